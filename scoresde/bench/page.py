"""A comparison as one self-contained page: data, style and script in a single file.

The parts are files of the folder ``templates``. The page asks no network for anything, and shows
what the data say as text only; inside its script element no ``<`` can end it.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

SCRIPTS = ("model.js", "chart.js", "tables.js", "app.js")


def page(record: Mapping[str, Any]) -> str:
    """The page of a comparison, given what its JSON file holds."""
    from .files import dumps

    folder = files(__package__) / "templates"

    def part(name: str) -> str:
        return (folder / name).read_text(encoding="utf-8")

    parts = {
        "title": html.escape(str(record["title"])),
        "style": part("style.css"),
        "data": embedded(dumps(record)),
        "script": "\n".join(part(name) for name in SCRIPTS),
    }
    # One pass, so that nothing inside a part is taken for a place.
    return re.sub(r"\{\{(\w+)\}\}", lambda m: parts[m[1]], part("report.html"))


def embedded(json: str) -> str:
    """JSON that cannot end its script element or start a comment in it."""
    for character in "<>&\u2028\u2029":
        json = json.replace(character, f"\\u{ord(character):04x}")
    return json
