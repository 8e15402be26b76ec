import math

import pytest
import torch
from torch.nn import functional

from scoresde import config, nets
from scoresde.nets import edm2
from scoresde.nets.edm2 import EDM2

TINY = {"width": 8, "multipliers": (1, 2), "blocks": 1, "attention": (4,), "head_dim": 8}


def random(n: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(n), dtype=dtype)


def awake(**changes: object) -> EDM2:
    """A network with no gain left at zero, so that every path shows in the output."""
    torch.manual_seed(0)
    net = EDM2(**{"shape": (3, 8, 8), **TINY, **changes})
    for n, (name, parameter) in enumerate(net.named_parameters()):
        if parameter.ndim == 0:
            parameter.data.fill_(0.3 + 0.07 * (n % 5) if name != "out_gain" else 0.8)
    return net.eval()


def inputs(net: EDM2, batch: int = 3, dtype: torch.dtype = torch.float32) -> tuple:
    y = torch.arange(batch) % net.num_classes if net.num_classes else None
    return random(1, batch, *net.shape, dtype=dtype), torch.linspace(-1, 0.8, batch), y


# The paper's formulas once more, on a state dict, apart from the network.


def unit(w):
    rms = w.flatten(1).square().mean(1).sqrt()
    return w / (1e-4 + rms).reshape(-1, *(1,) * (w.ndim - 1))


def learned(w, x, gain=1.0):
    w = gain * unit(w) / w[0].numel() ** 0.5
    if w.ndim == 2:
        return torch.einsum("oi,bi->bo", w, x)
    return functional.conv2d(x, w, padding="same")


def act(x):
    return x * torch.sigmoid(x) / 0.596


def add(a, b, t):
    return ((1 - t) * a + t * b) / ((1 - t) ** 2 + t**2) ** 0.5


def waves(p, key, c):
    return 2**0.5 * torch.cos(c[:, None] * p[f"{key}.freqs"] + p[f"{key}.phases"])


