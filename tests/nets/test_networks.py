import pytest
import torch
from torch import nn

import scoresde as sd
from scoresde import files, saved_steps
from scoresde.model import evaluating
from scoresde.nets import MLP, UNet
from scoresde.nets.embed import ClassEmbedding, NoiseEmbedding, fourier_features
from scoresde.training import Trainer, prepare


def awake(net: nn.Module) -> nn.Module:
    """The network with no layer left at zero, so that every path shows in the output."""
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        if parameter.ndim > 1 and not parameter.any():
            parameter.data.normal_(0, 0.1, generator=generator)
    return net.eval()


@pytest.mark.parametrize(
    "shape", [(2, 16), (1, 13), (1, 8, 8), (3, 9, 14), (4, 7, 7), (2, 4, 6, 5)], ids=str
)
def test_unet_keeps_any_shape(shape):
    net = awake(UNet(shape, width=16, multipliers=(1, 2), blocks=1, attention=(1,)))
    x = torch.randn(3, *shape)
    out = net(x, torch.zeros(3))
    assert out.shape == x.shape
    assert out.std() > 0


@pytest.mark.parametrize("axis", [1, 2])
def test_padding_is_cropped_to_the_right_place(axis):
    """A network on a padded item sees what it sees on the item embedded in zeros by hand."""
    net = awake(UNet((1, 8, 8), width=16, multipliers=(1, 2, 2), blocks=1, attention=()))
    x = torch.randn(2, 1, 7, 5)
    by_hand = torch.zeros(2, 1, 8, 8)
    by_hand[:, :, 0:7, 1:6] = x
    inside = net(by_hand, torch.zeros(2))[:, :, 0:7, 1:6]
    torch.testing.assert_close(net(x, torch.zeros(2)), inside)


@pytest.mark.parametrize("make", [lambda k: UNet((1, 8, 8), 16, (1, 2), 1, (1,), num_classes=k),
                                  lambda k: MLP((5,), num_classes=k)])  # fmt: skip
def test_conditions_reach_the_output(make):
    net = awake(make(3))
    x = torch.randn(2, *net.shape)
    low, high = net(x, torch.full((2,), -1.0)), net(x, torch.full((2,), -0.98))
    assert (low - high).abs().max() > 1e-5
    y = torch.tensor([0, 2])
    one_hot = torch.eye(3)[y]
    torch.testing.assert_close(net(x, torch.zeros(2), y), net(x, torch.zeros(2), one_hot))
    assert (net(x, torch.zeros(2), y) - net(x, torch.zeros(2))).abs().max() > 1e-5


@pytest.mark.parametrize("net", [UNet((1, 8, 8), 16, (1, 2), 1, (0,)), MLP((4,))])
def test_items_of_a_batch_do_not_mix(net):
    net = awake(net)
    x, c = torch.randn(4, *net.shape), torch.linspace(-1, 1, 4)
    torch.testing.assert_close(net(x, c)[2:3], net(x[2:3], c[2:3]))


