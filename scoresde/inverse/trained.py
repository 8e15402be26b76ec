r"""The conditional score that a network has learned, for a measurement of the kind it was given.

    score(x, t, image),    image = [mask y, mask]  or  [A^+ y, 1]

No approximation of ``p(y | x_t)`` is made, and nothing is differentiated: what the other methods
of this room estimate at every step has been learned before, for one kind of measurement.

Source: GLIDE: Towards Photorealistic Image Generation and Editing with Text-Guided Diffusion
Models (Nichol et al., 2022), section 3.1, https://arxiv.org/abs/2112.10741.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..config import ConfigError
from ..model import home
from ..wrapped import Wrapped
from .measured import check_items
from .operator import Operator, check_noise


@dataclass(frozen=True, eq=False)
class Trained(Wrapped):
    """The score of a model that was trained with images of its items (see :mod:`scoresde.given`).

    Args:
        score: a model with ``given``, or a score that wraps one.
        operator: of the measurement.
        y: the measurement in model range, ``(1, *operator.out)`` or ``(B, *operator.out)``.
        noise_std: of the measurement; the network goes by what it has been trained with.

    Raises:
        ConfigError: for a model without ``given``, or one that was given something else.
        ValueError: for a measurement that does not fit, or a number out of range.
    """

    score: Any
    operator: Operator
    y: Tensor
    noise_std: float = 0.0

    default_solver: ClassVar[dict[str, Any]] = {"name": "dpmpp-2m"}
    default_grid: ClassVar[str | None] = None
    default_steps: ClassVar[int] = 50

    @classmethod
    def suited(cls, steps: int) -> dict[str, Any]:
        """No option depends on the steps."""
        return {}

    def __post_init__(self) -> None:
        if self.given is None:
            raise ConfigError(
                "this model was not trained to be given a measurement: take a method that needs "
                "no training, such as pgdm, or train one with a section given"
            )
        check_noise(self.noise_std, "Trained")
        check_items(self.score, self.operator)
        self._image(self.y)

    def asks(self, cond: dict[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
        """The model, which is given the image of the measurement."""
        cond = dict(cond)
        y = cond.pop("measurement", self.y).to(*home(self.score))
        return [(self.score, {**cond, "image": self._image(y)})]

    def _image(self, y: Tensor) -> Tensor:
        image: Tensor = self.given.image(self.operator, self.operator.measurements(y))
        return image

    def _cond(self, x: Tensor, measurement: Tensor | None, cond: dict[str, Any]) -> dict[str, Any]:
        y = (self.y if measurement is None else measurement).to(x.device, x.dtype)
        if len(y) not in (1, len(x)):
            raise ValueError(
                f"{len(y)} measurements do not fit {len(x)} samples: give one, or one a sample"
            )
        image = self._image(y)
        return {**cond, "image": image.expand(len(x), *image.shape[1:])}

    def __call__(
        self, x: Tensor, t: float | Tensor, measurement: Tensor | None = None, **cond: Any
    ) -> Tensor:
        """``score(x, t, image=...)``, of the shape of ``x``; ``measurement`` replaces ``y``."""
        score: Tensor = self.score(x, t, **self._cond(x, measurement, cond))
        return score

    def denoise(
        self, x: Tensor, t: float | Tensor, measurement: Tensor | None = None, **cond: Any
    ) -> Tensor:
        """``E[x_0 | x_t, y]`` as the network has it, of the shape of ``x``."""
        denoised: Tensor = self.score.denoise(x, t, **self._cond(x, measurement, cond))
        return denoised


__all__ = ["Trained"]
