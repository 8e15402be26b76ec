import copy
import dataclasses

import pytest
import torch

from scoresde import config
from scoresde.nets.adm import ADM, Parts
from scoresde.nets.adm_classifier import ADMClassifier

TINY = ADM.presets["tiny"]
SMALL = {"width": 8, "multipliers": (1, 2), "blocks": 1, "head_dim": 8, "groups": None}
POOLS = ("adaptive", "attention", "spatial", "spatial-v2")


def awake(kind: type = ADM, **changes: object) -> ADM:
    """A network with no layer left at zero, so that every path shows in the output."""
    torch.manual_seed(0)
    net = kind(**{"shape": (3, 8, 8), **SMALL, "attention": (1,), **changes})
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return net.eval()


def inputs(net, batch: int = 3, dtype: torch.dtype = torch.float32) -> tuple:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, *net.shape, generator=generator).to(dtype)
    c = torch.linspace(-1, 0.8, batch, dtype=dtype)
    if isinstance(net, ADMClassifier):
        return x, c
    return x, c, torch.arange(batch) % net.num_classes if net.num_classes else None


VARIANTS = {
    "plain": {},
    "convolutions": {"resample": "conv", "adaptive": False},
    "nothing": {"resample": "plain"},
    "signal": {"shape": (2, 20)},
    "volume": {"shape": (1, 4, 4, 6)},
    "odd": {"shape": (3, 7, 10), "multipliers": (1, 1, 2), "out_channels": 6},
    "classes": {"num_classes": 3, "augment": 2, "embedding": "positional"},
    "heads": {"heads": 2, "decoder_heads": 4, "attention": (0, 1)},
    "signal, convolutions": {"shape": (2, 8), "resample": "conv"},
    "volume, nothing": {"shape": (1, 4, 4, 4), "resample": "plain"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_shapes_and_precision(variant):
    net = awake(**VARIANTS[variant])
    args = inputs(net)
    with torch.no_grad():
        out = net(*args)
        assert out.shape == (3, net.out_channels or net.shape[0], *net.shape[1:])
        double = copy.deepcopy(net).double()(args[0].double(), args[1].double(), args[2])
        torch.testing.assert_close(out, double.float(), rtol=1e-4, atol=1e-4)
        brain = out
        if len(net.shape) < 4:  # torch on the CPU has no mean of volumes in half precision
            half = copy.deepcopy(net).bfloat16()
            brain = half(args[0].bfloat16(), args[1], args[2])
            assert brain.dtype == torch.bfloat16
    assert (brain - out).norm() < 0.1 * out.norm()
    assert out.std() > 0.01


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_of_a_batch_are_apart(variant):
    net = awake(**VARIANTS[variant])
    x, c, y = inputs(net)
    with torch.no_grad():
        out = net(x, c, y)
        alone = net(x[1:2], c[1:2], None if y is None else y[1:2])
    torch.testing.assert_close(out[1:2], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_with_and_without_grad_mode(variant):
    net = awake(**VARIANTS[variant])
    args = inputs(net)
    with torch.no_grad():
        silent = net(*args)
    torch.testing.assert_close(net(*args).detach(), silent, rtol=1e-5, atol=1e-5)


def test_every_parameter_matters():
    net = awake(num_classes=3, augment=2, low_res=True, attention=(0, 1))
    x, c, y = inputs(net)
    net(x, c, y, x[:, :, ::2, ::2], torch.randn(3, 2)).square().sum().backward()
    idle = [k for k, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not idle


def test_a_gradient_is_that_of_finite_differences():
    net = awake().double()
    x, c, _ = inputs(net, 1, torch.float64)
    direction = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    weight = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(3))
    x.requires_grad_()
    (gradient,) = torch.autograd.grad((weight * net(x, c)).sum(), x)
    with torch.no_grad():
        differences = (net(x + 1e-5 * direction, c) - net(x - 1e-5 * direction, c)) / 2e-5
    along = (gradient * direction).sum()
    torch.testing.assert_close(along, (weight * differences).sum(), rtol=1e-6, atol=0.0)


def test_the_start_is_zero():
    net = ADM((3, 8, 8), **SMALL)
    assert not net(*inputs(net)).any()


@pytest.mark.parametrize("kind", [ADM, ADMClassifier])
def test_blocks_start_as_the_identity(kind):
    net = kind((3, 8, 8), **SMALL, attention=(1,))
    x, embedding = torch.randn(2, 16, 4, 4), torch.randn(2, 32)
    stage = net.trunk.middle[0]
    assert stage.attention is not None
    torch.testing.assert_close(stage(x, embedding), x)


def test_augmentation_starts_without_effect():
    net = ADM((3, 8, 8), **SMALL, attention=(), augment=2)
    c = torch.zeros(2)
    assert torch.equal(net.condition(c, None, torch.ones(2, 2)), net.condition(c, None, None))


def test_other_sizes_are_padded_around_and_cropped():
    net = awake(shape=(3, 7, 10), multipliers=(1, 1, 2))
    x, c, _ = inputs(net)
    with torch.no_grad():
        padded = net(torch.nn.functional.pad(x, (1, 1, 0, 1)), c)
        torch.testing.assert_close(net(x, c), padded[:, :, :7, 1:11])


def test_conditions():
    net = awake(num_classes=3, augment=2)
    x, c, y = inputs(net)
    with torch.no_grad():
        out, nothing = net(x, c, y), net(x, c)
        torch.testing.assert_close(net(x, c, torch.eye(3)[y]), out)
        torch.testing.assert_close(net(x, c, torch.zeros(3, 3)), nothing)
        torch.testing.assert_close(net(x, c, torch.full((3,), 3)), nothing)
        torch.testing.assert_close(net(x, c, y, augment=torch.zeros(3, 2)), out)
        assert not torch.allclose(out, nothing)
        assert not torch.allclose(net(x, c, y, augment=torch.ones(3, 2)), out)
        assert not torch.allclose(net(x, c + 0.5, y), out)


def test_small_pictures_are_stretched():
    net = awake(low_res=True)
    x, c, _ = inputs(net)
    flat = torch.full((3, 3, 2, 2), 0.7)
    with torch.no_grad():
        same = net(x, c, low_res=torch.full((3, 3, 8, 8), 0.7))
        torch.testing.assert_close(net(x, c, low_res=flat), same)
        assert not torch.allclose(net(x, c, low_res=2 * flat), same)
    with pytest.raises(ValueError, match="needs the condition low_res"):
        net(x, c)
    with pytest.raises(ValueError, match="takes no condition low_res"):
        awake()(x, c, low_res=flat)


@pytest.mark.parametrize("variant", ["plain", "convolutions", "heads"])
def test_checkpointing_gives_the_same_gradients(variant):
    gradients = []
    for flag in (False, True):
        net = awake(**VARIANTS[variant], checkpointing=flag)
        net(*inputs(net)).square().sum().backward()
        gradients.append({k: p.grad for k, p in net.named_parameters()})
    torch.testing.assert_close(*gradients)


def test_checkpointing_computes_blocks_again():
    counts = []
    for kind in (ADM, ADMClassifier):
        for flag in (False, True):
            net, calls = awake(kind, checkpointing=flag), []
            blocks = [m for m in net.modules() if type(m).__name__ == "ResBlock"]
            for block in blocks:
                block.conv1.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            net(*inputs(net)).sum().backward()
            counts.append(len(calls) / len(blocks))
    assert counts == [1, 2, 1, 2]


@pytest.mark.parametrize("kind", [ADM, ADMClassifier])
def test_compiles_in_one_graph(kind):
    net = awake(kind, checkpointing=False)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs(net)), net(*inputs(net)))


def test_pictures_stay_channels_last():
    net = awake(shape=(3, 16, 16), resample="conv", attention=())
    seen = []
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        net(*inputs(net))
    last = torch.channels_last
    assert seen
    assert all(t.is_contiguous(memory_format=last) for pair in seen for t in pair)


@pytest.mark.parametrize("kind", [ADM, ADMClassifier])
def test_rebuilt_from_its_section(kind):
    net = awake(kind, num_classes=4, multipliers=[0.5, 2], width=32)
    section = config.describe(net)
    assert section.pop("name") in ("adm", "adm-classifier")
    again = config.construct(kind, section, "net")
    again.load_state_dict(net.state_dict())
    assert dataclasses.asdict(again) == dataclasses.asdict(net)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(*inputs(net)), net(*inputs(net)))


