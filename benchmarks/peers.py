"""Samplers of other projects, each as a function of an exact denoiser, under EDM's process.

azula's samplers step linearly in the time of a schedule, so each schedule is a grid: its own VE
(log-SNR), cosine and rectified ones, and EDM's levels. diffusers' schedulers are given the noise
levels of EDM or of equal steps in log-SNR, and step a variance-preserving state where that is what
they are written for. k-diffusion's samplers step the state itself, on any levels. All may stop at
the smallest noise level, or denoise there as the last of their evaluations. Where a package is
not installed, its samplers are left out:

    pip install --no-deps azula k-diffusion && pip install diffusers einops
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

SIGMA_MIN, SIGMA_MAX = 0.002, 80.0
f64 = torch.float64
Denoiser = Callable[[Tensor, Tensor], Tensor]
"""``denoise(x, sigma)`` of a variance-exploding state."""


@dataclass(frozen=True)
class Peer:
    """One sampler of another project.

    Args:
        name: project, sampler and grid.
        run: ``run(denoise, x, nfe)``, with ``x`` at SIGMA_MAX: the result by at most ``nfe``
            evaluations.
        denoised: whether the result is the denoised state, not the state at SIGMA_MIN.
        stochastic: whether it draws noise (from torch's global generator).
    """

    name: str
    run: Callable[[Denoiser, Tensor, int], Tensor]
    denoised: bool
    stochastic: bool = False


def karras(u: Tensor) -> Tensor:
    """EDM's noise levels, from SIGMA_MAX at 0 to SIGMA_MIN at 1."""
    low, high = SIGMA_MIN ** (1 / 7), SIGMA_MAX ** (1 / 7)
    return (high + u * (low - high)) ** 7


def logsnr(u: Tensor) -> Tensor:
    """Equal steps in the logarithm."""
    return SIGMA_MAX * (SIGMA_MIN / SIGMA_MAX) ** u


def cosine(u: Tensor) -> Tensor:
    """Equal steps in the angle of a variance-preserving process."""
    low, high = (torch.atan(torch.tensor(s, dtype=f64)) for s in (SIGMA_MIN, SIGMA_MAX))
    return torch.tan(high + u * (low - high))


def rectified(u: Tensor) -> Tensor:
    """Equal steps in the time of the linear path."""
    low, high = SIGMA_MIN / (1 + SIGMA_MIN), SIGMA_MAX / (1 + SIGMA_MAX)
    t = high + u * (low - high)
    return t / (1 - t)


LEVELS = {"karras": karras, "log-snr": logsnr, "cosine": cosine, "rectified": rectified}


def azula() -> Iterator[Peer]:
    """Every sampler of azula, at each of its orders, on each grid."""
    if importlib.util.find_spec("azula") is None:
        return
    from azula import sample

    kinds: list[tuple[str, Any, dict[str, Any], int, bool]] = [
        ("DDIM", sample.DDIMSampler, {}, 1, False),
        ("Heun", sample.HeunSampler, {}, 2, False),
        ("DDPM", sample.DDPMSampler, {}, 1, True),
        ("Ito", sample.ItoSampler, {}, 1, True),
        ("PC", sample.PCSampler, {}, 2, True),
        ("DDIM eta=0.5", sample.DDIMSampler, {"eta": 0.5}, 1, True),
    ]
    for family in ("zAB", "vAB", "zEAB", "xEAB", "REAB"):
        for order in (2, 3, 4):
            name = f"{family}-{order}"
            kinds.append((name, getattr(sample, family + "Sampler"), {"order": order}, 1, False))
    for name, kind, options, cost, stochastic in kinds:
        for grid, levels in LEVELS.items():
            for last in (False, True):
                run = _azula(kind, options, cost, levels, last)
                yield Peer(f"azula {name}, {grid}", run, last, stochastic)


def _azula(
    kind: Any, options: dict[str, Any], cost: int, levels: Callable[[Tensor], Tensor], last: bool
) -> Callable[[Denoiser, Tensor, int], Tensor]:
    from azula.denoise import Denoiser as Base
    from azula.denoise import DiracPosterior

    def schedule(t: Tensor) -> tuple[Tensor, Tensor]:
        t = torch.as_tensor(t, dtype=f64)
        return torch.ones_like(t), levels(1 - t)

    class Exact(Base):
        def __init__(self, denoise: Denoiser) -> None:
            super().__init__()
            self.denoise, self.schedule = denoise, schedule

        def forward(self, x: Tensor, t: Tensor, **_: Any) -> Any:
            return DiracPosterior(mean=self.denoise(x, schedule(t)[1]))

    def run(denoise: Denoiser, x: Tensor, nfe: int) -> Tensor:
        steps = (nfe - last) // cost
        sampler = kind(
            Exact(denoise), start=1.0, stop=0.0, steps=steps, silent=True, dtype=f64, **options
        )
        x = sampler(x)
        return denoise(x, torch.tensor(SIGMA_MIN, dtype=f64)) if last else x

    return run


def diffusers() -> Iterator[Peer]:
    """The schedulers of diffusers that take noise levels, at each of their orders and forms."""
    if importlib.util.find_spec("diffusers") is None:
        return
    warnings.filterwarnings("ignore", module="diffusers")
    from diffusers import schedulers as made
    from diffusers.utils import logging

    logging.set_verbosity_error()
    for grid in ("karras", "log-snr"):
        for last in (False, True):
            end = {"final_sigmas_type": "zero" if last else "sigma_min"}
            for name, kind, options, stochastic in _multistep(made, end):
                if last and options.get("algorithm_type") == "dpmsolver":
                    continue  # it cannot step to zero
                run = _preserving(kind, options, LEVELS[grid], last)
                yield Peer(f"diffusers {name}, {grid}", run, last, stochastic)
            for name, kind, cost, stochastic in (
                ("Euler", made.EulerDiscreteScheduler, 1, False),
                ("LMS", made.LMSDiscreteScheduler, 1, False),
                ("Heun", made.HeunDiscreteScheduler, 2, False),
                ("Euler ancestral", made.EulerAncestralDiscreteScheduler, 1, True),
            ):
                run = _exploding(kind, cost, LEVELS[grid], last)
                yield Peer(f"diffusers {name}, {grid}", run, last, stochastic)


def _multistep(made: Any, end: dict[str, Any]) -> Iterator[tuple[str, Any, dict[str, Any], bool]]:
    """Name, class, options, and whether it draws noise."""
    dpm = made.DPMSolverMultistepScheduler
    for order in (2, 3):
        for lower in (True, False):
            tail = ", lower last" if lower else ""
            for algorithm in ("dpmsolver++", "dpmsolver"):
                for form in ("midpoint", "heun") if order == 2 else ("midpoint",):
                    options = {
                        **end,
                        "solver_order": order,
                        "solver_type": form,
                        "algorithm_type": algorithm,
                        "lower_order_final": lower,
                    }
                    yield f"{algorithm} {order}M {form}{tail}", dpm, options, False
        yield f"DEIS-{order}", made.DEISMultistepScheduler, {"solver_order": order}, False
    for order in (1, 2, 3):
        for prediction, name in ((True, "data"), (False, "noise")):
            for form in ("bh1", "bh2"):
                options = {"solver_order": order, "solver_type": form, "predict_x0": prediction,
                           **end}  # fmt: skip
                yield f"UniPC-{order} {form} {name}", made.UniPCMultistepScheduler, options, False
    for order in (1, 2):
        options = {"solver_order": order, "algorithm_type": "sde-dpmsolver++", **end}
        yield f"SDE-DPM-Solver++ {order}M", dpm, options, True
    for order in (2, 3):
        orders = {"predictor_order": order, "corrector_order": order}
        yield f"SA-Solver {order}", made.SASolverScheduler, orders, True
        for tau in (0.1, 0.3):
            options = {**orders, "tau_func": lambda t, tau=tau: tau}
            yield f"SA-Solver {order} tau={tau}", made.SASolverScheduler, options, True


def _levels(levels: Callable[[Tensor], Tensor], evaluations: int, last: bool) -> Tensor:
    """Noise levels of a scheduler, one more than its evaluations; the last may be zero."""
    if last:
        found = levels(torch.linspace(0, 1, evaluations, dtype=f64))
        return torch.cat([found, torch.zeros(1, dtype=f64)])
    return levels(torch.linspace(0, 1, evaluations + 1, dtype=f64))


def _begin(scheduler: Any, sigmas: Tensor) -> None:
    """A scheduler at its start, on these noise levels."""
    scheduler.sigmas = sigmas
    # SA-Solver's noise depends on them: evenly spread, as those of a process of 1000 steps.
    scheduler.timesteps = torch.linspace(999, 0, len(sigmas), dtype=f64)[:-1]
    scheduler.num_inference_steps = len(sigmas) - 1
    scheduler.is_scale_input_called = True
    scheduler.set_begin_index(0)


def _preserving(
    kind: Any, options: dict[str, Any], levels: Callable[[Tensor], Tensor], last: bool
) -> Callable[[Denoiser, Tensor, int], Tensor]:
    """A multistep scheduler, which steps ``x / sqrt(1 + sigma^2)``."""

    def run(denoise: Denoiser, x: Tensor, nfe: int) -> Tensor:
        scheduler = kind(**options)
        scheduler.set_timesteps(nfe)
        sigmas = _levels(levels, nfe, last)
        _begin(scheduler, sigmas)
        z = x / (1 + sigmas[0] ** 2).sqrt()
        for t, sigma in zip(scheduler.timesteps, sigmas, strict=False):
            scale = (1 + sigma**2).sqrt()
            eps = (z * scale - denoise(z * scale, sigma)) / sigma
            z = scheduler.step(eps, t, z).prev_sample
        return z * (1 + sigmas[-1] ** 2).sqrt()

    return run


def _exploding(
    kind: Any, cost: int, levels: Callable[[Tensor], Tensor], last: bool
) -> Callable[[Denoiser, Tensor, int], Tensor]:
    """A scheduler that steps the state itself; Heun's lists the inner levels twice."""

    def run(denoise: Denoiser, x: Tensor, nfe: int) -> Tensor:
        # Heun's last step, to zero, is Euler's; otherwise it has two evaluations as all others.
        count = nfe if cost == 1 else (nfe + 1) // 2 if last else nfe // 2
        scheduler = kind()
        scheduler.set_timesteps(count)
        sigmas = _levels(levels, count, last)
        if cost == 2:
            ends = sigmas[-1:] if last else sigmas[-1:].repeat(2)
            sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), ends])
        _begin(scheduler, sigmas)
        if hasattr(scheduler, "derivatives"):
            scheduler.derivatives = []
        for t, sigma in zip(scheduler.timesteps, sigmas, strict=False):
            eps = (x - denoise(x, sigma)) / sigma
            x = scheduler.step(eps, t, x).prev_sample
        return x

    return run


