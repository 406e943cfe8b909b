"""Gradients of float64 coefficients at float32 points: a line in r^2 in float64, the rest of the weights in float32.

Truth is the sum over pairs of differences, in float64.
"""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from fastagop.kernels.torch_backend import distance, smooth
from fastagop.kernels.torch_backend.distance import FEW

import fastagop
from fastagop import Gaussian, Laplace, Matern52
from fastagop.estimators import kernel_ridge, rounding

F32, F64 = torch.float32, torch.float64


def truth(w, X, A, Z) -> torch.Tensor:
    """sum_j w(r_ij) A_jc (x_j - z_i), (m, K, d); w of r^2, and zero where r = 0."""
    apart = X.double()[None] - Z.double()[:, None]
    sq = apart.square().sum(2)
    return torch.einsum("ij,jc,ijd->icd", w(sq).masked_fill(sq == 0, 0.0), A.double(), apart)


def gaussian(L):
    return lambda sq: torch.exp(-sq / (2 * L * L)) / L**2


def matern(L):
    """5 / (3 L^2) (1 + s) exp(-s) with s = sqrt(5) r / L."""
    return lambda sq: 5 / (3 * L * L) * (1 + (5 * sq).sqrt() / L) * torch.exp(-(5 * sq).sqrt() / L)


def outer(G, weights=None, center=False) -> torch.Tensor:
    """sum_i w_i sum_c g_ic g_ic^T."""
    w = torch.ones(len(G), dtype=F64) if weights is None else weights.double()
    if center:
        G = G - torch.einsum("i,icd->cd", w / w.sum(), G)
    return torch.einsum("i,icd,ice->de", w, G, G)


def off(found, true) -> float:
    return float((found.double() - true).norm() / true.norm())


@pytest.fixture
def cancelling(normal):
    """cancelling(n, d, K): points of length 1 and coefficients of 1e5 whose sums with smooth functions are small."""

    def make(n=300, d=40, K=3):
        X = torch.nn.functional.normalize(normal(n, d, dtype=F32) + 0.3, dim=1)
        alpha, ones = 1e5 * normal(n, K, seed=1), torch.ones(n, 1, dtype=F64)
        functions = torch.cat([ones, X.double()], 1) if n > 2 * d else ones
        return X, alpha - functions @ torch.linalg.lstsq(functions, alpha).solution

    return make


@pytest.mark.parametrize(("a", "b"), [(1.0, 0.0), (0.0, 1.0), (0.3, -0.7)])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_the_line_is_made_of_moments(a, b, offset, normal):
    X, alpha, Z = normal(600, 9) + offset, normal(600, 2, seed=1), normal(50, 9, seed=2) + offset
    moments = smooth.Moments.of(smooth.Line(Gaussian(2.0), a, b), X, alpha)
    G = normal(50, 2, 9, seed=3)
    found = moments.added(G, Z)
    assert off(found, G + truth(lambda sq: a + b * sq, X, alpha, Z)) <= 1e-13 * (1 + offset)


@pytest.mark.parametrize("kernel", [Gaussian(2.0), Matern52(3.0), Laplace(4.0)], ids=str)
def test_the_line_is_that_of_least_squares(kernel, normal):
    X = normal(200, 12, dtype=F32)
    line = smooth.Line.of(kernel, X)
    assert line is not None
    sq = torch.pdist(X.double()).square().sort().values
    sq, w = sq[len(sq) // 100 :], kernel.weight_(sq[len(sq) // 100 :].clone())
    fit = torch.linalg.lstsq(torch.stack([torch.ones_like(sq), sq], 1), w[:, None]).solution.flatten()
    assert line.a == pytest.approx(float(fit[0]), rel=0.1)
    assert line.b == pytest.approx(float(fit[1]), rel=0.1)


def test_no_line_without_distances(normal):
    assert smooth.Line.of(Gaussian(2.0), normal(1, 5, dtype=F32)) is None
    assert smooth.Line.of(Gaussian(2.0), torch.ones(20, 5)) is None


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("n", "d", "K"), [(300, 40, 3), (300, 40, 1), (90, 120, 2), (400, 19, 30)])
def test_the_agop_keeps_the_digits_that_float32_products_lose(n, d, K, weighted, center, cancelling, normal):
    X, alpha = cancelling(n, d, K)
    weights = normal(n, seed=5).square().float() if weighted else None
    kernel, roots = Gaussian(10.0), None if weights is None else weights.sqrt()
    true = outer(truth(gaussian(10.0), X, alpha, X), weights, center)
    found = smooth.agop(smooth.Line.of(kernel, X), X, alpha, 70, center=center, roots=roots)
    assert found.dtype == F64
    assert torch.equal(found, found.T)
    how = {"reduction": "sum", "method": "gradient", "sample_weight": weights}
    lost = off(fastagop.agop(kernel, X, alpha.float(), **how, center=center), true)
    assert off(found, true) <= 2e-7
    assert n < 2 * d or lost > 5e-6


