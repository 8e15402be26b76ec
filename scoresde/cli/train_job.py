"""The run that ``scoresde train`` is to make: a new one, one that goes on, a model's."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import options

if TYPE_CHECKING:
    import torch

    from ..training import Job

DEFAULT_STEPS = 3000
DEFAULT_MINUTES = 2.0


def default_folder(config: dict[str, Any]) -> Path:
    """``runs/DATA-SDE``."""
    source = str(config.get("data", {}).get("source", "digits"))
    name = re.sub(r"[^A-Za-z0-9]+", "-", Path(source.removeprefix("hf:")).stem).strip("-")
    return Path("runs") / f"{name or 'data'}-{config.get('sde', {}).get('name', 'vp')}"


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


def resumed(folder: Path, asked: dict[str, Any], device: torch.device) -> Job:
    """The job of an existing run: options may change how it goes on, not what it is.

    Raises:
        ConfigError: if a section that makes the model, or the data, is no longer the same.
    """
    from ..checkpoint import locate
    from ..config import SECTIONS, ConfigError, construct, describe, merge, read_yaml
    from ..data import DataConfig
    from ..training import prepare

    stored = read_yaml(locate(folder) / "config.yaml")
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
