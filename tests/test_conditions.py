"""Conditions that a network does not use are refused, and none is accused that may yet learn."""

import pytest
import torch
from torch import nn

import scoresde as sd
from scoresde import conditions
from scoresde.conditions import check_used, classes_of, randomize
from scoresde.guidance import Autoguidance, Classifier, ClassifierFree, Energy

IMAGE = (2, 8, 8)
SMALL = {"width": 16, "multipliers": (1,), "blocks": 1}
NETS = {
    "mlp": lambda k: sd.nets.MLP((3,), width=16, blocks=1, num_classes=k),
    "unet": lambda k: sd.nets.UNet(IMAGE, num_classes=k, **SMALL),
    "ncsnpp": lambda k: sd.nets.NCSNpp(IMAGE, num_classes=k, **SMALL),
    "adm": lambda k: sd.nets.ADM(IMAGE, num_classes=k, **{**SMALL, "width": 32}),
    "ddpm": lambda k: sd.nets.DDPMUNet(
        IMAGE, widths=(16,), blocks=1, groups=8, attention=(), num_classes=k
    ),
    "edm2": lambda k: sd.nets.EDM2(IMAGE, head_dim=32, num_classes=k, **{**SMALL, "width": 32}),
    "dit": lambda k: sd.nets.DiT(IMAGE, patch=4, width=32, depth=1, heads=2, num_classes=k),
}


def model_of(name, classes, trained):
    net = NETS[name](classes)
    if trained:
        randomize(net)
    return sd.ScoreModel(net, sd.VP(), sd.V(), shape=tuple(net.shape))


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("trained", [False, True])
def test_networks_with_classes_are_believed_and_those_without_refused(name, trained):
    y = torch.tensor([1, 0, 2])
    model = model_of(name, 3, trained)
    out = sd.sample(model, (3, *model.shape), steps=1, solver="ddim", y=y)
    assert out.x.isfinite().all()
    for classes in (None, 1):
        plain = model_of(name, classes, trained)
        zeros = torch.zeros_like(y)
        if classes:
            check_used(plain, {"y": zeros}, out.x)
            continue
        with pytest.raises(ValueError, match=r"y'? is given") as refused:
            sd.sample(plain, (3, *plain.shape), steps=1, solver="ddim", y=zeros)
        assert "classes" in str(refused.value)
        assert "\n" not in str(refused.value)


class Net(nn.Module):
    """``a tanh(x) + b y + c image``, which counts its calls."""

    def __init__(self, a=1.0, b=0.0, c=0.0):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([a]))
        self.b, self.c = b, c
        self.modes, self.rows = [], []

    def forward(self, x, c_noise, y=None, image=None):
        self.modes.append(self.training)
        self.rows.append(len(x))
        out = self.a * torch.tanh(x)
        out = out if y is None else out + self.b * y.reshape(len(x), -1).sum(1)[:, None]
        return out if image is None else out + self.c * image.flatten(1).sum(1)[:, None]


def plain(**settings):
    return sd.ScoreModel(Net(**settings), sd.VP(), sd.Eps(), shape=(2,))


Y = torch.tensor([0, 1, 2, 0])


def test_a_batch_without_classes_is_asked_with_one():
    for y in ([3, 3], [3, 0], [2, 2]):  # 3 stands for none
        check_used(model_of("mlp", 3, True), {"y": torch.tensor(y)}, torch.zeros(2, 3))


def test_asked_once_for_each_condition_of_a_score():
    model = plain(b=1.0, c=1.0).train()
    x, image = torch.zeros(4, 2), torch.ones(4, 3)
    for cond, calls in (({"y": Y}, 2), ({"y": Y}, 0), ({"y": Y, "image": image}, 2),
                        ({"image": image}, 0), ({}, 0)):  # fmt: skip
        check_used(model, cond, x)
        assert model.net.rows == [2] * calls
        model.net.rows.clear()
    assert set(model.net.modes) == {False}
    assert model.training
    check_used(plain(b=1.0), {"y": Y}, x[:1])
    fresh = plain(b=1.0)
    check_used(fresh, {"y": Y[:1]}, x[:1])
    assert fresh.net.rows == [1, 1]


@pytest.mark.parametrize(
    "y",
    [
        torch.tensor([0, 0]),
        torch.tensor([[0.0, 1.0], [0.5, 0.0]]),
        torch.tensor([0.3, 7.0]),
        torch.tensor([True, False]),
        torch.tensor([[1, 2, 4], [3, 4, 6]]).double(),
    ],
)
def test_values_of_every_kind(y):
    x = torch.zeros(2, 2)
    check_used(plain(b=1.0), {"y": y}, x)
    with pytest.raises(ValueError, match="'y' is given, but the output of the network Net does"):
        check_used(plain(), {"y": y}, x)


