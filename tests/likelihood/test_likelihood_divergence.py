import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import scoresde as sd
from scoresde.likelihood.divergence import draw_probes, exact, hutchinson

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


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
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
    if noise == "rademacher":
        symmetric = symmetric - symmetric.diag().diag()
    assert draws.var() == pytest.approx(float(2 * symmetric.square().sum()), rel=0.2)


def test_probes_are_of_the_sample_not_of_the_batch():
    like = torch.zeros(5, 2, 3)
    whole = draw_probes(like, 3, seed=4)
    assert set(whole.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(whole[:, 2:4], draw_probes(like[2:4], 3, seed=4, start_index=2))
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole, draw_probes(like, 3, seed=5))


def test_gaussian_probes_are_not_the_noise_that_sampling_drew():
    from scoresde.noise import KeyedNoise

    like = torch.zeros(4, 6)
    source = KeyedNoise(0)
    drawn = [source.normal((4, 6)) for _ in range(3)]
    probe = draw_probes(like, 1, "gaussian", seed=0)[0]
    assert all((probe - d).abs().min() > 0 for d in drawn)


def test_refusals():
    z = torch.zeros(2, 3)
    with pytest.raises(sd.ConfigError, match=r"unknown noise 'uniform'.*gaussian, rademacher"):
        draw_probes(z, 1, "uniform")
    with pytest.raises(ValueError, match="probes=0"):
        draw_probes(z, 0)
    with pytest.raises(ValueError, match="not differentiable in x"):
        exact(lambda a: a.detach() * 2, z)
