"""What a floating-point type resolves, and which one a device has.

Schedules and clocks are float64 on the CPU everywhere. States and times on a device are float64 by
choice, and float32 where it has no float64 (MPS); there, and wherever float32 is chosen, an
adaptive method is held to no less than ``FLOOR`` and says so.
"""

from __future__ import annotations

import warnings

import torch

FLOOR = {torch.float32: 1e-6, torch.float64: 1e-14}
"""Smallest tolerance of a step, relative and absolute, that a state of this type resolves."""
WITHOUT_FLOAT64 = ("mps",)
"""Kinds of devices that compute in float32 at best."""


def name_of(dtype: torch.dtype) -> str:
    """``"float32"`` and the like."""
    return str(dtype).removeprefix("torch.")


def widest(device: torch.device) -> torch.dtype:
    """The most precise type of a device: float64, or float32 where it has none."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def supported(dtype: torch.dtype, device: torch.device | str) -> torch.dtype:
    """``dtype``, or float32 with a warning where the device has no float64."""
    device = torch.device(device)
    if dtype == torch.float64 and widest(device) != dtype:
        warnings.warn(
            f"{device.type} has no float64: the state is kept in float32, "
            f"which resolves tolerances down to {FLOOR[torch.float32]:g}",
            stacklevel=3,
        )
        return torch.float32
    return dtype


def tolerance(value: float, dtype: torch.dtype) -> float:
    """``value``, or the floor of ``dtype`` with a warning where it is smaller."""
    floor = FLOOR[dtype]
    if value < floor:
        warnings.warn(
            f"a tolerance of {value:g} is below what {name_of(dtype)} resolves: {floor:g} is used"
            + ("; a float64 state resolves more" if dtype == torch.float32 else ""),
            stacklevel=3,
        )
        return floor
    return value
