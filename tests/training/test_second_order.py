"""The second-order objective: its formula, its minimum, its derivatives."""

import pytest
import torch
from torch import nn

import scoresde as sd
from scoresde import config
from scoresde.training import objectives
from scoresde.training.second_order import SecondOrder
from scoresde.training.step_noise import StepNoise

f64 = torch.float64


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=f64, generator=torch.Generator().manual_seed(seed))


class MLP(nn.Module):
    def __init__(self, dims=3):
        super().__init__()
        torch.manual_seed(0)
        self.inside, self.outside = nn.Linear(dims, 4).double(), nn.Linear(4, dims).double()

    def forward(self, x, c_noise):
        return self.outside(torch.tanh(self.inside(x) + c_noise[:, None]))


def exact_bracket(model, x, t, error):
    """``sigma tr(d eps_hat/dx) + |e|^2 - D`` with every entry of the Jacobian's diagonal."""
    values = []
    for i in range(len(x)):
        jacobian = torch.func.jacrev(lambda z, i=i: model.noise(z[None], t[i : i + 1])[0])(x[i])
        trace = jacobian.reshape(x[i].numel(), -1).trace()
        sigma = model.sde.sigma(t[i])
        values.append(sigma * trace + error[i].square().sum() - x[i].numel())
    return torch.stack(values)


@pytest.mark.parametrize("predicts", [sd.V(), sd.Eps(), sd.Karras()], ids=["v", "eps", "karras"])
def test_it_is_the_formula_with_the_exact_jacobian(sde, predicts):
    """The mean over all signs of the probed trace is the trace; the squares add its variance."""
    model = sd.ScoreModel(MLP(), sde, predicts)
    x0, eps = normal(4, 3), normal(4, 3, seed=1)
    t = torch.linspace(max(0.02, sde.t_min), sde.t_max, 4, dtype=f64)
    x = sde.perturb(x0, t, eps)
    error = model.noise(x, t) - eps
    objective = SecondOrder(second=0.3)
    weight = objective.weight(sde, t)
    first = weight * error.square().sum(1)
    brackets = exact_bracket(model, x, t, error)
    # Roots of the second part over all signs, by polarisation: probes are 8 corners.
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=f64)] * 3)
    parts = []
    for corner in corners:
        probe = corner.expand(4, 3)
        jacobian = torch.stack(
            [
                torch.func.jvp(
                    lambda z, i=i: model.noise(z[None], t[i : i + 1])[0], (x[i],), (probe[i],)
                )[1]
                for i in range(4)
            ]
        )
        bracket = sde.sigma(t) * (jacobian * probe).sum(1) + error.square().sum(1) - 3
        loss = objective(model, x0, t=t, eps=eps, probe=probe)
        expected = first + weight * 0.3 / 3 * bracket**2
        torch.testing.assert_close(loss, expected, rtol=1e-7, atol=1e-9)
        parts.append(bracket)
    torch.testing.assert_close(torch.stack(parts).mean(0), brackets, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("path", ["vp", "straight"])
def test_it_is_that_of_i_dode(path):
    """Zheng et al.: the velocity, the first loss and the trace term in each of the two states."""
    sde = sd.VP() if path == "vp" else sd.Linear()
    net = MLP()
    x0, eps, probe = normal(4, 3), normal(4, 3, seed=1), normal(4, 3, seed=2).sign()
    t = torch.linspace(0.1, 0.9, 4, dtype=f64)
    alpha, sigma = sde.alpha(t)[:, None], sde.sigma(t)[:, None]
    z = (alpha * x0 + sigma * eps).requires_grad_()
    c_noise = (sigma / alpha).log()[:, 0] / 4

    if path == "vp":
        predicts, scale = sd.V(scale_input=False), 1.0
        target = (eps - sigma * z) / alpha
    else:  # F = (eps - z)/(sqrt(2) alpha), which is none of the parameterizations

        class Straight(sd.V):
            def skip_and_out(self, alpha, sigma):
                return torch.ones_like(alpha), 2**0.5 * alpha

        predicts, scale = Straight(scale_input=False), 2.0
        target = (eps - z) / alpha / 2**0.5
    out = net(z, c_noise)
    first = (out - target.detach()).square().sum(1)
    (product,) = torch.autograd.grad(out, z, probe)
    div = (product * probe).sum(1)
    a, s = alpha[:, 0], sigma[:, 0]
    if path == "vp":
        second = s * div - a * (3 - first)
    else:
        second = s * div - 3 / 2**0.5 + 2**0.5 * a * first
    weight = scale * a**2 * (sde.diffusion(t) / sde.sigma(t)) ** 2
    expected = weight * (first + 0.1 / 3 * second**2)
    model = sd.ScoreModel(net, sde, predicts)
    loss = SecondOrder()(model, x0, t=t, eps=eps, probe=probe)
    torch.testing.assert_close(loss, expected, rtol=1e-8, atol=1e-10)


def test_the_bracket_has_mean_zero_at_the_truth_and_the_loss_its_minimum():
    """On Gaussian data N(0, v) the loss over slopes of the score is least at the true one."""
    sde, std, dims, t = sd.VP(), 0.7, 2, 0.35
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    true = sigma / (alpha**2 * std**2 + sigma**2)  # eps_hat = true * x

    class Slope(sd.Score):
        def __init__(self, slope):
            self.sde, self.slope = sde, slope

        def __call__(self, x, t):
            return -self.slope * x / sigma

    x0 = std * normal(200_000, dims)
    eps, probe = normal(200_000, dims, seed=1), normal(200_000, dims, seed=2).sign()
    x = alpha * x0 + sigma * eps
    bracket = sigma * true * dims + (true * x - eps).square().sum(1) - dims
    assert abs(float(bracket.mean())) < 4 * float(bracket.std()) / 200_000**0.5

    def second(slope):
        both = SecondOrder("simple", second=1.0)(Slope(slope), x0, t=t, eps=eps, probe=probe)
        return both - sd.DSM("simple")(Slope(slope), x0, t=t, eps=eps)

    # Without noise of the first order held, |E[bracket | x]|^2 is least at the truth: its
    # derivative in the slope is E[2 bracket sigma D]/D, with the error held.
    slope = torch.tensor(true, dtype=f64, requires_grad=True)
    loss = second(slope)
    (gradient,) = torch.autograd.grad(loss.mean(), slope)
    noise = 2 * sigma * float(bracket.std()) / 200_000**0.5
    assert abs(float(gradient)) < 4 * noise
    for wrong in (0.8, 1.2):
        slope = torch.tensor(true * wrong, dtype=f64, requires_grad=True)
        (gradient,) = torch.autograd.grad(second(slope).mean(), slope)
        assert float(gradient) * (wrong - 1) > 20 * noise
    whole = SecondOrder("simple", second=1.0)
    losses = [
        float(whole(Slope(true * k), x0, t=t, eps=eps, probe=probe).mean()) for k in (0.8, 1, 1.2)
    ]
    assert losses[1] == min(losses)


def test_derivatives_are_finite_differences():
    """The gradient of the whole, the first-order error in the bracket held."""
    sde, net = sd.VP(), MLP(2)
    model = sd.ScoreModel(net, sde, sd.V())
    x0, eps, probe = normal(3, 2), normal(3, 2, seed=1), normal(3, 2, seed=2).sign()
    t = torch.tensor([0.1, 0.5, 0.9], dtype=f64)
    objective = SecondOrder("simple", second=0.5)
    held = sd.DSM("simple")(model, x0, t=t, eps=eps).detach()
    weights = [p.detach().clone().requires_grad_() for p in net.parameters()]
    x = sde.perturb(x0, t, eps)

    def loss(*values):
        """Independent of the objective: the trace by forward mode, the held error a constant."""
        named = dict(zip(dict(net.named_parameters()), values, strict=True))
        a, s = sde.alpha(t)[:, None], sde.sigma(t)[:, None]

        def noise(z):
            c_in = 1 / (a**2 + s**2).sqrt()
            out = torch.func.functional_call(net, named, (c_in * z, (s / a).log()[:, 0] / 4))
            return s * z + a * out

        value, tangent = torch.func.jvp(noise, (x,), (probe,))
        first = (value - eps).square().sum(1)
        return first + 0.25 * (s[:, 0] * (tangent * probe).sum(1) + held - 2) ** 2

    torch.testing.assert_close(
        objective(model, x0, t=t, eps=eps, probe=probe), loss(*net.parameters())
    )
    assert torch.autograd.gradcheck(loss, weights)
    got = torch.autograd.grad(
        objective(model, x0, t=t, eps=eps, probe=probe).sum(), list(net.parameters())
    )
    expected = torch.autograd.grad(loss(*weights).sum(), weights)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["unet", "dit", "ncsnpp"])
