import dataclasses
import math

import pytest
import torch
from torch.nn import functional

from scoresde import nets
from scoresde.config import build, describe
from scoresde.nets import NCSNpp
from scoresde.nets.layers import Attention, GroupNorm, Pointwise, ResBlock

TINY = {"width": 8, "multipliers": (1, 2), "blocks": 1}
FIR = (1.0, 3.0, 3.0, 1.0)
VARIANTS = {
    "ddpm++": {},
    "ncsn++": {"taps": FIR, "input_pyramid": "residual"},
    "skips": {"taps": FIR, "input_pyramid": "skip", "output_pyramid": "skip"},
    "cat": {"input_pyramid": "skip", "combine": "cat"},
    "residual out": {"output_pyramid": "residual"},
    "ddpm": {"resblock": "ddpm", "skip_rescale": False, "groups": 4, "embedding": "positional"},
    "ddpm, no conv": {"resblock": "ddpm", "resample_conv": False},
    "ddpm, filtered": {"resblock": "ddpm", "taps": FIR},
    "fourier": {"embedding": "fourier", "noise_width": 16},
    "over sigma": {"embedding": "log-fourier", "scale_by_sigma": True},
    "unconditional": {"conditional": False},
    "classes": {"num_classes": 5, "augment": 3},
    "two outputs": {"out_channels": 6},
    "elu": {"act": "elu", "center_input": True},
}


def awake(shape=(3, 8, 8), **fields) -> NCSNpp:
    """A network whose residual branches are not zero."""
    torch.manual_seed(0)
    net = NCSNpp(shape, **{**TINY, **fields}).eval()
    for parameter in net.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 1 / math.sqrt(parameter[0].numel()))
        else:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return net


def inputs(net: NCSNpp, batch: int = 3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, *net.shape, generator=generator)
    return x, torch.linspace(0.3, 1.5, batch)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_has_its_shape_and_uses_every_weight(name):
    net = awake(**VARIANTS[name])
    x, c = inputs(net)
    cond = {"y": torch.tensor([0, 4, 2]), "augment": torch.rand(3, 3)} if net.augment else {}
    out = net(x, c, **cond)
    assert out.shape == (3, net.out_channels or 3, 8, 8)
    out.square().sum().backward()
    silent = [k for k, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


@pytest.mark.parametrize("shape", [(2, 16), (2, 13), (1, 9, 6), (2, 4, 6, 5)], ids=str)
@pytest.mark.parametrize("name", ["ddpm++", "ncsn++", "skips", "ddpm"])
def test_one_to_three_axes_of_any_size(name, shape):
    net = awake(shape, **VARIANTS[name])
    x, c = inputs(net)
    assert net(x, c).shape == x.shape


def test_padding_is_cropped_to_the_right_place():
    net = awake((1, 8, 8), attention=())
    x = torch.randn(2, 1, 7, 5)
    by_hand = torch.zeros(2, 1, 8, 6)
    by_hand[:, :, 0:7, 0:5] = x
    c = torch.zeros(2)
    torch.testing.assert_close(net(x, c), net(by_hand, c)[:, :, 0:7, 0:5])


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_change_neither_values_nor_layout(name):
    """Without gradients tensors are overwritten in place: the result is that with gradients."""
    net = awake(**VARIANTS[name])
    x, c = inputs(net)
    kept = x.clone()
    with torch.no_grad():
        plain = net(x, c)
        again = net(x, c)
    torch.testing.assert_close(plain, net(x, c), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plain, again, rtol=0, atol=0)
    torch.testing.assert_close(x, kept, rtol=0, atol=0)
    assert plain.is_contiguous()


@pytest.mark.parametrize("name", ["ddpm++", "skips", "classes"])
def test_checkpointing_gives_the_same_gradients(name):
    net = awake(**VARIANTS[name])
    x, c = inputs(net)
    found = []
    for flag in (False, True):
        net.checkpointing = flag
        x = x.detach().requires_grad_()
        loss = net(x, c).square().sum()
        found.append(torch.autograd.grad(loss, [x, *net.parameters()], allow_unused=True))
    for plain, recomputed in zip(*found, strict=True):
        if plain is not None:
            torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize("name", ["ncsn++", "skips", "classes", "ddpm, filtered"])
def test_compiles_without_a_break(name):
    net = awake(**VARIANTS[name])
    x, c = inputs(net)
    cond = {"y": torch.tensor([0, 4, 2])} if net.num_classes else {}
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, c, **cond), net(x, c, **cond))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, c, **cond), net(x, c, **cond))


@pytest.mark.parametrize("name", ["ddpm++", "ncsn++", "skips"])
def test_bfloat16_is_near(name):
    net = awake(**VARIANTS[name])
    x, c = inputs(net)
    with torch.no_grad():
        exact = net(x, c)
        half = net.bfloat16()(x.bfloat16(), c).float()
    assert (half - exact).std() < 0.05 * exact.std()


def test_labels_as_indices_and_as_rows_and_none():
    net = awake(num_classes=5)
    x, c = inputs(net)
    y = torch.tensor([0, 4, 2])
    torch.testing.assert_close(net(x, c, y), net(x, c, torch.eye(5)[y]))
    torch.testing.assert_close(net(x, c), net(x, c, torch.zeros(3, 5)))
    assert (net(x, c, y) - net(x, c)).abs().max() > 1e-3


