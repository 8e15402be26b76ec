"""``scoresde train``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import options
from .train_job import (
    about_data,
    about_run,
    asked_for,
    default_folder,
    figures_of,
    further,
    remove_run,
    resumed,
    shown,
    trained,
    turn,
    with_bounds,
)

if TYPE_CHECKING:
    from ..training import Job
    from ..world import World


@click.command(name="train")
@click.option("--sde", metavar="NAME", help="vp, subvp, ve, cosine, edm, linear or ddpm.")
@click.option("--data", metavar="SOURCE", help="digits, a toy's name, a path, or hf:owner/name.")
@click.option(
    "--config", "config_file", metavar="FILE", help="YAML with sections over the defaults.",
    type=click.Path(dir_okay=False, path_type=Path),
)  # fmt: skip
@options.settings("Set one value, as in --set sde.beta_max=20; may be repeated.")
@click.option("--sigma-max", metavar="X|auto", help="Largest noise of ve and edm; auto fits it.")
@click.option("--beta-max", metavar="X|auto", help="Largest rate of vp and subvp; auto fits it.")
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR",
    help="The run's folder.  [default: runs/DATA-SDE]",
)  # fmt: skip
@click.option("--steps", type=click.IntRange(min=1), help="Length of the run in steps,")
@click.option("--epochs", type=click.FloatRange(min=0, min_open=True), help="in passes, or")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), help="in minutes.")
@click.option(
    "--from", "start", metavar="MODEL", help="Train a run or a model of any kind further."
)
@click.option("--compile", "compiled", is_flag=True, help="Compile the network (torch.compile).")
@click.option("--tune-schedule", is_flag=True, help="Learn which noise levels to train on most.")
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
    config_file: Path | None,
    settings: tuple[str, ...],
    sigma_max: str | None,
    beta_max: str | None,
    out: Path | None,
    steps: int | None,
    epochs: float | None,
    minutes: float | None,
    start: str | None,
    compiled: bool,
    tune_schedule: bool,
    resume: bool,
    restartable: bool,
    overwrite: bool,
    dry_run: bool,
    seed: int | None,
    device_name: str,
    json_file: Path | None,
    world: World,
) -> None:
    """Train a score model by denoising score matching.

    With nothing else it trains a small network on real 8x8 digits for about two minutes, and
    leaves samples, the loss curve, held-out bits/dim and report.json in the run's folder.

    \b
    Examples:
      scoresde train --sde vp
      scoresde train --sde ve --sigma-max auto --data moons --steps 2000
      scoresde train --config configs/mnist.yaml --data path/to/mnist --minutes 60
      scoresde train --out runs/digits-vp --resume --steps 6000
      scoresde train --from runs/digits-vp --set objective.name=second-order --out runs/finer
      torchrun --nproc-per-node 8 -m scoresde train --config configs/cifar10-edm.yaml \\
          --data path/to/cifar10 --restartable

    Ctrl-C and SIGTERM end the run after the step and save it; SIGTERM, by which machines are
    taken away, gives the exit code 75: start it again. Under a launcher the processes share each
    batch; --set training.shard=true shares out the weights too.
    """
    asked = {
        "data.source": data, "sde.sigma_max": sigma_max, "sde.beta_max": beta_max,
        "training.seed": seed, "sampling.seed": seed, "likelihood.seed": seed,
    }  # fmt: skip
    bounds = {"steps": steps, "epochs": epochs, "minutes": minutes}
    config = asked_for(config_file, settings, sde, asked, bounds)
    if start is not None and resume:
        raise click.UsageError("--resume goes on with the weights of the run: leave out --from")
    if compiled:
        config.setdefault("training", {})["compile"] = True
    if tune_schedule:
        config.setdefault("objective", {})["times"] = "learned"

    folder = out or default_folder(config)
    resume, overwrite = turn(folder, resume, restartable, overwrite, world)
    options.check_writable(folder / "config.yaml")
    options.check_writable(json_file)
    device = world.device(device_name)

    from ..training import prepare
    from ..training.parallel import check

    if resume:
        job = resumed(folder, config, device)
    elif start is not None:
        job = further(start, with_bounds(config), folder, device)
    else:
        job = prepare(with_bounds(config), folder, device)
    check(job.training, world.size)
    summarise(job, world)
    if dry_run:
        return
    if overwrite and world.main:
        remove_run(folder)
    run(job, resume, json_file, world)


def summarise(job: Job, world: World) -> None:
    """Prints what is about to happen, with what is left of the data at ``t_max``."""
    from ..config import describe
    from ..model import always_given

    sde = job.model.sde
    parameters = sum(p.numel() for p in job.model.net.parameters())
    fields = {k: v for k, v in describe(sde).items() if not k.startswith(("t_", "name"))}
    say = options.speak
    about_data(job)
    say(f"process    {describe(sde)['name']} " + ", ".join(map(shown, fields, fields.values())))
    say(f"t_min      {sde.t_min:g} training, {sde.t_min_sampling:g} sampling, "
        f"{sde.t_min_likelihood:g} likelihood; t_max {sde.t_max:g}")  # fmt: skip
    say(f"at t_max   SNR {job.left.snr:.1e}, KL to the prior {job.left.kl:.2g} nats an item")
    if job.left.kl > 1:
        say("           more than a nat is left: --beta-max auto or --sigma-max auto may help")
    say(f"network    {describe(job.model.net)['name']}, {parameters:,} parameters, predicts "
        f"{describe(job.model.parameterization)['name']}")  # fmt: skip
    if job.model.given is not None:
        gift = job.model.given
        share = f"all but {gift.empty:.0%} of the items"
        share = "every item, so there is no likelihood" if always_given(job.model) else share
        say(f"given      {describe(gift)['name']}, to {share}")
    about_run(job, world)


def run(job: Job, resume: bool, json_file: Path | None, world: World) -> None:
    """Trains, reports, and prints what to try next."""
    from tqdm import tqdm

    from ..training import Trainer
    from ..training.report import finish

    show = options.on_screen()
    trainer = Trainer(job, tqdm.write if show else options.speak, world)
    again = f"scoresde train --out {job.folder} --resume"
    if not trained(trainer, resume, again, world, show):
        return
    figures = {**figures_of(trainer), "at_t_max": job.left._asdict()}
    report = finish(trainer.learner.averaged, job, figures, show, world.main)
    if not world.main:
        return
    options.write_json(json_file, report)
    if "heldout" in report:
        found = report["heldout"]
        figure, error, unit = (
            (found["bits_per_dim"], found["bits_per_dim_stderr"], "bits/dim")
            if "bits_per_dim" in found
            else (found["nats"], found["nats_stderr"], "nats")
        )
        options.speak(
            f"held out   {figure:.4f} ± {error:.4f} {unit} over {found['items']} items "
            f"({found['method']}, {found['nfe']:.0f} evaluations, "
            f"{found['divergence']} divergence)"
        )
    options.speak(f"written    {job.folder}/samples/final.png, loss.png, report.json")
    options.speak(
        f"try next\n"
        f"  scoresde sample {job.folder} --solver ancestral --steps 100\n"
        f"  scoresde likelihood {job.folder} --probes 4\n"
        f"  scoresde bench {job.folder} --solvers heun,ddim,ancestral --steps 5,10,20,50"
    )
