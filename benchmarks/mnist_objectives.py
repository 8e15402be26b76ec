"""A flow-matching, a VP-likelihood and an EDM model of MNIST at equal cost, side by side.

    python benchmarks/mnist_objectives.py path/to/mnist --steps 2000 --out runs/objectives

The same network, batches, steps, optimizer and seed; the process, the parameterization and the
objective are the papers'. For each: bits/dim of the same held-out images by the probability-flow
ODE, with its standard error, and samples of two solvers compared with held-out images by the
Frechet distance between the features of a classifier that is trained here on the labels. The floor
of that distance, for as many real images, stands beside it. Runs that are there are gone on with.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

import scoresde as sd
from scoresde.data import load
from scoresde.likelihood.dataset import dataset_log_prob
from scoresde.metrics import frechet
from scoresde.training.summary import cost

MODELS = {
    "flow matching": ["sde.name=linear", "parameterization.name=v", "objective.weight=velocity"],
    "VP likelihood": ["sde.name=vp", "parameterization.name=v", "objective.weight=likelihood",
                      "objective.times=importance"],
    "EDM": ["sde.name=edm", "parameterization.name=karras", "objective.weight=edm",
            "objective.times=log-normal"],
}  # fmt: skip
COMMON = [
    "net.name=unet", "net.width=16", "net.multipliers=[1, 2, 3]", "net.blocks=1",
    "net.attention=[2]", "training.batch_size=64", "training.lr=1.5e-3", "training.warmup=200",
    "training.precision=bfloat16", "training.evaluations=2", "training.checkpoint_every=250",
    "likelihood.items=0", "training.track=none",
]  # fmt: skip
SOLVERS = (("vabm", 20), ("heun", 32))


def train(name: str, mnist: str, out: Path, steps: int) -> Path:
    """The run of a model, by the command line."""
    run = out / name.replace(" ", "-")
    settings = [f"--set={s}" for s in [*COMMON, *MODELS[name]]]
    subprocess.run(
        [sys.executable, "-m", "scoresde", "train", "--data", mnist, "--steps", str(steps),
         "--out", str(run), "--restartable", "--device", "cpu", *settings],
        check=True,
    )  # fmt: skip
    return run


class Classifier(nn.Module):
    """Two convolutions and a layer of 64 features."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * 49, 64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of pictures ``(B, 1, 28, 28)`` in [-1, 1], ``(B, 10)``."""
        return self.head(self.features(x))


def classifier(x: Tensor, y: Tensor) -> Classifier:
    """A classifier of digits, trained for three passes."""
    torch.manual_seed(0)
    net = Classifier()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(3):
        for part in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            functional.cross_entropy(net(x[part]), y[part]).backward()
            optimizer.step()
    return net.eval()


@torch.no_grad()
def features(net: Classifier, x: Tensor) -> Tensor:
    return torch.cat([net.features(part) for part in x.split(500)])


def scaled(x: Tensor) -> Tensor:
    """Grey values 0..255 in [-1, 1]."""
    return x.float() / 127.5 - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mnist")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--items", type=int, default=128, help="images for bits/dim")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("runs/objectives"))
    args = parser.parse_args()
    runs = {name: train(name, args.mnist, args.out, args.steps) for name in MODELS}
    real, test = load(args.mnist, "train"), load(args.mnist, "test")
    net = classifier(scaled(real.x), real.y)
    right = float((net(scaled(test.x)).argmax(1) == test.y).float().mean())
    held = features(net, scaled(test.x))
    floors = [
        frechet(features(net, scaled(real.x[i * args.samples :][: args.samples])), held)
        for i in range(5)
    ]
    print(
        f"classifier: {right:.2%} of the test images; floor of the distance, {args.samples} "
        f"real images: {np.mean(floors):.2f} (5 sets: {min(floors):.2f} to {max(floors):.2f})"
    )
    print(
        "| model | bits/dim | evaluations | "
        + " | ".join(f"{s}, {n} steps: distance (evaluations)" for s, n in SOLVERS)
        + " | training, s |"
    )
    rows = []
    for name, run in runs.items():
        model = sd.load(run)
        found = dataset_log_prob(model, test, items=args.items, seed=0).summary()
        cells = []
        for solver, steps in SOLVERS:
            parts, nfe = [], 0.0
            for start in range(0, args.samples, 100):
                shape = (min(100, args.samples - start), *model.shape)
                drawn = sd.sample(model, shape, solver=solver, steps=steps, seed=start)
                parts.append(model.scaler.image(drawn.x))
                nfe = drawn.mean_nfe
            drawn_all = torch.cat(parts)
            cells.append(f"{frechet(features(net, scaled(drawn_all)), held):.2f} ({nfe:.0f})")
            if solver == SOLVERS[0][0]:
                rows.append(np.concatenate(drawn_all[:20, 0].numpy(), axis=1))
        print(
            f"| {name} | {found['bits_per_dim']:.4f} ± {found['bits_per_dim_stderr']:.4f} "
            f"| {found['nfe']:.0f} | {' | '.join(cells)} | {cost(run).seconds:.0f} |"
        )  # fmt: skip
    Image.fromarray(np.concatenate(rows)).save(args.out / "side-by-side.png")


if __name__ == "__main__":
    main()
