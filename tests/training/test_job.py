import pytest
import torch

from scoresde.config import ConfigError
from scoresde.training.job import prepare


@pytest.mark.parametrize(
    ("net", "said"),
    [
        (
            {"name": "adm-classifier", "preset": "tiny", "num_classes": 10},
            "net does not take the data",
        ),
        (
            {"name": "ncsnpp", "preset": "tiny", "out_channels": 2},
            "hybrid alone trains a variance",
        ),
        ({"name": "ncsnpp", "preset": "tiny", "out_channels": 3}, "net does not take the data"),
        ({"name": "ncsnpp", "preset": "tiny", "embedding": "log-fourier"}, "no finite output"),
        ({"name": "adm", "preset": "tiny", "low_res": True}, "net does not take the data"),
    ],
    ids=str,
)
def test_a_network_that_cannot_be_trained_is_refused_before_anything(tmp_path, net, said):
    with pytest.raises(ConfigError, match=said):
        prepare({"net": net}, tmp_path / "run", torch.device("cpu"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["ncsnpp", "adm", "ddpm-unet", "dit", "edm2"])
def test_networks_of_the_field_are_ready(tmp_path, name):
    config = {"net": {"name": name, "preset": "tiny"}}
    job = prepare(config, tmp_path / "run", torch.device("cpu"))
    assert job.model.net.shape == (1, 8, 8)
