"""Models on the Hugging Face hub: ``hf:owner/name``, fetched into its cache, and uploaded.

Of a repository only what :func:`scoresde.load` reads is fetched: one set of weights, safetensors
before pickled ones, and the small files that describe them. Its code is never fetched nor run.
The cache is that of the package ``huggingface_hub``, shared with every other user of it; without a
network it is what is read.
"""

from __future__ import annotations

import glob
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ..checkpoint import CheckpointError, save_model
from ..files import write_yaml
from ..tuning.files import FILE as TUNED
from .card import model_card
from .guided_flags import FILES as FLAGS

if TYPE_CHECKING:
    from ..model import ScoreModel

DESCRIPTIONS = ("config.yaml", "model.safetensors", TUNED, "report.json")
"""Files of a model of this toolkit."""
PIPELINE = ("model_index.json", "config.json", "scheduler_config.json")
NETWORKS = ("", "unet", "unet_ema", "transformer", "transformer_ema")
"""Places of a network in a folder of diffusers."""
WEIGHTS = re.compile(r"diffusion_pytorch_model\b.*\.(safetensors|bin)(\.index.*\.json)?")
HALF = re.compile(r"\b(fp16|bf16)\b")
CHECKPOINTS = (".pth", ".pt", ".pkl", ".ckpt", ".bin")
STEP = re.compile(r"checkpoints/(step-\d+)/(?:ema|raw)\.safetensors")
NAME = re.compile(r"(?P<repo>[^/@]+/[^/@]+)(?:/(?P<inside>[^@]+))?(?:@(?P<revision>.+))?")


def fetched(name: str) -> Path:
    """The folder or file of a model on the hub, in the local cache.

    Args:
        name: ``owner/name``, ``owner/name/folder`` or ``owner/name/file.pkl``, and ``@revision``
            (a branch, a tag or a commit) after either.

    Raises:
        CheckpointError: if there is no such model, it is not public, the hub cannot be reached
            and the cache does not hold it, or ``huggingface_hub`` is not installed.
    """
    match = NAME.fullmatch(name)
    inside = "" if match is None else (match["inside"] or "").strip("/")
    if match is None or not {".", ".."}.isdisjoint(re.split("[/@]", name)):
        raise CheckpointError(
            f"hf:{name} names no model: accepted are hf:owner/name, a folder or file in it as "
            "hf:owner/name/folder, and hf:owner/name@revision"
        )
    hub = package()
    repo, revision = match["repo"], match["revision"]
    with _one_line(repo, revision):
        try:
            files = [f.rfilename for f in hub.HfApi().model_info(repo, revision=revision).siblings]
        except _answers():
            raise
        except Exception:  # no network, in the words of whichever HTTP library the package uses
            folder = Path(hub.snapshot_download(repo, revision=revision, local_files_only=True))
            files = [file.relative_to(folder).as_posix() for file in folder.rglob("*")]
            if inside and inside not in files:
                raise CheckpointError(
                    f"the hub cannot be reached, and the cache holds hf:{repo} without {inside}"
                ) from None
        else:
            wanted = needed(files, inside)
            if not wanted:
                raise CheckpointError(
                    f"hf:{name} holds no model among its {len(files)} files: no config.yaml with "
                    "model.safetensors, no network of diffusers, no checkpoint"
                )
            patterns = [glob.escape(file) for file in wanted]
            folder = Path(
                hub.snapshot_download(
                    repo, revision=revision, allow_patterns=patterns, tqdm_class=_bar()
                )
            )
    return folder / inside if inside else folder


def needed(files: Sequence[str], inside: str = "") -> list[str]:
    """The files of a repository that are read, none if there is no model in it.

    Args:
        files: all of its files.
        inside: a folder or file in it.

    Raises:
        CheckpointError: if there are several checkpoints, of which one has to be named.
    """
    place = f"{inside}/" if inside else ""
    if inside in files:
        home = str(PurePosixPath(inside).parent)
        home = "" if home == "." else f"{home}/"
        return [inside, *(home + flags for flags in FLAGS if home + flags in files)]
    here = [file.removeprefix(place) for file in files if file.startswith(place)]
    steps = sorted({m[1] for file in here if (m := STEP.fullmatch(file))})
    if "config.yaml" in here and ("model.safetensors" in here or steps):
        found = [file for file in here if file in DESCRIPTIONS]
        if "model.safetensors" not in here:
            last = f"checkpoints/{steps[-1]}/"
            found += [f for f in here if f.startswith(last) and f.endswith(".safetensors")]
        return [place + file for file in found]
    if pipeline := _pipeline(here):
        above = PurePosixPath(inside).parent.as_posix() if inside else "."
        above = "" if above == "." else f"{above}/"
        outer = [f"{above}model_index.json", f"{above}scheduler/scheduler_config.json"]
        own = [place + file for file in pipeline]
        return own + [file for file in outer if file in files and file not in own]
    single = [file for file in here if "/" not in file and file.endswith(CHECKPOINTS)]
    if len(single) > 1:
        raise CheckpointError(
            f"the repository holds several checkpoints: name one, as in "
            f"hf:owner/name/{place}{single[0]} (there are {', '.join(single[:6])})"
        )
    return [place + file for file in (*single, *(f for f in FLAGS if single and f in here))]


