"""Guidance and inverse problems on MNIST, with networks: accuracy, error, seconds and pictures.

    python benchmarks/mnist_control.py guidance MNIST --judge JUDGE --classifier NOISY
    python benchmarks/mnist_control.py inpaint MNIST --judge JUDGE
    python benchmarks/mnist_control.py superres MNIST --judge JUDGE

MNIST is a folder of the data, JUDGE and NOISY are runs of ``scoresde train-classifier``.

``guidance`` draws digits of given classes by classifier-free guidance of zoo:mnist-given and by a
classifier of noisy items on zoo:mnist, at several scales, and asks a judge, a classifier trained
on clean images alone, which class it sees. The Frechet distance is that between the judge's
log-probabilities of samples and of test images, class by class alike.

``inpaint`` hides the middle of test images, ``superres`` makes them four times smaller. Each
method draws several results of each image. Told are the root mean square error of a result and of
the mean of the results over all pixels, how often the judge sees the image's label in a result,
and how often what it sees in the image itself. A command is one run. Pictures lie in --out.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import scoresde as sd
from scoresde import guidance, inverse
from scoresde.data import load
from scoresde.metrics import frechet
from scoresde.pictures import tile
from scoresde.sheet import Column, sheet, uncertainty

SCALES = (0.0, 1.0, 2.0, 3.0, 5.0)
INPAINT: list[tuple[str, str, dict[str, Any], int]] = [
    ("replacement", "zoo:mnist", {"name": "replacement"}, 49),
    ("replacement", "zoo:mnist", {"name": "replacement"}, 249),
    ("RePaint", "zoo:mnist", {"name": "repaint"}, 10),
    ("RePaint", "zoo:mnist", {"name": "repaint"}, 50),
    ("DDRM", "zoo:mnist", {"name": "ddrm"}, 49),
    ("DiffPIR", "zoo:mnist", {"name": "diffpir"}, 49),
    ("DPS", "zoo:mnist", {"name": "dps"}, 24),
    ("PGDM", "zoo:mnist", {"name": "pgdm"}, 24),
    ("TMPD", "zoo:mnist", {"name": "tmpd"}, 16),
    ("MMPS", "zoo:mnist", {"name": "mmps"}, 12),
    ("trained on masks", "zoo:mnist-given", {"name": "trained"}, 19),
    ("trained on masks", "zoo:mnist-given", {"name": "trained"}, 49),
]
"""Title, model, section and steps of the methods."""
SUPERRES = [row for row in INPAINT if row[0] != "trained on masks" and row[3] != 249]


class Judge:
    """What a classifier of clean images says of samples in the model range of a model."""

    def __init__(self, folder: str, model: sd.ScoreModel) -> None:
        self.net = sd.load_classifier(folder)
        self.model = model
        self.t = self.net.sde.t_min

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Log-probabilities of the classes, ``(B, 10)``."""
        x = self.model.scaler.encode(self.model.scaler.decode(x), dequantize=False).float()
        return torch.cat([self.net(part, self.t) for part in x.split(500)])

    def features(self, x: Tensor) -> Tensor:
        """Bounded log-probabilities, as features."""
        return self(x).clamp_min(-12)


