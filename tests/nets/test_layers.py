"""The blocks that networks share, and what all networks built of them have in common."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from scoresde.nets import ADM, EDM2, ADMClassifier, DDPMUNet, DiT, NCSNpp
from scoresde.nets.embed import Fourier, Positional, Waves, class_rows
from scoresde.nets.layers import (
    ACTIVATIONS,
    Attention,
    Downsample,
    GroupNorm,
    Pointwise,
    Resampling,
    ResBlock,
    Upsample,
    activate,
    group_norm,
    joined,
    run,
    uniform_,
)
from scoresde.nets.layout import cropped, margins, padded, weights_last
from scoresde.nets.resample import Resampler

FIR = (1.0, 3.0, 3.0, 1.0)
SHAPE = (3, 8, 8)
NETS = {
    "ncsnpp": lambda **kw: NCSNpp(SHAPE, 8, (1, 2), 1, **kw),
    "ncsnpp, filtered": lambda **kw: NCSNpp(
        SHAPE, 8, (1, 2), 1, taps=FIR, input_pyramid="residual", output_pyramid="residual", **kw
    ),
    "ncsnpp, ddpm": lambda **kw: NCSNpp(
        SHAPE, 8, (1, 2), 1, resblock="ddpm", resample_conv=False, taps=FIR, **kw
    ),
    "ddpm-unet": lambda **kw: DDPMUNet(SHAPE, (8, 16), 1, groups=4, **kw),
    "adm": lambda **kw: ADM(SHAPE, 16, (1, 2), 1, (1,), head_dim=16, groups=4, **kw),
    "dit": lambda **kw: DiT(SHAPE, width=16, depth=2, heads=2, **kw),
    "edm2": lambda **kw: EDM2(SHAPE, 16, (1, 2), 1, head_dim=16, **kw),
}


def norm(channels: int) -> GroupNorm:
    return group_norm(channels, 2, 1e-6)


def awake(name: str, **fields) -> nn.Module:
    """A network whose branches all show in the output."""
    torch.manual_seed(0)
    net = NETS[name](num_classes=5, **fields).eval()
    for parameter in net.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return net


def inputs(batch: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, *SHAPE, generator=generator)
    return x, torch.linspace(-0.3, 0.9, batch), torch.arange(batch) * 4 % 5


# -- networks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_classes_are_told_alike(name):
    net = awake(name)
    x, c, y = inputs()
    with torch.no_grad():
        told, untold = net(x, c, y), net(x, c)
        assert (told - untold).abs().max() > 1e-3
        for same in (y.int(), y.to(torch.uint8), torch.eye(5)[y], torch.eye(5).long()[y]):
            torch.testing.assert_close(net(x, c, same), told)
        torch.testing.assert_close(net(x, c, torch.full_like(y, 5)), untold)
        for wrong in (-1, 6):
            with pytest.raises((RuntimeError, IndexError)):
                net(x, c, torch.full_like(y, wrong))


@pytest.mark.parametrize("name", NETS)
def test_copies_and_pickles_compute_the_same(name):
    net = awake(name)
    x, c, y = inputs(1)
    with torch.no_grad():
        out = net(x, c, y)
        for again in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert torch.equal(again(x, c, y), out)
        fresh = NETS[name](num_classes=5).eval()
        fresh.load_state_dict(net.state_dict(), strict=True)
        assert torch.equal(fresh(x, c, y), out)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("grad", [False, True])
def test_inputs_of_any_layout_are_left_alone(name, grad):
    net = awake(name)
    x, c, y = inputs()
    rows = torch.eye(5)[y]
    with torch.set_grad_enabled(grad):
        expected = net(x, c, rows)
        for given in (
            x.contiguous(memory_format=torch.channels_last),
            x.transpose(2, 3).contiguous().transpose(2, 3),
        ):
            torch.testing.assert_close(net(given, c, rows), expected, rtol=1e-4, atol=1e-5)
            assert torch.equal(given, x)
    assert torch.equal(c, inputs()[1])
    assert torch.equal(rows, torch.eye(5)[y])


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("grad", [False, True])
def test_autocast_is_near(name, grad):
    net = awake(name)
    x, c, y = inputs()
    exact = net(x, c, y).detach()
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        half = net(x, c, y)
    assert (half.float() - exact).std() < 0.05 * exact.std()
    if grad:
        half.float().square().sum().backward()
        assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in net.parameters())


@pytest.mark.parametrize("name", NETS)
def test_second_derivatives_are_those_of_finite_differences(name):
    net = awake(name).double()
    x, c, y = (v.double() if v.is_floating_point() else v for v in inputs(1))

    def gradient(x: torch.Tensor, graph: bool = False) -> torch.Tensor:
        return torch.autograd.grad(net(x, c, y).square().sum(), x, create_graph=graph)[0]

    x.requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        first = gradient(x, graph=True)
        v, step = torch.randn_like(first), 1e-5
        (second,) = torch.autograd.grad((first * v).sum(), x)
        ends = [gradient((x + s * step * v).detach().requires_grad_()) for s in (1, -1)]
    torch.testing.assert_close(second, (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-5)


def passes(net: nn.Module, *given: torch.Tensor) -> float:
    """How often a block's first layer runs in a forward and a backward pass."""
    count = []
    for module in net.modules():
        first = getattr(module, "conv1", getattr(module, "qkv", None))
        if isinstance(first, nn.Module):
            first.register_forward_pre_hook(lambda *_: count.append(1))
    net(*given).square().sum().backward()
    return len(count)


