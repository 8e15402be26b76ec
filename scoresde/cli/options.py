"""Options that several commands share, and the little that reads them."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    import torch

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_MODEL = "zoo:mnist"


def device(command: F) -> F:
    """``--device``."""
    return click.option(
        "--device", "device_name", default="auto", show_default=True, metavar="DEVICE",
        help="auto, cpu, cuda, cuda:N or mps.",
    )(command)  # fmt: skip


def seed(command: F) -> F:
    """``--seed``."""
    return click.option(
        "--seed",
        type=click.IntRange(0, 2**63 - 1),
        default=None,
        help="Seed of everything random.",
    )(command)


def report(command: F) -> F:
    """``--json``."""
    return click.option(
        "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
        help="Write the figures to this file as JSON.",
    )(command)  # fmt: skip


def weights(command: F) -> F:
    """``--weights``."""
    return click.option(
        "--weights", default="ema", show_default=True, metavar="NAME",
        help="Weights of a run: ema, raw, or another average, as ema-length-0.05.",
    )(command)  # fmt: skip


def together(command: F) -> F:
    """Gives the command its ``world``: the processes of a launcher, or this one alone."""

    @functools.wraps(command)
    def inside(*args: Any, **given: Any) -> None:
        from ..world import joined

        with joined(given["device_name"]) as world:
            command(*args, world=world, **given)

    return inside  # type: ignore[return-value]


def settings(what: str) -> Callable[[F], F]:
    """``--set KEY=VALUE``, any number of times."""
    return click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help=what)


def pick_device(name: str) -> torch.device:
    """The device of that name, ``auto`` being the best there is; under a launcher the process's.

    Raises:
        ValueError: if it is no device, or is not there.
    """
    from ..devices import pick_device
    from ..world import launched

    place = launched()
    return pick_device(name, place.local_rank if place is not None and place.size > 1 else None)


def key_values(pairs: tuple[str, ...]) -> dict[str, Any]:
    """``("eta=0.5",)`` as ``{"eta": 0.5}``, values read as YAML."""
    import yaml

    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"--set {pair!r} is not of the form key=value")
        try:
            found[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {pair!r}: {value!r} is not valid YAML") from error
    return found


def grid(text: str | None) -> Any:
    """``--grid``: a name, ``logistic:width=2``, or the path of a file of tuned grids."""
    from . import specs

    return (
        text if text is None or text.endswith((".yaml", ".yml")) else specs.section(text, "grid")
    )


def solver(text: str, fields: tuple[str, ...]) -> dict[str, Any]:
    """``--solver`` and its ``--set``: a name, or ``ddim:eta=0.5`` as in bench."""
    from . import specs

    return {**specs.section(text, "solver"), **key_values(fields)}


def section(text: str | None, option: str) -> Any:
    """A name or a mapping, read as YAML; None for None."""
    import yaml

    try:
        return None if text is None else yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{option} {text!r} is neither a name nor a section") from error


def write_json(file: Path | None, content: dict[str, Any]) -> None:
    """Writes the figures whole or not at all, if a file was asked for."""
    if file is not None:
        from ..files import write_json

        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, content)


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """A path to write to, of the same suffix, which becomes ``file`` if the block succeeds."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.stem}.draft{file.suffix}")
    try:
        yield draft
        os.replace(draft, file)
    except OSError as error:
        raise ValueError(f"cannot write {file}: {error.strerror or error}") from error
    finally:
        draft.unlink(missing_ok=True)


def speak(line: str) -> None:
    """Prints a line, once in a launch; where the pipe's reader has gone, the work goes on."""
    from ..world import leads

    if not leads():
        return
    try:
        click.echo(line)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the rest of the process)


def on_screen() -> bool:
    """Whether to show progress: on a terminal, and by one process of a launch."""
    from ..world import leads

    return sys.stderr.isatty() and leads()


def check_drawn(file: Path) -> None:
    """Refuses a file that is neither a picture nor an array."""
    if file.suffix not in (".png", ".npy"):
        raise ValueError(f"cannot write {file}: accepted are .png and .npy")


def check_apart(*files: Path | None) -> None:
    """Refuses, before any work, one file for two things, or one that could not be written."""
    given = [file.absolute() for file in files if file is not None]
    for file in given:
        if given.count(file) > 1:
            raise ValueError(f"{file.name} cannot hold two things: give each a file of its own")
    for each in files:
        check_writable(each)


def check_writable(file: Path | None, is_folder: bool = False) -> None:
    """Refuses, before any work, a file, or a folder, that could not be written in the end."""
    if file is None:
        return
    if not is_folder and (not file.name or file.is_dir()):
        raise ValueError(f"cannot write {str(file)!r}: it is a folder, or no name")
    folder = file.parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(f"cannot write {file}: {folder} is not a folder")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"cannot write {file}: {folder} is not writable")


def processor(file: Path = Path("/proc/cpuinfo")) -> str:
    """The model of the processor; what Python says of it where Linux has no name for it."""
    import platform

    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next((name for name in names if name), platform.processor())


def versions(device: torch.device) -> dict[str, str | int]:
    """What a figure depends on besides its settings."""
    import platform

    import torch

    from .. import __version__

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "scoresde": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(device),
        "hardware": name or platform.machine(),
        "threads": torch.get_num_threads(),
    }
