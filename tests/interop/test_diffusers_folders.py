import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import scoresde as sd
from scoresde.checkpoint import CheckpointError
from scoresde.interop.diffusers import claims, export, read
from scoresde.interop.schedulers import TABLES, configuration, method, process
from scoresde.model import ScoreModel
from scoresde.nets.ddpm import DDPMUNet
from scoresde.nets.dit import DiT
from scoresde.noise_labels import LogNoise, NoiseLevel, Time
from scoresde.parameterization import X0, Eps, Karras, RawScore, ScaledScore, V

diffusers = pytest.importorskip("diffusers")

BASE = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": None,
}
PIXELS = sd.data.Scaler((128.0,), (2 / 256,), 256)
UNIT = sd.data.Scaler((0.0,), (1 / 256,), 256)


def unet(seed=0, **fields):
    torch.manual_seed(seed)
    return diffusers.UNet2DModel(**{**BASE, **fields}).eval()


def pipeline(folder, net=None, scheduler=None):
    net = net or unet()
    diffusers.DDPMPipeline(net, scheduler or diffusers.DDPMScheduler()).save_pretrained(folder)
    return net


def raw(model, x, label, **cond):
    with torch.no_grad():
        return model.net(x, label, **cond)


def agrees(model, net, step=421):
    torch.manual_seed(1)
    x, label = torch.randn(2, *model.shape), torch.full((2,), float(step))
    with torch.no_grad():
        wanted = net(x, label).sample
    torch.testing.assert_close(raw(model, x, label), wanted, rtol=1e-5, atol=1e-5)


# Schedulers


SCHEDULERS = [
    ("DDPMScheduler", {}),
    ("DDPMScheduler", {"beta_schedule": "squaredcos_cap_v2"}),
    ("DDPMScheduler", {"beta_schedule": "sigmoid", "num_train_timesteps": 200}),
    ("DDPMScheduler", {"prediction_type": "sample", "beta_end": 0.03}),
    ("DDPMScheduler", {"trained_betas": [0.01, 0.02, 0.3, 0.2]}),
    ("DDIMScheduler", {"prediction_type": "v_prediction", "beta_schedule": "scaled_linear"}),
    ("DDIMScheduler", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
    ("PNDMScheduler", {"beta_start": 0.001}),
    ("DPMSolverMultistepScheduler", {"rescale_betas_zero_snr": True, "num_train_timesteps": 20}),
    ("UniPCMultistepScheduler", {"prediction_type": "sample"}),
    ("EulerDiscreteScheduler", {"beta_schedule": "scaled_linear"}),
]


@pytest.mark.parametrize(("name", "fields"), SCHEDULERS, ids=str)
def test_tables_are_those_of_diffusers(name, fields):
    theirs = getattr(diffusers, name)(**fields)
    sde, parameterization = process({"_class_name": name, **fields})
    n = len(theirs.alphas_cumprod)
    t = torch.arange(1, n + 1, dtype=torch.float64) / n
    bars = theirs.alphas_cumprod.double()
    torch.testing.assert_close(sde.alpha(t) ** 2, bars, rtol=3e-4, atol=1e-6)
    labels = parameterization.label(sde.alpha(t), sde.sigma(t))
    torch.testing.assert_close(labels, torch.arange(n, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    assert sde.t_min == sde.t_min_sampling == sde.t_min_likelihood == 1 / n


@pytest.mark.parametrize("predicts", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("step", [0, 421, 999])
def test_denoised_data_are_those_of_the_scheduler(predicts, step, tmp_path):
    scheduler = diffusers.DDPMScheduler(prediction_type=predicts, clip_sample=False)
    net = pipeline(tmp_path, scheduler=scheduler)
    model = read(tmp_path).model
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        out = net(x, step).sample
        wanted = scheduler.step(out, step, x).pred_original_sample
        found = model.denoise(x, (step + 1) / 1000)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize("name", TABLES)
def test_defaults_of_every_scheduler(name):
    try:
        theirs = getattr(diffusers, name)()
    except (ImportError, AttributeError):
        pytest.skip(f"{name} needs more than diffusers")
    sde, parameterization = process({"_class_name": name})
    c = theirs.config
    assert (sde.num_steps, sde.beta_start, sde.beta_end) == (1000, c.beta_start, c.beta_end)
    assert sde.schedule == c.beta_schedule == "linear"
    assert type(parameterization) is Eps


def test_exploding_process():
    theirs = diffusers.ScoreSdeVeScheduler()
    sde, parameterization = process({**theirs.config, "_class_name": "ScoreSdeVeScheduler"})
    assert type(parameterization) is RawScore
    assert not parameterization.scale_input
    theirs.set_sigmas(2000)
    t = torch.linspace(1, 1e-5, 2000, dtype=torch.float64)
    torch.testing.assert_close(sde.sigma(t).float(), theirs.sigmas, rtol=1e-4, atol=0)
    torch.testing.assert_close(parameterization.label(sde.alpha(t), sde.sigma(t)), sde.sigma(t))
    assert process({"_class_name": "ScoreSdeVeScheduler", "sigma_max": 50.0})[0] == sd.VE()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"_class_name": "EDMEulerScheduler"}, "unknown scheduler 'EDMEulerScheduler'"),
        ({}, "unknown scheduler None"),
        ({"_class_name": "DDPMScheduler", "beta_schedule": "laplace"}, "squaredcos_cap_v2"),
        ({"_class_name": "DDPMScheduler", "prediction_type": "flow_prediction"}, "v_prediction"),
        ({"_class_name": "DDPMScheduler", "beta_end": 2.0}, "0 < beta_start <= beta_end < 1"),
        ({"_class_name": "DDPMScheduler", "num_train_timesteps": 1}, "2 and more"),
        ({"_class_name": "DDPMScheduler", "trained_betas": [0.1, 1.5]}, "every beta"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "discrete"),
        ({"_class_name": "ScoreSdeVeScheduler", "sigma_min": -1.0}, "sigma_min"),
    ],
    ids=str,
)
def test_refuses_other_processes(fields, message):
    with pytest.raises(CheckpointError, match=message):
        process(fields)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 50},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"trained_betas": [0.1, 0.2, 0.3], "prediction_type": "sample"},
        {"beta_schedule": "sigmoid", "prediction_type": "v_prediction"},
    ],
    ids=str,
)
def test_schedulers_there_and_back(fields):
    sde, parameterization = process({"_class_name": "DDPMScheduler", **fields})
    written = configuration(sde, parameterization)
    assert all(written[key] == value for key, value in fields.items())
    assert ("trained_betas" in written) == ("trained_betas" in fields)
    assert process(json.loads(json.dumps(written))) == (sde, parameterization)


