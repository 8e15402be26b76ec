"""One step of training: from a batch to new weights, without waiting for the device.

A step that is not finite changes nothing: the fused optimizer is told so on the device and leaves
the weights and its moments as they are. What a step found out stays there too, until the trainer
looks at many steps at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..data import Batch, Share
from ..noise import NoiseSource, step_seed
from ..world import World
from .ema import averages
from .job import Job
from .parallel import averaged, check, local, normalise, replicated, sharded, summed, whole
from .step_noise import StepNoise

if TYPE_CHECKING:
    from .ema import EMA

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Figures(NamedTuple):
    """What one step leaves on the device."""

    loss: Tensor
    """Loss of each item, a dimension or whole, ``(b,)``."""
    log_snr: Tensor
    """Log-SNR that each item was trained at, ``(b,)``, on the CPU but for learned times."""
    sound: Tensor
    """Whether each item holds finite values alone, ``(b,)``."""
    norm: Tensor
    """Norm of the gradient before it is clipped, ``()``."""
    bad: Tensor
    """Index of the first parameter whose gradient is not finite, ``()``; else 0."""
    where: tuple[str, ...]
    """What the items are called."""


class Learner:
    """The model in training: its parallel form, its optimizer and its averages.

    Args:
        job: what to train.
        world: the processes that train it together.
    """

    def __init__(self, job: Job, world: World) -> None:
        training = job.training
        self.job = job
        self.world = world
        self.share = Share(
            training.batch_size, training.seed, world.rank, world.size, training.workers or 0
        )
        check(training, world.size)
        self.shared = training.shard and world.size > 1
        """Whether the processes share the weights out."""
        net = job.model.net.to("cpu") if self.shared else job.model.net
        self.averages: list[EMA] = averages(
            net, training.ema, training.half_lives, training.lengths
        )
        if self.shared:
            for each in (net, *(average.net for average in self.averages)):
                sharded(each, job.device)
        if training.compile:
            net.compile()
        self.net = net if self.shared or world.size == 1 else replicated(net, job.device)
        self.model = job.model.around(self.net, "raw")
        self.averaged = job.model.around(self.averages[0].net, "ema").eval()
        self.parameters = dict(net.named_parameters())
        self.graded: list[str] = []
        self.shares: Tensor | None = None
        """Of each gradient, whether this process has a share of it that it alone counts."""
        own = getattr(job.objective, "module", None)
        self.own: nn.Module | None = None if own is None else own.to(job.device)
        groups = [{"params": list(net.parameters())}]
        if self.own is not None:
            groups.append({"params": list(self.own.parameters())})
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=training.lr,
            betas=training.betas,
            weight_decay=training.weight_decay,
            fused=job.fused,
        )
        self.scaler = torch.amp.GradScaler(  # type: ignore[attr-defined]
            job.device.type, enabled=training.precision == "float16"
        )

    # -- one step ----------------------------------------------------------------------------

    def learn(self, batch: Batch, step: int, rate: float) -> Figures:
        """Takes the step with a batch: loss, gradient, optimizer, averages.

        Args:
            batch: this process's items of the global batch.
            step: number of the step, from 0.
            rate: learning rate.
        """
        training, size = self.job.training, len(batch.x)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        if self.shared:
            normalise(self.job.model.net)
        piece = size // training.accumulate
        found = []
        for start in range(0, size, piece):
            last = start + piece >= size
            with self.unsynchronised(not last):
                found.append(self._part(batch, slice(start, start + piece), step))
        loss, log_snr, sound = (torch.cat(parts) for parts in zip(*found, strict=True))
        norm, bad = self._descend()
        for average in self.averages:
            average.update(step + 1, training.batch_size)
        return Figures(loss, log_snr, sound, norm, bad, batch.where)

    def _part(self, batch: Batch, part: slice, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Adds the gradient of some of the items; their losses, log-SNRs and soundness."""
        job, training, sde = self.job, self.job.training, self.model.sde
        start = self.share.start + part.start
        noise = StepNoise(training.seed, step, start, training.batch_size, job.device)
        x0, cond = self.prepared(batch.x[part], None if batch.y is None else batch.y[part], noise)
        if job.augment is not None:
            x0, labels = job.augment(x0, noise)
            cond |= labels
        cond |= self.given(x0, noise)
        draw = getattr(job.objective, "instants", job.objective.times)
        t, correction = draw(sde, len(x0), noise)
        half = torch.autocast(
            job.device.type, HALF.get(training.precision), enabled=training.precision in HALF
        )
        with half, self.dropout_noise(step, part.start):
            losses = job.objective(self.model, x0, t=t, generator=noise, **cond)
        losses = correction.to(losses.device, losses.dtype, non_blocking=True) * losses
        losses = losses / job.dims
        self.scaler.scale(losses.mean() / training.accumulate).backward()
        sound = x0.flatten(1).isfinite().all(1)
        return losses.detach(), sde.log_snr(t).detach(), sound

    def prepared(
        self, items: Tensor, y: Tensor | None, noise: NoiseSource
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Items in model range on the device, and the condition that goes with them."""
        job, scaler = self.job, self.model.scaler
        assert scaler is not None
        cond: dict[str, Tensor] = {}
        if job.conditional:
            assert y is not None
            cond["y"] = y.to(job.device, non_blocking=True)
        items = items.to(job.device, non_blocking=True)
        return scaler.encode(items, generator=noise, dequantize=job.dequantize).float(), cond

    def given(self, x0: Tensor, noise: NoiseSource) -> dict[str, Tensor]:
        """The condition that the network is given of the items ``x0`` in model range, if any."""
        given = self.job.model.given
        return {} if given is None else {"image": given.draw(x0, noise)}

    def _descend(self) -> tuple[Tensor, Tensor]:
        """One step of the optimizer on the gradient there is: its norm, the first bad part."""
        training = self.job.training
        own = {} if self.own is None else dict(self.own.named_parameters(prefix="objective"))
        learned = {k: p.grad for k, p in own.items() if p.grad is not None}
        for gradient in learned.values():  # first of all, so that all processes find the same
            averaged(gradient, self.world.size)
        self.scaler.unscale_(self.optimizer)
        found = {k: p.grad for k, p in self.parameters.items() if p.grad is not None}
        self.graded, gradients = [*found, *learned], list(found.values())
        if self.shared:
            for gradient in whole(gradients):
                averaged(gradient, self.world.size)
        norms = torch.stack(torch._foreach_norm([local(g) for g in gradients]))
        if self.shared:
            if not self.world.main and whole(gradients):  # which count once
                if self.shares is None:  # made once: the device is waited for
                    self.shares = norms.new_tensor([hasattr(g, "to_local") for g in gradients])
                norms = torch.where(self.shares > 0, norms, 0.0)
            norms = summed(norms.square()).sqrt()
        norm = norms.norm()
        if training.clip:
            scale = (training.clip / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([local(g) for g in gradients], scale)
        if learned:  # what makes the step be skipped counts as such, but is not clipped
            more = torch.stack(torch._foreach_norm(list(learned.values()))).to(norms.dtype)
            norm = torch.where(more.isfinite().all(), norm, math.nan)
            norms = torch.cat([norms, more])
        broken = ~norm.isfinite()
        if self.job.fused:
            self.optimizer.grad_scale = None  # type: ignore[attr-defined]
            self.optimizer.found_inf = broken.float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif not bool(broken):
            self.optimizer.step()
        self.scaler.update()
        return norm, (~norms.isfinite()).int().argmax()

    def unsynchronised(self, yes: bool) -> AbstractContextManager[Any]:
        """Within it, gradients of a part of the batch stay in this process."""
        if yes and isinstance(self.net, nn.parallel.DistributedDataParallel):
            return self.net.no_sync()
        return nullcontext()

    @contextmanager
    def dropout_noise(self, step: int, start: int) -> Iterator[None]:
        """Dropout draws from torch's global generator: keyed by the step, and left as it was."""
        devices = [self.job.device] if self.job.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            key = step_seed(self.job.training.seed, step, stream=5)
            torch.manual_seed(step_seed(key, self.share.start + start, stream=6))
            yield
