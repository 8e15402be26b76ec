import math

import pytest
import torch
from torch.nn import functional

from scoresde.config import ConfigError, construct, describe
from scoresde.nets.dit import DiT, StepEmbedding, grid_waves, patchify, unpatchify

SMALL = {"width": 32, "depth": 2, "heads": 2}


def awake(net: DiT, seed: int = 0) -> DiT:
    """The network with no parameter at its start, so that every path shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        std = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.5
        parameter.data.normal_(0, std, generator=generator)
    return net.eval()


def small(shape=(3, 8, 8), **fields) -> DiT:
    return awake(DiT(shape, **{**SMALL, **fields}))


@pytest.mark.parametrize(
    ("shape", "other"),
    [((2, 12), (20,)), ((3, 8, 12), (4, 6)), ((1, 4, 6, 8), (2, 2, 4))],
    ids=str,
)
def test_any_axes_and_any_size_that_the_patch_divides(shape, other):
    net = small(shape)
    x = torch.randn(2, *shape)
    assert net(x, torch.zeros(2)).shape == x.shape
    assert small(shape, out_channels=5)(x, torch.zeros(2)).shape == (2, 5, *shape[1:])
    x = torch.randn(2, shape[0], *other)
    assert net(x, torch.zeros(2)).shape == x.shape


@pytest.mark.parametrize("size", [(9,), (6, 12), (3, 6, 9)], ids=str)
def test_linear_over_patches_is_the_strided_convolution(size):
    n, patch = len(size), 3
    x, weight = torch.randn(2, 4, *size), torch.randn(5, 4, *[patch] * n)
    conv = (functional.conv1d, functional.conv2d, functional.conv3d)[n - 1]
    tokens = patchify(x, patch) @ weight.movedim(1, -1).flatten(1).T
    torch.testing.assert_close(
        tokens, conv(x, weight, stride=patch).flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-4
    )
    back = unpatchify(patchify(x, patch), [s // patch for s in size], patch)
    torch.testing.assert_close(back, x, rtol=0, atol=0)


def test_images_leave_channels_last():
    out = small()(torch.randn(2, 3, 8, 8), torch.zeros(2))
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_positions_are_sines_and_cosines_last_axis_first():
    flat = grid_waves((3, 4), (3, 4), 16)
    assert flat.dtype == torch.float64
    for row in range(3):
        for column in range(4):
            for k in range(4):
                rate = 10000 ** (-k / 4)
                got = flat[4 * row + column, k::4].tolist()
                wanted = [f(rate * i) for i in (column, row) for f in (math.sin, math.cos)]
                assert got == pytest.approx(wanted, abs=1e-14)


def test_positions_of_another_size_cover_the_same_range():
    fine, coarse = grid_waves((6, 4), (3, 4), 16), grid_waves((3, 4), (3, 4), 16)
    torch.testing.assert_close(fine.reshape(6, 4, 16)[::2], coarse.reshape(3, 4, 16))
    assert (fine[:4] - fine[4:8]).abs().max() > 0.1  # and the rows between are others


def test_positions_tell_all_places_of_a_volume_apart():
    flat = grid_waves((3, 4, 5), (3, 4, 5), 32)  # 5 waves an axis, two channels left
    assert not flat[:, 30:].any()
    assert torch.cdist(flat, flat).add(torch.eye(60) * 9).min() > 0.1


@pytest.mark.parametrize("shape", [(2, 8), (3, 8, 8), (1, 4, 4, 4)], ids=str)
def test_the_start_is_zero(shape):
    net = DiT(shape, **SMALL, num_classes=3)
    x = torch.randn(2, *shape)
    assert not net(x, torch.randn(2), torch.tensor([0, 1])).any()
    tokens = torch.randn(2, 4, 32)
    torch.testing.assert_close(net.body[0](tokens, torch.randn(2, 32)), tokens, rtol=0, atol=0)


def test_initial_weights_are_the_papers():
    net = DiT((3, 8, 8), width=64, depth=1, heads=2, num_classes=200, embedding="positional")
    condition = net.conditions[0]
    for layer in (condition.classes, condition.embed.mlp[0], condition.embed.mlp[2]):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for layer in (net.stem, net.body[0].qkv, net.body[0].mlp[0]):
        bound = math.sqrt(6 / sum(layer.weight.shape))
        assert 0.98 * bound < layer.weight.abs().max() <= bound
        assert not layer.bias.any()


def test_output_is_the_formula():
    """One block in float64, attention and norms written out."""
    net = small((2, 6, 4), depth=1, num_classes=3, mlp_eps=1e-2).double()
    x, c_noise = torch.randn(2, 2, 6, 4, dtype=torch.float64), torch.tensor([-0.5, 1.0]).double()
    y = torch.tensor([2, 0])

    def norm(h, eps=1e-6):
        h = h - h.mean(-1, keepdim=True)
        return h / (h.square().mean(-1, keepdim=True) + eps).sqrt()

    embed, classes = net.conditions[0].embed, net.conditions[0].classes
    e = embed(c_noise) + classes.weight[y]
    e = e * e.sigmoid()
    block = net.body[0]
    a1, b1, g1, a2, b2, g2 = block.modulation(e)[:, None].split(32, 2)
    h = net.stem(patchify(x, 2)) + grid_waves((3, 2), (3, 2), 32)
    q, k, v = block.qkv(norm(h) * (1 + b1) + a1).split(32, 2)
    heads = []
    for i in (slice(0, 16), slice(16, 32)):
        logits = q[..., i] @ k[..., i].transpose(1, 2) / 4
        heads.append(logits.softmax(2) @ v[..., i])
    h = h + g1 * block.out(torch.cat(heads, 2))
    inner = block.mlp[0](norm(h, 1e-2) * (1 + b2) + a2)
    inner = inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3))) / 2
    h = h + g2 * block.mlp[3](inner)
    shift, scale = net.head.modulation(e)[:, None].split(32, 2)
    wanted = unpatchify(net.head.linear(norm(h) * (1 + scale) + shift), (3, 2), 2)
    torch.testing.assert_close(net(x, c_noise, y), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("embedding", ["waves", "positional"])
@pytest.mark.parametrize("shared", [True, False])
def test_conditions_reach_the_output(embedding, shared):
    net = small(num_classes=3, embedding=embedding, shared_embedding=shared)
    x, y = torch.randn(2, 3, 8, 8), torch.tensor([0, 2])
    none, zeros = torch.tensor([3, 3]), torch.zeros(2)
    assert (net(x, zeros + 1) - net(x, zeros + 1.02)).abs().max() > 1e-5
    torch.testing.assert_close(net(x, zeros, y), net(x, zeros, torch.eye(3)[y]))
    torch.testing.assert_close(net(x, zeros), net(x, zeros, none))
    assert (net(x, zeros, y) - net(x, zeros)).abs().max() > 1e-3


def test_each_block_may_have_an_embedding_of_its_own():
    net = small(num_classes=3, shared_embedding=False, depth=3)
    x, y = torch.randn(2, 3, 8, 8), torch.tensor([0, 2])
    before = net(x, torch.zeros(2), y)
    for condition in net.conditions:
        rows = condition.classes.weight.data
        kept = rows.clone()
        rows[:] = 0
        assert (net(x, torch.zeros(2), y) - before).abs().max() > 1e-3
        rows[:] = kept
    assert len(net.conditions) == 3


def test_items_of_a_batch_do_not_mix():
    net = small(num_classes=4)
    x, c, y = torch.randn(4, 3, 8, 8), torch.linspace(-1, 1, 4), torch.arange(4)
    torch.testing.assert_close(net(x, c, y)[2:3], net(x[2:3], c[2:3], y[2:3]))


@pytest.mark.parametrize("shared", [True, False])
def test_every_parameter_learns(shared):
    net = small(num_classes=2, out_channels=6, shared_embedding=shared)
    out = net(torch.randn(4, 3, 8, 8), torch.zeros(4), torch.tensor([0, 1, 0, 2]))
    out.square().sum().backward()
    idle = [k for k, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_steps_are_cosines_then_sines(shift):
    embed = StepEmbedding(16, shift).double()
    step = torch.tensor([0.0, 17.0, 500.5])
    rates = 10000.0 ** (-torch.arange(128, dtype=torch.float64) / (128 - shift))
    angle = step.double()[:, None] * rates
    wanted = embed.mlp(torch.cat([angle.cos(), angle.sin()], 1))
    torch.testing.assert_close(embed(step), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(embed(torch.tensor([17])), wanted[1:2], rtol=0, atol=1e-5)


def test_half_precision_keeps_steps_and_output():
    net = small(num_classes=3, embedding="positional", freq_shift=1.0)
    x, step, y = torch.randn(2, 3, 8, 8), torch.tensor([998.0, 3.0]), torch.tensor([1, 3])
    wanted = net(x, step, y)
    out = net.bfloat16()(x.bfloat16(), step, y)
    assert out.dtype == torch.bfloat16
    assert (out.float() - wanted).abs().max() < 0.05 * wanted.abs().max()


@pytest.mark.parametrize("fields", [{}, {"shared_embedding": False, "embedding": "positional"},
                                    {"checkpointing": True}], ids=str)  # fmt: skip
def test_compiles_without_a_break(fields):
    net = small(num_classes=3, **fields)
    args = torch.randn(2, 3, 8, 8), torch.tensor([0.1, 0.5]), torch.tensor([0, 3])
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*args), net(*args))


def test_checkpointing_recomputes_with_equal_gradients():
    x, c, y = torch.randn(2, 3, 8, 8), torch.tensor([0.1, 0.5]), torch.tensor([0, 2])
    grads, calls = [], []
    for checkpointing in (False, True):
        net = small(num_classes=3, checkpointing=checkpointing)
        count: list[int] = []
        net.body[0].mlp.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        net(x, c, y).square().sum().backward()
        calls.append(len(count))
        grads.append({k: p.grad for k, p in net.named_parameters()})
    assert calls == [1, 2]
    for key, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][key], msg=key)


@pytest.mark.parametrize("silent", ["out", "mlp"])
def test_dropout_acts_on_both_branches_in_training_alone(silent):
    net = small(dropout=0.5)
    for block in net.body:
        for parameter in getattr(block, silent).parameters():
            parameter.data.zero_()
    x, c = torch.randn(1, 3, 8, 8), torch.zeros(1)
    torch.testing.assert_close(net(x, c), net(x, c), rtol=0, atol=0)
    net.train()
    assert (net(x, c) - net(x, c)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("preset", "millions"), [("small", 33), ("base", 130), ("large", 458), ("xlarge", 675)]
)
def test_presets_have_the_papers_sizes(preset, millions):
    """Table 1 of the paper: latents of 4x32x32, 1000 classes, learned variance."""
    with torch.device("meta"):
        net = DiT((4, 32, 32), **DiT.presets[preset], num_classes=1000, out_channels=8,
                  embedding="positional")  # fmt: skip
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


def test_tiny_is_small():
    assert sum(p.numel() for p in DiT((1, 28, 28), **DiT.presets["tiny"]).parameters()) < 1.5e6


def test_rebuilt_from_its_description():
    net = small((3, 8, 4), num_classes=3, embedding="positional", freq_shift=1.0, mlp_eps=1e-5)
    section = describe(net)
    assert section.pop("name") == "dit"
    again = construct(DiT, section, "net").eval()
    again.load_state_dict(net.state_dict())
    args = torch.randn(2, 3, 8, 4), torch.tensor([1.0, 900.0]), torch.tensor([0, 3])
    torch.testing.assert_close(again(*args), net(*args), rtol=0, atol=0)
    with pytest.raises(ConfigError, match=r"embedding.*'waves' or 'positional'"):
        construct(DiT, {**section, "embedding": "fourier"}, "net")


@pytest.mark.parametrize(
    ("shape", "fields", "message"),
    [
        ((5,), {}, "use the mlp"),
        ((1, 2, 2, 2, 2), {}, "1 to 3 spatial axes"),
        ((3, 8, 9), {}, r"multiples of its patch, 2, not \(8, 9\)"),
        ((3, 8, 8), {"heads": 5}, "multiple of its heads.*width 32, heads 5"),
        ((3, 8, 8), {"depth": 0}, "depth of at least 1, got 0"),
        ((3, 8, 8), {"out_channels": 0}, "out_channels of at least 1, got 0"),
        ((3, 8, 8), {"num_classes": 0}, "num_classes of at least 1, got 0"),
        ((3, 0, 8), {}, r"shape \(3, 0, 8\)"),
        ((3, 8, 8), {"mlp_ratio": 0.0}, "mlp_ratio 0.0"),
        ((3, 8, 8), {"embedding": "fourier"}, "'waves' or 'positional', not 'fourier'"),
    ],
)
def test_refused_fields(shape, fields, message):
    with pytest.raises(ValueError, match=message):
        DiT(shape, **{**SMALL, **fields})


def test_refused_inputs():
    net = small()
    with pytest.raises(ValueError, match=r"multiples of its patch, 2, not \(7, 8\)"):
        net(torch.zeros(1, 3, 7, 8), torch.zeros(1))
    with pytest.raises(ValueError, match=r"does not fit a dit of \(B, 3, size, size\)"):
        net(torch.zeros(1, 4, 8, 8), torch.zeros(1))
    with pytest.raises(ValueError, match="without classes"):
        net(torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.tensor([0]))
