import pytest
import torch
from torch.nn import functional

from scoresde.config import ConfigError, construct, describe
from scoresde.nets.ddpm import DDPMUNet

TINY = {"widths": (8, 16), "blocks": 1, "groups": 4, "embedding": "positional"}


def awake(shape=(3, 8, 8), dtype=torch.float32, **changes):
    """A network whose residual branches and norms all show in the output."""
    generator = torch.Generator().manual_seed(0)
    net = DDPMUNet(shape, **{**TINY, **changes}).to(dtype)
    for parameter in net.parameters():
        std = 0.3 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = (noise * std + (parameter.ndim < 2)).to(parameter)
    return net.eval()


def inputs(net, batch=3, dtype=torch.float32):
    x = torch.randn(batch, *net.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return x, torch.tensor([0.0, 421.0, 999.0])[:batch]


# The network once more, from the paper, on a state dict.


def norm(p, key, x):
    return functional.group_norm(x, 4, p[f"{key}.weight"], p[f"{key}.bias"], eps=1e-6)


def conv(p, key, x, **kw):
    return functional.conv2d(x, p[f"{key}.weight"], p[f"{key}.bias"], **kw)


def linear(p, key, x):
    return x @ p[f"{key}.weight"].T + p[f"{key}.bias"]


def silu(x):
    return x * torch.sigmoid(x)


def block(p, key, x, e):
    h = conv(p, f"{key}.conv1", silu(norm(p, f"{key}.norm1", x)), padding=1)
    h = h + linear(p, f"{key}.affine", e)[:, :, None, None]
    h = conv(p, f"{key}.conv2", silu(norm(p, f"{key}.norm2", h)), padding=1)
    if f"{key}.skip.weight" in p:
        x = linear(p, f"{key}.skip", x.movedim(1, 3)).movedim(3, 1)
    return x + h


def attend(p, key, x):
    h = norm(p, f"{key}.norm", x).flatten(2)
    w, b = p[f"{key}.qkv.weight"].chunk(3), p[f"{key}.qkv.bias"].chunk(3)
    q, k, v = (wi @ h + bi[:, None] for wi, bi in zip(w, b, strict=True))
    weights = (q.transpose(1, 2) @ k / x.shape[1] ** 0.5).softmax(2)
    out = p[f"{key}.out.weight"] @ (v @ weights.transpose(1, 2)) + p[f"{key}.out.bias"][:, None]
    return x + out.reshape(x.shape)


def reference(p, x, step):
    k = torch.arange(4, dtype=x.dtype)
    angle = step[:, None] * 10000 ** (-k / 3)
    e = linear(p, "embed1", torch.cat([angle.sin(), angle.cos()], 1).to(x.dtype))
    e = silu(linear(p, "embed2", silu(e)))
    first = conv(p, "stem", x, padding=1)
    second = block(p, "encoder.0.stages.0.block", first, e)
    third = conv(p, "encoder.0.resample.conv", functional.pad(second, (0, 1, 0, 1)), stride=2)
    h = block(p, "encoder.1.stages.0.block", third, e)
    fourth = attend(p, "encoder.1.stages.0.attention", h)
    h = attend(p, "mid.0.attention", block(p, "mid.0.block", fourth, e))
    h = block(p, "mid.1.block", h, e)
    for i, skip in enumerate((fourth, third)):
        h = block(p, f"decoder.0.stages.{i}.block", torch.cat([h, skip], 1), e)
        h = attend(p, f"decoder.0.stages.{i}.attention", h)
    h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
    h = conv(p, "decoder.0.resample.conv", h, padding=1)
    for i, skip in enumerate((second, first)):
        h = block(p, f"decoder.1.stages.{i}.block", torch.cat([h, skip], 1), e)
    return conv(p, "head", silu(norm(p, "head_norm", h)), padding=1)


def test_output_is_that_of_the_paper():
    net = awake(dtype=torch.float64)
    x, step = inputs(net, dtype=torch.float64)
    wanted = reference(net.state_dict(), x, step.double())
    torch.testing.assert_close(net(x, step.double()), wanted, rtol=1e-4, atol=1e-4)
    net.center_input, net.over_label = True, True
    wanted = (
        reference(net.state_dict(), 2 * x - 1, step.double() + 2) / (step + 2)[:, None, None, None]
    )
    torch.testing.assert_close(net(x, step.double() + 2), wanted, rtol=1e-4, atol=1e-4)


VARIANTS = [
    {},
    {"attention": (0, 1), "attention_up": (0,), "head_dim": 4},
    {"residual_down": (0,), "residual_up": (1,), "adaptive": True},
    {"middle": "plain", "middle_scale": 2.0, "act": "mish"},
    {"middle": "none", "padding": (1, 1), "act": "gelu"},
    {"middle_groups": 0, "embedding": "learned"},
    {"embedding": "log-fourier", "over_label": True, "center_input": True},
    {"embedding": "waves", "out_channels": 5},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_compiled_and_checkpointed_agree(changes):
    net = awake(**changes)
    x, label = inputs(net)
    label = label + 1
    plain = net(x, label)
    assert plain.shape == (3, changes.get("out_channels", 3), 8, 8)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, label), plain)
    with torch.no_grad():
        torch.testing.assert_close(net(x, label), plain)
    plain.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    net.checkpointing = True
    net(x, label).square().sum().backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], msg=name)


