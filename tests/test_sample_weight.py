"""agop with sample_weight: against the float64 reference, and against points written as often as they weigh."""

from __future__ import annotations

import pytest
import torch
from fastagop.kernels import reference

import fastagop
from fastagop import Gaussian, Laplace

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
methods = pytest.mark.parametrize("method", ["gradient", "gram", "auto"])
reductions = pytest.mark.parametrize("reduction", ["mean", "sum"])


def truth(kernel, X, alpha, Z, w, center, reduction):
    g, w = reference.gradients(kernel, X, alpha, Z), w.double()
    if center:
        g = g - torch.einsum("i,icd->cd", w, g) / w.sum()
    M = torch.einsum("i,icd,ice->de", w, g, g)
    return M / w.sum() if reduction == "mean" else M


@dtypes
@methods
@reductions
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("kernel", [Laplace(2.0), Gaussian(1.0)], ids=repr)
def test_weighted(kernel, dtype, method, reduction, center, own, cloud, normal, relative):
    X, alpha = cloud("collapsed 1", n=80, d=7, dtype=dtype), normal(80, 4, dtype=dtype)
    Z = None if own else cloud("spread", n=33, d=7, dtype=dtype, seed=3)
    w = normal(80 if own else 33, dtype=dtype, seed=5).square()
    w[3] = 0.0
    M = fastagop.agop(kernel, X, alpha, Z, center=center, method=method, reduction=reduction, sample_weight=w)
    assert M.dtype == dtype
    assert relative(M, truth(kernel, X, alpha, Z, w, center, reduction)) <= TOLERANCE[dtype]
    assert torch.equal(M, M.T)


@methods
@pytest.mark.parametrize("center", [False, True])
def test_a_weight_of_two_is_a_point_written_twice(method, center, cloud, normal, relative):
    X, alpha, Z = cloud("spread", n=60, d=5), normal(60, 3), cloud("spread", n=20, d=5, seed=2)
    w = torch.ones(20, dtype=X.dtype)
    w[4], w[7] = 2.0, 0.0
    twice = torch.cat([Z[:7], Z[8:], Z[4:5]])
    for reduction in ("mean", "sum"):
        how = {"center": center, "method": method, "reduction": reduction}
        M = fastagop.agop(Laplace(2.0), X, alpha, Z, sample_weight=w, **how)
        assert relative(M, fastagop.agop(Laplace(2.0), X, alpha, twice, **how)) <= 1e-12


@methods
@pytest.mark.parametrize("size", [1e-30, 1e30])  # their squares, or sums, are no float32
def test_units_of_weights_do_not_matter(method, size, cloud, normal, relative):
    X, alpha = cloud("spread", n=60, d=5, dtype=torch.float32), normal(60, 3, dtype=torch.float32)
    w = 0.5 + normal(60, dtype=torch.float32).abs()
    for center in (False, True):
        how = {"method": method, "center": center}
        M = fastagop.agop(Laplace(2.0), X, alpha, sample_weight=w, **how)
        assert relative(fastagop.agop(Laplace(2.0), X, alpha, sample_weight=size * w, **how), M) <= 1e-6


def test_weights_of_zero(cloud, normal):
    X, alpha, w = cloud("spread", n=20, d=5), normal(20, 3), torch.zeros(20, dtype=torch.float64)
    for center in (False, True):
        M = fastagop.agop(Laplace(2.0), X, alpha, sample_weight=w, reduction="sum", center=center)
        assert not M.any()
    with pytest.raises(ValueError, match="sample_weight must have a weight above 0 for reduction='mean'"):
        fastagop.agop(Laplace(2.0), X, alpha, sample_weight=w)
    with pytest.raises(ValueError, match=r"sample_weight must have a weight above 0, got none: no row is left"):
        fastagop.solve(Laplace(2.0), X, alpha, sample_weight=w)


@pytest.mark.parametrize(
    ("weight", "error", "words"),
    [
        ([1.0] * 20, TypeError, "sample_weight must be a torch.Tensor, got list"),
        (torch.ones(19, dtype=torch.float64), ValueError, r"shape \(20,\)"),
        (torch.ones(20, 1, dtype=torch.float64), ValueError, r"shape \(20,\)"),
        (torch.ones(20), ValueError, "got torch.float32"),
        (torch.full((20,), -1.0, dtype=torch.float64), ValueError, "finite and >= 0"),
        (torch.full((20,), torch.nan, dtype=torch.float64), ValueError, "finite and >= 0"),
        (torch.full((20,), torch.inf, dtype=torch.float64), ValueError, "finite and >= 0"),
    ],
)
def test_wrong_weights(weight, error, words, cloud, normal):
    X, alpha = cloud("spread", n=20, d=5), normal(20, 3)
    with pytest.raises(error, match=words):
        fastagop.agop(Laplace(2.0), X, alpha, sample_weight=weight)
