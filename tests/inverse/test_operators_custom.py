"""Any linear function: its adjoint by differentiation, its solutions, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from scoresde.inverse.operators import Bicubic, Blur, Custom


def _normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


BLUR = Blur((2, 6, 5), 0.5)


def test_the_adjoint_by_differentiation_and_solutions_are_those_of_the_operator():
    custom = Custom(BLUR, (2, 6, 5), dtype=torch.float64)
    assert custom.out == (2, 6, 5)
    x, y = _normal(3, 2, 6, 5), _normal(3, 2, 6, 5, seed=1)
    torch.testing.assert_close(custom(x), BLUR(x))
    torch.testing.assert_close(custom.adjoint(y), BLUR.adjoint(y))
    torch.testing.assert_close(custom.pinv(y), BLUR.pinv(y), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(custom.solve(y, 0.1, 2.0), BLUR.solve(y, 0.1, 2.0))
    torch.testing.assert_close(custom.dense(), BLUR.dense())
    assert custom.norm == pytest.approx(BLUR.norm)
    assert custom.adjointness() < 1e-14


def test_derivatives_pass_through_with_and_without_grad_mode():
    custom = Custom(Bicubic((1, 8), 2), (1, 8), dtype=torch.float64)
    x, y = _normal(2, 1, 8).requires_grad_(), _normal(2, 1, 4).requires_grad_()
    assert gradcheck(custom, (x,))
    assert gradcheck(custom.adjoint, (y,))
    assert gradcheck(lambda r: custom.solve(r, 0.3, 1.0), (y,))
    with torch.no_grad():
        assert not custom.adjoint(y).requires_grad
    assert x.grad is None


def test_a_function_of_numpy_needs_only_its_adjoint():
    matrix = _normal(3, 5).numpy()
    custom = Custom(
        lambda x: torch.from_numpy(x.detach().numpy() @ matrix.T),
        (5,),
        adjoint=lambda y: torch.from_numpy(y.detach().numpy() @ matrix),
        dtype=torch.float64,
    )
    x, y = _normal(2, 5).requires_grad_(), _normal(2, 3).requires_grad_()
    assert gradcheck(custom, (x,))
    assert gradcheck(custom.adjoint, (y,))
    np.testing.assert_allclose(custom.dense().numpy(), matrix)


def test_a_network_in_float32_is_an_operator():
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(3, 2, 3, stride=2, bias=False)
    custom = Custom(layer, (3, 8, 8))
    assert custom.out == (2, 3, 3)
    assert custom.dense().shape == (18, 192)
    y = torch.randn(2, 2, 3, 3)
    residual = custom(custom.pinv(y)) - y
    assert float(residual.detach().abs().max()) < 1e-4


def _no_adjoint(x):
    return x.detach().clone()


REFUSED = {
    "not linear": (lambda: Custom(torch.square, (3,)), "forward is not linear"),
    "affine": (lambda: Custom(lambda x: x + 1, (3,)), "forward is not linear"),
    "random": (lambda: Custom(lambda x: x * torch.rand(1), (3,)), "forward is not linear"),
    "no number": (lambda: Custom(lambda x: x * torch.nan, (3,)), "forward is not linear"),
    "mixes": (lambda: Custom(lambda x: x - x.mean(0), (3,)), "mixes the items"),
    "no batch": (lambda: Custom(lambda x: x.sum(), (3,)), "to a tensor (2, ...), got ()"),
    "flat": (lambda: Custom(lambda x: x.sum(1), (3,)), "got (2,)"),
    "no tensor": (lambda: Custom(lambda x: None, (3,)), "got NoneType"),
    "no derivative": (lambda: Custom(_no_adjoint, (3,)), "give its adjoint"),
    "wrong adjoint": (
        lambda: Custom(lambda x: 2 * x, (3,), adjoint=lambda y: y),
        "not that of forward",
    ),
    "shape of adjoint": (
        lambda: Custom(lambda x: x[:, :2], (3,), adjoint=lambda y: y),
        "to items (2, 3), got (2, 2)",
    ),
    "shape": (lambda: Custom(lambda x: x, ()), "shape of an item"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_is_no_linear_map_is_refused_in_one_line(case):
    make, said = REFUSED[case]
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        make()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
