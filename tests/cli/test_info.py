"""``scoresde info``: models of all kinds, their cost, and their figures."""

import json

import pytest
import torch

import scoresde as sd
from scoresde.cli import info
from scoresde.nets.adm import ADM
from scoresde.noise_labels import Time


def lines(said):
    return dict(line.split(maxsplit=1) for line in said.out.splitlines() if line[0] != " ")


def conditional():
    torch.manual_seed(0)
    net = ADM((3, 8, 8), width=32, multipliers=(1,), blocks=1, attention=(0,), head_dim=16,
              num_classes=5, out_channels=6)  # fmt: skip
    sde = sd.DDPM(1000, t_min=1e-3, t_min_sampling=1e-3, t_min_likelihood=1e-3)
    label = Time(sde, 1000.0, -1.0)
    return sd.ScoreModel(net, sde, sd.Eps(scale_input=False, label=label), shape=(3, 8, 8))


def test_a_model_in_words_and_numbers(run, tmp_path):
    said = run("info", "zoo:digits", "--json", "i.json").out
    figures = json.loads((tmp_path / "i.json").read_text())
    model = sd.load("zoo:digits")
    size = sum(p.numel() for p in model.net.parameters())
    assert figures["format"] == "scoresde"
    assert figures["parameters"] == size
    assert figures["weights memory"] == 4 * size + sum(b.nbytes for b in model.net.buffers())
    assert figures["multiply-adds"] > 1e7
    assert 0 < figures["forward memory"] < figures["gradient memory"]
    assert (figures["classes"], figures["learned variance"]) == (None, False)
    assert figures["noise label"] == {"name": "log-noise", "scale": 0.25, "unit": 1.0}
    for text in (
        f"{size:,}", f"{figures['multiply-adds']:,} a forward pass of one item", "[1, 8, 8]",
        "log-noise (scale=0.25, unit=1)", "MiB", "KiB for the activations of one item",
        "with those for a vector-Jacobian product", "training.batch_size",
    ):  # fmt: skip
        assert text in said
    assert "left out" not in said


def test_facts_of_a_conditional_model_with_learned_variance():
    facts = info.model_facts(conditional())
    assert (facts["classes"], facts["learned variance"]) == (5, True)
    assert (
        info.said("noise label", facts["noise label"]) == "time (sde=ddpm, scale=1000, offset=-1)"
    )
    assert "label" not in facts["parameterization"]
    json.dumps(facts)


@pytest.mark.parametrize(
    ("name", "form", "left"),
    [
        ("edm_ddpmpp_cond", "EDM", "augment_pipe"),
        ("guided_diffusion_cond/model.pt", "guided-diffusion", "nothing"),
        ("song_ddpmpp_subvp/checkpoint.pth", "score_sde_pytorch", "optimizer"),
    ],
)
def test_a_checkpoint_of_another_project(run, tmp_path, original, name, form, left):
    folder, _, file = name.partition("/")
    path = original(folder) / file
    said = run("info", path, "--json", "i.json").out
    assert said.splitlines()[0].split() == ["format", form]
    assert left in said.split("left out", 1)[1]
    assert json.loads((tmp_path / "i.json").read_text())["multiply-adds"] > 1e7
    error = run("likelihood", path, "--items", 1, code=1).err
    assert "is of another project" in error
    assert "--data" in error


@pytest.mark.parametrize("args", [["nothing"], ["zoo:mnits"], ["zoo:mnist", "--set", "a=1"]])
def test_mistakes_are_one_line(run, args):
    error = run("info", *args, code=1).err
    assert error.startswith("Error: ")
    assert error.count("\n") == 1
