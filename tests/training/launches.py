"""Two processes that train, as a launcher starts them, and what they leave behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from scoresde.config import merge
from scoresde.files import read_tensors, write_yaml
from scoresde.training import Trainer, prepare

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 60
"""Seconds after which a launch counts as hanging."""
PLAIN = {
    k: v
    for k, v in os.environ.items()
    if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
} | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}  # fmt: skip
SMALL: dict[str, Any] = {
    "data": {"source": "digits"},
    "net": {"name": "unet", "width": 16, "multipliers": [1, 2], "blocks": 1, "attention": []},
    "training": {
        "steps": 8, "batch_size": 8, "warmup": 2, "evaluations": 0, "checkpoint_every": 4,
        "track": "none", "workers": 0, "log_every": 1,
    },
    "sampling": {"count": 4, "steps": 3},
    "likelihood": {"items": 2},
}  # fmt: skip
COURSE = ("step", "loss", "gradient_norm", "lr", "items", "batch", "loss_by_time", "skipped")
"""What a run logs that does not depend on its processes."""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def start(size: int, *arguments: object, folder: Path | None = None) -> list[Any]:
    """Processes with the variables of a launcher, without its agent."""
    place = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)], cwd=folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=PLAIN | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(size)
    ]  # fmt: skip


def ended(processes: list[Any]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each; none may hang."""
    end, found = time.monotonic() + LIMIT, []
    try:
        for process in processes:
            out, err = process.communicate(timeout=max(end - time.monotonic(), 0.1))
            found.append((process.returncode, out, err))
    finally:
        for process in processes:
            process.kill()
    return found


class Torchrun:
    """``torchrun -m scoresde train`` in the background, which is ended with the block."""

    def __init__(self, folder: Path, *arguments: object, restarts: int = 0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
             "--standalone", "--max-restarts", str(restarts), "--monitor-interval", "0.1",
             "-m", "scoresde", "train", "--device", "cpu",
             *map(str, arguments)],
            cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=PLAIN,
            start_new_session=True,
        )  # fmt: skip

    def __enter__(self) -> Torchrun:
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def wait(self) -> tuple[int, str]:
        out, _ = self.process.communicate(timeout=LIMIT)
        return self.process.returncode, out

    def workers(self) -> dict[int, int]:
        """Process ids by rank."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                values = dict(
                    line.split("=", 1)
                    for line in (folder / "environ").read_bytes().decode().split("\0")
                    if "=" in line
                )
                parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
                if int(parent) == self.process.pid and "RANK" in values:
                    found[int(values["RANK"])] = int(folder.name)
        return found


def until(found: Any) -> Any:
    """Waits for something to be there."""
    end = time.monotonic() + LIMIT
    while not (there := found()):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)
    return there


def job(folder: Path, resume: bool = False, poison: int | None = None, **sections: Any) -> Any:
    """A run for :func:`train`: small, with some sections of its own."""
    config = merge(SMALL, sections)
    return {"folder": str(folder), "config": config, "resume": resume, "poison": poison}


def train(wanted: Any, world: Any = None) -> Trainer:
    """Trains a job."""
    cpu, folder = torch.device("cpu"), Path(wanted["folder"])
    job = prepare(wanted["config"], folder, cpu)
    # As weights that are shared out lie, so that both sides take their sums in the same order.
    job.model.net.to(memory_format=torch.contiguous_format)
    found = Trainer(job, lambda line: None, world)
    if wanted["resume"]:
        found.resume()
    if found.world.main:
        folder.mkdir(parents=True, exist_ok=True)
        write_yaml(folder / "config.yaml", found.job.config)
    descend = found.learner._descend

    def poisoned() -> Any:
        if found.step == wanted["poison"] and found.world.rank == found.world.size - 1:
            gradient = next(iter(found.learner.parameters.values())).grad
            getattr(gradient, "to_local", lambda: gradient)().fill_(torch.nan)
        return descend()

    found.learner._descend = poisoned
    found.run(show_progress=False)
    return found


def train_together(jobs: list[Any], folder: Path) -> None:
    """Trains jobs one after the other by the same two processes."""
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    found = ended(start(2, Path(__file__), file))
    assert [code for code, _, _ in found] == [0, 0], found


def course(folder: Path) -> dict[int, dict[str, Any]]:
    """What a run has logged, by the step."""
    rows = map(json.loads, (folder / "logs" / "train.jsonl").read_text().splitlines())
    return {row["step"]: {k: row[k] for k in COURSE} for row in rows}


def difference(one: Path, two: Path, first: int = 1) -> float:
    """The largest between the figures of two runs, of which the same are None."""
    a, b = course(one), course(two)
    assert list(a) == list(b)
    worst = 0.0
    for step in (s for s in a if s >= first):
        for key, value in a[step].items():
            pairs = zip(value, b[step][key], strict=True) if isinstance(value, list) else [
                (value, b[step][key])
            ]  # fmt: skip
            for x, y in pairs:
                if (x is None) != (y is None):
                    return torch.inf
                worst = max(worst, abs((x or 0.0) - (y or 0.0)))
    return worst


def weights_differ(one: Path, two: Path, name: str, but: str = "-") -> float:
    """The largest difference between the tensors of two checkpoints, without those of a name."""
    a, b = (read_tensors(f / f"checkpoints/step-000000008/{name}.safetensors") for f in (one, two))
    assert a.keys() == b.keys()
    assert all(a[k].dtype == b[k].dtype for k in a)
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a if but not in k)


def at_step_4(run: Path, copy: Path) -> Path:
    """A copy of a run that has come as far as its checkpoint of step 4."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints/step-000000008")
    return copy


if __name__ == "__main__":
    from scoresde.world import joined

    with joined("cpu") as world:
        for each in json.loads(Path(sys.argv[1]).read_text()):
            written: list[str] = []
            place = each["folder"]

            def watch(event: str, arguments: Any, place: str = place, to: Any = written) -> None:
                names = [str(a) for a in arguments if isinstance(a, (str, Path))]
                if event in ("os.mkdir", "os.rename", "os.remove") or (
                    event == "open" and isinstance(arguments[2], int) and arguments[2] & 3
                ):
                    to.extend(f"{event} {n}" for n in names if n.startswith(place))

            sys.addaudithook(watch)
            train(each, world)
            if world.rank == 1:
                Path(f"{place}.written-by-1").write_text(json.dumps(written[:]))
            world.barrier()
        # What is tested here has been written. On a busy machine, taking gloo's groups down has
        # ended the first process by signal 6 now and then ("terminate called without an active
        # exception").
        time.sleep(1 if world.main else 0)
        os._exit(0)
