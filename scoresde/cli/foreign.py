"""Models of this and of other projects on the command line, with settings given by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from . import options

if TYPE_CHECKING:
    from ..interop.foreign import Foreign

F = TypeVar("F", bound=Callable[..., Any])
OURS = "scoresde"


def settings(command: F) -> F:
    """``--config`` and ``--set``."""
    command = options.settings(
        "A setting of a foreign network, as in --set model.nf=128; laid over the file."
    )(command)
    return click.option(
        "--config", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.json",
        help="Settings of a foreign network, where none lie beside it.",
    )(command)  # fmt: skip


def opened(run: str, weights: str, config: Path | None, pairs: tuple[str, ...]) -> Foreign:
    """The model that ``run`` names, its format, and what of the file it lacks.

    Raises:
        ValueError: for settings that the format does not take, and as :func:`scoresde.load`.
    """
    from ..checkpoint import load, locate
    from ..interop import reading
    from ..interop.foreign import Foreign

    path = locate(run)
    given: Mapping[str, Any] | Path | None = config
    own = (path / "config.yaml").is_file()
    if config is not None or pairs:
        names = None if own else accepted(path)
        if names is None:
            raise ValueError(
                f"{run} says itself how its network is built: it takes neither --config nor --set"
            )
        if pairs:
            given = laid_over(stored(path, names, config), options.key_values(pairs))
    if own:
        return Foreign(load(path, weights=weights), OURS)
    found = reading.read(path, weights=weights, config=given)
    found.model.eval()
    return found


def accepted(path: Path) -> tuple[str, ...] | None:
    """Names of the files of settings that may lie beside a checkpoint; None if it takes none."""
    from ..interop import diffusers, guided_diffusion, reading, score_sde
    from ..interop.guided_flags import FILES

    if path.is_dir() and diffusers.claims(path):
        return ()  # the reader itself lays settings over those of the folder
    file = reading.checkpoint_in(path) if path.is_dir() else path
    content = reading.opened(file)
    if score_sde.claims(content):
        return score_sde.NAMES
    return FILES if guided_diffusion.claims(content) else None


def stored(path: Path, names: tuple[str, ...], config: Path | None) -> dict[str, Any]:
    """The settings of the file that is named, or that lies beside a checkpoint; else none."""
    from ..interop.foreign import settings

    home = path if path.is_dir() else path.parent
    if config is None and not any((home / name).is_file() for name in names):
        return {}
    return settings(home / "checkpoint", names, config)


def laid_over(base: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with values at dotted keys, in nested sections or where the dotted key stands."""
    for key, value in values.items():
        *sections, last = [key] if key in base else key.split(".")
        place = base
        for section in sections:
            inner = place.get(section, {})
            if not isinstance(inner, dict):
                raise ValueError(f"--set {key}: {section} is a value, not a section")
            place[section] = inner
            place = inner
        place[last] = value
    return base
