"""Classifier-free guidance against closed forms, and what it asks of networks."""

import math

import pytest
import torch
from counted import Counted, Net, f64, labelled, network, states, times

import scoresde as sd
from scoresde.conditions import randomize
from scoresde.guidance import ClassifierFree
from scoresde.model import cost


def tilted(mixture, sde, x, t, y, scale):
    """The score of ``p(x_t)^(1 - scale) p(x_t | y)^scale``, from the densities."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        log = (1 - scale) * mixture.log_prob(x, sde, t) + scale * mixture.log_prob(x, sde, t, y)
        return torch.autograd.grad(log.sum(), x)[0]


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5, 1.0, 2.0, 7.5])
def test_the_score_of_the_product_of_powers(sde, scale):
    mixture = labelled()
    score = ClassifierFree(mixture.score(sde), scale)
    for t in times(sde):
        x, y = states(mixture, sde, t)
        truth = tilted(mixture, sde, x, t, y, scale)
        torch.testing.assert_close(score(x, t, y=y), truth, rtol=1e-9, atol=1e-9)


def test_in_float32_to_its_rounding():
    sde, mixture = sd.VP(), labelled()
    single = ClassifierFree(labelled(dtype=torch.float32).score(sde), 3.0)
    double = ClassifierFree(mixture.score(sde), 3.0)
    for t in (1e-3, 0.1, 0.5, 1.0):
        x, y = states(mixture, sde, t)
        found, truth = single(x.float(), t, y=y), double(x.float().double(), t, y=y)
        assert (found - truth).abs().max() / truth.abs().max() < 1e-5


def test_one_row_of_a_condition_stands_for_all():
    score = ClassifierFree(network(), 3.0)
    x = torch.randn(4, *score.shape)
    with torch.no_grad():
        found = score(x, 0.4, y=torch.tensor([2]))
        assert torch.equal(found, score(x, 0.4, y=torch.full((4,), 2)))


def test_scale_one_is_the_conditional_score_and_zero_the_other():
    sde, mixture = sd.VP(), labelled()
    inner = Counted(mixture.score(sde))
    x, y = states(mixture, sde, 0.4)
    for scale, cond in ((1.0, {"y": y}), (0.0, {})):
        score = ClassifierFree(inner, scale, rescale=0.7)
        assert torch.equal(score(x, 0.4, y=y), mixture.score(sde)(x, 0.4, **cond))
        assert inner.rows() == [6]
        assert score.cost(torch.tensor(0.4)) == (1, 0)


def test_guidance_in_an_interval_of_noise_levels():
    sde, mixture = sd.VP(), labelled()
    inner = Counted(mixture.score(sde))
    low, high = 0.3, 2.0
    score, always = (
        ClassifierFree(inner, 3.0, (low, high)),
        ClassifierFree(mixture.score(sde), 3.0),
    )
    for q, within in ((0.29, False), (0.31, True), (1.99, True), (2.01, False)):
        t = sde.time(torch.tensor(-math.log(q), dtype=f64))
        assert float(sde.sigma(t) / sde.alpha(t)) == pytest.approx(q)
        x, y = states(mixture, sde, t)
        found = score(x, t, y=y)
        assert score.cost(t).forwards == sum(inner.rows()) / len(x) == 1 + within
        wanted = always(x, t, y=y) if within else mixture.score(sde)(x, t, y=y)
        assert torch.equal(found, wanted)
    edge = sd.EDM()  # sigma = t: the levels are exact, the upper end belongs to the interval
    score = ClassifierFree(mixture.score(edge), 3.0, (0.5, 2.0))
    assert [score.cost(torch.tensor(t, dtype=f64)).forwards for t in (0.5, 2.0)] == [1, 2]


def test_times_of_each_sample():
    sde, mixture = sd.VP(), labelled()
    inner = Counted(mixture.score(sde))
    t = torch.tensor([0.02, 0.2, 0.5, 0.9], dtype=f64)  # q of 0.05, 0.58, 3.4 and 57
    x, y = states(mixture, sde, t, 4)
    for interval, calls in (((0.1, 5.0), [8]), ((60.0, 70.0), [4]), (None, [8])):
        score = ClassifierFree(inner, 3.0, interval)
        whole = score(x, t, y=y)
        assert inner.rows() == calls
        assert score.cost(t).forwards == calls[0] / 4
        shaped = score(x, t.reshape(4, 1), y=y)
        assert torch.equal(shaped, whole)
        alone = torch.cat([score(x[i : i + 1], t[i], y=y[i : i + 1]) for i in range(4)])
        torch.testing.assert_close(whole, alone, rtol=1e-12, atol=1e-12)
        inner.calls.clear()


# --- what stands for no condition -------------------------------------------------------------

NETS = {
    "mlp": lambda: sd.nets.MLP((3,), width=16, blocks=1, num_classes=4),
    "unet": lambda: sd.nets.UNet((2, 8, 8), width=16, multipliers=(1,), blocks=1, num_classes=4),
    "dit": lambda: sd.nets.DiT((2, 8, 8), patch=4, width=32, depth=1, heads=2, num_classes=4),
    "ncsnpp": lambda: sd.nets.NCSNpp(
        (2, 8, 8), width=16, multipliers=(1,), blocks=1, num_classes=4
    ),
    "adm": lambda: sd.nets.ADM((2, 8, 8), width=32, multipliers=(1,), blocks=1, num_classes=4),
}


@pytest.mark.parametrize("name", NETS)
def test_both_branches_in_one_batch(name):
    net = NETS[name]()
    randomize(net)
    model = sd.ScoreModel(net, sd.VP(), sd.V()).eval()
    rows = []
    net.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    x = torch.randn(3, *net.shape, generator=torch.Generator().manual_seed(0))
    y, t = torch.tensor([0, 3, 2]), torch.tensor([0.1, 0.5, 0.9])
    plain, free = model(x, t, y=y), model(x, t)
    assert (plain - free).flatten(1).norm(dim=1).min() > 1e-4
    rows.clear()
    with torch.no_grad():
        found = ClassifierFree(model, 2.5)(x, t, y=y)
        assert rows == [6]
        apart = ClassifierFree(model, 2.5, null={"y": None})(x, t, y=y)
        assert rows == [6, 3, 3]
    for each in (found, apart):
        torch.testing.assert_close(each, free + 2.5 * (plain - free), rtol=1e-4, atol=1e-4)


class Told(sd.Score):
    """A score that is a known function of its conditions."""

    def __init__(self, sde, **usual):
        self.sde, self.usual, self.calls = sde, usual, []

    def __call__(self, x, t, vector=None, image=None, text=None, level=None):
        given = {"vector": vector, "image": image, "text": text, "level": level}
        self.calls.append((len(x), {k for k, v in given.items() if v is not None}))
        out = x * 0.1
        out = out if vector is None else out + vector.sum(1)[:, None]
        out = out if image is None else out + 100 * image.flatten(1).sum(1)[:, None]
        out = out if level is None else out + 1e4 * level[:, None]
        return out if text is None else out + len(text)


def test_which_conditions_are_dropped_and_by_what():
    inner = Told(sd.VP())
    x, vector, image = torch.zeros(2, 3), torch.ones(2, 2), torch.full((2, 1, 2), 2.0)
    cond = {"vector": vector, "image": image}

    def guided(scale=3.0, extra=None, **settings):
        inner.calls.clear()
        return float(
            ClassifierFree(inner, scale, **settings)(x, 0.5, **{**cond, **(extra or {})})[0, 0]
        )

    assert guided() == 3 * 402
    assert inner.calls == [(4, {"vector", "image"})]
    assert guided(drop=("vector",)) == 400 + 3 * 2
    assert guided(drop=("image", "absent")) == 2 + 3 * 400
    assert guided(drop="image") == 2 + 3 * 400
    assert inner.calls == [(4, {"vector", "image"})]
    assert guided(null={"vector": -0.5}) == -1 + 3 * 403
    assert guided(null={"vector": torch.tensor([0.0, 0.5]), "image": 1.0}) == 200.5 + 3 * 201.5
    assert guided(null={"image": None}) == 3 * 402
    assert inner.calls == [(2, {"vector", "image"}), (2, {"vector"})]
    # What has no value for none is left out: then each branch is an evaluation of its own.
    assert guided(extra={"text": "four"}) == 3 * 406
    assert inner.calls == [(2, {"vector", "image", "text"}), (2, {"vector", "image"})]
    assert guided(extra={"text": "four"}, drop=("vector",)) == 404 + 3 * 2
    assert inner.calls == [(4, {"vector", "image", "text"})]
    assert guided(extra={"level": torch.ones(2)}, drop=("level",)) == 402 + 3e4
    assert inner.calls == [(2, {"vector", "image", "level"}), (2, {"vector", "image"})]


def test_an_unconditional_score_of_its_own():
    sde, mixture = sd.VP(), labelled()
    plain = Counted(mixture.mixture.score(sde))
    score = ClassifierFree(Counted(mixture.score(sde)), 2.0, unconditional=plain)
    x, y = states(mixture, sde, 0.3)
    found = score(x, 0.3, y=y)
    torch.testing.assert_close(found, ClassifierFree(mixture.score(sde), 2.0)(x, 0.3, y=y))
    assert plain.calls[0][1] == {}
    assert score.cost(torch.tensor(0.3)) == (2, 0)
    kept = Told(sde)
    score = ClassifierFree(Told(sde), 2.0, drop=("image",), unconditional=kept)
    score(x, 0.3, vector=torch.ones(6, 2), image=torch.ones(6, 1))
    assert kept.calls == [(6, {"vector"})]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": math.nan}, "ClassifierFree needs a finite scale, got nan"),
        ({"scale": "much"}, "finite scale, got 'much'"),
        ({"interval": (2.0, 1.0)}, r"0 <= low < high, got \(2.0, 1.0\)"),
        ({"interval": (-1.0, 1.0)}, "0 <= low < high"),
        ({"interval": 3.0}, "interval"),
        ({"interval": (0.1, math.nan)}, "0 <= low < high"),
        ({"rescale": 1.5}, r"rescale in \[0, 1\], got 1.5"),
        (
            {"unconditional": labelled().score(sd.VE())},
            "the unconditional score is of the process",
        ),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(sd.ConfigError, match=message):
        ClassifierFree(labelled().score(sd.VP()), **settings)


def test_nothing_to_drop_is_refused():
    score = labelled().score(sd.VP())
    x = torch.zeros(2, 2, dtype=f64)
    with pytest.raises(ValueError, match="needs a condition to drop, and none is given"):
        ClassifierFree(score, 2.0)(x, 0.5)
    with pytest.raises(ValueError, match="needs one of image, text to drop"):
        ClassifierFree(score, 2.0, drop=("image", "text"))(x, 0.5, y=torch.tensor([0, 1]))
    assert torch.equal(ClassifierFree(score, 1.0)(x, 0.5), score(x, 0.5))


# --- readings, rescaling, the variance --------------------------------------------------------


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_readings_are_of_one_score(sde, rescale):
    model = network(sde).double()
    score = ClassifierFree(model, 3.0, rescale=rescale)
    x, y = (
        torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=f64),
        torch.arange(4),
    )
    for t in times(sde)[1:-1]:
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        plain = score(x, t, y=y)
        torch.testing.assert_close(score.noise(x, t, y=y), -sigma * plain, rtol=1e-5, atol=1e-6)
        x0 = (x + sigma**2 * plain) / alpha
        torch.testing.assert_close(score.denoise(x, t, y=y), x0, rtol=1e-5, atol=1e-5)


def test_rescaling_keeps_the_size_of_v():
    model, phi = network().double(), 0.6
    x, y = (
        torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=f64),
        torch.arange(4),
    )
    alpha, sigma = model.sde.alpha(0.4), model.sde.sigma(0.4)

    def v(score):
        return alpha * score.noise(x, 0.4, y=y) - sigma * score.denoise(x, 0.4, y=y)

    before, after = (v(ClassifierFree(model, 6.0, rescale=r)) for r in (0.0, phi))
    sizes = v(model).std(1) / before.std(1)
    assert (sizes < 0.7).any()
    torch.testing.assert_close(after, before * (1 - phi + phi * sizes)[:, None])
    # In other processes it is the v of the state in unit variance, a function of the noise level.
    other = network(sd.EDM()).double()
    other.net = model.net
    other.parameterization = model.parameterization = sd.Karras(sigma_data=1.0)
    t = other.sde.time(model.sde.log_snr(0.4))
    same = ClassifierFree(other, 6.0, rescale=phi).denoise(x / alpha, t, y=y)
    wanted = ClassifierFree(model, 6.0, rescale=phi).denoise(x, 0.4, y=y)
    torch.testing.assert_close(same, wanted, rtol=1e-5, atol=1e-5)


def test_a_learned_variance_is_the_conditional_one():
    class Wide(Net):
        def forward(self, x, c_noise, y=None):
            h = super().forward(x[:, :, 0], c_noise, y)
            return h.reshape(len(x), 6, 1)

    model = sd.ScoreModel(Wide(out=6), sd.VP(), sd.V(), shape=(3, 1)).eval()
    x, y = torch.randn(4, 3, 1, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    score = ClassifierFree(model, 3.0)
    (eps, v), (plain, its) = (s.noise_and_variance(x, 0.4, y=y) for s in (score, model))
    free, other = model.noise_and_variance(x, 0.4)
    torch.testing.assert_close(eps, free + 3 * (plain - free))
    torch.testing.assert_close(v, its)
    assert (its - other).abs().max() > 0.01
    out = sd.sample(
        score, (4, 3, 1), solver={"name": "ancestral", "variance": "learned"}, steps=5, y=y
    )
    assert out.converged
    assert (out.nfe, out.cost) == (6, (12, 0))


# --- with solvers and likelihoods -------------------------------------------------------------


@pytest.mark.parametrize("solver", ["ancestral", "dpmpp-3m", "heun", "runge-kutta"])
@pytest.mark.parametrize("threshold", [None, "static"])
def test_samples_by_every_kind_of_solver(solver, threshold):
    model, interval = network().double(), (0.2, 5.0)
    model.train()
    score = ClassifierFree(model, 2.0, interval, rescale=0.5)
    y = torch.tensor([0, 1, 2, 3])
    settings = {"solver": solver, "threshold": threshold, "seed": 3}
    if solver != "runge-kutta":
        settings["steps"] = 12
    sd.sample(score, (1, 3), y=y[:1], **settings)  # has asked whether the condition is used
    model.net.rows.clear()
    out = sd.sample(score, (4, 3), y=y, **settings)
    assert out.converged
    assert model.training
    assert model.net.modes == {False}
    assert out.weights == "ema"
    if solver != "runge-kutta":
        assert out.cost.products == 0
        assert out.cost.forwards * 4 == sum(model.net.rows)
        assert out.nfe < out.cost.forwards < 2 * out.nfe
    elif threshold is None:
        rows = sum(model.net.rows)
        assert out.nfe.sum() < rows < 2 * out.nfe.sum()
    alone = sd.sample(score, (1, 3), y=y[2:3], start_index=2, **settings)
    torch.testing.assert_close(alone.x, out.x[2:3], rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        again = sd.sample(score, (4, 3), y=y.clone(), **settings)
    assert torch.equal(again.x, out.x)


def test_the_density_of_guided_samples_is_normalised():
    sde, mixture = sd.VP(), labelled(dims=1)
    grid = torch.linspace(-6, 6, 241, dtype=f64)[:, None]
    for scale, interval in ((1.0, None), (2.5, None), (2.5, (0.2, 3.0))):
        score = ClassifierFree(mixture.score(sde), scale, interval)
        y = torch.ones(len(grid), dtype=torch.long)
        out = sd.log_prob(score, grid, y=y, divergence="exact", rtol=1e-7, atol=1e-7)
        density = out.log_prob.exp()
        assert float(density.sum() * 0.05) == pytest.approx(1.0, abs=2e-3)
        if scale == 1:
            plain = sd.log_prob(mixture.score(sde), grid, y=y, rtol=1e-7, atol=1e-7,
                                divergence="exact")  # fmt: skip
            assert torch.equal(out.log_prob, plain.log_prob)


def test_gradients_reach_the_weights_through_both_branches():
    model = network().double()
    score, x, y = ClassifierFree(model, 3.0), torch.randn(2, 3, dtype=f64), torch.tensor([0, 1])
    score(x, 0.5, y=y).sum().backward()
    found = model.net.table.weight.grad
    assert (found[[0, 1, 4]].abs().sum(1) > 0).all()  # the classes, and the one for none
    assert (found[[2, 3]] == 0).all()


def test_what_a_score_between_takes_is_not_dropped():
    sde, mixture = sd.VP(), labelled()
    seen = []

    def energy(x0, target):
        seen.append(target)
        return -((target - x0) ** 2).sum(1)

    x, y = states(mixture, sde, 0.4)
    target = torch.ones(6, 2, dtype=f64)
    score = ClassifierFree(sd.guidance.Energy(mixture.score(sde), energy), 2.0)
    score(x, 0.4, y=y, target=target)
    assert torch.equal(seen[0], torch.cat([target, target]))
    with pytest.raises(ValueError, match="needs a condition to drop"):
        score(x, 0.4, target=target)


def test_what_it_wraps_shows_through():
    model = network()
    score = ClassifierFree(model, 2.0)
    assert (score.sde, score.shape, score.weights) == (model.sde, (3,), "ema")
    twice = sd.guidance.Autoguidance(score, model, 2.0)
    assert cost(twice, torch.tensor(0.5)) == (3, 0)
