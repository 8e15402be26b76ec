"""What the folders of a set say: its splits and the classes of its files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde.data.dataset import SPLITS, DataError


@dataclass(frozen=True)
class Tree:
    """The files of a split, by their paths below the root, sorted.

    Args:
        names: the paths, with "/".
        depth: at which of their folders the classes are.
        classes: the names of the folders there; empty where some file lies in none.
    """

    names: Sequence[str]
    depth: int
    classes: tuple[str, ...]

    def labels(self, names: Sequence[str]) -> Tensor | None:
        """The class of each file, `(len(names),)`, int64; None where there are no classes."""
        if not self.classes:
            return None
        number = {name: k for k, name in enumerate(self.classes)}
        return torch.tensor([number[name.split("/")[self.depth]] for name in names])


def splits_of(root: str, names: Sequence[str]) -> dict[str, Tree]:
    """The splits of files: those of the folders train, test, ..., else all are "train".

    Returns:
        nothing where there are no files.

    Raises:
        DataError: a file beside the folders of the splits.
    """
    tops = {name.split("/")[0] for name in names}
    if "train" in tops and len(tops & set(SPLITS)) > 1 and not tops <= set(SPLITS):
        raise DataError(
            f"{root}: {min(tops - set(SPLITS))} lies beside the splits "
            f"{', '.join(sorted(tops & set(SPLITS)))}; move it out or into one"
        )
    if not tops <= set(SPLITS):
        return {"train": Tree(names, 0, _classes(names, 0))}
    classes = _classes(names, 1)  # the same in every split
    members = {s: [n for n in names if n.startswith(s + "/")] for s in SPLITS if s in tops}
    return {split: Tree(members[split], 1, classes) for split in members}


def _classes(names: Sequence[str], depth: int) -> tuple[str, ...]:
    """The folders at `depth`, if every file lies in one."""
    if not all(name.count("/") > depth for name in names):
        return ()
    return tuple(sorted({name.split("/")[depth] for name in names}))


def wrapped(names: Sequence[str]) -> str:
    """The one folder, with its "/", that an archive puts around all of its files, or ""."""
    tops = {name.split("/")[0] for name in names}
    alone = len(tops) == 1 and not tops & set(SPLITS) and all("/" in name for name in names)
    return f"{tops.pop()}/" if alone else ""
