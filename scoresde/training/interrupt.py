"""Ctrl-C that waits for the end of a step."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType


class Interruptible:
    """Block in which the first Ctrl-C only sets ``asked``; the second interrupts at once.

    A step must not stop half-way: the weights would be a step ahead of their average. Outside the
    main thread, where no handler can be set, and where SIGINT is ignored, nothing changes.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: object = None

    def __enter__(self) -> Interruptible:
        try:
            before = signal.getsignal(signal.SIGINT)
            if before is not signal.SIG_IGN:
                signal.signal(signal.SIGINT, self._handle)
                self._before = before
        except ValueError:
            self._before = None
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)  # type: ignore[arg-type]
