"""Networks ``F(x, c_noise, **cond)``: one architecture a file, its fields its configuration."""

from .dit import DiT
from .edm2 import EDM2
from .mlp import MLP
from .ncsnpp import NCSNpp
from .unet import UNet

__all__ = ["EDM2", "MLP", "DiT", "NCSNpp", "UNet"]
