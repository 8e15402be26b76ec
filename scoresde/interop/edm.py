r"""Network pickles of EDM and EDM2: ``network-snapshot-*.pkl``.

The network is a preconditioned denoiser ``D(x; sigma) = c_skip x + c_out F(c_in x, c_noise)`` on
``x = x_0 + sigma eps``, whichever process it was trained on, so that each becomes a model on the
:class:`~scoresde.EDM` process, and its preconditioning the parameterization:

    VP      eps_hat =  F(x / sqrt(sigma^2 + 1), 999 t(sigma)),     t the time of VP(0.1, 20)
    VE      eps_hat = -F(x, log(sigma/2))
    iDDPM   eps_hat =  F(x / sqrt(sigma^2 + 1), nearest step)
    EDM     :class:`~scoresde.Karras`, told log(sigma)/4

Noise levels run over those the network knows, within EDM's own 0.002 to 80.

Source: Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022),
table 1, https://arxiv.org/abs/2206.00364.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..allowance import no_larger
from ..checkpoint import CheckpointError, fit
from ..data.scaler import Scaler
from ..inert import Persistent, init_args, state_dict
from ..model import ScoreModel
from ..noise_labels import LogNoise, NearestStep, Time
from ..parameterization import Eps, Karras, Parameterization, ScaledScore
from ..sde import EDM, VP
from . import dhariwal, edm2, song_unet
from .foreign import Foreign

LEVELS = 256
SMALLEST, LARGEST = 0.002, 80.0
"""Noise levels of EDM's own sampler."""
POSITIONAL = ("img_resolution", "img_channels", "label_dim")
"""Arguments that the original may be given without a name."""


def claims(content: Any) -> bool:
    """Whether this is a snapshot of EDM or EDM2: a network under ``ema``, or the network."""
    return isinstance(of(content), Persistent)


def of(content: Any) -> Any:
    """The network in a snapshot."""
    return content.get("ema") if isinstance(content, Mapping) else content


def read(
    content: Any,
    file: Path,
    *,
    weights: str = "ema",
    config: Mapping[str, Any] | str | Path | None = None,
) -> Foreign:
    """The model of a snapshot, on the EDM process.

    Args:
        content: what the file holds.
        file: its path, for messages.
        weights: ``"ema"``; a snapshot holds no other.
        config: not needed: the file holds the arguments of its network.

    Raises:
        CheckpointError: for a network or an argument that is not known, or weights that do not
            fit it.
    """
    if weights != "ema":
        raise CheckpointError(f"{file} holds averaged weights only: ask for weights='ema'")
    outer = of(content)
    kwargs = arguments(outer, file)
    try:
        with no_larger(state_dict(outer), file):
            net, tensors = network(outer, kwargs)
            sde, parameterization = preconditioning(outer, kwargs)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error
    except KeyError as error:
        raise CheckpointError(f"{file} describes no network: it lacks {error}") from error
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file} describes no network: {error}") from error
    fit(net, {key: value.float() for key, value in tensors.items()}, file)
    model = ScoreModel(
        net,
        sde,
        parameterization,
        shape=net.shape,
        scaler=pictures(int(kwargs["img_channels"])),
        weights="ema",
    )
    kept = ("ema",) if isinstance(content, Mapping) else ()
    extra = [key for key in content if key not in kept] if kept else []
    unmapped = tuple(f"{key}: it concerns training alone" for key in extra)
    return Foreign(model, "EDM2" if outer.class_name == "Precond" else "EDM", unmapped)


def arguments(outer: Persistent, file: Path) -> dict[str, Any]:
    """The arguments of the preconditioned network, all by name."""
    kwargs = init_args(outer)
    kwargs.update(zip(POSITIONAL, kwargs.pop("_init_args", ()), strict=False))
    for name in ("img_resolution", "img_channels"):
        if type(kwargs.get(name)) is not int:
            raise CheckpointError(f"{file}: the network's {name} is not stored")
    return kwargs


