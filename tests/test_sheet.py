"""Sheets: every tile is its picture, pixel by pixel, under its title."""

import numpy as np
import pytest
import torch
from PIL import ImageColor

from scoresde.sheet import CHECKER, HEAT, SOFT, Column, sheet, uncertainty, veiled

WHITE = (255, 255, 255)


def pictures(n, channels, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # Off white, the colour of the page, so that a tile is found by its colours.
    return torch.randint(0, 200, (n, channels, height, width), generator=generator).to(torch.uint8)


def array(columns, scale=None):
    return np.asarray(sheet(columns, scale))


def enlarged(image, factor):
    """``(C, H, W)`` as the RGB pixels of a tile, without smoothing."""
    rgb = image.expand(3, -1, -1) if len(image) == 1 else image
    return rgb.permute(1, 2, 0).numpy().repeat(factor, 0).repeat(factor, 1)


def places(page, tile):
    """Corners (row, column) where a tile stands on a page."""
    height, width = tile.shape[:2]
    first = np.argwhere((page == tile[0, 0]).all(-1))
    return [
        (y, x)
        for y, x in first.tolist()
        if np.array_equal(page[y : y + height, x : x + width], tile)
    ]


@pytest.mark.parametrize(
    ("channels", "height", "width", "scale", "factor"),
    [(1, 8, 8, None, 12), (1, 28, 28, None, 4), (3, 64, 64, None, 2), (3, 12, 20, None, 5),
     (1, 128, 100, None, 1), (3, 10, 10, 3, 3)],
)  # fmt: skip
def test_tiles_are_their_pictures(channels, height, width, scale, factor):
    left, right = (pictures(2, channels, height, width, seed) for seed in (0, 1))
    page = array([("input", left), None, ("1", right)], scale)
    found = [places(page, enlarged(image, factor)) for image in (*left, *right)]
    assert [len(f) for f in found] == [1, 1, 1, 1]
    (y0, x0), (y1, x1), (y2, x2), (y3, x3) = (f[0] for f in found)
    assert (y0, y1, x0, x2) == (y2, y3, x1, x3)  # a row is an item, a column a kind of picture
    assert y1 >= y0 + height * factor
    assert x2 >= x0 + width * factor


def test_colours_and_grey_stand_in_one_sheet():
    grey, colour = pictures(1, 1, 32, 32), pictures(1, 3, 32, 32)
    page = array([("grey", grey), ("colour", colour)])
    assert len(places(page, enlarged(grey[0], 3))) == 1
    assert len(places(page, enlarged(colour[0], 3))) == 1


def test_a_small_measurement_fills_its_tile():
    large, small = pictures(1, 1, 32, 32), pictures(1, 1, 8, 8, 1)
    page = array([("input", large), ("measurement", small)])
    (y, x), (v, u) = (places(page, enlarged(i[0], f))[0] for i, f in ((large, 3), (small, 12)))
    assert (v, u > x) == (y, True)
    uneven = pictures(1, 1, 7, 32, 2)  # of other proportions
    page = array([("input", large), ("measurement", uneven)])
    tile = page[y : y + 96, u : u + 96]
    rows = np.minimum((np.arange(96) + 0.5) * 7 / 96, 6.99).astype(int)
    assert np.array_equal(tile[:, ::3, 0], uneven[0, 0].numpy()[rows])


def test_titles_stand_over_the_middle_of_their_columns():
    image = pictures(1, 1, 28, 28)
    plain, titled = (array([(t, image), ("1", image)]) for t in ("", "input"))
    assert plain.shape == titled.shape
    y, x = places(titled, enlarged(image[0], 4))[0]
    ink = np.argwhere((plain != titled).any(-1))
    assert len(ink) > 40
    assert ink[:, 0].max() < y
    assert ink[:, 0].min() > 0
    assert abs((ink[:, 1].min() + ink[:, 1].max()) / 2 - (x + 56)) < 3
    darkest = titled[ink[:, 0], ink[:, 1]].astype(int).sum(1).min()
    assert darkest < 200  # ink, on white
    wide = "a title that is wider than its tile"
    page = array([(wide, image), ("1", image)])
    letters = np.argwhere((page[: y - 2] < 128).all(-1))
    assert letters[:, 1].min() >= 10
    first, second = places(page, enlarged(image[0], 4))
    assert page.shape[1] > titled.shape[1]
    assert second[1] - first[1] > 112 + 6


def test_groups_stand_further_apart():
    image = pictures(1, 1, 28, 28)
    together, apart = (
        places(array([("a", image), *gap, ("b", image)]), enlarged(image[0], 4))
        for gap in ([], [None])
    )
    assert apart[1][1] - apart[0][1] > together[1][1] - together[0][1] + 10


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_not_known_is_a_checkerboard(channels):
    image = pictures(1, channels, 8, 8)
    known = torch.zeros(8, 8, dtype=torch.bool)
    known[:, :3] = True
    page = array([("input", image), ("measurement", veiled(image, known))])
    tile = enlarged(image[0], 12)
    (y, _) = places(page, tile)[0]
    (v, u) = places(page, tile[:, :36])[1]
    assert v == y
    open_part = page[v : v + 96, u + 36 : u + 96]
    colours, counts = np.unique(open_part.reshape(-1, 3), axis=0, return_counts=True)
    assert {tuple(c) for c in colours.tolist()} == {ImageColor.getrgb(c) for c in CHECKER}
    assert abs(counts[0] / counts.sum() - 0.5) < 0.05
    assert (open_part[:, :-12] != open_part[:, 12:]).any(-1).mean() < 0.01  # period: two squares
    assert (open_part[:, :-6] != open_part[:, 6:]).any(-1).mean() > 0.99


def test_a_pixel_is_known_where_any_channel_is():
    image = pictures(2, 3, 2, 2)
    known = torch.zeros(2, 3, 2, 2, dtype=torch.bool)
    known[1, 2, 0, 1] = True
    shown = veiled(image, known)
    assert torch.equal(shown[:, :3], image)
    assert shown[:, 3].tolist() == [[[0, 0], [0, 0]], [[0, 255], [0, 0]]]


def test_uncertainty_is_the_standard_deviation():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 7, 2, 4, 5, generator=generator) * torch.linspace(0, 2, 5)
    heat = uncertainty(x)
    expected = np.sqrt(np.var(x.double().numpy(), axis=1, ddof=1).mean(1))
    assert heat.most == pytest.approx(expected.max())
    assert heat.images.shape == (3, 3, 4, 5)
    table = np.array([ImageColor.getrgb(c) for c in HEAT], float)
    share = np.clip(expected / expected.max(), 0, 1) * (len(table) - 1)
    for channel in range(3):
        wanted = np.interp(share, np.arange(len(table)), table[:, channel])
        assert np.abs(heat.images[:, channel].numpy() - wanted).max() <= 0.51
    half = uncertainty(x, most=2 * heat.most)
    assert half.most == 2 * heat.most
    deepest = np.unravel_index(expected.argmax(), expected.shape)
    assert tuple(half.images[deepest[0], :, deepest[1], deepest[2]].tolist()) == tuple(
        table[2].astype(int)
    )


