"""``scoresde convert``: both ways, what it refuses, and what it leaves behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import scoresde as sd
from scoresde.checkpoint import CheckpointError
from scoresde.cli import convert, foreign
from scoresde.interop import hub, reading, score_sde
from scoresde.interop.foreign import Foreign
from scoresde.nets.ddpm import DDPMUNet
from scoresde.noise_labels import Time

NAMES = ("edm_adm", "guided_diffusion_cond", "song_ncsnpp_ve")


def chain():
    """A small network of DDPM on its table, which diffusers has as well."""
    torch.manual_seed(0)
    net = DDPMUNet((3, 8, 8), widths=(32,), blocks=1, attention=(), embedding="positional",
                   dropout=0.3)  # fmt: skip
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    first = 1 / 1000
    sde = sd.DDPM(1000, t_min=first, t_min_sampling=first, t_min_likelihood=first)
    return sd.ScoreModel(
        net, sde, sd.Eps(scale_input=False, label=Time(sde, 1000.0, -1.0)), shape=(3, 8, 8),
        scaler=sd.data.Scaler((128.0,), (2 / 256,), 256), weights="ema",
    )  # fmt: skip


@pytest.fixture
def source(tmp_path):
    chain().save(tmp_path / "m")
    return "m"


def held(folder):
    return sorted(p.name for p in folder.iterdir())


def same(a, b):
    ours, theirs = a.net.state_dict(), b.net.state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert (a.sde, a.parameterization, a.scaler) == (b.sde, b.parameterization, b.scaler)


def test_to_diffusers_and_back_changes_nothing(run, source, tmp_path):
    said = run("convert", source, "d", "--to", "diffusers").out
    assert "by 0" in said
    assert "left out" in said
    assert "nothing" in said
    assert held(tmp_path / "d") == ["model_index.json", "scheduler", "unet"]
    said = run("convert", "d", "back", "--json", "f/c.json").out
    assert "next: scoresde sample back" in said
    figures = json.loads((tmp_path / "f/c.json").read_text())
    assert (figures["format"], figures["to"], figures["difference"]) == (
        "diffusers",
        "scoresde",
        0,
    )
    assert figures["left out"]
    assert all(note in said for note in figures["left out"])
    model = sd.load(tmp_path / "back")
    same(model, chain())
    assert figures["parameters"] == sum(p.numel() for p in model.net.parameters())
    assert held(tmp_path) == ["back", "d", "f", "m"]
    run("sample", "back", "-n", 2, "--steps", 2)


def test_a_model_of_ours_keeps_its_grids_and_data(run, source, tmp_path):
    file = tmp_path / "m" / "config.yaml"
    file.write_text(file.read_text() + "data: {source: digits}\n")
    entry = {"solver": {"name": "vabm"}, "steps": 3, "grid": {"log_snr": [1.0, 0.0]}}
    (tmp_path / "m" / "tuned.yaml").write_text(yaml.safe_dump({"tuned": [entry]}))
    run("convert", source, "copy")
    assert sd.load(tmp_path / "copy").tuned == (entry,)
    assert yaml.safe_load((tmp_path / "copy/config.yaml").read_text())["data"] == {
        "source": "digits"
    }
    (tmp_path / "m" / "checkpoints").mkdir()
    assert "the optimizer's state stay in the run" in run("convert", source, "second").out


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_of_other_projects(run, tmp_path, original, name):
    said = run("convert", original(name), "x", "--json", "c.json").out
    figures = json.loads((tmp_path / "c.json").read_text())
    assert figures["difference"] == 0
    assert (
        figures["format"]
        == {"e": "EDM", "g": "guided-diffusion", "s": "score_sde_pytorch"}[name[0]]
    )
    assert "format" in said
    same(sd.load(tmp_path / "x"), sd.load(original(name)))


def test_settings_are_laid_over_the_file(run, tmp_path, original):
    home = original("song_ddpmpp_subvp")
    (tmp_path / "in").mkdir()
    shutil.copy(home / "checkpoint.pth", tmp_path / "in")
    error = run("convert", "in", "x", code=1).err
    assert "does not say how its network is built" in error
    run("convert", "in", "x", "--config", home / "config.json", "--set", "training.sde=vpsde")
    assert sd.load(tmp_path / "x").sde == sd.VP()
    shutil.copy(home / "config.json", tmp_path / "in")
    error = run("convert", "in", "y", "--set", "model.nf=32", code=1).err
    assert "does not fit the network" in error
    run("convert", "in", "y", "--set", "data.centered=false", "--weights", "raw")
    model = sd.load(tmp_path / "y")
    assert (model.net.center_input, model.weights) == (True, "raw")
    assert "name=vp," in run("info", "in", "--set", "training.sde=vpsde").out


@pytest.mark.parametrize(
    ("base", "values", "found"),
    [
        ({"model": {"nf": 1, "dropout": 0}}, {"model.nf": 2},
         {"model": {"nf": 2, "dropout": 0}}),
        ({"model.nf": 1}, {"model.nf": 2, "data.centered": True},
         {"model.nf": 2, "data": {"centered": True}}),
        ({}, {"image_size": 64, "channel_mult": "1,2"}, {"image_size": 64, "channel_mult": "1,2"}),
    ],
)  # fmt: skip
def test_dotted_keys_go_where_the_file_has_them(base, values, found):
    assert foreign.laid_over(base, values) == found


def test_a_key_below_a_value_is_refused():
    with pytest.raises(ValueError, match="model is a value"):
        foreign.laid_over({"model": 3}, {"model.nf": 2})


def test_settings_reach_the_reader_and_dropout_is_off(monkeypatch, tmp_path):
    file = tmp_path / "a.pth"
    file.write_bytes(b"")
    (tmp_path / "config.json").write_text('{"model": {"nf": 1, "name": "ddpm"}}')
    given = []

    def read(path, *, weights, config):
        given.append((path, weights, config))
        return Foreign(chain().train(), "elsewhere")

    monkeypatch.setattr(reading, "read", read)
    monkeypatch.setattr(reading, "opened", lambda _: {"model": {"module.all_modules.0.W": 0}})
    assert score_sde.claims(reading.opened(file))
    for path in (str(file), str(tmp_path)):
        found = foreign.opened(path, "raw", None, ("model.nf=2", "data.centered=true"))
        assert not found.model.training
    laid = {"model": {"nf": 2, "name": "ddpm"}, "data": {"centered": True}}
    assert given == [(file, "raw", laid), (tmp_path, "raw", laid)]
    foreign.opened(str(file), "ema", None, ())
    foreign.opened(str(file), "ema", tmp_path / "config.json", ())
    assert [config for *_, config in given[2:]] == [None, tmp_path / "config.json"]
    monkeypatch.setattr(reading, "opened", lambda _: {"ema": None})
    with pytest.raises(ValueError, match="neither --config nor --set"):
        foreign.opened(str(file), "ema", None, ("a=1",))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["nothing", "x"], "there is no such file or folder"),
        (["m", "file"], "it is a file"),
        (["m", "file/x"], "is not a folder"),
        (["m", "full"], "is not empty: name another folder, or pass --overwrite"),
        (["m", "full", "--overwrite"], "it holds notes.txt: name another folder"),
        (["m", "."], "is not empty"),
        (["m", "x", "--set", "a=1"], "neither --config nor --set"),
        (["m", "x", "--config", "file"], "neither --config nor --set"),
        (["m", "x", "--private"], "belongs to hf:owner/name"),
        (["m", "hf:me/m", "--to", "diffusers"], "DST cannot be hf:"),
        (["empty", "x"], "no model at empty"),
        (["file", "x"], "is no checkpoint"),
        (["zoo:digits", "x", "--to", "diffusers"], "diffusers"),
        (["hf:me", "x"], "names no model"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line_and_leave_nothing(run, source, tmp_path, args, said):
    (tmp_path / "file").write_text("text")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    error = run("convert", *args, code=1).err
    assert said in error
    assert error.startswith("Error: ")
    assert error.count("\n") == 1
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert held(tmp_path) == ["empty", "file", "full", "m"]


def test_overwrite_replaces_a_model_whole(run, source, tmp_path):
    run("convert", source, "x", "--to", "diffusers")
    run("convert", "x", "x", "--overwrite")
    assert held(tmp_path / "x") == ["config.yaml", "model.safetensors"]
    same(sd.load(tmp_path / "x"), chain())
    (tmp_path / "x" / "mine.txt").write_text("kept")
    assert "mine.txt" in run("convert", source, "x", "--overwrite", code=1).err
    (tmp_path / ".y.draft").mkdir()  # of a conversion that was killed
    (tmp_path / ".y.draft" / "half").write_text("")
    (tmp_path / "y").mkdir()
    run("convert", source, "y")
    assert held(tmp_path) == ["m", "x", "y"]
    assert held(tmp_path / "y") == ["config.yaml", "model.safetensors"]


def test_through_a_link_the_folder_behind_it_is_replaced(run, source, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    run("convert", source, "link")
    assert (tmp_path / "link").is_symlink()
    assert held(tmp_path / "real") == ["config.yaml", "model.safetensors"]


def test_a_copy_that_differs_is_not_kept(run, source, tmp_path, monkeypatch):
    load = sd.checkpoint.load

    def other(path, **options):
        model = load(path, **options)
        if ".draft" in str(path):
            with torch.no_grad():
                next(model.net.parameters()).mul_(1.001)
        return model

    monkeypatch.setattr("scoresde.checkpoint.load", other)
    error = run("convert", source, "x", code=1).err
    assert "nothing is written" in error
    assert held(tmp_path) == ["m"]


def test_differences_are_seen():
    a, b = chain().eval(), chain().eval()
    assert convert.compare(a, b) == 0
    b.sde = sd.DDPM(1000, beta_end=0.019)
    assert convert.compare(a, b) > 0
    b = chain().eval()
    b.parameterization = sd.X0(scale_input=False, label=b.parameterization.label)
    assert convert.compare(a, b) > 0
    assert convert._gap(torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0])) == float(
        "inf"
    )
    assert convert._gap(torch.zeros(1), None) == float("inf")


@pytest.mark.parametrize("place", ["safetensors.torch.save", "pathlib.Path.rename"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_ctrl_c_and_a_full_disk_leave_the_target_as_it_was(
    run, source, tmp_path, monkeypatch, place, error
):
    run("convert", source, "x")
    before = {p: p.read_bytes() for p in (tmp_path / "x").iterdir()}
    rename, calls = Path.rename, []

    def fail(*args, **_):
        calls.append(args)
        if place == "pathlib.Path.rename" and len(calls) != 2:
            return rename(*args)  # the second takes the draft to its place
        raise error

    monkeypatch.setattr(place, fail)
    said = run(
        "convert", source, "x", "--overwrite", code=130 if error is KeyboardInterrupt else 1
    )
    assert len(said.err.strip().splitlines()) == 1
    assert {p: p.read_bytes() for p in (tmp_path / "x").iterdir()} == before
    assert held(tmp_path) == ["m", "x"]


def test_an_upload_is_verified_and_then_sent(run, source, tmp_path, monkeypatch):
    sent = []

    def upload(folder, repo_id, **options):
        same(sd.load(folder), chain())
        sent.append((held(folder), repo_id, options))
        return f"https://huggingface.co/{repo_id}"

    monkeypatch.setattr(hub, "upload", upload)
    said = run("convert", source, "hf:me/m", "--private").out
    assert "written https://huggingface.co/me/m" in said
    assert sent == [(["README.md", "config.yaml", "model.safetensors"], "me/m", {"private": True})]

    def refuse(*_, **__):
        raise CheckpointError("no")

    monkeypatch.setattr(hub, "upload", refuse)
    assert run("convert", source, "hf:me/m", code=1).err == "Error: no\n"
    assert held(tmp_path) == ["m"]


def test_a_signal_stops_it(source, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "scoresde", "convert", "m", "x"], cwd=tmp_path,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    if process.returncode:  # it was not done before the signal came
        assert (process.returncode, error.strip()) == (130, "stopped")
        assert held(tmp_path) == ["m"]
    else:
        assert held(tmp_path) == ["m", "x"]


def test_without_the_hubs_package_nothing_is_begun(run, source, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    said = run("convert", source, "hf:me/m", code=1)
    assert "pip install" in said.err
    assert said.out == ""


def test_a_folder_that_cannot_be_made_is_named(run, source, tmp_path, monkeypatch):
    def refuse(path, *args, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    error = run("convert", source, "x/y", code=1).err
    assert error == f"Error: cannot write {tmp_path / 'x/y'}: Permission denied\n"


def test_a_class_of_the_users_own_is_imported_where_that_is_allowed(
    run, source, tmp_path, monkeypatch
):
    (tmp_path / "own_processes.py").write_text(
        "import scoresde as sd\nfrom dataclasses import dataclass\n\n\n"
        "@dataclass(frozen=True)\nclass Own(sd.VP):\n    extra: int = 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / source / "config.yaml"
    content = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**content, "sde": {"name": "own_processes.Own"}}))
    error = run("convert", source, "x", code=1).err
    assert "SCORESDE_IMPORT=own_processes" in error
    assert "own_processes" not in sys.modules
    monkeypatch.setenv("SCORESDE_IMPORT", "own_processes")
    assert "own_processes.Own" in run("convert", source, "x").out
    sys.modules.pop("own_processes")
