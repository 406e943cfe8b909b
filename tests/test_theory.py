"""What reproduce/theory.py says about the paper's proposition A.1 and theorems 4.3 and 4.4."""

from __future__ import annotations

import importlib.util
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from fastagop import collapse

# Loaded by path: reproduce/ is not installed, and the repository's root on sys.path would offer its kernels/ too.
_SPEC = importlib.util.spec_from_file_location(
    "reproduce.theory", Path(__file__).resolve().parents[1] / "reproduce" / "theory.py"
)
assert _SPEC is not None
assert _SPEC.loader is not None
theory = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(theory)

EPS = torch.finfo(torch.float64).eps
# q, lambda_k, lambda_Phi within the theorem's condition 2 lambda_k (1 + 1/lambda_Phi) q < lambda_Phi
SETTINGS = [
    (20, False, 0.01, 1.0),  # one-hot labels, the script's own
    (20, True, 0.1, 2.0),  # unit columns, where the rate within the span of y is the slower one
    (5, False, 0.02, 1.0),  # small classes
]


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


# ---- Proposition A.1


def angular_moment(r: float, power: int) -> float:
    """E relu(u)^p relu(v)^p of standard normals with correlation r, in polar coordinates."""
    theta = math.acos(r)
    # both factors are positive for angles between theta - pi/2 and pi/2
    angular, _ = quad(lambda t: (math.cos(t) * math.cos(t - theta)) ** power, theta - math.pi / 2, math.pi / 2)
    radial = {1: 2.0, 2: 8.0}[power]  # integral of rho^(2 p + 1) exp(-rho^2 / 2)
    return radial * angular / (2 * math.pi)


@pytest.mark.parametrize("r", [-1.0, -0.7, 0.0, 0.3, 0.99, 1.0])  # ends, where the paper divides by zero
def test_formula_5_and_the_variance_match_quadrature(r):
    mean = 2 * angular_moment(r, 1)
    assert theory.relu_inner_product(r).item() == pytest.approx(mean, abs=1e-12)
    variance = 4 * angular_moment(r, 2) - mean**2
    assert theory.relu_variance(r).item() == pytest.approx(variance, abs=1e-12)


@pytest.mark.parametrize("width", [16, 64])  # the same figure at two widths: the variance falls as 1/D
def test_monte_carlo_agrees(width, generator):
    mean, error, variance = theory.monte_carlo(0.6, width, 40_000, generator)
    assert abs(mean - theory.relu_inner_product(0.6).item()) < 5 * error
    # the estimate's own standard error is 0.9% at either width, measured over 60 seeds
    assert variance == pytest.approx(theory.relu_variance(0.6).item(), rel=0.05)


def test_expected_distances_shrink_and_least_for_close_points():
    r = torch.linspace(-1, 1, 201, dtype=torch.float64)[:-1]
    factor = (1 - theory.relu_inner_product(r)) / (1 - r)
    assert factor[0] == 0.5
    assert factor.max() < 1
    assert (factor.diff() > 0).all()


def test_a_cosine_beyond_one_is_refused():
    with pytest.raises(ValueError, match="r must be a cosine"):
        theory.relu_inner_product(1.1)


# ---- Theorem 4.3


def run(size, unit, ridge, shift, name, generator, layers=14):
    y = theory.labels(3, size, unit)
    q = 1.0 if unit else float(size)
    A = theory.data_gram(3, size, 100, shift, generator)
    kappa = theory.kappas(q, ridge, shift)[name]
    return y, q, kappa, theory.collapse(A, y, ridge, shift, kappa, layers)


def test_assumption_4_2_holds(generator):
    A = theory.data_gram(3, 20, 100, 1.5, generator)
    assert torch.linalg.eigvalsh(A)[0].item() == pytest.approx(1.5, rel=1e3 * EPS)


def test_a_layer_is_the_agop_of_the_linear_predictor(generator):
    X = torch.randn(40, 12, generator=generator, dtype=torch.float64)  # columns are samples, as in the paper
    y = theory.labels(3, 4)
    A = X.T @ X
    alpha = torch.linalg.inv(A + 0.1 * torch.eye(12, dtype=torch.float64)) @ y
    gradients = X @ alpha  # of f_c(z) = sum_j alpha_jc x_j^T z, the same everywhere
    M = gradients @ gradients.T
    layer = theory.collapse(A, y, 0.1, 1.0, 0.9, layers=1)[0]
    torch.testing.assert_close(layer, X.T @ M @ X / 0.9, rtol=1e3 * EPS, atol=1e3 * EPS)


@pytest.mark.parametrize(("size", "unit", "ridge", "shift"), SETTINGS)
def test_lemma_b2_gives_one_over_q_plus_lambda(size, unit, ridge, shift):
    y, q = theory.labels(3, size, unit), 1.0 if unit else float(size)
    Y = y @ y.T
    product = Y @ torch.linalg.inv(Y + shift * torch.eye(len(Y), dtype=torch.float64))
    torch.testing.assert_close(product, Y / (q + shift), rtol=1e3 * EPS, atol=1e3 * EPS)
    assert 1 / (q + shift) < 1 / shift < 1 + 1 / shift  # what the proof uses instead is too large for every q


