"""``scoresde bench`` end to end, on a small model of the embedded digits and on exact mixtures."""

import csv
import json
import platform
import subprocess
import sys
from xml.etree import ElementTree

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
    from scoresde.files import write_yaml
    from scoresde.nets import UNet

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    scaler = sd.data.Scaler.fit(sd.data.load("digits"))
    net = UNet(shape=(1, 8, 8), width=16, multipliers=(1,), blocks=1)
    for parameter in net.parameters():  # the last layer starts at zero
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    sd.ScoreModel(net, sd.VP(), sd.V(), shape=(1, 8, 8), scaler=scaler).save(folder)
    config = read_yaml(folder / "config.yaml")
    write_yaml(folder / "config.yaml", {**config, "data": {"source": "digits"}})
    return folder


def test_exact_writes_table_csv_json_and_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/bin/scoresde", "bench", "a b"])
    out, figures = tmp_path / "out", tmp_path / "figures.json"
    result = bench(
        "--exact", "--sde", "ve", "--dim", 3, "--solvers", "heun,ddim:eta=1,ode",
        "--steps", "4,16", "--samples", 200, "--seed", 2, "--device", "cpu",
        "--out", out, "--json", figures,
    )  # fmt: skip
    assert result.exit_code == 0
    for word in (
        "solver",
        "NFE",
        "endpoint RMS",
        "ddim(eta=1)",
        "floor",
        "own",
        "dim=3",
        "vs best",
    ):
        assert word in result.output
    content = json.loads(figures.read_text())
    assert content == json.loads((out / "bench.json").read_text())
    assert content["sdes"]["ve"]["name"] == "ve"
    assert content["complete"] is True
    assert content["command"] == "scoresde bench 'a b'"
    assert content["settings"]["seed"] == 2
    assert content["versions"]["torch"] == torch.__version__
    rows = content["rows"]
    assert [(r["steps"], r["nfe"]) for r in rows[:4]] == [(4, 9), (16, 33), (4, 5), (16, 17)]
    assert rows[4]["steps"] is None
    assert rows[1]["endpoint_rms"] < rows[0]["endpoint_rms"]
    assert rows[4]["endpoint_rms"] < 1e-3
    assert set(content["floors"]["overlapping(dim=3)"]) == {
        "sliced_w2",
        "mmd2",
        "mean_error",
        "covariance_error",
    }
    with open(out / "bench.csv", newline="") as handle:
        sheet = list(csv.DictReader(handle))
    assert [row["solver"] for row in sheet] == [row["solver"] for row in rows]
    assert float(sheet[0]["sliced_w2"]) == rows[0]["sliced_w2"]
    assert sheet[2]["endpoint_rms"] == ""
    low, high = rows[0]["intervals"]["endpoint_rms"]
    assert (float(sheet[0]["endpoint_rms_low"]), float(sheet[0]["endpoint_rms_high"])) == (
        low, high,
    )  # fmt: skip
    assert low < rows[0]["endpoint_rms"] < high
    with Image.open(out / "bench.png") as picture:
        assert picture.width > 800
    assert ElementTree.parse(out / "bench.svg").getroot().tag.endswith("svg")
    assert sorted(file.name for file in out.iterdir()) == [
        f"bench.{kind}" for kind in ("csv", "html", "json", "png", "svg")
    ]


@pytest.fixture
def quick(monkeypatch):
    """A reference of low accuracy, where that is not the point."""
    from scoresde.bench import run

    monkeypatch.setattr(run, "TIGHT", dict.fromkeys(run.TIGHT, 1e-3))