@pytest.mark.parametrize(
    ("preset", "size", "millions"),
    [
        ("imagenet-64", 64, 296),
        ("edm-imagenet-64", 64, 296),
        ("imagenet-128", 128, 422),
        ("imagenet-256", 256, 554),
        ("imagenet-512", 512, 559),
    ],
)
def test_presets_have_the_sizes_of_the_paper(preset, size, millions):
    with torch.device("meta"):
        net = ADM((3, size, size), num_classes=1000, out_channels=6, **ADM.presets[preset])
    count = sum(p.numel() for p in net.parameters()) / 1e6
    assert round(count) == millions
    levels = {size >> i for i in net.attention}
    assert levels == {32, 16, 8}


def test_classifiers_have_the_sizes_of_the_paper():
    for size, millions in ((64, 65), (128, 43), (256, 54), (512, 54)):
        with torch.device("meta"):
            net = ADMClassifier((3, size, size), **ADMClassifier.presets[f"imagenet-{size}"])
        assert round(sum(p.numel() for p in net.parameters()) / 1e6) == millions


def test_a_head_needs_as_many_channels():
    parts = Parts(2, 16, True, "block", None, None, 64, 0.0)
    assert parts.attention(32) is None
    assert parts.attention(96).heads == 1
    assert parts.attention(192).heads == 3
    assert parts.attention(192, 4).heads == 4


