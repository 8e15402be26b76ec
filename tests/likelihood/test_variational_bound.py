import math

import pytest
import torch
from scipy import stats

import scoresde as sd
from scoresde.likelihood.bound import log_mass

f64 = torch.float64


class Perturbed:
    """A Gaussian's exact score plus an error, that writes down what it was asked."""

    def __init__(self, sde, dims=4, error=0.2):
        self.sde, self.error, self.asked = sde, error, []
        mixture = sd.GaussianMixture([1.0], torch.zeros(1, dims, dtype=f64), [0.5])
        self.exact = mixture.score(sde)

    def __call__(self, x, t):
        eps_hat = -self.sde.sigma(t) * self.exact(x, t) + self.error * torch.sin(3 * x)
        self.asked.append((x, float(t.max()), eps_hat))
        return -eps_hat / self.sde.sigma(t)


def gaussian(n, dims=6, std=0.5):
    mixture = sd.GaussianMixture([1.0], torch.zeros(1, dims, dtype=f64), [std])
    return mixture, mixture.sample(n, torch.Generator().manual_seed(0))


def centres(n, dims, levels, seed=0):
    k = torch.randint(0, levels, (n, dims), generator=torch.Generator().manual_seed(seed))
    return k, (k.double() + 0.5) * 2 / levels - 1


def test_every_step_is_that_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    n, steps = 3, 50
    sde = sd.DDPM(num_steps=steps, beta_end=0.2)
    score = Perturbed(sde)
    x0 = torch.rand(n, 4, generator=torch.Generator().manual_seed(1), dtype=f64) * 2 - 1
    out = sd.vlb(score, x0, steps=steps, levels=None)
    assert out.steps.shape == (n, steps - 1)
    assert out.index[0].tolist() == list(range(2, steps + 1))
    scheduler = diffusers.DDPMScheduler(
        num_train_timesteps=steps, beta_start=1e-4, beta_end=0.2, clip_sample=False
    )
    betas = torch.linspace(1e-4, 0.2, steps, dtype=f64)  # theirs, without the float32 rounding
    scheduler.betas, scheduler.alphas = betas, 1 - betas
    scheduler.alphas_cumprod = (1 - betas).cumprod(0)
    for x, t, eps_hat in score.asked[: steps - 1]:
        i = round(t * steps)
        bar = scheduler.alphas_cumprod[i - 1]
        eps = (x - bar.sqrt() * x0) / (1 - bar).sqrt()
        means = [
            scheduler.step(e, i - 1, x, generator=torch.Generator().manual_seed(0)).prev_sample
            for e in (eps, eps_hat)
        ]
        variance = scheduler._get_variance(i - 1)
        kl = (means[0] - means[1]).square().sum(1) / (2 * variance)
        assert torch.allclose(out.steps[:, i - 2], kl, rtol=1e-6)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_equation_12_of_ddpm(variance):
    steps = 20
    sde = sd.DDPM(num_steps=steps, beta_end=0.3)
    score = Perturbed(sde)
    x0 = torch.linspace(-1, 1, 8, dtype=f64).reshape(2, 4)
    out = sd.vlb(score, x0, steps=steps, levels=None, variance=variance)
    betas = torch.linspace(1e-4, 0.3, steps, dtype=f64)
    bars = (1 - betas).cumprod(0)
    for x, t, eps_hat in score.asked[: steps - 1]:
        i = round(t * steps) - 1  # from zero, as the tables
        eps = (x - bars[i].sqrt() * x0) / (1 - bars[i]).sqrt()
        tilde = betas[i] * (1 - bars[i - 1]) / (1 - bars[i])
        model = tilde if variance == "small" else betas[i]
        weight = betas[i] ** 2 / (2 * model * (1 - betas[i]) * (1 - bars[i]))
        constant = 4 / 2 * (tilde / model - 1 - (tilde / model).log())
        expected = weight * (eps - eps_hat).square().sum(1) + constant
        assert torch.allclose(out.steps[:, i - 1], expected, rtol=1e-9)


