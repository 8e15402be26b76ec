"""``scoresde likelihood`` by other ways than the ODE: bounds, classification, the self-check."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from . import options
from .heldout import conditional
from .likelihood_run import bar

if TYPE_CHECKING:
    from ..data import Dataset
    from ..model import ScoreModel
    from ..world import World
    from .likelihood_run import Request


def bound(request: Request, model: ScoreModel, data: Dataset) -> None:
    """A bound, or the density by denoising alone: mean over items, and its parts."""
    found = bound_figures(
        model, data, request.world, request.batch, request.seed or 0, request.bound or "vlb",
        request.solve.get("steps", getattr(model.sde, "num_steps", 1000)), request.terms,
        request.variance or "small",
    )  # fmt: skip
    if found is None:
        return
    figures = {"model": request.run, "data": data.name, **found}
    versions = options.versions(request.device)
    options.write_json(request.json_file, {**figures, "versions": versions})
    options.speak(f"{data.name} under {request.run}: {bound_line(found)}")


def bound_figures(
    model: ScoreModel,
    data: Dataset,
    world: World,
    batch: int,
    seed: int,
    kind: str,
    steps: int,
    terms: int | None,
    variance: str,
) -> dict[str, Any] | None:
    """Mean of a bound over items and of each of its parts; None but on rank 0."""
    from ..likelihood import denoising_log_prob, elbo, vlb

    assert model.scaler is not None
    parts: list[dict[str, torch.Tensor]] = []
    device = next(model.parameters()).device
    unit = "bits/dim" if data.levels else "nats"
    items, share = len(data), world.share(len(data))
    nfe, more = 0, {}
    with bar(len(share), kind) as progress:
        for start in share[::batch]:
            x = data.x[start : min(start + batch, share.stop)].to(device)
            cond: dict[str, Any] = {"seed": seed, "start_index": start}
            if conditional(model) and data.y is not None:
                cond["y"] = data.y[start : start + len(x)].to(device)
            z = model.scaler.encode(x, dequantize=False)
            if kind == "vlb":
                chain = vlb(model, z, steps=steps, levels=data.levels, terms=terms,
                            variance=variance, **cond)  # fmt: skip
                kl = chain.total - chain.prior - chain.decoder
                parts.append({"total": chain.total, "prior": chain.prior, "steps": kl,
                              "decoder": chain.decoder, "error": chain.stderr})  # fmt: skip
                nfe, more = chain.nfe, {"grid_steps": steps, "variance": chain.variance}
            elif kind == "elbo":
                whole = elbo(model, z, levels=data.levels, terms=terms or 64, **cond)
                parts.append({"total": whole.total, "prior": whole.prior,
                              "diffusion": whole.diffusion,
                              "reconstruction": whole.reconstruction,
                              "error": whole.stderr})  # fmt: skip
                nfe, more = whole.nfe, {"terms": terms or 64}
            else:
                y = dequantised(model, x, seed, start)
                scale = 1 / (data.x[0].numel() * math.log(2)) if data.levels else 1.0
                alone = denoising_log_prob(model, y, terms=terms or 64, **cond)
                log_det = model.scaler.log_det(tuple(data.shape))
                parts.append({"total": -(alone.log_prob + log_det) * scale,
                              "error": alone.stderr * scale})  # fmt: skip
                nfe, more = alone.nfe, {"terms": terms or 64}
            progress.update(len(x))
    own = [{name: values.cpu() for name, values in part.items()} for part in parts]
    all_parts = world.gather((own, nfe, more))
    if all_parts is None:
        return None
    parts = [part for own, _, _ in all_parts for part in own]
    _, nfe, more = next(told for told in all_parts if told[0])
    table = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    error = table.pop("error")
    return {
        **{name: float(values.mean()) for name, values in table.items()},
        "bound": kind,
        "stderr": float(table["total"].std()) / math.sqrt(items),
        "stderr_noise": float(error.double().square().mean().sqrt()) / math.sqrt(items),
        "unit": unit, "items": items, "nfe": nfe, "weights": model.weights, **more,
    }  # fmt: skip


def dequantised(model: ScoreModel, x: torch.Tensor, seed: int, start: int) -> torch.Tensor:
    """Items in model range, discrete ones with the noise of their indices."""
    from ..likelihood.discrete import DEQUANTISATION
    from ..noise import KeyedNoise

    assert model.scaler is not None
    if model.scaler.levels is None:
        return model.scaler.encode(x)
    noise = KeyedNoise(seed ^ DEQUANTISATION, start).uniform(tuple(x.shape), x.device)
    return model.scaler.encode(x, noise=noise)


def bound_line(found: dict[str, Any]) -> str:
    """The bound and its parts in one line."""
    names = ("prior", "steps", "decoder", "diffusion", "reconstruction")
    parts = ", ".join(f"{name} {found[name]:.4f}" for name in names if name in found)
    words = "" if found["bound"] == "denoising" else "at most "
    if found["bound"] == "denoising" and found["unit"] == "nats":
        words = "-log p "
    how = f"{found['items']} items, {found['nfe']} evaluations"
    if "grid_steps" in found:
        how = f"{found['items']} items, {found['grid_steps']} steps, {found['nfe']} evaluations"
    return (
        f"{words}{found['total']:.4f} ± {found['stderr']:.4f} {found['unit']} "
        f"({found['bound']}{': ' if parts else ''}{parts}; its noise {found['stderr_noise']:.4f}; "
        f"{how})"
    )


def classification(request: Request, model: ScoreModel, data: Dataset) -> None:
    """Accuracy of Bayes over classes, with its error bar."""
    from ..likelihood import classify

    if not conditional(model):
        raise ValueError(f"{request.run} takes no labels, and cannot classify")
    if data.y is None or model.scaler is None:
        raise ValueError(f"{data.name} has no labels to compare with")
    settings = request.fitted(model, data)
    for name in ("dequantization", "draws", "importance"):
        settings.pop(name, None)
    classes = torch.arange(int(model.net.num_classes))  # type: ignore[arg-type]
    right, sure, posterior, nfe = [], [], [], 0
    share = request.world.share(len(data))
    with bar(len(share), "classify") as progress:
        for start in share[:: request.batch]:
            stop = min(start + request.batch, share.stop)
            seed = request.seed or 0
            x = dequantised(model, data.x[start:stop].to(request.device), seed, start)
            y = data.y[start:stop]
            found = classify(model, x, classes.to(request.device), start_index=start, **settings)
            right.append((found.prediction.cpu() == y).double())
            sure.append(found.confidence.cpu().double())
            rows = found.log_posterior.cpu().double()
            posterior.append(rows[torch.arange(len(y)), y])
            nfe = max(nfe, int(found.nfe.max()))
            progress.update(stop - start)
    gathered = request.world.gather(((right, sure, posterior), nfe))
    if gathered is None:
        return
    hits, trust, told = (
        torch.cat([part for lists, _ in gathered for part in lists[k]]) for k in range(3)
    )
    nfe = max(most for _, most in gathered)
    count = len(hits)
    figures: dict[str, Any] = {
        "model": request.run,
        "data": data.name,
        "items": count,
        "accuracy": float(hits.mean()),
        "accuracy_stderr": float(hits.std()) / math.sqrt(count),
        "log_posterior": float(told.mean()),
        "log_posterior_stderr": float(told.std()) / math.sqrt(count),
        "confidence": float(trust.mean()),
        "nfe": nfe,
    }
    versions = options.versions(request.device)
    options.write_json(request.json_file, {**figures, "versions": versions})
    options.speak(
        f"{data.name} under {request.run}: {100 * figures['accuracy']:.1f} ± "
        f"{100 * figures['accuracy_stderr']:.1f} % right of {count} items, log p(y|x) "
        f"{figures['log_posterior']:.3f} ± {figures['log_posterior_stderr']:.3f}"
    )


def self_check(request: Request, model: ScoreModel) -> None:
    """Closed forms of the model's shape, under its process, through the very settings."""
    from dataclasses import asdict

    from ..likelihood.selfcheck import self_check as check
    from ..likelihood.verdict import report

    if model.shape is None:
        raise ValueError(f"{request.run} does not say the shape of an item, which the check needs")
    levels = model.scaler.levels if model.scaler is not None else None
    settings = request.settings(math.prod(model.shape), levels, request.run)
    seed = settings.pop("seed")
    if request.terminal == "moments":
        settings["terminal"] = (torch.zeros(()), torch.ones(()))
    if request.items is not None and not request.items.isdecimal():
        raise ValueError(f"--items of a self-check takes a number, got {request.items!r}")
    repeats = int(request.items) if request.items is not None else 400
    with bar(100, "self-check") as progress:
        found = check(
            model.sde, tuple(model.shape), settings, levels=levels, repeats=repeats, seed=seed,
            batch=request.batch, device=request.device,
            progress=lambda fraction: progress.update(int(100 * fraction) - progress.n),
        )  # fmt: skip
    figures = {"model": request.run, "checks": [asdict(each) for each in found]}
    versions = options.versions(request.device)
    options.write_json(request.json_file, {**figures, "versions": versions})
    options.speak(report(found))
