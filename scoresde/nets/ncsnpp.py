r"""NCSN++ and DDPM++, and EDM's versions of both: one network, its options.

A U-Net of residual blocks with ``skip_scale = 1/sqrt(2)``, self-attention at chosen levels, and,
beside the U-Net's own path, optional pyramids of resampled pictures that enter each level of the
encoder (``input_pyramid``) and gather the output over the levels of the decoder
(``output_pyramid``). NCSN++ filters where it resamples and takes a residual input pyramid; DDPM++
does neither. The DDPM network of the same papers has ``resblock="ddpm"``: convolutions instead of
blocks change the resolution.

Sources: Score-Based Generative Modeling through Stochastic Differential Equations (Song et al.,
2021), appendix H, https://arxiv.org/abs/2011.13456; Elucidating the Design Space of
Diffusion-Based Generative Models (Karras et al., 2022), https://arxiv.org/abs/2206.00364; the
pyramids are those of Analyzing and Improving the Image Quality of StyleGAN (Karras et al., 2020),
https://arxiv.org/abs/1912.04958.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import unknown
from .embed import class_rows, noise_features
from .layers import (
    ACTIVATIONS,
    CONV,
    Attention,
    Downsample,
    GroupNorm,
    Level,
    Pointwise,
    Resampling,
    ResBlock,
    Stage,
    Upsample,
    activate,
    group_norm,
    joined,
    positive,
    run,
    typed,
    uniform_,
)
from .layout import cropped, image_for, padded, weights_last
from .resample import Resampler


@dataclass(eq=False, repr=False)
class NCSNpp(nn.Module):
    """NCSN++ family ``F(x, c_noise, y)`` for items ``(C, *spatial)``, 1 to 3 spatial axes.

    Args:
        shape: shape of one item, ``(C, *spatial)``.
        width: channels of the first convolution.
        multipliers: channels of each level, in units of ``width``.
        blocks: residual blocks a level on the way down (one more on the way up).
        attention: levels (0 is the full resolution) with self-attention; it also sits in the
            middle of the network.
        resblock: ``"biggan"``, blocks change the resolution, or ``"ddpm"``, convolutions do.
        taps: filter of resampling; NCSN++'s is ``(1, 3, 3, 1)``. None halves by the mean, or by a
            strided convolution where there is one, and doubles by the nearest neighbour.
        input_pyramid: ``"none"``, ``"skip"`` (the input, resampled) or ``"residual"``.
        output_pyramid: ``"none"``, ``"skip"`` (outputs of all levels, summed) or ``"residual"``.
        combine: how an input pyramid of skips enters, ``"sum"`` or ``"cat"``.
        embedding: features of ``c_noise``: ``"waves"`` for a quarter of the log of the noise
            level, ``"positional"`` for a step of 0 to 1000, ``"fourier"``, or ``"log-fourier"``
            of the log of a noise level.
        noise_width: number of these features, ``width`` if None.
        fourier_scale: standard deviation of the random frequencies.
        skip_rescale: whether residual sums are divided by sqrt(2).
        resample_conv: whether ``"ddpm"`` resampling has a convolution.
        groups: groups of the group norms; None for a quarter of the channels, at most 32.
        diffusers_groups: whether levels with attention have the groups of diffusers' version: 32
            for attention, and a quarter of the skip connection's channels added to all others on
            the way up. That differs below 128 channels.
        act: name of the activation.
        dropout: rate of dropout within the residual blocks.
        conditional: whether the network takes ``c_noise``.
        center_input: whether items lie in [0, 1] and the network takes them to [-1, 1].
        scale_by_sigma: whether the output is divided by the noise level.
        sigmas: ``(sigma_min, sigma_max, N)``: ``c_noise`` is a step of 0, the largest noise level,
            to N - 1, geometric in between; needed where ``scale_by_sigma`` meets another
            embedding than ``"log-fourier"``, which is told the level itself.
        out_channels: channels of the output, those of the items if None.
        num_classes: number of classes of ``y``, None for an unconditional network.
        image_channels: channels of the condition ``image``, joined to the input; 0 for none.
        augment: number of augmentation labels, 0 for none.
        checkpointing: whether blocks are computed again in the backward pass, to save memory.
    """

    shape: tuple[int, ...]
    width: int = 128
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    blocks: int = 4
    attention: tuple[int, ...] = (1,)
    resblock: str = "biggan"
    taps: tuple[float, ...] | None = None
    input_pyramid: str = "none"
    output_pyramid: str = "none"
    combine: str = "sum"
    embedding: str = "waves"
    noise_width: int | None = None
    fourier_scale: float = 16.0
    skip_rescale: bool = True
    resample_conv: bool = True
    groups: int | None = None
    diffusers_groups: bool = False
    act: str = "silu"
    dropout: float = 0.0
    conditional: bool = True
    center_input: bool = False
    scale_by_sigma: bool = False
    sigmas: tuple[float, float, int] | None = None
    out_channels: int | None = None
    num_classes: int | None = None
    image_channels: int = 0
    augment: int = 0
    checkpointing: bool = False

    name: ClassVar[str] = "ncsnpp"
    presets: ClassVar[dict[str, dict[str, object]]] = {
        "tiny": {"width": 16, "multipliers": (1, 2), "blocks": 1},
        "ddpmpp": {},
        "ddpmpp-deep": {"blocks": 8},
        "ncsnpp": {"taps": (1.0, 3.0, 3.0, 1.0), "input_pyramid": "residual"},
        "ncsnpp-deep": {"blocks": 8, "taps": (1.0, 3.0, 3.0, 1.0), "input_pyramid": "residual"},
        "edm-ddpmpp": {"multipliers": (2, 2, 2)},
        "edm-ncsnpp": {
            "multipliers": (2, 2, 2),
            "taps": (1.0, 3.0, 3.0, 1.0),
            "input_pyramid": "residual",
        },
    }

    def __post_init__(self) -> None:
        super().__init__()
        self._check()
        n, data = len(self.shape) - 1, self.shape[0]
        inside = data + self.image_channels
        widths = [self.width * m for m in self.multipliers]
        self.stride = 2 ** (len(widths) - 1)
        self.skip_scale = math.sqrt(0.5) if self.skip_rescale else 1.0
        self.resampler = Resampler(n, self.taps or (1.0, 1.0))
        embedding = self._embedding() if self.conditional else 0
        conv, norm, resampler = CONV[n], self._norm, self.resampler
        filtered = resampler if self.taps else None
        shared: dict[str, Any] = {"norm": norm, "skip_scale": self.skip_scale}

        def block(inside: int, outside: int, resample: str | None = None) -> ResBlock:
            return ResBlock(
                n,
                inside,
                outside,
                embedding,
                resample=resample,
                resampler=resampler,
                project=inside != outside or resample is not None,
                dropout=self.dropout,
                act=self.act,
                **shared,
            )

        def attend(channels: int) -> Attention:
            return Attention(channels, 1, **shared)

        def resampled(channels: int, way: str) -> nn.Module:
            if self.resblock == "biggan":
                return block(channels, channels, way)
            if not self.resample_conv:
                return Resampling(resampler, way)
            if way == "up":
                return Upsample(n, channels, channels, resampler)
            return Downsample(n, channels, channels, (0, 1), filtered)

        self.stem = conv(inside, self.width, 3, padding=1)
        self.encoder = nn.ModuleList()
        current, pyramid, skips = self.width, inside, [self.width]
        for i, width in enumerate(widths):
            level = Level()
            for _ in range(self.blocks):
                level.stages.append(
                    Stage(block(current, width), attend(width) if i in self.attention else None)
                )
                current = width
                skips.append(current)
            if i < len(widths) - 1:
                level.resample = resampled(current, "down")
                if self.input_pyramid == "skip":
                    level.pyramid = Pointwise(inside, current)
                    current *= 2 if self.combine == "cat" else 1
                elif self.input_pyramid == "residual":
                    level.pyramid = Downsample(n, pyramid, current, (0, 1), filtered)
                    pyramid = current
                skips.append(current)
            self.encoder.append(level)

        self.middle = nn.ModuleList(
            [Stage(block(current, current), attend(current)), Stage(block(current, current), None)]
        )

        self.decoder = nn.ModuleList()
        outside, lowest = self.out_channels or data, len(widths) - 1
        for i, width in reversed(list(enumerate(widths))):
            level = Level()
            for _ in range(self.blocks + 1):
                level.stages.append(Stage(block(current + skips.pop(), width), None))
                current = width
            level.attention = attend(current) if i in self.attention else None
            if self.output_pyramid == "skip":
                level.norm, level.pyramid = norm(current), conv(current, outside, 3, padding=1)
            elif self.output_pyramid == "residual" and i == lowest:
                level.norm, level.pyramid = norm(current), conv(current, current, 3, padding=1)
                pyramid = current
            elif self.output_pyramid == "residual":
                level.pyramid = Upsample(n, pyramid, current, resampler)
                pyramid = current
            if i:
                level.resample = resampled(current, "up")
            self.decoder.append(level)
        if self.output_pyramid != "skip":
            self.head_norm, self.head = norm(current), conv(current, outside, 3, padding=1)
        if self.diffusers_groups:
            self._regroup(widths)
        self._initialise()
        weights_last(self, n)

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        y: Tensor | None = None,
        augment: Tensor | None = None,
        image: Tensor | None = None,
    ) -> Tensor:
        """``x (B, C, *spatial)``, ``c_noise (B,)``, conditions to ``(B, out, *spatial)``.

        ``y`` holds indices ``(B,)`` or one-hot rows ``(B, num_classes)``; None and the index
        ``num_classes`` are the zero row. ``image (B, image_channels, *spatial)`` is joined to the
        input; None is one of zeros.
        """
        embedding = self.embed(c_noise, y, augment) if self.conditional else None
        spatial = x.shape[2:]
        image = padded(image_for(x, image, self.image_channels), self.stride)
        x = padded(x, self.stride)
        if self.center_input:
            x = 2 * x - 1
        x = torch.cat([x, image], 1)

        h = self.stem(x)
        skips, pyramid = [h], x
        for level in typed(self.encoder):
            for stage in level.stages:
                h = self._run(stage, h, embedding)
                skips.append(h)
            if level.resample is not None:
                h = self._resample(level.resample, h, embedding)
                if self.input_pyramid == "skip":
                    pyramid = self.resampler.down(pyramid)
                    entry = level.pyramid(pyramid)
                    h = entry + h if self.combine == "sum" else torch.cat([entry, h], 1)
                elif self.input_pyramid == "residual":
                    h = pyramid = joined(h, level.pyramid(pyramid), self.skip_scale)
                skips.append(h)

        for stage in self.middle:
            h = self._run(stage, h, embedding)

        out: Tensor | None = None
        for level in typed(self.decoder):
            for stage in level.stages:
                h = self._run(stage, torch.cat([h, skips.pop()], 1), embedding)
            if level.attention is not None:
                h = self._run(level.attention, h)
            if self.output_pyramid == "skip":
                add = level.pyramid(activate(level.norm(h), self.act))
                out = add if out is None else self.resampler.up(out) + add
            elif self.output_pyramid == "residual" and out is None:
                out = level.pyramid(activate(level.norm(h), self.act))
            elif self.output_pyramid == "residual":
                h = out = joined(h, level.pyramid(out), self.skip_scale)
            if level.resample is not None:
                h = self._resample(level.resample, h, embedding)
        if self.output_pyramid != "skip":
            out = self.head(activate(self.head_norm(h), self.act))
        assert out is not None

        out = cropped(out, spatial)
        return self._over_sigma(out, c_noise) if self.scale_by_sigma else out

    def embed(self, c_noise: Tensor, y: Tensor | None, augment: Tensor | None) -> Tensor:
        """The activated embedding ``(B, 4 width)`` of noise level, class and augmentation."""
        dtype = self.embed1.weight.dtype
        e = self.features(c_noise).to(dtype)
        if self.classes is not None:
            count = self.classes.in_features
            y = e.new_zeros(len(e), count) if y is None else class_rows(y, count)
            e = e + self.classes(y.to(dtype) * math.sqrt(count))
        if self.augmentation is not None and augment is not None:
            e = e + self.augmentation(augment.to(dtype))
        return self._act(self.embed2(self._act(self.embed1(e))))

    def _act(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.act](x, inplace=False)

    def _run(self, layer: nn.Module, *inputs: Any) -> Tensor:
        return run(layer, *inputs, again=self.checkpointing)

    def _resample(self, layer: nn.Module, h: Tensor, embedding: Tensor | None) -> Tensor:
        return self._run(layer, h, embedding) if isinstance(layer, ResBlock) else layer(h)

    def _over_sigma(self, out: Tensor, c_noise: Tensor) -> Tensor:
        sigma = c_noise
        if self.sigmas is not None:
            low, high, count = self.sigmas
            sigma = high * torch.exp(c_noise * (math.log(low / high) / (count - 1)))
        return out / sigma.to(out.dtype).reshape(-1, *(1,) * (out.ndim - 1))

    def _norm(self, channels: int) -> GroupNorm:
        return group_norm(channels, self.groups, 1e-6)

    def _embedding(self) -> int:
        """The layers of :meth:`embed`, and the width of what they give."""
        inside, outside = self.noise_width or self.width, 4 * self.width
        self.features = noise_features(self.embedding, inside, self.fourier_scale)
        self.classes = nn.Linear(self.num_classes, inside) if self.num_classes else None
        self.augmentation = nn.Linear(self.augment, inside, bias=False) if self.augment else None
        self.embed1, self.embed2 = nn.Linear(inside, outside), nn.Linear(outside, outside)
        return outside

    def _regroup(self, widths: list[int]) -> None:
        """The groups of diffusers' blocks with attention, see ``diffusers_groups``."""
        for i in self.attention:
            if not 0 <= i < len(widths) or widths[i] % 32:
                raise ValueError(
                    "diffusers_groups needs multiples of 32 channels where there is attention, "
                    f"at levels 0 to {len(widths) - 1}"
                )
            level = typed(self.decoder)[len(widths) - 1 - i]
            attentions: list[Any] = [level.attention]
            attentions += [stage.attention for stage in typed(self.encoder)[i].stages]
            for attention in attentions:
                attention.norm.num_groups = 32
            before = widths[min(i + 1, len(widths) - 1)]
            blocks: list[Any] = [stage.block for stage in level.stages]
            for norm in (block.norm1 for block in blocks):
                norm.num_groups = min(before + (norm.num_channels - before) // 4, 32)
                before = widths[i]

    def _initialise(self) -> None:
        """Uniform weights; each residual branch and the output start at zero, nearly."""
        for module in self.modules():
            if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
                uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        ends: list[Any] = [self.head] if self.output_pyramid != "skip" else []
        if self.output_pyramid == "skip":
            ends += [level.pyramid for level in typed(self.decoder)]
        for module in self.modules():
            if isinstance(module, ResBlock):
                ends.append(module.conv2)
            elif isinstance(module, Attention):
                ends.append(module.out)
                uniform_(module.qkv.weight, 0.1)
        for end in ends:
            uniform_(end.weight, 0.0)

    def _check(self) -> None:
        """Refuses fields that make no network, and makes tuples of lists."""
        for name in ("shape", "multipliers", "attention"):
            setattr(self, name, tuple(getattr(self, name)))
        self.taps = None if self.taps is None else tuple(self.taps)
        if len(self.shape) - 1 not in CONV:
            raise ValueError(
                f"the ncsnpp takes items of shape (C, *spatial) with 1 to 3 spatial axes, "
                f"not {self.shape}; use the mlp for vectors"
            )
        if not self.multipliers or min(self.multipliers) < 1 or self.width < 4 or self.blocks < 1:
            raise ValueError("the ncsnpp needs width >= 4, blocks >= 1 and multipliers >= 1")
        pyramids = ("none", "skip", "residual")
        for name, accepted in (
            ("resblock", ("biggan", "ddpm")),
            ("input_pyramid", pyramids),
            ("output_pyramid", pyramids),
            ("combine", ("sum", "cat")),
            ("act", tuple(ACTIVATIONS)),
        ):
            if getattr(self, name) not in accepted:
                raise unknown(f"{name} of ncsnpp", getattr(self, name), accepted)
        positive("ncsnpp", self, "num_classes", "out_channels", "noise_width", "groups")
        if not self.conditional and (self.num_classes or self.augment):
            raise ValueError("an ncsnpp that is not conditional takes no classes and no augment")
        if self.sigmas is not None and not (
            0 < self.sigmas[0] < self.sigmas[1] and self.sigmas[2] > 1
        ):
            raise ValueError(
                f"sigmas of ncsnpp are 0 < sigma_min < sigma_max and N > 1, not {self.sigmas}"
            )
        if self.scale_by_sigma and self.sigmas is None and self.embedding != "log-fourier":
            raise ValueError(
                "scale_by_sigma needs the noise level: embedding 'log-fourier', or sigmas"
            )
