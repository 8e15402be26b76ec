import math
from itertools import pairwise

import pytest
import torch
from scipy.special import ndtri
from torch import nn

import scoresde as sd
from scoresde import config
from scoresde.training import distributions as times_room
from scoresde.training import objectives
from scoresde.training import times as fixed_times
from scoresde.training import weights as weights_room
from scoresde.training.step_noise import StepNoise

WEIGHTS = ["simple", "likelihood", "x0", "edm", "min-snr"]


class Exact(sd.Score):
    """A score that counts on nothing but the mixture, with noise() as the objective calls it."""

    def __init__(self, mixture, sde):
        self.sde, self.inner = sde, mixture.score(sde)

    def __call__(self, x, t):
        return self.inner(x, t)


def test_simple_loss_is_the_squared_error(sde, mixture):
    model = Exact(mixture, sde)
    x0 = mixture.sample(6, torch.Generator().manual_seed(0))
    eps = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    t = torch.linspace(sde.t_min_sampling, sde.t_max, 6, dtype=torch.float64)
    x = sde.alpha(t)[:, None] * x0 + sde.sigma(t)[:, None] * eps
    error = -sde.sigma(t)[:, None] * mixture.score(sde)(x, t) - eps
    torch.testing.assert_close(sd.DSM("simple")(model, x0, t=t, eps=eps), (error**2).sum(1))


def test_weights_are_their_papers_in_each_space(sde, mixture):
    """Each weight on the error of eps is the plain error of what its paper predicts."""
    model = Exact(mixture, sde)
    x0 = mixture.sample(6, torch.Generator().manual_seed(0))
    eps = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    t = torch.linspace(max(0.01, sde.t_min), sde.t_max, 6, dtype=torch.float64)
    column = t[:, None]
    x = sde.perturb(x0, column, eps)
    alpha, sigma = sde.alpha(column), sde.sigma(column)
    score_error = model(x, column) + eps / sigma
    data_error = model.denoise(x, column) - x0
    q, snr = sigma / alpha, (alpha / sigma) ** 2
    expected = {
        "simple": sigma**2 * score_error**2,
        "likelihood": sde.diffusion(column) ** 2 * score_error**2,
        "x0": data_error**2,
        # EDM: (sigma^2 + sigma_data^2)/(sigma sigma_data)^2 |D - x0|^2
        "edm": (q**2 + 0.25) / (0.5 * q) ** 2 * data_error**2,
        # min-SNR in data space: min(snr, 5) |x0_hat - x0|^2
        "min-snr": snr.clamp_max(5) * data_error**2,
    }
    for name in WEIGHTS:
        loss = sd.DSM(name)(model, x0, t=t, eps=eps)
        torch.testing.assert_close(loss, expected[name].sum(1), rtol=1e-8, atol=1e-10)


