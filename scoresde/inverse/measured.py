r"""Scores led by a measurement: what the methods share.

    y = A x_0 + noise_std e,    score(x_t | y) = score(x_t) + grad log p(y | x_t)

``p(y | x_t)`` is an integral over ``p(x_0 | x_t)``, of which the score knows the mean and, by its
derivative, the covariance:

    x0_hat = E[x_0 | x_t],    V = Cov[x_0 | x_t] = (sigma^2/alpha) J,    J = d x0_hat / d x_t

The methods differ in the covariance ``C`` that they take for ``p(x_0 | x_t)``, seen as a Gaussian:

    grad log p(y | x_t) = J^T A^T w,    (noise_std^2 I + A C A^T) w = r,    r = y - A x0_hat

In terms of the denoised data, ``x0_hat`` moves by ``V^T A^T w``. Products with ``V^T`` are
vector-Jacobian products of the score; ``V`` is symmetric where the score is exact.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..model import Cost, cost, modules_of
from ..sde.base import as_time, match
from ..wrapped import Wrapped
from .operator import Operator, check_noise

FAR = 3.0
"""Standard deviations of the data that :meth:`Denoised.held` reckons with."""
SURE = 6.0
"""Deviations of a Gaussian that it lets through in any case."""


@dataclass(frozen=True, eq=False)
class Measured(Wrapped):
    """Base of the scores of ``p(x_t | y)``: a subclass gives :meth:`pull`.

    Args:
        score: ``score(x, t, **cond)`` that carries its ``sde``.
        operator: the linear map ``A`` from items to measurements.
        y: the measurement in model range, ``(1, *operator.out)`` or ``(B, *operator.out)``. One a
            sample may also be given at each call as the condition ``measurement``, ``(B, *out)``,
            which takes its place: solvers that go on with some samples of a batch need that.
        noise_std: standard deviation of the measurement's noise, >= 0.

    Raises:
        ValueError: for a measurement that does not fit the operator, or a number out of range.
    """

    score: Any
    operator: Any
    y: Tensor
    noise_std: float

    own: ClassVar[tuple[str, ...]] = ("measurement",)
    products: ClassVar[int] = 1
    """Products with the Jacobian of the wrapped score in one call."""
    default_solver: ClassVar[Any] = {"name": "ddim", "eta": 1.0}
    """The solver, or its section, that came closest to exact posteriors; see each method."""
    default_grid: ClassVar[str] = "logistic"
    """Where its steps lie when not told."""
    default_steps: ClassVar[int] = 100
    """Steps that it takes when not told."""

    def __post_init__(self) -> None:
        check_noise(self.noise_std, type(self).__name__)
        check_items(self.score, self.operator)
        _fits(self.y, self.operator, "y")

    @classmethod
    def suited(cls, steps: int) -> dict[str, Any]:
        """Options that suit a number of steps better than the defaults, which suit any."""
        return {}

    @abstractmethod
    def pull(self, at: Denoised, r: Tensor) -> Tensor:
        """By how much ``x0_hat`` moves, given the residual ``r = y - A x0_hat``.

        Args:
            at: the denoised data.
            r: ``(B, *operator.out)``.

        Returns:
            ``V^T A^T w``, of the shape of ``x``.
        """

    def denoise(
        self, x: Tensor, t: float | Tensor, measurement: Tensor | None = None, **cond: Any
    ) -> Tensor:
        """``x0_hat + V^T A^T w``, an estimate of ``E[x_0 | x_t, y]``, of the shape of ``x``."""
        at = Denoised(self.score, x, as_time(t, x), cond, self.scale, self.products > 0)
        y = self._measurement(x, measurement)
        move = self.pull(at, self.operator.seen(y - self.operator(at.x0)))
        return at.x0 + (at.held(move) if self.products and self._learned else move)

    def __call__(
        self, x: Tensor, t: float | Tensor, measurement: Tensor | None = None, **cond: Any
    ) -> Tensor:
        """``score + grad log p(y | x_t)`` as ``(alpha x0' - x)/sigma^2``, ``x0'`` from above.

        Args:
            x: state, ``(B, *shape)``.
            t: time, ``()``, ``(B,)`` or ``(B, 1, ..., 1)``.
            measurement: one a sample, ``(B, *operator.out)``, in the place of ``y``.
        """
        t = as_time(t, x)
        x0 = self.denoise(x, t, measurement, **cond)
        alpha, power = self.sde.alpha(t), self.sde.sigma(t) ** 2
        return (match(alpha, x) * x0 - x) / match(power, x)

    def cost(self, t: Tensor) -> Cost:
        """Of one call: that of the wrapped score, and of ``products`` ways back through it."""
        forwards, products = cost(self.score, t)
        # The way back through a product passes its two halves.
        return Cost(forwards, products + self.products * (forwards + 2 * products))

    @property
    def _learned(self) -> bool:
        """Whether the covariance is that of a network, and not exact."""
        return next(modules_of(self.score), None) is not None

    @property
    def scale(self) -> float:
        """Standard deviation of the data in model range, as the wrapped model knows it, or 1."""
        return scale_of(self.score)

    def _measurement(self, x: Tensor, measurement: Tensor | None) -> Tensor:
        """The measurement of every sample, ``(1 or B, *out)``, like ``x``."""
        y = self.y
        if measurement is not None:
            y = measurement
            _fits(y, self.operator, "measurement")
        if len(y) not in (1, len(x)):
            raise ValueError(
                f"{len(y)} measurements do not fit {len(x)} samples: give one, one a sample, or "
                "one a sample as the condition measurement= where a solver takes samples apart"
            )
        return y.to(x.device, x.dtype)


@dataclass(frozen=True, eq=False)
class Scaled(Measured):
    """Base of those that ask how far the data spread.

    Args:
        score, operator, y, noise_std: see :class:`Measured`.
        sigma_data: standard deviation of the data in model range, > 0; that of the wrapped
            model's parameterization if None, and 1 if it has none.

    Raises:
        ValueError: as :class:`Measured`.
    """

    sigma_data: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        scale_of(self.score, self.sigma_data, type(self).__name__)

    @property
    def scale(self) -> float:
        """Standard deviation of the data in model range."""
        return scale_of(self.score, self.sigma_data)


class Denoised:
    """``x0_hat`` at a state and a time, with what methods ask of ``p(x_0 | x_t)``.

    Args:
        score: the wrapped score.
        x: state, ``(B, *shape)``.
        t: time, ``()`` or ``(B, 1, ..., 1)``.
        cond: conditions of the score.
        scale: standard deviation of the data.
        jacobian: whether :meth:`spread` will be asked for.
    """

    def __init__(
        self, score: Any, x: Tensor, t: Tensor, cond: dict[str, Any], scale: float, jacobian: bool
    ) -> None:
        self._sde, self._t, self._scale = score.sde, t, scale
        self._keep = torch.is_grad_enabled()
        if not jacobian:
            self.x0 = _denoise(score, x, t, cond)
            return
        # Fused attention has no second derivatives.
        plain = sdpa_kernel(SDPBackend.MATH) if self._keep else nullcontext()
        with torch.enable_grad(), plain:
            self._x = x if self._keep and x.requires_grad else x.detach().requires_grad_()
            self._graph = _denoise(score, self._x, t, cond)
        if not self._graph.requires_grad:
            raise ValueError(
                "the score is not differentiable in x, which the measurement's pull needs: "
                "remove the no_grad, detach or NumPy call inside it"
            )
        self.x0 = self._graph if self._keep else self._graph.detach()

    def spread(self, v: Tensor) -> Tensor:
        """``V^T v = (sigma^2/alpha) J^T v``, of the shape of ``x``: one product."""
        (product,) = torch.autograd.grad(
            self._graph, self._x, v, retain_graph=True, create_graph=self._keep
        )
        factor = self._sde.sigma(self._t) ** 2 / self._sde.alpha(self._t)
        return match(factor, product) * product

    def held(self, move: Tensor) -> Tensor:
        """``move`` of each sample of a network, held to how wide ``p(x_0 | x_t)`` could be.

        Its covariance need not be one: where it is nearly zero along the residual, a step of
        conjugate gradients would go a thousand times too far. The bound is the radius of a
        Gaussian of data three times as wide as they are, six deviations at least.
        """
        s, q = FAR * self._scale, self.noise_level
        radius = s * q / torch.hypot(torch.full_like(q, s), q)
        most = beside(radius * max(SURE, math.sqrt(move[0].numel())), move)
        length = beside(move.flatten(1).norm(dim=1), move)
        return move * (most / length.clamp_min(torch.finfo(move.dtype).tiny)).clamp_max(1)

    @property
    def noise_level(self) -> Tensor:
        """``q = sigma/alpha``, of the shape of ``t``."""
        return self._sde.sigma(self._t) / self._sde.alpha(self._t)

    @property
    def diffusion(self) -> Tensor:
        """``g(t)``, of the shape of ``t``."""
        return self._sde.diffusion(self._t)

    @property
    def variance(self) -> Tensor:
        """``r_t^2 = s^2 q^2/(s^2 + q^2)``, that of ``p(x_0 | x_t)`` for data ``N(0, s^2 I)``."""
        power = self.noise_level**2
        return self._scale**2 * power / (self._scale**2 + power)


def beside(value: Tensor, r: Tensor) -> Tensor:
    """A number a sample, of shape ``()`` or ``(B, ...)``, to broadcast with ``r (B, ...)``."""
    return value.reshape(-1, *(1,) * (r.ndim - 1)).to(r.dtype) if value.ndim else value


def scale_of(score: Any, told: float | None = None, who: str = "") -> float:
    """Standard deviation of the data in model range, as told or as a score knows it, or 1.

    Raises:
        ValueError: if ``who`` was told a number out of range.
    """
    if told is not None:
        if not 0 < told < math.inf:
            raise ValueError(f"{who} needs a finite sigma_data > 0, got {told}")
        return told
    while not hasattr(score, "parameterization") and hasattr(score, "score"):
        score = score.score
    return float(getattr(getattr(score, "parameterization", None), "sigma_data", 1.0))


def check_items(score: Any, operator: Any) -> None:
    """Refuses an operator of items that are not those of the score, where it knows them."""
    if not isinstance(operator, Operator):
        raise ValueError(
            f"the operator is one of scoresde.inverse, got {type(operator).__name__}: "
            "inverse.Custom makes one of a linear function, inverse.Linear of a matrix"
        )
    shape = getattr(score, "shape", None)
    if shape is not None and tuple(shape) != tuple(operator.shape):
        raise ValueError(
            f"the operator measures items of shape {tuple(operator.shape)}, "
            f"the score has items of shape {tuple(shape)}"
        )


def _denoise(score: Any, x: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
    """``E[x_0 | x_t]`` by the score's own reading, or from the score (Tweedie)."""
    own = getattr(score, "denoise", None)
    if own is not None:
        return own(x, t, **cond)
    sde = score.sde
    return (x + match(sde.sigma(t) ** 2, x) * score(x, t, **cond)) / match(sde.alpha(t), x)


def _fits(y: Tensor, operator: Any, name: str) -> None:
    """Refuses a measurement that is not one of this operator."""
    out = tuple(operator.out)
    if not isinstance(y, Tensor) or y.ndim != len(out) + 1 or tuple(y.shape[1:]) != out:
        found = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        shape = "".join(f", {n}" for n in out)
        raise ValueError(
            f"{name} of {found} does not fit the operator: a tensor (1{shape}) or (B{shape})"
        )
