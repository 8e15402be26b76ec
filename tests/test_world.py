"""Processes of a launcher: one result whatever their number, one voice, and no hanging."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import scoresde as sd
from scoresde.bench.engine import shared_out
from scoresde.cli import cli
from scoresde.cli.sample import draw
from scoresde.config import ConfigError
from scoresde.devices import pick_device
from scoresde.series import run_series
from scoresde.world import World, joined, launched

ROOT = Path(__file__).resolve().parents[1]
PLAIN = {
    k: v
    for k, v in os.environ.items()
    if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
} | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # fmt: skip
LIMIT = 60
"""Seconds after which a launch counts as hanging."""


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def start(folder: Path, size: int, *arguments: object) -> list[subprocess.Popen[str]]:
    """Processes with the variables that ``accelerate launch`` and ``torchrun`` set, no agent."""
    port = str(free_port())
    return [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)], cwd=folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=PLAIN | {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank),
                         "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        )
        for rank in range(size)
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each; none may hang."""
    end = time.monotonic() + LIMIT
    found = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=max(end - time.monotonic(), 0.1))
            found.append((process.returncode, out, err))
    finally:
        for process in processes:
            process.kill()
    return found


def together(folder: Path, size: int, *arguments: object) -> list[tuple[int, str, str]]:
    """What ``size`` processes say, all of which succeed."""
    found = finish(start(folder, size, *arguments))
    assert [code for code, _, _ in found] == [0] * size, found
    return found


def torchrun(folder: Path, size: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size),
         "--master-port", str(free_port()), *map(str, arguments)],
        cwd=folder, text=True, capture_output=True, timeout=LIMIT, env=PLAIN, check=False,
    )  # fmt: skip