def guided(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Accuracy and distance by scale, of both kinds of guidance."""
    conditional, plain = sd.load(args.given), sd.load("zoo:mnist")
    judge = Judge(args.judge, plain)
    noisy = sd.load_classifier(args.classifier)
    test = load(args.data, "test")
    real = plain.scaler.encode(test.x, dequantize=False).float()
    right = float((judge(real).argmax(1) == test.y).float().mean())
    held = judge.features(real)
    print(f"judge: {right:.2%} of {len(real)} test images")
    y = torch.arange(args.samples) % 10
    rows, strips = [], []
    for kind in ("classifier-free", "classifier"):
        for scale in SCALES:
            if kind == "classifier-free":
                score: Any = guidance.ClassifierFree(conditional, scale)
            else:
                score = guidance.Classifier(plain, noisy, scale)
            began, parts = time.perf_counter(), []
            for i, part in enumerate(y.split(100)):
                out = sd.sample(
                    score, (len(part), 1, 28, 28), y=part, solver="dpmpp-2m", steps=args.steps,
                    start_index=100 * i, seed=0,
                )  # fmt: skip
                parts.append(out.x)
            x = torch.cat(parts)
            says = judge(x)
            row = {
                "guidance": kind,
                "scale": scale,
                "accuracy": float((says.argmax(1) == y).float().mean()),
                "frechet": frechet(judge.features(x), held),
                "spread": float(torch.stack([x[y == k].var(0).mean() for k in range(10)]).mean()),
                "forwards": out.cost.forwards,
                "products": out.cost.products,
                "seconds": time.perf_counter() - began,
            }
            row["stderr"] = (row["accuracy"] * (1 - row["accuracy"]) / len(y)) ** 0.5
            rows.append(row)
            print(json.dumps(row), flush=True)
            if scale in (0.0, 1.0, 3.0, 8.0):
                strips.append(plain.scaler.image(x[:20]))
    tile(torch.cat(strips), columns=20, scale=2).save(args.out / "mnist_guidance.png")
    return rows


def text_of_guidance(rows: list[dict[str, Any]]) -> str:
    """The table."""
    lines = ["| guidance | scale | class as asked for | Frechet | variance within a class |"]
    lines.append("|---|---|---|---|---|")
    lines += [
        f"| {r['guidance']} | {r['scale']:g} | {r['accuracy']:.1%} ± {r['stderr']:.1%} | "
        f"{r['frechet']:.2f} | {r['spread']:.3f} |"
        for r in rows
    ]
    return "\n".join(lines)


def restored(args: argparse.Namespace, problem: str) -> list[dict[str, Any]]:
    """Errors of each method, and a picture of some results of all."""
    models = {name: sd.load(name) for name in ("zoo:mnist",)}
    plain = models["zoo:mnist"]
    judge = Judge(args.judge, plain)
    test = load(args.data, "test")
    x0 = plain.scaler.encode(test.x[: args.items], dequantize=False).float()
    y0 = test.y[: args.items]
    sees = judge(x0).argmax(1)
    if problem == "inpaint":
        operator: Any = inverse.operators.MiddleBox((1, 28, 28))
        methods = INPAINT
    else:
        operator, methods = inverse.AveragePool((1, 28, 28), 4), SUPERRES
    y = operator.measure(x0, args.noise, seed=1)
    rows, shown = [], []
    for title, name, section, steps in methods:
        name = args.given if name == "zoo:mnist-given" else name
        model = models.setdefault(name, sd.load(name))
        began = time.perf_counter()
        found = []
        for part in range(0, len(y), args.batch):
            out = inverse.solve(
                model, operator, y[part : part + args.batch], noise_std=args.noise,
                method=section, draws=args.draws, steps=steps, seed=0,
                start_index=part * args.draws,
            )  # fmt: skip
            found.append(out.x.reshape(-1, args.draws, 1, 28, 28))
        x = torch.cat(found)
        says = judge(x.flatten(0, 1)).reshape(len(y), args.draws, 10)
        again = operator(x.flatten(0, 1)).reshape(len(y), args.draws, -1)
        miss = again - y.flatten(1)[:, None]
        row = {
            "method": title,
            "model": name,
            "steps": steps,
            "forwards": out.cost.forwards,
            "products": out.cost.products,
            "rmse": root((x - x0[:, None]).square().flatten(1).mean(1)),
            "rmse_of_mean": root((x.mean(1) - x0).square().flatten(1).mean(1)),
            "residual": float((miss.square().sum(2) / operator.count).mean().sqrt()),
            "label": float((says.argmax(2) == y0[:, None]).float().mean()),
            "agrees": float((says.argmax(2) == sees[:, None]).float().mean()),
            "sure": float(says.exp().amax(2).mean()),
            "seconds": time.perf_counter() - began,
            "converged": out.converged,
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
        shown.append((f"{title}, {out.cost.forwards + out.cost.products}", x))
    picture(args, plain, operator, x0, y, shown, problem)
    return rows


def root(squares: Tensor) -> float:
    """Root of the mean."""
    return float(squares.mean().sqrt())


def picture(
    args: argparse.Namespace, model: Any, operator: Any, x0: Tensor, y: Tensor,
    shown: list[tuple[str, Tensor]], problem: str,
) -> None:  # fmt: skip
    """A sheet with a row for each method: one image, its measurement, results, mean, deviation."""
    for item in args.show:
        rows = len(shown)
        image = model.scaler.image(x0[item : item + 1]).expand(rows, -1, -1, -1)
        small = ((operator.pinv(y[item : item + 1]).clamp(-1, 1) + 1) * 127.5).byte()
        columns: list[Any] = [
            Column("input", image),
            Column("measured", small.expand(rows, -1, -1, -1)),
        ]
        draws = torch.stack([x[item] for _, x in shown])
        for k in range(min(4, draws.shape[1])):
            columns.append(Column(f"result {k + 1}", model.scaler.image(draws[:, k])))
        heat = uncertainty(draws)
        columns += [Column("mean", model.scaler.image(draws.mean(1)))]
        columns += [Column("std", heat.images, heat.most)]
        file = args.out / f"mnist_{problem}_{item}.png"
        sheet(columns, scale=2).save(file)
        print(f"{file}: rows are {'; '.join(title for title, _ in shown)} (passes)")


def text_of_methods(rows: list[dict[str, Any]]) -> str:
    """The table."""
    lines = ["| method | passes | steps | error of a result | of the mean | label | agrees | s |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    lines += [
        f"| {r['method']} | {r['forwards'] + r['products']} | {r['steps']} | {r['rmse']:.3f} | "
        f"{r['rmse_of_mean']:.3f} | {r['label']:.1%} | {r['agrees']:.1%} | {r['seconds']:.0f} |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("guidance", "inpaint", "superres"))
    parser.add_argument("data")
    parser.add_argument("--given", default="zoo:mnist-given", help="model of classes and masks")
    parser.add_argument("--classifier", help="of noisy items, for guidance")
    parser.add_argument("--judge", required=True, help="classifier of clean items")
    parser.add_argument("--samples", type=int, default=200, help="of each scale")
    parser.add_argument("--steps", type=int, default=15, help="of each sample, for guidance")
    parser.add_argument("--items", type=int, default=16, help="images to restore")
    parser.add_argument("--draws", type=int, default=3, help="results of each")
    parser.add_argument("--noise", type=float, default=0.0)
    parser.add_argument("--batch", type=int, default=16, help="images at once")
    parser.add_argument("--show", type=int, nargs="*", default=[0, 1], help="images to draw")
    parser.add_argument("--out", type=Path, default=Path("runs/control"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.what == "guidance":
        rows = guided(args)
        print(text_of_guidance(rows))
    else:
        rows = restored(args, args.what)
        print(text_of_methods(rows))
    about = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    content = {"arguments": {k: str(v) for k, v in vars(args).items()}, **about, "rows": rows}
    (args.out / f"mnist_{args.what}.json").write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
