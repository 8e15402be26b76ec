"""What a run's folder says of the run: how it goes, what it cost, what went wrong.

Everything is read from the files, while the run goes on, after it has ended or died, and with no
checkpoint at all.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import CLASSIFIER
from ..config import read_yaml
from ..saved_steps import step_folders, step_of
from ..sde.base import GaussianSDE, as_time
from .log import EVENTS, Log
from .loss_picture import LONG, curve, grouped

TROUBLE = ("error", "skip", "unreadable", "worker", "data")
"""Kinds of events that a reader has to know of."""
TURNS = {"start": "running", "resume": "running", "stop": "stopped", "end": "finished",
         "error": "failed"}  # fmt: skip
SILENCE = 600.0
"""Seconds without a word after which a run is no longer taken to be running."""
RECENT = 25
"""Rows of the log that figures of the present are means of."""
Row = Mapping[str, Any]


@dataclass(frozen=True)
class RunCost:
    """What a run has cost so far, over all its sessions.

    Attributes:
        seconds: of training, with that done twice after a failure.
        repeated_seconds: the part of them that was done twice.
        items: seen by the weights as they are.
        steps: likewise.
        device_hours: seconds times the processes at work then, in hours.
        multiply_adds: three times those of a forward pass, for each item; None if not known.
        flops: additions and multiplications, two for each multiply-add.
    """

    seconds: float
    repeated_seconds: float
    items: int
    steps: int
    device_hours: float
    multiply_adds: int | None = None
    flops: int | None = None


def cost(run: Path, multiply_adds: int | None = None) -> RunCost:
    """What a run has cost so far.

    ``3 * multiply_adds * items``: the backward pass costs twice the forward one.

    Args:
        run: the run's folder.
        multiply_adds: of a forward pass of one item, as :func:`scoresde.cost.cost` counts them.
    """
    log = Log(run)
    return _cost(log.rows("train"), log.rows(EVENTS), saved(run), multiply_adds)


def saved(run: Path) -> Row:
    """The state in the newest checkpoint, which may be ahead of the log; empty without any."""
    for folder in reversed(step_folders(run)):
        try:
            return read_yaml(folder / "state.yaml")
        except (OSError, ValueError):  # just removed, or damaged
            continue
    return {}


def _cost(
    rows: Sequence[Row], events: Sequence[Row], state: Row, multiply_adds: int | None
) -> RunCost:
    again = [e for e in events if e.get("kind") == "rewind"]
    repeated = float(sum(e.get("seconds") or 0.0 for e in again))
    busy = sum((e.get("seconds") or 0.0) * e.get("world", 1) for e in again)
    last: Row = rows[-1] if rows else {}
    before = 0.0
    for row in [*rows, state] if (state.get("step") or 0) > (last.get("step") or 0) else rows:
        seconds = row.get("seconds") or before
        busy += (seconds - before) * row.get("world", 1)
        before = seconds
    steps, items = (int(max(last.get(k) or 0, state.get(k) or 0)) for k in ("step", "items"))
    return RunCost(
        before + repeated,
        repeated,
        items,
        steps,
        busy / 3600,
        **compute(items, multiply_adds),
    )


def compute(items: int, multiply_adds: int | None) -> dict[str, int | None]:
    """What training on so many items takes: the backward pass costs twice the forward one."""
    if multiply_adds is None:
        return {"multiply_adds": None, "flops": None}
    return {"multiply_adds": 3 * multiply_adds * items, "flops": 6 * multiply_adds * items}


def last_error(run: Path) -> dict[str, Any] | None:
    """The last event that tells of trouble: an error, a skipped step, an unreadable item."""
    return _last(Log(run).rows(EVENTS), TROUBLE)


def _last(events: Sequence[Row], kinds: Collection[str]) -> dict[str, Any] | None:
    return next((dict(e) for e in reversed(events) if e.get("kind") in kinds), None)


def is_run(folder: Path) -> bool:
    """Whether a folder holds a training run."""
    return (folder / "config.yaml").is_file() and (
        (folder / "checkpoints").is_dir() or (folder / "logs").is_dir()
    )


def summary(run: Path) -> dict[str, Any]:
    """Everything that the files of a run say of it, as JSON takes it."""
    log, now = Log(run), time.time()
    rows, heldout, events = (log.rows(name) for name in ("train", "heldout", EVENTS))
    last: Row = rows[-1] if rows else {}
    recent = rows[-RECENT:]
    price = _cost(rows, events, saved(run), None)
    description = read_yaml(run / "config.yaml")
    training = description.get("training")
    share = last.get("progress")
    written = last_written(run)
    silent = None if written is None else max(0.0, now - written)
    state = state_of(events, (run / "report.json").is_file(), share, silent, patience(rows))
    return {
        "kind": CLASSIFIER if CLASSIFIER in description else "score",
        "state": state,
        "seconds_since_written": silent,
        "step": price.steps,
        "share": 1.0 if state == "finished" else share,
        "seconds_left": _left(last, share) if state == "running" else None,
        "loss": mean(recent, "loss"),
        "heldout_loss": heldout[-1].get("loss") if heldout else None,
        "heldout_accuracy": heldout[-1].get("accuracy") if heldout else None,
        "gradient_norm": mean(recent, "gradient_norm"),
        "lr": last.get("lr"),
        "items_per_second": mean(recent, "items_per_second"),
        "waiting": mean(recent, "waiting"),
        "memory": last.get("memory"),
        "world": last.get("world"),
        "batch": last.get("batch") or (training or {}).get("batch_size"),
        "skipped": last.get("skipped"),
        "trouble": _last(events, TROUBLE),
        "cost": asdict(price),
        "loss_by_log_snr": means([r["loss_by_time"] for r in recent if r.get("loss_by_time")]),
        "heldout_error_by_log_snr": heldout[-1].get("eps_error_by_log_snr") if heldout else None,
        "curves": {"training": _curve(rows), "heldout": _curve(heldout)},
        "samples": newest(run / "samples", now),
        "checkpoints": checkpoints(run),
        "averages": averages(run),
        "snapshots": [
            {"file": p.relative_to(run).as_posix(), "bytes": _size(p)}
            for p in _files(run / "snapshots")
        ],
    }  # fmt: skip


def state_of(
    events: Sequence[Row],
    reported: bool,
    share: float | None,
    silent: float | None,
    patience: float = SILENCE,
) -> str:
    """``running``, ``finished``, ``stopped``, ``failed``, or ``silent``: killed, or it hangs.

    Args:
        events: rows of ``logs/events.jsonl``.
        reported: whether the run has left a ``report.json``.
        share: share of the run that is done, None if not known.
        silent: seconds since anything was written.
        patience: seconds without a word that are nothing unusual.
    """
    turn = _last(events, TURNS)
    state = TURNS[turn["kind"]] if turn else None
    if state is None and (reported or (share or 0.0) >= 1):
        return "finished"  # of a version that logged no events
    if state in (None, "running") and (silent is None or silent > patience):
        return "silent"
    return state or "running"


def patience(rows: Sequence[Row]) -> float:
    """Seconds of silence that are nothing unusual: some ten times that from row to row."""
    times = [r["seconds"] for r in rows[-RECENT:] if r.get("seconds") is not None]
    gap = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0
    return max(SILENCE, 10 * gap)


def _left(last: Row, share: float | None) -> float | None:
    return None if not share else (last.get("seconds") or 0.0) * (1 - share) / share


def last_written(run: Path) -> float | None:
    """When the logs, samples or checkpoints of a run were last written, None if never."""
    files = [*_files(run / "logs"), *_files(run / "samples"), *step_folders(run)]
    return max((t for f in files if (t := _modified(f)) is not None), default=None)


def newest(folder: Path, now: float) -> dict[str, Any] | None:
    """The file of a run's folder that was written last, and how long ago that was."""
    known = [(t, f) for f in _files(folder) if (t := _modified(f)) is not None]
    if not known:
        return None
    written, file = max(known)
    return {"file": file.relative_to(folder.parent).as_posix(), "seconds": max(0.0, now - written)}


