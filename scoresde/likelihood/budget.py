r"""What a likelihood is spent on: one solve, a second to know the solver's error, or a target.

To reach a standard error, two things can be bought. **Steps**: each item is solved at two
settings, the second with twice the steps (or a tenth of the tolerance) of the first; their
difference, times :data:`SHARE`, is the error that the second leaves, and while that is too large a
third follows. **Probes**: a pilot of ``m`` probes has the variance ``s^2``; with

    K = max(m, ceil(s^2 / (target^2 - solver^2)))

probes in all, ``(mean - truth) / (s/sqrt(K))`` has Student's distribution of ``m - 1`` degrees of
freedom exactly, for normal estimates, though ``K`` is random: the interval covers as it says.

Source: A two-sample test for a linear hypothesis whose power is independent of the variance
(Stein, 1945), https://doi.org/10.1214/aoms/1177731088.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..precision import FLOOR
from .result import total_stderr
from .solve import Problem, Report, Solve, Way, solve

SHARE = 0.5
"""Error of a solve in units of its difference from one with half the steps or ten times the
tolerance: on mixtures and networks the root mean square lies below (benchmarks/RESULTS.md)."""
PILOT = 8
"""Probes that a target begins with."""
MOST_PROBES = 1024
STEPS_PART = 0.5
"""Part of the squared target that the steps may use up."""


@dataclass
class Account:
    """What each item has come to, and cost; all ``(B,)`` but ``latent`` and ``estimates``."""

    way: Way
    prior: Tensor
    delta: Tensor
    estimates: Tensor
    latent: Tensor
    stderr_probes: Tensor
    stderr_solver: Tensor
    freedom: Tensor
    probes: Tensor
    nfe: Tensor
    t: Tensor
    failures: dict[int, str]
    message: str = ""
    spread: Tensor = field(default_factory=lambda: torch.zeros(0))
    """Variance of one probe by the pilot."""

    @property
    def log_prob(self) -> Tensor:
        """``prior + delta``."""
        return self.prior + self.delta

    @property
    def stderr(self) -> Tensor:
        """Root of the sum of the squares of the parts."""
        return total_stderr(self.stderr_probes, self.stderr_solver)


def opened(problem: Problem, way: Way, done: Solve, count: int) -> Account:
    """The account of a first solve with ``count`` probes, 0 if exact."""
    deltas, latent = done.carried.deltas, done.carried.latent
    variance = torch.zeros_like(done.prior)
    if not problem.exact:  # one probe tells nothing of its own error
        variance = deltas.var(1) if count > 1 else torch.full_like(done.prior, math.nan)
    return Account(
        way=way,
        prior=done.prior,
        delta=deltas.mean(1),
        estimates=done.estimates,
        latent=latent,
        stderr_probes=(variance / max(count, 1)).sqrt(),
        stderr_solver=torch.full_like(done.prior, math.nan),
        freedom=torch.full_like(done.prior, math.inf if problem.exact else count - 1),
        probes=torch.full((len(latent),), count),
        nfe=done.carried.nfe.clone(),
        t=done.carried.t.clone(),
        failures=done.carried.failures,
        spread=variance,
    )


def check(target: float | None, probes: int, way: Way) -> None:
    """Refuses a target that is none."""
    if target is not None and not 0 < target < math.inf:
        raise ValueError(f"target_stderr is in nats and above 0, got {target}")
    if probes < 1:
        raise ValueError(f"probes={probes}: the Hutchinson estimate needs at least 1")


def spend(
    problem: Problem,
    way: Way,
    probes: int,
    solver_error: bool,
    target: float | None,
    report: Report | None,
) -> Account:
    """One solve; two, if the solver's error is asked for; as many as a target needs."""
    count = 0 if problem.exact else probes
    if target is not None:
        return _reach(problem, way, 0 if problem.exact else max(probes, PILOT), target, report)
    directions = problem.probes(0, probes)
    if not solver_error:
        return opened(problem, way, solve(problem, way, directions, report), count)
    account = opened(problem, way, solve(problem, way, directions, report), count)
    if way.steps == 1:  # there is nothing coarser to compare with
        return account
    coarse = solve(problem, way.coarser(), directions, None)
    account.nfe += coarse.carried.nfe
    account.stderr_solver = _difference(coarse, account.estimates)
    return account


def _difference(coarse: Solve, estimates: Tensor) -> Tensor:
    """The error that a finer solve leaves, ``(B,)``, with some of the probes' noise on a grid.

    There the probes turn at other points: the error is rather over- than understated.
    """
    return SHARE * (estimates - coarse.estimates).mean(1).abs()


