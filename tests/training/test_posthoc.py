"""Averages after training: the fit of profiles, and weights put together from snapshots."""

import math
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from scoresde.config import ConfigError
from scoresde.files import CheckpointError, read_tensors, write_tensors
from scoresde.training import posthoc
from scoresde.training.ema import EMA, PowerFunction, averages


def profiles(steps, lengths, points):
    """Profiles (points, K) at midpoints of [0, 1], zero after their steps."""
    g = np.array([PowerFunction(length).power for length in lengths])
    steps = np.array(steps)
    inside = np.minimum(points[:, None] / steps, 1)
    return np.where(points[:, None] <= steps, (g + 1) / steps * inside**g, 0.0)


CASES = [
    ((1.0,), (0.1,), 1.0, 0.07),
    ((0.5, 1.0), (0.1, 0.1), 1.0, 0.15),
    ((0.25, 0.5, 0.75, 1.0), (0.1, 0.05, 0.05, 0.1), 1.0, 0.07),
    ((0.25, 0.5, 0.5, 0.75, 1.0, 1.0), (0.1, 0.05, 0.1, 0.05, 0.05, 0.1), 0.75, 0.2),
    ((0.25, 0.5, 0.5, 1.0), (0.2, 0.2, 0.1, 0.1), 0.6, 0.1),
]


@pytest.mark.parametrize(("steps", "lengths", "end", "length"), CASES)
def test_factors_are_those_of_a_dense_least_squares(steps, lengths, end, length):
    points = (np.arange(200_000) + 0.5) / 200_000
    ours, wanted = profiles(steps, lengths, points), profiles([end], [length], points)[:, 0]
    dense = np.linalg.lstsq(ours, wanted, rcond=None)[0]
    given = (steps, lengths, end, length)
    found = posthoc.coefficients(*given, whole=False)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, dense, rtol=1e-5, atol=1e-6)
    left = np.linalg.norm(ours @ dense - wanted) / np.linalg.norm(wanted)
    assert posthoc.residual(found, *given) == pytest.approx(left, rel=1e-5)

    # That they sum to one leaves the others free: c_K = 1 - c_1 - ... - c_(K-1).
    free = np.linalg.lstsq(ours[:, :-1] - ours[:, -1:], wanted - ours[:, -1], rcond=None)[0]
    dense = np.append(free, 1 - free.sum())
    found = posthoc.coefficients(*given)
    np.testing.assert_allclose(found, dense, rtol=1e-5, atol=1e-6)
    left = np.linalg.norm(ours @ dense - wanted) / np.linalg.norm(wanted)
    assert posthoc.residual(found, *given) == pytest.approx(left, rel=1e-5)
    assert found.sum() == pytest.approx(1, abs=1e-13)


@pytest.mark.parametrize("whole", [True, False])
def test_what_was_tracked_is_taken_as_it_is(whole):
    steps, lengths = np.repeat(np.arange(1, 65) * 1000.0, 2), np.tile([0.05, 0.1], 64)
    found = posthoc.coefficients(steps, lengths, 40_000, 0.1, whole=whole)
    expected = np.zeros(128)
    expected[79] = 1
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert posthoc.residual(found, steps, lengths, 40_000, 0.1) < 1e-6


def test_the_unit_of_time_does_not_matter():
    steps, lengths, end, length = CASES[3]
    small = posthoc.coefficients(steps, lengths, end, length)
    large = posthoc.coefficients([s * 1e9 for s in steps], lengths, end * 1e9, length)
    np.testing.assert_allclose(small, large, rtol=1e-9)


def test_a_step_is_at_least_one():
    with pytest.raises(ConfigError, match="at least one step, got 0"):
        posthoc.coefficients([1, 2], [0.1, 0.1], 0, 0.1)


# -- runs ---------------------------------------------------------------------------------------


class Walk(nn.Module):
    """Weights that walk, one that stays, and two buffers, one of which is not saved."""

    def __init__(self):
        super().__init__()
        self.x = nn.Parameter(torch.full((20, 5), 3.0))
        self.still = nn.Parameter(torch.tensor([0.1, 1e4]))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("table", torch.zeros(2), persistent=False)


STEPS, TRACKED = 1600, (0.05, 0.1)


