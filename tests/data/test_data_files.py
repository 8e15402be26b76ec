"""Readers of arrays, pictures and tables."""

import importlib
import io
import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from scoresde.data import DataError, load

rng = np.random.default_rng(0)


def grey(value, shape=(4, 5)):
    return Image.fromarray(np.full(shape, value, np.uint8))


def save(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def encoded(image):
    stream = io.BytesIO()
    image.save(stream, "png")
    return stream.getvalue()


# Arrays


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((3, 8, 8), (1, 8, 8)),
        ((3, 8, 6, 1), (1, 8, 6)),
        ((3, 8, 6, 3), (3, 8, 6)),
        ((3, 8, 6, 4), (4, 8, 6)),
        ((3, 3, 8, 6), (3, 8, 6)),
        ((3, 4, 4, 3), (3, 4, 4)),
        ((3, 3, 4, 4), (3, 4, 4)),
        ((3, 5), (5,)),
    ],
)
def test_uint8_pictures_become_channels_first(tmp_path, shape, expected):
    x = rng.integers(0, 256, shape, dtype=np.uint8)
    np.save(tmp_path / "a.npy", x)
    data = load(str(tmp_path / "a.npy"))
    assert data.shape == expected
    assert data.levels == 256
    assert data.x.dtype == torch.uint8
    if len(shape) == 4 and expected != shape[1:]:
        assert torch.equal(data.x.permute(0, 2, 3, 1), torch.from_numpy(x))
    else:
        assert torch.equal(data.x.reshape(shape), torch.from_numpy(x))


@pytest.mark.parametrize("shape", [(4, 2), (4, 2, 9), (4, 1, 6, 6), (4, 1, 3, 4, 5), (4, 6, 6, 3)])
def test_float_arrays_keep_their_shape(tmp_path, shape):
    x = rng.normal(size=shape)
    np.save(tmp_path / "a.npy", x)
    data = load(str(tmp_path / "a.npy"))
    assert data.levels is None
    torch.testing.assert_close(data.x, torch.from_numpy(x).float())


def test_other_integers_and_plain_columns_are_continuous(tmp_path):
    np.save(tmp_path / "a.npy", np.array([1, -2, 3], dtype=np.int16))
    data = load(str(tmp_path / "a.npy"))
    assert data.x.tolist() == [[1.0], [-2.0], [3.0]]
    assert data.levels is None


@pytest.mark.parametrize("key", ["x", "images", "data", "arr_0", "x_train"])
@pytest.mark.parametrize("label", ["y", "labels", "y_train"])
def test_npz_keys(tmp_path, key, label):
    np.savez(tmp_path / "a.npz", **{key: np.ones((3, 2)), label: np.array([2, 0, 1])})
    data = load(str(tmp_path / "a.npz"), limit=2)
    assert data.y is not None
    assert data.y.tolist() == [2, 0]
    assert len(data) == 2


