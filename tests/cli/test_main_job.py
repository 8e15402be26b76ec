"""The command line end to end, as a user runs it: processes, exit codes, files."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from scoresde.cli import COMMANDS

TINY = ["--set", "net.width=8", "--set", "training.evaluations=1", "--set", "sampling.count=4",
        "--set", "likelihood.items=4", "--set", "sampling.steps=4"]  # fmt: skip


def run(*args, cwd, expect=0, **kwargs):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "scoresde", *map(str, args)],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, **kwargs,
    )  # fmt: skip
    assert done.returncode == expect, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which ``runs/digits-vp`` was trained for some steps."""
    folder = tmp_path_factory.mktemp("work")
    done = run("train", "--sde", "vp", "--steps", 12, *TINY, cwd=folder)
    return folder, done.stdout


def test_help_is_immediate_and_imports_no_torch(tmp_path):
    code = "import sys; from scoresde.cli import cli; cli(['--help'], standalone_mode=False); " \
           "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert COMMANDS == (
        "train", "train-classifier", "sample", "likelihood", "dequantize", "encode", "decode",
        "interpolate", "edit", "inpaint", "superres", "colorize", "solve", "bench", "tune", "ema",
        "convert", "info", "check",
    )  # fmt: skip
    for command in COMMANDS:
        assert f"  {command} " in done.stdout
        assert "Example" in run(command, "--help", cwd=tmp_path).stdout


def test_train_leaves_what_it_promises(trained):
    folder, said = trained
    out = folder / "runs" / "digits-vp"
    report = json.loads((out / "report.json").read_text())
    assert report["steps"] == 12
    assert 0 < report["heldout"]["bits_per_dim"] < 12
    assert report["heldout"]["bits_per_dim_stderr"] > 0
    assert report["sampling"]["nfe"] > 0
    assert Image.open(out / "samples" / "final.png").width > 0
    assert Image.open(out / "loss.png").width > 100
    assert "SNR" in said
    assert "KL to the prior" in said
    for command in ("scoresde sample", "scoresde likelihood", "scoresde bench"):
        assert command in said


def test_sample_writes_pictures_and_arrays(trained):
    folder, _ = trained
    run("sample", "runs/digits-vp", "-n", 5, "--steps", 3, "--out", "s.npy", cwd=folder)
    items = np.load(folder / "s.npy")
    assert items.shape == (5, 1, 8, 8)
    assert items.dtype == np.uint8
    assert items.max() <= 16
    done = run("sample", "runs/digits-vp", "-n", 5, "--steps", 3, "--batch", 2, "--out", "t.npy",
               "--json", "t.json", "--seed", 0, cwd=folder)  # fmt: skip
    assert np.abs(np.load(folder / "t.npy").astype(int) - items).max() <= 1
    figures = json.loads((folder / "t.json").read_text())
    assert figures["nfe"] == 4  # vabm takes one evaluation a step, and one denoises
    assert "4 evaluations" in done.stdout
    run("sample", "runs/digits-vp", "-n", 4, "--solver", "ddim", "--set", "eta=0.5", "--steps", 2,
        "--brownian", "--out", "p.png", "--json", "p.json", cwd=folder)  # fmt: skip
    assert Image.open(folder / "p.png").width > 0
    assert (figures["brownian"], json.loads((folder / "p.json").read_text())["brownian"]) == (
        False,
        True,
    )


def test_likelihood_reports_bits_and_items(trained):
    folder, _ = trained
    run("likelihood", "runs/digits-vp", "--items", 3, "--rtol", 1e-2, "--atol", 1e-2,
        "--json", "l.json", "--csv", "l.csv", cwd=folder)  # fmt: skip
    figures = json.loads((folder / "l.json").read_text())
    rows = (folder / "l.csv").read_text().splitlines()
    assert len(rows) == 4
    assert rows[0].split(",")[:3] == ["item", "nats", "bits_per_dim"]
    mean = np.mean([float(r.split(",")[2]) for r in rows[1:]])
    shift = figures["spot_check"]["shift"] / (64 * np.log(2))
    assert mean - shift == pytest.approx(figures["bits_per_dim"])


