"""Networks ``F(x, c_noise, **cond)``: one architecture a file, its fields its configuration."""

from .adm import ADM
from .adm_classifier import ADMClassifier
from .ddpm import DDPMUNet
from .dit import DiT
from .edm2 import EDM2
from .mlp import MLP
from .mlp_classifier import MLPClassifier
from .ncsnpp import NCSNpp
from .unet import UNet

__all__ = [
    "ADM", "EDM2", "MLP", "ADMClassifier", "DDPMUNet", "DiT", "MLPClassifier", "NCSNpp", "UNet",
]  # fmt: skip
