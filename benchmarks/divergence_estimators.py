"""Error of a divergence against its vector-Jacobian products, at a point and along a path.

    python benchmarks/divergence_estimators.py [--items 16] [--repeats 64] [--costs]

Prints Markdown. First the root-mean-square error, in nats, of ``tr(sigma J)``, ``J`` the Jacobian
of the noise, at points of the trajectories of the shipped digits network and of two mixtures; then
the standard deviation of its integral over the whole path, in which the probes are held fixed or
change their signs from point to point; with ``--costs`` the seconds of an evaluation and of a
product. Jacobians are taken once, exactly: an estimator then sees the field ``z -> J z``. Hutch++
and XTrace work on ``J^T``, of the same trace, of which there are products, or on ``(I - J)^T``.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

import scoresde as sd
from scoresde.checkpoint import locate
from scoresde.config import construct, read_yaml
from scoresde.data import DataConfig, load_splits
from scoresde.grids import grid_of
from scoresde.likelihood.divergence import draw_probes, hutchinson, walsh
from scoresde.likelihood.quadrature import weights
from scoresde.model import Score
from scoresde.noise import KeyedNoise

Shape = tuple[int, ...]
PRODUCTS = (1, 2, 4, 8, 16, 32, 64)
POINTS = 16
SHOWN = (3, 5, 7, 9, 11)


def trajectory(score: Score, x: Tensor, points: int) -> tuple[Tensor, list[Tensor]]:
    """Times equally spaced in log-SNR and the states there, by steps of Heun in between."""
    sde, inner = score.sde, 3
    times = grid_of("logsnr")(sde, (points - 1) * inner, sde.t_max, sde.t_min_likelihood).flip(0)
    states = [x]
    for t, s in itertools.pairwise(times):
        x = states[-1]
        rise = float(sde.sigma(s) / sde.alpha(s) - sde.sigma(t) / sde.alpha(t))
        with torch.no_grad():
            first = score.noise(x, t)
            u = x / float(sde.alpha(t))
            second = score.noise(float(sde.alpha(s)) * (u + rise * first), s)
            states.append(float(sde.alpha(s)) * (u + rise * (first + second) / 2))
    return times[::inner], states[::inner]


def jacobians(score: Score, times: Tensor, states: list[Tensor]) -> Tensor:
    """``sigma d eps/dx``, ``(points, B, D, D)``, float64."""
    found = []
    for t, x in zip(times, states, strict=True):
        z = x.clone().requires_grad_()
        value = score.noise(z, t).flatten(1)
        rows = [
            torch.autograd.grad(column.sum(), z, retain_graph=True)[0].flatten(1)
            for column in value.T
        ]
        found.append(float(score.sde.sigma(t)) * torch.stack(rows, 1).double())
    return torch.stack(found)


def trace(a: Tensor) -> Tensor:
    return a.diagonal(dim1=-2, dim2=-1).sum(-1)


def gaussian_jacobians(sde: sd.sde.base.GaussianSDE, covariance: Tensor, times: Tensor) -> Tensor:
    """``sigma^2 (alpha^2 S + sigma^2)^{-1}``, ``(points, 1, D, D)``."""
    values, basis = torch.linalg.eigh(covariance)
    alpha, sigma = (f(times).double()[:, None] for f in (sde.alpha, sde.sigma))
    shrunk = sigma**2 / (alpha**2 * values.clamp_min(0) + sigma**2)
    return (basis @ torch.diag_embed(shrunk) @ basis.T)[:, None]


def drawn(like: Tensor, count: int, noise: str, seed: int) -> Tensor:
    """Probes ``(count, B, *shape)``: the package's, or orthogonal ones (alone: on a sphere)."""
    if noise != "orthogonal":
        return draw_probes(like, count, noise, seed)
    columns = draw_probes(like, count, "gaussian", seed).flatten(2).permute(1, 2, 0)
    q, r = torch.linalg.qr(columns)
    q = q * math.sqrt(q.shape[1]) * r.diagonal(dim1=1, dim2=2).sign()[:, None]  # Haar's measure
    return q.permute(2, 0, 1).reshape(count, *like.shape)


def probed(noise: str, shape: Shape) -> Callable[[Tensor, int], Tensor]:
    """Estimates ``(B,)`` of the traces of matrices ``(B, D, D)`` by that many products."""

    def estimate(a: Tensor, count: int) -> Tensor:
        z = a.new_zeros(len(a), *shape)
        probes = drawn(z, count, noise, seed=count)
        return hutchinson(lambda z: (a @ z.flatten(1)[:, :, None]).reshape(z.shape), z, probes)[
            1
        ].mean(1)

    return estimate


