"""What networks are given of an item: images of masks and operators, in training and after."""

import math

import pytest
import torch

import scoresde as sd
from scoresde import given
from scoresde.checkpoint import widened
from scoresde.config import ConfigError, describe
from scoresde.inverse.fourier import Fourier
from scoresde.inverse.linear import Linear
from scoresde.inverse.mask import Mask
from scoresde.inverse.separable import AveragePool, Blur
from scoresde.inverse.trained import Trained
from scoresde.noise import KeyedNoise
from scoresde.random_masks import KINDS, random_masks
from scoresde.training import Trainer, prepare


@pytest.mark.parametrize("spatial", [(40,), (28, 28), (8, 9, 10)])
@pytest.mark.parametrize("kind", KINDS)
def test_masks_hide_a_part_and_differ(spatial, kind):
    masks = random_masks(200, spatial, (kind,), KeyedNoise(0))
    assert masks.shape == (200, 1, *spatial)
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    known = masks.flatten(1).mean(1)
    assert 0.03 < float(known.mean()) < 0.97
    assert len(masks.flatten(1).unique(dim=0)) > 60
    assert float(((known > 0) & (known < 1)).float().mean()) > 0.7


def test_kinds_of_masks_have_equal_chances_and_their_own_look():
    masks = random_masks(3000, (28, 28), KINDS, KeyedNoise(1))
    # Only masks of single pixels change from nearly every entry to the next.
    changes = (masks.diff(dim=3) != 0).float().flatten(1).mean(1)
    assert abs(float((changes > 0.2).float().mean()) - 0.25 * 0.72) < 0.05  # 2 p (1 - p) > 0.2
    outside = random_masks(500, (28, 28), ("outside",), KeyedNoise(2))[:, 0]
    rows, columns = outside.amax(2).sum(1), outside.amax(1).sum(1)
    assert torch.equal(outside.flatten(1).sum(1), rows * columns)  # one box is known


def test_a_mask_does_not_depend_on_its_batch():
    many = random_masks(6, (12, 12), KINDS, KeyedNoise(3))
    alone = random_masks(1, (12, 12), KINDS, KeyedNoise(3, start=4))
    assert torch.equal(many[4:5], alone)


def test_the_image_of_a_mask_in_training_is_that_of_its_measurement():
    masked, x0 = given.Masked(empty=0.0), torch.randn(16, 3, 10, 10)
    image = masked.draw(x0, KeyedNoise(0))
    assert image.shape == (16, masked.channels((3, 10, 10)), 10, 10)
    mask = image[:1, 3:]
    operator = Mask(mask[0], (3, 10, 10))
    assert torch.equal(masked.image(operator, operator(x0[:1])), image[:1])
    assert torch.equal(image[:, :3], image[:, 3:] * x0)


def test_the_mask_of_a_vector_is_as_long_as_it_is():
    masked, x0 = given.Masked(empty=0.0), torch.randn(64, 7)
    image = masked.draw(x0, KeyedNoise(0))
    assert image.shape == (64, masked.channels((7,)))
    assert torch.equal(image[:, :7], image[:, 7:] * x0)
    assert len(image[:, 7:].unique(dim=0)) > 20
    row = next(i for i in range(64) if 0 < image[i, 7:].sum() < 7)
    operator = Mask(image[row, 7:])
    assert torch.equal(masked.image(operator, operator(x0[row : row + 1])), image[row : row + 1])


def test_a_share_of_the_items_is_given_nothing():
    image = given.Masked(empty=0.3).draw(torch.ones(4000, 1, 4), KeyedNoise(0))
    nothing = (image.flatten(1) == 0).all(1).float().mean()
    full = given.Masked(empty=0.0).draw(torch.ones(4000, 1, 4), KeyedNoise(0))
    expected = 0.3 + 0.7 * (full.flatten(1) == 0).all(1).float().mean()
    assert abs(float(nothing - expected)) < 3 * math.sqrt(0.25 / 4000)
    assert bool((given.Masked(empty=1.0).draw(torch.ones(50, 1, 4)) == 0).all())


