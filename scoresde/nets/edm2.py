r"""Magnitude-preserving U-Net (EDM2, configuration G): activations, weights and updates keep size.

Every layer maps inputs of unit variance to outputs of unit variance, without group norm or biases:

    normalize(a) = a / (eps + |a| / sqrt(N))                         N elements, eps = 1e-4
    learned      gain normalize(w) / sqrt(fan_in) * x                per output feature of w
    MP-SiLU(a) = silu(a) / 0.596
    MP-Sum(a, b; t) = ((1-t) a + t b) / sqrt((1-t)^2 + t^2)
    MP-Cat(a, b; t) = sqrt((N_a+N_b) / ((1-t)^2 + t^2)) [(1-t)/sqrt(N_a) a, t/sqrt(N_b) b]
    MP-Fourier(a) = sqrt(2) cos(2 pi (f a + phi)),                   f ~ N(0, 1), phi ~ U(0, 1)

A constant channel of ones at the input stands for the biases. In training the weights are replaced
by ``normalize(w)`` at each pass, so that their size does not decay the learning rate.

Written from the formulas. They leave open the order of the channels of queries, keys and
values, and where a block resamples: here as in the networks of its predecessor (q, k, v fastest;
the block resamples first). Not yet compared with published weights.

Source: Analyzing and Improving the Training Dynamics of Diffusion Models (Karras et al., 2024),
https://arxiv.org/abs/2312.02696.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from .embed import class_rows
from .layers import run

EPS = 1e-4
"""Added to a root mean square before the division by it."""


def normalize(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """``x / (eps + |x| / sqrt(N))``: a root mean square of one over ``dims``, of N elements.

    The norm is taken in float32 or better; the result has the shape and dtype of ``x``.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=wide)
    number = math.prod([x.shape[d] for d in dims])
    return x / (EPS + norm / math.sqrt(number)).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """``silu(x) / 0.596``; 0.596 is the root mean square of ``silu`` of a standard normal."""
    return functional.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """``((1-t) a + t b) / sqrt((1-t)^2 + t^2)``, for ``t`` in [0, 1]."""
    return torch.lerp(a, b, t) / math.hypot(1 - t, t)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """``[a, b]`` on axis 1, ``b`` weighing ``t`` in [0, 1] whatever the numbers of channels."""
    n_a, n_b = a.shape[1], b.shape[1]
    scale = math.sqrt(n_a + n_b) / math.hypot(1 - t, t)
    return torch.cat([scale * (1 - t) / math.sqrt(n_a) * a, scale * t / math.sqrt(n_b) * b], 1)