def test_prior_and_decoder_of_the_continuous_bound():
    sde = sd.VP()
    score = Perturbed(sde)
    x0 = torch.linspace(-1, 1, 8, dtype=f64).reshape(2, 4)
    out = sd.vlb(score, x0, steps=10, levels=None)
    alpha, sigma = sde.alpha(1.0), sde.sigma(1.0)
    start = torch.distributions.Normal(alpha * x0, sigma)
    prior = torch.distributions.Normal(torch.zeros_like(x0), 1.0)
    kl = torch.distributions.kl_divergence(start, prior).sum(1)
    assert torch.allclose(out.prior, kl, rtol=1e-9)
    x1, t1, eps_hat = score.asked[-1]
    assert t1 == pytest.approx(0.1)
    mean = (x1 - sde.sigma(t1) * eps_hat) / sde.alpha(t1)
    density = torch.distributions.Normal(mean, sde.sigma(t1)).log_prob(x0).sum(1)
    assert torch.allclose(out.decoder, -density, rtol=1e-9)
    assert torch.allclose(out.total, out.prior + out.steps.sum(1) + out.decoder)
    assert (out.nfe, out.unit) == (10, "nats")


def test_gaussian_bound_lies_above_the_exact_and_closes_in(sde):
    mixture, x0 = gaussian(1500)
    exact = -mixture.log_prob(x0)
    gaps = []
    for steps in (8, 32, 128):
        if sde.t_max / steps < sde.t_min:
            continue
        out = sd.vlb(mixture.score(sde), x0, steps=steps, levels=None, variance="large")
        gap = out.total - exact
        error = gap.std() / len(gap) ** 0.5
        assert gap.mean() > -3 * error
        gaps.append(float(gap.mean()))
    assert gaps[0] > gaps[1] > gaps[2]


def test_small_variance_leaves_the_gap_that_theory_says():
    """Near the data sigma^2 grows as i, and each step costs (r - 1 - log r)/2, r = i/(i - 1).

    Summed over the steps that is Euler's gamma / 2 a dimension, however fine the grid.
    """
    sde, (mixture, x0) = sd.VP(beta_min=2.0, beta_max=2.0), gaussian(2000, std=3.0)
    gaps = {}
    for variance in ("small", "large"):
        out = sd.vlb(mixture.score(sde), x0, steps=500, levels=None, variance=variance)
        gaps[variance] = float((out.total + mixture.log_prob(x0)).mean())
    assert gaps["small"] - gaps["large"] == pytest.approx(6 * 0.5772 / 2, abs=0.1)


@pytest.mark.parametrize("levels", [2, 5, 256])
def test_decoder_integrates_over_the_bins(levels):
    sde = sd.VP(beta_max=1.0)
    k, x0 = centres(3, 4, levels)
    score = Perturbed(sde)
    out = sd.vlb(score, x0, steps=4, levels=levels)
    x1, t1, eps_hat = score.asked[-1]
    mean = (x1 - sde.sigma(t1) * eps_hat) / sde.alpha(t1)
    # All bins, from the distribution function at their edges; the outermost are open.
    edges = torch.linspace(-1, 1, levels + 1, dtype=f64)
    below = torch.special.ndtr((edges - mean[..., None]) / sde.sigma(t1))
    below[..., 0], below[..., -1] = 0, 1
    mass = below.diff()
    assert torch.allclose(mass.sum(-1), torch.ones_like(mean))
    expected = -mass.gather(-1, k[..., None])[..., 0].log().sum(1) / (4 * math.log(2))
    assert torch.allclose(out.decoder, expected, rtol=1e-6)
    assert out.unit == "bits/dim"


def test_mass_far_in_either_tail_does_not_cancel():
    low = torch.tensor([8.0, 30.0, -31.0, -math.inf, 30.0], dtype=f64)
    high = torch.tensor([8.5, 31.0, -30.0, -30.0, math.inf], dtype=f64)
    value = log_mass(low, high)
    near, far = math.log(stats.norm.sf(8) - stats.norm.sf(8.5)), stats.norm.logsf(30)
    assert torch.allclose(value, torch.tensor([near, far, far, far, far], dtype=f64), rtol=1e-12)
    assert log_mass(low.float(), high.float()).isfinite().all()


