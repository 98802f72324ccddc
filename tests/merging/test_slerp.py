import math

import pytest
import torch

from pyqemb.merging.slerp import angle, fold, karcher, linear, slerp


def direct_slerp(a, b, t):
    a, b = a.double(), b.double()
    omega = torch.acos((a.flatten() @ b.flatten()) / (a.norm() * b.norm()))
    return torch.sin((1 - t) * omega) / torch.sin(omega) * a + torch.sin(t * omega) / torch.sin(omega) * b


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_slerp_is_the_formula(dtype, t):
    a, b = torch.randn(3, 700000).to(dtype), torch.randn(3, 700000).to(dtype)
    result = slerp(a, b, t)
    truth = direct_slerp(a, b, t)
    assert float((result.tensor.double() - truth).norm() / truth.norm()) < 1e-6
    assert not result.lerp
    assert result.angle == pytest.approx(90, abs=1)


def test_ends_are_exact():
    a, b = torch.randn(50), torch.randn(50)
    assert torch.equal(slerp(a, b, 0).tensor, a)
    assert torch.equal(slerp(a, b, 1).tensor, b)


def test_nearly_parallel_falls_back_to_lerp_and_says_so():
    a = torch.randn(10**6)
    b = a + 0.01 * torch.randn(10**6)
    result = slerp(a, b, 0.3)
    assert result.lerp
    assert result.angle == pytest.approx(math.degrees(0.01), rel=0.02)
    torch.testing.assert_close(result.tensor, 0.7 * a + 0.3 * b)
    assert slerp(a, a, 0.5).angle < 1e-3  # the cosine may pass 1 by a rounding


@pytest.mark.promise("R29", "opposite tensors are refused")
def test_zeros_are_blended_linearly_and_opposites_refused():
    a = torch.randn(10)
    torch.testing.assert_close(slerp(a, torch.zeros(10), 0.25).tensor, 0.75 * a)
    for method in (lambda: slerp(a, -a, 0.5), lambda: karcher([a, -a], [1, 1])):
        with pytest.raises(ValueError, match=r"opposite|cancel|away"):
            method()


def test_keeps_the_norm_of_equal_norms_where_linear_does_not():
    a, b = torch.tensor([1.0, 0]), torch.tensor([0.0, 1])
    assert float(slerp(a, b, 0.5).tensor.norm()) == pytest.approx(1)
    assert float(linear([a, b], [1, 1]).tensor.norm()) == pytest.approx(math.sqrt(0.5))


def test_fold_of_two_is_slerp_and_of_three_follows_the_weights():
    a, b, c = torch.randn(3, 1000)
    torch.testing.assert_close(fold(iter([a, b]), [1, 3]).tensor, slerp(a, b, 0.75).tensor)
    step = slerp(a, b, 0.5).tensor
    torch.testing.assert_close(fold(iter([a, b, c]), [1, 1, 1]).tensor, slerp(step, c, 1 / 3).tensor)
    assert torch.equal(fold(iter([a, b, c]), [1, 0, 0]).tensor, a)


def test_karcher_of_two_equals_slerp_of_unit_vectors():
    a, b = torch.nn.functional.normalize(torch.randn(2, 500, dtype=torch.float64), dim=1)
    torch.testing.assert_close(karcher([a, b], [1, 3]).tensor, slerp(a, b, 0.75).tensor)


def test_karcher_of_symmetric_points_is_their_centre():
    points = [torch.tensor([math.cos(x), math.sin(x), 1.0], dtype=torch.float64) for x in (0, 2.0944, 4.18879)]
    mean = karcher(points, [1, 1, 1]).tensor
    torch.testing.assert_close(mean, torch.tensor([0.0, 0, math.sqrt(2)], dtype=torch.float64), atol=1e-4, rtol=0)


def test_karcher_is_where_the_gradient_vanishes():
    points = torch.nn.functional.normalize(torch.randn(4, 6, dtype=torch.float64) + 1, dim=1)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    mean = karcher(list(points), weights.tolist()).tensor
    cosines = points @ mean
    angles = torch.acos(cosines)
    logs = (angles / torch.sin(angles))[:, None] * (points - cosines[:, None] * mean)
    assert float((weights @ logs).norm()) < 1e-8
    shuffled = karcher([points[i] for i in (2, 0, 3, 1)], [0.3, 0.1, 0.4, 0.2]).tensor
    torch.testing.assert_close(mean, shuffled)


def test_karcher_norm_is_the_weighted_mean_of_norms():
    a, b = torch.randn(100), 5 * torch.randn(100)
    assert float(karcher([a, b], [1, 3]).tensor.norm()) == pytest.approx(
        float(a.norm() / 4 + 3 * b.norm() / 4), rel=1e-5
    )


def test_bad_arguments():
    a = torch.randn(3)
    assert angle(a, a) < 1e-3
    for t in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="t must be from"):
            slerp(a, a, t)
    for weights in ([0, 0], [1, -1], [math.nan, 1]):
        with pytest.raises(ValueError, match="weights must be"):
            linear([a, a], weights)
