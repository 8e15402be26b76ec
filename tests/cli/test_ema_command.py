"""``scoresde ema``: averages of any length, made after training."""

import json

import pytest
import torch

import scoresde as sd
from scoresde import saved_steps
from scoresde.checkpoint import describe_model
from scoresde.files import write_yaml
from scoresde.nets import MLP
from scoresde.training.ema import EMA, PowerFunction, averages
from scoresde.training.posthoc import save_snapshot


@pytest.fixture
def trained(tmp_path):
    """A run with snapshots of two lengths; and an average of a third that was followed."""
    torch.manual_seed(0)
    model = sd.ScoreModel(MLP((2,), width=8, blocks=1), sd.VP(), sd.Eps(), shape=(2,))
    run = tmp_path / "runs" / "mine"
    kept = averages(model.net, 0.9, (), (0.05, 0.1))
    truth = EMA(model.net, PowerFunction(0.08))
    for n in range(1, 401):
        with torch.no_grad():
            for p in model.net.parameters():
                p += torch.randn_like(p) / 20
        for ema in (*kept, truth):
            ema.update(n)
        if n % 25 == 0:
            save_snapshot(run, n, kept)
    parts = {"raw": model.net.state_dict(), **{a.name: a.net.state_dict() for a in kept}}
    saved_steps.save_checkpoint(run, 400, parts, {"step": 400}, keep=1)
    write_yaml(run / "config.yaml", {**describe_model(model), "training": {"lr": 0.1}})
    return run, truth.net


def test_a_model_of_another_length(run, trained, tmp_path):
    folder, truth = trained
    said = run("ema", folder, "--length", "0.08", "--json", "e.json").out
    out = folder / "averages" / "length-0.08"
    assert f"written {out}" in said
    assert "from 32 snapshots" in said
    assert "poor" not in said
    model = sd.load(out)
    assert model.weights == "ema"
    for found, wanted in zip(model.net.parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=5e-3)
    (made,) = json.loads((tmp_path / "e.json").read_text())["averages"]
    assert (made["length"], made["step"], made["snapshots"]) == (0.08, 400, 32)
    assert 0 < made["residual"] < 0.01
    assert made["folder"] == str(out)
    run("sample", out, "-n", "2", "--steps", "2", "--out", "x.npy")
    assert (tmp_path / "x.npy").exists()


def test_several_lengths_and_a_step(run, trained):
    folder, _ = trained
    said = run("ema", folder, "--length", "0.2", "--length", ".01", "--length", "0.01",
               "--step", "200").out  # fmt: skip
    there = sorted(p.name for p in (folder / "averages").iterdir())
    assert there == ["length-0.01-step-200", "length-0.2-step-200"]
    assert said.count("written") == 2
    assert said.count("a poor fit") == 1  # the narrow one
    assert said.count("over 200 steps") == 2


def test_folders_that_are_asked_for(run, trained, tmp_path):
    folder, _ = trained
    run("ema", folder, "--length", "0.08", "--out", "one")
    run("ema", folder, "--length", "0.08", "--length", "0.09", "--out", "two")
    for place in ("one", "two/length-0.08", "two/length-0.09"):
        assert sd.load(tmp_path / place).shape == (2,)


def test_the_list(run, trained, tmp_path):
    folder, _ = trained
    lines = run("ema", folder, "--json", "e.json").out.splitlines()
    assert lines[0].split(maxsplit=1) == ["averages", "ema, ema-length-0.05, ema-length-0.1"]
    assert lines[1].split() == ["made", "none"]
    assert lines[2].startswith("snapshots  length 0.05 at 16 steps: 25, 50, ")
    assert lines[3].startswith("snapshots  length 0.1 at 16 steps: ")
    assert lines[3].endswith(" 400")
    run("ema", folder, "--length", "0.08")
    assert "length-0.08" in run("ema", folder).out.splitlines()[1]
    facts = json.loads((tmp_path / "e.json").read_text())
    assert len(facts["snapshots"]) == 32
    assert facts["averages"] == ["ema", "ema-length-0.05", "ema-length-0.1"]


def test_mistakes_are_one_line_and_leave_nothing(run, trained, tmp_path):
    folder, _ = trained
    for args, said in (
        (("nowhere",), "no run at nowhere"),
        ((folder, "--length", "0.3"), "lies between 0 and 0.2887, got 0.3"),
        ((folder, "--length", "0.1", "--length", "0"), "lies between 0 and 0.2887, got 0"),
        ((folder, "--length", "0.1", "--step", "401"), "accepted: 1 to 400"),
        ((folder, "--length", "0.1", "--out", folder), "is a training run: choose another"),
        ((folder, "--length", "0.1", "--out", folder / "config.yaml" / "x"), "is not a folder"),
        ((tmp_path, "--length", "0.1"), "is no training run"),
    ):
        error = run("ema", *args, code=1).err
        assert error.count("\n") == 1
        assert said in error
    assert "belong to --length" in run("ema", folder, "--step", "3", code=2).err
    assert not (folder / "averages").exists()


def test_a_run_without_snapshots(run, trained):
    folder, _ = trained
    for file in (folder / "snapshots").rglob("ema*"):
        file.unlink()
    assert "snapshots  none: training.lengths makes them" in run("ema", folder).out
    assert "train with training.lengths" in run("ema", folder, "--length", "0.1", code=1).err