def checkpoints(run: Path) -> list[dict[str, Any]]:
    """The checkpoints on the disk, oldest first, with their sizes."""
    found = []
    for folder in step_folders(run):
        sizes = {p.name: s for p in _files(folder) if (s := _size(p)) is not None}
        if sizes:  # or the run has just removed it
            found.append({
                "name": folder.name, "step": step_of(folder), "bytes": sum(sizes.values()),
                "files": sizes,
            })  # fmt: skip
    return found


def averages(run: Path) -> list[str]:
    """The weights that the newest checkpoint has: raw, and its averages."""
    folders = checkpoints(run)
    names = [n for n in (folders[-1]["files"] if folders else {}) if n.endswith(".safetensors")]
    return [n.removesuffix(".safetensors") for n in names if n.startswith(("raw", "ema"))]


def mean(rows: Sequence[Row], key: str) -> float | None:
    """The mean of a column, without the rows that lack it."""
    values = [r[key] for r in rows if r.get(key) is not None]
    return sum(values) / len(values) if values else None


def means(rows: Sequence[Sequence[float | None]]) -> list[float | None] | None:
    """The mean of each entry, None where it is None in all rows; None without rows."""
    if not rows:
        return None
    width = min(map(len, rows))
    columns = [[row[k] for row in rows if row[k] is not None] for k in range(width)]
    return [sum(c) / len(c) if c else None for c in columns]  # type: ignore[arg-type]


def _curve(rows: Sequence[Row], most: int = 500) -> dict[str, list[float]]:
    """Steps and losses, thinned to means of groups as in ``loss.png``."""
    steps, losses = curve(rows)
    if len(steps) > most:
        steps, losses = grouped(steps, losses, most, log=steps[-1] >= LONG)
    return {"step": steps.tolist(), "loss": losses.tolist()}


def noise_levels(sde: GaussianSDE, bins: int) -> list[float]:
    """The log-SNR between the bins in which losses are told apart, and at both ends."""
    start, end = (float(sde.log_snr(as_time(t))) for t in (sde.t_min, sde.t_max))
    return [start + (end - start) * k / bins for k in range(bins + 1)]


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(p for p in folder.rglob("*") if p.is_file())
    except OSError:  # the run has just removed it
        return []


def _modified(file: Path) -> float | None:
    try:
        return file.stat().st_mtime
    except OSError:
        return None


def _size(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except OSError:
        return None