@pytest.mark.parametrize("sde", [sd.VP(), sd.Cosine(t_max=0.99)], ids=["vp", "cosine"])
def test_continuous_processes_become_tables(sde):
    label = Time(sd.VP(), 999.0)
    written = configuration(sde, V(scale_input=False, label=label))
    table, parameterization = process(written)
    i = torch.arange(1, 1000, dtype=torch.float64)
    vp = label.sde
    torch.testing.assert_close(table.log_snr((i + 1) / 1000), vp.log_snr(i / 999))
    torch.testing.assert_close(table.alpha(1 / 1000), vp.alpha(vp.t_min))
    assert type(parameterization) is V
    alpha, sigma = vp.alpha(i / 999), vp.sigma(i / 999)
    torch.testing.assert_close(
        parameterization.label(alpha, sigma), label(alpha, sigma), rtol=1e-6, atol=1e-6
    )
    diffusers.DDPMScheduler.from_config(written)


TABLE = Time(sd.DDPM(), 1000.0, -1.0)


@pytest.mark.parametrize(
    ("sde", "parameterization", "message"),
    [
        (sd.VP(), Eps(), "labels LogNoise"),
        (sd.VE(), Eps(label=TABLE), "process VE"),
        (sd.DDPM(), Eps(label=Time(sd.SubVP())), "accepted: a variance-preserving process"),
        (sd.VE(), RawScore(label=NoiseLevel()), "RawScore.scale_input=False"),
        (sd.DDPM(), RawScore(label=TABLE), "networks of RawScore"),
        (sd.DDPM(), ScaledScore(label=TABLE), "networks of ScaledScore"),
        (sd.DDPM(), Karras(label=TABLE), "networks of Karras"),
        (sd.DDPM(), Eps(sigma_data=0.5, label=TABLE), "do not scale the input"),
        (
            sd.VP(),
            Eps(label=Time(sd.VP(t_min=1e-3, t_min_likelihood=1e-3), 999.0)),
            "labels 999 t",
        ),
        (sd.VP(), Eps(label=Time(sd.VP(), 999.5)), "labels 999.5 t"),
        (sd.VP(), Eps(label=Time(sd.Cosine(), 999.0)), r"to 0\.9946"),
    ],
    ids=str,
)
def test_names_what_no_scheduler_has(sde, parameterization, message):
    with pytest.raises(CheckpointError, match=message):
        configuration(sde, parameterization)


