"""Classes and vectors that condition the items, in every kind of file; latents."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from scoresde.data import DataConfig, DataError, Dataset, Share, load, load_splits, open_splits


def test_a_data_set_with_vectors():
    y = torch.arange(8.0, dtype=torch.float64).reshape(4, 2)
    data = Dataset(torch.randn(4, 3), y)
    assert data.vectors == 2
    assert data.num_classes is None
    assert data.class_names is None
    assert data.y.dtype == torch.float32
    assert data.subset([2]).y.tolist() == [[4.0, 5.0]]
    batch = next(data.loader(Share(4, seed=2)))
    rows = [int(name.removeprefix("item ")) for name in batch.where]
    assert sorted(rows) == [0, 1, 2, 3]
    assert torch.equal(batch.y, y.float()[rows])
    assert torch.equal(batch.x, data.x[rows])
    labelled = Dataset(torch.randn(4, 3), torch.arange(4))
    assert labelled.vectors is None


@pytest.mark.parametrize(
    ("y", "said"),
    [
        (torch.zeros(4), r"shape \(4,\).*vectors \(4, d\)"),
        (torch.zeros(3, 2), r"shape \(3, 2\)"),
        (torch.zeros(4, 0), r"shape \(4, 0\)"),
        (torch.tensor([[0.0], [1.0], [float("nan")], [0.0]]), "item 2 is not finite"),
    ],
)
def test_vectors_that_do_not_fit(y, said):
    with pytest.raises(DataError, match=said):
        Dataset(torch.randn(4, 3), y)


def test_a_probe_is_spread():
    data = Dataset(torch.arange(10.0)[:, None])
    assert data.probe(4)[:, 0].tolist() == [0.0, 2.0, 5.0, 7.0]
    assert torch.equal(data.probe(50), data.x)
    assert data.size == 10


def test_notes_are_said_with_the_first_batch():
    loader = Dataset(torch.ones(4, 1), notes=("careful",)).loader(Share(2))
    assert (next(loader).notes, next(loader).notes) == (("careful",), ())


@pytest.mark.parametrize(
    ("name", "beside"),
    [("x.npy", "y.npy"), ("x.npy", "c.npy"), ("faces.npy", "faces_y.npy"),
     ("faces.npy", "faces_c.npy"), ("x_train.npy", "y_train.npy")],
)  # fmt: skip
def test_arrays_beside_an_array(tmp_path, name, beside):
    y = np.random.default_rng(0).normal(size=(6, 2))
    np.save(tmp_path / name, np.zeros((6, 3)))
    np.save(tmp_path / beside, y)
    np.save(tmp_path / "other.npy", np.zeros(3))
    data = load(str(tmp_path / name))
    assert data.vectors == 2
    assert np.allclose(data.y, y)


def test_the_key_c_is_always_a_vector(tmp_path):
    at = tmp_path / "a.npz"
    np.savez(at, x=np.zeros((4, 3)), c=np.arange(4))
    assert load(str(at)).y.tolist() == [[0.0], [1.0], [2.0], [3.0]]
    np.savez(at, x=np.zeros((4, 3)), y=np.arange(4)[:, None])
    data = load(str(at))
    assert (data.vectors, data.num_classes, data.y.tolist()) == (None, 4, [0, 1, 2, 3])


def test_splits_of_a_folder_of_arrays(tmp_path):
    for split, n in (("train", 5), ("test", 3)):
        np.save(tmp_path / f"x_{split}.npy", np.full((n, 2), float(n)))
        np.save(tmp_path / f"c_{split}.npy", np.full((n, 4), float(n)))
    train, held = load_splits(DataConfig(str(tmp_path)))
    assert (len(train), len(held), train.vectors, held.vectors) == (5, 3, 4, 4)
    np.save(tmp_path / "c_test.npy", np.zeros((3, 3)))
    with pytest.raises(DataError, match="4 entries, those of the held-out items 3"):
        load_splits(DataConfig(str(tmp_path)))


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"y": np.zeros(4)}, "the labels are of type float64; they must be integers"),
        ({"y": np.zeros((3, 2))}, r"labels are float64 of shape \(3, 2\)"),
        ({"y": np.zeros((4, 2), int)}, r"labels are int64 of shape \(4, 2\)"),
        ({"y": np.array([0, -1, 2, 3])}, "labels run from -1 to 3"),
        ({"c": np.zeros((4, 2, 2))}, r"labels are float64 of shape \(4, 2, 2\)"),
        ({"y": np.array(["a"] * 4)}, "type <U1"),
    ],
)
def test_labels_that_do_not_fit(tmp_path, arrays, said):
    np.savez(tmp_path / "a.npz", x=np.zeros((4, 3)), **arrays)
    for memory in (0, 512):
        with pytest.raises(DataError, match=said):
            open_splits(DataConfig(str(tmp_path / "a.npz"), memory=memory))


def test_vectors_in_a_table(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    at, vectors = tmp_path / "t.parquet", [[0.5, 1.0], [2.0, 3.0], [4.0, 5.0]]
    pq.write_table(pa.table({"a": [1, 2, 3], "vector": vectors}), at)
    data = load(str(at))
    assert data.x.tolist() == [[1.0], [2.0], [3.0]]
    assert data.y.tolist() == vectors
    pq.write_table(pa.table({"a": [1, 2, 3], "vector": [[0.5, 1.0], [2.0], None]}), at)
    with pytest.raises(DataError, match="row 1: its vector has 1 numbers, the first row's 2"):
        load(str(at))


def test_more_labels_than_names(tmp_path):
    import json

    from conftest import encoded

    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    features = {"label": {"names": ["a", "b"], "_type": "ClassLabel"}}
    table = pa.table({"image": [encoded(0), encoded(1)], "label": [0, 2]})
    meta = json.dumps({"info": {"features": features}})
    pq.write_table(table.replace_schema_metadata({"huggingface": meta}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"labels run from 0 to 2; they must lie in 0\.\.1"):
        load(str(tmp_path / "t.parquet"))


# Latents


def test_files_of_one_item_in_folders_of_classes(tmp_path):
    for i in range(6):
        (tmp_path / f"c{i % 2}").mkdir(exist_ok=True)
        np.save(tmp_path / f"c{i % 2}" / f"{i}.npy", np.full((2, 3, 3), i, np.uint8))
    data = load(str(tmp_path))
    assert data.class_names == ("c0", "c1")
    assert data.levels is None
    assert data.x[:, 0, 0, 0].tolist() == [0, 2, 4, 1, 3, 5]
    assert data.y.tolist() == [0, 0, 0, 1, 1, 1]
    assert load(str(tmp_path), limit=2).x[:, 0, 0, 0].tolist() == [0, 1]


def test_files_of_rows_keep_their_order_and_limit(tmp_path):
    for k, n in enumerate((2, 3)):
        x = torch.arange(n)[:, None].expand(n, 4).bfloat16() + 10 * k
        y = torch.full((n,), k)
        save_file({"latents": x.contiguous(), "y": y}, tmp_path / f"{k}.safetensors")
    data = load(str(tmp_path))
    assert data.x[:, 0].tolist() == [0, 1, 10, 11, 12]
    assert data.y.tolist() == [0, 0, 1, 1, 1]
    assert load(str(tmp_path), limit=3).x[:, 0].tolist() == [0, 1, 10]
    alone = load(str(tmp_path / "1.safetensors"))
    assert (alone.x[:, 0].tolist(), alone.num_classes) == ([10, 11, 12], 2)


def test_splits_of_latents(tmp_path):
    for split, value in (("train", 1.0), ("validation", 2.0)):
        (tmp_path / split).mkdir()
        np.save(tmp_path / split / "a.npy", np.full((3, 2, 2, 2), value))
    train, held = load_splits(DataConfig(str(tmp_path)))
    assert (train.x.unique().tolist(), held.x.unique().tolist()) == ([1.0], [2.0])


def test_vectors_of_single_items(tmp_path):
    for i in range(3):
        np.savez(tmp_path / f"{i}.npz", arr_0=np.zeros((1, 2, 2)), y=np.full(5, i, np.float32))
    data = load(str(tmp_path))
    assert data.vectors == 5
    assert data.y[:, 0].tolist() == [0, 1, 2]


def test_latents_that_cannot_be_read_or_do_not_fit(tmp_path):
    for i in range(30):
        np.save(tmp_path / f"{i:02}.npy", np.full((1, 2, 2), i, np.float32))
    config = DataConfig(str(tmp_path), memory=0)
    train, _ = open_splits(config)
    bad, after = (int(i) for i in train.index[[3, 4]])
    (tmp_path / f"{bad:02}.npy").write_bytes(b"junk")
    batch = next(train.loader(Share(27)))
    assert batch.x[:, 0, 0, 0].tolist().count(after) == 2
    assert batch.notes[0].startswith(f"{bad:02}.npy: cannot be read")
    np.save(tmp_path / f"{bad:02}.npy", np.zeros((1, 2, 3), np.float32))
    with pytest.raises(DataError, match=rf"00\.npy has .*\(1, 2, 2\), but {bad:02}.*\(1, 2, 3\)"):
        next(open_splits(config)[0].loader(Share(27)))


@pytest.mark.parametrize(
    ("save", "said"),
    [
        (lambda at: np.savez(at, z=np.zeros((1, 2, 2))), r"holds z; latents must be called x"),
        (lambda at: np.savez_compressed(at, x=np.zeros((3, 2))), "np.savez, not"),
        (lambda at: np.savez(at, x=np.zeros((1, 2, 2)), y=np.zeros((2, 2))), "its y is"),
        (lambda at: at.write_bytes(b""), r"0\.npz: cannot be read"),
    ],
)
def test_impossible_latents_are_named(tmp_path, save, said):
    save(tmp_path / "0.npz")
    with pytest.raises(DataError, match=said) as caught:
        load(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_continuous_values_that_are_not_finite_pass_when_read_lazily(tmp_path):
    x = np.zeros((40, 3))
    x[7, 1] = np.nan
    np.save(tmp_path / "x.npy", x)
    train, _ = open_splits(DataConfig(str(tmp_path / "x.npy"), memory=0, heldout=0.05, seed=1))
    [batch] = [next(train.loader(Share(38)))]
    [at] = batch.x.isnan().any(1).nonzero()[:, 0].tolist()
    assert batch.where[at] == "x.npy, row 7"
    with pytest.raises(DataError, match="not finite"):
        open_splits(DataConfig(str(tmp_path / "x.npy")))


@pytest.mark.parametrize("fields", [{"memory": -1}, {"unreadable": -1}, {"buffer": 0}])
def test_impossible_settings_are_refused(fields):
    with pytest.raises(DataError, match=f"data.{next(iter(fields))}"):
        DataConfig(**fields)
