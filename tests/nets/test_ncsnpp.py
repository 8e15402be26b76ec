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


def by_hand(net: NCSNpp, x, c, y=None, augment=None):
    """The wiring of Song et al. (2021), appendix H, of blocks that are tested below."""
    act = {"silu": functional.silu, "elu": functional.elu}[net.act]
    e = None
    if net.conditional:
        e = net.features(c)
        if y is not None:
            e = e + net.classes(math.sqrt(net.num_classes) * torch.eye(net.num_classes)[y])
            e = e + net.augmentation(augment)
        e = act(net.embed2(act(net.embed1(e))))
    factor = 1 / math.sqrt(2) if net.skip_rescale else 1.0
    x = 2 * x - 1 if net.center_input else x

    def change(layer, h):
        return layer(h, e) if isinstance(layer, ResBlock) else layer(h)

    h, picture, skips = net.stem(x), x, []
    skips.append(h)
    for i, level in enumerate(net.encoder):
        for stage in level.stages:
            h = stage(h, e)
            skips.append(h)
        if i == len(net.encoder) - 1:
            break
        h = change(level.resample, h)
        if net.input_pyramid == "skip":
            picture = net.resampler.down(picture)
            entry = level.pyramid(picture)
            h = torch.cat([entry, h], 1) if net.combine == "cat" else h + entry
        elif net.input_pyramid == "residual":
            picture = h = (level.pyramid(picture) + h) * factor
        skips.append(h)
    h = net.middle[1](net.middle[0](h, e), e)
    out = None
    for level in net.decoder:
        for stage in level.stages:
            h = stage(torch.cat([h, skips.pop()], 1), e)
        h = h if level.attention is None else level.attention(h)
        if net.output_pyramid == "skip":
            part = level.pyramid(act(level.norm(h)))
            out = part if out is None else net.resampler.up(out) + part
        elif net.output_pyramid == "residual":
            if out is None:
                out = level.pyramid(act(level.norm(h)))
            else:
                out = h = (level.pyramid(out) + h) * factor
        h = h if level.resample is None else change(level.resample, h)
    assert skips == []
    if net.output_pyramid != "skip":
        out = net.head(act(net.head_norm(h)))
    if net.scale_by_sigma and net.sigmas:
        low, high, count = net.sigmas
        levels = torch.logspace(math.log10(high), math.log10(low), count)
        return out / levels[c.long(), None, None, None]
    return out / c[:, None, None, None] if net.scale_by_sigma else out


@pytest.mark.parametrize("name", [*VARIANTS, "sigmas"])
@pytest.mark.parametrize("grad", [False, True])
def test_output_is_the_wiring_of_the_paper(name, grad):
    sigmas = {"scale_by_sigma": True, "sigmas": (0.01, 50.0, 7), "embedding": "positional"}
    net = awake(**VARIANTS.get(name, sigmas), multipliers=(1, 2, 2))
    x, c = inputs(net)
    c = torch.tensor([0.0, 3.0, 6.0]) if name == "sigmas" else c
    cond = {"y": torch.tensor([0, 4, 2]), "augment": torch.rand(3, 3)} if net.augment else {}
    with torch.no_grad():
        expected = by_hand(net, x, c, **cond)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(net(x, c, **cond), expected, rtol=1e-4, atol=1e-5)


def test_resampling_with_a_filter_comes_before_the_strided_convolution():
    net = awake(**VARIANTS["ddpm, filtered"])
    layer = net.encoder[0].resample
    x = torch.randn(1, 8, 6, 6)
    k = torch.tensor(FIR) / 8
    smooth = functional.conv2d(
        functional.pad(x, (2, 2, 2, 2)), (k[:, None] * k).expand(8, 1, 4, 4), groups=8
    )
    expected = functional.conv2d(smooth, layer.conv.weight, layer.conv.bias, stride=2)
    torch.testing.assert_close(layer(x), expected)
    plain = awake(**VARIANTS["ddpm"]).encoder[0].resample
    expected = functional.conv2d(
        functional.pad(x, (0, 1, 0, 1)), plain.conv.weight, plain.conv.bias, stride=2
    )
    torch.testing.assert_close(plain(x), expected)


def test_branches_and_output_start_near_zero():
    torch.manual_seed(0)
    for fields in ({}, {"output_pyramid": "skip"}):
        net = NCSNpp((3, 8, 8), **{**TINY, **fields})
        x, c = inputs(net)
        assert net(x, c).abs().max() < 1e-3
        for module in net.modules():
            if isinstance(module, ResBlock):
                assert module.conv2.weight.abs().max() < 1e-4
            if isinstance(module, Attention):
                assert module.out.weight.abs().max() < 1e-4
                fan = module.qkv.weight.numel() / len(module.qkv.weight) * 2  # (C + 3C) / 2
                assert float(module.qkv.weight.detach().var()) == pytest.approx(0.1 / fan, rel=0.3)


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
        ({"diffusers_groups": True}, "multiples of 32 channels"),
        ({"diffusers_groups": True, "width": 32, "attention": (2,)}, "levels 0 to 1"),
        ({"conditional": False, "num_classes": 3}, "takes no classes"),
        ({"conditional": False, "augment": 3}, "takes no classes and no augment"),
        ({"sigmas": (0.1, 9.0, 1)}, "sigma_min < sigma_max and N > 1"),
        ({"sigmas": (9.0, 0.1, 10)}, "sigma_min < sigma_max and N > 1"),
    ],
)
def test_what_makes_no_network_is_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        NCSNpp((3, 8, 8), **{**TINY, **fields})


def test_groups_of_levels_with_attention_may_be_those_of_diffusers():
    for flag, groups in ((True, 32), (False, 16)):
        net = awake(width=64, diffusers_groups=flag, attention=(0,), multipliers=(1, 1))
        level = net.decoder[-1]
        assert [stage.block.norm1.num_groups for stage in level.stages] == [32, 32]
        assert level.attention.norm.num_groups == (32 if flag else 16)
        assert net.encoder[0].stages[0].attention.norm.num_groups == (32 if flag else 16)
        assert net.encoder[0].stages[0].attention.heads == 1
        assert net.encoder[1].stages[0].block.norm1.num_groups == 16
        net = awake(width=32, diffusers_groups=flag, attention=(0,), multipliers=(1, 1))
        norms = [stage.block.norm1.num_groups for stage in net.decoder[-1].stages]
        assert norms == [32 if flag else groups] * 2
        x, c = inputs(net)
        assert net(x, c).isfinite().all()


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
