"""Names and sections of a configuration, checked against the classes that they configure.

A section such as ``{name: vp, beta_max: 20}`` is a class and its own fields. Names resolve against
a package's ``__all__`` (``VP`` is ``vp``, ``EulerMaruyama`` is ``euler-maruyama``) or, with a dot,
to a user's own class; values are checked against the fields' types.

A name alone imports nothing, since it may come with a model from elsewhere: the module has to be
imported already, or be listed in the environment, ``SCORESDE_IMPORT=mynets,other.module``. Names
that a user types, in ``--config`` and ``--set``, are imported.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import os
import re
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

from .unrolled import LIMIT, unrolled

SECTIONS = (
    "sde",
    "parameterization",
    "net",
    "given",
    "data",
    "objective",
    "training",
    "sampling",
    "likelihood",
)


ALLOWED = "SCORESDE_IMPORT"
"""Variable of the environment: modules whose classes a model's files may name."""


class ConfigError(ValueError):
    """A name, key or value of a configuration that does not fit, said in one line."""


def unknown(kind: str, name: object, accepted: Iterable[str]) -> ConfigError:
    """The error for a name that is none of the accepted ones, with the nearest of them."""
    accepted = sorted(accepted)
    near = difflib.get_close_matches(str(name).lower(), accepted, 1, 0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return ConfigError(f"unknown {kind} {name!r}; {hint}accepted: {', '.join(accepted) or 'none'}")


def kebab(cls: type) -> str:
    """The name of a class on the command line: its ``name``, or its own name in kebab-case."""
    own = cls.__dict__.get("name")
    if isinstance(own, str):
        return own
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1-\2", cls.__name__)
    return re.sub(r"([A-Z])([A-Z][a-z])", r"\1-\2", words).lower()


@cache
def names(package: ModuleType) -> dict[str, type]:
    """The concrete classes of a package's ``__all__`` by kebab-case name."""
    members = (getattr(package, name) for name in package.__all__)
    classes = (m for m in members if isinstance(m, type) and dataclasses.is_dataclass(m))
    return {kebab(c): c for c in classes if not getattr(c, "__abstractmethods__", None)}


def resolve(name: str, package: ModuleType, kind: str) -> type:
    """The class called ``name``, in the package or at a dotted path.

    Raises:
        ConfigError: naming the accepted names and the nearest of them.
    """
    known = names(package)
    key = str(name).replace("_", "-").lower()
    if key in known:
        return known[key]
    squeezed = {n.replace("-", ""): c for n, c in known.items()}
    if key.replace("-", "") in squeezed:
        return squeezed[key.replace("-", "")]
    if "." in str(name):
        module, _, attribute = str(name).rpartition(".")
        if module in os.environ.get(ALLOWED, "").split(","):
            _import(module, name)
        if module not in sys.modules:
            raise ConfigError(
                f"{kind} {name!r} cannot be imported by its name alone: import {module} before, "
                f"or allow it in the environment, {ALLOWED}={module}"
            )
        found = vars(sys.modules[module]).get(attribute)  # no lookup that could run a module's own
        if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
            raise ConfigError(f"{kind} {name!r} is not a dataclass")
        return found
    raise unknown(kind, name, known)


def _import(module: str, name: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{name!r} cannot be imported: {error}") from error


def _import_named(content: Any) -> None:
    """Imports the modules of the dotted names in what a user has typed."""
    if isinstance(content, Mapping):
        name = content.get("name")
        if isinstance(name, str) and "." in name:
            _import(name.rpartition(".")[0], name)
        for value in content.values():
            _import_named(value)


def validate(cls: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``values`` coerced to the field types of ``cls`` (so that YAML's ``1e-4`` is a number).

    Raises:
        ConfigError: for an unknown key or a value of the wrong type, naming key and class.
    """
    import pydantic

    hints = get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for key in values:
        if key not in fields:
            raise unknown(f"key {where}.{key} of {cls.__name__}:", key, fields)
    given = {k: (hints[k], ...) for k in values}
    schema = pydantic.create_model(  # type: ignore[call-overload]
        cls.__name__,
        __config__=pydantic.ConfigDict(arbitrary_types_allowed=True, protected_namespaces=()),
        **given,
    )
    try:
        checked = schema(**values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        wanted = first["msg"][0].lower() + first["msg"][1:].replace("valid tuple", "list")
        raise ConfigError(f"{where}.{key}: {wanted}, got {values[key]!r}") from error
    return {key: getattr(checked, key) for key in values}


def build(section: Any, package: ModuleType, kind: str, **fixed: Any) -> Any:
    """The object that a section describes.

    Args:
        section: an object (returned as it is), a name, or a mapping with ``name`` and fields.
        package: where names resolve.
        kind: what the section is, for messages ("sde", "solver").
        fixed: fields that the caller sets, over those of the section.

    Raises:
        ConfigError: one line that names the key and what is accepted.
    """
    if isinstance(section, str):
        section = {"name": section}
    if not isinstance(section, Mapping):
        return section
    values = {k: v for k, v in section.items() if k != "name"}
    if "name" not in section:
        raise ConfigError(f"{kind} needs a name; accepted: {', '.join(sorted(names(package)))}")
    cls = resolve(section["name"], package, kind)
    return construct(cls, values, kind, **fixed)


def construct(cls: type, values: Mapping[str, Any], where: str, **fixed: Any) -> Any:
    """``cls(**values)`` after :func:`validate`, a refused value reported as ConfigError."""
    checked = validate(cls, values, where)
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.init
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
        and f.name not in {**checked, **fixed}
    ]
    if missing:
        raise ConfigError(f"{where} {class_name(cls)!r} needs {', '.join(missing)}")
    try:
        return cls(**{**checked, **fixed})
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def describe(thing: Any) -> dict[str, Any]:
    """The section that rebuilds ``thing``: its name and every field, ready for YAML.

    A field of tensors says what stands for it by its ``metadata["described"]``: a function of its
    value, or None to be left out.
    """
    told = {
        f.name: f.metadata.get("described", _plain) for f in dataclasses.fields(thing) if f.init
    }
    fields = {name: plain(getattr(thing, name)) for name, plain in told.items() if plain}
    return {"name": class_name(type(thing)), **fields}


def changed(thing: Any) -> dict[str, Any]:
    """The fields of ``thing`` that differ from their defaults, or have none."""
    try:
        usual = type(thing)()
    except TypeError:  # a field without a default, which is always said
        usual = None
    found = {}
    for f in dataclasses.fields(thing):
        plain = f.metadata.get("described", lambda value: value)
        if not f.init or plain is None:
            continue
        value = plain(getattr(thing, f.name))
        if value != getattr(usual, f.name, f.default):
            found[f.name] = value
    return found


def class_name(cls: type) -> str:
    """Kebab-case name of a class of this toolkit, dotted path of any other."""
    inside = cls.__module__.split(".")[0] == __name__.split(".")[0]
    return kebab(cls) if inside else f"{cls.__module__}.{cls.__qualname__}"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return describe(value)
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """A configuration file as a mapping of sections.

    Raises:
        ConfigError: if the file is missing, is not YAML, or has an unknown section.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {str(error).splitlines()[0]}") from error
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deeply") from error
    if unrolled(content) > LIMIT:
        raise ConfigError(f"{path} says more than any configuration, by repeating its parts")
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a mapping of sections: {', '.join(SECTIONS)}")
    return content


def read_config(path: Path | None) -> dict[str, Any]:
    """The sections of a user's file, none without one; an empty section is an empty mapping.

    Raises:
        ConfigError: as :func:`read_yaml`, and for a section that is unknown or no mapping.
    """
    content = read_yaml(path) if path is not None else {}
    content = {section: {} if value is None else value for section, value in content.items()}
    check_sections(content)
    _import_named(content)
    return {section: dict(value) for section, value in content.items()}


def check_sections(config: Mapping[str, Any], accepted: Iterable[str] = SECTIONS) -> None:
    """Refuses sections that are unknown or are not mappings."""
    accepted = tuple(accepted)
    for key, value in config.items():
        if key not in accepted:
            raise unknown("section", key, accepted)
        if not isinstance(value, Mapping):
            raise ConfigError(f"section {key!r} must be a mapping, got {value!r}")


def override(config: dict[str, Any], setting: str) -> None:
    """Applies ``section.key=value`` (value read as YAML) to ``config`` in place."""
    import yaml

    path, equals, text = setting.partition("=")
    section, dot, key = path.strip().partition(".")
    if not equals or not dot or not key:
        raise ConfigError(f"--set {setting!r} is not of the form section.key=value")
    if section not in SECTIONS:
        raise unknown("section", section, SECTIONS)
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {setting!r}: the value is not valid YAML") from error
    _import_named({key: value})
    config.setdefault(section, {})[key] = value


def merge(base: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the sections of ``extra`` laid over it.

    A section that names another class replaces the base's section whole, since its keys are not
    that class's.
    """
    merged = {section: dict(values) for section, values in base.items()}
    for section, values in extra.items():
        old = merged.get(section, {})
        renamed = "name" in values and values["name"] != old.get("name")
        merged[section] = dict(values) if renamed else {**old, **values}
    return merged
