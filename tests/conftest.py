import os
from pathlib import Path

import pytest
import torch

import scoresde as sd

torch.set_num_threads(1)  # two workers share the machine: more threads are slower, not faster

SDES = {
    "vp": lambda: sd.VP(),
    "subvp": lambda: sd.SubVP(),
    "ve": lambda: sd.VE(),
    "cosine": lambda: sd.Cosine(),
    "edm": lambda: sd.EDM(),
    "linear": lambda: sd.Linear(),
    "ddpm": lambda: sd.DDPM(),
}


@pytest.fixture(params=list(SDES))
def sde(request):
    """Every forward process, with its defaults."""
    return SDES[request.param]()


@pytest.fixture
def mixture():
    """A float64 mixture in two dimensions with zero mean, about unit variance."""
    means = torch.tensor([[1.0, 0.6], [-1.0, 0.4], [0.0, -1.0]], dtype=torch.float64)
    stds = torch.tensor([[0.3, 0.4], [0.4, 0.25], [0.35, 0.3]], dtype=torch.float64)
    return sd.GaussianMixture([1.0, 1.0, 1.0], means, stds)


ORIGINALS = Path(__file__).parent / "originals"


@pytest.fixture
def original():
    """The folder of a checkpoint that another project's own code wrote, by its name."""

    def folder(name: str) -> Path:
        for root in (ORIGINALS, Path(os.environ.get("SCORESDE_ORIGINALS", ORIGINALS))):
            if (root / name).is_dir():
                return root / name
        pytest.skip(f"{name} is not here: SCORESDE_ORIGINALS names a folder of more")

    return folder
