"""``scoresde sample``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import densities, options
from .guide import guided, passes, passes_said, said

if TYPE_CHECKING:
    import torch

    from ..model import ScoreModel
    from ..sampling import Samples
    from ..world import World
    from .guide import Guide


@click.command(name="sample")
@click.argument("run", default=options.DEFAULT_MODEL)
@click.option("-n", "--count", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--solver", metavar="NAME",
              help="By default that of a tuned grid, or what suits the process.")  # fmt: skip
@click.option("--steps", type=click.IntRange(min=1), help="By default the solver's own number.")
@click.option(
    "--grid",
    metavar="NAME",
    help="uniform, quadratic, logsnr, karras, logistic, tuned, or a file of `tune`; fields as in "
    "logistic:width=2.",
)
@options.settings("Set a field of the solver, as in --set eta=0.5; may be repeated.")
@click.option("--t-end", type=float, help="Time at which sampling stops.")
@click.option(
    "--denoise/--no-denoise",
    default=None,
    help="Final Tweedie step.  [default: denoise, but not with --log-prob]",
)
@click.option(
    "--threshold",
    metavar="MODE",
    help="Keep denoised data in [-1, 1]: static, dynamic, or a section such as "
    "'{mode: dynamic, quantile: 0.99, bound: 1}'.  [default: none]",
)
@click.option(
    "--log-prob",
    is_flag=True,
    help="Log-density of each sample in the same solve, into a .csv beside --out.",
)
@click.option(
    "--divergence",
    type=click.Choice(["auto", "hutchinson", "exact"]),
    default="auto",
    show_default=True,
    help="Of --log-prob.",
)
@click.option(
    "--probes",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Probes of the Hutchinson estimator of --log-prob.",
)
@click.option(
    "--brownian", is_flag=True, help="One path of noise an item, whatever the number of steps."
)
@click.option(
    "--label",
    type=click.IntRange(min=0),
    help="Class, for a conditional model or a classifier; by default each in turn.",
)
@guided
@click.option("--batch", type=click.IntRange(min=1), default=256, show_default=True,
              help="Items drawn at once; the samples do not depend on it.")  # fmt: skip
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
    help=".png for a picture, .npy for the items in data units.  [default: samples-SOLVER.png]",
)  # fmt: skip
@options.weights
@options.seed
@options.device
@options.report
@options.together
def command(
    run: str,
    count: int,
    solver: str | None,
    steps: int | None,
    grid: str | None,
    settings: tuple[str, ...],
    t_end: float | None,
    denoise: bool | None,
    threshold: str | None,
    log_prob: bool,
    divergence: str,
    probes: int,
    brownian: bool,
    label: int | None,
    batch: int,
    out: Path | None,
    weights: str,
    seed: int | None,
    device_name: str,
    json_file: Path | None,
    world: World,
    guide: Guide,
) -> None:
    """Draw samples from a model: a run's folder, an exported one, or zoo:NAME.

    \b
    Examples:
      scoresde sample
      scoresde sample runs/digits-vp --solver ancestral --steps 200 -n 100
      scoresde sample runs/digits-vp --solver ddim --set eta=0.5 --out samples.npy
      scoresde sample --solver dpmpp-3m --set lower_last=true --steps 8 --threshold dynamic
      scoresde sample --solver runge-kutta --log-prob --probes 4 -n 16
      scoresde sample runs/classes --label 3 --cfg 2 --guidance-interval 0.2,5
      torchrun --nproc-per-node 4 -m scoresde sample -n 10000 --out samples.npy
    """
    from ..checkpoint import load
    from ..config import describe
    from ..sampling import solver_of

    if out is not None:
        options.check_drawn(out)
    guide.check()
    device = world.device(device_name)
    model = load(run, weights=weights, device=device)
    led = guide.of(model, run, weights, device)
    wanted = None
    if solver is not None or settings:
        wanted = options.solver(solver or model.sde.default_solver, settings)
    chosen = solver_of(model, wanted, steps, options.grid(grid))
    name = describe(chosen)["name"]
    target = out or Path(f"samples-{name}.png")
    csv_file = target.with_suffix(".csv") if log_prob else None
    options.check_apart(target, json_file, csv_file)
    if label is not None:
        check_label(model, label, led.classes)
    drawn = draw(
        model, count, batch, label, device, world, score=led.score, classes=led.classes,
        solver=chosen, steps=steps, grid=options.grid(grid), t_end=t_end, denoise=denoise,
        seed=seed or 0,
        threshold=options.section(threshold, "--threshold"), log_prob=log_prob,
        divergence=divergence, probes=probes,
        brownian=brownian,
    )  # fmt: skip
    if drawn is None:
        return
    write(model, drawn.x, target)
    if csv_file is not None:
        densities.write(drawn, csv_file)
    figures = {
        "model": run,
        "count": count,
        "label": label,
        "guidance": led.figures,
        "denoise": drawn.denoised,
        "threshold": drawn.threshold,
        "nfe": drawn.mean_nfe,
        **passes(drawn),
        "rounds": drawn.rounds,
        "seconds": drawn.seconds,
        "processes": world.size,
        "converged": drawn.converged,
        "message": drawn.message,
        "solver": drawn.solver,
        "grid": drawn.grid,
        "steps": drawn.steps,
        "t_start": drawn.t_start,
        "t_end": drawn.t_end,
        "seed": drawn.seed,
        "brownian": drawn.brownian,
        "weights": drawn.weights,
        **densities.figures(drawn),
        "versions": options.versions(device),
    }
    options.write_json(json_file, figures)
    if not drawn.converged:
        click.echo(f"Warning: {drawn.message}", err=True)
    shared = f" of {world.size} processes" if world.size > 1 else ""
    options.speak(
        f"{count} samples from {run} by {name}{said(led.figures)}: {drawn.mean_nfe:.4g} "
        f"evaluations each{passes_said(drawn) if led.figures else ''}, "
        f"{drawn.seconds:.1f} s{shared}, t from {drawn.t_start:g} to {drawn.t_end:g}, "
        f"{drawn.weights} weights, seed {drawn.seed}"
    )
    if csv_file is not None:
        options.speak(densities.line(drawn))
    options.speak(f"written {target}" + (f" and {csv_file}" if csv_file is not None else ""))


def check_label(model: ScoreModel, label: int, classes: int | None = None) -> None:
    """Refuses a label that the model, or the classifier of so many classes, does not take."""
    classes = getattr(model.net, "num_classes", None) if classes is None else classes
    if classes is None:
        raise ValueError("--label needs a class-conditional model, and this one is not")
    if label >= classes:
        raise ValueError(
            f"--label {label} is out of range: the model has classes 0 to {classes - 1}"
        )


def draw(
    model: ScoreModel,
    count: int,
    batch: int,
    label: int | None,
    device: torch.device,
    world: World,
    score: Any = None,
    classes: int | None = None,
    **settings: Any,
) -> Samples | None:
    """``count`` samples in batches, shared by the processes, as one result; None but on rank 0.

    Of the model, or of a ``score`` that guides it to one of its ``classes``.

    Each process draws a contiguous share. Noise is keyed by the index, so that the samples are
    those of one process to rounding; the time is that of the slowest.
    """
    from dataclasses import replace

    import torch

    from ..sampling import join, sample

    if model.shape is None:
        raise ValueError("the model does not say the shape of its items")
    if score is None:
        score, classes = model, getattr(model.net, "num_classes", None)
    parts = []
    share = world.share(count)
    for start in share[::batch]:
        size = min(batch, share.stop - start)
        cond: dict[str, Any] = {}
        if classes is not None:
            index = torch.arange(start, start + size, device=device)
            cond["y"] = index % classes if label is None else torch.full_like(index, label)
        drawn = sample(
            score,
            (size, *model.shape),
            start_index=start,
            progress=options.on_screen(),
            **settings,
            **cond,
        )
        parts.append(drawn if world.size == 1 else on_cpu(drawn))
    gathered = world.gather(parts)
    if gathered is None:
        return None
    whole = join([part for own in gathered for part in own])
    return replace(whole, seconds=max(sum(part.seconds for part in own) for own in gathered))


def on_cpu(drawn: Samples) -> Samples:
    """The samples where another process can take them from."""
    from dataclasses import fields, replace

    import torch

    tensors: dict[str, Any] = {
        f.name: value.cpu()
        for f in fields(drawn)
        if isinstance(value := getattr(drawn, f.name), torch.Tensor)
    }
    return replace(drawn, **tensors)


def write(model: ScoreModel, x: torch.Tensor, file: Path) -> None:
    """Items in model range as a picture, or in data units as an array; whole or not at all."""
    import numpy as np

    from ..pictures import save_items

    items = x if model.scaler is None else model.scaler.decode(x)
    shown = model.scaler.image(x) if model.scaler is not None and x.ndim > 3 else items
    with options.whole(file) as draft:
        if file.suffix == ".npy":
            np.save(draft, items.cpu().numpy())
        else:
            save_items(draft, shown)
