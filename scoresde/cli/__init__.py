"""The command line: one command a file, loaded when it is asked for.

Nothing here or at the top of a command's file imports torch, so that help is immediate.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
import warnings
from typing import NoReturn

import click

from ..world import first_to_fail, leads

COMMANDS = (
    "train", "train-classifier", "sample", "likelihood", "dequantize", "encode", "decode",
    "interpolate", "edit", "inpaint", "superres", "colorize", "solve", "bench", "tune", "ema",
    "convert", "info", "check",
)  # fmt: skip
SHARED = ("train", "train-classifier", "sample", "likelihood", "bench")
"""Commands whose work the processes of a launcher share; the others are rank 0's alone."""


class LazyGroup(click.Group):
    """A group whose commands live in modules of their own names, with ``_`` for ``-``."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands, in the order of the work."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """The attribute ``command`` of the module called ``name``."""
        if name not in COMMANDS:
            return None
        module = f"{__name__}.{name.replace('-', '_')}"
        command: click.Command = importlib.import_module(module).command
        return command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="scoresde")
def cli() -> None:
    """Score-based generative models in continuous time: train, sample, evaluate likelihoods.

    \b
    Start with:
      scoresde train --sde vp          trains on real 8x8 digits in about two minutes
      scoresde sample                  draws MNIST digits from the model that ships with it
      scoresde likelihood              bits/dim of held-out MNIST under that model
      scoresde interpolate 0 1         the way between two held-out digits, through their latents
      scoresde edit 0 --strength 0.5   a held-out digit, noised part of the way and drawn anew
      scoresde convert SRC DST         a checkpoint of another project becomes a model of this one

    On several devices or machines, train, train-classifier, sample, likelihood and bench share
    their work:

    \b
      torchrun --nproc-per-node 2 -m scoresde sample -n 1000 --out samples.npy
    """
    context = click.get_current_context()
    if context.invoked_subcommand not in SHARED and not leads():
        context.exit()


def _warning(message: Warning | str, *_: object, **__: object) -> str:
    """A warning as one line, without the place in the code that it comes from."""
    return f"Warning: {' '.join(str(message).split())}\n"


def main() -> None:
    """Runs the command line: a mistake gives one line and exit code 1, Ctrl-C gives 130.

    With ``SCORESDE_DEBUG=1`` in the environment, errors show where they come from. Of the
    processes of a launcher the first that fails speaks for all, and else rank 0.
    """
    debug = os.environ.get("SCORESDE_DEBUG", "") not in ("", "0")
    # Read when torch loads: threads that spin while they wait crawl beside any busy process.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # it says each retry over two lines
    warnings.formatwarning = _warning
    try:
        if not leads():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the rest of the process)
            warnings.simplefilter("ignore")
        cli.main(standalone_mode=False)
    except click.ClickException as error:
        message = error.format_message()
        if isinstance(error, click.UsageError) and error.ctx is not None:
            message = f"{message.rstrip('.')} ({error.ctx.command_path} --help says more)"
        _end(f"Error: {' '.join(message.split())}", error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _end("stopped", 130)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if debug:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        _end(f"Error: {message}", 1)


def _end(line: str, code: int) -> NoReturn:
    """Ends the process with a line, said by the first process of a launch that fails."""
    if first_to_fail():
        click.echo(line, err=True)
    else:
        time.sleep(1)  # the launcher ends all with the first that goes: let the line be said
    sys.exit(code)