@pytest.mark.parametrize(("size", "unit", "ridge", "shift"), SETTINGS)
def test_with_the_exact_kappa_collapse_is_complete_and_exponential(size, unit, ridge, shift, generator):
    y, q, kappa, grams = run(size, unit, ridge, shift, "exact", generator)
    steps = theory.distances(grams, y @ y.T)
    s, rate = theory.fixed_point(q, ridge, shift, kappa)
    assert abs(s - 1) < 10 * EPS
    assert rate <= ridge / shift
    assert steps[-1] < 1e3 * EPS * q
    assert theory.last_ratio(steps) == pytest.approx(rate, rel=0.02)  # the slow mode leads after a few layers
    bound = 2 * ridge / shift * (1 + 1 / shift) * q
    assert all(b < bound * a for a, b in pairwise(steps) if b > 1e-10)


@pytest.mark.parametrize(("size", "unit", "ridge", "shift"), SETTINGS)
@pytest.mark.parametrize(("name", "order"), [("paper", 1), ("first order", 2)])
def test_the_floor_falls_with_the_stated_order_for_the_corrected_kappa_only(
    name, order, size, unit, ridge, shift, generator
):
    floors = []
    for lam in (ridge / 10, ridge / 20):
        y, q, kappa, grams = run(size, unit, lam, shift, name, generator)
        s, _ = theory.fixed_point(q, lam, shift, kappa)
        assert s > 1
        floors.append(theory.distances(grams[-1:], y @ y.T)[0])
        assert floors[-1] == pytest.approx(q * (s - 1), rel=1e-4)
    # halving lambda_k divides the floor by 2^order, up to a few percent of the next order
    assert math.log2(floors[0] / floors[1]) == pytest.approx(order, abs=0.05)


def test_a_wrong_kappa_does_not_keep_data_from_collapsing(generator):
    _, _, _, grams = run(20, False, 0.01, 1.0, "paper", generator)
    values, vectors = torch.linalg.eigh(grams[-1])
    X = vectors[:, -3:] * values[-3:].sqrt()
    assert collapse.nc1(X, torch.arange(3).repeat_interleave(20)) < 1e-24  # about EPS^2 times a few hundred


# ---- Theorem 4.4


@pytest.mark.parametrize("mu", [0.01, 1.0, 10.0])
def test_objective_is_formula_4_and_closed_at_the_optimum(mu, generator):
    y = theory.labels(3, 8)
    k = theory.competitors(y, generator)["Laplace"]
    values, vectors = np.linalg.eigh(k.numpy())
    by_eigenvalues = ((y.numpy().T @ vectors) ** 2 * values / (values + mu)).sum()
    assert theory.objective(k, y, mu) == pytest.approx(by_eigenvalues, rel=1e-12)
    assert theory.objective(y @ y.T, y, mu) == pytest.approx(3 * 8 * 8 / (8 + mu), rel=1e-12)


def test_competitors_are_feasible(generator):
    for _ in range(10):
        for name, k in theory.competitors(theory.labels(3, 8), generator).items():
            assert torch.linalg.eigvalsh(k)[0] > -24 * EPS * 24, name
            torch.testing.assert_close(k.diagonal(), torch.ones(24, dtype=torch.float64), rtol=8 * EPS, atol=0)
            assert k.min() >= 0, name
            assert k.max() <= 1 + 8 * EPS, name


@pytest.mark.parametrize("mu", [0.01, 1.0, 10.0])
def test_no_competitor_beats_the_collapsed_kernel(mu, generator):
    y = theory.labels(3, 8)
    optimum = 3 * 8 * 8 / (8 + mu)
    for _ in range(20):
        for name, k in theory.competitors(y, generator).items():
            assert theory.objective(k, y, mu) < optimum, name


def test_ascent_reaches_the_collapsed_kernel_and_stops_there(generator):
    y, mu = theory.labels(3, 4), 1.0
    V = torch.randn(12, 6, generator=generator, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.Adam([V], lr=0.05)
    for _ in range(300):  # feasible at every step: a Gram matrix of non-negative unit vectors
        rows = torch.nn.functional.normalize(V.abs(), dim=1)
        k = rows @ rows.T
        value = (y * torch.linalg.solve(k + mu * torch.eye(12, dtype=torch.float64), k @ y)).sum()
        assert value.item() < 3 * 4 * 4 / (4 + mu) * (1 + 100 * EPS)
        optimizer.zero_grad()
        (-value).backward()
        optimizer.step()
    torch.testing.assert_close(k.detach(), y @ y.T, rtol=0, atol=0.05)


def test_the_gap_closes_as_the_kernel_approaches(generator):
    y = theory.labels(3, 8)
    other = theory.competitors(y, generator)["correlation"]
    gaps = [8 * 24 / 9 - theory.objective((1 - t) * y @ y.T + t * other, y, 1.0) for t in (1e-1, 1e-2, 1e-3)]
    assert all(0 < small < 0.2 * large for large, small in pairwise(gaps))


def test_the_report_prints_three_tables(capsys):
    theory.main()
    printed = capsys.readouterr().out
    assert [title in printed for title in ("\nProposition A.1\n", "\nTheorem 4.3: ", "\nTheorem 4.4: ")] == [True] * 3
    assert "nan" not in printed