class MPFourier(nn.Module):
    """``sqrt(2) cos(freqs a + phases)``: random waves of fixed frequencies, ``2 pi`` included."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, a: Tensor) -> Tensor:
        """``(B,)`` to ``(B, channels)``, in the precision of ``a`` and float32 at least."""
        a = a.to(torch.promote_types(a.dtype, torch.float32))[:, None]
        return math.sqrt(2) * torch.cos(a * self.freqs.to(a.dtype) + self.phases.to(a.dtype))


class MPLinear(nn.Module):
    """Linear map or odd square convolution with forced weight normalisation, without bias.

    Args:
        inside: channels of the input.
        outside: channels of the output.
        kernel: size of the kernel, None for a linear map of vectors.
    """

    def __init__(self, inside: int, outside: int, kernel: int | None = None) -> None:
        super().__init__()
        window = () if kernel is None else (kernel, kernel)
        self.weight = nn.Parameter(torch.randn(outside, inside, *window))

    def force_norm(self) -> None:
        """Brings the weights to unit length, of shared-out ones (FSDP2) this process's rows."""
        rows = getattr(self.weight.data, "to_local", lambda: self.weight.data)()
        rows.copy_(normalize(rows, tuple(range(1, rows.ndim))))

    def forward(self, x: Tensor, gain: float | Tensor = 1.0) -> Tensor:
        """``(B, inside, ...)`` to ``(B, outside, ...)``, times ``gain``."""
        dims = tuple(range(1, self.weight.ndim))
        if self.training:
            # Through .data, since a second pass before the backward pass of a first one is
            # harmless: the weights are a fixed point by then. So is recomputing a block.
            self.force_norm()
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        scale = gain / math.sqrt(self.weight[0].numel())
        weight = (normalize(weight, dims) * scale).to(x.dtype)
        if weight.ndim == 2:
            return functional.linear(x, weight)
        return functional.conv2d(x, weight, padding=weight.shape[-1] // 2)


class MPBlock(nn.Module):
    """Residual block of the encoder or decoder, with attention after it where asked for.

        x = resample(x);  encoder: x = normalize(skip(x)) over channels
        h = conv1(MP-SiLU(conv0(MP-SiLU(x)) (1 + gain modulation(embedding))))
        decoder: x = skip(x);  x = MP-Sum(x, h; balance)

    Args:
        inside: channels of the input.
        outside: channels of the output.
        embedding: channels of the embedding.
        net: the network, whose rates and balances hold.
        encoder: whether the block is one of the encoder, else of the decoder.
        attend: whether attention follows.
        resample: ``"down"`` (mean of 2x2), ``"up"`` (nearest) or ``""``.
    """

    def __init__(
        self,
        inside: int,
        outside: int,
        embedding: int,
        net: EDM2,
        encoder: bool,
        attend: bool = False,
        resample: str = "",
    ) -> None:
        super().__init__()
        self.encoder, self.resample = encoder, resample
        self.dropout, self.clip = net.dropout, net.clip
        self.res_balance, self.attn_balance = net.res_balance, net.attn_balance
        self.heads = outside // net.head_dim if attend else 0
        if self.heads and outside % self.heads:
            raise ValueError(f"edm2: {outside} channels do not divide into {self.heads} heads")
        self.skip = MPLinear(inside, outside, 1) if inside != outside else None
        self.conv0 = MPLinear(outside if encoder else inside, outside, 3)
        self.modulation = MPLinear(embedding, outside)
        self.gain = nn.Parameter(torch.zeros(()))
        self.conv1 = MPLinear(outside, outside, 3)
        self.qkv = MPLinear(outside, 3 * outside, 1) if self.heads else None
        self.proj = MPLinear(outside, outside, 1) if self.heads else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """``(B, inside, H, W)`` to ``(B, outside, H', W')``."""
        if self.resample == "down":
            x = functional.avg_pool2d(x, 2)
        elif self.resample == "up":
            x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
        if self.encoder:
            x = x if self.skip is None else self.skip(x)
            x = normalize(x, (1,))
        h = self.conv0(mp_silu(x))
        h = mp_silu(h * (1 + self.modulation(embedding, self.gain))[:, :, None, None])
        h = self.conv1(functional.dropout(h, self.dropout, self.training))
        if not self.encoder and self.skip is not None:
            x = self.skip(x)
        x = mp_sum(x, h, self.res_balance)
        if self.qkv is not None and self.proj is not None:
            x = mp_sum(x, self.proj(self.attention(self.qkv(x))), self.attn_balance)
        return x if self.clip is None else x.clamp(-self.clip, self.clip)

    def attention(self, x: Tensor) -> Tensor:
        """Cosine attention ``softmax(q k / sqrt(d)) v``, heads of d channels normalised each.

        Channels of ``x (B, 3C, H, W)`` are ordered (head, channel, (q, k, v)), the last fastest.
        """
        batch, _, height, width = x.shape
        heads = x.reshape(batch, self.heads, -1, 3, height * width)
        q, k, v = normalize(heads, (2,)).permute(3, 0, 1, 4, 2).unbind(0)
        x = functional.scaled_dot_product_attention(q, k, v).transpose(2, 3)
        x = x.reshape(batch, -1, height, width)
        return x.contiguous(memory_format=torch.channels_last)


@dataclass(eq=False, repr=False)
class EDM2(nn.Module):
    """Magnitude-preserving U-Net ``F(x, c_noise, y)`` for images ``(C, H, W)``.

    Args:
        shape: shape of one item, ``(C, H, W)``; H and W multiples of ``2^(levels - 1)``.
        width: channels of the first level.
        multipliers: channels of each level, in units of ``width``.
        blocks: residual blocks a level on the way down (one more on the way up).
        attention: resolutions, in pixels of the longer side, with attention; it also sits in the
            middle of the network.
        head_dim: channels of an attention head. Levels with fewer go without attention.
        num_classes: number of classes of ``y``, None for an unconditional network.
        label_balance: weight t, in [0, 1], of the class against the noise level.
        concat_balance: weight t of the skip connections in the decoder.
        res_balance: weight t of the residual branches.
        attn_balance: weight t of the attention.
        clip: largest magnitude of an activation after a block, None for no bound.
        dropout: rate of dropout within the residual blocks.
        noise_width: waves of the noise level, None for the channels of the first level.
        embedding_width: channels of the embedding, None for those of the widest level.
        uncertainty_width: waves of the head of :meth:`log_variance`.
        checkpointing: whether to recompute the blocks in the backward pass, to save memory.
    """

    shape: tuple[int, ...]
    width: int = 192
    multipliers: tuple[int, ...] = (1, 2, 3, 4)
    blocks: int = 3
    attention: tuple[int, ...] = (16, 8)
    head_dim: int = 64
    num_classes: int | None = None
    label_balance: float = 0.5
    concat_balance: float = 0.5
    res_balance: float = 0.3
    attn_balance: float = 0.3
    clip: float | None = 256.0
    dropout: float = 0.0
    noise_width: int | None = None
    embedding_width: int | None = None
    uncertainty_width: int = 128
    checkpointing: bool = False

    name: ClassVar[str] = "edm2"
    presets: ClassVar[dict[str, dict[str, object]]] = {
        "tiny": {"width": 32, "multipliers": (1, 2), "blocks": 1, "head_dim": 32},
        "small": {"width": 64, "multipliers": (1, 2, 2), "blocks": 2, "head_dim": 32},
        "base": {"width": 128, "multipliers": (1, 2, 2), "blocks": 3},
        **{
            size: {"width": width}
            for size, width in zip(
                ("xs", "s", "m", "l", "xl", "xxl"), (128, 192, 256, 320, 384, 448), strict=True
            )
        },
    }

    def __post_init__(self) -> None:
        super().__init__()
        self.shape, self.multipliers = tuple(self.shape), tuple(self.multipliers)
        self.attention = tuple(self.attention)
        self._check()
        widths = [self.width * m for m in self.multipliers]
        waves = self.noise_width or widths[0]
        embedding = self.embedding_width or max(widths)

        self.fourier = MPFourier(waves)
        self.noise = MPLinear(waves, embedding)
        self.label = MPLinear(self.num_classes, embedding) if self.num_classes else None
        self.uncertainty_fourier = MPFourier(self.uncertainty_width)
        self.uncertainty = MPLinear(self.uncertainty_width, 1)
        self.stem = MPLinear(self.shape[0] + 1, widths[0], 3)

        # Names hold the resolution, "64x64_block0", and are those of published weights.
        self.encoder, self.decoder = nn.ModuleDict(), nn.ModuleDict()
        current, skips = widths[0], [widths[0]]
        for level, width in enumerate(widths):
            size, attend = self._level(level)
            if level:
                self.encoder[f"{size}_down"] = MPBlock(
                    current, current, embedding, self, True, resample="down"
                )
                skips.append(current)
            for i in range(self.blocks):
                self.encoder[f"{size}_block{i}"] = MPBlock(
                    current, width, embedding, self, True, attend
                )
                current = width
                skips.append(current)
        for level, width in reversed(list(enumerate(widths))):
            size, attend = self._level(level)
            if level == len(widths) - 1:
                for i in range(2):
                    self.decoder[f"{size}_in{i}"] = MPBlock(
                        current, current, embedding, self, False, i == 0
                    )
            else:
                self.decoder[f"{size}_up"] = MPBlock(
                    current, current, embedding, self, False, resample="up"
                )
            for i in range(self.blocks + 1):
                self.decoder[f"{size}_block{i}"] = MPBlock(
                    current + skips.pop(), width, embedding, self, False, attend
                )
                current = width
        self.out_gain = nn.Parameter(torch.zeros(()))
        self.out = MPLinear(current, self.shape[0], 3)

    def _check(self) -> None:
        if not self.multipliers or min(self.multipliers) < 1 or self.width < 1 or self.blocks < 1:
            raise ValueError("edm2 needs width, blocks and multipliers of at least 1")
        if self.head_dim < 1:
            raise ValueError(f"edm2 needs head_dim of at least 1, got {self.head_dim}")
        stride = 2 ** (len(self.multipliers) - 1)
        if len(self.shape) != 3 or any(size < 1 or size % stride for size in self.shape[1:]):
            raise ValueError(
                f"edm2 with {len(self.multipliers)} levels takes images of shape (C, H, W) with "
                f"H and W multiples of {stride}, not {self.shape}; the unet takes any size"
            )
        for name in ("label_balance", "concat_balance", "res_balance", "attn_balance"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"edm2 needs {name} in [0, 1], got {getattr(self, name)}")

    def _level(self, level: int) -> tuple[str, bool]:
        height, width = self.shape[1] >> level, self.shape[2] >> level
        return f"{height}x{width}", max(height, width) in self.attention

    def embed(self, c_noise: Tensor, y: Tensor | None, dtype: torch.dtype) -> Tensor:
        """``MP-SiLU(MP-Sum(noise, label))``, ``(B, embedding)``; no class is a vector of zeros."""
        embedding = self.noise(self.fourier(c_noise).to(dtype))
        if self.label is not None and self.num_classes is not None:
            if y is None:
                row = torch.zeros_like(embedding)
            else:
                rows = class_rows(y, self.num_classes).to(dtype)
                row = self.label(math.sqrt(self.num_classes) * rows)
            embedding = mp_sum(embedding, row, self.label_balance)
        return mp_silu(embedding)

    def forward(self, x: Tensor, c_noise: Tensor, y: Tensor | None = None) -> Tensor:
        """``F``, of the shape of ``x``.

        Args:
            x: images of unit variance, ``(B, C, H, W)``.
            c_noise: noise level, ``log(sigma/alpha)/4``, ``(B,)``.
            y: indices ``(B,)``, one-hot rows ``(B, num_classes)`` or None for no class.
        """
        embedding = self.embed(c_noise, y, x.dtype)
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        skips = [x]
        for block in self.encoder.values():
            x = run(block, x, embedding, again=self.checkpointing)
            skips.append(x)
        for name, block in self.decoder.items():
            if "_block" in name:
                x = mp_cat(x, skips.pop(), self.concat_balance)
            x = run(block, x, embedding, again=self.checkpointing)
        return self.out(x, self.out_gain)

    def log_variance(self, c_noise: Tensor) -> Tensor:
        """Logarithm of the expected loss ``u``, to train on ``loss / exp(u) + u``.

        Args:
            c_noise: noise level, ``(B,)``.

        Returns:
            ``u``, shape ``(B,)``.
        """
        features = self.uncertainty_fourier(c_noise)
        return self.uncertainty(features.to(self.uncertainty.weight.dtype))[:, 0]
