"""``scoresde inpaint``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import specs
from .restore import Problem, Settings, items, measured, restore, restoring

if TYPE_CHECKING:
    import torch

    from ..inverse import Operator
    from ..model import ScoreModel


@click.command(name="inpaint")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option(
    "--mask", default="middle-box", show_default=True, metavar="MASK",
    help="What is known: a black and white picture (white = known), or middle-box:side=0.5, "
    "half:side=top, outpaint, stripes, strokes:seed=1, random-pixels:share=0.2.",
)  # fmt: skip
@click.option("--invert", is_flag=True, help="White pixels of the mask's picture are unknown.")
@restoring
def command(images: tuple[str, ...], mask: str, invert: bool, chosen: Settings) -> None:
    """Fill in what a mask hides of IMAGE, several times over.

    IMAGE is an image file, a .npy of one item in data units (FILE.npy:3 for the fourth of
    several), or the index of an item that the run held out. The picture shows input, what is
    known of it, the results, their mean and their standard deviation.

    \b
    Examples:
      scoresde inpaint 0 1 2
      scoresde inpaint photo.png --mask mask.png --model runs/faces --draws 8
      scoresde inpaint 3 --mask half:side=top --method repaint --steps 100
      scoresde inpaint 3 --method smc:particles=64 --noise 0.05 --json figures.json
    """

    def problem(model: ScoreModel, chosen: Settings, device: torch.device) -> Problem:
        x, names = items(model, chosen, images, device)
        return measured(mask_of(mask, invert, tuple(x.shape[1:])), x, names, chosen, "known")

    restore(chosen, problem, "inpaint")


def mask_of(text: str, invert: bool, shape: tuple[int, ...]) -> Operator:
    """The mask that ``--mask`` names: a picture file, or a region by its name."""
    from ..config import build
    from ..inverse import Mask, operators

    if Path(text).is_file():
        return operators.Picture(shape, file=Path(text), white="unknown" if invert else "known")
    if invert:
        raise ValueError("--invert is about the picture of a mask, and --mask is no such file")
    if Path(text).suffix.lower() in (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp"):
        raise ValueError(f"cannot read the mask {text}: there is no such file")
    section: dict[str, Any] = specs.section(text, "mask")
    operator: Operator = build(section, operators, "mask", shape=shape)
    if not isinstance(operator, Mask):
        raise ValueError(
            f"{section['name']!r} is no mask: take `scoresde solve --operator {text}`"
        )
    return operator
