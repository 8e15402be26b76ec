"""Classifiers of noisy items: what they compute, where they are kept, which scores they fit."""

import dataclasses

import pytest
import torch
from torch import nn

import scoresde as sd
from scoresde import nets
from scoresde.classifier import fits, misfit
from scoresde.config import ConfigError
from scoresde.data import Scaler
from scoresde.files import CheckpointError, read_tensors, write_yaml
from scoresde.nets.adm_classifier import ADMClassifier

SMALL = {"width": 8, "multipliers": (1, 2), "blocks": 1, "head_dim": 8, "groups": None}


def awake(net):
    """The network with no layer left at zero, so that all it is given shows."""
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return net.eval()


def mlp(sde, **fields):
    net = awake(nets.MLPClassifier((2,), num_classes=3, width=16, blocks=1))
    return sd.NoisyClassifier(net, sde, **{"shape": (2,), **fields}).eval()


def points(n=5, dtype=torch.float32):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(1)).to(dtype)


class Told(nn.Module):
    """Logits that are what a network is given: its scaled input and its label."""

    num_classes = 3

    def forward(self, x, c_noise):
        return torch.cat([x, c_noise[:, None].to(x.dtype)], 1)


def test_input_and_label_by_the_formula(sde):
    x, t = points(dtype=torch.float64), torch.tensor([0.9, 0.5, 0.1, 0.02, 0.3]) * sde.t_max
    t = t.double()
    classifier = sd.NoisyClassifier(Told(), sde, sd.Eps(sigma_data=0.7))
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    told = torch.cat(
        [
            x / (0.49 * alpha**2 + sigma**2).sqrt()[:, None],
            ((sigma / alpha).log() / 4)[:, None],
        ],
        1,
    )
    torch.testing.assert_close(classifier.logits(x, t), told)
    log_p = told - told.exp().sum(1, keepdim=True).log()
    torch.testing.assert_close(classifier(x, t), log_p)
    y = torch.tensor([2, 0, 1, 1, 2])
    torch.testing.assert_close(classifier(x, t, y), log_p[torch.arange(5), y])
    torch.testing.assert_close(classifier(x, t, 1), log_p[:, 1])
    none = classifier(x, t, torch.tensor([3, 0, 3, 3, 2]))
    assert (none == 0).tolist() == [True, False, True, True, False]


def test_any_form_of_time(sde):
    classifier, x = mlp(sde), points()
    t = sde.t_min + 0.4 * (sde.t_max - sde.t_min)
    expected = classifier(x, torch.full((5,), t, dtype=torch.float64))
    for form in (t, torch.tensor(t, dtype=torch.float64), torch.full((5, 1), t).double()):
        torch.testing.assert_close(classifier(x, form), expected)
    assert expected.shape == (5, 3)
    torch.testing.assert_close(expected.exp().sum(1), torch.ones(5))
    assert not torch.allclose(classifier(x, 0.9 * sde.t_max), expected)
    # A sample's result is its own.
    torch.testing.assert_close(classifier(x[2:3], t), expected[2:3])
    with pytest.raises(ValueError, match="holds 2 classes for 5 items"):
        classifier(x, t, torch.tensor([0, 1]))


def test_clean_items_are_those_of_the_smallest_time(sde):
    classifier, x = mlp(sde), points()
    assert torch.equal(classifier(x, 0.0), classifier(x, sde.t_min))
    mixed = classifier(x, torch.tensor([0.0, 0.5, 0.0, 0.5, 0.5]).double())
    assert mixed.isfinite().all()
    torch.testing.assert_close(mixed[0], classifier(x, sde.t_min)[0])
    torch.testing.assert_close(mixed[1], classifier(x, 0.5)[1])


