"""What a finished run leaves behind: pictures, held-out likelihood and ``report.json``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..data.dataset import spread
from ..files import CheckpointError, write_json
from ..likelihood.dataset import DatasetLikelihood, dataset_log_prob
from ..model import always_given
from ..pictures import save_items
from ..sampling import Samples, sample
from .job import Job
from .log import Log
from .loss_picture import draw
from .summary import noise_levels

if TYPE_CHECKING:
    from ..model import ScoreModel


def draw_samples(model: ScoreModel, job: Job) -> Samples:
    """The samples of the run's ``sampling`` section: the same noise at every call."""
    chosen = job.sampling
    cond: dict[str, Any] = {}
    # Held-out items, from all over the set, which may lie class by class.
    held = spread(len(job.heldout), chosen.count)
    index = held[torch.arange(chosen.count) % len(held)]
    if job.conditional and (job.train.vectors or model.given is not None):
        assert job.heldout.y is not None  # of an item all conditions, which belong together
        cond["y"] = job.heldout.y[index].to(job.device)
    elif job.conditional:
        classes = model.net.num_classes
        cond["y"] = (torch.arange(chosen.count) % int(classes)).to(job.device)  # type: ignore[arg-type]
    if model.given is not None:
        assert model.scaler is not None
        x0 = model.scaler.encode(job.heldout.x[index].to(job.device), dequantize=False).float()
        generator = torch.Generator(job.device).manual_seed(chosen.seed)
        cond["image"] = model.given.draw(x0, generator)
    return sample(
        model,
        (chosen.count, *job.train.shape),
        solver=chosen.solver,
        steps=chosen.steps,
        grid=chosen.grid,
        seed=chosen.seed,
        **cond,
    )


def save_samples(model: ScoreModel, job: Job, name: str, write: bool = True) -> Tensor | None:
    """Draws samples and writes their picture ``samples/NAME.png``.

    Args:
        model: the model that draws.
        job: its run.
        name: of the picture.
        write: whether this process writes; all draw where they share the weights.

    Returns:
        The picture, uint8 ``(C, H, W)``; None where nothing is written.
    """
    drawn = draw_samples(model, job)
    return show_samples(model, job, drawn, name) if write else None


def show_samples(model: ScoreModel, job: Job, drawn: Samples, name: str) -> Tensor:
    """Writes the picture ``samples/NAME.png`` of samples; returns it, uint8 ``(C, H, W)``."""
    assert model.scaler is not None
    file = job.folder / "samples" / f"{name}.png"
    pictures = len(job.train.shape) > 2
    shown = model.scaler.image(drawn.x) if pictures else model.scaler.decode(drawn.x)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_items(file, shown, None if pictures else job.heldout.x[:2000])
    except OSError as error:
        raise CheckpointError(f"cannot write {file}: {error.strerror or error}") from error
    return pixels(file)


def pixels(file: Path) -> Tensor:
    """A picture file as uint8 ``(C, H, W)``, C of 1 for grey and else 3."""
    from PIL import Image

    with Image.open(file) as image:
        array = np.array(image.convert("L" if image.mode == "L" else "RGB"))
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)


def held_out(model: ScoreModel, job: Job, progress: Callable[[int], object]) -> DatasetLikelihood:
    """Likelihood of held-out items by the run's ``likelihood`` section."""
    settings = asdict(job.likelihood)
    return dataset_log_prob(
        model, job.heldout, labels=job.conditional, progress=progress, **settings
    )


def finish(
    model: ScoreModel,
    job: Job,
    figures: dict[str, Any],
    show_progress: bool,
    write: bool = True,
) -> dict[str, Any]:
    """Writes the sample grid, the loss curve and ``report.json``; returns the report.

    A model that was never without an image of its item has no likelihood of its own.

    Args:
        model: the trained model.
        job: its run.
        figures: what else the report says.
        show_progress: whether to show a progress bar.
        write: whether this process writes; all compute where they share the weights.
    """
    from tqdm import tqdm

    drawn = draw_samples(model, job)
    if write:
        show_samples(model, job, drawn, "final")
        save_loss_curve(job)
    report = {
        **figures,
        "sampling": {
            "count": len(drawn.x),
            "nfe": drawn.mean_nfe,
            "seconds": drawn.seconds,
            "converged": drawn.converged,
            "solver": drawn.solver,
            "grid": drawn.grid,
            "steps": drawn.steps,
            "seed": drawn.seed,
            "weights": drawn.weights,
        },
    }
    if job.likelihood.items and not always_given(model):
        total = min(job.likelihood.items, len(job.heldout)) * (
            job.likelihood.draws if job.heldout.levels else 1
        )
        with tqdm(
            total=total, desc="likelihood", disable=not show_progress, leave=False, unit="item"
        ) as bar:
            report["heldout"] = held_out(model, job, bar.update).summary()
    if write:
        write_json(job.folder / "report.json", report)
    return report


def save_loss_curve(job: Job) -> None:
    """Draws ``loss.png`` from the logs: training and held-out loss, and that by noise level."""
    log = Log(job.folder)
    train, heldout = log.rows("train"), log.rows("heldout")
    bins = next((len(r["loss_by_time"]) for r in train if r.get("loss_by_time")), 0)
    edges = noise_levels(job.model.sde, bins) if bins else None
    file = job.folder / "loss.png"
    try:
        unit = "loss an item, nats" if job.whole else "loss a dimension"
        draw(file, train, heldout, edges, unit)
    except OSError as error:
        raise CheckpointError(f"cannot write {file}: {error.strerror or error}") from error
