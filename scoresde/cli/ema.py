"""``scoresde ema``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import options

if TYPE_CHECKING:
    from ..training.posthoc import Reconstruction, Snapshot

POOR = 0.1
"""Residual of a profile from which on the average is another than the one asked for."""


@click.command(name="ema")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--length", "lengths", type=float, multiple=True, metavar="LENGTH",
              help="Relative length of an average to make, between 0 and 0.2887; may be repeated.",
              )  # fmt: skip
@click.option("--step", type=click.IntRange(min=1),
              help="Steps to average over.  [default: those of the last snapshot]")  # fmt: skip
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
              help="Folder of the model; of several, that of their folders.  "
              "[default: RUN/averages/length-LENGTH]")  # fmt: skip
@options.report
def command(
    run: Path,
    lengths: tuple[float, ...],
    step: int | None,
    out: Path | None,
    json_file: Path | None,
) -> None:
    """Make an average of the weights of any length, after training (EDM2's post-hoc EMA).

    It is put together from the snapshots that a run with training.lengths leaves. Without
    --length the averages and snapshots of the run are listed.

    \b
    Examples:
      scoresde train --set training.lengths=[0.05,0.1] --out runs/mine
      scoresde ema runs/mine
      scoresde ema runs/mine --length 0.08
      scoresde sample runs/mine/averages/length-0.08
      scoresde ema runs/mine --length 0.03 --length 0.15 --json ema.json
    """
    from ..training.ema import PowerFunction
    from ..training.posthoc import reconstruct

    options.check_writable(json_file)
    _check_run(run)
    if not lengths:
        if step is not None or out is not None:
            raise click.UsageError("--step and --out belong to --length")
        _list(run, json_file)
        return
    lengths = tuple(dict.fromkeys(lengths))
    for length in lengths:
        PowerFunction(length)  # one that no average has, before the work
    folders = [_folder(run, length, step, out, len(lengths) > 1) for length in lengths]
    for folder in folders:
        options.check_writable(folder / "config.yaml")
    made = []
    for length, folder in zip(lengths, folders, strict=True):
        with _bar(f"length {length:g}") as progress:
            found = reconstruct(run, length, step, progress)
        _export(run, found, folder)
        made.append({
            "length": length, "step": found.step, "residual": found.residual,
            "snapshots": found.snapshots, "folder": str(folder),
        })  # fmt: skip
        options.speak(
            f"length {length:g} over {found.step} steps from {found.snapshots} snapshots: the fit "
            f"leaves {found.residual:.2g} of its profile"
        )
        if found.residual > POOR:
            options.speak(
                "  a poor fit: more snapshots, or tracked lengths nearer to it, make it better"
            )
        options.speak(f"written {folder}")
    options.write_json(json_file, {"run": str(run), "averages": made})


def _check_run(run: Path) -> None:
    """Refuses what is no training run."""
    from ..files import CheckpointError

    if not run.exists():
        raise CheckpointError(f"no run at {run}: there is no such folder")
    if not (run / "config.yaml").is_file() or not (run / "checkpoints").is_dir():
        raise CheckpointError(f"{run} is no training run: it lacks config.yaml or checkpoints")


def _folder(run: Path, length: float, step: int | None, out: Path | None, several: bool) -> Path:
    """Where the average goes."""
    from ..files import CheckpointError

    name = f"length-{length!r}" + ("" if step is None else f"-step-{step}")
    if out is None:
        return run / "averages" / name
    folder = out / name if several else out
    if (folder / "checkpoints").exists():
        raise CheckpointError(f"{folder} is a training run: choose another folder")
    return folder


def _export(run: Path, found: Reconstruction, folder: Path) -> None:
    """Writes a model with these weights that is otherwise the run's."""
    from ..checkpoint import build_model, fit, save_model
    from ..config import read_yaml

    model = build_model(read_yaml(run / "config.yaml"))
    fit(model.net, found.tensors, run / "snapshots")
    model.weights = "ema"
    save_model(model, folder)


def _list(run: Path, json_file: Path | None) -> None:
    """The averages and snapshots that a run has."""
    from ..saved_steps import checksums, step_folders
    from ..training.posthoc import snapshots

    checkpoints = step_folders(run)
    names = checksums(checkpoints[-1]) if checkpoints else {}
    averages = sorted(n.removesuffix(".safetensors") for n in names if n.startswith("ema"))
    made = sorted(p.parent.name for p in run.glob("averages/*/model.safetensors"))
    found = snapshots(run)
    options.speak(f"averages   {', '.join(averages) or 'none'}")
    options.speak(f"made       {', '.join(made) or 'none'}")
    for line in _table(found):
        options.speak(line)
    facts: dict[str, Any] = {
        "run": str(run), "averages": averages, "made": made,
        "snapshots": [{"step": s.step, "length": s.length, "file": str(s.file)} for s in found],
    }  # fmt: skip
    options.write_json(json_file, facts)


def _table(found: list[Snapshot]) -> Iterator[str]:
    """A line for each length that has snapshots."""
    if not found:
        yield "snapshots  none: training.lengths makes them"
    for length in sorted({s.length for s in found}):
        steps = [str(s.step) for s in found if s.length == length]
        yield f"snapshots  length {length:g} at {len(steps)} steps: {', '.join(steps)}"


@contextmanager
def _bar(what: str) -> Iterator[Callable[[float], object]]:
    """A bar after two seconds, on a terminal."""
    from tqdm import tqdm

    with tqdm(
        total=100, delay=2, leave=False, disable=not options.on_screen(),
        bar_format=f"{what}: {{percentage:3.0f}}% |{{bar}}| {{elapsed}}",
    ) as bar:  # fmt: skip
        yield lambda done: bar.update(round(100 * done) - bar.n)
