r"""Variational dequantisation: a conditional flow ``q(u | k)`` on the unit cube, learned.

    v = h(eps; k),    u = sigmoid(v),    eps logistic
    log q(u | k) = sum [l(eps) - l(v)] - log|det dh/d eps|,    l(v) = log sigmoid(v) sigmoid(-v)

``h`` is made of affine couplings ``v <- v exp(s) + m``, whose ``s`` and ``m`` see the levels and
the entries that the coupling keeps (the first keeps none); it starts as the identity. Since the
sigmoid of logistic noise is uniform, ``q`` starts as uniform dequantisation exactly.

The flow is trained on ``E[log q(u | k) - log p(x)]``, ``x = encode(k + u)``, of a frozen score
model, where the diffusion's variational bound stands for ``-log p``:

    -log p(x) <= KL(p(x_T | x) | prior) + 1/2 int g^2/sigma^2 E|eps_hat - eps|^2 dt + constant

Sources: Flow++ (Ho et al., 2019), https://arxiv.org/abs/1902.00275; Density estimation using Real
NVP (Dinh et al., 2017), https://arxiv.org/abs/1605.08803; Maximum Likelihood Training of
Score-Based Diffusion Models (Song et al., 2021), https://arxiv.org/abs/2101.09258.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, silu

from .. import checkpoint, files
from ..config import ConfigError, construct, describe, read_yaml
from ..model import Score, evaluating, home
from ..nets.unet import CONV, zeroed
from ..noise import KeyedNoise
from ..precision import widest
from ..sde.base import GaussianSDE, select

if TYPE_CHECKING:
    from ..data.scaler import Scaler
    from .dequantize import Dequantized

FILE = "dequantizer"
"""Name of the two files of a flow, ``.safetensors`` and ``.yaml``."""
FORMAT = 1
BOUND = 3.0
"""Largest ``|s|`` of a coupling, which keeps the first steps of training from running away."""
CLIP = 100.0
"""Largest norm of the gradient of a batch's mean, in nats."""


