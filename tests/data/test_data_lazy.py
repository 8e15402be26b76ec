"""Sets that are read when needed: the same batches as in memory, whoever reads them."""

import os
import signal
import subprocess
import sys
import textwrap
import time
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import SIDE, encoded, picture, write_folder, write_zip
from PIL import Image
from safetensors.torch import save_file

from scoresde.data import (
    DataConfig,
    DataError,
    Dataset,
    Scaler,
    Share,
    choose_workers,
    load,
    load_heldout,
    load_splits,
    open_splits,
)
from scoresde.data.lazy import LazyLoader, LazySource


def batches(source, share, steps, step=0, **options):
    loader = LazyLoader(source, share, step, **options) if options else source.loader(share, step)
    with loader:
        return [next(loader) for _ in range(steps)]


def same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.x.dtype == b.x.dtype
        assert torch.equal(a.x, b.x)
        assert (a.y is None) == (b.y is None)
        if a.y is not None:
            assert a.y.dtype == b.y.dtype
            assert torch.equal(a.y, b.y)


def lazily(path, **fields):
    train, held = open_splits(DataConfig(str(path), memory=0, **fields))
    assert isinstance(train, LazySource)
    return train, held


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("folder") / "set")


# The same data, however they lie and are read


def a_folder(at):
    return write_folder(at / "set")


def a_zip(at):
    return write_zip(at / "set.zip")


def npy(at):
    np.save(at / "faces.npy", np.stack([picture(i) for i in range(60)]))
    np.save(at / "faces_y.npy", np.arange(60) % 3)
    return at / "faces.npy"


def folder_of_arrays(at):
    (at / "set").mkdir()
    np.save(at / "set" / "x.npy", np.random.default_rng(0).normal(size=(60, 2, 3)))
    np.save(at / "set" / "c.npy", np.random.default_rng(1).normal(size=(60, 5)))
    return at / "set"


def npz(at):
    y = np.random.default_rng(1).normal(size=(60, 4))
    np.savez(at / "a.npz", x=np.asfortranarray(np.stack([picture(i) for i in range(60)])), y=y)
    return at / "a.npz"


def packed(at):
    x = np.random.default_rng(0).normal(size=(60, 7))
    np.savez_compressed(at / "a.npz", x=x, y=np.arange(60) % 4)
    return at / "a.npz"


def parquet(at):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    cells = [{"bytes": encoded(i), "path": None} for i in range(60)]
    (at / "set").mkdir()
    for k in range(2):
        some = slice(30 * k, 30 * k + 30)
        labels = [i % 3 for i in range(60)][some]
        table = pa.table({"image": cells[some], "label": labels})
        pq.write_table(table, at / "set" / f"train-0000{k}-of-00002.parquet", row_group_size=7)
    return at / "set"


def hub(at):
    pytest.importorskip("datasets")
    return f"hf:{parquet(at)}"


def parquet_of_numbers(at):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rng = np.random.default_rng(0)
    pq.write_table(
        pa.table({
            "a": rng.normal(size=60), "b": rng.integers(0, 9, 60),
            "condition": rng.normal(size=(60, 3)).tolist(),
        }),
        at / "t.parquet",
    )  # fmt: skip
    return at / "t.parquet"


def latent_files(at):
    (at / "set").mkdir()
    for i in range(60):
        x = np.random.default_rng(i).normal(size=(2, 3, 3)).astype(np.float16)
        np.savez(at / "set" / f"{i}.npz", latents=x, y=i % 5)
    return at / "set"


def latent_shards(at):
    (at / "set").mkdir()
    for k, n in enumerate((10, 30, 20)):
        g = torch.Generator().manual_seed(k)
        x = torch.randn(n, 2, 3, 3, generator=g).bfloat16()
        save_file({"x": x, "y": torch.randn(n, 4)}, at / "set" / f"{k}.safetensors")
    return at / "set"


KINDS = [
    a_folder, a_zip, npy, folder_of_arrays, npz, packed, parquet, hub, parquet_of_numbers,
    latent_files, latent_shards,
]  # fmt: skip


