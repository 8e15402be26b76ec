"""The run that a command is to make: a new one, one that goes on, a model's; and making it."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import options

if TYPE_CHECKING:
    import torch

    from ..training import Job, Trainer
    from ..world import World

DEFAULT_STEPS = 3000
DEFAULT_MINUTES = 2.0


def asked_for(
    config_file: Path | None,
    settings: tuple[str, ...],
    sde: str | None,
    values: Mapping[str, Any],
    bounds: Mapping[str, Any],
) -> dict[str, Any]:
    """The sections that a command line asks for.

    Args:
        config_file: YAML.
        settings: ``section.key=value`` each, laid over it.
        sde: name of the process.
        values: of options, by ``section.key``; None where they are not given.
        bounds: of the run, likewise by key; one that is given replaces all of the file.
    """
    from ..config import merge, override, read_config

    config = read_config(config_file)
    if sde:
        config = merge(config, {"sde": {"name": sde}})
    for setting in settings:
        override(config, setting)
    for key, value in values.items():
        if value is not None:
            section, _, field = key.partition(".")
            config.setdefault(section, {})[field] = value
    if any(v is not None for v in bounds.values()):
        config.setdefault("training", {}).update(bounds)
    return config


def default_folder(config: dict[str, Any], suffix: str | None = None) -> Path:
    """``runs/DATA-SDE``, or ``runs/DATA-SUFFIX``."""
    source = str(config.get("data", {}).get("source", "digits"))
    name = re.sub(r"[^A-Za-z0-9]+", "-", Path(source.removeprefix("hf:")).stem).strip("-")
    suffix = suffix or config.get("sde", {}).get("name", "vp")
    return Path("runs") / f"{name or 'data'}-{suffix}"


def turn(
    folder: Path, resume: bool, restartable: bool, overwrite: bool, world: World
) -> tuple[bool, bool]:
    """Whether the run in a folder goes on, and whether it is replaced.

    Raises:
        ValueError: if there is none to go on with, or one that is not to be replaced.
        UsageError: for options that exclude each other.
    """
    from ..saved_steps import step_folders
    from ..training.summary import is_run

    if (resume or restartable) and overwrite:
        going = "--resume" if resume else "--restartable"
        raise click.UsageError(f"{going} and --overwrite exclude each other")
    if restartable:
        resume = world.broadcast(bool(step_folders(folder)))
        overwrite = not resume and is_run(folder)  # it ended before anything was saved
    if resume and not step_folders(folder):
        raise ValueError(f"no run to go on with: {folder} holds no checkpoint")
    if not resume and world.main:
        refuse_existing(folder, overwrite)
    return resume, overwrite


def refuse_existing(folder: Path, overwrite: bool) -> None:
    """A folder in use is never overwritten unasked, and only a run's folder is at all."""
    from ..training.summary import is_run

    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"cannot write the run to {folder}: it is a file")
    if not any(folder.iterdir()):
        return
    if not is_run(folder):
        raise ValueError(f"{folder} exists and is no run of scoresde; choose another --out")
    if not overwrite:
        raise ValueError(
            f"the run {folder} exists: --resume goes on with it, --overwrite replaces it, "
            f"--out DIR starts another"
        )


