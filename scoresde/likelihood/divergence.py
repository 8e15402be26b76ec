r"""Divergence of a vector field by reverse-mode differentiation: exact, or estimated by probes.

    exact:       div f = sum_i  e_i^T (df/dz) e_i        D vector-Jacobian products
    Hutchinson:  div f = E_v[v^T (df/dz) v]              one product a probe,  E[v v^T] = I

Rademacher probes have variance ``2 |offdiag sym J|_F^2`` (nothing from the diagonal), Gaussian
ones ``2 |sym J|_F^2``. Both run the field once an evaluation and keep no graph afterwards; reverse
mode works through fused attention, where forward mode does not.

Sources: A stochastic estimator of the trace of the influence matrix for Laplacian smoothing
splines (Hutchinson, 1990), https://doi.org/10.1080/03610919008812866; FFJORD (Grathwohl et al.,
2019), https://arxiv.org/abs/1810.01367.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..config import unknown
from ..noise import KeyedNoise

Field = Callable[[Tensor], Tensor]
CHUNK = 32
"""Rows of the Jacobian that the exact divergence takes at once."""
EXACT_DIMS = 32
"""Up to this many dimensions ``divergence="auto"`` is exact."""
LIKELIHOOD_DRAW = 1 << 31
"""First draw of the probes: a sample drawn with the same seed never shares their noise."""


def draw_probes(
    like: Tensor, count: int, noise: str = "rademacher", seed: int = 0, start_index: int = 0
) -> Tensor:
    """Probes of shape ``(count, B, *shape)``, each sample's a function of seed and index alone.

    Args:
        like: the batch ``(B, *shape)`` whose shape, device and dtype they take.
        count: probes a sample, >= 1.
        noise: ``"rademacher"`` or ``"gaussian"``.
        seed: key of the noise.
        start_index: index of the batch's first sample.

    Raises:
        ValueError: an unknown noise, or a count below one.
    """
    if count < 1:
        raise ValueError(f"probes={count}: the Hutchinson estimate needs at least 1")
    source = KeyedNoise(seed, start_index)
    source.draw = LIKELIHOOD_DRAW
    kinds = {"rademacher": source.rademacher, "gaussian": source.normal}
    if noise not in kinds:
        raise unknown("noise", noise, kinds)
    shape = tuple(like.shape)
    return torch.stack([kinds[noise](shape, like.device, like.dtype) for _ in range(count)])


def hutchinson(field: Field, z: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
    """``f(z)`` of shape ``(B, *shape)``, and ``v^T (df/dz) v`` of each probe, ``(B, probes)``."""
    z, value = _record(field, z)
    estimates = []
    for i, probe in enumerate(probes):
        (product,) = torch.autograd.grad(value, z, probe, retain_graph=i + 1 < len(probes))
        estimates.append((product * probe).flatten(1).sum(1))
    return value.detach(), torch.stack(estimates, 1)


def exact(field: Field, z: Tensor, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """``f(z)`` of shape ``(B, *shape)``, and its divergence, ``(B, 1)``.

    Rows are taken ``chunk`` at a time by ``torch.vmap``, or one by one where an operation of the
    field has no batching rule (or where the chunk does not fit into memory).
    """
    z, value = _record(field, z)
    dims = z[0].numel()
    total, batched = z.new_zeros(len(z)), True
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
