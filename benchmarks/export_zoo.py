"""Turns a trained run into a model that ships with the package, its weights in half precision.

    python benchmarks/export_zoo.py runs/mnist mnist --data mnist-sample

`--data` names the embedded data set that `scoresde likelihood` then evaluates by default.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import scoresde as sd
from scoresde.checkpoint import ZOO, describe_model
from scoresde.config import read_yaml
from scoresde.files import write_json, write_tensors, write_yaml
from scoresde.saved_steps import latest_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    parser.add_argument("--data", required=True)
    args = parser.parse_args()
    model = sd.load(args.run)
    stored, state = read_yaml(args.run / "config.yaml"), latest_checkpoint(args.run) / "state.yaml"
    folder = ZOO / args.name
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.half() for k, v in model.net.state_dict().items()}
    write_tensors(folder / "model.safetensors", weights)
    description = {**describe_model(model), "weights": model.weights}
    description["data"] = {**stored["data"], "source": args.data}
    write_yaml(folder / "config.yaml", description)
    trained = {k: stored[k] for k in ("objective", "training")}
    write_json(folder / "report.json", {**read_yaml(state), **trained})
    size = (folder / "model.safetensors").stat().st_size
    print(f"{folder}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
