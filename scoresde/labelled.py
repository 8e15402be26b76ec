r"""Mixtures whose components have classes: exact conditional scores, and an exact classifier.

With ``p(y) p(x | y) = sum_{k in y} w_k N(x; mu_k, S_k)``, and likewise the marginals at ``t``,

    score(x, t | y) = sum_{k in y} p(k | x_t, y) score_k(x, t)
    log p(y | x_t) = logsumexp_{k in y} log p(k | x_t)

What guidance by a classifier, or of a conditional score against the unconditional one, should do
is then known exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .analytic import Mixture, MixtureScore
from .sde.base import GaussianSDE, as_time

if TYPE_CHECKING:
    from .inverse.operator import Operator


class LabelledMixture:
    """A mixture each of whose components belongs to a class.

    Args:
        mixture: of ``K`` components.
        labels: class of each component, ``(K,)``, whole numbers from 0; every class up to the
            largest has a component.

    Raises:
        ValueError: for labels that do not fit.
    """

    def __init__(self, mixture: Mixture, labels: Tensor | Sequence[int]) -> None:
        labels = torch.as_tensor(labels, device=mixture.means.device)
        if labels.shape != mixture.weights.shape or labels.is_floating_point():
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} ({labels.dtype}) do not fit "
                f"{len(mixture.weights)} components: one whole number a component"
            )
        found = labels.unique()
        if not torch.equal(found, torch.arange(len(found)).to(found)):
            raise ValueError(f"labels must be 0, 1, ... without a gap, got {found.tolist()}")
        self.mixture = mixture
        self.labels = labels.long()
        self.num_classes = len(found)
        self.shape = mixture.shape

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> LabelledMixture:
        """The same mixture on another device or in another dtype."""
        return LabelledMixture(self.mixture.to(device, dtype), self.labels)

    @property
    def prior(self) -> Tensor:
        """``p(y)``, ``(num_classes,)``."""
        weights = self.mixture.weights
        return weights.new_zeros(self.num_classes).index_add(0, self.labels, weights)

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """``n`` draws with their classes, shapes ``(n, *shape)`` and ``(n,)``."""
        k, noise = self.mixture._draw(n, generator)
        return self.mixture.means[k] + self.mixture._coloured(k, noise), self.labels[k]

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean ``shape`` and covariance ``(D, D)`` of the flattened item, of all classes."""
        return self.mixture.moments()

    def log_prob(
        self,
        x: Tensor,
        sde: GaussianSDE | None = None,
        t: float | Tensor | None = None,
        y: Tensor | int | None = None,
    ) -> Tensor:
        """``log p(x | y)`` in nats, shape ``(B,)``, of the data or at ``t``; see the score."""
        logs, _ = self.mixture._log_components(x, *self.mixture._marginal(x, sde, t))
        prior = torch.log(self.prior)
        prior = torch.cat([prior, prior.new_zeros(1)])
        index, mask = self._mask(y, len(x))
        return torch.logsumexp(logs.masked_fill(~mask, -torch.inf), 1) - prior[index]

    def score(self, sde: GaussianSDE) -> LabelledScore:
        """The exact score, conditional on ``y`` where it is given."""
        return LabelledScore(self, sde)

    def classifier(self, sde: GaussianSDE) -> MixtureClassifier:
        """The exact classifier of noisy items."""
        return MixtureClassifier(self, sde)

    def posterior(
        self, operator: Operator, y: Tensor, noise_std: float | Tensor
    ) -> LabelledMixture:
        """The posterior of a linear measurement ``y``; see :meth:`Mixture.posterior`."""
        return LabelledMixture(self.mixture.posterior(operator, y, noise_std), self.labels)

    def log_evidence(self, operator: Operator, y: Tensor, noise_std: float | Tensor) -> Tensor:
        """``log p(y)`` of measurements, ``(B,)``; see :meth:`Mixture.log_evidence`."""
        return self.mixture.log_evidence(operator, y, noise_std)

    def _mask(self, y: Tensor | int | None, batch: int) -> tuple[Tensor, Tensor]:
        """Classes as indices ``(B or 1,)``, and which components belong: ``(B or 1, K)``."""
        chosen = torch.as_tensor(self.num_classes if y is None else y, device=self.labels.device)
        if chosen.is_floating_point() or chosen.ndim > 1 or chosen.numel() not in (1, batch):
            raise ValueError(
                f"y holds one class a sample, (B,) whole numbers from 0 to {self.num_classes} "
                f"({self.num_classes} for none), got shape {tuple(chosen.shape)} ({chosen.dtype})"
            )
        chosen = chosen.reshape(-1).long()
        if bool(((chosen < 0) | (chosen > self.num_classes)).any()):
            raise ValueError(
                f"y holds classes from 0 to {self.num_classes} ({self.num_classes} for none), "
                f"got {int(chosen.min())} to {int(chosen.max())}"
            )
        every = chosen == self.num_classes
        return chosen, (chosen[:, None] == self.labels) | every[:, None]


