"""Streams of tar shards: their order, resumption and damage."""

import json
import os
import pickle
import signal
import tarfile
import tracemalloc
from itertools import islice

import numpy as np
import pytest
from tar_streams import ids, pictures, png, same, write

from scoresde.data import DataError, Share
from scoresde.data.shards import TarShards
from scoresde.data.stream import Lane, Order, Position
from scoresde.data.stream_items import Form
from scoresde.data.stream_source import StreamSource

ITEMS = (7, 9, 8)  # in three shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder, start, paths = tmp_path_factory.mktemp("shards"), 0, []
    for k, count in enumerate(ITEMS):
        paths.append(write(folder / f"{k}.tar", pictures(range(start, start + count))))
        start += count
    return TarShards("three", tuple(paths))


FORM = Form("three", (1, 4, 4), 256, classes=3)


@pytest.fixture
def source(shards):
    return StreamSource(shards, FORM, tuple("012"), buffer=4)


@pytest.mark.parametrize("lanes", [1, 2, 3, 4, 5])
def test_lanes_are_disjoint_and_together_all_items_of_each_pass(shards, lanes):
    passes = []
    for epoch in range(3):
        found = []
        for lane in range(lanes):
            reader = Lane(shards, Order(lane, lanes, 4, seed=1), Position(epoch))
            while reader.position().epoch == epoch:
                found += ids(reader.draw(1, FORM, 0).x)
            found.pop()  # the first item of the next pass
        assert sorted(found) == list(range(sum(ITEMS)))
        passes.append(found)
    assert passes[0] != passes[1] != passes[2] != passes[0]


def test_blocks_are_permuted_but_hold_what_was_read_in_order(shards):
    single = TarShards("one", shards.paths[1:2])
    lane = Lane(single, Order(0, 1, 4, seed=3), Position())
    found = ids(lane.draw(9, FORM, 0).x)
    first, second = found[:4], found[4:8]
    assert sorted(first) == [7, 8, 9, 10]
    assert sorted(second) == [11, 12, 13, 14]
    assert [i - 7 for i in first] != [i - 11 for i in second]  # each block has its permutation
    other = ids(Lane(single, Order(0, 1, 4, seed=4), Position()).draw(9, FORM, 0).x)
    assert other != found


def test_permutations_differ_by_seed_pass_lane_and_block():
    def block(seed=0, lane=0, epoch=0, number=0):
        return tuple(Order(lane, 2, 64, seed).block(epoch, number, 64))

    found = {block(), block(seed=1), block(lane=1), block(epoch=1), block(number=1)}
    assert len(found) == 5
    assert block() == block()
    assert Order(0, 1, 4, 0).shards(0, 64) != Order(0, 1, 4, 0).shards(1, 64)


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stream_goes_on_bit_for_bit(shards, workers, rank):
    source = StreamSource(shards, FORM, tuple("012"), held=2, buffer=4)
    share = Share(6, seed=5, rank=rank, world=2, workers=workers)
    with source.loader(share) as loader:
        states, batches = [loader.state()], []
        for batch in islice(loader, 21):
            batches.append(batch)
            states.append(loader.state())
    epochs = {lane["epoch"] for state in states for lane in state["lanes"]}
    assert len(epochs) > 2  # past the ends of passes
    assert any(lane["used"] % 4 for state in states for lane in state["lanes"])  # inside blocks
    for step in (1, 5, 8, 13) if workers else range(18):
        state = json.loads(json.dumps(states[step]))
        with source.loader(share, step, state) as loader:
            assert all(same(a, b) for a, b in zip(islice(loader, 3), batches[step:], strict=False))
            assert loader.state() == states[step + 3]
    with source.loader(share, 13) as loader:  # without a state all is read again
        assert same(next(loader), batches[13])
        assert same(next(loader), batches[14])
    assert all(
        len(batch.x) == 3 and batch.y.tolist() == [i % 3 for i in ids(batch.x)]
        for batch in batches
    )


def test_batches_differ_between_ranks_and_seeds(source):
    def first(**share):
        with source.loader(Share(6, world=2, **share)) as loader:
            return [ids(batch.x) for batch in islice(loader, 2)]

    assert first(rank=0, seed=1) == first(rank=0, seed=1)
    mine, other = (first(rank=rank, seed=1) for rank in (0, 1))
    assert not {i for batch in mine for i in batch} & {i for batch in other for i in batch}
    assert first(rank=0, seed=1) != first(rank=0, seed=2)


def test_readers_take_turns(shards):
    """The batch of step n is that of reader n mod workers, which reads a lane of its own."""
    source = StreamSource(shards, FORM, tuple("012"), buffer=4)
    with source.loader(Share(2, seed=2, workers=2)) as loader:
        found = [ids(batch.x) for batch in islice(loader, 8)]
    for reader in range(2):
        lane = Lane(shards, Order(reader, 2, 4, seed=2), Position())
        assert found[reader::2] == [ids(lane.draw(2, FORM, 0).x) for _ in range(4)]


