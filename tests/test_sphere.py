import math

import pytest
import torch

import scoresde as sd

f64 = torch.float64


def test_slerp_is_the_formula_on_the_sphere():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(5, 3, 4, generator=generator, dtype=f64) for _ in range(2))
    a, b = (v / v.flatten(1).norm(dim=1)[:, None, None] for v in (a, b))
    omega = torch.acos((a * b).flatten(1).sum(1))[:, None, None]
    for w in (0.0, 0.2, 0.7, 1.0):
        expected = (torch.sin((1 - w) * omega) * a + torch.sin(w * omega) * b) / omega.sin()
        torch.testing.assert_close(sd.slerp(a, b, w), expected, rtol=1e-12, atol=1e-12)


def test_lengths_go_linearly_and_shares_are_a_samples_own():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(4, 6, generator=generator, dtype=f64) for _ in range(2))
    w = torch.tensor([0.0, 0.3, 0.8, 1.0], dtype=f64)
    out = sd.slerp(a, 3 * b, w)
    torch.testing.assert_close(out.norm(dim=1), torch.lerp(a.norm(dim=1), 3 * b.norm(dim=1), w))
    assert torch.equal(out[0], a[0])
    assert torch.equal(out[3], 3 * b[3])
    for i in range(4):
        torch.testing.assert_close(
            sd.slerp(a[i : i + 1], 3 * b[i : i + 1], float(w[i])), out[i : i + 1]
        )


@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-8, 1e-4, math.pi - 1e-9, math.pi])
@pytest.mark.parametrize("dtype", [torch.float32, f64])
def test_slerp_of_nearly_parallel_and_opposite_vectors(angle, dtype):
    a = torch.tensor([[0.6, 0.8, 0.0]], dtype=dtype)
    e = torch.tensor([[-0.8, 0.6, 0.0]], dtype=dtype)
    b = math.cos(angle) * a + math.sin(angle) * e
    eps = torch.finfo(dtype).eps
    for w in (0.25, 0.5, 0.75):
        out = sd.slerp(a, b, w)
        assert out.norm() == pytest.approx(1, abs=10 * eps)
        turned = float(torch.atan2((out - (out * a).sum() * a).norm(), (out * a).sum()))
        assert turned == pytest.approx(w * angle, abs=30 * eps)
    half, end = sd.slerp(a, b, 0.5), sd.slerp(a, b, 1.0)
    assert torch.equal(end, b)
    assert (half - sd.slerp(b, a, 0.5)).norm() < 2.1  # a way across, whichever


def test_slerp_of_zero_and_of_one_dimension():
    a, b = torch.zeros(1, 3), torch.ones(1, 3)
    torch.testing.assert_close(sd.slerp(a, b, 0.25), b / 4)
    torch.testing.assert_close(sd.slerp(b, a, 0.25), b * 0.75)
    one, two = torch.ones(1, 1), 2 * torch.ones(1, 1)
    torch.testing.assert_close(sd.slerp(one, two, 0.5), 1.5 * one)
    assert sd.slerp(one, -two, 0.5).isfinite().all()


@pytest.mark.parametrize(
    ("b", "w", "message"),
    [
        (torch.ones(2, 2, dtype=f64), 0.5, "two tensors of one shape"),
        (torch.ones(4, 2, dtype=f64), torch.zeros(3), r"w of shape \(\) or \(4,\), got \(3,\)"),
    ],
)
def test_what_does_not_fit_is_said(b, w, message):
    with pytest.raises(ValueError, match=message):
        sd.slerp(torch.ones(4, 2, dtype=f64), b, w)
