"""The memory of a processor, kept from step to step of a run.

The C library of GNU gives large blocks back to the system as soon as they are free, and a training
step frees all of its activations: the next one gets them again page by page, each page cleared. At
a batch of 128 that is up to 8 % of a step of the small U-Net.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # malloc.h
MIB = 2**20


@contextmanager
def kept_memory(device: torch.device) -> Iterator[None]:
    """Within it, memory that is freed stays with the process; after it, all goes back.

    For training on a CPU under glibc; elsewhere, and where the environment sets ``MALLOC_...``
    itself, nothing changes.

    Args:
        device: where the run trains.

    Source: mallopt(3), https://man7.org/linux/man-pages/man3/mallopt.3.html
    """
    library = None if device.type != "cpu" or _chosen() else _glibc()
    if library is None:
        yield
        return
    library.mallopt(MMAP_MAX, 0)
    library.mallopt(TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        # The values that glibc's own adaptation, which mallopt ends, arrives at in such a process.
        library.mallopt(MMAP_MAX, 65536)
        library.mallopt(MMAP_THRESHOLD, 32 * MIB)
        library.mallopt(TRIM_THRESHOLD, 64 * MIB)
        library.malloc_trim(0)


def _chosen() -> bool:
    """Whether the environment has a say already."""
    return any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in (
        os.environ.get("GLIBC_TUNABLES", "")
    )


def _glibc() -> Any:
    """The C library, if it is GNU's."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
