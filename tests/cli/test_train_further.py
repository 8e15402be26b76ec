"""``scoresde train --from``: a model of any kind is trained further."""

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import scoresde as sd
from scoresde.cli.train import command

QUIET = [
    "--set", "training.evaluations=0", "--set", "likelihood.items=0", "--set", "sampling.count=2",
    "--set", "training.track=none",
]  # fmt: skip


def train(*arguments):
    return CliRunner().invoke(command, [*QUIET, *map(str, arguments)])


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    run = tmp_path_factory.mktemp("first") / "run"
    done = train("--data", "moons", "--sde", "cosine", "--steps", 5, "--out", run,
                 "--set", "net.width=24")  # fmt: skip
    assert done.exit_code == 0, done.output
    return run


def test_process_network_and_weights_are_those_of_the_model(first, tmp_path):
    done = train("--from", first, "--data", "moons", "--steps", 1, "--out", tmp_path / "run",
                 "--set", "training.lr=1e-30", "--set", "objective.weight=likelihood")  # fmt: skip
    assert done.exit_code == 0, done.output
    before, after = sd.load(first), sd.load(tmp_path / "run", weights="raw")
    assert after.sde == before.sde
    assert after.net.width == 24
    for a, b in zip(before.net.parameters(), after.net.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_a_foreign_checkpoint_is_trained_further(original, tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8)
    np.save(tmp_path / "x.npy", pictures)
    done = train("--from", original("song_ddpmpp_subvp"), "--data", tmp_path / "x.npy",
                 "--dry-run", "--out", tmp_path / "run")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "process    subvp" in done.output
    assert "network    ncsnpp" in done.output
    assert "Warning" not in done.output  # its range is that of the data


def test_weights_that_do_not_fit_are_refused_before_anything(first, tmp_path):
    done = train("--from", first, "--data", "moons", "--out", tmp_path / "run",
                 "--set", "net.name=mlp", "--set", "net.width=8")  # fmt: skip
    assert done.exit_code != 0
    assert "does not fit the network" in str(done.exception)
    assert not (tmp_path / "run").exists()


def test_another_range_of_the_data_is_said(first, tmp_path):
    done = train("--from", first, "--data", "rings", "--dry-run", "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert "Warning: the data are scaled by" in done.output


def test_the_flags_of_compilation_and_of_the_schedule_reach_the_run(monkeypatch, tmp_path):
    seen = []

    def stop(config, *rest):
        seen.append(config)
        raise ValueError("seen")

    monkeypatch.setattr("scoresde.training.prepare", stop)
    train("--compile", "--tune-schedule", "--out", tmp_path / "run")
    train("--out", tmp_path / "run")
    assert seen[0]["training"]["compile"] is True
    assert seen[0]["objective"]["times"] == "learned"
    assert "compile" not in seen[1]["training"]
    assert "objective" not in seen[1]
