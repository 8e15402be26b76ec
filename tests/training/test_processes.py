"""Every process with every parameterization trains, samples and has a likelihood."""

import pytest
import torch

import scoresde as sd
from scoresde import config, parameterization
from scoresde.training import Trainer, prepare


@pytest.mark.parametrize("predicts", sorted(config.names(parameterization)))
@pytest.mark.parametrize("process", sorted(config.names(sd.sde)))
def test_the_main_job_in_small(tmp_path, process, predicts):
    settings = {
        "sde": {"name": process},
        "parameterization": {"name": predicts},
        "data": {"source": "mixture8", "samples": 500},
        "net": {"width": 64, "blocks": 1},
        "objective": {"weight": "likelihood", "times": "importance"},
        "training": {"steps": 60, "batch_size": 64, "evaluations": 0, "ema": 0.9, "warmup": 5},
    }
    trainer = Trainer(prepare(settings, tmp_path, torch.device("cpu")), say=lambda line: None)
    before = trainer.heldout.errors()
    trainer.run(show_progress=False)
    after = trainer.heldout.errors()
    # In the bins of middling noise, where something can be learned in a second.
    assert sum(after[2:6]) < sum(before[2:6])
    drawn = sd.sample(trainer.averaged, (8, 2), solver="heun", steps=6)
    assert drawn.converged
    assert drawn.x.isfinite().all()
    found = sd.log_prob(trainer.averaged, drawn.x, method="rk4", steps=6, divergence="exact")
    assert found.log_prob.isfinite().all()
