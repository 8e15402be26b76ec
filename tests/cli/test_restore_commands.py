"""``scoresde inpaint``, ``superres``, ``colorize`` and ``solve``, end to end on small models."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import scoresde as sd
from scoresde import given
from scoresde.cli import cli
from scoresde.data import Scaler


def run(*args, code=0):
    result = CliRunner().invoke(cli, list(map(str, args)))
    if code == 0:
        assert result.exit_code == 0, (result.output, result.exception)
        return result.output
    assert result.exit_code != 0
    return str(result.exception) + result.output


DIGITS = ("--model", "zoo:digits", "--steps", 4, "-n", 3)


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """A model of colour pictures that has learned nothing: all are grey to it."""
    folder = tmp_path_factory.mktemp("colours")
    torch.manual_seed(0)
    net = sd.nets.UNet((3, 8, 8), width=8, multipliers=(1,), blocks=1, attention=())
    scaler = Scaler((128.0,), (1 / 128,), 256)
    sd.ScoreModel(net, sd.VP(), sd.X0(), shape=(3, 8, 8), scaler=scaler).save(folder)
    return folder


def test_inpaint_shows_input_known_results_mean_and_std(tmp_path):
    out, figures = tmp_path / "shown.png", tmp_path / "figures.json"
    said = run("inpaint", 0, 1, *DIGITS, "--method", "ddrm", "--out", out, "--json", figures)
    assert "3 results for 2 items under zoo:digits by ddrm: 5 evaluations each" in said
    report = json.loads(figures.read_text())
    assert report["operator"] == {"name": "middle-box", "side": 0.5, "measured": 48}
    assert report["method"] == {"name": "ddrm"}
    assert report["residual"] < 1e-5  # what is known is in the results
    assert report["rmse"] > report["rmse_of_mean"] > 0
    with Image.open(out) as image:
        assert image.width > image.height > 2 * 96  # two rows of tiles, seven columns


def test_arrays_hold_every_result_in_data_units(tmp_path):
    out = tmp_path / "found.npy"
    run("inpaint", 0, 1, *DIGITS, "--method", "replacement", "--out", out)
    found = np.load(out)
    assert found.shape == (2, 3, 1, 8, 8)
    data = sd.load("zoo:digits")
    from scoresde.cli.items import read_item

    known = np.ones((8, 8), bool)
    known[2:6, 2:6] = False
    for i in range(2):
        original = read_item(data, "zoo:digits", str(i)).x[0, 0].numpy()
        for k in range(3):
            assert np.array_equal(found[i, k, 0][known], original[known])
    assert not np.array_equal(found[0, 0], found[0, 1])  # two draws of one item


def test_a_second_run_gives_the_same_results_and_another_seed_others(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(
            "inpaint",
            0,
            *DIGITS,
            "--method",
            "ddrm",
            "--seed",
            seed,
            "--out",
            tmp_path / f"{name}.npy",
        )
    a, b, c = (np.load(tmp_path / f"{name}.npy") for name in "abc")
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_a_mask_is_a_picture_white_where_known(tmp_path):
    mask = np.zeros((8, 8), np.uint8)
    mask[:, :3] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    for flag, measured in (((), 24), (("--invert",), 40)):
        figures = tmp_path / "figures.json"
        run("inpaint", 0, *DIGITS, "--method", "ddrm", "--mask", tmp_path / "mask.png", *flag,
            "--out", tmp_path / "x.png", "--json", figures)  # fmt: skip
        assert json.loads(figures.read_text())["operator"]["measured"] == measured


@pytest.mark.parametrize("method", ["mmps", "pgdm:sigma_data=0.5", "smc:particles=8"])
def test_superres_by_several_methods(tmp_path, method):
    figures = tmp_path / "figures.json"
    run("superres", 0, "--factor", 2, *DIGITS, "--method", method, "--noise", 0.05,
        "--out", tmp_path / "x.png", "--json", figures)  # fmt: skip
    report = json.loads(figures.read_text())
    assert report["operator"] == {"name": "average-pool", "factor": 2, "measured": 16}
    assert report["products"] > 0
    assert 0 < report["residual"] < 0.5


def test_a_small_picture_is_itself_the_measurement(tmp_path):
    Image.fromarray(np.full((4, 4), 90, np.uint8)).save(tmp_path / "small.png")
    out = tmp_path / "found.npy"
    said = run("superres", tmp_path / "small.png", "--small", "--factor", 2, *DIGITS,
               "--method", "ddrm", "--out", out)  # fmt: skip
    assert "from the input" not in said
    level = round(90 * 16 / 255)
    means = np.load(out).reshape(3, 4, 2, 4, 2).mean((2, 4))
    assert np.abs(means - level).max() <= 1.0  # levels are whole, their means need not be


def test_colorize_keeps_the_luma(colours, tmp_path):
    picture = np.random.default_rng(0).integers(60, 200, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "old.png")
    out = tmp_path / "found.npy"
    run("colorize", tmp_path / "old.png", "--model", colours, "--steps", 4, "-n", 2,
        "--method", "ddrm", "--out", out)  # fmt: skip
    luma = np.array([0.299, 0.587, 0.114])
    found = (np.load(out) * luma[:, None, None]).sum(1)
    wanted = (picture.transpose(2, 0, 1) * luma[:, None, None]).sum(0)
    clipped = (np.load(out) == 0) | (np.load(out) == 255)
    inside = ~clipped.any(1)
    assert inside.mean() > 0.5
    assert np.abs(found - wanted)[inside].max() <= 0.51  # whole levels
    run("colorize", tmp_path / "old.png", "--model", colours, "--steps", 2, "--method", "ddrm",
        "--out", tmp_path / "x.png")  # fmt: skip


def test_solve_takes_measurements_of_an_array(tmp_path):
    from scoresde.inverse import RandomProjection

    y = torch.zeros(2, 10)
    np.save(tmp_path / "y.npy", y.numpy())
    out = tmp_path / "found.npy"
    run("solve", "--operator", "random-projection:count=10", "--measurement", tmp_path / "y.npy",
        *DIGITS, "--method", "ddrm", "--out", out)  # fmt: skip
    assert np.load(out).shape == (2, 3, 1, 8, 8)
    assert RandomProjection((1, 8, 8), 10).out == (10,)
    np.save(tmp_path / "y.npy", np.zeros((2, 9), np.float32))
    said = run("solve", "--operator", "random-projection:count=10", "--measurement",
               tmp_path / "y.npy", *DIGITS, code=1)  # fmt: skip
    assert "is of shape (2, 9); measurements are (N, 10)" in said


def test_a_model_that_was_trained_for_it_is_asked_directly(tmp_path):
    torch.manual_seed(0)
    net = sd.nets.UNet((1, 8, 8), width=8, multipliers=(1,), attention=(), image_channels=2)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    scaler = Scaler((8.5,), (2 / 17,), 17)
    model = sd.ScoreModel(
        net, sd.VP(), sd.V(), shape=(1, 8, 8), scaler=scaler, given=given.Masked()
    )
    model.save(tmp_path / "model")
    np.save(tmp_path / "item.npy", np.full((1, 8, 8), 5))
    figures = tmp_path / "figures.json"
    said = run("inpaint", tmp_path / "item.npy", "--model", tmp_path / "model", "--steps", 3,
               "-n", 2, "--out", tmp_path / "x.png", "--json", figures)  # fmt: skip
    assert "by trained" in said
    assert json.loads(figures.read_text())["products"] == 0
    said = run("superres", tmp_path / "item.npy", "--model", tmp_path / "model", "--factor", 2,
               "--out", tmp_path / "x.png", code=1)  # fmt: skip
    assert "trained to fill in what a mask hides" in said


def test_items_that_are_no_pictures_are_drawn_as_curves(tmp_path):
    torch.manual_seed(0)
    net = sd.nets.UNet((1, 16), width=8, multipliers=(1,), blocks=1, attention=())
    sd.ScoreModel(net, sd.VP(), sd.X0(), shape=(1, 16)).save(tmp_path / "model")
    np.save(tmp_path / "signal.npy", np.sin(np.arange(16, dtype=np.float32))[None])
    for command in (("inpaint",), ("solve", "--operator", "blur:std=1")):
        run(*command, tmp_path / "signal.npy", "--model", tmp_path / "model", "--steps", 3,
            "--method", "ddrm", "--out", tmp_path / f"{command[0]}.png")  # fmt: skip
        with Image.open(tmp_path / f"{command[0]}.png") as image:
            assert image.width > image.height > 100


def test_pictures_that_do_not_fit_are_named(colours, tmp_path):
    square = np.zeros((8, 8), np.uint8)
    square[:, :4] = 255
    for name, pixels in (
        ("wide", square[:4]),
        ("white", square * 0 + 255),
        ("black", square * 0),
    ):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    for name, message in (
        ("wide", "it is 8 x 4, and items are 8 x 8: other proportions"),
        ("white", "leaves nothing to draw"),
        ("black", "a mask needs a known entry"),
    ):
        said = run("inpaint", 0, *DIGITS, "--mask", tmp_path / f"{name}.png", code=1)
        assert f"the mask {tmp_path / name}.png" in said
        assert message in said
    said = run("superres", tmp_path / "white.png", "--small", "--factor", 2, *DIGITS, code=1)
    assert "white.png is of shape (1, 8, 8), and what was measured is of (1, 4, 4)" in said
    said = run("inpaint", 0, "--model", colours, code=1)
    assert "no held-out item 0" in said
    assert "give a file as the item" in said
    assert "--data" not in said


@pytest.mark.parametrize("method", ["pgdm", "replacement", "smc:particles=6"])
def test_results_do_not_depend_on_how_many_are_drawn_at_once(tmp_path, monkeypatch, method):
    from scoresde.cli import restore

    for name, batch in (("a", 256), ("b", 6), ("c", 2)):
        monkeypatch.setattr(restore, "BATCH", batch)
        run("inpaint", 0, 1, *DIGITS, "--method", method, "--out", tmp_path / f"{name}.npy")
    a, b, c = (np.load(tmp_path / f"{name}.npy").astype(int) for name in "abc")
    assert a.shape == (2, 3, 1, 8, 8)
    assert np.abs(a - b).max() <= 1  # a level, by rounding
    assert np.abs(a - c).max() <= 1


def test_figures_tell_of_guidance_thresholds_and_dequantisation(tmp_path):
    figures = tmp_path / "figures.json"
    said = run("inpaint", 0, "--model", "zoo:digits", "--steps", 2, "-n", 1, "--autoguide",
               "zoo:digits", "--threshold", "static", "--dequantize", "--method", "ddrm",
               "--out", tmp_path / "x.png", "--json", figures)  # fmt: skip
    assert "1 result for 1 item under zoo:digits by ddrm, autoguidance 2: 3 evaluations (6 of" in (
        said
    )
    report = json.loads(figures.read_text())
    assert report["threshold"]["mode"] == "static"
    assert report["dequantize"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inpaint", 0, "--method", "mmsp"), "unknown method 'mmsp'; did you mean 'mmps'?"),
        (("inpaint", 0, "--method", "mmps:iteration=2"), "did you mean 'iterations'?"),
        (("inpaint", 0, "--method", "smc:particle=2"), "did you mean 'particles'?"),
        (("inpaint", 0, "--method", "ddrm", "--solver", "heun"), "leave out solver"),
        (("inpaint", 0, "--set", "iterations=2"), "name it by --method"),
        (("inpaint", 0, "--mask", "no.png"), "cannot read the mask no.png"),
        (("inpaint", 0, "--mask", "blur:std=1"), "'blur' is no mask"),
        (("inpaint", 0, "--mask", "midle-box"), "did you mean 'middle-box'?"),
        (("inpaint", 0, "--mask", "no.npy"), "cannot read the mask no.npy"),
        (("inpaint", 0, "--mask", "linear"), "'linear' is no mask"),
        (("inpaint", 0, "--mask", "mask"), "'mask' is for Python alone; accepted: half, middle"),
        (("inpaint", 0, "--mask", "."), "cannot read the mask ."),
        (("inpaint", 0, "--method", "smc:particles=2.5"), "should be a valid integer"),
        (("inpaint", 0, "--method", "smc:threshold=x"), "method.threshold: input should be"),
        (("inpaint", 0, "--method", "pgdm", "--set", "name=dps"), "the method is named by"),
        (("inpaint", 0, "--json", ""), "cannot write '.'"),
        (("inpaint", 0, "--seed", 2**63), "is not in the range"),
        (("inpaint", "²"), "no item at '²'"),
        (("solve", 0, "--operator", "custom"), "'custom' is for Python alone; accepted: average"),
        (("inpaint", 0, "--invert"), "--invert is about the picture of a mask"),
        (("inpaint", 0, "--out", "x.jpg"), "accepted are .png and .npy"),
        (("inpaint", 0, "--cfg", 2), "--cfg needs a class-conditional model"),
        (("inpaint", 0, "--rescale", 0.5), "--rescale needs --cfg"),
        (("inpaint", 0, "--label", 2), "--label needs a class-conditional model"),
        (("inpaint", "no.png"), "there is no such file"),
        (("superres", 0, "--factor", 3), "8"),
        (("superres", 0, "--small"), "--small needs picture files"),
        (("colorize", 0), "colorize needs a model of colour pictures"),
        (("solve", "--operator", "blur:std=1"), "give IMAGE... or --measurement"),
        (("solve", 0, "--operator", "blur:sdt=1"), "did you mean 'std'?"),
    ],
)
def test_mistakes_are_said_in_one_line_and_nothing_is_written(
    tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    said = run(*arguments, "--model", "zoo:digits", code=1)
    assert message in said
    assert not any(tmp_path.iterdir())
