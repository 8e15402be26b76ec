"""What ``scoresde info`` says of a training run besides its model."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import chart, options

if TYPE_CHECKING:
    from ..interop.foreign import Foreign
    from ..sde.base import GaussianSDE

ROWS = 8
"""Height of the chart."""


def opened(folder: Path, weights: str) -> tuple[Foreign | None, str | None]:
    """The model of a run and why it has no weights, if it has none.

    A run that goes on may remove a checkpoint while it is read: it is tried once more. Without
    any that can be read the model is as its configuration describes it, if it does.

    Raises:
        ConfigError: for weights that the run does not have.
        CheckpointError: if there is neither a checkpoint nor a log.
    """
    from ..checkpoint import build_model, load
    from ..config import read_yaml
    from ..files import CheckpointError
    from ..interop.foreign import Foreign
    from ..saved_steps import step_folders
    from .foreign import OURS

    for _ in range(2):
        there = step_folders(folder)
        try:
            return Foreign(load(folder, weights=weights), OURS), None
        except CheckpointError as error:
            reason = str(error)
        if step_folders(folder) == there:
            break
    if not any((folder / "logs").glob("*.jsonl")):
        raise CheckpointError(reason)
    try:
        model = build_model(read_yaml(folder / "config.yaml"))
    except ValueError as error:
        return None, f"{reason}; {error}"
    model.weights = "none yet"
    return Foreign(model.eval(), OURS), reason


def process(description: Mapping[str, Any]) -> GaussianSDE | None:
    """The process that a ``config.yaml`` describes; None if it cannot be built here."""
    from .. import sde
    from ..config import build

    try:
        return build(description.get("sde"), sde, "sde")  # type: ignore[no-any-return]
    except ValueError:
        return None


def say(facts: Mapping[str, Any], sde: GaussianSDE | None = None) -> None:
    """Prints the facts of a run, a line each, with a chart of the losses.

    Args:
        facts: as :func:`scoresde.training.summary.summary` gives them.
        sde: of the run, to name the noise levels; None if it is not known.
    """
    shades = chart.BLOCKS if chart.blocks() else chart.PLAIN
    for key, value in lines(facts):
        options.speak(f"{key:<22} {value}")
    unit = "an item" if facts["kind"] == "classifier" else "a dimension"
    for row in curve(facts["curves"], chart.width(), shades, unit):
        options.speak(row)
    for row in by_noise(facts, sde, shades):
        options.speak(row)


def lines(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The facts of a run in words, those that are known."""
    from ..units import duration, size

    yield "state", state(facts)
    trouble = facts["trouble"]
    if trouble:
        when = trouble.get("time")
        ago = "" if when is None else f", {duration(max(0.0, time.time() - when))} ago"
        yield (
            f"last {trouble['kind']}",
            f"{trouble.get('text')} (step {trouble.get('step')}{ago})",
        )
    if facts["loss"] is not None:
        held = facts["heldout_loss"]
        yield (
            "loss",
            f"{facts['loss']:.4g} training" + (f", {held:.4g} held out" if held else ""),
        )
    if facts["heldout_accuracy"] is not None:
        yield "accuracy", f"{facts['heldout_accuracy']:.1%} of clean items held out"
    yield from _speed(facts)
    yield "cost so far", cost(facts["cost"])
    found = facts["checkpoints"]
    yield (
        "checkpoints",
        ", ".join(f"step {c['step']} ({size(c['bytes'])})" for c in found) or "none",
    )
    if facts["averages"]:
        yield "weights in them", ", ".join(facts["averages"])
    if facts["snapshots"]:
        total = size(sum(s["bytes"] or 0 for s in facts["snapshots"]))
        yield "snapshots", f"{len(facts['snapshots'])} files, {total}"
    if facts["samples"]:
        ago = duration(facts["samples"]["seconds"])
        yield "last samples", f"{facts['samples']['file']}, {ago} old"


