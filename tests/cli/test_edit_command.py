"""scoresde edit: noised and drawn again, or carried over a bridge; as a user runs it."""

import json
import math
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import scoresde as sd
from scoresde import nets
from scoresde.cli import edit as module
from scoresde.cli.heldout import held_out_data
from scoresde.cli.items import read_picture
from scoresde.data import Scaler

FAST = ["--solver", "dpmpp-2m", "--steps", "6"]


def tiny(folder, sde, shape, net, scaler):
    sd.ScoreModel(net, sde, sd.Karras(), shape=shape, scaler=scaler).save(folder)
    return str(folder)


def points(folder, sde, scaler):
    torch.manual_seed(0)
    return tiny(folder, sde, (2,), nets.MLP(shape=(2,), width=8), scaler)


def figures(file):
    return json.loads(file.read_text())


def test_an_edit_is_that_of_the_library(run, tmp_path):
    said = run("edit", 3, "--model", "zoo:digits", "--strength", 0.35, "-n", 3, *FAST, "--seed",
               4, "--out", "e.npy", "--json", "e.json")  # fmt: skip
    model = sd.load("zoo:digits")
    item = held_out_data("zoo:digits", None, "test").x[3:4]
    x0 = model.scaler.encode(item, dequantize=False).float()
    out = sd.edit(model, x0, 0.35, 3, solver="dpmpp-2m", steps=6, seed=4)
    found = np.load(tmp_path / "e.npy")
    assert found.shape == (3, 1, 8, 8)
    assert np.array_equal(found, model.scaler.decode(out.x).numpy())
    told = figures(tmp_path / "e.json")
    assert (told["strength"], told["t_start"], told["draws"]) == (0.35, pytest.approx(0.35), 3)
    assert told["log_snr"] == pytest.approx(float(sd.VP().log_snr(0.35)))
    assert (told["nfe"], told["steps"], told["network_forwards"]) == (7, 6, 7)
    assert (told["item"], told["seed"], told["converged"]) == ("digits:3", 4, True)
    assert told["distance"] == pytest.approx(8.5 * float((out.x - x0).square().mean().sqrt()))
    assert told["std"] == pytest.approx(8.5 * float(out.x.var(0).mean().sqrt()))
    assert "3 edits of digits:3 under zoo:digits from strength 0.35 (t=0.35) by dpmpp-2m: 7" in (
        said.out
    )
    assert f"RMS {told['distance']:.3g} from the input, and {told['std']:.3g}" in said.out


def test_results_do_not_depend_on_how_many_are_drawn_at_once(run, tmp_path, monkeypatch):
    common = ["edit", 0, "--model", "zoo:digits", "-n", 5, "--solver", "ancestral", "--steps", 4]
    run(*common, "--out", "a.npy")
    monkeypatch.setattr(module, "BATCH", 2)
    run(*common, "--out", "b.npy", "--json", "b.json")
    a, b = (np.load(tmp_path / f"{n}.npy").astype(int) for n in "ab")
    assert a.shape == (5, 1, 8, 8)
    assert np.abs(a - b).max() <= 1  # a level, by rounding
    assert figures(tmp_path / "b.json")["draws"] == 5


def enlarged(levels, factor=12):
    grey = np.round(levels[0].astype(float) * 255 / 16).astype(np.uint8)
    return np.repeat(grey[..., None], 3, 2).repeat(factor, 0).repeat(factor, 1)


def columns(page, tiles):
    """The left edges of tiles on a sheet of one row."""
    width = tiles[0].shape[1]
    rows = np.argwhere((page[:, :, None] == tiles[0][0, 0]).all(-1))[:, 0]
    found = []
    for tile in tiles:
        places = [
            x
            for y in np.unique(rows)
            for x in range(page.shape[1] - width + 1)
            if np.array_equal(page[y : y + width, x : x + width], tile)
        ]
        assert len(places) >= 1
        found.append(places[0])
    return found


