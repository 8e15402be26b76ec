r"""What samples are compared to: held-out data, or a mixture whose law is known.

Every measure comes with its floor, the 95 % quantile of what real items reach in the same place:
as many of them, against the same reference. A sampler whose value is not above the floor cannot be
told from the truth by that measure and that many items.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..analytic import GaussianMixture
from ..metrics import MMD, SlicedWasserstein
from ..metrics.distances import QUANTILE
from .laws import Law
from .row import label

REFERENCE_LIMIT = 5000
FLOOR_SETS = 100


@dataclass(frozen=True)
class Target:
    """A reference set with its measures; made by :meth:`of_data` or :meth:`exact`.

    Args:
        reference: ``(M, *shape)``, in units of the data.
        floor: for each measure, what real items reach.
        about: what the reference and the floor are, in words and numbers.
        decode: from the model's range to units of the data.
        moments: exact mean and covariance of the flattened item, where they are known.
        seed: of the directions of the sliced distance.
        name: of the data or the law.
    """

    reference: Tensor
    floor: dict[str, float]
    about: dict[str, Any]
    decode: Callable[[Tensor], Tensor] = field(default=lambda x: x)
    moments: tuple[Tensor, Tensor] | None = None
    seed: int = 0
    name: str = ""

    @classmethod
    def of_data(
        cls,
        heldout: Tensor,
        real: Tensor | None = None,
        *,
        samples: int,
        decode: Callable[[Tensor], Tensor] | None = None,
        seed: int = 0,
        name: str = "",
    ) -> Target:
        """Held-out items as the reference; at most 5000 of them, chosen by the seed.

        Args:
            heldout: ``(M, *shape)``, M >= 4, levels or floats in units of the data.
            real: other real items (those of training), from which the floor is taken; without
                them the held-out items are halved: one half is the reference, one the floor's.
            samples: number of samples to be judged; the floor uses as many items if there are.
            decode: from the model's range to units of the data.
            seed: of the choice of items and of the directions.
            name: of the data.

        Raises:
            ValueError: too few held-out items.
        """
        if len(heldout) < 4:
            raise ValueError(f"a benchmark needs at least 4 held-out items, got {len(heldout)}")
        generator = torch.Generator().manual_seed(seed)
        heldout = heldout[torch.randperm(len(heldout), generator=generator)]
        half = len(heldout) // 2
        kind = "held-out items, one half against the other"
        if real is None:
            heldout, real = heldout[:half], heldout[half:]
        else:
            real = real[torch.randperm(len(real), generator=generator)]
            kind = "training items against held-out items"
        reference, real = heldout[:REFERENCE_LIMIT].double(), real[:samples].double()
        about = {
            "reference": "held-out items",
            "reference_items": len(reference),
            "floor": kind,
            "floor_items": len(real),
        }
        rest: dict[str, Any] = (
            {"name": name} if decode is None else {"name": name, "decode": decode}
        )
        return cls._with_floor(reference, real, about, seed, {}, **rest)

    @classmethod
    def exact(
        cls, law: GaussianMixture | Law, *, samples: int, seed: int = 0, name: str | None = None
    ) -> Target:
        """Exact draws and moments of a law.

        Args:
            law: what the score belongs to.
            samples: number of samples to be judged, and of exact draws in the reference.
            seed: of the draws and of the directions.
            name: of the law; its own if None.
        """
        generator = torch.Generator().manual_seed(seed)
        if name is None:
            name = label(law) if isinstance(law, Law) else ""
        mixture = law.mixture() if isinstance(law, Law) else law.to("cpu", torch.float64)

        def draw() -> Tensor:
            return mixture.sample(samples, generator)

        reference, real = draw(), draw()
        mean, covariance = mixture.moments()
        moments = mean.flatten(), covariance
        sets = [moment_errors(draw(), moments) for _ in range(FLOOR_SETS)]
        floor = {k: _quantile([s[k] for s in sets]) for k in sets[0]}
        about = {
            "reference": "exact draws",
            "reference_items": samples,
            "floor": "exact draws against exact draws",
            "floor_items": samples,
        }
        return cls._with_floor(reference, real, about, seed, floor, moments=moments, name=name)

    @classmethod
    def _with_floor(
        cls,
        reference: Tensor,
        real: Tensor,
        about: dict[str, Any],
        seed: int,
        others: dict[str, float],
        **rest: Any,
    ) -> Target:
        sliced, mmd = SlicedWasserstein(seed=seed), MMD.fit(reference)
        floor = {
            "sliced_w2": sliced.floor(real, reference, seed=seed),
            "mmd2": mmd.floor(real, reference, seed=seed),
            **others,
        }
        about |= {
            "floor_quantile": QUANTILE,
            "sliced_w2_projections": sliced.projections,
            "mmd2_kernel": "mean of rational-quadratic kernels, exponents 0.2, 0.5, 1, 2, 5",
            "mmd2_scale": mmd.scale,
            "mmd2_items_at_most": mmd.limit,
        }
        return cls(reference, floor, about, seed=seed, **rest)

    def measure(self, x: Tensor) -> dict[str, float]:
        """All measures of finite samples ``x (N, *shape)`` in the model's range."""
        items = self.decode(x.detach()).cpu().double()
        projections, kernel = self._profiles
        sliced = SlicedWasserstein(seed=self.seed)(items, self.reference, projections)
        mmd = MMD(self.about["mmd2_scale"])(items, self.reference, kernel)
        found = {
            "sliced_w2": sliced.value,
            "sliced_w2_stderr": sliced.stderr,
            "mmd2": mmd.value,
            "mmd2_stderr": mmd.stderr,
        }
        return found if self.moments is None else found | moment_errors(items, self.moments)

    @cached_property
    def _profiles(self) -> tuple[Tensor, Tensor]:
        """What the distances need to know of the reference, once for all rows."""
        mmd = MMD(self.about["mmd2_scale"])
        return SlicedWasserstein(seed=self.seed).profile(self.reference), mmd.profile(
            self.reference
        )


def moment_errors(x: Tensor, moments: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Errors of the mean and covariance of ``x (N, *shape)``.

    ``mean_error`` is the root mean square over entries, ``covariance_error`` the Frobenius norm of
    the difference relative to that of the exact covariance.
    """
    mean, covariance = moments
    x = x.flatten(1)
    found = torch.cov(x.T).reshape(covariance.shape)
    return {
        "mean_error": float((x.mean(0) - mean).square().mean().sqrt()),
        "covariance_error": float((found - covariance).norm() / covariance.norm()),
    }


def _quantile(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(QUANTILE))
