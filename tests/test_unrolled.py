import math

import pytest
import yaml

import scoresde as sd
from scoresde import config
from scoresde.unrolled import unrolled


class Read:
    """What stands for an object of a pickle."""

    def __init__(self, **state):
        self.state = state


def test_parts_are_counted_wherever_they_stand():
    assert unrolled(3) == unrolled("abc") == unrolled([]) == 1
    assert unrolled([1, 2]) == unrolled((1, 2)) == unrolled({"a": 1, "b": 2}) == 3
    pair = [1, 2]
    assert unrolled([pair, pair]) == unrolled([[1, 2], [1, 2]]) == 7
    assert unrolled({"a": Read(b=pair, c=pair)}) == 9


def test_laughs_rings_and_wells():
    value = [1]
    for _ in range(60):
        value = [value, value]
    assert unrolled(value) > 2**60
    ring = [1]
    ring.append({"a": (ring,)})
    assert unrolled(ring) == math.inf
    loop = Read()
    loop.state["self"] = [loop]
    assert unrolled(loop) == math.inf
    well = []
    for _ in range(100_000):
        well = [well]
    assert unrolled(well) == math.inf


def test_yaml_that_repeats_itself_is_refused(tmp_path):
    lines = ["a0: &a0 [1]"] + [f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]" for i in range(40)]
    file = tmp_path / "config.yaml"
    file.write_text("\n".join(lines))
    with pytest.raises(sd.ConfigError, match=r"config\.yaml says more than any"):
        config.read_yaml(file)
    file.write_text("[" * 20_000)
    with pytest.raises(sd.ConfigError, match="nested too deeply"):
        config.read_yaml(file)
    file.write_text("common: &c {a: 1}\nsde: *c\nnet: *c\n")
    assert config.read_yaml(file) == yaml.safe_load(file.read_text())
