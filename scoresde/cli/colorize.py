"""``scoresde colorize``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from .restore import Problem, Settings, items, measured, restore, restoring

if TYPE_CHECKING:
    import torch

    from ..model import ScoreModel


@click.command(name="colorize")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@restoring
def command(images: tuple[str, ...], chosen: Settings) -> None:
    """Draw the colours that a grey picture could have had, under a model of colour pictures.

    IMAGE is an image file of the model's size, grey or coloured (its luma is then what is given),
    a .npy of one item in data units, or the index of an item that the run held out.

    \b
    Examples:
      scoresde colorize old.png --model runs/faces
      scoresde colorize 0 1 2 --model runs/faces --method pgdm --draws 6
    """

    def problem(model: ScoreModel, chosen: Settings, device: torch.device) -> Problem:
        from ..inverse import Grayscale

        shape = tuple(model.shape or ())
        if len(shape) != 3 or shape[0] != 3:
            raise ValueError(f"colorize needs a model of colour pictures (3, H, W), not {shape}")
        x, names = items(model, chosen, images, device)
        return measured(Grayscale(shape), x, names, chosen, "grey")

    restore(chosen, problem, "colorize")
