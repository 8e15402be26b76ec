"""IDX files: folders laid out as MNIST's, single files, and what is wrong with damaged ones."""

import gzip
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from scoresde.data import DataConfig, DataError, load, load_splits
from scoresde.data.idx import CHUNK

FASHION = Path("/usr/share/datasets/fashion-mnist")
rng = np.random.default_rng(0)


def header(*shape, kind=8):
    return struct.pack(f">4B{len(shape)}I", 0, 0, kind, len(shape), *shape)


def idx(values):
    return header(*values.shape) + values.tobytes()


def pictures(count, height=3, width=5):
    return rng.integers(0, 256, (count, height, width), dtype=np.uint8)


def classes(count):
    return (np.arange(count) % 3).astype(np.uint8)


def write(folder, form="{}-idx{}-ubyte", counts=(7, 4)):
    """A folder of both splits, and its arrays by split."""
    folder.mkdir(parents=True, exist_ok=True)
    sets = {}
    for part, split, count in zip(("train", "t10k"), ("train", "test"), counts, strict=True):
        sets[split] = pictures(count), classes(count)
        for kind, axes, values in zip(("images", "labels"), (3, 1), sets[split], strict=True):
            name = form.format(f"{part}-{kind}", axes)
            packed = gzip.compress(idx(values)) if name.endswith(".gz") else idx(values)
            (folder / name).write_bytes(packed)
    return sets


def refusal(source, split="train", **options):
    with pytest.raises(DataError) as caught:
        load(str(source), split, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


FORMS = [f"{{}}{dot}idx{{}}-ubyte{gz}" for dot in "-." for gz in ("", ".gz")]


@pytest.mark.parametrize("form", [*FORMS, "{}-IDX{}-UBYTE"])
def test_a_folder_has_both_splits_with_their_labels(tmp_path, form):
    sets = write(tmp_path / "set", form)
    for split, (x, y) in sets.items():
        data = load(str(tmp_path / "set"), split)
        assert data.x.dtype == torch.uint8
        assert data.levels == 256
        assert data.name == "set"
        assert data.x.shape == (len(x), 1, 3, 5)
        assert torch.equal(data.x[:, 0], torch.from_numpy(x))
        assert data.y is not None
        assert data.y.tolist() == y.tolist()
        assert data.class_names == ("0", "1", "2")


def test_the_test_split_is_held_out(tmp_path):
    sets = write(tmp_path, "{}-idx{}-ubyte.gz", counts=(7, 2))  # two test items, two classes
    train, held = load_splits(DataConfig(str(tmp_path)))
    assert (len(train), len(held)) == (7, 2)
    assert torch.equal(held.x[:, 0], torch.from_numpy(sets["test"][0]))
    assert train.num_classes == held.num_classes == 3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("part", ["train", "t10k"])
def test_a_file_of_images_is_read_alone(tmp_path, form, part):
    sets = write(tmp_path, form)
    name = form.format(f"{part}-images", 3)
    data = load(str(tmp_path / name))
    assert torch.equal(
        data.x[:, 0], torch.from_numpy(sets["train" if part == "train" else "test"][0])
    )
    assert data.y is None
    assert data.name == name
    assert "no split 'test'" in refusal(tmp_path / name, "test")


def test_a_file_of_another_set_is_known_by_how_its_name_ends(tmp_path):
    at = tmp_path / "emnist-letters-train-images-idx3-ubyte"
    at.write_bytes(idx(pictures(2)))
    assert len(load(str(at))) == 2
    other = tmp_path / "pictures.gz"
    other.write_bytes(gzip.compress(idx(pictures(2))))
    assert "IDX images" in refusal(other)


@pytest.mark.parametrize("form", FORMS)
def test_a_limit_takes_the_first(tmp_path, form):
    x, y = write(tmp_path, form)["train"]
    data = load(str(tmp_path), limit=2)
    assert torch.equal(data.x[:, 0], torch.from_numpy(x[:2]))
    assert data.y is not None
    assert data.y.tolist() == y[:2].tolist()
    assert len(load(str(tmp_path), limit=100)) == 7


@pytest.mark.parametrize("limit", [None, 3, 50])
@pytest.mark.parametrize("form", ["{}-idx{}-ubyte", "{}-idx{}-ubyte.gz"])
def test_sets_longer_than_a_chunk(tmp_path, form, limit):
    x = pictures(70, 150, 200)
    assert x.nbytes > 2 * CHUNK
    at = tmp_path / form.format("a", 3)
    at.write_bytes(gzip.compress(idx(x), 1) if at.suffix == ".gz" else idx(x))
    assert torch.equal(load(str(at), limit=limit).x[:, 0], torch.from_numpy(x[:limit]))


def test_labels_may_be_missing_but_images_may_not(tmp_path):
    write(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    assert load(str(tmp_path), "test").y is None
    assert load(str(tmp_path)).y is not None
    (tmp_path / "train-images-idx3-ubyte").unlink()
    for split in ("train", "test"):
        message = refusal(tmp_path, split)
        assert message.startswith("train-labels-idx1-ubyte: its images are missing")
        assert "train-images-idx3-ubyte" in message


def test_a_missing_split_is_named(tmp_path):
    write(tmp_path)
    for kind in ("images-idx3", "labels-idx1"):
        (tmp_path / f"t10k-{kind}-ubyte").unlink()
    assert "no split 'test'; it has train" in refusal(tmp_path, "test")
    train, held = load_splits(DataConfig(str(tmp_path), heldout=0.3))
    assert (len(train), len(held)) == (5, 2)


def test_unpacked_files_come_before_packed_ones_and_folders_do_not_count(tmp_path):
    packed = write(tmp_path, "{}.idx{}-ubyte.gz")["train"][0]
    (tmp_path / "train-images-idx3-ubyte").mkdir()
    assert torch.equal(load(str(tmp_path)).x[:, 0], torch.from_numpy(packed))
    unpacked = write(tmp_path, "{}.idx{}-ubyte")["train"][0]
    assert torch.equal(load(str(tmp_path)).x[:, 0], torch.from_numpy(unpacked))


def test_a_file_unpacked_under_its_old_name_is_read(tmp_path):
    x = pictures(2)
    (tmp_path / "a-idx3-ubyte.gz").write_bytes(idx(x))
    (tmp_path / "b-idx3-ubyte").write_bytes(gzip.compress(idx(x)))
    for name in ("a-idx3-ubyte.gz", "b-idx3-ubyte"):
        assert torch.equal(load(str(tmp_path / name)).x[:, 0], torch.from_numpy(x))


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("limit", [None, 1])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "begins with nothing; an IDX file of images begins with 00 00 08 03"),
        (b"\x89PNG----", "begins with 89 50 4e 47"),
        (idx(classes(4)), "begins with 00 00 08 01"),
        (header(2, 3, 5, kind=13) + bytes(120), "begins with 00 00 0d 03"),
        (header(2, 3, 5)[:11], "ends within its header of 16 bytes"),
        (header(0, 3, 5), "is empty, its images are 0x3x5"),
        (header(2, 0, 5), "is empty, its images are 2x0x5"),
        (header(2, 3, 5) + bytes(29), "says 2x3x5, 30 bytes, but only 29 follow"),
        (header(2, 3, 5), "says 2x3x5, 30 bytes, but only 0 follow"),
        (header(2, 3, 5) + bytes(31), "says 2x3x5, 30 bytes, but more follow"),
    ],
)
def test_wrong_files_are_named(tmp_path, pack, limit, content, expected):
    at = tmp_path / "a-idx3-ubyte"
    at.write_bytes(pack(content))
    message = refusal(at, limit=limit)
    assert message.startswith("a-idx3-ubyte: ")
    assert expected in message


