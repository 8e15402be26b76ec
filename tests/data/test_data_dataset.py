"""The data set's own checks, subsets and splits."""

import pytest
import torch

from scoresde.data import DataError, Dataset


def test_discrete_data_is_kept_as_whole_levels():
    small = Dataset(torch.arange(6).reshape(3, 2), levels=17)
    large = Dataset(torch.tensor([[0], [299]], dtype=torch.int32), levels=300)
    assert small.x.dtype == torch.uint8
    assert large.x.dtype == torch.int64
    assert large.x.flatten().tolist() == [0, 299]


def test_continuous_data_is_float32():
    data = Dataset(torch.tensor([[1.5, 2.5]], dtype=torch.float64))
    assert data.x.dtype == torch.float32
    assert data.shape == (2,)
    assert data.levels is None
    assert data.num_classes is None
    assert len(data) == 1


def test_non_finite_values_are_counted_and_located():
    x = torch.zeros(5, 3, 2)
    x[2, 0, 1], x[2, 1, 1], x[4, 0, 0] = float("nan"), float("inf"), float("-inf")
    with pytest.raises(DataError, match=r"bars: 3 of 30 values .* item 2"):
        Dataset(x, name="bars")


def test_a_double_that_overflows_float32_is_not_finite():
    with pytest.raises(DataError, match="1 of 2 values"):
        Dataset(torch.tensor([[1e300, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize(
    ("x", "levels", "message"),
    [
        (torch.zeros(0, 2), None, r"\(0, 2\)"),
        (torch.zeros(3), None, r"\(3,\)"),
        (torch.zeros(3, 0), None, "empty axis"),
        (torch.zeros(3, 2, dtype=torch.uint8), None, "levels"),
        (torch.zeros(3, 2), 17, "integer type"),
        (torch.tensor([[17]]), 17, r"17 to 17.*0\.\.16"),
        (torch.tensor([[-1]]), 17, r"0\.\.16"),
        (torch.tensor([[0]]), 1, "2 to 65536"),
        (torch.tensor([[0]]), 65537, "2 to 65536"),
    ],
)
def test_impossible_data_is_refused(x, levels, message):
    with pytest.raises(DataError, match=message):
        Dataset(x, levels=levels)


@pytest.mark.parametrize(
    ("y", "names", "message"),
    [
        (torch.zeros(2, dtype=torch.long), None, r"\(3,\)"),
        (torch.zeros(3, 1, dtype=torch.long), None, r"\(3,\)"),
        (torch.zeros(3), None, "integers"),
        (torch.tensor([0, -1, 0]), None, "-1 to 0"),
        (torch.tensor([0, 1, 2]), ("a", "b"), r"0\.\.1"),
    ],
)
def test_impossible_labels_are_refused(y, names, message):
    with pytest.raises(DataError, match=message):
        Dataset(torch.zeros(3, 2), y, class_names=names)


def test_a_subset_keeps_order_labels_and_the_number_of_classes():
    data = Dataset(torch.arange(4.0)[:, None], torch.tensor([0, 1, 2, 3]), name="four")
    part = data.subset([2, 0])
    assert part.x.flatten().tolist() == [2.0, 0.0]
    assert part.y is not None
    assert part.y.tolist() == [2, 0]
    assert part.num_classes == data.num_classes == 4
    assert part.class_names == ("0", "1", "2", "3")
    assert part.name == "four"


@pytest.mark.parametrize("indices", [[], [4], [-1]])
def test_a_subset_outside_the_data_is_refused(indices):
    with pytest.raises(DataError, match=r"0\.\.3"):
        Dataset(torch.zeros(4, 1)).subset(indices)


def test_a_split_is_disjoint_complete_and_seeded():
    data = Dataset(torch.arange(50.0)[:, None], torch.arange(50))
    train, held = data.split(0.2, seed=3)
    assert (len(train), len(held)) == (40, 10)
    assert sorted(torch.cat([train.x, held.x]).flatten().tolist()) == list(range(50))
    assert train.y is not None
    assert torch.equal(train.y.float(), train.x[:, 0])
    again = data.split(0.2, seed=3)[1]
    other = data.split(0.2, seed=4)[1]
    assert torch.equal(held.x, again.x)
    assert not torch.equal(held.x.sort(0).values, other.x.sort(0).values)


def test_a_split_does_not_touch_the_global_generator():
    data = Dataset(torch.arange(50.0)[:, None])
    state = torch.random.get_rng_state()
    data.split(0.5)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(("fraction", "sizes"), [(0.001, (4, 1)), (0.999, (1, 4))])
def test_each_part_of_a_split_has_an_item(fraction, sizes):
    parts = Dataset(torch.zeros(5, 1)).split(fraction)
    assert tuple(map(len, parts)) == sizes


def test_impossible_splits_are_refused():
    for fraction in (0.0, 1.0, -0.1):
        with pytest.raises(DataError, match="between 0 and 1"):
            Dataset(torch.zeros(5, 1)).split(fraction)
    with pytest.raises(DataError, match="one item"):
        Dataset(torch.zeros(1, 1)).split(0.5)
