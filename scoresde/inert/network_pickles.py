"""Network pickles of EDM and EDM2, as data: their source code is dropped, never run.

A network is a call of `torch_utils.persistence._reconstruct_persistent_obj(meta)`, whose `meta`
holds the source of a whole module, the name of the class and the object's `__dict__`. Only the
last two are kept, as a :class:`Persistent`; torch's own modules inside (`ModuleDict`) likewise.
Tensors are streams of `torch.save` within the pickle, read by the same strict reader.
T. Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022,
https://arxiv.org/abs/2206.00364.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import CheckpointError
from .bytes_of_file import Source, Window, opened
from .stand_ins import Persistent, Storage, numpy_and_builtins, tensors
from .torch_files import read_stream
from .unpickle import Global, bounded, unpickle

MAX_MODULES = 100_000  # a module that holds another twice, thirty times over, has 2^30 paths
MAX_DEPTH = 64


def read_persistent(path: str | Path) -> Any:
    """The content of an EDM or EDM2 network pickle, usually a dict with the network as `ema`.

    Args:
        path: a file `network-snapshot-*.pkl`.

    Returns:
        Plain dicts, lists, numbers and CPU tensors; objects as :class:`Persistent`.

    Raises:
        CheckpointError: for a missing, foreign, damaged or hostile file, in one line. A global
            outside the inert ones is named; it is never looked up, imported or called.
    """
    with opened(path) as window:
        if Window(window.source).read(2) == b"PK":
            raise CheckpointError("it is an archive of torch.save, not a plain pickle")
        return bounded(unpickle(window, _Table(window.source)))


def state_dict(module: Any) -> dict[str, Tensor]:
    """Parameters and persistent buffers by dotted names, in the order of the original's own.

    Raises:
        CheckpointError: if `module` is no module, or its parts are broken or endless.
    """
    found: dict[str, Tensor] = {}
    for count, (prefix, state) in enumerate(_modules(module, "", 0)):
        if count >= MAX_MODULES:
            raise CheckpointError("a module in the pickle has more parts than any network")
        hidden = state.get("_non_persistent_buffers_set")
        skipped: set[Any] = hidden if isinstance(hidden, set) else set()
        for kind in ("_parameters", "_buffers"):
            for name, value in _named(state, kind):
                if value is None or (kind == "_buffers" and name in skipped):
                    continue
                if not isinstance(value, Tensor) or prefix + name in found:
                    raise CheckpointError(
                        f"the pickle's {prefix + name} is no tensor, or twice there"
                    )
                found[prefix + name] = value
    return found


def init_args(module: Any) -> dict[str, Any]:
    """The arguments that built a persistent object, by name; positional ones as `_init_args`.

    Returns:
        a copy of the keyword arguments; with the list `_init_args` if there were others.

    Raises:
        CheckpointError: if `module` is no persistent object.
    """
    state = _state(module)
    named, others = state.get("_init_kwargs"), state.get("_init_args", ())
    if type(named) is not dict or type(others) not in (tuple, list):
        raise CheckpointError(f"a {module.class_name} in the pickle has no arguments stored")
    return named | ({"_init_args": list(others)} if others else {})


def _state(module: Any) -> dict[str, Any]:
    if not isinstance(module, Persistent):
        raise CheckpointError(
            f"a module was expected in the pickle, not a {type(module).__name__}"
        )
    return module.state


def _named(state: dict[str, Any], kind: str) -> Iterator[tuple[str, Any]]:
    held = state.get(kind)
    if type(held) is not dict or not all(type(name) is str for name in held):
        raise CheckpointError(f"a module in the pickle has no {kind}")
    yield from held.items()


def _modules(module: Any, prefix: str, depth: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """A module's state and those of its parts, with the prefix of their names."""
    if depth > MAX_DEPTH:
        raise CheckpointError("a module in the pickle contains itself")
    state = _state(module)
    yield prefix, state
    for name, part in _named(state, "_modules"):
        if part is not None:
            yield from _modules(part, f"{prefix}{name}.", depth + 1)


def _persistent(meta: Any) -> Persistent:
    name, state = meta.get("class_name"), meta.get("state")
    if meta.get("type") != "class" or type(name) is not str or type(state) is not dict:
        raise CheckpointError("it is damaged: a persistent object without a class or a state")
    return Persistent(name, state)


def _nested(source: Source, data: Any) -> Storage:
    """The storage in a stream within the pickle, read from the file straight into its place."""
    if type(data) is Window:
        window = Window(source, data.at, data.stop)
    elif type(data) is bytes:
        source.spend(len(data))
        window = Window(Source(BytesIO(data), len(data)))
    else:
        raise CheckpointError("it is damaged: the bytes of a tensor are none")
    storage = read_stream(window)
    if type(storage) is not Storage:
        raise CheckpointError("it is damaged: the bytes of a tensor hold something else")
    return storage


class _Table(dict[tuple[str, str], Any]):
    """The globals of network pickles; torch's modules, whatever their class, are inert."""

    def __init__(self, source: Source) -> None:
        super().__init__(tensors() | numpy_and_builtins(source))
        self["torch_utils.persistence", "_reconstruct_persistent_obj"] = Global(
            "_reconstruct_persistent_obj", _persistent
        )
        self["torch.storage", "_load_from_bytes"] = Global(
            "_load_from_bytes", partial(_nested, source)
        )
        self["dnnlib.util", "EasyDict"] = Global("dnnlib.util.EasyDict", lambda: {})

    def __missing__(self, key: tuple[str, str]) -> Global:
        module, name = key
        if module.startswith("torch.nn.modules.") and name.isidentifier():
            return Global(f"{module}.{name}", lambda: Persistent(f"{module}.{name}"))
        raise KeyError(key)
