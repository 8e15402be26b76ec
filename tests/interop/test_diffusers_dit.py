import pytest
import torch

from scoresde.checkpoint import CheckpointError
from scoresde.interop.diffusers_dit import export, network, shares_embedding, tensors
from scoresde.nets.dit import DiT, grid_waves

diffusers = pytest.importorskip("diffusers")

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 3,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 10,
}
OLD = {"attention_bias": True, "activation_fn": "gelu-approximate", "norm_type": "ada_norm_zero",
       "norm_elementwise_affine": False}  # fmt: skip


def randomised(net):
    """Every parameter away from zero, gates included, of a size that keeps the scale of tokens."""
    generator = torch.Generator().manual_seed(0)
    for key, parameter in net.named_parameters():
        std = 0.5 if parameter.ndim < 2 or "table" in key else parameter[0].numel() ** -0.5
        parameter.data.normal_(0, std, generator=generator)
    return net.eval()


def foreign(cls="DiTTransformer2DModel", **fields):
    return randomised(getattr(diffusers, cls)(**{**TINY, **fields}))


def read(config, state, **options):
    net = network(config, **options).eval()
    net.load_state_dict(tensors(config, state, **options))
    return net


def difference(theirs, net, size=8, channels=4):
    """Largest difference relative to the largest output: first and last step, null class."""
    x = torch.randn(3, channels, size, size)
    step, y = torch.tensor([0, 999, 421]), torch.tensor([0, 10, 3])
    with torch.no_grad():
        wanted = theirs(x, timestep=step, class_labels=y).sample
        out = net(x, step.float(), y)
    assert wanted.shape == out.shape
    return ((wanted - out).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize(
    ("cls", "fields"),
    [
        ("DiTTransformer2DModel", {}),
        ("DiTTransformer2DModel", {"out_channels": 4}),
        ("DiTTransformer2DModel", {"out_channels": None, "in_channels": 3}),
        ("DiTTransformer2DModel", {"patch_size": 4}),
        ("DiTTransformer2DModel", {"patch_size": 4, "out_channels": 4, "num_layers": 1}),
        ("DiTTransformer2DModel", {"attention_bias": False}),
        ("DiTTransformer2DModel", {"norm_eps": 0.1}),
        ("DiTTransformer2DModel", {"num_layers": 8, "attention_head_dim": 16}),
        ("Transformer2DModel", OLD),
    ],
    ids=str,
)
def test_output_is_that_of_diffusers(cls, fields):
    theirs = foreign(cls, **fields)
    net = read(dict(theirs.config), theirs.state_dict())
    channels = fields.get("in_channels", 4)
    assert difference(theirs, net, channels=channels) < 1e-5
    assert difference(theirs, net, size=16, channels=channels) < 1e-5  # stretched positions
    x, step = torch.randn(2, channels, 8, 8), torch.tensor([7.0, 30.0])
    torch.testing.assert_close(net(x, step), net(x, step, torch.tensor([10, 10])))


def test_defaults_are_those_of_diffusers():
    """The published networks: what their class holds without a configuration."""
    with torch.device("meta"):
        theirs = diffusers.DiTTransformer2DModel()
        net = network({})
    ours = sum(p.numel() for p in net.parameters())
    assert ours == sum(p.numel() for p in theirs.parameters())
    kept = export(net)[0]
    config = {k: v for k, v in theirs.config.items() if not k.startswith("_")}
    assert {k: kept[k] for k in config} == {**config, "out_channels": 4}


@pytest.mark.parametrize(
    "fields", [{}, {"out_channels": 4, "patch_size": 4}, {"attention_bias": False}], ids=str
)
def test_the_way_back_is_the_same_file(fields):
    theirs = foreign(**fields)
    state = theirs.state_dict()
    net = read(dict(theirs.config), state)
    config, again = export(net)
    assert set(again) == set(state)
    for key in state:
        torch.testing.assert_close(again[key], state[key], rtol=0, atol=0, msg=key)
    config.pop("_class_name")
    assert {k: theirs.config[k] for k in config} == config
    again["proj_out_2.bias"].zero_()  # a copy
    assert net.head.linear.bias.any()


def test_own_network_with_a_shared_embedding_runs_in_diffusers():
    net = randomised(DiT((4, 8, 8), width=16, depth=3, heads=2, num_classes=10, out_channels=8,
                         embedding="positional", freq_shift=1.0))  # fmt: skip
    config, state = export(net)
    theirs = getattr(diffusers, config.pop("_class_name"))(**config).eval()
    theirs.load_state_dict(state)
    assert difference(theirs, net) < 1e-5
    assert shares_embedding(state)
    back = read(config, state, shared_embedding=True)
    assert len(back.conditions) == 1
    for key, tensor in net.state_dict().items():
        torch.testing.assert_close(back.state_dict()[key], tensor, rtol=0, atol=0)


def test_an_embedding_that_differs_is_not_shared():
    theirs = foreign()
    config, state = dict(theirs.config), theirs.state_dict()
    assert not shares_embedding(state)
    with pytest.raises(CheckpointError, match=r"not shared: transformer_blocks.1.norm1.emb"):
        tensors(config, state, shared_embedding=True)
    for key in list(state):
        if ".norm1.emb." in key:
            state[key] = state["transformer_blocks.0." + key.split(".", 2)[2]]
    assert shares_embedding(state)
    last = "transformer_blocks.2.norm1.emb.class_embedder.embedding_table.weight"
    state[last] = state[last] + 1e-6
    assert not shares_embedding(state)
    with pytest.raises(CheckpointError, match=last):
        tensors(config, state, shared_embedding=True)


def test_stored_positions_are_compared():
    theirs = foreign()
    config, state = dict(theirs.config), theirs.state_dict()
    stored = grid_waves((4, 4), (4, 4), 16).float()[None]
    assert "pos_embed.pos_embed" not in tensors(
        config, {**state, "pos_embed.pos_embed": theirs.pos_embed.pos_embed}
    )
    for other in (stored + 0.1, stored[:, :9], stored.flip(1)):
        with pytest.raises(CheckpointError, match=r"pos_embed.pos_embed.*grid of 4x4"):
            tensors(config, {**state, "pos_embed.pos_embed": other})


def test_keys_and_shapes_that_do_not_fit_are_named():
    theirs = foreign()
    config, state = dict(theirs.config), theirs.state_dict()
    short = {k: v for k, v in state.items() if k != "transformer_blocks.1.attn1.to_k.bias"}
    with pytest.raises(CheckpointError, match=r"blocks.1.attn1.to_k.bias are missing"):
        tensors(config, short)
    with pytest.raises(CheckpointError, match=r"caption.weight are unknown"):
        tensors(config, {**state, "caption.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="and 34 more are missing"):
        tensors({**config, "num_layers": 5}, state)
    with pytest.raises(CheckpointError, match=r"proj_out_2.weight is \(3, 3\).* \(32, 16\)"):
        tensors(config, {**state, "proj_out_2.weight": torch.zeros(3, 3)})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("norm_type", "ada_norm_single", "norm_type.*'ada_norm_zero'.*'ada_norm_single'"),
        ("activation_fn", "geglu", "activation_fn.*'gelu-approximate'"),
        ("norm_elementwise_affine", True, "norm_elementwise_affine"),
        ("cross_attention_dim", 768, "cross_attention_dim"),
        ("num_embeds_ada_norm", None, "num_embeds_ada_norm.*positive integer.*None"),
        ("sample_size", [8, 8], "sample_size.*positive integer"),
        ("sample_size", 9, r"multiples of its patch, 2, not \(9, 9\)"),
        ("rope", True, "unknown field rope.*accepted: num_attention_heads"),
    ],
)
def test_refused_configurations(field, value, message):
    with pytest.raises(CheckpointError, match=message):
        network({**TINY, "_class_name": "DiTTransformer2DModel", field: value})


@pytest.mark.parametrize(
    ("shape", "fields", "message"),
    [
        ((4, 8, 6), {}, "shape is .*size, size"),
        ((4, 8), {}, "shape is"),
        ((4, 8, 8), {"embedding": "waves"}, "embedding is 'waves'"),
        ((4, 8, 8), {"freq_shift": 0.0}, "freq_shift is 0.0"),
        ((4, 8, 8), {"mlp_ratio": 2.0}, "mlp_ratio is 2.0"),
        ((4, 8, 8), {"num_classes": None}, "num_classes is None"),
        ((4, 8, 8), {"width": 18}, "width is 18"),
    ],
)
def test_networks_that_diffusers_cannot_hold(shape, fields, message):
    usual = {"width": 16, "depth": 1, "heads": 2, "num_classes": 10, "embedding": "positional",
             "freq_shift": 1.0}  # fmt: skip
    with pytest.raises(CheckpointError, match=message):
        export(DiT(shape, **{**usual, **fields}))
