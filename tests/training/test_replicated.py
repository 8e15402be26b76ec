"""Many processes on one batch: the run of one process, whatever happens to them."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from launches import (
    SMALL,
    Torchrun,
    at_step_4,
    course,
    difference,
    ended,
    job,
    start,
    train,
    train_together,
    until,
    weights_differ,
)
from torch import nn

from scoresde.config import ConfigError
from scoresde.files import write_yaml
from scoresde.training import TrainingConfig
from scoresde.training.parallel import check, units

SAME = 1e-6
TOLD = {
    "net": {"num_classes": 10},
    "given": {"name": "masked", "empty": 0.3},
    "objective": {"drop": 0.5},
}
"""A network that is told of its items, and of some of them not."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs by one process and by two: the same, in parts, with another seed, gone on with."""
    folder = tmp_path_factory.mktemp("runs")
    train(job(folder / "one"))
    parts = {"accumulate": 2}
    train_together(
        [
            job(folder / "two"),
            job(folder / "parts", training=parts),
            job(folder / "other", training={"seed": 1}),
            job(at_step_4(folder / "one", folder / "one-two"), resume=True),
            job(folder / "two-told", **TOLD),
        ],
        folder,
    )
    train(job(folder / "one-parts", training=parts))
    train(job(folder / "one-told", **TOLD))
    train(job(at_step_4(folder / "two", folder / "two-one"), resume=True))
    return folder


def test_conditions_and_their_dropping_do_not_depend_on_the_processes(runs):
    assert difference(runs / "one-told", runs / "two-told") < SAME
    assert difference(runs / "one", runs / "one-told") > 100 * SAME


@pytest.mark.parametrize("run", ["two", "parts", "one-parts"])
def test_two_processes_train_what_one_trains(runs, run):
    assert difference(runs / "one", runs / run) < SAME
    assert list(course(runs / run)) == [1, *range(2, 9)]
    for name in ("raw", "ema", "optimizer"):
        assert weights_differ(runs / "one", runs / run, name) < 2 * SAME


def test_another_seed_is_another_run(runs):
    assert difference(runs / "one", runs / "other") > 1e-2
    assert weights_differ(runs / "one", runs / "other", "raw") > 1e-2


@pytest.mark.parametrize("run", ["one-two", "two-one"])
def test_a_run_goes_on_with_another_number_of_processes(runs, run):
    assert difference(runs / "one", runs / run, first=5) < SAME
    assert weights_differ(runs / "one", runs / run, "ema") < 2 * SAME
    events = (runs / run / "logs/events.jsonl").read_text()
    assert '"resume", "text": "step 4"' in events


def test_the_first_process_alone_writes(runs):
    assert json.loads((runs / "two.written-by-1").read_text()) == []


@pytest.mark.parametrize(
    ("batch", "processes", "accumulate", "fits"),
    [(8, 2, 2, True), (8, 2, 4, True), (8, 3, 1, False), (8, 2, 3, False), (5, 1, 2, False)],
)
def test_the_batch_has_to_come_out_even(batch, processes, accumulate, fits):
    training = TrainingConfig(batch_size=batch, accumulate=accumulate)
    if fits:
        return check(training, processes)
    with pytest.raises(ConfigError, match=f"multiple of {processes * accumulate}, which"):
        check(training, processes)


def test_half_precision_and_shared_out_weights_exclude_each_other():
    with pytest.raises(ConfigError, match=r"training.shard .* float16"):
        check(TrainingConfig(shard=True, precision="float16"), 2)


def test_a_batch_that_cannot_be_shared_is_refused_before_anything_is_written(tmp_path):
    write_yaml(tmp_path / "c.yaml", SMALL)
    arguments = ["--config", "c.yaml", "--out", "run", "--device", "cpu"]
    found = ended(
        start(2, "-m", "scoresde", "train", *arguments, "--set", "training.batch_size=9",
              folder=tmp_path)
    )  # fmt: skip
    assert [code for code, _, _ in found] == [1, 1]
    for _, _, err in found:  # without an agent every process speaks for itself
        assert err.splitlines()[-1].startswith("Error: training.batch_size 9 cannot be shared")
    assert not (tmp_path / "run").exists()


