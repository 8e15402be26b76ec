"""``scoresde tune`` end to end, and what takes its grids."""

import json

import pytest
import torch
import yaml

import scoresde as sd
from scoresde.tuning import tuner

FEW = ["--trajectories", 8, "--held-out", 8, "--batch", 8, "--steps", 3]


@pytest.fixture
def plane(tmp_path):
    """A small model of points in the plane, of random weights."""
    torch.manual_seed(0)
    net = sd.nets.MLP(shape=(2,), width=8)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    sd.ScoreModel(net, sd.VP(), sd.V(), shape=(2,)).save(tmp_path / "m")
    return "m"


def entries(file):
    return yaml.safe_load(file.read_text())["tuned"]


def test_a_grid_is_saved_with_the_model_and_taken_from_it(run, plane, tmp_path):
    said = run("tune", plane, "--iterations", 20, *FEW, "--json", "t.json").out
    figures = json.loads((tmp_path / "t.json").read_text())
    rows = [line.split() for line in said.splitlines()[2:9]]
    errors = [float(row[1]) for row in rows]
    assert errors == sorted(errors)
    assert {row[0] for row in rows} == {"tuned", *tuner.FIXED}
    assert rows[0][0] == "tuned"
    assert errors[0] == pytest.approx(figures["error"], rel=1e-2)
    gain = min(figures["fixed"].values()) / figures["error"]
    assert gain > 1.1
    assert f"{gain:.2f} times less error" in said
    assert "--solver vabm --steps 3 --grid tuned" in said
    run("sample", plane, "-n", 2, "--solver", "vabm", "--steps", 3, "--grid", "tuned",
        "--json", "s.json")  # fmt: skip
    taken = json.loads((tmp_path / "s.json").read_text())
    assert taken["grid"]["log_snr"] == pytest.approx(figures["grid"]["log_snr"])
    assert taken["steps"] == 3
    missed = run("sample", plane, "--solver", "vabm", "--steps", 4, "--grid", "tuned", code=1).err
    assert "at 4 steps (tuned: vabm at 3)" in missed


def test_of_several_solvers_the_best_is_named_as_it_was_written(run, plane, tmp_path):
    said = run("tune", plane, "--solver", "vabm:points=2,ddim", "--iterations", 40, *FEW,
               "--json", "t.json").out  # fmt: skip
    figures = json.loads((tmp_path / "t.json").read_text())
    tried = figures["tried"]
    assert [one["solver"]["name"] for one in tried] == ["vabm", "ddim"]
    for one, name in zip(tried, ("vabm:points=2", "ddim"), strict=True):
        assert f"{name}: RMS {one['seen']:.3g} after a short search" in said
    (entry,) = entries(tmp_path / "m" / "tuned.yaml")
    assert entry["solver"] == figures["solver"]
    chosen = {"ddim": "ddim", "vabm": "vabm:points=2"}[entry["solver"]["name"]]
    assert f"--solver {chosen} --steps 3 --grid tuned" in said
    for options in (["--solver", chosen], []):
        run("sample", plane, "-n", 2, *options, "--steps", 3, "--grid", "tuned",
            "--json", "s.json")  # fmt: skip
        assert json.loads((tmp_path / "s.json").read_text())["solver"] == entry["solver"]


def test_fields_of_one_solver_are_part_of_what_it_says(run, plane):
    said = run("tune", plane, "--set", "points=2", "--iterations", 20, *FEW).out
    assert "--solver vabm:points=2 --steps 3 --grid tuned" in said


def test_a_second_search_replaces_its_entry_and_keeps_the_others(run, plane, tmp_path):
    few = ["tune", plane, "--iterations", 12]
    run(*few, *FEW)
    (first,) = entries(tmp_path / "m" / "tuned.yaml")
    run(*few, *FEW[:-1], 4)
    run(*few, *FEW, "--seed", 1)
    kept, replaced = entries(tmp_path / "m" / "tuned.yaml")
    assert (kept["steps"], replaced["steps"]) == (4, 3)
    assert replaced["grid"]["log_snr"] != first["grid"]["log_snr"]


