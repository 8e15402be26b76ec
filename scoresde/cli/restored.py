"""What the commands that solve inverse problems tell and show of what they have drawn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .guide import passes_said, said

if TYPE_CHECKING:
    from torch import Tensor

    from ..inverse import Operator
    from ..model import ScoreModel
    from ..samples import Samples
    from .restore import Problem, Settings


def figures(posed: Problem, found: Tensor) -> dict[str, Any]:
    """How far the draws and their mean are from the items, and their measurement from ``y``."""
    n, draws = found.shape[:2]
    again = posed.operator(found.flatten(0, 1)).reshape(n, draws, *posed.y.shape[1:])
    miss = (posed.operator.seen((again - posed.y[:, None]).flatten(0, 1))).flatten(1)
    told: dict[str, Any] = {
        "residual": float((miss.square().sum(1) / posed.operator.count).mean().sqrt()),
        "spread": float(found.double().var(1, correction=min(1, draws - 1)).mean().sqrt()),
    }
    if posed.x is not None:
        told["rmse"] = float((found - posed.x[:, None]).double().square().mean().sqrt())
        told["rmse_of_mean"] = float((found.mean(1) - posed.x).double().square().mean().sqrt())
    return told


def about_run(
    chosen: Settings,
    posed: Problem,
    drawn: Samples,
    section: dict[str, Any],
    guidance: dict[str, Any] | None,
    seconds: float,
) -> dict[str, Any]:
    """The settings of a run, and what it cost, for its JSON."""
    cost = drawn.cost
    return {
        "model": chosen.run, "items": posed.names, "draws": chosen.draws,
        "operator": about_operator(posed.operator), "noise_std": chosen.noise,
        "method": section, "threshold": drawn.threshold, "dequantize": chosen.dequantize,
        "label": chosen.label, "guidance": guidance,
        "nfe": drawn.mean_nfe, "forwards": None if cost is None else cost.forwards,
        "products": None if cost is None else cost.products, "seconds": seconds,
        "converged": drawn.converged, "message": drawn.message, "solver": drawn.solver,
        "grid": drawn.grid, "steps": drawn.steps, "seed": drawn.seed, "weights": drawn.weights,
    }  # fmt: skip


def about_operator(operator: Operator) -> dict[str, Any]:
    """Name and numbers of an operator."""
    import dataclasses

    from ..config import class_name

    found: dict[str, Any] = {"name": class_name(type(operator))}
    for field in dataclasses.fields(operator):  # type: ignore[arg-type]
        value = getattr(operator, field.name)
        if isinstance(value, (bool, int, float, str, Path)):
            found[field.name] = str(value) if isinstance(value, Path) else value
    return {**found, "measured": operator.count}


def lines(chosen: Settings, posed: Problem, drawn: Samples, report: dict[str, Any]) -> list[str]:
    """What the command says."""
    name = report["method"]["name"]
    count = f"{len(posed.y)} item{'s' * (len(posed.y) > 1)}"
    spent = f"{drawn.mean_nfe:.4g} evaluations"
    if report["guidance"]:
        spent += passes_said(drawn)
    elif drawn.cost is not None and drawn.cost.products:
        spent += f" and {drawn.cost.products} products with the Jacobian"
    told = [
        f"{chosen.draws} result{'s' * (chosen.draws > 1)} for {count} under {chosen.run} by "
        f"{name}{said(report['guidance'])}: {spent} each, "
        f"{report['seconds']:.1f} s, {drawn.weights} weights, seed {drawn.seed}"
    ]
    if "rmse" in report:
        told.append(
            f"from the input: {report['rmse']:.4f} a result, {report['rmse_of_mean']:.4f} their "
            f"mean; spread {report['spread']:.4f}, residual {report['residual']:.4f} (root mean "
            "squares in model range)"
        )
    else:
        told.append(
            f"spread {report['spread']:.4f}, residual {report['residual']:.4f} (root mean squares "
            "in model range)"
        )
    return told


def beside(model: ScoreModel, posed: Problem) -> list[Any]:
    """What a picture shows before the results: the items where known, and their measurements."""
    from ..inverse import Fourier, Mask
    from ..pictures import as_images
    from ..sheet import Column
    from .draws import Shown

    operator, y = posed.operator, posed.y
    found: list[Any] = [] if posed.x is None else [Shown("input", model, posed.x)]
    if isinstance(operator, Mask):
        return [*found, Shown(posed.measured, model, y, operator.mask)]
    images = None
    if len(operator.out) == len(operator.shape) > 1 and not isinstance(operator, Fourier):
        images = as_images(((y.clamp(-1, 1) + 1) * 127.5).round().to("cpu").byte())
    if images is not None and images.shape[1] in (1, 3):
        return [*found, Column(posed.measured, images)]
    return [*found, Shown("pseudo-inverse", model, operator.pinv(y))]