def _pipeline(here: Sequence[str]) -> list[str]:
    """The files of a folder of diffusers: descriptions, and of each network one set of weights."""
    found = [file for file in here if file in (*PIPELINE, "scheduler/scheduler_config.json")]
    weights = []
    for network in NETWORKS:
        place = f"{network}/" if network else ""
        own = [f for f in here if f.startswith(place) and WEIGHTS.fullmatch(f[len(place) :])]
        safe = [file for file in own if ".safetensors" in file]
        own = safe or own
        full = [file for file in own if not HALF.search(file)]
        if own:
            weights += full or own
            weights += [f"{place}config.json"] if network and f"{place}config.json" in here else []
    return found + weights if weights else []


def push(
    model: ScoreModel,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    metrics: Mapping[str, Any] | None = None,
    licence: str | None = None,
    message: str = "A model of scoresde",
) -> str:
    """Uploads a model with its card, as :meth:`scoresde.ScoreModel.push_to_hub` says."""
    with tempfile.TemporaryDirectory() as folder:
        write(model, Path(folder), repo_id, metrics, licence)
        return upload(Path(folder), repo_id, private=private, token=token, message=message)


def write(
    model: ScoreModel,
    folder: Path,
    repo_id: str,
    metrics: Mapping[str, Any] | None = None,
    licence: str | None = None,
) -> None:
    """Writes what a repository holds: weights, ``config.yaml``, tuned grids, and the card."""
    save_model(model, folder)
    if model.tuned:
        write_yaml(folder / TUNED, {"tuned": list(model.tuned)})
    card = model_card(model, metrics, repo_id=repo_id, licence=licence)
    (folder / "README.md").write_text(card, encoding="utf-8")


def upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    message: str = "A model of scoresde",
) -> str:
    """Uploads a folder in one commit, into a repository that is made if it is not there.

    Returns:
        The address of the repository.

    Raises:
        CheckpointError: in one line, if the hub refuses it or cannot be reached.
    """
    hub = package()
    with _one_line(repo_id, None):
        api = hub.HfApi(token=token)
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)
    return str(url)


def package() -> Any:
    """The package ``huggingface_hub``.

    Raises:
        CheckpointError: saying how to install it.
    """
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise CheckpointError(
            'models on the hub need the package huggingface_hub: pip install "scoresde[hub]"'
        ) from error
    return huggingface_hub


def _answers() -> tuple[type[Exception], ...]:
    """What the hub, or the package's check of a name, answers where there is no such model."""
    from huggingface_hub import errors

    return (
        errors.HFValidationError,
        errors.RepositoryNotFoundError,  # a gated one is of this kind
        errors.RevisionNotFoundError,
    )


def _bar() -> Any:
    """A progress bar that keeps quiet where there is no terminal."""
    from tqdm.auto import tqdm

    class Bar(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": kwargs.get("disable") or None})

    return Bar


@contextmanager
def _one_line(repo: str, revision: str | None) -> Iterator[None]:
    """Turns what the hub or its package raises into one line."""
    from huggingface_hub import errors

    named = f"hf:{repo}" if revision is None else f"hf:{repo}@{revision}"
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # that of its HTTP library has no place in its errors
        if isinstance(error, errors.HFValidationError):
            said = f"{named} is no name on the hub: {_short(error)}"
        elif isinstance(error, errors.GatedRepoError):
            said = (
                f"{named} is gated: accept its terms at https://huggingface.co/{repo} and log in "
                "(hf auth login)"
            )
        elif isinstance(error, errors.RevisionNotFoundError):
            said = f"no model at {named}: the repository has no revision {revision!r}"
        elif isinstance(error, errors.RepositoryNotFoundError):
            said = (
                f"no model at {named}: there is no such repository, or it is not public and "
                "needs a login (hf auth login)"
            )
        elif isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
            said = f"no model at {named}: the hub cannot be reached, the cache lacks it or a part"
        else:
            said = f"the hub cannot be reached, or refuses {named}: {_short(error)}"
        raise CheckpointError(said) from error


def _short(error: Exception) -> str:
    """The first sentence or line of what a package says."""
    lines = str(error).strip().splitlines()
    return lines[0][:200].rstrip(".: ") if lines else type(error).__name__
