"""Lists on the command line: ``heun,ddim:eta=0.5`` as sections, ``5,10`` as numbers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def numbers(texts: Iterable[str], option: str) -> list[int]:
    """``("5,10",)`` as ``[5, 10]``, each >= 1.

    Raises:
        ValueError: naming the option.
    """
    text = ",".join(texts)
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{option} takes whole numbers such as 5,10,20, got {text!r}")
    return list(dict.fromkeys(int(part) for part in parts))


def sections(texts: Iterable[str], kind: str) -> list[dict[str, Any]]:
    """``("heun,ddim:eta=0.5",)`` as ``[{"name": "heun"}, {"name": "ddim", "eta": 0.5}]``.

    Values are read as YAML; commas and colons inside brackets belong to a value.

    Raises:
        ValueError: naming the kind and the part that does not fit.
    """
    return [section(part, kind) for text in texts for part in parts(text)]


def parts(text: str) -> list[str]:
    """``"heun,ddim:eta=0.5"`` as ``["heun", "ddim:eta=0.5"]``."""
    return _split(text, ",")


def section(text: str, kind: str) -> dict[str, Any]:
    """``"ddim:eta=0.5"`` as ``{"name": "ddim", "eta": 0.5}``."""
    import yaml

    name, *pairs = _split(text, ":")
    found: dict[str, Any] = {"name": name}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"{kind} {text.strip()!r} is not of the form name:key=value")
        try:
            found[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"{kind} {text.strip()!r}: {value!r} is not valid YAML") from error
    return found


def _split(text: str, separator: str) -> list[str]:
    """The parts of a text outside brackets, without blanks around them."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{(") - (character in "]})")
        if character == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]
