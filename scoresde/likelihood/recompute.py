r"""Steps that keep no graph: each is taken anew, with one, on the way back.

A likelihood's step holds products with the Jacobian of the score. Recorded with a graph of their
own they are second derivatives, for which fused attention has no kernel: on the way back attention
is computed by its plain formula. ``torch.utils.checkpoint`` would not do here, since each of those
products would have it take the step anew already on the way forth.

Source: Training Deep Nets with Sublinear Memory Cost (Chen et al., 2016),
https://arxiv.org/abs/1604.06174.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..model import evaluating
from .divergence import Field, exact, hutchinson
from .field import Divergence

Advance = Callable[[Sequence[Tensor], dict[str, Any]], tuple[Tensor, ...]]
"""``advance(state, cond)``: a step from a state to the next."""


@dataclass(frozen=True)
class Bearing:
    """What bears gradients besides the state.

    Args:
        score: the score.
        cond: its conditions.
        names: those of them that require gradients.
        params: the tensors that the score itself depends on.
    """

    score: Any
    cond: dict[str, Any]
    names: tuple[str, ...]
    params: tuple[Tensor, ...]

    @classmethod
    def of(cls, score: Any, x: Tensor, t: float, cond: dict[str, Any]) -> Bearing:
        """Found from the score; a plain callable is evaluated once, at ``x`` and ``t``."""
        names = tuple(k for k, v in cond.items() if isinstance(v, Tensor) and v.requires_grad)
        params = parameters(score)
        if not isinstance(score, nn.Module):
            still = {k: v.detach() if k in names else v for k, v in cond.items()}
            with torch.enable_grad(), evaluating(score):
                value = score(x.detach(), t, **still)
            known = {id(p) for p in params}
            params += tuple(p for p in leaves(value) if id(p) not in known)
        return cls(score, cond, names, params)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The conditions that require gradients, and the parameters."""
        return (*(self.cond[name] for name in self.names), *self.params)

    def fresh(self, tensors: Sequence[Tensor]) -> tuple[dict[str, Any], list[Tensor]]:
        """The conditions cut off from their graph, and the tensors to differentiate by."""
        count = len(self.names)
        cut = [t.detach().requires_grad_() for t in tensors[:count]]
        cond = {**self.cond, **dict(zip(self.names, cut, strict=True))}
        return cond, [*cut, *tensors[count:]]

    def step(
        self, advance: Advance, state: Sequence[Tensor], known: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """The next state, ``known`` already if given, with one node of a graph."""
        return _Step.apply(advance, self, known, len(state), *state, *self.tensors)

    @contextmanager
    def twice(self) -> Iterator[None]:
        """Evaluation mode, with a graph that can be differentiated twice."""
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(evaluating(self.score))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            yield


class _Step(torch.autograd.Function):
    """One step as one node of the graph, which holds what the step is given."""

    @staticmethod
    def forward(
        ctx: Any, advance: Advance, bearing: Bearing, known: Tensor | None, count: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        ctx.advance, ctx.bearing, ctx.count = advance, bearing, count
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        if known is not None:
            return (known,)
        with evaluating(bearing.score):
            return advance(tensors[:count], bearing.cond)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        count, bearing = ctx.count, ctx.bearing
        with bearing.twice():
            state = [t.detach().requires_grad_() for t in ctx.saved_tensors[:count]]
            cond, others = bearing.fresh(ctx.saved_tensors[count:])
            out = ctx.advance(state, cond)
            found = products(out, grads, [*state, *others], ctx.needs_input_grad[4:])
        return (None, None, None, None, *found)


def products(
    out: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    by: Sequence[Tensor],
    needed: Sequence[bool] | None = None,
) -> list[Tensor | None]:
    """``sum_o (d out_o/d by)^T grads_o`` for each of ``by``, None where not needed or zero."""
    pairs = [(o, g) for o, g in zip(out, grads, strict=True) if g is not None and o.requires_grad]
    wanted = [i for i in range(len(by)) if needed is None or needed[i]]
    found: list[Tensor | None] = [None] * len(by)
    if pairs and wanted:
        outs, given = zip(*pairs, strict=True)
        # The graph of a tensor that a plain callable derived from its own is shared by all steps.
        values = torch.autograd.grad(
            outs, [by[i] for i in wanted], given, allow_unused=True, retain_graph=True
        )
        for i, value in zip(wanted, values, strict=True):
            found[i] = value
    return found


def differentiable(probes: Tensor | None) -> Divergence:
    """The divergence, exact or by the probes ``(k, B, *shape)``, with a graph where one is made.

    Without, it is that of :mod:`~scoresde.likelihood.divergence`, number by number.
    """

    def estimate(field: Field, z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        here = probes
        if probes is not None and len(z) != probes.shape[1]:
            here = probes[:, rows]
        if not torch.is_grad_enabled():
            return exact(field, z) if here is None else hutchinson(field, z, here)
        z = z if z.requires_grad else z.detach().requires_grad_()
        value = field(z)
        if here is None:
            return value, _trace(value, z)
        estimates = []
        for probe in here:
            (product,) = torch.autograd.grad(value, z, probe, create_graph=True)
            estimates.append((product * probe).flatten(1).sum(1))
        return value, torch.stack(estimates, 1)

    return estimate


def _trace(value: Tensor, z: Tensor) -> Tensor:
    """``div value`` of shape ``(B, 1)``, with its graph; all rows at once where that works."""
    dims = z[0].numel()
    unit = torch.eye(dims, dtype=z.dtype, device=z.device)[:, None]
    directions = unit.expand(-1, len(z), -1).reshape(dims, *z.shape)
    try:
        (rows,) = torch.autograd.grad(
            value, z, directions, create_graph=True, is_grads_batched=True
        )
    except RuntimeError:  # an operation without a batching rule
        rows = torch.stack(
            [torch.autograd.grad(value, z, one, create_graph=True)[0] for one in directions]
        )
    return (rows.reshape(dims, len(z), dims) * unit).sum((0, 2))[:, None]


def parameters(score: Any) -> tuple[Tensor, ...]:
    """Parameters of a module, or of the one that a score keeps as its ``score``."""
    while not isinstance(score, nn.Module) and hasattr(score, "score"):
        score = score.score
    if not isinstance(score, nn.Module):
        return ()
    return tuple(p for p in score.parameters() if p.requires_grad)


def leaves(value: Tensor) -> tuple[Tensor, ...]:
    """The leaves that a tensor was computed from."""
    found, seen, waiting = [], set(), [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        waiting.extend(parent for parent, _ in node.next_functions)
    return tuple(found)
