"""The section of a configuration that says which data, and how it is prepared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from scoresde.data.dataset import DataError
from scoresde.data.scaler import MODES


@dataclass(frozen=True)
class DataConfig:
    """Which data, and how it is prepared.

    Args:
        source: "digits", "mnist-sample", a toy's name, a path, "hf:owner/name", or .tar files (a
            path, a folder of them, or a pattern such as "train-{000..127}.tar"), a stream.
        heldout: share of the items held out where the source has no test split, in (0, 1).
        size: pictures are centre-cropped and resized to `size x size`.
        scaler: mode of `Scaler.fit`.
        limit: at most so many items are read (of each split).
        samples: items drawn of a toy.
        seed: of the split and of the toys.
        memory: MiB that decoded items may take; a larger set is read when it is needed.
        unreadable: how many different items that cannot be read (damaged, cut short) are replaced
            by another before training ends; 0 ends it at the first.
        augment: what is done to the items of a step, the name of an augmentation or its section.
        dequantize: whether whole levels are trained on with noise within each, not at its middle;
            false where the likelihood is to add noise of its own.
        stream: whether "hf:owner/name" is read as a stream, without fetching it first.
        buffer: records of a stream that each reader holds and permutes at a time.
        classes: number of classes, where a stream has labels and does not say how many.

    Raises:
        DataError: a value outside its range.
    """

    source: str = "digits"
    heldout: float = 0.1
    size: int | None = None
    scaler: str = "auto"
    limit: int | None = None
    samples: int = 20000
    seed: int = 0
    memory: int = 512
    unreadable: int = 10
    augment: Any = None
    dequantize: bool = True
    stream: bool = False
    buffer: int = 1024
    classes: int | None = None

    def __post_init__(self) -> None:
        if not self.source:
            raise DataError("data.source is empty; name a set, a toy, a path or hf:owner/name")
        if not 0 < self.heldout < 1:
            raise DataError(f"data.heldout is {self.heldout}; it must lie between 0 and 1")
        if self.scaler not in MODES:
            raise DataError(
                f"data.scaler is {self.scaler!r}; it must be one of {', '.join(MODES)}"
            )
        for key in ("size", "limit", "samples", "buffer", "classes"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise DataError(f"data.{key} is {value}; it must be at least 1")
        for key in ("memory", "unreadable"):
            if getattr(self, key) < 0:
                raise DataError(f"data.{key} is {getattr(self, key)}; it must be at least 0")
