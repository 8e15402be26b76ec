"""Descriptions that would take memory or time, in each of the foreign formats."""

import copy
import json
import pickle
from pathlib import Path

import karras
import pytest
import song
import torch
from safetensors.torch import save_file

import scoresde as sd
from scoresde.checkpoint import CheckpointError
from scoresde.inert import read_persistent
from scoresde.interop import (
    diffusers_dit,
    diffusers_unet,
    edm,
    guided_diffusion,
    guided_keys,
    hub,
    reading,
)
from scoresde.interop.foreign import Foreign, settings
from scoresde.nets.adm import ADM
from scoresde.nets.adm_classifier import ADMClassifier
from scoresde.nets.ddpm import DDPMUNet
from scoresde.nets.dit import DiT


class Touch:
    def __reduce__(self):
        return (Path.touch, (Path("touched"),))


@pytest.fixture
def folder(tmp_path):
    """A network of diffusers."""
    net = DDPMUNet((3, 8, 8), widths=(32,), blocks=1, attention=(), embedding="positional")
    config, state = diffusers_unet.export(net)
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    given = {**karras.SONG, "channel_mult": [1, 2]}
    file = tmp_path_factory.mktemp("edm") / "network-snapshot.pkl"
    karras.snapshot(file, karras.drawn("EDMPrecond", given), "EDMPrecond", given)
    return read_persistent(file)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("block_out_channels", [10**9], "far larger"),
        ("layers_per_block", 10**6, "far larger"),
        ("in_channels", 10**9, "far larger"),
        ("num_class_embeds", 10**10, "far larger"),
        ("block_out_channels", ["a"], "block_out_channels .* is .*accepted: a list of type int"),
        ("block_out_channels", None, "block_out_channels .* is None"),
        ("block_out_channels", [32.5], "block_out_channels .* a list of type int"),
        ("layers_per_block", "1", "layers_per_block .* is '1', accepted: the type int"),
        ("dropout", "x", "dropout .* is 'x', accepted: the type float"),
        ("center_input_sample", 1, "center_input_sample .* the type bool"),
        ("sample_size", "x", "sample_size .* one or two whole numbers"),
        ("sample_size", [8], "sample_size .* one or two whole numbers"),
        ("sample_size", True, "sample_size .* one or two whole numbers"),
        ("attention_head_dim", 0, "attention_head_dim .* 1 or more"),
        ("new_thing", True, "unknown field new_thing"),
    ],
)
def test_networks_of_diffusers(folder, key, value, said):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, key: value}))
    with pytest.raises(CheckpointError, match=said):
        sd.load(folder)


def test_plain_variants_of_a_configuration_are_read(folder):
    content = json.loads((folder / "config.json").read_text())
    more = {"freq_shift": 0, "dropout": 0, "_diffusers_version": "99.0.0", "new": None,
            "sample_size": [8, 16]}  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**content, **more}))
    assert sd.load(folder).shape == (3, 8, 16)
    (folder / "config.json").write_text(json.dumps({**content, "freq_shift": 1.0}))
    assert sd.load(folder).net.freq_shift == 1


def test_json_without_a_bottom(folder):
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="no foreign checkpoint"):
        sd.load(folder)
    with pytest.raises(CheckpointError, match="is not valid JSON"):
        settings(folder / "x", ("config.json",), None)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b", "..", ""])
def test_shards_outside_of_the_folder(folder, name):
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match=r"outside of its folder|is a folder"):
        sd.load(folder)


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("model", "nf", 10**9, "far larger"),
        ("model", "num_res_blocks", 10**6, "far larger"),
        ("data", "num_channels", 10**9, "far larger"),
        ("model", "ch_mult", [1, 2.5], "ch_mult is .* a list of whole numbers"),
        ("model", "fir_kernel", [1] * 100_000, "fir_kernel is .* 2 to 64 numbers"),
        ("model", "fir_kernel", [1e308, 1e308], "whose sum is finite"),
        ("model", "fir_kernel", [1, -1], "whose sum is finite and not 0"),
    ],
)
def test_configurations_of_score_sde(tmp_path, section, key, value, said):
    config = song.settings(fir=True)
    raw = dict(song.drawn(config))
    shadow = [v for k, v in raw.items() if k != "sigmas"]
    torch.save({"model": raw, "ema": {"shadow_params": shadow}}, tmp_path / "c.pth")
    assert sd.load(tmp_path / "c.pth", config=config).weights == "ema"
    config[section][key] = value
    with pytest.raises(CheckpointError, match=said) as caught:
        sd.load(tmp_path / "c.pth", config=config)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("inner", "key", "value", "said"),
    [
        (True, "model_channels", 10**9, "far larger"),
        (True, "num_blocks", 10**6, "far larger"),
        (True, "label_dim", 10**10, "far larger"),
        (True, "channel_mult", [1.5, 2], "channel_mult is .* a list of whole numbers"),
        (True, "resample_filter", [1] * 100_000, "resample_filter .* is not symmetric"),
        (True, "resample_filter", [1e308, 1e308], "resample_filter"),
        (True, "new_thing", 1, "unknown arguments of a SongUNet: new_thing; known: img_resol"),
        (True, "_init_args", (16,), "unknown arguments of a SongUNet: _init_args"),
        (False, "M", 10**12, "1 <= num_steps <= 1000000"),
    ],
)
def test_arguments_of_edm(snapshot, inner, key, value, said):
    content = copy.deepcopy(snapshot)
    outer = edm.of(content)
    if key == "M":
        outer.class_name = "iDDPMPrecond"
    holder = outer.state["_modules"]["model"] if inner else outer
    if key == "_init_args":
        holder.state[key] = value
    else:
        holder.state["_init_kwargs"][key] = value
    with pytest.raises(CheckpointError, match=said) as caught:
        edm.read(content, Path("f.pkl"))
    assert len(str(caught.value)) < 500


