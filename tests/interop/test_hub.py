"""The hub, without a network: its cache in its own layout, and stand-ins for its answers."""

import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml

import scoresde as sd
from scoresde.checkpoint import CheckpointError
from scoresde.interop import hub
from scoresde.interop.card import model_card
from scoresde.tuning.files import short

huggingface_hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")
errors = pytest.importorskip("huggingface_hub.errors")
HASH = "0123456789abcdef0123456789abcdef01234567"


def plane(**fields):
    torch.manual_seed(0)
    net = sd.nets.MLP(shape=(2,), width=8, **fields)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    sde = sd.VP(t_min=1e-4, t_min_sampling=2e-3, t_min_likelihood=3e-5 + 1e-4)
    return sd.ScoreModel(net, sde, sd.V(), shape=(2,), weights="ema")


def pictures():
    shape = (1, 8, 8)
    net = sd.nets.UNet(shape, width=8, multipliers=(1,), attention=(), num_classes=10)
    scaler = sd.data.Scaler((128.0,), (2 / 256,), 256)
    return sd.ScoreModel(net, sd.VP(), sd.Eps(), shape=shape, scaler=scaler)


def same(a, b):
    ours, theirs = a.net.state_dict(), b.net.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert (a.sde, a.parameterization, a.shape) == (b.sde, b.parameterization, b.shape)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache that is offline; the function makes the folder of a repository in it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def made(repo, revision="main"):
        home = tmp_path / "cache" / f"models--{repo.replace('/', '--')}"
        (home / "refs").mkdir(parents=True)
        (home / "refs" / revision).write_text(HASH)
        folder = home / "snapshots" / HASH
        folder.mkdir(parents=True)
        return folder

    return made


@pytest.fixture
def online(tmp_path, monkeypatch):
    """A hub of one repository ``me/m``, a folder that the test fills; what was asked of it."""
    files = tmp_path / "remote"
    asked = SimpleNamespace(files=files, fetched=[], revisions=[])

    class Api:
        def model_info(self, repo, revision=None):
            assert repo == "me/m"
            asked.revisions.append(revision)
            names = [p.relative_to(files).as_posix() for p in files.rglob("*") if p.is_file()]
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=n) for n in sorted(names)])

    def snapshot(repo, *, revision=None, allow_patterns=None, **_):
        asked.revisions.append(revision)
        names = [p.relative_to(files).as_posix() for p in files.rglob("*") if p.is_file()]
        chosen = huggingface_hub.utils.filter_repo_objects(names, allow_patterns=allow_patterns)
        for name in sorted(chosen):
            asked.fetched.append(name)
            (tmp_path / "got" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(files / name, tmp_path / "got" / name)
        return str(tmp_path / "got")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return asked


def test_a_model_is_loaded_from_the_cache_without_a_network(cache):
    model = plane()
    folder = cache("me/m")
    model.save(folder)
    model.save(folder / "inside" / "deep")
    for name in ("hf:me/m", f"hf:me/m@{HASH}", "hf:me/m/inside/deep", "hf:me/m/inside/deep@main"):
        same(sd.load(name), model)
    plane(num_classes=3).save(cache("me/branch", "v2"))
    assert sd.load("hf:me/branch@v2").net.num_classes == 3


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("me/other", "cannot be reached"),
        ("me/m@v9", "hf:me/m@v9: the hub cannot be reached"),
        ("me/m/nothing", "the cache holds hf:me/m without nothing"),
        ("me", "names no model"),
        ("me/m/../../x", "names no model"),
        ("", "names no model"),
        ("me/m@", "names no model"),
        ("-me-/m..n", "is no name on the hub"),
    ],
)
def test_what_is_not_there_is_one_line(cache, name, said):
    plane().save(cache("me/m"))
    with pytest.raises(CheckpointError) as error:
        sd.load(f"hf:{name}")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r'pip install "scoresde\[hub\]"'):
        sd.load("hf:me/m")
    with pytest.raises(CheckpointError, match=r'pip install "scoresde\[hub\]"'):
        plane().push_to_hub("me/m")


DIFFUSERS = ["model_index.json", "scheduler/scheduler_config.json"]
STEM = "diffusion_pytorch_model"


