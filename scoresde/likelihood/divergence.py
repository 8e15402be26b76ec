r"""Divergence of a vector field by reverse-mode differentiation: exact, or estimated by probes.

    exact:       div f = sum_i  e_i^T J e_i,   J = df/dz       D vector-Jacobian products
    Hutchinson:  div f = E_v[v^T J v],         E[v v^T] = I    one product a probe

With ``S = (J + J^T)/2`` and ``off S`` its entries off the diagonal, one probe has the variance

    rademacher, walsh   2 |off S|_F^2      nothing from the diagonal
    gaussian            2 |S|_F^2

and the mean of ``k`` a ``k``-th of it, of Walsh ones ``2 sum S_pq^2`` over the pairs ``p != q``
that all their signs leave alike (for ``k`` a power of 2). Reverse mode works through fused
attention, where forward mode does not; probes one by one cost a CPU no more than a batch of them.
Left out, as at equal products they lose to ``walsh`` along a network's path: the sphere
(``2 D/(D + 2) (|S|_F^2 - (tr S)^2/D)``), orthogonal directions (``1 - (k - 1)/(D - 1)`` of its
``k``-th), Hutch++, XTrace, and a Gaussian control variate (benchmarks/divergence_estimators.py).

Sources: A stochastic estimator of the trace of the influence matrix for Laplacian smoothing
splines (Hutchinson, 1990), https://doi.org/10.1080/03610919008812866; FFJORD (Grathwohl et al.,
2019), https://arxiv.org/abs/1810.01367; Hierarchical probing for estimating the trace of the
matrix inverse on toroidal lattices (Stathopoulos et al., 2013), https://arxiv.org/abs/1302.4018.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..config import unknown
from ..noise import KeyedNoise

Field = Callable[[Tensor], Tensor]
MEMORY = 1 << 28
"""Bytes that the rows of the Jacobian which the exact divergence takes at once may need."""
GRADIENTS = 6
"""Gradients, as large as the largest, that a backward pass holds at once (measured on a U-Net)."""
EXACT_DIMS = 32
"""Up to this many dimensions ``divergence="auto"`` is exact."""
LIKELIHOOD_DRAW = 1 << 31
"""First draw of the probes: a sample drawn with the same seed never shares their noise."""
NOISES = ("gaussian", "rademacher", "walsh")
"""Distributions of the probes."""


def draw_probes(
    like: Tensor, count: int, noise: str = "rademacher", seed: int = 0, start_index: int = 0
) -> Tensor:
    """Probes of shape ``(count, B, *shape)``, each sample's a function of seed and index alone.

    The first probes are the same whatever the count.

    Args:
        like: the batch ``(B, *shape)`` whose shape, device and dtype they take.
        count: probes a sample, >= 1.
        noise: ``"rademacher"``, signs; ``"gaussian"``; ``"walsh"``, one draw of signs times the
            first Walsh functions (:func:`walsh`), new signs when these are used up: their mean
            errs less, and ``std/sqrt(k)`` says too much where neighbours depend on each other.
        seed: key of the noise.
        start_index: index of the batch's first sample.

    Raises:
        ValueError: an unknown noise, or a count below one.
    """
    if noise not in NOISES:
        raise unknown("noise", noise, NOISES)
    if count < 1:
        raise ValueError(f"probes={count}: the Hutchinson estimate needs at least 1")
    shape, source = tuple(like.shape), KeyedNoise(seed, start_index)
    source.draw = LIKELIHOOD_DRAW
    if noise == "walsh":
        total = 1 << _code(shape[1:])[1]
        bases = [source.rademacher(shape, like.device, like.dtype) for _ in range(0, count, total)]
        return torch.stack([bases[i // total] * walsh(i, like) for i in range(count)])
    draw = source.rademacher if noise == "rademacher" else source.normal
    return torch.stack([draw(shape, like.device, like.dtype) for _ in range(count)])


def walsh(number: int, like: Tensor) -> Tensor:
    """Signs ``(-1)^(bits that number and the place's code share)`` of shape ``(*shape)``.

    The code interleaves the bits of the coordinates, lowest first, of the last axis first: the
    functions 0 and 1 part neighbours along it, 0 to 3 those along the last two, and so on. Over
    all of them, at least D and less than ``2 n`` an axis, every pair of places cancels. Probes
    that are multiplied by the next function at each point of a grid stay probes, and what they
    err by cancels along the grid.

    Args:
        number: which function, >= 0; they repeat when used up.
        like: the batch ``(B, *shape)``.
    """
    code, _ = _code(tuple(like.shape[1:]))
    shared = code & number
    for fold in (32, 16, 8, 4, 2, 1):
        shared = shared ^ (shared >> fold)
    return (1 - 2 * (shared & 1)).to(like.device, like.dtype)


def turned(probes: Tensor, point: int, noise: str) -> Tensor:
    """Probes ``(k, B, *shape)`` with the signs that they have at a point of a grid.

    An ODE's right-hand side must keep its probes, a sum over points need not: with signs that turn
    the variance falls as if each point had a probe of its own, and further (by 30 on a network,
    benchmarks/divergence_estimators.py).
    """
    apart = len(probes) if noise == "walsh" else 1  # those are Walsh functions of each other
    return probes * walsh(point * apart, probes[0])


def hutchinson(field: Field, z: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
    """``f(z)`` of shape ``(B, *shape)``, and ``v^T (df/dz) v`` of each probe, ``(B, probes)``."""
    z, value = _record(field, z)
    estimates = []
    for i, probe in enumerate(probes):
        (product,) = torch.autograd.grad(value, z, probe, retain_graph=i + 1 < len(probes))
        estimates.append((product * probe).flatten(1).sum(1))
    return value.detach(), torch.stack(estimates, 1)


def exact(field: Field, z: Tensor, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """``f(z)`` of shape ``(B, *shape)``, and its divergence, ``(B, 1)``.

    Rows are taken ``chunk`` at a time by ``torch.vmap``, as many as :data:`MEMORY` holds if None,
    or one by one where an operation of the field has no batching rule (or where the chunk does
    not fit into memory).
    """
    z, value = _record(field, z)
    dims = z[0].numel()
    if chunk is None:
        chunk = min(dims, max(1, MEMORY // _row_bytes(value, z)))
    total, batched = z.new_zeros(len(z)), chunk > 1
    for start in range(0, dims, chunk):
        rows = range(start, min(start + chunk, dims))
        if batched:
            try:
                total += _diagonal(value, z, rows, batched=True)
                continue
            except RuntimeError:
                batched = False
        for row in rows:
            total += _diagonal(value, z, [row], batched=False)
    return value.detach(), total[:, None]


def _record(field: Field, z: Tensor) -> tuple[Tensor, Tensor]:
    """``z`` as a leaf, and ``f(z)`` with its graph."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        value = field(z)
    if not value.requires_grad:
        raise ValueError(
            "the score is not differentiable in x, which its divergence needs: "
            "remove the no_grad, detach or NumPy call inside it"
        )
    return z, value


def _row_bytes(value: Tensor, z: Tensor) -> int:
    """About what the backward pass of one row needs at its peak: a few of its largest gradient.

    Gradients are as large as what the graph's nodes gave; those of weights alone are not taken.
    """
    users: dict[Any, list[Any]] = {value.grad_fn: []}
    waiting, reached = [value.grad_fn], []
    while waiting:
        node = waiting.pop()
        if getattr(node, "variable", None) is z:
            reached.append(node)
        for before, _ in node.next_functions if node is not None else ():
            if before is not None:
                if before not in users:
                    waiting.append(before)
                users.setdefault(before, []).append(node)
    largest, seen = z.numel() * z.element_size(), set(reached)
    while reached:
        node = reached.pop()
        for gradient in getattr(node, "_input_metadata", ()):
            largest = max(largest, math.prod(gradient.shape) * gradient.dtype.itemsize)
        reached += (fresh := [user for user in users[node] if user not in seen])
        seen.update(fresh)
    return GRADIENTS * largest


def _diagonal(value: Tensor, z: Tensor, rows: Sequence[int], batched: bool) -> Tensor:
    """``sum over rows i of df_i/dz_i``, shape ``(B,)``."""
    index = torch.tensor(list(rows), device=z.device)
    onehot = torch.nn.functional.one_hot(index, z[0].numel()).to(z)
    directions = onehot[:, None, :].expand(-1, len(z), -1).reshape(-1, *z.shape)
    (products,) = torch.autograd.grad(
        value,
        z,
        directions if batched else directions[0],
        retain_graph=True,
        is_grads_batched=batched,
    )
    return (products.reshape(len(index), len(z), -1) * onehot[:, None, :]).sum((0, 2))


@lru_cache
def _code(shape: tuple[int, ...]) -> tuple[Tensor, int]:
    """The number of each place, ``shape``, and how many bits it has.

    Its bits are the lowest of the coordinates, last axis first, then their second bits and so on.
    """
    axes = torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")
    code, bits = torch.zeros(shape, dtype=torch.int64), 0
    for level in range(max((n - 1).bit_length() for n in shape)):
        for axis, n in zip(reversed(axes), reversed(shape), strict=True):
            if n > 1 << level:
                code += ((axis >> level) & 1) << bits
                bits += 1
    return code, bits
