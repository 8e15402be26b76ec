r"""The blocks that the convolutional networks share: residual block, attention, resampling block.

    residual:   h = conv1(act(norm1 x)),  h = conv2(act(norm2(h + a)))        a = affine(act(emb))
                or, adaptive,             h = conv2(act(norm2(h) (1 + scale) + shift))
                y = (skip(x) + h) * skip_scale
    attention:  y = (x + out(softmax(q k^T / sqrt(c)) v)) * skip_scale        q, k, v = qkv(norm x)

A resampling block halves or doubles both ``act(norm1 x)`` and ``x``. Embeddings arrive activated.

Sources: Denoising Diffusion Probabilistic Models (Ho et al., 2020),
https://arxiv.org/abs/2006.11239; BigGAN's residual block and the scale 1/sqrt(2): Song et al.
(2021), appendix H, https://arxiv.org/abs/2011.13456; adaptive norm: Diffusion Models Beat GANs on
Image Synthesis (Dhariwal & Nichol, 2021), https://arxiv.org/abs/2105.05233.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from .resample import Resampler, half_on_cpu

CONV: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "silu": functional.silu,
    "relu": functional.relu,
    "elu": functional.elu,
    "leaky-relu": lambda x, inplace: functional.leaky_relu(x, 0.2, inplace=inplace),
    "gelu": lambda x, inplace: functional.gelu(x),
    "mish": functional.mish,
}


def activate(x: Tensor, name: str = "silu") -> Tensor:
    """The activation of a fresh tensor, in its place where no gradient needs it."""
    return ACTIVATIONS[name](x, inplace=not torch.is_grad_enabled())


class GroupNorm(nn.GroupNorm):
    """Group norm; in float32 where torch's kernel for half precision is slow.

    That is on a CPU with fewer than 1024 places: with channels last it takes four times as long.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, *spatial)`` to the same shape."""
        if not half_on_cpu(x) or math.prod(x.shape[2:]) >= 1024:
            return super().forward(x)
        weight, bias = self.weight.float(), self.bias.float()
        y = functional.group_norm(x.float(), self.num_groups, weight, bias, self.eps)
        return y.to(x.dtype)


def group_norm(channels: int, groups: int | None, eps: float) -> GroupNorm:
    """A group norm; by default a quarter of the channels are its groups, 32 at most."""
    groups = groups or min(channels // 4, 32)
    if groups < 1 or channels % groups:
        raise ValueError(
            f"{channels} channels do not split into {groups} groups: "
            "choose the field groups, or the widths, otherwise"
        )
    return GroupNorm(groups, channels, eps=eps)


class Pointwise(nn.Linear):
    """A 1x1 convolution, as the matrix product that it is: no copy where channels are last."""

    def forward(self, x: Tensor) -> Tensor:
        """``(B, inside, *spatial)`` to ``(B, outside, *spatial)``."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)

    def added_to(self, h: Tensor, x: Tensor, scale: float) -> Tensor:
        """``(h + W x) * scale``, without the bias: one product that adds where ``h`` lies."""
        rows, places = h.movedim(1, -1), x.movedim(1, -1).flatten(0, -2).to(h.dtype)
        flat, weight = rows.flatten(0, -2), self.weight.T.to(h.dtype)
        if torch.is_grad_enabled():  # one factor is one pass on the way back
            flat = torch.addmm(flat, places, weight).mul_(scale)
        else:
            torch.addmm(flat, places, weight, beta=scale, alpha=scale, out=flat)
        return flat.view(rows.shape).movedim(-1, 1)


