import math
import warnings
import weakref

import pytest
import torch
from torch import nn

import scoresde as sd
from scoresde.config import ConfigError
from scoresde.model import Score
from scoresde.nets import MLP, UNet

f64 = torch.float64
WAYS = [True, "adjoint"]


def awake(net):
    """The network with no layer left at zero."""
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return net.double()


def model(sde=None, **options):
    torch.manual_seed(0)
    net = awake(MLP((3,), width=8, blocks=1, **options))
    return sd.ScoreModel(net, sde or sd.VP(), sd.V())


def points(n=3, dims=3):
    return torch.randn(n, dims, generator=torch.Generator().manual_seed(1), dtype=f64)


def slope(value, tensors, directions, h=1e-5):
    """Derivative of ``value()`` along directions of tensors, which are changed in place."""
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for tensor, direction in zip(tensors, directions, strict=True):
                tensor += sign * h * direction
            values.append(value())
            for tensor, direction in zip(tensors, directions, strict=True):
                tensor -= sign * h * direction
    return float(values[0] - values[1]) / (2 * h)


def along(grads, directions):
    pairs = zip(grads, directions, strict=True)
    return float(sum((g * d).sum() for g, d in pairs if g is not None))


def directions_like(tensors, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in tensors]


# --- in the data ------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_of_an_exact_score_it_is_the_score(sde, mixture, way):
    """``grad log p(x)`` of the density at ``t_min``, which the likelihood is."""
    score, x = mixture.score(sde), mixture.sample(2, torch.Generator().manual_seed(0))
    x.requires_grad_()
    out = sd.log_prob(
        score, x, divergence="exact", terminal=mixture.moments(), differentiable=way,
    )  # fmt: skip
    (found,) = torch.autograd.grad(out.log_prob.sum(), x)
    truth = score(x.detach(), sde.t_min_likelihood)
    assert (found - truth).abs().max() < 2e-4 * truth.abs().max()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sde", [sd.VE(), sd.Linear()], ids=["ve", "linear"])
def test_where_the_density_starts_later(sde, mixture, way):
    score, x = mixture.score(sde), points(2, 2).requires_grad_()
    settings = {"divergence": "exact", "terminal": mixture.moments(), "t_min": 0.5}
    out = sd.log_prob(score, x, differentiable=way, **settings)
    (found,) = torch.autograd.grad(out.log_prob.sum(), x)
    truth = score(x.detach(), 0.5)
    assert (found - truth).abs().max() < 1e-3 * truth.abs().max()


GRIDS = ["vabm", "heun", "dpmpp-3m", "unipc", "pndm", "dpm-2s", "rk", "edm"]


@pytest.mark.parametrize(
    ("method", "steps", "noise"),
    [(name, 7, "rademacher") for name in ("euler", "midpoint", "heun2", "heun3", "rk4", *GRIDS)]
    + [(name, None, "gaussian") for name in ("dopri5", "bosh3", "dop853")]
    + [("rk4", 7, "walsh"), ("vabm", 7, "walsh")],
)
def test_it_is_the_gradient_of_the_number_computed(mixture, method, steps, noise):
    score = mixture.score(sd.VP())
    settings = {"method": method, "steps": steps, "probes": 2, "seed": 3, "noise": noise}
    if steps is None:  # how the steps move with x is part of the number, and falls with it
        settings |= {"rtol": 1e-6, "atol": 1e-6}
    x = mixture.sample(4, torch.Generator().manual_seed(0))
    x[1] *= 4  # takes steps of its own
    plain = sd.log_prob(score, x, **settings)
    y = x.clone().requires_grad_()
    out = sd.log_prob(score, y, differentiable=True, **settings)
    for name in ("log_prob", "prior", "delta", "estimates", "latent", "stderr"):
        torch.testing.assert_close(
            getattr(out, name), getattr(plain, name), rtol=1e-12, atol=1e-12, check_stride=False
        )
    assert torch.equal(out.nfe, plain.nfe)
    (found,) = torch.autograd.grad(out.log_prob.sum(), y)
    v = directions_like([x])
    numeric = slope(lambda: sd.log_prob(score, x, **settings).log_prob.sum(), [x], v)
    assert along([found], v) == pytest.approx(numeric, rel=1e-6 if steps else 1e-3)


