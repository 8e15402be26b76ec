"""``scoresde dequantize``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from . import options


@click.command(name="dequantize")
@click.argument("run", default=options.DEFAULT_MODEL)
@click.option("--data", metavar="SOURCE", help="By default what the run was trained on.")
@click.option("--minutes", type=float, help="Of fitting.  [default: 2]")
@click.option("--steps", type=click.IntRange(min=1), help="Of fitting, instead of minutes.")
@click.option("--lr", type=float, default=2e-3, show_default=True)
@click.option("--batch", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--width", type=click.IntRange(min=1), default=32, show_default=True,
              help="Channels of the flow's networks.")  # fmt: skip
@click.option("--couplings", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True,
              metavar="FOLDER", help="Where the flow is written.")  # fmt: skip
@options.weights
@options.seed
@options.device
def command(
    run: str,
    data: str | None,
    minutes: float | None,
    steps: int | None,
    lr: float,
    batch: int,
    width: int,
    couplings: int,
    out: Path,
    weights: str,
    seed: int | None,
    device_name: str,
) -> None:
    """Fit a variational dequantisation to a model of discrete data.

    It starts as uniform noise, and learns where in its bin a model wants each value.

    \b
    Examples:
      scoresde dequantize zoo:digits --minutes 2 --out flow
      scoresde likelihood zoo:digits --dequantization variational:folder=flow
    """
    from tqdm import tqdm

    from ..checkpoint import load
    from ..likelihood import fit_dequantizer
    from .heldout import conditional, held_out_data

    if minutes is not None and steps is not None:
        raise ValueError("--minutes and --steps are two lengths: give one")
    if steps is None:
        minutes = 2.0 if minutes is None else minutes
    options.check_writable(out / "dequantizer.yaml")
    model = load(run, weights=weights, device=options.pick_device(device_name))
    train = held_out_data(run, data, "train", train=True)
    labelled = conditional(model) and train.y is not None
    cond: dict[str, Any] = {"y": train.y} if labelled else {}
    with tqdm(total=100, disable=not options.on_screen(), leave=False, unit="%") as bar:

        def tell(done: float, nats: float) -> None:
            bar.update(int(100 * done) - bar.n)
            bar.set_postfix_str(f"{nats:.2f} nats and a constant")

        flow = fit_dequantizer(
            model, train.x, steps=steps, minutes=minutes, lr=lr, batch=batch, seed=seed or 0,
            width=width, couplings=couplings, progress=tell, **cond,
        )  # fmt: skip
    flow.save(out)
    options.speak(f"written {out}: --dequantization variational:folder={out}")
