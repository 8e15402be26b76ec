"""Files of latents, and what encoding and decoding changed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import options

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..latents import Latents
    from ..model import ScoreModel
    from .options import F

FORMAT = 1


@dataclass(frozen=True, eq=False)
class LatentFile:
    """What a file holds: latents ``z``, the data ``x`` in model range, labels, and settings."""

    z: Tensor
    x: Tensor
    y: Tensor | None
    settings: dict[str, Any]


def solving(command: F) -> F:
    """``--solver``, ``--steps``, ``--grid`` and ``--set``."""
    import click

    for option in (
        options.settings("Set a field of the solver, as in --set rtol=1e-6; may be repeated."),
        click.option("--grid", metavar="NAME", help="As in `sample`."),
        click.option("--steps", type=click.IntRange(min=1), help="Of a solver with fixed steps."),
        click.option("--solver", metavar="NAME", help="Any deterministic one.  "
                     "[default: runge-kutta, or that of the latents]"),
    ):  # fmt: skip
        command = option(command)
    return command


def standing(command: F) -> F:
    """``--t-min`` and ``--dequantize``: where encoded data stand."""
    import click

    command = click.option(
        "--dequantize/--no-dequantize", default=True, show_default=True,
        help="Noise within the levels of discrete data, or their middle.",
    )(command)  # fmt: skip
    return click.option("--t-min", type=float, help="Time at which the data stand.")(command)


def settings_of(
    solver: str | None, steps: int | None, grid: str | None, fields: tuple[str, ...]
) -> dict[str, Any]:
    """The options of :func:`solving` as arguments; nothing of what was not said."""
    from ..latents import DEFAULT_SOLVER

    given: dict[str, Any] = {"steps": steps, "grid": options.grid(grid)}
    if solver is not None or fields:
        given["solver"] = options.solver(solver or DEFAULT_SOLVER, fields)
    return {k: v for k, v in given.items() if v is not None}


def fingerprint(model: ScoreModel) -> str:
    """A digest of the weights: two models with the same one are the same function."""
    import hashlib

    digest = hashlib.sha256()
    for name, tensor in sorted(model.net.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def write_latents(
    file: Path,
    model: ScoreModel,
    found: Latents,
    x: Tensor,
    y: Tensor | None,
    about: dict[str, Any],
) -> None:
    """Writes a file of latents, whole or not at all."""
    import numpy as np

    from ..config import describe

    settings = {
        "format": FORMAT, **about, "sde": describe(model.sde), "fingerprint": fingerprint(model),
        "weights": found.weights, "t_min": found.t_min, "t_max": found.t_max,
        "solver": found.solver, "grid": found.grid, "steps": found.steps,
    }  # fmt: skip
    arrays = {"z": found.z.cpu().numpy(), "x": x.cpu().numpy()}
    if y is not None:
        arrays["y"] = y.cpu().numpy()
    with options.whole(file) as draft, open(draft, "wb") as handle:
        np.savez(handle, settings=np.array(json.dumps(settings)), **arrays)  # type: ignore[arg-type]


def read_latents(file: Path) -> LatentFile:
    """A file that :func:`write_latents` wrote.

    Raises:
        ValueError: no such file, or another kind of file.
    """
    import zipfile

    import numpy as np
    import torch

    if not file.is_file():
        raise ValueError(f"no latents at {file}: there is no such file")
    try:
        with np.load(file, allow_pickle=False) as arrays:
            settings = json.loads(str(arrays["settings"]))
            z, x = torch.from_numpy(arrays["z"]), torch.from_numpy(arrays["x"])
            y = torch.from_numpy(arrays["y"]) if "y" in arrays else None
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile, TypeError) as error:
        raise ValueError(f"{file} holds no latents of 'scoresde encode', or is damaged") from error
    return LatentFile(z, x, y, settings)


def check_fit(latents: LatentFile, model: ScoreModel, file: Path) -> str:
    """Refuses latents of another shape or process; what to warn of, for other weights.

    Raises:
        ValueError: naming what does not fit.
    """
    from ..config import describe

    shape, known = tuple(latents.z.shape[1:]), latents.settings
    if model.shape is not None and shape != tuple(model.shape):
        raise ValueError(
            f"{file} holds latents of shape {shape}, and the model takes items of "
            f"{tuple(model.shape)}: it was encoded by {known['model']}"
        )
    ours = describe(model.sde)
    if known["sde"] != ours:
        keys = sorted(k for k in {*ours, *known["sde"]} if ours.get(k) != known["sde"].get(k))
        raise ValueError(
            f"{file} was encoded by {known['model']} under another process: "
            + ", ".join(f"{k} is {known['sde'].get(k)}, the model's {ours.get(k)}" for k in keys)
        )
    if known["fingerprint"] != fingerprint(model):
        return f"{file} was encoded by other weights, of {known['model']}"
    return ""


def batches(total: int, size: int, device: torch.device, y: Tensor | None) -> Any:
    """``(rows, conditions)`` of each batch."""
    for start in range(0, total, size):
        rows = slice(start, min(start + size, total))
        yield rows, {} if y is None else {"y": y[rows].to(device)}


def labels_for(model: ScoreModel, known: Tensor | None, label: int | None, n: int) -> Any:
    """One label an item for a conditional model: the given one, or those known.

    Raises:
        ValueError: a label for a model without classes, or none for one with classes.
    """
    import torch

    from .heldout import conditional
    from .sample import check_label

    if label is not None:
        check_label(model, label)
        return torch.full((n,), label)
    if not conditional(model):
        return None
    if known is None:
        raise ValueError("the model is class-conditional: give the class with --label")
    return known


def round_trip(model: ScoreModel, before: Tensor, after: Tensor) -> dict[str, Any]:
    """What encoding and decoding changed: RMS over all entries, and levels that moved."""
    before, after = before.cpu().double(), after.cpu().double()
    difference, scaler = after - before, model.scaler
    found = {"round_trip": float(difference.square().mean().sqrt())}
    if scaler is not None:
        in_data = scaler.difference(difference)
        found["round_trip_data"] = float(in_data.square().mean().sqrt())
        if scaler.levels is not None:
            moved = scaler.decode(after) != scaler.decode(before)
            found["levels_moved"] = float(moved.double().mean())
    return found


def round_trip_line(found: dict[str, Any]) -> str:
    """The same in one line."""
    line = f"round trip: RMS {found['round_trip']:.3g} in model range"
    if "round_trip_data" in found:
        line += f", {found['round_trip_data']:.3g} in units of the data"
    if "levels_moved" in found:
        line += f"; {100 * found['levels_moved']:.2g} % of the entries on another level"
    return line
