"""The training loop, top to bottom."""

from __future__ import annotations

import math
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from .. import saved_steps
from ..data import DataError
from ..files import CheckpointError
from ..model import ScoreModel
from ..world import World
from . import posthoc, state
from .finite import Skips, TrainingError, first_bad, read
from .heldout import BINS, Heldout
from .interrupt import Interruptible, Terminated
from .job import Job
from .learner import Figures, Learner
from .log import Log
from .memory import kept_memory
from .settings import TrainingConfig
from .track import Tracker, line, tracker

LOG_EVERY = 20


@dataclass(frozen=True)
class Budget:
    """When a run ends: whichever of its bounds comes first."""

    steps: float = math.inf
    seconds: float = math.inf

    @classmethod
    def of(cls, training: TrainingConfig, items: int | None) -> Budget:
        """The bounds of a configuration for a data set of so many items, None if unknown."""
        steps = training.steps or math.inf
        if training.epochs is not None:
            if items is None:
                raise TrainingError("a stream has no epochs: bound the run by steps or minutes")
            steps = min(steps, math.ceil(training.epochs * items / training.batch_size))
        return cls(steps, (training.minutes or math.inf) * 60)

    def progress(self, step: int, seconds: float) -> float:
        """Share of the run that is done, in [0, 1]."""
        return min(1.0, max(step / self.steps, seconds / self.seconds))


class Marks:
    """Instants spread evenly over a run.

    Args:
        count: how many there are; the last is the end.
        progress: share of the run that is done already.
    """

    def __init__(self, count: int, progress: float) -> None:
        self.count = count
        self.done = math.floor(progress * count)

    def passed(self, progress: float) -> bool:
        """Whether one lies between the last look and ``progress``."""
        before, self.done = self.done, math.floor(progress * self.count)
        return self.done > before


