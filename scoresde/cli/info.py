"""``scoresde info``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import foreign, options

if TYPE_CHECKING:
    import torch

    from ..model import ScoreModel

FACTS = (
    "shape", "sde", "parameterization", "noise label", "network", "classes", "learned variance",
    "parameters", "weights",
)  # fmt: skip
"""Those that say what a model is, not what it costs."""
OF = {
    "weights memory": "",
    "forward memory": " for the activations of one item",
    "gradient memory": " with those for a vector-Jacobian product",
}


@click.command(name="info")
@click.argument("run", default=options.DEFAULT_MODEL)
@foreign.settings
@options.weights
@options.device
@options.report
def command(
    run: str,
    config: Path | None,
    settings: tuple[str, ...],
    weights: str,
    device_name: str,
    json_file: Path | None,
) -> None:
    """Say what a model is: format, process, network, cost, training and figures so far.

    Of a training run, while it goes on or after it has died: how far it is, its losses, where it
    fails, what went wrong, its speed, what it cost, its checkpoints.

    \b
    Examples:
      scoresde info
      scoresde info runs/digits-vp --json info.json
      scoresde info checkpoint_8.pth --config config.json
      scoresde info hf:google/ddpm-cifar10-32
    """
    from ..checkpoint import locate
    from ..training.summary import is_run

    options.check_writable(json_file)
    device = options.pick_device(device_name)
    folder = locate(run)
    if not is_run(folder) or config is not None or settings:
        found = foreign.opened(run, weights, config, settings)
        facts = {"format": found.source, **model_facts(found.model.to(device))}
        if found.source != foreign.OURS:
            facts["left out"] = list(found.unmapped)
        report = folder / "report.json"
        if report.is_file():
            facts["report"] = json.loads(report.read_text())
        options.write_json(json_file, facts)
        show(facts)
        return
    options.write_json(json_file, run_facts(folder, weights, device))


def run_facts(folder: Path, weights: str, device: torch.device) -> dict[str, Any]:
    """Says how a run stands, which is quick, and then what its model is; returns it all."""
    from ..config import read_yaml
    from ..training import summary
    from . import info_run

    facts: dict[str, Any] = {"format": foreign.OURS, "run": summary.summary(folder)}
    show({"format": foreign.OURS})
    info_run.say(facts["run"], info_run.process(read_yaml(folder / "config.yaml")))
    options.speak("")
    found, reason = info_run.opened(folder, weights)
    own: dict[str, Any] = {}
    if found is not None:
        own = model_facts(found.model.to(device))
        price = facts["run"]["cost"]
        price |= summary.compute(price["items"], own["multiply-adds"])
        if flops := price["flops"]:
            own["compute so far"] = f"{flops:.3g} FLOPs (forward and backward)"
    if reason is not None:
        own["no weights"] = reason
    report = folder / "report.json"
    if report.is_file():
        own["report"] = json.loads(report.read_text())
    if facts["run"]["checkpoints"]:
        own["checkpoint"] = facts["run"]["checkpoints"][-1]["name"]
    show(own)
    return {**facts, **own}


def show(facts: Mapping[str, Any]) -> None:
    """Prints facts, a line each."""
    from ..interop.card import flat

    for key, value in facts.items():
        if key == "report":
            options.speak("report")
            for name, entry in flat(value).items():
                options.speak(f"  {name:<28} {entry}")
        elif key == "left out":
            for line in value or ["nothing"]:
                options.speak(f"{key:<22} {line}")
        else:
            options.speak(f"{key:<22} {said(key, value)}")


def said(key: str, value: Any) -> str:
    """A fact in words."""
    from ..interop.card import label

    if value is None:
        return {"scaler": "none", "classes": "none", "given": "none"}.get(key, "not known")
    if key == "noise label":
        return label(value)
    if key == "multiply-adds":
        return f"{value:,} a forward pass of one item"
    if key == "parameters":
        return f"{value:,}"
    if key.endswith("memory"):
        scale, unit = (2**20, "MiB") if value >= 2**20 else (2**10, "KiB")
        return f"{value / scale:.1f} {unit}{OF[key]}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k}={member(v)}" for k, v in value.items())
    return member(value)


def member(value: Any) -> str:
    """A value among others: a list in brackets."""
    from ..interop.card import figure

    if isinstance(value, Mapping):
        return str(value.get("name", value))
    if isinstance(value, list):
        return f"[{figure(value)}]" if value else "[]"
    return figure(value)


def model_facts(model: ScoreModel) -> dict[str, Any]:
    """Process, parameterization, network and its cost for one item, as JSON takes them."""
    from ..config import describe
    from ..cost import cost
    from ..interop.card import classes, learns_variance
    from ..sde.base import as_time

    sde, price = model.sde, cost(model)
    predicts = describe(model.parameterization)
    told = predicts.pop("label")
    return {
        "shape": None if model.shape is None else list(model.shape),
        "sde": describe(sde),
        "default solver": sde.default_solver,
        "SNR at t_max": f"{float((2 * sde.log_snr(as_time(sde.t_max))).exp()):.2e} (unit data)",
        "parameterization": predicts,
        "noise label": told,
        "scaler": describe(model.scaler) if model.scaler else None,
        "network": describe(model.net),
        "classes": classes(model),
        "given": None if model.given is None else describe(model.given),
        "learned variance": learns_variance(model),
        "parameters": price.parameters,
        "weights memory": price.weight_bytes,
        "multiply-adds": price.multiply_adds,
        "forward memory": price.forward_bytes,
        "gradient memory": price.vjp_bytes,
        "weights": model.weights,
    }