def test_a_state_of_other_terms_begins_a_fresh_pass(source):
    with source.loader(Share(4, workers=0)) as loader:
        for _ in islice(loader, 7):  # 28 of 24 items
            pass
        state = loader.state()
    with source.loader(Share(4, seed=9), 7, state) as loader:
        batch = next(loader)
    assert any("cannot go on" in note and "seed was 0 and is 9" in note for note in batch.notes)
    fresh = Lane(source.shards, Order(0, 1, 4, seed=9), Position(2))
    assert ids(batch.x) == ids(fresh.draw(4, FORM, 0).x)
    with source.loader(Share(4), 7, state) as loader:
        assert not next(loader).notes
    with pytest.raises(DataError, match="no state of a stream"):
        source.loader(Share(4), 7, {"lanes": 3})


def test_few_shards_for_many_readers_are_noted_once(source):
    with source.loader(Share(4, world=4)) as loader:
        first, second = islice(loader, 2)
    assert "fewer shards (3) than readers (4)" in first.notes[0]
    assert not second.notes


def test_a_killed_reader_is_replaced_and_nothing_is_lost(source):
    share = Share(2, seed=1, workers=2)
    with source.loader(share) as loader:
        expected = [ids(batch.x) for batch in islice(loader, 12)]
    with source.loader(share) as loader:
        found = [ids(batch.x) for batch in islice(loader, 3)]
        victim = loader._workers._running._workers[1]
        os.kill(victim.pid, signal.SIGKILL)
        victim.join()
        notes = []
        for batch in islice(loader, 9):
            found.append(ids(batch.x))
            notes += batch.notes
    assert found == expected
    assert any("was killed" in note for note in notes)


def test_an_unreadable_item_is_replaced_named_once_and_too_many_stop(tmp_path):
    members = dict(pictures(range(8)))
    members["000002.png"] = b"no picture"
    members["000005.png"] = png(np.zeros((5, 4)))  # of another size
    del members["000006.cls"]
    shards = TarShards("damaged", (write(tmp_path / "a.tar", members.items()),))
    source = StreamSource(shards, FORM, tuple("012"), buffer=4, unreadable=3)
    with source.loader(Share(4, seed=1)) as loader:
        batches = list(islice(loader, 6))
        state = loader.state()
    notes = [note for batch in batches for note in batch.notes]
    assert len(notes) == 3
    for name, why in (("2", "no known format"), ("5", "shape"), ("6", "no label")):
        assert any(f"a.tar/00000{name}" in note and why in note for note in notes)
    for k, batch in enumerate(batches):  # block by block, and replaced within it
        assert set(ids(batch.x)) == ({0, 1, 3} if k % 2 == 0 else {4, 7})
    with source.loader(Share(4, seed=1)) as loader, source.loader(Share(4, seed=1), 6) as replay:
        again = next(islice(loader, 6, None))
        assert same(again, next(replay))
    with source.loader(Share(4, seed=1), 6, state) as loader:
        assert same(again, next(loader))
    strict = StreamSource(shards, FORM, tuple("012"), buffer=4, unreadable=2)
    for workers in (0, 1):
        with (
            strict.loader(Share(4, seed=1, workers=workers)) as loader,
            pytest.raises(DataError, match="more than 2 items cannot be read"),
        ):
            list(islice(loader, 6))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_an_error_has_kept_back_comes_again(tmp_path, workers):
    members = dict(pictures(range(8)))
    for number in (2, 5, 6):
        members[f"00000{number}.png"] = b"no picture"
    shards = TarShards("damaged", (write(tmp_path / "a.tar", members.items()),))
    share = Share(2, seed=1, workers=workers)
    patient = StreamSource(shards, FORM, tuple("012"), buffer=4, unreadable=3)
    with patient.loader(share) as loader:
        batches = list(islice(loader, 8))
    with StreamSource(shards, FORM, tuple("012"), buffer=4, unreadable=2).loader(share) as loader:
        done = []
        with pytest.raises(DataError, match="more than 2"):
            done.extend(loader)
        state = loader.state()
    assert 0 < len(done) < 7
    with patient.loader(share, len(done), state) as loader:
        assert same(next(loader), batches[len(done)])


def test_a_block_without_a_readable_item_borrows_from_the_next(tmp_path):
    members = dict(pictures(range(4)))
    members["000001.png"] = b""
    shards = TarShards("damaged", (write(tmp_path / "a.tar", members.items()),))
    lane = Lane(shards, Order(0, 1, 1, seed=0), Position())  # blocks of one record
    draws = [lane.draw(1, FORM, 1) for _ in range(8)]
    assert [ids(draw.x)[0] for draw in draws] == [0, 2, 2, 3, 0, 2, 2, 3]
    for draw, (value,) in zip(draws, [[2], [2], [3], [0], [2], [2], [3], [0]], strict=True):
        assert ids(Lane(shards, Order(0, 1, 1, seed=0), draw.position).draw(1, FORM, 1).x) == [
            value
        ]


def test_a_label_outside_the_classes_stops(source):
    few = StreamSource(source.shards, Form("three", (1, 4, 4), 256, classes=2), ("0", "1"))
    with (
        few.loader(Share(24)) as loader,
        pytest.raises(DataError, match="label is 2, but three has 2"),
    ):
        next(loader)