def attend(p, key, x, d):
    b, c, height, width = x.shape
    heads = []
    z = learned(p[f"{key}.qkv.weight"], x).reshape(b, 3 * c, -1)
    for head in range(c // d):
        parts = []
        for which in range(3):
            rows = [3 * (head * d + channel) + which for channel in range(d)]
            part = z[:, rows]
            parts.append(part / (1e-4 + part.square().mean(1, keepdim=True).sqrt()))
        q, k, v = parts
        logits = torch.einsum("bcn,bcm->bnm", q, k) / d**0.5
        heads.append(torch.einsum("bnm,bcm->bcn", logits.softmax(2), v))
    return learned(p[f"{key}.proj.weight"], torch.cat(heads, 1).reshape(b, c, height, width))


def block(p, key, x, e, encoder, net):
    if key.endswith("_down"):
        b, c, h, w = x.shape
        x = x.reshape(b, c, h // 2, 2, w // 2, 2).mean((3, 5))
    if key.endswith("_up"):
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    skip = p.get(f"{key}.skip.weight")
    if encoder:
        x = x if skip is None else learned(skip, x)
        x = x / (1e-4 + x.square().mean(1, keepdim=True).sqrt())
    h = learned(p[f"{key}.conv0.weight"], act(x))
    c = learned(p[f"{key}.modulation.weight"], e, p[f"{key}.gain"]) + 1
    h = learned(p[f"{key}.conv1.weight"], act(h * c[:, :, None, None]))
    if not encoder and skip is not None:
        x = learned(skip, x)
    x = add(x, h, net.res_balance)
    if f"{key}.qkv.weight" in p:
        x = add(x, attend(p, key, x, net.head_dim), net.attn_balance)
    return x.clip(-net.clip, net.clip)


def paper(net, x, c_noise, one_hot=None):
    p = {k: v.double() for k, v in net.state_dict().items()}
    x, c_noise = x.double(), c_noise.double()
    e = learned(p["noise.weight"], waves(p, "fourier", c_noise))
    if one_hot is not None:
        label = learned(p["label.weight"], one_hot.double() * one_hot.shape[1] ** 0.5)
        e = add(e, label, net.label_balance)
    e = act(e)
    x = learned(p["stem.weight"], torch.cat([x, torch.ones_like(x[:, :1])], 1))
    high, low = "{}x{}".format(*net.shape[1:]), "{}x{}".format(*(s // 2 for s in net.shape[1:]))
    skips = [x]
    for name in (f"{high}_block0", f"{low}_down", f"{low}_block0"):
        x = block(p, f"encoder.{name}", x, e, True, net)
        skips.append(x)
    for name in ("in0", "in1", "block0", "block1", "up", "block0", "block1"):
        size = high if name == "up" or len(skips) < 3 else low
        if name.startswith("block"):
            s, t = skips.pop(), net.concat_balance
            n, m = x.shape[1], s.shape[1]
            scale = ((n + m) / ((1 - t) ** 2 + t**2)) ** 0.5
            x = torch.cat([scale * (1 - t) / n**0.5 * x, scale * t / m**0.5 * s], 1)
        x = block(p, f"decoder.{size}_{name}", x, e, False, net)
    return learned(p["out.weight"], x, p["out_gain"])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_classes": 5},
        {"head_dim": 16, "shape": (1, 8, 4), "attention": (8,)},
        {"num_classes": 2, "label_balance": 0.2, "concat_balance": 0.3, "res_balance": 0.6,
         "attn_balance": 0.8, "clip": 1.5},
        {"noise_width": 6, "embedding_width": 10},
    ],
    ids=str,
)  # fmt: skip
def test_network_is_the_formulas_of_the_paper(changes):
    net = awake(**changes)
    x, c, y = inputs(net)
    one_hot = None if y is None else torch.eye(net.num_classes)[y]
    with torch.no_grad():
        out, expected = net(x, c, y), paper(net, x, c, one_hot)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
        double = net.double()(x.double(), c.double(), y)
    torch.testing.assert_close(double, expected, rtol=1e-11, atol=1e-11)
    assert expected.std() > 0.3


def test_labels_as_indices_rows_and_none():
    net = awake(num_classes=4)
    x, c, y = inputs(net)
    with torch.no_grad():
        out = net(x, c, y)
        torch.testing.assert_close(net(x, c, torch.eye(4)[y]), out)
        nothing = paper(net, x, c, torch.zeros(3, 4)).float()
        torch.testing.assert_close(net(x, c), nothing, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(net(x, c, torch.full((3,), 4)), net(x, c))
    assert (out - nothing).abs().max() > 0.01


def test_log_variance_is_a_linear_map_of_waves():
    net = awake(uncertainty_width=16)
    c = torch.linspace(-1, 1, 7)
    p = {k: v.double() for k, v in net.state_dict().items()}
    expected = learned(p["uncertainty.weight"], waves(p, "uncertainty_fourier", c.double()))
    out = net.log_variance(c)
    assert out.shape == (7,)
    torch.testing.assert_close(out.double(), expected[:, 0], rtol=1e-5, atol=1e-5)
    assert out.std() > 0.1


# Magnitudes: 100_000 values or more, whose mean square is one within about 1 %.


def power(x):
    return x.double().square().mean().item()


@pytest.mark.parametrize("kernel", [None, 1, 3])
def test_learned_layers_keep_unit_variance(kernel):
    torch.manual_seed(0)
    layer = edm2.MPLinear(24, 64, kernel).eval()
    layer.weight.data *= 7
    x = random(0, 4000, 24) if kernel is None else random(0, 32, 24, 20, 20)
    out = layer(x) if kernel is None else layer(x)[..., 1:-1, 1:-1]
    assert power(out) == pytest.approx(1, abs=0.02)
    channels = out.transpose(0, 1).flatten(1).square().mean(1)
    assert (channels - 1).abs().max() < 0.15  # each output feature, not only their mean
    torch.testing.assert_close(layer(x, 3.0), 3 * layer(x))


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_fixed_layers_keep_unit_variance(t):
    a, b = random(0, 4, 48, 32, 32), random(1, 4, 24, 32, 32)
    assert power(edm2.mp_silu(a)) == pytest.approx(1, abs=0.015)
    assert power(edm2.mp_sum(a, random(2, *a.shape), t)) == pytest.approx(1, abs=0.02)
    joined = edm2.mp_cat(a, b, t)
    assert power(joined) == pytest.approx(1, abs=0.02)
    # Both inputs weigh as t says, though one has twice the channels.
    left, right = power(joined[:, :48]) * 48, power(joined[:, 48:]) * 24
    total = (1 - t) ** 2 + t**2
    assert right / (left + right) == pytest.approx(t**2 / total, abs=0.02)
    assert power(edm2.normalize(5 * a, (1,))) == pytest.approx(1, abs=1e-3)


def test_norms_are_taken_in_float32():
    wide = torch.full((1, 200_000), 200.0, dtype=torch.float16)  # a norm of 9e4, not a float16
    out = edm2.normalize(wide, (1,))
    assert out.dtype == torch.float16
    torch.testing.assert_close(out, torch.ones_like(wide))


def test_waves_have_unit_variance_and_unit_frequencies():
    torch.manual_seed(0)
    layer = edm2.MPFourier(4000)
    assert power(layer(torch.linspace(-2, 2, 50))) == pytest.approx(1, abs=0.02)
    assert layer.freqs.std() / (2 * math.pi) == pytest.approx(1, abs=0.05)
    assert 0 <= layer.phases.min() < 0.1
    assert 2 * math.pi - 0.1 < layer.phases.max() <= 2 * math.pi


def test_fresh_network_keeps_magnitudes_block_by_block():
    torch.manual_seed(0)
    net = EDM2((3, 16, 16), width=32, multipliers=(1, 2), blocks=2, attention=(8,), head_dim=32)
    net.out_gain.data.fill_(1.0)
    sizes = {}
    for name, module in net.eval().named_modules():
        if isinstance(module, (edm2.MPBlock, edm2.MPLinear)):
            module.register_forward_hook(lambda _, __, out, n=name: sizes.update({n: power(out)}))
    with torch.no_grad():
        out = net(random(0, 8, 3, 16, 16), torch.linspace(-1, 1, 8))
    blocks = {k: v for k, v in sizes.items() if k.count(".") == 1}
    assert len(blocks) == 14
    assert all(0.5 < v < 1.6 for v in blocks.values()), blocks
    assert 0.4 < power(out) < 1.6


def test_output_starts_at_zero():
    net = EDM2((3, 8, 8), **TINY)
    assert not net(*inputs(net)).any()


def test_norms_of_weights_do_not_matter():
    net = awake(num_classes=3)
    args = inputs(net)
    with torch.no_grad():
        before = net(*args)
        for n, parameter in enumerate(net.parameters()):
            if parameter.ndim:  # each output feature by its own factor
                rows = random(n, len(parameter), *(1,) * (parameter.ndim - 1))
                parameter.mul_(4 * rows.exp())
        torch.testing.assert_close(net(*args), before, rtol=1e-3, atol=2e-3)


def test_training_normalises_weights_in_place_and_keeps_the_function():
    net = awake()
    args = inputs(net)
    for parameter in net.parameters():
        if parameter.ndim:
            parameter.data *= 50
    with torch.no_grad():
        before = net(*args)
        assert net.stem.weight.std() > 10  # evaluation leaves the weights alone
        after = net.train()(*args)
        net.log_variance(args[1])
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)
    for name, parameter in net.named_parameters():
        if parameter.ndim:
            rms = parameter.flatten(1).square().mean(1).sqrt()
            assert (rms - 1).abs().max() < 1e-3, name


def test_gradients_of_normalised_weights_are_tangent():
    """The size of a weight has no effect, hence no gradient points along it."""
    net = awake().train()
    net(*inputs(net)).square().mean().backward()
    w, g = net.stem.weight.flatten(1), net.stem.weight.grad.flatten(1)
    cosine = (w * g).sum(1) / (w.norm(dim=1) * g.norm(dim=1))
    assert cosine.abs().max() < 1e-3
    assert g.norm() > 1e-3


def test_two_passes_before_a_backward_pass():
    net = awake().train()
    args = inputs(net)
    net(*args)
    (net(*args) + net(*args)).square().mean().backward()
    twice = net.stem.weight.grad.clone()
    net.zero_grad()
    (2 * net(*args)).square().mean().backward()
    torch.testing.assert_close(net.stem.weight.grad, twice, rtol=1e-3, atol=1e-5)


def test_gradients_are_those_of_finite_differences():
    net = awake(num_classes=3).double()
    x, c, y = inputs(net, dtype=torch.float64)
    c = c.double()
    weight = random(5, *x.shape, dtype=torch.float64)
    where = [x.requires_grad_(), *net.parameters()]
    directions = [random(9 + n, *v.shape, dtype=torch.float64) for n, v in enumerate(where)]

    def value():
        return (net(x, c, y) * weight).sum()

    gradients = torch.autograd.grad(value(), where, allow_unused=True)
    for v, g, d in zip(where, gradients, directions, strict=True):
        if g is None:  # the uncertainty's head
            assert v is net.uncertainty.weight
            continue
        h = 1e-5
        with torch.no_grad():
            v += h * d
            ahead = value()
            v -= 2 * h * d
            behind = value()
            v += h * d
        slope = (ahead - behind) / (2 * h)
        torch.testing.assert_close((g * d).sum(), slope, rtol=1e-5, atol=1e-5)
        assert g.any()


@pytest.mark.parametrize("training", [False, True])
def test_compiled_network_is_the_same(training):
    torch._dynamo.reset()
    net = awake(num_classes=3).train(training)
    args = inputs(net)
    net.requires_grad_(training)
    expected = net(*args)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    net.stem.weight.data *= 3
    out = compiled(*args)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)
    rms = net.stem.weight.detach().square().mean().sqrt()
    assert rms == pytest.approx(1 if training else 3, rel=0.2)


def test_checkpointing_gives_the_same_gradients():
    args, results = None, []
    for checkpointing in (False, True):
        net = awake(checkpointing=checkpointing, dropout=0.2).train()
        args = args or inputs(net)
        net(*args)  # weights normalised
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, k=kept: k.append(t) or t, lambda t: t
        ):
            torch.manual_seed(3)
            out = net(*args)
        out.square().mean().backward()
        results.append((out, [p.grad for p in net.parameters()], sum(t.numel() for t in kept)))
    (out, gradients, size), (again, recomputed, less) = results
    torch.testing.assert_close(again, out)
    torch.testing.assert_close(recomputed, gradients)
    assert less < size / 4


