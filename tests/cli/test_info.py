"""``scoresde info``: models of all kinds, their cost, and their figures."""

import io
import itertools
import json
import os
import shutil
import time

import pytest
import torch

import scoresde as sd
from scoresde import saved_steps
from scoresde.cli import chart, info
from scoresde.config import describe
from scoresde.files import CheckpointError, write_yaml
from scoresde.nets.adm import ADM
from scoresde.noise_labels import Time
from scoresde.training.log import Log


def lines(said):
    return dict(line.split(maxsplit=1) for line in said.out.splitlines() if line[0] != " ")


def conditional():
    torch.manual_seed(0)
    net = ADM((3, 8, 8), width=32, multipliers=(1,), blocks=1, attention=(0,), head_dim=16,
              num_classes=5, out_channels=6)  # fmt: skip
    sde = sd.DDPM(1000, t_min=1e-3, t_min_sampling=1e-3, t_min_likelihood=1e-3)
    label = Time(sde, 1000.0, -1.0)
    return sd.ScoreModel(net, sde, sd.Eps(scale_input=False, label=label), shape=(3, 8, 8))


def test_a_model_in_words_and_numbers(run, tmp_path):
    said = run("info", "zoo:digits", "--json", "i.json").out
    figures = json.loads((tmp_path / "i.json").read_text())
    model = sd.load("zoo:digits")
    size = sum(p.numel() for p in model.net.parameters())
    assert figures["format"] == "scoresde"
    assert figures["parameters"] == size
    assert figures["weights memory"] == 4 * size + sum(b.nbytes for b in model.net.buffers())
    assert figures["multiply-adds"] > 1e7
    assert 0 < figures["forward memory"] < figures["gradient memory"]
    assert (figures["classes"], figures["learned variance"]) == (None, False)
    assert figures["noise label"] == {"name": "log-noise", "scale": 0.25, "unit": 1.0}
    for text in (
        f"{size:,}", f"{figures['multiply-adds']:,} a forward pass of one item", "[1, 8, 8]",
        "log-noise (scale=0.25, unit=1)", "MiB", "KiB for the activations of one item",
        "with those for a vector-Jacobian product", "training.batch_size",
    ):  # fmt: skip
        assert text in said
    assert "left out" not in said


def test_facts_of_a_conditional_model_with_learned_variance():
    facts = info.model_facts(conditional())
    assert (facts["classes"], facts["learned variance"]) == (5, True)
    assert (
        info.said("noise label", facts["noise label"]) == "time (sde=ddpm, scale=1000, offset=-1)"
    )
    assert "label" not in facts["parameterization"]
    json.dumps(facts)


@pytest.mark.parametrize(
    ("name", "form", "left"),
    [
        ("edm_ddpmpp_cond", "EDM", "augment_pipe"),
        ("guided_diffusion_cond/model.pt", "guided-diffusion", "nothing"),
        ("song_ddpmpp_subvp/checkpoint.pth", "score_sde_pytorch", "optimizer"),
    ],
)
def test_a_checkpoint_of_another_project(run, tmp_path, original, name, form, left):
    folder, _, file = name.partition("/")
    path = original(folder) / file
    said = run("info", path, "--json", "i.json").out
    assert said.splitlines()[0].split() == ["format", form]
    assert left in said.split("left out", 1)[1]
    assert json.loads((tmp_path / "i.json").read_text())["multiply-adds"] > 1e7
    error = run("likelihood", path, "--items", 1, code=1).err
    assert "is of another project" in error
    assert "--data" in error


@pytest.mark.parametrize("args", [["nothing"], ["zoo:mnits"], ["zoo:mnist", "--set", "a=1"]])
def test_mistakes_are_one_line(run, args):
    error = run("info", *args, code=1).err
    assert error.startswith("Error: ")
    assert error.count("\n") == 1


# -- runs --------------------------------------------------------------------------------------

NET = sd.nets.MLP((2,), width=8, blocks=1)


def begun(folder, **training):
    """A run that has written its configuration, and nothing else."""
    folder.mkdir()
    model = sd.ScoreModel(NET, sd.VP(), sd.V(), shape=(2,))
    content = {
        "format": 1, "shape": [2], "scaler": None, "sde": describe(model.sde),
        "parameterization": describe(model.parameterization), "net": describe(NET),
        "training": {"batch_size": 64, "steps": 200, **training},
    }  # fmt: skip
    write_yaml(folder / "config.yaml", content)
    return Log(folder)


def going(log, steps=100, every=20):
    log.append("events", step=0, kind="start", text="step 0", time=time.time())
    for step in range(every, steps + 1, every):
        log.append(
            "train", step=step, seconds=step / 10, progress=step / 200, loss=2.0 / step,
            gradient_norm=0.5, items_per_second=640.0, lr=1e-3, items=64 * step, world=2,
            batch=64, waiting=0.25, memory=2**30, loss_by_time=[0.5, 0.25, None, 0.125], skipped=1,
        )  # fmt: skip
    log.append("heldout", step=steps, loss=0.5, eps_error_by_log_snr=[1.0, 0.5, 0.25, 0.1])


