"""Fixed-step solvers never wait for the device: their steps run where values cannot be read.

Tensors on torch's ``meta`` device have no values: every ``.item()``, ``float()``, ``bool()``,
``.tolist()`` or boolean index, each of which an accelerator would be waited for, raises there.
Times are what the loop gives, float64 scalars on the CPU.
"""

from itertools import pairwise

import pytest
import torch

import scoresde as sd
from scoresde import config, grids, solvers
from scoresde.brownian import BrownianPath
from scoresde.noise import KeyedNoise

META = torch.device("meta")
STEPPED = [n for n, c in config.names(solvers).items() if c.default_steps is not None]
WAITING = {"torchsde"}
"""Solvers of other libraries, which read times and step sizes back at every step."""
VARIANTS = [
    *(n for n in STEPPED if n not in WAITING),
    {"name": "ddim", "eta": 1.0},
    {"name": "edm", "churn": 20.0},
    {"name": "langevin", "steps": 2},
    {"name": "multistep", "variable": "velocity", "points": 6, "corrector": 7},
    {"name": "multistep", "lower_last": True, "coordinate": "t"},
    {"name": "dpmpp-3m", "form": "published"},
    {"name": "rk", "method": "dopri5", "variable": "noise"},
    {"name": "parallel", "solver": "sa"},  # its steps; its rounds wait once each, and say so
]


def label(section):
    return section if isinstance(section, str) else "-".join(map(str, section.values()))


class Score:
    """``-x``, the score of white noise, wherever ``x`` is."""

    def __init__(self, sde):
        self.sde = sde

    def __call__(self, x, t):
        assert x.device == META
        assert t.device.type == "cpu"
        return -x


def steps(solver, sde, x, noise, count=8):
    times = grids.LogSNR()(sde, count, sde.t_max, sde.t_min_sampling)
    reverse = solver.reverse(Score(sde))
    state = solver.init(reverse, x, times, noise)
    for t, s in pairwise(times.unbind()):
        x, state = solver.step(reverse, x, t, s, noise, state)
    return x


@pytest.mark.parametrize("section", VARIANTS, ids=label)
def test_a_step_never_waits(section):
    solver = config.build(section, solvers, "solver")
    x = steps(solver, sd.VP(), torch.empty(3, 2, 4, 4, device=META), KeyedNoise(0))
    assert x.device == META
    assert (x.shape, x.dtype) == ((3, 2, 4, 4), torch.float32)


@pytest.mark.parametrize("name", ["ancestral", "ddim", "sa", "sde-dpmpp-2m"])
def test_steps_on_a_brownian_path_never_wait(name):
    section = {"name": name, **({"eta": 1.0} if name == "ddim" else {})}
    solver = config.build(section, solvers, "solver")
    x = torch.empty(3, 2, 4, 4, device=META)
    assert steps(solver, sd.VP(), x, BrownianPath(0)).device == META


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_thresholds_never_wait(mode):
    sde, solver = sd.VP(), solvers.DPMpp2M()
    times = grids.LogSNR()(sde, 4, 1.0, 1e-3)
    reverse = solver.reverse(sd.Threshold(Score(sde), mode))
    x, state = torch.empty(3, 2, 4, 4, device=META), None
    for t, s in pairwise(times.unbind()):
        x, state = solver.step(reverse, x, t, s, None, state)
    assert x.device == META


@pytest.mark.parametrize("name", ["ancestral", "euler-maruyama", "heun", "rk", "unipc"])
def test_a_step_never_waits_in_any_process(sde, name):
    solver = config.build(name, solvers, "solver")
    x = torch.empty(3, 2, device=META, dtype=torch.float64)
    assert steps(solver, sde, x, KeyedNoise(0), count=4).dtype == torch.float64


@pytest.mark.parametrize("draw", ["normal", "uniform", "rademacher"])
def test_keyed_noise_never_waits(draw):
    out = getattr(KeyedNoise(3, 5), draw)((3, 2, 5), device=META, dtype=torch.float32)
    assert out.device == META
    assert (out.shape, out.dtype) == ((3, 2, 5), torch.float32)


@pytest.mark.parametrize("device", [None, META])
def test_noise_of_torch_never_waits(device):
    x = torch.empty(3, 2, device=META)
    assert steps(solvers.Ancestral(), sd.VP(), x, None).device == META


def test_a_network_never_waits():
    net = sd.nets.MLP((2,)).to(META)
    model = sd.ScoreModel(net, sd.VP(), sd.Eps())
    reverse = solvers.DPMpp2M().reverse(model)
    times = grids.LogSNR()(model.sde, 3, 1.0, 1e-3)
    x, state = torch.empty(3, 2, device=META), None
    for t, s in pairwise(times.unbind()):
        x, state = solvers.DPMpp2M().step(reverse, x, t, s, None, state)
    assert x.device == META


@pytest.mark.parametrize("read", [float, bool, torch.Tensor.item, torch.Tensor.tolist])
def test_reading_a_value_would_be_seen(read):
    class Reads(solvers.DDIM):
        def step(self, reverse, x, t, s, noise, state=None):
            read(x.sum())
            return super().step(reverse, x, t, s, noise)

    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        steps(Reads(), sd.VP(), torch.empty(3, 2, device=META), None)


def test_the_loop_waits_once(monkeypatch):
    """What it reads at its end is one vector of flags, whatever the number of steps."""
    waits = []
    real = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: waits.append(1) or real(self))
    for count in (3, 30):
        waits.clear()
        sde = sd.VP()
        score = sd.GaussianMixture([1.0], torch.zeros(1, 2), [1.0]).score(sde)
        solver = solvers.DDIM()
        times = grids.LogSNR()(sde, count, 1.0, 1e-3)
        solver.integrate(solver.reverse(score), torch.zeros(3, 2), times)
        assert len(waits) == 1
