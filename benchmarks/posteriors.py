"""Methods of inverse problems against exact posteriors, ours and azula's, at equal passes.

    python benchmarks/posteriors.py [--out FOLDER] [--quick] [--seed 0] [--workers 2]

Every method gets the same exact score of a mixture, the same process (VP), the same start and the
same measurements, and as many steps as a number of passes pays for; a pass is an evaluation of the
score or a product with its Jacobian. *W2* is the Wasserstein-2 distance from the exact posterior,
averaged over measurements: by optimal assignment on the ring, sliced elsewhere; the floor is that
of as many exact samples. *Mean* is the error of the posterior mean in posterior standard
deviations, *std* the mean relative error of the standard deviation. The plot ends above our worst.

All run as they come, and again with the best of a sweep over their main options (azula's over two
grids as well), chosen by W2 for each problem and number of passes on other noise and fewer samples
(the four best of fewer passes go on to more). Without azula (``pip install --no-deps azula
einops``) ours run alone. Writes ``posteriors.json``, ``posteriors.md`` and ``posteriors.png``;
float64, CPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from posterior_methods import OURS, choices, ours, said
from posterior_peers import Azula, variants
from posterior_problems import PROBLEMS, Judge
from tqdm import tqdm

BUDGETS = (20, 100, 500)
NOISES = {"ring": (0.1,), "random": (0.1, 0.02), "picture": (0.1,)}
SAMPLES = {"ring": 500, "random": 250, "picture": 250}
KINDS = {"scoresde": ("ours", "ours, best"), "azula": ("azula", "azula, best")}
Task = tuple[str, float, str, str]
"""Problem, noise, project, method."""


def run(task: Task, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The records of a method on a problem, one for each number of passes and kind."""
    torch.set_num_threads(1)
    law, noise, project, method = task
    problem = PROBLEMS[law](noise)
    y = problem.measurements(args.draws, args.seed)
    n = SAMPLES[law] // args.part
    judge = Judge(problem, y, n, args.seed)
    few = max(20, n // 5)
    trial_judge = Judge(problem, y, few, args.seed + 1)
    records = []
    if project == "scoresde":
        candidates = choices(method)
        labels = [said(c) for c in candidates]

        def full(choice: Any, budget: int) -> Any:
            return ours(choice, problem, y, n, budget, args.seed)

        def trial(choice: Any, budget: int) -> Any:
            return ours(choice, problem, y, few, budget, args.seed + 1)
    else:
        full, trial = Azula(problem, y, n, args.seed), Azula(problem, y, few, args.seed + 1)
        candidates = variants(problem)[method]
        labels = [str(c) for c in candidates]
    running = list(range(len(candidates)))
    for budget in args.budgets:
        tried = []
        for i in running if len(running) > 1 else []:
            try:
                total = sum(trial_judge(trial(candidates[i], budget)[0])["w2"])
            except ValueError:  # the budget pays for no step
                continue
            tried.append((math.inf if math.isnan(total) else total, i))
        ranked = [i for _, i in sorted(tried)] or running
        # What did badly with some steps has no chance with more, but for the size of a step.
        running = [i for i in ranked if i in ranked[:4] or method == "dps"]
        for kind, i in ((KINDS[project][0], 0), (KINDS[project][1], ranked[0])):
            if kind == "ours, best" and len(candidates) == 1:
                continue
            x, passes, steps = full(candidates[i], budget)
            records.append(
                {
                    "problem": law, "noise": noise, "method": method, "kind": kind,
                    "budget": budget, "passes": passes, "steps": steps, "settings": labels[i],
                    "floor": judge.floor, "floor_of_mean": judge.floor_of_mean, **judge(x),
                }
            )  # fmt: skip
    return records


def task_of(record: dict[str, Any]) -> Task:
    project = "scoresde" if record["kind"] in KINDS["scoresde"] else "azula"
    return record["problem"], record["noise"], project, record["method"]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def verdict(one: dict[str, Any], other: dict[str, Any]) -> str:
    """``<`` if ``one`` is closer, ``>`` if farther, by paired ratios over measurements."""
    if not all(map(math.isfinite, other["w2"])):
        return "<"
    gaps = torch.tensor(one["w2"]).double().log() - torch.tensor(other["w2"]).double().log()
    error = 2 * float(gaps.std()) / len(gaps) ** 0.5
    gap, slack = float(gaps.mean()), max(error, 0.02)
    return "<" if gap < -slack else ">" if gap > slack else "="


def figure(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.0e}"


def table(records: list[dict[str, Any]], budgets: list[int]) -> str:
    """Markdown: a table a problem, a row a method and kind."""
    lines = []
    key = {(r["problem"], r["noise"], r["method"], r["kind"], r["budget"]): r for r in records}
    for law, noise in dict.fromkeys((r["problem"], r["noise"]) for r in records):
        here = [r for r in records if (r["problem"], r["noise"]) == (law, noise)]
        floor = mean(here[0]["floor"])
        lines += [
            f"\n### {law}, noise {noise:g}\n",
            f"W2 of exact samples: {floor:.3f}; their error of the mean: "
            f"{here[0]['floor_of_mean']:.3f}.\n",
            "| method | of | " + " | ".join(f"W2 at {b}" for b in budgets)
            + " | " + " | ".join(f"mean, std at {b}" for b in budgets) + " | settings |",
            "|---" * (3 + 2 * len(budgets)) + "|",
        ]  # fmt: skip
        for method in dict.fromkeys(r["method"] for r in here):
            for kind in itertools.chain(*KINDS.values()):
                row = [key.get((law, noise, method, kind, b)) for b in budgets]
                if not any(row):
                    continue
                w2, rest, settings = [], [], []
                for b, r in zip(budgets, row, strict=True):
                    if r is None:
                        w2.append("-")
                        rest.append("-")
                        continue
                    mark = ""
                    for own in KINDS["scoresde"][: 1 if kind == "azula" else 2]:
                        mine = key.get((law, noise, method, own, b))
                        if kind in KINDS["azula"] and mine:
                            mark += " " + verdict(mine, r)
                    w2.append(figure(mean(r["w2"])) + mark)
                    rest.append(f"{figure(r['mean'])}, {r['std']:+.2f}")
                    settings.append(r["settings"])
                said = "; ".join(dict.fromkeys(settings))
                lines.append(f"| {method} | {kind} | " + " | ".join(w2 + rest) + f" | {said} |")
    lines.append(
        "\nBeside azula's: `<` ours is closer to the posterior than this, `>` farther, `=` neither"
        " (ratios paired over measurements, two standard errors). A second mark is that of our"
        " best.\n"
    )
    return "\n".join(lines)


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """W2 against passes, a panel a problem; a colour a method, a line a kind."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import NullLocator, ScalarFormatter

    panels = list(dict.fromkeys((r["problem"], r["noise"]) for r in records))
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    width = 5.8 * columns + 2.2
    fig, axes = plt.subplots(rows, columns, figsize=(width, 4.8 * rows), squeeze=False)
    names = list(dict.fromkeys([*OURS, *(r["method"] for r in records)]))
    colours = dict(zip(names, plt.get_cmap("tab10").colors, strict=False))
    styles = {
        "ours": {"ls": "-", "marker": "o", "lw": 2},
        "ours, best": {"ls": "-", "marker": "D", "lw": 0.8, "mfc": "none"},
        "azula": {"ls": ":", "marker": "x", "lw": 1.2},
        "azula, best": {"ls": "--", "marker": "s", "lw": 0.8, "mfc": "none"},
    }
    for ax, (law, noise) in zip(axes.flat, panels, strict=False):
        here = [r for r in records if (r["problem"], r["noise"]) == (law, noise)]
        floor = mean(here[0]["floor"])
        some = [r for r in here if r["kind"] in KINDS["scoresde"]] or here
        top = 1.5 * max(mean(r["w2"]) for r in some)
        ax.axhline(floor, color="0.6", lw=6, alpha=0.5)
        for method, kind in itertools.product(names, styles):
            line = [r for r in here if (r["method"], r["kind"]) == (method, kind)]
            beside = 1.025 ** (names.index(method) - len(names) / 2)  # so that marks can be told
            ax.plot(
                [r["budget"] * beside for r in line], [min(mean(r["w2"]), top) for r in line],
                color=colours[method], ms=5, **styles[kind],
            )  # fmt: skip
        ax.set(title=f"{law}, noise {noise:g}", xscale="log", yscale="log", xlabel="passes")
        ax.set_ylim(None, 1.08 * top)
        ticks = sorted({r["budget"] for r in here})
        ax.set_xticks(ticks, [str(t) for t in ticks])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_minor_formatter(ScalarFormatter())
        ax.yaxis.set_major_formatter(ScalarFormatter())
        ax.grid(alpha=0.3, which="both")
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax in axes[:, 0]:
        ax.set_ylabel("W2 from the exact posterior")
    handles = [Line2D([], [], color=colours[m], lw=2, label=m) for m in names]
    handles += [Line2D([], [], color="0.2", ms=5, label=k, **s) for k, s in styles.items()]
    handles.append(Line2D([], [], color="0.6", alpha=0.5, lw=6, label="floor of exact samples"))
    fig.tight_layout(rect=(0, 0, 1 - 2.2 / width, 1))
    fig.legend(handles=handles, loc="center right", frameon=False)
    fig.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("posteriors"), help="Folder.")
    parser.add_argument("--quick", action="store_true", help="Few samples, two budgets.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--methods", nargs="+", help="Names, all by default.")
    parser.add_argument(
        "--projects", nargs="+", choices=("scoresde", "azula"), default=["scoresde", "azula"]
    )
    parser.add_argument("--keep", action="store_true", help="Other figures that OUT has.")
    args = parser.parse_args()
    args.budgets, args.draws, args.part = list(BUDGETS), 5, 1
    if args.quick:
        args.budgets, args.draws, args.part = [20, 60], 3, 5
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    tasks = [
        (law, noise, project, method)
        for law in args.problems
        for noise in NOISES[law][: 1 if args.quick else None]
        for project, method in [
            *(("scoresde", name) for name in OURS),
            *(("azula", name) for name in variants(PROBLEMS[law](noise))),
        ]
        if args.methods is None or method in args.methods
        if project in args.projects
    ]
    # The long ones first, so that no worker is left with one at the end.
    order = sorted(tasks, key=lambda t: (t[2] == "scoresde", t[0] == "ring"))
    found: dict[Task, list[dict[str, Any]]] = {}
    figures = args.out / "posteriors.json"
    kept = json.loads(figures.read_text()) if args.keep and figures.exists() else []
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(run, task, args): task for task in order}
        for done in tqdm(as_completed(waiting), total=len(waiting), delay=2):
            found[waiting[done]] = done.result()
            records = [r for task in tasks for r in found.get(task, [])]
            records += [r for r in kept if task_of(r) not in found]
            records.sort(key=lambda r: (list(PROBLEMS).index(r["problem"]), -r["noise"]))
            figures.write_text(json.dumps(records, indent=1))
    text = table(records, args.budgets)
    print(text)
    (args.out / "posteriors.md").write_text(text + "\n")
    plot(records, args.out / "posteriors.png")
    print(f"{time.perf_counter() - began:.0f} s; figures and plot are in {args.out}")


if __name__ == "__main__":
    main()
