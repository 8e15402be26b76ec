"""Models that are given an image: widened, asked without one, told of, kept on disk."""

import pytest
import torch
from click.testing import CliRunner

import scoresde as sd
from scoresde import given
from scoresde.checkpoint import widened
from scoresde.cli.convert import command as convert
from scoresde.cli.info import model_facts
from scoresde.conditions import randomize
from scoresde.config import ConfigError
from scoresde.guidance import ClassifierFree
from scoresde.interop.card import model_card
from scoresde.training import Trainer, prepare
from scoresde.training.report import finish

SMALL = {"width": 16, "multipliers": (1, 2), "blocks": 1, "attention": ()}
WIDENED = {
    "mlp": (sd.nets.MLP, (3,), {"width": 16, "blocks": 1}),
    "unet": (sd.nets.UNet, (1, 8, 8), {**SMALL, "fourier": (2,)}),
    "ncsnpp": (sd.nets.NCSNpp, (1, 8, 8), SMALL),
    "residual": (sd.nets.NCSNpp, (1, 8, 8), {**SMALL, "input_pyramid": "residual"}),
    "skip": (sd.nets.NCSNpp, (1, 8, 8), {**SMALL, "input_pyramid": "skip"}),
    "adm": (sd.nets.ADM, (1, 8, 8), {**SMALL, "width": 32}),
    "ddpm": (sd.nets.DDPMUNet, (1, 8, 8), {"widths": (16,), "blocks": 1, "groups": 8,
                                           "attention": ()}),
    "dit": (sd.nets.DiT, (1, 8, 8), {"patch": 4, "width": 32, "depth": 1, "heads": 2}),
}  # fmt: skip


def networked(empty, classes=None):
    """A model with weights that use all that it is given."""
    net = sd.nets.UNet((1, 8, 8), width=8, image_channels=2, num_classes=classes)
    randomize(net)
    masked = given.Masked(empty=empty)
    return sd.ScoreModel(net, sd.VP(), sd.V(), shape=(1, 8, 8), given=masked).eval()


@pytest.mark.parametrize("name", WIDENED)
def test_further_conditions_change_nothing_at_first(name):
    net, shape, fields = WIDENED[name]
    small = net(shape, **fields)
    randomize(small)
    fields, cond = {**fields, "num_classes": 3}, {"y": torch.tensor([0, 2])}
    if hasattr(net, "image_channels"):
        fields["image_channels"] = 2
        cond["image"] = torch.randn(2, 2, *shape[1:])
    large = net(shape, **fields)
    large.load_state_dict(widened(small.state_dict(), large.state_dict()))
    x, c = torch.randn(2, *shape), torch.zeros(2)
    with torch.no_grad():
        out, wide = small.eval()(x, c), large.eval()(x, c, **cond)
    assert float(out.std()) > 0.05
    torch.testing.assert_close(wide, out, rtol=1e-5, atol=1e-5)


def test_a_model_that_was_never_without_its_image_is_not_asked_without():
    model, x = networked(0.0), torch.randn(2, 1, 8, 8)
    calls = (
        model,
        model.denoise,
        lambda x, t: sd.sample(model, (2, 1, 8, 8), solver="ddim", steps=1),
        lambda x, t: sd.log_prob(model, x, method="rk4", steps=1),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"without an image .*\(given.empty is 0\)") as said:
            call(x, 0.5)
        assert "\n" not in str(said.value)
    with torch.no_grad():
        assert networked(0.1)(x, 0.5).isfinite().all()
        assert model(x, 0.5, image=torch.zeros(2, 2, 8, 8)).isfinite().all()


def test_guidance_keeps_an_image_that_is_never_absent():
    x, y, image = torch.randn(2, 1, 8, 8), torch.tensor([1, 2]), torch.randn(2, 2, 8, 8)
    for empty, kept in ((0.0, image), (0.1, torch.zeros_like(image))):
        model = networked(empty, classes=3)
        with torch.no_grad():
            led = ClassifierFree(model, 3.0)(x, 0.5, y=y, image=image)
            plain, both = model(x, 0.5, image=kept), model(x, 0.5, y=y, image=image)
        assert float((both - plain).abs().max()) > 1e-3
        torch.testing.assert_close(led, plain + 3 * (both - plain), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="needs a condition to drop"):
        ClassifierFree(networked(0.0), 3.0)(x, 0.5, image=image)


def test_such_a_model_is_told_of_and_read_again(tmp_path):
    model = networked(0.0)
    model.save(tmp_path / "model")
    assert sd.load(tmp_path / "model").given == model.given
    assert model_facts(model)["given"]["name"] == "masked"
    row = "| given an image | `masked` (kinds=boxes, outside, strokes, pixels, empty=0) |"
    assert row in model_card(model)
    model.given = None
    assert model_facts(model)["given"] is None
    assert "given an image" not in model_card(model)
    done = CliRunner().invoke(convert, [str(tmp_path / "model"), str(tmp_path / "copy")])
    assert done.exit_code == 0, done.output
    assert sd.load(tmp_path / "copy").given == given.Masked(empty=0.0)


CONFIG = {
    "net": {"width": 8, "multipliers": [1], "blocks": 1, "attention": []},
    "data": {"source": "digits", "limit": 100},
    "given": {"name": "masked", "empty": 0.0},
    "training": {"steps": 2, "batch_size": 8, "evaluations": 1, "track": "none"},
    "sampling": {"steps": 2, "count": 4},
    "likelihood": {"items": 2},
}


@pytest.mark.parametrize("empty", [0.0, 0.1])
def test_a_report_has_a_likelihood_where_there_is_one(empty, tmp_path):
    config = {**CONFIG, "given": {"name": "masked", "empty": empty}}
    job = prepare(config, tmp_path / "run", torch.device("cpu"))
    trainer = Trainer(job, say=lambda text: None)
    trainer.run(show_progress=False)
    found = finish(trainer.averaged, job, {}, False)
    assert ("heldout" in found) == (empty > 0)
    assert found["sampling"]["count"] == 4


@pytest.mark.parametrize("net", ["dit", "edm2", "ddpm-unet"])
def test_networks_that_take_no_image_are_refused(net, tmp_path):
    config = {**CONFIG, "net": {"name": net}}
    with pytest.raises(ConfigError, match=f"{net} takes no image, which given needs; accepted: a"):
        prepare(config, tmp_path, torch.device("cpu"))
