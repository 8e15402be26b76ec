"""Where the figures and pictures of a run go besides its logs: TensorBoard, or Weights & Biases.

No tracker stops a run: its first failure is said once, and the tracker is switched off. On
resuming at a step, what was tracked after it is superseded.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..config import ConfigError, unknown
from ..files import printable, write_text
from ..units import duration, size

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("auto", "tensorboard", "wandb", "none")
ID = "wandb-id"
"""The file of ``logs/`` that keeps the id of a run at Weights & Biases."""


class Sink(Protocol):
    """What a tracker writes to."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Takes named numbers."""

    def picture(self, step: int, name: str, pixels: Tensor) -> None:
        """Takes a picture ``(C, H, W)`` of uint8."""

    def close(self) -> None:
        """Writes out what is held back."""


class TensorBoard:
    """Event files in ``RUN/logs/``, for ``tensorboard --logdir RUN/logs``.

    Args:
        run: the run's folder.
        config: the run's configuration.
        step: steps done so far; later events of an earlier session are purged.
    """

    def __init__(self, run: Path, config: Mapping[str, Any], step: int = 0) -> None:
        import yaml
        from torch.utils.tensorboard import SummaryWriter

        folder = run / "logs"
        earlier = any(folder.glob("events.out.tfevents.*"))
        purge = step + 1 if earlier else None
        self._writer: Any = SummaryWriter(folder, purge_step=purge, flush_secs=30)  # type: ignore[no-untyped-call]
        if not earlier:
            text = yaml.safe_dump(dict(config), sort_keys=False)
            self._writer.add_text("config", f"```\n{text}```", step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a point to each curve."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, pixels: Tensor) -> None:
        """Adds a picture ``(C, H, W)`` of uint8."""
        self._writer.add_image(name, pixels, step)

    def close(self) -> None:
        """Writes the events that are still in memory."""
        self._writer.close()


class Wandb:
    """A run at Weights & Biases, one for each folder; ``WANDB_MODE=offline`` keeps it on disk.

    A run that has gone back to a checkpoint makes again what its rows have already said, step for
    step: rows up to where they reach are left out.

    Args:
        run: the run's folder; ``logs/wandb-id`` keeps the id by which it is resumed.
        config: the run's configuration.
    """

    def __init__(self, run: Path, config: Mapping[str, Any]) -> None:
        import wandb

        folder = run / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / ID
        if not file.is_file():
            write_text(file, secrets.token_hex(8) + "\n")
        self._image: Any = wandb.Image
        self._run: Any = wandb.init(
            project="scoresde", name=run.resolve().name, id=file.read_text().strip(),
            resume="allow", dir=str(folder), config=dict(config),
        )  # fmt: skip

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a row of figures."""
        if step >= self._run.step:
            self._run.log(dict(values), step=step)

    def picture(self, step: int, name: str, pixels: Tensor) -> None:
        """Adds a picture ``(C, H, W)`` of uint8."""
        if step >= self._run.step:
            self._run.log({name: self._image(pixels.permute(1, 2, 0).numpy())}, step=step)

    def close(self) -> None:
        """Says that the run has ended."""
        self._run.finish()


class Tracker:
    """Passes figures and pictures on, to a sink or to nothing, and survives its failures.

    Args:
        sink: where to; None for nowhere.
        say: where the one message about a failure goes.
    """

    def __init__(self, sink: Sink | None = None, say: Callable[[str], object] = print) -> None:
        self.sink = sink
        self._say = say

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Passes on those of the named values that are numbers; None and text are left out."""
        numbers = {
            name: float(v)
            for name, v in values.items()
            if isinstance(v, (int, float)) and not isinstance(v, bool)
        }
        self._pass(lambda sink: sink.scalars(step, numbers))

    def picture(self, step: int, name: str, pixels: Tensor) -> None:
        """Passes on a picture ``(C, H, W)`` of uint8, C of 1, 3 or 4."""
        self._pass(lambda sink: sink.picture(step, name, pixels.cpu()))

    def close(self) -> None:
        """Ends the tracking."""
        self._pass(lambda sink: sink.close())
        self.sink = None

    def _pass(self, action: Callable[[Sink], None]) -> None:
        if self.sink is None:
            return
        try:
            action(self.sink)
        except Exception as error:  # whatever it is, training matters more
            self.sink, failed = None, type(self.sink).__name__
            self._say(f"{failed} failed and is switched off, the logs go on: {_said(error)}")


def tracker(
    kind: str,
    run: Path,
    config: Mapping[str, Any],
    step: int = 0,
    say: Callable[[str], object] = print,
) -> Tracker:
    """The tracker of a run.

    Args:
        kind: ``auto`` (TensorBoard if it is installed), ``tensorboard``, ``wandb`` or ``none``.
        run: the run's folder.
        config: its configuration.
        step: steps done so far; what was tracked after them is superseded.
        say: where the one message about a failure goes.

    Raises:
        ConfigError: for another kind, or one that is asked for by name and is not installed.
    """
    check(kind)
    if kind == "none":
        return Tracker(None, say)
    name = "wandb" if kind == "wandb" else "tensorboard"
    try:
        _load(name)
    except ImportError:  # of auto, which had not been asked for by name
        return Tracker(None, say)
    except Exception as error:  # installed, and at odds with something else
        say(f"{name} does not work and is left out, the logs go on: {_said(error)}")
        return Tracker(None, say)
    try:
        sink: Sink = Wandb(run, config) if kind == "wandb" else TensorBoard(run, config, step)
    except Exception as error:  # no network, no key, no space
        say(f"{name} did not start and is left out, the logs go on: {_said(error)}")
        return Tracker(None, say)
    return Tracker(sink, say)


def check(kind: str) -> None:
    """Refuses, before a run leaves anything, a tracker that it could not have.

    Raises:
        ConfigError: for another kind, or one that is asked for by name and is not installed.
    """
    if kind not in KINDS:
        raise unknown("training.track", kind, KINDS)
    if kind in ("auto", "none"):
        return
    try:
        _load(kind)
    except ImportError as error:
        raise ConfigError(
            f"training.track is {kind}, which cannot be imported ({_said(error)}): "
            f"pip install 'scoresde[{kind}]', or choose auto or none"
        ) from error
    except Exception:  # installed, and at odds with something else: said when the run starts
        return


def _load(name: str) -> None:
    """Imports what a tracker needs."""
    if name == "wandb":
        import wandb

        if not hasattr(wandb, "init"):  # the folder that wandb itself leaves behind
            raise ImportError("what is here by that name is not the package")
    else:
        import torch.utils.tensorboard  # noqa: F401


def _said(error: Exception) -> str:
    """An error as one line."""
    return printable(" ".join(str(error).split())) or type(error).__name__


def line(row: Mapping[str, Any], progress: float) -> str:
    """Where a run stands, in one line, from its last row of ``logs/train.jsonl``.

    Args:
        row: the last row; what it lacks is left out.
        progress: share of the run that is done, in [0, 1].
    """
    parts = [f"step {row.get('step', 0)}", f"{progress:.0%}"]
    for key, form in (
        ("loss", "loss {:.4f}"),
        ("gradient_norm", "gradient {:.3g}"),
        ("items_per_second", "{:.0f} items/s"),
        ("waiting", "{:.0%} waiting for data"),
    ):
        value = row.get(key)
        if value is not None and math.isfinite(value):
            parts.append(form.format(value))
    if row.get("memory"):
        parts.append(size(row["memory"]))
    if row.get("skipped"):
        parts.append(f"{row['skipped']} steps skipped")
    if progress > 0:
        left = (row.get("seconds") or 0.0) * (1 - progress) / progress
        parts.append(f"about {duration(left)} left")
    return ", ".join(parts)