@pytest.mark.parametrize("kernel", [(Gaussian(2.0), gaussian(2.0)), (Matern52(4.0), matern(4.0))], ids=["2", "5/2"])
def test_gradients_where_classes_have_collapsed(kernel, normal):
    """Points within 1e-4 of ten centres, two of them copies, far from the origin; near pairs are taken out."""
    centres = torch.nn.functional.normalize(normal(10, 30), dim=1)
    X = (centres.repeat(20, 1) + 1e-4 * normal(200, 30, seed=1) + 2.0).float()
    X[11] = X[1]
    alpha = 1e4 * normal(200, 2, seed=2)
    line, Z = smooth.Line.of(kernel[0], X), X[::7]
    assert off(smooth.gradients(line, X, alpha, Z), truth(kernel[1], X, alpha, Z)) <= 2e-6


def test_a_plan_counts_the_moments(normal):
    X, alpha = normal(500, 60, dtype=F32), normal(500, 4)
    rows, peak = smooth.plan_rows(X, alpha, False, 10**9)
    assert rows > 1
    assert peak >= 8 * 4 * 60 * 60 + 24 * rows * 4 * 60
    with pytest.raises(MemoryError):
        smooth.plan_rows(X, alpha, False, 10**5)


@pytest.mark.parametrize("spread", [1.0, 1e-4])
@pytest.mark.parametrize(("n", "d", "K"), [(700, 60, 4), (1500, 20, 1), (400, 150, 8)])
def test_a_plan_is_kept_to(n, d, K, spread, normal, tensor_memory):
    """Also where classes have collapsed and near pairs are measured again."""
    X = (normal(10, d).repeat(n // 10, 1) + spread * normal(n, d, seed=1)).float()
    alpha, line = normal(n, K), smooth.Line.of(Gaussian(5.0), X)
    rows, peak = smooth.plan_rows(X, alpha, True, 10**9)
    assert tensor_memory(lambda: smooth.agop(line, X, alpha, rows, center=True))[1] <= peak


def test_where_it_pays():
    x = torch.empty(1, dtype=F32)
    assert smooth.pays(x.expand(50_000, 1024), 10)
    assert not smooth.pays(x.expand(50_000, 1024).double(), 10)
    assert not smooth.pays(x.expand(2000, 2000), 10)  # moments cost as much as the product
    assert not smooth.pays(x.expand(50_000, FEW), 10)
    assert not smooth.pays(x.expand(50_000, 1024), 0)
    assert not smooth.pays(torch.empty(1, device="meta").expand(50_000, 1024), 10)


def test_a_line_is_taken_where_it_keeps_m(cancelling, monkeypatch):
    X, alpha = cancelling()
    for weights in (None, torch.linspace(0.0, 2.0, len(X), dtype=F64)):
        for center in (False, True):
            assert rounding.line_of(Gaussian(2.0), X, alpha, center, weights) is not None
    monkeypatch.setattr(rounding, "_LOSS", 1e-9)
    assert rounding.line_of(Gaussian(2.0), X, alpha, False, None) is None
    assert rounding.line_of(fastagop.ArcCosine(1), X, alpha, False, None) is None
    assert rounding.line_of(Gaussian(2.0), X, alpha[:, :0], False, None) is None


@pytest.fixture
def many(monkeypatch):
    """Some hundred points are many, and a line pays where it is good enough."""
    monkeypatch.setattr("fastagop.solvers.problem.FULL_MATRIX_ROWS", 64)
    monkeypatch.setattr(smooth, "pays", lambda X, K: X.dtype == F32)


@pytest.mark.usefixtures("many")
@pytest.mark.parametrize("weighted", [False, True])
def test_fits_take_it_and_say_so(weighted, normal, caplog):
    X = torch.nn.functional.normalize(normal(700, 20, dtype=F32), dim=1)
    Y = (X[:, :2] * X[:, 1:3]).sign()
    weights = normal(700, seed=4).square() + 0.1 if weighted else None
    how = {"iterations": 1, "ridge": 1e-9, "random_state": 0, "fit_intercept": False}

    def fitted(**options):
        caplog.clear()
        with warnings.catch_warnings(), caplog.at_level(logging.INFO, "fastagop"):
            warnings.simplefilter("ignore")
            return fastagop.RFMRegressor(Gaussian(3.0), **how, **options).fit(X, Y, weights), caplog.text

    narrow, said = fitted()
    assert "a rest, which is multiplied in float32" in said
    wide, said = fitted(dtype="float64")
    assert "float32" not in said
    assert off(torch.as_tensor(narrow.M_), torch.as_tensor(wide.M_).double()) <= 1e-5


@pytest.mark.usefixtures("many")
def test_float64_takes_over_where_the_rest_loses_too_much(normal, monkeypatch, caplog):
    monkeypatch.setattr(rounding, "_LOSS", 1e-12)
    X = torch.nn.functional.normalize(normal(700, 20, dtype=F32), dim=1)
    made = []
    monkeypatch.setattr(smooth, "agop", lambda *args, **options: made.append(args))
    regression = kernel_ridge.KernelRidge(Gaussian(3.0), 1e-9, "highest", "auto")
    with warnings.catch_warnings(), caplog.at_level(logging.INFO, "fastagop"):
        warnings.simplefilter("ignore")
        _, M, _ = kernel_ridge.fit_and_agop(X, X[:, :2].sign(), regression)
    assert made == []
    assert "computing in float64" in caplog.text
    assert bool(M.any())


@pytest.mark.usefixtures("many")
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("kernel", [Gaussian(1.0), Laplace(1.0)])
def test_float64_measures_no_near_pair_of_rounded_points_again(kernel, diagonal, normal, monkeypatch):
    """Every pair of a class of 100 is near for float64's own digits; float32 points have left r 1e-4 of its own."""
    rows, measure = [], distance._measure_near
    monkeypatch.setattr(distance, "_measure_near", lambda sq, *rest: (rows.append(len(sq)), measure(sq, *rest)))
    monkeypatch.setattr(kernel_ridge, "_float64_pays", lambda *args: True)
    monkeypatch.setattr(kernel_ridge, "_beside_a_line", lambda *args: None)
    monkeypatch.setattr(kernel_ridge, "_weights_", lambda *args: None)  # no stored values: from the points
    centers = torch.nn.functional.normalize(normal(7, 20), dim=1).repeat_interleave(100, 0)
    X = (centers + 2e-4 * normal(700, 20, seed=2)).float()
    regression = kernel_ridge.KernelRidge(kernel, 1e-3, "highest", "auto")
    solved, M, _ = kernel_ridge.fit_and_agop(X, X[:, :2].sign(), regression, diagonal=diagonal)
    assert max(rows, default=0) <= 16  # of a few points, whether float64 is due was asked
    G = fastagop.gradients(kernel, X.double(), solved.alpha)
    exact = G.square().sum((0, 1)) if diagonal else torch.einsum("icd,ice->de", G, G)
    assert off(M, exact) <= 1e-7