@pytest.mark.parametrize("make", KINDS)
def test_batches_are_those_of_the_set_in_memory(tmp_path, monkeypatch, make):
    if make is hub:
        from datasets import config

        monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    at = make(tmp_path)
    train, held = open_splits(DataConfig(str(at)))
    there, kept = lazily(at)
    assert isinstance(train, Dataset)
    assert (train.size, train.shape, train.levels) == (there.size, there.shape, there.levels)
    assert train.size == 54
    assert (train.class_names, train.num_classes) == (there.class_names, there.num_classes)
    assert train.vectors == there.vectors
    assert (train.num_classes is None) != (train.vectors is None)
    assert torch.equal(train.probe(20), there.probe(20))
    same([held], [kept])
    share = Share(8, seed=3)
    same(batches(train, share, 9), batches(there, share, 9))


@pytest.mark.parametrize("make", KINDS)
def test_the_held_out_items_are_those_of_load_splits(tmp_path, monkeypatch, make):
    if make is hub:
        from datasets import config

        monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    at = make(tmp_path)
    config_ = DataConfig(str(at), memory=0, heldout=0.3, seed=5)
    train, held = load_splits(config_)
    there, kept = open_splits(config_)
    same([held], [kept])
    same([load_heldout(config_)], [kept])
    same([train], [there.load()])
    every = load(str(at))
    assert len(every) == 60
    whole = torch.cat([train.x, held.x]).double().flatten(1).sum(1).sort().values
    assert torch.equal(whole, every.x.double().flatten(1).sum(1).sort().values)


def test_what_is_unpacked_is_kept_until_its_source_changes(tmp_path, cache):
    at = packed(tmp_path)
    lazily(at)
    lazily(at)
    assert len(list(cache.iterdir())) == 2  # x and y
    status = at.stat()
    os.utime(at, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))  # as long as it was
    lazily(at)
    assert len(list(cache.iterdir())) == 4
    np.savez_compressed(at, x=np.ones((60, 7)))
    assert lazily(at)[0].probe(3).unique().tolist() == [1.0]
    assert len(list(cache.iterdir())) == 5


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_what_was_saved(tmp_path, order, save):
    x = np.random.default_rng(0).normal(size=(6, 2, 3)).astype(np.float32)
    save(tmp_path / "a.npz", other=np.zeros(3), x=np.asarray(x, order=order))
    config = DataConfig(str(tmp_path / "a.npz"), memory=0, heldout=0.2)
    train, _ = open_splits(config)
    assert torch.equal(train.load().x, torch.from_numpy(x)[train.index])


def test_a_place_that_takes_nothing_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SCORESDE_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"a\.npz: it must be unpacked.*SCORESDE_CACHE"):
        lazily(packed(tmp_path))


def test_small_sets_are_held_and_large_ones_not(folder):
    one = 3 * SIDE * SIDE
    assert 60 * one < 2**20
    assert isinstance(open_splits(DataConfig(str(folder), memory=1))[0], Dataset)
    data, _ = lazily(folder)
    assert data.items.nbytes == 60 * one
    assert choose_workers(data) >= 1
    assert choose_workers(load(str(folder))) == 0


def test_few_held_out_items_are_kept_and_spread(tmp_path, monkeypatch):
    monkeypatch.setattr("scoresde.data.sources.HELD", 4)
    for split in ("train", "test"):
        write_folder(tmp_path / split, 12)
    _, held = lazily(tmp_path)
    assert held.x[:, 0, 0, 0].tolist() == [0, 3, 6, 9]
    assert held.y.tolist() == [0, 0, 1, 2]
    _, seeded = lazily(write_folder(tmp_path / "other"), heldout=0.2)
    assert torch.equal(
        seeded.x, load_splits(DataConfig(str(tmp_path / "other"), heldout=0.2))[1].x[:4]
    )


# Whoever reads


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("make", [write_folder, write_zip])
def test_workers_read_what_one_process_reads(tmp_path, make, workers):
    train, _ = lazily(make(tmp_path / "set.zip"))
    state = torch.random.get_rng_state()
    theirs = batches(train, Share(8, workers=workers), 9)
    assert torch.equal(torch.random.get_rng_state(), state)
    same(batches(train, Share(8), 9), theirs)
    assert [b.where for b in theirs] == [b.where for b in batches(train, Share(8), 9)]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs the open files of Linux")
