import pytest
import torch

from scoresde.noise import KeyedNoise, normal, philox


def words(value):
    return tuple(torch.tensor([value]) for _ in range(4))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        (0, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (0xFFFFFFFF, (0xFFFFFFFF, 0xFFFFFFFF), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ],
)
def test_philox_known_answers(counter, key, expected):
    """Published known-answer vectors of Philox4x32-10 (Random123)."""
    assert " ".join(f"{int(w):08x}" for w in philox(words(counter), key)) == expected


DRAWS = ["normal", "uniform", "rademacher"]


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize("item", [(1,), (3,), (2, 5), (1, 4, 4)])
def test_a_sample_does_not_depend_on_its_batch(kind, item):
    batch, alone = KeyedNoise(7), KeyedNoise(7, start=3)
    for _ in range(3):
        many = getattr(batch, kind)((5, *item))
        one = getattr(alone, kind)((1, *item))
        assert torch.equal(many[3:4], one)


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_samples_draws_and_seeds_differ(kind):
    noise = KeyedNoise(0)
    first, second = (getattr(noise, kind)((4, 6)) for _ in range(2))
    other = getattr(KeyedNoise(1), kind)((4, 6))
    high = getattr(KeyedNoise(1 << 32), kind)((4, 6))
    far = getattr(KeyedNoise(0, start=1 << 32), kind)((4, 6))
    everything = torch.cat([first, second, other, high, far]).flatten()
    assert everything.unique().numel() == everything.numel()
    assert torch.equal(
        getattr(KeyedNoise(-1), kind)((1, 4)), getattr(KeyedNoise(-1), kind)((1, 4))
    )


def test_moments_of_normal():
    z = KeyedNoise(3).normal((2000, 101), dtype=torch.float64)
    n = z.numel()
    assert abs(z.mean()) < 4 / n**0.5
    assert abs(z.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((z**3).mean()) < 4 * (15 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 4 * (96 / n) ** 0.5
    within, between = (z[:, :-1] * z[:, 1:]).mean(), (z[:-1] * z[1:]).mean()
    assert max(abs(within), abs(between)) < 4 / n**0.5
    power = z**2 - 1  # of the two halves of each Box-Muller pair, which share a radius
    assert abs((power[:, :49] * power[:, 52:]).mean()) < 4 * 2 / (n / 2) ** 0.5


def test_moments_of_uniform_and_rademacher():
    u = KeyedNoise(3).uniform((2000, 50), dtype=torch.float32)
    assert 0 <= u.min() < 1e-4
    assert 1 - 1e-4 < u.max() < 1
    assert abs(u.mean() - 0.5) < 4 / (12 * u.numel()) ** 0.5
    assert abs(u.var() - 1 / 12) < 1e-3
    r = KeyedNoise(3).rademacher((2000, 50))
    assert set(r.unique().tolist()) == {-1.0, 1.0}
    assert abs(r.mean()) < 4 / r.numel() ** 0.5


def test_float32_is_the_rounding_of_float64():
    single = KeyedNoise(5).normal((3, 7), dtype=torch.float32)
    double = KeyedNoise(5).normal((3, 7), dtype=torch.float64)
    assert single.dtype == torch.float32
    assert torch.equal(single, double.float())


def test_normal_takes_any_source():
    generator = torch.Generator().manual_seed(1)
    expected = torch.randn((2, 3), generator=torch.Generator().manual_seed(1))
    assert torch.equal(normal((2, 3), generator), expected)
    assert torch.equal(normal((2, 3), KeyedNoise(4)), KeyedNoise(4).normal((2, 3)))
    assert normal((2, 3), dtype=torch.float64).dtype == torch.float64