def test_networks_of_edm_have_no_other_arguments():
    for class_name, known in (("SongUNet", edm.song_unet.ARGUMENTS),
                              ("DhariwalUNet", edm.dhariwal.ARGUMENTS)):  # fmt: skip
        assert len(set(known)) == len(known), class_name
        assert {"img_resolution", "in_channels", "label_dropout", "dropout"} <= set(known)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("suffix", reading.SUFFIXES)
def test_calls_are_named_not_made(tmp_path, monkeypatch, suffix, protocol):
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"x{suffix}").write_bytes(pickle.dumps(Touch(), protocol))
    with pytest.raises(CheckpointError, match=r"needs the global .*; nothing was called"):
        sd.load(tmp_path / f"x{suffix}")
    assert not Path("touched").exists()


def test_names_in_a_file_reach_no_terminal(tmp_path):
    torch.save({"\x1b[2Ja\nb": 1}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"a mapping with \\x1b\[2Ja\\nb, no model"):
        sd.load(tmp_path / "x.pt")
    assert Foreign(None, "x", ("a\x1b[2J: \n",)).unmapped == (r"a\x1b[2J: \n",)


@pytest.mark.parametrize(
    "name", ["../x", "a/..", "a/b/../c", "a/b@../../x", "a/b@x/./y", "a/b/.", "a", "/a/b", "a//b"]
)
def test_hub_names_with_steps_are_none(name, monkeypatch):
    monkeypatch.setattr(hub, "package", lambda: pytest.fail("asked the hub"))
    with pytest.raises(CheckpointError, match="names no model"):
        hub.fetched(name)


def theirs(net):
    """The weights of a network under the names of guided-diffusion."""
    names, state = dict(guided_keys.modules(net)), {}
    for key, value in net.state_dict().items():
        module, _, kind = key.rpartition(".")
        if kind == "positions":
            state["out.2.positional_embedding"] = value.T
            continue
        matrix = kind == "weight" and (".skip" in key or "attention" in key or "out." in key)
        state[f"{names[module]}.{kind}"] = (
            value[..., None] if matrix and value.ndim == 2 else value
        )
    return state


def test_networks_of_guided_diffusion():
    fields = {"width": 32, "multipliers": (1,), "blocks": 1, "attention": (0,), "heads": 4,
              "embedding": "positional"}  # fmt: skip
    flags, file = {"image_size": 8}, Path("f.pt")
    state = theirs(ADM((3, 8, 8), num_classes=3, **fields))
    assert guided_diffusion.read(state, file, config=flags).model.net.num_classes == 3
    state["label_emb.weight"] = torch.empty(10**10, 0)
    with pytest.raises(CheckpointError, match="far larger"):
        guided_diffusion.read(state, file, config=flags)
    del fields["heads"]
    fields["head_dim"] = 32
    state = theirs(ADMClassifier((3, 8, 8), num_classes=3, pool="attention", **fields))
    flags["classifier_depth"] = 1
    with pytest.raises(CheckpointError, match="far larger"):
        guided_diffusion.read_classifier(state, file, {**flags, "image_size": 10**6})


def test_transformers_of_diffusers(tmp_path):
    net = DiT((4, 8, 8), patch=2, width=16, depth=1, heads=2, num_classes=3,
              embedding="positional", freq_shift=1.0)  # fmt: skip
    config, state = diffusers_dit.export(net)
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    for change, said in (({}, None), ({"num_layers": 10**6}, "far larger"),
                         ({"sample_size": 2**20}, "far larger"),
                         ({"attention_head_dim": 2**30}, "far larger")):  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        if said is None:
            assert sd.load(tmp_path).shape == (4, 8, 8)
            continue
        with pytest.raises(CheckpointError, match=said):
            sd.load(tmp_path)


def test_streams_of_older_versions_of_torch(tmp_path):
    content = {"a": torch.arange(3.0)}
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(reading.opened(tmp_path / "x.pt")["a"], content["a"])


def test_settings_that_are_known_are_not_listed(tmp_path):
    config = song.settings(fir=True)
    config["model"]["odd"] = 1
    raw = dict(song.drawn(config))
    torch.save({"model": raw}, tmp_path / "c.pth")
    found = reading.read(tmp_path / "c.pth", weights="raw", config=config)
    assert found.unmapped == ("setting model.odd: not known",)


@pytest.mark.parametrize(
    ("kind", "given", "levels"),
    [
        ("EDMPrecond", {}, (0.002, 80.0)),
        ("EDMPrecond", {"sigma_min": 0.1, "sigma_max": 50.0}, (0.1, 50.0)),
        ("VEPrecond", {}, (0.02, 80.0)),
        ("VEPrecond", {"sigma_max": 70.0}, (0.02, 70.0)),
    ],
)
def test_noise_levels_are_those_that_the_network_knows(snapshot, kind, given, levels):
    content = copy.deepcopy(snapshot)
    edm.of(content).class_name = kind
    edm.of(content).state["_init_kwargs"].update(given)
    for name in ("sigma_min", "sigma_max"):  # those of another kind
        edm.of(content).state.pop(name, None)
    sde = edm.read(content, Path("f.pkl")).model.sde
    assert (sde.sigma_min, sde.sigma_max) == levels