def test_dropout_acts_in_training_only():
    net = awake(dropout=0.5)
    args = inputs(net)
    with torch.no_grad():
        assert torch.equal(net(*args), net(*args))
        net.train()
        assert (net(*args) - net(*args)).abs().max() > 0.01


def test_half_precision_is_near():
    net = awake(num_classes=3)
    x, c, y = inputs(net)
    with torch.no_grad():
        expected = net(x, c, y)
        half = net.bfloat16()(x.bfloat16(), c, y)
    assert half.dtype == torch.bfloat16
    assert (half - expected).std() < 0.05 * expected.std()
    trained = net.train()(x.bfloat16(), c, y)
    trained.float().square().mean().backward()
    assert net.stem.weight.grad.isfinite().all()


def test_items_of_a_batch_do_not_mix():
    net = awake(num_classes=3)
    x, c, y = inputs(net)
    with torch.no_grad():
        alone = net(x[1:2], c[1:2], y[1:2])
        torch.testing.assert_close(net(x, c, y)[1:2], alone, rtol=1e-5, atol=1e-5)


def test_activations_are_clipped_and_channels_last():
    net = awake(clip=0.5)
    seen = []
    for module in (*net.encoder.values(), *net.decoder.values()):
        module.register_forward_hook(lambda _, __, out: seen.append(out))
    with torch.no_grad():
        net(*inputs(net))
    assert len(seen) == 10
    assert all(out.abs().max() == 0.5 for out in seen)
    assert all(out.is_contiguous(memory_format=torch.channels_last) for out in seen)
    assert awake(clip=None)(*inputs(net)).isfinite().all()


