"""What a checkpoint holds of a run, and how a run is put back to it.

The weights, their averages, the optimizer, the scale of the loss, what an objective has learned,
the step, the clock, and where in the data every process stood. There is no state of a random
generator: all noise of a step is a function of the seed and the step.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import checkpoint, files, saved_steps
from ..config import read_yaml
from ..files import CheckpointError
from ..world import World
from .learner import Learner
from .parallel import local


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
    """Whether all weights and their averages are, which a checkpoint has to be: all must ask."""
    nets = [learner.job.model.net, *(average.net for average in learner.averages)]
    tensors = [local(t) for n in nets for t in n.state_dict().values() if t.is_floating_point()]
    norms = torch.stack([n.float() for n in torch._foreach_norm(tensors)])
    broken = not bool(norms.isfinite().all())
    return not learner.world.highest([broken])[0]


def save(learner: Learner, run: Path, step: int, about: Mapping[str, Any]) -> None:
    """Writes the checkpoint of a step: by the first process, or each its share of the weights.

    Raises:
        CheckpointError: if it cannot be written.
    """
    keep, world = learner.job.training.keep, learner.world
    if not learner.shared:
        if world.main:
            saved_steps.save_checkpoint(run, step, parts(learner), about, keep)
        return
    from . import storage

    draft = _by_first(world, lambda: saved_steps.begin(run, step))
    try:
        storage.save(parts(learner), draft, world.group)
    except BaseException:
        if world.main:
            shutil.rmtree(draft, ignore_errors=True)
        raise
    _by_first(world, lambda: saved_steps.finish(run, draft, about, keep))


def _by_first(world: World, act: Callable[[], Path]) -> Path:
    """What the first process finds out, or fails at, on all."""
    found: Path | CheckpointError | None = None
    if world.main:
        try:
            found = act()
        except CheckpointError as error:
            found = error
    found = world.broadcast(found)
    if isinstance(found, CheckpointError):
        raise found
    assert found is not None
    return found


def restore(learner: Learner, folder: Path) -> Mapping[str, Any]:
    """Puts a learner back to a checkpoint of any number of processes; returns the rest of it.

    Raises:
        CheckpointError: if it does not fit the model.
    """
    nets: dict[str, nn.Module] = {"raw": learner.job.model.net}
    nets |= {average.name: average.net for average in learner.averages}
    if learner.own is not None:
        nets["objective"] = learner.own
    if learner.shared:
        _restore_shares(learner, nets, folder)
    else:
        for name, net in nets.items():
            file = folder / f"{name}.safetensors"
            checkpoint.fit(net, files.read_tensors(file), file)
        restore_moments(learner, files.read_tensors(folder / "optimizer.safetensors"))
    state = read_yaml(folder / "state.yaml")
    if learner.scaler.is_enabled() and state.get("scaler"):
        learner.scaler.load_state_dict(state["scaler"])
    return state


def _restore_shares(learner: Learner, nets: Mapping[str, nn.Module], folder: Path) -> None:
    """Gives each process its rows of the weights and of the optimizer's state."""
    from . import storage

    found = {name: net.state_dict() for name, net in nets.items()}
    for name, tensors in found.items():
        file = folder / f"{name}.safetensors"
        shapes = {key: shape for key, (shape, _) in storage.stored(file).items()}
        checkpoint.compare({k: tuple(t.shape) for k, t in tensors.items()}, shapes, file)
    names, parameters = names_of(learner), in_order(learner)
    found["optimizer"] = {}
    for key, (shape, dtype) in storage.stored(folder / "optimizer.safetensors").items():
        like = parameters[names.index(key.rpartition("|")[0])].detach()
        value = torch.zeros_like(like) if shape else torch.zeros((), dtype=dtype)
        found["optimizer"][key] = value
    storage.load(found, folder, learner.world.group)
    for name, net in nets.items():
        net.load_state_dict(found[name])
    restore_moments(learner, found["optimizer"])


def in_order(learner: Learner) -> list[Tensor]:
    """The optimizer's parameters, in its order."""
    return [p for group in learner.optimizer.param_groups for p in group["params"]]


def restore_moments(learner: Learner, stored: Mapping[str, Tensor]) -> None:
    """Gives the optimizer the state that :func:`moments` has described."""
    names = names_of(learner)
    tensors = in_order(learner)
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in stored.items():
        parameter, _, name = key.rpartition("|")
        index = names.index(parameter)
        if value.ndim and not learner.shared:
            # As the parameter lies in memory: a fused optimizer walks both in that order.
            value = torch.empty_like(tensors[index], device="cpu").copy_(value)
        state.setdefault(index, {})[name] = value
    groups = learner.optimizer.state_dict()["param_groups"]
    learner.optimizer.load_state_dict({"state": state, "param_groups": groups})