def save(folder, step=80):
    weights = NET.state_dict()
    parts = {"raw": weights, "ema": weights, "ema-length-0.05": weights, "optimizer": {}}
    saved_steps.save_checkpoint(folder, step, parts, {"step": step, "seconds": step / 10}, 2)


def told(run, tmp_path, name="r"):
    said = run("info", name, "--json", "i.json").out
    return said, json.loads((tmp_path / "i.json").read_text())


def test_a_run_that_goes_on(run, tmp_path):
    log = begun(tmp_path / "r")
    going(log)
    save(tmp_path / "r", 60)
    save(tmp_path / "r")
    log.append("events", step=90, kind="skip", text="the loss of item 7 is nan", time=time.time())
    for folder, name in (("samples", "step-000000100.png"), ("snapshots", "step-9.safetensors")):
        (tmp_path / "r" / folder).mkdir()
        (tmp_path / "r" / folder / name).write_bytes(b"1234")
    said, figures = told(run, tmp_path)
    found = figures["run"]
    assert (found["state"], found["step"], found["share"]) == ("running", 100, 0.5)
    assert found["seconds_left"] == pytest.approx(10.0)
    assert found["seconds_since_written"] < 60
    assert (found["world"], found["batch"], found["waiting"]) == (2, 64, 0.25)
    assert (found["items_per_second"], found["memory"], found["skipped"]) == (640, 2**30, 1)
    assert found["loss"] == pytest.approx(sum(2.0 / s for s in range(20, 101, 20)) / 5)
    assert found["heldout_loss"] == 0.5
    assert found["loss_by_log_snr"] == [0.5, 0.25, None, 0.125]
    assert found["trouble"]["text"] == "the loss of item 7 is nan"
    assert found["curves"]["training"]["step"] == [20, 40, 60, 80, 100]
    assert found["curves"]["heldout"] == {"step": [100], "loss": [0.5]}
    assert [c["step"] for c in found["checkpoints"]] == [60, 80]
    sizes = [p.stat().st_size for p in (tmp_path / "r/checkpoints/step-000000080").iterdir()]
    assert found["checkpoints"][1]["bytes"] == sum(sizes)
    assert sorted(found["averages"]) == ["ema", "ema-length-0.05", "raw"]
    assert found["samples"]["file"] == "samples/step-000000100.png"
    assert found["snapshots"] == [{"file": "snapshots/step-9.safetensors", "bytes": 4}]
    price = found["cost"]
    assert (price["seconds"], price["items"]) == (10.0, 6400)
    assert price["device_hours"] == pytest.approx(20 / 3600)
    assert price["flops"] == 6 * 6400 * figures["multiply-adds"]
    assert (figures["weights"], figures["checkpoint"]) == ("ema", "step-000000080")
    snr = [float(sd.VP().log_snr(torch.tensor(t))) for t in (sd.VP().t_min, sd.VP().t_max)]
    for text in (
        "running, step 100, 50% done, about 10 s left, written ", "last skip", "640 items/s",
        "25% of the time waiting for data", "1.0 GiB", "64 over 2 processes, 1 steps skipped",
        "10 s of training", "6,400 items", "o held out", f"{snr[0]:.1f} to", f"to {snr[1]:5.1f}",
        f"{price['flops']:.3g} FLOPs", "samples/step-000000100.png, 0 s old", "#" * 30,
    ):  # fmt: skip
        assert text in said, text
    assert said.isascii()


def test_a_run_that_failed_in_its_first_step(run, tmp_path):
    log = begun(tmp_path / "r")
    log.append("events", step=0, kind="start", text="step 0")
    log.append("events", step=0, kind="error", text="CUDA out of memory", time=time.time() - 7200)
    said, figures = told(run, tmp_path)
    assert figures["run"]["state"] == "failed"
    assert figures["weights"] == "none yet"
    assert figures["parameters"] == sum(p.numel() for p in NET.parameters())
    assert "has neither model.safetensors nor checkpoints" in figures["no weights"]
    assert "CUDA out of memory (step 0, 2.0 h ago)" in said
    assert "checkpoints            none" in said


def test_a_run_that_died_half_way(run, tmp_path):
    folder = tmp_path / "r"
    log = begun(folder, steps=None, epochs=3)
    going(log)
    save(folder)
    with open(folder / "logs/train.jsonl", "a") as handle:
        handle.write('{"step": 120, "lo')
    for file in [*folder.rglob("*")]:
        os.utime(file, (time.time() - 5000,) * 2)
    said, figures = told(run, tmp_path)
    assert figures["run"]["state"] == "silent"
    assert figures["run"]["share"] == 0.5  # of the epochs too: the run has logged it
    assert figures["run"]["step"] == 100
    assert "silent: killed, or it hangs, step 100, 50% done, written 83 min ago" in said
    assert run("info", "r", "--weights", "raw").out.split("weights ")[-1].split()[0] == "raw"


