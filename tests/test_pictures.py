"""Pictures of draws that are no images: what stands on their axes."""

import numpy as np
import pytest
import torch
from PIL import Image

from scoresde import pictures
from scoresde.pictures import save_draws


@pytest.fixture
def figure(monkeypatch, tmp_path):
    """Draws a picture, and gives its panels that are seen."""
    kept = []
    save = pictures._save
    monkeypatch.setattr(pictures, "_save", lambda f, file: (kept.append(f), save(f, file)))

    def make(*args, **kwargs):
        save_draws(tmp_path / "x.png", *args, **kwargs)
        assert Image.open(tmp_path / "x.png").width > 200
        return [axes for axes in kept[-1].axes if axes.get_visible()]

    return make


def test_signals_have_a_band_of_two_standard_deviations(figure):
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(2, 12, 3, 20, generator=generator, dtype=torch.float64)
    known = torch.rand(2, 3, 20, generator=generator) < 0.3
    measured, truth = draws[:, 0] + 1, draws[:, 1]
    panels = figure(draws, [("measured", measured), ("input", truth)], known, shown=5)
    assert len(panels) == 6
    for place, axes in enumerate(panels):
        i, c = divmod(place, 3)
        lines = {}
        for line in axes.lines:
            lines.setdefault(line.get_label(), []).append(line)
        mean, std = draws[i, :, c].mean(0).numpy(), draws[i, :, c].std(0).numpy()
        assert np.allclose(lines["mean"][0].get_ydata(), mean)
        assert len(axes.lines) == 1 + 5 + 2
        assert np.allclose(lines["draws"][0].get_ydata(), draws[i, 0, c])
        assert np.allclose(lines["measured"][0].get_ydata(), measured[i, c][known[i, c]])
        assert np.allclose(lines["measured"][0].get_xdata(), np.flatnonzero(known[i, c]))
        assert np.allclose(lines["input"][0].get_ydata(), truth[i, c])
        band = axes.collections[0].get_paths()[0].vertices
        for x in range(20):
            at = band[band[:, 0] == x, 1]
            assert at.min() == pytest.approx(mean[x] - 2 * std[x])
            assert at.max() == pytest.approx(mean[x] + 2 * std[x])


def test_vectors_are_curves_and_one_draw_has_no_band(figure):
    draws = torch.arange(7.0)[None, None]
    (axes,) = figure(draws, [("input", draws[:, 0] + 1)])
    assert not axes.collections
    assert [line.get_label() for line in axes.lines] == ["draws", "input"]
    assert np.allclose(axes.lines[1].get_ydata(), np.arange(7) + 1)


def test_points_are_scattered_and_a_known_entry_is_a_line(figure):
    draws = torch.randn(5, 9, 2, generator=torch.Generator().manual_seed(0))
    given = torch.randn(5, 2, generator=torch.Generator().manual_seed(1))
    known = torch.tensor([[1, 0], [0, 1], [1, 1], [1, 0], [1, 0]]).bool()
    panels = figure(draws, [("measured", given), ("input", given + 1)], known)
    assert len(panels) == 5
    for i, axes in enumerate(panels):
        assert np.allclose(axes.collections[0].get_offsets(), draws[i])
        assert np.allclose(axes.collections[-1].get_offsets(), given[i] + 1)
    across, along = panels[0].lines[0], panels[1].lines[0]
    assert np.allclose(across.get_xdata(), float(given[0, 0]))
    assert np.allclose(along.get_ydata(), float(given[1, 1]))
    assert not panels[2].lines
    assert np.allclose(panels[2].collections[1].get_offsets(), given[2])
