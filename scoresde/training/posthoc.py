r"""Averages of any length after training, from snapshots of the power-function ones.

An average of length l at step T is the integral over the path of the parameters of its profile

    p(tau) = (g + 1) tau^g / T^(g+1) on [0, T],    g = g(l)    (:class:`~.ema.PowerFunction`)

so that a linear combination of snapshots with profiles p_i is the average with the profile
sum_i c_i p_i. The c_i make that as close as can be to the profile that is wanted:

    minimise |sum_i c_i p_i - p|^2   subject to   sum_i c_i = 1,
    (p_i, p_j) = (g_i + 1)(g_j + 1) / (g_i + g_j + 1) (T_i / T_j)^(g_j) / T_j   for T_i <= T_j

The paper has no such constraint. With it, what the path has in common comes back as it was: the
error is of the order of the movement of the weights during training, not of the weights.

Source: Analyzing and Improving the Training Dynamics of Diffusion Models (Karras et al., 2024),
https://arxiv.org/abs/2312.02696
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..config import ConfigError
from ..files import CheckpointError, read_tensors, write_tensors
from .ema import EMA, PowerFunction

BUFFERS = "buffers"
SMALLEST = 1e-13  # share of the largest eigenvalue below which one is rounding
Floats = NDArray[np.float64]


class Snapshot(NamedTuple):
    """A stored average: after how many steps, of which relative length, where."""

    step: int
    length: float
    file: Path


@dataclass(frozen=True)
class Reconstruction:
    """An average that was not tracked.

    Args:
        tensors: parameters and stored buffers by their names.
        length: its relative length.
        step: the steps that it averages over.
        residual: distance of its profile to the wanted one, relative to that one's norm.
        snapshots: number of snapshots that it combines.
    """

    tensors: dict[str, Tensor]
    length: float
    step: int
    residual: float
    snapshots: int


def save_snapshot(run: Path, step: int, averages: Sequence[EMA], *, write: bool = True) -> None:
    """Writes the power-function averages as ``snapshots/step-N/NAME.safetensors``.

    Buffers, the same in all of them, go into a file of their own. Each file is whole or not there.

    Args:
        run: the run's folder.
        step: steps done.
        averages: all averages of the run; those of another profile are left out.
        write: whether this process writes. Where the network is sharded all processes must call.

    Raises:
        CheckpointError: if a file cannot be written, as on a full disk.
    """
    kept = [average for average in averages if isinstance(average.profile, PowerFunction)]
    folder = run / "snapshots" / f"step-{step:09d}"
    for average in kept:
        state = _state(average, write)
        if not write:
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot write {folder}: {error.strerror or error}") from error
        names = {name for name, _ in average.net.named_buffers(remove_duplicate=False)}
        buffers = {key: state.pop(key) for key in names & state.keys()}
        if buffers and average is kept[0]:
            write_tensors(folder / f"{BUFFERS}.safetensors", buffers)
        write_tensors(folder / f"{average.name}.safetensors", state)


def _state(average: EMA, keep: bool) -> dict[str, Tensor]:
    """The whole tensors of an average on the CPU, put together if sharded; none if not kept."""
    state = {}
    for key, value in average.net.state_dict().items():
        together = getattr(value, "full_tensor", None)
        whole = value if together is None else together()
        if keep:
            state[key] = whole.detach().cpu()
    return state


def snapshots(run: Path) -> list[Snapshot]:
    """The snapshots of a run, oldest first, then by their lengths."""
    found = []
    for file in run.glob("snapshots/step-*/ema-length-*.safetensors"):
        step = re.fullmatch(r"step-(\d+)", file.parent.name)
        length = re.fullmatch(r"ema-length-([\d.e-]+)\.safetensors", file.name)
        if step and length:
            found.append(Snapshot(int(step[1]), float(length[1]), file))
    return sorted(found)


def rewind(run: Path, step: int) -> None:
    """Removes the snapshots after ``step``, which a run that goes on from it makes again."""
    for folder in run.glob("snapshots/step-*"):
        number = re.fullmatch(r"step-(\d+)", folder.name)
        if number and int(number[1]) > step:
            shutil.rmtree(folder)


def coefficients(
    steps: Sequence[float],
    lengths: Sequence[float],
    target_step: float,
    target_length: float,
    *,
    whole: bool = True,
) -> Floats:
    """Factors of snapshots in the best approximation of another average.

    Args:
        steps: of the snapshots, (K,).
        lengths: of the snapshots, (K,).
        target_step: of the average that is wanted.
        target_length: of the average that is wanted.
        whole: whether the factors sum to one; False gives the paper's.

    Returns:
        Factors (K,).

    Raises:
        ConfigError: for a length that no power function has, or a step below 1.
    """
    products, towards, _ = _products(steps, lengths, target_step, target_length)
    norms = np.sqrt(products.diagonal())
    products, towards = products / norms / norms[:, None], towards / norms
    if not whole:
        found: Floats = np.linalg.lstsq(products, towards, rcond=SMALLEST)[0] / norms
        return found
    # The factors that sum to one: a point among them, and the directions that keep the sum.
    weights = 1 / norms
    point = weights / (weights @ weights)
    directions = np.linalg.svd(weights[None])[2][1:].T
    if directions.size:
        inner = directions.T @ products @ directions
        rest = directions.T @ (towards - products @ point)
        point = point + directions @ np.linalg.lstsq(inner, rest, rcond=SMALLEST)[0]
    result: Floats = point / norms
    return result


def residual(
    factors: Floats,
    steps: Sequence[float],
    lengths: Sequence[float],
    target_step: float,
    target_length: float,
) -> float:
    """``|sum_i c_i p_i - p| / |p|``: what the combination leaves of the profile.

    Below about 1e-7 it is rounding.
    """
    products, towards, square = _products(steps, lengths, target_step, target_length)
    left = float(factors @ products @ factors - 2 * towards @ factors) + square
    return math.sqrt(max(left, 0.0) / square)


def _products(
    steps: Sequence[float], lengths: Sequence[float], target_step: float, target_length: float
) -> tuple[Floats, Floats, float]:
    """Inner products of the snapshots' profiles, with the wanted one, and its own square."""
    ends = np.array([*steps, target_step], dtype=np.float64)
    if not (ends > 0).all():
        raise ConfigError(f"an average is over at least one step, got {ends.min():g}")
    powers = np.array([PowerFunction(length).power for length in (*lengths, target_length)])
    g, h = powers[:, None], powers
    ratio = ends[:, None] / ends
    late: Floats = np.maximum(ends[:, None], ends)
    shape = np.where(ratio <= 1, np.minimum(ratio, 1) ** h, np.minimum(1 / ratio, 1) ** g)
    every: Floats = (g + 1) * (h + 1) / (g + h + 1) * shape / late
    return every[:-1, :-1], every[:-1, -1], float(every[-1, -1])


