"""Masks by name: what they know, in any number of dimensions."""

from __future__ import annotations

import math

import pytest
import torch

from scoresde.inverse import operators as room

SHAPES = [(12,), (2, 12), (3, 8, 12), (2, 6, 8, 10)]


def _places(operator):
    """The mask of one channel; those of all channels are the same."""
    if len(operator.shape) == 1:
        return operator.mask
    assert bool((operator.mask == operator.mask[:1]).all())
    return operator.mask[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_middle_is_unknown_or_alone_known(shape):
    hole, island = _places(room.MiddleBox(shape, 0.5)), _places(room.Outpaint(shape, 0.5))
    assert torch.equal(hole, ~island)
    space = hole.shape
    assert int(island.sum()) == math.prod(n // 2 for n in space)
    assert torch.equal(island, island.flip(tuple(range(island.ndim)))) or any(
        (n - n // 2) % 2 for n in space
    )
    assert bool(island[tuple(n // 2 for n in space)])
    assert not bool(island[(0,) * len(space)])


@pytest.mark.parametrize("shape", SHAPES)
def test_halves_are_complementary_along_their_axis(shape):
    pairs = (("left", "right"), ("top", "bottom"), ("front", "back"))
    space = shape[1:] or shape
    for before, (early, late) in enumerate(pairs):
        if before >= len(space):
            with pytest.raises(ValueError, match="known half"):
                room.Half(shape, early)
            continue
        first, second = _places(room.Half(shape, early)), _places(room.Half(shape, late))
        assert torch.equal(first, ~second)
        axis = len(space) - 1 - before
        assert bool(first.movedim(axis, 0)[: space[axis] // 2].all())
        assert not bool(first.movedim(axis, 0)[space[axis] // 2 :].any())


@pytest.mark.parametrize("shape", SHAPES)
def test_random_pixels_are_as_many_as_the_share_says_by_seed(shape):
    operator = room.RandomPixels(shape, 0.25, seed=3)
    places = _places(operator)
    assert int(places.sum()) == round(0.25 * places.numel())
    assert operator.count == int(places.sum()) * (shape[0] if len(shape) > 1 else 1)
    assert torch.equal(operator.mask, room.RandomPixels(shape, 0.25, seed=3).mask)
    assert not torch.equal(operator.mask, room.RandomPixels(shape, 0.25, seed=4).mask)


def test_random_pixels_are_anywhere_alike():
    known = sum(room.RandomPixels((4, 4), 0.5, seed=s).mask[0].double() for s in range(400)) / 400
    assert float((known - 0.5).abs().max()) < 0.1


def test_stripes_alternate_across_their_axis():
    known = room.Stripes((1, 3, 10), period=5, width=2).mask[0]
    assert known[0].int().tolist() == [1, 1, 1, 0, 0, 1, 1, 1, 0, 0]
    assert bool((known == known[:1]).all())
    upright = room.Stripes((2, 10, 3), 5, 2, axis=1).mask
    assert torch.equal(upright[0], known[:1].T.expand(10, 3))
    assert torch.equal(room.Stripes((10,), 5, 2).mask, known[0])


@pytest.mark.parametrize("shape", [*SHAPES, (3, 64, 48)])
def test_strokes_are_as_thick_as_their_brush_by_seed(shape):
    operator = room.Strokes(shape, strokes=1, thickness=0.2, length=0.1, parts=1, seed=5)
    touched = ~_places(operator)
    assert bool(touched.any())
    assert torch.equal(operator.mask, room.Strokes(shape, 1, 0.2, 0.1, 1, seed=5).mask)
    least, dims = min(touched.shape), touched.ndim
    # all that is touched lies within the line and the brush on both of its ends
    radius = max(0.2 * least / 2, math.sqrt(dims) / 2)
    places = touched.nonzero().double()
    assert float(torch.cdist(places, places).max()) <= 0.1 * least + 2 * radius + 1e-9
    # and it holds a whole ball of the brush, but for rounding and what is cut off by the border
    grid = torch.cartesian_prod(*(torch.arange(n) for n in touched.shape)).reshape(-1, dims)
    untouched = grid[~touched.flatten()].double()
    inner = torch.cdist(places, untouched).min(1).values.max()
    assert float(inner) > radius - math.sqrt(dims)


def test_more_strokes_hide_more_and_all_parts_hang_together():
    counts = [room.Strokes((1, 64, 64), n, seed=1).count for n in (1, 3, 9)]
    assert counts[0] > counts[1] > counts[2]
    touched = ~room.Strokes((1, 64, 64), strokes=1, seed=2).mask[0]
    seen = torch.zeros_like(touched)
    first = tuple(touched.nonzero()[0])
    seen[first] = True
    for _ in range(touched.numel()):
        grown = torch.nn.functional.max_pool2d(seen[None].float(), 3, 1, 1)[0] > 0
        grown &= touched
        if torch.equal(grown, seen):
            break
        seen = grown
    assert torch.equal(seen, touched)


def test_a_picture_says_what_is_known(tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    picture = torch.zeros(4, 6, dtype=torch.uint8)
    picture[:2, :3] = 255
    picture[3, 5] = 128
    picture[3, 0] = 127
    file = tmp_path / "mask.png"
    image_module.fromarray(picture.numpy()).save(file)
    operator = room.Picture((3, 4, 6), file)
    assert torch.equal(_places(operator), picture >= 128)
    assert torch.equal(_places(room.Picture((3, 4, 6), file, "unknown")), picture < 128)
    double = _places(room.Picture((1, 8, 12), file))
    assert torch.equal(double, (picture >= 128).repeat_interleave(2, 0).repeat_interleave(2, 1))
    with pytest.raises(ValueError, match="pictures"):
        room.Picture((1, 8), file)
    with pytest.raises(ValueError, match="cannot read the mask"):
        room.Picture((1, 8, 8), tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match="cannot read the mask"):
        room.Picture((1, 8, 8), tmp_path / "text.png")


@pytest.mark.parametrize(
    "make",
    [
        lambda: room.MiddleBox((3, 8, 8), 0.0),
        lambda: room.MiddleBox((3, 8, 8), 1.0),
        lambda: room.Outpaint((3, 8, 8), math.nan),
        lambda: room.Half((3, 8, 8), "middle"),
        lambda: room.RandomPixels((3, 8, 8), -0.5),
        lambda: room.Stripes((3, 8, 8), 4, 4),
        lambda: room.Stripes((3, 8, 8), 4, 0),
        lambda: room.Stripes((3, 8, 8), axis=0),
        lambda: room.Stripes((3, 8, 8), axis=3),
        lambda: room.Strokes((3, 8, 8), strokes=0),
        lambda: room.Strokes((3, 8, 8), thickness=-1.0),
        lambda: room.Strokes((3, 8, 8), thickness=9.0),
        lambda: room.MiddleBox((1, 1, 1), 0.5),
        lambda: room.MiddleBox("none"),
    ],
)
def test_numbers_out_of_range_are_refused_in_one_line(make):
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        make()
