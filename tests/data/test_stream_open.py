"""Streams as they are opened: splits, held-out items, shapes, colours, arrays and labels."""

import json
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from tar_streams import ids, npy, pictures, png, write

from scoresde.data import DataConfig, DataError, Share, load_heldout, load_splits, open_splits
from scoresde.data.shards import open_tars
from scoresde.data.stream_source import StreamSource
from scoresde.data.stream_splits import open_stream


def test_opening_holds_out_the_head_where_there_is_no_test_split(tmp_path):
    for name, numbers in (("0", range(7)), ("1", range(7, 16)), ("2", range(16, 24))):
        write(tmp_path / f"{name}.tar", pictures(numbers))
    train, held = open_stream(str(tmp_path), classes=3, buffer=4)
    assert train.shape == held.shape == (1, 4, 4)
    assert (train.levels, train.num_classes, train.size, train.vectors) == (256, 3, None, None)
    assert train.class_names == held.class_names == ("0", "1", "2")
    assert ids(held.x) == [0, 1, 2]  # half of the first shard, which has 7
    assert held.y.tolist() == [0, 1, 2]
    assert set(ids(train.probe(100))) == set(range(3, 24))
    assert len(train.probe(6)) == 6
    for world in (1, 4):
        seen = set()
        for rank in range(world):
            with train.loader(Share(4 * world, rank=rank, world=world)) as loader:
                for batch in islice(loader, 12):
                    seen |= set(ids(batch.x))
        assert seen == set(range(3, 24))


def test_splits_by_names_folders_and_patterns(tmp_path):
    for k in range(3):
        write(tmp_path / f"train-{k:02d}.tar", pictures(range(10 * k, 10 * k + 10)))
    write(tmp_path / "val_0.tar", pictures([100, 101]))
    for source in (tmp_path, tmp_path / "train-{00..02}.tar", tmp_path / "train-*.tar"):
        train, held = open_stream(str(source), classes=3)
        assert (len(train.shards), ids(held.x), train.held) == (3, [100, 101], 0)
    train, held = open_stream(str(tmp_path / "train-{00,02}.tar"), classes=3, limit=1)
    assert (len(train.shards), ids(held.x)) == (2, [100])
    with pytest.raises(DataError, match=r"no tar file at .*train-03\.tar"):
        open_stream(str(tmp_path / "train-{00..03}.tar"))
    deep = tmp_path / "deep"
    write(deep / "train" / "value.tar", pictures(range(9)))
    write(deep / "test" / "train.tar", pictures([50]))
    train, held = open_stream(str(deep), classes=3)
    assert ([p.name for p in train.shards.paths], ids(held.x)) == (["value.tar"], [50])
    assert set(open_tars(str(write(tmp_path / "other" / "value.tar", [])))) == {"train"}
    with pytest.raises(DataError, match=r"only hf:owner/name, .tar files"):
        open_stream(str(tmp_path / "none.zip"))


def test_the_data_section_opens_streams(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / "tars" / split / "0.tar", pictures(range(9)))
    source = str(tmp_path / "tars")
    config = DataConfig(source, classes=3, buffer=5, unreadable=2, memory=1, limit=4)
    train, held = open_splits(config)
    assert isinstance(train, StreamSource)
    assert (train.buffer, train.unreadable, train.memory) == (5, 2, 2**20)
    assert (len(held), len(load_heldout(config))) == (4, 4)
    with train.loader(Share(2)) as loader:
        assert "data.limit is for held-out items" in next(loader).notes[0]
    with pytest.raises(DataError, match="not held whole"):
        load_splits(config)
    (tmp_path / "tars" / "cats").mkdir()  # a folder of pictures with a stray tar file is none
    with pytest.raises(DataError, match=r"lies beside|holds no"):
        open_splits(config)


def test_colours_and_sizes_follow_the_head(tmp_path):
    red = np.zeros((4, 6, 3)) + np.array([200, 0, 0])
    grey = [(f"{i:03d}.png", png(np.full((4, 6), i))) for i in range(70)]
    write(tmp_path / "grey.tar", [*grey, ("999.png", png(red))])
    train, _ = open_stream(str(tmp_path / "grey.tar"))
    assert train.shape == (1, 4, 6)
    expected = np.asarray(Image.fromarray(red.astype(np.uint8)).convert("L"))[0, 0]
    with train.loader(Share(71)) as loader:
        assert int(expected) in ids(next(loader).x)
    write(tmp_path / "mixed.tar", [*grey[:5], ("999.png", png(red))])
    train, held = open_stream(str(tmp_path / "mixed.tar"), size=2)
    assert train.shape == held.shape == (3, 2, 2)
    assert torch.equal(held.x[1], torch.full((3, 2, 2), 1, dtype=torch.uint8))
    assert train.probe(9)[-1, :, 0, 0].tolist() == [200, 0, 0]


def test_arrays_vectors_and_labels_in_json(tmp_path):
    rng = np.random.default_rng(0)
    x, v = rng.normal(size=(6, 5)).astype(np.float32), rng.normal(size=(6, 2))
    members = []
    for i in range(6):
        members += [(f"{i}.npy", npy(x[i])), (f"{i}.vec.npy", npy(v[i]))]
    train, held = open_stream(str(write(tmp_path / "v.tar", members)))
    assert (train.shape, train.levels, train.vectors, train.num_classes) == ((5,), None, 2, None)
    assert torch.equal(held.x, torch.from_numpy(x[:3]))
    assert torch.equal(held.y, torch.from_numpy(v[:3]).float())
    members = []
    for i in range(6):
        members += [(f"{i}.npy", npy(np.full((2, 5, 5), i, np.uint8)))]
        members += [(f"{i}.json", json.dumps({"label": i % 2}).encode())]
    train, held = open_stream(str(write(tmp_path / "j.tar", members)), classes=2)
    assert (train.shape, train.levels, held.y.tolist()) == ((2, 5, 5), 256, [0, 1, 0])
    train, held = open_stream(str(tmp_path / "j.tar"))
    assert train.num_classes is None
    assert held.y is None
    with train.loader(Share(2)) as loader:
        assert "set data.classes" in next(loader).notes[0]
    members = [(f"{i}.npy", npy(np.array([1.0, np.nan if i in (1, 4) else i]))) for i in range(6)]
    members += [("6.json", b'{"vector": [1, 2]}')]
    train, _ = open_stream(str(write(tmp_path / "n.tar", members)))
    with train.loader(Share(3)) as loader:
        batch = next(loader)
    said = "holds values that are not finite in float32"
    assert batch.notes[0] == f"n.tar/1: {said}; it is left out"
    assert batch.notes[1].startswith(f"n.tar/4: {said}")
    assert set(batch.x[:, 1].tolist()) == {3.0, 5.0}
    with pytest.raises(DataError, match=r"data\.size resizes pictures"):
        open_stream(str(tmp_path / "n.tar"), size=4)