@pytest.mark.parametrize(
    ("files", "inside", "wanted"),
    [
        (["config.yaml", "model.safetensors", "tuned.yaml", "README.md", "train.py"], "",
         ["config.yaml", "model.safetensors", "tuned.yaml"]),
        (["a/config.yaml", "a/model.safetensors", "config.yaml", "model.safetensors"], "a",
         ["a/config.yaml", "a/model.safetensors"]),
        (["config.yaml", "checkpoints/step-1/ema.safetensors", "checkpoints/step-2/state.yaml",
          "checkpoints/step-2/raw.safetensors", "checkpoints/step-2/ema.safetensors"], "",
         ["config.yaml", "checkpoints/step-2/raw.safetensors",
          "checkpoints/step-2/ema.safetensors"]),
        ([*DIFFUSERS, "unet/config.json", f"unet/{STEM}.safetensors", f"unet/{STEM}.bin",
          f"unet/{STEM}.fp16.safetensors", f"vae/{STEM}.safetensors", "vae/config.json",
          "text_encoder/model.safetensors", "unet/code.py"], "",
         [*DIFFUSERS, "unet/config.json", f"unet/{STEM}.safetensors"]),
        ([*DIFFUSERS, "unet/config.json", f"unet/{STEM}.bin", f"unet/{STEM}.non_ema.bin",
          "unet_ema/config.json", f"unet_ema/{STEM}.bin"], "",
         [*DIFFUSERS, "unet/config.json", f"unet/{STEM}.bin", f"unet/{STEM}.non_ema.bin",
          "unet_ema/config.json", f"unet_ema/{STEM}.bin"]),
        ([*DIFFUSERS, "unet/config.json", f"unet/{STEM}.fp16.bin"], "unet",
         [*DIFFUSERS, "unet/config.json", f"unet/{STEM}.fp16.bin"]),
        (["config.json", "scheduler_config.json", f"{STEM}.bin", "a.png"], "",
         ["config.json", "scheduler_config.json", f"{STEM}.bin"]),
        (["transformer/config.json", f"transformer/{STEM}-00001-of-00002.safetensors",
          f"transformer/{STEM}-00002-of-00002.safetensors",
          f"transformer/{STEM}.safetensors.index.json"], "",
         ["transformer/config.json", f"transformer/{STEM}-00001-of-00002.safetensors",
          f"transformer/{STEM}-00002-of-00002.safetensors",
          f"transformer/{STEM}.safetensors.index.json"]),
        (["checkpoint.pth", "config.json", "setup.py", "other.txt"], "",
         ["checkpoint.pth", "config.json"]),
        (["a/one.pkl", "a/two.pkl", "a/flags.json", "b.pkl"], "a/two.pkl",
         ["a/two.pkl", "a/flags.json"]),
        (["one.pkl", "two.pkl"], "two.pkl", ["two.pkl"]),
        (["README.md", "config.json"], "", []),
        (["config.yaml", "README.md"], "", []),
        (["unet/config.json"], "vae", []),
    ],
    ids=["ours", "ours-inside", "run", "pipeline", "bins", "half", "network", "shards", "single",
         "file-inside", "file", "text", "config-only", "elsewhere"],
)  # fmt: skip
def test_only_what_is_read_is_fetched(files, inside, wanted):
    found = hub.needed(files, inside)
    assert sorted(found) == sorted(wanted)
    assert len(set(found)) == len(found)


def test_of_several_checkpoints_one_has_to_be_named():
    with pytest.raises(CheckpointError, match=r"hf:owner/name/a/one.pkl.*one.pkl, two.pkl"):
        hub.needed(["a/one.pkl", "a/two.pkl"], "a")


def test_fetching_takes_the_model_and_leaves_the_rest(online):
    plane().save(online.files)
    (online.files / "evil.py").write_text("raise SystemExit")
    (online.files / "big[1].bin").write_bytes(b"0")
    same(sd.load("hf:me/m@v1"), plane())
    assert online.fetched == ["config.yaml", "model.safetensors"]
    assert online.revisions == ["v1", "v1"]


def test_names_with_wildcards_are_fetched_as_they_are(online):
    online.files.mkdir()
    for name in ("a[1].pth", "a1.pth"):
        (online.files / name).write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        sd.load("hf:me/m/a[1].pth")
    assert online.fetched == ["a[1].pth"]


def test_a_repository_without_a_model_says_so(online):
    online.files.mkdir()
    (online.files / "README.md").write_text("hello")
    with pytest.raises(CheckpointError, match="holds no model among its 1 files"):
        sd.load("hf:me/m")
    assert online.fetched == []


def answer(kind):
    """An error of the hub, made without the response that its constructor wants."""
    error = kind.__new__(kind)
    error.args = ("401 Client Error.\n\nmore lines",)
    error.server_message = error.request_id = error.response = None
    return error


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (errors.RepositoryNotFoundError, "there is no such repository, or it is not public"),
        (errors.GatedRepoError, "is gated: accept its terms at https://huggingface.co/me/m"),
        (errors.RevisionNotFoundError, "the repository has no revision 'v1'"),
    ],
)
def test_answers_of_the_hub_are_one_line(cache, online, monkeypatch, kind, said):
    plane().save(cache("me/m", "v1"))  # which does not hide them

    def refuse(*_, **__):
        raise answer(kind)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    with pytest.raises(CheckpointError) as error:
        sd.load("hf:me/m@v1")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_failing_network_leaves_the_cache(cache, monkeypatch):
    plane().save(cache("me/m"))

    class NoRouteError(Exception):
        """What an HTTP library may raise, of no kind that is known."""

    def fail(*_, **__):
        raise NoRouteError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    same(sd.load("hf:me/m"), plane())


