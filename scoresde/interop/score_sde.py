r"""Checkpoints of score_sde_pytorch: ``checkpoint_N.pth`` and its configuration.

The file holds the raw weights, the averaged ones as a bare list in the order of the trained
parameters, and the optimizer; the configuration (ml_collections, as JSON) lies beside it.

The processes are those of Score-Based Generative Modeling through Stochastic Differential
Equations (Song et al., 2021), https://arxiv.org/abs/2011.13456. Networks trained on continuous
times are told ``999 t``, or the noise level (VE). Those trained on N steps become continuous
between the steps: ``log alpha`` (VP) or ``log sigma`` (VE) is linear in the step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..allowance import no_larger
from ..checkpoint import CheckpointError, fit
from ..data.scaler import Scaler
from ..model import ScoreModel
from ..nets.ncsnpp import NCSNpp
from ..noise_labels import NoiseLevel, Time
from ..parameterization import Eps, Parameterization, RawScore
from ..sde import DDPM, VE, VP, GaussianSDE, SubVP
from .foreign import Foreign, settings
from .options import Options
from .score_sde_keys import averaged, bare, ours

NAMES = ("config.json",)
LEVELS = 256
MOST_TAPS = 64
ACTIVATION = {"swish": "silu", "relu": "relu", "elu": "elu", "lrelu": "leaky-relu"}
WITHOUT_EFFECT = (
    "attention_type", "beta_max", "beta_min", "conv_size", "ema_rate", "embedding_type",
    "fir", "fir_kernel", "fourier_scale", "init_scale", "normalization", "num_scales",
    "progressive", "progressive_combine", "progressive_input", "resblock_type", "sigma_max",
    "sigma_min", "skip_rescale",
)  # fmt: skip
"""Settings that do not change an evaluation, or only that of other networks and processes."""


def claims(content: Any) -> bool:
    """Whether this is a checkpoint of score_sde_pytorch."""
    if not isinstance(content, Mapping) or not isinstance(content.get("model"), Mapping):
        return False
    return any(bare(str(key)).startswith("all_modules.") for key in content["model"])


def read(
    content: Mapping[str, Any],
    file: Path,
    *,
    weights: str = "ema",
    config: Mapping[str, Any] | str | Path | None = None,
) -> Foreign:
    """The model of a checkpoint.

    Args:
        content: what the file holds.
        file: its path, beside which ``config.json`` is looked for.
        weights: ``"ema"`` or ``"raw"``.
        config: the configuration, or its path, instead of the file beside.

    Raises:
        CheckpointError: if the configuration is missing or names what is not supported, or the
            weights do not fit the network that it describes.
    """
    options = Options(settings(file, NAMES, config), file)
    try:
        with no_larger(content["model"], file):
            net = network(options)
        sde, parameterization = process(options)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{file}: its configuration: {error}") from error
    raw = {bare(str(key)): value for key, value in content["model"].items()}
    for key, value in raw.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{file}: {key} is a {type(value).__name__}, not a tensor")
    if weights == "ema":
        raw = averaged(raw, content.get("ema"), file)
    if isinstance(sde, VE) and isinstance(parameterization.label, Time):
        same_steps(options, raw.get("sigmas"))
    tensors, left = ours(net, raw, file)
    fit(net, tensors, file)
    model = ScoreModel(
        net,
        sde,
        parameterization,
        shape=net.shape,
        scaler=scaler(options.flag("data.centered", False)),
        weights=weights,
    )
    unmapped = [f"{key}: the network does not use it" for key in left]
    unmapped += [f"setting {name}: not known" for name in options.strange(WITHOUT_EFFECT)]
    if "optimizer" in content:
        unmapped.append("optimizer: its state is that of another trainer")
    return Foreign(model, "score_sde_pytorch", tuple(unmapped))


def network(options: Options) -> NCSNpp:
    """The untrained network that a configuration describes."""
    size, channels = options.whole("data.image_size"), options.whole("data.num_channels")
    multipliers = options.row("model.ch_mult")
    listed = set(options.row("model.attn_resolutions", (16,)))
    if size % 2 ** max(len(multipliers) - 1, 0):
        raise CheckpointError(
            f"{options.file}: data.image_size is {size}, which {len(multipliers)} levels of "
            "model.ch_mult cannot halve"
        )
    shared = {
        "shape": (channels, size, size),
        "width": options.whole("model.nf"),
        "multipliers": multipliers,
        "blocks": options.whole("model.num_res_blocks"),
        "attention": tuple(i for i in range(len(multipliers)) if size >> i in listed),
        "resample_conv": options.flag("model.resamp_with_conv", True),
        "act": options.choice("model.nonlinearity", ACTIVATION, "swish"),
        "dropout": options.number("model.dropout", 0.0),
        "conditional": options.flag("model.conditional", True),
        "center_input": not options.flag("data.centered", False),
        "scale_by_sigma": options.flag("model.scale_by_sigma", False),
    }
    if options.choice("model.name", {"ncsnpp": False, "ddpm": True}):
        own = {"resblock": "ddpm", "skip_rescale": False, "groups": 32, "embedding": "positional"}
    else:
        pyramid = {"none": "none", "residual": "residual"}
        embeddings = {"fourier": "log-fourier", "positional": "positional"}
        taps = tuple(float(v) for v in options.row("model.fir_kernel", (1, 3, 3, 1), whole=False))
        fir = options.flag("model.fir", False)
        if fir and (not 2 <= len(taps) <= MOST_TAPS or not 0 < abs(sum(taps)) < math.inf):
            raise CheckpointError(
                f"{options.file}: model.fir_kernel is {taps[:8]}; accepted: 2 to {MOST_TAPS} "
                "numbers whose sum is finite and not 0"
            )
        own = {
            "resblock": options.choice(
                "model.resblock_type", {"biggan": "biggan", "ddpm": "ddpm"}, "biggan"
            ),
            "taps": taps if fir else None,
            "input_pyramid": options.choice(
                "model.progressive_input", {**pyramid, "input_skip": "skip"}, "none"
            ),
            "output_pyramid": options.choice(
                "model.progressive", {**pyramid, "output_skip": "skip"}, "none"
            ),
            "combine": options.choice(
                "model.progressive_combine", {"sum": "sum", "cat": "cat"}, "sum"
            ),
            "embedding": options.choice("model.embedding_type", embeddings, "fourier"),
            "fourier_scale": options.number("model.fourier_scale", 16),
            "skip_rescale": options.flag("model.skip_rescale", True),
        }
    if own["embedding"] == "log-fourier":
        own["noise_width"] = 2 * options.whole("model.nf")
    elif shared["scale_by_sigma"]:
        own["sigmas"] = (*levels(options), options.whole("model.num_scales", 1000))
    return NCSNpp(**{**shared, **own})


def levels(options: Options) -> tuple[float, float]:
    """``(sigma_min, sigma_max)`` of the VE process."""
    return options.number("model.sigma_min", 0.01), options.number("model.sigma_max", 50.0)


def same_steps(options: Options, stored: Any) -> None:
    """Compares the noise levels of the steps with those in the file, the largest first."""
    low, high = levels(options)
    ends = math.log(high), math.log(low)
    table = torch.linspace(*ends, options.whole("model.num_scales", 1000), dtype=torch.float64)
    if isinstance(stored, Tensor) and (
        stored.shape != table.shape or not torch.allclose(stored.double(), table.exp(), rtol=1e-4)
    ):
        raise CheckpointError(
            f"{options.file}: its noise levels (sigmas) are not those of model.sigma_min, "
            "model.sigma_max and model.num_scales"
        )


def process(options: Options) -> tuple[GaussianSDE, Parameterization]:
    """The process of a configuration, and what its network predicts there."""
    n = options.whole("model.num_scales", 1000)
    kind = options.choice("training.sde", {"vpsde": "vp", "subvpsde": "subvp", "vesde": "ve"})
    continuous = options.flag("training.continuous", True)
    fourier = options("model.embedding_type", "fourier") == "fourier"
    if fourier and not continuous and kind != "subvp" and options("model.name") == "ncsnpp":
        raise CheckpointError(
            f"{options.file}: model.embedding_type 'fourier' needs training.continuous"
        )
    if kind == "ve":
        low, high = levels(options)
        ve = VE(low, high)
        label = NoiseLevel() if continuous else Time(ve, scale=1.0 - n, offset=n - 1.0)
        return ve, RawScore(scale_input=False, label=label)
    rates = options.number("model.beta_min", 0.1), options.number("model.beta_max", 20.0)
    if kind == "vp" and not continuous:
        first = 1 / n
        table = DDPM(n, rates[0] / n, rates[1] / n, t_min=first, t_min_sampling=first,
                     t_min_likelihood=first)  # fmt: skip
        return table, Eps(scale_input=False, label=Time(table, scale=n, offset=-1.0))
    sde = VP(*rates) if kind == "vp" else SubVP(*rates)
    return sde, Eps(scale_input=False, label=Time(sde, scale=999.0))


def scaler(centered: bool) -> Scaler:
    """Eight-bit pictures to [-1, 1], or to [0, 1]."""
    if centered:
        return Scaler((LEVELS / 2,), (2 / LEVELS,), LEVELS)
    return Scaler((0.0,), (1 / LEVELS,), LEVELS)


__all__ = ["claims", "read"]
