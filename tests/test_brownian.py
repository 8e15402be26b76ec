"""The path's law without Monte Carlo, and that it is one function whoever asks."""

import itertools

import pytest
import torch

import scoresde as sd
from scoresde import solvers
from scoresde.brownian import LENGTH, LOW, RESOLUTION, TICKS, BrownianPath, path_of, series, ticks
from scoresde.noise import KeyedNoise

POINTS = [-20.0, -3.3, -3.3 + 1e-7, -3.3 + 2e-7, 0.0, 0.1, 0.7, 5.0, 20.0]
SHAPE = (6, 2, 3)


def covariance(k):
    """Of the path at the ticks ``k``: what the shared normals give."""
    keys, weights = series(k)
    shared = keys[:, None] == keys[None]
    return (weights[:, None] * weights[None] * shared).sum(-1)


def test_the_series_has_the_law_of_brownian_motion():
    """``Cov(W(a), W(b)) = min(a, b)`` counted from the left end, down to neighbouring ticks."""
    k = torch.randint(TICKS, (200,), generator=torch.Generator().manual_seed(0))
    edges = torch.tensor(
        [0, 1, 2, 3, TICKS // 2 - 1, TICKS // 2, TICKS // 2 + 1, TICKS - 1, TICKS]
    )
    k = torch.cat([k, k[:50] + 1, edges])
    expected = torch.minimum(k[:, None], k[None]).double() * RESOLUTION
    torch.testing.assert_close(covariance(k), expected, rtol=1e-12, atol=1e-14)


def test_increments_have_unit_variance_at_every_span():
    """The variance that the series gives to the ticks that an increment spans."""
    for a, span in [(-20, 40), (0.3, 1), (0.3, 1e-3), (-6.1, 1e-6), (0, 1e-8), (31.9, 5)]:
        path = BrownianPath(0)
        found = path.increment(a, a + span, (30_000, 1), dtype=torch.float64)
        assert abs(found.mean()) < 4 / 30_000**0.5
        assert abs(found.var() - 1) < 4 * (2 / 30_000) ** 0.5, (a, span)


def test_keys_of_different_intervals_differ():
    """No interval of any level shares its normal with another."""
    k = ticks(torch.linspace(-31, 31, 100_000, dtype=torch.float64))
    keys = series(k)[0]
    for level in range(1, 33):
        assert (keys[:, level] >= 2 ** (level - 1)).all()
        assert (keys[:, level] < 2**level).all()
    assert (keys[:, 0] == 0).all()
    assert int(keys.max()) < 2**32  # a counter of Philox has 32 bits


def test_parts_add_up_to_the_whole():
    path, points = BrownianPath(3), torch.tensor([-5.0, -4.1, -0.3, -0.3 + 1e-5, 2.0, 7.0])
    points = points.double()
    parts = [
        path.increment(a, b, SHAPE, dtype=torch.float64) * (b - a).sqrt()
        for a, b in itertools.pairwise(points)
    ]
    whole = path.increment(points[0], points[-1], SHAPE, dtype=torch.float64) * 12**0.5
    torch.testing.assert_close(sum(parts), whole, rtol=0, atol=1e-5)
    rough = [p / 3 for p in parts]
    assert not torch.allclose(sum(rough), whole, atol=0.1)


def test_the_path_is_one_function():
    """In any order, with or without what is kept, and for a time a sample."""
    forward, backward = BrownianPath(1), BrownianPath(1)
    there = {u: forward.at(u, SHAPE) for u in POINTS}
    for u in reversed(POINTS):
        back = backward.at(u, SHAPE)
        torch.testing.assert_close(back, there[u], rtol=1e-12, atol=1e-12)
        each = backward.at(torch.full((6,), u, dtype=torch.float64), SHAPE)
        torch.testing.assert_close(each, there[u], rtol=1e-12, atol=1e-12)
    stepped = BrownianPath(1)
    for a, b in itertools.pairwise(POINTS):
        z = stepped.increment(a, b, SHAPE, dtype=torch.float64)
        low, high = ticks(torch.tensor([a, b], dtype=torch.float64)).tolist()
        span = (high - low) * RESOLUTION
        torch.testing.assert_close(z * span**0.5, there[b] - there[a], rtol=1e-6, atol=1e-9)


def test_a_sample_does_not_depend_on_its_batch():
    a = torch.tensor([-3.0, -1.0, 0.0, 0.5, 2.0, 3.0], dtype=torch.float64)
    b = a + torch.tensor([1.0, 0.1, 0.3, 2.0, 1e-4, 5.0], dtype=torch.float64)
    batch = BrownianPath(7).increment(a, b, SHAPE, dtype=torch.float64)
    column = BrownianPath(7).increment(a[:, None, None], b[:, None, None], SHAPE)
    torch.testing.assert_close(column, batch.float())
    for i in range(6):
        alone = BrownianPath(7, start=i).increment(a[i], b[i], (1, 2, 3), dtype=torch.float64)
        torch.testing.assert_close(alone, batch[i : i + 1], rtol=1e-9, atol=1e-9)
    part = BrownianPath(7).part(torch.tensor([4, 1])).part(torch.tensor([1]))
    one = part.increment(a[1], b[1], (1, 2, 3), dtype=torch.float64)
    torch.testing.assert_close(one, batch[1:2], rtol=1e-9, atol=1e-9)


def test_samples_seeds_and_draws_differ():
    z = [
        BrownianPath(seed, start).increment(0, 1, (4, 6), dtype=torch.float64)
        for seed, start in ((0, 0), (1, 0), (0, 4), (1 << 32, 0), (0, 1 << 32))
    ]
    z += [BrownianPath(0).normal((4, 6), dtype=torch.float64)]
    everything = torch.cat(z).flatten()
    assert everything.unique().numel() == everything.numel()


def test_other_draws_are_keyed_as_ever():
    path, keyed = BrownianPath(5, 2), KeyedNoise(5, 2)
    assert torch.equal(path.normal(SHAPE), keyed.normal(SHAPE))
    path.increment(0, 1, SHAPE)
    assert torch.equal(path.normal(SHAPE), keyed.normal(SHAPE))
    assert torch.equal(path.rademacher(SHAPE), keyed.rademacher(SHAPE))


def test_the_ends_and_wrong_spans():
    path = BrownianPath(0)
    assert torch.equal(path.at(LOW, SHAPE), torch.zeros(SHAPE, dtype=torch.float64))
    end = path.at(LOW + LENGTH, SHAPE)
    torch.testing.assert_close(path.at(1e9, SHAPE), end)
    outside = path.increment(-torch.inf, -40.0, SHAPE)
    assert outside.isfinite().all()
    for a, b in ((1.0, 1.0), (2.0, 1.0), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="an increment needs a < b"):
            path.increment(a, b, SHAPE)


def test_every_source_has_a_path():
    path = BrownianPath(3, 4)
    assert path_of(path) is path
    keyed = path_of(KeyedNoise(3, 4))
    torch.testing.assert_close(keyed.increment(0, 1, SHAPE), path.increment(0, 1, SHAPE))
    a, b = (path_of(torch.Generator().manual_seed(1)).increment(0, 1, SHAPE) for _ in range(2))
    assert torch.equal(a, b)
    assert path_of(None).increment(0, 1, SHAPE).isfinite().all()


def fields(name):
    return {"eta": 1.0} if name == "ddim" else {}


INCREMENTS = ["euler-maruyama", "ancestral", "reverse-diffusion", "ddim", "sde-dpmpp-2m"]


@pytest.fixture(scope="module")
def score():
    means = torch.tensor([[1.0, 0.6], [-1.0, 0.4], [0.0, -1.0]], dtype=torch.float64)
    stds = torch.tensor([[0.3, 0.4], [0.4, 0.25], [0.35, 0.3]], dtype=torch.float64)
    return sd.GaussianMixture([1.0, 1.0, 1.0], means, stds).score(sd.VP())


@pytest.fixture(scope="module")
def reference(score):
    return sd.sample(score, (16, 2), solver="sde-dpmpp-2m", steps=600, brownian=True).x


@pytest.mark.parametrize("name", INCREMENTS)
def test_all_solvers_and_step_counts_approach_one_end(score, reference, name):
    """With the path; without it, more steps are another sample."""

    def distance(steps, brownian):
        out = sd.sample(
            score, (16, 2), solver={"name": name, **fields(name)}, steps=steps, brownian=brownian
        )
        assert out.brownian == brownian
        return float((out.x - reference).square().mean().sqrt())

    assert distance(50, True) < 0.2
    assert distance(200, True) < 0.4 * distance(50, True)
    assert distance(200, False) > 0.5


def test_sa_and_pc_take_the_path_too(score):
    """SA between its two levels; PC in its predictor, its corrections being fresh."""

    class Counting(BrownianPath):
        steps = 0

        def increment(self, *args, **kwargs):
            self.steps += 1
            return super().increment(*args, **kwargs)

    times = torch.linspace(1, 0.01, 9, dtype=torch.float64)
    for solver, increments, draws in ((solvers.PC(), 8, 8), (solvers.SASolver(), 4, 0)):
        noise = Counting(0)
        x = torch.zeros(3, 2, dtype=torch.float64)
        assert solver.integrate(solver.reverse(score), x, times, noise).converged
        assert (noise.steps, noise.draw) == (increments, draws)


def test_the_prior_stays_and_deterministic_solvers_do_not_change(score):
    for name in ("ddim", "heun"):
        with_path, without = (
            sd.sample(score, (3, 2), solver=name, steps=5, brownian=b).x for b in (True, False)
        )
        assert torch.equal(with_path, without)


def test_a_process_without_a_log_snr_has_no_such_path(score):
    class Bare:
        sde = type("Process", (), {"t_max": 1.0, "t_min": 0.0, "t_min_sampling": 0.0})()

    with pytest.raises(ValueError, match="a Brownian path needs a process with a log-SNR"):
        sd.sample(Bare(), (3, 2), solver="ancestral", grid="uniform", brownian=True)
