"""The self-check: right settings pass, wrong ones are named, and the figures are what they say."""

import math
from dataclasses import replace

import pytest
import torch

import scoresde as sd
from scoresde.likelihood.selfcheck import CASES, mixture_of, self_check
from scoresde.likelihood.verdict import binomial_range, report, verdict

GRID = {"method": "unipc", "steps": 40, "divergence": "hutchinson"}


class Times:
    """A multiple of a score."""

    def __init__(self, score, factor):
        self.score, self.sde, self.factor = score, score.sde, factor

    def __call__(self, x, t):
        return self.factor * self.score(x, t)


def check(settings, *, sde=None, shape=(8,), cases=("broad",), **options):
    options = {"repeats": 300, **options}
    return self_check(sde or sd.VP(), shape, settings, cases=cases, **options)


def test_right_settings_pass(sde):
    settings = {**GRID, "steps": 80, "probes": 12}
    for found in check(settings, sde=sde, cases=tuple(CASES), repeats=200):
        assert found.ok, found
        assert (found.failed, found.truth_stderr) == (0, 0)
        assert found.nfe == 81
        low, high = found.coverage_range
        assert low < found.coverage < high
        if found.rms < 1e-3:
            assert "no longer matter" in found.verdict
            continue
        assert found.verdict.startswith("covers")
        assert found.coverage > 0.9


def test_the_figures_are_those_of_the_likelihood_itself():
    """By hand: the mixture's items, their keyed probes, and the closed forms at either end."""
    settings = {**GRID, "steps": 10, "probes": 6}
    (found,) = check(settings, repeats=50, batch=17, seed=3, dtype=torch.float64)
    mixture = mixture_of((8,), 1.0, CASES["broad"], 3)
    x = mixture.sample(50, torch.Generator().manual_seed(3))
    out = sd.log_prob(mixture.score(sd.VP()), x, seed=3, **settings)
    lacks = mixture.log_prob(out.latent, sd.VP(), 1.0) - out.prior
    truth = mixture.log_prob(x, sd.VP(), out.t_min)
    error = out.log_prob - truth
    own = error + lacks
    low, high = out.interval(0.95)
    assert found.bias == pytest.approx(float(own.mean()), rel=1e-6)
    assert found.bias_stderr == pytest.approx(float(own.std()) / 50**0.5, rel=1e-6)
    assert found.rms == pytest.approx(float(own.square().mean().sqrt()), rel=1e-6)
    assert found.stated == pytest.approx(float(out.stderr.square().mean().sqrt()), rel=1e-6)
    assert found.prior_bias == pytest.approx(-float(lacks.mean()), rel=1e-4)
    assert found.prior_rms == pytest.approx(float(lacks.square().mean().sqrt()), rel=1e-4)
    hits = ((low + lacks <= truth) & (truth <= high + lacks)).double().mean()
    assert found.coverage == pytest.approx(float(hits))
    assert found.coverage_range == binomial_range(round(50 * float(hits)), 50)
    assert found.coverage_with_prior == pytest.approx(
        float(((low <= truth) & (truth <= high)).double().mean())
    )
    twice = sd.log_prob(mixture.score(sd.VP()), x[:17], seed=3, **{**settings, "steps": 20})
    change = twice.log_prob - out.log_prob[:17]
    assert found.finer[0] == pytest.approx(float(change.mean()), rel=1e-6)
    assert found.finer[1] == pytest.approx(float(change.std()) / 17**0.5, rel=1e-6)


def test_rows_say_how_they_were_obtained():
    (found,) = check({**GRID, "probes": 3}, repeats=20, seed=5)
    assert (found.case, found.repeats, found.seed, found.level) == ("broad", 20, 5, 0.95)
    assert (found.shape, found.levels, found.sde) == ((8,), None, repr(sd.VP()))
    assert found.how == {
        "method": "unipc", "steps": 40, "divergence": "hutchinson", "probes": 3,
        "noise": "rademacher", "t_min": 1e-5, "t_max": 1.0, "grid": "logsnr", "dtype": "float32",
    }  # fmt: skip
    text = report([found])
    for part in ("VP(", "unipc, steps 40", "probes 3", "20 items of 8", "seed 5", "float32"):
        assert part in text
    (found,) = check({"divergence": "exact"}, repeats=20)
    assert found.how["rtol"] == 1e-5
    assert "probes" not in found.how


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_a_wrong_score_is_caught(factor):
    (found,) = check({**GRID, "probes": 8}, wrap=lambda score: Times(score, factor))
    assert not found.ok
    assert found.coverage < 0.5
    assert "not by the steps" in found.verdict
    assert "the score is not that of the density" in found.verdict
    assert "NOT RIGHT" in report([found])


def test_too_few_steps_are_caught():
    (found,) = check({**GRID, "steps": 8, "probes": 8})
    assert not found.ok
    assert found.coverage < 0.5
    assert "the solver's error" in found.verdict
    assert "give solver_error or more steps" in found.verdict
    (known,) = check({**GRID, "steps": 8, "probes": 8, "solver_error": True})
    assert known.ok
    assert known.coverage > 0.9
    assert "the solver errs by" in known.verdict  # a mean over items would still show it
    assert known.nfe > found.nfe


