"""Settings of another project's configuration, by dotted name, each checked as it is asked for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..files import CheckpointError


class Options:
    """Settings by dotted name; a nested mapping and a flat one with dotted keys are both read."""

    def __init__(self, values: Mapping[str, Any], file: Path) -> None:
        self.values, self.file = values, file
        self.asked: set[str] = set()

    def __call__(self, name: str, default: Any = None) -> Any:
        """The setting ``section.key``.

        Raises:
            CheckpointError: if it is missing and there is no default.
        """
        self.asked.add(name)
        section, _, key = name.partition(".")
        inner = self.values.get(section)
        if name in self.values:
            return self.values[name]
        if isinstance(inner, Mapping) and key in inner:
            return inner[key]
        if default is None:
            raise CheckpointError(f"{self.file}: the configuration lacks {name}")
        return default

    def strange(self, without_effect: Collection[str]) -> list[str]:
        """Settings of the network that nothing has asked for and that are not known."""
        inner = self.values.get("model")
        given = {f"model.{key}" for key in inner} if isinstance(inner, Mapping) else set()
        given |= {name for name in self.values if str(name).startswith("model.")}
        return sorted(given - self.asked - {f"model.{key}" for key in without_effect})

    def whole(self, name: str, default: int | None = None) -> int:
        """A setting that must be a whole number of 1 or more."""
        value = self(name, default)
        if type(value) is not int or value < 1:
            raise CheckpointError(self._refusal(name, value, "a whole number, 1 or more"))
        return value

    def number(self, name: str, default: float) -> float:
        """A setting that must be a number."""
        value = self(name, default)
        if type(value) not in (int, float):
            raise CheckpointError(self._refusal(name, value, "a number"))
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """A setting that must be true or false."""
        value = self(name, default)
        if type(value) is not bool:
            raise CheckpointError(self._refusal(name, value, "true, false"))
        return value

    def row(
        self, name: str, default: tuple[int, ...] | None = None, *, whole: bool = True
    ) -> tuple[Any, ...]:
        """A setting that must be a list of numbers, whole ones unless said otherwise."""
        value, kinds = self(name, default), (int,) if whole else (int, float)
        if not isinstance(value, (list, tuple)) or not all(type(v) in kinds for v in value):
            words = "a list of whole numbers" if whole else "a list of numbers"
            raise CheckpointError(self._refusal(name, value, words))
        return tuple(value)

    def choice(self, name: str, accepted: Mapping[str, Any], default: Any = None) -> Any:
        """What an accepted value of a setting stands for."""
        value = str(self(name, default)).lower()
        if value not in accepted:
            raise CheckpointError(self._refusal(name, value, ", ".join(accepted)))
        return accepted[value]

    def _refusal(self, name: str, value: Any, accepted: str) -> str:
        return f"{self.file}: {name} is {value!r}; accepted: {accepted}"
