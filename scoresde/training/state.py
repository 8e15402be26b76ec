"""What a checkpoint holds of a run, and how a run is put back to it.

The weights, their averages, the optimizer, the scale of the loss, what an objective has learned,
the step, the clock, and where in the data every process stood. There is no state of a random
generator: all noise of a step is a function of the seed and the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import checkpoint, files, saved_steps
from ..config import read_yaml
from .learner import Learner


def parts(learner: Learner) -> dict[str, dict[str, Tensor]]:
    """The tensors of a checkpoint by the names of their files."""
    found = {"raw": learner.job.model.net.state_dict()}
    for average in learner.averages:
        found[average.name] = average.net.state_dict()
    found["optimizer"] = moments(learner)
    if learner.own is not None:
        found["objective"] = learner.own.state_dict()
    return found


def moments(learner: Learner) -> dict[str, Tensor]:
    """The state of the optimizer, by parameter: ``PARAMETER|MOMENT``."""
    names = names_of(learner)
    return {
        f"{names[i]}|{name}": value
        for i, values in learner.optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }


def names_of(learner: Learner) -> list[str]:
    """What the optimizer's parameters are called, in its order."""
    own = (
        ()
        if learner.own is None
        else (f"objective:{k}" for k, _ in learner.own.named_parameters())
    )
    return [*learner.parameters, *own]


def finite(learner: Learner) -> bool:
    """Whether all weights and their averages are, which a checkpoint has to be."""
    nets = [learner.job.model.net, *(average.net for average in learner.averages)]
    tensors = [t for net in nets for t in net.state_dict().values() if t.is_floating_point()]
    return bool(torch.stack([n.float() for n in torch._foreach_norm(tensors)]).isfinite().all())


def save(learner: Learner, run: Path, step: int, about: Mapping[str, Any]) -> None:
    """Writes the checkpoint of a step: by the first process, as all hold the same.

    Raises:
        CheckpointError: if it cannot be written.
    """
    if learner.world.main:
        keep = learner.job.training.keep
        saved_steps.save_checkpoint(run, step, parts(learner), about, keep)


def restore(learner: Learner, folder: Path) -> Mapping[str, Any]:
    """Puts a learner back to a checkpoint; returns the rest of its state.

    Raises:
        CheckpointError: if it does not fit the model.
    """
    nets = {"raw": learner.job.model.net, **{a.name: a.net for a in learner.averages}}
    if learner.own is not None:
        nets["objective"] = learner.own
    for name, net in nets.items():
        file = folder / f"{name}.safetensors"
        checkpoint.fit(net, files.read_tensors(file), file)
    restore_moments(learner, files.read_tensors(folder / "optimizer.safetensors"))
    state = read_yaml(folder / "state.yaml")
    if learner.scaler.is_enabled() and state.get("scaler"):
        learner.scaler.load_state_dict(state["scaler"])
    return state


def restore_moments(learner: Learner, stored: Mapping[str, Tensor]) -> None:
    """Gives the optimizer the state that :func:`moments` has described."""
    names = names_of(learner)
    tensors = [p for group in learner.optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in stored.items():
        parameter, _, name = key.rpartition("|")
        index = names.index(parameter)
        if value.ndim:
            # As the parameter lies in memory: a fused optimizer walks both in that order.
            value = torch.empty_like(tensors[index], device="cpu").copy_(value)
        state.setdefault(index, {})[name] = value
    groups = learner.optimizer.state_dict()["param_groups"]
    learner.optimizer.load_state_dict({"state": state, "param_groups": groups})
