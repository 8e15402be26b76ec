"""Which format a path holds, and the model in it.

A folder of diffusers says what it is in its JSON; of a single file the first bytes tell the
container (an archive or stream of ``torch.save``, or a plain pickle) and its content the format.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import CheckpointError
from ..inert import read_persistent, read_torch
from . import diffusers, edm, guided_diffusion, score_sde
from .foreign import Foreign

SUFFIXES = (".pth", ".pt", ".pkl", ".bin", ".ckpt")
STREAM = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""How a file of ``torch.save`` before the archive begins: a pickle of its magic number."""


def read(
    path: Path, *, weights: str = "ema", config: Mapping[str, Any] | str | Path | None = None
) -> Foreign:
    """The model in a foreign file or folder, in evaluation mode.

    Args:
        path: a checkpoint, a folder of diffusers, or a folder that holds one checkpoint.
        weights: ``"ema"`` or ``"raw"``.
        config: the original's settings or a JSON file of them, where they do not lie beside it.

    Raises:
        CheckpointError: if the format is not known, or the file is damaged, does not fit its
            settings, or names code.
    """
    found = _found(path, weights, config)
    found.model.eval()
    return found


def _found(path: Path, weights: str, config: Mapping[str, Any] | str | Path | None) -> Foreign:
    if path.is_dir() and diffusers.claims(path):
        return diffusers.read(path, weights=weights, config=config)
    file = checkpoint_in(path) if path.is_dir() else path
    content = opened(file)
    for reader in (score_sde, edm, guided_diffusion):
        if reader.claims(content):
            return reader.read(content, file, weights=weights, config=config)
    raise CheckpointError(
        f"{file} holds {said(content)}, no model that is known; accepted: checkpoints of "
        "score_sde_pytorch, network pickles of EDM and EDM2, weights of guided-diffusion and "
        "improved-diffusion, folders of diffusers"
    )


def opened(file: Path) -> Any:
    """What a file holds, read without running any of it."""
    try:
        with open(file, "rb") as handle:
            head = handle.read(len(STREAM))
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    plain = head[:1] == b"\x80" and head != STREAM
    return read_persistent(file) if plain else read_torch(file)


def checkpoint_in(folder: Path) -> Path:
    """The one checkpoint in a folder."""
    found = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and p.is_file())
    if len(found) == 1:
        return found[0]
    if found:
        listed = ", ".join(p.name for p in found[:6])
        raise CheckpointError(f"{folder} holds several checkpoints: name one of {listed}")
    raise CheckpointError(
        f"no model at {folder}: the folder has no config.yaml and no foreign checkpoint"
    )


def said(content: Any) -> str:
    """A few words on what was found."""
    if isinstance(content, Mapping):
        return "a mapping with " + (", ".join(str(k) for k in list(content)[:4]) or "nothing")
    return f"a {type(content).__name__}"
