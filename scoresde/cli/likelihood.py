"""``scoresde likelihood``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from . import options, specs

DEFAULT_ITEMS = 64
BOUNDS = ("vlb", "elbo", "denoising")


@click.command(name="likelihood")
@click.argument("run", default=options.DEFAULT_MODEL)
@click.option("--data", metavar="SOURCE", help="By default the items that the run held out.")
@click.option("--split", default="test", show_default=True, help="Split of --data.")
@click.option("--items", metavar="N|all", help=f"How many items.  [default: {DEFAULT_ITEMS}]")
@click.option("--target", type=float, metavar="ERROR",
              help="Standard error of the mean of these items to reach, in bits/dim (nats for "
              "continuous data): draws and steps are chosen for it.")  # fmt: skip
@click.option("--spot", type=click.IntRange(min=0), metavar="N",
              help="Items evaluated again, and with finer steps, for the error bar; 0 for none."
              "  [default: 4 to 16]")  # fmt: skip
@click.option("--dequantization", default="uniform", show_default=True, metavar="NAME",
              help="uniform, truncated-normal, decoder, or variational:folder=PATH.")  # fmt: skip
@click.option("--draws", type=click.IntRange(min=1), default=1, show_default=True,
              help="Dequantisation draws an item.")  # fmt: skip
@click.option("--importance", is_flag=True, help="Weigh the draws by importance.")
@click.option("--divergence", type=click.Choice(["auto", "hutchinson", "exact"]),
              default="auto", show_default=True)  # fmt: skip
@click.option("--probes", type=click.IntRange(min=1), default=1, show_default=True,
              help="Probes of the Hutchinson estimator.")  # fmt: skip
@click.option("--noise", type=click.Choice(["rademacher", "gaussian", "walsh"]),
              default="rademacher", show_default=True, help="Of the probes.")  # fmt: skip
@click.option("--method", metavar="NAME",
              help="ODE method: dopri5, dop853, bosh3, rk4, ..., scipy-rk45; or a solver along a "
              "grid.  [default: unipc:points=3:variable=noise, 32 steps; dopri5 up to 32 "
              "dimensions]")  # fmt: skip
@click.option("--rtol", type=float, help="Of an adaptive method.  [default: 1e-5]")
@click.option("--atol", type=float, help="Of an adaptive method.  [default: 1e-5]")
@click.option("--steps", type=click.IntRange(min=1), help="Steps of a fixed-step method.")
@click.option("--grid", metavar="NAME", help="Of a solver's steps.  [default: logsnr]")
@click.option("--max-nfe", type=click.IntRange(min=1), help="Evaluations of one solve at most.")
@click.option("--t-min", type=float, help="Time at which the integral starts.")
@click.option("--terminal", type=click.Choice(["prior", "moments"]), default="prior",
              show_default=True, help="Density at the end: moments takes those of 2000 items of "
              "the training split.")  # fmt: skip
@click.option("--bound", type=click.Choice(BOUNDS),
              help="Instead of the ODE: DDPM's bound of --steps steps, the bound in continuous "
              "time, or the density by denoising alone.")  # fmt: skip
@click.option("--vlb", is_flag=True, help="The same as --bound vlb.")
@click.option("--terms", type=click.IntRange(min=1), metavar="K",
              help="Noise levels that a bound evaluates.  [default: 64; all of vlb]")  # fmt: skip
@click.option("--variance", type=click.Choice(["small", "large", "learned"]),
              help="Of the steps of --bound vlb.  [default: small]")  # fmt: skip
@click.option("--classify", is_flag=True, help="Classify the items by Bayes over their classes.")
@click.option("--against", metavar="SOURCE",
              help="Second data set, told from the first by likelihood: AUROC.")  # fmt: skip
@click.option("--self-check", is_flag=True,
              help="Run closed forms through these very settings: bias and coverage.")  # fmt: skip
@click.option("--levels", type=click.IntRange(min=2), help="Levels of the data, as a check.")
@click.option("--batch", type=click.IntRange(min=1), default=64, show_default=True,
              help="Items at once; rounded up to a multiple of 16.")  # fmt: skip
@click.option("--processes", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--part", metavar="I/N", help="Evaluate the I-th of N parts alone (0 to N - 1).")
@click.option("--out", "--csv", "out", type=click.Path(dir_okay=False, path_type=Path),
              metavar="FILE", help="Values of each item, .csv or .parquet. A run that was stopped "
              "goes on from there.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Begin anew, whatever FILE holds.")
@click.option("--pictures", type=click.Path(file_okay=False, path_type=Path), metavar="FOLDER",
              help="Write the most and least likely images and a histogram there.")  # fmt: skip
@options.weights
@options.seed
@options.device
@options.report
@options.together
def command(run: str, **given: Any) -> None:
    """Evaluate the likelihood of held-out data by the probability-flow ODE.

    Discrete data (images) gives bits/dim by dequantisation; continuous data gives nats.

    \b
    Examples:
      scoresde likelihood
      scoresde likelihood runs/digits-vp --items all --target 0.005
      scoresde likelihood --data path/to/mnist --items all --out bits.csv --processes 2
      scoresde likelihood --data path/to/mnist --against path/to/fashion --pictures shown
      scoresde likelihood --bound elbo
      scoresde likelihood --method dopri5 --probes 8 --self-check
      torchrun --nproc-per-node 4 -m scoresde likelihood --items all --out bits.csv
    """
    from .likelihood_run import Request

    if given["levels"] is not None and given["self_check"]:
        raise ValueError("--levels is a check of --data, which --self-check does not read")
    if given.pop("vlb"):
        if given["bound"] not in (None, "vlb"):
            raise ValueError(f"--vlb and --bound {given['bound']} are two bounds: name one")
        given["bound"] = "vlb"
    _check(given)
    given["device"] = given["world"].device(given.pop("device_name"))
    Request(run=run, solve=_solve(given), **given).answer()


def _check(given: dict[str, Any]) -> None:
    """Refuses what does not go together, before any work."""
    modes = [n for n in ("bound", "classify", "self_check") if given[n]]
    flags = {"bound": "--bound", "classify": "--classify", "self_check": "--self-check"}
    if len(modes) > 1:
        raise ValueError(f"{flags[modes[0]]} and {flags[modes[1]]} are two things: name one")
    if given["terms"] is not None and given["bound"] is None:
        raise ValueError("--terms belongs to --bound")
    if given["variance"] is not None and given["bound"] != "vlb":
        raise ValueError("--variance belongs to --bound vlb")
    for name in ("out", "against", "pictures", "target", "part"):
        if modes and given[name] is not None:
            raise ValueError(f"--{name} is for the ODE's likelihood, not for {flags[modes[0]]}")
    if given["part"] is not None and given["out"] is None:
        raise ValueError("--part needs --out, the file that its share goes to")
    for name in ("against", "pictures", "json_file", "target"):
        if given["part"] is not None and given[name] is not None:
            raise ValueError(f"--{name.removesuffix('_file')} is of a whole set, not of a --part")
    if given["overwrite"] and given["out"] is None:
        raise ValueError("--overwrite belongs to --out")
    if given["target"] is not None and not 0 < given["target"] < float("inf"):
        raise ValueError(f"--target takes an error above 0, got {given['target']:g}")
    if given["target"] is not None and given["spot"] == 0:
        raise ValueError("--target needs a spot check: leave out --spot 0")
    parse_part(given["part"])
    options.check_apart(given["json_file"], given["out"])
    if given["out"] is not None and given["out"].suffix not in (".csv", ".parquet"):
        raise ValueError(f"--out takes a .csv or a .parquet file, got {given['out']}")


def _solve(given: dict[str, Any]) -> dict[str, Any]:
    """The settings of the ODE's solve, taken out of what was given; None where not said."""
    names = (
        "divergence", "probes", "noise", "method", "rtol", "atol", "steps", "grid", "max_nfe",
        "t_min",
    )  # fmt: skip
    found = {name: given.pop(name) for name in names}
    method = found["method"]
    if method is not None and ":" in method:
        found["method"] = specs.section(method, "method")
    found["grid"] = options.grid(found["grid"])
    return {name: value for name, value in found.items() if value is not None}


def parse_part(text: str | None) -> tuple[int, int] | None:
    """``"0/4"`` as ``(0, 4)``."""
    if text is None:
        return None
    i, slash, n = text.partition("/")
    if not (slash and i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        raise ValueError(f"--part takes I/N with 0 <= I < N, such as 0/4, got {text!r}")
    return int(i), int(n)
