"""The training loop, top to bottom."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

from .. import saved_steps
from ..data import DataError
from ..files import CheckpointError
from ..model import ScoreModel
from ..world import World
from . import posthoc, state
from .finite import TrainingError
from .heldout import Heldout
from .interrupt import Interruptible, Terminated
from .job import Job
from .learner import Figures, Learner
from .memory import kept_memory
from .pace import Budget, Marks
from .track import line
from .watch import Watch


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
        self.learner = Learner(job, self.world)
        self.watch = Watch(job, self.world, say)
        self.budget = Budget.of(job.training, job.train.size)
        self.heldout: Any = self._heldout()
        self.step = 0
        self.seconds = 0.0
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

    def _heldout(self) -> Any:
        """What looks at the held-out items."""
        return Heldout(self.job, self.learner)

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
            closing(self),
            self.watch.recording(self),
            kept_memory(self.job.device),
            tqdm(total=1000, disable=not show_progress, bar_format=BAR, leave=False) as bar,
            Interruptible() as stop,
        ):
            self.watch.event(self.step, "resume" if self.step else "start", f"step {self.step}")
            try:
                asked = self._loop(bar, stop)
            except DataError:
                if self.world.size == 1:  # the others are in the middle of a step
                    self.save()
                raise
            self.save()
        self.job.model.eval()
        if asked:
            self.watch.event(
                self.step, "stop", f"{signal.Signals(asked).name} at step {self.step}: saved"
            )
            raise Terminated if asked == signal.SIGTERM else KeyboardInterrupt
        self.watch.event(self.step, "end", f"step {self.step}")
        items = self.step * self.job.training.batch_size
        self.watch.say(
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
            if len(self.watch.pending) >= training.log_every or self.step == 1:
                self.look(bar)
            # A checkpoint comes last: what is due at its step is not made again after it.
            if looks.passed(self.progress):
                self.evaluate()
            if snapshots.passed(self.progress):
                averages, write = self.learner.averages, self.world.main
                posthoc.save_snapshot(self.job.folder, self.step, averages, write=write)
            if self.step % training.checkpoint_every == 0:
                self.save()
            if bar.disable and now - spoken > 60 and self.watch.row:
                self.watch.say(line(self.watch.row, self.progress))
                spoken = now

    def learn(self) -> Figures:
        """One step on the next batch: what it left on the device."""
        if self._loader is None:
            self._loader = self.job.train.loader(self.learner.share, self.step, self.position)
        mark = time.perf_counter()
        batch = next(self._loader)
        waited = time.perf_counter() - mark
        figures = self.learner.learn(batch, self.step, self.rate)
        self.step += 1
        self.watch.keep(figures, batch, waited)
        return figures

    def close(self) -> None:
        """Ends the processes that read the data."""
        if self._loader is not None:
            self._loader.close()
            self._loader = None

    def look(self, bar: Any = None) -> None:
        """Reads the last steps back from the device, and logs them; see :meth:`Watch.look`."""
        self.watch.look(self, bar)

    def evaluate(self) -> None:
        """Held-out loss, error by noise level and a grid of samples, of the averaged weights."""
        from .report import save_samples

        self.look()
        if not self.world.main and not self.job.training.shard:
            return
        loss, errors = self.heldout.loss(), self.heldout.errors()
        name = f"step-{self.step:09d}"
        picture = save_samples(self.averaged, self.job, name, self.world.main)
        if picture is not None:
            found = {"loss": loss, "eps_error_by_log_snr": errors}
            self.watch.heldout(self, found, picture)

    # -- saving and resuming -----------------------------------------------------------------

    def save(self) -> None:
        """Writes a checkpoint of everything that the next step depends on.

        Raises:
            TrainingError: if the weights are not finite; nothing is written then.
            CheckpointError: if it cannot be written.
        """
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
            "skipped": self.watch.skips.total,
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
        self.watch.skips.total = int(found.get("skipped", 0))
        positions = found.get("data") or []
        if len(positions) == self.world.size:
            self.position = positions[self.world.rank]
        elif any(positions):
            self.position = positions[0]  # the data say what they make of it
        if self.world.main:
            saved_steps.set_aside(run, self.step)
            self.watch.log.rewind(self.step)
            posthoc.rewind(run, self.step)
            self.watch.row = next(iter(self.watch.log.rows("train")[-1:]), {})

    def _damaged(self, text: str) -> None:
        self.watch.say(f"Warning: {text}")


BAR = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}"
