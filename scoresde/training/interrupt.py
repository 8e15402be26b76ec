"""Ctrl-C and SIGTERM that wait for the end of a step."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

RESTART = 75
"""Exit code of a run that was asked to end before its time (EX_TEMPFAIL: try again)."""


class Terminated(Exception):  # noqa: N818 (what happened is no error)
    """The run was asked to end by SIGTERM, as a preempted machine asks, and has saved."""


class Interruptible:
    """Block in which the first Ctrl-C or SIGTERM only sets ``asked``; the second interrupts.

    A step must not stop half-way: the weights would be a step ahead of their average. Outside the
    main thread, where no handler can be set, and where a signal is ignored, nothing changes.
    """

    def __init__(self) -> None:
        self.asked: int = 0
        """The signal that came, 0 if none did."""
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interruptible:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                before = signal.getsignal(number)
                if before is not signal.SIG_IGN:
                    signal.signal(number, self._handle)
                    self._before[number] = before
            except ValueError:  # not the main thread
                break
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = number

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)  # type: ignore[arg-type]
