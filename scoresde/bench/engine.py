"""The comparison itself: solvers times step counts, each from the same start noise."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

from torch import Tensor

from .. import grids
from .. import solvers as room
from ..config import build, class_name
from ..model import home
from ..noise import KeyedNoise
from ..sampling import Samples, join, sample
from ..sde.base import select
from ..solvers.base import Solver
from .target import Target

ADAPTIVE_COST = 300
"""Evaluations that the progress bar allows for a solver that chooses its steps."""


@dataclass(frozen=True)
class Row:
    """One solver at one step count.

    Args:
        solver: name, with the fields that are not at their defaults.
        steps: steps of the solver; None if it chose them.
        grid: name of the grid; None if the solver chose its steps.
        nfe: evaluations of the score for a sample, the last denoising included; on average.
        seconds: wall-clock time of all samples, the median over the repeats.
        sliced_w2: sliced Wasserstein-2 distance to the reference, in units of the data.
        sliced_w2_stderr: its standard error over directions.
        mmd2: unbiased squared MMD to the reference.
        mmd2_stderr: its standard error over items.
        endpoint_rms: root mean square distance to the converged solution of the ODE from the same
            start, in the model's range; None for stochastic solvers or if not asked for.
        mean_error: root mean square error of the mean over entries, where the truth is known.
        covariance_error: relative Frobenius error of the covariance, where the truth is known.
        converged: whether the solver arrived with finite values.
        message: what went wrong or deserves notice.
    """

    solver: str
    steps: int | None
    grid: str | None = None
    nfe: int | None = None
    seconds: float | None = None
    sliced_w2: float | None = None
    sliced_w2_stderr: float | None = None
    mmd2: float | None = None
    mmd2_stderr: float | None = None
    endpoint_rms: float | None = None
    mean_error: float | None = None
    covariance_error: float | None = None
    converged: bool = False
    message: str = ""


def compare(
    score: Any,
    target: Target,
    *,
    solvers: Iterable[Any] = ("heun", "ddim", "ancestral"),
    steps: Sequence[int] = (5, 10, 20, 50),
    grid: Any = None,
    shape: tuple[int, ...] | None = None,
    samples: int = 256,
    seed: int = 0,
    repeats: int = 1,
    batch: int | None = None,
    endpoint: Any = None,
    progress: bool = False,
    **cond: Any,
) -> list[Row]:
    """Runs every solver at every step count and measures its samples against a target.

    All start from the same ``x_T``, and a stochastic solver's noise has the same seed at every
    step count. A solver that chooses its own steps runs once. One that fails gives a row that says
    so. A first evaluation of the score, not timed, warms up; with ``repeats > 1`` the first run of
    each row is not timed either.

    Args:
        score: ``score(x, t, **cond)`` that carries its ``sde``.
        target: what the samples are compared to.
        solvers: names, sections or :class:`scoresde.solvers.Solver` objects.
        steps: step counts, each >= 1.
        grid: name, section or grid for all of them; each solver's own if None.
        shape: of one item; ``score.shape`` if None.
        samples: number of samples, >= 2.
        seed: of the start noise and of the solvers.
        repeats: runs of each row, >= 1.
        batch: samples drawn at once; all if None.
        endpoint: solver of the probability-flow ODE, tight enough to be the truth, such as
            ``ODEScipy(method="DOP853", rtol=1e-10, atol=1e-10)``; it adds ``endpoint_rms``.
        progress: whether to show a bar on stderr after two seconds.
        cond: conditions, one value a sample.

    Returns:
        Rows in the order of ``solvers``, then of ``steps``.

    Raises:
        ConfigError: for an unknown solver or grid.
        ValueError: for numbers out of range, or if the endpoint solver does not converge.

    Example::

        law = sd.bench.mixture(2)
        target = sd.bench.Target.exact(law, samples=2000)
        rows = sd.bench.compare(law.score(sd.VP()), target, solvers=["heun", "ddim"], samples=2000)
    """
    plan = _plan(solvers, steps)
    places = None if grid is None else build(grid, grids, "grid")
    shape = shape or getattr(score, "shape", None)
    if shape is None:
        raise ValueError("compare needs the shape of one item, which this score does not say")
    for name, value, least in (("samples", samples, 2), ("repeats", repeats, 1)):
        if value < least:
            raise ValueError(f"compare needs {name} >= {least}, got {value}")
    device, dtype = home(score)
    noise = KeyedNoise(seed)
    x_T = score.sde.prior_sample((samples, *shape), noise, device=device, dtype=dtype)
    run = _Runner(score, x_T, seed, batch or samples, cond)
    run.warm_up()
    truth = None if endpoint is None else run.endpoint(build(endpoint, room, "solver"))

    rows = []
    with _bar(plan, repeats, progress) as bar:
        for solver, count in plan:
            bar.set_postfix_str(f"{label(solver)} {count or ''}", refresh=False)
            own = None if count is None else places
            rows.append(_row(run, target, truth, solver, count, own, repeats))
            bar.update(_cost(solver, count) * repeats)
    return rows


def label(solver: Solver) -> str:
    """A solver's name with its fields that differ from the defaults: ``ddim(eta=1)``."""
    try:
        usual = type(solver)()
    except TypeError:  # a solver with a field that has no default
        usual = None
    changed = []
    for field in fields(solver):
        value = getattr(solver, field.name)
        if value != getattr(usual, field.name, MISSING):
            changed.append(f"{field.name}={_plain(value)}")
    name = class_name(type(solver))
    return f"{name}({', '.join(changed)})" if changed else name


