"""Checkpoints of OpenAI's improved- and guided-diffusion: networks and noisy classifiers.

A file ``.pt`` is a bare state dictionary. The flags that its network was built with stand in
``flags.json`` or ``config.json`` beside it, or are passed as ``config=``. What the tensors tell is
taken from them, and flags that say otherwise are refused; the original's defaults stand for other
flags that are not given.

The networks were trained on DDPM's chain of ``diffusion_steps = T`` steps, with the linear table
``(1000/T) [1e-4, 0.02]`` or the cosine one, and are told the step ``0..T-1``, or 1000/T times it.

Sources: Diffusion Models Beat GANs on Image Synthesis (Dhariwal & Nichol, 2021),
https://arxiv.org/abs/2105.05233; Improved Denoising Diffusion Probabilistic Models (Nichol &
Dhariwal, 2021), https://arxiv.org/abs/2102.09672.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..allowance import no_larger
from ..checkpoint import CheckpointError, fit
from ..classifier import NoisyClassifier
from ..data.scaler import Scaler
from ..model import ScoreModel
from ..nets.adm import ADM
from ..nets.adm_classifier import ADMClassifier
from ..noise_labels import Time
from ..parameterization import X0, Eps
from ..sde import DDPM
from .foreign import Foreign
from .guided_flags import Flags
from .guided_keys import Layout, ours

SIGNS = ("time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.0.in_layers.0.weight")
POOLS = {
    "spatial_v2": "out.1.weight",
    "attention": "out.2.positional_embedding",
    "spatial": "out.2.weight",
    "adaptive": "out.3.weight",
}
"""Pools of the classifier, each with a tensor that none after it has."""
LAST = {
    "spatial_v2": "out.3.weight",
    "attention": "out.2.c_proj.weight",
    "spatial": "out.2.weight",
    "adaptive": "out.3.weight",
}


def claims(content: Any) -> bool:
    """Whether a file of ``torch.save`` holds a network of guided-diffusion, or its classifier."""
    return isinstance(content, Mapping) and all(
        isinstance(content.get(sign), Tensor) for sign in SIGNS
    )


def read(
    content: Any,
    file: Path,
    *,
    weights: str = "ema",
    config: Mapping[str, Any] | str | Path | None = None,
) -> Foreign:
    """The model in a state dictionary.

    Args:
        content: the state dictionary.
        file: where it comes from. Its name says which weights it holds: ``ema_0.9999_*.pt`` the
            averaged, ``model*.pt`` with a number the raw ones; of others they are as asked for.
        weights: ``"ema"`` or ``"raw"``.
        config: the original's flags, or the path of a JSON file; else they lie beside ``file``.

    Raises:
        CheckpointError: in one line, if flags are missing or wrong, or do not fit the tensors.
    """
    if not any(key.startswith("output_blocks.") for key in content):
        raise CheckpointError(f"{file} holds a classifier of noisy pictures: use load_classifier")
    flags = Flags.beside(file, config)
    with no_larger(content, file):
        net = network(content, flags)
    legacy = not flags.boolean("use_new_attention_order", False)
    fit(net, ours(net, content, file, legacy), file)
    sde, label = process(flags)
    predicted = X0 if flags.boolean("predict_xstart", False) else Eps
    if file.name.startswith("ema_"):
        weights = "ema"
    elif re.fullmatch(r"model\d+\.pt", file.name):
        weights = "raw"
    model = ScoreModel(
        net,
        sde,
        predicted(scale_input=False, label=label),
        shape=net.shape,
        scaler=Scaler((128.0,), (2 / 256,), 256),
        weights=weights,
    )
    return Foreign(model.eval(), "guided-diffusion", tuple(flags.unmapped()))


def read_classifier(
    content: Any, file: Path, config: Mapping[str, Any] | str | Path | None = None
) -> ADMClassifier:
    """The classifier of noisy pictures in a state dictionary.

    It is told what the model that it guides is told: the step ``i - 1`` of the chain at the time
    ``i/T``, which :class:`~scoresde.noise_labels.Time` gives (and :func:`process`, of its flags).

    Args:
        content: the state dictionary.
        file: where it comes from.
        config: the original's flags ``image_size`` and ``classifier_*``, or the path of a JSON
            file; else they lie beside ``file``.

    Raises:
        CheckpointError: in one line, if flags are missing or wrong, or do not fit the tensors.
    """
    flags = Flags.beside(file, config)
    told = Layout.of(content, file, flags.integer("classifier_depth", 2))
    compare(flags, told, "classifier_")
    size = flags.integer("image_size")
    pool, key = next((pool for pool in POOLS.items() if pool[1] in content), ("", ""))
    if not pool or LAST[pool] not in content:
        lacks = LAST[pool] if pool else ", ".join(POOLS.values())
        raise CheckpointError(f"{file} is no classifier of guided-diffusion: it lacks {lacks}")
    flags.agree("classifier_pool", flags.values.get("classifier_pool"), pool, key)
    try:
        with no_larger(content, file):
            net = ADMClassifier(
                (content["input_blocks.0.0.weight"].shape[1], size, size),
                num_classes=len(content[LAST[pool]]),
                pool=pool.replace("_", "-"),
                embedding="positional",
                **shared(told),
            )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"flags of {file}: {error}") from error
    # The original builds its classifiers in the legacy order, whatever the flags of the model.
    fit(net, ours(net, content, file, legacy=True), file)
    return net.eval()


def noisy_classifier(
    content: Any, file: Path, config: Mapping[str, Any] | str | Path | None = None
) -> NoisyClassifier:
    """:func:`read_classifier` on the chain of its flags, for items in [-1, 1].

    Raises:
        CheckpointError: as there, and for flags that make no chain.
    """
    net = read_classifier(content, file, config)
    sde, label = process(Flags.beside(file, config))
    classifier = NoisyClassifier(
        net,
        sde,
        Eps(scale_input=False, label=label),
        shape=net.shape,
        scaler=Scaler((128.0,), (2 / 256,), 256),
    )
    return classifier.eval()


def network(state: Mapping[str, Tensor], flags: Flags) -> ADM:
    """The untrained network that tensors and flags describe."""
    told = Layout.of(state, flags.file)
    compare(flags, told, "")
    if "out.2.weight" not in state:
        raise CheckpointError(f"{flags.file} does not fit its flags: out.2.weight is missing")
    stem, head = state["input_blocks.0.0.weight"].shape[1], state["out.2.weight"].shape[0]
    low_res = "large_size" in flags or "small_size" in flags or stem == 2 * head
    low_res = low_res or (stem == head and flags.boolean("learn_sigma", False))
    channels = stem // 2 if low_res else stem
    if head not in (channels, 2 * channels):
        raise CheckpointError(
            f"{flags.file}: out.2.weight gives {head} channels for pictures of {channels}"
        )
    learned = head == 2 * channels
    flags.agree("learn_sigma", flags.boolean("learn_sigma", learned), learned, "out.2.weight")
    classes = state["label_emb.weight"].shape[0] if "label_emb.weight" in state else None
    given = flags.boolean("class_cond", classes is not None)
    flags.agree("class_cond", given, classes is not None, "label_emb.weight")
    size = pixels(flags)
    heads: dict[str, Any] = {"head_dim": flags.integer("num_head_channels", -1)}
    if heads["head_dim"] == -1:
        heads = {"heads": flags.integer("num_heads", 4)}
        upward = flags.integer("num_heads_upsample", -1)
        heads["decoder_heads"] = None if upward == -1 else upward
    else:
        attended = [told.multipliers[i] for i in told.attention] + [told.multipliers[-1]]
        if any(round(told.width * m) % heads["head_dim"] for m in attended):
            raise flags.wrong("num_head_channels", "a divisor of the channels of each attention")
    try:
        return ADM(
            (channels, size, size),
            embedding="positional",
            dropout=flags.number("dropout", 0.0),
            low_res=low_res,
            out_channels=head if learned else None,
            num_classes=classes,
            **heads,
            **shared(told),
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"flags of {flags.file}: {error}") from error


def shared(told: Layout) -> dict[str, Any]:
    """The fields of network and classifier that tensors tell."""
    names = ("width", "multipliers", "blocks", "attention", "adaptive", "resample")
    return {name: getattr(told, name) for name in names}


def compare(flags: Flags, told: Layout, prefix: str) -> None:
    """Refuses flags that the tensors contradict.

    Args:
        flags: the flags.
        told: what the tensors tell.
        prefix: ``classifier_`` for a classifier, whose flags have names of their own.
    """
    width, depth = ("width", "depth") if prefix else ("num_channels", "num_res_blocks")
    for name, value, key in (
        (width, told.width, "time_embed.0.weight"),
        (depth, told.blocks, "the number of input_blocks"),
    ):
        flags.agree(prefix + name, flags.integer(prefix + name, value), value, key)
    down = f"input_blocks.{told.first[1] - 1}" if len(told.first) > 1 else ""
    checks = [(f"{prefix}use_scale_shift_norm", told.adaptive, "input_blocks.1.0.emb_layers.1")]
    if down:
        checks.append((f"{prefix}resblock_updown", told.resample == "block", down))
    if down and told.resample != "block":
        checks.append(("conv_resample", told.resample == "conv", down))
    for name, value, key in checks:
        flags.agree(name, flags.boolean(name, value), value, key)
    multipliers = None if prefix else flags.numbers("channel_mult")
    if multipliers:
        given = [int(told.width * m) for m in multipliers]
        widths = [round(told.width * m) for m in told.multipliers]
        pairs = zip(given, widths, strict=False)
        odd = next((n for n, (a, b) in enumerate(pairs) if a != b), -1)
        key = f"input_blocks.{told.first[odd]}.0.out_layers.3.weight"
        if given != widths:
            flags.agree("channel_mult", multipliers, list(told.multipliers), key)
    name = f"{prefix}attention_resolutions"
    resolutions = flags.numbers(name)
    if resolutions is not None:
        size = pixels(flags)
        factors = {size // int(r) for r in resolutions if r >= 1}
        levels = {n for n in range(len(told.first)) if 2**n in factors}
        odd = min(levels ^ set(told.attention), default=0)
        key = f"input_blocks.{told.first[odd]}.1.qkv.weight"
        sizes = ",".join(str(size >> n) for n in told.attention)
        if levels != set(told.attention):
            flags.agree(name, levels, sizes, key)


def pixels(flags: Flags) -> int:
    """Height and width of the pictures, the large ones of super-resolution."""
    return flags.integer("large_size" if "large_size" in flags else "image_size")


def process(flags: Flags) -> tuple[DDPM, Time]:
    """The chain of the flags, and what its networks are told.

    Raises:
        CheckpointError: for values that make no chain, and where the two projects' defaults
            differ with effect and the flag is not given.
    """
    steps = flags.integer("diffusion_steps", 1000)
    schedule = flags.word("noise_schedule", ("linear", "cosine"), "linear")
    if steps != 1000 and "rescale_timesteps" not in flags:
        raise CheckpointError(
            f"flags of {flags.file} lack rescale_timesteps: for {steps} steps it matters, and is "
            "true by default in improved-diffusion, false in guided-diffusion"
        )
    factor = 1000 / steps
    ends = {"beta_start": 1e-4 * factor, "beta_end": 0.02 * factor}
    table = {"schedule": "cosine"} if schedule == "cosine" else ends
    least = 1 / steps
    try:
        sde = DDPM(
            steps,
            t_min=least,
            t_min_sampling=least,
            t_min_likelihood=least,
            **table,  # type: ignore[arg-type]
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"flags of {flags.file}: {error}") from error
    scale = factor if flags.boolean("rescale_timesteps", False) else 1.0
    return sde, Time(sde, scale * steps, -scale)
