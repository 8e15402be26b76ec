r"""Denoising score matching of second order, for the likelihood of the ODE.

With the error ``e = eps_hat(alpha x_0 + sigma eps) - eps`` in D dimensions,

    loss = w(t) [ |e|^2 + (second/D) (sigma div_x eps_hat + |e|^2 - D)^2 ]

where the second ``|e|^2`` is held (no gradient). The bracket has the mean 0 given ``x`` for the
true score, as ``E[|e|^2 | x] = D - sigma div eps_hat`` then. Since ``sigma d/dx = d/d eps``, it is
``div_eps e + |e|^2``, and a probe ``v`` of signs gives it by one product, ``v^T (de/deps) v``.

In the velocity ``F = (eps - sigma x)/alpha`` of a VP process the term reads ``alpha^2 (sigma div F
- alpha (D - |F - F_hat|^2))^2``, and in ``F = (eps - x)/(sqrt(2) alpha)`` of the straight path
``2 alpha^2 (sigma div F - D/sqrt(2) + sqrt(2) alpha |F - F_hat|^2)^2``: i-DODE's, with its weight
0.1/D and its factor ``w alpha^2`` or ``2 w alpha^2`` on the error of ``F``. Both of its states are
processes here: VP in ``gamma = -2 log_snr`` and :class:`~scoresde.Linear` (alpha + sigma = 1).

Sources: Maximum Likelihood Training for Score-Based Diffusion ODEs by High-Order Denoising Score
Matching (Lu et al., 2022), https://arxiv.org/abs/2206.08265; Improved Techniques for Maximum
Likelihood Estimation for Diffusion ODEs (Zheng et al., 2023), https://arxiv.org/abs/2305.03935.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..model import Score
from ..noise import KeyedNoise, NoiseSource
from .objective import DSM, squared


@dataclass(frozen=True)
class SecondOrder(DSM):
    """The denoising loss with a term for the trace of the score's Jacobian.

    A step costs two to three times one of first order, and a network that ``torch.compile`` has
    compiled cannot be differentiated twice.

    Args:
        second: factor of the second-order term, over the number of dimensions.
    """

    weight: Any = "likelihood"
    times: Any = "importance"
    second: float = 0.1

    twice: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.second >= 0:
            raise ValueError(f"second must not be negative, got {self.second}")

    def loss(
        self,
        model: Score,
        x0: Tensor,
        time: Tensor,
        correction: Tensor,
        eps: Tensor,
        source: NoiseSource | None,
        cond: dict[str, Any],
    ) -> Tensor:
        """As in :class:`DSM`; signs given as ``probe`` take the place of drawn ones."""
        cond = dict(cond)
        probe = cond.pop("probe", None)
        probe = signs(eps, source) if probe is None else probe
        training = torch.is_grad_enabled()
        # Fused attention has no second derivative.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            eps = eps.detach().requires_grad_()
            error, c_out, _ = model.denoising_error(x0, eps, time, **cond)
            (product,) = torch.autograd.grad(error, eps, probe, create_graph=training)
        if not training:
            error = error.detach()
        first, trace = squared(error), (product * probe).flatten(1).sum(1)
        # e = c_out error: one power of c_out stays in the bracket, two are in the factor.
        bracket = trace + c_out.to(first.device, first.dtype, non_blocking=True) * first.detach()
        scale = self.second / x0[0].numel()
        factor = self.factor(model, time, correction, c_out, x0)
        return factor * (first + scale * bracket.square())


def signs(like: Tensor, source: NoiseSource | None) -> Tensor:
    """-1 or 1 with equal probability, of the shape of ``like``."""
    if isinstance(source, KeyedNoise):
        return source.rademacher(tuple(like.shape), like.device, like.dtype)
    home = source.device if source is not None else like.device
    bits = torch.randint(2, like.shape, generator=source, device=home)
    return (1 - 2 * bits).to(like.device, like.dtype)


__all__ = ["SecondOrder"]
