"""Weights shared out over two processes (FSDP2): the run of one, and its checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launches import (
    at_step_4,
    course,
    difference,
    ended,
    job,
    start,
    train,
    train_together,
    weights_differ,
)

import scoresde as sd
from scoresde import nets
from scoresde.files import CheckpointError, read_tensors, write_tensors
from scoresde.saved_steps import damage, latest_checkpoint
from scoresde.training import storage
from scoresde.training.parallel import normalise, sharded, units

pytest.importorskip("torch.distributed.fsdp", reason="no torch.distributed")
if not hasattr(torch.distributed.fsdp, "fully_shard"):
    pytest.skip("this torch has no FSDP2", allow_module_level=True)
if torch.__version__.startswith("2.6."):
    pytest.skip("FSDP2 of torch 2.6 wants a GPU", allow_module_level=True)

SAME = 1e-6
SHARD = {"shard": True}
EDM2 = {"name": "edm2", "width": 16, "multipliers": [1], "blocks": 1, "head_dim": 16}
LONG = {"lengths": [0.1], "snapshots": 2, "evaluations": 1}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs by one process and by two that share the weights."""
    folder = tmp_path_factory.mktemp("runs")
    train(job(folder / "one", training=LONG))
    train(job(folder / "one-nan", poison=3))
    train(job(folder / "one-bf16", training={"precision": "bfloat16"}))
    train(job(folder / "one-edm2", net=EDM2))
    train_together(
        [
            job(folder / "two", training=LONG | SHARD),
            job(folder / "two-parts", training=LONG | SHARD | {"accumulate": 2}),
            job(folder / "two-nan", poison=3, training=SHARD),
            job(folder / "two-bf16", training=SHARD | {"precision": "bfloat16"}),
            job(folder / "two-edm2", net=EDM2, training=SHARD),
            job(at_step_4(folder / "one", folder / "one-two"), True, training=LONG | SHARD),
        ],
        folder,
    )
    copies = [at_step_4(folder / "two", folder / f"two-{name}") for name in ("ddp", "two")]
    train(job(at_step_4(folder / "two", folder / "two-one"), True, training=LONG | SHARD))
    train_together(
        [job(copies[0], True, training=LONG), job(copies[1], True, training=LONG | SHARD)], folder
    )
    return folder


@pytest.mark.parametrize("run", ["two", "two-parts", "one-two", "two-one", "two-ddp", "two-two"])
def test_shared_out_weights_are_trained_as_whole_ones(runs, run):
    assert list(course(runs / run)) == list(range(1, 9))
    assert difference(runs / "one", runs / run) < SAME
    for name in ("raw", "ema", "ema-length-0.1", "optimizer"):
        assert weights_differ(runs / "one", runs / run, name) < 3 * SAME


def test_a_norm_that_the_forward_forces_is_forced_on_the_shards(runs):
    assert difference(runs / "one-edm2", runs / "two-edm2") < 1e-5
    # One process leaves weights that nothing uses as they are; those in use are of unit size.
    unused = "uncertainty"
    assert weights_differ(runs / "one-edm2", runs / "two-edm2", "raw", but=unused) < 1e-4


def test_half_precision_agrees_to_its_digits(runs):
    assert difference(runs / "one-bf16", runs / "two-bf16") < 2e-2
    assert difference(runs / "one-bf16", runs / "one") > 1e-5  # it was half precision


def test_a_gradient_that_one_process_finds_broken_is_skipped_by_both(runs):
    assert [row["skipped"] for row in course(runs / "two-nan").values()] == [0] * 3 + [1] * 5
    assert weights_differ(runs / "one-nan", runs / "two-nan", "raw") < SAME
    assert weights_differ(runs / "one-nan", runs / "two-nan", "optimizer") < SAME
    moments = read_tensors(runs / "two-nan/checkpoints/step-000000008/optimizer.safetensors")
    assert {float(v) for k, v in moments.items() if k.endswith("|step")} == {7.0}


def test_a_shared_out_run_is_read_as_any_other(runs):
    for weights in ("ema", "raw", "ema-length-0.1"):
        one, two = (sd.load(runs / run, weights=weights) for run in ("one", "two"))
        x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        assert (one(x, 0.5) - two(x, 0.5)).abs().max() < 1e-5
    assert damage(latest_checkpoint(runs / "two")) is None


def test_snapshots_and_pictures_are_those_of_one_process(runs):
    files = sorted(p.relative_to(runs / "one") for p in (runs / "one/snapshots").rglob("*.s*"))
    assert len(files) == 2
    for file in files:
        one, two = (read_tensors(runs / run / file) for run in ("one", "two"))
        assert one.keys() == two.keys()
        assert max(float((one[k] - two[k]).abs().max()) for k in one) < SAME
    heldout = [json.loads((runs / r / "logs/heldout.jsonl").read_text()) for r in ("one", "two")]
    assert abs(heldout[0]["loss"] - heldout[1]["loss"]) < SAME
    assert (runs / "two/samples/step-000000008.png").exists()


