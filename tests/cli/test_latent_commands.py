"""encode, decode, interpolate, and what sample can do besides: as a user runs them."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import scoresde as sd
from scoresde import nets
from scoresde.data import Scaler

FAST = ["--solver", "dpmpp-3m", "--steps", "40", "--grid", "logsnr"]


def tiny(folder, sde, shape, net, scaler, **sections):
    torch.manual_seed(0)
    sd.ScoreModel(net, sde, sd.Eps(), shape=shape, scaler=scaler).save(folder)
    return str(folder)


def vectors(folder, sde=None):
    scaler = Scaler((0.5, 0.2), (2.0, 4.0))
    return tiny(folder, sde or sd.VP(), (2,), nets.MLP(shape=(2,), width=8), scaler)


def test_encode_then_decode_returns_the_data(run, tmp_path):
    said = run("encode", "zoo:digits", "--items", 3, "--check", "--batch", 2, "--json", "e.json",
               "--seed", 3)  # fmt: skip
    figures = json.loads((tmp_path / "e.json").read_text())
    assert figures["items"] == 3
    assert figures["t_min"] == 1e-5
    assert 0 < figures["round_trip"] < 1e-3
    assert figures["round_trip_data"] == pytest.approx(8.5 * figures["round_trip"])
    assert figures["levels_moved"] == 0
    assert 0.9 < figures["latent_rms"] < 1.1
    assert "round trip: RMS" in said.out
    with np.load(tmp_path / "latents.npz") as arrays:
        assert arrays["z"].shape == arrays["x"].shape == (3, 1, 8, 8)
    said = run("decode", "latents.npz", "--out", "d.npy", "--json", "d.json")
    assert json.loads((tmp_path / "d.json").read_text())["levels_moved"] == 0
    assert "zoo:digits" in said.out
    from scoresde.cli.heldout import held_out_data

    expected = held_out_data("zoo:digits", None, "test").x[:3].numpy()
    assert np.array_equal(np.load(tmp_path / "d.npy"), expected)
    run("decode", "zoo:digits", "latents.npz", *FAST, "--batch", 3)
    assert Image.open(tmp_path / "decoded.png").width > 8
    assert not list(tmp_path.glob(".*"))


def test_a_batch_does_not_change_the_latents(run, tmp_path):
    for name, batch in (("a", 1), ("b", 4)):
        run("encode", "zoo:digits", "--items", 4, *FAST, "--batch", batch, "--out", f"{name}.npz")
    a, b = (np.load(tmp_path / f"{n}.npz") for n in "ab")
    np.testing.assert_allclose(a["z"], b["z"], atol=2e-4)
    assert np.array_equal(a["x"], b["x"])


def test_a_picture_is_its_item(run, tmp_path):
    """What ``sample`` draws as a picture is read back as the item that it shows."""
    run("encode", "zoo:digits", "--items", 1, *FAST, "--no-dequantize", "--out", "item.npz")
    x = np.load(tmp_path / "item.npz")["x"]
    levels = np.floor(x * 8.5 + 8.5)
    grey = np.round(levels[0, 0] * 255 / 16).astype(np.uint8)
    Image.fromarray(grey).save(tmp_path / "digit.png")
    Image.fromarray(np.repeat(grey[..., None], 3, 2)).save(tmp_path / "colour.png")
    for name in ("digit", "colour"):
        run("encode", "zoo:digits", "--data", f"{name}.png", *FAST, "--no-dequantize",
            "--out", f"{name}.npz")  # fmt: skip
        assert np.array_equal(np.load(tmp_path / f"{name}.npz")["x"], x)


def test_interpolate_draws_the_way(run, tmp_path):
    said = run("interpolate", 0, 3, "--model", "zoo:digits", "--count", 4, "--json", "i.json")
    figures = json.loads((tmp_path / "i.json").read_text())
    assert figures["levels_moved"] == 0
    assert max(figures["round_trip_ends"]) < 1e-3
    assert "round trip: RMS" in said.out
    image = np.asarray(Image.open(tmp_path / "interpolation.png"))
    tiles = [image[8:72, 8 + 72 * i : 72 + 72 * i] for i in range(8)]  # A, gap, 4 items, gap, B
    assert np.array_equal(tiles[0], tiles[2])  # A and its round trip
    assert np.array_equal(tiles[5], tiles[7])
    assert (tiles[1] == 32).all()
    assert (tiles[3] != tiles[2]).any()
    run("interpolate", 0, 3, "--model", "zoo:digits", "--count", 4, *FAST, "--out", "way.npy")
    way = np.load(tmp_path / "way.npy")
    assert way.shape == (4, 1, 8, 8)
    back = run("interpolate", "way.npy:3", "way.npy:0", "--model", "zoo:digits", *FAST, "--count",
               2, "--out", "back.npy").out  # fmt: skip
    assert "way.npy:3 to way.npy:0" in back
    assert (np.load(tmp_path / "back.npy") == way[[3, 0]]).mean() > 0.9


def test_vectors_of_a_run_without_held_out_data(run, tmp_path):
    model = vectors(tmp_path / "m")
    np.save(tmp_path / "points.npy", np.array([[0.5, 0.2], [1.0, 0.3]], np.float32))
    said = run("interpolate", "points.npy:0", "points.npy:1", "--model", model, "--count", 3)
    assert "units of the data" in said.out
    assert "levels" not in said.out
    assert Image.open(tmp_path / "interpolation.png").width > 100
    run("encode", model, "--data", "moons", "--items", 3)
    assert np.load(tmp_path / "latents.npz")["z"].shape == (3, 2)
    said = run("interpolate", 0, 1, "--model", model, code=1)
    assert "does not say which data it held out" in said.err


def test_labels_follow_the_items(run, tmp_path):
    net = nets.UNet(shape=(1, 8, 8), width=8, multipliers=(1,), attention=(), num_classes=10)
    model = tiny(tmp_path / "c", sd.VP(), (1, 8, 8), net, Scaler((8.5,), (2 / 17,), 17))
    run("encode", model, "--data", "digits", "--items", 4, *FAST)
    with np.load(tmp_path / "latents.npz") as arrays:
        assert arrays["y"].shape == (4,)
    run("decode", "latents.npz")
    run("decode", "latents.npz", "--label", 3)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    said = run("interpolate", "a.png", "a.png", "--model", model, code=1)
    assert "class-conditional: give the class with --label" in said.err
    run("interpolate", "a.png", "a.png", "--model", model, "--label", 3, *FAST, "--count", 2)
    said = run("encode", "zoo:digits", "--label", 3, code=1)
    assert "needs a class-conditional model" in said.err


def test_latents_of_other_models_are_told_apart(run, tmp_path):
    first, other = vectors(tmp_path / "m"), vectors(tmp_path / "ve", sd.EDM())
    torch.manual_seed(5)
    model = sd.load(first)
    with torch.no_grad():
        next(model.net.parameters()).add_(0.01)
    model.save(tmp_path / "n")
    run("encode", first, "--data", "moons", "--items", 2, *FAST)
    said = run("decode", "zoo:digits", "latents.npz", code=1)
    assert "latents of shape (2,), and the model takes items of (1, 8, 8)" in said.err
    said = run("decode", other, "latents.npz", code=1)
    assert "under another process: " in said.err
    assert "name is vp, the model's edm" in said.err
    said = run("decode", "n", "latents.npz")
    assert said.err.startswith("Warning: latents.npz was encoded by other weights, of ")
    assert run("decode", first, "latents.npz").err == ""


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["encode", "zoo:digits", "--out", "x.npy"], "latents go into a .npz file"),
        (["encode", "zoo:digits", "--data", "moons"], "items of shape (2,)"),
        (["encode", "zoo:digits", "--data", "large.png"], "large.png is of shape (1, 9, 8)"),
        (["encode", "zoo:digits", "--data", "broken.png"], "broken.png: cannot be read as a pict"),
        (["encode", "zoo:digits", "--solver", "ancestral"], "'ancestral' draws noise"),
        (["encode", "zoo:digits", "--solver", "hoin"], "did you mean 'heun'"),
        (["encode", "zoo:digits", "--steps", "5"], "chooses its own steps"),
        (["encode", "zoo:digits", "--t-min", "1e-7"], "trained times"),
        (["encode", "nowhere"], "no such file or folder"),
        (["decode", "none.npz"], "no latents at none.npz: there is no such file"),
        (["decode", "noise.npz"], "holds no latents of 'scoresde encode', or is damaged"),
        (["decode", "text.npz"], "holds no latents of 'scoresde encode', or is damaged"),
        (["decode", "none.npz", "--out", "x.bmp"], "accepted are .png and .npy"),
        (["interpolate", "0", "x", "--model", "zoo:digits"], "no item at 'x': there is no such"),
        (["interpolate", "0", "text.txt", "--model", "zoo:digits"], "cannot read this kind"),
        (["interpolate", "0", "999", "--model", "zoo:digits"], "no held-out item 999"),
        (["interpolate", "0", "large.png", "--model", "zoo:digits"], "of shape (1, 9, 8)"),
        (["interpolate", "0", "two.npy", "--model", "zoo:digits"], "take one of them, as in"),
        (["interpolate", "0", "two.npy:2", "--model", "zoo:digits"], "holds 2 items"),
        (["interpolate", "0", "high.npy", "--model", "zoo:digits"], "values run from 0 to 40"),
        (["interpolate", "0", "half.npy", "--model", "zoo:digits"], "whole levels 0 to 16"),
        (["interpolate", "0", "bad.npy", "--model", "zoo:digits"], "bad.npy cannot be read"),
        (["sample", "zoo:digits", "--log-prob", "--solver", "ddim", "--set", "eta=1"],
         "'ddim' draws noise"),
        (["sample", "zoo:digits", "--log-prob", "--denoise"], "leave out denoise"),
        (["sample", "zoo:digits", "--threshold", "hard"], "unknown threshold mode 'hard'"),
        (["sample", "zoo:digits", "--threshold", "{mode: "], "neither a name nor a section"),
    ],
    ids=lambda value: "-".join(value)[:40] if isinstance(value, list) else "",
)  # fmt: skip
def test_mistakes_give_one_line_and_leave_nothing(run, tmp_path, args, said):
    Image.fromarray(np.zeros((9, 8), np.uint8)).save(tmp_path / "large.png")
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    (tmp_path / "text.npz").write_text("text")
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "bad.npy").write_text("text")
    np.savez(tmp_path / "noise.npz", x=np.zeros(3))
    np.save(tmp_path / "two.npy", np.zeros((2, 1, 8, 8), np.uint8))
    high = np.zeros((1, 8, 8), np.uint8)
    high[0, 0, 0] = 40
    np.save(tmp_path / "high.npy", high)
    np.save(tmp_path / "half.npy", np.full((1, 8, 8), 0.5))
    before = sorted(p.name for p in tmp_path.rglob("*"))
    found = run(*args, code=1).err
    assert said in found
    assert found.startswith("Error: ")
    assert len(found.strip().splitlines()) == 1
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


# --- sample -----------------------------------------------------------------------------------


def test_sample_with_densities(run, tmp_path):
    said = run("sample", "zoo:digits", "-n", 3, "--batch", 2, "--solver", "dpmpp-3m", "--steps",
               12, "--log-prob", "--probes", 2, "--out", "s.npy", "--json", "s.json")  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "s.csv").read_text().splitlines()))
    figures = json.loads((tmp_path / "s.json").read_text())
    nats = [float(row["nats"]) for row in rows]
    assert nats == figures["log_prob"]
    assert len(nats) == 3
    assert all(float(row["stderr"]) > 0 for row in rows)
    assert figures["nfe"] == 12
    assert figures["denoise"] is False
    assert (figures["divergence"], figures["probes"]) == ("hutchinson", 2)
    assert f"mean {np.mean(nats):.4f} nats, from {min(nats):.4f} to {max(nats):.4f}" in said.out
    assert np.load(tmp_path / "s.npy").shape == (3, 1, 8, 8)


def test_sample_with_a_threshold_and_fewer_points_at_the_end(run, tmp_path):
    common = ["sample", "zoo:digits", "-n", 4, "--solver", "dpmpp-3m", "--steps", 5]
    run(*common, "--out", "a.npy", "--json", "a.json")
    run(*common, "--set", "lower_last=true", "--out", "b.npy", "--json", "b.json")
    run(*common, "--threshold", "dynamic", "--out", "c.npy", "--json", "c.json")
    run(*common, "--threshold", "{mode: static, bound: 0.3}", "--out", "d.npy", "--json", "d.json")
    figures = [json.loads((tmp_path / f"{n}.json").read_text()) for n in "abcd"]
    assert [f["solver"]["lower_last"] for f in figures] == [False, True, False, False]
    assert figures[0]["threshold"] is None
    assert figures[2]["threshold"] == {"mode": "dynamic", "quantile": 0.995, "bound": 1.0}
    assert figures[3]["threshold"]["bound"] == 0.3
    a, b, _, d = (np.load(tmp_path / f"{n}.npy").astype(int) for n in "abcd")
    assert (a != b).any()
    assert d.min() >= 5  # 8.5 - 0.3 * 8.5 levels
    assert d.max() <= 11


def test_a_warning_is_one_line_without_file_names(tmp_path):
    """In a process of its own: Python shows a warning from one place once."""
    model = vectors(tmp_path / "ve", sd.VE())
    done = subprocess.run(
        [sys.executable, "-m", "scoresde", "sample", model, "-n", "4", "--batch", "2", "--solver",
         "ddim", "--steps", "10"],
        cwd=tmp_path, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == (
        "Warning: 10 steps on the grid 'logsnr' of the deterministic 'ddim' give noisy samples "
        "from trained VE models: take the grid 'karras' with 27 evaluations, 100 steps, or the "
        "solver 'pc'\n"
    )
