"""Images a second of training: the whole loop, beside its bare network, and beside diffusers.

    python benchmarks/training_speed.py [--mnist DIR] [--cases small ddpmpp-64 ddpmpp]
        [--dtypes float32 bfloat16] [--threads 1] [--rounds 9] [--device cpu] [--compile]

In one process and in turns, round by round, on the same items:

- *loop*: `Trainer.run`, all of it: items, noise, loss, gradient, clipping, Adam, averages, logs.
- *bare*: forward and backward of the same network on a batch that is fixed.
- *peer*: a plain loop around the `UNet2DModel` of diffusers, as its example of unconditional
  training has it (diffusers_loop.py), with as many FLOPs as the network here to 2 %, in the memory
  layout that it comes in. It has a process of its own, which rests while it is not its turn.
- *floor*: the FLOPs, three forwards of them, at the rate of a 3x3 convolution of 8x128x32x32.

Ratios are medians over the rounds of quotients of neighbours; the first two rounds are left out.
What the loop does every so many steps, reading figures back and logging them, is timed apart and
shared out. Then the share of time that training waits for a folder of small PNG files, which
`--workers` processes read. `--clock cpu` counts the time of the thread instead, for a machine that
is busy otherwise (one thread, no accelerator). Prints Markdown.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers_loop import Apart, Network, Settings, Unwrapped
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

import scoresde as sd
from scoresde.cost import cost
from scoresde.data import DataConfig, Dataset, Share, open_splits
from scoresde.training.job import Job, prepare
from scoresde.training.learner import Learner
from scoresde.training.trainer import Trainer

WARM = 2
"""Rounds that are not counted."""


@dataclass(frozen=True)
class Case:
    """A network, its data and its peer.

    Args:
        net: section of the configuration.
        batch: items a step; as few as leave the optimizer a small part of it.
        peer: a network of diffusers of as many FLOPs.
    """

    net: dict[str, Any]
    batch: int
    peer: Network

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one item."""
        return self.peer.shape


CASES = {
    "small": Case(
        {"name": "unet", "preset": "small"}, 64, Network((1, 28, 28), (64, 64, 192), 2, (2,))
    ),
    "ddpmpp-64": Case(
        {"name": "ncsnpp", "preset": "ddpmpp", "width": 64}, 32,
        Network((3, 32, 32), (64, 128, 128, 192), 4, (1,)),
    ),
    "ddpmpp": Case(
        {"name": "ncsnpp", "preset": "ddpmpp"}, 16,
        Network((3, 32, 32), (128, 256, 288, 352), 4, (1,)),
    ),
}  # fmt: skip


def flops(net: nn.Module, shape: tuple[int, ...]) -> int:
    """FLOPs of a forward pass of one item: convolutions and products of matrices."""
    found = cost(sd.ScoreModel(net, sd.VP(), sd.Eps(), shape=shape)).multiply_adds
    assert found is not None
    return 2 * found


def autocast(device: torch.device, half: bool) -> torch.autocast:
    """Mixed precision, if asked for."""
    return torch.autocast(device.type, torch.bfloat16, enabled=half)