def test_an_error_of_one_process_ends_both(tmp_path):
    file = tmp_path / "work.py"
    file.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from launches import Trainer, job, train\n"
        "from scoresde.data import DataError\n"
        "from scoresde.world import joined\n"
        "def failing(self, *a, learn=Trainer.learn):\n"
        "    if self.step == 6 and self.world.rank == 1:\n"
        "        raise DataError('the disk of process 1 is gone')\n"
        "    return learn(self, *a)\n"
        "Trainer.learn = failing\n"
        "with joined('cpu') as world:\n"
        "    train(job(Path(sys.argv[1])), world)\n"
    )
    found = ended(start(2, file, tmp_path / "run"))
    assert all(code for code, _, _ in found)
    assert "the disk of process 1 is gone" in found[1][2]
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-000000004"]


LONG = ["--config", "c.yaml", "--out", "run", "--restartable"]


def steps(folder: Path) -> list[int]:
    return sorted(int(p.name[-9:]) for p in (folder / "run/checkpoints").glob("step-*"))


def events(folder: Path) -> list[tuple[str, int]]:
    file = folder / "run/logs/events.jsonl"
    return [(e["kind"], e["step"]) for e in map(json.loads, file.read_text().splitlines())]


def test_sigterm_saves_and_ends_all_and_the_run_goes_on(tmp_path):
    write_yaml(tmp_path / "c.yaml", SMALL)
    with Torchrun(tmp_path, *LONG, "--steps", 10**6, "--set", "training.keep=1") as launch:
        until(lambda: (tmp_path / "run/logs/train.jsonl").exists())
        launch.process.send_signal(signal.SIGTERM)
        launch.wait()
    (kind, stopped) = events(tmp_path)[-1]
    assert kind == "stop"
    assert steps(tmp_path) == [stopped]
    with Torchrun(tmp_path, *LONG, "--steps", stopped + 3) as launch:
        code, said = launch.wait()
    assert code == 0, said
    assert said.count(f"resumed at step {stopped}") == 1
    assert events(tmp_path)[-2:] == [("resume", stopped), ("end", stopped + 3)]
    assert (tmp_path / "run/report.json").exists()


def test_a_killed_process_is_started_again_by_torchrun(tmp_path):
    write_yaml(tmp_path / "c.yaml", SMALL)
    often = ["--steps", 120, "--set", "training.checkpoint_every=5"]
    with Torchrun(tmp_path, *LONG, *often, restarts=1) as launch:
        until(lambda: (tmp_path / "run/checkpoints").is_dir() and steps(tmp_path))
        os.kill(launch.workers()[1], signal.SIGKILL)
        code, said = launch.wait()
    assert code == 0, said
    kinds = [kind for kind, _ in events(tmp_path)]
    assert (kinds[0], kinds[-2:]) == ("start", ["resume", "end"])
    found, resumed = events(tmp_path)[-2:]
    assert found[1] % 5 == 0
    assert 0 < found[1] < resumed[1] == 120


class Holder(nn.Module):
    """Holds blocks, and has no forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2)]))
        self.plain = nn.SiLU()


def test_blocks_are_what_is_held_by_modules_without_a_forward():
    shared = nn.Linear(2, 2)
    net = nn.Sequential(
        nn.Linear(2, 2), nn.ModuleList([shared, Holder()]), nn.ModuleDict({"a": shared})
    )
    assert units(net) == [shared, net[1][1].block]
    assert units(nn.Linear(2, 2)) == []


def test_forced_norms_are_those_of_the_forward():
    from scoresde.nets.edm2 import MPLinear
    from scoresde.training.parallel import normalise

    torch.manual_seed(0)
    one, two = MPLinear(5, 3), MPLinear(5, 3)
    two.load_state_dict(one.state_dict())
    one(torch.randn(2, 5))
    normalise(nn.ModuleList([two]))
    assert torch.equal(one.weight, two.weight)
    assert torch.allclose(one.weight.square().mean(1), torch.ones(3), atol=1e-3)
