"""Series: one result whatever the batch and the processes, and nothing lost to a kill."""

import json
import math
import multiprocessing
import os
import random
import signal
import threading
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from scoresde.series import journal as journals
from scoresde.series.plan import Plan, SeriesError
from scoresde.series.run import merge, part_file, run_series
from scoresde.series.workers import Queue

COUNT = 201
COLUMNS = {"nats": float, "nfe": int, "converged": bool}
FINGERPRINT = {"model": "abc", "settings": {"rtol": 1e-5, "probes": 1}, "seed": 0}


def nats(item):
    return math.nan if item == 17 else math.sin(item) * 1e3 / 3


@dataclass(frozen=True)
class Make:
    """Evaluates closed forms, slowly, and logs each batch as it begins."""

    log: Path
    pause: float = 0.0
    trouble: tuple[int, str] = (-1, "")  # at the batch of this item
    tag: str = ""

    def __call__(self):
        return self.evaluate

    def evaluate(self, start, stop):
        with open(self.log, "a") as log:
            log.write(f"{self.tag}{os.getpid()} {start} {stop}\n")
        time.sleep(self.pause)
        if start <= self.trouble[0] < stop:
            if self.trouble[1] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.trouble[1] == "interrupt":
                raise KeyboardInterrupt
            raise KeyError(self.trouble[1])
        items = torch.arange(start, stop)
        return {
            "nats": [nats(i) for i in range(start, stop)],
            "nfe": items * 2**40 + 1,
            "converged": items % 5 != 0,
        }

    @property
    def spans(self):
        """Process, start and stop of the batches so far."""
        if not self.log.exists():
            return []
        lines = self.log.read_text().splitlines()
        return [(who, int(a), int(b)) for who, a, b in map(str.split, lines)]


@pytest.fixture
def make(tmp_path):
    return Make(tmp_path / "log")


def start(make, file, count=COUNT, **options):
    options = {"columns": COLUMNS, "fingerprint": FINGERPRINT, **options}
    return run_series(make, count, file, **options)


def stopped(make, file, at, **options):
    """A series that fails on the batch of an item."""
    with pytest.raises(KeyError, match="stop"):
        start(Make(make.log, trouble=(at, "stop")), file, **options)
    make.log.unlink()


@pytest.fixture
def whole(tmp_path_factory):
    """The bytes of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    start(Make(folder / "log"), folder / "a.csv")
    return (folder / "a.csv").read_bytes()


@pytest.mark.parametrize("batch", [16, 32, 64])
def test_the_file_has_every_digit_whatever_the_batch(make, tmp_path, whole, batch):
    table = start(make, tmp_path / "a.csv", batch=batch)
    assert (tmp_path / "a.csv").read_bytes() == whole
    assert len(table) == table.evaluated == COUNT
    lines = whole.decode().splitlines()
    assert lines[0] == "item,nats,nfe,converged"
    assert lines[8] == f"7,{nats(7)!r},{7 * 2**40 + 1},True"
    assert lines[18] == f"17,nan,{17 * 2**40 + 1},True"
    assert table["nats"].tolist()[:17] == [nats(i) for i in range(17)]
    assert [table[name].dtype for name in COLUMNS] == [torch.float64, torch.int64, torch.bool]
    assert [span[1:] for span in make.spans] == [
        (i, min(i + batch, COUNT)) for i in range(0, COUNT, batch)
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.csv", "a.csv.json", "log"]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_finished_file_is_read_and_not_evaluated(make, tmp_path, suffix):
    file = tmp_path / "made" / f"a{suffix}"
    first = start(make, file)
    make.log.unlink()
    touched = file.parent.stat().st_mtime_ns
    again = start(make, file, batch=16)
    assert make.spans == []
    assert file.parent.stat().st_mtime_ns == touched  # it may be read by several at once
    assert again.evaluated == 0
    assert again.seconds == first.seconds > 0
    assert again.fingerprint == FINGERPRINT
    assert torch.equal(again.items, torch.arange(COUNT))
    for name in COLUMNS:
        assert torch.equal(first[name].nan_to_num(), again[name].nan_to_num())
        assert first[name].dtype == again[name].dtype


def killed(make, file, options, at, pause):
    """Starts a run of its own and kills it once so many batches have begun, and a moment later."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["scoresde.series.run"])
    process = context.Process(target=start, args=(make, file), kwargs=options)
    process.start()
    before, deadline = len(make.spans), time.time() + 60
    while len(make.spans) < before + at and process.is_alive() and time.time() < deadline:
        time.sleep(0.002)
    time.sleep(pause)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL


