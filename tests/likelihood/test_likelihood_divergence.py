import math
import weakref

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import scoresde as sd
from scoresde.likelihood import divergence
from scoresde.likelihood.divergence import draw_probes, exact, hutchinson, walsh

SHAPES = [(7,), (2, 5), (1, 3, 4), (1, 2, 3, 2)]


class Dense(nn.Module):
    """A field that mixes all entries of an item."""

    def __init__(self, shape, attention=False):
        super().__init__()
        torch.manual_seed(0)
        dims = torch.Size(shape).numel()
        self.weight = nn.Parameter(torch.randn(dims, dims, dtype=torch.float64))
        self.attention = attention

    def forward(self, z):
        h = torch.sin(z.flatten(1) @ self.weight)
        if self.attention:
            tokens = h[:, None, :, None].contiguous()
            h = scaled_dot_product_attention(tokens, 2 * tokens, tokens + 1).flatten(1)
        return h.reshape(z.shape)


class Unbatched(torch.autograd.Function):
    """A cube whose gradient reads a value, which no batching rule allows."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z**3

    @staticmethod
    def backward(ctx, grad):
        (z,) = ctx.saved_tensors
        return 3 * z**2 * grad if float(grad.abs().sum()) > 0 else grad


def trace(field, z):
    """Trace of the Jacobian of each item, by the textbook."""
    rows = []
    for item in z:
        jacobian = torch.autograd.functional.jacobian(lambda a: field(a[None])[0], item)
        rows.append(jacobian.reshape(item.numel(), -1).trace())
    return torch.stack(rows)


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_exact_is_the_trace_for_any_shape(shape, attention):
    field, z = Dense(shape, attention), torch.randn(3, *shape, dtype=torch.float64)
    value, div = exact(field, z, chunk=3)  # leaves a rest, so that the last chunk is short
    assert torch.equal(value, field(z).detach())
    assert div.shape == (3, 1)
    assert torch.allclose(div[:, 0], trace(field, z), rtol=1e-10)


def test_exact_falls_back_where_vmap_cannot_go():
    z = torch.randn(3, 4, dtype=torch.float64)
    value = Unbatched.apply(z.requires_grad_())
    with pytest.raises(RuntimeError):
        torch.autograd.grad(
            value, z, torch.ones(2, 3, 4, dtype=torch.float64), is_grads_batched=True
        )
    _, div = exact(Unbatched.apply, z)
    assert torch.allclose(div[:, 0], (3 * z.detach() ** 2).sum(1))


@pytest.mark.parametrize("noise", ["rademacher", "gaussian", "walsh"])
@pytest.mark.parametrize("shape", SHAPES)
def test_hutchinson_has_the_mean_and_variance_of_theory(shape, noise):
    field = Dense(shape, attention=True)
    item = torch.randn(1, *shape, dtype=torch.float64)
    z = item.expand(1500, *shape).clone()
    _, div = hutchinson(field, z, draw_probes(z, 2, noise))
    assert div.shape == (1500, 2)
    draws, truth = div.flatten(), trace(field, item)
    assert abs(draws.mean() - truth) < 4 * draws.std() / len(draws) ** 0.5
    jacobian = torch.autograd.functional.jacobian(lambda a: field(a[None])[0], item[0])
    symmetric = jacobian.reshape(item.numel(), -1)
    symmetric = (symmetric + symmetric.T) / 2
    if noise != "gaussian":
        symmetric = symmetric - symmetric.diag().diag()
    assert draws.var() == pytest.approx(float(2 * symmetric.square().sum()), rel=0.2)


@pytest.mark.parametrize("noise", ["rademacher", "gaussian", "walsh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probes_are_of_the_sample_not_of_the_batch(noise, dtype):
    like = torch.zeros(5, 2, 3, dtype=dtype)
    whole = draw_probes(like, 11, noise, seed=4)  # more than the Walsh functions of the shape
    assert whole.shape == (11, 5, 2, 3)
    assert whole.dtype == dtype
    if noise != "gaussian":
        assert set(whole.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(whole[:, 2:4], draw_probes(like[2:4], 11, noise, 4, start_index=2))
    assert torch.equal(whole[:3], draw_probes(like, 3, noise, seed=4))
    assert not any(torch.equal(whole[0], other) for other in whole[1:])
    assert not torch.equal(whole[:, 0], whole[:, 1])
    assert not torch.equal(whole, draw_probes(like, 11, noise, seed=5))


def test_a_walsh_probe_is_a_rademacher_probe_and_new_signs_follow_used_up_ones():
    like = torch.zeros(4, 2, 3)  # 2^(1 + 2) functions
    walshs, signs = draw_probes(like, 9, "walsh"), draw_probes(like, 2)
    assert torch.equal(walshs[0], signs[0])
    assert torch.equal(walshs[8], signs[1])


def test_walsh_functions_part_neighbours_first_and_all_pairs_in_the_end():
    def left(shape, count):
        """Pairs of places whose products do not cancel over the first functions."""
        like = torch.zeros(1, *shape, dtype=torch.float64)
        f = torch.stack([walsh(i, like).flatten() for i in range(count)])
        mean = f.T @ f / count
        assert set(mean.unique().tolist()) <= {0.0, 1.0}
        return mean == 1

    y, x = (a.flatten() for a in torch.meshgrid(torch.arange(5), torch.arange(6), indexing="ij"))
    columns, rows = x[:, None] - x, y[:, None] - y
    assert torch.equal(left((5, 6), 2), columns % 2 == 0)
    assert torch.equal(left((5, 6), 4), (columns % 2 == 0) & (rows % 2 == 0))
    assert torch.equal(left((5, 6), 8), (columns % 4 == 0) & (rows % 2 == 0))
    for shape, total in (((7,), 8), ((5, 6), 64), ((1, 3, 4), 16), ((1,), 1)):
        dims = math.prod(shape)
        assert torch.equal(left(shape, total), torch.eye(dims, dtype=torch.bool))
    assert torch.equal(walsh(64 + 3, torch.zeros(1, 5, 6)), walsh(3, torch.zeros(1, 5, 6)))


@pytest.mark.parametrize("count", [2, 4])
def test_walsh_probes_err_by_the_pairs_that_they_leave(count):
    shape = (3, 4)
    field, item = Dense(shape), torch.randn(1, *shape, dtype=torch.float64)
    z = item.expand(1500, *shape).clone()
    _, div = hutchinson(field, z, draw_probes(z, count, "walsh"))
    means = div.mean(1)
    jacobian = torch.autograd.functional.jacobian(lambda a: field(a[None])[0], item[0])
    symmetric = jacobian.reshape(12, 12)
    symmetric = (symmetric + symmetric.T) / 2
    place = torch.arange(12)
    alike = (place % 4 % 2)[:, None] == place % 4 % 2
    if count == 4:
        alike &= (place // 4 % 2)[:, None] == place // 4 % 2
    alike &= ~torch.eye(12, dtype=torch.bool)
    assert means.var() == pytest.approx(float(2 * symmetric[alike].square().sum()), rel=0.2)
    assert abs(means.mean() - trace(field, item)) < 4 * means.std() / len(means) ** 0.5


@pytest.mark.parametrize("shape", SHAPES)
def test_all_walsh_probes_together_are_exact(shape):
    field, z = Dense(shape), torch.randn(3, *shape, dtype=torch.float64)
    total = math.prod(2 ** math.ceil(math.log2(n)) for n in shape)
    _, div = hutchinson(field, z, draw_probes(z, total, "walsh", seed=3))
    assert torch.allclose(div.mean(1), trace(field, z), rtol=1e-9, atol=1e-9)
    # So are the signs of one probe that change from point to point.
    (probe,) = draw_probes(z, 1)
    turned = torch.stack([probe * walsh(i, z) for i in range(total)])
    assert torch.allclose(hutchinson(field, z, turned)[1].mean(1), div.mean(1))


class Wide(nn.Module):
    """A field with few inputs, wide features, and weights that are larger still."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(2000, 50))
        self.into = nn.Parameter(torch.randn(6, 50))
        self.out = nn.Parameter(torch.randn(50, 6))

    def forward(self, z):
        self.features = weakref.ref(h := torch.sin(z @ self.into))
        return (h * self.table.sin().mean(0)) @ self.out