# Folders


def test_reads_a_pipeline(tmp_path):
    scheduler = diffusers.DDPMScheduler(variance_type="fixed_large")
    net = pipeline(tmp_path, scheduler=scheduler)
    assert claims(tmp_path)
    foreign = read(tmp_path)
    model = foreign.model
    assert foreign.source == "diffusers"
    assert model.shape == (3, 8, 8)
    assert model.scaler == PIXELS
    assert not model.training
    assert model.sde == sd.DDPM(t_min=1e-3, t_min_sampling=1e-3, t_min_likelihood=1e-3)
    assert any("variance_type=fixed_large" in note for note in foreign.unmapped)
    assert any("whether they are averaged" in note for note in foreign.unmapped)
    agrees(model, net)


def test_reads_a_network_alone(tmp_path):
    net = unet()
    net.save_pretrained(tmp_path)
    assert claims(tmp_path)
    foreign = read(tmp_path)
    assert any("assumed DDPMScheduler's defaults" in note for note in foreign.unmapped)
    agrees(foreign.model, net)
    fourier = unet(time_embedding_type="fourier")
    fourier.save_pretrained(tmp_path)
    foreign = read(tmp_path)
    assert any("assumed ScoreSdeVeScheduler" in note for note in foreign.unmapped)
    assert foreign.model.sde == sd.VE(sigma_max=1348.0)
    assert foreign.model.scaler == UNIT
    agrees(foreign.model, fourier)