def test_every_parameter_learns():
    net = awake(UNet((1, 8, 8), 16, (1, 2), 1, (1,), num_classes=2, fourier=(6,)))
    out = net(torch.randn(4, 1, 8, 8), torch.zeros(4), torch.tensor([0, 1, 0, 1]))
    out.square().sum().backward()
    idle = [k for k, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


def test_refusals_name_the_other_network():
    with pytest.raises(ValueError, match="use the mlp"):
        UNet((5,))
    with pytest.raises(ValueError, match="use the unet"):
        MLP((1, 8, 8))


def test_presets_grow():
    sizes = [
        sum(p.numel() for p in UNet((1, 32, 32), **UNet.presets[k]).parameters())
        for k in ("tiny", "small", "base")
    ]
    assert sizes == sorted(sizes)
    assert sizes[0] < 1e6 < sizes[1] < 1e7 < sizes[2]


def test_fourier_features_separate_grey_levels():
    levels = (torch.arange(256.0) + 0.5) / 128 - 1
    features = fourier_features(levels.reshape(1, 1, 256), torch.zeros(1), (6, 7))[0].T
    distance = torch.cdist(features[:, 1:], features[:, 1:])
    neighbours = distance.diagonal(1)
    assert features.shape == (256, 5)
    assert neighbours.min() > 1  # grey levels differ by 1/128 in x, by more than 1 in the features


def test_fourier_features_keep_what_the_noise_leaves():
    """Of a wave of noisy data, its mean over the noise."""
    x0, noise = torch.tensor(0.3), torch.tensor([0.0, 0.05, 0.5])
    eps = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    waves = fourier_features(x0.expand(3, 1, 1), noise, (2,))[:, 1:, 0]
    angle = 4 * torch.pi * (x0 + noise[:, None] * eps)
    mean = torch.stack([angle.sin().mean(1), angle.cos().mean(1)], 1)
    torch.testing.assert_close(waves, mean, rtol=0, atol=0.01)
    assert waves[2].abs().max() < 1e-6


def test_noise_embedding_tells_neighbours_apart_in_half_precision():
    embed = NoiseEmbedding(16).bfloat16()
    near = embed(torch.tensor([0.5, 0.51])).float()
    assert (near[0] - near[1]).abs().max() > 0


def test_class_embedding_without_labels_is_the_last_row():
    table = ClassEmbedding(3, 4)
    torch.testing.assert_close(table(None, 2), table(torch.tensor([3, 3])))


class Fixed(nn.Module):
    """A network whose output has a given shape."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: torch.Tensor, c_noise: torch.Tensor) -> torch.Tensor:
        return torch.zeros(self.shape)


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (2, 5, 4, 4), (2, 6, 4, 1), (1, 3, 4, 4), ()])
def test_an_output_of_another_shape_is_refused_before_it_is_broadcast(shape):
    model = sd.ScoreModel(Fixed(*shape), sd.VP(), sd.Eps())
    with pytest.raises(ValueError, match="it must give that shape, or twice its channels"):
        model(torch.zeros(2, 3, 4, 4), 0.5)


def test_an_output_of_twice_the_channels_is_about_the_variance():
    model = sd.ScoreModel(Fixed(2, 6, 4, 4), sd.VP(), sd.Eps())
    eps, v = model.noise_and_variance(torch.zeros(2, 3, 4, 4), 0.5)
    assert eps.shape == v.shape == (2, 3, 4, 4)
    assert (
        sd.ScoreModel(Fixed(2, 3, 4, 4), sd.VP(), sd.Eps()).noise_and_variance(
            torch.zeros(2, 3, 4, 4), 0.5
        )[1]
        is None
    )


@pytest.mark.parametrize("name", ["adm", "ddpm-unet", "dit", "edm2", "ncsnpp", "unet"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(name, tmp_path):
    """Resumed, the moments of the optimizer lie as the weights do, with channels last."""
    config = {
        "data": {"source": "digits", "limit": 64},
        "net": {"name": name, "preset": "tiny", "dropout": 0.1, "num_classes": 10},
        "training": {"batch_size": 4, "evaluations": 0, "warmup": 2, "decay": "constant"},
    }

    def run(folder: str, steps: int, resume: bool = False) -> dict[str, torch.Tensor]:
        config["training"]["steps"] = steps
        job = prepare(config, tmp_path / folder, torch.device("cpu"))
        trainer = Trainer(job, say=lambda line: None)
        if resume:
            trainer.resume()
        trainer.run(show_progress=False)
        newest = saved_steps.latest_checkpoint(tmp_path / folder)
        return {
            f"{part}.{key}": value
            for part in ("raw", "ema", "optimizer")
            for key, value in files.read_tensors(newest / f"{part}.safetensors").items()
        }

    whole = run("whole", 4)
    run("halves", 2)
    halves = run("halves", 4, resume=True)
    assert whole.keys() == halves.keys()
    assert [key for key, value in whole.items() if not torch.equal(value, halves[key])] == []


class Told(nn.Linear):
    """A network that keeps the labels that it was told."""

    def forward(self, x: torch.Tensor, c_noise: torch.Tensor) -> torch.Tensor:
        self.label = c_noise
        return super().forward(x)


def test_a_network_of_half_precision_is_told_the_noise_in_float32():
    net = Told(2, 2).bfloat16()
    model = sd.ScoreModel(net, sd.VP(), sd.Eps())
    assert model(torch.zeros(3, 2), 0.3).dtype == torch.float32
    assert net.label.dtype == torch.float32
    expected = -sd.VP().log_snr(torch.tensor(0.3, dtype=torch.float64)) / 4
    torch.testing.assert_close(net.label, expected.float().expand(3))


def test_a_noise_level_is_told_in_the_precision_of_the_time():
    net, sde = Told(2, 2), sd.VE()
    model = sd.ScoreModel(net, sde, sd.Eps(label="noise-level"))
    t = torch.linspace(0.01, 1, 200)
    model(torch.zeros(200, 2), t)
    assert torch.equal(net.label, sde.sigma(t) / sde.alpha(t))
    assert not torch.equal(net.label, (sde.sigma(t.double()) / sde.alpha(t.double())).float())


def test_evaluating_reaches_the_network_within_a_score():
    class Around:
        def __init__(self, score: object) -> None:
            self.score = score

    model = sd.ScoreModel(Told(2, 2), sd.VP(), sd.Eps()).train()
    with evaluating(Around(Around(model))):
        assert not model.net.training
    assert model.net.training
