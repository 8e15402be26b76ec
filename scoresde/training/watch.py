"""What a run tells: figures read back from the device, its logs, events and trackers."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data import Batch
from ..files import CheckpointError
from ..saved_steps import step_folders
from ..world import World
from .finite import Skips, TrainingError, first_bad, read
from .heldout import BINS
from .job import Job
from .learner import Figures
from .log import Log
from .track import Tracker, tracker

if TYPE_CHECKING:
    from .trainer import Trainer


class Watch:
    """Keeps what steps leave behind, and looks at many of them at once.

    Args:
        job: the run.
        world: the processes that train together; the first one writes.
        say: where messages go, one line each.
    """

    def __init__(self, job: Job, world: World, say: Callable[[str], object]) -> None:
        self.job = job
        self.world = world
        self.say = say if world.main else _silence
        self.log = Log(job.folder)
        self.tracker: Tracker | None = None
        self.skips = Skips(job.training.patience)
        self.pending: list[Figures] = []
        self.notes: list[str] = []
        self.waiting = 0.0
        self.row: dict[str, Any] = {}
        """The newest row of the log."""

    def keep(self, figures: Figures, batch: Batch, waited: float) -> None:
        """Takes what a step has left, and how long it has waited for its batch."""
        self.pending.append(figures)
        self.notes += batch.notes
        self.waiting += waited

    def look(self, run: Trainer, bar: Any = None) -> None:
        """Reads the last steps back and logs them: the one place that waits for the device.

        Raises:
            TrainingError: if too many steps in a row were not finite.
        """
        if not self.pending:
            return
        steps, self.pending = read(self.pending), []
        notes, self.notes = self.notes, []
        finite = [bool(f.norm.isfinite()) for f in steps]
        stopping = self.skips.look(finite)
        bad = next((i for i, fine in enumerate(finite) if not fine), None)
        found = None if bad is None else first_bad(steps[bad], run.learner.graded)
        everyone = self.world.gather((self._sums(steps), notes, found))
        text = None
        if everyone is not None:
            told = [("data", note) for _, notes, _ in everyone for note in dict.fromkeys(notes)]
            if bad is not None:  # of all, and it may have begun in another process
                text = min(found for _, _, found in everyone if found).text
                text = f"step {run.step - len(steps) + bad} is not finite and skipped: {text}"
                told.append(("skip", text))
            for kind, said in told:
                self.event(run.step, kind, said)
                self.say(said)
            self._log(run, [sums for sums, _, _ in everyone], steps, bar)
        if stopping:
            there = bool(step_folders(self.job.folder))
            kept = "The last checkpoint is kept" if there else "There is no checkpoint yet"
            raise TrainingError(
                f"stopped: {self.skips.patience} steps in a row were not finite, up to step "
                f"{run.step - 1}: {text or 'see logs/events.jsonl'}. {kept}. "
                f"Try a smaller training.lr (now {self.job.training.lr})"
            )

    def _sums(self, steps: list[Figures]) -> Tensor:
        """Sums and numbers of the finite losses by noise level, ``(2, BINS)``, of this process."""
        sde = self.job.model.sde
        loss = torch.cat([f.loss for f in steps]).double()
        start, end = (float(sde.log_snr(t)) for t in (sde.t_min, sde.t_max))
        place = (torch.cat([f.log_snr for f in steps]) - start) / (end - start)
        place = (place * BINS).clamp(0, BINS - 1).long()  # clean items are at infinity
        fine = loss.isfinite()
        sums = torch.zeros(2, BINS, dtype=torch.float64)
        sums[0].index_add_(0, place[fine], loss[fine])
        sums[1].index_add_(0, place[fine], torch.ones_like(loss[fine]))
        return sums

    def _log(self, run: Trainer, everyone: list[Tensor], steps: list[Figures], bar: Any) -> None:
        total, count = torch.stack(everyone).sum(0)
        batch, before = self.job.training.batch_size, self.row
        norms = [float(f.norm) for f in steps if bool(f.norm.isfinite())]
        spent = max(run.seconds - before.get("seconds", 0.0), 1e-9)
        self.row = {
            "step": run.step,
            "seconds": round(run.seconds, 3),
            "progress": round(run.progress, 6),
            "loss": float(total.sum() / count.sum()),
            "gradient_norm": sum(norms) / len(norms) if norms else math.nan,
            "items_per_second": (run.step - before.get("step", 0)) * batch / spent,
            "lr": run.learner.optimizer.param_groups[0]["lr"],
            "items": run.step * batch,
            "batch": batch,
            "world": self.world.size,
            "waiting": round(self.waiting / spent, 4),
            "memory": _memory(self.job.device),
            "loss_by_time": [
                float(s / n) if n else None for s, n in zip(total, count, strict=True)
            ],
            "skipped": self.skips.total,
        }
        self.waiting = 0.0
        self.log.append("train", **self.row)
        if self.tracker is not None:
            self.tracker.scalars(run.step, _named("train", self.row))
        if bar is not None:
            bar.n = round(run.progress * 1000)
            bar.set_postfix_str(
                f"step {run.step}, loss {self.row['loss']:.4f}, "
                f"{self.row['items_per_second']:.0f} items/s"
            )

    def heldout(
        self, run: Trainer, found: dict[str, Any], picture: Tensor | None = None, more: str = ""
    ) -> None:
        """Logs what the averaged weights do on held-out items, and their samples.

        Args:
            run: the run.
            found: the row of the log, with the held-out ``loss``.
            picture: of samples, uint8 ``(C, H, W)``.
            more: what else is said of it.
        """
        self.log.append("heldout", step=run.step, seconds=round(run.seconds, 3), **found)
        if self.tracker is not None:
            self.tracker.scalars(run.step, _named("heldout", found))
            if picture is not None:
                self.tracker.picture(run.step, "samples", picture)
        self.say(
            f"step {run.step}, {run.progress:.0%}: "
            f"loss {self.row.get('loss', math.nan):.4f}, held out {found['loss']:.4f}{more}"
        )

    def event(self, step: int, kind: str, text: str) -> None:
        """Writes an event of the run to ``logs/events.jsonl``."""
        if self.world.main:
            self.log.append("events", step=step, kind=kind, text=text, time=time.time())

    @contextmanager
    def recording(self, run: Trainer) -> Iterator[None]:
        """Figures go to the tracker too, and an error that ends the run to its events."""
        job = self.job
        if self.world.main:
            self.tracker = tracker(job.training.track, job.folder, job.config, run.step, self.say)
        try:
            yield
        except Exception as error:
            with suppress(CheckpointError):  # a full disk has no room for it
                text = " ".join(str(error).split()) or type(error).__name__
                self.event(run.step, "error", text)
            raise
        finally:
            if self.tracker is not None:
                self.tracker.close()
                self.tracker = None


def _silence(text: str) -> None:
    """What the processes besides the first have to say."""


def _memory(device: torch.device) -> int | None:
    """Most bytes that the run has held: on its device, or of this process where it is known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _named(group: str, row: dict[str, Any]) -> dict[str, Any]:
    """A row of a log under names that trackers group; of a list, one for each entry."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        many = enumerate(value) if isinstance(value, list) else ()
        flat |= {f"{group}/{key}/{i}": v for i, v in many} or {f"{group}/{key}": value}
    return flat
