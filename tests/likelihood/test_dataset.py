"""Likelihood of a data set: rows in whole blocks, the spot check, and plans for a target."""

import math
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

import scoresde as sd
from scoresde.data import Dataset, Scaler
from scoresde.likelihood.dataset import dataset_log_prob
from scoresde.likelihood.evaluation import COLUMNS, Evaluation, Rows
from scoresde.likelihood.spot import SpotCheck, spot_check
from scoresde.likelihood.target import plan

LEVELS = 16


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = sd.nets.UNet((1, 8, 8), width=16, multipliers=(1, 2), blocks=1, attention=(1,))
    for parameter in net.parameters():  # its last layer starts at zero
        torch.nn.init.normal_(parameter, std=0.05)
    scaler = Scaler((LEVELS / 2,), (2 / LEVELS,), LEVELS)
    model = sd.ScoreModel(net, sd.VP(), sd.V(), shape=(1, 8, 8), scaler=scaler, weights="raw")
    return model.eval()


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    return Dataset(torch.randint(0, LEVELS, (40, 1, 8, 8), generator=generator), levels=LEVELS)


ALONG = {"method": "unipc", "steps": 8}
ADAPTIVE = {"rtol": 1e-2, "atol": 1e-2}


@pytest.mark.parametrize("settings", [ALONG, ADAPTIVE], ids=["grid", "adaptive"])
def test_an_item_has_the_same_bits_in_any_batch(model, data, settings):
    """Adaptive methods too, whose batches shrink as items arrive."""
    whole = dataset_log_prob(model, data, batch=64, **settings).columns
    for batch, items in ((1, 3), (7, 17)):
        parts = dataset_log_prob(model, data, items=items, batch=batch, **settings).columns
        for name, values in parts.items():
            assert torch.equal(values.nan_to_num(), whole[name][:items].nan_to_num()), (
                name,
                batch,
            )


def test_rows_are_filled_up_and_taken_off(model):
    seen = []

    class Asked:
        sde, weights = model.sde, "raw"

        def __call__(self, x, t, y, scale):
            seen.append((len(x), t.shape, len(y), scale))
            return x * y[:, None]

    rows = Rows(Asked(), 4)
    x, y = torch.arange(10.0).reshape(5, 2), torch.arange(5.0)
    assert torch.equal(rows(x, 0.5, y=y, scale=2.0), x * y[:, None])
    assert torch.equal(rows(x, torch.full((5, 1), 0.5), y=y, scale=2.0), x * y[:, None])
    assert torch.equal(rows(x[:4], 0.5, y=y[:4], scale=2.0), (x * y[:, None])[:4])
    assert [n for n, *_ in seen] == [8, 8, 4]
    assert seen[1][1] == (8, 1)
    assert [n for *_, n, _ in seen] == [8, 8, 4]


def test_columns_are_the_parts_of_what_they_sum_to(model, data):
    found = dataset_log_prob(model, data, items=5, **ALONG)
    table = found.columns
    assert set(table) == set(COLUMNS)
    total = table["prior"] + table["delta"] + table["dequantization"]
    assert torch.allclose(table["nats"], total, atol=1e-3)
    assert torch.allclose(table["bits_per_dim"], -table["nats"] / (64 * math.log(2)))
    assert torch.equal(found.bits_per_dim, table["bits_per_dim"])
    assert (table["nfe"] == 9).all()
    assert table["stderr"].isnan().all()
    assert found.settings["dequantizer"] == {"name": "uniform"}
    assert (found.errors, found.error_line()) == ({}, "")


