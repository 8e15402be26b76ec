"""``scoresde solve``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .restore import Problem, Settings, items, measured, operator_of, restore, restoring

if TYPE_CHECKING:
    import torch

    from ..model import ScoreModel


@click.command(name="solve")
@click.argument("images", nargs=-1, metavar="[IMAGE...]")
@click.option(
    "--operator", "text", required=True, metavar="OPERATOR",
    help="average-pool:factor=4, bicubic:factor=4, grayscale, blur:std=2, motion-blur:length=7, "
    "random-projection:count=100, fourier-lines, middle-box, half, outpaint, stripes, strokes, "
    "random-pixels; fields after colons.",
)  # fmt: skip
@click.option(
    "--measurement", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.npy",
    help="Real measurements in model range, (N, ...), in the place of IMAGE.",
)  # fmt: skip
@restoring
def command(
    images: tuple[str, ...], text: str, measurement: Path | None, chosen: Settings
) -> None:
    """Solve a linear inverse problem y = A x + noise, under a model of x.

    IMAGE is measured by the operator, with noise if --noise says so, and then restored: an image
    file, a .npy of one item in data units, or the index of an item that the run held out.

    \b
    Examples:
      scoresde solve 0 1 2 --operator blur:std=1.5 --noise 0.05
      scoresde solve 0 --operator random-projection:count=100 --method mmps:iterations=3
      scoresde solve 0 --operator fourier-lines --method ddrm --steps 20
      scoresde solve --operator average-pool:factor=4 --measurement y.npy --out restored.npy
    """
    if bool(images) == (measurement is not None):
        raise click.UsageError("give IMAGE... or --measurement, one of the two")

    def problem(model: ScoreModel, chosen: Settings, device: torch.device) -> Problem:
        operator = operator_of(text, tuple(model.shape or ()), "operator")
        if measurement is not None:
            y = read_measurement(measurement, operator.out).to(device)
            return Problem(operator, y, None, [f"{measurement}:{i}" for i in range(len(y))])
        x, names = items(model, chosen, images, device)
        return measured(operator, x, names, chosen)

    restore(chosen, problem, "solve")


def read_measurement(file: Path, out: tuple[int, ...]) -> torch.Tensor:
    """Measurements of a .npy file, ``(N, *out)``, float32.

    Raises:
        ValueError: for a file that cannot be read, or another shape.
    """
    import numpy as np
    import torch

    try:
        values = np.load(file, allow_pickle=False)
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file} cannot be read: it holds no array of NumPy") from error
    if values.dtype.kind not in "biuf":
        raise ValueError(f"{file} holds {values.dtype}; a measurement is made of numbers")
    y = torch.from_numpy(np.ascontiguousarray(values)).float()
    y = y[None] if tuple(y.shape) == tuple(out) else y
    if tuple(y.shape[1:]) != tuple(out) or not len(y):
        shape = ", ".join(map(str, ("N", *out)))
        raise ValueError(f"{file} is of shape {tuple(values.shape)}; measurements are ({shape})")
    if not bool(y.isfinite().all()):
        raise ValueError(f"{file} holds values that are not finite")
    return y
