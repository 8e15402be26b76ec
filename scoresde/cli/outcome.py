"""What ``scoresde bench`` has measured so far, and its writing down."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import options

if TYPE_CHECKING:
    import torch

    from ..bench.cases import Case
    from ..bench.row import Row
    from ..world import World


class Outcome:
    """What has been measured so far, and how it was asked for."""

    def __init__(self, what: str, settings: dict[str, Any], endpoint: bool, world: World) -> None:
        self.what, self.settings, self.endpoint = what, settings, endpoint
        self.world = world
        self.complete = True
        self.rows: list[Row] = []
        self.cases: list[Case] = []

    def add(self, case: Case) -> None:
        """Runs one problem; its rows, of this process, stay even if it is interrupted."""
        from ..bench import compare
        from ..bench.run import UnsolvedError

        self.cases.append(case)
        earlier = len(self.rows)
        settings = {
            **self.settings, **case.cond, "on_row": self.rows.append,
            "progress": options.on_screen(), "world": self.world,
        }  # fmt: skip
        try:
            rows = compare(case.score, case.target, endpoint=self.endpoint, **settings)
        except UnsolvedError as error:  # before the first row, and on every process
            if self.world.main:
                click.echo(f"{case.what}: no distances to the converged ODE: {error}", err=True)
            rows = compare(case.score, case.target, **settings)
        self.rows[earlier:] = rows

    def write(self, folder: Path, json_file: Path | None, device: torch.device) -> None:
        """The files, then the table."""
        from ..bench import against_best
        from ..bench.files import record, write
        from ..bench.text import report

        rows = against_best(self.rows)
        floors = {case.target.name: case.target.floor for case in self.cases}
        content = self.content(device)
        write(folder, rows, floors, content)
        options.write_json(json_file, record(rows, floors, content))
        facts = self.cases[0].target.about
        for line in (
            content["title"],
            f"distances between flattened items in {content['unit']}, to "
            f"{facts['reference_items']} {facts['reference']}; endpoint in the model's range",
            f"floor: {facts['floor']}, {facts['floor_items']} items, 95 % over random splits\n",
            report(rows, floors),
            *self._shared(),
            f"written {folder}/bench.html, bench.csv, bench.json, bench.png, bench.svg",
        ):
            options.speak(line)

    def _shared(self) -> list[str]:
        """What the times mean where several processes worked."""
        if self.world.size == 1:
            return []
        return [
            f"the rows were shared by {self.world.size} processes at work at the same time; each "
            "was timed on one of them"
        ]

    def content(self, device: torch.device) -> dict[str, Any]:
        """Everything but the rows that a record says."""
        import datetime

        from ..bench.files import commit
        from ..bench.row import label
        from ..bench.run import reference_solver
        from ..config import describe
        from ..model import home

        scores = [case.score for case in self.cases]
        repeats = self.settings["repeats"]
        seeds = f"seed {self.settings['seed']}" + (f", {repeats} repeats" if repeats > 1 else "")
        reference = describe(reference_solver(home(scores[0])[1])) if self.endpoint else None
        return {
            "title": f"{self.what}: {self.settings['samples']} samples from common start noise, "
            + seeds,
            "unit": self.cases[0].unit,
            **self.cases[0].about,
            "complete": self.complete,
            "processes": self.world.size,
            "command": shlex.join(["scoresde", *sys.argv[1:]]),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "settings": {
                **self.settings,
                "endpoint": reference,
                "denoise": True,
                "weights": getattr(scores[0], "weights", None),
            },
            "sdes": {label(s.sde): describe(s.sde) for s in scores},
            "laws": {case.target.name: case.target.about for case in self.cases},
            "versions": {**options.versions(device), "commit": commit()},
        }