def flipped(packed, place):
    return packed[:place] + bytes([packed[place] ^ 0xFF]) + packed[place + 1 :]


@pytest.mark.parametrize("limit", [None, 1])
@pytest.mark.parametrize(
    "damage",
    [
        lambda packed: packed[:-9],
        lambda packed: packed[:-3],
        lambda packed: packed[: len(packed) // 2],
        lambda packed: packed[:6],
        lambda packed: flipped(packed, len(packed) // 2),
        lambda packed: flipped(packed, len(packed) - 6),  # the checksum
        lambda packed: flipped(packed, 2),
        lambda packed: packed[:10] + b"\x07" + packed[11:],  # a block of no known type
        lambda packed: packed + b"junk",
    ],
)
def test_damaged_gzip_is_named(tmp_path, damage, limit):
    at = tmp_path / "a-idx3-ubyte.gz"
    at.write_bytes(damage(gzip.compress(idx(pictures(40)), mtime=0)))
    assert refusal(at, limit=limit).startswith("a-idx3-ubyte.gz: ")


@pytest.mark.parametrize("form", ["{}-idx{}-ubyte", "{}-idx{}-ubyte.gz"])
def test_labels_of_another_count_are_refused(tmp_path, form):
    write(tmp_path, form)
    at = tmp_path / form.format("t10k-labels", 1)
    at.write_bytes(idx(classes(5)))
    for limit in (None, 2):
        assert refusal(tmp_path, "test", limit=limit) == f"{at.name}: has 5 labels for 4 images"
    assert len(load(str(tmp_path))) == 7
    at.write_bytes(idx(pictures(4)))
    assert "an IDX file of labels begins with 00 00 08 01" in refusal(tmp_path, "test")
    at.write_bytes(idx(classes(4))[:-1])
    assert "but only 3 follow" in refusal(tmp_path, "test")


HUGE = (2**32 - 1, 2**32 - 1, 2**32 - 1)


@pytest.mark.parametrize(
    ("pack", "shape", "there"),
    [
        (bytes, HUGE, 64),
        (gzip.compress, HUGE, 64),
        (bytes, HUGE, 16 * CHUNK),  # known from the length of the file; of a .gz it is not
        (bytes, (4, 4, 4), 16 * CHUNK),
        (gzip.compress, (4, 4, 4), 16 * CHUNK),
    ],
)
def test_a_false_header_takes_no_memory(tmp_path, pack, shape, there):
    at = tmp_path / "a-idx3-ubyte"
    at.write_bytes(pack(header(*shape) + bytes(there)))
    tracemalloc.start()
    try:
        assert "its header says" in refusal(at)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * CHUNK


def test_a_size_is_refused_as_for_arrays(tmp_path):
    write(tmp_path)
    assert "size=2 resizes picture files" in refusal(tmp_path, size=2)


@pytest.mark.skipif(not FASHION.is_dir(), reason="Fashion-MNIST is not installed")
def test_fashion_mnist():
    train, test = load_splits(DataConfig(str(FASHION)))
    assert train.x.shape == (60000, 1, 28, 28)
    assert test.x.shape == (10000, 1, 28, 28)
    for data, each in ((train, 6000), (test, 1000)):
        assert data.y is not None
        assert torch.bincount(data.y).tolist() == [each] * 10
        assert int(data.x.min()) == 0
        assert int(data.x.max()) == 255
    assert train.y is not None
    assert train.y[:5].tolist() == [9, 0, 0, 3, 0]  # an ankle boot comes first
    assert train.x.float().mean().item() / 255 == pytest.approx(0.2860, abs=1e-4)
    assert train.x.float().std().item() / 255 == pytest.approx(0.3530, abs=1e-4)