RUNS = {
    1: [(1, 64), (1, 16), (1, 32), (1, 16), (1, 64), (1, 32)],
    2: [(2, 16), (1, 64), (2, 32)],
}


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_kills_lose_nothing_but_the_batch_in_flight(tmp_path, processes):
    chance, count = random.Random(processes), 1001
    file, log = tmp_path / "a.csv", tmp_path / "log"
    start(Make(log), tmp_path / "whole.csv", count)
    log.unlink()
    for run, (crew, batch) in enumerate(RUNS[processes]):
        slow = Make(log, pause=0.03, tag=f"{run}:")
        options = {"count": count, "processes": crew, "batch": batch}
        killed(slow, file, options, chance.randint(1, 3), chance.uniform(0, 0.06))
        assert not file.exists()
    told = []
    table = start(
        Make(log, tag="end:"), file, count,
        progress=lambda done, columns: told.append((done, len(columns["nats"]))),
    )  # fmt: skip
    assert file.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert told[0] == (count - table.evaluated,) * 2
    assert told[-1] == (count, count)
    spans = Make(log).spans
    final = [(a, b) for who, a, b in spans if who.startswith("end")]
    assert 0 < sum(b - a for a, b in final) == table.evaluated < count
    # Each process that was killed lost at most the batch that it began last.
    lost = {who: (a, b) for who, a, b in spans if not who.startswith("end")}
    kept = Counter(i for who, a, b in spans if lost.get(who) != (a, b) for i in range(a, b))
    assert set(kept.values()) == {1}


