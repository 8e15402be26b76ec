"""Options of guidance, and the guided score that they describe."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    import torch

    from ..model import ScoreModel
    from ..samples import Samples

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = (
    click.option(
        "--cfg", type=float, metavar="SCALE",
        help="Classifier-free guidance: 1 is the plain conditional, more leads further towards "
        "the class.",
    ),
    click.option(
        "--rescale", type=float, metavar="PHI",
        help="Of --cfg: how much of the output's growth to undo, 0 to 1.  [default: 0]",
    ),
    click.option(
        "--classifier", metavar="MODEL",
        help="Guidance by a classifier of noisy items: a run of train-classifier, a folder, or "
        "guided-diffusion's file.",
    ),
    click.option("--classifier-scale", type=float, metavar="SCALE",
                 help="Of --classifier; 1 is Bayes' rule.  [default: 1]"),
    click.option("--autoguide", metavar="MODEL",
                 help="Guidance by a bad version of the model: smaller, or trained for less."),
    click.option("--autoguide-scale", type=float, metavar="SCALE",
                 help="Of --autoguide; 1 is the plain model.  [default: 2]"),
    click.option(
        "--guidance-interval", metavar="LOW,HIGH",
        help="Guide at noise levels sigma/alpha between these alone, as in 0.2,5.",
    ),
)  # fmt: skip


def guided(command: F) -> F:
    """Gives the command its ``guide``: what the options of guidance ask for."""

    @functools.wraps(command)
    def inside(*args: Any, **given: Any) -> None:
        own = {name: given.pop(name) for name in Guide.__dataclass_fields__}
        command(*args, guide=Guide(**own), **given)

    for option in reversed(_OPTIONS):
        inside = option(inside)
    return inside  # type: ignore[return-value]


@dataclass(frozen=True)
class Guided:
    """A guided score, how many classes its condition ``y`` has, and what to say of it."""

    score: Any
    classes: int | None
    figures: dict[str, Any] | None


@dataclass(frozen=True)
class Guide:
    """What the options ask for."""

    cfg: float | None = None
    rescale: float | None = None
    classifier: str | None = None
    classifier_scale: float | None = None
    autoguide: str | None = None
    autoguide_scale: float | None = None
    guidance_interval: str | None = None

    def check(self) -> None:
        """Refuses options that do not go together, before anything is loaded."""
        chosen = [name for name in ("cfg", "classifier", "autoguide") if self._has(name)]
        if len(chosen) > 1:
            raise ValueError(f"--{chosen[0]} and --{chosen[1]} do not go together: take one")
        for option, needed in (
            ("rescale", "cfg"),
            ("classifier_scale", "classifier"),
            ("autoguide_scale", "autoguide"),
        ):
            if self._has(option) and not self._has(needed):
                raise ValueError(f"--{option.replace('_', '-')} needs --{needed}")
        if self.guidance_interval is not None and not chosen:
            raise ValueError("--guidance-interval needs --cfg, --classifier or --autoguide")
        self.interval  # noqa: B018 (refuses what is none)

    def _has(self, option: str) -> bool:
        return getattr(self, option) is not None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The noise levels to guide at."""
        if self.guidance_interval is None:
            return None
        try:
            low, high = (float(end) for end in self.guidance_interval.split(","))
        except ValueError:
            low = high = -1.0
        if not 0 <= low < high:
            raise ValueError(
                f"--guidance-interval {self.guidance_interval!r} is not of the form LOW,HIGH "
                "with 0 <= LOW < HIGH"
            )
        return low, high

    def of(self, model: ScoreModel, run: str, weights: str, device: torch.device) -> Guided:
        """The guided score of a model, or the model itself.

        Args:
            model: the model.
            run: where it was loaded from.
            weights: which weights of a second model to take.
            device: where to load another network to.

        Raises:
            ValueError: if the model does not suit the guidance that is asked for.
        """
        from .. import guidance
        from ..checkpoint import load, load_classifier
        from ..conditions import classes_of

        classes, interval = classes_of(model), self.interval
        ends = None if interval is None else [v if v < math.inf else None for v in interval]
        figures: dict[str, Any] = {"interval": ends}
        score: Any = model
        if self.cfg is not None:
            if classes is None:
                raise ValueError("--cfg needs a class-conditional model, and this one is not")
            check_dropped(run, self.cfg)
            rescale = self.rescale or 0.0
            score = guidance.ClassifierFree(model, self.cfg, interval, rescale)
            figures |= {"name": "classifier-free", "scale": self.cfg, "rescale": rescale}
        elif self.classifier is not None:
            judge = load_classifier(self.classifier, device=device)
            if classes not in (None, judge.num_classes):
                raise ValueError(
                    f"the classifier has {judge.num_classes} classes, the model {classes}"
                )
            scale = 1.0 if self.classifier_scale is None else self.classifier_scale
            score = guidance.Classifier(model, judge, scale, interval, classes is not None)
            classes = judge.num_classes
            figures |= {"name": "classifier", "scale": scale, "classifier": self.classifier}
        elif self.autoguide is not None:
            bad = load(self.autoguide, weights=weights, device=device)
            if classes_of(bad) != classes:
                raise ValueError(
                    f"the bad model has {classes_of(bad) or 'no'} classes, the model "
                    f"{classes or 'none'}: they are given the same class"
                )
            scale = 2.0 if self.autoguide_scale is None else self.autoguide_scale
            score = guidance.Autoguidance(model, bad, scale, interval)
            figures |= {"name": "autoguidance", "scale": scale, "bad": self.autoguide}
        return Guided(score, classes, None if score is model else figures)


def check_dropped(run: str, scale: float) -> None:
    """Refuses a run that was never trained without its classes, whose score then means nothing."""
    from ..checkpoint import locate
    from ..config import read_yaml

    file = locate(run) / "config.yaml"
    objective = read_yaml(file).get("objective") if file.is_file() else None
    if scale != 1 and isinstance(objective, dict) and not objective.get("drop"):
        raise ValueError(
            f"--cfg {scale:g} needs a model that was trained without its class at times, and "
            "objective.drop of this run is 0: train it with --set objective.drop=0.1"
        )


def said(figures: dict[str, Any] | None) -> str:
    """The guidance in words, for the line that reports samples."""
    if figures is None:
        return ""
    name = {"classifier-free": "classifier-free guidance", "classifier": "classifier guidance"}
    words = f", {name.get(figures['name'], figures['name'])} {figures['scale']:g}"
    if figures.get("rescale"):
        words += f" rescaled by {figures['rescale']:g}"
    if figures["interval"] is not None:
        low, high = figures["interval"]
        words += f" at noise levels {low:g} to {high or math.inf:g}"
    return words


def passes(drawn: Samples) -> dict[str, int | None]:
    """What the evaluations asked of networks, each; None where steps differ between samples."""
    cost = drawn.cost
    return {
        "network_forwards": None if cost is None else cost.forwards,
        "network_products": None if cost is None else cost.products,
    }


def passes_said(drawn: Samples) -> str:
    """The same in words."""
    if drawn.cost is None:
        return ""
    forwards, products = drawn.cost
    back = f" and {products} ways back" if products else ""
    return f" ({forwards} of networks{back})"
