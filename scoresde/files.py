"""Files written whole or not at all: tensors as safetensors, the rest as YAML or JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or does not fit, said in one line.

    Names in a file may hold what a terminal obeys; here they are written out.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """The text with line ends, control characters and the like as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file, written beside its place and moved there once it is on the disk."""
    from safetensors.torch import save

    _write(file, save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}))


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: if the file is missing, truncated or no safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.exists():
        raise CheckpointError(f"no model at {file}: there is no such file")
    try:
        with open(file, "rb"):  # of a file that may not be read the package says it is not there
            pass
        return load_file(file)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{file} is truncated or damaged: {error}") from error


def write_yaml(file: Path, content: Any) -> None:
    """A YAML file, written beside its place and moved there once it is on the disk."""
    import yaml

    _write(file, yaml.safe_dump(content, sort_keys=False).encode())


def write_text(file: Path, content: str) -> None:
    """A text file, written beside its place and moved there once it is on the disk."""
    _write(file, content.encode())


def write_json(file: Path, content: Any) -> None:
    """A JSON file, written beside its place and moved there once it is on the disk."""
    _write(file, (json.dumps(finite(content), indent=2, allow_nan=False) + "\n").encode())


def finite(value: Any) -> Any:
    """The value with None for every number that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sync(folder: Path) -> None:
    """Brings the names in a folder to the disk, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _write(file: Path, content: bytes) -> None:
    draft = file.with_name(f".{file.name}.draft")
    try:
        with open(draft, "wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(draft, file)
    except OSError as error:
        raise CheckpointError(f"cannot write {file}: {error.strerror}") from error
    finally:
        draft.unlink(missing_ok=True)  # nothing is there once it has moved