def test_attention_sits_at_its_resolutions_and_in_the_middle():
    def places(**changes):
        return {k.rsplit(".", 2)[0] for k in awake(**changes).state_dict() if "qkv" in k}

    middle = "decoder.4x4_in0"
    low = {"encoder.4x4_block0", middle, "decoder.4x4_block0", "decoder.4x4_block1"}
    high = {"encoder.8x8_block0", "decoder.8x8_block0", "decoder.8x8_block1"}
    assert places() == low
    assert places(attention=(8,)) == {middle} | high
    assert places(attention=()) == {middle}
    assert places(attention=(8, 4), head_dim=16) == low  # 8 channels are less than a head


def test_configuration_survives_yaml():
    net = awake(num_classes=3, clip=None, dropout=0.1)
    section = config.describe(net)
    again = config.build({**section, "name": "scoresde.nets.edm2.EDM2"}, nets, "net")
    assert config.describe(again) == section
    again.load_state_dict(net.state_dict())
    torch.testing.assert_close(again.eval()(*inputs(net)), net(*inputs(net)))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"shape": (5,)}, r"\(C, H, W\)"),
        ({"shape": (3, 8, 7)}, "multiples of 2, not"),
        ({"multipliers": ()}, "multipliers of at least 1"),
        ({"head_dim": 0}, "head_dim of at least 1"),
        ({"res_balance": 1.5}, r"res_balance in \[0, 1\], got 1.5"),
        ({"head_dim": 5, "multipliers": (1, 4)}, "32 channels do not divide into 6 heads"),
    ],
)
def test_refusals_say_what_is_accepted(changes, match):
    with pytest.raises(ValueError, match=match):
        EDM2(**{"shape": (3, 8, 8), **TINY, **changes})


def test_presets_of_the_paper():
    with torch.device("meta"):
        sizes = {
            k: sum(p.numel() for p in EDM2((4, 64, 64), num_classes=1000, **v).parameters())
            for k, v in EDM2.presets.items()
        }
    published = {"xs": 125, "s": 280, "m": 498, "l": 778, "xl": 1119, "xxl": 1523}
    for size, millions in published.items():
        assert sizes[size] / 1e6 == pytest.approx(millions, rel=0.004), size
    assert sizes["tiny"] < sizes["small"] < sizes["base"] < sizes["xs"]
