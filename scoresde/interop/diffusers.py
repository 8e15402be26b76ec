"""Folders of diffusers: a pipeline's, or a single network's, read and written.

A pipeline's folder has ``model_index.json``, the network in ``unet/`` or ``transformer/`` (or, in
the oldest, in the folder itself) and ``scheduler/scheduler_config.json``, which gives the process.
A network's has ``config.json`` and the weights ``diffusion_pytorch_model.safetensors`` or
``.bin``, whole or in shards with an index, perhaps of a variant such as ``fp16``. Averaged weights
lie in ``unet_ema/``, raw ones in ``unet/`` or in the variant ``non_ema``; most folders hold one
set and do not say which.

Pictures lie in [-1, 1], those of ``ScoreSdeVeScheduler`` in [0, 1]. Networks for the latents of
another model have no scaler.

Source: the layout is that of diffusers 0.42, https://huggingface.co/docs/diffusers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..allowance import no_larger
from ..checkpoint import CheckpointError, fit
from ..data.scaler import Scaler
from ..files import write_json, write_tensors
from ..model import ScoreModel
from ..nets.dit import DiT
from . import diffusers_dit, diffusers_unet, schedulers
from .diffusers_weights import STEM, has, read_weights
from .foreign import Foreign, settings

UNET = ("UNet2DModel",)
TRANSFORMERS = ("DiTTransformer2DModel", "Transformer2DModel")
FOLDERS = ("unet", "transformer")
PICTURES = Scaler((128.0,), (2 / 256,), 256)
UNIT_PICTURES = Scaler((0.0,), (1 / 256,), 256)
SAID = "_weights"
"""Key of a network's configuration in which :func:`export` says which weights these are."""


def claims(folder: Path) -> bool:
    """Whether a folder is a pipeline or a network of diffusers."""
    if (folder / "model_index.json").is_file():
        return True
    for place in (folder, *(folder / name for name in FOLDERS)):
        file = place / "config.json"
        try:
            content = json.loads(file.read_text()) if file.is_file() else None
        except (ValueError, RecursionError):
            continue
        if isinstance(content, dict) and "_class_name" in content:
            return True
    return False


def read(
    folder: Path,
    *,
    weights: str = "ema",
    config: Mapping[str, Any] | str | Path | None = None,
) -> Foreign:
    """The model in a folder.

    Args:
        folder: of a pipeline or of a network.
        weights: ``"ema"`` or ``"raw"``, where the folder holds both.
        config: fields, or a JSON file of them, that replace those of the network's
            ``config.json``; under ``scheduler`` those of the scheduler's.

    Raises:
        CheckpointError: for a folder or a network of another kind, or files that are missing,
            damaged or do not fit.
    """
    given = {} if config is None else settings(folder / "config.json", (), config)
    scheduling = given.pop("scheduler", {})
    index = _json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    place = _network_folder(folder)
    averaged = weights == "ema" and (folder / f"{place.name}_ema" / "config.json").is_file()
    if averaged and place != folder:
        place = folder / f"{place.name}_ema"
    described = {**_json(place / "config.json"), **given}
    state, file, variant = read_weights(place, weights)
    net = _network(described, state, file)

    notes = []
    scheduler = _scheduler(folder, place)
    if scheduler is None:
        exploding = described.get("time_embedding_type") == "fourier"
        assumed = schedulers.EXPLODING if exploding else "DDPMScheduler"
        scheduler = {"_class_name": assumed}
        notes.append(f"scheduler: there is no configuration of it, assumed {assumed}'s defaults")
    scheduler |= scheduling
    sde, parameterization = schedulers.process(scheduler)
    channels, outside = net.shape[0], _out_channels(net)
    if outside not in (channels, 2 * channels):
        raise CheckpointError(
            f"the network in {place} takes {channels} channels and gives {outside}: it needs more "
            "than the noisy data; accepted: as many, or twice as many"
        )
    if outside == 2 * channels and scheduler.get("variance_type") == "learned":
        raise CheckpointError(
            "variance_type of the scheduler is 'learned', accepted: 'learned_range', a place "
            "between the smallest and the largest variance"
        )
    if words := schedulers.method(scheduler):
        notes.append(f"settings of the sampler, to be chosen when sampling: {words}")
    if variant:
        notes.append(f"weights: those of the variant {variant}, in float32")
    if getattr(net, "class_table", None) is not None:
        notes.append("class labels: the original needs them; without y no class is added")
    others = [k for k, v in index.items() if isinstance(v, list) and any(v)]
    others = [k for k in others if k not in (*FOLDERS, "scheduler")]
    if others:
        notes.append(f"{', '.join(others)}: the rest of the pipeline, not read")
    latent = others != [] or channels not in (1, 3)
    if latent:
        notes.append("scaler: the model lives in latents, which another model makes")
    kind = str(described.get(SAID, "raw"))
    if variant in ("non_ema", "raw"):
        kind = "raw"
    elif averaged or variant == "ema" or (weights == "ema" and has(place, "non_ema")):
        kind = "ema"
    elif SAID not in described:
        notes.append("weights: the folder does not say whether they are averaged")
    unit = scheduler["_class_name"] == schedulers.EXPLODING
    model = ScoreModel(
        net,
        sde,
        parameterization,
        shape=net.shape,
        scaler=None if latent else UNIT_PICTURES if unit else PICTURES,
        weights=kind,
    )
    return Foreign(model.eval(), "diffusers", tuple(notes))


