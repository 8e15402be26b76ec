"""The training loop, top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import checkpoint, files, saved_steps
from ..config import read_yaml
from ..data import Dataset
from ..model import ScoreModel
from ..noise import step_seed
from .batches import Batches
from .ema import EMA
from .interrupt import Interruptible
from .job import Job
from .log import Log
from .settings import TrainingConfig

BINS = 8  # of log-SNR, for the held-out error
LOG_EVERY = 20


class TrainingError(RuntimeError):
    """A run that cannot go on, with the step and the reason."""


@dataclass(frozen=True)
class Budget:
    """When a run ends: whichever of its bounds comes first."""

    steps: float = math.inf
    seconds: float = math.inf

    @classmethod
    def of(cls, training: TrainingConfig, items: int) -> Budget:
        """The bounds of a configuration for a data set of so many items."""
        steps = training.steps or math.inf
        if training.epochs is not None:
            steps = min(steps, math.ceil(training.epochs * items / training.batch_size))
        return cls(steps, (training.minutes or math.inf) * 60)

    def progress(self, step: int, seconds: float) -> float:
        """Share of the run that is done, in [0, 1]."""
        return min(1.0, max(step / self.steps, seconds / self.seconds))


class Trainer:
    """A run in progress: the model, its average, the optimizer and where they stand.

    Args:
        job: what to train, on what, for how long.
        say: where messages go, one line each.
    """

    def __init__(self, job: Job, say: Callable[[str], None] = print) -> None:
        self.job = job
        self.say = say
        self.log = Log(job.folder)
        training = job.training
        self.model = job.model
        self.ema = EMA(self.model.net, training.ema)
        self.averaged = ScoreModel(
            self.ema.net,
            self.model.sde,
            self.model.parameterization,
            shape=self.model.shape,
            scaler=self.model.scaler,
            weights="ema",
        )
        self.optimizer = torch.optim.Adam(
            self.model.net.parameters(), lr=training.lr, fused=job.device.type != "mps"
        )
        self.batches = Batches(len(job.train), training.batch_size, training.seed)
        self.budget = Budget.of(training, len(job.train))
        self.step = 0
        self.seconds = 0.0
        self.last_loss = math.nan
        self.pending: list[tuple[Tensor, Tensor]] = []
        if training.compile:
            self.model.net.compile()

    # -- one step ----------------------------------------------------------------------------

    def batch(
        self, data: Dataset, index: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Items in model range, and the condition that goes with them."""
        assert self.model.scaler is not None
        items = data.x[index].to(self.job.device, non_blocking=True)
        cond: dict[str, Tensor] = {}
        if self.job.conditional:
            assert data.y is not None
            cond["y"] = data.y[index].to(self.job.device, non_blocking=True)
        return self.model.scaler.encode(items, generator=generator).float(), cond

    def generator(self, step: int, stream: int) -> torch.Generator:
        """The source of all noise of one step, the same however the run got there."""
        seed = step_seed(self.job.training.seed, step, stream)
        return torch.Generator(self.job.device).manual_seed(seed)

    def learn(self) -> tuple[Tensor, Tensor]:
        """One step of the optimizer: the loss a dimension, and the norm of the gradient."""
        training, progress = self.job.training, self.progress
        rate = min(1.0, (self.step + 1) / max(1, training.warmup))
        if training.decay == "cosine":
            rate *= (1 + math.cos(math.pi * progress)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = training.lr * rate

        generator = self.generator(self.step, stream=2)
        x0, cond = self.batch(self.job.train, self.batches.indices(self.step), generator)
        half = torch.autocast(
            self.job.device.type, torch.bfloat16, enabled=training.precision == "bfloat16"
        )
        with half, self.dropout_noise():
            loss = self.job.objective(self.model, x0, generator=generator, **cond)
        loss = loss.mean() / x0[0].numel()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.net.parameters(), training.clip or math.inf)
        self.optimizer.step()
        self.step += 1
        self.ema.update(self.step)
        return loss.detach(), norm.detach()

    @contextmanager
    def dropout_noise(self) -> Iterator[None]:
        """Dropout draws from torch's global generator: keyed by the step, and left as it was."""
        devices = [self.job.device] if self.job.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(step_seed(self.job.training.seed, self.step, stream=5))
            yield

    @property
    def progress(self) -> float:
        """Share of the run that is done, in [0, 1]."""
        return self.budget.progress(self.step, self.seconds)

    # -- the run -----------------------------------------------------------------------------

    def run(self, show_progress: bool = True) -> None:
        """Trains to the end of the budget, with checkpoints and evaluations on the way.

        Raises:
            TrainingError: at a non-finite loss; the last checkpoint before it stays.
            KeyboardInterrupt: at Ctrl-C, after the step has ended and has been saved.
        """
        from tqdm import tqdm

        training = self.job.training
        self.model.train()
        with (
            tqdm(total=1000, disable=not show_progress, bar_format=BAR, leave=False) as bar,
            Interruptible() as stop,
        ):
            self._loop(bar, stop)
        self.model.eval()
        self.save()
        if stop.asked:
            raise KeyboardInterrupt
        rate = self.step * training.batch_size / max(self.seconds, 1e-9)
        self.say(
            f"trained {self.step} steps, {self.step * training.batch_size} items "
            f"in {self.seconds:.0f} s ({rate:.0f} items/s)"
        )

    def _loop(self, bar: Any, stop: Interruptible) -> None:
        training = self.job.training
        marks = training.evaluations
        done_marks = math.floor(self.progress * marks)
        mark, spoken = time.perf_counter(), time.perf_counter()
        while self.progress < 1 and not stop.asked:
            self.pending.append(self.learn())
            now = time.perf_counter()
            self.seconds += now - mark
            if len(self.pending) == LOG_EVERY or self.step == 1:
                self._log(bar)
            if self.step % training.checkpoint_every == 0:
                self.save()
            if math.floor(self.progress * marks) > done_marks:
                done_marks = math.floor(self.progress * marks)
                self.evaluate()
            elif bar.disable and now - spoken > 60:
                self.say(self._line())
                spoken = now
            mark = time.perf_counter()  # what is not a step does not count as training time

    def _pending(self) -> tuple[float, float]:
        """Mean loss and gradient norm of the steps since the last look, which are finite.

        The only place that waits for a device.
        """
        loss, norm = torch.stack([torch.stack(pair) for pair in self.pending]).mean(0).tolist()
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise TrainingError(
                f"the loss or its gradient is not finite at step {self.step} "
                f"(loss {loss}, gradient norm {norm}); the last checkpoint is kept. "
                f"Try a smaller training.lr (now {self.job.training.lr})"
            )
        return loss, norm

    def _log(self, bar: Any) -> None:
        """Writes the mean of the last steps to the log."""
        loss, norm = self._pending()
        self.pending = []
        self.last_loss = loss
        rate = self.step * self.job.training.batch_size / max(self.seconds, 1e-9)
        self.log.append("train", **self.here, loss=loss, gradient_norm=norm, items_per_second=rate)
        bar.n = round(self.progress * 1000)
        bar.set_postfix_str(f"step {self.step}, loss {loss:.4f}, {rate:.0f} items/s")

    def _line(self) -> str:
        left = self.seconds / max(self.progress, 1e-9) * (1 - self.progress)
        return (
            f"step {self.step}, {self.progress:.0%}, loss {self.last_loss:.4f}, "
            f"{self.seconds:.0f} s gone, about {left:.0f} s left"
        )

    @property
    def here(self) -> dict[str, Any]:
        """Where the run stands, for a row of a log."""
        return {"step": self.step, "seconds": round(self.seconds, 3)}

    # -- looking at it -----------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self) -> None:
        """Held-out loss, error by noise level and a grid of samples, of the averaged weights.

        The noise is the same at every call, so that the figures compare.
        """
        from .report import save_samples

        loss, errors = self.heldout_loss(), self.heldout_errors()
        self.log.append("heldout", **self.here, loss=loss, eps_error_by_log_snr=errors)
        save_samples(self.averaged, self.job, f"step-{self.step:09d}")
        self.say(
            f"step {self.step}, {self.progress:.0%}: "
            f"loss {self.last_loss:.4f}, held out {loss:.4f}"
        )

    @torch.no_grad()
    def heldout_loss(self, limit: int = 512) -> float:
        """The objective on held-out items, a dimension, at the same times and noise each call."""
        heldout, generator, losses = self.job.heldout, self.generator(0, stream=4), []
        for part in torch.arange(min(limit, len(heldout))).split(self.job.training.batch_size):
            x0, cond = self.batch(heldout, part, generator)
            losses.append(self.job.objective(self.averaged, x0, generator=generator, **cond))
        return float(torch.cat(losses).mean()) / self.job.train.x[0].numel()

    @torch.no_grad()
    def heldout_errors(self, limit: int = 512) -> list[float]:
        """Mean of ``|eps_hat - eps|^2 / D`` in equal bins of log-SNR, from high to low."""
        sde, heldout = self.model.sde, self.job.heldout
        n = min(limit, len(heldout))
        generator = self.generator(0, stream=3)
        start, end = sde.log_snr(sde.t_min), sde.log_snr(sde.t_max)
        u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        times = sde.time(start + u * (end - start))
        order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
        errors = torch.empty(n, dtype=torch.float64)
        simple = type(self.job.objective)(weight="simple")
        for part in torch.arange(n).split(self.job.training.batch_size):
            x0, cond = self.batch(heldout, order[part], generator)
            loss = simple(self.averaged, x0, t=times[part], generator=generator, **cond)
            errors[part] = loss.cpu().double() / x0[0].numel()
        return [float(b.mean()) for b in errors.chunk(BINS)]

    # -- saving and resuming -----------------------------------------------------------------

    def save(self) -> Path:
        """Writes a checkpoint of everything that the next step depends on.

        Raises:
            TrainingError: if the last steps were not finite; nothing is written then.
        """
        if self.pending:
            self._pending()
        keys = [k for k, _ in self.model.net.named_parameters()]
        moments = {
            f"{keys[i]}|{name}": value
            for i, values in self.optimizer.state_dict()["state"].items()
            for name, value in values.items()
        }
        return saved_steps.save_checkpoint(
            self.job.folder,
            self.step,
            {"raw": self.model.net.state_dict(), "ema": self.ema.net.state_dict(),
             "optimizer": moments},
            {"step": self.step, "seconds": self.seconds,
             "items": self.step * self.job.training.batch_size},
            self.job.training.keep,
        )  # fmt: skip

    def resume(self) -> None:
        """Continues from the newest checkpoint of the run's folder.

        Raises:
            CheckpointError: if there is none, or it does not fit the model.
        """
        folder = saved_steps.latest_checkpoint(self.job.folder)
        for net, name in ((self.model.net, "raw"), (self.ema.net, "ema")):
            file = folder / f"{name}.safetensors"
            checkpoint.fit(net, files.read_tensors(file), file)
        moments = files.read_tensors(folder / "optimizer.safetensors")
        parameters = dict(self.model.net.named_parameters())
        keys = list(parameters)
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in moments.items():
            parameter, _, name = key.partition("|")
            if value.ndim:
                # As the parameter lies in memory: a fused optimizer walks both in that order.
                value = torch.empty_like(parameters[parameter], device="cpu").copy_(value)
            state.setdefault(keys.index(parameter), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        where = read_yaml(folder / "state.yaml")
        self.step, self.seconds = int(where["step"]), float(where["seconds"])
        self.log.rewind(self.step)


BAR = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}"
