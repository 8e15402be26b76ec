"""``scoresde encode``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import options
from .latent_files import solving, standing

if TYPE_CHECKING:
    from ..data import Dataset
    from ..latents import Latents
    from ..model import ScoreModel

DEFAULT_ITEMS = 16


@click.command(name="encode")
@click.argument("run", default=options.DEFAULT_MODEL)
@click.option(
    "--data",
    metavar="SOURCE",
    help="A source, or an image file; by default the items that the run held out.",
)
@click.option("--split", default="test", show_default=True, help="Split of --data.")
@click.option(
    "--items", type=click.IntRange(min=1), help=f"How many items.  [default: {DEFAULT_ITEMS}]"
)
@solving
@standing
@click.option(
    "--label",
    type=click.IntRange(min=0),
    help="Class for a conditional model; by default those of the data.",
)
@click.option("--check", is_flag=True, help="Decode again, and report the round-trip error.")
@click.option("--batch", type=click.IntRange(min=1), default=64, show_default=True)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    default=Path("latents.npz"),
    show_default=True,
)
@options.weights
@options.seed
@options.device
@options.report
def command(
    run: str,
    data: str | None,
    split: str,
    items: int | None,
    solver: str | None,
    steps: int | None,
    grid: str | None,
    settings: tuple[str, ...],
    t_min: float | None,
    label: int | None,
    dequantize: bool,
    check: bool,
    batch: int,
    out: Path,
    weights: str,
    seed: int | None,
    device_name: str,
    json_file: Path | None,
) -> None:
    """Encode data into their latents, by the probability-flow ODE from data to noise.

    The file holds latents z, the data x in model range, and the settings; "scoresde decode" takes
    it back to data.

    \b
    Examples:
      scoresde encode --items 8 --check
      scoresde encode runs/digits-vp --data digits --items 100 --out latents.npz
      scoresde encode runs/digits-vp --data digit.png --solver dpmpp-3m --steps 100
    """  # fmt: skip
    from ..checkpoint import load
    from .latent_files import (
        labels_for,
        round_trip,
        round_trip_line,
        settings_of,
        write_latents,
    )

    if out.suffix != ".npz":
        raise ValueError(f"cannot write {out}: latents go into a .npz file")
    options.check_apart(out, json_file)
    device = options.pick_device(device_name)
    model = load(run, weights=weights, device=device)
    source = find_data(model, run, data, split)
    n = min(items or DEFAULT_ITEMS, len(source))
    y = labels_for(model, None if source.y is None else source.y[:n], label, n)
    how = settings_of(solver, steps, grid, settings)
    found, x, back = run_all(
        model, source, n, y, batch, seed or 0, dequantize, check, {**how, "t_min": t_min}
    )
    write_latents(out, model, found, x, y, {"model": run, "data": source.name, "seed": seed or 0,
                                            "dequantize": dequantize})  # fmt: skip
    size = float(found.z.double().square().mean().sqrt())
    figures: dict[str, Any] = {
        "model": run, "data": source.name, "items": n,
        "nfe": float(found.nfe.double().mean()), "seconds": found.seconds,
        "converged": bool(found.converged.all()), "message": found.message,
        "latent_rms": size, "prior_std": model.sde.prior_std,
        "solver": found.solver, "grid": found.grid, "steps": found.steps,
        "t_min": found.t_min, "t_max": found.t_max, "dequantize": dequantize,
        "seed": seed or 0, "weights": found.weights,
    }  # fmt: skip
    if back is not None:
        figures |= round_trip(model, x, back)
    options.write_json(json_file, {**figures, "versions": options.versions(device)})
    if found.message:
        click.echo(f"Warning: {found.message}", err=True)
    options.speak(
        f"{n} items of {source.name} under {run} by {found.solver['name']}: "
        f"{figures['nfe']:.4g} evaluations each, {found.seconds:.1f} s, "
        f"t from {found.t_min:g} to {found.t_max:g}, {found.weights} weights; "
        f"latents of RMS {size:.4g}, the prior's {model.sde.prior_std:.4g}"
    )
    if back is not None:
        options.speak(round_trip_line(figures))
    options.speak(f"written {out}")


def find_data(model: ScoreModel, run: str, source: str | None, split: str) -> Dataset:
    """The named data, an image file, or what the run held out; checked to fit the model.

    Raises:
        ValueError: data of another shape or of other levels than the model's.
    """
    from dataclasses import replace

    from ..data import Dataset
    from .heldout import held_out_data
    from .items import is_picture, read_picture

    levels = None if model.scaler is None else model.scaler.levels
    if source is not None and Path(source).is_file() and is_picture(Path(source)):
        return Dataset(read_picture(model, Path(source)), levels=levels, name=source)
    data = held_out_data(run, source, split)
    if model.shape is not None and tuple(data.shape) != tuple(model.shape):
        raise ValueError(
            f"{data.name} holds items of shape {tuple(data.shape)}, and the model takes "
            f"items of {tuple(model.shape)}"
        )
    if (
        source is not None and source.endswith((".npy", ".npz")) and levels and data.levels
        and int(data.x.max()) < levels
    ):  # fmt: skip
        data = replace(data, levels=levels)  # an array's type says only how many there may be
    if data.levels != levels:
        raise ValueError(
            f"{data.name} holds data with levels={data.levels}, and the model was trained on "
            f"data with levels={levels}"
        )
    return data


def run_all(
    model: ScoreModel,
    source: Dataset,
    n: int,
    y: Any,
    batch: int,
    seed: int,
    dequantize: bool,
    check: bool,
    settings: dict[str, Any],
) -> tuple[Latents, Any, Any]:
    """Latents of ``n`` items in batches, the items in model range, and decoded if wanted."""
    from dataclasses import replace

    import torch

    from ..latents import decode, encode
    from .items import encode_items
    from .latent_files import batches

    device = next(model.parameters()).device
    parts, items, back = [], [], []
    for rows, cond in batches(n, batch, device, y):
        x = encode_items(model, source.x[rows].to(device), seed, rows.start, dequantize)
        series = {"start_index": rows.start, "progress": options.on_screen(), **cond}
        part = encode(model, x, **settings, **series)
        if check:
            found = decode(model, part, **series)
            back.append(found.x.cpu())
        parts.append(part)
        items.append(x.cpu())
    whole = replace(
        next((p for p in parts if p.message), parts[0]),
        z=torch.cat([p.z for p in parts]),
        nfe=torch.cat([p.nfe for p in parts]),
        converged=torch.cat([p.converged for p in parts]),
        seconds=sum(p.seconds for p in parts),
    )
    return whole, torch.cat(items), torch.cat(back) if back else None