def test_the_scheduler_is_found_in_every_layout(tmp_path):
    net = pipeline(tmp_path, scheduler=diffusers.DDPMScheduler(num_train_timesteps=77))
    assert read(tmp_path / "unet").model.sde.num_steps == 77
    flat = tmp_path / "flat"  # the oldest pipelines
    net.save_pretrained(flat)
    (tmp_path / "model_index.json").rename(flat / "model_index.json")
    (tmp_path / "scheduler" / "scheduler_config.json").rename(flat / "scheduler_config.json")
    assert read(flat).model.sde.num_steps == 77
    agrees(read(flat).model, net)


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("shards", [True, False])
@pytest.mark.parametrize("variant", ["", "fp16", "bf16"])
def test_every_container(tmp_path, safe, shards, variant):
    net = unet()
    dtype = {"": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[variant]
    size = "20KB" if shards else "1GB"
    stored = net.to(dtype)
    stored.save_pretrained(
        tmp_path, safe_serialization=safe, max_shard_size=size, variant=variant or None
    )
    kept = len(list(tmp_path.glob("*-of-*")))
    assert (kept > 2) == shards
    foreign = read(tmp_path)
    assert all(p.dtype == torch.float32 for p in foreign.model.net.parameters())
    assert any(f"variant {variant}," in note for note in foreign.unmapped) == bool(variant)
    agrees(foreign.model, net.float())


def test_averaged_and_raw_weights(tmp_path):
    plain, averaged = pipeline(tmp_path), unet(seed=1)
    averaged.save_pretrained(tmp_path / "unet_ema")
    for weights, net in (("ema", averaged), ("raw", plain)):
        model = read(tmp_path, weights=weights).model
        agrees(model, net)
        assert model.weights == weights


def test_variants_of_averaged_and_raw_weights(tmp_path):
    averaged, plain = unet(seed=1), unet()
    averaged.save_pretrained(tmp_path)
    plain.save_pretrained(tmp_path, variant="non_ema")
    unet(seed=2).half().save_pretrained(tmp_path, variant="fp16")
    for weights, net in (("ema", averaged), ("raw", plain)):
        model = read(tmp_path, weights=weights).model
        agrees(model, net)
        assert model.weights == weights


def test_learned_variance_and_more_inputs(tmp_path):
    net = pipeline(tmp_path, unet(out_channels=6))
    model = read(tmp_path).model
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        eps, v = model.noise_and_variance(x, 0.5)
        out = net(x, 499).sample
    torch.testing.assert_close(torch.cat([eps, v], 1), out, rtol=1e-4, atol=1e-4)
    with pytest.raises(CheckpointError, match="accepted: 'learned_range'"):
        read(tmp_path, config={"scheduler": {"variance_type": "learned"}})
    pipeline(tmp_path / "more", unet(in_channels=6))
    with pytest.raises(CheckpointError, match="takes 6 channels and gives 3"):
        read(tmp_path / "more")


def test_classes_and_given_settings(tmp_path):
    net = unet(num_class_embeds=4, sample_size=None)
    net.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no sample_size"):
        read(tmp_path)
    given = {"sample_size": 8, "scheduler": {"beta_end": 0.03}}
    (tmp_path / "mine.json").write_text(json.dumps(given))
    for config in (given, tmp_path / "mine.json"):
        foreign = read(tmp_path, config=config)
        assert foreign.model.sde.beta_end == 0.03
        assert any("class labels" in note for note in foreign.unmapped)
    x, y = torch.randn(2, 3, 8, 8), torch.tensor([3, 0])
    with torch.no_grad():
        wanted = net(x, 5, class_labels=y).sample
    found = raw(foreign.model, x, torch.tensor([5.0, 5.0]), y=y)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_reads_a_transformer_beside_a_vae(tmp_path):
    torch.manual_seed(0)
    net = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        sample_size=8, num_embeds_ada_norm=5,
    ).eval()  # fmt: skip
    net.save_pretrained(tmp_path / "transformer")
    diffusers.DDIMScheduler().save_pretrained(tmp_path / "scheduler")
    index = {
        "_class_name": "DiTPipeline",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    foreign = read(tmp_path)
    assert isinstance(foreign.model.net, DiT)
    assert foreign.model.scaler is None
    assert any(note.startswith("vae:") for note in foreign.unmapped)
    x, y = torch.randn(2, 4, 8, 8), torch.tensor([1, 3])
    with torch.no_grad():
        wanted = net(x, timestep=torch.tensor([9, 9]), class_labels=y).sample
    found = raw(foreign.model, x, torch.tensor([9.0, 9.0]), y=y)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)

    export(foreign.model, tmp_path / "out")
    again = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "out" / "transformer")
    with torch.no_grad():
        out = again.eval()(x, timestep=torch.tensor([9, 9]), class_labels=y).sample
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    kept = diffusers.DDPMScheduler.from_pretrained(tmp_path / "out" / "scheduler")
    assert kept.config.variance_type == "learned_range"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "unet" / "config.json").unlink(), "no network at"),
        (lambda f: (f / "unet" / "config.json").write_text("{"), "not valid JSON"),
        (lambda f: change(f / "unet" / "config.json", _class_name="UNet2DConditionModel"),
         "a network 'UNet2DConditionModel' of diffusers; accepted: UNet2DModel"),
        (lambda f: change(f / "unet" / "config.json", layers_per_block=2), "missing are"),
        (lambda f: weights_of(f).unlink(), "no weights at"),
        (lambda f: weights_of(f).write_bytes(weights_of(f).read_bytes()[:999]), "truncated"),
        (lambda f: weights_of(f).rename(f / "unet" / "diffusion_pytorch_model.bin"), "bin"),
        (lambda f: shard(f, {"a": "../x.safetensors"}), "a shard outside of its folder"),
        (lambda f: shard(f, {}), "no weight_map"),
        (lambda f: shard(f, {"a": "b.safetensors"}), "no such file"),
    ],
)  # fmt: skip
def test_damaged_folders_are_refused_in_one_line(tmp_path, damage, message):
    pipeline(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message) as error:
        read(tmp_path)
    assert "\n" not in str(error.value)


def weights_of(folder):
    return folder / "unet" / "diffusion_pytorch_model.safetensors"


def change(file, **fields):
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def shard(folder, weight_map):
    weights_of(folder).unlink()
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


def test_a_shard_that_lacks_what_the_index_lists(tmp_path):
    unet().save_pretrained(tmp_path, max_shard_size="20KB")
    first = sorted(tmp_path.glob("*-of-*"))[0]
    state = load_file(first)
    del state["conv_in.weight"]
    save_file(state, first)
    with pytest.raises(CheckpointError, match=r"lists conv_in\.weight, which none of its shards"):
        read(tmp_path)


