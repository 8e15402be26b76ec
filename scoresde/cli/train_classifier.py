"""``scoresde train-classifier``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import options
from .train_job import (
    about_data,
    about_run,
    asked_for,
    default_folder,
    figures_of,
    remove_run,
    resumed,
    shown,
    trained,
    turn,
    with_bounds,
)

if TYPE_CHECKING:
    import torch

    from ..training import Job
    from ..world import World


@click.command(name="train-classifier")
@click.option("--sde", metavar="NAME", help="vp, subvp, ve, cosine, edm, linear or ddpm.")
@click.option("--data", metavar="SOURCE", help="digits, a toy's name, a path, or hf:owner/name.")
@click.option(
    "--like", metavar="MODEL", help="Process and range of this score model, which it is to guide."
)
@click.option(
    "--clean", type=click.FloatRange(0, 1), is_flag=False, flag_value=1.0, metavar="[SHARE]",
    help="Share of items without noise; all if none is said, for a judge of clean items.",
)  # fmt: skip
@click.option(
    "--config", "config_file", metavar="FILE", help="YAML with sections over the defaults.",
    type=click.Path(dir_okay=False, path_type=Path),
)  # fmt: skip
@options.settings("Set one value, as in --set net.preset=small; may be repeated.")
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR",
    help="The run's folder.  [default: runs/DATA-classifier]",
)  # fmt: skip
@click.option("--steps", type=click.IntRange(min=1), help="Length of the run in steps,")
@click.option("--epochs", type=click.FloatRange(min=0, min_open=True), help="in passes, or")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), help="in minutes.")
@click.option("--resume", is_flag=True, help="Go on with the run in the folder.")
@click.option(
    "--restartable", is_flag=True,
    help="Go on with the run if there is one, else start it: for machines that may be taken away.",
)  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace the run in the folder.")
@click.option("--dry-run", is_flag=True, help="Check everything and stop before training.")
@options.seed
@options.device
@options.report
@options.together
def command(
    sde: str | None,
    data: str | None,
    like: str | None,
    clean: float | None,
    config_file: Path | None,
    settings: tuple[str, ...],
    out: Path | None,
    steps: int | None,
    epochs: float | None,
    minutes: float | None,
    resume: bool,
    restartable: bool,
    overwrite: bool,
    dry_run: bool,
    seed: int | None,
    device_name: str,
    json_file: Path | None,
    world: World,
) -> None:
    """Train a classifier of noisy items, which guides a score model or judges samples.

    It learns log p(y | x_t) at all noise levels of a process. At the end its accuracy and its
    calibration on held-out items are told by noise level.

    \b
    Examples:
      scoresde train-classifier --data digits --like runs/digits-vp --out runs/digits-classifier
      scoresde train-classifier --data path/to/mnist --sde vp --set net.preset=small --epochs 10
      scoresde train-classifier --data path/to/mnist --clean --epochs 10 --out runs/judge
      scoresde train-classifier --out runs/judge --resume --epochs 20

    Ctrl-C and SIGTERM end the run after the step and save it; SIGTERM, by which machines are
    taken away, gives the exit code 75: start it again.
    """
    asked = {"data.source": data, "training.seed": seed, "objective.clean": clean}
    bounds = {"steps": steps, "epochs": epochs, "minutes": minutes}
    config = asked_for(config_file, settings, sde, asked, bounds)
    folder = out or default_folder(config, "classifier")
    resume, overwrite = turn(folder, resume, restartable, overwrite, world)
    if like is not None and "sde" in config:
        raise click.UsageError("--like takes the process of the score model: leave out --sde")
    if like is not None and resume and not restartable:
        raise click.UsageError("--resume goes on with the process of the run: leave out --like")
    options.check_writable(folder / "config.yaml")
    options.check_writable(json_file)
    device = world.device(device_name)

    from ..training.parallel import check

    if resume:
        job = gone_on(folder, config, device)
    else:
        job = begun(with_bounds(config), folder, device, like)
    check(job.training, world.size)
    summarise(job, world)
    if dry_run:
        return
    if overwrite and world.main:
        remove_run(folder)
    run(job, resume, json_file, world)


def begun(config: dict[str, Any], folder: Path, device: torch.device, like: str | None) -> Job:
    """The job of a new run, of the process and range of a score model if one is named.

    Raises:
        ConfigError: if the data are not of the shape of that model.
    """
    from ..checkpoint import load
    from ..config import describe
    from ..training.classifier import Alike, prepare_classifier

    if like is None:
        return prepare_classifier(config, folder, device)
    model = load(like)
    config = {**config, "sde": describe(model.sde)}
    alike = Alike(like, model.scaler, model.shape)
    return prepare_classifier(config, folder, device, like=alike)


def gone_on(folder: Path, config: dict[str, Any], device: torch.device) -> Job:
    """The job of a run that goes on; the range of a model that it is like is that of the run."""
    from ..checkpoint import CLASSIFIER
    from ..config import construct, read_yaml
    from ..data import Scaler
    from ..training.classifier import Alike, prepare_classifier

    stored = read_yaml(folder / "config.yaml")
    name = (stored.get(CLASSIFIER) or {}).get("like")
    like = None
    if name is not None and stored.get("scaler"):
        fields = {k: v for k, v in stored["scaler"].items() if k != "name"}
        like = Alike(name, construct(Scaler, fields, "scaler"))

    def make(sections: dict[str, Any], folder: Path, device: torch.device) -> Job:
        return prepare_classifier(sections, folder, device, like=like)

    return resumed(folder, config, device, make)


def summarise(job: Job, world: World) -> None:
    """Prints what is about to happen."""
    from ..config import describe

    sde, say = job.model.sde, options.speak
    fields = {k: v for k, v in describe(sde).items() if not k.startswith(("t_", "name"))}
    parameters = sum(p.numel() for p in job.model.net.parameters())
    about_data(job)
    say(f"process    {describe(sde)['name']} " + ", ".join(map(shown, fields, fields.values())))
    say(
        f"network    {describe(job.model.net)['name']}, {parameters:,} parameters, "
        f"{job.train.num_classes} classes, {job.objective.clean:.0%} of the items clean"
    )
    about_run(job, world)


def run(job: Job, resume: bool, json_file: Path | None, world: World) -> None:
    """Trains, examines, and prints how the classifier does."""
    from tqdm import tqdm

    from ..training.classifier import ClassifierTrainer, finish_classifier

    show = options.on_screen()
    trainer = ClassifierTrainer(job, tqdm.write if show else options.speak, world)
    again = f"scoresde train-classifier --out {job.folder} --resume"
    if not trained(trainer, resume, again, world, show):
        return
    with tqdm(desc="held out", disable=not show, leave=False, unit="item") as bar:
        report = finish_classifier(trainer, figures_of(trainer), bar.update)
    if not world.main:
        return
    options.write_json(json_file, report)
    for line in table(report["heldout"]):
        options.speak(line)
    options.speak(f"written    {job.folder}/loss.png, report.json")
    options.speak(f'try next   scoresde.load_classifier("{job.folder}")')


def table(found: dict[str, Any]) -> list[str]:
    """How a classifier does on held-out items, a line for each range of noise."""
    clean = found["clean"]
    lines = [
        f"held out   {clean['items']} items, each seen at every level of noise",
        "           log-SNR          accuracy         nats    calibration error",
    ]
    for each in (clean, *found["noisy"]):
        high, low = each["log_snr"] or (None, None)
        place = "clean" if high is None else f"{high:5.1f} to {low:5.1f}"
        lines.append(
            f"           {place:<15} {each['accuracy']:6.1%} ± {each['stderr']:5.1%} "
            f"{each['nats']:8.3f}    {each['calibration']:6.1%}"
        )
    return lines
