"""What a run tells: its logs, its trackers, the line of a minute and the picture of its losses."""

import json
import resource
import sys
import time
import types
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

from scoresde.config import ConfigError
from scoresde.files import CheckpointError
from scoresde.training import loss_picture, track
from scoresde.training.log import Log
from scoresde.training.summary import RunCost, cost, last_error, means, patience, state_of

# -- logs --------------------------------------------------------------------------------------


def filled(folder, steps=(20, 40, 60)):
    log = Log(folder)
    for step in steps:
        log.append("train", step=step, loss=1 / step, seconds=step / 10, items=8 * step, world=2)
    return log


@pytest.mark.parametrize("half", ['{"step": 80, "lo', "\0\0\0", "{"])
def test_half_a_row_is_none_and_is_cut_off_by_the_next(tmp_path, half):
    log = filled(tmp_path)
    file = tmp_path / "logs/train.jsonl"
    with open(file, "a") as handle:
        handle.write(half)
    assert [r["step"] for r in log.rows("train")] == [20, 40, 60]
    log.append("train", step=80)
    assert [r["step"] for r in log.rows("train")] == [20, 40, 60, 80]
    assert [json.loads(r)["step"] for r in file.read_text().splitlines()] == [20, 40, 60, 80]
    with open(file, "a") as handle:
        handle.write(half)
    log.rewind(40)
    assert [json.loads(r)["step"] for r in file.read_text().splitlines()] == [20, 40]


