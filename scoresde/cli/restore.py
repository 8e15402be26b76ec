"""What the commands that solve inverse problems share: options, the work, figures, the picture."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

from . import options
from .guide import Guide, Guided, guided

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..inverse import Operator
    from ..model import ScoreModel
    from ..samples import Samples

F = TypeVar("F", bound=Callable[..., Any])


class Settings(NamedTuple):
    """The options of all of these commands."""

    run: str
    method: str | None
    noise: float
    draws: int
    solver: str | None
    steps: int | None
    grid: str | None
    settings: tuple[str, ...]
    threshold: str | None
    label: int | None
    dequantize: bool
    out: Path | None
    weights: str
    seed: int | None
    device_name: str
    json_file: Path | None
    guide: Guide


class Problem(NamedTuple):
    """What is to be restored, in model range.

    Args:
        operator: the linear map.
        y: the measurements, ``(N, *operator.out)``.
        x: the items that were measured, ``(N, *shape)``; None where they are not known.
        names: what the items are called.
        measured: the title of the measurements in the picture.
    """

    operator: Operator
    y: Tensor
    x: Tensor | None
    names: list[str]
    measured: str = "measurement"


def restoring(command: F) -> F:
    """The options of :class:`Settings`, given to the command as ``chosen``."""

    @guided
    @functools.wraps(command)
    def inside(**given: Any) -> None:
        own = {name: given.pop(name) for name in Settings._fields}
        command(chosen=Settings(**own), **given)

    for option in reversed(_OPTIONS):
        inside = option(inside)
    return inside  # type: ignore[return-value]


_OPTIONS = [
    click.option("--model", "run", default=options.DEFAULT_MODEL, show_default=True,
                 metavar="RUN", help="A run, an exported folder, zoo:NAME, or a checkpoint."),
    click.option("--method", metavar="NAME",
                 help="trained, mmps, pgdm, dps, tmpd, diffpir, ddrm, replacement, repaint or "
                 "smc; fields as in mmps:iterations=3.  [default: trained for a model that was "
                 "trained on measurements, else pgdm]"),
    click.option("--noise", type=click.FloatRange(min=0), default=0.0, show_default=True,
                 metavar="STD", help="Standard deviation of the measurement's noise in model "
                 "range, where pictures go from -1 to 1."),
    click.option("-n", "--draws", type=click.IntRange(min=1), default=4, show_default=True,
                 help="Results for each item: what it could have been."),
    click.option("--solver", metavar="NAME", help="By default that of the method."),
    click.option("--steps", type=click.IntRange(min=1), help="By default those of the method."),
    click.option("--grid", metavar="NAME", help="As in `sample`; by default the solver's."),
    options.settings("Set a field of the method, as in --set iterations=3; may be repeated."),
    click.option("--threshold", metavar="MODE",
                 help="Keep denoised data in [-1, 1]: static, or dynamic.  [default: none]"),
    click.option("--label", type=click.IntRange(min=0), help="Class, for a conditional model."),
    click.option("--dequantize/--no-dequantize", default=False,
                 help="Add the noise of dequantisation to discrete items before they are "
                 "measured.  [default: no]"),
    click.option("--out", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
                 help=".png: input, measurement, results, mean and uncertainty side by side; "
                 ".npy: the results in data units, (items, draws, ...) or, of one item, "
                 "(draws, ...).  [default: COMMAND.png]"),
    options.weights, options.seed, options.device, options.report,
]  # fmt: skip


def restore(
    chosen: Settings,
    problem: Callable[[ScoreModel, Settings, torch.device], Problem],
    command: str,
) -> None:
    """Runs a command: makes its problem, solves it, and writes picture and figures."""
    import torch

    from ..checkpoint import load
    from ..inverse.solving import default_method
    from .draws import write_draws
    from .restored import about_run, beside, figures, lines

    out = chosen.out or Path(f"{command}.png")
    options.check_drawn(out)
    options.check_apart(out, chosen.json_file)
    chosen.guide.check()
    device = options.pick_device(chosen.device_name)
    model = load(chosen.run, weights=chosen.weights, device=device)
    posed = problem(model, chosen, device)
    led, cond = conditioned(model, chosen, len(posed.y), device)
    section = method_of(chosen) or default_method(led.score)
    began = time.perf_counter()
    drawn = draw(led.score, posed, chosen, section, cond)
    seconds = time.perf_counter() - began
    found = drawn.x.reshape(len(posed.y), chosen.draws, *posed.operator.shape)
    with torch.no_grad():
        told = figures(posed, found)
    write_draws(out, model, found, beside(model, posed))
    about = about_run(chosen, posed, drawn, section, led.figures, seconds)
    report = {**about, **told, "versions": options.versions(device)}
    options.write_json(chosen.json_file, report)
    if not drawn.converged:
        click.echo(f"Warning: {drawn.message}", err=True)
    for line in lines(chosen, posed, drawn, report):
        options.speak(line)
    options.speak(f"written {out}")


def draw(
    score: Any, posed: Problem, chosen: Settings, section: dict[str, Any], cond: dict[str, Any]
) -> Samples:
    """The results of all items, some at a time: they do not depend on how many."""
    from ..inverse import solve
    from ..inverse.solving import SMC
    from ..samples import join

    draws, count = chosen.draws, len(posed.y)
    # The draws of a run of particles are made together.
    most = draws if section["name"] == SMC else min(draws, BATCH)
    items = max(1, BATCH // most)
    rows = [(i, first) for i in range(0, count, items) for first in range(0, draws, most)]
    return join([
        solve(
            score, posed.operator, posed.y[i : i + items], noise_std=chosen.noise, method=section,
            draws=min(most, draws - first), steps=chosen.steps, grid=options.grid(chosen.grid),
            solver=None if chosen.solver is None else options.solver(chosen.solver, ()),
            seed=chosen.seed or 0, start_index=i * draws + first, progress=options.on_screen(),
            threshold=options.section(chosen.threshold, "--threshold"),
            **{name: value[i : i + items] for name, value in cond.items()},
        )
        for i, first in rows
    ])  # fmt: skip


BATCH = 256
"""Results that are drawn at once."""


def method_of(chosen: Settings) -> dict[str, Any] | None:
    """``--method`` with its ``--set``, None for the model's own."""
    from . import specs

    if chosen.method is None:
        if chosen.settings:
            raise ValueError("--set belongs to a method: name it by --method")
        return None
    given = options.key_values(chosen.settings)
    if "name" in given:
        raise ValueError("--set name: the method is named by --method")
    return {**specs.section(chosen.method, "method"), **given}