def test_it_trains_networks_with_attention(name):
    sections = {
        "unet": {"preset": "tiny"},
        "dit": {"patch": 2, "width": 16, "depth": 1, "heads": 2},
        "ncsnpp": {"width": 8, "multipliers": [1, 1], "blocks": 1, "attention": [4], "groups": 4},
    }
    from scoresde.training.job import build_net

    net = build_net({"name": name, **sections[name]}, (1, 8, 8))
    for p in net.parameters():  # last layers start at zero, where nothing would flow
        nn.init.normal_(p, std=0.1)
    attention = []
    fused = nn.functional.scaled_dot_product_attention

    def counted(*args, **kwargs):
        attention.append(1)
        return fused(*args, **kwargs)

    nn.functional.scaled_dot_product_attention = counted
    try:
        model = sd.ScoreModel(net, sd.VP(), sd.V(), shape=(1, 8, 8))
        loss = SecondOrder()(model, torch.randn(2, 1, 8, 8), generator=StepNoise(0, 0, 0, 2))
        loss.sum().backward()
    finally:
        nn.functional.scaled_dot_product_attention = fused
    assert attention
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in grads)
    assert sum(float(g.abs().sum()) for g in grads) > 0


def test_it_draws_its_probe_and_works_without_gradients():
    model = sd.ScoreModel(MLP(), sd.VP(), sd.V())
    objective = config.build("second-order", objectives, "objective")
    assert objective.second == 0.1
    x0 = normal(20, 3)
    whole = objective(model, x0, generator=StepNoise(0, 1, 0, 20))
    with torch.no_grad():
        same = objective(model, x0, generator=StepNoise(0, 1, 0, 20))
        part = torch.cat(
            [
                objective(model, x0[a:b], generator=StepNoise(0, 1, a, 20))
                for a, b in [(0, 7), (7, 20)]
            ]
        )
    assert not same.requires_grad
    torch.testing.assert_close(whole, same)
    torch.testing.assert_close(whole, part)
    source = torch.Generator().manual_seed(0)
    assert objective(model, x0, generator=source).shape == (20,)