class ResBlock(nn.Module):
    """Residual block from ``inside`` to ``outside`` channels, see the module's equation.

    Args:
        n: number of spatial axes.
        inside: channels of the input.
        outside: channels of the output.
        embedding: width of the embedding, 0 for a block that takes none.
        norm: ``norm(channels)``, the normalisation.
        adaptive: whether the embedding scales and shifts instead of being added.
        skip_scale: factor of the sum.
        resample: ``"down"``, ``"up"`` or None.
        resampler: how it halves and doubles.
        project: whether the skip connection has a matrix; by default where channels change.
        dropout: rate of dropout before the second convolution.
        act: name of the activation.
    """

    def __init__(
        self,
        n: int,
        inside: int,
        outside: int,
        embedding: int,
        *,
        norm: Callable[[int], nn.Module],
        adaptive: bool = False,
        skip_scale: float = 1.0,
        resample: str | None = None,
        resampler: Resampler | None = None,
        project: bool | None = None,
        dropout: float = 0.0,
        act: str = "silu",
    ) -> None:
        super().__init__()
        self.adaptive, self.skip_scale, self.act = adaptive, skip_scale, act
        self.resample, self.resampler = resample, resampler
        self.norm1 = norm(inside)
        self.conv1 = CONV[n](inside, outside, 3, padding=1)
        width = outside * (2 if adaptive else 1)
        self.affine = nn.Linear(embedding, width) if embedding else None
        self.norm2 = norm(outside)
        self.dropout = nn.Dropout(dropout)
        self.conv2: Any = CONV[n](outside, outside, 3, padding=1)
        project = inside != outside if project is None else project
        self.skip = Pointwise(inside, outside) if project else None

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """``(B, inside, *spatial)``, activated embedding ``(B, E)`` to ``(B, outside, ...)``."""
        h = activate(self.norm1(x), self.act)
        if self.resample is not None:
            assert self.resampler is not None
            change = self.resampler.up if self.resample == "up" else self.resampler.down
            h, x = change(h), change(x)
        h = self.conv1(h)
        if self.affine is None or embedding is None:
            h = self.norm2(h)
        else:
            a = self.affine(embedding).reshape(len(x), -1, *(1,) * (x.ndim - 2))
            if self.adaptive:
                scale, shift = a.chunk(2, 1)
                h = torch.addcmul(shift, self.norm2(h), 1 + scale)
            else:
                h = self.norm2(h.add_(a))  # no gradient needs what a convolution gave
        h = self.dropout(activate(h, self.act))
        if self.skip is None:
            return joined(x, self.conv2(h), self.skip_scale)
        bias = self.conv2.bias + self.skip.bias
        h = self.conv2._conv_forward(h, self.conv2.weight, bias)
        return self.skip.added_to(h, x, self.skip_scale)


def joined(x: Tensor, h: Tensor, scale: float) -> Tensor:
    """``(x + h) * scale`` in the place of ``h``, which no gradient needs: a layer's output."""
    h = h.add_(x)
    return h if scale == 1.0 else h.mul_(scale)


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """``x W^T + b``; on a CPU torch's own first copies b to every row, slower than adding it."""
    if x.device.type != "cpu":
        return layer(x)
    return functional.linear(x, layer.weight).add_(layer.bias)


class Attention(nn.Module):
    """Self-attention over all positions; ``qkv`` holds q, k and v, each head after head.

    Args:
        channels: channels of input and output.
        heads: number of heads.
        norm: ``norm(channels)``.
        skip_scale: factor of the sum.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        *,
        norm: Callable[[int], nn.Module],
        skip_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if heads < 1 or channels % heads:
            raise ValueError(f"{channels} channels do not split into {heads} attention heads")
        self.heads, self.skip_scale = heads, skip_scale
        self.norm = norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, *spatial)`` to the same shape."""
        h = self.norm(x).flatten(2).transpose(1, 2)
        h = linear(h, self.qkv).unflatten(2, (3, self.heads, -1))
        q, k, v = h.permute(2, 0, 3, 1, 4)
        h = functional.scaled_dot_product_attention(q, k, v)
        h = linear(h.transpose(1, 2).flatten(2), self.out)
        h = h.transpose(1, 2).reshape(x.shape)
        if torch.is_grad_enabled():  # a view: writing into it would cost the gradient copies
            return (x + h) * self.skip_scale
        return joined(x, h, self.skip_scale)


