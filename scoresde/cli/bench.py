"""``scoresde bench``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import options

if TYPE_CHECKING:
    import torch

    from ..bench import Target
    from ..data import Dataset
    from ..model import ScoreModel

BATCH = 256
SAMPLES, EXACT_SAMPLES = 128, 2000
STEPS, EXACT_STEPS = "5,10,20,50", "5,10,20,50,100,200"
ENDPOINT = {"name": "runge-kutta", "method": "dop853", "max_nfe": 5000}
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
EXACT_TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


@click.command(name="bench")
@click.argument("run", required=False)
@click.option(
    "--exact",
    is_flag=True,
    help="Against a mixture whose score, moments and law are known, not a model.",
)
@click.option("--sde", metavar="NAME", help="Process of --exact.  [default: vp]")
@click.option("--dim", type=click.IntRange(1, 256), help="Dimension of --exact.  [default: 2]")
@click.option(
    "--solvers",
    default="heun,ddim,ancestral",
    show_default=True,
    metavar="NAMES",
    help="Comma-separated; a field is set as in ddim:eta=0.5.",
)
@click.option(
    "--steps",
    metavar="NUMBERS",
    help=f"Comma-separated.  [default: {STEPS}; --exact: {EXACT_STEPS}]",
)
@click.option("--grid", metavar="NAME", help="For all solvers; by default each its own.")
@click.option(
    "--samples",
    type=click.IntRange(min=2),
    metavar="N",
    help=f"[default: {SAMPLES}; --exact: {EXACT_SAMPLES}]",
)
@click.option("--data", metavar="SOURCE", help="By default the data of the run.")
@click.option(
    "--endpoint",
    is_flag=True,
    help="For a model too, the distance to the converged ODE (some hundred evaluations).",
)
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Runs of each row; the median time of all but the first.",
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    default=BATCH,
    show_default=True,
    help="Items of a model drawn at once.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR",
    help="Folder of bench.csv, .json, .png.  [default: RUN/bench or bench-NAME]",
)  # fmt: skip
@options.weights
@options.seed
@options.device
@options.report
def command(
    run: str | None,
    exact: bool,
    sde: str | None,
    dim: int | None,
    solvers: str,
    steps: str | None,
    grid: str | None,
    samples: int | None,
    data: str | None,
    endpoint: bool,
    repeats: int,
    batch: int,
    out: Path | None,
    weights: str,
    seed: int | None,
    device_name: str,
    json_file: Path | None,
) -> None:
    """Compare samplers and step counts: error against evaluations, from common start noise.

    With a model, samples are compared to held-out data; with --exact, to a law known in closed
    form, and the ODE's solvers also to its converged solution. Each error stands beside the floor
    that real items of the same number reach.

    \b
    Examples:
      scoresde bench
      scoresde bench runs/digits-vp --solvers heun,ddim,ancestral --steps 5,10,20,50
      scoresde bench --exact --sde ve --solvers heun,ddim,ddim:eta=1,ode --json bench.json
    """
    refuse_mixed(exact, {"RUN": run, "--data": data}, {"--sde": sde, "--dim": dim})
    counts = numbers(steps or (EXACT_STEPS if exact else STEPS))
    sections = [section(text) for text in solvers.split(",")]
    count = samples or (EXACT_SAMPLES if exact else SAMPLES)
    run = run or options.DEFAULT_MODEL
    folder = out or default_folder(None if exact else run, sde or "vp")
    for file in filter(None, (folder / "bench.csv", json_file)):
        options.check_writable(file)
    check_names(sections, grid)

    from ..bench import compare
    from ..bench.report import record, table, verdict, write

    device, seed = options.pick_device(device_name), seed or 0
    score: Any
    if exact:
        score, target, words = exact_case(sde or "vp", dim or 2, count, seed, device)
        cond: dict[str, Any] = {}
    else:
        score, target, words, cond = model_case(run, weights, data, count, seed, device)
    reference = {**ENDPOINT, **(EXACT_TOLERANCE if exact else TOLERANCE)}
    rows = compare(
        score, target, solvers=sections, steps=counts, grid=grid, samples=count, seed=seed,
        repeats=repeats, batch=None if exact else batch,
        endpoint=reference if exact or endpoint else None,
        progress=sys.stderr.isatty(), **cond,
    )  # fmt: skip
    title = f"{words['what']}: {count} samples from common start noise, seed {seed}"
    content = {
        "title": title,
        **words,
        "settings": {
            "solvers": sections, "steps": counts, "grid": grid, "samples": count, "seed": seed,
            "repeats": repeats, "batch": None if exact else batch,
            "endpoint": reference if exact or endpoint else None,
            "t_start": score.sde.t_max, "t_end": score.sde.t_min_sampling,
            "denoise": True, "weights": getattr(score, "weights", None),
        },
        "target": target.about,
        "versions": options.versions(device),
    }  # fmt: skip
    write(folder, rows, target.floor, content)
    options.write_json(json_file, record(rows, target.floor, content))
    click.echo(f"{title}\n{about(target, words['unit'])}\n")
    click.echo(table(rows, target.floor))
    click.echo(f"\n* not above the floor    {verdict(rows, target.floor)}")
    click.echo(f"written {folder}/bench.png, bench.csv, bench.json")
    if all(row.nfe is None for row in rows):
        raise ValueError(f"no solver finished; the first said: {rows[0].message}")


def refuse_mixed(exact: bool, of_model: dict[str, Any], of_exact: dict[str, Any]) -> None:
    """Refuses an option that belongs to the other kind of benchmark."""
    for name, value in (of_model if exact else of_exact).items():
        if value is not None and exact:
            raise ValueError(f"--exact needs no model: leave out {name}")
        if value is not None:
            raise ValueError(f"{name} belongs to --exact; a model brings its own")


def numbers(text: str) -> list[int]:
    """``"5,10"`` as ``[5, 10]``."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"--steps takes whole numbers such as 5,10,20, got {text!r}")
    return [int(part) for part in parts]


