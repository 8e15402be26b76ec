"""Every recipe, in every variant of its head, has the size that is said and takes steps."""

import re
import shlex
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from scoresde import nets, parameterization, sde
from scoresde.cli.train import command
from scoresde.config import ConfigError, build, describe, merge, names, override, read_config
from scoresde.interop import score_sde, song_unet
from scoresde.interop.options import Options
from scoresde.training import Trainer, prepare
from scoresde.training.job import build_net

FOLDER = Path(__file__).parent.parent / "configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
# Shape of one item, and whether it is made of 256 levels, where that is not a picture of CIFAR-10.
SHAPES = {
    "mnist": ((1, 28, 28), True),
    "mnist-given": ((1, 28, 28), True),
    "moons": ((2,), False),
    "volumes": ((1, 16, 16, 16), False),
}
SMALL = {
    "ncsnpp": {"width": 8, "blocks": 1, "noise_width": None},
    "adm": {"width": 32, "blocks": 1},
    "ddpm-unet": {"widths": [8, 8, 8, 8], "groups": 4, "blocks": 1},
    "unet": {"width": 8, "blocks": 1, "head_dim": 8},
    "mlp": {"width": 16, "blocks": 1},
}


def commands(file):
    """The commands in the head of a recipe: the variant's name, and the arguments."""
    head = re.sub(r"\\\n#\s+", "", file.read_text())
    found = re.findall(r"^#   scoresde train (.*)  # (.+)$", head, re.M)
    return [(variant, shlex.split(arguments)) for arguments, variant in found]


VARIANTS = [(file, *found) for file in CONFIGS for found in commands(file)]
IDS = [f"{file.stem}: {variant}" for file, variant, _ in VARIANTS]


def configuration(file, arguments):
    """What the command makes of the recipe."""
    given = command.make_context("train", list(arguments)).params
    assert given["config_file"] == Path("configs") / file.name
    assert (given["data"] == "PATH") == (file.stem != "moons")
    config = read_config(file)
    if given["sde"]:
        config = merge(config, {"sde": {"name": given["sde"]}})
    for setting in given["settings"]:
        override(config, setting)
    return config


def shape(file):
    return SHAPES.get(file.stem, ((3, 32, 32), True))[0]


