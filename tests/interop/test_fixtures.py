"""Checkpoints that the original projects wrote, and what their own code computed from them."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tape import distance

import scoresde as sd
from scoresde.likelihood import solve

FIXTURES = Path(__file__).parents[2] / "../shared/fixtures"
pytestmark = pytest.mark.skipif(
    not FIXTURES.exists(), reason="no checkpoints of the original projects"
)


def expected(name):
    with np.load(FIXTURES / name / "expected.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def apart(found, wanted):
    """The largest distance of any item, each by its own size: scores grow as t falls."""
    return max(distance(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("weights", ["raw", "ema"])
@pytest.mark.parametrize(
    ("name", "process", "bound"),
    [
        ("song_ddpmpp_subvp", sd.SubVP(), 5e-6),
        ("song_ddpmpp_vp_mnist", sd.VP(), 5e-6),
        ("song_ncsnpp_ve", sd.VE(), 1e-4),
    ],
)
def test_scores_of_score_sde(name, process, bound, weights):
    """The last bound is that of one float32 logarithm, see the next test."""
    files = expected(name)
    model = sd.load(FIXTURES / name, weights=weights)
    assert model.sde == process
    assert model.weights == weights
    wanted = files[f"score_{weights}"]
    with torch.no_grad():
        assert apart(model(files["x"], files["t"]), wanted) < bound
        for i, t in enumerate(files["t"].tolist()):
            assert distance(model(files["x"][i : i + 1], t)[0], wanted[i]) < bound
        if name == "song_ncsnpp_ve":
            assert apart(model(files["x"], files["t"])[:2], wanted[:2]) < 5e-6


ALONE = """
import sys
sys.path[:0] = {path!r}
import torch, scoresde as sd
from test_fixtures import FIXTURES, apart, expected
files = expected("song_ncsnpp_ve")
for weights in ("raw", "ema"):
    model = sd.load(FIXTURES / "song_ncsnpp_ve", weights=weights)
    with torch.no_grad():
        print(apart(model(files["x"], files["t"]), files["score_" + weights]))
"""


def test_fourier_features_with_the_logarithm_of_the_original():
    """At t = 0.01 the angles are about 1400 rad, and the last bit of a logarithm is 6e-5 there.

    The original's machine rounded log(0.010889042) to -4.5199985, MKL's AVX-512 to -4.5199981 (the
    nearest float32 is the latter); its AVX2 code, which must be chosen before torch starts,
    rounds like the original.
    """
    code = ALONE.format(path=[str(Path(__file__).parent), str(Path(sd.__file__).parents[1])])
    environment = {**os.environ, "MKL_ENABLE_INSTRUCTIONS": "AVX2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert all(float(line) < 1e-5 for line in done.stdout.split())
    assert len(done.stdout.split()) == 2


@pytest.mark.parametrize("name", ["edm_adm", "edm_ddpmpp_cond"])
def test_denoisers_of_edm(name):
    files = expected(name)
    model = sd.load(FIXTURES / name)
    sigma, labels = files["sigma"], files["labels"]
    with torch.no_grad():
        found = model.denoise(files["x"], sigma, y=labels)
        assert apart(found, files["denoised"]) < 5e-6
        index = labels.argmax(1)
        assert torch.equal(labels, torch.nn.functional.one_hot(index, labels.shape[1]).float())
        assert apart(model.denoise(files["x"], sigma, y=index), files["denoised"]) < 5e-6
        score = model(files["x"], sigma, y=labels)
    q = sigma[:, None, None, None]
    assert apart(score, (files["denoised"] - files["x"]) / q**2) < 1e-4  # a difference at 0.05
    assert model.sde == sd.EDM()
    assert model.weights == "ema"


def test_outputs_of_guided_diffusion():
    files = expected("guided_diffusion_cond")
    model = sd.load(FIXTURES / "guided_diffusion_cond")
    with torch.no_grad():
        found = model.net(files["x"], files["t"], files["y"])
        assert apart(found, files["output"]) < 5e-6
        eps, v = model.noise_and_variance(files["x"], (files["t"] + 1) / 1000, y=files["y"])
    assert apart(eps, files["output"][:, :3]) < 1e-5
    assert apart(v, files["output"][:, 3:]) < 1e-5


def mnist(monkeypatch, rows):
    """The averaged model, and the probe of the original in place of the drawn one."""
    files = expected("song_ddpmpp_vp_mnist")
    probe = files["lik_probe"][rows]
    monkeypatch.setattr(solve, "draw_probes", lambda *_: probe[None])
    model = sd.load(FIXTURES / "song_ddpmpp_vp_mnist")
    return model, {key: value[rows] for key, value in files.items() if value.ndim}


def compared(model, files, bits, latent, **options):
    out = sd.log_prob(model, files["lik_data"], **options)
    assert bool(out.converged.all())
    found = sd.bits_per_dim(out.log_prob, 1024)
    by_hand = -out.log_prob / (1024 * math.log(2)) + 7  # its offset: 256 levels over [-1, 1]
    torch.testing.assert_close(found, by_hand, rtol=1e-6, atol=1e-6)
    print((found - files["lik_bpd"]).abs().max(), apart(out.latent, files["lik_latent"]), out.nfe)
    assert (found - files["lik_bpd"]).abs().max() < bits
    assert apart(out.latent, files["lik_latent"]) < latent
    return out


def test_likelihood_of_score_sde(monkeypatch):
    """One image with its probe, which the original solved in a batch of 16 at 1e-5."""
    model, files = mnist(monkeypatch, slice(0, 1))
    compared(model, files, 2e-3, 2e-3, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_likelihoods_of_score_sde(monkeypatch):
    model, files = mnist(monkeypatch, slice(0, 4))
    compared(model, files, 2e-4, 2e-4)


def test_ode_samples_of_score_sde():
    files = expected("song_ddpmpp_vp_mnist")
    model = sd.load(FIXTURES / "song_ddpmpp_vp_mnist")
    out = sd.sample(
        model, x_T=files["ode_start"], t_end=1e-3, denoise=False,
        solver={"name": "ode-scipy", "rtol": 1e-5, "atol": 1e-5},
    )  # fmt: skip
    assert out.converged
    print(((out.x + 1) / 2 - files["ode_end"]).abs().max(), out.nfe)
    assert ((out.x + 1) / 2 - files["ode_end"]).abs().max() < 1e-3
