"""Schedulers of diffusers: their tables as processes, and processes as their configurations.

Most schedulers sample one and the same process, a table of ``beta``, whatever their method: their
configuration gives the table and what the network predicts. The network's label is the step, 0 to
N - 1, which on the time axis of :class:`~scoresde.DDPM` is the point (step + 1)/N. The settings
of the method are not part of a model. ``ScoreSdeVeScheduler`` is the process VE; its networks are
told the noise level and give the score of data in [0, 1].

A table whose last step is rescaled to carry no signal has no finite log-SNR there: its last
``alpha_bar`` is a quarter of the one before here, at most 2^-24.

Source: fields, defaults and conventions are those that diffusers 0.42 shows,
https://huggingface.co/docs/diffusers/api/schedulers/overview; the rescaling: Common Diffusion
Noise Schedules and Sample Steps are Flawed (Lin et al., 2024), https://arxiv.org/abs/2305.08891.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..files import CheckpointError
from ..noise_labels import NoiseLevel, Time
from ..parameterization import X0, Eps, Parameterization, RawScore, V
from ..sde import DDPM, VE
from ..sde.base import GaussianSDE

TABLES = (
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
"""Schedulers of a table of ``beta``."""
EXPLODING = "ScoreSdeVeScheduler"

SCHEDULES = {
    "linear": "linear",
    "scaled_linear": "scaled-linear",
    "squaredcos_cap_v2": "cosine",
    "sigmoid": "sigmoid",
}
PREDICTIONS: dict[str, type[Parameterization]] = {
    "epsilon": Eps,
    "sample": X0,
    "v_prediction": V,
}
OTHER = {
    "DPMSolverSDEScheduler": {"beta_start": 0.00085, "beta_end": 0.012},
    "HeunDiscreteScheduler": {"beta_start": 0.00085, "beta_end": 0.012},
    "KDPM2AncestralDiscreteScheduler": {"beta_start": 0.00085, "beta_end": 0.012},
    "KDPM2DiscreteScheduler": {"beta_start": 0.00085, "beta_end": 0.012},
}
"""Defaults that differ from those of the other schedulers."""
REFUSED = {"use_flow_sigmas": False, "timestep_type": "discrete", "shift_terminal": None}
"""Settings that would make another process or label, at the values that do not."""
METHOD = (
    "variance_type",
    "clip_sample",
    "thresholding",
    "snr",
    "timestep_spacing",
    "solver_order",
)
"""Settings of the method that a user may want to choose again."""


def process(config: Mapping[str, Any]) -> tuple[GaussianSDE, Parameterization]:
    """The process and the meaning of the network's output that a configuration describes.

    Args:
        config: ``scheduler_config.json``, with its ``_class_name``.

    Raises:
        CheckpointError: for another scheduler, or a value that is no process of ours.
    """
    name = config.get("_class_name")
    try:
        if name == EXPLODING:
            least = config.get("sampling_eps", 1e-5)
            sde = VE(
                config.get("sigma_min", 0.01), config.get("sigma_max", 1348.0),
                t_min=min(least, 1e-5), t_min_sampling=least, t_min_likelihood=least,
            )  # fmt: skip
            return sde, RawScore(scale_input=False, label=NoiseLevel())
        if name not in TABLES:
            raise CheckpointError(
                f"unknown scheduler {name!r}; accepted: {', '.join(TABLES)}, {EXPLODING}"
            )
        for key, plain in REFUSED.items():
            if config.get(key, plain) != plain:
                raise CheckpointError(f"{key} of {name} is {config[key]!r}, accepted: {plain}")
        predicts = config.get("prediction_type", "epsilon")
        if predicts not in PREDICTIONS:
            raise CheckpointError(
                f"prediction_type of {name} is {predicts!r}, accepted: {', '.join(PREDICTIONS)}"
            )
        table = _table(name, config)
    except (ValueError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"the configuration of {name}: {error}") from error
    label = Time(table, float(table.num_steps), -1.0)
    return table, PREDICTIONS[predicts](scale_input=False, label=label)


def method(config: Mapping[str, Any]) -> str:
    """The settings of the method in a configuration, in words, empty where there are none."""
    return ", ".join(f"{key}={config[key]}" for key in METHOD if key in config)


def _table(name: str, config: Mapping[str, Any]) -> DDPM:
    count = config.get("num_train_timesteps", 1000)
    given, rule = config.get("trained_betas"), config.get("beta_schedule", "linear")
    fields: dict[str, Any] = {}
    if given is not None:
        fields = {"betas": tuple(given)}
        count = len(given)
    elif rule not in SCHEDULES:
        raise CheckpointError(
            f"beta_schedule of {name} is {rule!r}, accepted: {', '.join(SCHEDULES)}"
        )
    else:
        plain = {"beta_start": 1e-4, "beta_end": 0.02, **OTHER.get(name, {})}
        fields = {key: config.get(key, value) for key, value in plain.items()}
        fields |= {"num_steps": count, "schedule": SCHEDULES[rule]}
    if not isinstance(count, int) or count < 2:
        raise CheckpointError(f"{name} has a table of {count!r} steps, accepted: 2 and more")
    times = dict.fromkeys(("t_min", "t_min_sampling", "t_min_likelihood"), 1 / count)
    if config.get("rescale_betas_zero_snr"):
        fields = {"betas": _rescaled(DDPM(**fields))}
    return DDPM(**fields | times)


def _rescaled(table: DDPM) -> tuple[float, ...]:
    """The betas whose ``sqrt(alpha_bar)`` is moved and scaled from ``a_N`` to nearly zero."""
    count = table.num_steps
    a = table.alpha(torch.arange(1, count + 1, dtype=torch.float64) / count)
    a = (a - a[-1]) * a[0] / (a[0] - a[-1])
    bars = a**2
    bars[-1] = torch.minimum(bars[-2] / 4, bars.new_tensor(2.0**-24))
    return _betas(bars)


def _betas(bars: Tensor) -> tuple[float, ...]:
    """``beta_i = 1 - alpha_bar_i / alpha_bar_{i-1}``."""
    return tuple((1 - bars / torch.cat([bars.new_ones(1), bars[:-1]])).tolist())


def configuration(
    sde: GaussianSDE, parameterization: Parameterization, *, learned: bool = False
) -> dict[str, Any]:
    """``scheduler_config.json`` of a process and the meaning of a network's output.

    A variance-preserving process becomes the table of its marginals at the labels 0, 1, ..., N-1,
    whichever process the labels come from; the first is taken at ``t_min`` where its own time
    would carry no noise.

    Args:
        sde: process of the model.
        parameterization: what its network predicts.
        learned: whether the network also predicts the variance.

    Raises:
        CheckpointError: if no scheduler has such a process, label or output.
    """
    label = parameterization.label
    plain = not parameterization.scale_input
    if isinstance(sde, VE) and isinstance(label, NoiseLevel):
        if type(parameterization) is not RawScore or not plain:
            raise CheckpointError(
                f"diffusers' {EXPLODING} needs a network that gives the score of unscaled inputs, "
                "RawScore(scale_input=False)"
            )
        return {
            "_class_name": EXPLODING,
            "sigma_min": sde.sigma_min,
            "sigma_max": sde.sigma_max,
            "sampling_eps": sde.t_min_sampling,
            "snr": sde.langevin_snr,
            "num_train_timesteps": 2000,
            "correct_steps": 1,
        }
    predictions = {cls: key for key, cls in PREDICTIONS.items()}
    if type(parameterization) not in predictions:
        raise CheckpointError(
            f"no scheduler of diffusers has networks of {type(parameterization).__name__}; "
            "accepted: Eps, X0, V, and RawScore for VE"
        )
    for preserving in (sde, getattr(label, "sde", None)):
        if preserving is None or not _preserves_variance(preserving):
            raise CheckpointError(
                f"no scheduler of diffusers has the process {type(sde).__name__} with labels "
                f"{type(label).__name__}; accepted: a variance-preserving process with Time, and "
                "VE with NoiseLevel"
            )
    if not (plain or parameterization.sigma_data == 1):
        raise CheckpointError(
            "the schedulers of diffusers do not scale the input; accepted: scale_input False, or "
            "sigma_data 1, where it is of unit variance by itself"
        )
    return {
        "_class_name": "DDPMScheduler",
        **_fields_of_table(label),
        "prediction_type": predictions[type(parameterization)],
        "variance_type": "learned_range" if learned else "fixed_small",
        "clip_sample": False,
    }


def _preserves_variance(sde: GaussianSDE) -> bool:
    t = torch.linspace(sde.t_min, sde.t_max, 9, dtype=torch.float64)
    return bool((sde.alpha(t) ** 2 + sde.sigma(t) ** 2 - 1).abs().max() < 1e-9)


def _fields_of_table(label: Time) -> dict[str, Any]:
    """The table at whole labels: by its rule where it has one, else number by number."""
    sde = label.sde
    count = round(label.scale + label.offset) + 1
    whole = label.scale + label.offset == count - 1 and count > 1
    first = -label.offset / label.scale
    exact = isinstance(sde, DDPM) and (sde.num_steps, count - 1) == (label.scale, label.scale - 1)
    if exact and sde.betas is None:
        rules = {ours: theirs for theirs, ours in SCHEDULES.items()}
        return {
            "num_train_timesteps": sde.num_steps,
            "beta_start": sde.beta_start,
            "beta_end": sde.beta_end,
            "beta_schedule": rules[sde.schedule],
        }
    if exact:
        return {"num_train_timesteps": count, "trained_betas": list(sde.betas)}
    # The step 0 of a process in continuous time would carry no noise: it is taken at t_min, whose
    # label must be that of the step but for a hundredth.
    if not whole or sde.t_max < 1 or (sde.t_min - first) * label.scale > 0.0101:
        raise CheckpointError(
            f"no scheduler of diffusers has the labels {label.scale:g} t {label.offset:+g} of "
            f"{type(sde).__name__} from t = {sde.t_min:g} to {sde.t_max:g}; accepted: whole "
            "numbers from 0 at t_min to the last at t = 1"
        )
    t = (torch.arange(count, dtype=torch.float64) - label.offset) / label.scale
    bars = torch.sigmoid(2 * sde.log_snr(t.clamp(sde.t_min, sde.t_max)))
    return {"num_train_timesteps": count, "trained_betas": list(_betas(bars))}
