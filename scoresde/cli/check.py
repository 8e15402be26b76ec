"""``scoresde check``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from . import options

FEW, MOST, SECONDS = 4, 64, 2.0  # batches and time that tell how fast items come


@click.command(name="check")
@click.argument("source", required=False)
@click.option("--config", "config_file", type=click.Path(dir_okay=False, path_type=Path),
              metavar="FILE", help="The configuration that is to train on the data.")  # fmt: skip
@click.option("--sde", metavar="NAME", help="The process that is to train on the data.")
@options.settings("Set one value, as in --set net.preset=small; may be repeated.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Write a picture of the first items, as the trainer sees them.")  # fmt: skip
@options.device
@options.report
def command(
    source: str | None,
    config_file: Path | None,
    sde: str | None,
    settings: tuple[str, ...],
    out: Path | None,
    device_name: str,
    json_file: Path | None,
) -> None:
    """Show what data look like to the trainer, and what training on them would cost.

    Reports shape, range, moments, constant entries, the proposed sigma_max, what the process
    leaves of the data, and the memory and time of a step measured on this machine.

    \b
    Examples:
      scoresde check
      scoresde check path/to/images --sde ve --set net.preset=small
    """
    from ..config import merge, override, read_config

    options.check_writable(json_file)
    options.check_writable(out)
    config = read_config(config_file)
    if sde:
        config = merge(config, {"sde": {"name": sde}})
    for setting in settings:
        override(config, setting)
    if source is not None:
        config.setdefault("data", {})["source"] = source
    device = options.pick_device(device_name)

    from ..pictures import save_items
    from ..training import prepare

    job = prepare(config, Path("runs"), device)
    facts = {**data_facts(job), **reading_facts(job), **cost_facts(job)}
    options.write_json(json_file, facts)
    for key, value in facts.items():
        options.speak(f"{key:<24} {value}")
    if out is not None:
        scaler = job.model.scaler
        assert scaler is not None
        z = scaler.encode(job.train.probe(64), dequantize=False)
        save_items(out, scaler.image(z) if z.ndim > 3 else job.train.probe(2000))
        options.speak(f"written {out}")


def data_facts(job: Any) -> dict[str, Any]:
    """What the trainer will see."""
    from ..sde.terminal import auto_sigma_max

    scaler = job.model.scaler
    raw = job.train.probe(5000)
    x, raw = scaler.encode(raw, dequantize=False), raw.float()
    classes = job.train.num_classes or "no labels"
    if job.train.vectors is not None:
        classes = f"vectors of {job.train.vectors}"
    count = "as many as come" if job.train.size is None else job.train.size
    constant = int((x.flatten(1).std(0) == 0).sum())
    return {
        "items": f"{count} to train on, {len(job.heldout)} held out",
        "shape": tuple(job.train.shape),
        "levels": job.train.levels or "continuous",
        "classes": classes,
        "data range": f"{float(raw.min()):g} to {float(raw.max()):g}",
        "data mean, std": f"{float(raw.mean()):.4g}, {float(raw.std()):.4g}",
        "constant entries": f"{constant} of {x[0].numel()}",
        "model range": f"{float(x.min()):.4g} to {float(x.max()):.4g}",
        "model mean, std": f"{float(x.mean()):.4g}, {float(x.std()):.4g}",
        "proposed sigma_max": f"{auto_sigma_max(x):.4g} (largest distance of two items)",
        "left at t_max": f"SNR {job.left.snr:.2e}, KL to the prior {job.left.kl:.3g} nats an item",
    }


def reading_facts(job: Any) -> dict[str, Any]:
    """Where the items are, how fast they come, and what could not be read of the first ones."""
    import time

    from ..data import Dataset, Share, choose_workers

    training, held = job.training, isinstance(job.train, Dataset)
    workers = training.workers
    workers = choose_workers(job.train) if workers is None or held else workers
    share = Share(training.batch_size, training.seed, workers=workers)
    notes: list[str] = []
    batches, started = 0, 0.0
    with job.train.loader(share) as loader:
        for batch in loader:
            notes += batch.notes
            if batches == 0:
                started = time.perf_counter()  # once the workers have started
            batches += 1
            seconds = time.perf_counter() - started
            if batches > MOST or (batches > FEW and seconds > SECONDS):
                break
    rate = (batches - 1) * training.batch_size / max(seconds, 1e-9)
    seen = batches * training.batch_size
    return {
        "held": "in memory" if held else "read when needed",
        "loader": f"{rate:.0f} items/s, {workers} workers",
        "notes": "; ".join(notes) or f"none: the first {seen} drawn can be read",
    }


def _pass(job: Any, seconds: float) -> dict[str, str]:
    """The time of a pass, at so many seconds an item, over data whose number is known."""
    if job.train.size is None:
        return {}
    return {"a pass over the data": f"{seconds * job.train.size:.0f} s"}


def cost_facts(job: Any) -> dict[str, Any]:
    """Time and memory of one step, from a few steps that are thrown away."""
    import time

    import torch

    from ..training import Trainer

    trainer = Trainer(job)
    trainer.learn()
    started = time.perf_counter()
    for _ in range(3):
        trainer.learn()
    if job.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / 3
    parameters = sum(p.numel() for p in job.model.net.parameters())
    size = job.training.batch_size
    facts = {
        "network": f"{parameters:,} parameters",
        "step": f"{seconds:.3f} s for a batch of {size} on {job.device}",
        **_pass(job, seconds / size),
        # raw and averaged weights, gradient and two moments of Adam, four bytes each
        "memory of the state": f"{parameters * 20 / 2**20:.0f} MiB and activations",
    }
    if job.device.type == "cuda":
        facts["peak memory"] = f"{torch.cuda.max_memory_allocated() / 2**20:.0f} MiB"
    return facts
