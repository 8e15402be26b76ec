"""Every operator against its dense matrix, made of unit vectors."""

from __future__ import annotations

import math

import pytest
import torch
from operators_made import made
from torch.autograd import gradcheck

KINDS = made()


@pytest.fixture(params=list(KINDS), name="operator")
def _operator(request):
    return KINDS[request.param]


def _eye(shape):
    size = math.prod(shape)
    return torch.eye(size, dtype=torch.float64).reshape(size, *shape)


def _normal(*shape, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _close(found, wanted, tolerance=1e-11):
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def _matrix(operator):
    return operator(_eye(operator.shape)).flatten(1).T


def test_the_map_is_linear_and_its_adjoint_is_the_transposed_matrix(operator):
    matrix = _matrix(operator)
    x, y = _normal(3, *operator.shape), _normal(3, *operator.out)
    _close(operator(x), (x.flatten(1) @ matrix.T).reshape(3, *operator.out))
    _close(operator.adjoint(y), (y.flatten(1) @ matrix).reshape(3, *operator.shape))
    assert operator.adjointness() < 1e-13
    _close(operator.dense(), matrix)


def test_the_norm_is_the_largest_singular_value(operator):
    assert operator.norm == pytest.approx(float(torch.linalg.matrix_norm(_matrix(operator), 2)))


def test_the_spectrum_is_a_singular_value_decomposition(operator):
    matrix, spectrum = _matrix(operator), operator.spectrum()
    size, count = matrix.shape[1], matrix.shape[0]
    coefficients = spectrum.to(_eye(operator.shape))
    v = coefficients.flatten(1)  # row i is V^T e_i
    assert v.shape == (size, size)
    _close(v @ v.T, torch.eye(size).double())
    _close(spectrum.back(coefficients), _eye(operator.shape))
    values = spectrum.values.expand(coefficients.shape[1:]).flatten()
    assert float(values.min()) >= 0
    left = spectrum.measured(_eye(operator.out)).flatten(1)  # row j is U^T e_j
    _close(left * values @ v.T, matrix)
    seen = (values > 0).double()
    _close(left.T @ left, seen.diag())
    assert int(seen.sum()) == torch.linalg.matrix_rank(matrix)
    _close(spectrum.measurement(coefficients).flatten(1), v @ left.T)
    assert spectrum.onto == (int(seen.sum()) == count)


def test_the_pseudo_inverse(operator):
    y = _normal(3, *operator.out)
    wanted = y.flatten(1) @ torch.linalg.pinv(_matrix(operator)).T
    _close(operator.pinv(y), wanted.reshape(3, *operator.shape), 1e-8)


def test_solving_with_a_number_a_sample(operator):
    matrix = _matrix(operator)
    r = _normal(3, *operator.out)
    a, b = torch.tensor([1e-4, 0.3, 2.0]).double(), torch.tensor([1.0, 0.0, 5.0]).double()
    systems = a[:, None, None] * torch.eye(len(matrix)) + b[:, None, None] * (matrix @ matrix.T)
    wanted = torch.linalg.solve(systems, r.flatten(1)).reshape(r.shape)
    ones = (1,) * len(operator.out)
    _close(operator.solve(r, a.reshape(-1, *ones), b.reshape(-1, *ones)), wanted, 1e-7)
    for i in range(3):  # numbers, and zero-dimensional tensors
        _close(operator.solve(r[i : i + 1], float(a[i]), b[i]), wanted[i : i + 1], 1e-7)


def test_solving_without_noise_is_the_pseudo_inverse_in_the_range(operator):
    matrix = _matrix(operator)
    r = _normal(3, *operator.out)
    inverse = torch.linalg.pinv(2 * matrix @ matrix.T, rtol=1e-10, hermitian=True)
    _close(operator.solve(r, 0, 2.0), (r.flatten(1) @ inverse).reshape(r.shape), 1e-7)
    a = torch.tensor([0.0, 0.5, 0.0]).double().reshape(-1, *(1,) * len(operator.out))
    _close(operator.solve(r, a, 2.0)[::2], operator.solve(r, 0.0, 2.0)[::2])
    _close(operator.solve(r, a, 2.0)[1:2], operator.solve(r[1:2], 0.5, 2.0))


def test_float32_is_right_to_its_rounding(operator):
    x, y = _normal(2, *operator.shape), _normal(2, *operator.out)
    for function, argument in (
        (operator, x),
        (operator.adjoint, y),
        (lambda r: operator.solve(r, 0.5, 1.0), y),
    ):
        found = function(argument.float())
        assert found.dtype == torch.float32
        _close(found.double(), function(argument), 3e-6)
    spectrum = operator.spectrum(x.float())
    assert spectrum.values.dtype == torch.float32
    coefficients = spectrum.to(x.float())
    _close(spectrum.back(coefficients), x.float(), 3e-6)


def test_a_sample_is_independent_of_its_batch(operator):
    x, y = _normal(3, *operator.shape), _normal(3, *operator.out)
    huge = torch.cat([x[:1], 1e6 * x[1:]]), torch.cat([y[:1], 1e6 * y[1:]])
    _close(operator(huge[0])[:1], operator(x[:1]))
    _close(operator.solve(huge[1], 0.1, 1.0)[:1], operator.solve(y[:1], 0.1, 1.0))


def test_gradients_of_all_calls(operator):
    x, y = _normal(2, *operator.shape), _normal(2, *operator.out)
    ones = (1,) * len(operator.out)
    a = torch.tensor([0.5, 2.0]).double().reshape(-1, *ones).requires_grad_()
    b = torch.tensor([1.0, 0.3]).double().reshape(-1, *ones).requires_grad_()
    x.requires_grad_()
    y.requires_grad_()
    assert gradcheck(operator, (x,), fast_mode=True)
    assert gradcheck(operator.adjoint, (y,), fast_mode=True)
    assert gradcheck(operator.solve, (y, a, b), fast_mode=True)
    back = torch.autograd.grad(operator.solve(y, torch.zeros_like(a), b).sum(), (y, b))
    assert all(bool(g.isfinite().all()) for g in back)


def test_what_was_kept_from_inference_mode_can_be_differentiated():
    operator = made()["blur 2-D"]
    with torch.inference_mode():
        operator.solve(operator(torch.randn(2, 2, 5, 4)), 0.1, 1.0)
    x = torch.randn(2, 2, 5, 4, requires_grad=True)
    operator.solve(operator(x), 0.1, 1.0).sum().backward()
    assert bool(x.grad.isfinite().all())
