"""What a run survives: kills, a full disk, a damaged checkpoint, bad data, a dead worker.

    python benchmarks/faults.py --kills 50

Each fault happens to real runs of `scoresde train`, in a temporary folder, and the messages are
printed as a user sees them. The kills are `kill -9`: half of them at random instants of the run,
half within its saves (once a draft of a checkpoint is seen). After each kill every checkpoint is
verified, and at the end the run, started again after each, must hold the same bits as one that was
never stopped. The full disk is a tmpfs of a few MiB, which needs the right to mount one.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from scoresde.files import read_tensors
from scoresde.saved_steps import damage, latest_checkpoint, step_folders, step_of

TRAIN = [sys.executable, "-m", "scoresde", "train", "--device", "cpu"]
SMALL = [
    "--data", "moons", "--set", "net.width=96", "--set", "training.batch_size=64",
    "--set", "training.evaluations=0", "--set", "likelihood.items=0",
    "--set", "training.track=none", "--set", "sampling.count=4",
]  # fmt: skip
PICTURES = [
    "--set", "net.width=16", "--set", "training.evaluations=0", "--set", "likelihood.items=0",
    "--set", "training.batch_size=16", "--set", "training.track=none",
    "--set", "data.memory=0", "--set", "sampling.count=4",
]  # fmt: skip


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(TRAIN + arguments, capture_output=True, text=True, check=False)


def told(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Prints the exit code and the lines that hold one of the words."""
    lines = (done.stdout + done.stderr).splitlines()
    print(f"  exit code {done.returncode}")
    for line in lines:
        if any(word in line for word in words):
            print(f"  | {line}")


def tensors(run: Path) -> dict[str, np.ndarray]:
    newest = latest_checkpoint(run)
    return {
        f"{file.stem}.{key}": value.numpy()
        for file in sorted(newest.glob("*.safetensors"))
        for key, value in read_tensors(file).items()
    }


def kills(folder: Path, count: int, rng: random.Random) -> None:
    """Kills a run again and again, and compares its end with an undisturbed one."""
    print(f"{count} kills (kill -9)")
    steps = ["--steps", "6000", "--set", "training.checkpoint_every=10"]
    whole, broken = folder / "whole", folder / "broken"
    began = time.perf_counter()
    assert run([*SMALL, *steps, "--out", str(whole)]).returncode == 0
    length = time.perf_counter() - began
    seen = lost = in_saves = 0
    most = 0
    for number in range(count):
        process = subprocess.Popen(
            [*TRAIN, *SMALL, *steps, "--out", str(broken), "--restartable"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        in_save = number % 2 == 1
        before = [step_of(f) for f in step_folders(broken)]
        while process.poll() is None and len(list((broken / "logs").glob("*"))) < 1:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        while in_save and process.poll() is None:
            drafts = list((broken / "checkpoints").glob(".draft-*"))
            if drafts:
                time.sleep(rng.uniform(0, 0.01))
                in_saves += any(d.exists() for d in drafts)
                break
        if process.poll() is not None:
            print(f"  the run ended by itself after {number} kills")
            break
        newest = max((step_of(f) for f in step_folders(broken)), default=0)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        seen += 1
        after = step_folders(broken)
        wrong = [damage(f) for f in after if damage(f) is not None]
        lost += bool(wrong) or max(map(step_of, after), default=0) < newest
        most = max(most, newest - max(before, default=0))
    done = run([*SMALL, *steps, "--out", str(broken), "--restartable"])
    a, b = tensors(whole), tensors(broken)
    same = a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
    print(f"  {seen} kills, {in_saves} of them within a save, {lost} lost something saved")
    print(f"  the end: exit code {done.returncode}, {len(a)} tensors, the same bits: {same}")
    print(f"  an undisturbed run takes {length:.0f} s; the most steps between two kills: {most}")


def full_disk(folder: Path) -> None:
    """Lets the disk fill up in the middle of a run."""
    print("a full disk (tmpfs of 8 MiB)")
    disk = folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], check=False
    )
    if mounted.returncode:
        print("  left out: no right to mount a tmpfs")
        return
    try:
        out = disk / "run"
        settings = ["--steps", "800", "--set", "training.checkpoint_every=50",
                    "--set", "training.keep=9"]  # fmt: skip
        told(run([*SMALL, *settings, "--out", str(out)]), "Error", "space")
        for each in step_folders(out):
            print(f"  {each.name}: {damage(each) or 'sound'}")
        left = sorted(p.name for p in (out / "checkpoints").glob(".*"))
        print(f"  drafts left behind: {left or 'none'}")
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        print("  with more space, --resume:")
        told(run(["--out", str(out), "--resume"]), "resumed", "trained", "Error")
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def truncated(folder: Path) -> None:
    """Cuts the newest checkpoint of a run off."""
    print("a truncated checkpoint")
    out = folder / "truncated"
    settings = ["--steps", "60", "--set", "training.checkpoint_every=20"]
    run([*SMALL, *settings, "--out", str(out)])
    file = step_folders(out)[-1] / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    told(run(["--out", str(out), "--resume", "--steps", "80"]), "damaged", "resumed", "trained")


