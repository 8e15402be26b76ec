"""The card of a model: what it is, in a README.md with the front matter that the hub reads.

The form is that of Model Cards for Model Reporting (Mitchell et al., 2019),
https://arxiv.org/abs/1810.03993, with the fields of https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..config import describe
from ..cost import cost

if TYPE_CHECKING:
    from ..data.scaler import Scaler
    from ..model import ScoreModel

TASK = "unconditional-image-generation"
"""The hub has no other task for pictures without a prompt, classes or none."""


MANY = 16
"""More members of a sequence than these are not listed one by one."""


def model_card(
    model: ScoreModel,
    metrics: Mapping[str, Any] | None = None,
    *,
    repo_id: str | None = None,
    licence: str | None = None,
) -> str:
    """The text of a README.md: YAML front matter, then tables for readers.

    Args:
        model: the model, whose ``shape`` is known.
        metrics: figures by name, as ``{"bits_per_dim": 1.27, "FID": 3.2}``; mappings in it
            become dotted names, and ``"dataset"`` names the data that they are of.
        repo_id: ``owner/name`` on the hub, from which the card shows how to load the model.
        licence: identifier of the licence, such as ``"apache-2.0"``.
    """
    import yaml

    name = (repo_id or "model").split("/")[-1]
    matter = front_matter(model, metrics or {}, name, licence)
    text = [
        "---",
        yaml.safe_dump(matter, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# {name}",
        "",
        f"A score-based generative model of {items(model)}, in the format of `scoresde`: weights "
        f"as safetensors ({'averaged' if model.weights == 'ema' else 'raw'}, "
        f"`{model.weights}`), the rest as YAML.",
        "",
        *example(model, repo_id),
        *table("Process", process(model)),
        *table("Network", network(model)),
        *table("Sampling", sampling(model)),
        *table("Data", {"range": data_range(model.scaler)}),
        *table("Metrics", {k: figure(v) for k, v in flat(metrics or {}).items()}
               or {"none": "none were given"}),
    ]  # fmt: skip
    return "\n".join(text).rstrip() + "\n"


def front_matter(
    model: ScoreModel, metrics: Mapping[str, Any], name: str, licence: str | None
) -> dict[str, Any]:
    """What the hub reads: library, task, tags, licence and figures."""
    process = str(describe(model.sde)["name"])
    tags = ["scoresde", "diffusion", "score-based-generative-model", process]
    found: dict[str, Any] = {"library_name": "scoresde"}
    if pictures(model):
        found["pipeline_tag"] = TASK
    if licence is not None:
        found["license"] = licence
    found["tags"] = [*tags, "class-conditional"] if classes(model) else tags
    data = str(metrics.get("dataset", "unspecified"))
    figures = [
        {"type": key, "value": value, "name": key}
        for key, value in flat(metrics).items()
        if type(value) in (int, float) and math.isfinite(value)
    ]
    if figures:
        task = {"type": TASK if pictures(model) else "other"}
        result = {"task": task, "dataset": {"name": data, "type": data}, "metrics": figures}
        found["model-index"] = [{"name": name, "results": [result]}]
    return found


def example(model: ScoreModel, repo_id: str | None) -> list[str]:
    """How to load and sample."""
    count = classes(model)
    shape = ", ".join(str(n) for n in (16, *(model.shape or ())))
    call = f"out = sd.sample(model, ({shape}), seed=0"
    decoded = "out.x" if model.scaler is None else "model.scaler.decode(out.x)"
    return [
        "```python",
        "import scoresde as sd",
        *(["import torch"] if count else []),
        "",
        f'model = sd.load("{f"hf:{repo_id}" if repo_id else "path/to/this/folder"}")',
        f"{call}, y=torch.arange(16) % {count})" if count else f"{call})",
        f"items = {decoded}  # in units of the data",
        "```",
        "",
    ]


def process(model: ScoreModel) -> dict[str, str]:
    """The forward process with its fields, and the three smallest times."""
    sde = model.sde
    times = ("t_min", "t_min_sampling", "t_min_likelihood")
    fields = {k: v for k, v in describe(sde).items() if k not in ("name", *times)}
    return {
        "SDE": f"`{describe(sde)['name']}`",
        **{key: figure(value) for key, value in fields.items()},
        "smallest time of training": figure(sde.t_min),
        "smallest time of sampling": figure(sde.t_min_sampling),
        "smallest time of likelihoods": figure(sde.t_min_likelihood),
    }


def network(model: ScoreModel) -> dict[str, str]:
    """What the network is, predicts and is told, and what it costs."""
    found = describe(model.parameterization)
    predicts = ", ".join(
        f"{k}={figure(v)}" for k, v in found.items() if k not in ("name", "label")
    )
    price = cost(model)
    fields = {k: v for k, v in describe(model.net).items() if k not in ("name", "shape")}
    return {
        "network": f"`{describe(model.net)['name']}`",
        **{key: figure(value) for key, value in fields.items()},
        "parameterization": f"`{found['name']}` ({predicts})",
        "noise label": label(found["label"]),
        "parameters": f"{price.parameters:,}",
        "multiply-adds of one evaluation": figure(price.multiply_adds),
        "classes": str(classes(model) or "none"),
        **({} if model.given is None else {"given an image": given(model)}),
        "learned variance": "yes" if learns_variance(model) else "no",
    }


def sampling(model: ScoreModel) -> dict[str, str]:
    """The solver that is used unless another is asked for, and the grids tuned to the model."""
    from .. import solvers
    from ..config import build
    from ..tuning.files import short

    name = model.sde.default_solver
    steps = build(name, solvers, "solver").default_steps
    tuned = [f"`{short(e['solver'])}` at {e['steps']} steps" for e in model.tuned]
    return {
        "default solver": f"`{name}`, {'its own' if steps is None else steps} steps",
        "tuned grids": ", ".join(tuned) or "none",
    }


def data_range(scaler: Scaler | None) -> str:
    """Which values of the data go where in the model's range."""
    if scaler is None:
        return "the model's own: there is no map to data"
    if scaler.levels is None:
        return f"model = (data - {listed(scaler.shift)}) * {listed(scaler.scale)}, continuous data"
    low = [(0 - scaler.shift[0]) * scaler.scale[0], (scaler.levels - scaler.shift[0])
           * scaler.scale[0]]  # fmt: skip
    return (
        f"whole levels 0 to {scaler.levels - 1}, dequantised by u in [0, 1): model = "
        f"(level + u - {listed(scaler.shift)}) * {listed(scaler.scale)}, "
        f"in [{low[0]:g}, {low[1]:g})"
    )


