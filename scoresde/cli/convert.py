"""``scoresde convert``."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import foreign, options

if TYPE_CHECKING:
    from ..interop.foreign import Foreign
    from ..model import ScoreModel

WRITTEN = {
    "scoresde": ("config.yaml", "model.safetensors", "tuned.yaml", "README.md"),
    "diffusers": ("model_index.json", "unet", "transformer", "scheduler"),
}
"""What a converted model consists of: --overwrite removes nothing else."""


@click.command(name="convert")
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@options.weights
@foreign.settings
@click.option("--to", "form", type=click.Choice(list(WRITTEN)), default="scoresde",
              show_default=True, help="The format that is written.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace a converted model at DST.")
@click.option("--private", is_flag=True, help="Of a repository that hf:owner/name makes.")
@options.report
def command(
    source: str,
    target: str,
    weights: str,
    config: Path | None,
    settings: tuple[str, ...],
    form: str,
    overwrite: bool,
    private: bool,
    json_file: Path | None,
) -> None:
    """Turn a checkpoint of any known format into a model's folder, and compare the two.

    SRC is a checkpoint of score_sde_pytorch, EDM, EDM2, guided- or improved-diffusion, a folder
    of diffusers, hf:owner/name, or a run of this toolkit. DST is a folder that is not there yet,
    or hf:owner/name, to which the model is uploaded.

    \b
    Examples:
      scoresde convert checkpoint_26.pth models/cifar10 --config config.json
      scoresde convert edm-cifar10-32x32-cond-vp.pkl models/edm
      scoresde convert model250000.pt models/adm --set image_size=64 --set num_heads=4
      scoresde convert hf:google/ddpm-cifar10-32 models/ddpm
      scoresde convert runs/digits-vp pipeline --to diffusers
    """
    import torch

    from .info import FACTS, model_facts, show

    start = time.perf_counter()
    hub = target[3:] if target.startswith("hf:") else None
    place = None if hub is not None else Path(target)
    options.check_writable(json_file)
    if private and hub is None:
        raise ValueError("--private belongs to hf:owner/name")
    if hub is not None and form != "scoresde":
        raise ValueError("a pipeline of diffusers goes into a folder: DST cannot be hf:")
    if place is not None:
        check_target(place, overwrite)
    else:
        from ..interop.hub import package

        package()  # before any work
    found = foreign.opened(source, weights, config, settings)
    found.unmapped = (*found.unmapped, *left_behind(source, found))
    facts = model_facts(found.model)
    show({"format": found.source, **{key: facts[key] for key in FACTS}})
    show({"left out": list(found.unmapped)})
    if place is not None:
        with beside(place) as draft:
            difference = written(found, source, draft, form, None)
        where = str(place)
    else:
        from ..interop.hub import upload

        with tempfile.TemporaryDirectory() as folder:
            draft = Path(folder)
            difference = written(found, source, draft, form, hub)
            where = upload(draft, str(hub), private=private)
    options.speak(f"written {where}: read again, its noise differs from that of {source} by "
                  f"{difference:g}")  # fmt: skip
    if form == "scoresde":
        options.speak(f"next: scoresde sample {target}")
    options.write_json(
        json_file,
        {
            "source": source,
            "target": target,
            "to": form,
            "format": found.source,
            **facts,
            "left out": list(found.unmapped),
            "difference": difference,
            "seconds": time.perf_counter() - start,
            "versions": options.versions(torch.device("cpu")),
        },
    )


def left_behind(source: str, found: Foreign) -> tuple[str, ...]:
    """What a run of this toolkit has besides its model."""
    from ..checkpoint import locate

    if found.source == foreign.OURS and (locate(source) / "checkpoints").is_dir():
        kind = "raw" if found.model.weights == "ema" else "averaged"
        return (f"checkpoints: the {kind} weights and the optimizer's state stay in the run",)
    return ()


def written(found: Foreign, source: str, draft: Path, form: str, hub: str | None) -> float:
    """Writes the model into the folder, reads it again, and gives the largest difference.

    Raises:
        CheckpointError: if there is one, so that nothing is kept.
    """
    from ..checkpoint import CheckpointError, load

    if form == "diffusers":
        from ..interop.diffusers import export

        export(found.model, draft)
    else:
        write_ours(found.model, source, draft, hub)
    difference = compare(found.model, load(draft, weights=found.model.weights))
    if difference != 0:
        raise CheckpointError(
            f"nothing is written: the {form} model, read again, differs from {source} by "
            f"{difference:g} in its noise"
        )
    return difference


def write_ours(model: ScoreModel, source: str, draft: Path, hub: str | None) -> None:
    """The files of a model, its tuned grids, and of a run or model of ours its data."""
    from ..checkpoint import locate, save_model
    from ..config import read_yaml
    from ..files import write_yaml
    from ..tuning import FILE

    if hub is not None:
        from ..interop.hub import write

        write(model, draft, hub)
    else:
        save_model(model, draft)
    if model.tuned:
        write_yaml(draft / FILE, {"tuned": list(model.tuned)})
    own = locate(source) / "config.yaml"
    if own.is_file() and (data := read_yaml(own).get("data")) is not None:
        write_yaml(draft / "config.yaml", {**read_yaml(draft / "config.yaml"), "data": data})


def compare(model: ScoreModel, copy: ScoreModel) -> float:
    """Largest difference of noise, and of what is said about the variance, at two times."""
    import torch

    from ..cost import conditions
    from ..sde.base import match

    sde = model.sde
    generator = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 2, *(model.shape or ()), generator=generator)
    t = sde.t_min_sampling + (sde.t_max - sde.t_min_sampling) * torch.tensor([0.2, 0.8])
    t = t.reshape(-1, *[1] * (x.ndim - 1))
    x = match(sde.alpha(t), x) * x + match(sde.sigma(t), x) * eps
    cond = conditions(model, len(x), x.device)
    with torch.no_grad():
        pairs = zip(*(m.noise_and_variance(x, t, **cond) for m in (model, copy)), strict=True)
        gaps = [0.0 if a is b is None else _gap(a, b) for a, b in pairs]
    return max(gaps)


def _gap(a: Any, b: Any) -> float:
    """Largest difference; infinite where one is missing or is no number and the other is."""
    import torch

    if a is None or b is None or not torch.equal(a.isnan(), b.isnan()):
        return float("inf")
    return float((a - b).abs().nan_to_num().max())


def check_target(place: Path, overwrite: bool) -> None:
    """Refuses, before any work, a target that is a file, or holds anything to be kept."""
    if place.is_file():
        raise ValueError(f"cannot write {place}: it is a file, and a model is a folder")
    options.check_writable(place, is_folder=True)
    held = sorted(p.name for p in place.iterdir()) if place.is_dir() else []
    if not held:
        return
    if not overwrite:
        raise ValueError(f"{place} is not empty: name another folder, or pass --overwrite")
    for name in held:
        if not any(name in names for names in WRITTEN.values()):
            raise ValueError(
                f"{place} is more than a converted model, it holds {name}: name another folder"
            )


@contextmanager
def beside(place: Path) -> Iterator[Path]:
    """A folder that takes the place of ``place`` if the block succeeds, and else is removed."""
    place = place.resolve()
    draft, old = (place.with_name(f".{place.name}.{kind}") for kind in ("draft", "old"))
    shutil.rmtree(draft, ignore_errors=True)  # of a conversion that was killed
    try:
        draft.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"cannot write {place}: {error.strerror}") from error
    try:
        yield draft
        try:
            if place.exists():
                shutil.rmtree(old, ignore_errors=True)
                place.rename(old)
            draft.rename(place)
        except BaseException:
            if old.exists() and not place.exists():
                old.rename(place)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