class Trainer:
    """A run in progress: what learns, the data, the logs, and where they stand.

    Args:
        job: what to train, on what, for how long.
        say: where messages go, one line each.
        world: the processes that train together.
    """

    def __init__(
        self, job: Job, say: Callable[[str], object] = print, world: World | None = None
    ) -> None:
        self.job = job
        self.world = world or World()
        self.say = say if self.world.main else _silence
        self.learner = Learner(job, self.world)
        self.log = Log(job.folder)
        self.tracker: Tracker | None = None
        self.budget = Budget.of(job.training, job.train.size)
        self.skips = Skips(job.training.patience)
        self.heldout = Heldout(job, self.learner)
        self.step = 0
        self.seconds = 0.0
        self.pending: list[Figures] = []
        self.notes: list[str] = []
        self.waiting = 0.0
        self.row: dict[str, Any] = {}
        self.saved: int | None = None
        self.position: Any = None
        self._loader: Any = None

    @property
    def model(self) -> ScoreModel:
        """The model with the weights as they are."""
        return self.job.model

    @property
    def averaged(self) -> ScoreModel:
        """The model with its averaged weights."""
        return self.learner.averaged

    @property
    def progress(self) -> float:
        """Share of the run that is done, in [0, 1]."""
        return self.budget.progress(self.step, self.seconds)

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        training = self.job.training
        rate = training.lr * min(1.0, (self.step + 1) / max(1, training.warmup))
        if training.decay == "cosine":
            rate *= (1 + math.cos(math.pi * self.progress)) / 2
        return rate

    # -- the run -----------------------------------------------------------------------------

    def run(self, show_progress: bool = True) -> None:
        """Trains to the end of the budget, with checkpoints and evaluations on the way.

        Raises:
            TrainingError: after too many steps in a row that were not finite.
            DataError: for data that cannot be read; one process saves everything before, many
                end at once, and the last checkpoint stays.
            CheckpointError: if a checkpoint cannot be written; those before it stay.
            KeyboardInterrupt: at Ctrl-C, after the step has ended and has been saved.
            Terminated: at SIGTERM, likewise.
        """
        from tqdm import tqdm

        self.job.model.train()
        with (
            self.recorded(),
            self.tracking(),
            kept_memory(self.job.device),
            tqdm(total=1000, disable=not show_progress, bar_format=BAR, leave=False) as bar,
            Interruptible() as stop,
        ):
            self.event("resume" if self.step else "start", f"step {self.step}")
            try:
                asked = self._loop(bar, stop)
            except DataError:
                if self.world.size == 1:  # the others are in the middle of a step
                    self.save()
                raise
            self.save()
        self.job.model.eval()
        if asked:
            self.event("stop", f"{signal.Signals(asked).name} at step {self.step}: saved")
            raise Terminated if asked == signal.SIGTERM else KeyboardInterrupt
        self.event("end", f"step {self.step}")
        items = self.step * self.job.training.batch_size
        self.say(
            f"trained {self.step} steps, {items} items in {self.seconds:.0f} s "
            f"({items / max(self.seconds, 1e-9):.0f} items/s)"
        )

    def _loop(self, bar: Any, stop: Interruptible) -> int:
        training = self.job.training
        looks = Marks(training.evaluations, self.progress)
        snapshots = Marks(training.snapshots if training.lengths else 0, self.progress)
        spoken = time.perf_counter()
        while True:
            # All processes stop at the same step, and go by the slowest clock.
            asked, self.seconds = self.world.highest((stop.asked, self.seconds))
            if self.progress >= 1 or asked:
                return int(asked)
            mark = time.perf_counter()
            self.learn()
            now = time.perf_counter()
            self.seconds += now - mark  # what is not a step does not count as training time
            if len(self.pending) >= LOG_EVERY or self.step == 1:
                self.look(bar)
            if self.step % training.checkpoint_every == 0:
                self.save()
            if looks.passed(self.progress):
                self.evaluate()
            if snapshots.passed(self.progress):
                averages, write = self.learner.averages, self.world.main
                posthoc.save_snapshot(self.job.folder, self.step, averages, write=write)
            if bar.disable and now - spoken > 60 and self.row:
                self.say(line(self.row, self.progress))
                spoken = now

    def learn(self) -> Figures:
        """One step on the next batch: what it left on the device."""
        if self._loader is None:
            self._loader = self.job.train.loader(self.learner.share, self.step, self.position)
        mark = time.perf_counter()
        batch = next(self._loader)
        self.waiting += time.perf_counter() - mark
        self.notes += batch.notes
        figures = self.learner.learn(batch, self.step, self.rate)
        self.pending.append(figures)
        self.step += 1
        return figures

    # -- looking at it -----------------------------------------------------------------------

    def look(self, bar: Any = None) -> None:
        """Reads the last steps back and logs them: the one place that waits for the device.

        Raises:
            TrainingError: if too many steps in a row were not finite.
        """
        steps, self.pending = read(self.pending), []
        notes, self.notes = self.notes, []
        finite = [bool(f.norm.isfinite()) for f in steps]
        stopping = self.skips.look(finite)
        bad = next((i for i, fine in enumerate(finite) if not fine), None)
        text = None
        if bad is not None:
            text = first_bad(steps[bad], self.learner.graded)
            text = f"step {self.step - len(steps) + bad} is not finite and skipped: {text}"
        everyone = self.world.gather((self._sums(steps), notes, text))
        if everyone is not None:
            texts = [t for _, said, found in everyone for t in [*said, found] if t]
            for each in dict.fromkeys(texts):
                self.event("skip" if "is not finite and skipped" in each else "data", each)
                self.say(each)
            self._log([sums for sums, _, _ in everyone], steps, bar)
        if stopping:
            raise TrainingError(
                f"stopped: {self.skips.patience} steps in a row were not finite, up to step "
                f"{self.step - 1}: {text or 'see logs/events.jsonl'}. The last checkpoint is "
                f"kept. Try a smaller training.lr (now {self.job.training.lr})"
            )

    def _sums(self, steps: list[Figures]) -> torch.Tensor:
        """Sums and numbers of the finite losses by noise level, ``(2, BINS)``, of this process."""
        sde = self.job.model.sde
        loss = torch.cat([f.loss for f in steps]).double()
        start, end = (float(sde.log_snr(t)) for t in (sde.t_min, sde.t_max))
        place = (torch.cat([f.log_snr for f in steps]) - start) / (end - start)
        place = (place * BINS).long().clamp(0, BINS - 1)
        fine = loss.isfinite()
        sums = torch.zeros(2, BINS, dtype=torch.float64)
        sums[0].index_add_(0, place[fine], loss[fine])
        sums[1].index_add_(0, place[fine], torch.ones_like(loss[fine]))
        return sums

    def _log(self, everyone: list[torch.Tensor], steps: list[Figures], bar: Any) -> None:
        total, count = torch.stack(everyone).sum(0)
        training, before = self.job.training, self.row
        norms = [float(f.norm) for f in steps if bool(f.norm.isfinite())]
        spent = self.seconds - before.get("seconds", 0.0)
        items = self.step * training.batch_size
        self.row = {
            "step": self.step,
            "seconds": round(self.seconds, 3),
            "loss": float(total.sum() / count.sum()),
            "gradient_norm": sum(norms) / len(norms) if norms else math.nan,
            "items_per_second": (items - before.get("items", 0)) / max(spent, 1e-9),
            "lr": self.learner.optimizer.param_groups[0]["lr"],
            "items": items,
            "batch": training.batch_size,
            "world": self.world.size,
            "waiting": round(self.waiting / max(spent, 1e-9), 4),
            "memory": _memory(self.job.device),
            "loss_by_time": [
                float(s / n) if n else None for s, n in zip(total, count, strict=True)
            ],
            "skipped": self.skips.total,
        }
        self.waiting = 0.0
        self.log.append("train", **self.row)
        if self.tracker is not None:
            self.tracker.scalars(self.step, _named("train", self.row))
        if bar is not None:
            bar.n = round(self.progress * 1000)
            bar.set_postfix_str(
                f"step {self.step}, loss {self.row['loss']:.4f}, "
                f"{self.row['items_per_second']:.0f} items/s"
            )

    def evaluate(self) -> None:
        """Held-out loss, error by noise level and a grid of samples, of the averaged weights."""
        from .report import save_samples

        if self.pending:
            self.look()
        if not self.world.main and not self.job.training.shard:
            return
        loss, errors = self.heldout.loss(), self.heldout.errors()
        picture = save_samples(
            self.learner.averaged, self.job, f"step-{self.step:09d}", self.world.main
        )
        if not self.world.main:
            return
        row = {"step": self.step, "seconds": round(self.seconds, 3)}
        self.log.append("heldout", **row, loss=loss, eps_error_by_log_snr=errors)
        if self.tracker is not None:
            found = {"loss": loss, "eps_error_by_log_snr": errors}
            self.tracker.scalars(self.step, _named("heldout", found))
            assert picture is not None
            self.tracker.picture(self.step, "samples", picture)
        self.say(
            f"step {self.step}, {self.progress:.0%}: "
            f"loss {self.row.get('loss', math.nan):.4f}, held out {loss:.4f}"
        )

    def event(self, kind: str, text: str) -> None:
        """Writes an event of the run to ``logs/events.jsonl``."""
        if self.world.main:
            self.log.append("events", step=self.step, kind=kind, text=text, time=time.time())

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Writes an error that ends the run to its events, and closes the data."""
        try:
            yield
        except Exception as error:
            with suppress(CheckpointError):
                self.event("error", " ".join(str(error).split()) or type(error).__name__)
            raise
        finally:
            if self._loader is not None:
                self._loader.close()
                self._loader = None

    @contextmanager
    def tracking(self) -> Iterator[None]:
        """Figures and pictures go to the tracker besides the logs."""
        job = self.job
        if self.world.main:
            self.tracker = tracker(job.training.track, job.folder, job.config, self.step, self.say)
        try:
            yield
        finally:
            if self.tracker is not None:
                self.tracker.close()
                self.tracker = None

    # -- saving and resuming -----------------------------------------------------------------

    def save(self) -> None:
        """Writes a checkpoint of everything that the next step depends on.

        Raises:
            TrainingError: if the weights are not finite; nothing is written then.
            CheckpointError: if it cannot be written.
        """
        if self.pending:
            self.look()
        if self.saved == self.step:
            return
        if not state.finite(self.learner):
            raise TrainingError(
                f"the weights are not finite at step {self.step}: nothing is written, the last "
                "checkpoint stays"
            )
        if self._loader is not None:
            self.position = self._loader.state()
        about = {
            "step": self.step,
            "seconds": self.seconds,
            "items": self.step * self.job.training.batch_size,
            "world": self.world.size,
            "skipped": self.skips.total,
            "scaler": self.learner.scaler.state_dict(),
            "data": self.world.gather(self.position),
        }
        try:
            state.save(self.learner, self.job.folder, self.step, about)
        except CheckpointError as error:
            kept = saved_steps.step_folders(self.job.folder)
            intact = f"{kept[-1].name} is intact" if kept else "there is none before it"
            raise CheckpointError(f"{error}; {intact}") from error
        self.saved = self.step

    def resume(self) -> None:
        """Continues from the newest sound checkpoint of the run's folder.

        Raises:
            CheckpointError: if there is none, or it does not fit the model.
        """
        run = self.job.folder
        folder = saved_steps.latest_checkpoint(run, self._damaged) if self.world.main else None
        folder = self.world.broadcast(folder)
        assert folder is not None
        found = state.restore(self.learner, folder)
        self.step, self.seconds = int(found["step"]), float(found["seconds"])
        self.saved = self.step
        self.skips.total = int(found.get("skipped", 0))
        positions = found.get("data") or []
        if len(positions) == self.world.size:
            self.position = positions[self.world.rank]
        elif any(positions):
            self.position = positions[0]  # the data say what they make of it
        if self.world.main:
            saved_steps.set_aside(run, self.step)
            self.log.rewind(self.step)
            posthoc.rewind(run, self.step)
            self.row = next(iter(self.log.rows("train")[-1:]), {})

    def _damaged(self, text: str) -> None:
        self.say(f"Warning: {text}")


def _silence(text: str) -> None:
    """What the processes besides the first have to say."""


def _memory(device: torch.device) -> int:
    """Most bytes that the run has held: on its device, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _named(group: str, row: dict[str, Any]) -> dict[str, Any]:
    """A row of a log under names that trackers group; of a list, one for each entry."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        many = isinstance(value, list)
        flat |= (
            {f"{group}/{key}/{i}": v for i, v in enumerate(value)}
            if many
            else {f"{group}/{key}": value}
        )
    return flat


BAR = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}"
