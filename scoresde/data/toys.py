"""Two-dimensional toy distributions, drawn in closed form from a seed.

Each has a spread of about 1 to 2 in both entries, so that it can be used with or without a
scaler. `moons`, `rings` and `mixture8` carry their part as the class label.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from scoresde.data.dataset import DataError, Dataset

Draw = Callable[[int, Generator], tuple[Tensor, Tensor | None]]


def _polar(radius: Tensor | float, angle: Tensor) -> Tensor:
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)


def _moons(n: int, g: Generator) -> tuple[Tensor, Tensor | None]:
    """Two half circles of radius 1, facing each other, with noise 0.08."""
    y = torch.randint(2, (n,), generator=g)
    x = _polar(1.0, math.pi * (torch.rand(n, generator=g) + y))
    x = x + (y[:, None] - 0.5) * torch.tensor([1.0, 0.5])
    return x + 0.08 * torch.randn(n, 2, generator=g), y


def _rings(n: int, g: Generator) -> tuple[Tensor, Tensor | None]:
    """Three circles of radius 0.5, 1.25 and 2, as likely as each other, with noise 0.06."""
    y = torch.randint(3, (n,), generator=g)
    x = _polar(0.5 + 0.75 * y, 2 * math.pi * torch.rand(n, generator=g))
    return x + 0.06 * torch.randn(n, 2, generator=g), y


def _checkerboard(n: int, g: Generator) -> tuple[Tensor, Tensor | None]:
    """Uniform on the eight unit squares of [-2, 2]^2 where `floor(x0) + floor(x1)` is even."""
    row = torch.randint(-2, 2, (n,), generator=g)
    column = 2 * torch.randint(-1, 1, (n,), generator=g) + row.remainder(2)
    return torch.stack([column, row], dim=1) + torch.rand(n, 2, generator=g), None


def _mixture8(n: int, g: Generator) -> tuple[Tensor, Tensor | None]:
    """Eight Gaussians of standard deviation 0.15 on a circle of radius 2."""
    y = torch.randint(8, (n,), generator=g)
    return _polar(2.0, math.pi / 4 * y) + 0.15 * torch.randn(n, 2, generator=g), y


def _swissroll(n: int, g: Generator) -> tuple[Tensor, Tensor | None]:
    """The spiral of radius `angle / 6` for angles of 1.5 pi to 4.5 pi, with noise 0.05."""
    angle = 1.5 * math.pi * (1 + 2 * torch.rand(n, generator=g))
    return _polar(angle / 6, angle) + 0.05 * torch.randn(n, 2, generator=g), None


TOYS: dict[str, Draw] = {
    "moons": _moons,
    "rings": _rings,
    "checkerboard": _checkerboard,
    "mixture8": _mixture8,
    "swissroll": _swissroll,
}
PARTS = {
    "moons": ("upper", "lower"),
    "rings": ("inner", "middle", "outer"),
    "mixture8": ("0", "1", "2", "3", "4", "5", "6", "7"),
}


def toy(name: str, n: int = 20000, seed: int = 0) -> Dataset:
    """Draw `n` points `(n, 2)`, float32, of the toy distribution `name`.

    Raises:
        DataError: an unknown name, or `n` below 1.
    """
    if name not in TOYS:
        near = difflib.get_close_matches(name, TOYS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(f"no toy is called {name!r}{hint} (there are {', '.join(TOYS)})")
    if n < 1:
        raise DataError(f"toy {name}: n is {n}; it must be at least 1")
    x, y = TOYS[name](n, torch.Generator().manual_seed(seed))
    return Dataset(x, y, name=name, class_names=None if y is None else PARTS[name])