def test_a_file_that_holds_nothing_but_half_a_row(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/train.jsonl").write_text('{"st')
    log = Log(tmp_path)
    assert log.rows("train") == []
    log.append("train", step=1)
    assert log.rows("train") == [{"step": 1}]


def test_lines_that_are_no_rows_are_left_out(tmp_path):
    log = filled(tmp_path)
    with open(tmp_path / "logs/train.jsonl", "ab") as handle:
        handle.write(b'{"step": 70, "l{"step": 75}\n[1]\n\xff\n{"a": 1\n"b": 2}\n')
    log.append("train", step=80)
    assert [r["step"] for r in log.rows("train")] == [20, 40, 60, 80]


def test_two_halves_of_an_object_are_no_row(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/train.jsonl").write_text('{"step": 1}\n{"a": 1\n"b": 2}\n')
    assert Log(tmp_path).rows("train") == [{"step": 1}]


def test_numbers_that_are_not_finite_are_null(tmp_path):
    Log(tmp_path).append("train", step=1, loss=float("nan"), by=[1.0, float("inf")])
    text = (tmp_path / "logs/train.jsonl").read_text()
    assert json.loads(text) == {"step": 1, "loss": None, "by": [1.0, None]}


@contextmanager
def full_at(size):
    """A disk that takes no more than so many bytes of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line_and_leaves_no_half_row(tmp_path):
    log = filled(tmp_path)
    file = tmp_path / "logs/train.jsonl"
    before = file.read_bytes()
    with full_at(len(before) + 10), pytest.raises(CheckpointError, match=r"cannot write .*train"):
        log.append("train", step=80, loss=0.5)
    assert file.read_bytes() == before
    with full_at(10), pytest.raises(CheckpointError, match="cannot write"):
        log.rewind(40)
    assert file.read_bytes() == before
    log.append("train", step=80, loss=0.5)
    assert len(log.rows("train")) == 4


def test_logs_of_many_rows_are_read_at_once(tmp_path):
    (tmp_path / "logs").mkdir()
    row = json.dumps({"step": 20, "loss": 0.0123, "loss_by_time": [0.0123] * 8}) + "\n"
    (tmp_path / "logs/train.jsonl").write_text(row * 100_000)
    start = time.process_time()
    assert len(Log(tmp_path).rows("train")) == 100_000
    assert time.process_time() - start < 4


def test_going_back_keeps_events_and_counts_what_is_done_again(tmp_path):
    log = filled(tmp_path)
    log.append("heldout", step=50, loss=1.0)
    log.append("events", step=60, kind="error", text="the disk is full")
    log.rewind(40)
    assert [r["step"] for r in log.rows("train")] == [20, 40]
    assert log.rows("heldout") == []
    error, back = log.rows("events")
    assert error["kind"] == "error"
    assert (back["kind"], back["step"], back["seconds"], back["items"]) == ("rewind", 40, 2, 160)
    log.rewind(40)
    assert len(log.rows("events")) == 2
    log.append("train", step=60, seconds=7.0, items=480, world=4)
    found = cost(tmp_path, multiply_adds=10)
    # 4 s on 2 processes, 2 s on 2 that were lost, 3 s on 4.
    hours = (4 * 2 + 2 * 2 + 3 * 4) / 3600
    assert found == RunCost(9.0, 2.0, 480, 60, hours, 3 * 10 * 480, 2 * 3 * 10 * 480)
    assert last_error(tmp_path)["text"] == "the disk is full"


def test_the_last_trouble(tmp_path):
    assert last_error(tmp_path) is None
    log = Log(tmp_path)
    for kind in ("start", "skip", "save", "end"):
        log.append("events", step=3, kind=kind, text=kind)
    assert last_error(tmp_path)["kind"] == "skip"


def test_how_a_run_stands():
    turn = [{"kind": k} for k in ("start", "skip", "save")]
    assert state_of(turn, False, 0.5, 5.0) == "running"
    assert state_of(turn, False, 0.5, 700.0) == "silent"
    assert state_of(turn, False, 0.5, 700.0, patience=1e4) == "running"
    for kind, name in (("stop", "stopped"), ("error", "failed"), ("end", "finished")):
        assert state_of([*turn, {"kind": kind}], False, 0.5, 1e6) == name
        assert state_of([*turn, {"kind": kind}, {"kind": "resume"}], True, 0.5, 1) == "running"
    assert state_of([], True, None, 1e6) == "finished"
    assert state_of([], False, None, None) == "silent"
    assert patience([{"seconds": 300.0 * k} for k in range(9)]) == 3000
    assert means([[1.0, None, 3.0], [2.0, None, None]]) == [1.5, None, 3.0]


# -- trackers ----------------------------------------------------------------------------------


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "logs"), size_guidance={"images": 0, "scalars": 0})
    return read.Reload()


def points(folder, name):
    return [(e.step, round(e.value, 4)) for e in events(folder).Scalars(name)]


def test_tensorboard_holds_what_was_passed_and_forgets_what_is_done_again(tmp_path):
    pixels = torch.arange(3 * 4 * 5, dtype=torch.uint8).view(3, 4, 5)
    first = track.tracker("auto", tmp_path, {"sde": {"name": "vp"}})
    for step in (20, 40, 60):
        first.scalars(step, {"train/loss": 1 / step, "train/none": None, "kind": "text"})
    first.picture(40, "samples", pixels)
    first.close()
    assert points(tmp_path, "train/loss") == [(20, 0.05), (40, 0.025), (60, 0.0167)]
    assert events(tmp_path).Tags()["scalars"] == ["train/loss"]
    import io

    stored = events(tmp_path).Images("samples")[0]
    shown = np.array(Image.open(io.BytesIO(stored.encoded_image_string)))
    assert stored.step == 40
    assert (torch.from_numpy(shown).permute(2, 0, 1) == pixels).all()

    again = track.tracker("tensorboard", tmp_path, {}, step=40)
    again.scalars(60, {"train/loss": 0.5})
    again.close()
    assert points(tmp_path, "train/loss") == [(20, 0.05), (40, 0.025), (60, 0.5)]
    assert len(events(tmp_path).Images("samples")) == 1
    assert (
        b"name: vp"
        in events(tmp_path).Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    )


def test_without_the_package_auto_is_nothing_and_the_name_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    said = []
    quiet = track.tracker("auto", tmp_path, {}, say=said.append)
    quiet.scalars(1, {"a": 1.0})
    quiet.close()
    assert not said
    assert not (tmp_path / "logs").exists()
    with pytest.raises(ConfigError, match=r"pip install 'scoresde\[tensorboard\]'"):
        track.tracker("tensorboard", tmp_path, {})


def test_none_is_none_and_another_name_is_an_error(tmp_path):
    assert track.tracker("none", tmp_path, {}).sink is None
    with pytest.raises(ConfigError, match="accepted: auto, none, tensorboard, wandb"):
        track.tracker("mlflow", tmp_path, {})


class Broken:
    def __init__(self):
        self.calls = 0

    def scalars(self, step, values):
        self.calls += 1
        raise OSError("no space\nleft")

    picture = close = scalars


def test_a_failure_is_said_once_and_switches_the_tracker_off():
    said, sink = [], Broken()
    tracker = track.Tracker(sink, said.append)
    for step in range(3):
        tracker.scalars(step, {"loss": 1.0})
    tracker.picture(3, "samples", torch.zeros(1, 2, 2, dtype=torch.uint8))
    tracker.close()
    assert sink.calls == 1
    assert said == ["Broken failed and is switched off, the logs go on: no space left"]


def test_a_tracker_that_does_not_start_stops_nothing(tmp_path):
    (tmp_path / "logs").write_text("in the way")
    said = []
    tracker = track.tracker("tensorboard", tmp_path, {}, say=said.append)
    tracker.scalars(1, {"a": 1.0})
    assert len(said) == 1
    assert said[0].startswith("tensorboard did not start and is left out, the logs go on: ")


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package: a run remembers by its id how far it got."""
    stub = types.ModuleType("wandb")
    stub.reached, stub.rows, stub.asked, stub.finished = {}, [], [], 0

    class Run:
        def __init__(self, name):
            self.id = name
            self.step = stub.reached.get(name, 0)

        def log(self, values, step):
            assert step >= self.step
            self.step = step
            stub.reached[self.id] = step + 1
            stub.rows.append((self.id, step, values))

        def finish(self):
            stub.finished += 1

    def init(**given):
        stub.asked.append(given)
        return Run(given["id"])

    stub.init, stub.Image = init, lambda array: array
    monkeypatch.setitem(sys.modules, "wandb", stub)
    return stub


def test_wandb_resumes_one_run_for_each_folder(tmp_path, wandb):
    run = tmp_path / "digits"
    first = track.tracker("wandb", run, {"sde": {"name": "vp"}})
    first.scalars(20, {"loss": 1.0})
    first.picture(20, "samples", torch.zeros(3, 4, 5, dtype=torch.uint8))
    first.scalars(40, {"loss": 0.5})
    first.close()
    again = track.tracker("wandb", run, {}, step=20)
    again.scalars(40, {"loss": 0.5})  # is there already
    again.scalars(60, {"loss": 0.25})
    other = track.tracker("wandb", tmp_path / "other", {})
    other.close()
    ids = [given["id"] for given in wandb.asked]
    assert ids[0] == ids[1] != ids[2]
    assert [(i, step) for i, step, _ in wandb.rows] == [(ids[0], s) for s in (20, 20, 40, 60)]
    assert wandb.rows[1][2]["samples"].shape == (4, 5, 3)
    given = wandb.asked[0]
    assert (given["resume"], given["name"], given["dir"]) == ("allow", "digits", f"{run}/logs")
    assert given["config"] == {"sde": {"name": "vp"}}
    assert "mode" not in given  # WANDB_MODE decides
    assert wandb.finished == 2


def test_wandb_that_is_not_there_or_has_no_key(tmp_path, wandb, monkeypatch):
    def init(**given):
        raise RuntimeError("api_key not configured")

    wandb.init = init
    said = []
    track.tracker("wandb", tmp_path, {}, say=said.append).scalars(1, {"a": 1.0})
    assert said == ["wandb did not start and is left out, the logs go on: api_key not configured"]
    del wandb.init  # as the folder that wandb leaves behind, imported by its name
    with pytest.raises(ConfigError, match=r"pip install 'scoresde\[wandb\]'"):
        track.tracker("wandb", tmp_path, {})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install 'scoresde\[wandb\]'"):
        track.tracker("wandb", tmp_path, {})


# -- words and pictures ------------------------------------------------------------------------


def test_the_line_of_a_minute():
    row = {"step": 300, "seconds": 60.0, "loss": 0.12345, "gradient_norm": 0.5, "waiting": 0.021,
           "items_per_second": 1234.4, "memory": 3 * 2**20, "skipped": 2}  # fmt: skip
    assert track.line(row, 0.25) == (
        "step 300, 25%, loss 0.1235, gradient 0.5, 1234 items/s, 2% waiting for data, 3.0 MiB, "
        "2 steps skipped, about 3 min left"
    )
    bare = {"step": 1, "loss": None, "gradient_norm": float("nan"), "seconds": 1.0}
    assert track.line(bare, 0.0) == "step 1, 0%"


def test_groups_of_rows_are_means_over_the_axis():
    steps, values = np.arange(1.0, 101.0), np.arange(1.0, 101.0) * 2
    x, y = loss_picture.grouped(steps, values, 10, log=False)
    np.testing.assert_allclose(x[0], np.mean(np.arange(1, 11)))  # 1 to 10.9
    np.testing.assert_allclose(y, 2 * x)
    assert len(x) == 10
    x, _ = loss_picture.grouped(steps[:-1], values[:-1], 2, log=True)
    np.testing.assert_allclose(x, [np.mean(np.arange(1, 10)), np.mean(np.arange(10, 100))])
    table = np.stack([values, np.where((steps > 50) & (steps % 2 == 0), values, np.nan)], 1)
    _, means_ = loss_picture.grouped(steps, table, 2, log=False)
    assert means_.shape == (2, 2)
    assert np.isnan(means_[0, 1])
    np.testing.assert_allclose(means_[1], [151.0, 152.0])  # of 51 to 100, and the even of them


def test_the_picture_has_a_panel_for_noise_levels_only_where_they_are_known(tmp_path):
    train = [{"step": s, "loss": 2.0 / s if s != 5 else None} for s in range(1, 200)]
    heldout = [{"step": 100, "loss": 0.1}]
    sizes = []
    for rows in (train, [{**r, "loss_by_time": [1.0 / r["step"], None]} for r in train], []):
        loss_picture.draw(tmp_path / "loss.png", rows, heldout if rows else [])
        with Image.open(tmp_path / "loss.png") as image:
            sizes.append(image.size)
            colours = {c for _, c in image.convert("RGB").getcolors(1 << 20)}
            assert ((31, 42, 68) in colours) == bool(rows)  # the line of training
            assert ((209, 73, 91) in colours) == bool(rows)  # and of what is held out
    assert sizes[1][0] > 1.4 * sizes[0][0]
    assert sizes[2] == sizes[0]