class Timer:
    """Seconds of calls, with the device waited for."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.clock = time.thread_time if args.clock == "cpu" else time.perf_counter
        self.cuda = args.device.startswith("cuda")

    def now(self) -> float:
        """The time when all that was asked for has been done."""
        if self.cuda:
            torch.cuda.synchronize()
        return self.clock()

    def seconds(self, call: Callable[[], object], times: int = 1) -> float:
        """Mean time of so many calls."""
        began = self.now()
        for _ in range(times):
            call()
        return (self.now() - began) / times


class InTurns(Trainer):
    """The trainer, which lets others have their turn before each round of its steps.

    Args:
        others: what is timed besides, by name: the mean seconds of so many steps.
        every: steps a round, of it and of each of the others.
    """

    def __init__(
        self, job: Job, others: dict[str, Callable[[int], float]], every: int, timer: Timer
    ) -> None:
        super().__init__(job, lambda text: None)
        self.others, self.every, self.timer = others, every, timer
        self.taken: dict[str, list[float]] = {"loop": [], **{name: [] for name in others}}
        self.looks: list[float] = []
        self.began: float | None = None
        self.apart = 0.0

    def learn(self) -> Any:
        """One step; before the first of a round, one round of the others."""
        if self.step % self.every == 0:
            now = self.timer.now()
            if self.began is not None:
                self.taken["loop"].append((now - self.began - self.apart) / self.every)
            if self.step < (self.job.training.steps or 0) - 1:
                for name, seconds in self.others.items():
                    self.taken[name].append(seconds(self.every))
            self.apart, self.began = 0.0, self.timer.now()
        return super().learn()

    def look(self, bar: Any = None) -> None:
        """Reads figures back and logs them, on its own account."""
        self.timer.now()  # the steps themselves are the loop's
        self.looks.append(self.timer.seconds(lambda: super(InTurns, self).look(bar)))
        self.apart += self.looks[-1]

    def rounds(self) -> dict[str, list[float]]:
        """Seconds a step of each round that counts."""
        share = statistics.median(self.looks) / self.job.training.log_every
        found = {name: seconds[WARM:] for name, seconds in self.taken.items()}
        return {**found, "loop": [seconds + share for seconds in found["loop"]]}


def bare(learner: Learner, case: Case, args: argparse.Namespace) -> Callable[[], None]:
    """Forward and backward pass of the network that learns, on a batch that stays."""
    net, device = learner.net, learner.job.device
    x = torch.randn(case.batch, *case.shape, device=device)
    target, c = torch.randn_like(x), torch.linspace(-1, 1, case.batch, device=device)

    def call() -> None:
        net.zero_grad(set_to_none=True)
        with autocast(device, args.half):
            out = net(x, c)
        (out.float() - target).square().mean().backward()

    return call


def convolution(device: torch.device, half: bool) -> tuple[Callable[[], None], float]:
    """Four convolutions of 8x128x32x32, the channels last, and their FLOPs."""
    dtype = torch.bfloat16 if half else torch.float32
    x, w = (
        torch.randn(shape, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        for shape in ((8, 128, 32, 32), (128, 128, 3, 3))
    )

    @torch.no_grad()
    def call() -> None:
        for _ in range(4):
            functional.conv2d(x, w, padding=1)

    return call, 4 * 2 * 8 * 32 * 32 * 9 * 128 * 128


def configuration(case: Case, source: str, args: argparse.Namespace) -> dict[str, Any]:
    """Sections of a run that is nothing but steps."""
    return {
        "net": case.net,
        "data": {"source": source},
        "training": {
            "batch_size": case.batch,
            "steps": (WARM + args.rounds) * args.every + 1,
            "precision": "bfloat16" if args.half else "float32",
            "compile": args.compile,
            "evaluations": 0,
            "checkpoint_every": 10**9,
            "track": "none",
            "workers": 0,
        },
    }


def measure(case: Case, source: str, folder: Path, args: argparse.Namespace) -> list[str]:
    """The cells of a case's row."""
    device, timer = torch.device(args.device), Timer(args)
    job = prepare(configuration(case, source, args), folder, device)
    kernel, kernel_flops = convolution(device, args.half)
    others: dict[str, Callable[[int], float]] = {"rate": partial(timer.seconds, kernel)}
    trainer = InTurns(job, others, args.every, timer)
    others["bare"] = partial(timer.seconds, bare(trainer.learner, case, args))
    ours, theirs, peer = flops(job.model.net, case.shape), 0, None
    if not args.no_peer:
        theirs = flops(Unwrapped(case.peer.build()), case.shape)
        if abs(theirs / ours - 1) > 0.02:
            raise SystemExit(f"FLOPs differ: {theirs / ours:.3f}")
        peer = started(case, job, timer, args)
        others["peer"] = peer.seconds
    trainer.taken |= {name: [] for name in others}
    trainer.run(show_progress=False)
    if peer is not None:
        peer.close()

    taken = trainer.rounds()
    floor = [3 * ours * case.batch / kernel_flops * s for s in taken["rate"]]
    rates = [case.batch / statistics.median(s) for s in (floor, taken["bare"], taken["loop"])]
    cells = [f"{rate:.3g}" for rate in rates]
    cells += [
        f"{quotient(floor, taken['loop']):.2f}",
        f"{quotient(taken['bare'], taken['loop']):.3f}",
    ]
    if "peer" in taken:
        cells += [f"{case.batch / statistics.median(taken['peer']):.3g}", f"{theirs / ours:.3f}"]
        matched = [s * ours / theirs for s in taken["peer"]]
        cells += [f"{quotient(matched, taken['loop']):.2f}"]
    return cells


