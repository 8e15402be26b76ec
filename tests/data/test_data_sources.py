"""Sources by name, their splits and the configuration."""

import numpy as np
import pytest
import torch
from PIL import Image

from scoresde.data import DataConfig, DataError, load, load_splits


def save(value, path, shape=(4, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(shape, value, np.uint8)).save(path)


def test_the_digits():
    data = load("digits")
    assert data.x.shape == (1797, 1, 8, 8)
    assert data.x.dtype == torch.uint8
    assert data.levels == 17
    assert int(data.x.max()) == 16
    assert int(data.x.min()) == 0
    assert data.class_names == tuple("0123456789")
    assert data.num_classes == 10
    assert data.y is not None
    assert data.y[:10].tolist() == list(range(10))
    assert len(load("digits", limit=5)) == 5


def test_the_mnist_sample_is_all_held_out():
    train, test = load("mnist-sample"), load("mnist-sample", "test")
    assert train.x.shape == (256, 1, 28, 28)
    assert train.levels == 256
    assert test.y is not None
    assert test.y[:5].tolist() == [7, 2, 1, 0, 4]
    assert torch.equal(train.x, test.x)
    assert all(torch.equal(part.x, test.x) for part in load_splits(DataConfig("mnist-sample")))


def test_a_source_without_splits_is_split_by_its_seed():
    train, held = load_splits(DataConfig("digits", heldout=0.2))
    assert (len(train), len(held)) == (1438, 359)
    again = load_splits(DataConfig("digits", heldout=0.2))[1]
    other = load_splits(DataConfig("digits", heldout=0.2, seed=1))[1]
    assert torch.equal(held.x, again.x)
    assert not torch.equal(held.x, other.x)
    with pytest.raises(DataError, match="no split 'test'; it has train"):
        load("digits", "test")


def test_toys_take_samples_seed_and_limit():
    assert len(load("moons", samples=30)) == 30
    assert len(load("moons", samples=30, limit=7)) == 7
    assert not torch.equal(load("moons", samples=9).x, load("moons", samples=9, seed=1).x)
    train, held = load_splits(DataConfig("rings", samples=40, heldout=0.25))
    assert (len(train), len(held)) == (30, 10)


def test_npz_splits_are_used(tmp_path):
    at = tmp_path / "a.npz"
    np.savez(at, x_train=np.ones((6, 2)), x_test=np.zeros((3, 2)))
    train, held = load_splits(DataConfig(str(at)))
    assert (len(train), len(held)) == (6, 3)
    assert held.x.unique().tolist() == [0.0]
    train, held = load_splits(DataConfig(str(at), limit=2))
    assert (len(train), len(held)) == (2, 2)


@pytest.mark.parametrize(("ours", "theirs"), [([0, 1, 1], [2, 0]), ([0, 2, 1], [1, 0])])
def test_both_splits_have_as_many_classes(tmp_path, ours, theirs):
    np.savez(
        tmp_path / "a.npz",
        x_train=np.ones((3, 2)),
        y_train=np.array(ours),
        x_test=np.ones((2, 2)),
        y_test=np.array(theirs),
    )
    train, held = load_splits(DataConfig(str(tmp_path / "a.npz")))
    assert train.num_classes == held.num_classes == 3


def test_splits_that_cannot_serve_one_model_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x_train=np.ones((6, 2)), x_test=np.ones((6, 3)))
    with pytest.raises(DataError, match=r"\(2,\).*\(3,\)"):
        load_splits(DataConfig(str(tmp_path / "a.npz")))


def test_picture_folders_share_their_classes_across_splits(tmp_path):
    save(1, tmp_path / "train" / "cat" / "1.png")
    save(2, tmp_path / "train" / "dog" / "2.png")
    save(3, tmp_path / "test" / "dog" / "3.png")
    train, held = load_splits(DataConfig(str(tmp_path)))
    assert train.x[:, 0, 0, 0].tolist() == [1, 2]
    assert held.y is not None
    assert held.y.tolist() == [1]
    assert held.class_names == train.class_names == ("cat", "dog")
    save(4, tmp_path / "stray.png")
    with pytest.raises(DataError, match=r"stray\.png lies beside the splits test, train"):
        load(str(tmp_path))


def test_a_lone_test_split_is_split_itself(tmp_path):
    for i in range(4):
        save(i, tmp_path / "test" / f"{i}.png")
    train, held = load_splits(DataConfig(str(tmp_path), heldout=0.25))
    assert sorted(torch.cat([train.x, held.x])[:, 0, 0, 0].tolist()) == [0, 1, 2, 3]
    assert len(held) == 1


def test_a_class_may_be_called_train(tmp_path):
    save(1, tmp_path / "train" / "1.png")
    save(2, tmp_path / "plane" / "2.png")
    assert load(str(tmp_path)).class_names == ("plane", "train")


def test_size_is_refused_where_nothing_is_resized(tmp_path):
    with pytest.raises(DataError, match=r"size=16.*\(1, 8, 8\)"):
        load("digits", size=16)
    with pytest.raises(DataError, match="size=16"):
        load("moons", size=16)
    assert load("digits", size=8).shape == (1, 8, 8)


def test_unknown_sources_name_what_is_accepted(tmp_path):
    with pytest.raises(DataError, match=r"did you mean 'digits'.*swissroll.*hf:owner/name.*npz"):
        load("digit")
    (tmp_path / "a.csv").write_text("1")
    with pytest.raises(DataError, match=r"a\.csv: cannot read .*\.npy"):
        load(str(tmp_path / "a.csv"))


@pytest.mark.parametrize(
    "fields",
    [
        {"source": ""},
        {"heldout": 0.0},
        {"heldout": 1.0},
        {"heldout": float("nan")},
        {"size": 0},
        {"limit": 0},
        {"samples": 0},
        {"scaler": "minmax"},
    ],
)
def test_impossible_settings_are_refused(fields):
    with pytest.raises(DataError, match=f"data.{next(iter(fields))}"):
        DataConfig(**fields)


def test_a_limit_below_one_is_refused():
    with pytest.raises(DataError, match="limit is 0"):
        load("digits", limit=0)