def test_uniform_levels_need_about_their_bits():
    # Eight equally likely levels hold three bits, which the bound approaches from above.
    levels = 8
    means = ((torch.arange(levels, dtype=f64) + 0.5) * 2 / levels - 1)[:, None]
    points = sd.GaussianMixture(torch.ones(levels), means, torch.full((levels,), 1e-3))
    _, x0 = centres(400, 1, levels)
    out = sd.vlb(points.score(sd.Cosine()), x0, steps=700, levels=levels)
    assert 3.0 < float(out.total.mean()) < 3.2


def test_a_subset_of_steps_is_unbiased_and_covered_by_its_error():
    score = Perturbed(sd.VP(), error=0.05)
    x0 = torch.linspace(-1, 1, 4, dtype=f64).expand(300, 4).clone()
    whole = sd.vlb(score, x0, steps=40, levels=None)
    part = sd.vlb(score, x0, steps=40, levels=None, terms=8)
    assert part.steps.shape == part.index.shape == (300, 8)
    assert part.nfe == 9
    assert all(len(set(row)) == 8 for row in part.index.tolist())
    assert part.index.min() == 2
    assert part.index.max() == 40
    # The terms are the same numbers, only fewer of them.
    assert torch.allclose(part.steps, whole.steps.gather(1, part.index - 2))
    difference = part.total - whole.total
    assert abs(difference.mean()) < 4 * difference.std() / 300**0.5
    spread = part.total.std()
    assert spread < part.stderr.square().mean().sqrt() < 1.6 * spread
    spread = (whole.total - whole.decoder).std()
    assert 0.95 * spread < whole.stderr.square().mean().sqrt() < 2.5 * spread
    every = sd.vlb(score, x0[:3], steps=40, levels=None, terms=39)
    assert torch.allclose(every.total, whole.total[:3])


def test_a_sample_does_not_depend_on_its_batch():
    score = Perturbed(sd.VP())
    _, x0 = centres(5, 4, 256)
    for terms in (None, 3):
        whole = sd.vlb(score, x0, steps=10, terms=terms, seed=2)
        alone = sd.vlb(score, x0[3:4], steps=10, terms=terms, seed=2, start_index=3)
        assert torch.allclose(alone.total, whole.total[3:4], rtol=1e-12)


def test_any_shape_and_float32():
    means = torch.zeros(1, 1, 2, 3)
    score = sd.GaussianMixture([1.0], means, [0.5]).score(sd.Cosine())
    x0 = (torch.arange(12).reshape(2, 1, 2, 3) + 0.5) / 128 - 1
    for terms in (None, 4):
        out = sd.vlb(score, x0, steps=20, terms=terms)
        assert out.total.shape == (2,)
        assert out.total.dtype == torch.float32
        assert out.total.isfinite().all()


def test_the_network_is_evaluated_in_eval_mode_without_gradients():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.drop = torch.nn.Linear(4, 4), torch.nn.Dropout(0.5)

        def forward(self, x, c_noise):
            assert not self.training
            assert not torch.is_grad_enabled()
            return self.drop(self.layer(x))

    model = sd.ScoreModel(Net(), sd.VP(), sd.Eps()).train()
    seen = []
    out = sd.vlb(
        model, centres(2, 4, 256)[1].float(), steps=6, progress=lambda *state: seen.append(state)
    )
    assert model.training
    assert out.weights == "raw"
    assert [s[2] for s in seen] == list(range(5))


def test_refusals():
    score, (_, x0) = Perturbed(sd.VP()), centres(2, 4, 256)
    with pytest.raises(ValueError, match=r"centres of 256 bins.*dequantize=False"):
        sd.vlb(score, x0 + 0.002, steps=5)
    with pytest.raises(ValueError, match="uint8"):
        sd.vlb(score, x0.to(torch.uint8), steps=5)
    with pytest.raises(sd.ConfigError, match=r"unknown variance 'huge'.*large, learned, small"):
        sd.vlb(score, x0, steps=5, variance="huge")
    with pytest.raises(ValueError, match="terms=5"):
        sd.vlb(score, x0, steps=5, terms=5)
    with pytest.raises(ValueError, match="below the trained t_min"):
        sd.vlb(Perturbed(sd.EDM()), x0, steps=100_000)