def conditioned(
    model: ScoreModel, chosen: Settings, count: int, device: torch.device
) -> tuple[Guided, dict[str, Any]]:
    """The score, guided if asked for, and its conditions."""
    import torch

    from .sample import check_label

    guide = chosen.guide.of(model, chosen.run, chosen.weights, device)
    if chosen.label is None:
        if guide.figures is not None and guide.figures["name"] != "autoguidance":
            raise ValueError("guidance leads towards a class: give --label")
        return guide, {}
    check_label(model, chosen.label, guide.classes)
    return guide, {"y": torch.full((count,), chosen.label, device=device)}


def items(
    model: ScoreModel, chosen: Settings, texts: tuple[str, ...], device: torch.device
) -> tuple[Tensor, list[str]]:
    """The items of the command line in model range, ``(N, *shape)``, and what they are called."""
    import torch

    from .items import encode_items, read_item

    read = [read_item(model, chosen.run, text) for text in texts]
    x = torch.cat([item.x for item in read]).to(device)
    seed = chosen.seed or 0
    return encode_items(model, x, seed, 0, chosen.dequantize), [item.name for item in read]


def measured(
    operator: Operator, x: Tensor, names: list[str], chosen: Settings, title: str = "measurement"
) -> Problem:
    """The problem of items that the command measures itself, with noise of its seed."""
    y = operator.measure(x, chosen.noise, seed=(chosen.seed or 0) ^ MEASUREMENT)
    return Problem(operator, y, x, names, title)


MEASUREMENT = 1 << 42
"""Keeps the noise of measurements apart from that of the draws of the same seed."""


def operator_of(text: str, shape: tuple[int, ...], kind: str) -> Operator:
    """The ``"operator"``, or the ``"mask"``, of a name and its fields.

    Raises:
        ValueError: for a name or field that is none, or that only Python can give.
    """
    from dataclasses import MISSING, fields

    from ..config import build, names, unknown
    from ..inverse import Mask, operators
    from . import specs

    section = specs.section(text, kind)
    classes = names(operators)
    plain = {
        name
        for name, cls in classes.items()
        for needed in [{f.name for f in fields(cls) if f.init and f.default is MISSING}]
        if needed <= {"shape"} and (kind != "mask" or issubclass(cls, Mask))
    }
    name = section["name"]
    if name in classes and name not in plain:
        if kind == "mask" and not issubclass(classes[name], Mask):
            raise ValueError(f"{name!r} is no mask: take `scoresde solve --operator {text}`")
        raise ValueError(
            f"{kind} {name!r} is for Python alone; accepted: {', '.join(sorted(plain))}"
        )
    own = "." in name and all(part.isidentifier() for part in name.split("."))
    if name not in plain and not own:
        raise unknown(kind, name, plain)
    operator: Operator = build(section, operators, kind, shape=shape)
    if kind == "mask" and not isinstance(operator, Mask):
        raise ValueError(f"{name!r} is no mask: take `scoresde solve --operator {text}`")
    return operator
