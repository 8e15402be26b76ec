"""The log-densities of samples: for JSON, in a line, and in a file of their own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import options

if TYPE_CHECKING:
    from ..sampling import Samples


def figures(drawn: Samples) -> dict[str, Any]:
    """The log-densities for JSON: nats in model range of the states at ``t_end``."""
    if drawn.log_prob is None:
        return {}
    assert drawn.log_prob_stderr is not None
    return {
        "log_prob": drawn.log_prob.tolist(),
        "log_prob_stderr": drawn.log_prob_stderr.tolist(),
        "log_prob_mean": float(drawn.log_prob.mean()),
        "divergence": drawn.divergence,
        "probes": drawn.probes,
    }


def line(drawn: Samples) -> str:
    """Mean and range of the log-densities in one line."""
    assert drawn.log_prob is not None
    values = drawn.log_prob
    probes = f" of {drawn.probes} probes" if drawn.probes else ""
    return (
        f"log-density at t={drawn.t_end:g} in model range: mean {float(values.mean()):.4f} nats, "
        f"from {float(values.min()):.4f} to {float(values.max()):.4f} "
        f"({drawn.divergence} divergence{probes})"
    )


def write(drawn: Samples, file: Path) -> None:
    """One row a sample: its index, nats in model range, and their standard error."""
    import csv

    assert drawn.log_prob is not None
    assert drawn.log_prob_stderr is not None
    with options.whole(file) as draft, open(draft, "w", newline="") as handle:
        rows = csv.writer(handle)
        rows.writerow(["item", "nats", "stderr"])
        pairs = zip(drawn.log_prob.tolist(), drawn.log_prob_stderr.tolist(), strict=True)
        rows.writerows([i, nats, stderr] for i, (nats, stderr) in enumerate(pairs))