def test_the_picture_shows_input_results_and_mean(run, tmp_path):
    common = ["edit", 3, "--model", "zoo:digits", "--strength", 0.3, "-n", 3, *FAST]
    run(*common)
    run(*common, "--out", "e.npy")
    page = np.asarray(Image.open(tmp_path / "edited.png").convert("RGB"))
    item = held_out_data("zoo:digits", None, "test").x[3].numpy()
    tiles = [enlarged(item), *(enlarged(x) for x in np.load(tmp_path / "e.npy"))]
    first, *results = columns(page, tiles)
    assert first < results[0] < results[1] < results[2]
    assert results[0] - first > 2 * 96  # the noised input stands between
    between = page[:, first + 102 : results[0] - 20]
    assert len(np.unique(between.reshape(-1, 3), axis=0)) > 8
    right = page[60, results[2] + 102 :]
    assert (right[:, 0] != right[:, 2]).any()  # the uncertainty has colours
    run("edit", 3, "--model", "zoo:digits", "-n", 1, *FAST, "--out", "one.png", "--json", "o.json")
    assert Image.open(tmp_path / "one.png").width < page.shape[1]
    assert figures(tmp_path / "o.json")["std"] is None


def test_points_and_signals_are_drawn_too(run, tmp_path):
    model = points(tmp_path / "m", sd.EDM(), Scaler((0.5, 0.2), (2.0, 4.0)))
    np.save(tmp_path / "p.npy", np.array([0.5, 0.2], np.float32))
    run("edit", "p.npy", "--model", model, "-n", 20, *FAST, "--json", "p.json")
    assert Image.open(tmp_path / "edited.png").width > 300
    told = figures(tmp_path / "p.json")
    q = math.exp(-float(sd.VP().log_snr(0.5)))
    assert told["t_start"] == pytest.approx(q)  # EDM's time is the noise level
    net = nets.UNet(shape=(1, 16), width=8, multipliers=(1,), attention=())
    signals = tiny(tmp_path / "s", sd.VP(), (1, 16), net, Scaler())
    np.save(tmp_path / "s.npy", np.sin(np.arange(16, dtype=np.float32))[None])
    run("edit", "s.npy", "--model", signals, "--t-start", 0.2, *FAST, "--json", "s.json",
        "--out", "s.png")  # fmt: skip
    assert Image.open(tmp_path / "s.png").width > 300
    told = figures(tmp_path / "s.json")
    assert (told["t_start"], told["strength"], told["draws"]) == (0.2, None, 8)


def test_classes_are_the_items_own_or_the_given_and_can_be_guided_to(run, tmp_path):
    net = nets.UNet(shape=(1, 8, 8), width=8, multipliers=(1,), attention=(), num_classes=10)
    for p in net.parameters():  # a network that has learned to see its classes
        torch.nn.init.normal_(p, std=0.2)
    model = tiny(tmp_path / "c", sd.VP(), (1, 8, 8), net, Scaler((8.5,), (2 / 17,), 17))
    np.save(tmp_path / "item.npy", held_out_data("zoo:digits", None, "test").x[0].numpy())
    common = ["edit", "item.npy", "--model", model, "-n", 2, *FAST]
    said = run(*common, code=1)
    assert "the results are of a class: give it with --label" in said.err
    for name, more in (
        ("a", ["--label", 3]),
        ("b", ["--label", 4]),
        ("c", ["--label", 3, "--cfg", 1]),
        ("d", ["--label", 3, "--cfg", 3, "--json", "d.json"]),
    ):
        run(*common, *more, "--out", f"{name}.npy")
    a, b, c, d = (np.load(tmp_path / f"{n}.npy").astype(int) for n in "abcd")
    assert np.array_equal(a, c)
    assert (a != b).any()
    assert (a != d).any()
    told = figures(tmp_path / "d.json")
    assert (told["label"], told["guidance"]["scale"], told["network_forwards"]) == (3, 3.0, 14)
    said = run("edit", 0, "--model", "zoo:digits", "--cfg", 2, code=1)
    assert "--cfg needs a class-conditional model" in said.err
    assert "--label 10 is out of range" in run(*common, "--label", 10, code=1).err
    run("edit", "item.npy", "--from", model, "--model", model, "--from-label", 3, "--label", 4,
        "--out", "moved.npy", "--solver", "heun", "--steps", 5)  # fmt: skip
    moved = np.load(tmp_path / "moved.npy").astype(int)
    assert (np.abs(moved - np.load(tmp_path / "item.npy")) > 1).any()


