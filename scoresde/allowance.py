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
from torch.utils._pytree import tree_leaves, tree_map_only

from .files import CheckpointError

TIMES, BESIDES = 4, 1 << 24
"""Elements a network may have for each that its file holds, and besides: tables that it makes."""
CALLS, AT_LEAST = 16, 1000
"""Tensors that it may make for each in its file, and at least."""


@contextmanager
def no_larger(tensors: Mapping[str, Any], file: Path) -> Iterator[None]:
    """Networks built in the block allocate what these tensors could fill, or nothing.

    Args:
        tensors: what the file holds, by name.
        file: for the message.

    Raises:
        CheckpointError: before the memory is taken.
    """
    held = [value.numel() for value in tensors.values() if isinstance(value, Tensor)]
    with _Allowance(TIMES * sum(held) + BESIDES, CALLS * len(held) + AT_LEAST) as allowance:
        try:
            yield
        except (ValueError, RuntimeError) as error:
            if not allowance.spent:
                raise
            raise CheckpointError(
                f"{file} holds {sum(held):,} numbers, and the network that is described for it "
                "is far larger"
            ) from error


class _Allowance(TorchDispatchMode):
    """Counts what operations allocate, and refuses before they do."""

    def __init__(self, elements: int, calls: int) -> None:
        super().__init__()
        self.elements, self.calls = elements, calls

    @property
    def spent(self) -> bool:
        """Whether something was refused."""
        return self.elements < 0 or self.calls < 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.elements -= _elements(func, args, kwargs)
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs))):
            self.calls -= 1
        if self.spent:
            raise ValueError("more than the file could fill")
        return func(*args, **kwargs)


def _elements(func: Any, args: Any, kwargs: Mapping[str, Any]) -> int:
    """How many elements an operation makes: by its size, or by making them without memory.

    What is made of other tensors counts where it is larger than all of them: tables, not copies.
    """
    if func._schema.is_mutable:
        return 0
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if not given and args and isinstance(args[0], (list, tuple)):
        return math.prod(int(n) for n in args[0])
    if not given and all(argument.name != "device" for argument in func._schema.arguments):
        return 0
    if not given:
        kwargs = {**kwargs, "device": torch.device("meta")}
    try:
        made = func(
            *tree_map_only(Tensor, _without_memory, args),
            **tree_map_only(Tensor, _without_memory, kwargs),
        )
    except (NotImplementedError, RuntimeError):  # what depends on values makes one, not many
        return 0
    sizes = [leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
    size = max(sizes, default=0)
    return size if size > max((t.numel() for t in given), default=0) else 0


def _without_memory(tensor: Tensor) -> Tensor:
    return tensor.to("meta")