class LabelledScore(MixtureScore):
    """Exact score of a diffused :class:`LabelledMixture`, conditional on classes.

    ``score(x, t, y=classes)`` takes one class a sample, ``(B,)``; ``num_classes``, or no ``y``,
    stands for no condition.
    """

    def __init__(self, labelled: LabelledMixture, sde: GaussianSDE) -> None:
        super().__init__(labelled.mixture, sde)
        self.labelled = labelled
        self.num_classes = labelled.num_classes

    def __call__(self, x: Tensor, t: float | Tensor, y: Tensor | int | None = None) -> Tensor:
        """``sum_{k in y} p(k | x_t, y) score_k(x, t)``, of the shape of ``x``."""
        if y is None:
            return super().__call__(x, t)
        means, variances = self.mixture._marginal(x, self.sde, t)
        logs, scores = self.mixture._log_components(x, means, variances)
        _, mask = self.labelled._mask(y, len(x))
        share = torch.softmax(logs.masked_fill(~mask, -torch.inf), 1)[:, :, None]
        return self.mixture._back(share * scores).sum(1).reshape(x.shape).to(x.dtype)


class MixtureClassifier:
    """``log p(y | x_t)`` of a :class:`LabelledMixture`, exact and differentiable in ``x``."""

    def __init__(self, labelled: LabelledMixture, sde: GaussianSDE) -> None:
        self.labelled = labelled
        self.sde = sde
        self.num_classes = labelled.num_classes
        self.device = labelled.mixture.means.device
        self.dtype = labelled.mixture.means.dtype

    def __call__(self, x: Tensor, t: float | Tensor, y: Tensor | int | None = None) -> Tensor:
        """Log-probabilities in nats in the dtype of ``x``.

        Args:
            x: state, ``(B, *shape)``.
            t: time, ``()``, ``(B,)`` or ``(B, 1, ..., 1)``.
            y: classes ``(B,)``; of ``num_classes``, which stands for none, it is 0.

        Returns:
            ``(B,)``, or of every class, ``(B, num_classes)``, without ``y``.
        """
        mixture, labels = self.labelled.mixture, self.labelled.labels
        logs, _ = mixture._log_components(x, *mixture._marginal(x, self.sde, as_time(t, x)))
        shares = torch.log_softmax(logs, 1)
        if y is not None:
            _, mask = self.labelled._mask(y, len(x))
            return torch.logsumexp(shares.masked_fill(~mask, -torch.inf), 1).to(x.dtype)
        members = labels[:, None] == torch.arange(self.num_classes, device=labels.device)
        each = shares[:, :, None].masked_fill(~members, -torch.inf)
        return torch.logsumexp(each, 1).to(x.dtype)


__all__ = ["LabelledMixture", "LabelledScore", "MixtureClassifier"]