def test_every_entry_asks():
    x = torch.zeros(4, 2)
    for entry in (
        lambda s, **c: sd.sample(s, (4, 2), steps=2, **c),
        lambda s, **c: sd.sample(s, (4, 2), steps=2, threshold="static", **c),
        lambda s, **c: sd.encode(s, x, solver="heun", steps=2, **c),
        lambda s, **c: sd.decode(s, x, solver="heun", steps=2, **c),
        lambda s, **c: sd.log_prob(s, x, method="euler", steps=2, **c),
        lambda s, **c: sd.log_prob(s, x, method="euler", steps=2, differentiable=True, **c),
    ):
        with pytest.raises(ValueError, match="output of the network Net does not depend on it"):
            entry(plain(), y=Y)
        with pytest.raises(ValueError, match="Net takes no condition 'extra'; it takes y, image"):
            entry(plain(b=1.0), y=Y, extra=Y)
        entry(plain(b=1.0), y=Y)


def test_wrappers_ask_what_they_wrap():
    used, ignored, image = plain(b=1.0), plain(c=1.0), torch.ones(4, 3)
    energy, classifier = (lambda x0, target: x0.sum(1)), (lambda x, t, y: x.sum(1))

    def takes(score, **cond):
        try:
            sd.sample(score, (4, 2), steps=1, solver="ddim", **cond)
        except ValueError as error:
            return "does not depend on it" not in str(error)
        return True

    assert takes(ClassifierFree(used, 2.0), y=Y)
    assert not takes(ClassifierFree(ignored, 2.0), y=Y)
    assert takes(ClassifierFree(used, 2.0, unconditional=ignored), y=Y)
    both = plain(b=1.0, c=1.0)
    assert takes(ClassifierFree(both, 2.0, drop=("y",), unconditional=ignored), y=Y, image=image)
    assert not takes(ClassifierFree(both, 2.0, drop=("y",), unconditional=used), y=Y, image=image)
    assert takes(Autoguidance(used, plain(b=2.0), 2.0), y=Y)
    assert not takes(Autoguidance(used, ignored, 2.0), y=Y)
    assert takes(Classifier(ignored, classifier), y=Y)
    assert not takes(Classifier(ignored, classifier, conditional=True), y=Y)
    assert takes(Energy(used, energy), y=Y, target=Y)
    assert not takes(Energy(ignored, energy), y=Y, target=Y)
    assert not takes(sd.Threshold(ClassifierFree(ignored, 2.0), "static"), y=Y)


def test_closed_forms_are_not_asked():
    calls = []

    class Plain(sd.Score):
        sde = sd.VP()

        def __call__(self, x, t, **cond):
            calls.append(cond)
            return -x

    check_used(Plain(), {"mode": "a", "y": Y}, torch.zeros(4, 2))
    assert not calls
    check_used(plain(b=1.0), {"y": None}, torch.zeros(4, 2))


def test_what_is_not_learned_yet_is_asked_again():
    model = model_of("mlp", 3, False)
    x = torch.zeros(3, 3)
    before = {k: v.clone() for k, v in model.net.state_dict().items()}
    check_used(model, {"y": Y[:3]}, x)
    assert "y" not in conditions._SEEN[model]
    assert all(torch.equal(v, before[k]) for k, v in model.net.state_dict().items())
    randomize(model.net)
    check_used(model, {"y": Y[:3]}, x)
    assert "y" in conditions._SEEN[model]


def test_training_refuses_a_network_that_ignores_its_classes(tmp_path):
    from scoresde.training.job import try_network

    class Deaf(Net):
        num_classes = 3

    model = sd.ScoreModel(Deaf(), sd.VP(), sd.Eps(), shape=(2,))
    with pytest.raises(sd.ConfigError, match="net does not take the data: the condition 'y'"):
        try_network(model, 3, torch.device("cpu"))
    for name in NETS:
        try_network(model_of(name, 3, False), 3, torch.device("cpu"))


@pytest.mark.parametrize("name", ["unet", "mlp", "ncsnpp"])
def test_images_of_an_untrained_network(name):
    shape = (3,) if name == "mlp" else IMAGE
    settings = {"mlp": {"width": 16}, "unet": SMALL, "ncsnpp": SMALL}[name]
    cls = {"mlp": sd.nets.MLP, "unet": sd.nets.UNet, "ncsnpp": sd.nets.NCSNpp}[name]
    model = sd.ScoreModel(cls(shape, image_channels=2, **settings), sd.VP(), sd.V(), shape=shape)
    check_used(model, {"image": torch.ones(2, 2, *shape[1:])}, torch.zeros(2, *shape))
    one = torch.ones(1, 2, *shape[1:])  # of one row, which stands for all
    conditions._SEEN.clear()
    check_used(model, {"image": one}, torch.zeros(2, *shape))
    without = sd.ScoreModel(cls(shape, **settings), sd.VP(), sd.V(), shape=shape)
    with pytest.raises(ValueError, match="image"):
        check_used(without, {"image": torch.ones(2, 2, *shape[1:])}, torch.zeros(2, *shape))


def test_how_many_classes():
    model = model_of("mlp", 3, False)
    assert classes_of(model) == 3
    assert classes_of(sd.Threshold(ClassifierFree(model), "static")) == 3
    assert classes_of(model_of("mlp", None, False)) is None
    assert classes_of(lambda x, t: x) is None