def test_certain_items_and_single_draws_have_no_colour():
    for draws in (1, 3):
        heat = uncertainty(torch.ones(2, draws, 1, 4, 4))
        assert heat.most == 0
        assert (heat.images == 255).all()


def test_lightness_of_the_colours_falls_all_the_way():
    """The scale is read in grey as well."""
    light = [np.dot(ImageColor.getrgb(c), (0.299, 0.587, 0.114)) for c in HEAT]
    assert (np.diff(light) < -25).all()


@pytest.mark.parametrize(("most", "label"), [(0.123456, "0.12"), (8.04, "8"), (117.3, "117")])
def test_the_scale_of_the_uncertainty_is_told(monkeypatch, most, label):
    from PIL import ImageDraw

    said = []
    honest = ImageDraw.ImageDraw.text

    def text(self, xy, words, *args, **kwargs):
        said.append(words)
        honest(self, xy, words, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    image = pictures(1, 3, 28, 28)
    page = array([("input", image), Column("std", image, most)])
    assert said == ["input", "std", "0", label]
    (_, _), (y, x) = places(page, enlarged(image[0], 4))
    foot = page[y + 112 :, x - 1 : x + 114]
    dark = np.argwhere((foot == ImageColor.getrgb(HEAT[-1])).all(-1))  # the bar's strongest end
    numbers = np.argwhere((foot == ImageColor.getrgb(SOFT)).all(-1))
    assert len(dark) >= 6
    assert numbers[:, 1].min() < dark[:, 1].min() <= dark[:, 1].max() < numbers[:, 1].max()
    assert (page[y + 114 :, : x - 2] == WHITE).all()
    assert (page[:, -10:] == WHITE).all()  # nothing leaves the page


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ([], "at least one column"),
        ([None], "at least one column"),
        ([("a", torch.zeros(1, 1, 4, 4))], "column 'a' of a sheet needs uint8 images"),
        ([("a", torch.zeros(1, 5, 4, 4).byte())], r"got torch.uint8 of shape \(1, 5, 4, 4\)"),
        ([("a", torch.zeros(2, 1, 4, 4).byte()), ("b", torch.zeros(1, 1, 4, 4).byte())],
         "'b' of a sheet has 1 rows, and 'a' has 2"),
    ],
)  # fmt: skip
def test_what_is_no_sheet_is_said(columns, message):
    with pytest.raises(ValueError, match=message):
        sheet(columns)
    with pytest.raises(ValueError, match="needs draws"):
        uncertainty(torch.zeros(2, 1, 4, 4))
