"""The checkpoints of a run: ``checkpoints/step-N``, whole or not there, verified when read.

A checkpoint is drafted beside its place, brought to the disk with the checksums of its files
(``SHA256SUMS``, which ``sha256sum -c`` reads), and moved there by one rename; only then are the
oldest removed. A kill, a full disk or a power cut at any instant leaves the ones before it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from .files import CheckpointError, sync, write_tensors, write_text, write_yaml

SUMS = "SHA256SUMS"


def step_folders(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, sound or not."""
    return sorted(p for p in (run / "checkpoints").glob("step-*") if p.is_dir())


def step_of(folder: Path) -> int:
    """The step of a checkpoint, by its name."""
    return int(folder.name.removeprefix("step-"))


def save_checkpoint(
    run: Path,
    step: int,
    parts: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Writes ``checkpoints/step-N`` whole or not at all, then drops all but the last ``keep``.

    Args:
        run: the run's folder.
        step: steps done.
        parts: tensors by the names of their files.
        state: everything else that the next step depends on, as YAML takes it.
        keep: checkpoints to keep.

    Raises:
        CheckpointError: if it cannot be written, as on a full disk; what was there stays.
    """
    draft = begin(run, step)
    try:
        for name, tensors in parts.items():
            write_tensors(draft / f"{name}.safetensors", tensors)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)  # a full disk gets its space back
        raise
    return finish(run, draft, state, keep)


def begin(run: Path, step: int) -> Path:
    """An empty draft of ``checkpoints/step-N`` to write files into."""
    checkpoints = run / "checkpoints"
    for stale in checkpoints.glob(".draft-*"):
        shutil.rmtree(stale, ignore_errors=True)
    draft = checkpoints / f".draft-{step:09d}"
    try:
        draft.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"cannot write {draft}: {error.strerror or error}") from error
    return draft


def finish(run: Path, draft: Path, state: Mapping[str, Any], keep: int) -> Path:
    """Gives a draft its state and its checksums, and puts it in its place."""
    target = draft.with_name(draft.name.replace(".draft-", "step-"))
    try:
        write_yaml(draft / "state.yaml", dict(state))
        names = sorted(p.relative_to(draft).as_posix() for p in draft.rglob("*") if p.is_file())
        write_text(draft / SUMS, "".join(f"{checksum(draft / n)}  {n}\n" for n in names))
        sync(draft)
        _exchange(draft, target)
        sync(draft.parent)
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    for old in step_folders(run)[:-keep]:
        with suppress(OSError):  # it is tried again after the next
            _remove(old)
    return target


def _exchange(draft: Path, target: Path) -> None:
    """Moves a draft to its place; a checkpoint of the same step that is there goes last."""
    before = draft.with_name(f".draft-{target.name}")
    shutil.rmtree(before, ignore_errors=True)
    if target.exists():
        os.replace(target, before)
    try:
        os.replace(draft, target)
    except BaseException:
        if before.exists():
            os.replace(before, target)
        raise
    shutil.rmtree(before, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Removes a checkpoint, which is none from the first instant on."""
    gone = folder.with_name(f".draft-{folder.name}")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def checksum(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(file, "rb") as handle:
        while chunk := handle.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def checksums(folder: Path) -> dict[str, str]:
    """What the files of a checkpoint were written with, by their names."""
    try:
        lines = (folder / SUMS).read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return {}
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def damage(folder: Path, only: Iterable[str] | None = None) -> str | None:
    """What is wrong with a checkpoint, None if all its files are as they were written.

    Args:
        folder: ``checkpoints/step-N``.
        only: names of the files that matter, by default all.
    """
    if not (folder / SUMS).is_file():
        # Of a version that wrote none, whose checkpoints were whole or absent too.
        return None if (folder / "state.yaml").is_file() else f"{SUMS} is not there"
    recorded = checksums(folder)
    for name in recorded if only is None else only:
        if not (folder / name).is_file():
            return f"{name} is not there"
        if recorded.get(name) != checksum(folder / name):
            return f"{name} is not as it was written (its checksum differs)"
    return None if "state.yaml" in recorded else f"{SUMS} is truncated"


def latest_checkpoint(
    run: Path, say: Callable[[str], object] = warnings.warn, only: Iterable[str] | None = None
) -> Path:
    """The newest sound checkpoint of a run; of each damaged one after it, ``say`` is told.

    Raises:
        CheckpointError: if there is none.
    """
    folders = step_folders(run)
    if not folders:
        raise CheckpointError(
            f"no model at {run}: it has neither model.safetensors nor checkpoints"
        )
    only = None if only is None else list(only)
    for left, folder in reversed(list(enumerate(folders))):
        wrong = damage(folder, only)
        if wrong is None:
            return folder
        if left:
            say(f"checkpoint {folder} is damaged: {wrong}; the one before it is used")
    raise CheckpointError(
        f"no checkpoint of {run} is sound; of the oldest, {folder.name}, {wrong}"
    )


def set_aside(run: Path, step: int) -> None:
    """Renames the checkpoints after ``step``, which a run that goes on from it makes again."""
    for folder in step_folders(run):
        if step_of(folder) > step:
            aside = folder.with_name(f"damaged-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)  # a rename needs a free name
            os.replace(folder, aside)