def test_the_image_of_an_operator_is_its_pseudo_inverse_and_a_one():
    degraded = given.Degraded({"name": "average-pool", "factor": 2}, empty=0.0)
    x0 = torch.randn(5, 1, 8, 8)
    image = degraded.draw(x0, KeyedNoise(0))
    means = torch.nn.functional.avg_pool2d(x0, 2)
    assert torch.allclose(image[:, :1], means.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert bool((image[:, 1:] == 1).all())
    operator = AveragePool((1, 8, 8), 2)
    assert torch.allclose(degraded.image(operator, operator(x0)), image)
    noisy = given.Degraded({"name": "average-pool", "factor": 2}, noise_std=0.5, empty=0.0)
    many = torch.zeros(2000, 1, 8, 8)
    assert abs(float(noisy.draw(many, KeyedNoise(0))[:, 0].std()) - 0.5) < 0.01


def test_what_was_not_trained_for_is_refused():
    masked, degraded = given.Masked(), given.Degraded({"name": "average-pool", "factor": 2})
    pool, y = AveragePool((1, 8, 8), 2), torch.zeros(1, 1, 4, 4)
    with pytest.raises(ConfigError, match="what a mask hides"):
        masked.image(pool, y)
    with pytest.raises(ConfigError, match="trained to undo AveragePool"):
        degraded.image(AveragePool((1, 8, 8), 4), torch.zeros(1, 1, 2, 2))
    mask = torch.ones(3, 4, 4)
    mask[0, 0, 0] = 0
    with pytest.raises(ConfigError, match="all channels share"):
        masked.image(Mask(mask), torch.zeros(1, 3, 4, 4))
    with pytest.raises(ConfigError, match="what a mask hides"):  # it has a mask of frequencies
        masked.image(Fourier(torch.ones(1, 4, 4)), torch.zeros(1, 1, 4, 4))
    with pytest.raises(ConfigError, match=r"finite and >= 0, got inf"):
        given.Degraded(noise_std=math.inf)
    with pytest.raises(ConfigError, match=r"unknown kind of mask 'boxs'; did you mean 'boxes'"):
        given.Masked(kinds=("boxs",))
    with pytest.raises(ConfigError, match=r"given.empty must be in \[0, 1\], got 2"):
        given.Masked(empty=2)


def test_an_operator_of_the_same_kind_that_does_something_else_is_refused():
    blurred = given.Degraded({"name": "blur", "std": 1.0})
    y = torch.randn(1, 1, 8, 8)
    assert blurred.image(Blur((1, 8, 8), 1.0), y).shape == (1, 2, 8, 8)
    for _ in range(2):  # however often it is asked
        with pytest.raises(ConfigError, match=r"trained to undo Blur.*std=1.0.*not Blur.*std=2.0"):
            blurred.image(Blur((1, 8, 8), 2.0), y)
    same = Linear(AveragePool((1, 4, 4), 2).dense(), (1, 4, 4))
    pooled = given.Degraded({"name": "average-pool", "factor": 2})
    with pytest.raises(ConfigError, match="trained to undo AveragePool"):
        pooled.image(same, torch.randn(1, 4))  # the numbers, but of another shape
    assert given.Masked(kinds="boxes").kinds == ("boxes",)


def test_an_operator_is_made_once_for_a_shape():
    degraded = given.Degraded({"name": "random-projection", "count": 3})
    assert degraded.of((2, 4)) is degraded.of([2, 4])
    assert degraded.of((2, 5)).shape == (2, 5)
    again = given.Degraded({"name": "random-projection", "count": 3})
    assert degraded == again
    assert describe(degraded) == describe(again)


def test_what_a_mask_hides_has_no_say():
    mask = Mask(torch.tensor([[[1.0, 0.0], [1.0, 1.0]]]))
    y = torch.tensor([[[[0.3, 0.0], [-0.2, 0.9]]]])
    nan = y.clone()
    nan[0, 0, 0, 1] = math.nan
    assert torch.equal(given.Masked().image(mask, nan), given.Masked().image(mask, y))


@pytest.mark.parametrize(
    "make",
    [
        lambda channels: sd.nets.UNet((1, 6, 6), width=8, fourier=(3,), image_channels=channels),
        lambda channels: sd.nets.NCSNpp((1, 6, 6), width=8, image_channels=channels),
        lambda channels: sd.nets.NCSNpp(
            (1, 6, 6), width=8, input_pyramid="skip", combine="cat", image_channels=channels
        ),
        lambda channels: sd.nets.ADM(
            (1, 6, 6), width=32, multipliers=(1, 2), blocks=1, image_channels=channels
        ),
        lambda channels: sd.nets.MLP((6,), width=16, image_channels=channels),
    ],
    ids=["unet", "ncsnpp", "pyramid", "adm", "mlp"],
)
def test_networks_take_an_image_and_none_is_zeros(make):
    torch.manual_seed(0)
    net = make(2)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(3, *net.shape)
    image, c = torch.randn(3, 2, *net.shape[1:]), torch.zeros(3)
    out = net(x, c, image=image)
    assert out.shape == x.shape
    assert torch.equal(net(x, c), net(x, c, image=torch.zeros_like(image)))
    for channel in range(2):  # each of its channels is seen
        changed = image.clone()
        changed[:, channel] += 1
        assert not torch.allclose(net(x, c, image=changed), out)
    with pytest.raises(ValueError, match="the image is of shape"):
        net(x, c, image=image[:, :1])
    with pytest.raises(ValueError, match="without one; set image_channels"):
        make(0)(x, c, image=image)


def test_a_model_keeps_what_it_was_given(tmp_path):
    net = sd.nets.UNet((1, 8, 8), width=8, image_channels=2)
    model = sd.ScoreModel(net, sd.VP(), sd.V(), given=given.Masked(empty=0.25))
    model.save(tmp_path)
    loaded = sd.load(tmp_path)
    assert loaded.given == given.Masked(empty=0.25)
    assert sd.ScoreModel(sd.nets.MLP((2,)), sd.VP(), sd.V()).given is None


def test_a_trained_model_is_the_score_of_its_image():
    net = sd.nets.UNet((1, 8, 8), width=8, image_channels=2)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model = sd.ScoreModel(net, sd.VP(), sd.V(), given=given.Masked())
    mask = torch.ones(1, 8, 8)
    mask[:, :4] = 0
    operator, x0 = Mask(mask), torch.randn(2, 1, 8, 8)
    y = operator(x0)
    score, x, t = Trained(model, operator, y[:1]), torch.randn(2, 1, 8, 8), 0.5
    image = torch.cat([y, mask.expand(2, 1, 8, 8)], 1)
    with torch.no_grad():
        assert torch.equal(score(x, t), model(x, t, image=image[:1].expand(2, -1, -1, -1)))
        assert torch.equal(score(x, t, measurement=y), model(x, t, image=image))
        assert torch.equal(score.denoise(x, t), model.denoise(x, t, image=image[[0, 0]]))
    with pytest.raises(ValueError, match="2 measurements do not fit 3 samples"):
        Trained(model, operator, y)(torch.randn(3, 1, 8, 8), t)
    with pytest.raises(
        ValueError, match="Trained needs a finite noise_std >= 0, one number, got -1"
    ):
        Trained(model, operator, y, -1.0)
    with pytest.raises(ConfigError, match="not trained to be given a measurement"):
        Trained(sd.ScoreModel(sd.nets.MLP((2,)), sd.VP(), sd.V()), operator, y)


def test_the_image_of_a_measurement_is_where_the_model_is():
    class Far(sd.Score):
        """On a device of its own, in a dtype of its own."""

        sde, given = sd.VP(), given.Masked()
        device, dtype = torch.device("meta"), torch.float32

        def __call__(self, x, t, image):
            return x

    mask = Mask(torch.tensor([[1.0, 0.0]]))
    ((_, cond),) = Trained(Far(), mask, torch.ones(1, 1, 2, dtype=torch.float64)).asks({})
    assert (cond["image"].device.type, cond["image"].dtype) == ("meta", torch.float32)


def test_further_conditions_change_nothing_at_first():
    small = sd.nets.UNet((1, 8, 8), width=8, fourier=(2,))
    for parameter in small.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    large = sd.nets.UNet((1, 8, 8), width=8, fourier=(2,), image_channels=2, num_classes=3)
    large.load_state_dict(widened(small.state_dict(), large.state_dict()))
    x, c = torch.randn(2, 1, 8, 8), torch.zeros(2)
    y, image = torch.tensor([0, 2]), torch.randn(2, 2, 8, 8)
    assert torch.allclose(large(x, c, y, image), small(x, c), atol=1e-6)


CONFIG = {
    "sde": {"name": "vp"},
    "net": {"width": 8, "multipliers": [1], "blocks": 1, "attention": []},
    "data": {"source": "digits", "limit": 200},
    "given": {"name": "masked", "empty": 0.0},
    "training": {"steps": 30, "batch_size": 32, "evaluations": 1, "lr": 0.003},
    "sampling": {"steps": 4, "count": 4},
    "likelihood": {"items": 0},
}


def test_training_gives_the_network_its_images(tmp_path):
    job = prepare(CONFIG, tmp_path / "run", torch.device("cpu"))
    assert job.model.net.image_channels == 2
    assert job.config["given"]["name"] == "masked"
    Trainer(job, say=lambda text: None).run()
    stem = job.model.net.stem.weight
    untrained = prepare(CONFIG, tmp_path / "other", torch.device("cpu")).model.net.stem.weight
    # AdamW moves a weight only where there is a gradient: the image's channels have had one.
    assert float((stem - untrained).detach()[:, 1:].abs().mean()) > 1e-3
    assert (tmp_path / "run" / "samples").is_dir()


def test_items_that_have_no_such_image_are_refused(tmp_path):
    config = {**CONFIG, "given": {"name": "degraded", "operator": {"name": "grayscale"}}}
    with pytest.raises(ConfigError, match="given 'degraded' does not suit items of shape"):
        prepare(config, tmp_path, torch.device("cpu"))
