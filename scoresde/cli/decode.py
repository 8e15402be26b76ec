"""``scoresde decode``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from . import options
from .latent_files import solving


@click.command(name="decode")
@click.argument("arguments", nargs=-1, metavar="[RUN] LATENTS")
@solving
@click.option(
    "--label",
    type=click.IntRange(min=0),
    help="Class for a conditional model; by default those of the file.",
)
@click.option("--batch", type=click.IntRange(min=1), default=64, show_default=True)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help=".png for a picture, .npy for the items in data units.  [default: decoded.png]",
)
@options.weights
@options.seed
@options.device
@options.report
def command(
    arguments: tuple[str, ...],
    solver: str | None,
    steps: int | None,
    grid: str | None,
    settings: tuple[str, ...],
    label: int | None,
    batch: int,
    out: Path | None,
    weights: str,
    seed: int | None,
    device_name: str,
    json_file: Path | None,
) -> None:
    """Decode a file of latents into data, by the probability-flow ODE from noise to data.

    Without RUN the model that encoded them decodes them. Nothing is random: --seed is only noted.

    \b
    Examples:
      scoresde decode latents.npz
      scoresde decode runs/digits-vp latents.npz --out decoded.npy
    """  # fmt: skip
    import torch

    from ..checkpoint import load
    from ..latents import DEFAULT_SOLVER, decode
    from ..sampling import join
    from .latent_files import (
        batches,
        check_fit,
        labels_for,
        read_latents,
        round_trip,
        round_trip_line,
        settings_of,
    )
    from .sample import write

    if not 1 <= len(arguments) <= 2:
        raise click.UsageError("decode takes a file of latents, and before it a run if you like")
    file, target = Path(arguments[-1]), out or Path("decoded.png")
    options.check_drawn(target)
    options.check_apart(target, json_file)
    latents = read_latents(file)
    known = latents.settings
    run = arguments[0] if len(arguments) == 2 else str(known["model"])
    device = options.pick_device(device_name)
    model = load(run, weights=weights, device=device)
    notice = check_fit(latents, model, file)
    if notice:
        click.echo(f"Warning: {notice}", err=True)
    how: dict[str, Any] = {
        k: known[k] for k in ("solver", "steps", "grid") if known[k] is not None
    }
    given = settings_of(solver, steps, grid, settings)
    if "solver" in given and known["solver"]["name"] != given["solver"]["name"]:
        how = {}  # the steps and the grid were another solver's
    how = {"solver": DEFAULT_SOLVER, **how, **given, "t_min": known["t_min"],
           "t_max": known["t_max"]}  # fmt: skip
    n = len(latents.z)
    y = labels_for(model, latents.y, label, n)
    parts = [
        decode(
            model,
            latents.z[rows].to(device),
            start_index=rows.start,
            progress=options.on_screen(),
            **how,
            **cond,
        )
        for rows, cond in batches(n, batch, device, y)
    ]
    drawn = join(parts)
    assert isinstance(drawn.x, torch.Tensor)
    write(model, drawn.x, target)
    figures = {
        "model": run, "latents": str(file), "data": known["data"], "items": n,
        "nfe": drawn.mean_nfe, "seconds": drawn.seconds, "converged": drawn.converged,
        "message": drawn.message, "solver": drawn.solver, "grid": drawn.grid,
        "steps": drawn.steps, "t_min": drawn.t_end, "t_max": drawn.t_start,
        "seed": seed or 0, "weights": drawn.weights, **round_trip(model, latents.x, drawn.x),
        "versions": options.versions(device),
    }  # fmt: skip
    options.write_json(json_file, figures)
    if not drawn.converged:
        click.echo(f"Warning: {drawn.message}", err=True)
    options.speak(
        f"{n} items from {file} by {drawn.solver['name']} under {run}: "
        f"{drawn.mean_nfe:.4g} evaluations each, {drawn.seconds:.1f} s, "
        f"t from {drawn.t_start:g} to {drawn.t_end:g}, {drawn.weights} weights"
    )
    options.speak(round_trip_line(figures))
    options.speak(f"written {target}")