@pytest.mark.usefixtures("quick")
def test_lists_cross_and_repeats_have_intervals(tmp_path):
    bench(
        "--exact", "--sde", "vp:beta_max=15,ve", "--law", "separated:parts=4",
        "--law", "narrow:dim=1", "--dim", "3",
        "--solvers", "ddim", "--solvers", "runge-kutta:rtol=1e-2:atol=1e-2",
        "--grids", "karras:rho=3,logsnr", "--nfe", "4,6", "--repeats", 2, "--samples", 20,
        "--device", "cpu", "--out", tmp_path,
    )  # fmt: skip
    content = json.loads((tmp_path / "bench.json").read_text())
    rows = content["rows"]
    laws = ["separated(dim=3, parts=4)", "narrow(dim=1)"]
    assert list(dict.fromkeys(r["law"] for r in rows)) == laws == list(content["floors"])
    assert list(dict.fromkeys(r["sde"] for r in rows)) == ["vp(beta_max=15)", "ve"]
    own = [r for r in rows if (r["sde"], r["law"]) == ("ve", laws[0])]
    assert [(r["solver"], r["grid"], r["steps"], r["nfe"]) for r in own[:4]] == [
        ("ddim", "karras(rho=3)", 3, 4), ("ddim", "karras(rho=3)", 5, 6),
        ("ddim", "logsnr", 3, 4), ("ddim", "logsnr", 5, 6),
    ]  # fmt: skip
    assert [r["solver"] for r in own[4:]] == ["runge-kutta(rtol=0.01, atol=0.01)"]
    assert all("sliced_w2" in r["intervals"] and r["repeats"] == 2 for r in rows)
    assert len(rows) == 5 * 4
    with Image.open(tmp_path / "bench.png") as picture:
        assert picture.height > 1000  # a line of panels each


def test_model_is_compared_to_its_held_out_data(run):
    result = bench(run, "--solvers", "ddim,ancestral", "--steps", "2,3", "--samples", 20,
                   "--batch", 8, "--device", "cpu")  # fmt: skip
    assert "levels 0 to 16" in result.output
    assert "FID" not in result.output
    content = json.loads((run / "bench" / "bench.json").read_text())
    assert content["data"] == "digits"
    assert content["laws"]["digits"]["floor"] == "training items against held-out items"
    assert content["laws"]["digits"]["floor_items"] == 20
    assert content["settings"]["weights"] == "raw"
    assert [r["nfe"] for r in content["rows"]] == [3, 4, 3, 4]
    # Untrained samples are noise: far above what digits are among themselves.
    assert all(
        r["sliced_w2"] > 2 * content["floors"]["digits"]["sliced_w2"] for r in content["rows"]
    )
    assert all(r["endpoint_rms"] is None for r in content["rows"])


def test_floor_comes_from_training_items_or_from_halves(run, tmp_path):
    """The embedded MNIST images are one split only: they are never compared to themselves."""
    from scoresde.bench import Target
    from scoresde.bench.cases import of_model

    train, held = sd.data.load_splits(sd.data.DataConfig(source="digits"))
    target = of_model(str(run), "ema", "digits", 30, 0, torch.device("cpu")).target
    assert target.floor == Target.of_data(held.x, train.x, samples=30).floor

    images = sd.data.load("mnist-sample")
    net = sd.nets.UNet(shape=(1, 28, 28), width=16, multipliers=(1,), blocks=1)
    scaler = sd.data.Scaler.fit(images)
    sd.ScoreModel(net, sd.VP(), sd.V(), shape=(1, 28, 28), scaler=scaler).save(tmp_path)
    case = of_model(str(tmp_path), "ema", "mnist-sample", 128, 0, torch.device("cpu"))
    target = case.target
    assert case.unit == "levels 0 to 255"
    assert target.about["reference_items"] == target.about["floor_items"] == 128
    assert target.floor["sliced_w2"] > 1


