"""Averages of the weights: their profiles, and what an update does to a network."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from scoresde.config import ConfigError
from scoresde.training.ema import EMA, LONGEST, HalfLife, PowerFunction, Warm, averages


class Point(nn.Module):
    """A network that is one parameter."""

    def __init__(self, size):
        super().__init__()
        self.x = nn.Parameter(torch.zeros(size, dtype=torch.float64))


def shares(profile, steps, batch=1):
    """What each of theta_0, ..., theta_n has in the average, measured on one-hot parameters."""
    net = Point(steps + 1)
    with torch.no_grad():
        net.x[0] = 1
    ema = EMA(net, profile)
    for n in range(1, steps + 1):
        with torch.no_grad():
            net.x.zero_()[n] = 1
        ema.update(n, batch)
    return ema.net.x.numpy()


# -- profiles -----------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.2, 0.288])
def test_a_power_function_has_its_relative_length(length):
    g = PowerFunction(length).power
    assert g > 0

    def moment(k):  # of (g + 1) u^g on [0, 1]
        return integrate.quad(lambda u: (g + 1) * u ** (g + k), 0, 1, epsabs=1e-13)[0]

    assert moment(0) == pytest.approx(1, abs=1e-9)
    assert math.sqrt(moment(2) - moment(1) ** 2) == pytest.approx(length, rel=1e-7)


def test_powers_are_those_of_the_paper():
    assert PowerFunction(0.05).power == pytest.approx(16.97, abs=0.005)
    assert PowerFunction(0.10).power == pytest.approx(6.94, abs=0.005)
    assert pytest.approx(1 / math.sqrt(12)) == LONGEST  # of a uniform distribution
    assert PowerFunction(LONGEST * (1 - 1e-9)).power == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("length", [0.03, 0.1, 0.25])
def test_the_average_is_the_integral_of_its_profile(length):
    n, g = 1500, PowerFunction(length).power
    found = shares(PowerFunction(length), n)
    edges = (np.arange(n + 1) / n) ** (g + 1)
    np.testing.assert_allclose(found[1:], np.diff(edges), rtol=1e-10, atol=1e-14)
    assert found[0] == 0  # the untrained start is forgotten
    assert found.sum() == pytest.approx(1, abs=1e-12)
    age = (np.arange(n + 1) - 0.5) / n
    mean = found @ age
    assert mean == pytest.approx((g + 1) / (g + 2), abs=1e-3)
    assert math.sqrt(found @ (age - mean) ** 2) == pytest.approx(length, rel=1e-3)


@pytest.mark.parametrize("batch", [1, 8, 100])
def test_a_half_life_counts_items(batch):
    profile = HalfLife(200)
    steps = 6000 // batch
    found = shares(profile, steps, batch)
    assert found.sum() == pytest.approx(1, abs=1e-12)
    last = 200 // batch
    assert found[-last:].sum() == pytest.approx(0.5, abs=1e-9)
    assert found[-2 * last :].sum() == pytest.approx(0.75, abs=1e-9)


def test_a_half_life_ramps_up():
    profile = HalfLife(1000, ramp=0.1)
    # At the n-th step half of the average goes in ramp n batch items, until that is all of them.
    for n, items in ((1, 0.4), (50, 20.0), (2500, 1000.0), (9999, 1000.0)):
        assert (1 - profile.weight(n, 4)) ** (items / 4) == pytest.approx(0.5)
    assert shares(profile, 500)[0] < 1e-20
    assert shares(HalfLife(1000, ramp=None), 500)[0] == pytest.approx(2**-0.5)


def test_a_warm_decay_is_that_of_song():
    found = shares(Warm(0.99), 3)
    d = [2 / 11, 3 / 12, 4 / 13]
    expected = [d[0] * d[1] * d[2], (1 - d[0]) * d[1] * d[2], (1 - d[1]) * d[2], 1 - d[2]]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert Warm(0.99).weight(10**6, 1) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: PowerFunction(0.0), "between 0 and 0.2887, got 0.0"),
        (lambda: PowerFunction(0.29), "between 0 and 0.2887, got 0.29"),
        (lambda: PowerFunction(math.nan), "got nan"),
        (lambda: HalfLife(0), "positive, got 0 items"),
        (lambda: HalfLife(math.inf), "got inf items"),
        (lambda: HalfLife(10, ramp=0), "ramp of a half-life must be positive"),
        (lambda: Warm(1.0), r"decay in \[0, 1\), got 1.0"),
        (lambda: averages(Point(1), 0.9, (), (0.05, 0.05)), "ema-length-0.05 twice"),
        (lambda: averages(Point(1), 0.9, (500, 500.0)), "ema-halflife-500 twice"),
    ],
)
def test_what_makes_no_average(make, said):
    with pytest.raises(ConfigError, match=said):
        make()


def test_the_averages_of_a_configuration():
    found = averages(Point(1), 0.9, (5e5, 2.5, 3e7), (0.05, 0.123456789))
    assert [a.name for a in found] == [
        "ema", "ema-halflife-500000", "ema-halflife-2.5", "ema-halflife-30000000",
        "ema-length-0.05", "ema-length-0.123456789",
    ]  # fmt: skip
    assert [a.profile for a in found[:3]] == [Warm(0.9), HalfLife(5e5), HalfLife(2.5)]
    assert len({id(a.net) for a in found}) == 6


# -- updates ------------------------------------------------------------------------------------


def test_a_number_is_a_warm_decay():
    assert EMA(Point(1), 0.5).profile == EMA(Point(1), decay=0.5).profile == Warm(0.5)
    for given in ({}, {"profile": Warm(0.5), "decay": 0.5}):
        with pytest.raises(TypeError, match="either a profile or a decay"):
            EMA(Point(1), **given)


def test_the_copy_is_in_evaluation_mode_and_apart():
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    ema = EMA(net, 0.5)
    assert net.training
    assert not any(m.training for m in ema.net.modules())
    assert not any(p.requires_grad for p in ema.net.parameters())
    before = ema.net[0].weight.clone()
    with torch.no_grad():
        net[0].weight.add_(1)
    assert torch.equal(ema.net[0].weight, before)


def test_buffers_are_copied_wherever_they_are_now():
    net = nn.BatchNorm1d(2)
    ema = EMA(net, PowerFunction(0.1))
    net(torch.randn(8, 2))
    net.running_mean = torch.tensor([3.0, 4.0])  # another tensor, not another value
    for n in (1, 2):
        ema.update(n)
    assert ema.net.running_mean.tolist() == [3.0, 4.0]
    assert int(ema.net.num_batches_tracked) == 1
    net.running_mean.fill_(9.0)
    assert ema.net.running_mean.tolist() == [3.0, 4.0]


class Count(TorchDispatchMode):
    """The operations that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("profile", [Warm(0.9), HalfLife(100), PowerFunction(0.1)])
