"""The comparison itself: solvers times grids times steps, each from the same start noise."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from .. import solvers as room
from ..config import build
from ..model import home
from ..sampling import Samples
from ..world import World
from .intervals import order_statistics, paired_ratio, quantile, root_of_mean, student
from .plan import Trial, plan
from .row import MEASURES, Measure, Row, label
from .run import Runner, Truth, reference_solver
from .target import Target

STEPS = (5, 10, 20, 50)
Interval = tuple[float, float]


def compare(
    score: Any,
    target: Target,
    *,
    solvers: Iterable[Any] = ("heun", "ddim", "ancestral"),
    steps: Sequence[int] | None = None,
    nfe: Sequence[int] | None = None,
    grids: Iterable[Any] | None = None,
    grid: Any = None,
    shape: tuple[int, ...] | None = None,
    samples: int = 256,
    seed: int = 0,
    repeats: int = 1,
    batch: int | None = None,
    endpoint: Any = None,
    on_row: Callable[[Row], None] | None = None,
    progress: bool = False,
    world: World | None = None,
    **cond: Any,
) -> list[Row]:
    """Runs every solver on every grid at every step count, and measures its samples.

    In each repeat all start from the same ``x_T``, and a stochastic solver's noise has the same
    seed at every step count. A solver that chooses its own steps runs once. One that fails gives a
    row that says so. A first evaluation of the score, not timed, warms up; with ``repeats > 1``
    the first run of each row is not timed either.

    Args:
        score: ``score(x, t, **cond)`` that carries its ``sde``.
        target: what the samples are compared to.
        solvers: names, sections or :class:`scoresde.solvers.Solver` objects.
        steps: step counts, each >= 1; 5, 10, 20, 50 if there are neither these nor budgets.
        nfe: budgets instead: for each solver the most steps whose evaluations, the last denoising
            included, do not exceed it.
        grids: names, sections or grids; each solver's own if None.
        grid: a single one, instead of ``grids``.
        shape: of one item; ``score.shape`` if None.
        samples: number of samples in each repeat, >= 2.
        seed: of the start noise and of the solvers; repeats use ``seed, seed + 1, ...``.
        repeats: runs of each row, >= 1; with two or more, every measure has an interval.
        batch: samples drawn at once; all if None.
        endpoint: adds the distance to the converged probability-flow ODE: True for the tight
            solver of the state's dtype, or a solver such as
            ``ODEScipy(method="DOP853", rtol=1e-10, atol=1e-10)``.
        on_row: called with each row of this process when it is done; :func:`against_best` comes
            after all.
        progress: whether to show a bar on stderr after two seconds.
        world: processes that all call this with the same arguments, and share the rows and the
            solves of the endpoint; all get all rows, which do not depend on their number. Each
            row is timed on one of them, while the others are at work.
        cond: conditions, one value a sample.

    Returns:
        Rows in the order of ``solvers``, then ``grids``, then ``steps``.

    Raises:
        ConfigError: for an unknown solver or grid.
        ValueError: for numbers out of range, or if the endpoint solver does not converge.

    Example::

        law = sd.bench.Separated(dim=16)
        target = sd.bench.Target.exact(law, samples=2000)
        rows = sd.bench.compare(
            law.mixture().score(sd.VP()), target, solvers=["heun", "unipc"], nfe=[10, 20],
            grids=["karras", "logsnr"], samples=2000, repeats=5, endpoint=True,
        )
    """
    if steps is not None and nfe is not None:
        raise ValueError("compare takes steps or nfe, not both: a budget sets the steps")
    if grid is not None and grids is not None:
        raise ValueError("compare takes grid or grids, not both")
    shape = shape or getattr(score, "shape", None)
    if shape is None:
        raise ValueError("compare needs the shape of one item, which this score does not say")
    for name, value, least in (("samples", samples, 2), ("repeats", repeats, 1)):
        if value < least:
            raise ValueError(f"compare needs {name} >= {least}, got {value}")
    chosen = grids if grid is None else [grid]
    trials = plan(solvers, chosen, STEPS if steps is None else steps, nfe, score.sde, shape)
    world = world or World()
    place = home(score)
    run = Runner.prepare(score, shape, samples, seed, repeats, batch, place, cond)
    run.warm_up()
    truth = None
    if endpoint is not None and endpoint is not False:
        tight = reference_solver(place[1]) if endpoint is True else endpoint
        truth = Truth.find(run, build(tight, room, "solver"), world)

    mine = shared_out([trial.cost for trial in trials], world.size)[world.rank]
    rows: dict[int, Row] = {}
    with _bar([trials[i] for i in mine], repeats, progress) as bar:
        for i in mine:
            trial = trials[i]
            bar.set_postfix_str(f"{label(trial.solver)} {trial.steps or ''}", refresh=False)
            rows[i] = _row(run, target, truth, trial)
            if on_row is not None:
                on_row(rows[i])
            bar.update(trial.cost * repeats)
    for own in world.broadcast(world.gather(rows)):
        rows |= own
    return against_best([rows[i] for i in range(len(trials))])


def shared_out(costs: Sequence[float], size: int) -> list[list[int]]:
    """Indices of the costs for each of ``size`` processes: the dearest first, to who has least."""
    shares: list[list[int]] = [[] for _ in range(size)]
    loads = [0.0] * size
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        least = loads.index(min(loads))
        shares[least].append(i)
        loads[least] += costs[i]
    return [sorted(share) for share in shares]


def against_best(rows: Sequence[Row]) -> list[Row]:
    """The rows with ``vs_best``: the error over the least one among rows that cost no more.

    The error is that of the endpoint where the row has one, and sliced W2 otherwise; the other row
    solves the same problem with at most as many evaluations. 1 says that nothing run here does
    better for its cost. Both started from the same noise in every repeat: the ratio is the
    geometric mean of those of the repeats, and its interval is of that.
    """
    return [_against(row, rows) for row in rows]


def _against(row: Row, rows: Sequence[Row]) -> Row:
    key = "endpoint_rms" if row.value("endpoint_rms") is not None else "sliced_w2"
    if row.nfe is None or not (row.value(key) or 0) > 0 or key not in row.runs:
        return row
    rivals = [
        other for other in rows
        if other.case == row.case and other.converged and other.nfe is not None
        and other.nfe <= row.nfe and len(other.runs.get(key, ())) == row.repeats
        and min(other.runs[key]) > 0
    ]  # fmt: skip
    if not rivals or not min(row.runs[key]) > 0:
        return row
    # By the mean that the ratio is of, so that no row is better than the best.
    best = min(rivals, key=lambda other: sum(map(math.log, other.runs[key])))
    ratio, interval = paired_ratio(row.runs[key], best.runs[key])
    intervals = {k: v for k, v in row.intervals.items() if k != "vs_best"}
    if interval is not None and best is not row:
        intervals["vs_best"] = interval
    return replace(row, vs_best=ratio, intervals=intervals)


def _row(run: Runner, target: Target, truth: Truth | None, trial: Trial) -> Row:
    """All repeats of a trial, measured."""
    row = Row(
        label(trial.solver), trial.steps, None if trial.grid is None else label(trial.grid),
        sde=label(run.score.sde), law=target.name, budget=trial.budget, message=trial.message,
    )  # fmt: skip
    if trial.message:
        return row
    of_path = truth if truth is not None and not trial.solver.stochastic else None
    found, values = [], []
    intervals: dict[str, Interval] = {}
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for repeat in range(len(run.starts)):
                out = run(trial.solver, trial.steps, trial.grid, repeat)
                found.append(replace(out, x=out.x[:0]))  # the samples are measured and let go
                if bool(out.x.isfinite().all()):
                    measured, intervals = _measure(out, target, of_path, repeat)
                    values.append(measured)
    except Exception as error:
        return replace(row, message=_said(error))
    notice = str(caught[0].message) if caught else ""
    row = _account(row, found, notice)
    if len(values) < len(found):
        return row
    runs = {key: tuple(v[key] for v in values) for key in values[0]}
    if len(values) > 1:
        intervals = {m.key: _between(m, runs[m.key]) for m in MEASURES if m.key in runs}
    means: dict[str, Any] = {key: statistics.fmean(of_key) for key, of_key in runs.items()}
    return replace(
        row,
        **means,
        reference_error=None if of_path is None else of_path.error,
        intervals=intervals,
        runs={m.key: runs[m.key] for m in MEASURES if m.key in runs},
    )


def _account(row: Row, found: Sequence[Samples], notice: str) -> Row:
    """The row with what its runs cost and whether they arrived."""
    counts = [torch.as_tensor(out.nfe).double() for out in found]
    mean = statistics.fmean(float(c.mean()) for c in counts)
    nfe = round(mean) if math.isclose(mean, round(mean)) else round(mean, 1)
    timed = [out.seconds for out in found[min(1, len(found) - 1) :]]
    failed = next((out for out in found if not out.converged), None)
    if row.budget is not None and nfe > row.budget:
        notice = f"takes {nfe:g} evaluations where {row.budget} were allowed"
    return replace(
        row,
        nfe=nfe,
        nfe_max=int(max(float(c.max()) for c in counts)),
        seconds=statistics.median(timed),
        seconds_low=min(timed),
        seconds_high=max(timed),
        repeats=len(found),
        converged=failed is None,
        message=failed.message if failed is not None else notice,
    )


def _measure(
    out: Samples, target: Target, truth: Truth | None, repeat: int
) -> tuple[dict[str, float], dict[str, Interval]]:
    """The measures of one run, and the intervals that one run gives."""
    values = target.measure(out.x)
    half = quantile(len(out.x) - 1) * values["mmd2_stderr"]
    intervals: dict[str, Interval | None] = {
        "mmd2": (values["mmd2"] - half, values["mmd2"] + half)
    }
    if truth is not None:
        squares = truth.errors(out.x, repeat)
        roots = squares.sqrt().sort().values
        values |= {
            "endpoint_rms": math.sqrt(float(squares.mean())),
            "endpoint_median": float(roots.quantile(0.5)),
            "endpoint_q95": float(roots.quantile(0.95)),
        }
        intervals |= {
            "endpoint_rms": root_of_mean(squares),
            "endpoint_median": order_statistics(roots, 0.5),
            "endpoint_q95": order_statistics(roots, 0.95),
        }
    return values, {key: pair for key, pair in intervals.items() if pair is not None}


def _between(measure: Measure, values: Sequence[float]) -> Interval:
    """Student's interval over the repeats, above zero where the measure is."""
    low, high = student(values) or (-math.inf, math.inf)
    return (low if measure.signed else max(low, 0.0)), high


def _said(error: Exception) -> str:
    """The message of an error in one line; with its kind, where it was not meant for users."""
    text, kind = " ".join(str(error).split()), type(error).__name__
    if not text or not isinstance(error, (ValueError, RuntimeError, ImportError)):
        return f"{kind}: {text}" if text else kind
    return text


def _bar(trials: Sequence[Trial], repeats: int, show: bool) -> Any:
    from tqdm import tqdm

    total = sum(trial.cost for trial in trials) * repeats
    return tqdm(total=total, desc="bench", unit="nfe", disable=not show, delay=2, leave=False)
