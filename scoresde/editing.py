r"""Editing: an item noised part of the way and drawn again, or carried from one model to another.

SDEdit adds the noise of a time ``t_0`` to a guide and samples from there: what the noise covers is
the model's to choose, what it leaves is the guide's.

    x_t0 = alpha(t_0) x_0 + sigma(t_0) eps,    then the reversed process from t_0 down

A bridge is two probability-flow ODEs, one model's from data to noise and another's back. It draws
nothing: each item of one law has one item of the other, and the way back leads to it again.

Sources: SDEdit: Guided Image Synthesis and Editing with Stochastic Differential Equations (Meng et
al., 2022), https://arxiv.org/abs/2108.01073; Dual Diffusion Implicit Bridges for Image-to-Image
Translation (Su et al., 2022), https://arxiv.org/abs/2203.08382.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .latents import Latents, decode, encode, rms
from .noise import KeyedNoise, normal
from .samples import Samples
from .sampling import initial, sample
from .sde.base import GaussianSDE, repeated
from .sde.vp import VP


def edit(
    score: Any,
    x0: Tensor,
    strength: float = 0.5,
    draws: int = 1,
    *,
    keep: Tensor | None = None,
    t_start: float | None = None,
    seed: int = 0,
    start_index: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **settings: Any,
) -> Samples:
    """Draws from a model near a guide: the guide noised to ``t_0``, and sampled from there.

    A guide of another style, a sketch, a collage or a mean becomes an item of the model. With
    Gaussian data ``N(m, s^2)`` and ``v^2 = alpha^2 s^2 + sigma^2`` at ``t_0``, the reverse SDE
    gives ``N(m + alpha^2 s^2/v^2 (x_0 - m), alpha^2 s^4 sigma^2/v^4 + s^2 sigma^2/v^2)``, and the
    ODE ``N(m + alpha s/v (x_0 - m), s^2 sigma^2/v^2)``.

    Args:
        score: ``score(x, t, **cond)`` that carries its ``sde``, guided or not.
        x0: guides in model range, floating point, ``(B, *shape)``.
        strength: how much is the model's to choose, in (0, 1]; see :func:`start_time`.
        draws: draws for each guide, each with noise of its own.
        keep: True where the guide stays as it is, of a shape that broadcasts to an item's: the
            rest alone is edited, by :class:`scoresde.inverse.Replacement`. None keeps nothing.
        t_start: the time ``t_0`` itself, instead of a strength.
        seed: seed of the noise added and of the solver's.
        start_index: index of the first draw, for a batch out of a longer series.
        device: device of the state; by default that of the score.
        dtype: float32 or float64, of the state; by default that of ``x0``.
        settings: ``solver``, ``steps``, ``grid``, ``t_end``, ``threshold`` and the like, and
            conditions, one value a guide, as for :func:`scoresde.sample`. ``steps`` are those from
            ``t_0`` down, all of them.

    Returns:
        Samples of shape ``(B * draws, *shape)``, the draws of a guide one after another; their
        ``t_start`` is ``t_0``.

    Raises:
        ValueError: a strength out of range or with no way to sample, fewer than one draw, or what
            :func:`scoresde.sample` refuses.

    Source: SDEdit: Guided Image Synthesis and Editing with Stochastic Differential Equations (Meng
    et al., 2022), https://arxiv.org/abs/2108.01073.
    """
    start = start_time(score.sde, strength) if t_start is None else float(t_start)
    end = settings.get("t_end")
    end = score.sde.t_min_sampling if end is None else float(end)
    if t_start is None and not end < start:
        raise ValueError(
            f"strength={strength:g} noises to t={start:.3g}, where sampling has ended "
            f"(t_end={end:g}): take a larger one"
        )
    x = noised(score, x0, start, draws, seed, start_index, device, dtype)
    if keep is not None:
        settings["solver"] = _keeping(score, keep, x0, draws, settings.get("solver"))
    return sample(
        score, x_T=x, t_start=start, seed=seed, start_index=start_index,
        device=device, dtype=dtype, **repeated(settings, draws),
    )  # fmt: skip


def _keeping(score: Any, keep: Tensor, x0: Tensor, draws: int, solver: Any) -> Any:
    """The solver, kept to the guides where ``keep`` says so."""
    from .inverse.mask import Mask
    from .inverse.replacement import Replacement

    mask = Mask(keep, tuple(x0.shape[1:]))
    solver = score.sde.default_solver if solver is None else solver
    return Replacement(mask, mask(x0).repeat_interleave(draws, 0), 0.0, solver=solver)


def start_time(sde: GaussianSDE, strength: float) -> float:
    """The time ``t_0`` that a strength stands for, the same amount of noise on every process.

    The strength is the time of the VP process with the linear schedule (``beta`` from 0.1 to 20),
    as in the paper, and ``t_0`` the time with its log-SNR, at most ``t_max``: 0.3 to 0.6 keeps
    the layout of a guide, 1 next to nothing of it.

    Args:
        sde: the process.
        strength: in (0, 1].

    Raises:
        ValueError: a strength out of range.
    """
    if not 0 < strength <= 1:
        raise ValueError(
            f"strength must lie in (0, 1], got {strength:g}: 0 would leave the guide as it is"
        )
    return min(float(sde.time(VP().log_snr(strength))), sde.t_max)


@torch.no_grad()
def noised(
    score: Any,
    x0: Tensor,
    t: float,
    draws: int = 1,
    seed: int = 0,
    start_index: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """What :func:`edit` starts from: ``alpha x_0 + sigma eps``, ``(B * draws, *shape)``.

    The noise is keyed by the seed and the index of the draw, apart from that of a solver's steps.

    Raises:
        ValueError: fewer than one draw, a time out of range, or guides that are no finite floats.
    """
    sde = score.sde
    if draws < 1:
        raise ValueError(f"editing needs draws >= 1, got {draws}")
    if not sde.t_min <= t <= sde.t_max:
        raise ValueError(
            f"t_start={t:g} lies outside the trained times [{sde.t_min:g}, {sde.t_max:g}]"
        )
    if not x0.is_floating_point() or not bool(x0.isfinite().all()):
        raise ValueError(
            f"editing needs finite floating-point guides in model range, got {x0.dtype}"
            + ("" if x0.is_floating_point() else ": take integer data there by scaler.encode(x)")
        )
    x0 = initial(score, sde, KeyedNoise(0), None, x0, device, dtype)
    x0 = x0.repeat_interleave(draws, 0)
    eps = normal(tuple(x0.shape), KeyedNoise(seed, start_index), device=x0.device, dtype=x0.dtype)
    return sde.perturb(x0, t, eps)


@dataclass(frozen=True, eq=False)
class Bridge:
    """Items carried from one model to another, and how.

    Args:
        x: the items, ``(B, *shape)``, in the target's model range.
        latents: those of the source, with evaluations and settings.
        samples: the decoded items with theirs.
        back: the items carried there and back, in the source's model range; None if that was not
            asked for.
        cycle: root mean square over an item of what the way there and back changed, in the
            source's model range, ``(B,)``; None likewise.
        message: what happened, of the way there or back, where a solver did not arrive.
    """

    x: Tensor
    latents: Latents
    samples: Samples
    back: Tensor | None
    cycle: Tensor | None
    message: str

    @property
    def converged(self) -> bool:
        """Whether every solver arrived with finite values."""
        return not self.message


def bridge(
    source: Any,
    target: Any,
    x: Tensor,
    *,
    source_cond: Mapping[str, Any] | None = None,
    target_cond: Mapping[str, Any] | None = None,
    cycle: bool = True,
    **settings: Any,
) -> Bridge:
    """Items of one model as items of another: encoded with the first, decoded with the second.

    Between ``N(m, S)`` and ``N(n, T)`` with covariances that commute, the bridge is the optimal
    transport map ``n + T^(1/2) S^(-1/2) (x - m)``, up to what is left of the data at ``t_max``.

    The models may have processes of their own: latents are scaled by the ratio of what data of
    unit variance have become at ``t_max``, ``sqrt(alpha^2 + sigma^2)``. Model ranges are each
    model's own: ``source.scaler.encode`` takes data to the one, ``target.scaler.decode`` the
    result to data.

    Args:
        source: score of the items' law, which carries its ``sde``; guided or not.
        target: score of the law to carry them to, for items of the same shape.
        x: items in the source's model range, floating point, ``(B, *shape)``.
        source_cond: conditions of the source, one value an item.
        target_cond: conditions of the target. The same model under two labels is a bridge too.
        cycle: whether to go back as well and report what that changed, at twice the cost.
        settings: ``solver`` (a deterministic one), ``steps``, ``grid``, ``progress`` and the like,
            as for :func:`scoresde.encode`; they hold for both models.

    Raises:
        ValueError: models of two shapes, or what :func:`scoresde.encode` refuses.

    Source: Dual Diffusion Implicit Bridges for Image-to-Image Translation (Su et al., 2022),
    https://arxiv.org/abs/2203.08382.
    """
    one, other = (getattr(score, "shape", None) for score in (source, target))
    if one is not None and other is not None and tuple(one) != tuple(other):
        raise ValueError(
            f"a bridge needs two models of one shape, got items of {tuple(one)} "
            f"and of {tuple(other)}"
        )
    ratio = _spread(target.sde) / _spread(source.sde)
    here, there = dict(source_cond or {}), dict(target_cond or {})
    latents = encode(source, x, **settings, **here)
    samples = decode(target, latents.z * ratio, **settings, **there)
    messages = [latents.message, samples.message]
    back = error = None
    if cycle:
        returned = encode(target, samples.x, **settings, **there)
        undone = decode(source, returned.z / ratio, **settings, **here)
        back, error = undone.x, rms(undone.x - x.to(undone.x))
        messages += [returned.message, undone.message]
    return Bridge(samples.x, latents, samples, back, error, "; ".join(filter(None, messages)))


def _spread(sde: GaussianSDE) -> float:
    """Standard deviation at ``t_max`` of data of unit variance: near ``prior_std``, and exact."""
    return math.hypot(float(sde.alpha(sde.t_max)), float(sde.sigma(sde.t_max)))


__all__ = ["Bridge", "bridge", "edit", "noised", "start_time"]
