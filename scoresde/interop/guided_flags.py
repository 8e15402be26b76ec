"""Flags of improved- and guided-diffusion, whose values may be strings as on a command line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import CheckpointError
from .foreign import settings

FILES = ("flags.json", "config.json")
USED = (
    "image_size",
    "large_size",
    "small_size",
    "num_channels",
    "num_res_blocks",
    "channel_mult",
    "learn_sigma",
    "class_cond",
    "attention_resolutions",
    "num_heads",
    "num_head_channels",
    "num_heads_upsample",
    "use_scale_shift_norm",
    "resblock_updown",
    "use_new_attention_order",
    "conv_resample",
    "dropout",
    "diffusion_steps",
    "noise_schedule",
    "rescale_timesteps",
    "predict_xstart",
    "timestep_respacing",
)
QUIET = (
    "use_fp16",
    "use_checkpoint",
    "use_kl",
    "rescale_learned_sigmas",
    "sigma_small",
    "lr",
    "weight_decay",
    "lr_anneal_steps",
    "batch_size",
    "microbatch",
    "ema_rate",
    "log_interval",
    "save_interval",
    "resume_checkpoint",
    "fp16_scale_growth",
    "schedule_sampler",
    "data_dir",
    "model_path",
    "classifier_path",
    "classifier_scale",
    "classifier_use_fp16",
    "classifier_width",
    "classifier_depth",
    "classifier_attention_resolutions",
    "classifier_use_scale_shift_norm",
    "classifier_resblock_updown",
    "classifier_pool",
    "num_samples",
    "use_ddim",
    "clip_denoised",
    "base_name",
)
"""Flags of training, sampling and the classifier, without effect on the network's output."""
WORDS = {"true": True, "yes": True, "t": True, "y": True, "1": True}
WORDS |= {"false": False, "no": False, "f": False, "n": False, "0": False}


@dataclass(frozen=True)
class Flags:
    """The original's flags, whose values may be strings, as on its command line."""

    values: Mapping[str, Any]
    file: Path

    @classmethod
    def beside(cls, file: Path, config: Mapping[str, Any] | str | Path | None) -> Flags:
        """The flags given, or in a file beside the checkpoint.

        Raises:
            CheckpointError: if there are none, saying which are needed.
        """
        if config is None and not any((file.parent / name).is_file() for name in FILES):
            raise CheckpointError(
                f"{file} holds no flags: put {' or '.join(FILES)} beside it, or pass config=, "
                "with image_size and all that is not the default of num_heads, num_head_channels, "
                "use_new_attention_order, noise_schedule, diffusion_steps, rescale_timesteps and "
                "predict_xstart"
            )
        return cls(settings(file, FILES, config), file)

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def wrong(self, name: str, wanted: str) -> CheckpointError:
        """The error for a value that is none."""
        return CheckpointError(
            f"flags of {self.file}: {name} must be {wanted}, got {self.values[name]!r}"
        )

    def number(self, name: str, default: float) -> float:
        """A number."""
        value = self.values.get(name)
        if value is None:
            return default
        try:
            return float(value if not isinstance(value, bool) else "a bool")
        except (TypeError, ValueError):
            raise self.wrong(name, "a number") from None

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int:
        """A whole number, ``-1`` where it is the default, else at least ``least``."""
        if name not in self and default is None:
            raise CheckpointError(f"flags of {self.file} lack {name}, which no tensor tells")
        value = self.number(name, default or 0)
        if value != value // 1 or (value < least and value != default):
            raise self.wrong(name, f"a whole number of at least {least}")
        return int(value)

    def boolean(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.values.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or str(value).lower() in WORDS:
            return value if isinstance(value, bool) else WORDS[str(value).lower()]
        raise self.wrong(name, "true or false")

    def word(self, name: str, accepted: tuple[str, ...], default: str) -> str:
        """One of the accepted words."""
        value = self.values.get(name, default)
        if value not in accepted:
            raise self.wrong(name, " or ".join(accepted))
        return str(value)

    def numbers(self, name: str) -> list[float] | None:
        """The numbers of a list, or of a string with commas between them; None if not given."""
        value = self.values.get(name)
        if value is None:
            return None
        parts = [p for p in value.split(",") if p.strip()] if isinstance(value, str) else value
        try:
            found = [float(part) for part in parts]
        except (TypeError, ValueError):
            found = [math.nan]
        if not all(map(math.isfinite, found)):
            raise self.wrong(name, "numbers with commas between them")
        return found

    def agree(self, name: str, given: Any, told: Any, key: str) -> None:
        """Refuses a flag that is given and contradicted by a tensor."""
        if name in self and given != told:
            raise CheckpointError(
                f"{self.file} does not fit its flags: {name} is {self.values[name]!r}, "
                f"but by {key} it is {told!r}"
            )

    def unmapped(self) -> list[str]:
        """Flags that are not used, each with the reason."""
        found = []
        if self.values.get("timestep_respacing"):
            steps = self.values["timestep_respacing"]
            found.append(f"timestep_respacing={steps}: the steps are chosen where one samples")
        for name in self.values:
            if name not in USED and name not in QUIET:
                found.append(f"{name}: unknown flag, ignored")
        return found