def test_model_with_endpoint(run, tmp_path):
    bench(run, "--solvers", "ddim,heun", "--steps", "20", "--samples", 4, "--endpoint",
          "--out", tmp_path, "--device", "cpu")  # fmt: skip
    content = json.loads((tmp_path / "bench.json").read_text())
    ddim, heun = content["rows"]
    assert heun["endpoint_rms"] < ddim["endpoint_rms"] < 0.5
    # A float32 network: the tolerances are what it resolves, and the reference errs measurably.
    assert content["settings"]["endpoint"]["rtol"] == 1e-6
    assert 1e-8 < heun["reference_error"] < 1e-3


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
        (("--exact", "--grids", "karras:rho"), "grid 'karras:rho' is not of the form"),
        (("--exact", "--law", "seperated"), "did you mean 'separated'"),
        (("--exact", "--law", "narrow:ratio=2"), "ratio in"),
        (("--exact", "--dim", "2,9999"), "--dim takes 1 to 4096"),
        (("--exact", "--sde", "vp:beta_mx=3"), "unknown key sde.beta_mx"),
        (("--exact", "--steps", "5", "--nfe", "5"), "--steps and --nfe exclude each other"),
        (("--exact", "--nfe", "5;8"), "--nfe takes whole numbers"),
        (("RUN", "--law", "narrow"), "--law belongs to --exact"),
        (("--exact", "--data", "digits"), "leave out --data"),
        (("RUN", "--exact"), "leave out RUN"),
        (("--exact", "--weights", "ema"), "leave out --weights"),
        (("--exact", "--batch", "8"), "leave out --batch"),
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


TINY = ("--exact", "--samples", "20", "--device", "cpu", "--out")


@pytest.mark.usefixtures("quick")
def test_ctrl_c_keeps_the_rows_that_are_done(tmp_path, monkeypatch):
    real, calls = sd.solvers.Heun.step, []

    def step(self, *arguments):
        calls.append(1)
        if len(calls) == 12:  # in the second row, of 10 steps
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(sd.solvers.Heun, "step", step)
    result = CliRunner().invoke(
        command, [*TINY, str(tmp_path), "--solvers", "heun", "--steps", "5,10,20"],
        standalone_mode=False,
    )  # fmt: skip
    assert isinstance(result.exception, KeyboardInterrupt) or result.exit_code != 0
    content = json.loads((tmp_path / "bench.json").read_text())
    assert content["complete"] is False
    assert [row["steps"] for row in content["rows"]] == [5]
    assert "This run was interrupted" in (tmp_path / "bench.html").read_text()
    assert "heun" in result.output


def test_ctrl_c_exits_with_130_and_a_pipe_gets_the_table_alone(tmp_path):
    code = (
        "import sys, scoresde.solvers.heun as h\n"
        "def step(*a): raise KeyboardInterrupt\n"
        "h.Heun.step = step\n"
        "import scoresde.bench.run as r; r.TIGHT = dict.fromkeys(r.TIGHT, 1e-3)\n"
        f"sys.argv = {['scoresde', 'bench', *TINY, str(tmp_path)]!r} + "
        "['--solvers', 'ddim,heun', '--steps', '2']\n"
        "from scoresde.cli import main; main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 130
    assert done.stderr.strip() == "stopped"
    assert "ddim" in (tmp_path / "bench.csv").read_text()
    assert "\r" not in done.stdout
    lines = done.stdout.splitlines()
    assert lines[4].startswith("solver")
    assert lines[6].startswith("ddim")


@pytest.mark.usefixtures("quick")
def test_a_second_run_overwrites_and_a_failed_one_does_not(tmp_path, monkeypatch):
    def run(seed):
        bench(*TINY, tmp_path, "--solvers", "ddim", "--steps", "2", "--seed", seed)
        return {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    first, second = run(0), run(1)
    assert first.keys() == second.keys()
    assert len(first) == 5
    assert all(first[name] != second[name] for name in first)
    from scoresde.bench import page

    def broken(record):
        raise OSError("disk full")

    monkeypatch.setattr(page, "page", broken)
    with pytest.raises(OSError, match="disk full"):
        run(2)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == second


def test_a_process_whose_reference_fails_still_has_rows(tmp_path, monkeypatch):
    from scoresde.bench import run

    monkeypatch.setattr(run, "REFERENCE_NFE", 30)
    result = bench(*TINY, tmp_path, "--solvers", "ddim", "--steps", "2")
    assert "no distances to the converged ODE" in result.stderr
    (row,) = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert row["converged"]
    assert row["endpoint_rms"] is None


def test_times_name_the_processor(tmp_path):
    from scoresde.cli.options import processor

    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel name\t: A Chip @ 3 GHz\n")
    assert processor(file) == "A Chip @ 3 GHz"
    assert processor(tmp_path / "none") == platform.processor()