def section(text: str) -> dict[str, Any]:
    """``"ddim:eta=0.5"`` as ``{"name": "ddim", "eta": 0.5}``."""
    import yaml

    name, *pairs = (part.strip() for part in text.split(":"))
    found: dict[str, Any] = {"name": name}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"solver {text.strip()!r} is not of the form name:key=value")
        found[key.strip()] = yaml.safe_load(value)
    return found


def default_folder(run: str | None, sde: str) -> Path:
    """``bench`` in the run's folder; for the zoo and exact cases a folder here."""
    if run is None:
        return Path(f"bench-exact-{sde}")
    if run.startswith("zoo:"):
        return Path(f"bench-{run[4:]}")
    return Path(run) / "bench"


def check_names(sections: list[dict[str, Any]], grid: str | None) -> None:
    """Refuses unknown solvers and grids before anything is loaded."""
    from .. import grids, solvers
    from ..config import build

    for one in sections:
        build(one, solvers, "solver")
    if grid is not None:
        build(grid, grids, "grid")


def exact_case(
    name: str, dim: int, samples: int, seed: int, device: torch.device
) -> tuple[Any, Target, dict[str, Any]]:
    """The score of the mixture, its target, and what to call them."""

    from .. import sde
    from ..bench import Target, mixture
    from ..config import build, describe
    from ..precision import widest

    process = build(name, sde, "sde")
    law = mixture(dim)
    # The target is computed on the CPU; not every accelerator has float64.
    dtype = widest(device)
    score = law.to(device, dtype).score(process)
    described = describe(process)
    entries = "1 dimension" if dim == 1 else f"{dim} dimensions"
    words = {
        "what": f"exact score, {described['name']}, mixture of 3 Gaussians in {entries}",
        "unit": "data units",
        "model": None,
        "sde": described,
        "dim": dim,
    }
    return score, Target.exact(law, samples=samples, seed=seed), words


def model_case(
    run: str, weights: str, source: str | None, samples: int, seed: int, device: torch.device
) -> tuple[ScoreModel, Target, dict[str, Any], dict[str, Any]]:
    """The model, its target, what to call them, and its conditions."""
    import torch

    from ..bench import Target
    from ..checkpoint import load
    from ..config import describe

    model = load(run, weights=weights, device=device)
    train, heldout = splits(run, source)
    if heldout.shape != model.shape:
        raise ValueError(
            f"{heldout.name} has items of {heldout.shape}, the model {run} of {model.shape}"
        )
    # Sources without a split of their own may give the same items twice.
    distinct = not (train.x.shape == heldout.x.shape and torch.equal(train.x, heldout.x))
    decode = None if model.scaler is None else model.scaler.decode
    target = Target.of_data(
        heldout.x, train.x if distinct else None, samples=samples, decode=decode, seed=seed
    )
    levels = heldout.levels
    words = {
        "what": f"{run}, {describe(model.sde)['name']}, {model.weights} weights, "
        f"against {heldout.name}",
        "unit": f"levels 0 to {levels - 1}" if levels else "data units",
        "model": run,
        "sde": describe(model.sde),
        "data": heldout.name,
    }
    cond = {}
    if getattr(model.net, "num_classes", None) is not None and train.y is not None:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randint(len(train), (samples,), generator=generator)
        cond["y"] = train.y[chosen].to(device)
    return model, target, words, cond


def splits(run: str, source: str | None) -> tuple[Dataset, Dataset]:
    """Training and held-out items, of the named data or those of the run."""
    from ..checkpoint import locate
    from ..config import construct, read_yaml
    from ..data import DataConfig, load_splits

    if source is not None:
        return load_splits(DataConfig(source=source))
    stored = read_yaml(locate(run) / "config.yaml").get("data")
    if stored is None:
        raise ValueError(f"{run} does not say which data it held out: name them with --data")
    return load_splits(construct(DataConfig, stored, "data"))


def about(target: Target, unit: str) -> str:
    """What the distances are, in two lines."""
    facts = target.about
    return (
        f"distances between flattened items in {unit}, to {facts['reference_items']} "
        f"{facts['reference']}; endpoint in the model's range\n"
        f"floor: {facts['floor']}, {facts['floor_items']} items, 95 % over random splits"
    )
