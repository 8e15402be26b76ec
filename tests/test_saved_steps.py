"""Checkpoints of a run at any instant: whole or not there, whatever ends the process."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from scoresde import saved_steps
from scoresde.files import CheckpointError, read_tensors
from scoresde.saved_steps import latest_checkpoint, save_checkpoint, set_aside, step_folders


class Killed(BaseException):
    """The process is gone: nothing that would tidy up after it may count."""


def save(run, step, value, keep=2):
    tensors = {"raw": {"w": torch.full((3,), float(value))}}
    return save_checkpoint(run, step, tensors, {"step": step}, keep)


def value(run):
    return float(read_tensors(latest_checkpoint(run) / "raw.safetensors")["w"][0])


def damage(folder):
    file = folder / "raw.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")


def calls(monkeypatch, limit):
    """Counts renames and removals; the one of number ``limit``, and all after it, never happen."""
    seen = []

    def watched(act):
        def changed(*args, **kwargs):
            seen.append(act.__name__)
            if limit and len(seen) == limit and act.__name__ == "rmtree":  # in the middle of it
                for file in Path(args[0]).glob("*S*"):
                    file.unlink()
            if limit and len(seen) >= limit:
                raise Killed
            return act(*args, **kwargs)

        return changed

    monkeypatch.setattr(os, "replace", watched(os.replace))
    monkeypatch.setattr(shutil, "rmtree", watched(shutil.rmtree))
    return seen


def save_three(run, keep):
    for step in (1, 2, 3):
        save(run, step, step, keep)


@pytest.mark.parametrize("keep", [1, 2])
def test_a_kill_at_any_instant_leaves_a_sound_newest_checkpoint(tmp_path, monkeypatch, keep):
    with monkeypatch.context() as patch:
        seen = calls(patch, 0)
        save_three(tmp_path / "whole", keep)
        count = len(seen)
    assert count > 6
    started = False
    for limit in range(1, count + 1):
        run = tmp_path / f"{limit}"
        with monkeypatch.context() as patch:
            calls(patch, limit)
            with pytest.raises(Killed):
                save_three(run, keep)
        assert all((f / saved_steps.SUMS).is_file() for f in step_folders(run))
        if not step_folders(run):
            assert not started
            continue
        started, found = True, value(run)
        assert saved_steps.step_of(latest_checkpoint(run)) == found
        save(run, int(found) + 1, found + 1, keep)  # and the run goes on from there
        assert value(run) == found + 1
        assert len(step_folders(run)) <= keep
        assert not list(run.glob("checkpoints/.draft-*"))
    assert started


def test_a_damaged_checkpoint_can_be_set_aside_again(tmp_path):
    save(tmp_path, 1, 1)
    for again in (2.0, 3.0):  # the same step is damaged, made again, and damaged again
        damage(save(tmp_path, 2, again))
        with pytest.warns(UserWarning, match="is damaged"):
            assert value(tmp_path) == 1
        set_aside(tmp_path, 1)
        assert [f.name for f in step_folders(tmp_path)] == ["step-000000001"]
    aside = tmp_path / "checkpoints" / "damaged-step-000000002"
    assert float(read_tensors(aside / "raw.safetensors")["w"][0]) == 3


def test_a_step_that_is_there_already_is_replaced(tmp_path):
    save(tmp_path, 1, 1)
    save(tmp_path, 1, 2)
    assert value(tmp_path) == 2
    assert os.listdir(tmp_path / "checkpoints") == ["step-000000001"]


def test_a_replacement_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    save(tmp_path, 1, 1)
    replace = os.replace

    def full(source, target):
        if os.path.basename(target).startswith("step-") and ".draft-0" in str(source):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save(tmp_path, 1, 2)
    assert value(tmp_path) == 1
