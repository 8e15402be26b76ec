"""A run that was killed and goes on is the run that was not: all tensors, snapshots and rows."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from scoresde import files, saved_steps
from scoresde.training import Trainer, posthoc, prepare

PICTURES = {"name": "ncsnpp", "width": 8, "multipliers": [1, 2], "blocks": 1, "attention": [1]}
QUICK = {
    "data": {"source": "digits", "limit": 64},
    "net": {"width": 8, "multipliers": [1, 2], "blocks": 1, "attention": [1], "dropout": 0.1},
    "training": {
        "steps": 6, "batch_size": 8, "evaluations": 2, "warmup": 2, "ema": 0.9, "keep": 3,
        "checkpoint_every": 2, "track": "none", "workers": 0,
    },
    "sampling": {"count": 2, "steps": 2},
}  # fmt: skip
KINDS = {
    "plain": {},
    "learned": {
        "objective": {"weight": "likelihood", "times": "learned"},
        "training": {"accumulate": 2, "weight_decay": 0.1},
    },
    "averages": {
        "training": {
            "lengths": [0.1, 0.05], "half_lives": [20, 50], "snapshots": 3,
            "precision": "bfloat16",
        },
    },
    "due": {"training": {"lengths": [0.1], "snapshots": 3, "evaluations": 3}},
    "hybrid": {
        "objective": {"name": "hybrid"},
        "net": {**PICTURES, "name": "adm", "width": 32, "out_channels": 2},
    },
    "augmented": {"data": {"augment": "edm"}, "net": {**PICTURES, "augment": 9}},
    "labels": {"net": {"num_classes": 10}, "objective": {"drop": 0.3}},
    "stream": {"training": {"workers": 2}},
}  # fmt: skip
CLOCKS = {"seconds", "items_per_second", "waiting", "memory", "time"}


class Killed(BaseException):
    """Nothing is tidied up."""


def killed(*args, **kwargs):
    raise Killed


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    """Three shards of 30 pictures."""
    folder, random = tmp_path_factory.mktemp("stream"), np.random.default_rng(0)
    for shard in range(3):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for item in range(30):
                content = io.BytesIO()
                Image.fromarray(random.integers(0, 256, (8, 8), np.uint8)).save(content, "png")
                info = tarfile.TarInfo(f"{shard}{item:03d}.png")
                info.size = len(content.getvalue())
                tar.addfile(info, io.BytesIO(content.getvalue()))
    return folder


@pytest.fixture
def make(stream):
    def make(folder, kind):
        changes = KINDS[kind]
        config = {k: {**QUICK.get(k, {}), **changes.get(k, {})} for k in {*QUICK, *changes}}
        if "name" in changes.get("net", {}):
            config["net"] = changes["net"]
        if kind == "stream":
            config["data"] = {"source": str(stream)}
        return Trainer(prepare(config, folder, torch.device("cpu")), say=lambda line: None)

    return make


def left(run):
    """All that a run leaves: tensors by file and name, and rows without what a clock says."""
    places = [saved_steps.latest_checkpoint(run), *sorted(run.glob("snapshots/*"))]
    tensors = {
        f"{place.name}/{file.name}/{key}": value
        for place in places
        for file in place.glob("*.safetensors")
        for key, value in files.read_tensors(file).items()
    }
    rows = {
        name: [
            {k: v for k, v in json.loads(line).items() if k not in CLOCKS}
            for line in (run / f"logs/{name}.jsonl").read_text().splitlines()
        ]
        for name in ("train", "heldout")
    }
    return tensors, rows


def assert_same(run, other):
    (tensors, rows), (others, other_rows) = left(run), left(other)
    assert tensors.keys() == others.keys()
    assert [k for k, v in tensors.items() if not torch.equal(v, others[k])] == []
    assert rows == other_rows
    assert len(rows["heldout"]) in (2, 3)


def kill_at(trainer, step):
    learn = trainer.learner.learn
    trainer.learner.learn = lambda batch, n, rate: killed() if n == step else learn(batch, n, rate)
    with pytest.raises(Killed):
        trainer.run(show_progress=False)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "due"])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, make, kind):
    make(tmp_path / "whole", kind).run(show_progress=False)
    kill_at(make(tmp_path / "halves", kind), 5)
    for name, damaged, step in (("once", False, 4), ("further back", True, 2)):
        run = tmp_path / name
        shutil.copytree(tmp_path / "halves", run)
        if damaged:
            file = saved_steps.latest_checkpoint(run) / "optimizer.safetensors"
            file.write_bytes(file.read_bytes()[:-1])
        again = make(run, kind)
        again.resume()
        assert again.step == step
        again.run(show_progress=False)
        assert_same(tmp_path / "whole", run)


@pytest.mark.parametrize("what", ["evaluate", "snapshot", "save"])
@pytest.mark.parametrize("step", [4, 6])
def test_what_is_due_at_a_checkpoint_is_not_lost(tmp_path, make, monkeypatch, what, step):
    make(tmp_path / "whole", "due").run(show_progress=False)
    trainer = make(tmp_path / "halves", "due")
    with monkeypatch.context() as patch:
        owner = {"evaluate": (trainer, "evaluate"), "snapshot": (posthoc, "save_snapshot")}
        owner["save"] = (trainer, "save")
        place, name = owner[what]
        act = getattr(place, name)
        patch.setattr(
            place, name, lambda *a, **k: killed() if trainer.step == step else act(*a, **k)
        )
        with pytest.raises(Killed):
            trainer.run(show_progress=False)
    again = make(tmp_path / "halves", "due")
    again.resume()
    again.run(show_progress=False)
    assert_same(tmp_path / "whole", tmp_path / "halves")
