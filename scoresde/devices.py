"""Devices by name. Nothing at the top imports torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .config import ConfigError

if TYPE_CHECKING:
    import torch


def pick_device(name: str, local_rank: int | None = None) -> torch.device:
    """The device of that name, ``auto`` being the best there is.

    Args:
        name: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        local_rank: under a launcher, the number of the process on its machine: ``auto`` and
            ``cuda`` then mean the GPU of this number.

    Raises:
        ConfigError: if it is no device, or is not there.
    """
    import torch

    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
        name = "cuda"
    try:
        found = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            f"unknown device {name!r}; accepted: auto, cpu, cuda, cuda:N, mps"
        ) from error
    if found.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"unknown device {name!r}; accepted: auto, cpu, cuda, cuda:N, mps")
    if found.type == "cuda" and found.index is None and local_rank is not None:
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"process {local_rank} of this machine has no GPU: torch sees "
                f"{torch.cuda.device_count()} CUDA devices, and each process needs its own"
            )
        return torch.device("cuda", local_rank)
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"no device {name!r}: torch sees {torch.cuda.device_count()} CUDA devices"
        )
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("no device 'mps': torch sees no Apple GPU")
    return found