def export(model: ScoreModel, folder: Path) -> None:
    """Writes a pipeline's folder, which diffusers loads and :func:`read` reads.

    A ``DDPMPipeline``, or a ``ScoreSdeVePipeline`` for VE; for a DiT a ``DiTPipeline``, which
    needs a VAE besides.

    Raises:
        CheckpointError: if diffusers has no such network, process, label or range of the data,
            naming what stands against it, or if a file cannot be written.
    """
    net = model.net
    transformer = isinstance(net, DiT)
    if isinstance(net, DiT):
        config, state = diffusers_dit.export(net)
    else:
        config, state = diffusers_unet.export(net)
    learned = config["out_channels"] == 2 * config["in_channels"]
    scheduler = schedulers.configuration(model.sde, model.parameterization, learned=learned)
    exploding = scheduler["_class_name"] == schedulers.EXPLODING
    _check_range(model.scaler, exploding)
    if not exploding:
        scheduler["clip_sample"] = model.scaler is not None
    pipeline = "ScoreSdeVePipeline" if exploding else "DDPMPipeline"
    name = "transformer" if transformer else "unet"
    index = {
        "_class_name": "DiTPipeline" if transformer else pipeline,
        name: ["diffusers", config["_class_name"]],
        "scheduler": ["diffusers", scheduler["_class_name"]],
    }
    for place in (folder / name, folder / "scheduler"):
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot write {place}: {error.strerror}") from error
    write_tensors(folder / name / f"{STEM}.safetensors", state)
    write_json(folder / name / "config.json", {**config, SAID: model.weights})
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    write_json(folder / "model_index.json", index)


def _network_folder(folder: Path) -> Path:
    places = [folder / name for name in FOLDERS] + [folder]
    for place in places:
        if (place / "config.json").is_file():
            return place
    raise CheckpointError(
        f"no network at {folder}: neither {FOLDERS[0]}/, {FOLDERS[1]}/ nor the folder itself has "
        "a config.json"
    )


def _scheduler(folder: Path, place: Path) -> dict[str, Any] | None:
    """The scheduler's configuration, in the folder or in the pipeline that the folder is in."""
    places = [folder / "scheduler", folder]
    if (folder.parent / "model_index.json").is_file() and folder == place:
        places.append(folder.parent / "scheduler")
    for home in places:
        if (home / "scheduler_config.json").is_file():
            return _json(home / "scheduler_config.json")
    return None


def _network(config: dict[str, Any], state: Mapping[str, Tensor], file: Path) -> Any:
    name = config.get("_class_name")
    if name in UNET:
        with no_larger(state, file):
            net: nn.Module = diffusers_unet.network(config)
        tensors = _named(file, lambda: diffusers_unet.tensors(config, state))
    elif name in TRANSFORMERS:
        shared = diffusers_dit.shares_embedding(state)
        with no_larger(state, file):
            net = diffusers_dit.network(_public(config), shared_embedding=shared)
        tensors = _named(
            file,
            lambda: diffusers_dit.tensors(_public(config), state, shared_embedding=shared),
        )
    else:
        raise CheckpointError(
            f"a network {name!r} of diffusers; accepted: {', '.join((*UNET, *TRANSFORMERS))}"
        )
    fit(net, tensors, file)
    return net


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if not k.startswith("_")}


def _named(file: Path, make: Any) -> dict[str, Tensor]:
    try:
        return make()
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error


def _out_channels(net: Any) -> int:
    return net.out_channels or net.shape[0]


def _check_range(scaler: Scaler | None, unit: bool) -> None:
    """Refuses data that diffusers would show in another range than the model has them."""
    if scaler is None:
        return
    ends = [(level - scaler.shift[0]) * scaler.scale[0] for level in (0, 255)]
    wanted = (0.0, 1.0) if unit else (-1.0, 1.0)
    same = len(set(scaler.shift)) == len(set(scaler.scale)) == 1
    if not same or any(abs(a - b) > 0.01 for a, b in zip(ends, wanted, strict=True)):
        raise CheckpointError(
            f"the pipelines of diffusers show pictures of 256 levels in [{wanted[0]:g}, 1]; this "
            f"model's scaler is {scaler}"
        )


def _json(file: Path) -> dict[str, Any]:
    return settings(file, (), file)
