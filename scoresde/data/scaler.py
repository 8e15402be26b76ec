"""The one map between data and model: affine, invertible, with a known log-determinant.

    model = (data - shift) * scale
    log p_data = log p_model + log|d model / d data|

Whole levels `k = 0..levels-1` become a density by uniform dequantisation, `data = k + u` with
`u ~ U[0, 1)`: then `log p_data` is a lower bound of the probability of `k` when averaged over
`u` (Theis, van den Oord, Bethge, "A note on the evaluation of generative models", 2016,
https://arxiv.org/abs/1511.01844), and with `log_det` in nats over D entries

    bits/dim = -(log p_model + log_det) / (D ln 2)

A density uniform over [-1, 1] at 256 levels is exactly 8 bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde.data.dataset import MAX_LEVELS, DataError, Dataset, level_dtype
from scoresde.data.source import Source
from scoresde.noise import NoiseSource, uniform

MODES = ("auto", "range", "standardize", "standardize-per-dim", "none")
PROBED = 5000  # items


@dataclass(frozen=True)
class Scaler:
    """The map `model = (data - shift) * scale`, where discrete `data` is `k + u`, `u ~ U[0, 1)`.

    Args:
        shift: one value, or one an entry of the first data axis (the channels of a picture or
            signal, the entries of a vector), in units of the data.
        scale: likewise, not zero, in model units a data unit.
        levels: number of discrete levels, None for continuous data.

    Raises:
        DataError: a zero or non-finite entry, lengths that disagree, or impossible levels.
    """

    shift: tuple[float, ...] = (0.0,)
    scale: tuple[float, ...] = (1.0,)
    levels: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shift", tuple(float(v) for v in self.shift))
        object.__setattr__(self, "scale", tuple(float(v) for v in self.scale))
        if not self.shift or not self.scale or not all(map(math.isfinite, self.shift)):
            raise DataError(f"scaler: shift must be one or more finite values, not {self.shift}")
        if not all(math.isfinite(v) and v != 0 for v in self.scale):
            raise DataError(f"scaler: scale must be finite and not zero, not {self.scale}")
        if len({len(self.shift), len(self.scale)} - {1}) > 1:
            raise DataError(
                f"scaler: {len(self.shift)} shifts and {len(self.scale)} scales; "
                "give one, or as many of both"
            )
        if self.levels is not None and not 2 <= self.levels <= MAX_LEVELS:
            raise DataError(f"scaler: levels is {self.levels}; it must be 2 to {MAX_LEVELS}")

    @classmethod
    def fit(cls, dataset: Source, mode: str = "auto") -> Scaler:
        """The scaler that suits a data set; continuous data not held in memory by a probe of it.

        Discrete data always goes by its levels, `[0, levels] -> [-1, 1]`. Continuous data:
        "range" takes the global minimum and maximum to [-1, 1]; "standardize" gives it mean 0
        and standard deviation 1 over all entries, "standardize-per-dim" in each entry of the
        first data axis; "none" leaves it. "auto" is "standardize-per-dim" for vectors,
        "standardize" for other shapes. Where nothing varies the scale is 1.

        Raises:
            DataError: an unknown mode.
        """
        if mode not in MODES:
            raise DataError(f"scaler: mode {mode!r} is not one of {', '.join(MODES)}")
        if dataset.levels is not None:
            return cls((dataset.levels / 2,), (2 / dataset.levels,), dataset.levels)
        if mode == "auto":
            mode = "standardize-per-dim" if len(dataset.shape) == 1 else "standardize"
        if mode == "none":
            return cls()
        x = dataset.x if isinstance(dataset, Dataset) else dataset.probe(PROBED)
        if mode == "range":
            low, high = float(x.min()), float(x.max())
            return cls(((low + high) / 2,), (2 / (high - low) if high > low else 1.0,))
        per_dim = mode == "standardize-per-dim"
        rows = x.double().transpose(0, 1).flatten(1 if per_dim else 0)
        rows = rows if per_dim else rows[None]  # (d, values)
        std, mean = torch.std_mean(rows, dim=1, correction=0)
        varies = std > torch.finfo(torch.float32).eps * mean.abs()
        scale = torch.where(varies, 1 / std, torch.ones_like(std))
        return cls(tuple(mean.tolist()), tuple(scale.tolist()))

    def _along(self, values: tuple[float, ...], x: Tensor) -> Tensor:
        """`values` shaped to broadcast against `x`, `(B, *shape)`, along its first data axis."""
        if len(values) > 1 and (x.ndim < 2 or x.shape[1] != len(values)):
            raise DataError(
                f"scaler: it holds {len(values)} entries for the first data axis; "
                f"a batch of shape {tuple(x.shape)} does not have as many"
            )
        if len(values) == 1:
            return x.new_full((), values[0])  # no copy from the host, which a device waits for
        rows = torch.tensor(values, dtype=x.dtype).to(x.device, non_blocking=True)
        return rows.reshape(-1, *[1] * (x.ndim - 2))

    def encode(
        self,
        x: Tensor,
        noise: Tensor | None = None,
        generator: NoiseSource | None = None,
        dequantize: bool = True,
    ) -> Tensor:
        """Take data to the model's range, `(x + u - shift) * scale`.

        For discrete data `u` is `noise`, else drawn with `generator`, else (`dequantize=False`)
        1/2. It is kept `2 levels eps` inside [0, 1], so that rounding never moves an item to the
        next level and `decode` returns it exactly. Continuous data has no `u`.

        Args:
            x: data, `(B, *shape)`.
            noise: uniform in [0, 1), `(B, *shape)`.

        Returns:
            `(B, *shape)`, float64 if `x` is, else float32.

        Raises:
            DataError: values that are no levels, or noise of another shape or range.
        """
        data = x if x.dtype == torch.float64 else x.float()
        if self.levels is not None:
            if x.is_floating_point() and not (x == x.floor().clamp(0, self.levels - 1)).all():
                raise DataError(f"scaler: discrete data must be whole levels 0..{self.levels - 1}")
            margin = 2 * self.levels * torch.finfo(data.dtype).eps
            data = data + self._noise(data, noise, generator, dequantize).clamp(margin, 1 - margin)
        return (data - self._along(self.shift, data)) * self._along(self.scale, data)

    @staticmethod
    def _noise(
        data: Tensor, noise: Tensor | None, generator: NoiseSource | None, dequantize: bool
    ) -> Tensor:
        if not dequantize:
            return torch.full_like(data, 0.5)
        if noise is None:
            return uniform(data.shape, generator, device=data.device, dtype=data.dtype)
        if noise.shape != data.shape or not ((noise >= 0) & (noise < 1)).all():
            raise DataError(
                f"scaler: noise must be uniform in [0, 1) and of the data's shape "
                f"{tuple(data.shape)}, not of {tuple(noise.shape)}"
            )
        return noise.to(data)

    def decode(self, z: Tensor) -> Tensor:
        """Take the model's range to data, `z / scale + shift`.

        Args:
            z: `(B, *shape)`.

        Returns:
            `(B, *shape)`: whole levels (floor, clamped; uint8, or int64 above 256 levels) for
            discrete data, else floating point.
        """
        z = z if z.dtype == torch.float64 else z.float()
        data = z / self._along(self.scale, z) + self._along(self.shift, z)
        if self.levels is None:
            return data
        return data.floor().clamp(0, self.levels - 1).to(level_dtype(self.levels))

    def difference(self, z: Tensor) -> Tensor:
        """Take a difference in model range to units of the data, `z / scale`, `(B, *shape)`."""
        return z / self._along(self.scale, z)

    def log_det(self, shape: tuple[int, ...]) -> float:
        """`log|d model / d data|` of one item of `shape`, the sum of `log|scale|`, in nats.

        Raises:
            DataError: `shape` does not have one entry a scale on its first axis.
        """
        if len(self.scale) > 1 and (not shape or shape[0] != len(self.scale)):
            raise DataError(
                f"scaler: it holds {len(self.scale)} entries for the first data axis; "
                f"shape {tuple(shape)} does not have as many"
            )
        logs = sum(math.log(abs(v)) for v in self.scale)
        return logs * math.prod(shape) / len(self.scale)

    def image(self, z: Tensor) -> Tensor:
        """The model's range as grey or colour values 0..255, uint8, `(B, *shape)`.

        Discrete data: the decoded levels stretched to 0..255. Continuous: `[-1, 1]`, clamped.
        """
        if self.levels is None:
            return ((z.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return (self.decode(z).float() * 255 / (self.levels - 1)).round().to(torch.uint8)