class Downsample(nn.Module):
    """A strided 3x3 convolution, after the filter if there is one.

    Args:
        n: number of spatial axes.
        inside: channels of the input.
        outside: channels of the output.
        padding: ``(before, after)`` zeros of each axis; with a filter it is the filter's own.
        resampler: the filter, None for none.
    """

    def __init__(
        self,
        n: int,
        inside: int,
        outside: int,
        padding: tuple[int, int] = (1, 1),
        resampler: Resampler | None = None,
    ) -> None:
        super().__init__()
        self.n, self.padding = n, padding
        self.resampler = resampler
        same = padding[0] == padding[1] and self.resampler is None
        self.conv = CONV[n](inside, outside, 3, stride=2, padding=padding[0] if same else 0)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, inside, *spatial)`` to ``(B, outside, *spatial/2)``."""
        if self.resampler is not None:
            taps = len(self.resampler.taps)
            x = self.resampler.filtered(x, ((taps + 1) // 2, taps // 2))
        elif self.padding[0] != self.padding[1]:
            x = functional.pad(x, self.padding * self.n)
        return self.conv(x)


class Upsample(nn.Module):
    """Twice the resolution, then a 3x3 convolution."""

    def __init__(self, n: int, inside: int, outside: int, resampler: Resampler) -> None:
        super().__init__()
        self.resampler = resampler
        self.conv = CONV[n](inside, outside, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, inside, *spatial)`` to ``(B, outside, *2 spatial)``."""
        return self.conv(self.resampler.up(x))


class Resampling(nn.Module):
    """Twice or half the resolution, nothing else."""

    def __init__(self, resampler: Resampler, way: str) -> None:
        super().__init__()
        self.resampler, self.way = resampler, way

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, *spatial)`` at the other resolution."""
        return self.resampler.up(x) if self.way == "up" else self.resampler.down(x)


class Stage(nn.Module):
    """A residual block, with attention after it where asked for."""

    def __init__(self, block: ResBlock, attention: Attention | None) -> None:
        super().__init__()
        self.block = block
        self.attention = attention

    def forward(self, x: Tensor, embedding: Tensor | None) -> Tensor:
        """As :class:`ResBlock`."""
        x = self.block(x, embedding)
        return x if self.attention is None else self.attention(x)


class Level(nn.Module):
    """What happens at one resolution, on the way down or up; what is absent is None."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        self.attention: Attention | None = None
        self.norm: Any = None
        self.pyramid: Any = None
        self.resample: nn.Module | None = None


def run(layer: nn.Module, *inputs: Any, again: bool) -> Tensor:
    """The layer's output; with ``again`` it keeps no graph and is run again on the way back."""
    if again and torch.is_grad_enabled():
        return checkpoint(layer, *inputs, use_reentrant=False)
    return layer(*inputs)


def typed(levels: nn.ModuleList) -> list[Level]:
    """The levels in a list of modules."""
    return cast("list[Level]", list(levels))


def positive(name: str, net: nn.Module, *fields: str) -> None:
    """Refuses a network called ``name`` with a number below 1 in one of its fields."""
    for field in fields:
        value = getattr(net, field, None)
        if value is not None and value < 1:
            raise ValueError(f"the {name} needs {field} of at least 1, got {value}")


def uniform_(weight: Tensor, scale: float = 1.0) -> None:
    """Uniform weights of variance ``scale / mean(fan_in, fan_out)``; 0 means 1e-10."""
    receptive = math.prod(weight.shape[2:])
    fan = (weight.shape[0] + weight.shape[1]) * receptive / 2
    bound = math.sqrt(3 * max(scale, 1e-10) / fan)
    nn.init.uniform_(weight, -bound, bound)
