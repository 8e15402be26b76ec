"""Streams of Hugging Face data sets, from local folders of parquet and of tar files."""

import json
from itertools import islice

import numpy as np
import pytest
import torch
from tar_streams import ids, pictures, png, same, write

from scoresde.data import DataError, Share
from scoresde.data.hub_stream import open_hub_stream
from scoresde.data.stream_splits import open_stream

hub = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
SHARDS = (30, 25, 25)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """No data set is asked for by anyone else, nor kept."""
    patch = pytest.MonkeyPatch()
    patch.setattr(hub.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    yield
    patch.undo()


def parquet(path, numbers, group=7):
    """A file of grey pictures of one value each, with named classes, in groups of rows."""
    info = {
        "label": {"_type": "ClassLabel", "names": ["a", "b", "c"]},
        "image": {"_type": "Image"},
    }
    cells = [{"bytes": png(np.full((4, 4), i)), "path": f"{i}.png"} for i in numbers]
    table = pa.table({"image": cells, "label": [i % 3 for i in numbers]})
    table = table.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": info}})}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pa.parquet.write_table(table, path, row_group_size=group)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import pyarrow.parquet  # noqa: F401

    root, start = tmp_path_factory.mktemp("parquet"), 0
    for k, count in enumerate(SHARDS):
        parquet(root / "data" / f"train-{k:05d}-of-00003.parquet", range(start, start + count))
        start += count
    return root


@pytest.fixture(scope="module")
def source(folder):
    return open_stream(f"hf:{folder}", buffer=8)


def test_what_a_hub_stream_is(source, folder):
    train, held = source
    assert (train.shape, train.levels, train.num_classes) == ((1, 4, 4), 256, 3)
    assert train.class_names == held.class_names == ("a", "b", "c")
    assert len(train.shards) == 3
    assert ids(held.x) == list(range(15))
    assert held.y.tolist() == [i % 3 for i in range(15)]
    assert set(ids(train.probe(200))) == set(range(15, 80))
    with pytest.raises(DataError, match=r"has 3 classes, but data\.classes is 5"):
        open_stream(f"hf:{folder}", classes=5)


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (4, 0), (2, 2)])
def test_a_hub_stream_goes_on_bit_for_bit_and_gives_all_items(source, world, workers):
    train, seen = source[0], []
    for rank in range(world):
        share = Share(4 * world, seed=5, rank=rank, world=world, workers=workers)
        with train.loader(share) as loader:
            states, batches = [loader.state()], []
            for batch in islice(loader, max(40 // world, 10)):
                batches.append(batch)
                states.append(loader.state())
        seen += [i for batch in batches for i in ids(batch.x)]
        assert all(batch.y.tolist() == [i % 3 for i in ids(batch.x)] for batch in batches)
        for step in (0, 3, 6) if rank == world - 1 else ():
            state = json.loads(json.dumps(states[step]))
            for k in range(step, step + 4, 2):  # and again from the state of what was resumed
                with train.loader(share, k, state) as loader:
                    assert all(same(batch, next(loader)) for batch in batches[k : k + 2])
                    state = json.loads(json.dumps(loader.state()))
    assert set(seen) == set(range(15, 80))


def test_tar_files_through_datasets(tmp_path):
    for k in range(2):
        write(tmp_path / f"train-{k}.tar", pictures(range(10 * k, 10 * k + 10)))
    write(tmp_path / "test-0.tar", pictures([50, 51]))
    train, held = open_stream(f"hf:{tmp_path}", classes=3, buffer=4)
    assert (train.shape, len(train.shards), ids(held.x)) == ((1, 4, 4), 2, [50, 51])
    share = Share(4, seed=1)
    with train.loader(share) as loader:
        batches = list(islice(loader, 3))
        state = loader.state()
        batches += list(islice(loader, 4))
    assert sorted(i for batch in batches[:5] for i in ids(batch.x)) == list(range(20))
    assert batches[0].where[0].split("/")[-1] == f"{ids(batches[0].x)[0]:06d}"
    with train.loader(share, 3, state) as loader:
        assert all(same(a, b) for a, b in zip(islice(loader, 4), batches[3:], strict=True))


def test_numbers_and_missing_sets(tmp_path):
    table = pa.table({"a": [float(i) for i in range(9)], "b": list(range(9)), "name": ["x"] * 9})
    import pyarrow.parquet

    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    train, held = open_stream(f"hf:{tmp_path}")
    assert (train.shape, train.levels, train.num_classes) == ((2,), None, None)
    assert torch.equal(held.x, torch.arange(4.0)[:, None].expand(4, 2))
    with pytest.raises(DataError, match="hf:"):
        open_hub_stream(str(tmp_path / "none"))
    pyarrow.parquet.write_table(table.select(["name"]), tmp_path / "train.parquet")
    with pytest.raises(DataError, match="has columns name"):
        open_hub_stream(str(tmp_path))