def test_a_run_without_a_checkpoint_that_can_be_read(run, tmp_path):
    folder = tmp_path / "r"
    going(begun(folder))
    save(folder)
    (folder / "checkpoints/step-000000080/ema.safetensors").write_bytes(b"damaged")
    said, figures = told(run, tmp_path)
    assert "ema.safetensors is not as it was written" in figures["no weights"]
    assert figures["run"]["step"] == 100
    assert "running, step 100" in said


def test_a_checkpoint_that_the_run_removes_while_it_is_read(run, tmp_path, monkeypatch):
    folder = tmp_path / "r"
    going(begun(folder))
    save(folder, 60)
    load = sd.checkpoint.load

    def late(path, **given):
        if (folder / "checkpoints/step-000000080").exists():
            return load(path, **given)
        (folder / "checkpoints/step-000000060").rename(folder / "checkpoints/.draft-old")
        save(folder, 80)
        raise CheckpointError("ema.safetensors: there is no such file")

    monkeypatch.setattr("scoresde.checkpoint.load", late)
    _, figures = told(run, tmp_path)
    assert figures["weights"] == "ema"
    assert "no weights" not in figures


def test_a_run_whose_network_cannot_be_built_here(run, tmp_path):
    folder = tmp_path / "r"
    log = begun(folder)
    going(log)
    text = (folder / "config.yaml").read_text().replace("name: mlp", "name: mine.Net")
    (folder / "config.yaml").write_text(text)
    said, figures = told(run, tmp_path)
    assert figures["run"]["step"] == 100
    assert "mine.Net" in figures["no weights"]
    assert "parameters" not in figures
    assert "log-SNR" in said


def test_a_finished_run_of_a_version_without_events(run, tmp_path):
    folder = tmp_path / "r"
    log = begun(folder)
    for step in (1, 21):
        log.append("train", step=step, seconds=step / 10, progress=step / 200, loss=1.0)
    save(folder, 30)
    (folder / "report.json").write_text('{"steps": 30}')
    _, figures = told(run, tmp_path)
    assert (figures["run"]["state"], figures["run"]["step"]) == ("finished", 30)
    assert figures["run"]["cost"]["seconds"] == 3.0
    assert figures["report"] == {"steps": 30}
    assert figures["run"]["trouble"] is None


def test_a_folder_without_model_and_logs_is_still_a_mistake(run, tmp_path):
    begun(tmp_path / "r")
    assert "no such file or folder" not in run("info", "r", code=1).err
    (tmp_path / "r/logs").mkdir()
    assert "neither model.safetensors nor checkpoints" in run("info", "r", code=1).err


# -- charts ------------------------------------------------------------------------------------


def test_a_chart_is_as_wide_as_asked_and_shows_both_curves():
    steps = list(range(1, 101))
    curves = {"a": (steps, [100.0 / s for s in steps]), "b": ([50, 100], [2.0, 100.0])}
    for columns in (40, 77):
        rows = chart.chart(curves, columns, 8, chart.PLAIN)
        assert len(rows) == 9
        assert max(map(len, rows)) == columns
        assert rows[-1].split() == ["step", "1", "100"]
        assert [r.split("|")[0].strip() for r in (rows[0], rows[7])] == ["100", "1"]
        assert rows[0].endswith("o")  # of the second curve, at the last step and as high as that
        filled = [len(r.split("|", 1)[1].replace("o", "").strip()) for r in rows[:8]]
        assert filled == sorted(filled)  # it falls: each row is as long as the one above, or more
    body = [r.split("|", 1)[1] for r in chart.chart(curves, 77, 8, chart.PLAIN, long=True)[:8]]
    heights = [sum(len(r) > k and r[k] != " " for r in body) for k in range(0, 60, 10)]
    # 1/s is a straight line on two logarithmic axes: the same fall from column to column.
    assert heights == sorted(heights, reverse=True)
    assert max(a - b for a, b in itertools.pairwise(heights)) <= 2


def test_a_chart_without_values_positive_values_or_two_steps():
    assert chart.chart({"a": ([], []), "b": ([], [])}, 40, 8, chart.PLAIN) == []
    rows = chart.chart({"a": ([1, 2], [-1.0, 1.0])}, 40, 8, chart.BLOCKS)
    assert [rows[k].split("|")[0].split()[0] for k in (0, 7)] == ["1", "-1"]
    assert "█" in rows[0]
    assert len(chart.chart({"a": ([5], [1.0])}, 40, 8, chart.PLAIN)) == 9


@pytest.mark.parametrize(
    ("encoding", "terminal", "blocks"),
    [("utf-8", True, True), ("UTF8", True, True), ("ascii", True, False), ("utf-8", False, False)],
)
def test_blocks_are_for_terminals_that_show_them(encoding, terminal, blocks):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    stream.isatty = lambda: terminal
    assert chart.blocks(stream) is blocks


def test_charts_fit_the_terminal(monkeypatch):
    for columns, width in ((60, 59), (300, 100), (10, 40)):
        size = os.terminal_size((columns, 24))
        monkeypatch.setattr(shutil, "get_terminal_size", lambda fallback, size=size: size)
        assert chart.width() == width