def test_checkpointing_recomputes_the_blocks():
    net = awake(checkpointing=True)
    calls = []
    for module in (net.encoder[0].stages[0], net.mid[1], net.decoder[1].stages[1]):
        module.block.conv1.register_forward_hook(lambda *_: calls.append(1))
    net(*inputs(net)).sum().backward()
    assert len(calls) == 6


@pytest.mark.parametrize("shape", [(2, 16), (2, 7), (3, 5, 9), (1, 4, 6, 5)], ids=str)
def test_any_size_of_one_to_three_axes(shape):
    net = awake(shape, residual_down=(0,))
    x, step = inputs(net)
    assert net(x, step).shape == x.shape
    assert net(x, step).is_contiguous()
    torch.testing.assert_close(net(x, step)[1:2], net(x[1:2], step[1:2]), rtol=1e-4, atol=1e-5)


def test_the_margins_are_cropped_at_their_place():
    """A size of 5 in a network of stride 4 is one of 8: a zero before and two after."""
    net = awake((3, 8, 5), widths=(8, 8, 8))
    x, step = inputs(net)
    whole = net(functional.pad(x, (1, 2)), step)
    torch.testing.assert_close(net(x, step), whole[..., 1:6])


def test_pictures_stay_channels_last():
    net = awake()
    seen = []
    net.mid[0].block.conv2.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    net(*inputs(net))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype):
    net = awake(num_classes=3)
    x, step = inputs(net)
    y = torch.tensor([0, 1, 2])
    plain = net(x, step, y).detach()
    out = awake(num_classes=3, dtype=dtype)(x.to(dtype), step, y)
    assert out.dtype == dtype
    scale = plain.abs().max()
    error = (out.double() - plain.double()).abs().max() / scale
    assert error < (1e-5 if dtype == torch.float64 else 0.1)


def test_classes():
    net = awake(num_classes=4)
    x, step = inputs(net)
    y = torch.tensor([3, 0, 1])
    rows = functional.one_hot(y, 4)
    out = net(x, step, y)
    torch.testing.assert_close(net(x, step, rows), out)
    assert not torch.allclose(net(x, step), out)
    added = awake(classes="vector")
    added.load_state_dict({k: v for k, v in net.state_dict().items() if "class" not in k})
    torch.testing.assert_close(added(x, step, net.class_table.weight[y]), out)
    torch.testing.assert_close(added(x, step), net(x, step))
    label = awake(classes="label")
    e = label.class_mlp(label.features(y.float()))
    added.load_state_dict({k: v for k, v in label.state_dict().items() if "class" not in k})
    torch.testing.assert_close(added(x, step, e), label(x, step, y))


def test_learned_steps_are_rounded():
    net = awake(embedding="learned", steps=10)
    x, _ = inputs(net)
    between, whole = torch.tensor([2.4, 3.6, 12.0]), torch.tensor([2.0, 4.0, 9.0])
    torch.testing.assert_close(net(x, between), net(x, whole))


def test_starts_near_zero():
    torch.manual_seed(0)
    net = DDPMUNet((3, 8, 8), **TINY)
    x, step = inputs(net)
    assert 0 < net(x, step).abs().max() < 1e-3
    assert net.encoder[0].stages[0].block.conv2.weight.abs().max() < 1e-4
    assert net.mid[0].attention.out.weight.abs().max() < 1e-4


@pytest.mark.parametrize("preset", DDPMUNet.presets)
def test_presets_are_rebuilt_from_what_they_describe(preset):
    with torch.device("meta"):
        net = DDPMUNet((3, 32, 32), **DDPMUNet.presets[preset], attention_up=(1,))
        section = describe(net)
        assert section.pop("name") == "ddpm-unet"
        again = construct(DDPMUNet, section, "net")
    assert describe(again) == describe(net)
    shapes = {k: v.shape for k, v in net.state_dict().items()}
    assert shapes == {k: v.shape for k, v in again.state_dict().items()}


def test_the_published_sizes():
    """Parameters as the paper counts them: 35.7 million and 114 million."""
    counts = []
    with torch.device("meta"):
        for preset, size in (("ddpm-cifar10", 32), ("ddpm-256", 256)):
            net = DDPMUNet((3, size, size), **DDPMUNet.presets[preset], embedding="positional")
            counts.append(sum(p.numel() for p in net.parameters()) / 1e6)
    assert [round(counts[0], 1), round(counts[1])] == [35.7, 114]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": (5,)}, "1 to 3 spatial axes"),
        ({"widths": ()}, "widths >= 4"),
        ({"blocks": 0}, "blocks >= 1"),
        ({"groups": 5}, "8 channels do not split into 5 groups"),
        ({"head_dim": 3}, "do not split into 5 attention heads"),
        ({"head_dim": 32}, "do not split into 0 attention heads"),
        ({"attention": (2,)}, "attention of ddpm-unet names levels 0 to 1"),
        ({"residual_up": (-1,)}, "residual_up of ddpm-unet"),
        ({"padding": (1, 0)}, r"padding \(0, 1\) or \(1, 1\)"),
        ({"middle_scale": 0.0}, "middle_scale"),
        ({"middle": "attend"}, "did you mean 'attention'"),
        ({"act": "tanh"}, "act of ddpm-unet"),
        ({"embedding": "sine"}, "embedding of ddpm-unet"),
        ({"classes": "rows"}, "classes of ddpm-unet"),
    ],
    ids=str,
)
def test_refuses_what_makes_no_network(changes, message):
    with pytest.raises((ValueError, ConfigError), match=message):
        DDPMUNet(**{"shape": (3, 8, 8), **TINY, **changes})
