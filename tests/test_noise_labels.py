"""What networks are told about the noise level: steps of chains, at and between them."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import scoresde as sd
from scoresde import config, model, noise_labels
from scoresde.nets.embed import Positional
from scoresde.noise_labels import LogNoise, NearestStep, NoiseLevel, Time

f64 = torch.float64
TABLES = {
    "linear": sd.DDPM(),
    "scaled-linear": sd.DDPM(1000, 0.00085, 0.012, "scaled-linear"),
    "cosine": sd.DDPM(schedule="cosine"),
    "sigmoid": sd.DDPM(schedule="sigmoid"),
    "long cosine": sd.DDPM(4000, schedule="cosine"),
}


def label_of(table):
    return Time(table, scale=float(table.num_steps), offset=-1.0)


class Told(nn.Module):
    """A network that writes down its labels, of its own dtype."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.own = nn.Parameter(torch.zeros((), dtype=dtype))
        self.labels = []

    def forward(self, x, label):
        self.labels.append(label)
        return x


@pytest.mark.parametrize("kind", TABLES)
def test_steps_of_a_table_are_whole_numbers(kind):
    table = TABLES[kind]
    n = table.num_steps
    steps = torch.arange(n, dtype=f64)
    t = (steps + 1) / n
    found = label_of(table)(table.alpha(t), table.sigma(t))
    assert (found - steps).abs().max() < 1e-9
    between = torch.linspace(1 / n, 1, 5 * n + 3, dtype=f64)
    labels = label_of(table)(table.alpha(between), table.sigma(between))
    assert (labels.diff() > 0).all()
    assert (labels - (n * between - 1)).abs().max() < 1e-9


@pytest.mark.parametrize("kind", TABLES)
def test_steps_in_float32_alone(kind):
    """A device without float64 still tells neighbours apart, to a hundredth of a step."""
    table = TABLES[kind]
    n = table.num_steps
    steps = torch.arange(n)
    t = (steps.float() + 1) / n
    found = label_of(table)(table.alpha(t), table.sigma(t))
    assert found.dtype == torch.float32
    assert (found - steps).abs().max() < 1e-2
    assert (found.diff() > 0).all()


def table_model(table, net=None):
    n = table.num_steps
    ends = dict.fromkeys(("t_min", "t_min_sampling", "t_min_likelihood"), 1 / n)
    process = sd.DDPM(n, table.beta_start, table.beta_end, table.schedule, **ends)
    kind = sd.Eps(scale_input=False, label=label_of(table))
    return sd.ScoreModel(net or Told(), process, kind)


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("narrow", [False, True], ids=["float64", "as-mps"])
def test_a_model_is_told_whole_steps(monkeypatch, kind, narrow):
    """Times of float32 round to 6e-8, 6e-5 of a step of 1000; so does the label."""
    if narrow:
        monkeypatch.setattr(model, "widest", lambda device: torch.float32)
    wrapped = table_model(TABLES[kind])
    n = TABLES[kind].num_steps
    steps = torch.arange(0, n, 7)
    x = torch.zeros(len(steps), 2)
    wrapped.noise(x, (steps.float() + 1) / n)
    told = wrapped.net.labels[-1]
    assert told.dtype == torch.float32
    assert (told - steps).abs().max() < (1e-2 if narrow else 3e-7 * n)
    wrapped.noise(x[:1], 1 / n)  # a number is a float64 time
    assert abs(float(wrapped.net.labels[-1])) < 1e-9 + (1e-2 if narrow else 0)


def test_a_label_below_the_first_step_breaks_nothing():
    """``t`` may round to less than 1/N: the label is then a little less than 0."""
    table = TABLES["linear"]
    label = label_of(table)
    t = torch.tensor([1 / 1000 * (1 - 1e-6), 1 / 1000, table.t_min], dtype=f64)
    found = label(table.alpha(t), table.sigma(t))
    assert -1.1e-6 < float(found[0]) < 0
    assert float(found[2]) == pytest.approx(1000 * 1e-5 - 1, abs=1e-9)
    assert found.round().long().tolist() == [0, 0, -1]
    features = Positional(16)(found)
    assert features.isfinite().all()
    torch.testing.assert_close(features[0], features[1], rtol=0, atol=2e-6)


def test_time_of_song_et_al_survives_the_round_trip():
    """``999 t`` within two roundings of float32: one of the time, one of the label."""
    sde = sd.VP()
    wrapped = sd.ScoreModel(Told(), sde, sd.Eps(scale_input=False, label=Time(sde, 999.0)))
    t = torch.cat([torch.logspace(-5, 0, 400), torch.linspace(1e-3, 1, 400)])
    wrapped.noise(torch.zeros(len(t), 2), t)
    expected = (999 * t.double()).float()
    assert ((wrapped.net.labels[-1] / expected - 1).abs() < 1.2e-7).all()
    single = Time(sde, 999.0)(sde.alpha(t), sde.sigma(t))
    assert ((single / expected - 1).abs() < 2e-5).all()


