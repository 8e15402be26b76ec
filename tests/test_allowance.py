from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import scoresde as sd
from scoresde import allowance
from scoresde.checkpoint import CheckpointError

FILE = Path("m.safetensors")


def held(*sizes):
    return {str(i): torch.empty(n) for i, n in enumerate(sizes)}


def within(tensors, make):
    with allowance.no_larger(tensors, FILE):
        return make()


def test_what_the_file_could_fill_is_built_as_without_it(monkeypatch):
    monkeypatch.setattr(allowance, "BESIDES", 0)
    torch.manual_seed(0)
    plain = nn.Linear(10, 10)
    torch.manual_seed(0)
    net = within(held(100, 10), lambda: nn.Linear(10, 10))
    assert torch.equal(net.weight, plain.weight)
    assert torch.equal(net.bias, plain.bias)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(10, 100),
        lambda: [nn.Linear(10, 10) for _ in range(10)],
        lambda: torch.zeros(1000),
        lambda: torch.arange(1000),
        lambda: torch.arange(0.0, 100.0, 0.1),
        lambda: torch.linspace(0, 1, 1000),
        lambda: torch.randn((10, 100)),
        lambda: torch.eye(25),
        lambda: torch.full((1000,), 1.0),
    ],
)
def test_more_than_that_is_refused(make, monkeypatch):
    monkeypatch.setattr(allowance, "BESIDES", 0)
    with pytest.raises(CheckpointError, match=r"^m\.safetensors holds 110 numbers, and"):
        within(held(100, 10), make)
    within(held(1000, 10), make)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(10**9, 10**9),  # more bytes than an address can name
        lambda: nn.Linear(10**8, 10**4),
        lambda: torch.zeros(1 << 45),
        lambda: torch.arange(1 << 45),
        lambda: torch.linspace(0, 1, 1 << 45),
        lambda: torch.outer(torch.ones(1 << 22), torch.ones(1 << 22)),
        lambda: torch.ones(1 << 12).repeat(1 << 40),
        lambda: torch.ones(1 << 22)[:, None] + torch.ones(1 << 22),
    ],
)
def test_it_is_refused_before_the_memory_is_taken(make):
    with pytest.raises(CheckpointError, match="far larger"):
        within(held(100), make)


def test_many_tiny_layers_are_too_many():
    def tower():
        return [nn.Linear(1, 1) for _ in range(10**6)]

    with pytest.raises(CheckpointError, match="far larger"):
        within(held(*[1] * 10), tower)


def test_other_errors_pass():
    def fails():
        raise ValueError("width")

    with pytest.raises(ValueError, match=r"^width$"):
        within(held(1), fails)
    with pytest.raises(RuntimeError, match="mat1"):
        within(held(1), lambda: torch.zeros(2, 3) @ torch.zeros(2, 3))


@pytest.fixture
def model(tmp_path):
    sd.load("zoo:mnist").save(tmp_path)
    return tmp_path


def rewritten(folder, change):
    content = yaml.safe_load((folder / "config.yaml").read_text())
    change(content)
    (folder / "config.yaml").write_text(yaml.safe_dump(content))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("width", 10**9, "far larger"),
        ("blocks", 10**6, "far larger"),
        ("num_classes", 10**12, "far larger"),
    ],
)
def test_a_model_of_ours_is_no_larger_than_its_weights(model, key, value, said):
    rewritten(model, lambda c: c["net"].update({key: value}))
    with pytest.raises(CheckpointError, match=said):
        sd.load(model)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 99}, "is of format 99; this version reads 1"),
        ({"shape": 3}, "shape is 3; accepted: a list of sizes"),
        ({"shape": "abc"}, "shape is 'abc'"),
        ({"shape": [1, -28, 28]}, "shape is"),
        ({"shape": [1, 28.0, 28]}, "shape is"),
        ({"net": 7}, "section 'net' is no mapping"),
        ({"sde": [1]}, "section 'sde' is no mapping"),
        ({"parameterization": None}, "section 'parameterization' is no mapping"),
        ({"scaler": 5}, "section 'scaler' is no mapping"),
        ({"weights": [1]}, "unknown weights in config.yaml"),
    ],
)
def test_sections_that_are_none_are_named(model, change, said):
    rewritten(model, lambda c: c.update(change))
    with pytest.raises(ValueError, match=said) as caught:
        sd.load(model)
    assert type(caught.value) in (CheckpointError, sd.ConfigError)


def test_files_that_may_not_be_read_are_one_line(model, monkeypatch):
    real = Path.is_file

    def refuse(path, *args):
        if path.name == "config.yaml":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args)

    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(CheckpointError, match=r"^cannot read .*config\.yaml: Permission denied$"):
        sd.load(model)


def test_a_message_is_one_line_that_no_terminal_obeys():
    said = str(CheckpointError("a\nb\x1b[2J\u202ec ü"))
    assert said == r"a\nb\x1b[2J\u202ec ü"