def test_the_noise_label_reaches_the_output_and_items_do_not_mix():
    net = awake()
    x, c = inputs(net)
    together = net(x, c)
    assert (net(x, c + 0.1) - together).abs().max() > 1e-4
    torch.testing.assert_close(net(x[1:2], c[1:2]), together[1:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_section_rebuilds_the_network(name):
    net = awake(**VARIANTS[name])
    section = describe(net)
    again = build(section, nets, "net")
    assert section["name"] == "ncsnpp"
    assert {f.name: getattr(again, f.name) for f in dataclasses.fields(again)} == {
        f.name: getattr(net, f.name) for f in dataclasses.fields(net)
    }


@pytest.mark.parametrize("preset", NCSNpp.presets)
def test_presets_build(preset):
    with torch.device("meta"):
        net = NCSNpp((3, 32, 32), **NCSNpp.presets[preset])
    count = sum(p.numel() for p in net.parameters()) / 1e6
    published = {"ddpmpp": 61.8, "ncsnpp": 62.8, "ddpmpp-deep": 107.5, "ncsnpp-deep": 107.6}
    if preset in published:
        # Within 2 %: the published networks are told the noise by other features.
        assert count == pytest.approx(published[preset], rel=0.02)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"resblock": "resnet"}, "resblock of ncsnpp 'resnet'; .*accepted: biggan, ddpm"),
        ({"input_pyramid": "cat"}, "accepted: none, residual, skip"),
        ({"embedding": "sines"}, "accepted: fourier, log-fourier, positional, waves"),
        ({"width": 10}, "channels do not split into"),
        ({"scale_by_sigma": True}, "scale_by_sigma needs the noise level"),
        ({"blocks": 0}, "blocks >= 1"),
    ],
)
def test_what_makes_no_network_is_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        NCSNpp((3, 8, 8), **{**TINY, **fields})


def test_vectors_are_refused():
    with pytest.raises(ValueError, match="use the mlp for vectors"):
        NCSNpp((5,))


def test_attention_is_the_formula():
    torch.manual_seed(0)
    layer = Attention(8, 2, norm=lambda c: GroupNorm(2, c), skip_scale=0.5)
    x = torch.randn(2, 8, 3, 5)
    h = layer.norm(x).flatten(2)
    rows = torch.einsum("oc,bcp->bop", layer.qkv.weight, h) + layer.qkv.bias[:, None]
    q, k, v = (part.unflatten(1, (2, 4)) for part in rows.chunk(3, 1))
    attended = (torch.einsum("bhcp,bhcq->bhpq", q, k) / 2).softmax(-1)
    h = torch.einsum("bhpq,bhcq->bhcp", attended, v).flatten(1, 2)
    h = torch.einsum("oc,bcp->bop", layer.out.weight, h) + layer.out.bias[:, None]
    expected = (x + h.unflatten(2, (3, 5))) / 2
    torch.testing.assert_close(layer(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("project", [None, True])
@pytest.mark.parametrize("grad", [False, True])
def test_the_residual_block_is_the_formula(adaptive, project, grad):
    torch.manual_seed(0)
    block = ResBlock(2, 8, 8, 6, norm=lambda c: GroupNorm(2, c), adaptive=adaptive,
                     skip_scale=0.7, project=project)  # fmt: skip
    x, e = torch.randn(3, 8, 5, 4), torch.randn(3, 6)
    h = block.conv1(functional.silu(block.norm1(x)))
    a = block.affine(e)[:, :, None, None]
    h = block.norm2(h) * (1 + a[:, :8]) + a[:, 8:] if adaptive else block.norm2(h + a)
    h = block.conv2(functional.silu(h))
    skip = x
    if project:
        weight, bias = block.skip.weight[:, :, None, None], block.skip.bias
        skip = functional.conv2d(x, weight, bias)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(block(x, e), 0.7 * (skip + h))


def test_a_pointwise_layer_is_a_1x1_convolution():
    layer = Pointwise(4, 6)
    for shape in ((2, 4, 5), (2, 4, 5, 3), (2, 4, 2, 3, 2)):
        x = torch.randn(shape)
        conv = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}[x.ndim]
        weight = layer.weight[(..., *(None,) * (x.ndim - 2))]
        torch.testing.assert_close(layer(x), conv(x, weight, layer.bias))


@pytest.mark.parametrize("size", [4, 16, 40])
def test_group_norm_in_half_precision(size):
    norm = GroupNorm(4, 16, eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = (3 + torch.randn(2, 16, size, size)).bfloat16()
    exact = functional.group_norm(x.float(), 4, norm.weight.bfloat16().float(),
                                  norm.bias.bfloat16().float(), 1e-6)  # fmt: skip
    error = norm.bfloat16()(x).float() - exact
    assert error.abs().max() < 0.03 * exact.abs().max()


@pytest.mark.parametrize("kind", ["positional", "fourier", "waves"])
def test_frequencies_stay_precise_in_half_precision(kind):
    net = awake(embedding=kind)
    exact = net.features(torch.tensor([1.7, 998.0]))
    torch.testing.assert_close(net.bfloat16().features(torch.tensor([1.7, 998.0])), exact)
    assert net.features(torch.tensor([1.0])).dtype == torch.float32