@pytest.mark.parametrize("name", NETS)
def test_checkpointing_can_be_switched_later(name):
    net = awake(name)
    once = passes(copy.deepcopy(net), *inputs())
    net.checkpointing = True
    assert passes(net, *inputs()) == 2 * once


def test_checkpointing_of_a_classifier_can_be_switched_later():
    net = ADMClassifier(SHAPE, 3, 16, (1, 2), 1, (1,), head_dim=16, pool="adaptive", groups=4)
    x, c, _ = inputs()
    once = passes(copy.deepcopy(net), x, c)
    net.checkpointing = True
    assert passes(net, x, c) == 2 * once


@pytest.mark.parametrize("name", ["ncsnpp", "ddpm-unet", "adm"])
@pytest.mark.parametrize("field", ["num_classes", "out_channels"])
def test_numbers_below_one_are_refused(name, field):
    with pytest.raises(ValueError, match=f"the {name} needs {field} of at least 1, got -1"):
        NETS[name](**{field: -1})


# -- blocks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize("grad", [False, True])
def test_a_resampling_block_resamples_both_branches(way, grad):
    torch.manual_seed(0)
    resampler = Resampler(2, FIR)
    block = ResBlock(2, 4, 6, 5, norm=norm, skip_scale=0.6, resample=way, resampler=resampler,
                     act="elu")  # fmt: skip
    x, e = torch.randn(3, 4, 6, 8), torch.randn(3, 5)
    change = getattr(resampler, way)
    h = block.conv1(change(functional.elu(block.norm1(x)))) + block.affine(e)[..., None, None]
    h = block.conv2(functional.elu(block.norm2(h)))
    skip = functional.conv2d(change(x), block.skip.weight[..., None, None], block.skip.bias)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(block(x, e), 0.6 * (skip + h))


def test_a_block_without_embedding_has_no_layer_for_it():
    block = ResBlock(1, 4, 4, 0, norm=norm)
    x = torch.randn(2, 4, 6)
    h = block.conv2(functional.silu(block.norm2(block.conv1(functional.silu(block.norm1(x))))))
    assert block.affine is None
    torch.testing.assert_close(block(x), x + h)


def test_dropout_acts_between_the_convolutions():
    torch.manual_seed(0)
    block = ResBlock(1, 4, 4, 0, norm=norm, dropout=1.0 - 1e-9)
    x = torch.randn(2, 4, 6)
    torch.testing.assert_close(block.train()(x), x + block.conv2.bias[:, None])
    assert (block.eval()(x) - x).abs().max() > 1e-3