@dataclass(frozen=True)
class Known:
    """An evaluation whose errors are known: noise 2, steps that lack 3 ± 0.5, and less refined."""

    data: Dataset
    settings: dict = field(default_factory=lambda: {"method": "unipc", "steps": 8})

    def of(self, index, noise, score=None, refine=1, **_):
        steps = (self.settings.get("steps") or 1e-2 / self.settings["rtol"] * 8) * refine
        lacks = (3 + 0.5 * torch.sin(100.0 * index)) * (8 / steps) ** 2
        draws = self.settings.get("draws", self.settings.get("probes", 1))
        generator = torch.Generator().manual_seed(noise // 2**20)  # of which torch takes 32 bits
        jitter = 2 * torch.randn(len(index), generator=generator) / math.sqrt(draws)
        nfe = torch.full((len(index),), int(steps))
        arrived = torch.ones(len(index), dtype=torch.bool)
        return SimpleNamespace(log_prob=-100.0 - lacks + jitter, nfe=nfe, converged=arrived)


def test_the_spot_check_finds_what_steps_and_noise_leave():
    big = Dataset(torch.zeros(4000, 1), levels=None)
    found = spot_check(Known(big), 1000)
    assert found.shift == pytest.approx(3 * 15 / 16, abs=0.05)
    assert found.spread == pytest.approx(0.5 / math.sqrt(2) * 15 / 16, rel=0.1)
    assert found.noise == pytest.approx(2, rel=0.1)
    assert found.items == 1000
    assert found.nfe == 1000 * (8 + 8 + 32)
    assert found.steps_stderr() == pytest.approx(
        math.hypot(found.spread / 1000**0.5, found.shift / 15)
    )
    with pytest.raises(ValueError, match="at least 2 items"):
        spot_check(Known(big), 1)


def test_the_mean_takes_the_shift_out_and_knows_its_error(model, data):
    plain = dataset_log_prob(model, data, items=20, **ALONG)
    found = dataset_log_prob(model, data, items=20, spot=6, **ALONG)
    assert torch.equal(plain.log_prob, found.log_prob)
    assert found.nats == pytest.approx(plain.nats + found.spot.shift)
    errors = found.errors
    assert errors["draws"] == pytest.approx(found.spot.noise / math.sqrt(20))
    assert errors["computation"] == pytest.approx(math.hypot(errors["draws"], errors["steps"]))
    summary = found.summary()
    scale = 64 * math.log(2)
    assert summary["bits_per_dim"] == pytest.approx(-found.nats / scale)
    assert summary["bits_per_dim_stderr_computation"] == pytest.approx(
        errors["computation"] / scale
    )
    assert "taken out, by 6 items" in found.error_line()
    tight = dataset_log_prob(model, data, items=20, method="unipc", steps=32, draws=3)
    off = abs(found.nats - tight.nats)
    assert off < 4 * errors["computation"]
    assert abs(plain.nats - tight.nats) > 0


def test_a_plan_spends_where_it_pays():
    data = Dataset(torch.zeros(100, 1), levels=None)
    loose, found = plan(Known(data), 1.0, 8)
    assert loose.settings == {"method": "unipc", "steps": 8}
    assert found.items == 8
    many = plan(Known(Dataset(torch.zeros(100, 1, dtype=torch.uint8), levels=2)), 0.1, 8)
    assert many[0].settings["draws"] == pytest.approx(2 * 4 / (100 * 0.01), abs=3)
    assert many[0].settings["steps"] > 8
    assert many[1].items > 8 or many[1].spread ** 2 / many[1].items < 0.01 / 2
    errors = math.hypot(many[1].noise / 10, many[1].steps_stderr())
    assert errors < 0.13
    with pytest.raises(ValueError, match="the target is above 0"):
        plan(Known(data), 0.0, 8)


def test_a_plan_never_takes_out_the_shift_of_other_steps():
    """Where even the finest steps lack too much, the check is still that of those steps."""
    data = Dataset(torch.zeros(100, 1, dtype=torch.uint8), levels=2)
    evaluation, found = plan(Known(data), 1e-9, 8)
    steps = evaluation.settings["steps"]
    assert steps == 8 * 2**5
    assert evaluation.settings["draws"] <= 1024
    lacks = 3 * (8 / steps) ** 2 * 15 / 16
    noise = 4 * 2 / math.sqrt(found.items * evaluation.settings["draws"])
    assert abs(found.shift - lacks) < noise


def test_methods_of_order_one_are_trusted_less(model, data):
    for method, rest in (("euler", 3), ("ddim", 3), ("rk4", 15), ("unipc", 15)):
        evaluation = Evaluation(model, data, {"method": method, "steps": 4})
        assert spot_check(evaluation, 2).rest == rest


def test_a_spot_check_says_what_it_cannot_know(model, data):
    found = dataset_log_prob(model, data, items=4, spot=2, rtol=1e-6, atol=1e-6)
    assert math.isnan(found.errors["steps"])
    assert "what the steps leave is not known" in found.error_line()
    with pytest.raises(ValueError, match="the spot check did not end: the evaluations allowed"):
        dataset_log_prob(model, data, items=4, spot=2, max_nfe=8, rtol=1e-2, atol=1e-2)
    tight = dataset_log_prob(model, data, items=4, spot=2, method="unipc", steps=8, max_nfe=9)
    assert tight.spot.items == 2  # the refined solve has a budget of its own


def test_labels_are_needed_and_within_the_classes(data):
    torch.manual_seed(0)
    net = sd.nets.UNet((1, 8, 8), width=16, multipliers=(1,), blocks=1, num_classes=3)
    scaler = Scaler((LEVELS / 2,), (2 / LEVELS,), LEVELS)
    model = sd.ScoreModel(net, sd.VP(), sd.V(), shape=(1, 8, 8), scaler=scaler)
    with pytest.raises(ValueError, match="has no labels, which the model is conditional on"):
        Evaluation(model, data, {}, labels=True)
    far = Dataset(data.x[:3], y=torch.tensor([0, 1, 3]), levels=LEVELS)
    with pytest.raises(ValueError, match="go up to 3, and the model has 3 classes"):
        Evaluation(model, far, {}, labels=True)
    labelled = Dataset(data.x[:3], y=torch.tensor([0, 1, 2]), levels=LEVELS)
    Evaluation(model, labelled, {}, labels=True)
    Evaluation(model, far, {})


def test_times_are_those_of_the_dequantisation(model, data):
    cut = Dataset(data.x[:2], levels=LEVELS)
    for name in ("truncated-normal", {"name": "decoder", "t": 1e-3}):
        found = dataset_log_prob(model, cut, dequantization=name, **ALONG)
        used = sd.data_log_prob(model, cut.x, dequantization=name, **ALONG).t_min
        assert found.settings["t_min"] == used > 1e-5


def test_adaptive_methods_and_probes_are_planned_alike():
    data = Dataset(torch.zeros(50, 1), levels=None)
    evaluation, found = plan(Known(data, {"rtol": 1e-2, "atol": 1e-2}), 0.15, 4)
    assert evaluation.settings["rtol"] == evaluation.settings["atol"] < 1e-2
    assert evaluation.settings["probes"] > 1
    assert math.hypot(found.noise / 50**0.5, found.steps_stderr()) < 0.2


def test_what_does_not_fit_is_refused(model, data):
    with pytest.raises(ValueError, match=r"shape \(1, 4, 4\) do not fit"):
        Evaluation(model, Dataset(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), levels=LEVELS), {})
    with pytest.raises(ValueError, match="levels=2 do not fit a model of data with levels=16"):
        Evaluation(model, Dataset(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), levels=2), {})
    bare = sd.ScoreModel(model.net, model.sde, model.parameterization)
    with pytest.raises(ValueError, match="needs a model with a scaler"):
        Evaluation(bare, data, {})
    assert SpotCheck(4, 1.0, 1.0, 1.0, 9).items == 4
