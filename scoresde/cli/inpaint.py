"""``scoresde inpaint``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .restore import Problem, Settings, items, measured, operator_of, restore, restoring

if TYPE_CHECKING:
    import torch

    from ..inverse import Mask
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


def mask_of(text: str, invert: bool, shape: tuple[int, ...], crop: bool = False) -> Mask:
    """The mask that ``--mask`` names: a picture file, or a region by its name.

    Args:
        text: the file, or name and fields of the region.
        invert: whether white pixels are unknown.
        shape: of an item.
        crop: whether a picture of other proportions is cropped, as items are by ``--resize``.

    Raises:
        ValueError: for what is no mask, or one that hides nothing.
    """
    from ..inverse import operators

    named, _, rest = text.partition(":file=")
    text = rest if named == "picture" and rest else text
    if Path(text).is_file():
        white: Any = "unknown" if invert else "known"
        try:
            mask: Mask = operators.Picture(shape, file=Path(text), white=white, crop=crop)
        except ValueError as error:
            what = str(error).removeprefix(f"cannot read the mask {text}: ")
            raise ValueError(f"cannot take the mask {text}: {what}") from error
    else:
        if invert:
            raise ValueError("--invert is about the picture of a mask, and --mask is no such file")
        if Path(text).suffix.lower() in FILES or Path(text).exists():
            raise ValueError(f"cannot read the mask {text}: there is no such file")
        mask = operator_of(text, shape, "mask")  # type: ignore[assignment]
    if bool(mask.mask.all()):
        raise ValueError(f"the mask {text} leaves nothing to draw: all of it is known")
    return mask


FILES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".npy", ".npz")
