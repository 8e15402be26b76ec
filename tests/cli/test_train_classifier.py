"""``scoresde train-classifier``, end to end."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import scoresde as sd
from scoresde.classifier import fits, misfit
from scoresde.cli.train_classifier import command
from scoresde.config import read_yaml
from scoresde.data import Scaler
from scoresde.training.classifier import ClassifierTrainer

SMALL = [
    "--set", "net.width=16", "--set", "net.blocks=1", "--set", "training.track=none",
    "--set", "training.evaluations=1", "--set", "training.batch_size=32",
    "--set", "data.samples=500",
]  # fmt: skip


def train(*arguments, code=0, small=True):
    done = CliRunner().invoke(command, [*(SMALL if small else ()), *map(str, arguments)])
    assert done.exit_code == code, (done.output, done.exception)
    return done


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on moons, and what it said."""
    folder = tmp_path_factory.mktemp("classifier") / "run"
    done = train("--data", "moons", "--sde", "vp", "--steps", 60, "--seed", 3, "--out", folder,
                 "--json", folder.parent / "it.json")  # fmt: skip
    return folder, done.output


def test_a_run_leaves_a_classifier_and_its_figures(run):
    folder, said = run
    assert "mlp-classifier" in said
    assert "2 classes, 0% of the items clean" in said
    report = json.loads((folder / "report.json").read_text())
    assert json.loads((folder.parent / "it.json").read_text()) == report
    assert report["steps"] == 60
    assert report["items_seen"] == 60 * 32
    held = report["heldout"]
    assert held["clean"]["items"] == 50
    assert held["clean"]["accuracy"] > 0.8
    assert held["noisy"][-1]["accuracy"] < 0.8  # nothing is left to see
    assert f"clean           {held['clean']['accuracy']:6.1%}" in said
    assert said.count("±") == 9
    found = sd.load_classifier(folder)
    assert isinstance(found, sd.NoisyClassifier)
    assert (found.num_classes, found.class_names) == (2, ("upper", "lower"))
    assert (found.weights, found.sde) == ("ema", sd.VP())
    data = sd.data.load("moons", samples=500, seed=5)
    x = found.scaler.encode(data.x)
    right = (found(x, 0.0).argmax(1) == data.y).double().mean()
    assert right > 0.8
    raw = sd.load_classifier(folder, weights="raw")
    assert not torch.equal(raw(x, 0.3), found(x, 0.3))
    found.save(folder.parent / "saved")
    assert torch.equal(sd.load_classifier(folder.parent / "saved")(x, 0.3), found(x, 0.3))
    with pytest.raises(sd.checkpoint.CheckpointError, match="use load_classifier"):
        sd.load(folder)


def test_info_tells_of_a_classifier(run):
    from scoresde.cli.info import command as info

    folder, _ = run
    said = CliRunner().invoke(info, [str(folder)])
    assert said.exit_code == 0, said.exception
    right = json.loads((folder / "report.json").read_text())["heldout"]["clean"]["accuracy"]
    assert f"accuracy               {right:.1%} of clean items held out" in said.output
    assert "training loss an item, o held out" in said.output
    assert "training loss a dimension" not in said.output


def test_a_run_goes_on_as_if_it_had_not_stopped(run, tmp_path, monkeypatch):
    whole, _ = run
    learn = ClassifierTrainer.learn

    def interrupted(self):
        if self.step == 20:
            os.kill(os.getpid(), signal.SIGTERM)
        return learn(self)

    parts = ("--data", "moons", "--sde", "vp", "--steps", 60, "--seed", 3, "--out", tmp_path / "r")
    monkeypatch.setattr(ClassifierTrainer, "learn", interrupted)
    done = train(*parts, code=75)
    assert f"scoresde train-classifier --out {tmp_path / 'r'} --resume" in done.output
    monkeypatch.setattr(ClassifierTrainer, "learn", learn)
    done = train("--out", tmp_path / "r", "--restartable", small=False)
    assert "resumed at step 21" in done.output
    for weights in ("raw", "ema"):
        a, b = (sd.load_classifier(f, weights=weights).net for f in (whole, tmp_path / "r"))
        for one, other in zip(a.parameters(), b.parameters(), strict=True):
            assert torch.equal(one, other)
    again = train("--out", tmp_path / "r", "--resume", small=False)
    assert "has reached its end" in again.output
    longer = train("--out", tmp_path / "r", "--resume", "--steps", 62, small=False)
    assert "trained 62 steps" in longer.output
    refused = train("--out", tmp_path / "r", "--resume", "--sde", "ve", code=1, small=False)
    assert "section 'sde' cannot change" in str(refused.exception)
    refused = train("--out", tmp_path / "r", code=1)
    assert "--resume goes on with it" in str(refused.exception)
    train("--out", tmp_path / "r", "--overwrite", "--data", "rings", "--steps", 1)
    assert sd.load_classifier(tmp_path / "r").num_classes == 3