def test_a_kept_picture_is_cropped_with_the_item(run, tmp_path):
    wide = np.zeros((8, 16), np.uint8)
    wide[:, :8] = 255  # of the centre square the left half
    Image.fromarray(wide).save(tmp_path / "mask.png")
    Image.fromarray(np.arange(128, dtype=np.uint8).reshape(8, 16)).save(tmp_path / "wide.png")
    common = ["edit", "wide.png", "--model", "zoo:digits", "--resize", "-n", 2, *FAST]
    run(*common, "--keep", "mask.png", "--out", "a.npy")
    run(*common, "--keep", "half:side=left", "--out", "b.npy")
    assert np.array_equal(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"))
    said = run("edit", 0, "--model", "zoo:digits", "--keep", "mask.png", code=1)
    assert "it is 16 x 8, and items are 8 x 8: other proportions" in said.err


def test_a_region_is_left_as_it_is(run, tmp_path):
    common = ["edit", 3, "--model", "zoo:digits", "--strength", 0.8, "-n", 2, *FAST]
    item = held_out_data("zoo:digits", None, "test").x[3].numpy().astype(int)
    run(*common, "--keep", "half:side=top", "--out", "a.npy", "--json", "a.json")
    a = np.load(tmp_path / "a.npy").astype(int)
    assert np.array_equal(a[:, :, :4], item[None, :, :4].repeat(2, 0))
    assert (a[:, :, 4:] != item[:, 4:]).mean() > 0.2
    assert figures(tmp_path / "a.json")["keep"] == "half:side=top"
    run(*common, "--keep", "half:side=top")
    page = np.asarray(Image.open(tmp_path / "edited.png").convert("RGB"))
    tile = enlarged(item)
    upper = page[:, columns(page, [tile])[0] + 102 :][:, :96]  # the second column
    rows = [y for y in range(len(page) - 96) if np.array_equal(upper[y : y + 48], tile[:48])]
    assert len(rows) == 1
    assert upper[rows[0] + 48 : rows[0] + 96].min() > 200  # a checkerboard below
    white = np.zeros((8, 8), np.uint8)
    white[:, 6:] = 255
    Image.fromarray(white).save(tmp_path / "mask.png")
    run(*common, "--keep", "mask.png", "--out", "b.npy")
    b = np.load(tmp_path / "b.npy").astype(int)
    assert np.array_equal(b[..., 6:], item[None, ..., 6:].repeat(2, 0))
    assert (b[..., :6] != item[..., :6]).mean() > 0.2


def test_a_bridge_goes_through_both_scalers(run, tmp_path):
    """One network under two scalers: in model range the bridge is the identity."""
    scalers = Scaler((0.5, 0.2), (2.0, 4.0)), Scaler((-3.0, 10.0), (0.5, 1.0))
    one, other = (points(tmp_path / f"m{k}", sd.VP(), s) for k, s in enumerate(scalers))
    x = torch.tensor([[0.7, 0.1]])
    np.save(tmp_path / "p.npy", x[0].numpy())
    said = run("edit", "p.npy", "--from", one, "--model", other, "--out", "b.npy",
               "--json", "b.json")  # fmt: skip
    expected = scalers[1].decode(scalers[0].encode(x))
    assert np.load(tmp_path / "b.npy") == pytest.approx(expected.numpy(), abs=1e-2)
    told = figures(tmp_path / "b.json")
    assert (told["from"], told["model"], told["converged"]) == (one, other, True)
    assert 0 < told["cycle"] < 1e-2
    assert told["nfe_encode"] > 6
    assert told["nfe_decode"] > 6
    assert f"there and back: RMS {told['cycle']:.3g} in model range" in said.out
    run("edit", "p.npy", "--from", one, "--model", other)
    assert Image.open(tmp_path / "edited.png").width > 300


def test_a_bridge_of_pictures_shows_both_ends(run, tmp_path):
    run("edit", 3, "--from", "zoo:digits", "--model", "zoo:digits", "--solver", "heun", "--steps",
        12, "--grid", "logsnr", "--json", "b.json")  # fmt: skip
    page = np.asarray(Image.open(tmp_path / "edited.png").convert("RGB"))
    item = held_out_data("zoo:digits", None, "test").x[3].numpy()
    assert len(columns(page, [enlarged(item)])) == 1
    assert figures(tmp_path / "b.json")["steps"] == 12
    assert (figures(tmp_path / "b.json")["nfe_encode"]) == 24


def test_pictures_of_another_size_are_cropped_about_their_centre(run, tmp_path):
    y, x = np.mgrid[:40, :60]
    smooth = np.stack([4 * x, 6 * y, 2 * (x + y)], -1).astype(np.uint8)
    colours = Image.fromarray(smooth)
    colours.save(tmp_path / "large.png")
    net = nets.UNet(shape=(3, 8, 16), width=8, multipliers=(1,), attention=())
    model = sd.ScoreModel(net, sd.VP(), sd.Eps(), shape=(3, 8, 16), scaler=None)
    x = read_picture(model, tmp_path / "large.png", resize=True)
    cropped = colours.crop((0, 5, 60, 35)).resize((16, 8), Image.Resampling.LANCZOS)
    wanted = np.asarray(cropped, dtype=float).transpose(2, 0, 1) / 127.5 - 1
    assert np.abs(x[0].numpy() - wanted)[:, 1:-1, 1:-1].max() < 1.5 / 127.5
    fitted = np.asarray(ImageOps.fit(colours, (16, 8), Image.Resampling.LANCZOS), dtype=float)
    assert np.allclose(x[0].numpy(), fitted.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)
    said = run("edit", "large.png", "--model", "zoo:digits", code=1)
    assert "large.png is of shape (1, 40, 60)" in said.err
    run("edit", "large.png", "--model", "zoo:digits", "--resize", "-n", 1, *FAST)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["0", "--strength", "0"], "strength must lie in (0, 1], got 0"),
        (["0", "--strength", "1.5"], "strength must lie in (0, 1], got 1.5"),
        (["0", "--strength", "0.0005"], "take a larger one"),
        (["0", "--t-start", "2"], "t_start=2 lies outside the trained times"),
        (["0", "--t-start", "0.5", "--strength", "0.5"], "--strength and --t-start say the same"),
        (["0", "--from", "zoo:digits", "--strength", "0.5"], "a bridge draws nothing"),
        (["0", "--from", "zoo:digits", "-n", "2"], "a bridge draws nothing"),
        (["0", "--from", "zoo:digits", "--keep", "half"], "a bridge draws nothing"),
        (["0", "--keep", "none.png"], "cannot read the mask none.png"),
        (["0", "--rescale", "0.5"], "--rescale needs --cfg"),
        (["0", "--from", "zoo:mnist"], "two models of one shape, got items of (1, 28, 28)"),
        (["0", "--from", "zoo:digits", "--solver", "ancestral"], "'ancestral' draws noise"),
        (["0", "--from-label", "3"], "--from-label belongs to --from"),
        (["0", "--label", "3"], "needs a class-conditional model"),
        (["0", "--out", "x.bmp"], "accepted are .png and .npy"),
        (["0", "--out", "x.png", "--json", "x.png"], "x.png cannot hold two things"),
        (["nothing.png"], "no item at 'nothing.png': there is no such file"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_mistakes_give_one_line_and_leave_nothing(run, tmp_path, args, said):
    found = run("edit", *args, "--model", "zoo:digits", code=1).err
    assert said in found
    assert found.startswith("Error: ")
    assert len(found.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


PAGE = (Path(__file__).parents[2] / "docs" / "editing.md").read_text()


@pytest.mark.parametrize("line", re.findall(r"^scoresde .*$", PAGE, flags=re.M))
def test_commands_of_the_page_run(run, tmp_path, line):
    arguments = shlex.split(line, comments=True)[1:]
    run(*arguments, "--solver", "dpmpp-2m", "--steps", 4, "--grid", "logsnr", "--json", "x.json")
    assert "zoo:digits" in figures(tmp_path / "x.json")["model"]
    assert len(list(tmp_path.glob("*.png"))) == 1


def test_python_of_the_page_runs():
    scope: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.S):
        exec(block, scope)
    assert scope["out"].cycle.max() < 0.3
