"""``scoresde superres``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from .restore import Problem, Settings, items, measured, restore, restoring

if TYPE_CHECKING:
    import torch

    from ..model import ScoreModel

KERNELS = ("average-pool", "bicubic")


@click.command(name="superres")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option("--factor", type=click.IntRange(min=2), default=4, show_default=True,
              help="How many times smaller each side of the measurement is.")  # fmt: skip
@click.option("--kernel", type=click.Choice(KERNELS), default="average-pool", show_default=True,
              help="How the small picture came about.")  # fmt: skip
@click.option("--small", is_flag=True,
              help="IMAGE is the small picture itself, not one to be made small.")  # fmt: skip
@restoring
def command(
    images: tuple[str, ...], factor: int, kernel: str, small: bool, chosen: Settings
) -> None:
    """Draw what a small picture could have been at full size.

    IMAGE is a picture of the model's size, which the command makes small and restores, or with
    --small the small one. It is an image file, a .npy of one item in data units, or the index of
    an item that the run held out.

    \b
    Examples:
      scoresde superres 0 1 2
      scoresde superres photo.png --model runs/faces --factor 2 --kernel bicubic
      scoresde superres thumbnail.png --small --model runs/faces --draws 8
    """

    def problem(model: ScoreModel, chosen: Settings, device: torch.device) -> Problem:
        from ..config import build
        from ..inverse import operators

        shape = tuple(model.shape or ())
        section = {"name": kernel, "factor": factor}
        operator = build(section, operators, "operator", shape=shape)
        if small:
            y, names = small_items(model, operator.out, images, device)
            return Problem(operator, y, None, names, "low resolution")
        x, names = items(model, chosen, images, device)
        return measured(operator, x, names, chosen, "low resolution")

    restore(chosen, problem, "superres")


def small_items(
    model: ScoreModel, shape: tuple[int, ...], texts: tuple[str, ...], device: torch.device
) -> tuple[torch.Tensor, list[str]]:
    """Small pictures in model range, ``(N, *shape)``.

    Raises:
        ValueError: for what is no picture, or one of another size.
    """
    from pathlib import Path

    import torch

    from .items import is_picture, read_picture

    found = []
    for text in texts:
        if not (Path(text).is_file() and is_picture(Path(text))):
            raise ValueError(f"--small needs picture files, got {text!r}")
        found.append(read_picture(model, Path(text), shape))
    x = torch.cat(found).to(device)
    scaler = model.scaler
    encoded = x.float() if scaler is None else scaler.encode(x, dequantize=False).float()
    return encoded, list(texts)