def network(outer: Persistent, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """The network inside the preconditioning, untrained, and its weights under our names."""
    state = state_dict(outer)
    if outer.class_name == "Precond":
        return edm2.network(kwargs), edm2.tensors(state)
    inner = outer.state["_modules"].get("model")
    if not isinstance(inner, Persistent):
        raise CheckpointError(f"the {outer.class_name} holds no network")
    own = {key.removeprefix("model."): v for key, v in state.items() if key.startswith("model.")}
    own_kwargs = {"img_resolution": kwargs["img_resolution"], **init_args(inner)}
    known = {"SongUNet": song_unet.ARGUMENTS, "DhariwalUNet": dhariwal.ARGUMENTS}
    strange = sorted(set(own_kwargs) - set(known.get(inner.class_name, own_kwargs)))
    if strange:
        raise CheckpointError(
            f"unknown arguments of a {inner.class_name}: {', '.join(strange)}; known: "
            f"{', '.join(known[inner.class_name])}"
        )
    if inner.class_name == "SongUNet":
        net = song_unet.network(own_kwargs)
        return net, song_unet.tensors(own, net)
    if inner.class_name == "DhariwalUNet":
        return dhariwal.network(own_kwargs), dhariwal.tensors(own, own_kwargs)
    raise CheckpointError(
        f"its network is a {inner.class_name}; accepted: SongUNet, DhariwalUNet, EDM2's"
    )


def preconditioning(outer: Persistent, kwargs: Mapping[str, Any]) -> tuple[EDM, Parameterization]:
    """The process over the noise levels that the network knows, and what it predicts there."""
    kind, state = outer.class_name, outer.state

    def number(name: str, default: float) -> float:
        value = kwargs.get(name, state.get(name, default))
        if type(value) not in (int, float):
            raise CheckpointError(f"{name} is {value!r}; accepted: a number")
        return float(value)

    low, high = number("sigma_min", 0.0), number("sigma_max", float("inf"))
    predicts: Parameterization
    if kind in ("EDMPrecond", "Precond"):
        predicts = Karras(sigma_data=number("sigma_data", 0.5))
    elif kind == "VPPrecond":
        rate, first = number("beta_d", 19.9), number("beta_min", 0.1)
        label = Time(VP(first, first + rate), scale=number("M", 1000) - 1)
        # The original keeps the noise levels of its process as plain attributes.
        low, high = float(state.get("sigma_min", 2**-10)), float(state.get("sigma_max", 152.167))
        predicts = Eps(label=label)
    elif kind == "VEPrecond":
        low, high = number("sigma_min", 0.02), number("sigma_max", 100.0)
        predicts = ScaledScore(scale_input=False, label=LogNoise(scale=1.0, unit=2.0))
    elif kind == "iDDPMPrecond":
        steps = NearestStep(int(number("M", 1000)), number("C_1", 0.001), number("C_2", 0.008))
        checked(steps, state.get("_buffers", {}).get("u"))
        low, high = float(steps.levels[-2]), float(steps.levels[0])
        predicts = Eps(label=steps)
    else:
        raise CheckpointError(
            f"unknown preconditioning {kind}; accepted: VPPrecond, VEPrecond, "
            "iDDPMPrecond, EDMPrecond, Precond"
        )
    return EDM(max(low, SMALLEST), min(high, LARGEST)), predicts


def checked(steps: NearestStep, stored: Any) -> None:
    """Compares the table of noise levels with the one in the file.

    The original computes it in float32, whose rounding moves the smallest level by 5e-4 of itself.
    """
    if isinstance(stored, Tensor):
        same = stored.shape == steps.levels.shape and torch.allclose(
            stored.double(), steps.levels, rtol=1e-3, atol=1e-6
        )
        if not same:
            raise CheckpointError("its table of noise levels u is not that of its M, C_1 and C_2")


def pictures(channels: int) -> Scaler | None:
    """Eight-bit pictures to [-1, 1]; latents of four channels and more have no such map."""
    return Scaler((LEVELS / 2,), (2 / LEVELS,), LEVELS) if channels < 4 else None


__all__ = ["claims", "read"]
