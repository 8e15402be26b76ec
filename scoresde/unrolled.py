"""How much a nested description says when it is written out.

Pickles and YAML name a part once and use it many times: thirty lists, each the one before twice,
are a few hundred bytes, and 2^30 items to whoever prints or walks them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

LIMIT = 1_000_000
"""Parts of the largest description that is read."""


def unrolled(value: Any) -> float:
    """Number of parts of nested lists and mappings, a shared one counted wherever it stands.

    Returns:
        1 for what has no parts; infinity for what contains itself, or has no bottom in sight.
    """
    try:
        return _count(value, {})
    except RecursionError:
        return math.inf


def _count(value: Any, known: dict[int, float]) -> float:
    if isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, (list, tuple)):
        parts = list(value)
    else:
        held = getattr(value, "state", None)  # of an object that was read as data
        parts = [held] if isinstance(held, dict) else []
    if not parts:
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf  # until it is counted: found within itself it has no end
        known[id(value)] = 1 + sum(_count(part, known) for part in parts)
    return known[id(value)]