@pytest.mark.parametrize("where", ["inside", "header", "boundary", "garbage", "size"])
def test_a_truncated_shard_is_used_as_far_as_it_goes(tmp_path, shards, where):
    content = bytearray(shards.paths[0].read_bytes())
    with tarfile.open(shards.paths[0]) as tar:
        member = tar.getmembers()[8]  # the picture of item 4
    cut = {"inside": member.offset_data + 10, "header": member.offset + 100}.get(
        where, member.offset
    )
    if where == "garbage":
        content[cut : cut + 512] = b"x" * 512
        cut = len(content)
    elif where == "size":  # a header whose checksum is right and whose size is not
        member.size = 2**80
        content[cut : cut + 512] = member.tobuf(tarfile.GNU_FORMAT)[:512]
        cut = len(content)
    path = tmp_path / "short.tar"
    path.write_bytes(content[:cut])
    source = StreamSource(
        TarShards("short", (path, *shards.paths[1:])), FORM, tuple("012"), buffer=4
    )
    with source.loader(Share(7, seed=2)) as loader:
        batches = list(islice(loader, 6))  # two passes of 4 + 9 + 8 items
    for half in (batches[:3], batches[3:]):
        assert sorted(i for batch in half for i in ids(batch.x)) == [0, 1, 2, 3, *range(7, 24)]
    notes = [note for batch in batches for note in batch.notes]
    assert len(notes) == 1
    assert notes[0].startswith("short.tar: is cut short or damaged")


def test_a_missing_or_empty_stream_is_an_error(tmp_path, shards):
    gone = StreamSource(TarShards("gone", (tmp_path / "gone.tar",)), FORM)
    for workers in (0, 1):
        with (
            gone.loader(Share(2, workers=workers)) as loader,
            pytest.raises(DataError, match=r"gone\.tar"),
        ):
            next(loader)
    empty = TarShards("empty", (write(tmp_path / "empty.tar", []),))
    with (
        StreamSource(empty, FORM).loader(Share(2)) as loader,
        pytest.raises(DataError, match="nothing to read"),
    ):
        next(loader)


def test_positions_of_a_tar_are_where_records_begin(shards):
    cursor = shards.open(0)
    records = []
    while True:
        at = cursor.position()
        try:
            records.append((at, next(cursor)))
        except StopIteration:
            break
    assert [r.where for _, r in records] == [f"0.tar/{i:06d}" for i in range(7)]
    for k, (position, record) in enumerate(records):
        again = shards.open(0, position)
        assert next(again) == record
        if k + 1 < len(records):
            assert next(again) == records[k + 1][1]
    end = shards.open(0, at)
    assert end.position() == at
    with pytest.raises(StopIteration):
        next(end)


def test_long_names_hidden_files_folders_and_other_suffixes(tmp_path):
    deep = "a/" * 60 + "x" * 80
    members = [
        ("._one.png", b"junk"),
        (".hidden/two.png", b"junk"),
        ("one.txt", b"a caption"),
        ("one.png", png(np.full((4, 4), 1))),
        (f"{deep}.png", png(np.full((4, 4), 2))),
        ("b/one.PNG", png(np.full((4, 4), 3))),
        ("b/one.png", png(np.full((4, 4), 4))),
    ]
    shards = TarShards("odd", (write(tmp_path / "odd.tar", members),))
    cursor = shards.open(0)
    positions, records = [cursor.position()], []
    for _ in range(4):
        records.append(next(cursor))
        positions.append(cursor.position())
    assert [r.where for r in records] == [f"odd.tar/{k}" for k in ("one", deep, "b/one", "b/one")]
    assert all(next(shards.open(0, p)) == r for p, r in zip(positions, records, strict=False))


def test_what_a_worker_gets_can_be_pickled(source):
    """As it must be where workers are spawned, not forked."""
    with source.loader(Share(2, seed=1, workers=1)) as loader:
        reading = pickle.loads(pickle.dumps(loader._reading()[0]))
        assert next(iter(reading)).where == next(loader).where


def test_a_block_is_all_that_a_reader_keeps(tmp_path):
    """Memory does not grow with the shard: neither members nor blocks are kept."""
    write(tmp_path / "a.tar", [(f"{i}.png", png(np.full((4, 4), i % 200))) for i in range(2000)])
    shards = TarShards("a", (tmp_path / "a.tar",))
    lane = Lane(shards, Order(0, 1, 16, seed=0), Position())
    form = Form("a", (1, 4, 4), 256)
    tracemalloc.start()
    try:
        for draws in (20, 80):
            before = tracemalloc.get_traced_memory()[0]
            for _ in range(draws):
                lane.draw(16, form, 0)
        # 1280 members alone would take more than half a megabyte.
        assert tracemalloc.get_traced_memory()[0] < before + 50_000
    finally:
        tracemalloc.stop()


def test_skipping_decodes_nothing(source, monkeypatch):
    monkeypatch.setattr(Form, "item", lambda *a: pytest.fail("decoded"))
    lane = Lane(source.shards, Order(0, 1, 4, seed=0), Position(used=50))
    assert lane.position().epoch == 2