@pytest.mark.parametrize("padding", [(1, 1), (0, 1)])
@pytest.mark.parametrize("taps", [None, FIR])
def test_downsampling_is_a_strided_convolution(padding, taps):
    layer = Downsample(2, 3, 4, padding, Resampler(2, taps) if taps else None)
    x = torch.randn(2, 3, 6, 8)
    if taps:
        # The filter reaches two places before and after; what it gives is one wider each way.
        k = torch.tensor(taps) / sum(taps)
        kernel = (k[:, None] * k).expand(3, 1, 4, 4)
        before = functional.conv2d(functional.pad(x, (2, 2, 2, 2)), kernel, groups=3)
    else:
        before = functional.pad(x, padding * 2)
    expected = functional.conv2d(before, layer.conv.weight, layer.conv.bias, stride=2)
    torch.testing.assert_close(layer(x), expected)
    assert layer(x).shape == (2, 4, 3, 4)


def test_upsampling_convolves_what_was_doubled():
    layer = Upsample(1, 3, 4, Resampler(1))
    x = torch.randn(2, 3, 5)
    torch.testing.assert_close(layer(x), layer.conv(x.repeat_interleave(2, 2)))


@pytest.mark.parametrize("way", ["up", "down"])
def test_resampling_moves_with_its_network(way):
    layer = Resampling(Resampler(2, FIR), way)
    x = torch.randn(1, 2, 4, 4)
    torch.testing.assert_close(layer(x), getattr(layer.resampler, way)(x))
    assert layer.to("meta")(x.to("meta")).device.type == "meta"


def test_attention_in_heads_needs_them_to_divide():
    with pytest.raises(ValueError, match="8 channels do not split into 3 attention heads"):
        Attention(8, 3, norm=norm)