@pytest.mark.parametrize("other", [sd.VE(), sd.EDM(), sd.Linear(), sd.Cosine()], ids=repr)
def test_a_label_follows_the_noise_level_on_any_process(other):
    """The network of a table serves a process of the same noise levels."""
    table = TABLES["cosine"]
    t = (torch.arange(10, 900, 20, dtype=f64) + 1) / 1000
    elsewhere = other.time(table.log_snr(t))
    inside = (elsewhere > other.t_min) & (elsewhere < other.t_max)
    assert inside.sum() > 20
    found = label_of(table)(other.alpha(elsewhere), other.sigma(elsewhere))
    torch.testing.assert_close(found[inside], 1000 * t[inside] - 1, rtol=1e-7, atol=1e-7)


def levels_by_hand(n=1000, c_1=0.001, c_2=0.008):
    """Table 1 of Karras et al. (2022), in numpy from its end."""
    u = [0.0]
    for j in range(n, 0, -1):
        ratio = (
            math.sin(math.pi / 2 * (j - 1) / (n * (c_2 + 1))) ** 2
            / math.sin(math.pi / 2 * j / (n * (c_2 + 1))) ** 2
        )
        u.insert(0, math.sqrt((u[0] ** 2 + 1) / max(ratio, c_1) - 1))
    return np.array(u)


def test_nearest_step_is_that_of_table_1():
    label = NearestStep()
    u = levels_by_hand()
    assert np.allclose(label.levels.numpy(), u, rtol=1e-10, atol=0)
    assert float(label.levels[999]) == pytest.approx(0.0064254, abs=5e-8)
    assert float(label.levels[0]) == pytest.approx(20291.17, abs=5e-3)
    assert float(label.levels[1000]) == 0
    q = np.concatenate([np.geomspace(1e-4, 3e4, 301), u[:-1]])
    alpha = np.linspace(0.3, 1, len(q))
    expected = [999 - int(np.argmin(np.abs(u - value))) for value in q]
    # q itself is rounded by the division: levels are far apart beside that.
    found = label(torch.from_numpy(alpha), torch.from_numpy(alpha * q))
    assert found.dtype == f64
    assert found.tolist() == expected
    assert expected[301:] == list(range(999, -1, -1))
    single = label(torch.ones(len(q)), torch.from_numpy(q).float())
    assert (single - found).abs().max() <= 1
    assert (single[301:] == found[301:]).all()
    column = label(torch.ones(4, 1, dtype=f64), torch.from_numpy(q[:4, None]))
    assert column.shape == (4, 1)


def test_levels_that_were_rounded_to_float32_keep_their_labels():
    """Those of the published networks, whose smallest level is 0.0064223 by that rounding."""
    n = 1000
    j = torch.arange(n + 1, dtype=torch.float32)
    a = torch.sin(math.pi / 2 * j / n / 1.008) ** 2
    u = torch.zeros(n + 1)
    for k in range(n, 0, -1):
        u[k - 1] = ((u[k] ** 2 + 1) / (a[k - 1] / a[k]).clamp_min(0.001) - 1).sqrt()
    assert float(u[999]) == pytest.approx(0.0064223, abs=5e-8)
    assert float(u[0]) == pytest.approx(20291.17, abs=5e-2)
    expected = torch.arange(n - 1, -1, -1)
    for given in (u[:-1], u[:-1].double()):
        assert (NearestStep()(torch.ones_like(given), given) == expected).all()


def test_nearest_step_is_the_step_of_the_cosine_table():
    """Its levels are those of the table, in the other order."""
    table, label = TABLES["cosine"], NearestStep()
    t = (torch.arange(1000, dtype=f64) + 1) / 1000
    alpha, sigma = table.alpha(t), table.sigma(t)
    torch.testing.assert_close(label.levels[:-1].flip(0), sigma / alpha, rtol=1e-7, atol=0)
    assert torch.equal(label(alpha, sigma), label_of(table)(alpha, sigma).round())


def test_log_noise_and_noise_level():
    alpha, sigma = torch.tensor([0.5, 1.0], dtype=f64), torch.tensor([2.0, 0.1], dtype=f64)
    torch.testing.assert_close(LogNoise()(alpha, sigma), (sigma / alpha).log() / 4)
    torch.testing.assert_close(LogNoise(1.0, 2.0)(alpha, sigma), (sigma / alpha / 2).log())
    torch.testing.assert_close(NoiseLevel()(alpha, sigma), sigma / alpha)


@pytest.mark.parametrize(
    "label", [LogNoise(1.0, 0.5), NoiseLevel(), label_of(TABLES["cosine"]), NearestStep(100)]
)
def test_labels_are_rebuilt_from_their_sections(label):
    section = config.describe(label)
    assert config.build(section, noise_labels, "label") == label
    assert sd.Eps(label=section).label == label


def test_a_label_of_no_process_is_refused():
    with pytest.raises(sd.ConfigError, match="needs a Gaussian process, not 3"):
        Time(3)
    with pytest.raises(sd.ConfigError, match="unknown sde of the label 'vpp'"):
        Time("vpp")
    with pytest.raises(sd.ConfigError, match="unknown label 'nearest'"):
        sd.Eps(label="nearest")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: sd.noise_labels.LogNoise(unit=0.0), "unit > 0"),
        (lambda: sd.noise_labels.NearestStep(num_steps=0), "1 <= num_steps <= 1000000"),
        (lambda: sd.DDPM(num_steps=10**10), "1 <= num_steps <= 1000000"),
    ],
)
def test_labels_and_tables_that_cannot_be(make, said):
    with pytest.raises(ValueError, match=said):
        make()