def test_like_a_score_model(tmp_path):
    scaler = Scaler((0.1, 0.2), (1.5, 1.25))
    sde = sd.SubVP(beta_max=12.0)
    net = sd.nets.MLP((2,), width=8, blocks=1)
    model = sd.ScoreModel(net, sde, sd.V(), shape=(2,), scaler=scaler)
    model.save(tmp_path / "score")
    asked = ("--data", "moons", "--like", tmp_path / "score", "--steps", 2)
    train(*asked, "--out", tmp_path / "run")
    found = sd.load_classifier(tmp_path / "run")
    assert (found.sde, found.scaler) == (sde, scaler)
    fits(model, found)
    assert read_yaml(tmp_path / "run/config.yaml")["classifier"]["like"] == str(tmp_path / "score")
    # The run keeps the range, which is not that of its data, without the model.
    (tmp_path / "score").rename(tmp_path / "gone")
    train("--out", tmp_path / "run", "--resume", "--steps", 4, small=False)
    assert sd.load_classifier(tmp_path / "run").scaler == scaler
    train("--data", "moons", "--steps", 1, "--out", tmp_path / "other")
    assert "of the process VP" in misfit(model, sd.load_classifier(tmp_path / "other"))
    both = train("--data", "moons", "--like", tmp_path / "gone", "--sde", "vp", code=2)
    assert "leave out --sde" in both.output
    wrong = train("--data", "digits", "--like", tmp_path / "gone", "--out", tmp_path / "w", code=1)
    assert "is of items of shape (2,), digits of (1, 8, 8)" in str(wrong.exception)
    assert not (tmp_path / "w").exists()


def test_a_judge_of_clean_items(tmp_path):
    done = train("--data", "moons", "--clean", "--steps", 60, "--out", tmp_path / "run")
    assert "100% of the items clean" in done.output
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["heldout"]["noisy"] == []
    assert report["heldout"]["clean"]["accuracy"] > 0.8
    some = train("--data", "moons", "--clean", 0.25, "--steps", 1, "--out", tmp_path / "some")
    assert "25% of the items clean" in some.output


def test_runs_of_scores_and_of_classifiers_are_told_apart(run, tmp_path):
    from scoresde.cli.train import command as train_score

    folder, _ = run
    done = CliRunner().invoke(train_score, ["--out", str(folder), "--resume"])
    assert "is the run of a classifier: go on with train-classifier --resume" in str(
        done.exception
    )
    score = tmp_path / "score"
    quiet = ["--set", "training.evaluations=0", "--set", "likelihood.items=0", "--set",
             "sampling.count=2", "--set", "training.track=none"]  # fmt: skip
    arguments = ["--data", "moons", "--steps", "1", "--out", str(score), *quiet]
    assert CliRunner().invoke(train_score, arguments).exit_code == 0
    refused = train("--out", score, "--resume", code=1, small=False)
    assert "is the run of a score: go on with train --resume" in str(refused.exception)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--data", "checkerboard"), 1, "a classifier needs classes"),
        (("--data", "moons", "--set", "sampling.count=3"), 1, "unknown section 'sampling'"),
        (("--resume", "--overwrite"), 2, "--resume and --overwrite exclude each other"),
        (("--data", "moons", "--resume"), 1, "no run to go on with"),
        (("--like", "nowhere/at/all"), 1, "no model at nowhere/at/all"),
        (("--clean", "2"), 2, "is not in the range 0<=x<=1"),
    ],
)
def test_refusals(tmp_path, arguments, code, said):
    done = train(*arguments, "--out", tmp_path / "run", code=code)
    assert said in done.output + str(done.exception)
    assert not (tmp_path / "run").exists()


def test_dry_run_and_the_place_of_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("my points.npz", x=np.arange(18, dtype=np.float32).reshape(9, 2), y=np.arange(9) % 3)
    done = train("--data", "my points.npz", "--dry-run", "--minutes", 0.5)
    assert "0.5 minutes" in done.output
    assert "runs/my-points-classifier" in done.output
    assert not (tmp_path / "runs").exists()
