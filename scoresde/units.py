"""Durations and sizes in words."""

from __future__ import annotations

import math


def duration(seconds: float | None) -> str:
    """Seconds in the unit that suits them: ``95 s``, ``14 min``, ``3.2 h``, ``2.1 days``."""
    if seconds is None or not math.isfinite(seconds):
        return "an unknown time"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"


def size(count: float) -> str:
    """Bytes in the unit that suits them: ``0.5 KiB``, ``3.1 MiB``, ``12.0 GiB``."""
    for power, unit in ((3, "GiB"), (2, "MiB")):
        if count >= 1024**power:
            return f"{count / 1024**power:.1f} {unit}"
    return f"{count / 1024:.1f} KiB"
