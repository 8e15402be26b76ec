"""The closed-form checks again on an accelerator; skipped where there is none."""

import pytest
import torch

import scoresde as sd
from scoresde.noise import KeyedNoise
from scoresde.training import Trainer, prepare

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture
def on_gpu(mixture):
    return mixture.to("cuda")


def test_keyed_noise_is_that_of_the_cpu():
    here, there = KeyedNoise(7, 3), KeyedNoise(7, 3)
    for _ in range(2):
        a, b = here.normal((4, 3, 5)), there.normal((4, 3, 5), "cuda")
        torch.testing.assert_close(a, b.cpu(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "solver", ["euler-maruyama", "reverse-diffusion", "ancestral", "ddim", "heun", "pc", "ode"]
)
def test_samples_are_those_of_the_cpu(sde, mixture, on_gpu, solver):
    x = 2 * torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_T = sde.prior_std * x / 2
    settings = {"solver": solver, "steps": None if solver == "ode" else 12}
    here = sd.sample(mixture.score(sde), x_T=x_T, **settings)
    there = sd.sample(on_gpu.score(sde), x_T=x_T.cuda(), **settings)
    assert there.x.is_cuda
    assert there.mean_nfe == here.mean_nfe
    torch.testing.assert_close(here.x, there.x.cpu(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_likelihood_is_that_of_the_cpu(sde, mixture, on_gpu, divergence):
    x = mixture.sample(8, torch.Generator().manual_seed(0))
    here = sd.log_prob(mixture.score(sde), x, divergence=divergence)
    there = sd.log_prob(on_gpu.score(sde), x.cuda(), divergence=divergence)
    assert there.log_prob.is_cuda
    torch.testing.assert_close(here.log_prob, there.log_prob.cpu(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_network_trains_and_samples(tmp_path, precision):
    config = {"training": {"steps": 30, "evaluations": 0, "precision": precision}}
    trainer = Trainer(prepare(config, tmp_path, torch.device("cuda")), say=lambda line: None)
    trainer.run(show_progress=False)
    drawn = sd.sample(trainer.averaged, (4, 1, 8, 8), steps=4)
    assert drawn.x.is_cuda
    assert drawn.x.isfinite().all()


NETWORKS = {
    "ncsnpp": lambda: sd.nets.NCSNpp(
        (3, 16, 16), **{**sd.nets.NCSNpp.presets["ncsnpp"], "width": 32, "blocks": 1}
    ),
    "adm": lambda: sd.nets.ADM((3, 16, 16), **sd.nets.ADM.presets["tiny"]),
    "ddpm-unet": lambda: sd.nets.DDPMUNet((3, 16, 16), **sd.nets.DDPMUNet.presets["tiny"]),
    "dit": lambda: sd.nets.DiT((3, 16, 16), **sd.nets.DiT.presets["tiny"]),
    "edm2": lambda: sd.nets.EDM2((3, 16, 16), **sd.nets.EDM2.presets["tiny"]),
}


def awake(name):
    torch.manual_seed(0)
    net = NETWORKS[name]().eval()
    for parameter in net.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        elif parameter.ndim == 0:  # a gain
            torch.nn.init.ones_(parameter)
    return net, torch.randn(4, 3, 16, 16), torch.linspace(-1, 1, 4)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_give_what_they_give_on_the_cpu(name):
    net, x, c = awake(name)
    here = torch.nn.functional.mse_loss(net(x, c), x)
    gradients = torch.autograd.grad(here, [p for p in net.parameters() if p.ndim > 1],
                                    allow_unused=True)  # fmt: skip
    net.cuda()
    there = torch.nn.functional.mse_loss(net(x.cuda(), c.cuda()), x.cuda())
    torch.testing.assert_close(here, there.cpu(), rtol=1e-3, atol=1e-4)  # TF32 may be on
    wanted = [p for p in net.parameters() if p.ndim > 1]
    for a, b in zip(gradients, torch.autograd.grad(there, wanted, allow_unused=True), strict=True):
        if a is not None:
            torch.testing.assert_close(a, b.cpu(), rtol=0, atol=0.02 * float(a.abs().max()))


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_in_half_precision_and_compiled(name):
    net, x, c = awake(name)
    net, x, c = net.cuda(), x.cuda(), c.cuda()
    with torch.no_grad():
        exact = net(x, c)
        compiled = torch.compile(net, fullgraph=True)(x, c)
        with torch.autocast("cuda", torch.bfloat16):
            half = net(x, c).float()
    torch.testing.assert_close(exact, compiled, rtol=1e-2, atol=1e-2 * float(exact.std()))
    assert (half - exact).std() < 0.05 * exact.std()
