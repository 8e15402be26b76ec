"""Networks ``F(x, c_noise, **cond)``: one architecture a file, its fields its configuration."""

from .mlp import MLP
from .unet import UNet

__all__ = ["MLP", "UNet"]
