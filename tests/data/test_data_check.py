"""What ``scoresde check`` says of data, held or read when needed."""

from types import SimpleNamespace

import pytest
from conftest import write_folder

from scoresde.cli.check import data_facts, reading_facts
from scoresde.data import DataConfig, Scaler, load, open_splits


def job(path, workers=None, **fields):
    train, held = open_splits(DataConfig(str(path), **fields))
    return SimpleNamespace(
        train=train, heldout=held, model=SimpleNamespace(scaler=Scaler.fit(load(str(path)))),
        left=SimpleNamespace(snr=1e-6, kl=1e-3),
        training=SimpleNamespace(batch_size=8, seed=0, workers=workers),
    )  # fmt: skip


def test_the_facts_are_those_of_the_set_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("scoresde.cli.check.SECONDS", 0.0)
    write_folder(tmp_path, 50)
    held, lazy = job(tmp_path), job(tmp_path, memory=0, workers=2)
    assert data_facts(held) == data_facts(lazy)
    assert data_facts(held)["items"] == "45 to train on, 5 held out"
    assert data_facts(held)["classes"] == 3
    facts = reading_facts(held)
    assert facts["held"] == "in memory"
    assert facts["loader"].endswith(" items/s, 0 workers")
    facts = reading_facts(lazy)
    assert facts["held"] == "read when needed"
    assert facts["loader"].endswith(" items/s, 2 workers")
    assert facts["notes"] == "none: the first 40 drawn can be read"
    assert float(facts["loader"].split()[0]) > 0


@pytest.mark.parametrize("memory", [0, 512])
def test_what_cannot_be_read_is_named(tmp_path, monkeypatch, memory):
    write_folder(tmp_path, 50)
    good = job(tmp_path, memory=0)
    name = good.train.items.where(int(good.train.index[0]))
    (tmp_path / name).write_bytes(b"")
    monkeypatch.setattr("scoresde.cli.check.FEW", 6)
    monkeypatch.setattr("scoresde.cli.check.SECONDS", 0.0)
    train, held = open_splits(DataConfig(str(tmp_path), memory=memory))
    now = SimpleNamespace(**{**vars(good), "train": train, "heldout": held})
    assert reading_facts(now)["notes"].startswith(f"{name}: cannot be read as a picture")
    assert reading_facts(now)["notes"].count("stands in") == 1
