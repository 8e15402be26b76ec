"""Steps of solvers beside those of diffusers' schedulers, on the same noise and exact score.

    python benchmarks/steps_of_diffusers.py [--steps 20]

Prints the largest relative difference over the states of a run of each method, and between the
ends of the two runs, as a table in Markdown; float64, CPU. Both follow the closed-form score of
a mixture under DDPM's linear table of 1000 steps, told as noise at whole steps: diffusers' step
``i`` is our time ``(i + 1)/1000``. The tables that diffusers keeps in float32 are raised to
float64; what remains is the difference of the formulas.

Where the two would otherwise differ, the settings are those that agree:

* ``clip_sample`` off (ours is the option ``threshold`` of sampling);
* an end at the denoised state (``set_alpha_to_one``, ``final_sigmas_type="zero"``), which our
  last denoising gives. ``set_alpha_to_one=False`` ends at the table's first step instead, as
  ``t_end=1/N, denoise=False`` does; with ``steps_offset=0`` it would stay there for a step;
* DDPM on leading steps: on trailing ones it adds noise to its end, ``fixed_large`` all of it;
* no lower orders on the last steps but the one to ``sigma = 0``: 3M has more of them under 15
  steps; UniPC lowers its correction along with its prediction, our ``lower_last`` the prediction
  alone. UniPC's ``bh1`` to ``sigma = 0`` is not finite;
* PNDM starts with repeated evaluations, ours with lower orders: each of the later steps is
  compared from their values.

DPM-Solver and Euler compute a step in float32 whatever they are given: hence their 1e-7.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import diffusers
import torch
from torch import Tensor

import scoresde as sd
from scoresde import solvers

TABLE = 1000
SDE = sd.DDPM(TABLE, t_min=1 / TABLE, t_min_sampling=1 / TABLE, t_min_likelihood=1 / TABLE)


def exact_score() -> Any:
    """The score of three modes in two dimensions."""
    means = torch.tensor([[1.0, 0.6], [-1.0, 0.4], [0.0, -1.0]], dtype=torch.float64)
    return sd.GaussianMixture([1.0, 2.0, 1.0], means, [0.3, 0.4, 0.35]).score(SDE)


@dataclass(frozen=True)
class Case:
    """A scheduler of diffusers, the solver that should be the same, and how their states relate.

    Args:
        scheduler: class of diffusers.
        solver: ours.
        options: of the scheduler.
        step: options of its ``step``.
        scaled: whether its state is ``x/alpha``.
        ends_at_table: whether it ends at the first step of the table instead of denoising.
        noisy: whether a step draws.
        seed_history: whether each of our steps starts from their values.
    """

    scheduler: str
    solver: solvers.Solver
    options: dict[str, Any] = field(default_factory=dict)
    step: dict[str, Any] = field(default_factory=dict)
    scaled: bool = False
    ends_at_table: bool = False
    noisy: bool = False
    seed_history: bool = False


DPM = "DPMSolverMultistepScheduler"
LEADING = {"timestep_spacing": "leading"}
UNIPC = "UniPCMultistepScheduler"
CASES = {
    "ancestral (small)": Case(
        "DDPMScheduler", solvers.Ancestral("small"),
        {"variance_type": "fixed_small", "clip_sample": False, **LEADING}, noisy=True,
    ),
    "ancestral (large)": Case(
        "DDPMScheduler", solvers.Ancestral("large"),
        {"variance_type": "fixed_large", "clip_sample": False, **LEADING}, noisy=True,
    ),
    "ddim": Case("DDIMScheduler", solvers.DDIM(), {"clip_sample": False}),
    "ddim (to the table's first step)": Case(
        "DDIMScheduler", solvers.DDIM(),
        {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, **LEADING},
        ends_at_table=True,
    ),
    "ddim (eta=1)": Case(
        "DDIMScheduler", solvers.DDIM(1.0), {"clip_sample": False}, {"eta": 1.0}, noisy=True
    ),
    "dpmpp-2m": Case(DPM, solvers.DPMpp2M(), {"solver_order": 2}),
    "dpmpp-3m (published)": Case(DPM, solvers.DPMpp3M(form="published"), {"solver_order": 3}),
    "sde-dpmpp-2m": Case(
        DPM, solvers.SDEDPMpp2M(), {"algorithm_type": "sde-dpmsolver++"}, noisy=True
    ),
    "unipc (points=2, bh2)": Case(
        UNIPC, solvers.UniPC(points=2, line="bh2"), {"solver_order": 2, "solver_type": "bh2"}
    ),
    "unipc (points=2, bh1, lower_last)": Case(
        UNIPC, solvers.UniPC(points=2, line="bh1", lower_last=True),
        {"solver_order": 2, "solver_type": "bh1", "final_sigmas_type": "sigma_min"},
        ends_at_table=True,
    ),
    "unipc (points=3, bh2)": Case(
        UNIPC, solvers.UniPC(points=3, line="bh2"),
        {"solver_order": 3, "final_sigmas_type": "sigma_min", "lower_order_final": False},
        ends_at_table=True,
    ),
    "pndm (single steps)": Case(
        "PNDMScheduler", solvers.PNDM(), {"skip_prk_steps": True, **LEADING}, seed_history=True
    ),
    "ddim (theirs Euler)": Case("EulerDiscreteScheduler", solvers.DDIM(), scaled=True),
    "heun": Case(
        "HeunDiscreteScheduler", solvers.Heun(), {"beta_start": 1e-4, "beta_end": 0.02},
        scaled=True,
    ),
}  # fmt: skip


def scheduler_of(case: Case, steps: int) -> Any:
    """Their scheduler on ``steps`` whole steps of the table, its numbers raised to float64."""
    options = {"num_train_timesteps": TABLE, "timestep_spacing": "trailing", **case.options}
    theirs = getattr(diffusers, case.scheduler)(**options)
    betas = torch.linspace(1e-4, 0.02, TABLE, dtype=torch.float64)
    theirs.betas, theirs.alphas = betas, 1 - betas
    theirs.alphas_cumprod = bars = theirs.alphas.cumprod(0)
    if hasattr(theirs, "one"):
        theirs.one = torch.tensor(1.0, dtype=torch.float64)
    if hasattr(theirs, "final_alpha_cumprod"):
        theirs.final_alpha_cumprod = bars[0] if case.ends_at_table else bars.new_ones(())
    theirs.set_timesteps(steps)
    whole = torch.as_tensor(theirs.timesteps).double()
    assert bool((whole == whole.round()).all()), "the steps must be whole"
    if hasattr(theirs, "sigmas"):
        index = whole.long()
        last = ((1 - bars[0]) / bars[0]).sqrt() if case.ends_at_table else bars.new_zeros(())
        sigmas = torch.cat([((1 - bars[index]) / bars[index]).sqrt(), last[None]])
        assert torch.allclose(sigmas.float(), theirs.sigmas.float(), rtol=1e-4)
        theirs.sigmas = sigmas
    return theirs


def time_of(step: Any) -> Tensor:
    """Our time of a step of theirs."""
    return torch.tensor((int(step) + 1) / TABLE, dtype=torch.float64)


def their_run(case: Case, theirs: Any, score: Any, x: Tensor, seed: int) -> list[Tensor]:
    """States at each time, the denoised end (or that at the table's first step) the last."""
    generator = torch.Generator().manual_seed(seed)
    state = x / SDE.alpha(time_of(theirs.timesteps[0])) if case.scaled else x
    states = []
    for step in theirs.timesteps:
        t = time_of(step)
        if hasattr(theirs, "scale_model_input"):
            inner = theirs.scale_model_input(state, step)
        eps = score.noise(inner, t)  # of a variance-preserving state, scaled or not
        drawn: dict[str, Any] = {"generator": generator} if case.noisy else {}
        if case.scheduler == DPM and case.noisy:  # of itself it draws float32, another stream
            drawn = {"variance_noise": torch.randn(x.shape, generator=generator, dtype=x.dtype)}
        state = theirs.step(eps, step, state, **drawn, **case.step).prev_sample
        states.append(state)
    if theirs.order == 2:  # two calls a step, the last of one
        states = states[1::2] + states[-1:]
    return states


def our_run(case: Case, times: Tensor, score: Any, x: Tensor, seed: int) -> list[Tensor]:
    """The same states, by the solver and a last denoising."""
    generator, states = torch.Generator().manual_seed(seed), []
    reverse = case.solver.reverse(score)
    out = case.solver.integrate(
        reverse, x, times, generator, lambda i, t, state: states.append(state)
    )
    if not case.ends_at_table:
        states.append(reverse.denoise(out.x, times[-1]))
    return states


def single_steps(
    case: Case, theirs: Any, score: Any, x: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Their state after a step and ours, from their state and values."""
    reverse = case.solver.reverse(score)
    for n, (step, following) in enumerate(pairwise(theirs.timesteps)):
        t = time_of(step)
        eps = score.noise(x, t)
        history = tuple(reversed(theirs.ets[-3:]))
        moved = theirs.step(eps, step, x).prev_sample
        if n >= 2:  # the two before are the start that differs
            yield moved, case.solver.step(reverse, x, t, time_of(following), None, history)[0]
        x = moved


def differences(name: str, steps: int = 20, seed: int = 0) -> list[float]:
    """Relative differences of the states of a method after each step, the end's the last."""
    case, score = CASES[name], exact_score()
    theirs = scheduler_of(case, steps)
    x = torch.randn(
        (64, 2), generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64
    )
    if case.seed_history:
        return [relative(*pair) for pair in single_steps(case, theirs, score, x)]
    unique = dict.fromkeys(int(step) for step in theirs.timesteps)
    times = torch.stack([time_of(step) for step in unique])
    if case.ends_at_table:
        times = torch.cat([times, time_of(0)[None]])
    expected = their_run(case, theirs, score, x, seed)
    found = our_run(case, times, score, x, seed)
    if case.scaled:
        found[:-1] = [state / SDE.alpha(t) for state, t in zip(found, times[1:], strict=False)]
    return [relative(*pair) for pair in zip(expected, found, strict=True)]


def relative(expected: Tensor, found: Tensor) -> float:
    """Largest difference by the largest value."""
    return float((expected - found).abs().max() / expected.abs().max())


def main() -> None:
    """The table."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="that divide 1000")
    steps = parser.parse_args().steps
    print(f"diffusers {diffusers.__version__}, {steps} of {TABLE} steps, float64\n")
    print("| solver | scheduler | largest difference | at the end |\n| --- | --- | --- | --- |")
    for name, case in CASES.items():
        found = differences(name, steps)
        print(f"| {name} | {case.scheduler} | {max(found):.1e} | {found[-1]:.1e} |")


if __name__ == "__main__":
    main()
