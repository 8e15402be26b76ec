"""``scoresde bench``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import options, specs
from .outcome import Outcome

if TYPE_CHECKING:
    import torch

    from ..bench.cases import Case
    from ..world import World

BATCH = 256
SAMPLES, EXACT_SAMPLES = 128, 2000
STEPS, EXACT_STEPS = "5,10,20,50", "5,10,20,50,100,200"


@click.command(name="bench")
@click.argument("run", required=False)
@click.option(
    "--exact",
    is_flag=True,
    help="Against laws whose score, moments and draws are known, not a model.",
)
@click.option("--sde", "sdes", multiple=True, metavar="NAMES", help="Of --exact.  [default: vp]")
@click.option(
    "--law", "laws", multiple=True, metavar="NAMES",
    help="Of --exact: overlapping, separated, narrow.  [default: overlapping]",
)  # fmt: skip
@click.option(
    "--dim", "dims", multiple=True, metavar="NUMBERS",
    help="Dimensions of each law, 1 to 4096.  [default: 2]",
)  # fmt: skip
@click.option(
    "--solvers",
    multiple=True,
    default=("heun,ddim,ancestral",),
    show_default=True,
    metavar="NAMES",
    help="One that chooses its steps runs once: runge-kutta:rtol=1e-3:atol=1e-3.",
)
@click.option(
    "--grids", "--grid", "grids", multiple=True, metavar="NAMES",
    help="Each solver on each of them; by default each on its own.",
)  # fmt: skip
@click.option(
    "--steps", multiple=True, metavar="NUMBERS",
    help=f"Step counts.  [default: {STEPS}; --exact: {EXACT_STEPS}]",
)  # fmt: skip
@click.option(
    "--nfe", multiple=True, metavar="NUMBERS",
    help="Budgets instead: the most steps whose evaluations, the last denoising included, do not "
    "exceed it.",
)  # fmt: skip
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
    help="For a model too, the distance to the converged ODE (some hundred evaluations, twice).",
)
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Runs of each row with seeds of their own: intervals for every measure; the median time "
    "of all but the first.",
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
    help="Folder of bench.html, .csv, .json, .png, .svg.  [default: RUN/bench or bench-NAME]",
)  # fmt: skip
@options.weights
@options.seed
@options.device
@options.report
@options.together
def command(
    run: str | None,
    exact: bool,
    sdes: tuple[str, ...],
    laws: tuple[str, ...],
    dims: tuple[str, ...],
    solvers: tuple[str, ...],
    grids: tuple[str, ...],
    steps: tuple[str, ...],
    nfe: tuple[str, ...],
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
    world: World,
) -> None:
    """Compare samplers, grids and step counts: error against evaluations, from common start noise.

    With a model, samples are compared to held-out data; with --exact, to laws known in closed
    form, and the ODE's solvers also to its converged solution. Each error stands beside the floor
    that real items of the same number reach. All lists are comma-separated, an option may come
    several times, and a field is set as in ddim:eta=0.5, karras:rho=3 or vp:beta_max=15.

    \b
    Examples:
      scoresde bench
      scoresde bench runs/digits-vp --solvers heun,ddim,ancestral --steps 5,10,20,50
      scoresde bench runs/digits-vp --solvers unipc,dpmpp-2m --grids karras,logsnr --endpoint
      scoresde bench --exact --sde vp,ve,edm --solvers heun,ddim,ddim:eta=1,ode
      scoresde bench --exact --law separated,narrow --dim 2,64 --nfe 5,8,10,20 --repeats 5
      torchrun --nproc-per-node 4 -m scoresde bench runs/digits-vp --endpoint --repeats 5
    """
    given = {"--sde": sdes, "--law": laws, "--dim": dims}
    own = {f"--{name}": named(name) for name in ("weights", "batch")}
    of_model = {"RUN": run, "--data": data, **own}
    refuse_mixed(exact, of_model, given)
    if steps and nfe:
        raise ValueError("--steps and --nfe exclude each other: a budget sets the steps")
    counts = None if nfe else specs.numbers(steps or (EXACT_STEPS if exact else STEPS,), "--steps")
    settings: dict[str, Any] = {
        "solvers": specs.sections(solvers, "solver"),
        "grids": specs.sections(grids, "grid") or None,
        "steps": counts,
        "nfe": specs.numbers(nfe, "--nfe") if nfe else None,
        "samples": samples or (EXACT_SAMPLES if exact else SAMPLES),
        "seed": seed or 0,
        "repeats": repeats,
        "batch": None if exact else batch,
    }
    sections = (
        specs.sections(sdes or ("vp",), "sde"),
        specs.sections(laws or ("overlapping",), "law"),
    )
    run = run or options.DEFAULT_MODEL
    folder = out or default_folder(None if exact else run, [s["name"] for s in sections[0]])
    for file in filter(None, (folder / "bench.csv", json_file)):
        options.check_writable(file)
    check_names(settings)

    from ..bench import cases

    device = world.device(device_name)
    size = {"samples": settings["samples"], "seed": settings["seed"]}
    if exact:
        processes, problems = build_exact(*sections, dims)
        found = exact_cases(processes, problems, device, **size)
        what = exact_words(processes, problems)
    else:
        case = cases.of_model(run, weights, data, device=device, **size)
        found, what = iter([case]), case.what
    outcome = Outcome(what, settings, exact or endpoint, world)
    try:
        for case in found:
            outcome.add(case)
    except KeyboardInterrupt:
        outcome.complete = False
        if not outcome.rows:
            raise
    if world.main:
        outcome.write(folder, json_file, device)
    if not outcome.complete:
        raise KeyboardInterrupt
    if all(row.nfe is None for row in outcome.rows):
        raise ValueError(f"no solver finished; the first said: {outcome.rows[0].message}")


def named(parameter: str) -> bool:
    """Whether an option that has a default was given on the command line."""
    source = click.get_current_context().get_parameter_source(parameter)
    return source is click.core.ParameterSource.COMMANDLINE


def refuse_mixed(exact: bool, of_model: dict[str, Any], of_exact: dict[str, Any]) -> None:
    """Refuses an option that belongs to the other kind of benchmark."""
    for name, value in (of_model if exact else of_exact).items():
        if value and exact:
            raise ValueError(f"--exact needs no model: leave out {name}")
        if value:
            raise ValueError(f"{name} belongs to --exact; a model brings its own")


def default_folder(run: str | None, sdes: list[str]) -> Path:
    """``bench`` in the run's folder; for the zoo and exact cases a folder here."""
    if run is None:
        return Path("-".join(["bench-exact", *dict.fromkeys(sdes)]))
    if run.startswith("zoo:"):
        return Path(f"bench-{run[4:]}")
    return Path(run) / "bench"