def test_likelihood_by_a_solver_along_a_grid(trained):
    cwd, _ = trained
    run("likelihood", "runs/digits-vp", "--items", 3, "--method", "unipc:points=2", "--steps", 7,
        "--grid", "karras", "--json", "u.json", cwd=cwd)  # fmt: skip
    figures = json.loads((cwd / "u.json").read_text())
    assert (figures["method"], figures["steps"], figures["nfe"]) == ("unipc", 7, 8)
    assert figures["solver"]["points"] == 2
    assert figures["grid"] == {"name": "karras", "rho": 7.0}


def test_likelihood_gives_the_variational_bound_with_its_parts(trained):
    folder, _ = trained
    run("likelihood", "runs/digits-vp", "--items", 2, "--vlb", "--steps", 20, "--json", "b.json",
        cwd=folder)  # fmt: skip
    bound = json.loads((folder / "b.json").read_text())
    parts = bound["prior"] + bound["steps"] + bound["decoder"]
    assert bound["total"] == pytest.approx(parts)
    assert bound["nfe"] == 20
    assert bound["unit"] == "bits/dim"


def test_info_and_check(trained):
    folder, _ = trained
    said = run("info", "runs/digits-vp", cwd=folder).stdout
    assert "parameters" in said
    assert "multiply-adds" in said
    said = run("check", "--set", "net.width=8", cwd=folder).stdout
    assert "(1, 8, 8)" in said
    assert "proposed sigma_max" in said


def test_an_existing_run_is_kept_unless_asked(trained):
    folder, _ = trained
    before = (folder / "runs/digits-vp/report.json").read_bytes()
    done = run("train", "--sde", "vp", "--steps", 2, cwd=folder, expect=1)
    assert "--resume" in done.stderr
    assert "--overwrite" in done.stderr
    assert (folder / "runs/digits-vp/report.json").read_bytes() == before


def test_resume_goes_on(trained, tmp_path):
    run("train", "--steps", 4, "--out", "r", *TINY, cwd=tmp_path)
    said = run("train", "--out", "r", "--resume", "--steps", 6, cwd=tmp_path).stdout
    assert "resumed at step 4" in said
    assert json.loads((tmp_path / "r/report.json").read_text())["steps"] == 6
    done = run("train", "--out", "r", "--resume", "--sde", "ve", cwd=tmp_path, expect=1)
    assert "section 'sde' cannot change" in done.stderr
    run("train", "--out", "r", "--overwrite", "--steps", 2, *TINY, cwd=tmp_path)
    assert json.loads((tmp_path / "r/report.json").read_text())["steps"] == 2


def test_resume_with_the_arguments_that_started_the_run(tmp_path):
    start = ["train", "--sde", "ve", "--sigma-max", "auto", "--data", "moons", "--out", "r",
             "--set", "objective.weight=likelihood", "--set", "likelihood.items=0"]  # fmt: skip
    run(*start, "--steps", 2, "--set", "training.evaluations=0", cwd=tmp_path)
    assert "resumed at step 2" in run(*start, "--steps", 3, "--resume", cwd=tmp_path).stdout
    said = run(*start, "--steps", 3, "--resume", cwd=tmp_path).stdout
    assert "reached its end" in said
    done = run("train", "--out", "r", "--resume", "--set", "training.batch_size=7", cwd=tmp_path,
               expect=1)  # fmt: skip
    assert "training.batch_size cannot change" in done.stderr


