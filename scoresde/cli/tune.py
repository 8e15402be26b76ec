"""``scoresde tune``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import options, specs

if TYPE_CHECKING:
    from ..model import ScoreModel
    from ..tuning import Tuning


@click.command(name="tune")
@click.argument("run", default=options.DEFAULT_MODEL)
@click.option("--solver", default="vabm", show_default=True, metavar="NAME[,NAME...]",
              help="Deterministic solver that steps along a grid; of several, such as "
              "vab:points=3,vabm, the best after a short search is taken.")  # fmt: skip
@click.option("--steps", type=click.IntRange(min=2), default=10, show_default=True)
@options.settings("Set a field of the solver, as in --set points=2; may be repeated.")
@click.option("--trajectories", type=click.IntRange(min=2), default=128, show_default=True,
              help="Reference trajectories that the search uses.")  # fmt: skip
@click.option("--held-out", type=click.IntRange(min=2), default=64, show_default=True,
              help="Further ones that judge the result.")  # fmt: skip
@click.option("--iterations", type=click.IntRange(min=0), default=80, show_default=True,
              help="Steps of the search; 0 judges the fixed grids alone.")  # fmt: skip
@click.option("--batch", type=click.IntRange(min=1), default=16, show_default=True,
              help="Trajectories of one step of the search.")  # fmt: skip
@click.option("--t-end", type=float, help="Time at which sampling stops.")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
    help="File of tuned grids.  [default: RUN/tuned.yaml; for zoo:NAME tuned-NAME.yaml here]",
)  # fmt: skip
@options.weights
@options.seed
@options.device
@options.report
def command(
    run: str,
    solver: str,
    steps: int,
    settings: tuple[str, ...],
    trajectories: int,
    held_out: int,
    iterations: int,
    batch: int,
    t_end: float | None,
    out: Path | None,
    weights: str,
    seed: int | None,
    device_name: str,
    json_file: Path | None,
) -> None:
    """Place the time points of a solver's steps by the error that they leave on this model.

    The grid is saved with the run, beside those of other solvers and step counts, if it beats
    every fixed grid on trajectories that the search has not seen; --grid tuned then takes it.

    \b
    Examples:
      scoresde tune runs/digits-vp --steps 10
      scoresde sample runs/digits-vp --steps 10 --grid tuned
      scoresde tune runs/digits-vp --solver vab,vabm:points=2,vabm --steps 5
      scoresde tune zoo:digits --solver unipc --steps 8 --out digits.yaml
      scoresde sample zoo:digits --solver unipc --steps 8 --grid digits.yaml
    """
    from ..checkpoint import load
    from ..tuning import FILE, tune
    from ..tuning.files import read, save

    own = not run.startswith(("zoo:", "hf:")) and not Path(run).is_file()
    stem = Path(run.removeprefix("zoo:").removeprefix("hf:")).stem
    target = out or (Path(run) / FILE if own else Path(f"tuned-{stem}.yaml"))
    if target.suffix not in (".yaml", ".yml"):
        raise ValueError(f"cannot write {target}: tuned grids go into a .yaml file")
    options.check_apart(target, json_file)
    read(target)  # a file that could not take one more entry, before the work
    names = specs.parts(solver)
    if settings and len(names) > 1:
        raise ValueError("--set belongs to one solver: of several, write name:key=value")
    names = [":".join((solver, *settings))] if settings else names
    sections = [specs.section(name, "solver") for name in names]
    device = options.pick_device(device_name)
    model = load(run, weights=weights, device=device)
    with _bar() as progress:
        found = tune(
            model, sections, steps,
            trajectories=trajectories, held_out=held_out, iterations=iterations, batch=batch,
            seed=seed or 0, t_end=t_end, progress=progress,
            **_labels(model, trajectories + held_out, seed or 0),
        )  # fmt: skip
    options.write_json(
        json_file, {"model": run, **found.entry(), "versions": options.versions(device)}
    )
    chosen = names[0]
    for name, (section, error) in zip(names, found.tried, strict=False):
        options.speak(f"{name}: RMS {error:.3g} after a short search")
        chosen = name if section == found.solver else chosen
    options.speak(table(found))
    best = found.best_fixed
    if found.gain > 1:
        target.parent.mkdir(parents=True, exist_ok=True)
        save(target, found)
        options.speak(f"{found.gain:.2f} times less error than the best fixed grid, {best}")
        name = "tuned" if target.name == FILE and out is None else str(target)
        options.speak(f"written {target}: --solver {chosen} --steps {steps} --grid {name}")
    else:
        options.speak(f"no better than the fixed grid {best}, so nothing is saved")


def table(found: Tuning) -> str:
    """The errors of all grids, the best first."""
    rows = {**{k: (v, found.fixed_median[k]) for k, v in found.fixed.items()},
            "tuned": (found.error, found.median)}  # fmt: skip
    lines = [
        f"{found.solver['name']}, {found.steps} steps, t from {found.t_start:g} to "
        f"{found.t_end:g}: distance to the converged end, in the model's range, of "
        f"{found.held_out} unseen trajectories ({found.trajectories} seen)",
        f"{'grid':<18}{'RMS':>10}{'median':>10}",
    ]
    for name, (error, median) in sorted(rows.items(), key=lambda row: row[1][0]):
        lines.append(f"{name:<18}{error:>10.3g}{median:>10.3g}")
    return "\n".join(lines)


def _labels(model: ScoreModel, count: int, seed: int) -> dict[str, Any]:
    """Each class in turn for a conditional model."""
    import torch

    classes = getattr(model.net, "num_classes", None)
    return {} if classes is None else {"y": torch.arange(count) % classes}


@contextmanager
def _bar() -> Iterator[Callable[[str, float], None]]:
    """A bar for each part of the work, after two seconds, on a terminal."""
    from tqdm import tqdm

    with tqdm(
        total=100, delay=2, leave=False, disable=not options.on_screen(),
        bar_format="{desc}: {percentage:3.0f}% |{bar}| {elapsed}",
    ) as bar:  # fmt: skip
        part = ""

        def progress(what: str, fraction: float) -> None:
            nonlocal part
            if what != part:
                part = what
                bar.set_description(what)
                bar.reset()
            bar.update(round(100 * fraction) - bar.n)

        yield progress
