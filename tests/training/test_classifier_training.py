"""Training of classifiers: the objective, what a run learns, how it goes on, how it is judged."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import scoresde as sd
from scoresde import files, saved_steps
from scoresde.config import ConfigError
from scoresde.labelled import LabelledMixture
from scoresde.training import DSM
from scoresde.training.accuracy import examine, level
from scoresde.training.classifier import (
    ClassifierTrainer,
    finish_classifier,
    prepare_classifier,
)
from scoresde.training.cross_entropy import CrossEntropy
from scoresde.training.step_noise import StepNoise

CPU = torch.device("cpu")
MEANS = torch.tensor([[1.2, 0.0], [-0.9, 0.7], [-0.5, -1.1], [0.3, 1.4]], dtype=torch.float64)
STDS = torch.tensor([0.4, 0.3, 0.5, 0.25], dtype=torch.float64)
MIXTURE = LabelledMixture(
    sd.GaussianMixture(torch.tensor([0.3, 0.2, 0.3, 0.2]).double(), MEANS, STDS), [0, 1, 2, 0]
)


class Told(nn.Module):
    """Logits that are what a network is given: its scaled input and its label."""

    num_classes = 3

    def forward(self, x, c_noise):
        return torch.cat([x, c_noise[:, None].to(x.dtype)], 1)


def drawn(n=6):
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(n, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    return x0, eps, torch.arange(n) % 3


# The objective.


def test_the_loss_is_the_cross_entropy_at_the_noisy_item(sde):
    x0, eps, y = drawn()
    classifier = sd.NoisyClassifier(Told(), sde)
    t = torch.linspace(0.1, 0.9, 6, dtype=torch.float64) * sde.t_max
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    x = (alpha[:, None] * x0 + sigma[:, None] * eps) / (alpha**2 + sigma**2).sqrt()[:, None]
    logits = torch.cat([x, ((sigma / alpha).log() / 4)[:, None]], 1)
    expected = logits.exp().sum(1).log() - logits[torch.arange(6), y]
    found = CrossEntropy()(classifier, x0, t=t, eps=eps, y=y)
    torch.testing.assert_close(found, expected)


def test_clean_items_have_no_noise(sde):
    x0, eps, y = drawn()
    classifier = sd.NoisyClassifier(Told(), sde)
    found = CrossEntropy()(classifier, x0, t=torch.zeros(6).double(), eps=eps, y=y)
    torch.testing.assert_close(found, -classifier(x0, sde.t_min, y), rtol=0, atol=0)
    mixed = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.5, 0.0]).double()
    found = CrossEntropy()(classifier, x0, t=mixed, eps=eps, y=y)
    noisy = sde.perturb(x0, torch.tensor(0.5).double(), eps)
    given = torch.where(mixed[:, None] > 0, noisy, x0)
    torch.testing.assert_close(found, -classifier(given, mixed, y))


def test_times_and_the_share_of_clean_items():
    sde, n = sd.VP(), 4000
    plain, ones = CrossEntropy("importance").instants(sde, n, torch.Generator().manual_seed(1))
    wanted, correction = DSM(times="importance").times(sde, n, torch.Generator().manual_seed(1))
    assert torch.equal(plain, wanted)
    assert torch.equal(ones, correction)
    some = CrossEntropy("importance", clean=0.3)
    t, correction = some.instants(sde, n, torch.Generator().manual_seed(1))
    clean = t == 0
    assert abs(float(clean.double().mean()) - 0.3) < 5 * math.sqrt(0.21 / n)
    assert torch.equal(t[~clean], wanted[~clean])
    assert (correction[clean] == 1).all()
    assert torch.equal(correction[~clean], ones[~clean])
    t, correction = CrossEntropy(clean=1.0).instants(sde, 10)
    assert (t == 0).all()
    assert (correction == 1).all()
    # An item's draws are its own, on one process or on many.
    whole = some.instants(sde, 32, StepNoise(0, 3, 0, 32))[0]
    parts = [some.instants(sde, 16, StepNoise(0, 3, start, 32))[0] for start in (0, 16)]
    assert torch.equal(torch.cat(parts), whole)
    with pytest.raises(ValueError, match=r"clean must be in \[0, 1\]"):
        CrossEntropy(clean=1.5)
    with pytest.raises(ConfigError, match="items with classes y"):
        some(sd.NoisyClassifier(Told(), sde), torch.zeros(2, 2))


# How it is judged.


def test_calibration_by_hand():
    p = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.55, 0.45], [0.35, 0.65]], dtype=torch.float64)
    found = level(p.log(), torch.tensor([0, 1, 0, 0]))
    # Cells of a fifteenth: two at 0.9 (half of them right), one at 0.55 (right), one at 0.65.
    assert found.accuracy == 0.5
    assert found.calibration == pytest.approx((0.8 + 0.45 + 0.65) / 4)
    assert found.nats == pytest.approx(-np.log([0.9, 0.1, 0.55, 0.35]).mean())
    assert found.stderr == pytest.approx(0.25)
    assert level(torch.zeros(1, 2), torch.tensor([0])).calibration == 0.0  # sure, and right


def test_the_exact_classifier_is_calibrated_and_none_is_better():
    sde = sd.VP()
    x, y = MIXTURE.sample(4000, torch.Generator().manual_seed(0))
    exact = MIXTURE.classifier(sde)
    found = examine(exact, x, y, bins=4)
    assert len(found.noisy) == 4
    assert found.noisy[0].log_snr[0] == pytest.approx(float(sde.log_snr(sde.t_min)))
    assert found.noisy[3].log_snr[1] == pytest.approx(float(sde.log_snr(sde.t_max)))
    accuracy = [each.accuracy for each in (found.clean, *found.noisy)]
    # By an independent route: the largest posterior, averaged over items of that noise.
    edges = torch.linspace(float(sde.log_snr(sde.t_min)), float(sde.log_snr(sde.t_max)), 5)
    for k, each in enumerate(found.noisy):
        assert each.calibration < 0.03
        generator = torch.Generator().manual_seed(5 + k)
        u = torch.rand(4000, generator=generator, dtype=torch.float64)
        t = sde.time(edges[k].double() + u * float(edges[k + 1] - edges[k]))
        eps = torch.randn(4000, 2, generator=generator, dtype=torch.float64)
        log_p = exact(sde.perturb(x, t, eps), t)
        assert each.accuracy == pytest.approx(float(log_p.max(1)[0].exp().mean()), abs=0.03)
        entropy = -(log_p.exp() * log_p).sum(1).nan_to_num(0).mean()
        assert each.nats == pytest.approx(float(entropy), abs=0.04)
    assert accuracy[0] > accuracy[2] > accuracy[4]
    prior = float(MIXTURE.prior.max())
    assert accuracy[4] == pytest.approx(prior, abs=0.03)  # nothing is left of the item

    def bold(x, t):
        return (3 * exact(x, t)).log_softmax(1)

    bold.sde = sde
    sure = examine(bold, x, y, bins=4)
    assert [a.accuracy for a in sure.noisy] == accuracy[1:]
    assert sure.noisy[2].calibration > 0.1
    assert sure.noisy[2].nats > found.noisy[2].nats
    small = examine(exact, x, y, bins=4, batch_size=50)
    assert small == found  # not of the batch
    assert examine(exact, x, y, bins=0).noisy == ()


# What a run learns.


@pytest.fixture(scope="module")
def points(tmp_path_factory):
    x, y = MIXTURE.sample(20000, torch.Generator().manual_seed(3))
    file = tmp_path_factory.mktemp("points") / "points.npz"
    np.savez(file, x=x.float().numpy(), y=y.numpy())
    return file


def trained(config, folder, **settings):
    trainer = ClassifierTrainer(
        prepare_classifier(config, folder, CPU, **settings), say=lambda line: None
    )
    trainer.run(show_progress=False)
    return trainer


@pytest.mark.parametrize("process", ["vp", "ve"])
def test_it_approaches_the_exact_posterior(points, tmp_path, process):
    config = {
        "sde": {"name": process, **({"sigma_max": 10.0} if process == "ve" else {})},
        "data": {"source": str(points), "scaler": "none"},
        "net": {"width": 48, "blocks": 1},
        "objective": {"times": "importance"},
        "training": {
            "steps": 400, "batch_size": 256, "evaluations": 0, "track": "none", "lr": 4e-3,
            "ema": 0.99, "weight_decay": 0.0,
        },
    }  # fmt: skip
    trainer = trained(config, tmp_path / "run")
    sde, averaged = trainer.job.model.sde, trainer.learner.averaged
    exact = MIXTURE.classifier(sde)
    x0, _ = MIXTURE.sample(2000, torch.Generator().manual_seed(9))
    eps = torch.randn(2000, 2, generator=torch.Generator().manual_seed(10)).double()
    gaps, alone = [], []
    log_prior = MIXTURE.prior.log()
    for log_snr in (3.0, 1.0, 0.0, -1.0):
        t = sde.time(log_snr)
        x = sde.perturb(x0, t, eps)
        truth = exact(x, t)
        with torch.no_grad():
            found = averaged(x.float(), t).double()
        gaps.append(float((truth.exp() * (truth - found)).sum(1).mean()))
        alone.append(float((truth.exp() * (truth - log_prior)).sum(1).mean()))
    assert max(gaps) < 0.02  # nats
    assert alone[0] > 0.5  # what knowing nothing but the prior costs
    assert alone[2] > 0.1


# How it goes on.

QUICK = {
    "data": {"source": "digits", "limit": 64},
    "net": {"width": 8, "multipliers": [1, 2], "blocks": 1, "head_dim": 8, "groups": None,
            "dropout": 0.1},
    "training": {
        "steps": 6, "batch_size": 8, "evaluations": 2, "warmup": 2, "ema": 0.9, "keep": 3,
        "checkpoint_every": 2, "track": "none", "log_every": 2,
    },
}  # fmt: skip
KINDS = {
    "plain": {},
    "clean": {"objective": {"clean": 0.5}, "data": {"augment": "flip"}},
    "learned": {"objective": {"times": "learned"}, "training": {"accumulate": 2}},
}
CLOCKS = {"seconds", "items_per_second", "waiting", "memory", "time"}


def quick(kind="plain", **training):
    changes = KINDS[kind]
    config = {k: {**QUICK.get(k, {}), **changes.get(k, {})} for k in {*QUICK, *changes}}
    config["training"] |= training
    return config


class Killed(BaseException):
    """Nothing is tidied up."""


def left(run):
    """All that a run leaves: tensors by file and name, and rows without what a clock says."""
    place = saved_steps.latest_checkpoint(run)
    tensors = {
        f"{file.name}/{key}": value
        for file in place.glob("*.safetensors")
        for key, value in files.read_tensors(file).items()
    }
    rows = {
        name: [
            {k: v for k, v in json.loads(line).items() if k not in CLOCKS}
            for line in (run / f"logs/{name}.jsonl").read_text().splitlines()
        ]
        for name in ("train", "heldout")
        if (run / f"logs/{name}.jsonl").exists()
    }
    return tensors, rows


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_killed_is_the_run_that_was_not(tmp_path, kind):
    trained(quick(kind), tmp_path / "whole")
    broken = ClassifierTrainer(prepare_classifier(quick(kind), tmp_path / "broken", CPU), print)
    learn = broken.learner.learn

    def until_five(batch, step, rate):
        if step == 5:
            raise Killed
        return learn(batch, step, rate)

    broken.learner.learn = until_five
    with pytest.raises(Killed):
        broken.run(show_progress=False)
    again = ClassifierTrainer(
        prepare_classifier(quick(kind), tmp_path / "broken", CPU), say=lambda line: None
    )
    again.resume()
    assert again.step == 4
    again.run(show_progress=False)
    (tensors, rows), (others, other_rows) = left(tmp_path / "whole"), left(tmp_path / "broken")
    assert tensors.keys() == others.keys()
    assert [k for k, v in tensors.items() if not torch.equal(v, others[k])] == []
    assert rows == other_rows
    assert len(rows["heldout"]) == 2
    assert any(k.startswith("optimizer") for k in tensors)


def test_parts_of_a_batch_are_the_batch(tmp_path):
    config = quick("clean", evaluations=0, steps=3)
    config["net"] = {**config["net"], "dropout": 0.0}
    whole = trained(config, tmp_path / "whole")
    config["training"] |= {"accumulate": 2}
    parts = trained(config, tmp_path / "parts")
    for a, b in zip(
        whole.job.model.net.parameters(), parts.job.model.net.parameters(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    rows = [left(tmp_path / run)[1]["train"] for run in ("whole", "parts")]
    assert rows[0][0]["loss"] == pytest.approx(rows[1][0]["loss"], rel=1e-5)


def test_what_a_run_tells(tmp_path):
    trainer = trained(quick(), tmp_path / "run")
    report = finish_classifier(trainer, {"steps": 6})
    assert json.loads((tmp_path / "run/report.json").read_text()) == json.loads(json.dumps(report))
    assert (tmp_path / "run/loss.png").stat().st_size > 1000
    _, rows = left(tmp_path / "run")
    last = rows["heldout"][-1]
    for key in ("accuracy_by_log_snr", "calibration_by_log_snr"):
        assert len(last[key]) == 8
    assert last["loss"] == pytest.approx(math.log(10), abs=0.3)  # of an item, not a dimension
    assert rows["train"][0]["loss"] == pytest.approx(math.log(10), abs=0.3)
    held = report["heldout"]
    assert held["clean"]["items"] == len(trainer.job.heldout)
    assert [each["accuracy"] for each in held["noisy"]] == last["accuracy_by_log_snr"]
    assert held["clean"]["accuracy"] == last["accuracy"]
    # The averaged weights are those that were looked at.
    job = trainer.job
    x0, y, _ = trainer.heldout.items(1000)
    assert torch.equal(y, job.heldout.y)
    with torch.no_grad():
        log_p = trainer.learner.averaged(x0, 0.0)
        raw = trainer.learner.model(x0, 0.0)
    nats, other = (-float(p.gather(1, y[:, None]).mean()) for p in (log_p, raw))
    assert held["clean"]["nats"] == pytest.approx(nats, rel=1e-6)
    assert abs(other - nats) > 1e-4
    assert held["clean"]["accuracy"] == pytest.approx(
        float((log_p.argmax(1) == y).double().mean())
    )


def test_clean_runs_are_judged_on_clean_items(tmp_path):
    config = quick(evaluations=1, steps=2)
    config["objective"] = {"clean": 1.0}
    trainer = trained(config, tmp_path / "run")
    assert finish_classifier(trainer, {})["heldout"]["noisy"] == ()
    _, rows = left(tmp_path / "run")
    assert rows["heldout"][-1]["accuracy_by_log_snr"] == []
    by_time = rows["train"][0]["loss_by_time"]
    assert by_time[0] is not None
    assert by_time[1:] == [None] * 7


def test_a_split_given_twice_is_split(tmp_path):
    config = {"data": {"source": "mnist-sample", "heldout": 0.25}, "net": QUICK["net"]}
    job = prepare_classifier(config, tmp_path / "run", CPU)
    assert (job.train.size, len(job.heldout)) == (192, 64)
    assert job.model.shape == (1, 28, 28)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"data": {"source": "checkerboard"}}, "a classifier needs classes, but .* has no labels"),
        ({"net": {"name": "unet"}}, "net does not take the data"),
        ({"net": {"name": "mlp-classifier"}}, "use the adm-classifier"),
        ({"net": {"preset": "huge"}}, "unknown preset of adm-classifier 'huge'"),
        ({"objective": {"weight": "simple"}}, "unknown key objective.weight"),
        ({"sampling": {"count": 3}}, "unknown section 'sampling'"),
        ({"data": {"augment": "edm"}}, "edm"),
        ({"training": {"precision": "float16"}}, "float16 needs CUDA"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_is_refused_before_anything(tmp_path, config, said):
    with pytest.raises(ConfigError, match=said):
        prepare_classifier(config, tmp_path / "run", CPU)
    assert not (tmp_path / "run").exists()