def bad_data(folder: Path, rng: np.random.Generator) -> None:
    """NaN in arrays, an unreadable picture, pictures of which too many cannot be read."""
    print("a NaN in the data, read when needed")
    x = rng.normal(size=(60000, 2)).astype(np.float32)
    x[51234, 1] = np.nan  # not among the first, which are looked at before the run
    np.save(folder / "points.npy", x)
    points = str(folder / "points.npy")
    nan = ["--data", points, "--set", "training.batch_size=2000", "--steps", "60"]
    small = SMALL[2:]
    told(
        run([*small, *nan, "--set", "data.memory=0", "--set", "data.scaler=none",
             "--out", str(folder / "nan")]),
        "finite", "trained", "Error",
    )  # fmt: skip
    print("the same in memory")
    told(run([*small, *nan, "--out", str(folder / "nan2")]), "finite", "trained", "Error")
    print("an unreadable picture among 200")
    pictures = folder / "pictures"
    pictures.mkdir()
    for i in range(200):
        Image.fromarray(rng.integers(0, 256, (12, 12), np.uint8)).save(pictures / f"{i:03d}.png")
    (pictures / "017.png").write_bytes((pictures / "017.png").read_bytes()[:60])
    told(
        run([*PICTURES, "--data", str(pictures), "--steps", "40", "--out", str(folder / "one")]),
        "cannot", "trained", "Error",
    )  # fmt: skip
    print("unreadable pictures, 30 of 200")
    for i in range(0, 60, 2):
        (pictures / f"{i:03d}.png").write_bytes(b"not a picture")
    out = folder / "many"
    told(
        run([*PICTURES, "--data", str(pictures), "--steps", "40", "--out", str(out)]),
        "cannot", "trained", "Error",
    )  # fmt: skip
    print(f"  saved before it ended: {[f.name for f in step_folders(out)]}")


def children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(p) for p in listed]


def dead_worker(folder: Path, rng: np.random.Generator) -> None:
    """Kills a process that reads the data."""
    print("a dead worker")
    pictures = folder / "readable"
    pictures.mkdir()
    for i in range(200):
        Image.fromarray(rng.integers(0, 256, (12, 12), np.uint8)).save(pictures / f"{i:03d}.png")
    out, log = folder / "worker", folder / "worker.txt"
    with open(log, "w") as handle:
        process = subprocess.Popen(
            [*TRAIN, *PICTURES, "--data", str(pictures), "--steps", "150", "--out", str(out),
             "--set", "training.workers=2"],
            stdout=handle, stderr=subprocess.STDOUT,
        )  # fmt: skip
        while not (out / "logs" / "train.jsonl").exists():
            time.sleep(0.05)
        workers = [
            c for c in children(process.pid)
            if b"resource_tracker" not in Path(f"/proc/{c}/cmdline").read_bytes()
        ]  # fmt: skip
        os.kill(workers[0], signal.SIGKILL)
        process.wait()
    print(f"  exit code {process.returncode}")
    for line in log.read_text().splitlines():
        if "killed" in line or "trained" in line or "Error" in line:
            print(f"  | {line}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kills(folder, args.kills, random.Random(args.seed))
        full_disk(folder)
        truncated(folder)
        bad_data(folder, rng)
        dead_worker(folder, rng)


if __name__ == "__main__":
    main()