def train(run, every, lengths=TRACKED, also=(), steps=STEPS):
    """A random walk with snapshots; the averages of ``also`` are followed without any."""
    net = Walk()
    kept = averages(net, 0.99, (400,), lengths)
    other = {length: EMA(net, PowerFunction(length)) for length in also}
    noise = torch.Generator().manual_seed(0)
    for n in range(1, steps + 1):
        with torch.no_grad():
            net.x += torch.randn(net.x.shape, generator=noise) / math.sqrt(steps)
            net.count += 1
        for ema in (*kept, *other.values()):
            ema.update(n, 4)
        if n % every == 0:
            posthoc.save_snapshot(run, n, kept)
    return kept, {length: ema.net.state_dict() for length, ema in other.items()}


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """Runs of 8, 16 and 32 snapshots of the same walk, and averages that were followed."""
    root = tmp_path_factory.mktemp("walks")
    _, truth = train(root / "8", STEPS // 8, also=(0.03, 0.07, 0.15))
    for count in (16, 32):
        train(root / str(count), STEPS // count)
    return root, truth


def distance(found, truth):
    return float((found["x"] - truth["x"]).norm() / (truth["x"] - 3).norm())


@pytest.mark.parametrize(
    ("length", "bounds"),
    [(0.03, (0.1, 0.02, 2e-3)), (0.07, (1e-2, 1e-3, 1e-4)), (0.15, (1e-2, 1e-3, 2e-4))],
)
def test_an_average_that_was_not_tracked(walked, length, bounds):
    root, truth = walked
    residual = 1.0
    for count, bound in zip((8, 16, 32), bounds, strict=True):
        made = posthoc.reconstruct(root / str(count), length)
        assert (made.step, made.length, made.snapshots) == (STEPS, length, 2 * count)
        assert made.residual < residual / 2
        residual = made.residual
        assert distance(made.tensors, truth[length]) < bound
        assert made.tensors.keys() == truth[length].keys()


def test_what_does_not_move_comes_back_as_it_was(walked):
    root, _ = walked
    for length in (0.02, 0.07, 0.28):  # however poor the fit
        made = posthoc.reconstruct(root / "8", length)
        torch.testing.assert_close(made.tensors["still"], Walk().still.detach())


def test_an_average_of_another_step(walked, tmp_path):
    root, _ = walked
    _, truth = train(tmp_path / "short", 10**6, (), also=(0.07,), steps=STEPS // 2)
    scale = math.sqrt(2)  # of the steps of a walk of half the length
    made = posthoc.reconstruct(root / "32", 0.07, STEPS // 2)
    found = (made.tensors["x"] - 3) * scale + 3
    assert distance({"x": found}, truth[0.07]) < 1e-3
    assert int(made.tensors["count"]) == STEPS // 2
    between = posthoc.reconstruct(root / "32", 0.07, STEPS // 2 + 30)
    assert int(between.tensors["count"]) == STEPS // 2
    assert int(posthoc.reconstruct(root / "32", 0.07, 1).tensors["count"]) == STEPS // 32
    assert made.residual < 0.02 < between.residual


def test_what_snapshots_hold(tmp_path):
    kept, _ = train(tmp_path, 5, steps=10)
    found = posthoc.snapshots(tmp_path)
    assert [(s.step, s.length) for s in found] == [(5, 0.05), (5, 0.1), (10, 0.05), (10, 0.1)]
    stored = read_tensors(found[3].file)
    assert stored.keys() == {"x", "still"}
    assert torch.equal(stored["x"], kept[3].net.x)
    assert found[3].file.name == f"{kept[3].name}.safetensors"
    files = {p.name for p in found[0].file.parent.iterdir()}
    assert files == {
        "ema-length-0.05.safetensors", "ema-length-0.1.safetensors", "buffers.safetensors",
    }  # fmt: skip
    assert read_tensors(found[0].file.with_name("buffers.safetensors"))["count"] == 5
    posthoc.rewind(tmp_path, 5)
    assert [s.step for s in posthoc.snapshots(tmp_path)] == [5, 5]


def test_a_process_that_does_not_write(tmp_path):
    posthoc.save_snapshot(tmp_path, 1, averages(Walk(), 0.9, (), (0.1,)), write=False)
    assert not list(tmp_path.iterdir())


def test_the_dtype_stays_and_sums_are_wider(tmp_path):
    net = nn.Linear(64, 64).half()
    kept = averages(net, 0.9, (), (0.05, 0.1))
    for n in range(1, 9):
        for i, ema in enumerate(kept[1:]):
            nn.init.normal_(ema.net.weight)
            ema.net.weight.mul_(i + n)
        posthoc.save_snapshot(tmp_path, n, kept)
    made = posthoc.reconstruct(tmp_path, 0.07)
    assert made.tensors["weight"].dtype == torch.float16
    found = posthoc.snapshots(tmp_path)
    steps, lengths = [s.step for s in found], [s.length for s in found]
    factors = posthoc.coefficients(steps, lengths, 8, 0.07)
    exact = sum(
        c * read_tensors(s.file)["weight"].double() for c, s in zip(factors, found, strict=True)
    )
    # Rounded once; in sums of half precision nearly every number would be another.
    assert (made.tensors["weight"] != exact.half()).double().mean() < 0.02


def test_progress_is_told(tmp_path):
    train(tmp_path, 5, steps=10)
    told = []
    posthoc.reconstruct(tmp_path, 0.07, progress=told.append)
    assert told == [0.25, 0.5, 0.75, 1]


def test_what_cannot_be_made(tmp_path):
    with pytest.raises(CheckpointError, match=r"no snapshots.* training\.lengths"):
        posthoc.reconstruct(tmp_path, 0.1)
    train(tmp_path, 5, steps=10)
    for step in (0, 11):
        with pytest.raises(ConfigError, match=f"step {step} .* 1 to 10"):
            posthoc.reconstruct(tmp_path, 0.1, step)
    with pytest.raises(ConfigError, match=r"got 0\.3"):
        posthoc.reconstruct(tmp_path, 0.3)

    file = posthoc.snapshots(tmp_path)[2].file
    good = read_tensors(file)
    for bad in (
        {"x": good["x"]}, {**good, "more": good["x"].clone()}, {**good, "x": good["x"][1:]},
    ):  # fmt: skip
        write_tensors(file, bad)
        with pytest.raises(CheckpointError, match=r"step-000000010.*does not fit the others: "):
            posthoc.reconstruct(tmp_path, 0.1)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        posthoc.reconstruct(tmp_path, 0.1)


def test_a_full_disk_leaves_no_half_file(tmp_path, monkeypatch):
    kept = averages(Walk(), 0.9, (), (0.1,))
    posthoc.save_snapshot(tmp_path, 1, kept)
    shutil.rmtree(tmp_path / "snapshots")
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space")))
    with pytest.raises(CheckpointError, match="No space"):
        posthoc.save_snapshot(tmp_path, 1, kept)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
