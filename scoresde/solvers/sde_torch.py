r"""The reverse SDE by torchsde, on the steps of any grid.

torchsde wants an increasing time and a flat state, so it is given ``u = -t``:

    dy = -drift(y, -u) du + diffusion(-u) dw,    y of shape (B, D)

The noise depends on time alone, so Ito and Stratonovich agree and both families of methods apply.

The Brownian motion is the sample's own :class:`scoresde.brownian.BrownianPath`, whose clock is the
log-SNR: its increment over a step, rescaled to the variance that the step has in t. That has the
right law, and to first order it is the same motion, so a sample is the same in any batch and every
method and number of steps approaches one end point, the one of the other solvers on that path.
The space-time area that ``srk`` asks for is a draw of its own, keyed by sample and step.

Source: Scalable Gradients for Stochastic Differential Equations (Li et al., 2020),
https://arxiv.org/abs/2001.01328; https://github.com/google-research/torchsde.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..brownian import PathNoise, path_of
from ..config import unknown
from ..noise import NoiseSource
from ..sde.base import Reverse
from .base import Solver, gaussian, increment

_METHODS = {
    "euler": ("ito", 1.0, 1),
    "milstein": ("ito", 1.0, 1),
    "srk": ("ito", 2.0, 4),
    "midpoint": ("stratonovich", 1.0, 2),
    "heun": ("stratonovich", 2.0, 2),
    "euler_heun": ("stratonovich", 1.0, 1),
    "reversible_heun": ("stratonovich", 1.0, 1),
}
"""Kind of integral, weak order for noise that depends on time alone, evaluations a step.

``midpoint`` and ``reversible_heun`` gain an order where the drift is linear: on Gaussian data."""


class Carried(NamedTuple):
    """What a step leaves to the next: the noise, and the method's own state (torchsde's extra)."""

    noise: PathNoise
    extra: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class TorchSDE(Solver):
    """torchsde's methods, one call a step, on Brownian motions that do not depend on the batch.

    ``reversible_heun`` takes one evaluation more, in its first step. It is hardly stable: its two
    states part, by a factor of e or so in each unit of log-SNR, and on a mixture in VP hundreds of
    steps are too few. ``heun`` is the method to take.

    Args:
        method: ``euler``, ``milstein``, ``srk``, ``midpoint``, ``heun``, ``euler_heun`` or
            ``reversible_heun``.
    """

    method: str = "euler"

    name: ClassVar[str] = "torchsde"
    stochastic: ClassVar[bool] = True
    brownian: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.method not in _METHODS:
            raise unknown("method of TorchSDE", self.method, _METHODS)
        _, order, nfe = _METHODS[self.method]
        object.__setattr__(self, "order", order)
        object.__setattr__(self, "nfe_per_step", nfe)

    def init(
        self, reverse: Reverse, x: Tensor, times: Tensor, noise: NoiseSource | None
    ) -> Carried:
        """The path of the noise's seed."""
        return Carried(path_of(noise))

    def shifted(self, state: Carried | None, change: Tensor) -> Carried | None:
        """The method begins anew where it is: its second state has not moved."""
        return None if state is None else Carried(state.noise)

    def step(
        self,
        reverse: Reverse,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        noise: NoiseSource | None,
        state: Carried | None = None,
    ) -> tuple[Tensor, Carried]:
        """One step of the method from ``t`` to ``s``, shape ``()``."""
        from torchsde import sdeint

        if t.ndim:
            raise ValueError("torchsde takes one time for the batch, not one a sample")
        state = state or Carried(path_of(noise))
        y = x.flatten(1)
        system = _Increasing(reverse, x.shape, _METHODS[self.method][0])
        if state.extra:  # torchsde looks at the shape of the drift at y: that of any drift does
            system.known[float(-t), id(y)] = y, state.extra[0]
        y, extra = sdeint(
            system,
            y,
            torch.stack([-t, -s]),
            bm=_motion(reverse, y, t, s, state.noise),
            method=self.method,
            dt=2 * float(t - s),  # torchsde cuts its step at the end of the interval
            extra=True,
            extra_solver_state=state.extra or None,
        )
        return y[-1].reshape(x.shape), Carried(state.noise, extra)


def _motion(reverse: Reverse, y: Tensor, t: Tensor, s: Tensor, noise: PathNoise) -> Any:
    """The Brownian motion of one step as torchsde wants it, like ``y``."""
    from torchsde import BaseBrownian

    class Motion(BaseBrownian):
        dtype, device, shape = y.dtype, y.device, y.shape
        levy_area_approximation = "space-time"

        def __call__(
            self, ta: Tensor, tb: Tensor, return_U: bool = False, return_A: bool = False
        ) -> Any:
            """``W = W(tb) - W(ta)`` and, if asked for, ``U``, the integral of ``W(r) - W(ta)``."""
            h = tb - ta
            w = h.sqrt() * increment(y, noise, reverse.sde, -ta, -tb)
            if not return_U:
                return w
            return w, h * (w / 2 + (h / 12).sqrt() * gaussian(y, noise))

        def __repr__(self) -> str:
            return f"Motion({noise!r})"

    return Motion()


class _Increasing:
    """The reversed process as torchsde wants it, for one step.

    torchsde evaluates the same drift several times (once to check shapes, and again in every stage
    of ``srk``): each is computed once.
    """

    noise_type = "diagonal"

    def __init__(self, reverse: Reverse, shape: torch.Size, sde_type: str) -> None:
        self.reverse = reverse
        self.shape = shape
        self.sde_type = sde_type
        self.known: dict[tuple[float, int], tuple[Tensor, Tensor]] = {}

    def f(self, u: Tensor, y: Tensor) -> Tensor:
        """Drift, shape ``(B, D)``."""
        key = float(u), id(y)
        if key not in self.known:  # y is kept with its drift, so that its id stays its own
            self.known[key] = y, -self.reverse.drift(y.reshape(self.shape), -u).flatten(1)
        return self.known[key][1]

    def g(self, u: Tensor, y: Tensor) -> Tensor:
        """Diffusion, the same for every component, shape ``(B, D)``."""
        return self.reverse.diffusion(-u).to(y.dtype) * torch.ones_like(y)