def test_claims_no_other_folder(tmp_path):
    assert not claims(tmp_path)
    (tmp_path / "config.yaml").write_text("")
    (tmp_path / "config.json").write_text("{}")
    assert not claims(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert not claims(tmp_path)
    change_to = {"_class_name": "UNet2DModel"}
    (tmp_path / "config.json").write_text(json.dumps(change_to))
    assert claims(tmp_path)


# Export


def tiny(**fields):
    torch.manual_seed(0)
    base = {"widths": (8, 16), "blocks": 1, "groups": 4, "embedding": "positional"}
    net = DDPMUNet((3, 8, 8), **{**base, **fields}).eval()
    for parameter in net.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return net


MODELS = {
    "ddpm": lambda: ScoreModel(
        tiny(), sd.DDPM(), Eps(scale_input=False, label=TABLE), scaler=PIXELS, weights="ema"
    ),
    "cosine table, v": lambda: ScoreModel(
        tiny(adaptive=True),
        sd.DDPM(100, schedule="cosine"),
        V(label=Time(sd.DDPM(100, schedule="cosine"), 100.0, -1.0)),
    ),
    "vp, x0": lambda: ScoreModel(tiny(), sd.VP(), X0(label=Time(sd.VP(), 999.0)), scaler=PIXELS),
    "ve": lambda: ScoreModel(
        tiny(embedding="log-fourier", over_label=True, center_input=True),
        sd.VE(sigma_max=90.0),
        RawScore(scale_input=False, label=NoiseLevel()),
        scaler=UNIT,
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_exports_a_pipeline_that_diffusers_loads(tmp_path, kind):
    model = MODELS[kind]()
    export(model, tmp_path)
    cls = diffusers.ScoreSdeVePipeline if kind == "ve" else diffusers.DDPMPipeline
    loaded = cls.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    net = diffusers.UNet2DModel.from_pretrained(tmp_path / "unet").eval()
    x, label = torch.randn(2, 3, 8, 8), torch.tensor([7.0, 42.0])
    with torch.no_grad():
        wanted = loaded.unet.eval()(x, label).sample
        assert torch.equal(net(x, label).sample, wanted)
    torch.testing.assert_close(raw(model, x, label), wanted, rtol=1e-5, atol=1e-5)
    assert loaded(num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 3)

    again = read(tmp_path).model
    assert torch.equal(raw(again, x, label), raw(model, x, label))
    assert again.weights == model.weights
    assert again.scaler == (model.scaler or PIXELS)
    assert type(again.parameterization) is type(model.parameterization)
    t = torch.tensor([0.3, 0.8])
    if kind == "vp, x0":  # the table meets the process at the labels only
        t = torch.tensor([300, 800]) / 999
        at = torch.tensor([301, 801]) / 1000
        with torch.no_grad():
            torch.testing.assert_close(again(x, at), model(x, t), rtol=1e-3, atol=1e-3)
        return
    with torch.no_grad():
        torch.testing.assert_close(again(x, t), model(x, t), rtol=1e-5, atol=1e-5)


def test_a_saved_model_is_read_again(tmp_path):
    """From diffusers into our own folder and back: nothing is lost."""
    net = pipeline(tmp_path / "theirs")
    first = read(tmp_path / "theirs").model
    export(first, tmp_path / "again")
    second = read(tmp_path / "again").model
    assert second.sde == first.sde
    assert second.parameterization == first.parameterization
    agrees(second, net)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: ScoreModel(tiny(embedding="waves"), sd.DDPM(), Eps(label=TABLE)), "embedding"),
        (lambda: ScoreModel(tiny(), sd.DDPM(), Eps(label=LogNoise())), "labels LogNoise"),
        (lambda: ScoreModel(tiny(), sd.DDPM(), Eps(label=TABLE), scaler=UNIT), r"in \[-1, 1\]"),
        (lambda: ScoreModel(tiny(), sd.DDPM(), Eps(label=TABLE),
         scaler=sd.data.Scaler((0.5,), (2.0,))), "this model's scaler"),
        (lambda: ScoreModel(torch.nn.Identity(), sd.DDPM(), Eps(label=TABLE)), "hold a Identity"),
    ],
)  # fmt: skip
def test_names_what_cannot_be_exported(tmp_path, model, message):
    with pytest.raises(CheckpointError, match=message):
        export(model(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_method_is_told_in_words():
    assert method({"snr": 0.15, "beta_start": 1.0, "clip_sample": True}) == (
        "clip_sample=True, snr=0.15"
    )
    assert method({}) == ""