def _plain(value: Any) -> str:
    if isinstance(value, Solver):
        return label(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class _Runner:
    """Everything that the rows have in common."""

    score: Any
    start: Tensor
    seed: int
    batch: int
    cond: dict[str, Any]

    def __call__(self, solver: Solver, steps: int | None, grid: Any) -> Samples:
        """All samples, batch by batch; noise is keyed, so the batches do not show."""
        parts = []
        for first in range(0, len(self.start), self.batch):
            rows = slice(first, first + self.batch)
            cond = select(self.cond, rows)
            parts.append(
                sample(
                    self.score, x_T=self.start[rows], solver=solver, steps=steps, grid=grid,
                    seed=self.seed, start_index=first, **cond,
                )
            )  # fmt: skip
        return join(parts)

    def warm_up(self) -> None:
        """One step of the first batch, so that nothing timed loads libraries or kernels."""
        rows = slice(self.batch)
        first = replace(self, start=self.start[rows], cond=select(self.cond, rows))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one step is few, and nobody looks at its sample
            first(room.DDIM(), 1, None)

    def endpoint(self, solver: Solver) -> Tensor:
        """The converged end of the ODE."""
        if solver.stochastic:
            raise ValueError(f"the endpoint needs a solver of the ODE, and {label(solver)} is not")
        found = self(solver, None, None)
        if not found.converged:
            raise ValueError(f"the endpoint by {label(solver)} did not converge: {found.message}")
        return found.x


def _row(
    run: _Runner,
    target: Target,
    truth: Tensor | None,
    solver: Solver,
    steps: int | None,
    grid: Any,
    repeats: int,
) -> Row:
    row = Row(label(solver), steps)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            runs = [run(solver, steps, grid) for _ in range(repeats)]
    except (ValueError, RuntimeError, ArithmeticError, ImportError) as error:
        return replace(row, message=" ".join(str(error).split()) or type(error).__name__)
    found = runs[-1]
    notice = str(caught[0].message) if caught else ""
    row = replace(
        row,
        grid=None if found.grid is None else found.grid["name"],
        nfe=round(found.mean_nfe),
        seconds=statistics.median(r.seconds for r in runs[min(1, repeats - 1) :]),
        converged=found.converged,
        message=found.message or notice,
    )
    if not bool(found.x.isfinite().all()):
        return row
    measured: dict[str, Any] = {**target.measure(found.x)}
    row = replace(row, **measured)
    if truth is None or solver.stochastic:
        return row
    return replace(
        row, endpoint_rms=float((found.x - truth).cpu().double().square().mean().sqrt())
    )


def _plan(wanted: Iterable[Any], steps: Sequence[int]) -> list[tuple[Solver, int | None]]:
    """Every solver with every step count, or once if it chooses its steps."""
    chosen: list[Solver] = [build(section, room, "solver") for section in wanted]
    if not chosen or not steps:
        raise ValueError("compare needs at least one solver and one step count")
    for count in steps:
        if count < 1:
            raise ValueError(f"a step count must be at least 1, got {count}")
    plan = []
    for solver in dict.fromkeys(chosen):
        counts = dict.fromkeys(steps) if solver.default_steps is not None else (None,)
        plan += [(solver, count) for count in counts]
    return plan


def _cost(solver: Solver, steps: int | None) -> int:
    return ADAPTIVE_COST if steps is None else steps * solver.nfe_per_step + 1


def _bar(plan: list[tuple[Solver, int | None]], repeats: int, show: bool) -> Any:
    from tqdm import tqdm

    total = sum(_cost(solver, steps) for solver, steps in plan) * repeats
    return tqdm(total=total, desc="bench", unit="nfe", disable=not show, delay=2, leave=False)