def reconstruct(
    run: Path,
    length: float,
    step: int | None = None,
    progress: Callable[[float], object] = lambda done: None,
) -> Reconstruction:
    """The average of any length, out of a run's snapshots, read one tensor at a time.

    Args:
        run: the run's folder.
        length: relative length of the average, in (0, 0.2887).
        step: the steps that it averages over, by default those of the last snapshot.
        progress: told the share of the work that is done, in [0, 1].

    Raises:
        CheckpointError: if there are no snapshots, or one of them is damaged or does not fit.
        ConfigError: for a length or a step that no average of the run has.
    """
    found = snapshots(run)
    if not found:
        raise CheckpointError(
            f"{run} has no snapshots to make averages from: train with training.lengths, "
            f"such as --set training.lengths=[0.05,0.1]"
        )
    last = found[-1].step
    step = last if step is None else step
    if not 1 <= step <= last:
        raise ConfigError(f"step {step} is not in the run's snapshots: accepted: 1 to {last}")
    steps, lengths = [float(s.step) for s in found], [s.length for s in found]
    factors = coefficients(steps, lengths, step, length)
    sums: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for i, (snapshot, factor) in enumerate(zip(found, factors, strict=True)):
        keys = set()
        for key, value in _stored(snapshot.file):
            keys.add(key)
            wide = value.to(torch.promote_types(value.dtype, torch.float32))
            if i == 0:
                sums[key], dtypes[key] = wide * factor, value.dtype
            elif key not in sums or sums[key].shape != value.shape:
                raise CheckpointError(f"{snapshot.file} does not fit the others: {key}")
            else:
                sums[key].add_(wide, alpha=float(factor))
        if missing := sums.keys() - keys:
            raise CheckpointError(f"{snapshot.file} does not fit the others: {min(missing)}")
        progress((i + 1) / len(found))
    tensors = {key: total.to(dtypes[key]) for key, total in sums.items()}
    tensors |= _buffers(found, step)
    return Reconstruction(
        tensors, length, step, residual(factors, steps, lengths, step, length), len(found)
    )


def _stored(file: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file, one in memory at a time."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (it is no mapping)
                yield key, opened.get_tensor(key)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{file} is truncated or damaged: {error}") from error


def _buffers(found: Sequence[Snapshot], step: int) -> dict[str, Tensor]:
    """Those of the newest snapshot up to ``step``, or else of the first."""
    nearest = max((s for s in found if s.step <= step), default=found[0])
    file = nearest.file.with_name(f"{BUFFERS}.safetensors")
    return read_tensors(file) if file.exists() else {}