def test_workers_do_not_share_a_place_in_a_zip(tmp_path):
    train, _ = lazily(write_zip(tmp_path / "a.zip"))
    fds = [int(fd) for fd in os.listdir("/proc/self/fd")]
    path = str(tmp_path / "a.zip")
    fds = [fd for fd in fds if os.path.realpath(f"/proc/self/fd/{fd}") == path]
    assert fds  # it is open here since it was looked at
    places = [os.lseek(fd, 0, os.SEEK_CUR) for fd in fds]
    batches(train, Share(6, workers=2), 3, context="fork")
    assert [os.lseek(fd, 0, os.SEEK_CUR) for fd in fds] == places


def test_spawned_workers_read_a_zip(tmp_path):
    train, _ = lazily(write_zip(tmp_path / "set.zip"))
    train.probe(4)  # the archive is open here
    same(batches(train, Share(8), 3), batches(train, Share(8, workers=1), 3, context="spawn"))


def test_ranks_share_a_batch(folder):
    train, _ = lazily(folder)
    whole = batches(train, Share(12, seed=1), 6)
    parts = [batches(train, Share(12, 1, rank, 3), 6) for rank in range(3)]
    for k, batch in enumerate(whole):
        assert torch.equal(batch.x, torch.cat([part[k].x for part in parts]))
        assert torch.equal(batch.y, torch.cat([part[k].y for part in parts]))
        assert batch.where == sum((part[k].where for part in parts), ())
    data = load(str(folder))
    whole = batches(data, Share(12), 3)
    parts = [batches(data, Share(12, rank=rank, world=2), 3) for rank in range(2)]
    assert torch.equal(whole[2].x, torch.cat([part[2].x for part in parts]))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_begins_at_any_step(folder, workers):
    train, _ = lazily(folder)
    share = Share(8, seed=4, workers=workers)
    whole = batches(train, Share(8, seed=4), 12)
    same(whole[9:], batches(train, share, 3, step=9))
    same(whole[9:], batches(load_splits(DataConfig(str(folder)))[0], share, 3, step=9))
    with train.loader(share) as loader:
        next(loader)
        assert loader.state() == {}


def test_a_pass_has_every_item_once(folder):
    train, _ = lazily(folder)
    seen = [name for b in batches(train, Share(9), 6) for name in b.where]
    assert len(set(seen)) == len(seen) == 54
    names = {name for b in batches(train, Share(9), 6, step=6) for name in b.where}
    assert names == set(seen)


def test_labels_and_names_are_those_of_the_pictures(folder):
    train, _ = lazily(folder)
    for batch in batches(train, Share(8), 3):
        for x, y, where in zip(batch.x, batch.y, batch.where, strict=True):
            number = int(where[-7:-4])
            assert (int(x[0, 0, 0]), int(y)) == (number, number * 3 // 60)
            assert torch.equal(x, torch.from_numpy(picture(number)).permute(2, 0, 1))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"batch": 10, "world": 4}, "10 items cannot be shared by 4"),
        ({"batch": 4, "world": 2, "rank": 2}, "rank 2"),
        ({"batch": 0}, "batch of 0"),
        ({"batch": 1, "workers": -1}, "workers"),
    ],
)
def test_impossible_shares_are_refused(fields, said):
    with pytest.raises(DataError, match=said):
        Share(**fields)


# Memory