def test_overwrite_touches_nothing_but_the_run(tmp_path):
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "config.yaml").write_text("a: 1")
    done = run("train", "--out", "project", "--overwrite", "--steps", 1, cwd=tmp_path, expect=1)
    assert "is no run of scoresde" in done.stderr
    assert (tmp_path / "project" / "config.yaml").read_text() == "a: 1"
    quick = ["train", "--out", "r", "--steps", 1, *TINY, "--set", "training.evaluations=0"]
    run(*quick, cwd=tmp_path)
    (tmp_path / "r" / "notes.txt").write_text("mine")
    run(*quick, "--overwrite", cwd=tmp_path)
    assert (tmp_path / "r" / "notes.txt").read_text() == "mine"


def test_a_reader_that_leaves_does_not_stop_training(tmp_path):
    command = f"{sys.executable} -m scoresde train --steps 2 --out r {' '.join(TINY)} | head -1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], cwd=tmp_path, capture_output=True,
        text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "r" / "report.json").exists()


def test_a_conditional_model_draws_the_class_that_is_asked_for(tmp_path):
    # Layers that start at zero hide the class until they have learned something.
    run("train", "--out", "r", "--steps", 60, *TINY, "--set", "net.num_classes=10",
        "--set", "training.ema=0", "--set", "training.lr=0.01", cwd=tmp_path)  # fmt: skip
    for name, label in (("a", ["--label", 3]), ("b", ["--label", 4]), ("c", [])):
        run("sample", "r", "-n", 4, "--steps", 3, *label, "--out", f"{name}.npy", cwd=tmp_path)
    a, b, c = (np.load(tmp_path / f"{n}.npy").astype(int) for n in "abc")
    assert (a != b).any()
    assert (a[3] == c[3]).mean() > 0.9  # without a label, sample i has class i mod 10
    assert "multiply-adds" in run("info", "r", cwd=tmp_path).stdout
    done = run("sample", "r", "--label", 10, cwd=tmp_path, expect=1)
    assert "classes 0 to 9" in done.stderr
    done = run("train", "--set", "net.num_classes=3", "--out", "s", cwd=tmp_path, expect=1)
    assert "10 classes" in done.stderr


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "scoresde", "train", "--steps", "100000", "--out", "r", *TINY],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A background job of a shell starts with SIGINT ignored; a terminal's does not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        log = tmp_path / "r" / "logs" / "train.jsonl"
        deadline = time.time() + 120
        while not log.exists() and time.time() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "scoresde train --out r --resume" in said
    assert len(list((tmp_path / "r" / "checkpoints").glob("step-*"))) == 1


