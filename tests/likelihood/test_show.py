"""Pictures show the right items in the right order, and every value."""

import math

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from PIL import Image

from scoresde.likelihood import show


@pytest.fixture
def drawn(monkeypatch):
    """Everything that is put on axes or figures, in order."""
    seen = []
    for owner, name in [
        (Axes, "imshow"), (Axes, "set_title"), (Axes, "set_xlabel"), (Axes, "hist"),
        (Axes, "axvline"), (FigureBase, "suptitle"), (FigureBase, "supxlabel"),
    ]:  # fmt: skip
        real = getattr(owner, name)

        def record(self, *args, real=real, name=name, **kwargs):
            seen.append((name, args[0] if args else None, kwargs))
            return real(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, record)
    return lambda name: [(first, kwargs) for kind, first, kwargs in seen if kind == name]


def images(count, channels=1):
    """Item ``i`` is all ``i``."""
    return torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, channels, 4, 6)


def size(file):
    with Image.open(file) as picture:
        return picture.size


@pytest.mark.parametrize(("likely", "ends"), [("low", [0, 2, 4, 5]), ("high", [5, 4, 2, 0])])
def test_the_ends_are_the_most_and_the_least_likely(tmp_path, drawn, likely, ends):
    values = torch.tensor([1.0, math.nan, 2.0, 3.0, 4.0, 5.25, math.inf])
    show.extremes(images(7), values, tmp_path / "a.png", likely=likely, columns=2)
    best, second, almost, worst = ends
    shown = [int(pixels.max()) for pixels, _ in drawn("imshow")]
    assert shown == [best, second, worst, almost]
    assert [text for text, _ in drawn("set_title")] == [f"{values[i]:.3f}" for i in shown]
    assert [text for text, _ in drawn("set_xlabel")] == [f"#{i}" for i in shown]
    titles = [text for text, _ in drawn("suptitle")]
    assert titles == ["most likely (bits/dim, #item)", "least likely (bits/dim, #item)"]
    # Absolute greys: matplotlib would stretch each picture.
    assert all((k["vmin"], k["vmax"]) == (0, 255) for _, k in drawn("imshow"))
    assert size(tmp_path / "a.png")[0] > 200


@pytest.mark.parametrize(
    ("count", "columns", "rows", "shown"), [(100, 5, 2, 20), (5, 8, 3, 4), (2, 8, 1, 2)]
)
def test_no_item_is_at_both_ends(tmp_path, drawn, count, columns, rows, shown):
    values = torch.arange(count, dtype=torch.float64)
    show.extremes(images(count, 3), values, tmp_path / "a.png", columns=columns, rows=rows)
    items = [int(pixels.max()) for pixels, _ in drawn("imshow")]
    assert len(items) == len(set(items)) == shown
    assert drawn("imshow")[0][0].shape == (4, 6, 3)
    assert items[: shown // 2] == list(range(shown // 2))


def test_extremes_take_volumes_and_refuse_what_is_no_picture(tmp_path):
    file = tmp_path / "a.png"
    show.extremes(torch.zeros(4, 1, 3, 4, 4, dtype=torch.uint8), torch.arange(4.0), file)
    assert file.exists()
    for bad, values, options, said in [
        (torch.zeros(4, 2), torch.arange(4.0), {}, "needs images"),
        (images(4), torch.arange(3.0), {}, "as many values"),
        (images(4), torch.arange(4.0), {"columns": 0}, "columns"),
        (images(4), torch.full((4,), math.nan), {}, "two items"),
        (images(4), torch.arange(4.0), {"likely": "lowest"}, "did you mean 'low'"),
    ]:
        with pytest.raises(ValueError, match=said):
            show.extremes(bad, values, file, **options)


def test_a_histogram_has_common_bins_and_every_finite_value(tmp_path, drawn):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(500, generator=generator)
    b = 8 + 0.1 * torch.randn(300, generator=generator)
    b[0] = math.nan
    auroc = {"likelihood": (0.98765, 0.00123)}
    show.histogram({"in": a, "out": b}, tmp_path / "a.png", "bits/dim", auroc)
    hists = drawn("hist")
    edges = hists[0][1]["bins"]
    assert all(np.array_equal(options["bins"], edges) for _, options in hists)
    assert 10 < len(edges) <= show.BINS + 1
    assert edges[0] == pytest.approx(float(a.min()))
    assert edges[-1] == pytest.approx(float(b[1:].max()))
    assert all(options["density"] for _, options in hists)
    labels = [options["label"] for _, options in hists if "label" in options]
    assert labels == [
        f"in: {a.mean():.3f} on average, 500 items",
        f"out: {b[1:].mean():.3f} on average, 299 items, 1 not finite",
    ]
    means = [x for x, _ in drawn("axvline")]
    assert means == pytest.approx([float(a.double().mean()), float(b[1:].double().mean())])
    assert drawn("supxlabel")[0][0] == "AUROC by likelihood: 0.9877 ± 0.0012"
    assert drawn("set_xlabel")[0][0] == "bits/dim"
    assert size(tmp_path / "a.png") == (770, 440)


def test_a_histogram_of_one_value_and_of_none(tmp_path):
    show.histogram({"a": torch.ones(3)}, tmp_path / "a.png", "nats")
    assert (tmp_path / "a.png").exists()
    with pytest.raises(ValueError, match="none of b"):
        show.histogram({"a": torch.ones(3), "b": torch.tensor([math.nan])}, tmp_path / "b.png", "")
    with pytest.raises(ValueError, match="none of any"):
        show.histogram({}, tmp_path / "b.png", "")