def remove_run(folder: Path) -> None:
    """Removes what a run has written into its folder, and nothing else."""
    for name in ("checkpoints", "samples", "logs", "bench", "snapshots", "averages"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("config.yaml", "report.json", "loss.png"):
        (folder / name).unlink(missing_ok=True)


def resumed(
    folder: Path,
    asked: dict[str, Any],
    device: torch.device,
    make: Callable[[dict[str, Any], Path, torch.device], Job] | None = None,
) -> Job:
    """The job of an existing run: options may change how it goes on, not what it is.

    Args:
        folder: of the run.
        asked: the sections that are asked for.
        device: where it trains.
        make: makes a job of sections, of a classifier; that of a score model by default.

    Raises:
        ConfigError: if a section that makes the model, or the data, is no longer the same.
    """
    from ..checkpoint import CLASSIFIER, locate
    from ..config import SECTIONS, ConfigError, construct, describe, merge, read_yaml
    from ..data import DataConfig
    from ..training import prepare as prepare_score

    prepare = make or prepare_score
    stored = read_yaml(locate(folder) / "config.yaml")
    if (CLASSIFIER in stored) != (make is not None):
        ours, other = (
            ("a classifier", "train-classifier") if make is None else ("a score", "train")
        )
        raise ConfigError(f"{folder} is the run of {ours}: go on with {other} --resume")
    kept = {k: v for k, v in stored.items() if k in SECTIONS}
    going = {k: v for k, v in asked.items() if k in ("training", "sampling", "likelihood")}
    made = {k: v for k, v in asked.items() if k not in going}

    def same(section: str, wanted: Any) -> None:
        if wanted != stored.get(section):
            raise ConfigError(
                f"--resume continues a run as it was: section {section!r} cannot change, "
                f"only training, sampling and likelihood can"
            )

    if "data" in made:  # first, since a network may not even take other data
        found = describe(construct(DataConfig, merge(kept, made)["data"], "data"))
        same("data", {k: v for k, v in found.items() if k != "name"})
    job = prepare(merge(kept, going), folder, device)
    wanted = prepare(merge(kept, made), folder, device).config if made else {}
    for section in made:
        same(section, wanted.get(section))
    for key in ("batch_size", "seed", "half_lives", "lengths"):  # an average has no late start
        if job.config["training"][key] != stored["training"].get(key, []):
            raise ConfigError(f"--resume continues a run as it was: training.{key} cannot change")
    for part in ("shape", "scaler"):
        if job.config[part] != stored.get(part):
            raise ConfigError(f"the data of {folder} have changed since: another {part} fits them")
    return job


def further(start: str, config: dict[str, Any], folder: Path, device: torch.device) -> Job:
    """The job that trains a model further: what the configuration leaves open is the model's.

    Conditions that the model has not had (``net.num_classes``, ``given``) come in with weights
    that are zero, so that training starts from what the model does without them.

    Raises:
        CheckpointError: if there is no such model, or its weights do not fit what is asked for.
    """
    from ..checkpoint import describe_model, fit, load, widened
    from ..config import merge
    from ..training import prepare

    model = load(start)
    told = describe_model(model)
    sections = ("sde", "parameterization", "net", "given")
    kept = {section: told[section] for section in sections if section in told}
    job = prepare(merge(kept, config), folder, device)
    tensors = model.net.state_dict()
    fit(job.model.net, widened(tensors, job.model.net.state_dict()), Path(start))
    if model.scaler is not None and model.scaler != job.model.scaler:
        options.speak(
            f"Warning: the data are scaled by {job.model.scaler}, those of {start} by "
            f"{model.scaler}: the model will have to learn another range"
        )
    return job


def with_bounds(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with the default length if it has none."""
    training = config.get("training", {})
    if not any(training.get(k) is not None for k in ("steps", "epochs", "minutes")):
        training = {**training, "steps": DEFAULT_STEPS, "minutes": DEFAULT_MINUTES}
    return {**config, "training": training}


def reported(folder: Path, step: int) -> bool:
    """Whether the report of a run is that of a step: a kill may have come before it."""
    try:
        found = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("steps") == step


def trained(trainer: Trainer, resume: bool, again: str, world: World, show: bool) -> bool:
    """Trains a run to its end, or to where it is stopped; whether a report is to be made.

    Args:
        trainer: of the run.
        resume: whether it goes on.
        again: the command that goes on with it.
        world: the processes that train it.
        show: whether to show a progress bar.

    Raises:
        KeyboardInterrupt, SystemExit: when it is stopped, after everything is saved.
    """
    from ..files import write_yaml
    from ..training import RESTART, Terminated

    job = trainer.job
    if resume:
        trainer.resume()
        options.speak(f"resumed at step {trainer.step}")
        if trainer.progress >= 1 and world.broadcast(reported(job.folder, trainer.step)):
            options.speak("the run has reached its end: raise --steps, --epochs or --minutes")
            return False
    if world.main:
        job.folder.mkdir(parents=True, exist_ok=True)
        write_yaml(job.folder / "config.yaml", job.config)
    try:
        trainer.run(show)
    except (KeyboardInterrupt, Terminated) as stop:
        if world.main:
            click.echo(
                f"\nstopped at step {trainer.step}; everything is saved. Go on with:\n  {again}",
                err=True,
            )
        if isinstance(stop, Terminated):
            sys.exit(RESTART)
        raise
    return world.main or job.training.shard


def figures_of(trainer: Trainer) -> dict[str, Any]:
    """What the report of any run says of its training."""
    job = trainer.job
    return {
        "steps": trainer.step,
        "items_seen": trainer.step * job.training.batch_size,
        "training_seconds": round(trainer.seconds, 1),
        "world": trainer.world.size,
        "parameters": sum(p.numel() for p in job.model.net.parameters()),
        "versions": options.versions(job.device),
    }


def about_run(job: Job, world: World) -> None:
    """Prints how long a run is, and where it goes."""
    training, say = job.training, options.speak
    ends = [f"{v:g} {k}" for k in ("steps", "epochs", "minutes") if (v := getattr(training, k))]
    size = "" if world.size == 1 else f" over {world.size} processes"
    say(f"run        {' or '.join(ends)}, batch {training.batch_size}{size}, "
        f"seed {training.seed}, on {job.device}, into {job.folder}")  # fmt: skip


def about_data(job: Job) -> None:
    """Prints what a run trains on."""
    items = "a stream" if job.train.size is None else f"{job.train.size} items"
    options.speak(
        f"data       {job.train.name}: {items} of {tuple(job.train.shape)}, "
        f"{len(job.heldout)} held out, "
        + (f"{job.train.levels} levels" if job.train.levels else "continuous")
    )


def shown(key: str, value: Any) -> str:
    """A field as ``key=value``, a number short."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return f"{key}={value:g}" if number else f"{key}={value}"
