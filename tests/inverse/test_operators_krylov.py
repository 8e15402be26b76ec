"""Operators without a spectrum: conjugate gradients against the dense answers."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from scoresde.inverse import krylov
from scoresde.inverse.linear import Linear
from scoresde.inverse.operator import Operator
from scoresde.inverse.operators import Bicubic


def _normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Bare(Operator):
    """A matrix that hides its spectrum and counts its products."""

    def __init__(self, matrix):
        self.inner = Linear(matrix)
        self.shape = self.inner.shape
        self.products = 0

    @property
    def out(self):
        return self.inner.out

    def __call__(self, x):
        self.products += 1
        return self.inner(x)

    def adjoint(self, y):
        return self.inner.adjoint(y)


SHAPES = {"wide": (4, 9), "tall": (9, 4), "square": (5, 5)}


@pytest.fixture(params=[*SHAPES, "singular"], name="pair")
def _pair(request):
    if request.param == "singular":
        matrix = _normal(6, 2) @ _normal(2, 7, seed=1)
    else:
        matrix = _normal(*SHAPES[request.param])
    return Bare(matrix), matrix


def test_solutions_are_those_of_the_dense_systems(pair):
    operator, matrix = pair
    r = _normal(4, len(matrix), seed=2)
    a = torch.tensor([1e-2, 0.3, 2.0, 50.0]).double()
    b = torch.tensor([1.0, 0.0, 5.0, 1e-3]).double()
    systems = a[:, None, None] * torch.eye(len(matrix)) + b[:, None, None] * (matrix @ matrix.T)
    wanted = torch.linalg.solve(systems, r)
    found = operator.solve(r, a[:, None], b[:, None])
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(operator.solve(r, 0.3, 0.0), r / 0.3)


def test_without_noise_it_is_the_pseudo_inverse_even_out_of_the_range(pair):
    operator, matrix = pair
    r = _normal(3, len(matrix), seed=2)
    wanted = r @ torch.linalg.pinv(2 * matrix @ matrix.T, rtol=1e-10, hermitian=True)
    torch.testing.assert_close(operator.solve(r, 0, 2.0), wanted, rtol=1e-7, atol=1e-7)
    a = torch.tensor([[0.0], [0.5], [0.0]]).double()
    mixed = operator.solve(r, a, 2.0)
    torch.testing.assert_close(mixed[::2], wanted[::2], rtol=1e-7, atol=1e-7)
    system = 0.5 * torch.eye(len(matrix)).double() + 2 * matrix @ matrix.T
    torch.testing.assert_close(mixed[1], torch.linalg.solve(system, r[1]), rtol=1e-8, atol=1e-8)


def test_the_pseudo_inverse_and_the_norm(pair):
    operator, matrix = pair
    y = _normal(3, len(matrix), seed=2)
    wanted = y @ torch.linalg.pinv(matrix, rtol=1e-10).T
    torch.testing.assert_close(operator.pinv(y), wanted, rtol=1e-7, atol=1e-7)
    assert operator.norm == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)))


def test_a_sample_is_independent_of_its_batch(pair):
    operator, matrix = pair
    r = _normal(3, len(matrix), seed=2) * torch.tensor([[1.0], [1e8], [0.0]]).double()
    a = torch.tensor([[0.1], [1e-5], [1.0]], dtype=torch.float64)
    found, alone = operator.solve(r, a, 1.0), operator.solve(r[:1], 0.1, 1.0)
    torch.testing.assert_close(found[:1], alone, rtol=1e-11, atol=0)
    assert not bool(found[2].any())


def test_derivatives_of_first_and_second_order(pair):
    operator, matrix = pair
    r = _normal(2, len(matrix), seed=2).requires_grad_()
    a = torch.tensor([[0.5], [2.0]]).double().requires_grad_()
    b = torch.tensor(1.5).double().requires_grad_()
    assert gradcheck(operator.solve, (r, a, b))
    assert gradgradcheck(operator.solve, (r, a, b), fast_mode=True)
    assert gradcheck(operator.pinv, (r,))
    assert gradgradcheck(operator.pinv, (r,), fast_mode=True)


def test_the_gradient_costs_one_more_solve_not_the_iterations():
    operator = Bare(_normal(20, 30))
    r = _normal(2, 20, seed=1).requires_grad_()
    z = operator.solve(r, 0.1, 1.0)
    forward = operator.products
    z.sum().backward()
    assert operator.products <= 2 * forward + 8


def test_iterations_end_where_all_samples_have_converged():
    operator = Bare(torch.eye(50).double())
    operator.solve(_normal(2, 50), 0.1, 1.0)
    assert operator.products <= krylov.ASKED


def test_float32_converges_to_its_rounding():
    inner = Bicubic((1, 16, 16), 4)

    class Hidden(Operator):
        shape, out = inner.shape, inner.out  # type: ignore[assignment]

        def __call__(self, x):
            return inner(x)

        def adjoint(self, y):
            return inner.adjoint(y)

    y = _normal(2, *inner.out).float()
    hidden = Hidden()
    for found, wanted in (
        (hidden.solve(y, 0.01, 1.0), inner.solve(y, 0.01, 1.0)),
        (hidden.pinv(y), inner.pinv(y)),
    ):
        assert found.dtype == torch.float32
        assert float((found - wanted).norm() / wanted.norm()) < 1e-5
    assert hidden.norm == pytest.approx(inner.norm)
    assert hidden.spectrum() is None
    assert hidden.count == math.prod(inner.out)


def test_adjointness_shows_a_wrong_adjoint():
    right = Bare(_normal(4, 6))
    assert right.adjointness() < 1e-14

    class Wrong(Bare):
        def adjoint(self, y):
            return 1.01 * super().adjoint(y)

    assert Wrong(_normal(4, 6)).adjointness() > 1e-3
