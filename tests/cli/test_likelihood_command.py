"""``scoresde likelihood``: files, resumption, pictures, targets, other data, bounds, classes."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

import scoresde as sd
from scoresde.data import Scaler

FAST = ("zoo:digits", "--steps", 4, "--spot", 0)


def table(file):
    with open(file) as handle:
        return list(csv.DictReader(handle))


def test_a_file_is_the_same_from_any_batch_and_number_of_processes(run, tmp_path):
    run("likelihood", *FAST, "--items", 40, "--out", "one.csv", "--batch", 64)
    run("likelihood", *FAST, "--items", 40, "--out", "two.csv", "--batch", 7, "--processes", 2)
    one, two = (tmp_path / f"{name}.csv" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    rows = table(one)
    assert [int(row["item"]) for row in rows] == list(range(40))
    nats = np.array([float(row["nats"]) for row in rows])
    bits = np.array([float(row["bits_per_dim"]) for row in rows])
    assert np.allclose(bits, -nats / (64 * np.log(2)))
    assert {row["nfe"] for row in rows} == {"5"}


def test_a_finished_file_is_read_and_another_is_refused(run, tmp_path):
    first = run("likelihood", *FAST, "--items", 3, "--out", "b.csv", "--json", "1.json").out
    again = run("likelihood", *FAST, "--items", 3, "--out", "b.csv", "--json", "2.json").out
    assert first.splitlines()[0] == again.splitlines()[0]
    before = (tmp_path / "b.csv").read_bytes()
    other = ("likelihood", *FAST, "--items", 3, "--seed", 1, "--out", "b.csv")
    said = run(*other, code=1).err
    assert "b.csv is of another series" in said
    assert "seed" in said
    assert (tmp_path / "b.csv").read_bytes() == before
    run(*other, "--overwrite")
    assert (tmp_path / "b.csv").read_bytes() != before


def test_parts_make_the_whole(run, tmp_path):
    run("likelihood", *FAST, "--items", 40, "--out", "w.csv")
    for part in ("0/2", "1/2"):
        said = run("likelihood", *FAST, "--items", 40, "--out", "p.csv", "--part", part).out
        assert f"part {part}" in said
    parts = sorted(tmp_path.glob("p.part-*.csv"))
    assert len(parts) == 2
    sd.series.merge(parts, tmp_path / "p.csv")
    assert (tmp_path / "p.csv").read_bytes() == (tmp_path / "w.csv").read_bytes()


def test_one_item(run):
    assert "(1 items" in run("likelihood", *FAST, "--items", 1).out


def test_another_flow_in_the_same_folder_is_another_series(run):
    fit = ("dequantize", "zoo:digits", "--steps", 1, "--width", 8, "--out", "flow")
    use = ("likelihood", *FAST, "--items", 2, "--dequantization", "variational:folder=flow",
           "--out", "b.csv")  # fmt: skip
    run(*fit, "--seed", 0)
    run(*use)
    run(*fit, "--seed", 1)
    assert "b.csv is of another series" in run(*use, code=1).err


def test_pictures_and_other_data(run, tmp_path):
    other = np.random.default_rng(0).integers(0, 256, (30, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "noise.npz", x_train=other, x_test=other)
    said = run("likelihood", "zoo:mnist", "--steps", 6, "--spot", 0, "--items", 16,
               "--against", "noise.npz", "--pictures", "shown", "--json", "f.json",
               "--out", "b.parquet").out  # fmt: skip
    assert "told from" in said
    found = json.loads((tmp_path / "f.json").read_text())["against"]
    assert found["auroc"]["likelihood"]["value"] > 0.99  # white noise is no digit
    assert found["bits_per_dim"] > 4
    for name in ("extremes", "histogram"):
        assert Image.open(tmp_path / "shown" / f"{name}.png").size[0] > 300
    assert (tmp_path / "b.parquet").exists()
    assert (tmp_path / "b.against.parquet").exists()


def test_a_target_is_met_and_said(run, tmp_path):
    said = run("likelihood", "zoo:digits", "--items", 32, "--target", 0.02, "--steps", 8,
               "--json", "t.json").out  # fmt: skip
    found = json.loads((tmp_path / "t.json").read_text())
    assert found["bits_per_dim_stderr_computation"] < 0.025
    assert found["draws"] > 1
    assert "of these very items ±" in said
    assert "taken out" in said


def test_the_self_check_prints_bias_and_coverage(run, tmp_path):
    said = run("likelihood", "zoo:digits", "--self-check", "--items", 40, "--draws", 6,
               "--steps", 32, "--json", "s.json").out  # fmt: skip
    found = json.loads((tmp_path / "s.json").read_text())["checks"]
    assert [check["case"] for check in found] == ["broad", "narrow"]
    assert all(0.8 < check["coverage"] <= 1 for check in found)
    assert "covers as it says" in said
    assert "bias" in said


def test_a_dequantisation_is_fitted_and_used(run, tmp_path):
    said = run("dequantize", "zoo:digits", "--steps", 2, "--width", 8, "--out", "flow").out
    assert "variational:folder=flow" in said
    run("likelihood", *FAST, "--items", 4, "--dequantization", "variational:folder=flow",
        "--json", "v.json")  # fmt: skip
    found = json.loads((tmp_path / "v.json").read_text())
    assert found["dequantizer"] == {"name": "variational", "folder": "flow"}
    said = run("dequantize", "--steps", 2, "--minutes", 1, "--out", "flow", code=1).err
    assert "two lengths: give one" in said


@pytest.mark.parametrize("kind", ["vlb", "elbo", "denoising"])
def test_bounds(run, tmp_path, kind):
    said = run("likelihood", "zoo:digits", "--bound", kind, "--items", 24, "--terms", 24,
               "--steps", 200, "--json", "b.json").out  # fmt: skip
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["bound"] == kind
    assert found["unit"] == "bits/dim"
    assert 1.5 < found["total"] < 3.5
    assert 0 < found["stderr_noise"] < 0.6
    assert f"({kind}" in said


def test_the_bound_of_a_learned_variance(run, tmp_path):
    """On a table of 20 steps, which is the chain unless --steps says otherwise."""
    torch.manual_seed(0)
    net = sd.nets.NCSNpp((1, 8, 8), width=8, multipliers=(1,), blocks=1, out_channels=2)
    table = sd.DDPM(20, 0.002, 0.4, t_min=0.05, t_min_sampling=0.05, t_min_likelihood=0.05)
    model = sd.ScoreModel(net, table, sd.Eps(), shape=(1, 8, 8),
                          scaler=Scaler((8.5,), (2 / 17,), 17))  # fmt: skip
    model.save(tmp_path / "m")
    totals = {}
    for variance in ("small", "large", "learned"):
        run("likelihood", "m", "--data", "digits", "--items", 4, "--bound", "vlb",
            "--variance", variance, "--json", "b.json")  # fmt: skip
        found = json.loads((tmp_path / "b.json").read_text())
        assert (found["grid_steps"], found["variance"]) == (20, variance)
        totals[variance] = found["total"]
    # An untrained head says the middle of the two, in the logarithm.
    assert totals["learned"] < max(totals["small"], totals["large"])
    run("sample", "m", "-n", 1, "--solver", "ancestral", "--set", "variance=learned")


def test_continuous_data_have_nats(run, tmp_path):
    net = sd.nets.MLP((2,), width=16)
    model = sd.ScoreModel(net, sd.VP(), sd.V(), shape=(2,), scaler=Scaler((0.0,), (2.0,)))
    model.save(tmp_path / "m")
    said = run("likelihood", "m", "--data", "moons", "--items", 5, "--json", "n.json").out
    found = json.loads((tmp_path / "n.json").read_text())
    assert "nats" in said
    assert "bits_per_dim" not in found
    assert (found["method"], found["divergence"]) == ("dopri5", "exact")
    assert found["dequantizer"] is None
    run("likelihood", "m", "--data", "moons", "--items", 5, "--terminal", "moments")
    said = run("likelihood", "m", "--data", "moons", "--items", 5, "--draws", 2, code=1).err
    assert "is continuous: there is nothing to dequantise" in said


def test_classes_by_bayes(run, tmp_path):
    torch.manual_seed(0)
    net = sd.nets.UNet((1, 8, 8), width=16, multipliers=(1, 2), blocks=1, num_classes=10)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    scaler = Scaler((8.5,), (2 / 17,), 17)
    model = sd.ScoreModel(net, sd.VP(), sd.V(), shape=(1, 8, 8), scaler=scaler)
    model.save(tmp_path / "m")
    said = run("likelihood", "m", "--data", "digits", "--items", 12, "--steps", 3, "--classify",
               "--json", "c.json").out  # fmt: skip
    found = json.loads((tmp_path / "c.json").read_text())
    assert 0 <= found["accuracy"] <= 1
    assert found["log_posterior"] < 0
    assert found["items"] == 12
    assert "% right of 12 items" in said
    said = run("likelihood", "zoo:digits", "--classify", code=1).err
    assert "takes no labels, and cannot classify" in said


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (["--items", "0"], "--items takes a whole number above 0, or all, got '0'"),
        (["--items", "some"], "or all, got 'some'"),
        (["--out", "b.txt"], "--out takes a .csv or a .parquet file"),
        (["--part", "2/2", "--out", "b.csv"], "--part takes I/N with 0 <= I < N"),
        (["--part", "0/2"], "--part needs --out"),
        (["--terms", "4"], "--terms belongs to --bound"),
        (["--bound", "elbo", "--variance", "large"], "--variance belongs to --bound vlb"),
        (["--vlb", "--bound", "elbo"], "two bounds: name one"),
        (["--bound", "elbo", "--classify"], "--bound and --classify are two things"),
        (["--bound", "elbo", "--out", "b.csv"], "--out is for the ODE's likelihood"),
        (["--target", "0"], "--target takes an error above 0, got 0"),
        (["--target", "0.1", "--spot", "0"], "--target needs a spot check"),
        (["--part", "0/2", "--out", "b.csv", "--json", "f.json"], "--json is of a whole set"),
        (["--overwrite"], "--overwrite belongs to --out"),
        (["--steps", "4", "--rtol", "1e-3"], "--rtol and --atol belong to methods that"),
        (["--method", "unipc", "--rtol", "1e-3"], "--rtol and --atol belong to methods that"),
        (["--dequantization", "variational"], "'variational' needs folder"),
        (["--against", "moons", "--items", "2"], "do not fit a model"),
        (["--self-check", "--items", "all"], "takes a number, got 'all'"),
        (["--dequantization", "unform", "--spot", "0"], "did you mean 'uniform'"),
        (["--dequantization", "variational:folder=nowhere", "--spot", "0"], "nowhere"),
        (["--out", "b.csv", "--json", "b.csv"], "cannot hold two things"),
        (["--against", "nowhere", "--items", "2", "--steps", "2", "--spot", "0"], "nowhere"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(run, tmp_path, args, match):
    said = run("likelihood", "zoo:digits", *args, code=1).err
    assert match in said
    assert len(said.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