def test_a_grid_for_the_zoo_lies_here(run, tmp_path):
    said = run("tune", "zoo:digits", "--iterations", 4, "--trajectories", 4, "--held-out", 2,
               "--batch", 4, "--steps", 3).out  # fmt: skip
    assert "--solver vabm --steps 3 --grid tuned-digits.yaml" in said
    run("sample", "zoo:digits", "-n", 2, "--solver", "vabm", "--grid", "tuned-digits.yaml")
    run("bench", "zoo:digits", "--solvers", "vabm", "--grids", "tuned-digits.yaml",
        "--steps", 3, "--samples", 4, "--out", "b")  # fmt: skip
    assert "tuned" in (tmp_path / "b" / "bench.csv").read_text()


def test_what_beats_no_fixed_grid_is_not_saved(run, plane, tmp_path):
    said = run("tune", plane, "--iterations", 0, *FEW).out
    assert "no better than the fixed grid" in said
    assert not (tmp_path / "m" / "tuned.yaml").exists()
    best = said.splitlines()[-1].split(",")[0].split()[-1]
    # The name that it gives is one that the other commands take.
    run("sample", plane, "-n", 2, "--solver", "vabm", "--steps", 3, "--grid", best)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--solver", "ancestral"], "cannot be tuned"),
        (["--solver", "ddim:eta=1"], "cannot be tuned"),
        (["--solver", "vab,vabm", "--set", "points=2"], "belongs to one solver"),
        (["--solver", "vabm,heun"], "equal evaluations a step, got vabm 1, heun 2"),
        (["--solver", "unipd"], "did you mean 'unipc'"),
        (["--set", "points=["], "is not valid YAML"),
        (["--t-end", "3"], "within the trained times"),
        (["--t-end", "0"], "within the trained times"),
        (["--out", "grid.txt"], "a .yaml file"),
        (["--out", "notes/grid.yaml"], "not a folder"),
        (["--out", "a.yaml", "--json", "a.yaml"], "cannot hold two things"),
        (["--out", "broken.yaml"], "not a file of tuned grids"),
        (["--out", "text.yaml"], "not a file of tuned grids"),
        (["--out", "odd.yaml"], "not a file of tuned grids"),
        (["--steps", "1"], "not in the range"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_found_before_the_work(run, tmp_path, monkeypatch, args, said):
    for name, text in {
        "notes": "", "broken.yaml": "a: [1,", "text.yaml": "some text",
        "odd.yaml": "tuned: [{solver: 3, steps: 3, grid: {log_snr: [0, a]}}]",
    }.items():  # fmt: skip
        (tmp_path / name).write_text(text)
    before = {p.name: p.read_text() for p in tmp_path.iterdir()}
    monkeypatch.setattr(tuner, "_reference", None)  # the work would fail
    error = run("tune", "zoo:digits", *args, code=2 if args[0] == "--steps" else 1).err
    assert said in error
    assert error.startswith("Error: ")
    assert error.count("\n") == 1
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("text", ["x", "tuned: [{solver: 3, steps: 3, grid: 5}]", "a: [1,"])
def test_other_files_are_refused_as_grids(run, tmp_path, text):
    (tmp_path / "g.yaml").write_text(text)
    for args in (["sample", "zoo:digits", "--grid", "g.yaml", "--solver", "vabm"],
                 ["bench", "zoo:digits", "--grids", "g.yaml", "--out", "b"]):  # fmt: skip
        assert "g.yaml is not a file of tuned grids" in run(*args, code=1).err
    assert [p.name for p in tmp_path.iterdir()] == ["g.yaml"]


def test_classes_take_turns(run, tmp_path):
    torch.manual_seed(0)
    net = sd.nets.MLP(shape=(2,), width=8, num_classes=3)
    sd.ScoreModel(net, sd.VP(), sd.Eps(), shape=(2,)).save(tmp_path / "m")
    said = run("tune", "m", "--iterations", 2, *FEW).out
    assert "8 unseen trajectories (8 seen)" in said


@pytest.mark.parametrize("place", ["torch.optim.Adam.step", "os.replace"])
def test_ctrl_c_leaves_the_file_as_it_was(run, plane, tmp_path, monkeypatch, place):
    file = tmp_path / "g.yaml"
    file.write_text("tuned: []\n")

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(place, interrupt)
    said = run("tune", plane, "--iterations", 20, *FEW, "--out", file, code=130)
    assert said.err.strip() == "stopped"
    assert file.read_text() == "tuned: []\n"
    assert {p.name for p in tmp_path.iterdir()} == {"g.yaml", "m"}