def test_damaged_and_unknown_arrays_are_named(tmp_path):
    np.savez(tmp_path / "other.npz", weights=np.ones(3))
    (tmp_path / "broken.npz").write_bytes(b"PK no zip")
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "words.npy", np.array([["a"]]))
    np.savez(tmp_path / "labels.npz", x=np.ones((2, 2)), y=np.array([0.5, 1.0]))
    for name, message in [
        ("other.npz", "weights.*x_train"),
        ("broken.npz", "broken.npz"),
        ("pickled.npy", "pickle"),
        ("words.npy", "numbers"),
        ("labels.npz", "float64"),
    ]:
        with pytest.raises(DataError, match=message) as caught:
            load(str(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_non_finite_arrays_are_refused(tmp_path):
    x = np.ones((5, 2))
    x[3, 1] = np.nan
    np.save(tmp_path / "a.npy", x)
    with pytest.raises(DataError, match=r"a\.npy: 1 of 10 .* a\.npy, row 3;"):
        load(str(tmp_path / "a.npy"))


# Pictures


def test_grey_pictures_have_one_channel_and_colour_makes_three(tmp_path):
    save(grey(10), tmp_path / "a.png")
    save(grey(20), tmp_path / "deep" / "b.bmp")
    data = load(str(tmp_path))
    assert data.x.shape == (2, 1, 4, 5)
    assert data.levels == 256
    assert data.y is None
    assert data.x[:, 0, 0, 0].tolist() == [10, 20]
    colour = np.zeros((4, 5, 3), np.uint8)
    colour[1, 2] = 1, 2, 3
    save(Image.fromarray(colour), tmp_path / "c.png")
    data = load(str(tmp_path))
    assert data.x.shape == (3, 3, 4, 5)
    assert data.x[1, :, 1, 2].tolist() == [1, 2, 3]
    assert data.x[0].unique().tolist() == [10]


def test_the_first_frame_of_an_animation(tmp_path):
    grey(0).save(tmp_path / "a.gif", save_all=True, append_images=[grey(255)])
    data = load(str(tmp_path))
    assert len(data) == 1
    assert data.x.unique().tolist() == [0]


def test_subfolders_are_classes(tmp_path):
    for name, value in (("dog/1", 1), ("cat/2", 2), ("cat/more/3", 3)):
        save(grey(value), tmp_path / f"{name}.png")
    data = load(str(tmp_path))
    assert data.class_names == ("cat", "dog")
    assert data.y is not None
    assert dict(zip(data.x[:, 0, 0, 0].tolist(), data.y.tolist(), strict=True)) == {
        1: 1,
        2: 0,
        3: 0,
    }
    save(grey(9), tmp_path / "stray.png")
    assert load(str(tmp_path)).y is None


def test_a_limit_is_spread_over_the_classes(tmp_path):
    for name in ("a", "b", "c"):
        for i in range(4):
            save(grey(i), tmp_path / name / f"{i}.png")
    data = load(str(tmp_path), limit=6)
    assert data.y is not None
    assert data.y.tolist() == [0, 0, 1, 1, 2, 2]


def test_different_sizes_need_a_size(tmp_path):
    save(grey(1), tmp_path / "a.png")
    save(grey(2, (6, 3)), tmp_path / "b.png")
    with pytest.raises(DataError, match=r"a\.png is 5x4 but b\.png is 3x6.*size"):
        load(str(tmp_path))
    assert load(str(tmp_path), size=3).x.shape == (2, 1, 3, 3)


def test_size_crops_the_centre(tmp_path):
    stripes = np.repeat(np.array([0, 100, 100, 0], np.uint8), 4)  # columns of width 4
    save(Image.fromarray(np.tile(stripes, (8, 1))), tmp_path / "a.png")
    data = load(str(tmp_path), size=8)
    assert data.x.unique().tolist() == [100]


def test_unreadable_pictures_are_named(tmp_path):
    save(grey(1), tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(encoded(grey(1))[:40])
    with pytest.raises(DataError, match=r"bad\.png: cannot be read") as caught:
        load(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_deep_pictures_are_not_silently_clipped(tmp_path):
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png: has more than 8 bits"):
        load(str(tmp_path))


def test_empty_folders_are_named(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(DataError, match="holds no pictures"):
        load(str(tmp_path))


def test_a_zip_reads_as_its_folder(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, value in (("set/dog/1", 1), ("set/cat/2", 2)):
            archive.writestr(f"{name}.png", encoded(grey(value)))
        archive.writestr("__MACOSX/set/._1.png", b"junk")
    data = load(str(tmp_path / "a.zip"))
    assert data.class_names == ("cat", "dog")
    assert data.x[:, 0, 0, 0].tolist() == [2, 1]
    (tmp_path / "b.zip").write_bytes(b"no zip")
    with pytest.raises(DataError, match=r"b\.zip"):
        load(str(tmp_path / "b.zip"))


# Tables


def write_pictures(path, values, labels=None, names=None, struct=True):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    cells = [encoded(grey(v)) if isinstance(v, int) else v for v in values]
    columns = {"image": [{"bytes": c, "path": None} for c in cells] if struct else cells}
    if labels is not None:
        columns["label"] = labels
    table = pa.table(columns)
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        meta = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": meta})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


@pytest.mark.parametrize("folder", ["", "data"])
def test_parquet_shards_of_a_split_are_read_in_order(tmp_path, folder):
    at = tmp_path / folder
    write_pictures(at / "train-00001-of-00002.parquet", [3, 4], [0, 1], ["no", "yes"])
    write_pictures(at / "train-00000-of-00002.parquet", [1, 2], [1, 0], ["no", "yes"])
    write_pictures(at / "test-00000-of-00001.parquet", [9], [1], ["no", "yes"])
    data = load(str(tmp_path))
    assert data.x[:, 0, 0, 0].tolist() == [1, 2, 3, 4]
    assert data.x.shape[1:] == (1, 4, 5)
    assert data.y is not None
    assert data.y.tolist() == [1, 0, 0, 1]
    assert data.class_names == ("no", "yes")
    assert load(str(tmp_path), "test").x.unique().tolist() == [9]
    assert load(str(tmp_path), limit=3).x[:, 0, 0, 0].tolist() == [1, 2, 3]
    assert load(str(tmp_path), size=2).shape == (1, 2, 2)
    with pytest.raises(DataError, match="no split 'validation'; it has test, train"):
        load(str(tmp_path), "validation")


def test_a_missing_shard_is_noticed(tmp_path):
    write_pictures(tmp_path / "train-00000-of-00002.parquet", [1])
    with pytest.raises(DataError, match="1 of its 2"):
        load(str(tmp_path))


def test_one_parquet_file_of_plain_bytes(tmp_path):
    write_pictures(tmp_path / "a.parquet", [1, 2], struct=False)
    data = load(str(tmp_path / "a.parquet"))
    assert data.x[:, 0, 0, 0].tolist() == [1, 2]
    assert data.y is None


def test_unlabelled_sets_mark_it_with_minus_one(tmp_path):
    write_pictures(tmp_path / "a.parquet", [1, 2], [-1, -1])
    assert load(str(tmp_path / "a.parquet")).y is None


@pytest.mark.parametrize("cell", [b"junk", None])
def test_unreadable_cells_are_named(tmp_path, cell):
    write_pictures(tmp_path / "a.parquet", [1, cell])
    with pytest.raises(DataError, match=r"a\.parquet, row 1: cannot be read"):
        load(str(tmp_path / "a.parquet"))


def test_numeric_columns_are_the_entries_of_vectors(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    at = tmp_path / "t.parquet"
    pq.write_table(pa.table({"a": [1, 2], "name": ["u", "v"], "b": [0.5, 1.5]}), at)
    data = load(str(at))
    assert data.x.tolist() == [[1.0, 0.5], [2.0, 1.5]]
    assert data.levels is None
    pq.write_table(pa.table({"a": [1, None], "b": [0.5, 1.5]}), at)
    with pytest.raises(DataError, match=r"1 of 4 values .* t\.parquet, row 1;"):
        load(str(at))
    pq.write_table(pa.table({"name": ["u", "v"]}), at)
    with pytest.raises(DataError, match="columns name"):
        load(str(at))
    at.write_bytes(b"junk")
    with pytest.raises(DataError, match=r"t\.parquet"):
        load(str(at))


def test_a_missing_extra_is_one_clear_line(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    real = importlib.import_module

    def without(name, *args):
        if name.split(".")[0] in ("pyarrow", "datasets"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(DataError) as caught:
        load(str(tmp_path / "a.parquet"))
    assert str(caught.value) == "reading parquet needs pyarrow: pip install 'scoresde[parquet]'"
    with pytest.raises(DataError, match=r"needs datasets: pip install 'scoresde\[hub\]'"):
        load("hf:owner/name")


def test_a_hub_set_reads_as_its_files(tmp_path, monkeypatch):
    config = pytest.importorskip("datasets.config")
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    at = tmp_path / "set"
    write_pictures(at / "train-00000-of-00001.parquet", [1, 2], [1, 0], ["no", "yes"])
    write_pictures(at / "test-00000-of-00001.parquet", [9], [1], ["no", "yes"])
    ours, theirs = load(str(at)), load(f"hf:{at}")
    assert torch.equal(ours.x, theirs.x)
    assert theirs.class_names == ("no", "yes")
    assert ours.y is not None
    assert theirs.y is not None
    assert torch.equal(ours.y, theirs.y)
    assert load(f"hf:{at}", "test", limit=1).x.unique().tolist() == [9]


def test_importing_the_package_imports_no_optional_one():
    import subprocess
    import sys

    code = "import sys, scoresde.data; print(*{'PIL', 'pyarrow', 'datasets'} & set(sys.modules))"
    run = [sys.executable, "-c", code]
    assert subprocess.run(run, check=True, capture_output=True, text=True).stdout == "\n"
