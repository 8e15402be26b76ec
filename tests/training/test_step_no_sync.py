"""A training step never waits for the device: it runs where values cannot be read.

Tensors on torch's ``meta`` device have no values: every ``.item()``, ``float()``, ``bool()``,
``.cpu()`` or boolean index, each of which an accelerator would be waited for, raises there. Only
what ``meta`` does not have is stood in for: generators, autocast and the fused optimizer.
"""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from scoresde.data import Batch
from scoresde.training import finite, learner, prepare
from scoresde.training.step_noise import StepNoise
from scoresde.world import World

META = torch.device("meta")
SMALL = {
    "data": {"source": "digits", "limit": 64},
    "net": {"width": 8, "multipliers": [1, 2], "blocks": 1, "attention": [1], "dropout": 0.1},
    "training": {"steps": 6, "batch_size": 8, "accumulate": 2, "evaluations": 0},
}
PICTURES = {"name": "ncsnpp", "width": 8, "multipliers": [1, 2], "blocks": 1, "attention": [1]}
GUIDED = {**PICTURES, "name": "adm", "width": 32}
KINDS = {
    "dsm": {},
    "clipless": {"training": {"clip": 0.0, "lengths": [0.1], "half_lives": [100]}},
    "labels": {"net": {"num_classes": 10}, "objective": {"drop": 0.2}},
    "min-snr": {"objective": {"weight": "min-snr", "times": "log-normal"}},
    "importance": {"objective": {"weight": "likelihood", "times": "importance"}},
    "velocity": {"objective": {"weight": "likelihood", "times": "velocity-importance"}},
    "learned": {"objective": {"weight": "likelihood", "times": "learned"}},
    "hybrid": {"objective": {"name": "hybrid"}, "net": {**GUIDED, "out_channels": 2}},
    "second-order": {"objective": {"name": "second-order"}},
    "ve": {"sde": {"name": "ve"}},
    "linear": {"sde": {"name": "linear"}},
    "edm-augmented": {"data": {"augment": "edm"}, "net": {**PICTURES, "augment": 9}},
    "flipped": {"data": {"augment": "flip"}},
}


class Valueless(StepNoise):
    """Noise that is on the device, and of which no number is known."""

    def __init__(self, seed, step, start, total, device):
        assert device == META
        super().__init__(seed, step, start, total, "cpu")

    @property
    def device(self):
        return META

    def _blocks(self, fill, shape, device, dtype):
        self.draw += 1
        assert torch.device(device or META) == META
        return torch.empty(shape, device=META, dtype=dtype)


class Fused(torch.optim.SGD):
    """Takes what the trainer tells a fused optimizer, which there is none of on ``meta``."""

    def __init__(self, groups, lr, betas, weight_decay, fused):
        assert fused
        super().__init__(groups, lr=lr)

    def step(self):
        assert self.grad_scale is None
        assert (self.found_inf.device, self.found_inf.shape) == (META, ())
        assert all(p.grad.device == META for group in self.param_groups for p in group["params"])


class Copies(TorchFunctionMode):
    """Refuses copies from the host that the host waits for."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        made = func in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)
        if made and found.device == META:
            raise AssertionError(f"{func} from numbers of the host")
        if func is torch.Tensor.to and args[0].device != found.device:
            assert (kwargs or {}).get("non_blocking"), "a copy that is waited for"
        return found


@pytest.fixture
def on_meta(monkeypatch):
    monkeypatch.setattr(learner, "StepNoise", Valueless)
    monkeypatch.setattr(torch.optim, "AdamW", Fused)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())


def begun(folder, kind):
    config = {k: {**SMALL.get(k, {}), **v} for k, v in {**SMALL, **KINDS[kind]}.items()}
    job = prepare(config, folder, torch.device("cpu"))
    job.model.to(META)
    return learner.Learner(replace(job, device=META), World())


def step(trained):
    data = trained.job.train
    return trained.learn(Batch(data.x[:8], data.y[:8], tuple("abcdefgh")), 0, 1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_never_waits(tmp_path, on_meta, kind):
    trained = begun(tmp_path, kind)
    step(trained)  # what the first one copies and keeps does not count
    with Copies():
        figures = step(trained)
    for value, shape in ((figures.loss, (8,)), (figures.sound, (8,)), (figures.norm, ())):
        assert (value.device, value.shape) == (META, shape)


def test_figures_are_read_back_whole(tmp_path, on_meta):
    # A learned schedule has its times on the device, and the trainer computes on the CPU.
    figures = step(begun(tmp_path, "learned"))
    assert figures.log_snr.device == META
    ready = figures._replace(**{k: torch.zeros(8) for k in ("loss", "sound")})
    ready = ready._replace(norm=torch.zeros(()), bad=torch.zeros(()))
    with pytest.raises(NotImplementedError, match="meta"):  # it has no values to give
        finite.read([ready])
