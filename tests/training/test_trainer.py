import json
import signal

import pytest
import torch

import scoresde as sd
from scoresde import files, saved_steps
from scoresde.noise import step_seed
from scoresde.training import EMA, Budget, Trainer, TrainingConfig, TrainingError, prepare
from scoresde.training.batches import Batches
from scoresde.training.interrupt import Interruptible

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


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, interruptible):
    make(tmp_path / "whole").run(show_progress=False)
    half = make(tmp_path / "halves")

    learn = half.learn

    def stop_after_three():
        if half.step == 2:
            signal.raise_signal(signal.SIGINT)  # in the middle of the third step
        return learn()

    half.learn = stop_after_three
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
    trainer.log.append("train", step=9, loss=1.0)
    again = make(tmp_path, steps=4)
    again.resume()
    assert [row["step"] for row in again.log.rows("train")] == [1]


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
    before = trainer.heldout_errors()
    trainer.run(show_progress=False)
    after = trainer.heldout_errors()
    # Where the noise is about as large as the data, the untrained network predicts sigma x only.
    assert after[3] < 0.8 * before[3]
    assert after[4] < 0.8 * before[4]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    trainer = make(tmp_path, steps=60, checkpoint_every=2)
    learn = trainer.learn

    def break_at_five():
        if trainer.step == 5:
            next(iter(trainer.model.net.parameters())).data.fill_(float("nan"))
        return learn()

    trainer.learn = break_at_five
    with pytest.raises(TrainingError, match="not finite at step"):
        trainer.run(show_progress=False)
    for key, value in stored(tmp_path).items():
        assert value.isfinite().all(), key


def test_checkpoints_are_pruned_and_named_by_step(tmp_path):
    make(tmp_path, steps=6, checkpoint_every=1, keep=2).run(show_progress=False)
    names = [p.name for p in saved_steps.step_folders(tmp_path)]
    assert names == ["step-000000005", "step-000000006"]
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_log_rows_are_json(tmp_path):
    make(tmp_path, steps=40).run(show_progress=False)
    rows = [json.loads(r) for r in (tmp_path / "logs/train.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 21]
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
    x = job.model.scaler.encode(job.train.x[:5000])
    assert job.model.sde.sigma_max == pytest.approx(float(torch.pdist(x[:2000]).max()), abs=1e-3)


def test_auto_beta_max_leaves_what_it_promises(tmp_path):
    config = {"sde": {"name": "vp", "beta_max": "auto"}}
    job = prepare(config, tmp_path, torch.device("cpu"))
    assert job.left.kl == pytest.approx(0.01, rel=0.05)
    assert job.model.sde.beta_max != 20.0
