"""What one evaluation of a model's network costs: multiply-adds, and memory of activations.

The network runs on tensors without values, which have shapes, types and lifetimes: a large one is
counted in about a second, on any machine, and nothing is computed. Multiply-adds are those of
convolutions and matrix products, attention's two included, whatever kernel computes them. The
memory is the largest sum of tensors that live at once, the item and the output among them, the
weights apart; kernels need workspace besides, and allocators round up.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from .model import ScoreModel


@dataclass(frozen=True)
class Cost:
    """Parameters, multiply-adds and bytes, the last four of one item; None if not countable.

    Attributes:
        parameters: their number.
        weight_bytes: of parameters and buffers.
        multiply_adds: of a forward pass.
        forward_bytes: peak of the activations of a forward pass without a graph.
        vjp_bytes: peak of those of a forward pass and a vector-Jacobian product with respect to
            the item, as likelihoods take it.
    """

    parameters: int
    weight_bytes: int
    multiply_adds: int | None = None
    forward_bytes: int | None = None
    vjp_bytes: int | None = None


def cost(model: ScoreModel) -> Cost:
    """The cost of a model's network for one item, counted without computing it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    net = model.net
    parameters = list(net.parameters())
    size = sum(v.nbytes for v in {*parameters, *net.buffers()})
    fixed = Cost(sum(p.numel() for p in parameters), size)
    shape = model.shape
    if shape is None or not parameters:
        return fixed
    first = parameters[0]
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            # A copy, since a network may keep what it computes.
            fakes = {id(v): fake.from_tensor(v) for v in (*parameters, *net.buffers())}
            copied = copy.deepcopy(net, dict(fakes)).eval()

            def evaluate(x: Tensor) -> Tensor:
                label = x.new_ones(1, dtype=torch.promote_types(x.dtype, torch.float32))
                return copied(x, label, **conditions(model, 1, x.device))

            def item() -> Tensor:
                return torch.zeros((1, *shape), device=first.device, dtype=first.dtype)

            # Fused attention on a processor is not among the operations that torch counts.
            counter = FlopCounterMode(display=False)
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
                evaluate(item())
            with torch.no_grad(), Live(fakes.values()) as forward:
                evaluate(item())
            with torch.enable_grad(), Live(fakes.values()) as both:
                x = item().requires_grad_()
                out = evaluate(x)
                torch.autograd.grad(out, x, torch.ones_like(out))
    except (RuntimeError, TypeError, ValueError):  # a network that asks for values
        return fixed
    flops = int(counter.get_total_flops())
    return Cost(fixed.parameters, size, flops // 2, forward.peak, both.peak)


def conditions(model: ScoreModel, count: int, device: torch.device) -> dict[str, Tensor]:
    """What the network has to be told besides, for ``count`` items: classes in turn, an image."""
    found = {}
    classes = getattr(model.net, "num_classes", None)
    if classes is not None:
        found["y"] = torch.arange(count, device=device) % classes
    if channels := getattr(model.net, "image_channels", 0):
        size = (count, channels, *(model.shape or ())[1:])
        found["image"] = torch.linspace(-1, 1, math.prod(size), device=device).reshape(size)
    if getattr(model.net, "low_res", False):
        found["low_res"] = torch.zeros((count, *(model.shape or ())), device=device)
    return found


class Live(TorchDispatchMode):
    """Sums the storages that live, and keeps the largest sum.

    Args:
        known: tensors that are not counted.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.known = {v.untyped_storage()._cdata for v in known}
        self.sizes: dict[int, int] = {}
        self.watched: dict[int, Any] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._add(value.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.known or key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.watched[key] = weakref.ref(storage, partial(self._drop, key))
        self.now += self.sizes[key]
        self.peak = max(self.peak, self.now)

    def _drop(self, key: int, _: Any) -> None:
        self.now -= self.sizes.pop(key, 0)
        self.watched.pop(key, None)
