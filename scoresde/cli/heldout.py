"""The data that a run held out, or that were named instead."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..data import Dataset
    from ..model import ScoreModel


def held_out_data(run: str, source: str | None, split: str, train: bool = False) -> Dataset:
    """The named data, or those that the run held out; with ``train`` what it was trained on."""
    from ..checkpoint import locate
    from ..config import construct, read_yaml
    from ..data import DataConfig, load, load_heldout, load_splits

    def part(config: DataConfig) -> Dataset:
        return load_splits(config)[0] if train else load_heldout(config)

    if source is not None:
        config = DataConfig(source=source)
        if train or split == "test":
            return part(config)
        return load(source, split)
    file = locate(run) / "config.yaml"
    if not file.is_file():  # a model of another project
        raise ValueError(
            f"{run} is of another project, and does not say which data it held out: "
            "name them with --data"
        )
    stored = read_yaml(file).get("data")
    if stored is None:
        raise ValueError(f"{run} does not say which data it held out: name them with --data")
    return part(construct(DataConfig, stored, "data"))


def conditional(model: ScoreModel) -> bool:
    """Whether the network takes labels."""
    return getattr(model.net, "num_classes", None) is not None