def test_exact_takes_as_many_rows_as_memory_holds(monkeypatch):
    field, z, asked = Wide(), torch.randn(4, 6), []
    real = torch.autograd.grad

    def grad(outputs, inputs, grad_outputs, **settings):
        asked.append(len(grad_outputs) if settings["is_grads_batched"] else 1)
        return real(outputs, inputs, grad_outputs, **settings)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    row = divergence.GRADIENTS * 4 * 50 * 4  # of the features, not of the table
    results = []
    for memory, chunks in (
        (1 << 28, [6]),
        (4 * row, [4, 2]),
        (2 * row - 1, [1] * 6),
        (0, [1] * 6),
    ):
        monkeypatch.setattr(divergence, "MEMORY", memory)
        asked.clear()
        results.append(exact(field, z)[1])
        assert asked == chunks
    assert all(torch.allclose(r, results[0], rtol=1e-5, atol=1e-5) for r in results)


def test_nothing_of_the_graph_is_kept():
    field, z = Wide(), torch.randn(4, 6)
    for found in (exact(field, z), hutchinson(field, z, draw_probes(z, 2))):
        assert not any(part.requires_grad for part in found)
        assert field.features() is None
    assert not z.requires_grad
    assert all(weight.grad is None for weight in field.parameters())


def test_gaussian_probes_are_not_the_noise_that_sampling_drew():
    from scoresde.noise import KeyedNoise

    like = torch.zeros(4, 6)
    source = KeyedNoise(0)
    drawn = [source.normal((4, 6)) for _ in range(3)]
    probe = draw_probes(like, 1, "gaussian", seed=0)[0]
    assert all((probe - d).abs().min() > 0 for d in drawn)


def test_refusals():
    z = torch.zeros(2, 3)
    with pytest.raises(
        sd.ConfigError, match=r"unknown noise 'uniform'.*gaussian, rademacher, walsh"
    ):
        draw_probes(z, 1, "uniform")
    with pytest.raises(ValueError, match="probes=0"):
        draw_probes(z, 0)
    with pytest.raises(ValueError, match="not differentiable in x"):
        exact(lambda a: a.detach() * 2, z)
