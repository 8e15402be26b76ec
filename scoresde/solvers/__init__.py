"""Solvers: each steps a :class:`scoresde.Reverse` along a grid of times; one file a family.

======================  =========  =======  ===========================================
name                    order      NFE      use
======================  =========  =======  ===========================================
``euler``               1          1        the probability-flow ODE as it stands
``heun``                2          2        few steps, any process
``edm``                 2          2        the same with churn, EDM's algorithm 2
``ddim``                1          1        few steps, or stochastic with ``eta > 0``
``dpmpp-2m``            2          1        few steps; the denoised state in the log-SNR
``dpmpp-3m``            3          1        the same through three values
``unipc``               4          1        the same with a corrector that costs nothing
``deis``                4          1        the noise as a polynomial in t
``lms``                 4          1        the noise as a polynomial in sigma/alpha
``vab``                 3          1        the velocity as a polynomial in the angle
``vabm``                4          1        the same with a corrector that costs nothing
``pndm``                2          1        the noise by constant weights
``multistep``           any        1        any variable, coordinate, order and corrector
``rk``                  any        stages   Runge-Kutta by tableau: ``rk4``, ``ralston3``, your own
``parallel``            any        more     a method of one evaluation a step, in fewer rounds
``dpm-2s``              2          2        DPM-Solver: evaluations within the step
``dpm-3s``              3          3        the same, two of them
``dpmpp-2s``            2          2        the same for the denoised state
``sde-dpmpp-2m``        2 (weak)   1        the reverse SDE through two denoised states
``sa``                  2 (weak)   1        noise between two levels, with a corrector
``euler-maruyama``      1 (weak)   1        the reverse SDE as it stands
``reverse-diffusion``   1 (weak)   1        the same, with exact transition coefficients
``ancestral``           1 (weak)   1        DDPM's posterior
``adaptive-sde``        2 (weak)   2        the reverse SDE, each sample at its own pace
``pc``                  1 (weak)   2        a predictor with Langevin corrections (VE)
``langevin``            none       1        corrections alone
``runge-kutta``         adaptive   6        probability-flow ODE, each sample at its own pace
``ode``                 adaptive   6        the same by torchdiffeq, a sample after the other
``ode-scipy``           adaptive   6        the same by scipy, in float64
``torchsde``            1 or 2     1 to 4   the reverse SDE by torchsde
======================  =========  =======  ===========================================
"""

from .adaptive import RungeKutta
from .adaptive_sde import AdaptiveSDE
from .ancestral import Ancestral, ReverseDiffusion
from .base import Solution, Solver
from .ddim import DDIM
from .dpm import DPM2S, DPM3S, DPMpp2M, DPMpp2S, DPMpp3M, SDEDPMpp2M
from .edm import EDM
from .euler import Euler, EulerMaruyama
from .heun import Heun
from .langevin import Langevin
from .linear import DEIS, LMS, VAB, VABM
from .multistep import Multistep
from .ode import ODE, ODEScipy
from .parallel import Parallel
from .pc import PC
from .pndm import PNDM
from .sa import SASolver
from .sde_torch import TorchSDE
from .tableau import ExplicitRK
from .unipc import UniPC

__all__ = [
    "DDIM",
    "DEIS",
    "DPM2S",
    "DPM3S",
    "EDM",
    "LMS",
    "ODE",
    "PC",
    "PNDM",
    "VAB",
    "VABM",
    "AdaptiveSDE",
    "Ancestral",
    "DPMpp2M",
    "DPMpp2S",
    "DPMpp3M",
    "Euler",
    "EulerMaruyama",
    "ExplicitRK",
    "Heun",
    "Langevin",
    "Multistep",
    "ODEScipy",
    "Parallel",
    "ReverseDiffusion",
    "RungeKutta",
    "SASolver",
    "SDEDPMpp2M",
    "Solution",
    "Solver",
    "TorchSDE",
    "UniPC",
]
