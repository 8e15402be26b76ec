"""Commands and Python of the pages on guidance and on inverse problems, as they stand."""

import re
import shlex
from pathlib import Path

import pytest
import torch

import scoresde as sd
from scoresde.cli import cli
from scoresde.config import override

ROOT = Path(__file__).parent.parent
PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in ("guidance", "inverse")}
LINES = [
    line for page in PAGES.values() for line in re.findall(r"^scoresde .*$", page, flags=re.M)
]
BLOCKS = [
    (name, block)
    for name, page in PAGES.items()
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.S)
]
GIVEN = Path(sd.__file__).parent / "zoo" / "mnist-given"


@pytest.mark.parametrize("line", LINES)
def test_commands_are_accepted(line):
    command, *arguments = shlex.split(line, comments=True)[1:]
    given = cli.get_command(None, command).make_context(command, arguments).params
    config: dict = {}
    for setting in given.get("settings") or ():
        override(config, setting)
    assert set(config) <= {"net", "objective", "given"}
    if config.get("given"):
        import scoresde.given as room
        from scoresde.config import build

        build({"name": config["given"].pop("name"), **config["given"]}, room, "given")
    guide = given.get("guide")
    if guide is not None:
        guide.check()
    if "text" in given or "mask" in given:
        from scoresde.cli.restore import operator_of

        text = given.get("text") or given["mask"]
        if not text.endswith(".png"):
            operator_of(text, (1, 28, 28), "operator")


@pytest.mark.parametrize(("page", "block"), BLOCKS, ids=lambda value: value[:25])
def test_python_runs(page, block):
    if "zoo:mnist-given" in block and not GIVEN.exists():
        compile(block, page, "exec")
        pytest.skip("needs the model of conditions")
    quick = block.replace("draws=8)", "draws=1, steps=2)").replace("steps=20", "steps=2")
    scope: dict = {"torch": torch, "x": torch.zeros(1, 1, 28, 28), "sd": sd}
    exec(quick, scope)
    if "Energy" in block:
        out = sd.sample(scope["score"], (1, 1, 28, 28), steps=2)
        assert out.x.isfinite().all()
    if "Custom" in block:
        assert scope["operator"].adjointness() < 1e-5


def test_methods_of_the_page_are_those_of_the_library():
    from scoresde.inverse.solving import accepted

    methods = PAGES["inverse"].split("## Methods")[1].split("## ")[0]
    assert set(re.findall(r"^\| `([\w-]+)`", methods, flags=re.M)) == set(accepted())
