"""What the globals of foreign checkpoints stand for: tensors checked, all else inert.

A tensor is a view of its storage, `x[i] = storage[offset + sum(i * stride)]`; the last element
must lie in the storage, and there are no more elements than the storage holds. NumPy's scalars
become Python numbers, its arrays tensors, parameters plain tensors, ordered dictionaries plain
ones. Whatever copies is paid from the source's allowance: a pickle can name the same bytes a
million times.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..files import CheckpointError
from .bytes_of_file import Source, Window
from .unpickle import Global, Stateful, Unbuilt

MAX_DIMS = 64  # torch's own limit

STORAGES = {
    "Float": torch.float32, "Double": torch.float64, "Half": torch.float16,
    "BFloat16": torch.bfloat16, "Long": torch.int64, "Int": torch.int32, "Short": torch.int16,
    "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool,
    "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128,
}  # fmt: skip
_CODE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|c8|c16|\?)")


@dataclass(frozen=True, eq=False)
class Storage:
    """The memory of tensors, `(nbytes,)` of uint8, and the type of its elements."""

    memory: Tensor
    dtype: torch.dtype


@dataclass(eq=False)
class Dtype(Stateful):
    """A type of NumPy: `kind` such as "f8", `order` "<", ">" or "|"."""

    kind: str
    order: str = "="

    def take(self, state: Any) -> None:
        """Keep the byte order, the only part of the state that plain types have."""
        plain = type(state) is tuple and len(state) >= 5 and state[2:5] == (None, None, None)
        if not plain or state[1] not in ("<", ">", "|", "="):
            raise CheckpointError("it holds a structured or object type of NumPy")
        self.order = state[1]

    def numpy(self) -> np.dtype[Any]:
        """The type itself."""
        return np.dtype(self.kind).newbyteorder(self.order)  # type: ignore[arg-type]


class Array(Unbuilt):
    """An array of NumPy before its state is known."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.source = source

    def built(self, state: Any) -> Tensor:
        """The array as a tensor; `state` is (version, shape, type, is Fortran order, bytes)."""
        _version, shape, dtype, fortran, data = state
        return _array(self.source, data, dtype, shape, "F" if fortran else "C")


@cache
def tensors() -> dict[tuple[str, str], Any]:
    """The globals of tensors, their types and the containers around them."""
    table: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): Global("collections.OrderedDict", _empty_dict),
        ("torch._utils", "_rebuild_tensor_v2"): Global("_rebuild_tensor_v2", _rebuild_v2),
        ("torch._utils", "_rebuild_tensor_v3"): Global("_rebuild_tensor_v3", _rebuild_v3),
        ("torch._utils", "_rebuild_parameter"): Global("_rebuild_parameter", _rebuild_parameter),
        ("torch", "device"): Global("torch.device", _device),
        ("torch", "Size"): Global("torch.Size", _whole_numbers),
        ("torch.storage", "UntypedStorage"): torch.uint8,
    }
    for name, dtype in STORAGES.items():
        table["torch", f"{name}Storage"] = dtype
    for dtype in {value for value in vars(torch).values() if isinstance(value, torch.dtype)}:
        table["torch", str(dtype).removeprefix("torch.")] = dtype
    return table


def numpy_and_builtins(source: Source) -> dict[tuple[str, str], Any]:
    """The globals of NumPy's scalars, arrays and types, and of bytes and sets in protocol 2."""

    def encode(text: Any, encoding: Any) -> bytes:
        if type(text) is not str or encoding != "latin1":
            raise CheckpointError("its pickle encodes what is no bytes")
        source.spend(len(text))
        return text.encode("latin1")

    def members(items: Any = ()) -> set[Any]:
        source.spend(len(items))
        if any(type(item) not in (str, int) for item in items):
            raise CheckpointError("its pickle holds a set of other things than names and numbers")
        return set(items)

    def reconstruct(kind: Any, shape: Any, code: Any) -> Array:
        if kind is not ndarray:
            raise CheckpointError("its pickle makes an array of an unknown class")
        return Array(source)

    def frombuffer(data: Any, dtype: Any, shape: Any, order: Any) -> Tensor:
        return _array(source, data, dtype, shape, order)

    def scalar(dtype: Any, data: Any) -> Any:
        return _array(source, data, dtype, (), "C").item()

    ndarray = Global("numpy.ndarray", _refused("numpy.ndarray"))
    table: dict[tuple[str, str], Any] = {
        ("_codecs", "encode"): Global("_codecs.encode", encode),
        ("__builtin__", "set"): Global("set", members),
        ("builtins", "set"): Global("set", members),
        ("numpy", "ndarray"): ndarray,
        ("numpy", "dtype"): Global("numpy.dtype", _dtype),
    }
    for core in ("numpy.core", "numpy._core"):  # before and after NumPy 2
        table[f"{core}.multiarray", "scalar"] = Global("numpy scalar", scalar)
        table[f"{core}.multiarray", "_reconstruct"] = Global("numpy _reconstruct", reconstruct)
        table[f"{core}.numeric", "_frombuffer"] = Global("numpy _frombuffer", frombuffer)
    return table


