import json

import numpy as np
import pytest
import torch
from song import drawn, network, score, settings
from tape import distance

import scoresde as sd
from scoresde.checkpoint import CheckpointError


def container(raw, ema, short=0):
    """What run_lib saves; the averages are a bare list, without the Fourier frequencies."""
    listed = [v for k, v in ema.items() if k != "sigmas" and not k.endswith("all_modules.0.W")]
    group = {"lr": 2e-4 * np.minimum(3 / 5, 1.0), "params": list(range(len(listed)))}
    return {
        "optimizer": {"state": {}, "param_groups": [group]},
        "model": {f"module.{k}": v for k, v in raw.items()},
        "ema": {"decay": 0.999, "num_updates": 3, "shadow_params": listed[: len(listed) - short]},
        "step": 3,
    }


def written(folder, config, **options):
    """A checkpoint beside its settings, and both sets of weights."""
    raw, ema = drawn(config), drawn(config, seed=1)
    for key in raw:  # these two are never averaged
        if key == "sigmas" or key == "all_modules.0.W":
            ema[key] = raw[key]
    torch.save(container(raw, ema, **options), folder / "checkpoint_8.pth")
    (folder / "config.json").write_text(json.dumps(config))
    return raw, ema


def batch(config, n=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size, channels = config["data"]["image_size"], config["data"]["num_channels"]
    return torch.randn(n, channels, size, size, generator=generator)


VE = {"sde": "vesde", "centered": False}
FOURIER = {"embedding_type": "fourier", **VE}
FIR = {"fir": True}
DDPM = {"name": "ddpm", "nf": 32, "skip_rescale": False}
BLOCKS = {"resblock_type": "ddpm", "fir": True, "resamp_with_conv": False}
NETWORKS = {
    "ddpmpp": {},
    "deeper": {"ch_mult": [1, 2, 2], "num_res_blocks": 2, "attn_resolutions": [8, 2]},
    "no attention listed": {"attn_resolutions": []},
    "fir": FIR,
    "fir 121": {**FIR, "fir_kernel": [1, 2, 1]},
    "fir 11": {**FIR, "fir_kernel": [1, 1]},
    "fir asymmetric": {**FIR, "fir_kernel": [1, 5, 2, 1]},
    "fir asymmetric 3": {**FIR, "fir_kernel": [4, 2, 1], "progressive_input": "residual"},
    "fir five": {**FIR, "fir_kernel": [1, 4, 6, 3, 1], "progressive_input": "residual"},
    "blocks of ddpm": BLOCKS,
    "blocks of ddpm, asymmetric": {**BLOCKS, "fir_kernel": [1, 3, 2, 2]},
    "blocks of ddpm, residual": {**BLOCKS, "progressive_input": "residual"},
    "blocks of ddpm, both skips": {
        **BLOCKS, "progressive_input": "input_skip", "progressive": "output_skip"
    },
    "input skip": {"progressive_input": "input_skip"},
    "input skip cat": {"progressive_input": "input_skip", "progressive_combine": "cat"},
    "input skip fir": {**FIR, "progressive_input": "input_skip", "ch_mult": [1, 2, 2]},
    "residual": {"progressive_input": "residual", "ch_mult": [1, 2, 2]},
    "residual fir": {**FIR, "progressive_input": "residual", "ch_mult": [1, 2, 2]},
    "residual not rescaled": {"progressive_input": "residual", "skip_rescale": False},
    "output skip": {**FIR, "progressive": "output_skip", "ch_mult": [1, 2, 2]},
    "output skip, asymmetric": {**FIR, "progressive": "output_skip", "fir_kernel": [1, 5, 2, 1]},
    "both skips": {
        **FIR, **FOURIER, "progressive": "output_skip", "progressive_input": "input_skip",
        "ch_mult": [1, 2, 2], "scale_by_sigma": True,
    },
    "both skips cat": {
        **FIR, "progressive": "output_skip", "progressive_input": "input_skip",
        "progressive_combine": "cat", "ch_mult": [1, 2, 2],
    },
    "output skip and residual": {
        **FIR, "progressive": "output_skip", "progressive_input": "residual", "ch_mult": [1, 1, 2]
    },
    "fourier": FOURIER,
    "fourier, published": {
        **FOURIER, **FIR, "progressive_input": "residual", "scale_by_sigma": True,
        "ch_mult": [1, 2, 2, 2],
    },
    "fourier scaled": {**FOURIER, "scale_by_sigma": True},
    "positional scaled": {**VE, "continuous": False, "scale_by_sigma": True, "num_scales": 50},
    "not rescaled": {"skip_rescale": False},
    "elu": {"nonlinearity": "elu"},
    "relu": {"nonlinearity": "relu"},
    "lrelu": {"nonlinearity": "lrelu"},
    "unconditional": {"conditional": False},
    "unconditional fourier": {**FOURIER, "conditional": False, "scale_by_sigma": True},
    "one channel": {"num_channels": 1},
    "one channel, both skips": {
        **FIR, "num_channels": 1, "progressive": "output_skip", "progressive_input": "input_skip"
    },
    "not centered": {"centered": False},
    "not centered, residual": {"centered": False, "progressive_input": "residual"},
    "odd groups": {"nf": 12, "ch_mult": [1, 3]},
    "wide": {"nf": 160, "ch_mult": [1], "attn_resolutions": []},
    "larger": {"image_size": 16, "ch_mult": [1, 2, 2]},
    "ddpm": DDPM,
    "ddpm without conv": {**DDPM, "resamp_with_conv": False},
    "ddpm of ve": {
        **DDPM, **VE, "continuous": False, "scale_by_sigma": True, "num_scales": 50,
        "attn_resolutions": [8],
    },
    "ddpm lrelu": {**DDPM, "nonlinearity": "lrelu", "num_channels": 1, "ch_mult": [1, 1]},
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_equal_the_original(name, tmp_path):
    config = settings(**NETWORKS[name])
    weights = dict(zip(("raw", "ema"), written(tmp_path, config), strict=True))
    x = batch(config)
    label = torch.tensor(
        [0.7, 31.0, 5.25] if "fourier" in config["model"].values() else [0, 7, 41]
    )
    outputs = []
    for kind, path in (("raw", tmp_path / "checkpoint_8.pth"), ("ema", tmp_path)):
        model = sd.load(path, weights=kind)
        assert model.weights == kind
        assert model.shape == x.shape[1:]
        assert not model.training
        with torch.no_grad():
            outputs.append(model.net(x, label.float()))
        expected = network(weights[kind], config, x, label.float())
        assert distance(outputs[-1], expected) < 4e-6
    assert distance(*outputs) > 0.1  # or the weights would not have mattered


CONTINUOUS = {
    "vp": {},
    "vp of other rates": {"beta_min": 0.3, "beta_max": 12.0},
    "vp fourier": {"embedding_type": "fourier", "fourier_scale": 1},
    "subvp": {"sde": "subvpsde"},
    "subvp of other rates": {"sde": "subvpsde", "beta_min": 0.3, "beta_max": 12.0},
    "subvp never discrete": {"sde": "subvpsde", "continuous": False},
    "ve": {**FOURIER, "fourier_scale": 1, "scale_by_sigma": True},
    "ve not scaled": {**FOURIER, "fourier_scale": 1, "sigma_max": 380.0},
    "ve centered": {"sde": "vesde", "embedding_type": "fourier", "fourier_scale": 1,
                    "scale_by_sigma": True, "sigma_min": 0.02},
    "ve positional": VE,
    "ddpm of vp": DDPM,
    "ddpm of subvp": {**DDPM, "sde": "subvpsde"},
    "vp not centered": {"centered": False},
}  # fmt: skip


@pytest.mark.parametrize("name", CONTINUOUS)
def test_scores_of_continuous_processes(name, tmp_path):
    config = settings(**CONTINUOUS[name])
    raw, ema = written(tmp_path, config)
    x = batch(config)
    t = torch.tensor([0.02, 0.37, 0.96], dtype=torch.float64)
    for kind, weights in (("raw", raw), ("ema", ema)):
        model = sd.load(tmp_path, weights=kind)
        expected = score(weights, config, x, t)
        with torch.no_grad():
            for i in range(3):  # each alone: a score's size falls with t
                assert distance(model(x[i : i + 1], t[i].item()), expected[i : i + 1]) < 5e-6
            assert distance(model(x, t), expected) < 5e-6
    kinds = {"vpsde": sd.VP, "subvpsde": sd.SubVP, "vesde": sd.VE}
    assert type(model.sde) is kinds[config["training"]["sde"]]


DISCRETE = {
    "vp": {},
    "vp of other rates": {"beta_min": 0.2, "beta_max": 9.0, "num_scales": 100},
    "ddpm of vp": {**DDPM, "num_scales": 100},
    "ve": {**VE, "scale_by_sigma": True},
    "ve of few": {**VE, "num_scales": 10, "sigma_min": 0.1, "sigma_max": 1.0},
    "ve centered": {"sde": "vesde", "scale_by_sigma": True, "num_scales": 232},
    "ddpm of ve": {**DDPM, **VE, "scale_by_sigma": True, "num_scales": 100},
}


@pytest.mark.parametrize("name", DISCRETE)
def test_scores_of_discrete_processes(name, tmp_path):
    config = settings(continuous=False, **DISCRETE[name])
    raw, ema = written(tmp_path, config)
    n, x = config["model"]["num_scales"], batch(config, 4)
    step = torch.tensor([0, n // 3, n // 2, n - 1])
    for kind, weights in (("raw", raw), ("ema", ema)):
        model = sd.load(tmp_path, weights=kind)
        if config["training"]["sde"] == "vpsde":
            assert type(model.sde) is sd.DDPM
            assert model.sde.t_min == 1 / n
            t = (step.double() + 1) / n
        else:
            assert type(model.sde) is sd.VE
            t = step.double() / (n - 1)
        expected = score(weights, config, x, step=step)
        with torch.no_grad():
            for i in range(len(x)):
                assert distance(model(x[i : i + 1], t[i].item()), expected[i : i + 1]) < 5e-6
            assert distance(model(x, t), expected) < 5e-6


def test_settings_are_given_in_every_form(tmp_path):
    config = settings(ch_mult=[1, 1], embedding_type="fourier", **VE)
    raw, _ = written(tmp_path, config)
    elsewhere = tmp_path / "elsewhere.json"
    (tmp_path / "config.json").rename(elsewhere)
    flat = {f"{s}.{k}": v for s, held in config.items() if isinstance(held, dict)
            for k, v in held.items()}  # fmt: skip
    short = {k: v for k, v in flat.items() if k.split(".")[0] in ("training", "data", "model")}
    tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in short.items()}
    x, label = batch(config), torch.tensor([0.3, 2.0, 40.0])
    expected = network(raw, config, x, label)
    for given in (config, flat, short, tuples, elsewhere, str(elsewhere)):
        model = sd.load(tmp_path / "checkpoint_8.pth", weights="raw", config=given)
        with torch.no_grad():
            assert distance(model.net(x, label), expected) < 4e-6
    elsewhere.write_text(json.dumps(flat))
    assert sd.load(tmp_path / "checkpoint_8.pth", config=elsewhere).shape == (3, 8, 8)


def test_what_was_read_is_saved_and_read_again(tmp_path):
    config = settings(fir=True, progressive="output_skip", progressive_input="input_skip",
                      fir_kernel=[1, 5, 2, 1], embedding_type="fourier", **VE)  # fmt: skip
    written(tmp_path, config)
    model = sd.load(tmp_path)
    model.save(tmp_path / "mine")
    again = sd.load(tmp_path / "mine")
    x = batch(config)
    with torch.no_grad():
        assert torch.equal(again(x, 0.4), model(x, 0.4))
    assert again.sde == model.sde
    assert again.weights == "ema"


def test_a_bare_model_and_a_file_without_a_prefix(tmp_path):
    """DataParallel's prefix is not always there."""
    config = settings()
    raw, ema = written(tmp_path, config)
    content = container(raw, ema)
    content["model"] = dict(raw)
    torch.save(content, tmp_path / "checkpoint_8.pth")
    x, label = batch(config), torch.tensor([1.0, 20.0, 400.0])
    for kind, weights in (("raw", raw), ("ema", ema)):
        with torch.no_grad():
            found = sd.load(tmp_path, weights=kind).net(x, label)
        assert distance(found, network(weights, config, x, label)) < 4e-6


# Errors


def refused(path, pattern, **options):
    with pytest.raises(CheckpointError, match=pattern) as caught:
        sd.load(path, **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_without_settings(tmp_path):
    written(tmp_path, settings())
    (tmp_path / "config.json").unlink()
    refused(tmp_path, r"config\.json.*config=")
    refused(tmp_path, r"nothing\.json", config=tmp_path / "nothing.json")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, r"config\.json.*JSON")
    (tmp_path / "config.json").write_text("[1]")
    refused(tmp_path, r"config\.json.*mapping")
    refused(tmp_path, "model|data|training|setting", config={})
    for section in ("model", "data", "training"):
        config = settings()
        del config[section]
        refused(tmp_path, section, config=config)
        refused(tmp_path, section, config={**config, section: 3})


@pytest.mark.parametrize(
    ("name", "value", "pattern"),
    [
        ("sde", "cldsde", "sde.*cldsde.*vpsde"),
        ("sde", None, "training.sde.*vpsde"),
        ("name", "ncsnv2_64", "ncsnv2_64.*ncsnpp"),
        ("embedding_type", "waves", "embedding_type.*waves.*fourier"),
        ("nonlinearity", "gelu", "nonlinearity.*gelu.*swish"),
        ("resblock_type", "biggan2", "resblock_type.*biggan2"),
        ("progressive", "some", "progressive.*some"),
        ("progressive_input", "some", "progressive_input.*some"),
        ("progressive_combine", "product", "progressive_combine.*product"),
        ("nf", 0, "nf.*0"),
        ("nf", "8", "nf.*'8'"),
        ("nf", 10, "30 channels do not split into 7 groups"),
        ("ch_mult", [], "ch_mult|multipliers"),
        ("ch_mult", 2, "ch_mult"),
        ("ch_mult", [1, 0], "ch_mult|multipliers"),
        ("ch_mult", [1, "a"], "ch_mult"),
        ("num_res_blocks", 0, "num_res_blocks"),
        ("num_res_blocks", 1.5, "num_res_blocks"),
        ("attn_resolutions", 4, "attn_resolutions"),
        ("fir", "yes", "fir"),
        ("num_channels", 0, "num_channels"),
        ("image_size", 7, "image_size|7|divi"),
        ("image_size", "8", "image_size"),
        ("centered", "no", "centered"),
        ("continuous", "no", "continuous"),
        ("num_scales", 0, "num_scales"),
        ("num_scales", None, "num_scales"),
        ("beta_min", -1, "beta_min"),
        ("beta_max", "20", "beta_max"),
    ],
    ids=str,
)
def test_settings_that_are_no_option(name, value, pattern, tmp_path):
    written(tmp_path, settings())
    config = settings(**{name: value})
    refused(tmp_path, pattern, config=config)


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"fir_kernel": []}, "fir_kernel"),
        ({"fir_kernel": [0, 0]}, "fir_kernel"),
        ({"fir_kernel": [1]}, "fir_kernel"),
        ({"fir_kernel": 3}, "fir_kernel"),
        ({"sde": "vesde", "sigma_min": 60}, "sigma_m"),
        ({"sde": "vesde", "sigma_min": 0}, "sigma_min"),
        ({"sde": "vesde", "sigma_max": "50"}, "sigma_max"),
        ({"name": "ddpm", "nf": 24}, "32|24"),
        ({"name": "ddpm", "nf": 32, "conditional": False}, "fit"),
        ({"embedding_type": "fourier", "sde": "vesde", "continuous": False}, "continuous|fourier"),
        ({"progressive": "output_skip", "fir": False}, "fit"),
        ({"progressive": "residual", "fir": True}, "fit"),
        ({"resblock_type": "ddpm", "fir": False}, "fit"),
        ({"resblock_type": "ddpm", "fir": True, "resamp_with_conv": True}, "fit"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together(changes, pattern, tmp_path):
    written(tmp_path, settings(fir=True))
    refused(tmp_path, pattern, config=settings(**{"fir": True, **changes}))


def test_weights_that_do_not_fit(tmp_path):
    config = settings()
    raw, ema = written(tmp_path, config, short=1)
    refused(tmp_path, r"shadow_params.*\d+")
    assert sd.load(tmp_path, weights="raw").weights == "raw"
    refused(tmp_path, "does not fit", weights="raw", config=settings(nf=16))
    refused(tmp_path, "does not fit", weights="raw", config=settings(ch_mult=[1, 1]))
    refused(tmp_path, "does not fit", weights="raw", config=settings(num_res_blocks=2))
    good = container(raw, ema)

    def changed(pattern, weights="ema", **parts):
        torch.save({**good, **parts}, tmp_path / "checkpoint_8.pth")
        refused(tmp_path, pattern, weights=weights)

    shadow = good["ema"]["shadow_params"]
    swapped = [shadow[1], shadow[0], *shadow[2:]]
    changed(r"shadow_params|all_modules\.0\.weight", ema={**good["ema"], "shadow_params": swapped})
    longer = [*shadow, torch.ones(1)]
    changed(r"shadow_params", ema={**good["ema"], "shadow_params": longer})
    changed(r"shadow_params", ema={**good["ema"], "shadow_params": None})
    changed("averaged.*no tensor", ema={**good["ema"], "shadow_params": [3.0, *shadow[1:]]})
    changed(r"shadow_params|ema", ema={})
    changed(r"ema", ema=None)
    model = good["model"]
    fewer = {k: v for k, v in model.items() if k != "module.all_modules.2.bias"}
    changed("nothing in it for stem.bias", "raw", model=fewer)
    changed(r"all_modules\.99", "raw", model={**model, "module.all_modules.99.b": torch.ones(1)})
    odd = {**model, "module.all_modules.2.bias": torch.ones(3)}
    changed(r"stem\.bias is \(3,\), the network has \(8,\)", "raw", model=odd)
    changed(r"all_modules\.2\.bias", "raw", model={**model, "module.all_modules.2.bias": 3})
    changed(r"all_modules\.2\.bias", "ema", model=odd)


def test_settings_of_other_weights(tmp_path):
    """A wrong number of steps loads silently by shapes alone; the table in the file tells."""
    config = settings(**VE, scale_by_sigma=True, continuous=False, num_scales=30)
    written(tmp_path, config)
    refused(tmp_path, "num_scales|sigmas", config=settings(**VE, continuous=False, num_scales=31))
    other = settings(**VE, scale_by_sigma=True, continuous=False, num_scales=30, sigma_max=90)
    refused(tmp_path, "sigma_max|sigmas", config=other)