def started(case: Case, job: Job, timer: Timer, args: argparse.Namespace) -> Apart:
    """The peer of a case, on the same items."""
    data, steps = job.train, job.training.steps
    assert isinstance(data, Dataset)
    assert data.levels is not None
    assert steps is not None
    settings = Settings(case.batch, steps, args.device, args.half, args.compile, args.threads)
    return Apart(case.peer, settings, data.x, data.levels, timer.now)


def quotient(above: list[float], below: list[float]) -> float:
    """Median quotient of neighbours."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def write_pictures(folder: Path, items: Tensor, count: int) -> None:
    """A folder of PNG files of one channel."""
    folder.mkdir()
    for i in range(count):
        Image.fromarray(items[i % len(items), 0].numpy()).save(folder / f"{i:06d}.png")


def waiting(items: Tensor, folder: Path, args: argparse.Namespace) -> str:
    """Training on a folder of files: share of time that it waits, and what the reader could do."""
    case = CASES["small"]
    write_pictures(folder / "pictures", items, 4096)
    config = configuration(case, str(folder / "pictures"), args)
    config["data"]["memory"] = 0  # read when it is needed
    config["training"] |= {"steps": 61, "workers": args.workers, "batch_size": 16}
    job = prepare(config, folder / "waiting", torch.device(args.device))
    trainer = Trainer(job, lambda text: None)
    trainer.run(show_progress=False)
    row = trainer.watch.log.rows("train")[-2]  # the rows before the workers were at speed left out

    train, _ = open_splits(DataConfig(source=str(folder / "pictures"), memory=0))
    loader = train.loader(Share(16, workers=args.workers))
    for _ in range(20):
        next(loader)
    began = time.perf_counter()
    for _ in range(100):
        next(loader)
    rate = 16 * 100 / (time.perf_counter() - began)
    loader.close()
    return (
        f"A folder of PNG files of 28x28, {args.workers} worker(s): training at "
        f"{row['items_per_second']:.0f} images/s waits {row['waiting']:.2%} of the time; "
        f"the reader alone gives {rate:.0f} images/s."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mnist", default="mnist-sample", help="MNIST; else embedded digits")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--every", type=int, default=1, help="steps a round; 20 on a GPU")
    parser.add_argument("--batch", type=int, help="items a step, for all cases")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--no-peer", action="store_true", help="without diffusers")
    parser.add_argument("--no-folder", action="store_true", help="without the folder of files")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.device}, {args.threads} thread(s), {args.clock} time")
    head = ["case", "dtype", "batch", "floor", "bare", "loop", "loop/floor", "loop/bare"]
    head += [] if args.no_peer else ["peer", "FLOPs peer/ours", "loop/peer at equal FLOPs"]
    print("\n| " + " | ".join(head) + " |")
    print("|---" * len(head) + "|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rng = np.random.default_rng(0)
        synthetic = folder / "pictures.npy"
        np.save(synthetic, rng.integers(0, 256, (4096, 32, 32, 3), np.uint8))
        for dtype in args.dtypes:
            args.half = dtype == "bfloat16"
            for key in args.cases:
                case = CASES[key]
                if args.batch:
                    case = replace(case, batch=args.batch)
                source = args.mnist if case.shape[0] == 1 else str(synthetic)
                cells = measure(case, source, folder / f"{key}-{dtype}", args)
                print("| " + " | ".join([key, dtype, str(case.batch), *cells]) + " |", flush=True)
        if not args.no_folder:
            args.half = False
            items, _ = open_splits(DataConfig(source=args.mnist))
            assert isinstance(items, Dataset)
            print("\n" + waiting(items.x, folder, args))


if __name__ == "__main__":
    main()
