"""Checkpoints of other projects: our output beside the one that they recorded.

    python benchmarks/foreign_checkpoints.py FOLDER

``FOLDER`` holds one folder a checkpoint, each with the file, its settings, and ``expected.npz``:
inputs (``x``, ``t`` or ``sigma``, classes) and what the original's own code gave in float32
(``score_raw``, ``score_ema``, ``denoised`` or the network's ``output``). Prints, as Markdown, the
largest difference over the largest value, of the whole batch and of each item alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import scoresde as sd


def outputs(folder: Path, expected: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What was compared, ours, and theirs."""
    x = expected["x"]
    for weights in ("raw", "ema"):
        if f"score_{weights}" in expected:
            model = sd.load(folder, weights=weights)
            yield f"score, {weights}", model(x, expected["t"]), expected[f"score_{weights}"]
    if "denoised" in expected:
        model = sd.load(folder)
        ours = model.denoise(x, expected["sigma"], y=expected["labels"])
        yield "denoised", ours, expected["denoised"]
    if "output" in expected:
        model = sd.load(folder)
        yield "network", model.net(x, expected["t"], expected["y"]), expected["output"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| checkpoint | output | largest relative difference | of each item |")
    print("|---|---|---|---|")
    for file in sorted(args.folder.glob("*/expected.npz")):
        arrays = dict(np.load(file).items())
        expected = {key: torch.from_numpy(value) for key, value in arrays.items()}
        with torch.no_grad():
            for what, ours, theirs in outputs(file.parent, expected):
                error, size = (ours - theirs).abs(), theirs.abs()
                each = error.flatten(1).amax(1) / size.flatten(1).amax(1)
                whole = float(error.max() / size.max())
                alone = ", ".join(f"{float(e):.1e}" for e in each)
                print(f"| {file.parent.name} | {what} | {whole:.1e} | {alone} |")


if __name__ == "__main__":
    main()
