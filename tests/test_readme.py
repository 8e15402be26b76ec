"""The README's Python runs as it stands; names of it and of docs/ are the command line's."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch

import scoresde as sd
from scoresde import nets
from scoresde.cli import COMMANDS, cli
from scoresde.config import build, construct, names, override
from scoresde.data import DataConfig
from scoresde.training import augment, objectives
from scoresde.training.settings import LikelihoodConfig, SamplingConfig, TrainingConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)
TRAINING = (ROOT / "docs" / "training.md").read_text()
LINES = [
    line
    for block in re.findall(r"```\n(.*?)```", TRAINING, flags=re.S)
    for line in block.splitlines()
    if re.match(r"(scoresde|torchrun|srun) ", line)
]
SECTIONS = {"training": TrainingConfig, "data": DataConfig, "sampling": SamplingConfig,
            "likelihood": LikelihoodConfig}  # fmt: skip


@pytest.mark.parametrize("block", [b for b in BLOCKS if "zoo:" not in b], ids=lambda b: b[:30])
def test_examples_run(block):
    scope = {"sd": sd, "torch": torch}
    exec("from dataclasses import dataclass\nfrom scoresde.sde import as_time\n" + block, scope)
    if "Sine" in scope:
        sde, t = scope["Sine"](t_max=1.0), torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
        torch.testing.assert_close(sde.time(sde.log_snr(t)), t)
        torch.testing.assert_close(sde.drift_rate(t), -1.5 * torch.tan(1.5 * t))


def test_the_closed_form_example_gives_the_closed_form():
    block = next(b for b in BLOCKS if "mixture.log_prob(x)" in b)
    assign = block.rstrip().rpartition("\n")
    scope = {"sd": sd, "torch": torch}
    exec(f"{assign[0]}\nerror = {assign[2]}", scope)
    assert scope["error"].abs().max() < 0.05


def test_commands_are_there():
    named = set(re.findall(r"^scoresde (\w+)", README, flags=re.M))
    assert named <= set(COMMANDS)
    assert {"train", "sample", "likelihood", "bench", "check"} <= named


@pytest.mark.parametrize("line", LINES)
def test_commands_of_the_page_on_training_are_accepted(line):
    words = shlex.split(line)
    command, *arguments = words[words.index("scoresde") + 1 :]
    found = cli.get_command(None, command)
    given = found.make_context(command, arguments).params  # an unknown option is an error
    config = {}
    for setting in given.get("settings") or ():
        override(config, setting)
    for section, cls in SECTIONS.items():
        construct(cls, config.get(section, {}), section)
    build({"name": "dsm", **config.get("objective", {})}, objectives, "objective")
    build(config.get("data", {}).get("augment"), augment, "augment")
    net = {"name": "unet", **config.get("net", {})}
    assert net.pop("preset", "small") in sd.nets.UNet.presets
    build(net, nets, "net", shape=(1, 8, 8))
    if given.get("config_file"):
        assert (ROOT / given["config_file"]).is_file()


def test_keys_of_the_page_on_training_are_there():
    keys = set(re.findall(r"`(training|data|sampling|likelihood)\.(\w+)\b(?!\.)", TRAINING))
    assert {("training", "patience"), ("data", "memory")} <= keys
    for section, key in keys:
        assert key in SECTIONS[section].__dataclass_fields__, f"{section}.{key}"
    for named, room in (("weight", "weights"), ("times", "distributions")):
        table = TRAINING.split(f"| `objective.{named}` |")[1].split("\n\n")[0]
        there = set(re.findall(r"^\| `([\w-]+)`", table, flags=re.M))
        assert there == set(names(importlib.import_module(f"scoresde.training.{room}")))
    table = TRAINING.split("| `objective.name` |")[1].split("\n\n")[0]
    assert set(re.findall(r"^\| `([\w-]+)`", table, flags=re.M)) == set(names(objectives))


def test_links_between_the_pages_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
            file = page.parent / target if target else page
            assert file.exists(), f"{page.name}: {target}"
            titles = re.findall(r"^#+ (.*)$", file.read_text(), flags=re.M) if anchor else []
            assert not anchor or anchor in [t.lower().replace(" ", "-") for t in titles], anchor


def test_public_names_resolve():
    for name in sd.__all__:
        assert getattr(sd, name) is not None
    assert set(dir(sd)) == set(sd.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sd.nothing