def state(facts: Mapping[str, Any]) -> str:
    """How a run stands, in one line."""
    from ..units import duration

    words = facts["state"]
    if words == "silent":
        words = "silent: killed, or it hangs"
    parts = [words, f"step {facts['step']}"]
    if facts["share"] is not None:
        parts.append(f"{facts['share']:.0%} done")
    if facts["seconds_left"] is not None:
        parts.append(f"about {duration(facts['seconds_left'])} left")
    silent = facts["seconds_since_written"]
    parts.append("nothing written yet" if silent is None else f"written {duration(silent)} ago")
    return ", ".join(parts)


def _speed(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    from ..units import size

    speed = []
    if facts["items_per_second"] is not None:
        speed.append(f"{facts['items_per_second']:.4g} items/s")
    if facts["waiting"] is not None:
        speed.append(f"{facts['waiting']:.0%} of the time waiting for data")
    if facts["memory"]:
        speed.append(f"{size(facts['memory'])} of memory at most")
    if speed:
        yield "speed", ", ".join(speed)
    if facts["batch"]:
        world = facts["world"] or 1
        many = f"{world} processes" if world > 1 else "one process"
        skipped = f", {facts['skipped']} steps skipped" if facts["skipped"] else ""
        yield "global batch", f"{facts['batch']} over {many}{skipped}"


def cost(price: Mapping[str, Any]) -> str:
    """What a run has cost, in one line."""
    from ..units import duration

    parts = [
        f"{duration(price['seconds'])} of training",
        f"{price['device_hours']:.3g} device-hours",
        f"{price['items']:,} items",
    ]
    if price["repeated_seconds"]:
        parts.append(f"{duration(price['repeated_seconds'])} of it done twice")
    return ", ".join(parts)


def curve(
    curves: Mapping[str, Any], columns: int, shades: str, unit: str = "a dimension"
) -> list[str]:
    """A chart of training and held-out loss, with its title."""
    from ..training.loss_picture import LONG

    pairs = {name: (c["step"], c["loss"]) for name, c in curves.items()}
    if len(pairs["training"][0]) < 2:
        return []
    pairs["training"] = (pairs["training"][0], smooth(pairs["training"][1]))
    long = max(s for steps, _ in pairs.values() for s in steps) >= LONG
    held = ", o held out (averaged weights)" if pairs["heldout"][0] else ""
    return [
        "",
        f"training loss {unit}{held}",
        *chart.chart(pairs, columns, ROWS, shades, long),
    ]


def smooth(values: Sequence[float]) -> list[float]:
    """Means over each value and a twentieth of the course around it, less at the ends."""
    found = []
    for k in range(len(values)):
        reach = min(len(values) // 40, k, len(values) - 1 - k)
        part = values[k - reach : k + reach + 1]
        found.append(sum(part) / len(part))
    return found


def by_noise(facts: Mapping[str, Any], sde: GaussianSDE | None, shades: str) -> Iterator[str]:
    """Loss in each bin of log-SNR as bars, the held-out error beside it."""
    from ..training.summary import noise_levels

    train, held = facts["loss_by_log_snr"], facts["heldout_error_by_log_snr"]
    shown: Sequence[float | None] = train or held or ()
    known = [v for v in shown if v is not None]
    if not known:
        return
    edges = None if sde is None else noise_levels(sde, len(shown))
    what = "training loss" if train else "held-out error of eps"
    beside = train is not None and held is not None and len(held) == len(train)
    yield ""
    yield f"{'log-SNR':<18}{what}" + (", held-out error of eps" if beside else "")
    for k, value in enumerate(shown):
        name = f"bin {k + 1}" if edges is None else f"{edges[k]:6.1f} to {edges[k + 1]:5.1f}"
        number = "-" if value is None else f"{value:.4g}"
        other = held[k] if beside else None
        second = "" if not beside else f"{'-' if other is None else f'{other:.4g}':<11}"
        length = "" if value is None else chart.bar(value, max(known), 30, shades)
        yield f"{name:<18}{number:<11}{second}{length}".rstrip()