@cache
def table():
    """Rows of the README: (recipe, variant) to (parameters, images) as they are written there."""
    rows, recipe = {}, None
    for line in (FOLDER / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 8 or cells[0] in ("recipe", "---"):
            continue
        link = re.fullmatch(r"\[(.+)\]\((.+)\.yaml\)", cells[0])
        recipe = link[2] if link else recipe
        assert link is None or link[1] == link[2]
        rows[recipe, cells[1]] = cells[4], cells[5]
    return rows


def millions(number):
    return f"{number / 1e6:.1f} M"


@pytest.mark.parametrize(("file", "variant", "arguments"), VARIANTS, ids=IDS)
def test_the_table_has_the_size_of_the_network_and_the_images_of_the_run(file, variant, arguments):
    config = configuration(file, arguments)
    with torch.device("meta"):
        net = build_net(config.get("net", {"preset": "tiny"}), shape(file))
    parameters, images = table()[file.stem, variant]
    assert parameters == millions(sum(p.numel() for p in net.parameters()))
    training = config["training"]
    if "steps" in training:
        seen = training["steps"] * training["batch_size"]
        assert images == (f"{seen / 1e6:.0f} M" if seen > 1e7 else millions(seen))


def test_the_networks_have_the_published_sizes():
    # Ho et al.'s code; TorchCFM prints its size in units of 2^20; improved DDPM's file has a name.
    assert table()["cifar10-ddpm", "ddpm"][0] == "35.7 M"
    flow = table()["cifar10-flow-matching", "independent coupling"][0]
    assert float(flow.removesuffix(" M")) * 1e6 / 2**20 == pytest.approx(34.09, abs=0.05)
    assert table()["cifar10-improved-ddpm", "hybrid"][0] == "52.5 M"


def test_every_recipe_has_a_command_and_every_row_a_recipe():
    assert {file.stem for file, *_ in VARIANTS} == {file.stem for file in CONFIGS}
    assert set(table()) == {(file.stem, variant) for file, variant, _ in VARIANTS}
    assert len(CONFIGS) >= 10


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A function of a recipe: the path of synthetic data of its shape."""
    folder = tmp_path_factory.mktemp("data")

    def make(file):
        path = folder / f"{file.stem}.npz"
        if not path.exists():
            size, levels = SHAPES.get(file.stem, ((3, 32, 32), True))
            numbers = np.random.default_rng(0)
            x = numbers.integers(0, 256, (40, *size)).astype(np.uint8)
            # Pictures have their channels last.
            x = np.moveaxis(x, 1, -1) if levels else x.astype(np.float32)
            np.savez(path, x=x, y=np.arange(40) % 10)
        return str(path)

    return make


def small(config):
    """The configuration with a network of the same build, but narrow."""
    net = dict(config.get("net", {}))
    name = net.get("name")
    if name is None:
        return config
    presets = getattr(names(nets)[name], "presets", {})
    net = {**presets.get(net.pop("preset", None), {}), **net, **SMALL[name]}
    return {**config, "net": net}


@pytest.mark.parametrize(("file", "variant", "arguments"), VARIANTS, ids=IDS)
def test_recipe_builds_and_steps(file, variant, arguments, data, tmp_path):
    config = small(configuration(file, arguments))
    config = merge(config, {"data": {"source": data(file)}, "training": {"batch_size": 4}})
    trainer = Trainer(prepare(config, tmp_path, torch.device("cpu")))
    before = [p.clone() for p in trainer.model.net.parameters()]
    figures = trainer.learn()
    trainer.learn()  # warm-up starts at a tiny rate; zero layers need a second step
    assert figures.loss.isfinite().all()
    assert figures.norm.isfinite()
    assert figures.norm > 0
    after = list(trainer.model.net.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("section", ["sde", "net", "data", "objective", "training", "sampling"])
def test_a_wrong_key_in_a_recipe_is_found(section, data, tmp_path):
    file = FOLDER / "cifar10-vp.yaml"
    config = small(configuration(file, commands(file)[0][1]))
    config = merge(config, {"data": {"source": data(file)}, "training": {"batch_size": 4}})
    config[section]["wrongkey"] = 1
    with pytest.raises(ConfigError, match="wrongkey"):
        prepare(config, tmp_path, torch.device("cpu"))


@pytest.mark.parametrize("file", [f for f in CONFIGS if f.stem != "moons"], ids=lambda f: f.stem)
def test_without_data_a_recipe_says_so(file, tmp_path):
    with pytest.raises(ValueError, match="no data at"):
        prepare(read_config(file), tmp_path, torch.device("cpu"))


# -- against the originals' settings, as the readers of their checkpoints understand them -----


def found(stem, variant):
    """A variant's network (without numbers), process and parameterization."""
    file, _, arguments = next(v for v in VARIANTS if (v[0].stem, v[1]) == (stem, variant))
    config = configuration(file, arguments)
    with torch.device("meta"):
        net = build_net(config["net"], shape(file))
    process = build(config["sde"], sde, "sde")
    section = {"name": process.default_parameterization, **config.get("parameterization", {})}
    return net, process, build(section, parameterization, "parameterization")


def differences(net, other):
    """Fields of two networks that are not the same."""
    ours, theirs = describe(net), describe(other)
    return {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}


SONG = {
    "data": {"image_size": 32, "num_channels": 3},
    "model": {
        "name": "ncsnpp", "nf": 128, "ch_mult": [1, 2, 2, 2], "attn_resolutions": [16],
        "resblock_type": "biggan", "skip_rescale": True, "dropout": 0.1,
    },
}  # fmt: skip


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("name", ["vp", "subvp", "ve"])
def test_the_networks_and_processes_of_song_et_al(name, deep):
    ve = name == "ve"
    model = {**SONG["model"], "num_res_blocks": 8 if deep else 4}
    if ve:
        model |= {"fir": True, "progressive_input": "residual", "embedding_type": "fourier"}
    else:
        model |= {"embedding_type": "positional"}
    told = {"model": model, "data": {**SONG["data"], "centered": True},
            "training": {"sde": f"{name}sde", "continuous": True}}  # fmt: skip
    options = Options(told, Path("config.json"))
    with torch.device("meta"):
        original = score_sde.network(options)
    net, process, predicts = found("cifar10-ve" if ve else "cifar10-vp", name + ", deep" * deep)
    assert differences(net, original) <= {"noise_width"}  # None is the width
    assert (net.noise_width or net.width) == (original.noise_width or original.width)
    if not ve:
        assert (process, predicts) == score_sde.process(options)
    else:
        theirs, _ = score_sde.process(options)  # of data in [0, 1], half as wide
        assert (process.sigma_min, process.sigma_max) == (
            2 * theirs.sigma_min, 2 * theirs.sigma_max,
        )  # fmt: skip
        t = torch.rand(5, dtype=torch.float64)
        c = predicts(process.alpha(t), process.sigma(t))
        assert torch.equal(c.c_in, torch.ones_like(t))
        assert torch.allclose(c.c_noise, process.sigma(t))


@pytest.mark.parametrize(
    ("variant", "told"),
    [
        ("unconditional", {}),
        ("conditional", {"label_dim": 10}),
        (
            "unconditional, NCSN++",
            {
                "embedding_type": "fourier", "encoder_type": "residual",
                "resample_filter": [1, 3, 3, 1], "channel_mult_noise": 2,
            },
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_the_networks_of_edm(variant, told):
    told = {
        "img_resolution": 32, "in_channels": 3, "out_channels": 3, "augment_dim": 9,
        "model_channels": 128, "channel_mult": [2, 2, 2], "dropout": 0.13, **told,
    }  # fmt: skip
    with torch.device("meta"):
        original = song_unet.network(told)
    net, process, predicts = found("cifar10-edm", variant)
    assert differences(net, original) <= {"taps", "noise_width", "out_channels"}
    assert (net.taps or (1, 1)) == (original.taps or (1, 1))
    assert (net.noise_width or net.width) == (original.noise_width or original.width)
    assert (process, predicts) == (sde.EDM(), parameterization.Karras(sigma_data=0.5))


@pytest.mark.parametrize(
    ("stem", "variant", "length"),
    [("cifar10-ddpm", "ddpm", 1000), ("cifar10-improved-ddpm", "hybrid", 4000)],
)
def test_the_label_of_a_chain_is_its_step_as_if_there_were_1000(stem, variant, length):
    _, process, predicts = found(stem, variant)
    assert process.num_steps == length
    i = torch.tensor([0, 1, 77, length - 1], dtype=torch.float64)  # as the originals count them
    t = (i + 1) / length
    predicts = replace(predicts, sigma_data=0.5)  # as that of pictures, with which c_in is not 1
    c = predicts(process.alpha(t), process.sigma(t))
    assert torch.allclose(c.c_noise, i * 1000 / length, atol=1e-6)
    assert torch.equal(c.c_in, torch.ones_like(t))
    assert torch.equal(c.c_out, torch.ones_like(t))


def test_numbers_that_follow_from_others():
    import scoresde as sd

    half_life = torch.tensor(0.5).log() / torch.tensor(0.99929).log() * 512
    assert float(half_life) == pytest.approx(0.5e6, rel=0.01)
    edm = read_config(FOLDER / "cifar10-edm.yaml")["training"]
    assert edm["warmup"] * edm["batch_size"] == pytest.approx(10e6, rel=1e-4)
    section = read_config(FOLDER / "i-dode.yaml")["sde"]
    process = sd.VP(**{k: float(v) for k, v in section.items() if k != "name"})
    assert float(-2 * process.log_snr(process.t_min)) == pytest.approx(-13.3, abs=1e-3)
    assert float(-2 * process.log_snr(process.t_max)) == pytest.approx(5, abs=1e-3)
