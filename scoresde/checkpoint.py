"""Models on disk: weights as safetensors, everything else as YAML, nothing executable.

A model's folder holds ``model.safetensors`` and ``config.yaml``. A training run's folder holds
``config.yaml`` and ``checkpoints/step-N/`` with the raw and averaged weights and the state of the
optimizer. :func:`load` reads both, the models that ship with the package as ``zoo:NAME``, and, by
:mod:`scoresde.interop`, checkpoints of other projects.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import given, nets, parameterization, sde
from .allowance import no_larger
from .config import build, construct, describe, read_yaml, unknown
from .files import CheckpointError, read_tensors, write_tensors, write_yaml
from .model import ScoreModel
from .saved_steps import checksums, latest_checkpoint, step_folders
from .tuning import files as tuned

if TYPE_CHECKING:
    from .classifier import NoisyClassifier

FORMAT = 1
WEIGHTS = r"raw|ema(-[\w.+-]+)?"
CLASSIFIER = "classifier"
"""The section by which a ``config.yaml`` says that it describes a classifier."""
TABLES = {"classes", "class_table"}
"""What networks call the layer that takes classes; its output is added to an embedding."""
ZOO = Path(__file__).parent / "zoo"


def load(
    path: str | Path,
    *,
    weights: str = "ema",
    device: str | torch.device = "cpu",
    config: Mapping[str, Any] | str | Path | None = None,
) -> ScoreModel:
    """The model in a run, an exported folder, the zoo, on the hub, or of another project.

    The format is found out: checkpoints of score_sde_pytorch (``.pth``), network pickles of EDM
    and EDM2 (``.pkl``), weights of guided- and improved-diffusion (``.pt``), folders of
    diffusers. Nothing in a file is ever run. ``model.net`` is the network with the original's
    inputs and outputs; classes are the condition ``y``.

    Args:
        path: ``runs/mine``, an exported folder, ``zoo:mnist``, ``hf:owner/name``, or a foreign
            file or folder.
        weights: ``"ema"``, ``"raw"`` or the name of a further average of a run, such as
            ``"ema-length-0.05"``; an exported folder holds one of them.
        device: where the weights go.
        config: settings of a foreign network, or a JSON file of them, where none lies beside it.

    Raises:
        CheckpointError: if there is no model, or a file of it cannot be read, is truncated, does
            not fit, or names code.
        ConfigError: for a ``config.yaml`` that is no description of a model. A class of the
            user's own has to be imported before (or see :mod:`scoresde.config`).
    """
    if not re.fullmatch(WEIGHTS, weights):
        raise unknown("weights", weights, ("ema", "raw"))
    try:
        return _load(locate(path), weights, config).to(device)
    except OSError as error:
        place = error.filename or path
        raise CheckpointError(f"cannot read {place}: {error.strerror or error}") from error


def _load(folder: Path, weights: str, config: Mapping[str, Any] | str | Path | None) -> ScoreModel:
    if not (folder / "config.yaml").is_file():
        from .interop.reading import read

        model = read(folder, weights=weights, config=config).model
        if folder.is_dir():
            model.tuned = tuple(tuned.read(folder / tuned.FILE))
        return model
    description = read_yaml(folder / "config.yaml")
    if CLASSIFIER in description:
        raise CheckpointError(f"{folder} holds a classifier of noisy items: use load_classifier")
    file, weights = _weights_in(folder, weights, description)
    tensors = read_tensors(file)
    with no_larger(tensors, file):
        model = build_model(description)
    model.weights = weights
    fit(model.net, tensors, file)
    model.tuned = tuple(tuned.read(folder / tuned.FILE))
    return model.eval()


def _weights_in(folder: Path, weights: str, description: Mapping[str, Any]) -> tuple[Path, str]:
    """The file of the weights of an exported folder or a run, and which weights they are."""
    if not (folder / "model.safetensors").exists():
        return weights_of(folder, weights), weights
    weights = description.get("weights", "raw")
    if weights not in ("ema", "raw"):
        raise unknown("weights in config.yaml:", weights, ("ema", "raw"))
    return folder / "model.safetensors", weights


def weights_of(run: Path, weights: str) -> Path:
    """The file of the weights of a run's newest sound checkpoint.

    Raises:
        CheckpointError: if there is no checkpoint, or it has no such average.
    """
    file = f"{weights}.safetensors"
    there = checksums(step_folders(run)[-1]) if step_folders(run) else {}
    if there and file not in there:
        found = [n.removesuffix(".safetensors") for n in there if n.startswith(("raw", "ema"))]
        raise unknown(f"weights in {run}:", weights, found)
    return latest_checkpoint(run, only=[file]) / file


def load_classifier(
    path: str | Path,
    *,
    weights: str = "ema",
    device: str | torch.device = "cpu",
    config: Mapping[str, Any] | str | Path | None = None,
) -> NoisyClassifier:
    """The classifier in a run of train-classifier, a saved folder, or a file of guided-diffusion.

    Args:
        path: ``runs/mine``, a saved folder, ``64x64_classifier.pt``, ``hf:owner/name/file.pt``,
            or a folder that holds such a file alone.
        weights: ``"ema"``, ``"raw"`` or the name of a further average of a run; a saved folder
            or file holds one of them.
        device: where the weights go.
        config: flags of guided-diffusion, or a JSON file of them, where none lies beside it.

    Returns:
        In evaluation mode, ``classifier(x, t, y)`` to ``log p(y | x_t)``. Of guided-diffusion
        ``classifier.net(x, step)`` is the original's network, to logits ``(B, classes)``.

    Raises:
        CheckpointError: if there is none, it is a score model, or its weights do not fit.
    """
    from .classifier import build_classifier
    from .interop import guided_diffusion
    from .interop.reading import checkpoint_in, opened

    if not re.fullmatch(WEIGHTS, weights):
        raise unknown("weights", weights, ("ema", "raw"))
    file = locate(path)
    if not (file / "config.yaml").is_file():
        file = checkpoint_in(file) if file.is_dir() else file
        return guided_diffusion.noisy_classifier(opened(file), file, config).to(device)
    description = read_yaml(file / "config.yaml")
    if CLASSIFIER not in description:
        raise CheckpointError(f"{file} holds no classifier but a score model: use load")
    file, weights = _weights_in(file, weights, description)
    tensors = read_tensors(file)
    with no_larger(tensors, file):
        classifier = build_classifier(description)
    classifier.weights = weights
    fit(classifier.net, tensors, file)
    return classifier.eval().to(device)


def locate(path: str | Path) -> Path:
    """The folder or foreign file behind a path, a ``zoo:`` or an ``hf:`` name."""
    text = str(path)
    if text.startswith("zoo:"):
        known = sorted(p.parent.name for p in ZOO.glob("*/config.yaml"))
        if text[4:] not in known:
            raise unknown("model", text, [f"zoo:{name}" for name in known])
        return ZOO / text[4:]
    if text.startswith("hf:"):
        from .interop.hub import fetched

        return fetched(text[3:])
    if not Path(path).exists():
        hub = f"; did you mean hf:{text}?" if re.fullmatch(r"[\w-]+/[\w.-]+", text) else ""
        raise CheckpointError(f"no model at {text}: there is no such file or folder{hub}")
    return Path(path)


def build_model(description: Mapping[str, Any]) -> ScoreModel:
    """The untrained model that a ``config.yaml`` describes."""
    from .data import Scaler

    if description.get("format", FORMAT) != FORMAT:
        raise CheckpointError(
            f"config.yaml is of format {description['format']!r}; this version reads {FORMAT}"
        )
    for section in ("sde", "parameterization", "net", "shape"):
        if section not in description:
            raise CheckpointError(f"config.yaml lacks the section {section!r}")
        if section != "shape" and not isinstance(description[section], (str, Mapping)):
            raise CheckpointError(f"config.yaml: the section {section!r} is no mapping")
    shape, scaler = description["shape"], description.get("scaler")
    if not isinstance(shape, (list, tuple)) or not all(type(n) is int and n > 0 for n in shape):
        raise CheckpointError(f"config.yaml: shape is {shape!r}; accepted: a list of sizes")
    if scaler is not None:
        if not isinstance(scaler, Mapping):
            raise CheckpointError("config.yaml: the section 'scaler' is no mapping")
        scaler = construct(Scaler, {k: v for k, v in scaler.items() if k != "name"}, "scaler")
    gift = description.get("given") or None
    return ScoreModel(
        build(description["net"], nets, "net"),
        build(description["sde"], sde, "sde"),
        build(description["parameterization"], parameterization, "parameterization"),
        shape=tuple(shape),
        scaler=scaler,
        given=None if gift is None else build(gift, given, "given"),
    )


def describe_model(model: ScoreModel) -> dict[str, Any]:
    """The sections from which :func:`build_model` rebuilds the model."""
    if model.shape is None:
        shape = getattr(model.net, "shape", None)
        if shape is None:
            raise CheckpointError(
                "a model without a shape cannot be saved: pass ScoreModel(shape=)"
            )
        model.shape = tuple(shape)
    try:
        net = describe(model.net)
    except TypeError as error:
        raise CheckpointError(
            f"{type(model.net).__name__} cannot be saved: a network to save is a dataclass, "
            f"so that its fields can be written"
        ) from error
    return {
        "format": FORMAT,
        "shape": list(model.shape),
        "scaler": None if model.scaler is None else describe(model.scaler),
        "sde": describe(model.sde),
        "parameterization": describe(model.parameterization),
        "net": net,
        **({} if model.given is None else {"given": describe(model.given)}),
    }


def save_model(model: ScoreModel, folder: Path) -> None:
    """Writes ``model.safetensors`` and ``config.yaml`` into ``folder``, each whole or not at all.

    Raises:
        CheckpointError: if the folder is that of a training run, whose config.yaml is its own.
    """
    if (folder / "checkpoints").exists():
        raise CheckpointError(f"{folder} is a training run: save the model into another folder")
    description = {**describe_model(model), "weights": model.weights}
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "model.safetensors", model.net.state_dict())
    write_yaml(folder / "config.yaml", description)


def fit(net: nn.Module, tensors: Mapping[str, Tensor], file: Path) -> None:
    """Loads weights strictly, naming the first key or shape that does not fit."""
    expected = net.state_dict()
    compare(
        {key: tuple(t.shape) for key, t in expected.items()},
        {key: tuple(t.shape) for key, t in tensors.items()},
        file,
    )
    net.load_state_dict(dict(tensors))


def widened(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights for the same network with further conditions, which change nothing at first.

    A table of classes that is not there, and the part of an input that takes an image, are zeros;
    everything else stays as it is, fitting or not.
    """
    made = dict(tensors)
    for key, wanted in expected.items():
        own = made.get(key)
        if own is None and TABLES & set(key.split(".")):
            made[key] = torch.zeros_like(wanted)
        elif own is not None and own.ndim > 1 and own.shape != wanted.shape:
            more = wanted.shape[1] - own.shape[1]
            if more > 0 and own.shape[:1] + own.shape[2:] == wanted.shape[:1] + wanted.shape[2:]:
                made[key] = torch.cat([own, own.new_zeros(len(own), more, *own.shape[2:])], 1)
    return made


def compare(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], file: Path
) -> None:
    """Refuses shapes in a file that are not those of the network, naming the first."""
    for key in [*expected, *found]:
        if key not in found or key not in expected:
            where = "the file" if key not in found else "the network"
            raise CheckpointError(f"{file} does not fit the network: {key} is not in {where}")
        if found[key] != expected[key]:
            raise CheckpointError(
                f"{file} does not fit the network: {key} is {found[key]}, "
                f"the network has {expected[key]}"
            )