def label(section: Mapping[str, Any]) -> str:
    """What the network is told about the noise, in a few words."""
    fields = {k: v["name"] if isinstance(v, Mapping) else v for k, v in section.items()}
    name = fields.pop("name")
    return (
        f"{name} ({', '.join(f'{k}={figure(v)}' for k, v in fields.items())})" if fields else name
    )


def learns_variance(model: ScoreModel) -> bool:
    """Whether the output has a second half, about the variance of a reverse step."""
    outside = getattr(model.net, "out_channels", None)
    return bool(outside and model.shape and outside == 2 * model.shape[0])


def classes(model: ScoreModel) -> int | None:
    """The number of classes that the network takes as ``y``."""
    found = getattr(model.net, "num_classes", None)
    return None if found is None else int(found)


def given(model: ScoreModel) -> str:
    """What the network is given of an item beside its noisy state."""
    fields = flat(describe(model.given))
    name = fields.pop("name")
    return f"`{name}` ({', '.join(f'{k}={figure(v)}' for k, v in fields.items())})"


def pictures(model: ScoreModel) -> bool:
    """Whether items are grey or colour pictures."""
    return len(model.shape or ()) == 3 and (model.shape or ())[0] in (1, 3)


def items(model: ScoreModel) -> str:
    """The shape of an item in words."""
    shape = " x ".join(str(n) for n in model.shape or ())
    return f"pictures of shape {shape}" if pictures(model) else f"items of shape {shape}"


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested figures as ``a.b`` keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[prefix + str(key)] = value.item() if hasattr(value, "item") else value
    return found


def figure(value: Any) -> str:
    """A value for a reader."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int):
        return f"{value:,}" if value >= 10000 else str(value)
    return f"{value:g}" if isinstance(value, float) else listed(value)


def listed(value: Any) -> str:
    """A value, a sequence as its members with commas between them."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        return str(value)
    members = [figure(v) for v in value]
    if len(members) > MANY:
        return f"{members[0]}, {members[1]}, ..., {members[-1]} ({len(members)} values)"
    return ", ".join(members) or "none"


def table(title: str, rows: Mapping[str, str]) -> list[str]:
    """A section with a table of two columns."""
    body = [f"| {key} | {value.replace('|', '/')} |" for key, value in rows.items()]
    return [f"## {title}", "", "| | |", "|---|---|", *body, ""]