def _reach(
    problem: Problem, way: Way, pilot: int, target: float, report: Report | None
) -> Account:
    """Adds steps and probes, for each item by itself, until its error is below the target."""
    directions = problem.probes(0, pilot)
    before = way if way.steps == 1 else way.coarser()
    account = opened(problem, before, solve(problem, before, directions, report), pilot)
    levels = [before]
    level = torch.zeros(len(problem.x), dtype=torch.long)
    rows = _standing(account, torch.arange(len(problem.x)))
    while len(rows):
        finer = way if levels[-1] == before != way else levels[-1].finer()
        rows = rows[account.nfe[rows] + _cost(account, levels, rows, finer) <= way.max_nfe]
        if not len(rows) or not _useful(finer, problem.x.dtype):
            break
        levels.append(finer)
        done = solve(problem.some(_on(rows, problem.x)), finer, _of(directions, rows), report)
        _adopt(account, done, rows, pilot)
        level[rows] = len(levels) - 1
        account.way = finer
        rows = _standing(account, rows)
        left = account.stderr_solver[_on(rows, problem.x)].cpu() ** 2
        rows = rows[left > STEPS_PART * target**2]
    if pilot:
        _more_probes(problem, account, levels, level, pilot, target, report)
    # Of an item that was solved once, what the steps leave is not known.
    met = (account.stderr <= target) & ~account.stderr_solver.isnan()
    missed = int((~met).sum())
    if missed:
        account.message = (
            f"the standard error of {target:g} nats was not reached for {missed} of "
            f"{len(problem.x)} items: max_nfe={way.max_nfe}, {MOST_PROBES} probes or the "
            "precision of the state ended it"
        )
    return account


def _cost(account: Account, levels: list[Way], rows: Tensor, finer: Way) -> Tensor:
    """Evaluations that the next solve is expected to take."""
    if finer.steps is not None and levels[-1].steps is not None:
        share = finer.steps / levels[-1].steps
    else:
        share = 2.0
    last = account.nfe[rows] * (1 if len(levels) == 1 else 2 / 3)
    return (share * last).ceil().long()


def _useful(way: Way, dtype: torch.dtype) -> bool:
    """Whether a state of this dtype can tell the way from a coarser one."""
    return not way.adaptive or max(way.rtol, way.atol) >= FLOOR[dtype]


def _standing(account: Account, rows: Tensor) -> Tensor:
    """Those of the rows that have not failed."""
    failed = torch.tensor(sorted(account.failures), dtype=torch.long)
    return rows[~torch.isin(rows, failed)]


def _on(rows: Tensor, x: Tensor) -> Tensor:
    return rows.to(x.device)


def _of(directions: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if directions is None else directions[:, rows.to(directions.device)]


def _adopt(account: Account, done: Solve, rows: Tensor, pilot: int) -> None:
    """Puts a finer solve of some items in place of the one they had."""
    here = _on(rows, account.prior)
    account.stderr_solver[here] = SHARE * (done.estimates - account.estimates[here]).mean(1).abs()
    deltas = done.carried.deltas
    account.prior[here], account.delta[here] = done.prior, deltas.mean(1)
    account.estimates[here], account.latent[here] = done.estimates, done.carried.latent
    if pilot:
        account.spread[here] = deltas.var(1)
        account.stderr_probes[here] = (deltas.var(1) / pilot).sqrt()
    account.nfe[rows] += done.carried.nfe
    account.t[rows] = done.carried.t
    account.failures.update({int(rows[i]): reason for i, reason in done.carried.failures.items()})


def _more_probes(
    problem: Problem,
    account: Account,
    levels: list[Way],
    level: Tensor,
    pilot: int,
    target: float,
    report: Report | None,
) -> None:
    """As many more probes as each item's own variance asks for, all in one more solve of it."""
    left = (target**2 - account.stderr_solver.nan_to_num(0.0) ** 2).clamp_min(0.05 * target**2)
    needed = (account.spread / left).nan_to_num(0.0).ceil().long().clamp(pilot, MOST_PROBES).cpu()
    # A power of two times the pilot: items that need as many are solved together.
    needed = pilot * 2 ** (needed.double() / pilot).log2().ceil().long()
    fits = account.nfe + _last(account, level) <= levels[0].max_nfe
    extra = torch.full((len(problem.x), 0), math.nan).to(account.estimates)
    for at, many in {(int(a), int(n)) for a, n in zip(level, needed, strict=True) if n > pilot}:
        rows = ((level == at) & (needed == many) & fits).nonzero()[:, 0]
        rows = _standing(account, rows)
        if not len(rows):
            continue
        part = problem.some(_on(rows, problem.x))
        done = solve(part, levels[at], _of(problem.probes(pilot, many), rows), report)
        here = _on(rows, account.prior)
        deltas = done.carried.deltas
        old = account.estimates[here] - account.prior[here, None]
        account.delta[here] = (old.sum(1) + deltas.sum(1)) / many
        account.stderr_probes[here] = (account.spread[here] / many).sqrt()
        account.probes[rows] = many
        account.nfe[rows] += done.carried.nfe
        width = many - pilot
        if extra.shape[1] < width:
            pad = torch.full((len(extra), width - extra.shape[1]), math.nan).to(extra)
            extra = torch.cat([extra, pad], 1)
        extra[here, :width] = done.estimates
        account.failures.update(
            {int(rows[i]): reason for i, reason in done.carried.failures.items()}
        )
    account.estimates = torch.cat([account.estimates, extra], 1)


def _last(account: Account, level: Tensor) -> Tensor:
    """About what one more solve costs each item at the level that it has reached."""
    return torch.where(level > 0, (account.nfe * 2 / 3).long(), account.nfe)


def with_gradients(problem: Problem, way: Way, probes: int, how: bool | str) -> Account:
    """One solve that carries gradients."""
    from .gradient import differentiable_solve

    if how not in (True, "adjoint"):
        raise ValueError(f"differentiable must be True, False or 'adjoint', got {how!r}")
    done = differentiable_solve(problem, way, problem.probes(0, probes), adjoint=how == "adjoint")
    return opened(problem, way, done, 0 if problem.exact else probes)
