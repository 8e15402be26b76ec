"""The problems of a benchmark: exact scores of laws, or a model and its held-out data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..config import describe
from ..precision import widest
from .laws import Law
from .row import label
from .target import Target


@dataclass(frozen=True, eq=False)
class Case:
    """A score and what its samples are compared to.

    Args:
        score: ``score(x, t, **cond)`` that carries its ``sde``.
        target: the reference.
        what: the problem in words.
        unit: of distances between items.
        cond: conditions, one value a sample.
        about: what else a record should say.
    """

    score: Any
    target: Target
    what: str
    unit: str = "data units"
    cond: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)


def exact(sde: Any, law: Law, target: Target, device: torch.device) -> Case:
    """The exact score of a law under a process, in the widest type of the device.

    Args:
        sde: the process.
        law: the law.
        target: of that law; shared by all processes.
        device: where the score is computed; targets are on the CPU.
    """
    score = law.mixture().to(device, widest(device)).score(sde)
    return Case(score, target, f"exact score of {label(law)} under {label(sde)}")


def of_model(
    run: str, weights: str, source: str | None, samples: int, seed: int, device: torch.device
) -> Case:
    """A model and the data that it held out.

    Args:
        run: folder or ``zoo:NAME``.
        weights: ``"ema"`` or ``"raw"``.
        source: data instead of the run's own.
        samples: number of samples to be judged.
        seed: of the choice of items and of the classes of a conditional model.
        device: where the model runs.

    Raises:
        ValueError: if the data do not fit the model, or the run does not say which they are.
    """
    from ..checkpoint import load

    model = load(run, weights=weights, device=device)
    train, heldout = _splits(run, source)
    if heldout.shape != model.shape:
        raise ValueError(
            f"{heldout.name} has items of {heldout.shape}, the model {run} of {model.shape}"
        )
    # Sources without a split of their own may give the same items twice.
    distinct = not (train.x.shape == heldout.x.shape and torch.equal(train.x, heldout.x))
    decode = None if model.scaler is None else model.scaler.decode
    target = Target.of_data(
        heldout.x, train.x if distinct else None, samples=samples, decode=decode, seed=seed,
        name=heldout.name,
    )  # fmt: skip
    cond = {}
    if getattr(model.net, "num_classes", None) is not None and train.y is not None:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randint(len(train), (samples,), generator=generator)
        cond["y"] = train.y[chosen].to(device)
    levels = heldout.levels
    what = f"{run}, {describe(model.sde)['name']}, {model.weights} weights, against {heldout.name}"
    unit = f"levels 0 to {levels - 1}" if levels else "data units"
    return Case(model, target, what, unit, cond, {"model": run, "data": heldout.name})


def _splits(run: str, source: str | None) -> tuple[Any, Any]:
    """Training and held-out items, of the named data or those of the run."""
    from ..checkpoint import locate
    from ..config import construct, read_yaml
    from ..data import DataConfig, load_splits

    if source is not None:
        return load_splits(DataConfig(source=source))
    file = locate(run) / "config.yaml"
    stored = read_yaml(file).get("data") if file.is_file() else None
    if stored is None:
        raise ValueError(f"{run} does not say which data it held out: name them with --data")
    return load_splits(construct(DataConfig, stored, "data"))
