"""What a finished run leaves behind: pictures, held-out likelihood and ``report.json``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from ..files import write_json
from ..likelihood.dataset import DatasetLikelihood, dataset_log_prob
from ..pictures import save_curves, save_items
from ..sampling import Samples, sample
from .job import Job
from .log import Log

if TYPE_CHECKING:
    from ..model import ScoreModel


def draw_samples(model: ScoreModel, job: Job) -> Samples:
    """The samples of the run's ``sampling`` section: the same noise at every call."""
    chosen = job.sampling
    cond: dict[str, Any] = {}
    if job.conditional:
        classes = model.net.num_classes
        cond["y"] = (torch.arange(chosen.count) % int(classes)).to(job.device)  # type: ignore[arg-type]
    return sample(
        model,
        (chosen.count, *job.train.shape),
        solver=chosen.solver,
        steps=chosen.steps,
        grid=chosen.grid,
        seed=chosen.seed,
        **cond,
    )


def save_samples(model: ScoreModel, job: Job, name: str) -> Samples:
    """Draws samples and writes their picture ``samples/NAME.png``."""
    assert model.scaler is not None
    drawn = draw_samples(model, job)
    file = job.folder / "samples" / f"{name}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    pictures = len(job.train.shape) > 2
    shown = model.scaler.image(drawn.x) if pictures else model.scaler.decode(drawn.x)
    save_items(file, shown, None if pictures else job.heldout.x[:2000])
    return drawn


def held_out(model: ScoreModel, job: Job, progress: Callable[[int], object]) -> DatasetLikelihood:
    """Likelihood of held-out items by the run's ``likelihood`` section."""
    settings = asdict(job.likelihood)
    return dataset_log_prob(
        model, job.heldout, labels=job.conditional, progress=progress, **settings
    )


def finish(
    model: ScoreModel, job: Job, figures: dict[str, Any], show_progress: bool
) -> dict[str, Any]:
    """Writes the sample grid, the loss curve and ``report.json``; returns the report."""
    from tqdm import tqdm

    drawn = save_samples(model, job, "final")
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
    if job.likelihood.items:
        total = min(job.likelihood.items, len(job.heldout)) * (
            job.likelihood.draws if job.heldout.levels else 1
        )
        with tqdm(
            total=total, desc="likelihood", disable=not show_progress, leave=False, unit="item"
        ) as bar:
            report["heldout"] = held_out(model, job, bar.update).summary()
    write_json(job.folder / "report.json", report)
    return report


def save_loss_curve(job: Job) -> None:
    """Draws ``loss.png`` from the logs: training loss, and held-out loss of the average."""
    log = Log(job.folder)
    train, heldout = log.rows("train"), log.rows("heldout")
    curves = {"training loss": ([r["step"] for r in train], [r["loss"] for r in train])}
    if heldout:
        losses = [r["loss"] for r in heldout]
        curves["held out, averaged weights"] = ([r["step"] for r in heldout], losses)
    save_curves(job.folder / "loss.png", curves, "loss a dimension")
