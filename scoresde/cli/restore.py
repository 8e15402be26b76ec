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
    from ..inverse import solve
    from ..inverse.solving import default_method
    from .draws import write_draws

    out = chosen.out or Path(f"{command}.png")
    if out.suffix not in (".png", ".npy"):
        raise ValueError(f"cannot write {out}: accepted are .png and .npy")
    options.check_apart(out, chosen.json_file)
    chosen.guide.check()
    device = options.pick_device(chosen.device_name)
    model = load(chosen.run, weights=chosen.weights, device=device)
    posed = problem(model, chosen, device)
    led, cond = conditioned(model, chosen, len(posed.y), device)
    section = method_of(chosen) or default_method(led.score)
    began = time.perf_counter()
    drawn = solve(
        led.score, posed.operator, posed.y, noise_std=chosen.noise, method=section,
        draws=chosen.draws, steps=chosen.steps, grid=options.grid(chosen.grid),
        solver=None if chosen.solver is None else options.solver(chosen.solver, ()),
        seed=chosen.seed or 0, progress=options.on_screen(),
        threshold=options.section(chosen.threshold, "--threshold"), **cond,
    )  # fmt: skip
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


def method_of(chosen: Settings) -> dict[str, Any] | None:
    """``--method`` with its ``--set``, None for the model's own."""
    from . import specs

    if chosen.method is None:
        if chosen.settings:
            raise ValueError("--set belongs to a method: name it by --method")
        return None
    return {**specs.section(chosen.method, "method"), **options.key_values(chosen.settings)}


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


def figures(posed: Problem, found: Tensor) -> dict[str, Any]:
    """How far the draws and their mean are from the items, and their measurement from ``y``."""
    n, draws = found.shape[:2]
    again = posed.operator(found.flatten(0, 1)).reshape(n, draws, *posed.y.shape[1:])
    miss = (posed.operator.seen((again - posed.y[:, None]).flatten(0, 1))).flatten(1)
    told: dict[str, Any] = {
        "residual": float((miss.square().sum(1) / posed.operator.count).mean().sqrt()),
        "spread": float(found.double().var(1, correction=min(1, draws - 1)).mean().sqrt()),
    }
    if posed.x is not None:
        told["rmse"] = float((found - posed.x[:, None]).double().square().mean().sqrt())
        told["rmse_of_mean"] = float((found.mean(1) - posed.x).double().square().mean().sqrt())
    return told


def about_run(
    chosen: Settings,
    posed: Problem,
    drawn: Samples,
    section: dict[str, Any],
    guidance: dict[str, Any] | None,
    seconds: float,
) -> dict[str, Any]:
    """The settings of a run, and what it cost, for its JSON."""
    cost = drawn.cost
    return {
        "model": chosen.run, "items": posed.names, "draws": chosen.draws,
        "operator": operator_of(posed.operator), "noise_std": chosen.noise,
        "method": section, "label": chosen.label, "guidance": guidance,
        "nfe": drawn.mean_nfe, "forwards": None if cost is None else cost.forwards,
        "products": None if cost is None else cost.products, "seconds": seconds,
        "converged": drawn.converged, "message": drawn.message, "solver": drawn.solver,
        "grid": drawn.grid, "steps": drawn.steps, "seed": drawn.seed, "weights": drawn.weights,
    }  # fmt: skip


def operator_of(operator: Operator) -> dict[str, Any]:
    """Name and numbers of an operator."""
    import dataclasses

    from ..config import class_name

    found: dict[str, Any] = {"name": class_name(type(operator))}
    for field in dataclasses.fields(operator):  # type: ignore[arg-type]
        value = getattr(operator, field.name)
        if isinstance(value, (bool, int, float, str, Path)):
            found[field.name] = str(value) if isinstance(value, Path) else value
    return {**found, "measured": operator.count}


def lines(chosen: Settings, posed: Problem, drawn: Samples, report: dict[str, Any]) -> list[str]:
    """What the command says."""
    name = report["method"]["name"]
    count = f"{len(posed.y)} item{'s' * (len(posed.y) > 1)}"
    spent = f"{drawn.mean_nfe:.4g} evaluations"
    if drawn.cost is not None and drawn.cost.products:
        spent += f" and {drawn.cost.products} products with the Jacobian"
    told = [
        f"{chosen.draws} results for {count} under {chosen.run} by {name}: {spent} each, "
        f"{report['seconds']:.1f} s, {drawn.weights} weights, seed {drawn.seed}"
    ]
    if "rmse" in report:
        told.append(
            f"from the input: {report['rmse']:.4f} a result, {report['rmse_of_mean']:.4f} their "
            f"mean; spread {report['spread']:.4f}, residual {report['residual']:.4f} (root mean "
            "squares in model range)"
        )
    else:
        told.append(
            f"spread {report['spread']:.4f}, residual {report['residual']:.4f} (root mean squares "
            "in model range)"
        )
    return told


def beside(model: ScoreModel, posed: Problem) -> list[Any]:
    """What a picture shows before the results: the items where known, and their measurements."""
    from ..inverse import Fourier, Mask
    from ..pictures import as_images
    from ..sheet import Column
    from .draws import Shown

    operator, y = posed.operator, posed.y
    found: list[Any] = [] if posed.x is None else [Shown("input", model, posed.x)]
    if isinstance(operator, Mask):
        return [*found, Shown(posed.measured, model, y, operator.mask)]
    images = None
    if len(operator.out) == len(operator.shape) > 1 and not isinstance(operator, Fourier):
        images = as_images(((y.clamp(-1, 1) + 1) * 127.5).round().to("cpu").byte())
    if images is not None and images.shape[1] in (1, 3):
        return [*found, Column(posed.measured, images)]
    return [*found, Shown("pseudo-inverse", model, operator.pinv(y))]
