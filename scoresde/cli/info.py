"""``scoresde info``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from . import options


@click.command(name="info")
@click.argument("run", default=options.DEFAULT_MODEL)
@options.weights
@options.device
@options.report
def command(run: str, weights: str, device_name: str, json_file: Path | None) -> None:
    """Say what a model is: process, network, cost, training and figures so far.

    \b
    Examples:
      scoresde info
      scoresde info runs/digits-vp --json info.json
    """
    from ..checkpoint import load, locate, step_folders

    options.check_writable(json_file)
    model = load(run, weights=weights, device=options.pick_device(device_name))
    folder = locate(run)
    facts = model_facts(model)
    report = folder / "report.json"
    if report.exists():
        facts["report"] = json.loads(report.read_text())
    if checkpoints := step_folders(folder):
        facts["checkpoint"] = checkpoints[-1].name
    options.write_json(json_file, facts)
    for key, value in facts.items():
        if key == "report":
            options.speak("report")
            for name, entry in flat(value).items():
                options.speak(f"  {name:<28} {entry}")
        elif isinstance(value, dict):
            options.speak(f"{key:<16} " + ", ".join(f"{k}={v}" for k, v in value.items()))
        else:
            options.speak(f"{key:<16} {value}")


def model_facts(model: Any) -> dict[str, Any]:
    """Process, parameterization, network and its cost for one item."""
    from ..config import describe
    from ..sde.base import as_time

    sde = model.sde
    return {
        "shape": tuple(model.shape),
        "sde": describe(sde),
        "default solver": sde.default_solver,
        "SNR at t_max": f"{float((2 * sde.log_snr(as_time(sde.t_max))).exp()):.2e} (unit data)",
        "parameterization": describe(model.parameterization),
        "scaler": describe(model.scaler) if model.scaler else "none",
        "network": describe(model.net),
        "parameters": f"{sum(p.numel() for p in model.net.parameters()):,}",
        "multiply-adds": f"{multiply_adds(model):,} a forward pass of one item",
        "weights": model.weights,
    }


def multiply_adds(model: Any) -> int:
    """Multiply-adds of one forward pass of one item, counted by torch."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    device = next(model.parameters()).device
    labels = getattr(model.net, "num_classes", None) is not None
    cond = {"y": torch.zeros(1, dtype=torch.long, device=device)} if labels else {}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, *model.shape, device=device), model.sde.t_max, **cond)
    return int(counter.get_total_flops()) // 2


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested figures as ``a.b`` keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[prefix + key] = value
    return found
