import pytest
import torch

from scoresde import nets
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


@pytest.mark.parametrize("ignored", ["y", "image"])
def test_a_network_that_ignores_a_condition_is_refused(tmp_path, monkeypatch, ignored):
    forward, config = nets.UNet.forward, {
        "net": {"width": 8, "multipliers": [1], "blocks": 1, "attention": [], "num_classes": 10},
        "given": {"name": "masked"},
    }  # fmt: skip

    def deaf(self, x, c_noise, y=None, image=None):
        cond = {"y": y, "image": image, ignored: None}
        return forward(self, x, c_noise, **cond)

    prepare(config, tmp_path, torch.device("cpu"))
    monkeypatch.setattr(nets.UNet, "forward", deaf)
    with pytest.raises(ConfigError, match=f"the condition '{ignored}' is given, but the output"):
        prepare(config, tmp_path, torch.device("cpu"))


@pytest.mark.parametrize("name", ["ncsnpp", "adm", "ddpm-unet", "dit", "edm2"])
def test_networks_of_the_field_are_ready(tmp_path, name):
    config = {"net": {"name": name, "preset": "tiny"}}
    job = prepare(config, tmp_path / "run", torch.device("cpu"))
    assert job.model.net.shape == (1, 8, 8)