def check_names(settings: dict[str, Any]) -> None:
    """Refuses unknown solvers and grids before anything is loaded."""
    from .. import solvers
    from ..config import build
    from ..grids import Tuned, grid_of
    from ..tuning.files import open_file

    for one in settings["solvers"]:
        build(one, solvers, "solver")
    for one in settings["grids"] or ():
        grid = grid_of(one)
        if isinstance(grid, Tuned) and grid.file is not None:
            open_file(grid.file)


def build_exact(
    sdes: list[dict[str, Any]], laws: list[dict[str, Any]], dims: tuple[str, ...]
) -> tuple[list[Any], list[Any]]:
    """The processes, and every law in every dimension."""
    from .. import sde
    from ..bench import laws as room
    from ..config import build

    sizes = specs.numbers(dims or ("2",), "--dim")
    if max(sizes) > 4096:
        raise ValueError(f"--dim takes 1 to 4096, got {max(sizes)}")
    processes = [build(section, sde, "sde") for section in sdes]
    each = [
        {"dim": dim, **section} for section in laws
        for dim in (sizes if "dim" not in section else [section["dim"]])
    ]  # fmt: skip
    return processes, [build(section, room, "law") for section in each]


def exact_cases(
    processes: list[Any], laws: list[Any], device: torch.device, samples: int, seed: int
) -> Iterator[Case]:
    """Every law under every process; a law's target serves all of them."""
    from ..bench import Target, cases

    for law in laws:
        target = Target.exact(law, samples=samples, seed=seed)
        for process in processes:
            yield cases.exact(process, law, target, device)


def exact_words(processes: list[Any], laws: list[Any]) -> str:
    """``exact score, vp, overlapping(dim=2)``, or of how many."""
    from ..bench.row import label

    one = len(processes) * len(laws) == 1
    names = [", ".join(map(label, processes)), ", ".join(map(label, laws))]
    if len(laws) > 3:
        names[1] = f"{len(laws)} laws"
    return ", ".join(["exact score" if one else "exact scores", *names])
