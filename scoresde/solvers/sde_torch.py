r"""The reverse SDE by torchsde, on the steps of any grid.

torchsde wants an increasing time and a flat state, so it is given ``u = -t``:

    dy = -drift(y, -u) du + diffusion(-u) dw,    y of shape (B, D)

The noise depends on time alone, so Ito and Stratonovich agree and both families of methods apply.

Source: Scalable Gradients for Stochastic Differential Equations (Li et al., 2020),
https://arxiv.org/abs/2001.01328; https://github.com/google-research/torchsde.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..config import unknown
from ..noise import NoiseSource, normal
from ..sde.base import Reverse
from .base import Solver

_METHODS = {
    "euler": ("ito", 1),
    "milstein": ("ito", 1),
    "srk": ("ito", 4),
    "midpoint": ("stratonovich", 2),
    "heun": ("stratonovich", 2),
    "euler_heun": ("stratonovich", 1),
}


@dataclass(frozen=True)
class TorchSDE(Solver):
    """torchsde's methods, one call a step.

    The Brownian path is torchsde's own: it repeats with the seed, but a sample's noise does depend
    on the batch that it is drawn in. The other stochastic solvers have no such limit.

    Args:
        method: ``euler``, ``milstein``, ``srk``, ``midpoint``, ``heun`` or ``euler_heun``.
    """

    method: str = "euler"

    name: ClassVar[str] = "torchsde"
    order: ClassVar[float] = 1.0
    stochastic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.method not in _METHODS:
            raise unknown("method of TorchSDE", self.method, _METHODS)
        object.__setattr__(self, "nfe_per_step", _METHODS[self.method][1])

    def init(self, reverse: Reverse, x: Tensor, times: Tensor, noise: NoiseSource | None) -> Any:
        """The Brownian path, seeded by one draw of ``noise``."""
        from torchsde import BrownianInterval

        bits = normal((1, 1), noise, device="cpu", dtype=torch.float64).view(torch.int64)
        return BrownianInterval(
            -float(times[0]),
            -float(times[-1]),
            size=(len(x), x[0].numel()),
            dtype=x.dtype,
            device=x.device,
            entropy=abs(int(bits)),
            levy_area_approximation="space-time" if self.method == "srk" else "none",
        )

    def step(
        self,
        reverse: Reverse,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        noise: NoiseSource | None,
        state: Any,
    ) -> tuple[Tensor, Any]:
        """One step of the method, along the path ``state``."""
        from torchsde import sdeint

        system = _Increasing(reverse, x.shape, _METHODS[self.method][0])
        ends = torch.stack([-t, -s])
        whole = 2 * float(t - s)  # torchsde cuts its step at the end of the interval
        y = sdeint(system, x.flatten(1), ends, bm=state, method=self.method, dt=whole)
        return y[-1].reshape(x.shape), state


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