def test_a_large_array_is_not_read_whole(tmp_path):
    at = tmp_path / "x.npy"
    array = np.lib.format.open_memmap(at, "w+", np.uint8, (4000, 3, 64, 64))  # 47 MiB
    array[:] = np.arange(4000, dtype=np.uint8)[:, None, None, None]
    del array
    tracemalloc.start()
    train, held = open_splits(DataConfig(str(at), memory=8))
    [batch] = batches(train, Share(16), 1)
    train.probe(5000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(train, LazySource)
    assert batch.x.shape == (16, 3, 64, 64)
    assert len(held) == 400
    assert peak < 12 * 2**20
    assert len(train.probe(5000)) * 8 * 3 * 64 * 64 <= 8 * 2**20


def test_the_held_out_part_fits_the_memory(tmp_path):
    at = tmp_path / "x.npy"
    np.save(at, np.zeros((1000, 32, 32), np.uint8))  # of these 1 KiB, 500 are held out
    _, held = open_splits(DataConfig(str(at), memory=0, heldout=0.5))
    assert len(held) == 64


# Items that cannot be read


def damage(folder, *numbers, how=lambda b: b[: len(b) // 2]):
    for i in numbers:
        [file] = folder.rglob(f"{i:03}.png")
        file.write_bytes(how(file.read_bytes()))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_picture_is_replaced_and_named_once(tmp_path, workers):
    folder = write_folder(tmp_path / "set")
    names = [n for b in batches(lazily(folder)[0], Share(54), 1) for n in b.where]
    order = [int(lazily(folder)[0].index[k]) for k in range(54)]
    bad, after = order[10], order[11]
    damage(folder, bad)
    for memory in (0, 512):
        train, _ = open_splits(DataConfig(str(folder), memory=memory))
        found = batches(train, Share(9, workers=workers), 18)  # three passes
        notes = [note for b in found for note in b.notes]
        assert len(notes) == 1
        name = f"c{bad * 3 // 60}/{bad:03}.png"
        assert notes[0].startswith(f"{name}: cannot be read as a picture: ")
        assert notes[0].endswith(f"; c{after * 3 // 60}/{after:03}.png stands in for it")
        first = [int(x[0, 0, 0]) for b in found[:6] for x in b.x]
        assert sorted(first) == sorted([i for i in order if i != bad] + [after])
        labels = [int(y) for b in found[:6] for y in b.y]
        assert labels == [i * 3 // 60 for i in first]
    assert name in names


def test_empty_and_missing_files_are_replaced(tmp_path):
    folder = write_folder(tmp_path / "set")
    train, _ = lazily(folder)
    a, b, c = (int(i) for i in train.index[[20, 21, 22]])
    damage(folder, a, how=lambda _: b"")
    [file] = folder.rglob(f"{b:03}.png")
    file.unlink()  # after the set was opened
    [batch] = batches(train, Share(54), 1)
    values = batch.x[:, 0, 0, 0].tolist()
    assert (values.count(a), values.count(b), values.count(c)) == (0, 0, 3)
    assert sum(f"{c:03}.png stands in" in note for note in batch.notes) == 2


def test_a_held_out_item_that_cannot_be_read_is_left_out(tmp_path):
    folder = write_folder(tmp_path / "set")
    before = lazily(folder)[1]
    bad = int(before.x[2, 0, 0, 0])
    damage(folder, bad)
    for memory in (0, 512):
        config = DataConfig(str(folder), memory=memory)
        train, held = open_splits(config)
        rest = torch.cat([before.x[:2], before.x[3:]])
        assert torch.equal(held.x, rest)
        assert torch.equal(load_splits(config)[1].x, rest)
        assert torch.equal(load_heldout(config).x, rest)
        assert len(held.y) == len(rest)
        [batch] = batches(train, Share(8), 1)
        assert [n for n in batch.notes if f"{bad:03}.png" in n and n.endswith("it is left out")]


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_damaged_pictures_end_it(tmp_path, workers):
    folder = write_folder(tmp_path / "set")
    train, _ = lazily(folder, unreadable=2)
    bad = [int(i) for i in train.index[[5, 25, 45]]]
    damage(folder, *bad[:2])
    assert len(batches(train, Share(9, workers=workers), 12)) == 12
    damage(folder, bad[2])
    with pytest.raises(DataError, match=r"more than 2 items .* last: c\d/\d+\.png") as caught:
        batches(train, Share(9, workers=workers), 12)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"more than 2"):
        open_splits(DataConfig(str(folder), unreadable=2))
    strict, _ = open_splits(DataConfig(str(folder), memory=0, unreadable=0, heldout=0.1))
    with pytest.raises(DataError, match=r"^c\d/\d+\.png: cannot be read") as caught:
        batches(strict, Share(9, workers=workers), 12)


def test_nothing_readable_ends_it(tmp_path):
    folder = write_folder(tmp_path / "set", 30)
    train, _ = lazily(folder)
    damage(folder, *range(30))
    with pytest.raises(DataError, match="more than 10"):
        batches(train, Share(2), 1)
    with pytest.raises(DataError, match="cannot be read"):
        lazily(folder)


def seen_and_unseen(folder, n):
    """A picture that the survey of a folder does not look at."""
    from scoresde.data.dataset import spread
    from scoresde.data.pictures import SURVEYED

    looked = set(spread(n, SURVEYED).tolist())
    return next(i for i in range(n) if i not in looked)


@pytest.mark.parametrize("workers", [0, 1])
def test_another_size_is_an_error_wherever_it_comes(tmp_path, workers):
    folder = write_folder(tmp_path / "set")
    odd = seen_and_unseen(folder, 60)
    damage(folder, odd, how=lambda _: encoded(odd, SIDE + 1))
    train, _ = lazily(folder, heldout=0.02)
    with pytest.raises(DataError, match=rf"000\.png is 6x6 but .*{odd:03}\.png is 7x7; set data"):
        batches(train, Share(9, workers=workers), 7)
    with pytest.raises(DataError, match=rf"{odd:03}\.png is 7x7"):
        load(str(folder))
    train, _ = lazily(folder, size=5)
    assert batches(train, Share(9), 1)[0].x.shape[1:] == (3, 5, 5)
    damage(folder, 0, how=lambda _: encoded(0, SIDE + 1))
    with pytest.raises(DataError, match=r"set data\.size"):
        lazily(folder)


def test_colours_among_grey_pictures(tmp_path):
    for i in range(60):
        (tmp_path / "set").mkdir(exist_ok=True)
        Image.fromarray(np.full((4, 4), i, np.uint8)).save(tmp_path / "set" / f"{i:03}.png")
    odd = seen_and_unseen(tmp_path, 60)
    assert lazily(tmp_path / "set")[0].shape == (1, 4, 4)
    damage(tmp_path / "set", odd, how=lambda _: encoded(odd, 4))
    assert load(str(tmp_path / "set")).shape == (3, 4, 4)
    train, held = load_splits(DataConfig(str(tmp_path / "set")))
    assert train.shape == held.shape == (3, 4, 4)
    train, _ = lazily(tmp_path / "set", heldout=0.02)
    with pytest.raises(DataError, match=rf"{odd:03}\.png has colours, but 000\.png"):
        batches(train, Share(10), 6)


# Workers that die


def pids(loader):
    return [worker.pid for worker in loader._workers._running._workers]


def test_a_killed_worker_loses_and_repeats_no_batch(folder):
    train, _ = lazily(folder)
    wanted = batches(train, Share(8), 12)
    found = []
    with train.loader(Share(8, workers=2)) as loader:
        for step in range(12):
            if step in (3, 7):
                os.kill(pids(loader)[step % 2], signal.SIGKILL)
                time.sleep(0.3)  # nothing is raised here, where a step might be running
            found.append(next(loader))
    same(wanted, found)
    notes = [note for b in found for note in b.notes]
    assert len(notes) == 2
    assert "was killed; started again at the batch of step" in notes[0]


def test_workers_that_go_on_dying_end_it(folder, monkeypatch):
    train, _ = lazily(folder)
    monkeypatch.setattr("scoresde.data.workers.RESTARTS", 1)
    with train.loader(Share(8, workers=1)) as loader:
        next(loader)

        def kill_and_go_on():
            for _ in range(40):
                os.kill(pids(loader)[0], signal.SIGKILL)
                next(loader)

        with pytest.raises(DataError, match="was killed, 2 times"):
            kill_and_go_on()


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_signals_to_all_processes_leave_no_tracebacks(folder, context):
    code = f"""
    import signal, sys, time
    from scoresde.data import DataConfig, Share, open_splits
    from scoresde.data.lazy import LazyLoader

    def stop(*_):
        raise KeyboardInterrupt

    if __name__ == "__main__":
        signal.signal(signal.SIGTERM, stop)
        train, _ = open_splits(DataConfig({str(folder)!r}, memory=0))
        for _ in range(2):
            loader = LazyLoader(train, Share(8, workers=2), context={context!r})
            try:
                next(loader)
                print("ready", flush=True)
                while True:
                    next(loader)
            except KeyboardInterrupt:
                loader.close()
                print("stopped", flush=True)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    for sent in (signal.SIGINT, signal.SIGTERM):
        assert process.stdout.readline() == "ready\n"
        os.killpg(process.pid, sent)
        assert process.stdout.readline() == "stopped\n"
    assert process.communicate(timeout=30) == ("", "")


@pytest.mark.parametrize("mode", ["range", "standardize", "standardize-per-dim", "none"])
def test_a_scaler_is_fitted_to_a_probe(tmp_path, mode):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(3, 2, (60, 2, 3)))
    train, _ = open_splits(DataConfig(str(tmp_path / "x.npy")))
    assert Scaler.fit(lazily(tmp_path / "x.npy")[0], mode) == Scaler.fit(train, mode)
