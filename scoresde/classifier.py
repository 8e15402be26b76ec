r"""Classifiers of noisy items: ``log p(y | x_t)`` at every noise level, and so of clean ones too.

    log p(y | x_t) = log softmax_y F(c_in x_t, c_noise),    x_t = alpha x_0 + sigma eps

As for a score model, ``c_in = 1/sqrt(alpha^2 sigma_data^2 + sigma^2)`` gives the network an input
of unit variance whatever the process, and ``c_noise`` tells it the noise level. Its gradient in
``x_t`` guides a score of the same process to a class: ``score(x_t | y) = score(x_t) + grad log
p(y | x_t)``.

Sources: Score-Based Generative Modeling through Stochastic Differential Equations (Song et al.,
2021), appendix I, https://arxiv.org/abs/2011.13456; Diffusion Models Beat GANs on Image Synthesis
(Dhariwal & Nichol, 2021), section 4, https://arxiv.org/abs/2105.05233.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from .config import ConfigError
from .files import CheckpointError, write_tensors, write_yaml
from .parameterization import Eps, Parameterization
from .precision import widest
from .sde.base import GaussianSDE, as_time

if TYPE_CHECKING:
    from .data.scaler import Scaler

CLOSE = 0.05
"""Difference of two processes, in log alpha or log-SNR, that a network hardly sees."""


class NoisyClassifier(nn.Module):
    """A network composed with a process: ``log p(y | x_t)`` of noisy items.

    Args:
        net: ``F(x, c_noise)`` with ``x`` of shape ``(B, *shape)`` and ``c_noise`` of shape
            ``(B,)``, giving logits ``(B, num_classes)``.
        sde: the forward process.
        parameterization: its ``c_in`` scales the input, its ``label`` tells the noise level;
            what it says of the output is not used. By default that of :class:`~scoresde.Eps`.
        shape: shape of one item, where known.
        scaler: map between data and model range, where known.
        num_classes: number of classes; by default that of the network.
        class_names: one name a class, where known.
        weights: which weights these are, ``"ema"`` or ``"raw"``; reported with every result.
    """

    given = None
    """A classifier sees the noisy item alone."""

    def __init__(
        self,
        net: nn.Module,
        sde: GaussianSDE,
        parameterization: Parameterization | None = None,
        *,
        shape: tuple[int, ...] | None = None,
        scaler: Scaler | None = None,
        num_classes: int | None = None,
        class_names: tuple[str, ...] | None = None,
        weights: str = "raw",
    ) -> None:
        super().__init__()
        self.net = net
        self.sde = sde
        self.parameterization = parameterization or Eps()
        self.shape = shape
        self.scaler = scaler
        classes = num_classes or getattr(net, "num_classes", None)
        if classes is None:
            raise ValueError("a classifier needs num_classes, which its network does not tell")
        self.num_classes = int(classes)
        self.class_names = class_names
        self.weights = weights

    def around(self, net: nn.Module, weights: str) -> NoisyClassifier:
        """The same classifier around another network of its kind."""
        return NoisyClassifier(
            net, self.sde, self.parameterization, shape=self.shape, scaler=self.scaler,
            num_classes=self.num_classes, class_names=self.class_names, weights=weights,
        )  # fmt: skip

    def forward(self, x: Tensor, t: float | Tensor, y: int | Tensor | None = None) -> Tensor:
        """``log p(y | x_t)``, ``(B,)``; without ``y`` that of every class, ``(B, num_classes)``.

        Args:
            x: state in model range, ``(B, *shape)``.
            t: time, shape ``()``, ``(B,)`` or ``(B, 1, ..., 1)``; below ``t_min``, as at 0, the
                network is told ``t_min``: there items are clean.
            y: classes, ``(B,)``, or one for all; ``num_classes`` stands for none, and gives 0.

        Returns:
            In nats, in float32 or the wider dtype of ``x``.

        Raises:
            ValueError: for items or classes of another shape.
        """
        log_p = self.logits(x, t).log_softmax(1)
        if y is None:
            return log_p
        log_p = torch.cat([log_p, torch.zeros_like(log_p[:, :1])], 1)  # no class: certain
        classes = torch.as_tensor(y, device=x.device).long().reshape(-1)
        if len(classes) not in (1, len(x)):
            raise ValueError(f"y holds {len(classes)} classes for {len(x)} items: one an item")
        return log_p.gather(1, classes.expand(len(x))[:, None])[:, 0]

    def logits(self, x: Tensor, t: float | Tensor) -> Tensor:
        """``F(c_in x, c_noise)``, ``(B, num_classes)``; see :meth:`forward`."""
        if self.shape is not None and tuple(x.shape[1:]) != tuple(self.shape):
            raise ValueError(
                f"x of shape {tuple(x.shape)} does not fit "
                f"a classifier of (B, *{tuple(self.shape)})"
            )
        t = as_time(t, x)
        if self.parameterization.label.widen:
            t = t.to(widest(t.device))
        t = t.clamp(min=self.sde.t_min)
        c = self.parameterization(self.sde.alpha(t), self.sde.sigma(t))
        parameter = next(self.net.parameters(), x)
        # The noise level stays in float32 or better: half precision cannot tell neighbours apart.
        precise = torch.promote_types(parameter.dtype, torch.float32)
        c_noise = c.c_noise.reshape(-1).to(parameter.device, precise, non_blocking=True)
        inner = c.c_in.to(x.device, x.dtype, non_blocking=True) * x
        out = self.net(inner.to(parameter.dtype), c_noise.expand(len(x)))
        if out.shape != (len(x), self.num_classes):
            raise ValueError(
                f"the network gave {tuple(out.shape)} for {len(x)} items of {self.num_classes} "
                "classes"
            )
        wide: Tensor = out.to(torch.promote_types(x.dtype, torch.float32))
        return wide

    def save(self, folder: str | Path) -> None:
        """Writes ``model.safetensors`` and ``config.yaml``, for :func:`scoresde.load_classifier`.

        Raises:
            CheckpointError: if the classifier cannot be described, or the folder is that of a run.
        """
        folder = Path(folder)
        if (folder / "checkpoints").exists():
            raise CheckpointError(f"{folder} is a training run: save into another folder")
        description = {**describe_classifier(self), "weights": self.weights}
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / "model.safetensors", self.net.state_dict())
        write_yaml(folder / "config.yaml", description)


def describe_classifier(classifier: NoisyClassifier) -> dict[str, Any]:
    """The sections from which :func:`build_classifier` rebuilds the classifier."""
    from .checkpoint import CLASSIFIER, describe_model

    names, model = classifier.class_names, cast(Any, classifier)  # of the same parts as a score
    return {
        **describe_model(model),
        CLASSIFIER: {
            "num_classes": classifier.num_classes,
            "class_names": None if names is None else list(names),
        },
    }


def build_classifier(description: Mapping[str, Any]) -> NoisyClassifier:
    """The untrained classifier that a ``config.yaml`` describes.

    Raises:
        CheckpointError, ConfigError: if it describes none.
    """
    from .checkpoint import CLASSIFIER, build_model

    section = description.get(CLASSIFIER)
    if not isinstance(section, Mapping) or type(section.get("num_classes")) is not int:
        raise CheckpointError(f"config.yaml: the section {CLASSIFIER!r} does not say num_classes")
    names = section.get("class_names")
    if names is not None and not isinstance(names, list):
        raise CheckpointError(f"config.yaml: class_names is {names!r}; accepted: a list")
    parts = build_model(description)
    classes = getattr(parts.net, "num_classes", section["num_classes"])
    if classes != section["num_classes"]:
        raise CheckpointError(
            f"config.yaml: the classifier has {section['num_classes']} classes, its network "
            f"{classes}"
        )
    return NoisyClassifier(
        parts.net, parts.sde, parts.parameterization, shape=parts.shape, scaler=parts.scaler,
        num_classes=section["num_classes"],
        class_names=None if names is None else tuple(map(str, names)),
    )  # fmt: skip


def misfit(score: Any, classifier: Any, name: str = "classifier") -> str | None:
    """Why a classifier cannot guide a score, in one line; None if it can, as far as is known.

    Both have to be of one process, the same ``alpha`` and ``sigma`` at the same time, and of one
    model range. What one of them does not tell is not compared.

    Args:
        score: carries its ``sde``; perhaps its ``shape`` and ``scaler``.
        classifier: likewise, or another score; a bare function tells nothing.
        name: what the second is called.
    """
    ours, theirs = (getattr(each, "sde", None) for each in (score, classifier))
    if ours is not None and theirs is not None:
        low, high = max(ours.t_min, theirs.t_min), min(ours.t_max, theirs.t_max)
        t = low + (high - low) * torch.linspace(0.05, 1, 20, dtype=torch.float64)
        apart = max(
            float((ours.log_snr(t) - theirs.log_snr(t)).abs().max()),
            float((ours.alpha(t).log() - theirs.alpha(t).log()).abs().max()),
        )
        if not apart <= CLOSE:
            return f"the {name} is of the process {theirs!r}, the score of {ours!r}"
    mine, its = (getattr(each, "shape", None) for each in (score, classifier))
    if mine is not None and its is not None and tuple(mine) != tuple(its):
        return f"the {name} is of items of shape {tuple(its)}, the score of {tuple(mine)}"
    mine, its = (getattr(each, "scaler", None) for each in (score, classifier))
    if mine is not None and its is not None and not _same_range(mine, its):
        return f"the {name} is of data scaled by {its}, the score by {mine}"
    return None


def _same_range(one: Scaler, other: Scaler) -> bool:
    """Whether two scalers are one map, to a hundredth of the model's range."""
    shifts, scales = (
        [torch.tensor(getattr(each, key), dtype=torch.float64) for each in (one, other)]
        for key in ("shift", "scale")
    )
    if len({len(v) for v in (*shifts, *scales)} - {1}) > 1:
        return False
    ratio = (scales[1] / scales[0] - 1).abs()
    moved = ((shifts[1] - shifts[0]) * scales[0]).abs()
    return float(torch.maximum(ratio, moved).max()) <= CLOSE / 5


def fits(score: Any, classifier: Any) -> None:
    """Refuses a classifier that cannot guide a score: see :func:`misfit`.

    Raises:
        ConfigError: in one line.
    """
    wrong = misfit(score, classifier)
    if wrong is not None:
        raise ConfigError(
            f"{wrong}: guidance needs one process and one range (train-classifier --like SCORE)"
        )


__all__ = ["NoisyClassifier", "fits", "misfit"]
