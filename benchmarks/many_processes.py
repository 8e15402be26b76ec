"""Many processes on one machine: the same run, how much faster, and how much smaller each is.

    python benchmarks/many_processes.py [--steps 50] [--rounds 5]

Two processes over gloo on the CPU, one thread each. Prints a table in Markdown:

* the largest difference of the losses of two processes from those of one, replicated and shared
  out, and of a run of two that shares its weights and goes on as one;
* items a second of one process and of two, at the same batch a process and at the same global
  batch, of the unet's preset small on 28x28 pictures: medians of rounds by turns;
* bytes of weights, averages and moments that each process holds.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LEARNING = {
    "data": {"source": "digits"},
    "net": {"name": "unet", "width": 32, "multipliers": [1, 2], "blocks": 1},
    "training": {"batch_size": 16, "warmup": 5, "evaluations": 0, "track": "none"},
}  # fmt: skip
BATCH = 16
"""Items a process in the measurement of speed."""


def launch(size: int, task: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs this file in so many processes; what each found out."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = os.environ | {
        "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, __file__, "--task", json.dumps(task)], stdout=subprocess.PIPE,
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(size)
    ]  # fmt: skip
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"a process of {task} failed")
    return [json.loads(text.splitlines()[-1]) for text in said]


def work(task: dict[str, Any]) -> dict[str, Any]:
    """What one process of a launch does."""
    import torch

    from scoresde.world import joined

    torch.set_num_threads(1)
    with joined("cpu") as world:
        return learn(task, world) if task["kind"] == "learn" else speed(task, world)


def learn(task: dict[str, Any], world: Any) -> dict[str, Any]:
    """Trains, and tells the loss of every step and the bytes that this process holds."""
    import torch

    from scoresde.config import merge
    from scoresde.training import Trainer, prepare
    from scoresde.training.parallel import local

    training = {
        "steps": task["steps"],
        "checkpoint_every": task["steps"] // 2,
        "keep": 9,
        "log_every": 1,
    }
    config = merge(LEARNING, {"training": training | {"shard": task["shard"]}})
    found = Trainer(
        prepare(config, Path(task["folder"]), torch.device("cpu")), lambda line: None, world
    )
    if task["resume"]:
        found.resume()
    found.run(show_progress=False)
    learner = found.learner
    held = list(learner.parameters.values())
    held += [p for average in learner.averages for p in average.net.parameters()]
    held += [v for state in learner.optimizer.state.values() for v in state.values()]
    size = sum(local(t).numel() * t.element_size() for t in held)
    rows = found.watch.log.rows("train")
    return {"losses": {row["step"]: row["loss"] for row in rows}, "bytes": size}


def speed(task: dict[str, Any], world: Any) -> dict[str, Any]:
    """Items a second over all processes, without what comes before the first step."""
    import torch

    from scoresde.data import Batch
    from scoresde.training import prepare
    from scoresde.training.learner import Learner

    folder = Path(task["folder"])
    pictures = folder / "pictures.npz"
    config = {
        "data": {"source": str(pictures), "limit": 64},
        "net": {"name": "unet", "preset": "small"},
        "training": {"batch_size": task["batch"], "track": "none", "workers": 0},
    }
    learner = Learner(prepare(config, folder / "run", torch.device("cpu")), world)
    local = task["batch"] // world.size
    x = torch.randint(0, 256, (local, 1, 28, 28), dtype=torch.uint8)
    batch = Batch(x, None, (), ())
    learner.learn(batch, 0, 1e-4)
    world.barrier()
    began = time.perf_counter()
    for step in range(1, 1 + task["steps"]):
        learner.learn(batch, step, 1e-4)
    world.barrier()
    return {"rate": task["steps"] * task["batch"] / (time.perf_counter() - began)}


def apart(one: dict[str, float], two: dict[str, float]) -> float:
    """The largest difference of losses at the same steps."""
    assert one.keys() == two.keys()
    return max(abs(one[step] - two[step]) for step in one)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--task")
    given = parser.parse_args()
    if given.task:
        print(json.dumps(work(json.loads(given.task))))
        return
    import shutil

    import numpy as np
    import torch

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)

        def run(name: str, size: int, shard: bool, resume: bool = False) -> list[dict[str, Any]]:
            return launch(size, {
                "kind": "learn", "folder": str(folder / name), "steps": given.steps,
                "shard": shard, "resume": resume,
            })  # fmt: skip

        one, two, shared = run("one", 1, False), run("two", 2, False), run("shared", 2, True)
        shutil.copytree(folder / "shared", folder / "again")
        shutil.rmtree(max((folder / "again/checkpoints").glob("step-*")))
        again = run("again", 1, False, resume=True)
        print(f"torch {torch.__version__}, {given.steps} steps, two processes over gloo\n")
        print("| run | largest difference of a loss from one process | bytes a process |")
        print("|---|---|---|")
        print(f"| one process | 0 | {one[0]['bytes']:,} |")
        for name, found in (("two, replicated", two), ("two, shared out", shared),
                            ("two, shared out, then one", again)):  # fmt: skip
            worst = apart(one[0]["losses"], found[0]["losses"])
            size = max(each["bytes"] for each in found)
            print(f"| {name} | {worst:.1e} | {size:,} |")

        levels = np.random.default_rng(0).integers(0, 256, (256, 28, 28), dtype=np.uint8)
        np.savez(folder / "pictures.npz", x=levels)
        cases = {
            f"one process, batch {BATCH}": (1, BATCH),
            f"two processes, batch {2 * BATCH} ({BATCH} each)": (2, 2 * BATCH),
            f"two processes, batch {BATCH} ({BATCH // 2} each)": (2, BATCH),
        }
        rates: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(given.rounds):
            for name, (size, batch) in cases.items():
                task = {"kind": "speed", "folder": place, "batch": batch, "steps": 4}
                rates[name].append(launch(size, task)[0]["rate"])
        middle = {name: statistics.median(found) for name, found in rates.items()}
        alone = next(iter(middle.values()))
        print("\n| unet small, 28x28, one thread a process | items/s | of one, a process |")
        print("|---|---|---|")
        for name, rate in middle.items():
            spread = f"{min(rates[name]):.1f} to {max(rates[name]):.1f}"
            share = rate / alone / cases[name][0]
            print(f"| {name} | {rate:.1f} ({spread}) | {share:.0%} |")


if __name__ == "__main__":
    main()