def test_errors_that_are_not_stated_are_named():
    (exact,) = check({**GRID, "steps": 12, "divergence": "exact"})
    assert not exact.ok
    assert exact.verdict.startswith("the solver's error")
    assert exact.verdict.endswith("is not in the interval: give solver_error")
    (one,) = check(GRID)
    assert not one.ok
    assert "one probe tells nothing of its error" in one.verdict
    (draw,) = check(GRID, levels=16, repeats=40)
    assert not draw.ok
    assert "one draw tells nothing of its error" in draw.verdict
    (ended,) = check({"probes": 2, "max_nfe": 10}, repeats=40)
    assert ended.failed == 40
    assert "40 of 40 items did not end" in ended.verdict
    assert not ended.ok


def test_error_bars_that_are_too_small_are_told_from_biased_ones(monkeypatch):
    real = sd.likelihood.selfcheck.log_prob

    def boasting(*args, **settings):
        out = real(*args, **settings)
        return replace(out, stderr=out.stderr / 3, stderr_probes=out.stderr_probes / 3)

    monkeypatch.setattr(sd.likelihood.selfcheck, "log_prob", boasting)
    (found,) = check({**GRID, "probes": 16})
    assert not found.ok
    assert "times as large as stated" in found.verdict
    assert found.rms > 2 * found.stated


def test_a_few_items_that_err_by_more_are_told():
    (found,) = check({**GRID, "probes": 12}, repeats=60)
    lots = replace(found, rms=2 * found.stated)
    assert "a few items err by more, 2 times the stated" in verdict(lots, "", False)[1]
    assert "give solver_error" in verdict(lots, "", False)[1]
    assert "give more steps" in verdict(lots, "", True)[1]
    assert "a few items" not in verdict(found, "", False)[1]
    tiny = replace(found, rms=9e-4, coverage_range=(0, 0.01))
    assert verdict(tiny, "", False) == (
        True,
        "errs by 0.0009 nats, where intervals no longer matter",
    )
    skewed = replace(found, coverage=0.88, coverage_range=(0.85, 0.91), rms=found.stated)
    assert "of the size stated, but skewed" in verdict(skewed, "", False)[1]


def test_discrete_data_has_the_mean_over_uniform_noise_as_its_truth():
    found = check({**GRID, "draws": 8}, levels=64, shape=(2, 3), repeats=120, cases=tuple(CASES))
    for row in found:
        assert row.ok, row
        assert row.coverage > 0.9
        assert 0 < row.truth_stderr < 0.25 * row.stated
        assert row.levels == 64
        assert row.bits(-6 * math.log(2)) == pytest.approx(1)
    text = report(found)
    assert text.count("bits/dim") == 1
    assert "2x3 (64 levels)" in text
    assert "draws 8" in text


def test_the_prior_is_reported_apart():
    """Noise of 5 does not hide data of unit variance; a Gaussian of its moments knows of it."""
    sde = sd.VE(sigma_max=5.0)
    settings = {**GRID, "probes": 16}
    (found,) = check(settings, sde=sde)
    assert found.ok
    assert found.coverage > 0.9
    assert found.coverage_with_prior < found.coverage - 0.05
    assert "the prior" in found.verdict
    assert "give a terminal" in found.verdict
    (mended,) = check({**settings, "terminal": (torch.zeros(8), torch.eye(8))}, sde=sde)
    assert abs(mended.prior_bias) < 0.2 * abs(found.prior_bias)
    assert mended.prior_rms < 0.2 * found.prior_rms
    assert mended.coverage_with_prior > found.coverage_with_prior + 0.1


def test_a_row_does_not_depend_on_batches_and_progress_ends():
    seen = []
    settings = {**GRID, "steps": 12, "probes": 3}
    (a,) = check(settings, repeats=30, batch=7, dtype=torch.float64, progress=seen.append)
    (b,) = check(settings, repeats=30, batch=30, dtype=torch.float64)
    assert a.rms == pytest.approx(b.rms, rel=1e-9)
    assert a.coverage == b.coverage
    assert seen == sorted(seen)
    assert len(seen) == 5
    assert seen[-1] == 1
    two = []
    check(settings, repeats=20, cases=tuple(CASES), progress=two.append)
    assert two == [0.5, 1.0]


def test_a_binomial_range_holds_its_share_in_each_tail():
    low, high = binomial_range(370, 400)

    def above(p):  # P(at least 370 hits)
        return sum(math.comb(400, k) * p**k * (1 - p) ** (400 - k) for k in range(370, 401))

    assert above(low) == pytest.approx(0.025, rel=1e-6)
    assert 1 - above(high) + math.comb(400, 370) * high**370 * (1 - high) ** 30 == pytest.approx(
        0.025, rel=1e-6
    )
    assert binomial_range(0, 10)[0] == 0
    assert binomial_range(10, 10)[1] == 1
    assert binomial_range(0, 400)[1] == pytest.approx(1 - 0.025 ** (1 / 400))


@pytest.mark.parametrize(
    ("settings", "options", "said"),
    [
        ({"seed": 1}, {}, "sets seed itself"),
        ({}, {"repeats": 5}, "repeats >= 20"),
        ({}, {"level": 95}, "0 < level < 1"),
        ({}, {"cases": ("wide",)}, "cases are among broad, narrow, got wide"),
        ({}, {"dtype": torch.float16}, "dtype must be one of"),
        ({"method": "unipc"}, {}, "give steps"),
    ],
)
def test_refusals(settings, options, said):
    with pytest.raises(ValueError, match=said):
        check(settings, **options)