def test_likelihood_weight_is_the_slope_of_log_snr(sde):
    t = torch.linspace(max(0.01, sde.t_min), sde.t_max - 1e-4, 7, dtype=torch.float64)
    t = t.requires_grad_()
    (slope,) = torch.autograd.grad(sde.log_snr(t).sum(), t)
    weight = config.build("likelihood", weights_room, "weight")
    torch.testing.assert_close(weight(sde, t.detach()), -2 * slope, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", config.names(times_room))
def test_times_stay_within_the_trained_interval(sde, name):
    times = config.build(name, times_room, "times")
    t, correction = times(sde, 4096, torch.Generator().manual_seed(0))
    assert t.dtype == torch.float64
    assert t.min() >= sde.t_min * (1 - 1e-9)
    assert t.max() <= sde.t_max * (1 + 1e-9)
    assert correction.shape == t.shape


def test_low_discrepancy_covers_every_cell():
    t, _ = times_room.LowDiscrepancy()(sd.VP(), 64, torch.Generator().manual_seed(3))
    u = (t - 1e-5) / (1 - 1e-5)
    assert sorted((u * 64).long().tolist()) == list(range(64))


def test_log_normal_has_its_moments():
    sde = sd.EDM()
    t, _ = times_room.LogNormal()(sde, 200_000, torch.Generator().manual_seed(0))
    log_q = t.log()
    assert float(log_q.mean()) == pytest.approx(-1.2, abs=0.02)
    assert float(log_q.std()) == pytest.approx(1.2, abs=0.02)


def test_importance_times_are_uniform_in_log_snr(sde):
    t, _ = times_room.Importance()(sde, 1000, torch.Generator().manual_seed(0))
    log_snr = sde.log_snr(t)
    low, high = sde.log_snr(sde.t_max), sde.log_snr(sde.t_min)
    u = ((log_snr - low) / (high - low)).sort().values
    assert (u - (torch.arange(1000) + 0.5) / 1000).abs().max() < 1e-3


def test_importance_sampling_is_unbiased_with_constant_weight(sde, mixture):
    """Weight times correction is constant, and equals the integral that uniform times estimate."""
    t, correction = times_room.Importance()(sde, 64, torch.Generator().manual_seed(0))
    factor = weights_room.Likelihood()(sde, t) * correction
    torch.testing.assert_close(factor, factor[:1].expand(64), rtol=1e-9, atol=0)
    span = float(sde.log_snr(sde.t_min) - sde.log_snr(sde.t_max))
    # mean over uniform t of g^2/sigma^2 = 2 span / (t_max - t_min)
    assert float(factor[0]) == pytest.approx(2 * span / (sde.t_max - sde.t_min), rel=1e-9)


def test_optimal_loss_on_gaussian_data_is_the_closed_form():
    """E|eps_hat - eps|^2 = alpha^2 v / (alpha^2 v + sigma^2) a dimension, for data N(0, v)."""
    sde, v, t = sd.VP(), 0.49, 0.3
    mixture = sd.GaussianMixture([1.0], torch.zeros(1, 3).double(), [v**0.5])
    generator = torch.Generator().manual_seed(0)
    x0 = mixture.sample(100_000, generator)
    loss = sd.DSM("simple")(mixture.score(sde), x0, t=t, generator=generator)
    alpha2, sigma2 = float(sde.alpha(t)) ** 2, float(sde.sigma(t)) ** 2
    expected = 3 * alpha2 * v / (alpha2 * v + sigma2)
    error = float(loss.std()) / math.sqrt(len(loss))
    assert abs(float(loss.mean()) - expected) < 4 * error
    assert error < 0.01


def test_a_wrong_name_gives_the_nearest():
    with pytest.raises(sd.ConfigError, match="did you mean 'likelihood'"):
        sd.DSM(weight="likelyhood")
    with pytest.raises(sd.ConfigError, match=r"objective\.weight\.gama"):
        sd.DSM(weight={"name": "min-snr", "gama": 3})


class Net(nn.Module):
    """A network in float64 whose output depends on every input."""

    num_classes = 5

    def __init__(self, dims):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(dims, dims).double()
        self.labels = []

    def forward(self, x, c_noise, y=None):
        self.labels.append(y)
        c = c_noise.to(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
        return torch.sin(self.layer(x.flatten(1)).view_as(x) + c)


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inner_times(sde, n):
    return torch.linspace(max(0.01, sde.t_min), sde.t_max, n, dtype=torch.float64)


@pytest.mark.parametrize("name", config.names(sd.parameterization))
def test_the_error_at_the_output_is_that_of_the_noise(sde, name):
    model = sd.ScoreModel(Net(12), sde, config.build(name, sd.parameterization, "p"))
    x0, eps = normal(4, 3, 2, 2), normal(4, 3, 2, 2, seed=1)
    t = inner_times(sde, 4)
    x = sde.perturb(x0, t, eps)
    error, c_out, v = model.denoising_error(x0, eps, t)
    expected = model.noise(x, t) - eps
    torch.testing.assert_close(c_out.view(4, 1, 1, 1) * error, expected, rtol=1e-7, atol=1e-9)
    assert v is None
    for weight in ("simple", "edm"):
        factor = config.build(weight, weights_room, "w")(sde, t)
        loss = sd.DSM(weight)(model, x0, t=t, eps=eps)
        torch.testing.assert_close(loss, factor * expected.flatten(1).square().sum(1))
    one = sd.DSM("simple")(model, x0[:1], t=float(t[1]), eps=eps[:1])
    both = sd.DSM("simple")(model, x0[:1], t=t[1:2].view(1, 1, 1, 1), eps=eps[:1])
    torch.testing.assert_close(one, both)


@pytest.mark.parametrize("sde", [sd.Linear(), sd.Cosine(), sd.DDPM(schedule="cosine")], ids=repr)
def test_a_small_error_survives_where_the_noise_is_all(sde):
    """The network errs by 1e-3 in v: the loss says so, where eps_hat - eps is mostly rounding."""
    x0, eps = normal(2, 50).float(), normal(2, 50, seed=1).float()
    t = torch.tensor([sde.t_max, sde.t_max], dtype=torch.float64)
    alpha, sigma = float(sde.alpha(t)[0]), float(sde.sigma(t)[0])

    class Nearly(nn.Module):
        def forward(self, x, c_noise):
            return (alpha * eps.double() - sigma * x0.double() + 1e-3).float()

    loss = sd.DSM("velocity")(sd.ScoreModel(Nearly(), sde, sd.V()), x0, t=t, eps=eps)
    c_out = alpha / (alpha**2 + sigma**2)
    weight = float(sde.diffusion(t)[0]) ** 4 / (4 * sigma**2)
    expected = weight * c_out**2 * 50 * 1e-6
    assert loss.tolist() == pytest.approx([expected] * 2, rel=1e-3)


def test_velocity_weight_is_flow_matching_on_the_straight_path(mixture):
    sde = sd.Linear()
    model = Exact(mixture, sde)
    x0, eps = mixture.sample(6, torch.Generator().manual_seed(0)), normal(6, 2, seed=1)
    t = torch.linspace(0.01, 0.999, 6, dtype=torch.float64)
    x = (1 - t[:, None]) * x0 + t[:, None] * eps
    expected = (model.velocity(x, t) - (eps - x0)).square().sum(1)
    loss = sd.DSM("velocity")(model, x0, t=t, eps=eps)
    torch.testing.assert_close(loss, expected, rtol=1e-8, atol=1e-12)
    usual = objectives.DSM(**sde.default_objective)
    assert (usual.weight, usual.times) == (weights_room.Velocity(), fixed_times.LowDiscrepancy())


def test_velocity_weight_is_conditional_flow_matching(sde, mixture):
    model = Exact(mixture, sde)
    x0, eps = mixture.sample(6, torch.Generator().manual_seed(0)), normal(6, 2, seed=1)
    t, h = inner_times(sde, 7)[:-1] + 1.4e-3, 1e-6  # within the cells of a table
    slopes = [(f(t + h) - f(t - h))[:, None] / (2 * h) for f in (sde.alpha, sde.sigma)]
    x = sde.perturb(x0, t, eps)
    expected = (model.velocity(x, t) - (slopes[0] * x0 + slopes[1] * eps)).square().sum(1)
    loss = sd.DSM("velocity")(model, x0, t=t, eps=eps)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("predicted", ["eps", "x0", "v"])
def test_min_snr_is_one_loss_for_all_three_predictions(predicted):
    """Hang et al.: min(snr, gamma) for x0, over snr for eps, over snr + 1 for v."""
    sde, net = sd.VP(), Net(3)
    x0, eps = normal(6, 3), normal(6, 3, seed=1)
    t = torch.linspace(0.02, 0.95, 6, dtype=torch.float64)
    alpha, sigma = sde.alpha(t)[:, None], sde.sigma(t)[:, None]
    snr = (alpha / sigma) ** 2
    target = {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0}[predicted]
    over = {"eps": snr, "x0": 1, "v": snr + 1}[predicted]
    predicts = config.build(predicted, sd.parameterization, "p")
    out = net(alpha * x0 + sigma * eps, (sigma / alpha).log()[:, 0] / 4)
    expected = (snr.clamp_max(5) / over * (out - target) ** 2).sum(1)
    loss = sd.DSM("min-snr")(sd.ScoreModel(net, sde, predicts), x0, t=t, eps=eps)
    torch.testing.assert_close(loss, expected)


def test_edm_is_the_loss_of_its_paper():
    """ln sigma ~ N(-1.2, 1.2^2), lambda(sigma) |D(y + n; sigma) - y|^2, table 1 of the paper."""
    sde, net, sd_ = sd.EDM(), Net(4), 0.5
    objective = objectives.DSM(**sde.default_objective)
    model = sd.ScoreModel(net, sde, sd.Karras())
    y, n = normal(5, 4), normal(5, 4, seed=1)
    source = torch.Generator().manual_seed(7)
    sigma, correction = objective.times(sde, 5, source)
    uniform = torch.rand(5, generator=torch.Generator().manual_seed(7)).double()
    expected = torch.as_tensor(ndtri(uniform.numpy()) * 1.2 - 1.2).exp().clamp(0.002, 80)
    torch.testing.assert_close(sigma, expected)
    assert correction.tolist() == [1.0] * 5
    s = sigma[:, None]
    c_skip, c_out = sd_**2 / (s**2 + sd_**2), s * sd_ / (s**2 + sd_**2).sqrt()
    c_in, c_noise = 1 / (s**2 + sd_**2).sqrt(), sigma.log() / 4
    denoised = c_skip * (y + s * n) + c_out * net(c_in * (y + s * n), c_noise)
    expected = (s**2 + sd_**2) / (s * sd_) ** 2 * (denoised - y) ** 2
    loss = objective(model, y, t=sigma, eps=n)
    torch.testing.assert_close(loss, expected.sum(1))


def test_logit_normal_is_that_of_rectified_flow():
    times = config.build("logit-normal", times_room, "times")
    u = torch.tensor([0.02, 0.3, 0.5, 0.9], dtype=torch.float64)
    expected = torch.as_tensor(ndtri(u.numpy())).sigmoid()
    torch.testing.assert_close(times.quantile(sd.Linear(), u), expected)


def test_importance_times_are_those_of_score_flow():
    """On VP the cumulative weight of g^2/sigma^2 is log(e^B - 1), B the integral of beta."""
    sde, u = sd.VP(), torch.linspace(0.01, 0.99, 9, dtype=torch.float64)

    def cumulative(t):
        return torch.expm1(t**2 * (20 - 0.1) / 2 + 0.1 * t).log()

    low, high = (cumulative(torch.tensor(t, dtype=torch.float64)) for t in (1e-5, 1.0))
    t = times_room.Importance().quantile(sde, u)
    torch.testing.assert_close((cumulative(t) - low) / (high - low), u, rtol=1e-9, atol=0)


def test_steps_are_the_chain():
    times = config.build("steps", times_room, "times")
    t, _ = times(sd.DDPM(num_steps=50), 500, torch.Generator().manual_seed(0))
    counts = (t * 50).round().long().bincount(minlength=51)
    assert counts[0] == 0
    assert counts[1:].tolist() == [10] * 50
    assert torch.equal(t, (t * 50).round() / 50)
    with pytest.raises(sd.ConfigError, match=r"objective\.times\.steps=1000000 starts at t=1e-06"):
        times_room.Steps(steps=1_000_000)(sd.VP(), 4)


@pytest.mark.parametrize("name", ["low-discrepancy", "uniform", "log-normal", "importance"])
def test_processes_draw_their_parts_of_one_batch(name):
    """Two processes, or micro-batches, have the losses of one."""
    sde = sd.VP()
    objective = sd.DSM("simple", name, drop=0.5)
    model = sd.ScoreModel(Net(3), sde, sd.V())
    x0, y = normal(24, 3), torch.arange(24) % 5
    losses = []
    for cuts in ([0, 24], [0, 7, 24]):
        parts = []
        for start, end in pairwise(cuts):
            noise = StepNoise(3, 11, start, 24)
            t, correction = objective.times(sde, end - start, noise)
            loss = objective(model, x0[start:end], t=t, generator=noise, y=y[start:end])
            parts.append(correction * loss)
        losses.append(torch.cat(parts))
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    labels = model.net.labels
    assert torch.equal(labels[0], torch.cat(labels[1:]))
    if name == "low-discrepancy":
        t, _ = objective.times(sde, 24, StepNoise(3, 12, 0, 24))
        cells = ((t - sde.t_min) / (sde.t_max - sde.t_min) * 24).long()
        assert sorted(cells.tolist()) == list(range(24))
        other, _ = objective.times(sde, 24, StepNoise(3, 13, 0, 24))
        assert not torch.equal(t, other)


def test_labels_are_dropped_at_the_rate():
    model = sd.ScoreModel(Net(2), sd.VP(), sd.V())
    x0, y = normal(4000, 2), torch.arange(4000) % 5
    source = torch.Generator().manual_seed(0)
    sd.DSM(drop=0.1)(model, x0, generator=source, y=y)
    seen = model.net.labels.pop()
    gone = seen != y
    assert seen[gone].unique().tolist() == [5]
    assert abs(int(gone.sum()) - 400) < 4 * math.sqrt(4000 * 0.09)
    assert torch.equal(y, torch.arange(4000) % 5)  # the batch itself is left alone
    sd.DSM(drop=0.1)(model, x0, generator=source, y=normal(4000, 3))
    rows = model.net.labels.pop()
    zero = (rows == 0).all(1)
    assert abs(int(zero.sum()) - 400) < 4 * math.sqrt(4000 * 0.09)
    assert torch.equal(rows[~zero], normal(4000, 3)[~zero])
    sd.DSM()(model, x0, generator=source, y=y)
    assert model.net.labels.pop() is y


def test_labels_that_cannot_be_dropped():
    model = sd.ScoreModel(Net(2), sd.VP(), sd.V())
    with pytest.raises(sd.ConfigError, match=r"drop=0\.2 drops labels, but the network is given"):
        sd.DSM(drop=0.2)(model, normal(3, 2))
    with pytest.raises(sd.ConfigError, match="drop must be in"):
        config.build({"name": "dsm", "drop": 1.5}, objectives, "objective")
    del Net.num_classes
    try:
        with pytest.raises(sd.ConfigError, match="needs a network that has num_classes"):
            sd.DSM(drop=0.2)(model, normal(3, 2), y=torch.zeros(3, dtype=torch.long))
    finally:
        Net.num_classes = 5


def test_objectives_by_name():
    assert set(config.names(objectives)) == {"dsm", "hybrid", "second-order"}
    assert config.build("dsm", objectives, "objective") == sd.DSM()
    assert sd.DSM().module is None


@pytest.mark.parametrize(
    "section",
    [
        {"name": "dsm", "weight": "velocity", "drop": 0.5},
        {"name": "dsm", "times": "uniform"},
        {"name": "dsm", "times": "velocity-importance"},
        {"name": "dsm", "times": "learned"},
        {"name": "second-order"},
        {"name": "hybrid"},
    ],
    ids=lambda s: "-".join(str(v) for v in s.values()),
)
def test_no_step_waits_for_the_device(section):
    """On torch's meta device, whatever would read a value back raises."""

    class Twice(Net):
        def forward(self, x, c_noise, y=None):
            out = super().forward(x, c_noise, y)
            return torch.cat([out, out], 1) if section["name"] == "hybrid" else out

    objective = config.build(section, objectives, "objective")
    model = sd.ScoreModel(Twice(12), sd.DDPM(num_steps=8), sd.V()).to("meta")
    if objective.module is not None:
        objective.module.to("meta")
    x0 = torch.empty(16, 3, 4, dtype=torch.float64, device="meta")
    y = torch.empty(16, dtype=torch.long, device="meta")
    noise = StepNoise(0, 0, 0, 16)
    t, correction = objective.times(model.sde, 16, noise)
    loss = objective(model, x0, t=t, generator=noise, y=y)
    (correction.to(loss.device) * loss).mean().backward()
    assert loss.shape == (16,)
    assert model.net.layer.weight.grad.device.type == "meta"
