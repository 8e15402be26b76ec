"""Scores: the protocol, and a network that is one.

A score is any callable ``score(x, t, **cond) -> grad_x log p_t(x)`` that carries its ``.sde``. The
class :class:`Score` adds the equivalent readings of it: noise, denoised data, ODE velocity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .parameterization import Coefficients, Parameterization
from .precision import widest
from .sde.base import GaussianSDE, as_time, match

if TYPE_CHECKING:
    from .data.scaler import Scaler
    from .given import Degraded, Masked


class Cost(NamedTuple):
    """What one call of a score asks of networks, for each sample."""

    forwards: int = 1
    """Evaluations."""
    products: int = 0
    """Products with the Jacobian of one: ways back, each about as long as an evaluation."""


def cost(score: Any, t: Tensor) -> Cost:
    """What one call at ``t`` costs: one evaluation, unless the score says otherwise."""
    own = getattr(score, "cost", None)
    return Cost() if own is None else own(t)


class Score:
    """Base of scores of Gaussian processes: a subclass gives ``__call__`` and ``sde``."""

    sde: GaussianSDE
    __call__: Callable[..., Tensor]

    def noise(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        """``eps_hat = -sigma(t) score(x, t)``, of the shape of ``x``."""
        t = as_time(t, x)
        return match(-self.sde.sigma(t), x) * self(x, t, **cond)

    def denoise(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        """``E[x_0 | x_t] = (x - sigma eps_hat)/alpha``, of the shape of ``x``."""
        t = as_time(t, x)
        eps = self.noise(x, t, **cond)
        return (x - match(self.sde.sigma(t), x) * eps) / match(self.sde.alpha(t), x)

    def velocity(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        """``dx/dt = f(x, t) - g(t)^2/2 score(x, t)``, the drift of the probability-flow ODE."""
        return self.sde.reverse(self.__call__, eta=0.0, **cond).drift(x, as_time(t, x))

    def denoising_error(
        self, x0: Tensor, eps: Tensor, t: float | Tensor, **cond: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """``eps_hat - eps`` at ``x = alpha x_0 + sigma eps``, as ``c_out`` times an error.

        Args:
            x0: data in model range, ``(B, *shape)``.
            eps: noise, of the shape of ``x0``.
            t: times, ``()`` or ``(B,)``, on any device.

        Returns:
            ``(error, c_out, v)``: the error of the shape of ``x0``, its factor of the shape of
            ``t`` (here 1), and what the network says about the variance (here None).
        """
        t = as_time(t)
        time = as_time(t, x0).to(x0.device, widest(x0.device)) if t.ndim else t
        return (
            self.noise(self.sde.perturb(x0, time, eps), time, **cond) - eps,
            torch.ones_like(t),
            None,
        )


class ScoreModel(nn.Module, Score):
    """A network composed with a process and a parameterization.

        eps_hat = c_skip x + c_out F(c_in x, c_noise),    score = -eps_hat / sigma

    Args:
        net: ``F(x, c_noise, **cond)`` with ``x`` of shape ``(B, *shape)`` and ``c_noise`` of
            shape ``(B,)``, giving the shape of ``x``, or twice its channels: the second half is
            then about the variance, see :meth:`noise_and_variance`.
        sde: the forward process.
        parameterization: what ``F`` predicts.
        shape: shape of one item, where known.
        scaler: map between data and model range, where known.
        weights: which weights these are, ``"ema"`` or ``"raw"``; reported with every result.
        given: what the network is given of an item beside its state, see :mod:`scoresde.given`.
    """

    def __init__(
        self,
        net: nn.Module,
        sde: GaussianSDE,
        parameterization: Parameterization,
        *,
        shape: tuple[int, ...] | None = None,
        scaler: Scaler | None = None,
        weights: str = "raw",
        given: Degraded | Masked | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.sde = sde
        self.parameterization = parameterization
        self.shape = shape
        self.scaler = scaler
        self.weights = weights
        self.given = given
        self.tuned: tuple[dict[str, Any], ...] = ()
        """Entries of the time grids tuned to this model, which :func:`scoresde.load` reads."""

    def around(self, net: nn.Module, weights: str) -> ScoreModel:
        """The same model around another network of its kind."""
        return ScoreModel(
            net, self.sde, self.parameterization, shape=self.shape, scaler=self.scaler,
            weights=weights, given=self.given,
        )  # fmt: skip

    def noise(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        """``eps_hat``, in the dtype of ``x``; the network computes in its own dtype."""
        return self.noise_and_variance(x, t, **cond)[0]

    def noise_and_variance(
        self, x: Tensor, t: float | Tensor, **cond: Any
    ) -> tuple[Tensor, Tensor | None]:
        """``eps_hat``, and what a network of twice the channels says about the variance.

        The second half ``v`` of its output, in the shape of ``x``, places the log-variance of a
        reverse step between that of the small (``v = -1``) and the large variance (``v = 1``) of
        :class:`~scoresde.solvers.Ancestral`. Source: Improved Denoising Diffusion Probabilistic
        Models (Nichol & Dhariwal, 2021), https://arxiv.org/abs/2102.09672.

        Returns:
            ``(eps_hat, v)``; ``v`` is None without such a half.
        """
        c, out, v = self._output(x, t, cond)
        return match(c.c_skip, x) * x + match(c.c_out, x) * out, v

    def denoise(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        """``E[x_0 | x_t] = (x - sigma eps_hat)/alpha``, without the cancellation in it.

        ``(1 - sigma c_skip)/alpha x - sigma c_out/alpha F``: where the noise is large, both terms
        of the difference are, but not these coefficients.
        """
        c, out, _ = self._output(x, t, cond)
        t = as_time(t, x)
        t = t.to(widest(t.device))
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        skip, factor = (1 - sigma * c.c_skip) / alpha, -sigma * c.c_out / alpha
        return match(skip, x) * x + match(factor, x) * out

    def denoising_error(
        self, x0: Tensor, eps: Tensor, t: float | Tensor, **cond: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """``F - F*``, without the cancellation in ``eps_hat - eps = c_out (F - F*)``.

            F* = (1 - c_skip sigma)/c_out eps - c_skip alpha/c_out x_0

        Where ``c_out`` is small, ``eps_hat`` and ``eps`` nearly agree, but ``F`` and ``F*`` do
        not. The coefficients are made where ``t`` is, in float64, and moved to the data at once.

        Returns:
            ``(F - F*, c_out, v)``; see :meth:`Score.denoising_error`. ``v`` is that of
            :meth:`noise_and_variance`.
        """
        t = as_time(t)
        t = t.to(widest(t.device)).flatten() if t.ndim else t
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        c = self.parameterization(alpha, sigma)
        to_data, to_eps = -c.c_skip * alpha / c.c_out, (1 - c.c_skip * sigma) / c.c_out
        factors = torch.stack([c.c_in * alpha, c.c_in * sigma, to_eps, to_data])
        factors = factors.to(x0.device, x0.dtype, non_blocking=True)
        data_in, eps_in, to_eps, to_data = (as_time(f, x0) for f in factors)
        out, v = self._evaluate(torch.addcmul(data_in * x0, eps_in, eps), c.c_noise, cond)
        error = torch.addcmul(out, to_eps, eps, value=-1)
        return torch.addcmul(error, to_data, x0, value=-1), c.c_out, v

    def _output(
        self, x: Tensor, t: float | Tensor, cond: dict[str, Any]
    ) -> tuple[Coefficients, Tensor, Tensor | None]:
        """The coefficients, ``F`` in the dtype of ``x``, and the half about the variance."""
        t = as_time(t, x)
        if self.parameterization.label.widen:
            t = t.to(widest(t.device))  # labels of 1000 steps need more digits than float32 has
        c = self.parameterization(self.sde.alpha(t), self.sde.sigma(t))
        return c, *self._evaluate(match(c.c_in, x) * x, c.c_noise, cond)

    def _evaluate(
        self, inner: Tensor, c_noise: Tensor, cond: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """``F`` of ``inner = c_in x``, in its dtype, and the half about the variance."""
        if self.shape is not None and tuple(inner.shape[1:]) != tuple(self.shape):
            raise ValueError(
                f"x of shape {tuple(inner.shape)} does not fit "
                f"a model of (B, *{tuple(self.shape)})"
            )
        if cond.get("image") is None and always_given(self):
            raise ValueError(
                "this model was never trained without an image of its item (given.empty is 0): "
                "give it image=, or a measurement by scoresde.inverse"
            )
        parameter = next(self.net.parameters(), inner)
        # The noise level stays in float32 or better: half precision cannot tell neighbours apart.
        precise = torch.promote_types(parameter.dtype, torch.float32)
        c_noise = c_noise.reshape(-1).to(parameter.device, precise, non_blocking=True)
        out = self.net(inner.to(parameter.dtype), c_noise.expand(len(inner)), **cond)
        out = out.to(inner.dtype)
        if out.shape == inner.shape:
            return out, None
        if out.shape != (len(inner), 2 * inner.shape[1], *inner.shape[2:]):
            raise ValueError(
                f"the network gave {tuple(out.shape)} for x of shape {tuple(inner.shape)}: "
                "it must give that shape, or twice its channels"
            )
        out, v = out.chunk(2, 1)
        return out, v

    def forward(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        """The score ``grad_x log p_t(x)``, of the shape and dtype of ``x``.

        Args:
            x: state, shape ``(B, *shape)``.
            t: time, shape ``()``, ``(B,)`` or ``(B, 1, ..., 1)``, in ``[t_min, t_max]``.
        """
        t = as_time(t, x)
        return -self.noise(x, t, **cond) / match(self.sde.sigma(t), x)

    def save(self, folder: str | Path) -> None:
        """Writes ``model.safetensors`` and ``config.yaml``; :func:`scoresde.load` reads them."""
        from .checkpoint import save_model

        save_model(self, Path(folder))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | None = None,
        metrics: Mapping[str, Any] | None = None,
        licence: str | None = None,
        message: str = "A model of scoresde",
    ) -> str:
        """Uploads the model to the Hugging Face hub, with a card that says what it is.

        ``scoresde.load("hf:owner/name")`` reads it again. Needs ``pip install "scoresde[hub]"``
        and a login (``hf auth login``) or a token.

        Args:
            repo_id: ``owner/name``; made if it is not there.
            private: whether a repository that is made is private.
            token: of a login with write access, that of ``hf auth login`` if None.
            metrics: figures for the card, as ``{"bits_per_dim": 1.27, "dataset": "mnist"}``.
            licence: identifier of the weights' licence, such as ``"apache-2.0"``.
            message: of the commit.

        Returns:
            The address of the repository.

        Raises:
            CheckpointError: in one line, if the hub refuses it or cannot be reached.
        """
        from .interop.hub import push

        return push(
            self, repo_id, private=private, token=token, metrics=metrics, licence=licence,
            message=message,
        )  # fmt: skip


def always_given(model: Any) -> bool:
    """Whether a model was never trained without an image: without one, it says nothing."""
    given = getattr(model, "given", None)
    return given is not None and getattr(given, "empty", 1.0) == 0


@contextmanager
def evaluating(score: object) -> Iterator[None]:
    """Puts the modules of a score into evaluation mode for the block, and back."""
    modules = [m for m in modules_of(score) if m.training]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module in modules:
            module.train()


def modules_of(score: object) -> Iterator[nn.Module]:
    """The module that a score is; or those of its ``parts``, or of what it keeps as ``score``."""
    if isinstance(score, nn.Module):
        yield score
        return
    for part in getattr(score, "parts", (getattr(score, "score", None),)):
        if part is not None:
            yield from modules_of(part)


def home(score: object) -> tuple[torch.device, torch.dtype]:
    """Device of a score, and the dtype its inputs are best kept in."""
    if isinstance(score, nn.Module):
        parameter = next(score.parameters(), None)
        if parameter is not None:
            dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
            return parameter.device, dtype
    device = getattr(score, "device", torch.device("cpu"))
    return device, getattr(score, "dtype", torch.get_default_dtype())


def per_sample(cond: dict[str, Any], x: Tensor) -> dict[str, Any]:
    """Conditions on the device of the state, checked to hold one value a sample."""
    for name, value in cond.items():
        if isinstance(value, Tensor) and value.ndim and len(value) != len(x):
            raise ValueError(
                f"condition {name!r} has {len(value)} values for {len(x)} samples: one a sample"
            )
    return {k: v.to(x.device) if isinstance(v, Tensor) else v for k, v in cond.items()}
