"""Tuned grids on disk: the entries of a model's ``tuned.yaml``, found by solver and step count."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import grids, solvers
from ..config import ConfigError, build, changed, describe, read_yaml

if TYPE_CHECKING:
    from ..solvers.base import Solver
    from .tuner import Tuning

FILE = "tuned.yaml"
"""Name of the file of tuned grids in a model's folder."""


def recall(score: Any, grid: grids.Tuned, solver: Solver, steps: int | None) -> grids.Tuned:
    """The points that a tuned grid stands for.

    Args:
        score: a model with ``tuned``, the entries of its folder.
        grid: a grid with points, which is returned as it is, or without.
        solver: the solver that is to follow it; where there is none for one that takes another's
            steps (``parallel``), that of the other.
        steps: its steps; those of the only entry for the solver if None.

    Raises:
        ConfigError: if there is no entry for them, naming those that there are.
    """
    if grid.log_snr:
        return grid
    entries = _entries(score, grid)
    section = describe(solver)
    own = [e for e in entries if e["solver"] == section]
    if not own and isinstance(within := section.get("solver"), dict):
        own = [e for e in entries if e["solver"] == within]  # takes the same steps (parallel)
    match = own if steps is None and len(own) == 1 else [e for e in own if e["steps"] == steps]
    if not match:
        raise ConfigError(
            f"no grid is tuned for {short(section)} at {'its default' if steps is None else steps}"
            f" steps (tuned: {_list(entries)}); `scoresde tune` makes one"
        )
    return grids.Tuned(tuple(float(v) for v in match[-1]["grid"]["log_snr"]))


def tuned_solver(score: Any, grid: grids.Tuned, steps: int | None) -> dict[str, Any]:
    """The section of the solver that a tuned grid was made for, of several the most accurate.

    Args:
        score: a model with ``tuned``, the entries of its folder.
        grid: a grid without points.
        steps: its steps; if None, all entries have to be of one solver.

    Raises:
        ConfigError: if there is no such entry, or no saying which.
    """
    entries = _entries(score, grid)
    match = [e for e in entries if steps in (None, e["steps"])]
    if not match:
        wanted = "" if steps is None else f" at {steps} steps"
        raise ConfigError(
            f"no grid is tuned{wanted} (tuned: {_list(entries)}); `scoresde tune` makes one"
        )
    if steps is None and any(e["solver"] != match[0]["solver"] for e in match):
        raise ConfigError(f"a tuned grid needs a solver or steps (tuned: {_list(entries)})")
    return min(match, key=lambda e: e.get("error", math.inf))["solver"]


def short(section: dict[str, Any]) -> str:
    """A solver as the command line takes it, ``vabm:points=2``: what differs from its defaults."""
    try:
        fields = changed(build(section, solvers, "solver"))
    except ConfigError:  # of another version, or a class that is not here
        return str(section["name"])
    return ":".join([section["name"], *(f"{k}={v}" for k, v in fields.items())])


def _entries(score: Any, grid: grids.Tuned) -> Sequence[dict[str, Any]]:
    """Those of the grid's file, or of the model's."""
    return getattr(score, "tuned", ()) if grid.file is None else open_file(grid.file)


def _list(entries: Sequence[dict[str, Any]]) -> str:
    return ", ".join(f"{short(e['solver'])} at {e['steps']}" for e in entries) or "none"


def open_file(name: str) -> list[dict[str, Any]]:
    """The entries of a file that has to be there.

    Raises:
        ConfigError: if it is not there, or is not such a file.
    """
    if not Path(name).is_file():
        raise ConfigError(f"there is no file of tuned grids at {name}")
    return read(Path(name))


def read(file: Path) -> list[dict[str, Any]]:
    """The entries of a file of tuned grids; none if there is no such file.

    Raises:
        ConfigError: if it is not such a file.
    """
    if not file.exists():
        return []
    try:
        entries = read_yaml(file).get("tuned")
    except ConfigError as error:
        if isinstance(error.__cause__, OSError):
            raise
        entries = None
    if not isinstance(entries, list) or not all(map(_is_entry, entries)):
        raise ConfigError(f"{file} is not a file of tuned grids, as `scoresde tune` writes them")
    return entries


def _is_entry(value: Any) -> bool:
    """Whether a value has all that :func:`recall` takes from an entry."""
    match value:
        case {"solver": {"name": str()}, "steps": int(), "grid": {"log_snr": [*points]}}:
            return all(isinstance(p, (int, float)) for p in points)
    return False


def save(file: Path, found: Tuning) -> None:
    """Adds an entry to a file of tuned grids, in place of one for the same solver and steps."""
    from ..files import write_yaml

    entry = found.entry()
    key = entry["solver"], entry["steps"]
    kept = [e for e in read(file) if (e["solver"], e["steps"]) != key]
    write_yaml(file, {"tuned": [*kept, entry]})