def k_diffusion() -> Iterator[Peer]:
    """The samplers of k-diffusion that follow a list of noise levels, and DPM-Solver-fast."""
    found = importlib.util.find_spec("k_diffusion")
    if found is None:
        return
    # Its package imports networks and pictures, which its samplers do not need.
    package, pictures = ModuleType("k_diffusion"), ModuleType("torchvision.transforms")
    package.__path__ = list(found.submodule_search_locations or ())
    pictures.functional = ModuleType("functional")
    before = set(sys.modules)
    names = {"k_diffusion": package, "torchvision.transforms": pictures}
    with mock.patch.dict(sys.modules, {**names, "torchvision": ModuleType("torchvision")}):
        made = importlib.import_module("k_diffusion.sampling")
        late = {n: m for n, m in sys.modules.items() if n not in before | {"torchvision", *names}}
    sys.modules.update(late)
    kinds: list[tuple[str, Any, dict[str, Any], int, bool]] = [
        ("Euler", made.sample_euler, {}, 1, False),
        ("Heun", made.sample_heun, {}, 2, False),
        ("DPM-2", made.sample_dpm_2, {}, 2, False),
        ("DPM++ 2M", made.sample_dpmpp_2m, {}, 1, False),
        *((f"LMS-{order}", made.sample_lms, {"order": order}, 1, False) for order in (2, 3, 4)),
        ("DPM++ 2S", made.sample_dpmpp_2s_ancestral, {"eta": 0.0}, 2, False),
    ]
    for eta in (0.1, 0.3, 1.0):
        kinds += [
            (f"{name} eta={eta}", kind, {"eta": eta}, cost, True)
            for name, kind, cost in (
                ("Euler ancestral", made.sample_euler_ancestral, 1),
                ("DPM-2 ancestral", made.sample_dpm_2_ancestral, 2),
                ("DPM++ 2S ancestral", made.sample_dpmpp_2s_ancestral, 2),
                ("DPM++ SDE", made.sample_dpmpp_sde, 2),
                ("DPM++ 2M SDE", made.sample_dpmpp_2m_sde, 1),
                ("DPM++ 3M SDE", made.sample_dpmpp_3m_sde, 1),
            )
        ]
    for name, kind, options, cost, stochastic in kinds:
        for grid, levels in LEVELS.items():
            for last in (False, True):
                run = _listed(kind, options, cost, levels, last)
                yield Peer(f"k-diffusion {name}, {grid}", run, last, stochastic)
    yield Peer("k-diffusion DPM fast", _fast(made.sample_dpm_fast), denoised=False)


