import pytest
import torch
import yaml
from torch import nn

import scoresde as sd
from scoresde import config, files
from scoresde.data import Scaler


def small_model(sde=None, parameterization=None):
    torch.manual_seed(0)
    net = sd.nets.UNet((1, 8, 8), width=8, multipliers=(1, 2), blocks=1, attention=(1,))
    for parameter in net.parameters():
        nn.init.normal_(parameter, 0, 0.1)
    scaler = Scaler((8.5,), (2 / 17,), 17)
    return sd.ScoreModel(
        net, sde or sd.VP(), parameterization or sd.V(0.7), shape=(1, 8, 8), scaler=scaler
    )


def test_a_saved_model_comes_back_the_same(tmp_path, sde):
    model = small_model(sde, sd.Karras(0.3))
    model.save(tmp_path / "m")
    again = sd.load(tmp_path / "m")
    x, t = torch.randn(2, 1, 8, 8), sde.t_max / 2
    assert torch.equal(again(x, t), model.eval()(x, t))
    assert again.sde == sde
    assert again.parameterization == sd.Karras(0.3)
    assert again.scaler == model.scaler
    assert again.shape == (1, 8, 8)
    assert not again.training
    assert {p.name for p in (tmp_path / "m").iterdir()} == {"model.safetensors", "config.yaml"}


def test_epsilons_travel_with_the_model(tmp_path):
    small_model(sd.VP(t_min=1e-4, t_min_sampling=2e-3, t_min_likelihood=5e-4)).save(tmp_path)
    sde = sd.load(tmp_path).sde
    assert (sde.t_min, sde.t_min_sampling, sde.t_min_likelihood) == (1e-4, 2e-3, 5e-4)


def test_a_truncated_file_is_refused(tmp_path):
    small_model().save(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or damaged"):
        sd.load(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match="no model at"):
        sd.load(tmp_path)


def test_a_file_of_another_network_names_what_does_not_fit(tmp_path):
    small_model().save(tmp_path)
    content = yaml.safe_load((tmp_path / "config.yaml").read_text())
    content["net"]["width"] = 16
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match="does not fit the network: embed"):
        sd.load(tmp_path)


def test_missing_models_are_named(tmp_path):
    with pytest.raises(ValueError, match="there is no such file or folder"):
        sd.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"no config\.yaml"):
        sd.load(tmp_path)
    with pytest.raises(ValueError, match="unknown model 'zoo:nothing'"):
        sd.load("zoo:nothing")
    with pytest.raises(ValueError, match="unknown weights 'best'"):
        sd.load(tmp_path, weights="best")


def test_a_failed_save_leaves_the_old_model(tmp_path, monkeypatch):
    model = small_model()
    model.save(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(ValueError, match="No space left on device"):
        model.save(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"model.safetensors", "config.yaml"}


def test_networks_that_cannot_be_described_are_refused(tmp_path):
    model = sd.ScoreModel(nn.Linear(2, 2), sd.VP(), sd.Eps(), shape=(2,))
    with pytest.raises(ValueError, match="Linear cannot be saved"):
        model.save(tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_half_precision_weights_load_into_float32(tmp_path):
    model = small_model()
    model.save(tmp_path)
    tensors = files.read_tensors(tmp_path / "model.safetensors")
    files.write_tensors(tmp_path / "model.safetensors", {k: v.half() for k, v in tensors.items()})
    again = sd.load(tmp_path)
    assert all(p.dtype == torch.float32 for p in again.parameters())
    torch.testing.assert_close(
        again.net.state_dict()["stem.weight"], tensors["stem.weight"], rtol=1e-3, atol=1e-4
    )


def test_a_model_refuses_items_of_another_shape():
    with pytest.raises(
        ValueError, match=r"\(2, 1, 9, 9\) does not fit a model of \(B, \*\(1, 8, 8\)\)"
    ):
        small_model()(torch.zeros(2, 1, 9, 9), 0.5)


def test_batched_times_equal_single_ones():
    model = small_model().eval()
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    together = model(x, t)
    assert together.dtype == torch.float32
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], model(x[i : i + 1], float(t[i])))


def test_readings_of_a_score_agree(sde):
    model = small_model(sde).eval()
    x, t = torch.randn(2, 1, 8, 8), sde.t_max * 0.4
    score, eps, x0 = model(x, t), model.noise(x, t), model.denoise(x, t)
    torch.testing.assert_close(eps, -sde.sigma(t) * score)
    torch.testing.assert_close(sde.alpha(t) * x0 + sde.sigma(t) * eps, x)
    velocity = sde.drift(x, t) - sde.diffusion(t) ** 2 / 2 * score
    torch.testing.assert_close(model.velocity(x, t), velocity)


def test_sections_describe_what_they_built(sde):
    section = config.describe(sde)
    assert config.build(section, sd.sde, "sde") == sde
    assert yaml.safe_load(yaml.safe_dump(section)) == section
