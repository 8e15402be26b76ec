"""A step of the optimizer that is skipped: by the network, the schedule or the scale of a loss."""

import math

import pytest
import torch

from scoresde.training import Trainer, prepare, state

QUICK = {
    "data": {"source": "digits", "limit": 64},
    "net": {"width": 8, "multipliers": [1, 2], "blocks": 1, "attention": [1]},
    "training": {"steps": 6, "batch_size": 8, "evaluations": 0, "weight_decay": 0.1},
}
LEARNED = {"weight": "likelihood", "times": "learned"}


def make(folder, objective=None, **training):
    config = {**QUICK, "training": {**QUICK["training"], **training}}
    config |= {"objective": objective} if objective else {}
    trainer = Trainer(prepare(config, folder, torch.device("cpu")), say=lambda line: None)
    trainer.job.model.train()
    return trainer


def snapshot(trainer):
    learner = trainer.learner
    found = {**learner.job.model.net.state_dict(), **state.moments(learner)}
    if learner.own is not None:
        found |= {f"own.{k}": v for k, v in learner.own.state_dict().items()}
    return {k: v.clone() for k, v in found.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("culprit", ["network", "schedule"])
def test_a_skipped_step_changes_nothing_and_counts(tmp_path, culprit, first):
    trainer = make(tmp_path, LEARNED, patience=3)
    learner = trainer.learner
    if not first:
        trainer.learn()
        trainer.learn()
    before = snapshot(trainer)
    if culprit == "network":
        name, parameter = list(learner.parameters.items())[-1]
    else:
        name, parameter = "objective.logits", learner.own.logits
    handle = parameter.register_hook(lambda g: g * math.nan)
    figures = trainer.learn()
    assert not figures.norm.isfinite()
    assert learner.graded[int(figures.bad)] == name
    after = snapshot(trainer)
    if first:  # the optimizer has made its state, and it is that of no step
        assert all(float(v.abs().sum()) == 0 for k, v in after.items() if k not in before)
        after = {k: v for k, v in after.items() if k in before}
    assert same(before, after)
    trainer.look()
    assert trainer.watch.skips.total == 1
    handle.remove()
    trainer.learn()
    assert not same(before, {k: v for k, v in snapshot(trainer).items() if k in before})


def test_a_scaled_loss_trains_as_it_is(tmp_path):
    plain, scaled = make(tmp_path / "plain"), make(tmp_path / "scaled")
    scaled.learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for _ in range(3):
        plain.learn()
        scaled.learn()
    assert same(snapshot(plain), snapshot(scaled))


def test_a_scale_that_overflows_skips_the_step_and_shrinks(tmp_path):
    trainer = make(tmp_path)
    trainer.learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    trainer.learn()
    before = snapshot(trainer)
    trainer.learner.scaler.update(2.0**127)
    list(trainer.learner.parameters.values())[-1].register_hook(lambda g: g * 2.0**20)
    figures = trainer.learn()
    assert not figures.norm.isfinite()
    assert same(before, snapshot(trainer))
    assert trainer.learner.scaler.get_scale() == 2.0**126