def hutch_pp(a: Tensor, products: int) -> Tensor:
    """Hutch++ (Meyer et al., 2021, https://arxiv.org/abs/2010.09649), algorithm 1."""
    third, b = products // 3, a.mT
    columns = draw_probes(a[:, 0], products - third, seed=1).permute(1, 2, 0)
    sketch, rest = columns[..., :third], columns[..., third:]
    q = torch.linalg.qr(b @ sketch)[0]
    rest = rest - q @ (q.mT @ rest)
    return trace(q.mT @ b @ q) + trace(rest.mT @ b @ rest) / rest.shape[-1]


def xtrace(a: Tensor, products: int) -> Tensor:
    """XTrace (Epperly, Tropp, Webber, 2024, https://arxiv.org/abs/2301.07825), section 2.1.

    With ``Q R = B Omega`` the leave-one-out basis is ``Q (I - s s^T)``, ``s`` along a column of
    ``R^{-T}``; the residual of the one left out is scaled to the sphere of its complement.
    """
    count, dims, b = products // 2, a.shape[-1], a.mT
    omega = draw_probes(a[:, 0], count, "gaussian", seed=2).permute(1, 2, 0)
    image = b @ omega
    q, r = torch.linalg.qr(image)
    imaged = b @ q
    s = torch.linalg.solve_triangular(
        r.mT, torch.eye(count, dtype=a.dtype).expand_as(r), upper=False
    )
    s = s / s.norm(dim=1, keepdim=True)
    inner, seen = q.mT @ imaged, q.mT @ omega
    seen = seen - s * (s * seen).sum(1, keepdim=True)
    left, left_image = omega - q @ seen, image - imaged @ seen
    scaled = (dims - count + 1) / left.square().sum(1)
    each = trace(inner)[:, None] - (s * (inner @ s)).sum(1) + scaled * (left * left_image).sum(1)
    return each.mean(1)


def points_table(
    name: str, js: Tensor, controls: dict[str, Tensor], shape: Shape, repeats: int
) -> None:
    """Errors at the points of the path, in nats."""
    dims = js.shape[-1]
    print(f"\n{name}: RMS error of tr(sigma J), nats, over {js.shape[1]} items x {repeats}\n")
    print("| point | trace | estimator | " + " | ".join(map(str, PRODUCTS)) + " |")
    print("|---" * (len(PRODUCTS) + 3) + "|")
    for point in SHOWN:
        a = js[point].repeat(repeats, 1, 1)
        truth, unit = trace(a), torch.eye(dims, dtype=a.dtype)
        plans: dict[str, tuple[Callable[[Tensor, int], Tensor], Tensor, int]] = {
            kind: (probed(kind, shape), torch.zeros_like(unit), 1)
            for kind in ("gaussian", "rademacher", "orthogonal", "walsh")
        }
        for label, shift in (("J", 0 * unit), ("I - J", unit)):
            plans[f"Hutch++ of {label}"] = (hutch_pp, shift, 3)
            plans[f"XTrace of {label}"] = (xtrace, shift, 4)
        for label, control in controls.items():
            for kind in ("gaussian", "rademacher"):
                plans[f"{kind} - {label}"] = (probed(kind, shape), control[point, 0], 1)
        for label, (estimate, taken, least) in plans.items():
            cells = []
            for count in PRODUCTS:
                possible = least <= count and (
                    count <= dims or label in ("gaussian", "rademacher")
                )
                if not possible:
                    cells.append("-")
                    continue
                error = estimate(a - taken, count) + trace(taken) - truth
                cells.append(f"{float(error.square().mean().sqrt()):.3f}")
            print(f"| {point} | {float(truth.mean()):.1f} | {label} | {' | '.join(cells)} |")


def path_table(
    js: Tensor, steps: Tensor, controls: dict[str, Tensor], shape: Shape, repeats: int
) -> None:
    """Standard deviations of the integral, in nats, and what the standard error says."""
    points, items, dims = js.shape[:3]
    like = js.new_zeros(items * repeats, *shape)
    print("\n| probes | k | standard deviation | standard error |\n|---|---|---|---|")
    plans = [(kind, False, "") for kind in ("gaussian", "rademacher", "orthogonal", "walsh")]
    plans += [("rademacher", False, label) for label in controls]
    plans += [("gaussian", False, "full Gaussian"), ("redrawn", False, "")]
    plans += [("rademacher", True, ""), ("gaussian", True, "")]
    for kind, turning, label in plans:
        for count in (1, 2, 4):
            noise = "rademacher" if kind == "redrawn" else kind
            estimates = js.new_zeros(len(like), count)
            for point in range(points):
                seed = point if kind == "redrawn" else 0
                v = drawn(like, count, noise, seed=seed)
                v = (v * walsh(point, like) if turning else v).flatten(2)
                a = js[point] - (controls[label][point] if label else 0)
                estimates += steps[point] * _forms(v, a, repeats)
            errors = estimates.mean(1).reshape(repeats, items)
            std = float(errors.var(0).mean().sqrt())
            share = 1 - count / dims if kind == "orthogonal" else 1  # of a finite population
            said = (share / count * estimates.var(1)).mean().sqrt() if count > 1 else math.nan
            how = f"{kind}{' - ' + label if label else ''}{', signs change' if turning else ''}"
            print(f"| {how} | {count} | {std:.2f} | {float(said):.2f} |")