def test_an_update_is_one_operation_and_never_waits(profile):
    # On this device there are no values to wait for.
    net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(20))).to("meta")
    ema = EMA(net, profile)
    with Count() as count:
        ema.update(7, 4)
    assert count.names == ["_foreach_lerp_.Scalar"]


def test_shared_and_frozen_parameters():
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    net[1].weight = net[0].weight
    net.fixed = nn.Parameter(torch.tensor([0.1, 0.7]), requires_grad=False)
    ema = EMA(net, PowerFunction(0.1))
    assert ema.net[1].weight is ema.net[0].weight
    with torch.no_grad():
        net[0].weight.fill_(1.0)
    ema.update(1)
    with torch.no_grad():
        net[0].weight.fill_(2.0)
    ema.update(2)
    w = ema.profile.weight(2, 1)  # taken once, not once a name
    torch.testing.assert_close(ema.net[1].weight, torch.full((2, 2), 1 + w))
    assert torch.equal(ema.net.fixed, net.fixed)


def test_a_skipped_step_does_no_harm():
    net = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    ema = EMA(net, PowerFunction(0.1))
    path = []
    for n, gradient in enumerate((0.5, math.nan, 0.25, math.inf), 1):
        net.weight.grad = torch.full((1, 1), gradient)
        if math.isfinite(gradient):
            optimizer.step()
        ema.update(n)
        path.append(float(net.weight.detach()))
    g = PowerFunction(0.1).power
    profile = np.diff((np.arange(5) / 4) ** (g + 1))
    assert float(ema.net.weight) == pytest.approx(profile @ path, rel=1e-6)


# -- sharded networks ---------------------------------------------------------------------------


@pytest.fixture
def mesh():
    """Process 0 of two, of which the other is not there."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def test_a_process_averages_its_own_part(mesh, monkeypatch):
    from torch.distributed.tensor import DTensor, Shard

    lerp, given = torch._foreach_lerp_, []

    def spy(*args):
        given.extend([*args[0], *args[1]])
        lerp(*args)

    monkeypatch.setattr("torch._foreach_lerp_", spy)

    def shard(net, value):
        part = DTensor.from_local(torch.full((2, 3), value), mesh, [Shard(0)])
        net.weight = nn.Parameter(part, requires_grad=net.weight.requires_grad)

    net = nn.Linear(3, 4, bias=False)
    ema = EMA(net, PowerFunction(0.1))
    shard(net, 1.0)  # as FSDP2 does: other parameters in the same modules
    shard(ema.net, 5.0)
    ema.update(2)
    w = ema.profile.weight(2, 1)
    assert ema.net.weight.shape == (4, 3)
    torch.testing.assert_close(ema.net.weight.to_local(), torch.full((2, 3), 5 + w * (1 - 5)))
    assert torch.equal(net.weight.detach().to_local(), torch.ones(2, 3))
    # Not every version of torch has this operation for whole sharded tensors.
    assert not any(isinstance(part, DTensor) for part in given)
    assert [part.shape for part in given] == [(2, 3), (2, 3)]


def test_an_update_after_an_evaluation_of_a_sharded_network(mesh):
    from torch.distributed.fsdp import fully_shard

    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    ema = EMA(net, PowerFunction(0.1))
    for each in (net, ema.net):
        fully_shard(each, mesh=mesh)
    with torch.no_grad():
        ema.net(torch.zeros(2, 4))
    assert not hasattr(ema.net[0].weight, "to_local")  # left whole
    ema.update(1)
    mine, source = ema.net[0].weight.to_local(), net[0].weight.to_local()
    assert mine.shape == (2, 4)
    assert torch.equal(mine, source)