def alone(folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """The command of ``-m scoresde ...`` in this very process, with the threads of a launch."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(folder)
    cli.main(list(map(str, arguments[2:])), standalone_mode=False)


def script(folder: Path, text: str) -> Path:
    file = folder / "work.py"
    file.write_text(textwrap.dedent(text))
    return file


def test_the_place_is_read_from_the_variables_of_a_launcher():
    assert launched({}) is None
    assert launched({"RANK": "1"}) is None
    assert launched({"RANK": "1", "WORLD_SIZE": "4"}) == (1, 4, 1)
    assert launched({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == (5, 8, 1)
    with pytest.raises(ConfigError, match="RANK=4, WORLD_SIZE=4"):
        launched({"RANK": "4", "WORLD_SIZE": "4"})
    with pytest.raises(ConfigError, match="whole numbers, got RANK=x"):
        launched({"RANK": "x", "WORLD_SIZE": "4"})


def test_shares_are_contiguous_whole_and_even():
    for count in (0, 1, 5, 10, 64):
        for size in (1, 2, 3, 7):
            shares = [World(rank, size).share(count) for rank in range(size)]
            assert [i for share in shares for i in share] == list(range(count))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_world_of_one_is_free(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with joined("cpu") as world:
        assert (world.rank, world.size, world.main) == (0, 1, True)
        assert world.gather(3) == [3]
        assert world.broadcast("a") == "a"
        assert world.highest([1.0, -2.0]) == [1.0, -2.0]
        world.barrier()
        assert not torch.distributed.is_initialized()
    with pytest.raises(KeyError), joined("cpu"):
        raise KeyError("an error passes through")


def test_each_process_of_a_machine_has_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    world = World(rank=5, size=8, local_rank=1)
    assert world.device("auto") == world.device("cuda") == torch.device("cuda", 1)
    assert world.device("cuda:0") == torch.device("cuda", 0)
    assert world.device("cpu") == torch.device("cpu")
    assert World().device("auto") == torch.device("cuda")
    with pytest.raises(ConfigError, match="process 2 of this machine has no GPU: torch sees 2"):
        World(rank=2, size=3, local_rank=2).device("auto")
    with pytest.raises(ConfigError, match="no device 'cuda:2'"):
        pick_device("cuda:2", 0)


def test_rows_go_to_the_process_with_least_to_do():
    assert shared_out([1, 50, 20, 30, 5], 2) == [[1, 4], [0, 2, 3]]
    assert shared_out([3, 2], 1) == [[0, 1]]
    assert shared_out([3], 3) == [[0], [], []]


def test_processes_exchange_objects_and_agree(tmp_path):
    file = script(tmp_path, """
        import json, sys, time
        import torch
        from scoresde.world import joined
        with joined("auto") as w:
            told = {
                "gather": w.gather({"rank": w.rank, "more": "x" * 10 ** (2 + w.rank)}),
                "broadcast": w.broadcast([w.rank + 7]),
                "highest": w.highest([w.rank, -w.rank, float("inf") if w.rank == 2 else 0.0]),
                "backend": torch.distributed.get_backend(),
            }
            if w.main:
                told["received"] = [w.receive(1), w.receive(2), w.receive(1)]
            elif w.rank == 1:
                w.send("one", 0); w.send({"again": 1}, 0)
            else:
                w.send(torch.arange(3).tolist(), 0)
            if w.rank == 1:
                time.sleep(1)
            w.barrier()
            told["left"] = time.time()
        told["down"] = not torch.distributed.is_initialized()
        json.dump(told, open(f"rank{w.rank}.json", "w"))
    """)  # fmt: skip
    together(tmp_path, 3, file)
    told = [json.loads((tmp_path / f"rank{r}.json").read_text()) for r in range(3)]
    assert [each["rank"] for each in told[0]["gather"]] == [0, 1, 2]
    assert [len(each["more"]) for each in told[0]["gather"]] == [100, 1000, 10000]
    assert told[1]["gather"] is None
    assert told[0]["received"] == ["one", [0, 1, 2], {"again": 1}]
    for each in told:
        assert each["broadcast"] == [7]
        assert each["highest"] == [2.0, 0.0, float("inf")]
        assert each["down"]
    left = [each["left"] for each in told]
    assert max(left) - min(left) < 0.8  # they waited for the one that slept


SAMPLE = ("-m", "scoresde", "sample", "zoo:digits", "--solver", "ancestral", "--steps", 6,
          "-n", 10, "--seed", 3, "--device", "cpu")  # fmt: skip


def test_samples_do_not_depend_on_the_number_of_processes(tmp_path, monkeypatch):
    batch = ("--batch", 4)
    alone(tmp_path, monkeypatch, *SAMPLE, *batch, "--out", "1.npy", "--json", "1.json")
    for size in (2, 3):
        found = together(tmp_path, size, *SAMPLE, *batch, "--out", f"{size}.npy",
                         "--json", f"{size}.json")  # fmt: skip
        assert found[0][1].startswith("10 samples from zoo:digits")
        assert f"of {size} processes" in found[0][1]
        assert all(out == "" for _, out, _ in found[1:])
    one, two, three = (np.load(tmp_path / f"{n}.npy").astype(float) for n in (1, 2, 3))
    assert one.std() > 1
    for other in (two, three):  # levels, of states that are the same to rounding
        assert np.abs(other - one).max() <= 1
        assert (other == one).mean() > 0.99
    assert json.loads((tmp_path / "3.json").read_text())["processes"] == 3
    assert {f.name for f in tmp_path.iterdir()} == {
        f"{n}.{kind}" for n in (1, 2, 3) for kind in ("npy", "json")
    }


def test_a_process_may_have_no_samples_to_draw(monkeypatch):
    found: list[list[sd.Samples]] = []
    monkeypatch.setattr(World, "gather", lambda self, obj: found.append(obj))
    model = sd.load("zoo:digits")
    for rank in range(2):
        world = World(rank, 2)
        assert draw(model, 1, 8, None, torch.device("cpu"), world, solver="ddim", steps=1) is None
    assert sorted(map(len, found)) == [0, 1]


def test_likelihood_by_adaptive_solves_is_the_same_under_torchrun(tmp_path, monkeypatch, capsys):
    how = ("-m", "scoresde", "likelihood", "zoo:digits", "--items", 34, "--batch", 16, "--method",
           "dopri5", "--rtol", 1e-3, "--atol", 1e-3, "--spot", 2, "--device", "cpu")  # fmt: skip
    alone(tmp_path, monkeypatch, *how, "--out", "one.csv", "--json", "one.json")
    said = capsys.readouterr().out
    found = torchrun(tmp_path, 2, *how, "--out", "two.csv", "--json", "two.json")
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[:2] == said.splitlines()[:2]
    assert found.stdout.count("34 items") == 1
    assert "summed over 2 processes" in found.stdout
    # To the bit: work is handed out in whole blocks of rows.
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()
    rows = (tmp_path / "two.csv").read_text().splitlines()
    assert len({row.split(",")[7] for row in rows[1:]}) > 1  # evaluations differ by item
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("one", "two"))
    assert one["bits_per_dim"] == two["bits_per_dim"]
    assert one["spot_check"] == two["spot_check"]
    assert (one["processes"], two["processes"]) == (1, 2)
    assert not list(tmp_path.glob("*.partial"))


def test_bounds_are_shared_to_rounding(tmp_path, monkeypatch):
    how = ("-m", "scoresde", "likelihood", "zoo:digits", "--bound", "elbo", "--items", 9,
           "--terms", 4, "--batch", 4, "--device", "cpu")  # fmt: skip
    alone(tmp_path, monkeypatch, *how, "--json", "1.json")
    together(tmp_path, 2, *how, "--json", "2.json")
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (1, 2))
    for key in ("total", "diffusion", "stderr", "stderr_noise"):
        assert two[key] == pytest.approx(one[key], rel=1e-5), key
    assert (one["items"], one["nfe"]) == (two["items"], two["nfe"])


SERIES = """
    import os, sys, time
    from pathlib import Path
    import torch
    from scoresde.series import run_series
    from scoresde.world import joined
    pause, fail = float(sys.argv[1]), int(sys.argv[2])
    with joined("cpu") as w:
        def make():
            def evaluate(start, stop):
                with open(f"seen-{w.rank}.txt", "a") as seen:
                    print(start, stop, file=seen)
                time.sleep(pause * (1 + 2 * (start % 64 == 0)))
                if start == fail:
                    os._exit(9)
                x = torch.arange(start, stop, dtype=torch.float64)
                return {"square": x.square().sin(), "even": x % 2 == 0}
            return evaluate
        table = run_series(make, 200, Path("s.csv"), columns={"square": float, "even": bool},
                           fingerprint={"what": "squares"}, batch=16, world=w)
        assert len(table) == 200 and float(table["square"][3]) == float(torch.tensor(9.0).double().sin())
        Path(f"evaluated-{w.rank}.txt").write_text(str(table.evaluated))
"""  # noqa: E501


def seen(folder: Path) -> dict[int, list[int]]:
    """The first items of the batches that each rank has begun."""
    found = {}
    for file in folder.glob("seen-*.txt"):
        found[int(file.stem[5:])] = [int(s.split()[0]) for s in file.read_text().splitlines()]
        file.unlink()
    return found


def squares(folder: Path, begun: list[int]) -> int:
    """The same series in this process; how many items it evaluated."""

    def evaluate(start: int, stop: int) -> dict[str, torch.Tensor]:
        begun.append(start)
        x = torch.arange(start, stop, dtype=torch.float64)
        return {"square": x.square().sin(), "even": x % 2 == 0}

    return run_series(
        lambda: evaluate, 200, folder / "s.csv", columns={"square": float, "even": bool},
        fingerprint={"what": "squares"}, batch=16,
    ).evaluated  # fmt: skip


def test_a_series_that_was_killed_goes_on_in_another_world(tmp_path):
    squares(tmp_path / "whole", [])
    file = script(tmp_path, SERIES)
    processes = start(tmp_path, 3, file, 0.3, -1)
    partial = tmp_path / "s.csv.partial"
    end = time.monotonic() + LIMIT
    while not (partial.exists() and partial.stat().st_size > 1000):
        assert time.monotonic() < end
        assert all(p.poll() is None for p in processes)
        time.sleep(0.02)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    finish(processes)
    begun = seen(tmp_path)
    assert all(begun[rank] for rank in range(3)), begun  # all three were at work
    assert not (tmp_path / "s.csv").exists()
    together(tmp_path, 2, file, 0.05, -1)
    again = seen(tmp_path)
    assert len(again) == 2
    evaluated = int((tmp_path / "evaluated-1.txt").read_text())
    assert evaluated == int((tmp_path / "evaluated-0.txt").read_text())
    assert 0 < evaluated < 200 - 2 * 16  # what was on the disk was not evaluated again
    assert sum(map(len, again.values())) == -(-evaluated // 16)
    assert (tmp_path / "s.csv").read_bytes() == (tmp_path / "whole" / "s.csv").read_bytes()


def test_a_process_that_dies_ends_the_others_and_loses_nothing_finished(tmp_path):
    file = script(tmp_path, SERIES)
    found = finish(start(tmp_path, 2, file, 0.05, 160))
    assert sorted(code for code, _, _ in found) == [1, 9], found
    other = found[0] if found[0][0] == 1 else found[1]
    assert "another process of this run ended" in other[2]
    begun: list[int] = []
    assert 0 < squares(tmp_path, begun) < 100
    assert 160 in begun


def test_bench_rows_are_those_of_one_process(tmp_path, monkeypatch, capsys):
    how = ("-m", "scoresde", "bench", "--exact", "--solvers", "heun,ancestral,runge-kutta",
           "--steps", "4,8", "--samples", 40, "--repeats", 2, "--endpoint")  # fmt: skip
    how = (*how, "--device", "cpu")
    alone(tmp_path, monkeypatch, *how, "--out", "one")
    assert "shared by" not in capsys.readouterr().out
    found = together(tmp_path, 2, *how, "--out", "two")
    assert "shared by 2 processes" in found[0][1]
    assert found[1][1] == ""
    one, two = (json.loads((tmp_path / n / "bench.json").read_text()) for n in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert len(one["rows"]) == 5
    for rows in (one["rows"], two["rows"]):
        for row in rows:
            assert row.pop("seconds") > 0
            for name in ("seconds_low", "seconds_high"):
                row.pop(name)
    assert one["rows"] == two["rows"]  # to the bit: a row is of one process
    assert one["rows"][0]["endpoint_rms"] > 0


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("Error: ")]


def test_a_mistake_is_said_once_and_ends_all(tmp_path):
    found = torchrun(tmp_path, 2, *SAMPLE, "--solver", "nope", "--out", "a.npy")
    assert found.returncode != 0
    assert len(errors(found.stderr)) == 1, found.stderr
    assert "nope" in errors(found.stderr)[0]
    assert found.stdout == ""


def test_an_error_on_one_process_ends_all_with_its_own_line(tmp_path):
    file = script(tmp_path, """
        import os, sys, time
        import scoresde.sampling as room
        from scoresde.cli import main
        if os.environ["RANK"] == "1":
            def sample(*a, **k):
                raise RuntimeError("the second process ran out of memory")
            room.sample = sample
        main()
    """)  # fmt: skip
    began = time.monotonic()
    found = torchrun(tmp_path, 2, file, *SAMPLE[2:], "--out", "a.npy")
    assert found.returncode != 0
    assert errors(found.stderr) == ["Error: the second process ran out of memory"]
    assert not list(tmp_path.glob("*.npy"))
    assert time.monotonic() - began < 30


def test_commands_that_are_not_shared_run_once(tmp_path):
    found = together(tmp_path, 2, "-m", "scoresde", "encode", "zoo:digits", "--items", 2,
                     "--solver", "heun", "--steps", 3, "--out", "z.npz")  # fmt: skip
    assert "written z.npz" in found[0][1]
    assert found[1][1:] == ("", "")


def test_a_launcher_without_an_address_is_refused(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(ConfigError, match="2 processes need MASTER_ADDR to meet"), joined("cpu"):
        pass
