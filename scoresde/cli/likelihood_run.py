"""What ``scoresde likelihood`` does: the data, the evaluation, and what is said of it."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch

from ..checkpoint import load
from ..data import Dataset
from ..likelihood.dataset import DatasetLikelihood, mean_error, summed
from ..likelihood.divergence import EXACT_DIMS
from ..likelihood.evaluation import COLUMNS, Evaluation
from ..likelihood.integrate import METHODS
from ..likelihood.spot import SpotCheck, spot_check
from ..likelihood.target import plan
from ..series import BLOCK, Table, part_file, run_series
from ..world import World
from . import options, specs
from .heldout import conditional, held_out_data
from .likelihood import DEFAULT_ITEMS, parse_part
from .likelihood_series import Maker, fingerprint

if TYPE_CHECKING:
    from ..model import ScoreModel

ALONG = {"method": {"name": "unipc", "points": 3, "variable": "noise"}, "steps": 32}
"""Method for many dimensions, when none is named: chosen by measurement on networks."""


@dataclass
class Request:
    """A call of the command, its options by their names; ``solve`` holds those of the ODE."""

    run: str
    data: str | None
    split: str
    items: str | None
    target: float | None
    spot: int | None
    dequantization: str
    draws: int
    importance: bool
    terminal: str
    bound: str | None
    terms: int | None
    variance: str | None
    classify: bool
    against: str | None
    self_check: bool
    levels: int | None
    batch: int
    processes: int
    part: str | None
    out: Path | None
    overwrite: bool
    pictures: Path | None
    weights: str
    seed: int | None
    device: torch.device
    json_file: Path | None
    world: World
    solve: dict[str, Any]

    def answer(self) -> None:
        """Evaluates, and says what was found."""
        from . import likelihood_others as others

        model = load(self.run, weights=self.weights, device=self.device)
        if self.self_check:
            if self.world.main:
                others.self_check(self, model)
            return
        held = held_out_data(self.run, self.data, self.split)
        if self.levels is not None and self.levels != held.levels:
            have = f"{held.levels} levels" if held.levels else "continuous, without levels"
            raise ValueError(
                f"--levels {self.levels} does not fit {held.name}, whose data are {have}"
            )
        held = self._taken(held)
        if self.bound is not None:
            others.bound(self, model, held)
        elif self.classify:
            others.classification(self, model, held)
        else:
            self._evaluate(model, held)

    def settings(self, dims: int, levels: int | None, what: str) -> dict[str, Any]:
        """What the likelihood of such items is evaluated by, the defaults filled in."""
        found: dict[str, Any] = {"seed": self.seed or 0, **self.solve}
        named = {"method", "rtol", "atol"} & set(found)
        if not named and (dims > EXACT_DIMS or "steps" in found or "grid" in found):
            found = {**ALONG, **found}
        elif found.get("method", METHODS[0]) not in METHODS:
            found.setdefault("steps", ALONG["steps"])
        if "steps" in found and {"rtol", "atol"} & set(found):
            raise ValueError("--rtol and --atol belong to methods that choose their steps")
        if levels:
            section = self.dequantization
            found["dequantization"] = (
                specs.section(section, "dequantization") if ":" in section else section
            )
            found |= {"draws": self.draws, "importance": self.importance}
        elif self.draws > 1 or self.importance or self.dequantization != "uniform":
            raise ValueError(f"{what} is continuous: there is nothing to dequantise")
        return found

    def fitted(self, model: ScoreModel, data: Dataset) -> dict[str, Any]:
        """The settings for these data, with the moments of the training data if asked for."""
        found = self.settings(data.x[0].numel(), data.levels, data.name)
        if self.terminal == "moments":
            found["terminal"] = self._moments(model)
        return found

    def _moments(self, model: ScoreModel) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviations of the training data in model range."""
        assert model.scaler is not None
        train = held_out_data(self.run, self.data, "train", train=True)
        x = model.scaler.encode(train.x[:2000], generator=torch.Generator().manual_seed(0))
        return x.mean(0).to(self.device), x.std(0).to(self.device)

    def _taken(self, data: Dataset) -> Dataset:
        """The items asked for."""
        text = self.items if self.items is not None else str(DEFAULT_ITEMS)
        if text != "all" and not (text.isdecimal() and int(text) > 0):
            raise ValueError(f"--items takes a whole number above 0, or all, got {text!r}")
        count = len(data) if text == "all" else min(int(text), len(data))
        return data if count == len(data) else data.subset(range(count))

    def _evaluate(self, model: ScoreModel, data: Dataset) -> None:
        part = parse_part(self.part)
        evaluation = Evaluation(model, data, self.fitted(model, data), labels=conditional(model))
        other = None
        if self.against is not None:
            other = self._taken(held_out_data(self.run, self.against, self.split))
            replace(evaluation, data=other)  # refuses, before any work, what does not fit
        evaluation, spot = self._checked(evaluation, part)
        table = self._series(evaluation, self.out, data.name, part)
        if part is not None:
            assert self.out is not None
            where = part_file(self.out, part)
            options.speak(
                f"part {part[0]}/{part[1]} of {data.name}: {len(table)} items in {where}"
            )
            return
        found = summed(evaluation, table.columns, spot, table.seconds)
        far = None if other is None else self._other(evaluation, other)
        if not self.world.main:
            return
        figures = {"model": self.run, "data": data.name, "target": self.target, **found.summary(),
                   "processes": max(self.processes, self.world.size)}  # fmt: skip
        lines = [f"{data.name} under {self.run}: {found.line()}"]
        if found.error_line():
            lines.append(found.error_line())
        shown = {data.name: found}
        if other is not None and far is not None:
            figures["against"], line = outliers(found, far, other.name)
            shown[other.name] = far
            lines += [f"{other.name}, as evaluated: {far.line()}", line]
        if self.pictures is not None:
            figures["pictures"] = draw(self.pictures, model, data, shown, figures.get("against"))
            lines.append("written " + ", ".join(figures["pictures"]))
        options.write_json(self.json_file, {**figures, "versions": options.versions(self.device)})
        self._warn(evaluation, found)
        settings = found.settings
        lines.append(
            f"{settings['divergence']} divergence, t from {settings['t_min']:g} to "
            f"{settings['t_max']:g}, {model.weights} weights, {found.seconds:.0f} s"
            + (f" summed over {self.world.size} processes" if self.world.size > 1 else "")
        )
        for line in lines:
            options.speak(line)

    def _warn(self, evaluation: Evaluation, found: DatasetLikelihood) -> None:
        """Says which items did not arrive, and a target that was missed."""
        lost = (~found.columns["converged"]).nonzero()[:, 0].tolist()
        if lost:
            click.echo(
                f"Warning: {len(lost)} of {len(found.log_prob)} items did not arrive, the first "
                f"is item {lost[0]}: the mean is nan",
                err=True,
            )
        if self.target is not None:
            left = found.errors["computation"] / unit_of(evaluation)
            if not left <= 1.2 * self.target:
                click.echo(
                    f"Warning: the target of {self.target:g} was not reached: {left:.2g} is left",
                    err=True,
                )

    def _checked(
        self, evaluation: Evaluation, part: tuple[int, int] | None
    ) -> tuple[Evaluation, SpotCheck | None]:
        """The evaluation, changed to meet a target, and its spot check; rank 0's, on all."""
        told = None
        if self.world.main:
            evaluation, spot = self._spot(evaluation, part)
            plain = {k: v for k, v in evaluation.settings.items() if k != "terminal"}
            told = plain, spot  # the moments stay on the device of each
        changed, spot = self.world.broadcast(told)
        return replace(evaluation, settings={**evaluation.settings, **changed}), spot

    def _spot(
        self, evaluation: Evaluation, part: tuple[int, int] | None
    ) -> tuple[Evaluation, SpotCheck | None]:
        """The evaluation, changed to meet a target, and its spot check."""
        count = len(evaluation.data)
        items = min(16, max(4, count // 16)) if self.spot is None else self.spot
        if self.target is None and (items == 0 or count < 2 or part is not None):
            return evaluation, None
        with bar(None, "spot check") as progress:
            if self.target is None:
                return evaluation, spot_check(evaluation, items, progress.update)
            target = self.target * unit_of(evaluation)
            return plan(evaluation, target, max(items, 4), progress.update)

    def _series(
        self,
        evaluation: Evaluation,
        out: Path | None,
        name: str,
        part: tuple[int, int] | None = None,
    ) -> Table:
        """Every item, into a file that is kept if one was asked for."""
        count = len(evaluation.data)
        with tempfile.TemporaryDirectory() as folder, bar(count, name) as progress:
            done = 0

            def tell(items: int, columns: dict[str, torch.Tensor]) -> None:
                nonlocal done
                progress.update(items - done)
                done = items
                progress.set_postfix_str(running(columns["nats"], evaluation))

            return run_series(
                Maker(self.run, self.weights, str(self.device), evaluation)
                if self.processes > 1
                else (lambda: evaluation),
                count,
                out or Path(folder) / "items.csv",
                columns=COLUMNS,
                fingerprint=fingerprint(evaluation, self.device),
                batch=-(-self.batch // BLOCK) * BLOCK,
                processes=self.processes,
                part=part,
                progress=tell,
                fresh=self.overwrite,
                world=self.world,
            )

    def _other(self, evaluation: Evaluation, data: Dataset) -> DatasetLikelihood:
        """The likelihood of other data, by the settings of the first."""
        fitted = replace(evaluation, data=data)
        out = None
        if self.out is not None:
            out = self.out.with_name(f"{self.out.stem}.against{self.out.suffix}")
        table = self._series(fitted, out, data.name)
        return summed(fitted, table.columns, None, table.seconds)


def outliers(
    inside: DatasetLikelihood, outside: DatasetLikelihood, name: str
) -> tuple[dict[str, Any], str]:
    """How well likelihoods tell two data sets apart: figures, and a line."""
    from ..likelihood.outliers import separation

    scores = separation(inside.log_prob, outside.log_prob)
    figures = {
        "data": name,
        **outside.summary(),
        "auroc": {score: {"value": a.value, "stderr": a.stderr} for score, a in scores.items()},
    }
    said = ", ".join(f"{a.value:.4f} ± {a.stderr:.4f} by {score}" for score, a in scores.items())
    return figures, f"told from {name}: AUROC {said}"


def draw(
    folder: Path,
    model: ScoreModel,
    data: Dataset,
    shown: dict[str, DatasetLikelihood],
    against: dict[str, Any] | None,
) -> list[str]:
    """The pictures, and their names."""
    from ..likelihood.show import extremes, histogram

    assert model.scaler is not None
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    unit = "bits/dim" if data.levels else "nats"
    values = {n: f.bits_per_dim if f.levels else f.log_prob for n, f in shown.items()}
    if len(data.shape) > 2 and len(data) > 1:
        images = model.scaler.image(model.scaler.encode(data.x, dequantize=False))
        file = folder / "extremes.png"
        likely = "low" if data.levels else "high"
        extremes(images, values[data.name], file, unit=unit, likely=likely, rows=2)
        written.append(str(file))
    scores = (
        {s: (a["value"], a["stderr"]) for s, a in against["auroc"].items()} if against else None
    )
    histogram(values, folder / "histogram.png", unit, auroc=scores)
    return [*written, str(folder / "histogram.png")]


def unit_of(evaluation: Evaluation) -> float:
    """Nats of an item to one of the unit that is spoken of: bits/dim, or nats."""
    return evaluation.dims * math.log(2) if evaluation.data.levels else 1.0


def running(nats: torch.Tensor, evaluation: Evaluation) -> str:
    """The mean so far and its standard error."""
    mean, error = float(nats.mean()), mean_error(nats)
    unit = unit_of(evaluation)
    if evaluation.data.levels:
        return f"{-mean / unit:.4f} ± {error / unit:.4f} bits/dim"
    return f"{mean:.4f} ± {error:.4f} nats"


@contextmanager
def bar(total: int | None, what: str) -> Iterator[Any]:
    """A progress bar on a terminal."""
    from tqdm import tqdm

    with tqdm(
        total=total, desc=what, disable=not options.on_screen(), leave=False, unit="item"
    ) as progress:
        yield progress