class Coupling(nn.Module):
    """``v <- v exp(s) + m`` where ``keep`` is 0; ``s, m`` are functions of the rest and of ``h``.

    Args:
        n: spatial axes, 0 for vectors.
        keep: 1 where an entry stays as it is, ``(1, C, *spatial)``.
        width: channels of the network, and of ``h``.
    """

    keep: Tensor

    def __init__(self, n: int, keep: Tensor, width: int) -> None:
        super().__init__()
        channels = keep.shape[1]
        self.register_buffer("keep", keep, persistent=False)
        self.first = _layer(n, channels + width, width)
        self.second = _layer(n, width, width)
        self.last = zeroed(_layer(n, width, 2 * channels))

    def forward(self, v: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """``v (B, *shape)`` and ``h (B, width, *spatial)`` to the new ``v`` and its ``s``."""
        s, m = self._shift(v, h)
        return v * s.exp() + m, s

    def inverse(self, v: Tensor, h: Tensor) -> Tensor:
        """The ``v`` that :meth:`forward` takes to this one."""
        s, m = self._shift(v, h)
        return (v - m) * (-s).exp()

    def _shift(self, v: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """``s`` and ``m``, 0 where entries are kept, which is all of ``v`` that they depend on."""
        seen = self.keep * (2 * torch.sigmoid(v) - 1)
        h = silu(self.first(torch.cat([seen, h], 1)))
        s, m = self.last(silu(self.second(h))).chunk(2, 1)
        free = 1 - self.keep
        return free * BOUND * torch.tanh(s / BOUND), free * m


@dataclass(eq=False, repr=False)
class DequantizingFlow(nn.Module):
    """The conditional flow ``u = sigmoid(h(eps; k))``; convolutions, or layers for vectors.

    Args:
        shape: of one item, ``(D,)`` or ``(C, *spatial)`` with 1 to 3 spatial axes.
        levels: number of levels, >= 2.
        width: channels of its networks.
        couplings: couplings that keep some entries, after the first, which keeps none.
    """

    shape: tuple[int, ...]
    levels: int
    width: int = 32
    couplings: int = 4

    def __post_init__(self) -> None:
        super().__init__()
        self.shape, n = tuple(self.shape), len(self.shape) - 1
        if n not in (0, *CONV) or self.levels < 2 or self.width < 1 or self.couplings < 0:
            raise ValueError(
                "a dequantizing flow needs items of shape (D,) or (C, *spatial) with 1 to 3 "
                f"spatial axes, levels >= 2, width >= 1 and couplings >= 0, got {self.shape}, "
                f"{self.levels}, {self.width}, {self.couplings}"
            )
        self.stem = _layer(n, 3 * self.shape[0], self.width)
        self.body = nn.ModuleList(_layer(n, self.width, self.width) for _ in range(2))
        masks = [
            torch.zeros(1, *self.shape),
            *(mask(self.shape, i) for i in range(self.couplings)),
        ]
        self.layers = nn.ModuleList(Coupling(n, keep, self.width) for keep in masks)

    def forward(self, eps: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Logistic noise ``(B, *shape)`` to ``u`` in (0, 1), ``(B, *shape)``, and ``log q(u|k)``.

        Args:
            eps: logistic noise, in the flow's dtype.
            k: whole levels, ``(B, *shape)``.
        """
        h, v = self.features(k), eps
        log_q = _log_logistic(eps)
        for layer in self.layers:
            v, s = layer(v, h)
            log_q = log_q - s
        log_q = log_q - _log_logistic(v)
        return torch.sigmoid(v), log_q.to(widest(v.device)).flatten(1).sum(1)

    def inverse(self, u: Tensor, k: Tensor) -> Tensor:
        """The logistic noise behind ``u`` in (0, 1), ``(B, *shape)``."""
        h, v = self.features(k), torch.logit(u)
        for layer in reversed(self.layers):
            assert isinstance(layer, Coupling)
            v = layer.inverse(v, h)
        return v

    def features(self, k: Tensor) -> Tensor:
        """What the couplings see of the levels, ``(B, width, *spatial)``.

        The two outermost levels, at which data are cut off, are told apart.
        """
        if tuple(k.shape[1:]) != self.shape:
            raise ValueError(
                f"k of shape {tuple(k.shape)} does not fit a dequantizer of (B, *{self.shape})"
            )
        weight = next(self.parameters())
        k = k.to(weight.device, weight.dtype)
        ends = [(k == end).to(weight.dtype) for end in (0, self.levels - 1)]
        h = self.stem(torch.cat([2 * k / (self.levels - 1) - 1, *ends], 1))
        for layer in self.body:
            h = h + layer(silu(h))
        return silu(h)


@dataclass(frozen=True)
class Variational:
    """The learned dequantisation in a folder, or the one that :func:`fit_dequantizer` made.

    Args:
        folder: what :meth:`save` wrote.

    Raises:
        CheckpointError: if the folder holds none, or it is damaged.
    """

    folder: str
    flow: DequantizingFlow = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "flow", _read(Path(self.folder)))

    @classmethod
    def of(cls, flow: DequantizingFlow) -> Variational:
        """The dequantisation by a flow at hand; its folder is empty."""
        made = object.__new__(cls)
        object.__setattr__(made, "folder", "")
        object.__setattr__(made, "flow", flow.eval())
        return made

    def draw(self, k: Tensor, scaler: Scaler, sde: GaussianSDE, source: KeyedNoise) -> Dequantized:
        """``x = encode(k + u)`` with ``u ~ q(u | k)``, ``log_q = log q(u|k) - log_det``."""
        from .dequantize import Dequantized, levels_of

        if levels_of(k, scaler) != self.flow.levels:
            raise ValueError(
                f"a dequantizer of {self.flow.levels} levels does not fit {scaler.levels} levels"
            )
        flow = self.flow.to(k.device)
        v = source.uniform(tuple(k.shape), k.device, widest(k.device)) + 2.0**-25  # in (0, 1)
        with torch.no_grad():
            u, log_q = flow((v.log() - torch.log1p(-v)).to(next(flow.parameters()).dtype), k)
        x = _encode(k, u, scaler)
        return Dequantized(x, log_q - scaler.log_det(tuple(k.shape[1:])), None)

    def save(self, folder: str | Path) -> None:
        """Writes ``dequantizer.safetensors`` and ``dequantizer.yaml`` into ``folder``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        section = {k: v for k, v in describe(self.flow).items() if k != "name"}
        files.write_tensors(folder / f"{FILE}.safetensors", self.flow.state_dict())
        files.write_yaml(folder / f"{FILE}.yaml", {"format": FORMAT, "flow": section})

    @classmethod
    def load(cls, folder: str | Path) -> Variational:
        """What :meth:`save` wrote into ``folder``."""
        return cls(str(folder))


def fit_dequantizer(
    score: Score,
    data: Tensor,
    *,
    scaler: Scaler | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    lr: float = 2e-3,
    batch: int = 64,
    seed: int = 0,
    width: int = 32,
    couplings: int = 4,
    progress: Callable[[float, float], object] | None = None,
    **cond: Any,
) -> Variational:
    """Trains a flow to dequantise ``data`` for a score, which stays as it is.

    Args:
        score: a score, differentiable in ``x``; its loss stands for the likelihood.
        data: whole levels, ``(N, *shape)``: training data, not what is to be evaluated.
        scaler: map to model range; by default ``score.scaler``.
        steps: length of the training; or ``minutes``, whichever ends first.
        minutes: wall-clock time.
        lr: learning rate at the start, which falls as a half cosine.
        batch: items a step.
        seed: of weights, batches and noise.
        width: of the flow's networks.
        couplings: of the flow.
        progress: called as ``progress(share done, nats of the step)``, whose constant is open.
        cond: passed to the score; of tensors, one value an item of ``data``.

    Raises:
        ValueError: no length, data that do not fit, or a loss that is not finite.
    """
    from ..data.batches import Batches
    from ..noise import step_seed
    from .dequantize import levels_of

    scaler = getattr(score, "scaler", None) if scaler is None else scaler
    if scaler is None:
        raise ValueError("fit_dequantizer needs a scaler: the score carries none")
    if (steps is None and minutes is None) or (steps or 1) < 1 or not (minutes or 1) > 0:
        raise ValueError(f"give steps >= 1 or minutes > 0, got steps={steps}, minutes={minutes}")
    levels = levels_of(data, scaler)
    device, _ = home(score)
    with torch.random.fork_rng([]):
        torch.manual_seed(step_seed(seed, 0, stream=6))
        flow = DequantizingFlow(tuple(data.shape[1:]), levels, width, couplings)
    flow.to(device)
    parameters = list(flow.parameters())
    optimizer = torch.optim.Adam(parameters, lr=lr)
    batches, started, step, done = Batches(len(data), batch, seed), time.perf_counter(), 0, 0.0
    with torch.inference_mode(False), torch.enable_grad(), evaluating(score):
        while done < 1:
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 + math.cos(math.pi * done)) / 2
            generator = torch.Generator(device).manual_seed(step_seed(seed, step, stream=7))
            rows = batches.indices(step)
            k = data[rows.to(data.device)].to(device)
            here = {n: v.to(device) if isinstance(v, Tensor) else v
                    for n, v in select(cond, rows).items()}  # fmt: skip
            loss = _loss(flow, score, k, scaler, generator, here).mean()
            # Of the flow's weights alone: the score's collect nothing.
            for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                p.grad = gradient
            norm = nn.utils.clip_grad_norm_(parameters, CLIP)
            if not bool(norm.isfinite()):
                raise ValueError(f"the dequantizer's loss is not finite at step {step}")
            optimizer.step()
            step += 1
            elapsed = (time.perf_counter() - started) / 60
            done = min(1.0, max(step / (steps or math.inf), elapsed / (minutes or math.inf)))
            if progress is not None:
                progress(done, float(loss.detach()))
    return Variational.of(flow)


def _loss(
    flow: DequantizingFlow,
    score: Score,
    k: Tensor,
    scaler: Scaler,
    generator: torch.Generator,
    cond: dict[str, Any],
) -> Tensor:
    """``log q(u | k)`` and the bound on ``-log p(encode(k + u))``, nats, ``(B,)``."""
    from ..training.objective import DSM

    v = torch.rand(k.shape, generator=generator, device=k.device) * (1 - 2.0**-23) + 2.0**-24
    u, log_q = flow(v.log() - torch.log1p(-v), k)
    x = _encode(k, u, scaler)
    sde = score.sde
    denoising = DSM("likelihood", "importance")(score, x, generator=generator, **cond)
    prior = (float(sde.alpha(sde.t_max)) / sde.prior_std * x).flatten(1).square().sum(1)
    return log_q + ((sde.t_max - sde.t_min) * denoising + prior) / 2


def mask(shape: tuple[int, ...], i: int) -> Tensor:
    """What the coupling ``i`` keeps, ``(1, *shape)``: checkerboards of cells of one, then two.

    Of a pair, the second keeps what the first changes. Channels count as an axis.
    """
    cell = 1 + i // 2 % 2
    axes = torch.meshgrid(*(torch.arange(n) // cell for n in shape), indexing="ij")
    return ((torch.stack(axes).sum(0) + i) % 2).to(torch.float32)[None]


def _layer(n: int, inside: int, outside: int) -> nn.Module:
    return CONV[n](inside, outside, 3, padding=1) if n else nn.Linear(inside, outside)


def _log_logistic(v: Tensor) -> Tensor:
    """Log-density of the logistic distribution, and log of the slope of the sigmoid."""
    return logsigmoid(v) + logsigmoid(-v)


def _encode(k: Tensor, u: Tensor, scaler: Scaler) -> Tensor:
    """``encode(k + u)``; the sigmoid may round to one, which is no level's."""
    return scaler.encode(k, noise=u.clamp(max=1 - 2.0**-24))


def _read(folder: Path) -> DequantizingFlow:
    file = folder / f"{FILE}.safetensors"
    if not file.exists():
        raise checkpoint.CheckpointError(f"no dequantizer at {folder}: there is no {file.name}")
    section = read_yaml(folder / f"{FILE}.yaml").get("flow")
    if not isinstance(section, dict):
        raise ConfigError(f"{folder / FILE}.yaml has no section 'flow'")
    flow = construct(DequantizingFlow, section, "flow")
    checkpoint.fit(flow, files.read_tensors(file), file)
    return flow.eval()
