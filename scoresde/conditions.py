r"""Conditions that a network is given, and whether it uses them.

A network that silently ignores its condition samples as if there were none, and nobody sees it.
So the first time that a network is given a condition it is evaluated with it and with another
value, at a middle noise level: the outputs must differ. A network that has learned nothing yet may
hide a condition behind weights that start at zero; a copy with random weights then tells whether
there is any way from the condition to the output.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .model import evaluating, home
from .noise import KeyedNoise
from .sde.base import as_time, match

ROWS = 2
"""Samples that a network is asked about."""
_SEEN: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()
"""By score, the conditions that it was seen to use."""


def classes_of(score: Any) -> int | None:
    """How many classes a score's condition ``y`` has, where it says so, through what wraps it."""
    while score is not None:
        net = getattr(score, "net", None)
        # Many processes train a network within DDP's module.
        for holder in (score, net, getattr(net, "module", None)):
            classes = getattr(holder, "num_classes", None)
            if isinstance(classes, int):
                return classes
        score = None if isinstance(score, nn.Module) else getattr(score, "score", None)
    return None


def check_used(score: Any, cond: dict[str, Any], x: Tensor) -> None:
    """Refuses conditions that the networks of a score do not take, or do not depend on.

    Each network is evaluated twice for a condition, once in its life, on two samples at most;
    of closed forms nothing is asked.

    Args:
        score: any score; of one that wraps others, these are asked.
        cond: its conditions, of tensors one value a sample.
        x: a batch of states ``(B, *shape)``, of which only shape, dtype and device are used.

    Raises:
        ValueError: naming the condition.
    """
    for leaf, its in leaves(score, cond):
        if not isinstance(leaf, nn.Module):
            continue
        seen = _SEEN.setdefault(leaf, set())
        new = [name for name in its if name not in seen]
        for name in new:
            _check_taken(getattr(leaf, "net", leaf), name)
        seen.update(name for name in new if _uses(leaf, name, its, x))


def leaves(score: Any, cond: dict[str, Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The scores that a score is made of at last, and the conditions that each is given."""
    asks = getattr(score, "asks", None)
    if asks is None:
        yield score, cond
        return
    for part, its in asks(cond):
        yield from leaves(part, its)


def _uses(model: Any, name: str, cond: dict[str, Any], x: Tensor) -> bool:
    """Whether the output depends on a condition; False where the weights do not let it be told.

    Raises:
        ValueError: if nothing leads from the condition to the output.
    """
    x = x[:ROWS]
    cond = {k: _first(v, len(x)) for k, v in cond.items()}
    other = _other(cond[name], classes_of(model) if name == "y" else None)
    if other is None or (isinstance(other, Tensor) and torch.equal(other, cond[name])):
        return True
    changed = {**cond, name: other}
    if _differ(model, x, cond, changed):
        return True
    try:
        copied = copy.deepcopy(model)
    except RuntimeError:  # a network that holds what cannot be copied
        return False
    randomize(copied)
    if _differ(copied, x, cond, changed):
        return False
    net = getattr(model, "net", model)
    none = name == "y" and getattr(net, "num_classes", 0) is None
    raise ValueError(
        f"the condition {name!r} is given, but the output of the network {type(net).__name__} "
        f"does not depend on it{': it has no classes' if none else ''}"
    )


def _check_taken(net: nn.Module, name: str) -> None:
    """Refuses a condition that the signature of a network lacks."""
    parameters = inspect.signature(net.forward).parameters
    if name not in parameters and not any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
        taken = [p for p in list(parameters)[2:] if p != "augment"]
        raise ValueError(
            f"the network {type(net).__name__} takes no condition {name!r}; "
            f"it takes {', '.join(taken) or 'none'}"
        )


def _first(value: Any, count: int) -> Any:
    """A condition of the first samples; of one row that stands for all, as many."""
    if not isinstance(value, Tensor) or not value.ndim:
        return value
    return value.expand(count, *value.shape[1:]) if len(value) == 1 else value[:count]


def _other(value: Any, classes: int | None) -> Any:
    """Another value of a condition, None for what has no other."""
    if not isinstance(value, Tensor):
        return value + 1.0 if isinstance(value, float) else None
    if value.dtype == torch.bool:
        return ~value
    if value.is_floating_point():
        noise = KeyedNoise(0).normal((1, *value.shape), value.device, value.dtype)[0]
        return value + noise * value.std(correction=0).clamp_min(1.0)
    if value.ndim > 1:  # one-hot rows, say
        return value.roll(1, -1)
    if classes is not None and classes > 1:
        return (value + 1) % classes
    return torch.where(value == 0, 1, 0).to(value.dtype)


@torch.no_grad()
def _differ(model: Any, x: Tensor, a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether the output is another with other conditions, on noise at a middle noise level."""
    sde = model.sde
    if hasattr(sde, "log_snr"):
        ends = [float(sde.log_snr(t)) for t in (sde.t_min_sampling, sde.t_max)]
        t = sde.time(sum(ends) / 2).clamp(sde.t_min, sde.t_max)
        size = torch.hypot(sde.alpha(t), sde.sigma(t))
    else:
        t = as_time((sde.t_min + sde.t_max) / 2)
        size = torch.ones_like(t)
    device, _ = home(model)
    x = match(size, x) * KeyedNoise(0).normal(tuple(x.shape), device, x.dtype)
    with evaluating(model):
        return not torch.equal(model(x, t, **a), model(x, t, **b))


@torch.no_grad()
def randomize(module: nn.Module) -> None:
    """Random weights for every layer, of about the sizes that keep signals as large as they are.

    None is zero, so that whatever there is a way for has an effect.
    """
    for i, parameter in enumerate(module.parameters()):
        if not parameter.is_floating_point():
            continue
        shape = tuple(parameter.shape)
        noise = KeyedNoise(i).normal((1, *shape), parameter.device, torch.float32)[0]
        if len(shape) > 1:
            noise = noise / max(1, parameter[0].numel()) ** 0.5
        else:
            noise = 0.5 + 0.1 * noise
        parameter.copy_(noise)


__all__ = ["check_used", "classes_of"]
