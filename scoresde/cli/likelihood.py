"""``scoresde likelihood``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import options, specs

if TYPE_CHECKING:
    from ..data import Dataset
    from ..likelihood.dataset import DatasetLikelihood
    from ..model import ScoreModel


DEFAULT_ITEMS = 64


@click.command(name="likelihood")
@click.argument("run", default=options.DEFAULT_MODEL)
@click.option("--data", metavar="SOURCE", help="By default the items that the run held out.")
@click.option("--split", default="test", show_default=True, help="Split of --data.")
@click.option(
    "--items", type=click.IntRange(min=1), help=f"How many items.  [default: {DEFAULT_ITEMS}]"
)
@click.option("--draws", type=click.IntRange(min=1), default=1, show_default=True,
              help="Dequantisation draws an item.")  # fmt: skip
@click.option("--divergence", type=click.Choice(["auto", "hutchinson", "exact"]),
              default="auto", show_default=True)  # fmt: skip
@click.option("--probes", type=click.IntRange(min=1), default=1, show_default=True,
              help="Probes of the Hutchinson estimator.")  # fmt: skip
@click.option("--method", default="dopri5", show_default=True, metavar="NAME",
              help="ODE method: dopri5, dop853, bosh3, rk4, ..., scipy-rk45; or with --steps a "
              "solver such as unipc or vabm:points=2.")  # fmt: skip
@click.option("--rtol", type=float, default=1e-5, show_default=True)
@click.option("--atol", type=float, default=1e-5, show_default=True)
@click.option("--steps", type=click.IntRange(min=1), help="Steps of a fixed-step method.")
@click.option("--grid", metavar="NAME", help="Of a solver's steps.  [default: logsnr]")
@click.option("--t-min", type=float, help="Time at which the integral starts.")
@click.option(
    "--vlb", is_flag=True, help="DDPM's variational bound of --steps steps instead of the ODE."
)
@click.option("--terms", type=click.IntRange(min=1), metavar="K",
              help="Evaluate K random terms of the bound instead of all.")  # fmt: skip
@click.option("--levels", type=click.IntRange(min=2), help="Levels of the data, as a check.")
@click.option("--batch", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--csv", "csv_file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Write the value of each item to this file.")  # fmt: skip
@options.weights
@options.seed
@options.device
@options.report
def command(
    run: str,
    data: str | None,
    split: str,
    items: int | None,
    draws: int,
    levels: int | None,
    vlb: bool,
    terms: int | None,
    batch: int,
    csv_file: Path | None,
    weights: str,
    seed: int | None,
    device_name: str,
    json_file: Path | None,
    **settings: Any,
) -> None:
    """Evaluate the likelihood of held-out data by the probability-flow ODE.

    Discrete data (images) gives bits/dim by uniform dequantisation; continuous data gives nats.

    \b
    Examples:
      scoresde likelihood
      scoresde likelihood runs/digits-vp --items 100 --probes 8
      scoresde likelihood --method unipc --steps 60
      scoresde likelihood runs/digits-vp --vlb --steps 1000 --terms 50
      scoresde likelihood runs/mnist-vp --data path/to/mnist --items 1000 --json bits.json
    """
    from ..checkpoint import load

    for file in filter(None, (json_file, csv_file)):
        options.check_writable(file)
    device = options.pick_device(device_name)
    model = load(run, weights=weights, device=device)
    heldout = held_out_data(run, data, split)
    if levels is not None and levels != heldout.levels:
        have = f"{heldout.levels} levels" if heldout.levels else "continuous, without levels"
        raise ValueError(f"--levels {levels} does not fit {heldout.name}, whose data are {have}")
    if terms is not None and not vlb:
        raise ValueError("--terms belongs to --vlb")
    if vlb and csv_file is not None:
        raise ValueError("--csv is for the ODE's likelihood, not for --vlb")
    if vlb:
        count = min(items or DEFAULT_ITEMS, len(heldout))
        bound = bound_figures(
            model, heldout, count, batch, seed or 0, settings["steps"] or 1000, terms
        )
        figures = {"model": run, "data": heldout.name, **bound}
        options.write_json(json_file, {**figures, "versions": options.versions(device)})
        options.speak(f"{heldout.name} under {run}: {bound_line(bound)}")
        return
    if ":" in settings["method"]:
        settings["method"] = specs.section(settings["method"], "method")
    settings["grid"] = options.grid(settings["grid"])
    found = evaluate(model, heldout, items or DEFAULT_ITEMS, draws, batch, seed or 0, settings)
    figures = {"model": run, "data": heldout.name, **found.summary()}
    options.write_json(json_file, {**figures, "versions": options.versions(device)})
    if csv_file is not None:
        write_csv(csv_file, found)
    if not found.converged:
        click.echo("Warning: the solver did not converge on every item", err=True)
    options.speak(f"{heldout.name} under {run}: {found.line()}")
    options.speak(
        f"{found.settings['divergence']} divergence, t from {found.settings['t_min']:g} to "
        f"{found.settings['t_max']:g}, {model.weights} weights, {found.seconds:.0f} s"
    )


def held_out_data(run: str, source: str | None, split: str) -> Dataset:
    """The named data, or those that the run held out."""
    from ..checkpoint import locate
    from ..config import construct, read_yaml
    from ..data import DataConfig, load, load_splits

    if source is not None:
        config = DataConfig(source=source)
        return load_splits(config)[1] if split == "test" else load(source, split)
    stored = read_yaml(locate(run) / "config.yaml").get("data")
    if stored is None:
        raise ValueError(f"{run} does not say which data it held out: name them with --data")
    return load_splits(construct(DataConfig, stored, "data"))[1]


def conditional(model: ScoreModel) -> bool:
    """Whether the network takes labels."""
    return getattr(model.net, "num_classes", None) is not None


def evaluate(
    model: ScoreModel,
    data: Dataset,
    items: int,
    draws: int,
    batch: int,
    seed: int,
    settings: dict[str, Any],
) -> DatasetLikelihood:
    """The likelihood, with a progress bar on a terminal."""
    from tqdm import tqdm

    from ..likelihood.dataset import dataset_log_prob

    total = min(items, len(data)) * (draws if data.levels else 1)
    with tqdm(total=total, disable=not sys.stderr.isatty(), leave=False, unit="item") as bar:
        return dataset_log_prob(
            model, data, items=items, draws=draws, batch=batch, seed=seed, progress=bar.update,
            labels=conditional(model), **settings,
        )  # fmt: skip


def bound_figures(
    model: ScoreModel,
    data: Dataset,
    items: int,
    batch: int,
    seed: int,
    steps: int,
    terms: int | None,
) -> dict[str, Any]:
    """Mean of the variational bound over items and of each of its parts."""
    import math

    import torch
    from tqdm import tqdm

    from ..likelihood import vlb

    assert model.scaler is not None
    parts = []
    device = next(model.parameters()).device
    with tqdm(total=items, disable=not sys.stderr.isatty(), leave=False, unit="item") as bar:
        for start in range(0, items, batch):
            x = data.x[start : min(start + batch, items)].to(device)
            z = model.scaler.encode(x, dequantize=False)
            cond: dict[str, Any] = {}
            if conditional(model) and data.y is not None:
                cond["y"] = data.y[start : start + len(x)].to(device)
            found = vlb(
                model, z, steps=steps, levels=data.levels, terms=terms, seed=seed,
                start_index=start, **cond,
            )  # fmt: skip
            kl = found.total - found.prior - found.decoder
            parts.append(torch.stack([found.total, found.prior, kl, found.decoder], 1).cpu())
            bar.update(len(x))
    table = torch.cat(parts)
    mean = dict(zip(("total", "prior", "steps", "decoder"), table.mean(0).tolist(), strict=True))
    stderr = float(table[:, 0].std()) / math.sqrt(len(table))
    return {
        **mean, "stderr": stderr, "unit": found.unit, "items": items, "grid_steps": steps,
        "nfe": found.nfe, "variance": found.variance, "weights": found.weights,
    }  # fmt: skip


def bound_line(bound: dict[str, Any]) -> str:
    """The bound and its parts in one line."""
    return (
        f"at most {bound['total']:.4f} ± {bound['stderr']:.4f} {bound['unit']} "
        f"(prior {bound['prior']:.4f}, steps {bound['steps']:.4f}, "
        f"decoder {bound['decoder']:.4f}; {bound['items']} items, "
        f"{bound['grid_steps']} steps, {bound['nfe']} evaluations)"
    )


def write_csv(file: Path, found: DatasetLikelihood) -> None:
    """One row an item: its index, nats, and bits/dim where the data are discrete."""
    import csv

    file.parent.mkdir(parents=True, exist_ok=True)
    bits = found.bits_per_dim.tolist() if found.levels is not None else None
    with open(file, "w", newline="") as handle:
        rows = csv.writer(handle)
        rows.writerow(["item", "nats", *(["bits_per_dim"] if bits else [])])
        for i, nats in enumerate(found.log_prob.tolist()):
            rows.writerow([i, nats, *([bits[i]] if bits else [])])