def test_groups_are_a_quarter_of_the_channels_at_most_32():
    assert [group_norm(c, None, 1e-6).num_groups for c in (4, 24, 128, 256)] == [1, 6, 32, 32]
    assert group_norm(24, 8, 1e-3).num_groups == 8
    assert group_norm(24, 8, 1e-3).eps == 1e-3
    for channels, groups in ((10, 4), (3, None), (144, None)):
        with pytest.raises(ValueError, match=f"{channels} channels do not split .* field groups"):
            group_norm(channels, groups, 1e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_write_in_place_without_gradients_alone(name):
    x = torch.linspace(-3, 3, 7)
    kept = x.clone()
    expected = activate(x, name)
    assert torch.equal(x, kept)
    with torch.no_grad():
        torch.testing.assert_close(activate(x, name), expected)
        assert activate(x, "silu") is x
    slope = float(activate(torch.tensor([-1.0]), "leaky-relu"))
    assert slope == pytest.approx(-0.2)


def test_sums_are_written_where_the_branch_lies():
    x, h = torch.randn(2, 3), torch.randn(2, 3)
    expected = 0.5 * (x + h)
    out = joined(x, h, 0.5)
    torch.testing.assert_close(out, expected)
    assert out.data_ptr() == h.data_ptr()
    layer = Pointwise(3, 4)
    x, h = torch.randn(2, 3, 5), torch.randn(2, 4, 5)
    expected = 0.5 * (h + layer(x) - layer.bias[:, None])
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(layer.added_to(h.clone(), x, 0.5), expected)


def test_a_layer_is_run_again_only_where_a_gradient_is_asked_for():
    layer, count = nn.Linear(2, 2), []
    layer.register_forward_pre_hook(lambda *_: count.append(1))
    x = torch.randn(3, 2, requires_grad=True)
    for again, grad, expected in ((False, True, 1), (True, True, 2), (True, False, 1)):
        count.clear()
        with torch.set_grad_enabled(grad):
            out = run(layer, x, again=again)
        if grad:
            out.square().sum().backward()
        assert len(count) == expected


def test_uniform_weights_have_their_variance():
    torch.manual_seed(0)
    weight = torch.empty(40, 60, 5, 5)
    uniform_(weight, 0.3)
    assert float(weight.var()) == pytest.approx(0.3 / (50 * 25), rel=0.02)
    assert float(weight.abs().max()) == pytest.approx((3 * 0.3 / (50 * 25)) ** 0.5, rel=1e-3)
    uniform_(weight, 0.0)
    assert 0 < float(weight.abs().max()) < 1e-6


# -- layout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("spatial", [(5,), (7, 5), (8, 4), (3, 9, 4)])
def test_items_lie_amid_zeros(spatial):
    x = torch.randn(2, 3, *spatial)
    wide = padded(x, 4)
    assert all(
        size % 4 == 0 and size - s < 4 for size, s in zip(wide.shape[2:], spatial, strict=True)
    )
    assert torch.equal(cropped(wide, spatial), x)
    assert cropped(wide, spatial).is_contiguous()
    assert float(wide.abs().sum()) == pytest.approx(float(x.abs().sum()), rel=1e-5)
    before = [m for i, m in enumerate(margins(spatial, 4)) if i % 2 == 0][::-1]
    assert before == [(-s % 4) // 2 for s in spatial]
    if len(spatial) > 1:
        last = torch.channels_last if len(spatial) == 2 else torch.channels_last_3d
        assert wide.is_contiguous(memory_format=last)


@pytest.mark.parametrize("n", [2, 3])
def test_weights_lie_with_channels_last(n):
    conv = (nn.Conv2d, nn.Conv3d)[n - 2](4, 5, 3)
    weights_last(conv, n)
    last = torch.channels_last if n == 2 else torch.channels_last_3d
    assert conv.weight.is_contiguous(memory_format=last)


# -- features ------------------------------------------------------------------------------------


def test_features_of_the_noise_label_are_their_formulas():
    c = torch.tensor([0.7, -1.3], dtype=torch.float64)
    w = torch.logspace(-1, 3, 4, base=2.0, dtype=torch.float64)
    expected = torch.cat([(c[:, None] * w).cos(), (c[:, None] * w).sin()], 1)
    torch.testing.assert_close(Waves(8)(c), expected, rtol=1e-5, atol=1e-6)
    w = 10000 ** -(torch.arange(3, dtype=torch.float64) / 2)
    expected = torch.cat([(c[:, None] * w).sin(), (c[:, None] * w).cos(), c[:, None] * 0], 1)
    torch.testing.assert_close(Positional(7)(c), expected, rtol=1e-5, atol=1e-6)
    w = 10000 ** -(torch.arange(3, dtype=torch.float64) / 3)
    expected = torch.cat([(c[:, None] * w).cos(), (c[:, None] * w).sin()], 1)
    torch.testing.assert_close(Positional(6, 0.0, True)(c), expected, rtol=1e-5, atol=1e-6)
    torch.manual_seed(0)
    for log in (False, True):
        layer = Fourier(6, 2.0, log=log)
        level = c.abs()
        angle = (level.log() if log else level)[:, None] * layer.frequencies * 2 * torch.pi
        torch.testing.assert_close(layer(level), torch.cat([angle.sin(), angle.cos()], 1))
    assert float(Fourier(20000, 3.0).frequencies.std()) == pytest.approx(3, rel=0.03)


@pytest.mark.parametrize("make", [Waves, Fourier])
@pytest.mark.parametrize("width", [0, 7])
def test_features_come_in_pairs(make, width):
    with pytest.raises(ValueError, match=f"come in pairs: {width} is not even"):
        make(width)


def test_too_few_features_are_refused():
    with pytest.raises(ValueError, match="needs more features than 2"):
        Positional(2)
    with pytest.raises(ValueError, match="come in pairs: 15 is not even"):
        NCSNpp(SHAPE, 8, (1, 2), 1, noise_width=15)


def test_frequencies_survive_a_change_of_precision():
    layer = Positional(16)
    exact = layer.frequencies.clone()
    assert torch.equal(layer.half().frequencies, exact)
    assert torch.equal(layer.double().frequencies, exact.double())


def test_rows_of_classes():
    rows = class_rows(torch.tensor([1, 0, 2]), 2)
    assert rows.tolist() == [[0, 1], [1, 0], [0, 0]]
    given = torch.rand(3, 2)
    assert class_rows(given, 2) is given
