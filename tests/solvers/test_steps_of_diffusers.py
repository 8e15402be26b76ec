"""Whole runs of solvers against diffusers' schedulers; what differs is said in the benchmark."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from scoresde import solvers

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers' own
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "steps_of_diffusers.py"
spec = importlib.util.spec_from_file_location("steps_of_diffusers", SCRIPT)
theirs = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(theirs)

SINGLE = ("DPMSolverMultistepScheduler", "EulerDiscreteScheduler")
"""Schedulers that compute a step in float32 whatever the type of the state."""


@pytest.mark.parametrize("name", theirs.CASES)
def test_every_state_is_that_of_diffusers(name):
    found = theirs.differences(name, 20)
    assert len(found) == (18 if "pndm" in name else 20)
    assert max(found) < (1e-5 if theirs.CASES[name].scheduler in SINGLE else 1e-11)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("ancestral (small)", solvers.Ancestral("large")),
        ("ddim", solvers.DDIM(0.1)),
        ("dpmpp-2m", solvers.DPMpp2M(line="exact")),
        ("dpmpp-3m (published)", solvers.DPMpp3M()),
        ("unipc (points=2, bh2)", solvers.UniPC(points=2, line="exact")),
        ("heun", solvers.DDIM()),
    ],
)
def test_another_formula_would_be_seen(monkeypatch, name, other):
    """What agrees to 1e-5 differs by more for the next of kin."""
    monkeypatch.setitem(theirs.CASES, name, replace(theirs.CASES[name], solver=other))
    assert max(theirs.differences(name, 20)) > 1e-4