def test_a_kill_in_the_middle_of_a_save_leaves_the_checkpoint_before(tmp_path):
    file = tmp_path / "work.py"
    file.write_text(
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from launches import job, train\n"
        "from scoresde.training import storage\n"
        "from scoresde.world import joined\n"
        "def killed(self, plan, planner, write=storage.Writer.write_data, calls=[]):\n"
        "    calls.append(1)\n"
        "    done = write(self, plan, planner)\n"
        "    if len(calls) == 2 and world.rank == 1:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return done\n"
        "storage.Writer.write_data = killed\n"
        "with joined('cpu') as world:\n"
        "    train(job(Path(sys.argv[1]), training={'shard': True}), world)\n"
    )
    found = ended(start(2, file, tmp_path / "run"))
    assert found[1][0] == -9
    assert found[0][0] != 0
    newest = latest_checkpoint(tmp_path / "run")
    assert newest.name == "step-000000004"
    gone_on = train(job(tmp_path / "run", True))
    assert gone_on.step == 8
    assert sd.load(tmp_path / "run").weights == "ema"


# -- in one process, whose shards are whole ------------------------------------------------


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


NETS = {
    "adm": lambda: nets.ADM((1, 8, 8), width=32, multipliers=(1, 2), blocks=1),
    "ddpm": lambda: nets.DDPMUNet((1, 8, 8), **nets.DDPMUNet.presets["tiny"]),
    "dit": lambda: nets.DiT((1, 8, 8), width=16, depth=2, heads=2, patch=2),
    "dit-recomputed": lambda: nets.DiT(
        (1, 8, 8), width=16, depth=2, heads=2, patch=2, checkpointing=True
    ),
    "edm2": lambda: nets.EDM2((1, 8, 8), **nets.EDM2.presets["tiny"]),
    "mlp": lambda: nets.MLP((3,), width=16, blocks=2),
    "ncsnpp": lambda: nets.NCSNpp((1, 8, 8), **nets.NCSNpp.presets["tiny"]),
    "ncsnpp-pyramids": lambda: nets.NCSNpp(
        (1, 8, 8), width=16, multipliers=(1, 2), blocks=1,
        input_pyramid="residual", output_pyramid="skip", attention=(1,),
    ),
    "unet": lambda: nets.UNet((1, 8, 8), num_classes=3, **nets.UNet.presets["tiny"]),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_every_network_can_be_shared_out_by_its_blocks(name, alone):
    torch.manual_seed(0)
    whole, shared = NETS[name]().double(), NETS[name]().double()
    for parameter in whole.parameters():
        parameter.data.normal_(std=0.2)
    shared.load_state_dict(whole.state_dict())
    blocks = sum(p.numel() for unit in units(shared) for p in unit.parameters())
    assert blocks > 0.4 * sum(p.numel() for p in shared.parameters())
    sharded(shared, torch.device("cpu"))
    normalise(shared)
    x, noise = torch.randn(2, *whole.shape).double(), torch.rand(2).double()
    outs = [net(x, noise) for net in (whole, shared)]
    assert torch.allclose(*outs, rtol=0, atol=1e-5 * float(outs[0].abs().max()))
    for out in outs:
        out.square().mean().backward()
    # Some are zero but for rounding, as of a bias before a normalisation.
    close = 1e-5 * max(float(p.grad.abs().max()) for p in whole.parameters() if p.grad is not None)
    for (key, p), q in zip(whole.named_parameters(), shared.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), key
        if p.grad is not None:
            found = q.grad.full_tensor() if p.ndim else q.grad
            assert (p.grad - found).abs().max() < close, key


def test_files_are_those_of_one_process(tmp_path, alone):
    tensors = {
        "scalar": torch.tensor(3.0), "empty": torch.zeros(0, 3), "half": torch.rand(3, 2).half(),
        "whole": torch.arange(5), "turned": torch.rand(4, 3).T, "double": torch.rand(2).double(),
        "yes": torch.tensor([True, False]), "brain": torch.rand(7).bfloat16(),
    }  # fmt: skip
    storage.save({"a": tensors, "b": {"c/d": torch.ones(2)}}, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]
    found = read_tensors(tmp_path / "a.safetensors")
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in tensors.items())
    write_tensors(tmp_path / "c.safetensors", tensors)
    into = {key: torch.zeros_like(value) for key, value in tensors.items()}
    storage.load({"c": into, "b": {"c/d": torch.zeros(2)}}, tmp_path)
    assert all(torch.equal(into[k], v) for k, v in tensors.items())


def test_errors_of_files_are_one_line(tmp_path, alone):
    missing = tmp_path / "missing"
    with pytest.raises(CheckpointError, match=r"cannot write .*a.safetensors: No such file"):
        storage.save({"a": {"b": torch.ones(2)}}, missing)
    storage.save({"a": {"b": torch.ones(2)}}, tmp_path)
    with pytest.raises(CheckpointError, match=r"checkpoint of process 0 failed: .*b"):
        storage.load({"a": {"b": torch.ones(3)}}, tmp_path)
    file: Path = tmp_path / "a.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        storage.load({"a": {"b": torch.ones(2)}}, tmp_path)
