"""A network no larger than the file that is to fill it, so that a few words of a description do
not take the machine's memory: ``width: 1000000000`` is refused before anything is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .config import ConfigError

TIMES, BESIDES = 4, 1 << 24
"""Elements a network may have for each that its file holds, and besides: tables that it makes."""
CALLS, AT_LEAST = 16, 1000
"""Tensors that it may make for each in its file, and at least."""


class Oversized(ConfigError):
    """A description of a network that is larger than its file."""


@contextmanager
def no_larger(tensors: Mapping[str, Any], file: Path) -> Iterator[None]:
    """Networks built in the block allocate what these tensors could fill, or nothing.

    Args:
        tensors: what the file holds, by name.
        file: for the message.

    Raises:
        Oversized: before the memory is taken.
    """
    held = [value.numel() for value in tensors.values() if isinstance(value, Tensor)]
    with _Allowance(TIMES * sum(held) + BESIDES, CALLS * len(held) + AT_LEAST) as allowance:
        try:
            yield
        except (ValueError, RuntimeError, MemoryError, OverflowError) as error:
            if not allowance.spent and not isinstance(error, (MemoryError, OverflowError)):
                raise
            raise Oversized(
                f"{file} holds {sum(held):,} numbers, and the network that is described for it "
                "is far larger"
            ) from error


class _Allowance(TorchDispatchMode):
    """Counts what operations without a tensor allocate, and refuses before they do."""

    def __init__(self, elements: int, calls: int) -> None:
        super().__init__()
        self.elements, self.calls = elements, calls

    @property
    def spent(self) -> bool:
        """Whether something was refused."""
        return self.elements < 0 or self.calls < 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs))):
            self.elements -= _elements(func, args, kwargs)
            self.calls -= 1
            if self.spent:
                raise ValueError("more than the file could fill")
        return func(*args, **kwargs)


def _elements(func: Any, args: Any, kwargs: Mapping[str, Any]) -> int:
    """How many elements an operation makes: by its size, or by making them without memory."""
    if args and isinstance(args[0], (list, tuple)):
        return math.prod(int(n) for n in args[0])
    if not any(argument.name == "device" for argument in func._schema.arguments):
        return 0
    made = func(*args, **{**kwargs, "device": torch.device("meta")})
    return int(made.numel()) if isinstance(made, Tensor) else 0