def test_a_torn_record_is_cut_off_in_silence(make, tmp_path, whole):
    file = tmp_path / "a.csv"
    stopped(make, file, 64, batch=16)
    journal = tmp_path / "a.csv.partial"
    kept = journal.read_bytes()
    size = 12 + 24 + 16 * 17
    for cut in (*range(0, size, 23), 1, 11, 12, 13, size - 1, size):
        file.unlink(missing_ok=True)
        journal.write_bytes(kept[: len(kept) - cut])
        make.log.unlink(missing_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            start(make, file)
        assert make.spans[0][1] == (64 if cut == 0 else 48)
        assert file.read_bytes() == whole


def test_nothing_of_a_torn_record_stays_behind_those_that_follow(make, tmp_path, whole):
    file, journal = tmp_path / "a.csv", tmp_path / "a.csv.partial"
    stopped(make, file, 128, batch=64)
    journal.write_bytes(journal.read_bytes()[:-5])
    stopped(make, file, 96, batch=16)  # shorter than what was torn
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start(make, file)
    assert make.spans[0][1] == 96
    assert file.read_bytes() == whole


def test_a_journal_torn_at_its_beginning_begins_anew(make, tmp_path, whole):
    file, journal = tmp_path / "a.csv", tmp_path / "a.csv.partial"
    stopped(make, file, 64)
    kept = journal.read_bytes()
    for size in (0, 5, 18, 25, 40, 200):
        file.unlink(missing_ok=True)
        journal.write_bytes(kept[:size])
        assert start(make, file).evaluated == COUNT
        assert file.read_bytes() == whole


@pytest.mark.parametrize("place", [0, 3, 5, 9, 13, 200])
def test_damage_ends_what_is_trusted(make, tmp_path, whole, place):
    file, journal = tmp_path / "a.csv", tmp_path / "a.csv.partial"
    stopped(make, file, 160, batch=16)
    damaged = bytearray(journal.read_bytes())
    size = 12 + 24 + 16 * 17
    damaged[len(damaged) - 3 * size + place] ^= 0x40
    journal.write_bytes(damaged)
    with pytest.warns(UserWarning, match=r"a\.csv\.partial is damaged from byte"):
        start(make, file)
    assert make.spans[0][1] == 112
    assert file.read_bytes() == whole


def test_an_intact_record_of_items_that_are_none_of_the_series_is_damage(make, tmp_path, whole):
    file = tmp_path / "a.csv"
    stopped(make, file, 64)
    with journals.Journal(tmp_path / "a.csv.partial") as journal:
        journal.handle.seek(0, os.SEEK_END)
        journal.append(journals.BATCH.pack(8, 24, 0.0) + bytes(16 * 17))
    with pytest.warns(UserWarning, match="damaged"):
        start(make, file)
    assert file.read_bytes() == whole


OTHERS = [
    ({"fingerprint": {**FINGERPRINT, "seed": 1}}, "seed is 0 there and 1 here"),
    ({"fingerprint": {**FINGERPRINT, "settings": {"rtol": 1e-6, "probes": 1}}},
     r"settings\.rtol is 1e-05 there and 1e-06 here"),
    ({"fingerprint": {"model": "abc", "seed": 0}}, r"settings\.probes is 1 there and not given"),
    ({"count": 200}, "items is 201 there and 200 here"),
    ({"block": 32}, "block is 16 there and 32 here"),
    ({"columns": dict(reversed(COLUMNS.items()))}, "columns is"),
]  # fmt: skip


@pytest.mark.parametrize(("other", "said"), OTHERS)
@pytest.mark.parametrize("done", [False, True])
def test_another_series_is_refused_and_kept(make, tmp_path, other, said, done):
    file = tmp_path / "a.csv"
    if done:
        start(make, file)
    else:
        stopped(make, file, 64)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(SeriesError, match=said) as error:
        start(make, file, **other)
    assert "\n" not in str(error.value)
    assert "overwrite" in str(error.value)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert start(make, file, fresh=True, **other).evaluated == other.get("count", COUNT)
    assert not (tmp_path / "a.csv.partial").exists()


def test_a_run_begun_anew_goes_on_after_a_stop(make, tmp_path):
    file, other = tmp_path / "a.csv", {"fingerprint": {**FINGERPRINT, "seed": 1}}
    start(make, file)
    stopped(make, file, 100, fresh=True, **other)
    assert start(make, file, **other).evaluated == COUNT - 64


def test_a_file_that_was_changed_or_tells_nothing_is_refused(make, tmp_path):
    file = tmp_path / "a.csv"
    start(make, file)
    file.write_bytes(file.read_bytes().replace(b"nan", b"0.5"))
    with pytest.raises(SeriesError, match="was changed"):
        start(make, file)
    (tmp_path / "a.csv.json").unlink()
    with pytest.raises(SeriesError, match=r"no a\.csv\.json says how"):
        start(make, file)
    (tmp_path / "b.csv.partial").write_text("my notes")
    with pytest.raises(SeriesError, match="no journal"):
        start(make, tmp_path / "b.csv")
    assert (tmp_path / "b.csv.partial").read_text() == "my notes"


def test_killed_before_the_journal_went(make, tmp_path, whole):
    file, journal = tmp_path / "a.csv", tmp_path / "a.csv.partial"
    stopped(make, file, 200)
    kept = journal.read_bytes()
    start(make, file)
    journal.write_bytes(kept)
    make.log.unlink()
    assert start(make, file).evaluated == 0
    assert not journal.exists()
    assert make.spans == []
    assert file.read_bytes() == whole


def test_two_at_once_are_refused(make, tmp_path, whole):
    file, said = tmp_path / "a.csv", []

    def meanwhile(done, columns):
        with pytest.raises(SeriesError, match="in use") as error:
            start(make, file, fresh=True)
        said.append(str(error.value))

    start(make, file, progress=meanwhile)
    assert len(said) == 4
    assert file.read_bytes() == whole


def test_the_lock_of_a_journal_that_was_removed_holds_nothing(tmp_path, monkeypatch):
    """Another process opens the journal, and locks it once its holder has removed it."""
    file, locked = tmp_path / "a.csv.partial", []
    flock = journals.fcntl.flock

    def late(handle, how):
        if not locked:
            file.unlink()
        locked.append(how)
        flock(handle, how)

    monkeypatch.setattr(journals.fcntl, "flock", late)
    with journals.Journal(file) as journal:
        journal.append(b"x")
        assert file.stat().st_size == 13
    assert len(locked) == 2


@pytest.mark.parametrize("processes", [1, 2])
def test_errors_arrive_with_their_message_and_keep_the_journal(make, tmp_path, processes):
    file = tmp_path / "a.csv"
    options = {"count": 16 * processes, "processes": processes, "batch": 16}
    with pytest.raises(KeyError, match="no such thing") as error:
        start(Make(make.log, trouble=(0, "no such thing")), file, **options)
    assert processes == 1 or "in evaluate" in str(error.value.__cause__)
    assert multiprocessing.active_children() == []
    assert (tmp_path / "a.csv.partial").exists()


def test_a_dead_worker_is_noticed(make, tmp_path, whole):
    file = tmp_path / "a.csv"

    def kept(done, columns):
        time.sleep(0.05)  # a worker gets its next batch only once its last is kept
        assert len(make.spans) <= -(-done // 16) + 1

    with pytest.raises(RuntimeError, match=r"items 192 to 200 \(signal 9: out of memory"):
        start(Make(make.log, trouble=(200, "kill")), file, processes=2, batch=16, progress=kept)
    assert multiprocessing.active_children() == []
    assert start(make, file).evaluated <= 9 + 16
    assert file.read_bytes() == whole


def interrupted(make, file, said, when):
    """Ctrl-C to the whole group, as from a terminal: as workers start, or later as they work."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)

    def press():
        while len(multiprocessing.active_children()) < 2 or len(make.spans) < when:
            time.sleep(0.01)
        time.sleep(0.3)
        os.killpg(0, signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    try:
        start(make, file, processes=2, batch=16)
    except KeyboardInterrupt:
        os.write(2, f"stopped {len(multiprocessing.active_children())}".encode())


@pytest.mark.parametrize("when", [0, 4])
def test_ctrl_c_stops_the_workers_and_keeps_the_journal(make, tmp_path, whole, when):
    file, said = tmp_path / "a.csv", tmp_path / "said"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["scoresde.series.run"])
    arguments = (Make(make.log, 0.3), file, said, when)
    process = context.Process(target=interrupted, args=arguments)
    process.start()
    process.join(60)
    assert said.read_text() == "stopped 0"
    assert (tmp_path / "a.csv.partial").exists()
    assert start(make, file).evaluated <= COUNT - 16 * min(when, 1)
    assert file.read_bytes() == whole


def test_ctrl_c_in_this_process_keeps_the_journal(make, tmp_path, whole):
    file = tmp_path / "a.csv"
    with pytest.raises(KeyboardInterrupt):
        start(Make(make.log, trouble=(100, "interrupt")), file)
    assert start(make, file).evaluated == COUNT - 64
    assert file.read_bytes() == whole


@pytest.mark.parametrize("n", [1, 3, 20])
def test_parts_join_to_the_whole(make, tmp_path, whole, n):
    file = tmp_path / "a.csv"
    tables = [start(make, file, part=(i, n), batch=32) for i in range(n)]
    assert torch.equal(torch.cat([t.items for t in tables]), torch.arange(COUNT))
    assert all(a % 16 == 0 and (b % 16 == 0 or b == COUNT) for _, a, b in make.spans)
    files = [part_file(file, (i, n)) for i in range(n)]
    assert part_file(file, (1, 3)).name == "a.part-1-of-3.csv"
    assert not file.exists()
    joined = merge(files[::-1], file)
    assert file.read_bytes() == whole
    assert torch.equal(joined["nfe"], torch.cat([t["nfe"] for t in tables]))
    assert start(make, file).evaluated == 0
    assert len(merge(files)) == COUNT


def test_parts_that_do_not_fit_are_refused(make, tmp_path):
    file = tmp_path / "a.csv"
    files = [part_file(file, (i, 3)) for i in range(3)]
    start(make, file, part=(0, 3))
    start(make, file, part=(1, 3), fingerprint={**FINGERPRINT, "seed": 5})
    stopped(make, file, 200, part=(2, 3), batch=16)
    with pytest.raises(SeriesError, match=r"missing: 1, 2"):
        merge(files[:1])
    with pytest.raises(SeriesError, match="seed is 5 there and 0 here"):
        merge(files)
    with pytest.raises(SeriesError, match="twice"):
        merge([files[0], files[0]])
    with pytest.raises(SeriesError, match="is not finished"):
        merge([files[0], files[2]])
    with pytest.raises(SeriesError, match="is not there"):
        merge([tmp_path / "b.csv"])
    start(make, file, part=(1, 2))
    with pytest.raises(SeriesError, match="one of 2 parts"):
        merge([files[0], part_file(file, (1, 2))])


BAD = [
    ({"batch": 24}, "multiple of 16"),
    ({"batch": 0}, "multiple of 16"),
    ({"processes": 0}, "processes"),
    ({"threads": 0}, "threads"),
    ({"count": 0}, "count"),
    ({"part": (3, 3)}, "part"),
    ({"columns": {"item": int}}, "columns"),
    ({"columns": {"a": str}}, "columns"),
    ({"fingerprint": {"a": torch.ones(1)}}, "plain values"),
    ({"columns": {**COLUMNS, "more": float}}, "columns are"),
    ({"columns": {**COLUMNS, "nats": int}}, "'nats' of items 0 to 63 must be int"),
    ({"columns": {**COLUMNS, "nfe": bool}}, "must be bool"),
    ({"columns": {**COLUMNS, "converged": float}}, "must be float"),
]


@pytest.mark.parametrize(("bad", "said"), BAD, ids=lambda v: None if isinstance(v, dict) else v)
def test_bad_arguments_give_one_line(make, tmp_path, bad, said):
    with pytest.raises(SeriesError, match=said) as error:
        start(make, tmp_path / "a.csv", **bad)
    assert "\n" not in str(error.value)


def test_bad_files_give_one_line(make, tmp_path, monkeypatch):
    with pytest.raises(SeriesError, match=r"goes to \.csv or \.parquet"):
        start(make, tmp_path / "a.txt")
    (tmp_path / "file").touch()
    with pytest.raises(SeriesError, match="cannot write"):
        start(make, tmp_path / "file" / "a.csv")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(SeriesError, match="needs pyarrow"):
        start(make, tmp_path / "a.parquet")
    with pytest.raises(SeriesError, match="pickled"):
        start(lambda: None, tmp_path / "a.csv", processes=2)
    assert make.spans == []


def test_a_full_disk_keeps_what_was_written(make, tmp_path, whole, monkeypatch):
    file, sync, calls = tmp_path / "a.csv", os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) > 4:
            raise OSError(28, "No space left on device")
        sync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SeriesError, match=r"cannot write .*a\.csv\.partial: No space left"):
        start(make, file, batch=16)
    monkeypatch.undo()
    assert start(make, file).evaluated < COUNT
    assert file.read_bytes() == whole


def test_the_last_batches_are_shared_out():
    plan = Plan(16 * 10, {"a": "int"}, {})
    known = torch.zeros(160, dtype=torch.bool).numpy()
    known[32:48] = True
    queue = Queue(plan, known, 4, 2)
    spans = list(iter(queue.take, None))
    assert spans == [(0, 32), (48, 112), (112, 144), (144, 160)]


def test_threads_are_put_back(make, tmp_path):
    before, seen = torch.get_num_threads(), []
    start(make, tmp_path / "a.csv", threads=2,
          progress=lambda *_: seen.append(torch.get_num_threads()))  # fmt: skip
    assert seen == [2] * 4
    assert torch.get_num_threads() == before


def test_the_page_beside_the_file_says_how_it_was_made(make, tmp_path):
    start(make, tmp_path / "a.csv")
    about = json.loads((tmp_path / "a.csv.json").read_text())
    assert about["fingerprint"] == FINGERPRINT
    assert about["items"] == COUNT
    assert about["seconds"] > 0
