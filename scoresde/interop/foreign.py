"""What a reader of a foreign format gives, and the original's settings beside a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import CheckpointError, printable
from ..model import ScoreModel


@dataclass
class Foreign:
    """A model read from a foreign format.

    Attributes:
        model: the model, with its weights, process, parameterization and scaler.
        source: the format's name, as "score_sde_pytorch".
        unmapped: what the file holds and the model does not, each with the reason.
    """

    model: ScoreModel
    source: str
    unmapped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.unmapped = tuple(map(printable, self.unmapped))


def settings(
    file: Path, names: Sequence[str], given: Mapping[str, Any] | str | Path | None
) -> dict[str, Any]:
    """The original's settings: as given, or from a JSON file of one of ``names`` beside ``file``.

    Args:
        file: the checkpoint.
        names: names of files that are looked for beside it, the first that exists is read.
        given: a mapping, or the path of a JSON file, which is read instead.

    Raises:
        CheckpointError: if there is no such file, or it is no JSON mapping.
    """
    if isinstance(given, Mapping):
        return dict(given)
    if given is not None:
        beside = Path(given)
    else:
        found = [file.parent / name for name in names if (file.parent / name).is_file()]
        if not found:
            raise CheckpointError(
                f"{file} does not say how its network is built: put {' or '.join(names)} beside "
                "it, or pass config= (--config FILE.json on the command line)"
            )
        beside = found[0]
    try:
        content = json.loads(beside.read_text())
    except OSError as error:
        raise CheckpointError(f"cannot read {beside}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(
            f"{beside} is not valid JSON: {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{beside} must hold a JSON mapping of settings")
    return content
