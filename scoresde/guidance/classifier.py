r"""Classifier guidance: the gradient of a classifier of noisy items leads the score.

    s(x, t) = score(x, t) + scale grad_x log p(y | x_t)

At ``scale = 1``, with an exact classifier and the unconditional score, this is the conditional
score, by Bayes' rule. For another scale it is the score of ``p(x_t) p(y | x_t)^scale`` at every
``t``, which are not the marginals of any one diffused density: samples are not those of the tilted
density of the data. Dhariwal & Nichol write ``s`` for the scale, and lead a conditional model by a
classifier too: ``conditional=True``.

Sources: Diffusion Models Beat GANs on Image Synthesis (Dhariwal & Nichol, 2021), section 4,
https://arxiv.org/abs/2105.05233; Score-Based Generative Modeling through Stochastic Differential
Equations (Song et al., 2021), section 5, https://arxiv.org/abs/2011.13456; the interval:
Kynkaanniemi et al. (2024), https://arxiv.org/abs/2404.07724.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..classifier import fits
from ..model import Cost, cost
from .gradients import gradient, leaf, recordable, recording
from .pulled import Pulled
from .readings import Reading, check_settings, read


@dataclass(frozen=True, eq=False)
class Classifier(Pulled):
    """``score + scale grad_x log p(y | x_t)``.

    Args:
        score: ``score(x, t, **cond)`` that carries its ``sde``.
        classifier: ``classifier(x, t, y)``, or ``classifier(x, t)`` of one thing alone, to
            ``log p(y | x_t)``, ``(B,)``, differentiable in ``x``; ``t`` of shape ``()`` or
            ``(B, 1, ..., 1)``. The condition ``y`` is given to it where there is one.
        scale: 1 is Bayes' rule, 0 the score alone.
        interval: noise levels ``low < sigma/alpha <= high`` to guide at; elsewhere the score
            alone, without the classifier. None for everywhere.
        conditional: whether the score is given ``y`` too.

    Raises:
        ConfigError: for a setting out of range, or a classifier of another process or range.
        ValueError: when called, if the classifier does not give one number a sample, or is not
            differentiable.
    """

    score: Any
    classifier: Callable[..., Tensor]
    scale: float = 1.0
    interval: tuple[float, float] | None = None
    conditional: bool = False

    def __post_init__(self) -> None:
        interval = check_settings(type(self).__name__, self.scale, self.interval)
        object.__setattr__(self, "interval", interval)
        fits(self.score, self.classifier)

    @property
    def parts(self) -> tuple[Any, ...]:
        """The score and the classifier."""
        return self.score, self.classifier

    def asks(self, cond: dict[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
        """What the score is given of the conditions."""
        return [(self.score, self._kept(cond))]

    def _kept(self, cond: dict[str, Any]) -> dict[str, Any]:
        return cond if self.conditional else {k: v for k, v in cond.items() if k != "y"}

    def _pulled(
        self, kind: str, x: Tensor, t: Tensor, cond: dict[str, Any]
    ) -> tuple[Reading, Tensor]:
        """A reading of the score, and ``grad_x log p(y | x_t)``."""
        reading = read(kind, self.score, x, t, self._kept(cond))
        with recording() as kept:
            at = leaf(x, kept)
            told = [recordable(v) for v in (t, *([cond["y"]] if "y" in cond else []))]
            log_p = self.classifier(at, *told)
            forgotten = "y" not in cond and log_p.ndim > 1
            name = "classifier" + ", without a condition y," * forgotten
            pull = gradient(log_p, at, kept, name)
        return reading, pull

    def cost(self, t: Tensor) -> Cost:
        """That of the score, and the classifier forwards and back within the interval."""
        forwards, products = cost(self.score, t)
        more = int(self.active(t))
        return Cost(forwards + more, products + more)


__all__ = ["Classifier"]
