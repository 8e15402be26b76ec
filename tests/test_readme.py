"""The README's Python runs as it stands, and its names are the command line's."""

import re
from pathlib import Path

import pytest
import torch

import scoresde as sd
from scoresde.cli import COMMANDS

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)


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


def test_public_names_resolve():
    for name in sd.__all__:
        assert getattr(sd, name) is not None
    assert set(dir(sd)) == set(sd.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sd.nothing
