"""Networks ``F(x, c_noise, **cond)``: one architecture a file, its fields its configuration."""

from .mlp import MLP
from .ncsnpp import NCSNpp
from .unet import UNet

__all__ = ["MLP", "NCSNpp", "UNet"]