def test_heads_of_the_two_ways():
    net = awake(heads=2, decoder_heads=4, attention=(0, 1))
    assert [level.stages[0].attention.heads for level in net.trunk.levels] == [2, 2]
    assert [level.stages[0].attention.heads for level in net.decoder] == [4, 4]
    assert net.trunk.middle[0].attention.heads == 2
    assert awake(heads=2, attention=(0,)).decoder[1].stages[1].attention.heads == 2


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 12), (1, 4, 4, 2)])
def test_classifier_pools(pool, shape):
    net = awake(ADMClassifier, shape=shape, pool=pool, num_classes=7)
    x, c = inputs(net)
    x.requires_grad_()
    out = net(x, c)
    assert out.shape == (3, 7)
    (slope,) = torch.autograd.grad(out[1].sum(), x, retain_graph=True)
    assert slope[1].abs().sum() > 0
    assert not slope[0].any()
    with torch.no_grad():
        assert not torch.allclose(net(x, c + 1), out)
    out.square().sum().backward()
    idle = [k for k, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (ADM, {"shape": (3,)}, "the adm takes items of shape"),
        (ADM, {"multipliers": ()}, "needs width >= 4, blocks >= 1 and multipliers > 0"),
        (ADM, {"blocks": 0}, "needs width >= 4, blocks >= 1"),
        (ADM, {"resample": "fir"}, "unknown resample of adm 'fir'; .*accepted: block, conv"),
        (ADM, {"embedding": "fourier"}, "unknown embedding of adm"),
        (ADM, {"groups": 5}, "8 channels do not split into 5 groups"),
        (ADM, {"heads": 3}, "16 channels do not split into 3 attention heads"),
        (ADM, {"heads": -1}, "heads >= 1 or none given"),
        (ADM, {"head_dim": 0}, "head_dim >= 1"),
        (ADM, {"head_dim": 0, "decoder_heads": 0}, "head_dim >= 1"),
        (ADMClassifier, {"pool": "max"}, "unknown pool of adm-classifier 'max'"),
        (ADMClassifier, {"num_classes": 0}, "needs classes, num_classes=0"),
    ],
)
def test_wrong_fields(kind, fields, message):
    with pytest.raises(ValueError, match=message):
        kind(**{"shape": (3, 8, 8), **SMALL, "attention": (1,), **fields})


def test_classifier_refuses_another_shape():
    net = awake(ADMClassifier)
    with pytest.raises(ValueError, match="does not fit a classifier"):
        net(torch.zeros(2, 3, 4, 4), torch.zeros(2))
