"""``scoresde train``: a mistake is one true line, and leaves nothing behind."""

import importlib.util
import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from scoresde.cli.train import command

QUIET = [
    "--set", "training.evaluations=0", "--set", "likelihood.items=0", "--set", "sampling.count=2",
    "--set", "sampling.steps=2", "--set", "training.track=none", "--set", "training.batch_size=4",
]  # fmt: skip


def train(*arguments):
    return CliRunner().invoke(command, [*QUIET, *map(str, arguments)])


def refused(run, *arguments):
    """What is said of a run that leaves nothing behind."""
    done = train("--steps", 1, "--out", run, *arguments)
    assert done.exit_code != 0
    assert not run.exists()
    said = done.output if done.exception is None else f"{done.output}{done.exception}"
    return " ".join(said.split())


def test_a_process_with_a_field_that_is_a_name_is_summed_up(tmp_path):
    done = train("--sde", "ddpm", "--steps", 1, "--out", tmp_path / "run", "--dry-run")
    assert done.exit_code == 0, done.exception
    assert "schedule=linear" in done.output
    assert "steps=1000" in done.output


def test_dropped_labels_need_a_network_that_takes_them(tmp_path):
    said = refused(tmp_path / "run", "--data", "moons", "--set", "objective.drop=0.2")
    assert "objective.drop=0.2 drops labels" in said
    assert "net.num_classes" in said


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_a_tracker_that_is_not_there_is_said_before_the_run(tmp_path):
    said = refused(tmp_path / "run", "--data", "moons", "--set", "training.track=wandb")
    assert "training.track is wandb, which cannot be imported" in said


def write_tar(path, count, label=None):
    with tarfile.open(path, "w") as tar:
        for k in range(count):
            picture = io.BytesIO()
            Image.fromarray(np.full((8, 8), k, np.uint8)).save(picture, "png")
            parts = {"png": picture.getvalue()} | ({} if label is None else {"cls": label})
            for suffix, content in parts.items():
                member = tarfile.TarInfo(f"{k:04d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def test_labels_of_a_stream_without_their_number_name_the_setting(tmp_path):
    write_tar(tmp_path / "s.tar", 12, b"1")
    said = refused(tmp_path / "run", "--data", tmp_path / "s.tar", "--set", "net.num_classes=3")
    assert "net.num_classes is 3, but the data have no labels" in said
    assert "data.classes" in said
    refused_array = refused(tmp_path / "run", "--data", "swissroll", "--set", "net.num_classes=3")
    assert "data.classes" not in refused_array  # it is for streams


def test_the_item_with_a_missing_value_is_named_as_the_file_has_it(tmp_path):
    x = np.random.default_rng(0).normal(size=(300, 5))
    x[17, 2] = np.nan
    np.save(tmp_path / "x.npy", x)
    said = refused(tmp_path / "run", "--data", tmp_path / "x.npy")
    assert "values are not finite in float32, the first in x.npy, row 17;" in said
    assert re.search(r"\b1 of \d+ values", said)


def test_nothing_to_resume_is_said_so(tmp_path):
    said = refused(tmp_path / "run", "--data", "moons", "--resume")
    assert "no run to go on with" in said


def test_resuming_takes_no_other_weights(tmp_path):
    said = refused(tmp_path / "run", "--resume", "--from", "zoo:mnist")
    assert "--from" in said


def test_averages_cannot_be_added_to_a_run_that_has_begun(tmp_path):
    run = ("--data", "moons", "--out", tmp_path / "run", "--set", "training.half_lives=[8]")
    assert train(*run, "--steps", 1).exit_code == 0
    for added in ("half_lives=[8,16]", "lengths=[0.1]"):
        again = train(*run[2:4], "--resume", "--steps", 2, "--set", f"training.{added}")
        assert again.exit_code != 0
        assert f"training.{added.split('=')[0]} cannot change" in str(again.exception)
    assert train(*run, "--resume", "--steps", 2).exit_code == 0


def test_other_data_are_refused_by_name_even_where_the_network_does_not_take_them(tmp_path):
    run = ("--data", "moons", "--out", tmp_path / "run")
    assert train(*run, "--steps", 1).exit_code == 0
    again = train("--data", "digits", *run[2:], "--restartable", "--steps", 2)
    assert "section 'data' cannot change" in str(again.exception)
    assert train(*run, "--restartable", "--steps", 2).exit_code == 0


@pytest.mark.parametrize("before", [0, 3])
def test_a_run_that_diverges_says_what_there_is_to_go_back_to(tmp_path, before):
    run = ("--data", "moons", "--out", tmp_path / "run")
    if before:
        assert train(*run, "--steps", before).exit_code == 0
    done = train(*run, "--restartable", "--steps", 20, "--set", "training.lr=1e30",
                 "--set", "training.warmup=0", "--set", "training.patience=2")  # fmt: skip
    assert "2 steps in a row were not finite" in str(done.exception)
    assert ("The last checkpoint is kept." in str(done.exception)) == bool(before)
    assert ("There is no checkpoint yet." in str(done.exception)) == (not before)


@pytest.mark.parametrize("left", [None, "{", '{"steps": 2}'])
def test_a_run_killed_before_its_report_makes_it_when_it_is_started_again(tmp_path, left):
    run = ("--data", "moons", "--out", tmp_path / "run", "--steps", 3, "--restartable")
    assert train(*run).exit_code == 0
    report = tmp_path / "run" / "report.json"
    before = json.loads(report.read_text())
    report.unlink()
    if left is not None:
        report.write_text(left)
    assert train(*run).exit_code == 0
    after = json.loads(report.read_text())
    assert after["steps"] == 3
    assert after["training_seconds"] == before["training_seconds"]
    made = report.stat().st_mtime_ns
    assert "has reached its end" in train(*run).output
    assert report.stat().st_mtime_ns == made


def test_the_examples_of_the_help_name_configurations_that_exist():
    named = re.findall(r"configs/[\w-]+\.yaml", command.help)
    assert len(named) > 1
    for file in named:
        assert (Path(__file__).parents[2] / file).is_file(), file


def test_a_list_that_is_none_is_asked_for_by_that_name(tmp_path):
    said = refused(tmp_path / "run", "--data", "moons", "--set", "training.half_lives=5")
    assert "training.half_lives: input should be a list, got 5" in said