def test_its_gradient_is_that_of_its_log_probability():
    sde = sd.VE()
    classifier = mlp(sde).double()
    x, t, y = 3 * points(dtype=torch.float64), torch.tensor(0.5), torch.tensor([0, 1, 2, 0, 1])
    x.requires_grad_()
    (slope,) = torch.autograd.grad(classifier(x, t, y).sum(), x)
    for axis in range(2):
        step = 1e-6 * torch.eye(2, dtype=torch.float64)[axis]
        with torch.no_grad():
            numeric = (classifier(x + step, t, y) - classifier(x - step, t, y)) / 2e-6
        torch.testing.assert_close(slope[:, axis], numeric, rtol=1e-5, atol=1e-8)
    assert slope.abs().max() > 1e-3


@pytest.mark.parametrize("shape", [(1, 28, 28), (2, 13), (1, 5, 6, 3)])
@pytest.mark.parametrize("pool", ["adaptive", "attention", "spatial"])
def test_sizes_that_do_not_halve_are_padded(shape, pool):
    fields = {**SMALL, "multipliers": (1, 1, 2), "attention": (2,), "pool": pool}
    net = awake(ADMClassifier(shape, num_classes=4, **fields))
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    c = torch.tensor([-0.3, 0.4])
    before = [(-size % 4) // 2 for size in shape[1:]]
    whole = [size + -size % 4 for size in shape[1:]]
    larger = torch.zeros(2, shape[0], *whole)
    inside = tuple(slice(b, b + s) for b, s in zip(before, shape[1:], strict=True))
    larger[(slice(None), slice(None), *inside)] = x
    wide = ADMClassifier((shape[0], *whole), num_classes=4, **fields).eval()
    wide.load_state_dict(net.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(net(x, c), wide(larger, c))


@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_presets(preset):
    for kind, shape in ((ADMClassifier, (1, 28, 28)), (nets.MLPClassifier, (3,))):
        net = kind(shape, num_classes=5, **kind.presets[preset])
        with torch.no_grad():
            assert net(torch.randn(2, *shape), torch.zeros(2)).shape == (2, 5)
            half = net.bfloat16()
            classifier = sd.NoisyClassifier(half, sd.VP(), shape=shape)
            assert classifier(torch.randn(2, *shape), 0.5).dtype == torch.float32


def test_every_part_of_the_perceptron_counts():
    net = awake(nets.MLPClassifier((3,), num_classes=4, width=16, blocks=2))
    x, c = torch.randn(6, 3), torch.linspace(-1, 1, 6)
    net(x, c).square().sum().backward()
    assert [k for k, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []
    untrained = nets.MLPClassifier((3,), num_classes=4)
    assert not untrained(x, c).any()  # all classes alike
    with pytest.raises(ValueError, match=r"vectors of shape \(D,\), not \(1, 8\)"):
        nets.MLPClassifier((1, 8))
    with pytest.raises(ValueError, match="needs classes, num_classes=0"):
        nets.MLPClassifier((3,), num_classes=0)
    with pytest.raises(ValueError, match="does not fit a classifier"):
        net(torch.randn(6, 2), c)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    scaler = Scaler((1.0, 2.0), (0.5, 3.0))
    label = sd.noise_labels.Time(sd.VP(), 999.0)
    sde = sd.SubVP(beta_max=15.0)
    saved = mlp(
        sde,
        parameterization=sd.Eps(sigma_data=0.6, label=label),
        scaler=scaler,
        class_names=("a", "b", "c"),
        weights="ema",
    )
    saved.save(tmp_path / "it")
    found = sd.load_classifier(tmp_path / "it")
    assert sorted(p.name for p in (tmp_path / "it").iterdir()) == [
        "config.yaml", "model.safetensors",
    ]  # fmt: skip
    assert isinstance(found, sd.NoisyClassifier)
    assert not found.training
    assert (found.sde, found.scaler, found.shape) == (sde, scaler, (2,))
    assert (found.class_names, found.num_classes, found.weights) == (("a", "b", "c"), 3, "ema")
    assert torch.equal(found(points(), 0.3), saved(points(), 0.3))


def test_classifiers_and_scores_are_told_apart(tmp_path):
    mlp(sd.VP()).save(tmp_path / "classifier")
    sd.ScoreModel(nets.MLP((2,), width=8), sd.VP(), sd.Eps(), shape=(2,)).save(tmp_path / "score")
    with pytest.raises(CheckpointError, match="holds a classifier of noisy items: use load_class"):
        sd.load(tmp_path / "classifier")
    with pytest.raises(CheckpointError, match="holds no classifier but a score model: use load"):
        sd.load_classifier(tmp_path / "score")
    with pytest.raises(CheckpointError, match="no model at"):
        sd.load_classifier(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="unknown weights 'best'"):
        sd.load_classifier(tmp_path / "classifier", weights="best")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="is a training run"):
        mlp(sd.VP()).save(tmp_path / "run")


@pytest.mark.parametrize(
    ("section", "said"),
    [
        (None, "does not say num_classes"),
        ({"num_classes": "3"}, "does not say num_classes"),
        ({"num_classes": 4}, "has 4 classes, its network 3"),
        ({"num_classes": 3, "class_names": 7}, "class_names is 7; accepted: a list"),
    ],
)
def test_what_describes_no_classifier_is_refused(tmp_path, section, said):
    mlp(sd.VP()).save(tmp_path)
    description = sd.config.read_yaml(tmp_path / "config.yaml")
    write_yaml(tmp_path / "config.yaml", {**description, "classifier": section})
    with pytest.raises(CheckpointError, match=said):
        sd.load_classifier(tmp_path)


def test_weights_that_do_not_fit_are_named(tmp_path):
    mlp(sd.VP()).save(tmp_path)
    description = sd.config.read_yaml(tmp_path / "config.yaml")
    description["net"]["width"] = 24
    write_yaml(tmp_path / "config.yaml", description)
    with pytest.raises(CheckpointError, match="does not fit the network"):
        sd.load_classifier(tmp_path)
    assert "out.weight" in read_tensors(tmp_path / "model.safetensors")


def score(sde, shape=(2,), scaler=None):
    net = nets.MLP(shape, width=8, blocks=1)
    return sd.ScoreModel(net, sde, sd.Eps(), shape=shape, scaler=scaler)


def test_a_classifier_fits_scores_of_its_process_and_range():
    scaler = Scaler((1.0, 2.0), (0.5, 3.0))
    classifier = mlp(sd.VP(), scaler=scaler)
    fits(score(sd.VP(), scaler=scaler), classifier)
    fits(score(sd.VP(t_min=1e-3, t_min_likelihood=1e-3), scaler=scaler), classifier)
    fits(score(sd.DDPM(), scaler=scaler), classifier)  # the chain that VP is the limit of
    fits(sd.Threshold(score(sd.VP(), scaler=scaler)), classifier)
    fits(score(sd.VP()), lambda x, t, y: x)  # says nothing of itself
    near = dataclasses.replace(scaler, shift=(1.001, 2.0))
    fits(score(sd.VP(), scaler=near), classifier)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (score(sd.VE()), r"of the process VP\(.*the score of VE\("),
        (score(sd.VP(beta_max=18.0)), r"the score of VP\(.*beta_max=18.0"),
        (score(sd.Cosine()), "the score of Cosine"),
        (score(sd.SubVP()), "the score of SubVP"),  # of the same alpha
        (score(sd.VE(sigma_max=40.0)), "the score of VE"),
        (score(sd.VP(), scaler=Scaler((1.0, 2.0), (0.5, 3.3))), "is of data scaled by Scaler"),
        (score(sd.VP(), scaler=Scaler((1.0, 2.1), (0.5, 3.0))), "is of data scaled by Scaler"),
        (score(sd.VP(), shape=(3,), scaler=Scaler()), r"of items of shape \(2,\), the score"),
    ],
)
def test_other_scores_are_refused_in_one_line(other, said):
    classifier = mlp(sd.VP(), scaler=Scaler((1.0, 2.0), (0.5, 3.0)))
    with pytest.raises(ConfigError, match=said) as error:
        fits(other, classifier)
    assert "\n" not in str(error.value)
    assert misfit(other, classifier) in str(error.value)