def _forms(v: Tensor, a: Tensor, repeats: int) -> Tensor:
    """``v^T A v`` of probes ``(k, repeats x items, D)``, ``(repeats x items, k)``."""
    u = v.reshape(len(v), repeats, -1, v.shape[-1])
    return ((u[..., None, :] @ a)[..., 0, :] * u).sum(-1).flatten(1).T


def costs(name: str) -> None:
    """Seconds of an evaluation, of one with its graph, and of products of several probes."""
    model = sd.load(name).eval()
    print(f"\n{name}: milliseconds, one thread\n")
    print("| batch | k | f | f with graph | loop | batched | repeated | b |")
    print("|---" * 8 + "|")
    t = torch.tensor(0.4)
    for batch in (1, 16):
        z = torch.randn(batch, *(model.shape or ()))

        def recorded(z: Tensor) -> tuple[Tensor, Tensor]:
            z = z.detach().requires_grad_()
            return z, model.noise(z, t)

        def batched(z: Tensor, v: Tensor) -> None:
            z, value = recorded(z)
            torch.autograd.grad(value, z, v, is_grads_batched=True)

        def repeated(z: Tensor, v: Tensor) -> None:
            z, value = recorded(z.repeat(len(v), *(1,) * (z.ndim - 1)))
            torch.autograd.grad(value, z, v.flatten(0, 1))

        def looped(z: Tensor, v: Tensor) -> None:
            hutchinson(lambda x: model.noise(x, t), z, v)

        with torch.no_grad():
            plain = clock(model.noise, z, t)
        graph = clock(recorded, z)
        for count in (1, 2, 4, 8):
            v = draw_probes(z, count)
            loop = clock(looped, z, v)
            others = (clock(go, z, v) for go in (batched, repeated))
            values = [plain, graph, loop, *others, (loop - graph) / count]
            print(f"| {batch} | {count} | " + " | ".join(f"{v:.1f}" for v in values) + " |")


def clock(call: Callable[..., object], *args: Tensor, times: int = 4) -> float:
    """Shortest of a few runs, milliseconds."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        call(*args)
        taken.append(time.perf_counter() - began)
    return 1e3 * min(taken)


def digits(items: int) -> tuple[Score, Tensor, Tensor]:
    """Score, held-out items dequantised once, and the covariance of the training items."""
    name = "zoo:digits"
    model = sd.load(name).eval()
    scaler = model.scaler
    assert scaler is not None
    stored = read_yaml(locate(name) / "config.yaml")["data"]
    train, test = load_splits(construct(DataConfig, stored, "data"))

    def encoded(x: Tensor, start: int) -> Tensor:
        noise = KeyedNoise(1, start).uniform(tuple(x.shape), dtype=torch.float32)
        return scaler.encode(x, noise=noise, dequantize=True).float()

    covariance = encoded(train.x[:2000], 1 << 20).flatten(1).double().T.cov()
    return model, encoded(test.x[:items], 0), covariance


def mixture(dims: int, items: int) -> tuple[Score, Tensor, Tensor]:
    """Eight components: score, draws, covariance."""
    made = torch.Generator().manual_seed(dims)
    means = torch.randn(8, dims, generator=made, dtype=torch.float64)
    stds = 0.1 + 0.4 * torch.rand(8, dims, generator=made, dtype=torch.float64)
    law = sd.GaussianMixture(torch.ones(8), means, stds)
    return law.score(sd.VP()), law.sample(items, made), law.moments()[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=64)
    parser.add_argument("--costs", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread")
    if args.costs:
        for name in ("zoo:digits", "zoo:mnist"):
            costs(name)
    problems: dict[str, tuple[Score, Tensor, Tensor]] = {"zoo:digits": digits(args.items)}
    problems |= {f"mixture, {dims}-D": mixture(dims, args.items) for dims in (16, 64)}
    for name, (score, x, covariance) in problems.items():
        times, states = trajectory(score, x, POINTS)
        js, shape = jacobians(score, times, states), tuple(x.shape[1:])
        full = gaussian_jacobians(score.sde, covariance, times)
        diagonal = gaussian_jacobians(score.sde, covariance.diag().diag(), times)
        controls = {"full Gaussian": full, "diagonal Gaussian": diagonal}
        points_table(name, js, controls, shape, max(1, args.repeats // 8))
        steps = weights(-score.sde.log_snr(times))
        print(f"\n{name}: integral over {POINTS} points of the path")
        path_table(js, steps, controls, shape, args.repeats)


if __name__ == "__main__":
    main()
