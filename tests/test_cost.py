"""The cost of networks: against counts by hand, published ones, and what is not to be touched."""

import pytest
import torch
from torch import nn

import scoresde as sd
from scoresde.cost import conditions, cost
from scoresde.nets.adm import ADM
from scoresde.nets.unet import Attention


class Two(nn.Module):
    """Two linear layers with a rectifier."""

    def __init__(self, width):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, width), nn.Linear(width, 4)

    def forward(self, x, c_noise):
        return self.outer(self.inner(x).relu())


def model(net, shape):
    return sd.ScoreModel(net, sd.VP(), sd.Eps(), shape=shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_counts_by_hand(dtype):
    found = cost(model(Two(1000).to(dtype), (4,)))
    size = dtype.itemsize
    label = max(size, 4)
    assert found.parameters == 9004
    assert found.weight_bytes == 9004 * size
    assert found.multiply_adds == 8000
    # Item and label, the layer's output and its rectified copy at once.
    assert found.forward_bytes == (4 + 2000) * size + label
    # Item, output, its gradient; the rectified values, their gradient, and that of the layer's.
    assert found.vjp_bytes == (4 + 4 + 4 + 3000) * size


def test_the_published_multiply_adds_of_adm():
    # Scalable Diffusion Models with Transformers (Peebles & Xie, 2023), table 5: 1120 G, 554 M.
    with torch.device("meta"):
        net = ADM(
            (3, 256, 256), width=256, multipliers=(1, 1, 2, 2, 4, 4), blocks=2,
            attention=(3, 4, 5), head_dim=64, resample="block", out_channels=6, num_classes=1000,
        )  # fmt: skip
    found = cost(model(net, (3, 256, 256)))
    assert found.multiply_adds == pytest.approx(1120e9, rel=1e-3)
    assert found.parameters == pytest.approx(554e6, rel=1e-3)


def test_attention_is_counted():
    # With C channels and N places: 4 N C^2 by weights, 2 N^2 C by the two products.
    shape = (3, 8, 8)
    nets = [sd.nets.UNet(shape, width=32, multipliers=(1,), attention=a) for a in ((), (0,))]
    counts = [cost(model(net, shape)).multiply_adds for net in nets]
    n, c = 64, 32
    layers = sum(isinstance(m, Attention) for m in nets[1].modules())
    layers -= sum(isinstance(m, Attention) for m in nets[0].modules())
    assert layers > 0
    assert counts[1] - counts[0] == layers * (4 * n * c**2 + 2 * n**2 * c)


def test_nothing_is_left_in_the_network():
    """Buffers shared by several modules, as those of filters, stay what they were."""
    shape = (3, 16, 16)
    net = sd.nets.NCSNpp(shape, width=16, multipliers=(1, 2), blocks=1, taps=(1, 3, 3, 1))
    net.train()
    net.requires_grad_(False)
    m = model(net, shape)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert cost(m).vjp_bytes > cost(m).forward_bytes
    assert net.training
    assert not any(p.requires_grad for p in net.parameters())
    for module in net.modules():
        for value in (*module._parameters.values(), *module._buffers.values()):
            assert type(value) in (torch.Tensor, nn.Parameter, type(None))
    after = net.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert type(net.eval()(torch.zeros(1, *shape), torch.ones(1))) is torch.Tensor


def test_a_network_that_asks_for_values_is_not_counted():
    class Asks(Two):
        def forward(self, x, c_noise):
            return super().forward(x, c_noise) if c_noise.max() > 0 else x

    found = cost(model(Asks(8), (4,)))
    assert found.parameters == 76
    assert found.multiply_adds is found.forward_bytes is found.vjp_bytes is None
    assert cost(sd.ScoreModel(Two(8), sd.VP(), sd.Eps())).multiply_adds is None


def test_conditions_are_what_the_network_takes():
    shape = (3, 16, 16)
    net = ADM(shape, width=32, multipliers=(1, 2), blocks=1, attention=(), num_classes=3,
              low_res=True)  # fmt: skip
    m = model(net, shape)
    cond = conditions(m, 4, torch.device("cpu"))
    assert cond["y"].tolist() == [0, 1, 2, 0]
    assert cond["low_res"].shape == (4, *shape)
    assert m(torch.zeros(4, *shape), 0.5, **cond).shape == (4, *shape)
    assert cost(m).multiply_adds > 0
    assert conditions(model(Two(8), (4,)), 4, torch.device("cpu")) == {}
