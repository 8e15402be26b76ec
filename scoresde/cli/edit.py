"""``scoresde edit``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import options
from .guide import guided, passes, passes_said, said

if TYPE_CHECKING:
    import torch

    from ..model import ScoreModel
    from .guide import Guide, Guided
    from .items import Item

STRENGTH, DRAWS, BATCH = 0.5, 8, 256


@click.command(name="edit")
@click.argument("item")
@click.option("--model", "run", default=options.DEFAULT_MODEL, show_default=True, metavar="RUN",
              help="The model that draws the results.")  # fmt: skip
@click.option(
    "--strength", type=float, metavar="S",
    help=f"Noise added first, in (0, 1]: 0.3 to 0.6 keeps the layout.  [default: {STRENGTH}]",
)  # fmt: skip
@click.option("--t-start", type=float, help="The time to start from, instead of a strength.")
@click.option("-n", "--draws", type=click.IntRange(min=1),
              help=f"Results, each with noise of its own.  [default: {DRAWS}]")  # fmt: skip
@click.option(
    "--keep", metavar="MASK",
    help="What to leave as it is: a picture whose white pixels are kept, or a region as in "
    "`inpaint`, such as half:side=top.",
)  # fmt: skip
@click.option(
    "--from", "origin", metavar="RUN",
    help="Bridge instead: encode with this model, and decode with --model.",
)  # fmt: skip
@click.option("--label", type=click.IntRange(min=0), help="Class of the results.")
@click.option("--from-label", type=click.IntRange(min=0), help="Class of the item under --from.")
@guided
@click.option(
    "--solver", metavar="NAME",
    help="By default that of the process; of a bridge, runge-kutta or another of the ODE.",
)  # fmt: skip
@click.option(
    "--steps", type=click.IntRange(min=1),
    help="Steps from the noised item down.  [default: the solver's own number]",
)  # fmt: skip
@click.option("--grid", metavar="NAME", help="As in `sample`.")
@options.settings("Set a field of the solver, as in --set eta=0.5; may be repeated.")
@click.option(
    "--resize", is_flag=True,
    help="Crop a picture about its centre and resize it to the model's size.",
)  # fmt: skip
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
    default=Path("edited.png"), show_default=True,
    help=".png: input, noised input, results, mean and uncertainty side by side; .npy: the "
    "results in data units.",
)  # fmt: skip
@options.weights
@options.seed
@options.device
@options.report
def command(
    item: str,
    run: str,
    strength: float | None,
    t_start: float | None,
    draws: int | None,
    keep: str | None,
    origin: str | None,
    label: int | None,
    from_label: int | None,
    solver: str | None,
    steps: int | None,
    grid: str | None,
    settings: tuple[str, ...],
    resize: bool,
    out: Path,
    weights: str,
    seed: int | None,
    device_name: str,
    json_file: Path | None,
    guide: Guide,
) -> None:
    """Draw an item anew, near one that is given: noise is added to ITEM, and taken away again.

    ITEM is an image file, a .npy file of one item (FILE.npy:3 for the fourth of several), or the
    index of an item that the run held out. It need not be of the model's data: a sketch, or an
    item of another style, becomes one of the model. With --from it is carried over without
    noise: one model encodes it, the other decodes it.

    \b
    Examples:
      scoresde edit 0 --strength 0.4 -n 8
      scoresde edit sketch.png --model runs/digits-vp --resize --out edited.png
      scoresde edit 3 --model runs/classes --label 7 --cfg 2 --strength 0.7
      scoresde edit 0 --keep half:side=top --strength 0.8
      scoresde edit photo.png --from runs/photos --model runs/paintings
    """  # fmt: skip
    from ..checkpoint import load
    from .inpaint import mask_of
    from .items import read_item
    from .latent_files import settings_of

    options.check_drawn(out)
    options.check_apart(out, json_file)
    if strength is not None and t_start is not None:
        raise ValueError("--strength and --t-start say the same thing: give one of them")
    if origin is None and from_label is not None:
        raise ValueError("--from-label belongs to --from, the model that encodes the item")
    if origin is not None and (strength, t_start, draws, keep) != (None, None, None, None):
        raise ValueError(
            "a bridge draws nothing: --strength, --t-start, -n and --keep do not go with --from"
        )
    guide.check()
    device = options.pick_device(device_name)
    model = load(run, weights=weights, device=device)
    led = guide.of(model, run, weights, device)
    how: dict[str, Any] = {"steps": steps, "grid": options.grid(grid)}
    how["progress"] = options.on_screen()
    about = {"model": run, "label": label, "guidance": led.figures, "seed": seed or 0}
    if origin is None:
        given = read_item(model, run, item, resize)
        if solver is not None or settings:
            how["solver"] = options.solver(solver or model.sde.default_solver, settings)
        if keep is not None:
            how["keep"] = mask_of(keep, False, tuple(given.x.shape[1:]), resize).mask
        about |= {"item": given.name, "keep": keep}
        noise = (STRENGTH if strength is None and t_start is None else strength, t_start)
        found = _edit(model, led, given, noise, draws or DRAWS, about, how, out, device)
    else:
        source = load(origin, weights=weights, device=device)
        given = read_item(source, origin, item, resize)
        how |= settings_of(solver, steps, grid, settings)
        about |= {"item": given.name, "from": origin, "from_label": from_label}
        found = _bridge(source, model, led, given, about, how, out, device)
    figures, message, lines = found
    options.write_json(json_file, {**figures, "versions": options.versions(device)})
    if message:
        click.echo(f"Warning: {message}", err=True)
    for line in lines:
        options.speak(line)
    options.speak(f"written {out}")


Told = tuple[dict[str, Any], str, list[str]]


def _edit(
    model: ScoreModel,
    led: Guided,
    given: Item,
    noise: tuple[float | None, float | None],
    draws: int,
    about: dict[str, Any],
    how: dict[str, Any],
    out: Path,
    device: torch.device,
) -> Told:
    """SDEdit of the item: figures, what went wrong, and what to say."""
    import math

    from ..editing import edit, noised
    from ..samples import join
    from .draws import Shown, spread, write_draws
    from .items import encode_items

    strength, t_start = noise
    x = encode_items(model, given.x.to(device), about["seed"], 0, dequantize=False)
    cond = classes(model, led.classes, given.label, about["label"], device)
    about = {**about, "label": int(cond["y"]) if cond else None}
    if strength is not None:
        how["strength"] = strength
    parts = [
        edit(led.score, x, draws=min(BATCH, draws - start), t_start=t_start, seed=about["seed"],
             start_index=start, **how, **cond)
        for start in range(0, draws, BATCH)
    ]  # fmt: skip
    drawn = join(parts)
    t = drawn.t_start
    start = noised(model, x, t, seed=about["seed"])
    start = start / math.hypot(float(model.sde.alpha(t)), float(model.sde.sigma(t)))
    found = drawn.x[None]
    before = [Shown("input", model, x), Shown("noised input", model, start)]
    if "keep" in how:
        before.insert(1, Shown("kept", model, x, how["keep"]))
    write_draws(out, model, found, before)
    moved, apart = drawn.x - x, spread(model, found)
    moved = moved if model.scaler is None else model.scaler.difference(moved)
    figures = {
        **about, "strength": strength, "draws": draws, "t_start": t, "t_end": drawn.t_end,
        "log_snr": float(model.sde.log_snr(t)), "nfe": drawn.mean_nfe,
        **passes(drawn),
        "seconds": drawn.seconds, "converged": drawn.converged, "message": drawn.message,
        "solver": drawn.solver, "grid": drawn.grid, "steps": drawn.steps,
        "weights": drawn.weights, "distance": _rms(moved),
        "std": None if draws == 1 else _rms(apart) * math.sqrt(draws / (draws - 1)),
    }  # fmt: skip
    at = f"t={t:.3g}" if strength is None else f"strength {strength:g} (t={t:.3g})"
    varied = "" if draws == 1 else f", and {figures['std']:.3g} from each other"
    lines = [
        f"{draws} edit{'s' * (draws > 1)} of {given.name} under {about['model']} from {at} by "
        f"{drawn.solver['name']}{said(led.figures)}: {drawn.mean_nfe:.4g} evaluations each"
        f"{passes_said(drawn) if led.figures else ''}, {drawn.seconds:.1f} s, "
        f"{drawn.weights} weights, seed {about['seed']}",
        f"RMS {figures['distance']:.3g} from the input{varied}, in units of the data",
    ]
    return figures, drawn.message, lines


def _bridge(
    source: ScoreModel,
    target: ScoreModel,
    led: Guided,
    given: Item,
    about: dict[str, Any],
    how: dict[str, Any],
    out: Path,
    device: torch.device,
) -> Told:
    """The bridge between two models: figures, what went wrong, and what to say."""
    import math

    from ..conditions import classes_of
    from ..editing import bridge
    from .draws import Shown, write_draws
    from .items import encode_items
    from .latent_files import round_trip, round_trip_line

    x = encode_items(source, given.x.to(device), about["seed"], 0, dequantize=True)
    here = classes(source, classes_of(source), given.label, about["from_label"], device)
    there = classes(target, led.classes, None, about["label"], device)
    told = bridge(source, led.score, x, source_cond=here, target_cond=there, **how)
    sde = source.sde
    end = math.hypot(float(sde.alpha(sde.t_max)), float(sde.sigma(sde.t_max)))
    write_draws(
        out, target, told.x[None],
        [Shown("input", source, x), Shown("latent", source, told.latents.z / end)],
        [Shown("there and back", source, told.back)],  # type: ignore[arg-type]
    )  # fmt: skip
    there_and_back = round_trip(source, x, told.back)  # type: ignore[arg-type]
    nfe = float(told.latents.nfe.double().mean()), told.samples.mean_nfe
    figures = {
        **about, "nfe_encode": nfe[0], "nfe_decode": nfe[1],
        "seconds": told.latents.seconds + told.samples.seconds,
        "converged": told.converged, "message": told.message, "solver": told.latents.solver,
        "grid": told.latents.grid, "steps": told.latents.steps, "weights": told.latents.weights,
        "cycle": there_and_back["round_trip"],
        **{k.replace("round_trip", "cycle"): v for k, v in there_and_back.items()},
    }  # fmt: skip
    lines = [
        f"{given.name} of {about['from']} as an item of {about['model']} by "
        f"{told.latents.solver['name']}: {nfe[0]:.4g} evaluations to encode, {nfe[1]:.4g} to "
        f"decode, {figures['seconds']:.1f} s, {told.latents.weights} weights",
        round_trip_line(there_and_back).replace("round trip", "there and back"),
    ]
    return figures, told.message, lines


def classes(
    model: ScoreModel, count: int | None, known: int | None, label: int | None, device: Any
) -> dict[str, Any]:
    """The condition of one item under a score of so many classes: the given, or its own.

    Raises:
        ValueError: a label where there are no classes, or none where there are.
    """
    import torch

    from .sample import check_label

    label = known if label is None and count is not None else label
    if label is not None:
        check_label(model, label, count)
        return {"y": torch.tensor([label], device=device)}
    if count is not None:
        raise ValueError("the results are of a class: give it with --label")
    return {}


def _rms(x: torch.Tensor) -> float:
    return float(x.double().square().mean().sqrt())
