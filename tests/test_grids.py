import pytest
import torch

import scoresde as sd
from scoresde import config, grids

ALL = [name for name in config.names(grids) if name != "tuned"]  # which has points of its own


def build(name):
    return config.build(name, grids, "grid")


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("steps", [1, 2, 17, 1000])
def test_times_decrease_between_the_ends(sde, name, steps):
    start = sde.t_max * 0.9
    times = build(name)(sde, steps, start, sde.t_min_sampling)
    assert times.dtype == torch.float64
    assert times.shape == (steps + 1,)
    assert float(times[0]) == start
    assert float(times[-1]) == sde.t_min_sampling
    assert bool((times.diff() < 0).all())


@pytest.mark.parametrize(
    ("name", "spacing"),
    [
        ("uniform", lambda sde, t: t),
        ("quadratic", lambda sde, t: t.sqrt()),
        ("logsnr", lambda sde, t: sde.log_snr(t)),
        ("karras", lambda sde, t: (-sde.log_snr(t) / 7).exp()),
        ("logistic", lambda sde, t: 1 / (1 + (2 / 3 * sde.log_snr(t)).exp())),
    ],
)
def test_steps_are_equal_in_the_variable_of_the_grid(sde, name, spacing):
    times = build(name)(sde, 20, sde.t_max, sde.t_min_sampling)
    steps = spacing(sde, times).diff()
    torch.testing.assert_close(steps, steps.mean().expand_as(steps), rtol=1e-7, atol=0)


def test_karras_gives_the_noise_levels_of_edm():
    """Equation 5 of Karras et al. (2022), N = 18."""
    i = torch.arange(18, dtype=torch.float64)
    expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(grids.Karras()(sd.EDM(), 17, 80.0, 0.002), expected)


def test_a_large_rho_approaches_logsnr():
    ends = (sd.VP(), 10, 1.0, 1e-3)
    torch.testing.assert_close(
        grids.Karras(rho=1e4)(*ends), grids.LogSNR()(*ends), rtol=1e-2, atol=0
    )


@pytest.mark.parametrize("name", ALL)
def test_impossible_times_are_refused(name):
    grid = build(name)
    with pytest.raises(ValueError, match="steps >= 1, got 0"):
        grid(sd.VP(), 0, 1.0, 1e-3)
    for start, end in ((1.1, 1e-3), (0.5, 0.5), (0.5, 0.6), (0.5, -0.1)):
        with pytest.raises(ValueError, match=r"0 <= t_end < t_start <= 1\.0"):
            grid(sd.VP(), 5, start, end)


def test_equal_steps_to_an_infinite_log_snr_are_refused():
    with pytest.raises(ValueError, match="no finite log-SNR at an end"):
        grids.LogSNR()(sd.VP(), 5, 1.0, 0.0)
    assert float(grids.Uniform()(sd.VP(), 5, 1.0, 0.0)[-1]) == 0


def test_rho_must_be_positive():
    with pytest.raises(ValueError, match="rho > 0, got 0"):
        grids.Karras(rho=0)


def test_logistic_is_uniform_in_the_time_of_the_linear_path():
    sde = sd.Linear()
    times = grids.Logistic(width=2.0)(sde, 10, 0.99, 0.01)
    torch.testing.assert_close(times, torch.linspace(0.99, 0.01, 11, dtype=torch.float64))
    times = grids.Logistic(width=1.0)(sd.VP(), 10, 1.0, 1e-3)
    power = sd.VP().sigma(times) ** 2
    torch.testing.assert_close(power.diff(), power.diff().mean().expand(10))


def test_logistic_has_its_shortest_steps_at_its_scale():
    sde = sd.EDM()
    steps = sde.log_snr(grids.Logistic(scale=0.1)(sde, 101, 80.0, 0.002))
    shortest = int(steps.diff().argmin())
    assert float(-steps[shortest]) > torch.tensor(0.1).log() > float(-steps[shortest + 1])


def test_a_tuned_grid_belongs_to_its_times():
    sde = sd.VP()
    times = grids.Logistic()(sde, 5, 1.0, 1e-3)
    tuned = grids.Tuned(tuple(sde.log_snr(times).tolist()))
    torch.testing.assert_close(tuned(sde, 5, 1.0, 1e-3), times)
    with pytest.raises(ValueError, match="tuned for 5 steps, not 6"):
        tuned(sde, 6, 1.0, 1e-3)
    with pytest.raises(ValueError, match=r"t_end=0\.001, not 0\.01"):
        tuned(sde, 5, 1.0, 1e-2)