@pytest.mark.parametrize("part", ["prior", "delta", "latent"])
@pytest.mark.parametrize("way", WAYS)
def test_the_parts_and_the_latent_carry_it(mixture, part, way):
    score, x = mixture.score(sd.Cosine()), mixture.sample(2, torch.Generator().manual_seed(0))
    settings = {"divergence": "exact", "method": "rk4", "steps": 10 if way is True else 60}

    def value(x, **options):
        return getattr(sd.log_prob(score, x, **settings, **options), part)[0].square().sum()

    y = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(value(y, differentiable=way), y)
    assert not found[1].any()
    v = directions_like([x])
    numeric = slope(lambda: value(x), [x], v)
    assert along([found], v) == pytest.approx(numeric, rel=1e-6 if way is True else 1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_an_item_does_not_depend_on_its_batch(way):
    score, x = model(), points(4)
    settings = {"differentiable": way, "method": "rk4", "steps": 5, "probes": 2}

    def gradient(part, start):
        part = part.clone().requires_grad_()
        out = sd.log_prob(score, part, start_index=start, **settings)
        return torch.autograd.grad(out.log_prob.sum(), part)[0]

    parts = [gradient(x[:1], 0), gradient(x[1:], 1)]
    torch.testing.assert_close(torch.cat(parts), gradient(x, 0))


# --- in the parameters ------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
@pytest.mark.parametrize(
    ("way", "settings"),
    [
        (True, {"method": "rk4", "steps": 3}),
        (True, {"method": "vabm", "steps": 6}),
        (True, {"rtol": 1e-6, "atol": 1e-6}),
        ("adjoint", {}),
        ("adjoint", {"method": "rk4", "steps": 20}),
        ("adjoint", {"method": "torchdiffeq-bosh3"}),
        ("adjoint", {"method": "scipy-dop853"}),
    ],
    ids=str,
)
def test_parameters_against_finite_differences(way, settings, divergence):
    score, x = model(), points(2)
    settings = {"divergence": divergence, "seed": 2, **settings}
    out = sd.log_prob(score, x, differentiable=way, **settings)
    assert not x.requires_grad
    assert out.log_prob.requires_grad
    tensors = list(score.parameters())
    found = torch.autograd.grad(out.log_prob.mean(), tensors, allow_unused=True)
    assert sum(g is not None and bool(g.any()) for g in found) > len(tensors) - 3
    v = directions_like(tensors)
    numeric = slope(lambda: sd.log_prob(score, x, **settings).log_prob.mean(), tensors, v)
    same = way is True and "steps" in settings
    assert along(found, v) == pytest.approx(numeric, rel=1e-6 if same else 5e-3)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_adjoint_keeps_its_accuracy_whatever_the_size_of_the_loss(scale):
    score, x = model(), points().requires_grad_()
    tensors = [x, *score.parameters()]

    def gradient(factor):
        out = sd.log_prob(score, x, differentiable="adjoint", divergence="exact")
        grads = torch.autograd.grad(factor * out.log_prob.sum(), tensors, allow_unused=True)
        return torch.cat([g.flatten() for g in grads if g is not None])

    torch.testing.assert_close(gradient(scale) / scale, gradient(1.0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_a_float32_model_trains_by_it(way):
    """Ascent raises the likelihood; the model stays in training mode, and dropout stays out."""
    score = model(dropout=0.5).float().train()
    x = points(8).float()
    settings = {"method": "rk4", "steps": 10, "divergence": "exact"}
    before = sd.log_prob(score, x, **settings).log_prob.mean()
    optimizer = torch.optim.SGD(score.parameters(), lr=1e-3)
    out = sd.log_prob(score, x, differentiable=way, **settings)
    assert out.log_prob.dtype == torch.float32
    assert out.log_prob.mean().item() == pytest.approx(before.item(), abs=1e-5)
    (-out.log_prob.mean()).backward()
    assert score.training
    assert score.net.head[1].weight.grad.dtype == torch.float32
    out_eval = sd.log_prob(score.eval(), x, differentiable=way, **settings).log_prob.mean()
    weight = score.net.body[0].second.weight
    torch.testing.assert_close(torch.autograd.grad(-out_eval, weight)[0], weight.grad)
    optimizer.step()
    assert sd.log_prob(score, x, **settings).log_prob.mean() > before
    with pytest.raises(RuntimeError, match=r"inplace|backward"):  # what the steps were made with
        out.log_prob.mean().backward()


@pytest.mark.parametrize("way", WAYS)
def test_through_attention(way):
    """Fused attention has no second derivative: its formula does."""
    torch.manual_seed(0)
    net = UNet((1, 4, 4), width=8, multipliers=(1, 2), blocks=1, attention=(1,), head_dim=8)
    score = sd.ScoreModel(awake(net), sd.VP(), sd.V(), shape=(1, 4, 4))
    x = torch.randn(2, 1, 4, 4, dtype=f64).requires_grad_()
    settings = {"method": "rk4", "steps": 2 if way is True else 10, "seed": 1}
    tensors = [x, *score.parameters()]
    out = sd.log_prob(score, x, differentiable=way, **settings)
    found = torch.autograd.grad(out.log_prob.mean(), tensors, allow_unused=True)
    v = directions_like(tensors)
    with torch.no_grad():
        numeric = slope(lambda: sd.log_prob(score, x, **settings).log_prob.mean(), tensors, v)
    assert along(found, v) == pytest.approx(numeric, rel=1e-5 if way is True else 2e-2)


class Drifted(Score):
    """A plain callable that holds tensors of its own, a module, and takes a condition."""

    def __init__(self, score, shift, inner=None):
        self.sde, self.exact, self.shift, self.inner = score.sde, score, shift, inner

    def __call__(self, x, t, *, scale=None):
        moved = self.exact(x, t) + self.shift * torch.sin(x)
        moved = moved if scale is None else moved * scale
        return moved if self.inner is None else moved + self.inner(x)


@pytest.mark.parametrize("way", WAYS)
def test_whatever_a_plain_callable_and_its_conditions_depend_on(mixture, way):
    theta = torch.tensor(0.2, dtype=f64, requires_grad=True)
    torch.manual_seed(0)
    inner = nn.Linear(2, 2).double()
    factor = torch.tensor([0.9, 1.1, 1.0], dtype=f64, requires_grad=True)
    x = mixture.sample(3, torch.Generator().manual_seed(0))

    settings = {"method": "rk4", "steps": 8} if way is True else {}

    def value(**options):
        score = Drifted(mixture.score(sd.VP()), theta**2, inner)  # a tensor with a graph
        scale = (2 * factor)[:, None] / 2
        return sd.log_prob(score, x, scale=scale, **settings, **options).log_prob

    tensors = [theta, factor, *inner.parameters()]
    found = torch.autograd.grad(value(differentiable=way).sum(), tensors)
    for tensor, grad in zip(tensors, found, strict=True):
        v = directions_like([tensor])
        numeric = slope(lambda: value().sum(), [tensor], v)
        assert along([grad], v) == pytest.approx(numeric, rel=1e-6 if way is True else 1e-2)


class Guided(Score):
    """A wrapper that keeps a module as its ``score``, and is not asked for it at every time."""

    def __init__(self, score):
        self.score, self.sde = score, score.sde

    def __call__(self, x, t):
        late = torch.as_tensor(t).reshape(-1).min() > 0.5
        return self.score(x, t) if late else -x


def test_the_module_within_a_guided_score():
    inner = model()
    out = sd.log_prob(Guided(inner), points(), differentiable=True, method="rk4", steps=4)
    grads = torch.autograd.grad(out.log_prob.sum(), list(inner.parameters()), allow_unused=True)
    assert any(g is not None and bool(g.any()) for g in grads)


# --- what it costs ----------------------------------------------------------------------------


class Kept:
    """Counts what the graph still holds, not what steps have held and let go."""

    def __init__(self):
        self.parts = weakref.WeakSet()

    def __enter__(self):
        class Part:
            def __init__(self, tensor):
                self.tensor = tensor

        def pack(tensor):
            part = Part(tensor)
            self.parts.add(part)
            return part

        self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda part: part.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *what):
        self.hooks.__exit__(*what)

    def bytes(self):
        storages = {p.tensor.untyped_storage()._cdata: p.tensor for p in self.parts}
        return sum(t.untyped_storage().nbytes() for t in storages.values())


@pytest.mark.parametrize(
    ("settings", "more", "per_step"),
    [
        ({"method": "rk4", "steps": 4}, {"steps": 24}, 1),
        ({"method": "vabm", "steps": 4}, {"steps": 24}, 2),  # the state, and the newest value
        ({"rtol": 1e-3, "atol": 1e-3}, {"rtol": 1e-7, "atol": 1e-7}, 1),
    ],
    ids=str,
)
def test_memory_holds_the_states_alone(settings, more, per_step):
    score, x = model(), points(16).requires_grad_()

    def kept(**options):
        with Kept() as found:
            out = sd.log_prob(score, x, differentiable=True, **options)
        return found.bytes(), (out.steps or int(out.nfe.sum()) // 6 // len(x))

    few, many = kept(**settings), kept(**{**settings, **more})
    state = 16 * (3 + 1) * 8
    assert many[1] >= few[1] + 10
    # Beside them: the divergences of a grid, which rows go alone.
    assert many[0] - few[0] <= 2 * per_step * state * (many[1] - few[1])


def test_the_adjoint_keeps_nothing():
    score, x = model(), points(16).requires_grad_()

    def kept(**options):
        with Kept() as found:
            out = sd.log_prob(score, x, differentiable="adjoint", **options)
        assert out.log_prob.requires_grad
        return found.bytes()

    assert kept(method="rk4", steps=2) == kept(method="rk4", steps=20) == kept()


# --- where there is none, and what is refused ---------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_none_flows_where_none_is_asked_for(mixture, way):
    score, x = mixture.score(sd.VP()), mixture.sample(2)
    assert not sd.log_prob(score, x, differentiable=way).log_prob.requires_grad
    frozen = model().requires_grad_(False)
    assert not sd.log_prob(frozen, points(), differentiable=way).log_prob.requires_grad
    y = points().requires_grad_()
    out = sd.log_prob(frozen, y, differentiable=way)
    (grad,) = torch.autograd.grad(out.log_prob.sum(), y)
    assert grad.any()
    with torch.no_grad():
        assert not sd.log_prob(model(), y, differentiable=way).log_prob.requires_grad
    assert not sd.log_prob(model(), y).log_prob.requires_grad


@pytest.mark.parametrize("way", WAYS)
def test_an_item_that_is_given_up_leaves_the_others_alone(mixture, way):
    score = mixture.score(sd.VP())
    x = mixture.sample(3, torch.Generator().manual_seed(0))
    x[1] *= 6  # needs more evaluations than the others
    needed = sd.log_prob(score, x, divergence="exact").nfe
    assert needed[1] > needed[[0, 2]].max()
    settings = {"divergence": "exact", "max_nfe": int(needed[[0, 2]].max())}
    x.requires_grad_()
    out = sd.log_prob(score, x, differentiable=way, **settings)
    assert out.converged.tolist() == [True, False, True]
    assert math.isnan(out.log_prob[1].item())
    (grad,) = torch.autograd.grad(out.log_prob[out.converged].sum(), x)
    clean = sd.log_prob(score, x, divergence="exact", differentiable=way)
    (truth,) = torch.autograd.grad(clean.log_prob[[0, 2]].sum(), x)
    torch.testing.assert_close(grad[[0, 2]], truth[[0, 2]], rtol=1e-4, atol=1e-4)
    assert not grad[1].any()


@pytest.mark.parametrize("way", WAYS)
def test_an_item_without_finite_values_spoils_no_gradient(mixture, way):
    exact, theta = mixture.score(sd.VP()), torch.ones((), dtype=f64, requires_grad=True)

    def score(x, t):
        return exact(x, t) * theta * torch.where(x[:, :1] > 20, math.nan, 1.0)

    score.sde = exact.sde
    x = mixture.sample(3, torch.Generator().manual_seed(0))
    grads = []
    for second in (0.0, 21.0):
        x[1] = second
        y = x.clone().requires_grad_()
        out = sd.log_prob(score, y, divergence="exact", differentiable=way)
        loss = out.log_prob[[0, 2]].sum()
        grads.append(torch.autograd.grad(loss, [y, theta]))
    assert out.converged.tolist() == [True, False, True]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_the_evaluations_allowed_are_those_of_the_way_forth():
    score, x = model(), points()
    settings = {"method": "rk4", "steps": 10, "max_nfe": 13}
    plain, out = (sd.log_prob(score, x, differentiable=d, **settings) for d in (False, True))
    assert not out.converged.any()
    assert "used up" in out.message
    assert out.nfe.tolist() == [12] * 3
    assert plain.nfe.tolist() == [13] * 3  # stops within a step


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("settings", [{}, {"method": "vabm", "steps": 5}], ids=str)
def test_the_way_forth_costs_no_more(way, settings):
    score, x, calls = model(), points(), []
    score.register_forward_hook(lambda *_: calls.append(1))
    sd.log_prob(score, x, **settings)
    plain = len(calls)
    calls.clear()
    out = sd.log_prob(score, x, differentiable=way, **settings)
    assert len(calls) == plain
    out.log_prob.sum().backward()
    assert len(calls) > plain


@pytest.mark.parametrize("method", ["scipy-rk45", "torchdiffeq-dopri5"])
def test_methods_that_choose_for_the_batch_take_the_adjoint(mixture, method):
    with pytest.raises(ConfigError, match=f"steps of '{method}' cannot be differentiated"):
        sd.log_prob(mixture.score(sd.VP()), mixture.sample(2), method=method, differentiable=True)


@pytest.mark.parametrize("way", WAYS)
def test_a_score_without_a_graph_is_refused(mixture, way):
    score = mixture.score(sd.VP())

    def detached(x, t):
        return score(x.detach(), t)

    detached.sde = score.sde
    with pytest.raises(ValueError, match="not differentiable in x"):
        sd.log_prob(detached, mixture.sample(2).requires_grad_(), differentiable=way)


def test_a_divergence_of_an_operation_that_cannot_be_batched(mixture):
    """Row by row instead, with the same value and gradient."""

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        def backward(ctx, grad):
            return 2 * ctx.saved_tensors[0] * grad.sum().sign().abs() * grad

    score = mixture.score(sd.VP())

    def other(x, t):
        return score(x, t) + 0.1 * Square.apply(x)

    def same(x, t):
        return score(x, t) + 0.1 * x**2

    other.sde = same.sde = score.sde
    x = mixture.sample(2, torch.Generator().manual_seed(0)).requires_grad_()
    grads = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for this in (other, same):
            out = sd.log_prob(
                this, x, divergence="exact", differentiable=True, method="rk4", steps=3
            )
            grads.append(torch.autograd.grad(out.log_prob.sum(), x)[0])
    torch.testing.assert_close(*grads)
