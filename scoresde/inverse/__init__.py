"""Linear inverse problems: operators, and methods that sample what could have been measured.

    y = A x_0 + noise_std e,    e ~ N(0, I):    samples of p(x_0 | y)

An operator knows ``A``, its adjoint and, mostly, its spectrum. Some methods are scores of
``p(x_t | y)``, for any solver (DPS, PGDM, TMPD, MMPS, DiffPIR, and Trained, which a network has
learned); some are solvers (Replacement, RePaint, DDRM); ``smc`` moves particles whose weights make
them exact. :func:`solve` runs any of them by its name.
"""

from . import methods, operators
from .channels import Channels, Grayscale
from .convolution import Convolution, MotionBlur
from .custom import Custom
from .ddrm import DDRM
from .diffpir import DiffPIR
from .dps import DPS
from .fourier import Fourier, FourierLines
from .linear import Linear
from .mask import Mask
from .mmps import MMPS
from .operator import Operator, Spectrum
from .particles import Particles
from .pgdm import PGDM
from .projection import RandomProjection
from .repaint import RePaint
from .replacement import Replacement
from .separable import AveragePool, Bicubic, Blur
from .smc import smc
from .solving import solve
from .tmpd import TMPD
from .trained import Trained

__all__ = [
    "DDRM",
    "DPS",
    "MMPS",
    "PGDM",
    "TMPD",
    "AveragePool",
    "Bicubic",
    "Blur",
    "Channels",
    "Convolution",
    "Custom",
    "DiffPIR",
    "Fourier",
    "FourierLines",
    "Grayscale",
    "Linear",
    "Mask",
    "MotionBlur",
    "Operator",
    "Particles",
    "RandomProjection",
    "RePaint",
    "Replacement",
    "Spectrum",
    "Trained",
    "methods",
    "operators",
    "smc",
    "solve",
]
