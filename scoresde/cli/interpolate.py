"""``scoresde interpolate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import options
from .latent_files import solving, standing

if TYPE_CHECKING:
    from torch import Tensor

    from ..model import ScoreModel


@click.command(name="interpolate")
@click.argument("a")
@click.argument("b")
@click.option("--model", "run", default=options.DEFAULT_MODEL, show_default=True, metavar="RUN")
@click.option(
    "--count",
    type=click.IntRange(min=2),
    default=8,
    show_default=True,
    help="Items of the way, both ends included.",
)
@solving
@standing
@click.option(
    "--label",
    type=click.IntRange(min=0),
    help="Class for a conditional model; by default that of the held-out items.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    default=Path("interpolation.png"),
    show_default=True,
    help=".png for a picture, .npy for the items of the way in data units.",
)
@options.weights
@options.seed
@options.device
@options.report
def command(
    a: str,
    b: str,
    run: str,
    count: int,
    solver: str | None,
    steps: int | None,
    grid: str | None,
    settings: tuple[str, ...],
    t_min: float | None,
    label: int | None,
    dequantize: bool,
    out: Path,
    weights: str,
    seed: int | None,
    device_name: str,
    json_file: Path | None,
) -> None:
    """Draw the way from item A to item B through their latents.

    A and B are image files, .npy files of one item (FILE.npy:3 for the fourth of several), or
    indices of items that the run held out. The picture shows A, the way from A to B, and B: the
    ends of the way are A and B, encoded and decoded.

    \b
    Examples:
      scoresde interpolate 0 1
      scoresde interpolate a.png b.png --model runs/digits-vp --count 12 --out way.png
    """  # fmt: skip
    import torch

    from ..checkpoint import load
    from ..latents import interpolate
    from .items import encode_items, read_item
    from .latent_files import labels_for, round_trip, round_trip_line, settings_of

    options.check_drawn(out)
    options.check_apart(out, json_file)
    device = options.pick_device(device_name)
    model = load(run, weights=weights, device=device)
    ends = [read_item(model, run, text) for text in (a, b)]
    x = encode_items(
        model, torch.cat([end.x for end in ends]).to(device), seed or 0, 0, dequantize
    )
    known = {end.label for end in ends}
    if label is None and len(known) == 1 and None not in known:
        y = labels_for(model, torch.tensor([ends[0].label]), None, 1)
    else:
        y = labels_for(model, None, label, 1)
    how: dict[str, Any] = {**settings_of(solver, steps, grid, settings), "t_min": t_min}
    if y is not None:
        how["y"] = y.to(device)
    way = interpolate(model, x[:1], x[1:], count, progress=options.on_screen(), **how)
    draw(model, x, way.x[0], out)
    found = round_trip(model, x, torch.stack([way.x[0, 0], way.x[0, -1]]))
    parts = (way.start, way.end)
    messages = [m for m in (way.start.message, way.end.message, way.samples.message) if m]
    figures = {
        "model": run, "a": ends[0].name, "b": ends[1].name, "count": count,
        "nfe_encode": [float(p.nfe.double().mean()) for p in parts],
        "nfe_decode": way.samples.mean_nfe,
        "seconds": sum(p.seconds for p in parts) + way.samples.seconds,
        "converged": not messages, "message": "; ".join(messages),
        "solver": way.start.solver, "grid": way.start.grid, "steps": way.start.steps,
        "t_min": way.start.t_min, "t_max": way.start.t_max, "dequantize": dequantize,
        "seed": seed or 0, "weights": way.start.weights,
        "round_trip_ends": way.round_trip[0].tolist(), **found,
        "versions": options.versions(device),
    }  # fmt: skip
    options.write_json(json_file, figures)
    for message in messages:
        click.echo(f"Warning: {message}", err=True)
    nfe = sum(figures["nfe_encode"]) / 2
    options.speak(
        f"{count} items from {ends[0].name} to {ends[1].name} under {run} by "
        f"{way.start.solver['name']}: {nfe:.4g} evaluations to encode, "
        f"{way.samples.mean_nfe:.4g} to decode, {figures['seconds']:.1f} s, "
        f"{way.start.weights} weights"
    )
    options.speak(round_trip_line(found))
    options.speak(f"written {out}")


def draw(model: ScoreModel, ends: Tensor, way: Tensor, file: Path) -> None:
    """Both items and the way between them as one strip, or points in a plane; else the way alone.

    Args:
        model: of the items.
        ends: A and B in model range, ``(2, *shape)``.
        way: the way, ``(count, *shape)``.
        file: .png, or .npy for the way in data units.
    """
    import torch

    from ..pictures import as_images, save_way, tile
    from .sample import write

    images = None
    if file.suffix == ".png" and model.scaler is not None:
        images = as_images(model.scaler.image(torch.cat([ends, way])))
    if file.suffix == ".png" and way.ndim == 2 and way.shape[1] >= 2:
        shown = torch.cat([ends, way])
        shown = shown if model.scaler is None else model.scaler.decode(shown)
        with options.whole(file) as draft:
            save_way(draft, shown[:2], shown[2:])
        return
    if images is None:
        write(model, way, file)
        return
    gap = torch.full_like(images[:1], 32)  # the colour between the tiles
    strip = torch.cat([images[:1], gap, images[2:], gap, images[1:2]])
    with options.whole(file) as draft:
        tile(strip, columns=len(strip), scale=max(1, 64 // max(strip.shape[2:]))).save(draft)