@pytest.fixture
def uploads(tmp_path, monkeypatch):
    """Uploads go into a folder; the calls."""
    calls = []

    class Api:
        def __init__(self, token=None):
            calls.append({"token": token})

        def create_repo(self, repo_id, **options):
            calls.append({"repo_id": repo_id, **options})
            return f"https://huggingface.co/{repo_id}"

        def upload_folder(self, repo_id, folder_path, **options):
            shutil.copytree(folder_path, tmp_path / "uploaded")
            calls.append({"repo_id": repo_id, **options})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return SimpleNamespace(calls=calls, folder=tmp_path / "uploaded")


def test_what_is_pushed_is_loaded_again(cache, uploads, monkeypatch):
    model = plane()
    entry = {"solver": {"name": "vabm"}, "steps": 3, "grid": {"log_snr": [1.0, 0.0]}}
    model.tuned = (entry,)
    url = model.push_to_hub(
        "me/m", private=True, token="t", metrics={"bits_per_dim": 1.5}, message="first"
    )
    assert url == "https://huggingface.co/me/m"
    assert uploads.calls == [
        {"token": "t"},
        {"repo_id": "me/m", "private": True, "exist_ok": True},
        {"repo_id": "me/m", "commit_message": "first"},
    ]
    assert sorted(p.name for p in uploads.folder.iterdir()) == [
        "README.md", "config.yaml", "model.safetensors", "tuned.yaml",
    ]  # fmt: skip
    monkeypatch.undo()
    shutil.copytree(uploads.folder, cache_folder(uploads, monkeypatch), dirs_exist_ok=True)
    read = sd.load("hf:me/m")
    same(read, model)
    assert (read.weights, read.tuned) == ("ema", (entry,))


def cache_folder(uploads, monkeypatch):
    home = uploads.folder.parent / "second"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (home / "models--me--m" / "refs").mkdir(parents=True)
    (home / "models--me--m" / "refs" / "main").write_text(HASH)
    return home / "models--me--m" / "snapshots" / HASH


def test_a_refused_upload_is_one_line(uploads, monkeypatch):
    def refuse(*_, **__):
        raise answer(errors.RepositoryNotFoundError)

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", refuse)
    with pytest.raises(CheckpointError, match="needs a login") as error:
        plane().push_to_hub("me/m")
    assert "\n" not in str(error.value)


def test_the_card_is_read_by_the_hub():
    metrics = {"bits_per_dim": 1.25, "test": {"FID": torch.tensor(3.5)}, "dataset": "mnist",
               "converged": True, "broken": float("nan")}  # fmt: skip
    text = model_card(pictures(), metrics, repo_id="me/digits", licence="mit")
    card = huggingface_hub.ModelCard(text)
    data = card.data.to_dict()
    assert data["library_name"] == "scoresde"
    assert data["pipeline_tag"] == "unconditional-image-generation"
    assert data["license"] == "mit"
    assert {"scoresde", "vp", "class-conditional"} <= set(data["tags"])
    results = {r.metric_type: (r.metric_value, r.dataset_name) for r in card.data.eval_results}
    assert results == {"bits_per_dim": (1.25, "mnist"), "test.FID": (3.5, "mnist")}
    assert "| converged | yes |" in text
    assert "in [-1, 1)" in text
    assert "levels 0 to 255" in text


def test_the_card_says_what_the_model_is():
    model = plane()
    text = model_card(model)
    matter = yaml.safe_load(text.split("---")[1])
    assert set(matter) == {"library_name", "tags"}
    for line in (
        "| SDE | `vp` |", "| beta_max | 20 |", "| smallest time of training | 0.0001 |",
        "| smallest time of sampling | 0.002 |", "| smallest time of likelihoods | 0.00013 |",
        "| parameterization | `v` (sigma_data=1, scale_input=yes) |",
        "| noise label | log-noise (scale=0.25, unit=1) |",
        f"| parameters | {sum(p.numel() for p in model.net.parameters()):,} |",
        "| default solver | `vabm`, 20 steps |", "| tuned grids | none |", "averaged",
    ):  # fmt: skip
        assert line in text
    model.tuned = ({"solver": {"name": "vabm", "points": 2}, "steps": 7, "grid": {}},)
    assert f"`{short(model.tuned[0]['solver'])}` at 7 steps" in model_card(model)
    model.sde = sd.DDPM(1000, betas=tuple(0.001 for _ in range(1000)))
    assert "(1000 values)" in model_card(model)


@pytest.mark.parametrize("make", [plane, pictures])
def test_the_example_of_the_card_runs(make, tmp_path, monkeypatch):
    model = make()
    model.save(tmp_path / "m")
    code = model_card(model, repo_id="me/m").split("```python\n")[1].split("```")[0]
    assert 'sd.load("hf:me/m")' in code
    monkeypatch.setattr(hub, "fetched", lambda name: tmp_path / "m" if name == "me/m" else None)
    code = code.replace("seed=0", "seed=0, steps=2")
    space = {}
    exec(code, space)
    assert space["items"].shape == (16, *model.shape)
