"""``scoresde bench`` end to end, on a small model of the embedded digits and on exact mixtures."""

import csv
import json
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import scoresde as sd
from scoresde.cli.bench import command
from scoresde.config import read_yaml


def bench(*arguments):
    result = CliRunner().invoke(command, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An untrained model of the digits, saved with the section that names its data."""
    from scoresde.checkpoint import write_yaml
    from scoresde.nets import UNet

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    scaler = sd.data.Scaler.fit(sd.data.load("digits"))
    net = UNet(shape=(1, 8, 8), width=16, multipliers=(1,), blocks=1)
    sd.ScoreModel(net, sd.VP(), sd.V(), shape=(1, 8, 8), scaler=scaler).save(folder)
    config = read_yaml(folder / "config.yaml")
    write_yaml(folder / "config.yaml", {**config, "data": {"source": "digits"}})
    return folder


def test_exact_writes_table_csv_json_and_picture(tmp_path):
    out, figures = tmp_path / "out", tmp_path / "figures.json"
    result = bench(
        "--exact", "--sde", "ve", "--dim", 3, "--solvers", "heun,ddim:eta=1,ode",
        "--steps", "4,16", "--samples", 200, "--seed", 2, "--device", "cpu",
        "--out", out, "--json", figures,
    )  # fmt: skip
    assert result.exit_code == 0
    for word in ("solver", "NFE", "endpoint RMS", "ddim(eta=1)", "floor", "own", "3 dimensions"):
        assert word in result.output
    content = json.loads(figures.read_text())
    assert content == json.loads((out / "bench.json").read_text())
    assert content["sde"]["name"] == "ve"
    assert content["settings"]["seed"] == 2
    assert content["versions"]["torch"] == torch.__version__
    rows = content["rows"]
    assert [(r["steps"], r["nfe"]) for r in rows[:4]] == [(4, 9), (16, 33), (4, 5), (16, 17)]
    assert rows[4]["steps"] is None
    assert rows[1]["endpoint_rms"] < rows[0]["endpoint_rms"]
    assert rows[4]["endpoint_rms"] < 1e-3
    assert set(content["floor"]) == {"sliced_w2", "mmd2", "mean_error", "covariance_error"}
    with open(out / "bench.csv", newline="") as handle:
        sheet = list(csv.DictReader(handle))
    assert [row["solver"] for row in sheet] == [row["solver"] for row in rows]
    assert float(sheet[0]["sliced_w2"]) == rows[0]["sliced_w2"]
    assert sheet[2]["endpoint_rms"] == ""
    with Image.open(out / "bench.png") as picture:
        assert picture.width > 800


def test_model_is_compared_to_its_held_out_data(run):
    result = bench(run, "--solvers", "ddim,ancestral", "--steps", "2,3", "--samples", 20,
                   "--batch", 8, "--device", "cpu")  # fmt: skip
    assert "levels 0 to 16" in result.output
    assert "FID" not in result.output
    content = json.loads((run / "bench" / "bench.json").read_text())
    assert content["data"] == "digits"
    assert content["target"]["floor"] == "training items against held-out items"
    assert content["target"]["floor_items"] == 20
    assert content["settings"]["weights"] == "raw"
    assert [r["nfe"] for r in content["rows"]] == [3, 4, 3, 4]
    # Untrained samples are noise: far above what digits are among themselves.
    assert all(r["sliced_w2"] > 2 * content["floor"]["sliced_w2"] for r in content["rows"])
    assert all(r["endpoint_rms"] is None for r in content["rows"])


def test_floor_comes_from_training_items_or_from_halves(run, tmp_path):
    """The embedded MNIST images are one split only: they are never compared to themselves."""
    from scoresde.bench import Target
    from scoresde.cli.bench import model_case

    train, held = sd.data.load_splits(sd.data.DataConfig(source="digits"))
    _, target, _, _ = model_case(str(run), "ema", "digits", 30, 0, torch.device("cpu"))
    assert target.floor == Target.of_data(held.x, train.x, samples=30).floor

    images = sd.data.load("mnist-sample")
    net = sd.nets.UNet(shape=(1, 28, 28), width=16, multipliers=(1,), blocks=1)
    scaler = sd.data.Scaler.fit(images)
    sd.ScoreModel(net, sd.VP(), sd.V(), shape=(1, 28, 28), scaler=scaler).save(tmp_path)
    _, target, words, _ = model_case(
        str(tmp_path), "ema", "mnist-sample", 128, 0, torch.device("cpu")
    )
    assert words["unit"] == "levels 0 to 255"
    assert target.about["reference_items"] == target.about["floor_items"] == 128
    assert target.floor["sliced_w2"] > 1


def test_model_with_endpoint(run, tmp_path):
    bench(run, "--solvers", "ddim,heun", "--steps", "20", "--samples", 4, "--endpoint",
          "--out", tmp_path, "--device", "cpu")  # fmt: skip
    ddim, heun = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert heun["endpoint_rms"] < ddim["endpoint_rms"] < 0.5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--exact", "--solvers", "huen"), "did you mean 'heun'"),
        (("--exact", "--grid", "karas"), "did you mean 'karras'"),
        (("--exact", "--sde", "vpp"), "unknown sde 'vpp'"),
        (("--exact", "--steps", "5,x"), "--steps takes whole numbers such as 5,10,20, got '5,x'"),
        (("--exact", "--steps", "0"), "--steps takes whole numbers"),
        (("--exact", "--solvers", "ddim:eta"), "not of the form name:key=value"),
        (("--exact", "--solvers", "ddim:eta=2"), "eta in"),
        (("--exact", "--data", "digits"), "leave out --data"),
        (("RUN", "--exact"), "leave out RUN"),
        (("RUN", "--dim", "3"), "--dim belongs to --exact"),
        (("RUN", "--data", "moons"), "moons has items of"),
        (("nowhere",), "no model at nowhere"),
    ],
)
def test_mistakes_are_one_line(arguments, said, run, tmp_path):
    arguments = [run if a == "RUN" else a for a in arguments]
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=said) as error:
        bench(*arguments, "--out", out, "--device", "cpu")
    assert "\n" not in str(error.value)
    assert not out.exists()


def test_the_command_line_exits_with_one_and_one_line(tmp_path):
    program = [sys.executable, "-m", "scoresde", "bench", "--exact"]
    done = subprocess.run(
        [*program, "--solvers", "huen"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_help_shows_an_example_and_does_not_import_torch():
    code = (
        "import sys; from scoresde.cli.bench import command\n"
        "try: command(['--help'])\n"
        "except SystemExit: assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    program = [sys.executable, "-c", code]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "scoresde bench --exact" in done.stdout


def test_all_rows_failing_is_an_error(tmp_path, monkeypatch):
    def step(*arguments):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(sd.solvers.Heun, "step", step)
    with pytest.raises(ValueError, match="no solver finished; the first said: out of memory"):
        bench("--exact", "--solvers", "heun", "--samples", 20, "--out", tmp_path)
    assert "out of memory" in (tmp_path / "bench.csv").read_text()