def _empty_dict() -> dict[Any, Any]:
    return {}


def _refused(name: str) -> Callable[..., Any]:
    def make(*arguments: Any) -> Any:
        raise CheckpointError(f"its pickle calls {name}")

    return make


def _device(kind: Any, index: Any = None) -> torch.device:
    if type(kind) is not str or type(index) not in (int, type(None)):
        raise CheckpointError("it is damaged: a device that is none")
    return torch.device(kind) if index is None else torch.device(kind, index)


def _whole_numbers(items: Any) -> tuple[int, ...]:
    """A shape or strides: at most 64 whole numbers that are not negative."""
    fits = type(items) in (tuple, list) and len(items) <= MAX_DIMS
    if not fits or not all(type(n) is int and n >= 0 for n in items):
        raise CheckpointError("it is damaged: sizes or strides of a tensor are no whole numbers")
    return tuple(items)


def _rebuild_v2(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, metadata: Any = None
) -> Tensor:
    dtype = storage.dtype if type(storage) is Storage else None
    return _rebuild_v3(storage, offset, size, stride, grad, hooks, dtype, metadata)


def _rebuild_v3(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    grad: Any,
    hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> Tensor:
    if type(storage) is not Storage or not isinstance(dtype, torch.dtype) or metadata:
        raise CheckpointError("it is damaged, or holds a tensor that is not a plain one")
    (offset,), size, stride = (
        _whole_numbers((offset,)),
        _whole_numbers(size),
        _whole_numbers(stride),
    )
    if len(size) != len(stride):
        raise CheckpointError("it is damaged: a tensor with other numbers of sizes and strides")
    held = len(storage.memory) // dtype.itemsize
    elements, last = 1, offset
    for n, step in zip(size, stride, strict=True):
        elements, last = elements * n, last + (n - 1) * step
    if elements and (last >= held or elements > held):
        raise CheckpointError(
            f"it declares a tensor of size {size} that exceeds its storage of {held} elements"
        )
    if not elements:
        return torch.empty(size, dtype=dtype)
    return storage.memory[: held * dtype.itemsize].view(dtype).as_strided(size, stride, offset)


def _rebuild_parameter(data: Any, grad: Any, hooks: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise CheckpointError("it is damaged: a parameter that is no tensor")
    return data


def _dtype(code: Any, *flags: Any) -> Dtype:
    if type(code) is not str or not _CODE.fullmatch(code):
        raise CheckpointError(f"it holds the type {str(code)[:50]!r} of NumPy, not one of numbers")
    return Dtype(code)


def _array(source: Source, data: Any, dtype: Any, shape: Any, order: Any) -> Tensor:
    """An array's bytes as a tensor in the order of its axes."""
    if type(dtype) is not Dtype or type(data) not in (bytes, Window) or order not in ("C", "F"):
        raise CheckpointError("it is damaged, or holds an array of objects")
    shape, numpy = _whole_numbers(shape), dtype.numpy()
    elements = 1
    for n in shape:
        elements *= n
    if elements * numpy.itemsize != len(data):
        raise CheckpointError(f"it declares an array of shape {shape} in {len(data)} bytes")
    if isinstance(data, Window):
        flat = Window(source, data.at, data.stop).copied(len(data)).numpy().view(numpy)
    else:
        source.spend(len(data))
        flat = np.frombuffer(data, numpy)
    native = flat.reshape(shape, order=order).astype(numpy.newbyteorder("="), order="C", copy=True)
    return torch.from_numpy(native)


@dataclass(eq=False)
class Persistent(Stateful):
    """An object of foreign code without its code: the name of its class and its attributes.

    Args:
        class_name: such as "EDMPrecond", or "torch.nn.modules.container.ModuleDict".
        state: its `__dict__`; of a module `_parameters`, `_buffers`, `_modules` and the rest.
    """

    class_name: str
    state: dict[str, Any] = field(default_factory=dict, repr=False)

    def take(self, state: Any) -> None:
        """Keep the attributes, once."""
        if type(state) is not dict or self.state:
            raise CheckpointError(
                f"its pickle sets the state of a {self.class_name} in a strange way"
            )
        self.state = state
