"""The logs of a run: one JSON object a line, one file a kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Log:
    """``logs/NAME.jsonl`` in the folder of a run.

    Args:
        run: the run's folder.
    """

    def __init__(self, run: Path) -> None:
        self.folder = run / "logs"

    def append(self, name: str, **row: Any) -> None:
        """Adds a row to a log."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / f"{name}.jsonl", "a") as handle:
            handle.write(json.dumps(row) + "\n")

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of a log, none if there is no such log."""
        file = self.folder / f"{name}.jsonl"
        return [json.loads(row) for row in file.read_text().splitlines()] if file.exists() else []

    def rewind(self, step: int) -> None:
        """Drops what was logged after ``step``, which a resumed run will log again."""
        for file in self.folder.glob("*.jsonl"):
            kept = [row for row in self.rows(file.stem) if row["step"] <= step]
            file.write_text("".join(json.dumps(row) + "\n" for row in kept))
