"""Gradients of log-likelihoods that are added to a score, within likelihoods' own gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def recording() -> Iterator[bool]:
    """Records a graph, whatever the caller does; yields whether the caller records one too."""
    kept = torch.is_grad_enabled()
    # Fused attention has no second derivative.
    plain = sdpa_kernel(SDPBackend.MATH) if kept else nullcontext()
    with torch.inference_mode(False), torch.enable_grad(), plain:
        yield kept


def leaf(x: Tensor, kept: bool) -> Tensor:
    """``x`` to differentiate with respect to, within the caller's graph if that is kept."""
    if kept and x.requires_grad:
        return x
    return recordable(x).detach().requires_grad_()


def recordable(value: Any) -> Any:
    """A tensor made under inference_mode as one that a graph may save; others as they are."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def gradient(log_prob: Tensor, x: Tensor, kept: bool, what: str) -> Tensor:
    """Gradient of ``log_prob (B,)`` with respect to ``x (B, *shape)``.

    Args:
        log_prob: one number a sample.
        x: what it was computed from.
        kept: whether the caller differentiates the gradient again.
        what: gave it, for messages.

    Raises:
        ValueError: if it is not ``(B,)``, or does not depend on ``x``.
    """
    if tuple(log_prob.shape) != (len(x),):
        raise ValueError(
            f"the {what} gave shape {tuple(log_prob.shape)} for {len(x)} samples: "
            "it must give one log-probability a sample, (B,)"
        )
    if not log_prob.requires_grad:
        raise ValueError(
            f"the {what} is not differentiable in its first argument: "
            "remove the no_grad, detach or NumPy call inside it"
        )
    # Each sample's log-probability depends on that sample alone: the sum has all gradients.
    (found,) = torch.autograd.grad(log_prob.sum(), x, create_graph=kept)
    return found if kept else found.detach()
