"""The operators by name: every class of ``__all__`` is built from its kebab-case name."""

from .channels import Channels, Grayscale
from .convolution import Convolution, MotionBlur
from .custom import Custom
from .fourier import Fourier, FourierLines
from .linear import Linear
from .mask import Mask
from .projection import RandomProjection
from .regions import Half, MiddleBox, Outpaint, Picture, RandomPixels, Stripes, Strokes
from .separable import AveragePool, Bicubic, Blur

__all__ = [
    "AveragePool",
    "Bicubic",
    "Blur",
    "Channels",
    "Convolution",
    "Custom",
    "Fourier",
    "FourierLines",
    "Grayscale",
    "Half",
    "Linear",
    "Mask",
    "MiddleBox",
    "MotionBlur",
    "Outpaint",
    "Picture",
    "RandomPixels",
    "RandomProjection",
    "Stripes",
    "Strokes",
]