def _listed(
    kind: Any, options: dict[str, Any], cost: int, levels: Callable[[Tensor], Tensor], last: bool
) -> Callable[[Denoiser, Tensor, int], Tensor]:
    """A sampler along a list of levels; of two evaluations a step, one in a step to zero."""
    takes_noise = "noise_sampler" in kind.__code__.co_varnames

    def run(denoise: Denoiser, x: Tensor, nfe: int) -> Tensor:
        count = nfe if cost == 1 else (nfe + 1) // 2 if last else nfe // 2
        draw = {"noise_sampler": lambda a, b: torch.randn_like(x)} if takes_noise else {}
        return kind(
            lambda y, sigma: denoise(y, sigma.flatten()[0]), x, _levels(levels, count, last),
            disable=True, **options, **draw,
        )  # fmt: skip

    return run


def _fast(kind: Any) -> Callable[[Denoiser, Tensor, int], Tensor]:
    """A sampler that is told its evaluations and ends."""

    def run(denoise: Denoiser, x: Tensor, nfe: int) -> Tensor:
        return kind(
            lambda y, sigma: denoise(y, sigma.flatten()[0]), x, SIGMA_MIN, SIGMA_MAX, nfe,
            disable=True,
        )  # fmt: skip

    return run


def every() -> list[Peer]:
    """All of them."""
    return [*azula(), *diffusers(), *k_diffusion()]
