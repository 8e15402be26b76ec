import json
import signal

import numpy as np
import pytest
import torch

import scoresde as sd
from scoresde import files, saved_steps
from scoresde.data.batches import Batches
from scoresde.noise import step_seed
from scoresde.training import (
    EMA,
    Budget,
    Terminated,
    Trainer,
    TrainingConfig,
    TrainingError,
    prepare,
    report,
    state,
    watch,
)
from scoresde.training import trainer as trainer_room
from scoresde.training.classifier import ClassifierTrainer, prepare_classifier
from scoresde.training.finite import Bad
from scoresde.training.interrupt import Interruptible
from scoresde.training.track import Tracker
from scoresde.world import World

QUICK = {
    "data": {"source": "digits", "limit": 64},
    "net": {"width": 8, "multipliers": [1, 2], "blocks": 1, "attention": [1], "dropout": 0.1},
    "training": {"steps": 6, "batch_size": 8, "evaluations": 0, "warmup": 2, "ema": 0.9},
}


@pytest.fixture
def interruptible():
    """Ctrl-C as in a terminal, also where the tests run as a background job, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def make(folder, **training):
    config = {**QUICK, "training": {**QUICK["training"], **training}}
    return Trainer(prepare(config, folder, torch.device("cpu")), say=lambda line: None)


def stored(folder):
    newest = saved_steps.latest_checkpoint(folder)
    return {
        f"{name}.{key}": value
        for name in ("raw", "ema", "optimizer")
        for key, value in files.read_tensors(newest / f"{name}.safetensors").items()
    }


def stop_at(trainer, step, number):
    """Sends the process a signal in the middle of a step."""
    learn = trainer.learner.learn

    def stopped(batch, n, rate):
        if n == step:
            signal.raise_signal(number)
        return learn(batch, n, rate)

    trainer.learner.learn = stopped


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, interruptible):
    make(tmp_path / "whole").run(show_progress=False)
    half = make(tmp_path / "halves")

    stop_at(half, 2, signal.SIGINT)  # in the middle of the third step
    with pytest.raises(KeyboardInterrupt):
        half.run(show_progress=False)
    again = make(tmp_path / "halves")
    again.resume()
    assert again.step == 3
    again.run(show_progress=False)

    whole, halves = stored(tmp_path / "whole"), stored(tmp_path / "halves")
    assert whole.keys() == halves.keys()
    for key, value in whole.items():
        assert torch.equal(value, halves[key]), key
    assert any(k.startswith("optimizer.") and k.endswith("exp_avg_sq") for k in whole)


def test_a_second_ctrl_c_does_not_wait(interruptible):
    with Interruptible() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is not stop._handle


def test_resuming_drops_what_was_logged_after_the_checkpoint(tmp_path):
    trainer = make(tmp_path, steps=4)
    trainer.run(show_progress=False)
    trainer.watch.log.append("train", step=9, loss=1.0)
    again = make(tmp_path, steps=4)
    again.resume()
    assert [row["step"] for row in again.watch.log.rows("train")] == [1, 4]


def test_the_seed_decides_the_run(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make(tmp_path / name, seed=seed, steps=2).run(show_progress=False)
    a, b, c = (stored(tmp_path / n) for n in "abc")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not all(torch.equal(a[k], c[k]) for k in a)


def test_training_lowers_the_held_out_error(tmp_path):
    config = {**QUICK, "data": {"source": "digits"}}
    config["training"] = {**QUICK["training"], "steps": 250, "batch_size": 64}
    trainer = Trainer(prepare(config, tmp_path, torch.device("cpu")), say=lambda line: None)
    before = trainer.heldout.errors()
    trainer.run(show_progress=False)
    after = trainer.heldout.errors()
    # Where the noise is about as large as the data, the untrained network predicts sigma x only.
    assert after[3] < 0.8 * before[3]
    assert after[4] < 0.8 * before[4]


def test_sigterm_saves_and_asks_for_a_restart(tmp_path):
    make(tmp_path / "whole").run(show_progress=False)
    half = make(tmp_path / "halves")
    stop_at(half, 3, signal.SIGTERM)
    with pytest.raises(Terminated):
        half.run(show_progress=False)
    again = make(tmp_path / "halves")
    again.resume()
    assert again.step == 4
    again.run(show_progress=False)
    whole, halves = stored(tmp_path / "whole"), stored(tmp_path / "halves")
    assert all(torch.equal(whole[key], halves[key]) for key in whole)
    kinds = [row["kind"] for row in again.watch.log.rows("events")]
    assert kinds == ["start", "stop", "resume", "end"]


def spoil(trainer, step, count=1):
    """Puts infinity into the batches of some steps on their way to the learner."""
    learn = trainer.learner.learn

    def spoilt(batch, n, rate):
        if step <= n < step + count:
            batch = batch._replace(x=batch.x.clone())
            batch.x[5, 1] = float("inf")
        return learn(batch, n, rate)

    trainer.learner.learn = spoilt


MOONS = {"data": {"source": "moons", "samples": 500}, "net": {"name": "mlp", "width": 16}}


def on_moons(folder, said, **training):
    config = {**MOONS, "training": {**QUICK["training"], "batch_size": 16, **training}}
    return Trainer(prepare(config, folder, torch.device("cpu")), said.append)


def test_a_step_that_is_not_finite_is_named_and_changes_nothing(tmp_path):
    said = []
    trainer = on_moons(tmp_path, said)
    trainer.learn()
    before = {k: v.clone() for k, v in state.parts(trainer.learner)["raw"].items()}
    moments = {k: v.clone() for k, v in state.moments(trainer.learner).items()}
    spoil(trainer, 1)
    where = trainer.job.train.loader(trainer.learner.share, 1)
    named = next(where).where[5]
    figures = trainer.learn()
    assert not figures.norm.isfinite()
    for key, value in state.parts(trainer.learner)["raw"].items():
        assert torch.equal(value, before[key]), key
    for key, value in state.moments(trainer.learner).items():
        assert torch.equal(value, moments[key]), key
    trainer.learn()
    assert any(
        not torch.equal(v, before[k]) for k, v in state.parts(trainer.learner)["raw"].items()
    )
    trainer.save()
    assert said == [
        f"step 1 is not finite and skipped: {named} of the data holds values that are not finite"
    ]
    assert trainer.watch.log.rows("events")[0]["kind"] == "skip"
    row = trainer.watch.log.rows("train")[-1]
    assert row["skipped"] == 1
    assert row["loss"] > 0  # of the steps that were finite


def test_a_gradient_that_is_not_finite_names_its_parameter(tmp_path):
    said = []
    trainer = on_moons(tmp_path, said)
    name, parameter = list(trainer.learner.parameters.items())[2]
    hook = parameter.register_hook(lambda grad: grad * float("nan"))
    trainer.learn()
    hook.remove()
    trainer.look()
    assert said[0].startswith(f"step 0 is not finite and skipped: the gradient of {name} is not")


def test_a_loss_that_is_not_finite_names_item_and_noise_level(tmp_path):
    said = []
    trainer = on_moons(tmp_path, said)
    objective = trainer.job.objective

    class Broken:
        times = staticmethod(objective.times)

        def __call__(self, *args, **kwargs):
            loss = objective(*args, **kwargs)
            return loss * torch.where(torch.arange(len(loss)) == 3, torch.inf, 1.0)

    trainer.job.objective = Broken()
    figures = trainer.learn()
    trainer.look()
    assert f"the loss of {figures.where[3]} is inf at log-SNR" in said[0]


def test_what_began_in_another_process_is_named_before_what_followed_here(tmp_path):
    class Two(World):
        def gather(self, obj):
            return [obj, (obj[0], [], Bad(0, "item 3 of the other is nan"))]

    said = []
    trainer = on_moons(tmp_path, said)
    trainer.watch.world = Two()
    hook = next(iter(trainer.learner.parameters.values())).register_hook(lambda g: g * torch.nan)
    trainer.learn()
    hook.remove()
    trainer.look()
    assert said == ["step 0 is not finite and skipped: item 3 of the other is nan"]


def test_a_run_stops_after_too_many_bad_steps_in_a_row_and_keeps_the_checkpoint(tmp_path):
    said = []
    trainer = on_moons(tmp_path, said, steps=60, checkpoint_every=2, patience=3)
    spoil(trainer, 5, 2)  # two in a row are borne
    spoil(trainer, 25, 40)
    with pytest.raises(TrainingError, match="3 steps in a row were not finite"):
        trainer.run(show_progress=False)
    assert trainer.watch.skips.total >= 5
    for key, value in stored(tmp_path).items():
        assert value.isfinite().all(), key
    assert trainer.watch.log.rows("events")[-1]["kind"] == "error"


def test_weights_that_are_not_finite_are_never_written(tmp_path):
    trainer = make(tmp_path)
    trainer.learn()
    trainer.save()
    trainer.learn()
    next(iter(trainer.learner.averages[0].net.parameters())).data.fill_(float("nan"))
    with pytest.raises(TrainingError, match="not finite at step 2: nothing is written"):
        trainer.save()
    assert [p.name for p in saved_steps.step_folders(tmp_path)] == ["step-000000001"]


def test_accumulated_parts_train_as_one_batch(tmp_path):
    config = {**MOONS, "objective": {"times": "low-discrepancy"}}
    losses = {}
    for parts in (1, 4):
        training = {**QUICK["training"], "batch_size": 32, "accumulate": parts, "ema": 0.5}
        job = prepare({**config, "training": training}, tmp_path, torch.device("cpu"))
        trainer = Trainer(job, say=lambda line: None)
        figures = [trainer.learn() for _ in range(3)]
        losses[parts] = torch.stack([f.loss for f in figures]), trainer
    torch.testing.assert_close(losses[1][0], losses[4][0], rtol=1e-5, atol=1e-6)
    for a, b in zip(*(t.learner.parameters.values() for _, t in losses.values()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("part", ["ema", "optimizer", "state"])
def test_a_damaged_newest_checkpoint_falls_back_loudly(tmp_path, part):
    make(tmp_path / "whole", steps=8).run(show_progress=False)
    make(tmp_path / "run", steps=6, checkpoint_every=2, decay="constant").run(show_progress=False)
    newest = saved_steps.step_folders(tmp_path / "run")[-1]
    file = newest / ("state.yaml" if part == "state" else f"{part}.safetensors")
    file.write_bytes(file.read_bytes()[:-7])
    said = []
    config = {**QUICK, "training": {**QUICK["training"], "checkpoint_every": 2}}
    again = Trainer(prepare(config, tmp_path / "run", torch.device("cpu")), said.append)
    again.resume()
    assert again.step == 4
    assert "step-000000006 is damaged" in said[0]
    assert file.name in said[0]
    again.run(show_progress=False)
    names = [p.name for p in saved_steps.step_folders(tmp_path / "run")]
    assert names == ["step-000000004", "step-000000006"]
    assert saved_steps.damage(tmp_path / "run/checkpoints/step-000000006") is None


def test_checkpoints_are_pruned_and_named_by_step(tmp_path):
    make(tmp_path, steps=6, checkpoint_every=1, keep=2).run(show_progress=False)
    names = [p.name for p in saved_steps.step_folders(tmp_path)]
    assert names == ["step-000000005", "step-000000006"]
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_log_rows_are_json(tmp_path):
    make(tmp_path, steps=40).run(show_progress=False)
    rows = [json.loads(r) for r in (tmp_path / "logs/train.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 21, 40]
    assert all(r["loss"] > 0 for r in rows)


def test_ema_averages_parameters_and_copies_buffers():
    net = torch.nn.BatchNorm1d(2)
    ema = EMA(net, decay=0.5)
    start = ema.net.weight.clone()
    with torch.no_grad():
        net.weight.fill_(3.0)
        net.running_mean.fill_(7.0)
    ema.update(1)
    d = min(0.5, 2 / 11)
    torch.testing.assert_close(ema.net.weight, d * start + (1 - d) * 3.0)
    torch.testing.assert_close(ema.net.running_mean, torch.full((2,), 7.0))
    ema.update(1000)
    torch.testing.assert_close(ema.net.weight, 0.5 * (d * start + (1 - d) * 3.0) + 1.5)


def test_batches_are_passes_and_depend_on_the_step_alone():
    batches = Batches(n=10, batch_size=4, seed=0)
    steps = [batches.indices(i) for i in range(5)]
    passes = torch.cat(steps)
    assert sorted(passes[:10].tolist()) == list(range(10))
    assert sorted(passes[10:].tolist()) == list(range(10))
    assert passes[:10].tolist() != passes[10:].tolist()
    assert torch.equal(Batches(10, 4, 0).indices(3), steps[3])
    assert not torch.equal(Batches(10, 4, 1).indices(3), steps[3])
    assert Batches(n=3, batch_size=8, seed=0).indices(0).shape == (8,)


def test_step_seeds_do_not_collide():
    seeds = {step_seed(s, n, k) for s in range(5) for n in range(200) for k in range(4)}
    assert len(seeds) == 5 * 200 * 4
    assert all(0 <= s < 2**63 for s in seeds)


def test_budget_takes_the_first_bound():
    training = TrainingConfig(steps=100, epochs=2, minutes=1, batch_size=10)
    budget = Budget.of(training, items=95)
    assert budget.steps == 19
    assert budget.progress(0, 30) == pytest.approx(0.5)
    assert budget.progress(19, 0) == 1


@pytest.mark.parametrize(
    ("section", "match"),
    [
        ({"lr": "fast"}, r"training\.lr: .*number, got 'fast'"),
        ({"lr": -1}, "lr must be positive"),
        ({"batch_sise": 3}, "did you mean 'batch_size'"),
        ({"batch_size": 1.5}, r"training\.batch_size"),
        ({"decay": "linear"}, "'constant' or 'cosine'"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\)"),
    ],
)
def test_bad_training_sections_name_the_key(tmp_path, section, match):
    with pytest.raises(sd.ConfigError, match=match):
        prepare({"training": section}, tmp_path / "run", torch.device("cpu"))
    assert not (tmp_path / "run").exists()


def test_yaml_scientific_notation_is_a_number(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("training: {lr: 1e-4}\n")  # YAML reads this as the string '1e-4'
    job = prepare(sd.config.read_yaml(file), tmp_path, torch.device("cpu"))
    assert job.training.lr == 1e-4


def test_auto_sigma_max_is_the_largest_distance(tmp_path):
    config = {"sde": {"name": "ve", "sigma_max": "auto"}, "data": {"source": "moons"}}
    job = prepare(config, tmp_path, torch.device("cpu"))
    x = job.model.scaler.encode(job.train.probe(5000))
    assert job.model.sde.sigma_max == pytest.approx(float(torch.pdist(x[:2000]).max()), abs=1e-3)


def test_auto_beta_max_leaves_what_it_promises(tmp_path):
    config = {"sde": {"name": "vp", "beta_max": "auto"}}
    job = prepare(config, tmp_path, torch.device("cpu"))
    assert job.left.kl == pytest.approx(0.01, rel=0.05)
    assert job.model.sde.beta_max != 20.0


def test_a_run_draws_with_the_vectors_of_held_out_items(tmp_path, monkeypatch):
    y = torch.randn(60, 3).numpy()
    np.savez(tmp_path / "data.npz", x=y[:, :2], y=y)
    config = {
        "data": {"source": str(tmp_path / "data.npz")},
        "net": {"name": "mlp", "width": 16, "num_classes": 3},
        "sampling": {"count": 9},
    }
    job = prepare(config, tmp_path / "run", torch.device("cpu"))
    seen = {}
    monkeypatch.setattr(report, "sample", lambda model, shape, **given: seen.update(given))
    report.draw_samples(job.model, job)
    assert len(job.heldout) == 6
    torch.testing.assert_close(seen["y"][:6], job.heldout.y)
    torch.testing.assert_close(seen["y"][6:], job.heldout.y[:3])


def test_the_conditions_that_a_run_draws_with_are_those_of_the_same_items(tmp_path, monkeypatch):
    config = {
        "data": {"source": "digits", "limit": 300},
        "net": {"width": 8, "multipliers": [1], "blocks": 1, "attention": [], "num_classes": 10},
        "given": {"name": "degraded", "operator": {"name": "average-pool", "factor": 2},
                  "empty": 0.0},
        "sampling": {"count": 10},
    }  # fmt: skip
    job = prepare(config, tmp_path / "run", torch.device("cpu"))
    seen = {}
    monkeypatch.setattr(report, "sample", lambda model, shape, **given: seen.update(given))
    report.draw_samples(job.model, job)
    held = job.heldout
    assert len(held) == 30
    index = torch.arange(0, 30, 3)  # of all the set, which may lie class by class
    x0 = job.model.scaler.encode(held.x[index], dequantize=False).float()
    assert torch.equal(seen["y"], held.y[index])
    assert torch.equal(seen["image"], job.model.given.draw(x0))


def test_what_is_held_out_is_looked_at_all_over_the_set(tmp_path):
    config = {"data": {"source": "digits", "heldout": 0.8}}
    net = {"width": 8, "multipliers": [1], "blocks": 1, "attention": [], "num_classes": 10}
    job = prepare({**config, "net": net}, tmp_path, torch.device("cpu"))
    judged = prepare_classifier(config, tmp_path, torch.device("cpu"))
    for each in (job, judged):  # as a split of one's own may lie
        each.heldout = each.heldout.subset(each.heldout.y.argsort())
    held, seen = Trainer(job, say=print).heldout, []
    held.objective = lambda model, x0, **cond: seen.append(cond["y"]) or x0.flatten(1).sum(1)
    held.loss()
    seen.append(ClassifierTrainer(judged, say=print).heldout.items(512)[1])
    for y in (torch.cat(seen[:-1]), seen[-1]):
        assert len(y) == 512 < len(job.heldout)
        assert y.bincount(minlength=10).min() > 40


def test_without_a_terminal_a_run_says_a_line_a_minute(tmp_path, monkeypatch):
    seconds = iter(range(0, 10**6, 5))  # between looks at the clock, of which a step takes four
    monkeypatch.setattr(trainer_room.time, "perf_counter", lambda: float(next(seconds)))
    said = []
    on_moons(tmp_path, said, steps=12).run(show_progress=False)
    lines = [line for line in said if line.startswith("step ") and "items/s" in line]
    assert 3 <= len(lines) <= 4
    assert "left" in lines[0]


def test_a_run_feeds_its_tracker(tmp_path, monkeypatch):
    seen = {}

    class Sink:
        def scalars(self, step, values):
            seen.setdefault(step, {}).update(values)

        def picture(self, step, name, pixels):
            seen[step][name] = pixels

        def close(self):
            seen["closed"] = True

    monkeypatch.setattr(watch, "tracker", lambda *given: Tracker(Sink()))
    make(tmp_path, steps=4, evaluations=1, log_every=2).run(show_progress=False)
    assert set(seen) == {1, 3, 4, "closed"}
    assert {
        "train/loss",
        "train/gradient_norm",
        "train/items_per_second",
        "train/memory",
        "heldout/loss",
        "heldout/eps_error_by_log_snr/0",
        "samples",
    } <= seen[4].keys()
    assert any(name.startswith("train/loss_by_time/") for name in seen[4])
