r"""Classifier-free guidance: from the unconditional score through the conditional one.

    s = s_u + scale (s_c - s_u),    s_c = score(x, t | y),  s_u = score(x, t)

``scale = 1`` is the plain conditional score, 0 the unconditional one. (Papers that write ``w`` for
``scale - 1``, as Ho & Salimans, have the conditional at ``w = 0``.) Where both are exact, ``s`` is
the score of ``p(x_t)^(1 - scale) p(x_t | y)^scale`` at every ``t``: for ``scale != 1`` these are
not the marginals of any one diffused density, and samples are not those of the tilted density of
the data. Guidance in an interval of noise levels alone, at medium ones, keeps more variety.

``rescale = phi`` undoes part of the growth of the network's output that strong guidance brings,
in the reading ``v = (alpha eps - sigma x_0)/h``, ``h^2 = alpha^2 + sigma^2``, which is what the
networks of Lin et al. predict:

    v' = v (1 - phi + phi std(v_c)/std(v)),    std over the entries of a sample

Sources: Classifier-Free Diffusion Guidance (Ho & Salimans, 2022),
https://arxiv.org/abs/2207.12598; the interval: Applying Guidance in a Limited Interval Improves
Sample and Distribution Quality in Diffusion Models (Kynkaanniemi et al., 2024),
https://arxiv.org/abs/2404.07724; ``rescale``: Common Diffusion Noise Schedules and Sample Steps
are Flawed (Lin et al., 2023), section 3.4, https://arxiv.org/abs/2305.08891.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..conditions import classes_of, leaves
from ..config import ConfigError
from ..model import always_given
from ..sde.base import match
from .extrapolation import Extrapolation, check_process
from .readings import Reading, check_settings, of_score, read


@dataclass(frozen=True, eq=False)
class ClassifierFree(Extrapolation):
    """``s_u + scale (s_c - s_u)``: a conditional score, made more so.

    One evaluation of both branches in a batch of twice the size, where what stands for no
    condition is known; else two.

    Args:
        score: ``score(x, t, **cond)`` that carries its ``sde``.
        scale: 1 is the conditional score, in one evaluation, 0 the unconditional one.
        interval: noise levels ``low < sigma/alpha <= high`` to guide at; elsewhere the conditional
            score alone, in one evaluation. None for everywhere.
        rescale: ``phi`` in [0, 1]; 0.7 in the paper. It needs items of several entries.
        null: by name, what stands for no condition: a number or a tensor that broadcasts to the
            condition's values, or None to leave it out. By default classes ``y`` become the index
            ``num_classes``, floating-point vectors and images zeros, as training drops them, and
            whatever else is left out.
        unconditional: score of the unconditional branch; by default ``score`` itself. It is not
            given the conditions that are dropped, but those that ``null`` gives a value.
        drop: names of the conditions that the unconditional branch lacks; if None all that reach
            the network, but not those that a score between takes, as the target of an energy,
            and not an image that it was never trained without (``given.empty`` of 0).

    Raises:
        ConfigError: for a setting out of range, or an unconditional score of another process.
        ValueError: when called without any of the conditions to drop.
    """

    score: Any
    scale: float = 1.0
    interval: tuple[float, float] | None = None
    rescale: float = 0.0
    null: Mapping[str, Any] | None = None
    unconditional: Any = None
    drop: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        object.__setattr__(self, "interval", check_settings(name, self.scale, self.interval))
        if not 0 <= self.rescale <= 1:
            raise ConfigError(f"{name} needs rescale in [0, 1], got {self.rescale}")
        if self.drop is not None:
            names = (self.drop,) if isinstance(self.drop, str) else tuple(self.drop)
            object.__setattr__(self, "drop", names)
        if self.unconditional is not None:
            check_process(name, self.score, self.unconditional, "unconditional score")

    @property
    def parts(self) -> tuple[Any, ...]:
        """The scores that it is made of."""
        return (self.score,) if self.unconditional is None else (self.score, self.unconditional)

    def asks(self, cond: dict[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
        """What each part is given of the conditions."""
        asked = [(self.score, cond)]
        if self.unconditional is not None:
            gone = self._dropped(cond)
            asked.append((self.unconditional, {k: v for k, v in cond.items() if k not in gone}))
        return asked

    def _dropped(self, cond: dict[str, Any]) -> tuple[str, ...]:
        """Names of the conditions that the unconditional branch lacks."""
        if self.drop is not None:
            return self.drop
        reached = {name for _, its in leaves(self.score, cond) for name in its}
        if always_given(self):
            reached.discard("image")
        return tuple(name for name in cond if name in reached)

    @property
    def _other(self) -> Any:
        return self.score if self.unconditional is None else self.unconditional

    def _reference(self, cond: dict[str, Any], x: Tensor) -> tuple[Any, dict[str, Any]]:
        """The unconditional score, and what it is given."""
        names = self._dropped(cond)
        if not any(name in cond for name in names):
            wanted = "a condition" if self.drop is None else f"one of {', '.join(names)}"
            raise ValueError(f"classifier-free guidance needs {wanted} to drop, and none is given")
        kept = dict(cond)
        for name in names:
            value = self._null(name, kept.pop(name, None))
            if value is not None:
                kept[name] = value
        return self._other, kept

    def _null(self, name: str, value: Any) -> Any:
        """What stands for no condition in the place of ``value``; None where it is left out."""
        if value is None:
            return None
        if self.null is not None and name in self.null:
            given = self.null[name]
            if given is None or not isinstance(value, Tensor):
                return given
            return torch.as_tensor(given).to(value.device, value.dtype).expand_as(value)
        if self.unconditional is not None or not isinstance(value, Tensor):
            return None
        if value.ndim > 1:
            return torch.zeros_like(value)
        classes = classes_of(self.score)
        indices = value.ndim == 1 and not value.is_floating_point()
        return torch.full_like(value, classes) if indices and name == "y" and classes else None

    def _both(
        self, kind: str, x: Tensor, t: Tensor, cond: dict[str, Any]
    ) -> tuple[Reading, Reading]:
        """Both branches, in one batch where their conditions are alike."""
        other, its = self._reference(cond, x)
        doubled = {name: _joined(value, its.get(name), len(x)) for name, value in cond.items()}
        if other is not self.score or any(value is None for value in doubled.values()):
            return read(kind, self.score, x, t, cond), read(kind, other, x, t, its)
        t = torch.cat([t, t]) if t.ndim else t
        both, variance = read(kind, other, torch.cat([x, x]), t, doubled)
        (wanted, reference), n = both.chunk(2), len(x)
        return Reading(wanted, None if variance is None else variance[:n]), Reading(reference)

    def _finished(self, kind: str, x: Tensor, t: Tensor, wanted: Tensor, guided: Tensor) -> Tensor:
        """``v (1 - phi + phi std(v_c)/std(v))`` in the place of ``v``."""
        if self.rescale == 0:
            return guided
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        h = torch.hypot(alpha, sigma)
        # v = slope * reading + offset * x, of eps and of x_0 = (x - sigma eps)/alpha.
        if kind == "denoised":
            slope, offset = -h / sigma, alpha / (sigma * h)
        else:
            slope = h / alpha * of_score("noise", self.sde, t) / of_score(kind, self.sde, t)
            offset = -sigma / (alpha * h)
        a, b = match(slope, x), match(offset, x) * x
        v = a * guided + b
        ratio = _std(a * wanted + b) / _std(v)
        return guided + self.rescale * (ratio - 1) * v / a


def _joined(value: Any, other: Any, n: int) -> Any:
    """One condition of both branches, None where they cannot be asked for in one batch."""
    if isinstance(value, Tensor) and value.ndim and isinstance(other, Tensor):
        # One row stands for all of the ``n`` samples.
        both = (v.expand(n, *v.shape[1:]) if len(v) == 1 else v for v in (value, other))
        return torch.cat(list(both))
    return value if value is other else None


def _std(v: Tensor) -> Tensor:
    """Standard deviation over the entries of each sample, ``(B, 1, ...)``, never quite zero."""
    variance = v.flatten(1).var(1, unbiased=False)
    floor = torch.finfo(v.dtype).tiny
    return variance.clamp_min(floor).sqrt().reshape(-1, *(1,) * (v.ndim - 1))


__all__ = ["ClassifierFree"]
