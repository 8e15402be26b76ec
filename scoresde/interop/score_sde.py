r"""Checkpoints of score_sde_pytorch: ``checkpoint_N.pth`` and its configuration.

The file holds the raw weights, the averaged ones as a bare list in the order of the trained
parameters, and the optimizer; the configuration (ml_collections, as JSON) lies beside it. The
weights are those of one list of modules, numbered in the order in which the network is built:

    [Fourier], [Linear, Linear], stem, each level of the encoder, middle, of the decoder, [head]

The processes are those of Score-Based Generative Modeling through Stochastic Differential
Equations (Song et al., 2021), https://arxiv.org/abs/2011.13456. Networks trained on continuous
times are told ``999 t``, or the noise level (VE). Those trained on N steps become continuous
between the steps: ``log alpha`` (VP) or ``log sigma`` (VE) is linear in the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import CheckpointError, fit
from ..data.scaler import Scaler
from ..model import ScoreModel
from ..nets.layers import Attention, Downsample, ResBlock, Upsample, typed
from ..nets.ncsnpp import NCSNpp
from ..noise_labels import NoiseLevel, Time
from ..parameterization import Eps, Parameterization, RawScore
from ..sde import DDPM, VE, VP, GaussianSDE, SubVP
from .foreign import Foreign, settings

NAMES = ("config.json",)
LEVELS = 256
ACTIVATION = {"swish": "silu", "relu": "relu", "elu": "elu", "lrelu": "leaky-relu"}
WITHOUT_EFFECT = (
    "attention_type", "beta_max", "beta_min", "conv_size", "ema_rate", "embedding_type",
    "fir", "fir_kernel", "fourier_scale", "init_scale", "normalization", "num_scales",
    "progressive", "progressive_combine", "progressive_input", "resblock_type", "sigma_max",
    "sigma_min", "skip_rescale",
)  # fmt: skip
"""Settings that do not change an evaluation, or only that of other networks and processes."""
RES = {
    "GroupNorm_0": "norm1",
    "Conv_0": "conv1",
    "Dense_0": "affine",
    "GroupNorm_1": "norm2",
    "Conv_1": "conv2",
    "Conv_2": "skip",
    "NIN_0": "skip",
}


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
    net = network(options)
    raw = {bare(str(key)): value for key, value in content["model"].items()}
    if weights == "ema":
        raw = averaged(raw, content.get("ema"), file)
    tensors, left = ours(net, raw, file)
    fit(net, tensors, file)
    sde, parameterization = process(options)
    model = ScoreModel(
        net,
        sde,
        parameterization,
        shape=net.shape,
        scaler=scaler(options("data.centered", False)),
        weights=weights,
    )
    unmapped = [f"{key}: the network does not use it" for key in left]
    unmapped += [f"setting {name}: not known" for name in options.strange()]
    if "optimizer" in content:
        unmapped.append("optimizer: its state is that of another trainer")
    return Foreign(model, "score_sde_pytorch", tuple(unmapped))


class Options:
    """Settings by dotted name; a nested mapping and a flat one with dotted keys are both read."""

    def __init__(self, values: Mapping[str, Any], file: Path) -> None:
        self.values, self.file = values, file
        self.asked: set[str] = set()

    def __call__(self, name: str, default: Any = None) -> Any:
        """The setting ``section.key``.

        Raises:
            CheckpointError: if it is missing and there is no default.
        """
        self.asked.add(name)
        section, _, key = name.partition(".")
        inner = self.values.get(section)
        if name in self.values:
            return self.values[name]
        if isinstance(inner, Mapping) and key in inner:
            return inner[key]
        if default is None:
            raise CheckpointError(f"{self.file}: the configuration lacks {name}")
        return default

    def strange(self) -> list[str]:
        """Settings of the network that nothing has asked for and that are not known."""
        inner = self.values.get("model")
        given = {f"model.{key}" for key in inner} if isinstance(inner, Mapping) else set()
        given |= {name for name in self.values if str(name).startswith("model.")}
        return sorted(given - self.asked - {f"model.{key}" for key in WITHOUT_EFFECT})

    def choice(self, name: str, accepted: Mapping[str, Any], default: Any = None) -> Any:
        """What an accepted value of a setting stands for."""
        value = str(self(name, default)).lower()
        if value not in accepted:
            raise CheckpointError(
                f"{self.file}: {name} is {value!r}; accepted: {', '.join(accepted)}"
            )
        return accepted[value]


def network(options: Options) -> NCSNpp:
    """The untrained network that a configuration describes."""
    size, channels = int(options("data.image_size")), int(options("data.num_channels"))
    multipliers = tuple(int(m) for m in options("model.ch_mult"))
    listed = {int(r) for r in options("model.attn_resolutions", (16,))}
    shared = {
        "shape": (channels, size, size),
        "width": int(options("model.nf")),
        "multipliers": multipliers,
        "blocks": int(options("model.num_res_blocks")),
        "attention": tuple(i for i in range(len(multipliers)) if size >> i in listed),
        "resample_conv": bool(options("model.resamp_with_conv", True)),
        "act": options.choice("model.nonlinearity", ACTIVATION, "swish"),
        "dropout": float(options("model.dropout", 0.0)),
        "conditional": bool(options("model.conditional", True)),
        "center_input": not options("data.centered", False),
        "scale_by_sigma": bool(options("model.scale_by_sigma", False)),
    }
    if options.choice("model.name", {"ncsnpp": False, "ddpm": True}):
        own = {"resblock": "ddpm", "skip_rescale": False, "groups": 32, "embedding": "positional"}
    else:
        pyramid = {"none": "none", "residual": "residual"}
        embeddings = {"fourier": "log-fourier", "positional": "positional"}
        taps = tuple(float(v) for v in options("model.fir_kernel", (1, 3, 3, 1)))
        own = {
            "resblock": options.choice(
                "model.resblock_type", {"biggan": "biggan", "ddpm": "ddpm"}, "biggan"
            ),
            "taps": taps if options("model.fir", False) else None,
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
            "fourier_scale": float(options("model.fourier_scale", 16)),
            "skip_rescale": bool(options("model.skip_rescale", True)),
        }
    if own["embedding"] == "log-fourier":
        own["noise_width"] = 2 * int(shared["width"])
    elif shared["scale_by_sigma"]:
        own["sigmas"] = (*levels(options), int(options("model.num_scales", 1000)))
    return NCSNpp(**{**shared, **own})


def levels(options: Options) -> tuple[float, float]:
    """``(sigma_min, sigma_max)`` of the VE process."""
    return float(options("model.sigma_min", 0.01)), float(options("model.sigma_max", 50.0))


def process(options: Options) -> tuple[GaussianSDE, Parameterization]:
    """The process of a configuration, and what its network predicts there."""
    n = int(options("model.num_scales", 1000))
    kind = options.choice(
        "training.sde", {"vpsde": "vp", "subvpsde": "subvp", "vesde": "ve"}, "vpsde"
    )
    continuous = bool(options("training.continuous", True))
    if kind == "ve":
        low, high = levels(options)
        ve = VE(low, high)
        label = NoiseLevel() if continuous else Time(ve, scale=1.0 - n, offset=n - 1.0)
        return ve, RawScore(scale_input=False, label=label)
    rates = float(options("model.beta_min", 0.1)), float(options("model.beta_max", 20.0))
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


def bare(key: str) -> str:
    """A key without the prefix that DataParallel adds."""
    return key.removeprefix("module.")


def averaged(raw: Mapping[str, Tensor], ema: Any, file: Path) -> dict[str, Tensor]:
    """The raw weights with those of the list put in place of the trained parameters.

    The list leaves out the buffer ``sigmas`` and the Fourier frequencies ``all_modules.0.W``,
    which have no gradient.
    """
    shadow = ema.get("shadow_params") if isinstance(ema, Mapping) else None
    if shadow is None:
        raise CheckpointError(f"{file} holds no averaged weights: ask for weights='raw'")
    keys = [key for key in raw if key not in ("sigmas", "all_modules.0.W")]
    if len(shadow) != len(keys):
        raise CheckpointError(
            f"{file}: {len(shadow)} averaged weights for {len(keys)} trained parameters"
        )
    for key, value in zip(keys, shadow, strict=True):
        if value.shape != raw[key].shape:
            raise CheckpointError(
                f"{file}: the averaged {key} is {tuple(value.shape)}, "
                f"the raw one {tuple(raw[key].shape)}"
            )
    return {**raw, **dict(zip(keys, shadow, strict=True))}


def ours(
    net: NCSNpp, raw: Mapping[str, Tensor], file: Path
) -> tuple[dict[str, Tensor], list[str]]:
    """The weights under the names of ``net``, and the keys of the file that it does not use."""
    tensors, used = {}, set()
    for index, (name, module) in enumerate(numbered(net)):
        prefix = f"all_modules.{index}."
        found = {k.removeprefix(prefix): v for k, v in raw.items() if k.startswith(prefix)}
        for key, value in translated(module, found).items():
            tensors[f"{name}.{key}"] = value
        used |= {prefix + key for key in found if kept(module, key)}
    missing = [key for key in net.state_dict() if key not in tensors]
    if missing:
        raise CheckpointError(
            f"{file} does not fit its configuration: nothing in it for {missing[0]}"
        )
    left = [key for key in raw if key not in used and key != "sigmas"]
    return tensors, left


def numbered(net: NCSNpp) -> Iterator[tuple[str, nn.Module]]:
    """The modules of ``net``, by name, in the order in which the original numbers its own."""
    named = dict(net.named_modules())

    def each(*names: str) -> Iterator[tuple[str, nn.Module]]:
        for name in names:
            if name in named:
                yield name, named[name]

    if net.embedding == "log-fourier" and net.conditional:
        yield from each("features")
    yield from each("embed1", "embed2", "stem")
    for i, level in enumerate(typed(net.encoder)):
        at = f"encoder.{i}"
        for j in range(len(level.stages)):
            yield from each(f"{at}.stages.{j}.block", f"{at}.stages.{j}.attention")
        yield from each(f"{at}.resample", f"{at}.pyramid")
    yield from each("middle.0.block", "middle.0.attention", "middle.1.block")
    for i, level in enumerate(typed(net.decoder)):
        at = f"decoder.{i}"
        for j in range(len(level.stages)):
            yield from each(f"{at}.stages.{j}.block")
        yield from each(f"{at}.attention", f"{at}.norm", f"{at}.pyramid", f"{at}.resample")
    yield from each("head_norm", "head")


def kept(module: nn.Module, key: str) -> bool:
    """Whether the module uses the weight: a block without embedding has no use for Dense_0."""
    return not (isinstance(module, ResBlock) and module.affine is None and "Dense_0" in key)


def translated(module: nn.Module, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of one numbered item under the names of its counterpart here."""
    if isinstance(module, ResBlock):
        return {
            f"{RES[block]}.{weight_or_bias(kind)}": matrix(value, kind, RES[block])
            for (block, kind), value in ((k.split(".", 1), v) for k, v in found.items())
            if block in RES and kept(module, block)
        }
    if isinstance(module, Attention):
        q, k, v = (f"NIN_{i}" for i in range(3))
        moved = {
            "norm.weight": found.get("GroupNorm_0.weight"),
            "norm.bias": found.get("GroupNorm_0.bias"),
            "out.weight": found["NIN_3.W"].T if "NIN_3.W" in found else None,
            "out.bias": found.get("NIN_3.b"),
        }
        if all(f"{n}.W" in found and f"{n}.b" in found for n in (q, k, v)):
            moved["qkv.weight"] = torch.cat([found[f"{n}.W"].T for n in (q, k, v)])
            moved["qkv.bias"] = torch.cat([found[f"{n}.b"] for n in (q, k, v)])
        return {key: value for key, value in moved.items() if value is not None}
    if isinstance(module, (Downsample, Upsample)):
        return {f"conv.{k.split('.')[-1]}": v for k, v in found.items()}
    if "W" in found:
        return {"frequencies": found["W"]}
    # An entry of the input pyramid is a 1x1 convolution called Conv_0; the rest has no such name.
    entry = any(key.startswith("Conv_0.") for key in found)
    return {
        k.removeprefix("Conv_0."): matrix(v, k.split(".")[-1], "skip") if entry else v
        for k, v in found.items()
    }


def weight_or_bias(kind: str) -> str:
    """The name that a "network in network" gives otherwise."""
    return {"W": "weight", "b": "bias"}.get(kind, kind)


def matrix(value: Tensor, kind: str, name: str) -> Tensor:
    """A 1x1 convolution (out, in, 1, 1), or a matrix (in, out), as a matrix (out, in)."""
    if name != "skip" or kind in ("bias", "b"):
        return value
    return value.T if kind == "W" else value.flatten(1)


__all__ = ["claims", "read"]
