"""Memory and speed of training data that are read as a stream.

Writes tar shards of random 32x32 colour pictures (PNG, with labels) into a temporary folder, reads
all of them once through the loader that training uses, or trains on them (`--train`), and prints
what the processes hold and how many pictures a second they give. Linux only (it reads /proc). Run:

    python benchmarks/stream_memory.py --items 100000 --shards 20 --batch 128 --workers 2

The resident memory counts pages that processes share once for each; the proportional one divides
them among the processes. Both must stay flat, however long the stream is.
"""

from __future__ import annotations

import argparse
import io
import os
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from scoresde.data import DataConfig, Share, open_splits
from scoresde.training import Trainer, prepare
from scoresde.training.learner import Figures

MIB = 2**20


def write_shards(folder: Path, items: int, shards: int) -> int:
    """Writes the stream and returns its size in bytes."""
    rng = np.random.default_rng(0)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:04d}.tar", "w") as tar:
            for i in range(shard * items // shards, (shard + 1) * items // shards):
                # Smooth, so that they compress about as well as photographs of this size do.
                coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
                out = io.BytesIO()
                coarse.resize((32, 32), Image.Resampling.BICUBIC).save(out, "png")
                for suffix, content in (("png", out.getvalue()), ("cls", b"%d" % (i % 10))):
                    info = tarfile.TarInfo(f"{i:08d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return sum(path.stat().st_size for path in folder.glob("*.tar"))


def family() -> list[int]:
    """This process and its children."""
    found = [os.getpid()]
    for task in Path("/proc/self/task").iterdir():
        found += map(int, (task / "children").read_text().split())
    return found


def held() -> tuple[float, float]:
    """MiB of the family: resident, and proportional."""
    totals = {"Rss": 0, "Pss": 0}
    for process in family():
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            key = line.split(":")[0]
            if key in totals:
                totals[key] += int(line.split()[1]) * 1024
    return totals["Rss"] / MIB, totals["Pss"] / MIB


class Tenths:
    """Prints what is held after each tenth of the steps."""

    def __init__(self, steps: int, batch: int) -> None:
        self.steps, self.batch, self.done = steps, batch, 0
        self.began = self.last = time.perf_counter()

    def after(self, step: int) -> None:
        """To be called with the number of steps done."""
        if step * 10 // self.steps == self.done * 10 // self.steps:
            return
        now = time.perf_counter()
        rate = (step - self.done) * self.batch / (now - self.last)
        self.done, self.last = step, now
        resident, proportional = held()
        memory = f"{resident:6.0f} MiB    {proportional:6.0f} MiB"
        print(f"{step / self.steps:6.0%}   {memory}   {rate:9.0f}", flush=True)

    @property
    def rate(self) -> float:
        """Pictures a second so far."""
        return self.done * self.batch / (self.last - self.began)


def loaded(folder: Path, steps: int, given: argparse.Namespace) -> float:
    """The loader alone."""
    train, _ = open_splits(DataConfig(str(folder), buffer=given.buffer, classes=10))
    with train.loader(Share(given.batch, workers=given.workers)) as loader:
        next(loader)
        tenths = Tenths(steps, given.batch)
        for step in range(1, steps + 1):
            next(loader)
            tenths.after(step)
    return tenths.rate


def trained(folder: Path, steps: int, given: argparse.Namespace) -> float:
    """A whole run on thumbnails: data, steps, averages, logs, checkpoints."""
    config = {
        "data": {"source": str(folder), "buffer": given.buffer, "classes": 10, "size": 8},
        "net": {"width": 8, "multipliers": [1], "blocks": 1, "attention": [], "num_classes": 10},
        "training": {"steps": steps, "batch_size": given.batch, "workers": given.workers,
                     "evaluations": 0, "checkpoint_every": 100, "track": "none"},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as run:
        trainer = Trainer(prepare(config, Path(run), torch.device("cpu")), lambda text: None)
        tenths, learn = Tenths(steps, given.batch), trainer.learn

        def counted() -> Figures:
            figures = learn()
            tenths.after(trainer.step)
            return figures

        trainer.learn = counted  # type: ignore[method-assign]
        trainer.run(show_progress=False)
    return tenths.rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--shards", type=int, default=20)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--buffer", type=int, default=1024)
    parser.add_argument("--passes", type=int, default=1)
    parser.add_argument("--train", action="store_true", help="a whole run, not its loader alone")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        size = write_shards(Path(folder), given.items, given.shards)
        print(f"{given.items} pictures in {given.shards} shards, {size / MIB:.0f} MiB")
        steps = given.passes * given.items // given.batch
        print("  read    resident  proportional   pictures/s")
        rate = (trained if given.train else loaded)(Path(folder), steps, given)
    print(f"all: {rate:.0f} pictures/s", end=", ")
    print(f"{given.workers} workers, {os.cpu_count()} processors, torch {torch.__version__}")


if __name__ == "__main__":
    main()