def test_vectors_train_and_report_nats(tmp_path):
    run("train", "--data", "moons", "--sde", "ve", "--sigma-max", "auto", "--steps", 5,
        "--set", "sampling.solver=heun", "--set", "sampling.steps=5",
        "--set", "likelihood.items=4", "--out", "m", cwd=tmp_path)  # fmt: skip
    report = json.loads((tmp_path / "m/report.json").read_text())
    assert "bits_per_dim" not in report["heldout"]
    assert np.isfinite(report["heldout"]["nats"])
    done = run("likelihood", "m", "--levels", 256, cwd=tmp_path, expect=1)
    assert "continuous" in done.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["train", "--sde", "vpp"], "did you mean 'vp'"),
        (["train", "--set", "sde.beta_mx=3"], "did you mean 'beta_max'"),
        (["train", "--set", "training.lr=fast"], "training.lr"),
        (["train", "--set", "sde.beta_max=-1"], "beta_min <= beta_max"),
        (["train", "--data", "moon"], "moons"),
        (["train", "--data", "none.npz"], "none.npz"),
        (["train", "--config", "none.yaml"], "cannot read none.yaml"),
        (["train", "--out", "file/run"], "not a folder"),
        (["train", "--out", "busy"], "no run of scoresde"),
        (["train", "--data", "nan.npy"], "finite"),
        (["train", "--data", "images"], "broken.png"),
        (["train", "--set", "sampling.solver=hoin"], "did you mean 'heun'"),
        (["train", "--set", "likelihood.method=dopri"], "did you mean 'dopri"),
        (["train", "--set", "likelihood.method=unipc"], "'unipc' takes fixed steps"),
        (["train", "--set", "likelihood.grid=karras"], "'dopri5' has steps of its own"),
        (
            [
                "train",
                "--set",
                "likelihood.method=unipc",
                "--set",
                "likelihood.steps=4",
                "--set",
                "likelihood.grid=tuned",
            ],
            "grids are tuned for sampling",
        ),
        (
            ["likelihood", "--method", "vabm", "--steps", "4", "--grid", "foo"],
            "unknown grid 'foo'",
        ),
        (["train", "--set", "likelihood.items=-1"], "items must be at least 0"),
        (["train", "--config", "flat.yaml"], "section 'sde' must be a mapping"),
        (["train", "--json", "file/x.json"], "not a folder"),
        (["train", "--device", "gpu9"], "unknown device 'gpu9'"),
        (["sample", "nowhere"], "no such file or folder"),
        (["sample", "--out", "x.bmp"], ".png and .npy"),
        (["likelihood", "nowhere"], "no such file or folder"),
        (["sample", "zoo:digits", "--set", "eta=["], "'[' is not valid YAML"),
        (["sample", "zoo:digits", "--out", "a.npy", "--json", "a.npy"], "cannot hold two things"),
        (["sample", "zoo:digits", "--solver", "heun", "--set", "eta=1"], "accepted: none"),
        (["encode", "zoo:digits", "--json", "latents.npz"], "cannot hold two things"),
        (["interpolate", "--model", "zoo:digits", "0", "nan.npy"], "is of shape (4, 2)"),
    ],
    ids=lambda value: "-".join(value)[:40] if isinstance(value, list) else "",
)
def test_mistakes_give_one_line_and_leave_nothing(tmp_path, args, said):
    (tmp_path / "file").write_text("")
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy" / "thesis.txt").write_text("precious")
    np.save(tmp_path / "nan.npy", np.full((4, 2), np.nan, np.float32))
    (tmp_path / "flat.yaml").write_text("sde: vp")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "broken.png").write_bytes(b"not a picture")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    done = run(*args, cwd=tmp_path, expect=1)
    assert said in done.stderr
    assert done.stderr.startswith("Error: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("args", [["sampel"], ["sample", "-n", 0], ["tune", "--setps", 3],
                                  ["interpolate", 0]], ids=repr)  # fmt: skip
def test_usage_errors_are_one_line_too(tmp_path, args):
    said = run(*args, cwd=tmp_path, expect=2).stderr
    assert said.startswith("Error: ")
    assert "--help says more" in said
    assert said.count("\n") == 1


def test_items_that_sample_wrote_are_data_to_encode(tmp_path):
    quick = ["--solver", "vabm", "--steps", 4, "--grid", "logistic:width=2"]
    run("sample", "zoo:digits", "-n", 20, *quick, "--out", "s.npy", cwd=tmp_path)
    said = run("encode", "zoo:digits", "--data", "s.npy", *quick, cwd=tmp_path).stdout
    assert "of s.npy under zoo:digits" in said


def test_times_below_the_trained_ones_are_refused(trained):
    folder, _ = trained
    for args in (["sample", "--t-end", 1e-7], ["likelihood", "--t-min", 1e-7]):
        command, *rest = args
        done = run(command, "runs/digits-vp", *rest, cwd=folder, expect=1)
        assert "t_min" in done.stderr


def test_a_damaged_checkpoint_is_refused(trained, tmp_path):
    import shutil

    folder, _ = trained
    shutil.copytree(folder / "runs/digits-vp", tmp_path / "r")
    file = next((tmp_path / "r/checkpoints").glob("*/ema.safetensors"))
    file.write_bytes(file.read_bytes()[:1000])
    done = run("sample", "r", cwd=tmp_path, expect=1)
    assert "ema.safetensors is not as it was written (its checksum differs)" in done.stderr
    assert "the one before it is used" not in done.stderr  # as there is none
    assert not list(tmp_path.glob("*.png"))
