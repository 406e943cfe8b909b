"""solve(method="cg"): the same solution as a factorisation, without the matrix, and honest where it cannot be had."""

from __future__ import annotations

import dataclasses
import logging
import re
import warnings

import pytest
import scipy.linalg
import scipy.sparse.linalg
import torch
from fastagop.kernels import reference

import fastagop
from fastagop import ConjugateGradients, Gaussian, Laplace
from fastagop.solvers import cg, preconditioner

EPS = 2.0**-52
TIGHT = ConjugateGradients(tolerance=1e-11)
RANKS = [0, 7, 60, None]  # none; less than a proposal block; a good share of the spectrum; the default
kernels = pytest.mark.parametrize("kernel", [Laplace(2.0), Gaussian(1.0)], ids=repr)


def residual(A, alpha, Y):
    return float(torch.linalg.vector_norm(A @ alpha.double() - Y.double()) / torch.linalg.vector_norm(Y.double()))


@kernels
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_dense_solution(kernel, rank, ridge, cloud, normal, relative, system):
    """alpha and the predictions at new points agree with scipy's dense solve to the residual times the condition."""
    X, Y, Z = cloud("spread", n=300), normal(300, 4), cloud("spread", n=50, seed=3)
    A = system(kernel, X, ridge)
    exact = torch.from_numpy(scipy.linalg.solve(A.numpy(), Y.numpy(), assume_a="pos"))
    values = torch.linalg.eigvalsh(A)
    solution = fastagop.solve(kernel, X, Y, ridge=ridge, method=dataclasses.replace(TIGHT, rank=rank))
    assert solution.method == "cg"
    assert solution.stopped == ""
    assert solution.jitter == 0
    assert solution.iterations >= 1
    assert solution.residual <= TIGHT.tolerance
    assert abs(solution.residual - residual(A, solution.alpha, Y)) <= 64 * EPS * float(values[-1] / values[0])
    bound = 2 * TIGHT.tolerance * float(values[-1] / values[0])
    assert relative(solution.alpha, exact) <= bound
    K = reference.kernel_matrix(kernel, Z, X)
    assert relative(K @ solution.alpha, K @ exact) <= bound


def test_preconditioner_pays(cloud, targets, system):
    """More rank, fewer steps; and without one, as many as scipy's conjugate gradients take."""
    X, Y = cloud("collapsed 1", n=400), targets(400)
    steps = []
    for rank in (0, 20, 100, 300):
        solution = fastagop.solve(Gaussian(1.0), X, Y, ridge=1e-3, method=ConjugateGradients(rank=rank))
        assert solution.rank == rank
        steps.append(solution.iterations)
    assert steps == sorted(steps, reverse=True)
    assert steps[2] <= steps[0] / 2
    count = 0

    def tick(_):
        nonlocal count
        count += 1

    A = system(Gaussian(1.0), X, 1e-3).numpy()
    slowest = 0
    for y in Y.numpy().T:
        count = 0
        scipy.sparse.linalg.cg(A, y, rtol=1e-6, atol=0.0, maxiter=1000, callback=tick)
        slowest = max(slowest, count)
    assert abs(steps[0] - slowest) <= 0.05 * slowest + 1


def test_falkon(cloud, normal, relative):
    """Nystroem regression (K_nm^T K_nm + ridge K_mm) b = K_nm^T Y with every point a center predicts the same."""
    kernel, ridge = Laplace(2.0), 1e-2
    X, Z, Y = cloud("spread", n=150), cloud("spread", n=40, seed=3), normal(150, 3)
    K, new = reference.kernel_matrix(kernel, X), reference.kernel_matrix(kernel, Z, X)
    falkon = torch.linalg.solve(K.T @ K + ridge * K, K.T @ Y)
    condition = float(torch.linalg.cond(K.T @ K + ridge * K))
    solution = fastagop.solve(kernel, X, Y, ridge=ridge, method=TIGHT)
    assert relative(new @ solution.alpha, new @ falkon) <= condition * EPS + TIGHT.tolerance * 1e3


@pytest.mark.parametrize("tolerance", [1e-2, 1e-6, 1e-9])
def test_tolerance(tolerance, cloud, normal, system):
    X, Y = cloud("spread", n=200), normal(200, 3)
    solution = fastagop.solve(Gaussian(1.0), X, Y, ridge=1e-3, method=ConjugateGradients(tolerance=tolerance))
    true = residual(system(Gaussian(1.0), X, 1e-3), solution.alpha, Y)
    assert 1e-3 * tolerance <= true <= tolerance  # met, and not by going on for ever


def test_float32_rounds_alpha_only(cloud, normal, system):
    """float64 passes: the residual of a float32 alpha is that of the exact solution rounded to float32."""
    X, Y = cloud("spread", n=300, dtype=torch.float32), normal(300, 3, dtype=torch.float32)
    solution = fastagop.solve(Gaussian(1.0), X, Y, ridge=1e-3, method="cg")
    A = system(Gaussian(1.0), X, 1e-3)
    exact = torch.linalg.solve(A, Y.double())
    assert solution.alpha.dtype == torch.float32
    assert solution.dtype == torch.float64
    rounding = torch.finfo(torch.float32).eps * float(torch.linalg.matrix_norm(A, 2) * exact.norm() / Y.double().norm())
    assert solution.residual <= 0.5 * rounding + 1e-6  # the tolerance of the passes
    assert abs(solution.residual - residual(A, solution.alpha, Y)) <= 1e-3 * solution.residual


def test_every_column_is_solved(cloud, normal, system):
    """One large target column must not hide that a small one is unsolved; zero columns cost nothing."""
    X, Y = cloud("spread", n=200), normal(200, 3) * torch.tensor([1.0, 1e-9, 0.0])
    solution = fastagop.solve(Laplace(2.0), X, Y, method="cg")
    A = system(Laplace(2.0), X, 0.0)
    for c in range(2):
        assert residual(A, solution.alpha[:, c], Y[:, c]) <= 1e-6
    assert not solution.alpha[:, 2].any()
    nothing = fastagop.solve(Laplace(2.0), X, torch.zeros(200, 2, dtype=X.dtype), method="cg")
    assert (nothing.residual, nothing.iterations) == (0.0, 0)
    assert fastagop.solve(Laplace(2.0), X, Y[:, :0], method="cg").alpha.shape == (200, 0)


@pytest.mark.parametrize("n", [1, 2, 20])
def test_few_rows(n, cloud, normal, relative, system):
    X, Y = cloud("spread", n=n), normal(n, 2)
    for rank in (0, 1, None):
        solution = fastagop.solve(Laplace(2.0), X, Y, method=dataclasses.replace(TIGHT, rank=rank))
        assert relative(solution.alpha, torch.linalg.solve(system(Laplace(2.0), X, 0.0), Y)) <= 1e-9


# ---- what cannot be solved


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ridge", [0.0, 1e-3])
@pytest.mark.parametrize("kernel", [Laplace(2.0), Gaussian(5.0)], ids=repr)
@pytest.mark.parametrize(
    "name", ["collapsed 1e-2", "collapsed 1e-4", "nested", "pairs", "zero-rows", "identical", "line"]
)
def test_hard_problems(dtype, ridge, kernel, name, cloud, targets, bounded_solution, system):
    """Never NaN, never wild, never much worse than a plain solve, and never silent about what was not reached."""
    X, Y = cloud(name, dtype=dtype), targets(120, dtype)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        solution = fastagop.solve(kernel, X, Y, ridge=ridge, method=ConjugateGradients(rank=40))
    assert bool(solution.alpha.isfinite().all())
    assert float(solution.alpha.abs().max()) <= torch.finfo(dtype).eps ** -0.5
    A = system(kernel, X, ridge)
    true = residual(A, solution.alpha, Y)
    size = torch.linalg.matrix_norm(A, 2) * torch.linalg.vector_norm(solution.alpha.double()) / Y.double().norm()
    assert abs(solution.residual - true) <= 64 * EPS * float(size) + 1e-9
    best = bounded_solution(A, X, Y, dtype)  # at most 0.8: alpha = 0 has 1
    assert true <= min(1.5 * best, 0.5 * (1 + best)) + (2e-6 if dtype == torch.float64 else 2e-3)
    met = solution.residual if solution.merged_residual is None else solution.merged_residual
    missed = solution.stopped or met > (1e-3 if dtype == torch.float32 else 1e-6)
    contradicted = ridge == 0 and solution.contradictions > 0
    assert len(said) == int(bool(missed or solution.jitter or contradicted))
    if ridge:
        assert solution.jitter == 0
        assert solution.stopped == ""
    best = bounded_solution(A, X, Y, dtype)  # at most 0.8: alpha = 0 has 1
    assert true <= min(1.5 * best, 0.5 * (1 + best)) + (2e-6 if dtype == torch.float64 else 2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", [Laplace(6.0), fastagop.ProductLaplace(6.0)], ids=repr)
def test_large_coefficients_stay_where_they_solve_the_system(dtype, kernel, normal):
    """Without a ridge, too: a factorisation takes them, and jitter would leave most of these targets unmet."""
    X = torch.arange(17, dtype=dtype)[:, None] * (1e-3 if dtype == torch.float32 else 2e-8)
    Y = normal(17, 1, dtype=dtype, seed=2)
    direct, found = (fastagop.solve(kernel, X, Y, method=method) for method in ("cholesky", "cg"))
    assert direct.jitter == 0
    assert float(direct.alpha.abs().max()) > torch.finfo(dtype).eps ** -0.5 * float(Y.abs().max())
    assert found.jitter == 0
    assert found.residual <= (1e-3 if dtype == torch.float32 else 1e-6)


def test_contradicting_targets(cloud, normal, system):
    """The jitter that a factorisation would add: nearly equal rows are answered by their mean."""
    X, Y = cloud("spread", n=200), normal(200, 3)
    X[150] = X[10] + 1e-14 * normal(12, seed=3)  # more than rounding apart
    Y[150] = -Y[10]
    with pytest.warns(fastagop.NumericalWarning, match=r"jitter .* was added") as said:
        solution = fastagop.solve(Laplace(2.0), X, Y, method="cg")
    assert f"{solution.jitter:.1e}" in str(said[0].message)
    least = float((2**0.5) * Y[10].norm() / Y.norm())
    assert least * 0.999 <= solution.residual <= 1.05 * least
    assert residual(system(Laplace(2.0), X, solution.jitter), solution.alpha, Y) <= 1e-6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (ConjugateGradients(rank=100, max_iterations=5), "max_iterations = 5 steps were not enough"),
        (ConjugateGradients(rank=0, tolerance=1e-18), "rounding keeps the residual above the tolerance"),
    ],
)
def test_an_early_end_is_said(options, words, cloud, normal):
    X, Y = cloud("spread", n=200), normal(200, 3)
    with pytest.warns(fastagop.NumericalWarning, match=f"conjugate gradients ended .* because {words}") as said:
        solution = fastagop.solve(Gaussian(1.0), X, Y, ridge=1e-3, method=options)
    assert words in solution.stopped
    assert "larger rank" in str(said[0].message)
    assert solution.residual < 1
    assert solution.iterations <= options.max_iterations


@pytest.mark.parametrize(
    ("matrix", "precondition", "words"),
    [
        (torch.diag(torch.tensor([1.0, 2.0, -3.0])), None, "the kernel matrix is not positive definite"),
        (torch.eye(3), torch.neg, "the preconditioner is not positive definite"),
        (torch.eye(3), lambda R: R * torch.nan, "the preconditioner is not positive definite"),
    ],
)
def test_what_is_not_positive_definite_is_said(matrix, precondition, words):
    Y = torch.tensor([[1.0], [1.0], [2.0]], dtype=torch.float64)
    outcome = cg.conjugate_gradients(lambda V: matrix.double() @ V, Y, precondition, ConjugateGradients())
    assert words in outcome.stopped
    assert outcome.residual <= 1
    assert bool(outcome.alpha.isfinite().all())


def test_no_progress_is_said(cloud, targets, monkeypatch):
    monkeypatch.setattr(cg, "_STALL", 2)  # eigenvalues down to rounding: residuals do not fall step by step
    with pytest.warns(fastagop.NumericalWarning, match="because it makes no progress"):
        solution = fastagop.solve(Gaussian(5.0), cloud("nested"), targets(120), method=ConjugateGradients(rank=0))
    assert solution.residual <= 1


# ---- the preconditioner


@kernels
def test_pivoted_cholesky(kernel, cloud):
    """From below, and no worse than the best approximation of half the rank."""
    K = reference.kernel_matrix(kernel, cloud("spread", n=200))
    F = preconditioner.pivoted_cholesky(lambda index: K[:, index].clone(), K.diagonal().clone(), 150, 0.0)
    assert F.shape == (200, 150)
    left = K - F @ F.T
    assert float(torch.linalg.eigvalsh(left)[0]) >= -1e3 * EPS
    best = torch.linalg.eigvalsh(K).cumsum(0)  # trace that the best approximation of rank 200 - 1 - i leaves
    assert float(best[49]) * (1 - 1e-9) <= float(left.trace()) <= float(best[124])


def test_pivots_stop_where_nothing_is_left(cloud):
    """Exact duplicates are never drawn twice: rank 40 of 120 points that are 40."""
    K = reference.kernel_matrix(Laplace(2.0), cloud("spread", n=40).repeat(3, 1))
    F = preconditioner.pivoted_cholesky(lambda index: K[:, index].clone(), K.diagonal().clone(), 100, 0.0)
    assert F.shape == (120, 40)
    assert float((F @ F.T - K).abs().max()) <= 1e3 * EPS
    again = preconditioner.pivoted_cholesky(lambda index: K[:, index].clone(), K.diagonal().clone(), 100, 0.0)
    assert torch.equal(F, again)
    few = preconditioner.pivoted_cholesky(lambda index: K[:, index].clone(), K.diagonal().clone(), 100, 1e3)
    assert few.shape == (120, 0)


@pytest.mark.parametrize("ridge", [0.0, 1e-8, 1e-1])
@pytest.mark.parametrize("spread", [0.0, 9.0])  # eigenvalues of one size, and over nine decades
def test_preconditioner(ridge, spread, normal):
    """tail P^-1 against the dense inverse of F F^T + ridge I with F's complement at the tail; also at ridge 0."""
    Q = torch.linalg.qr(normal(60, 20)).Q
    F = Q * 10.0 ** (-spread / 2 * torch.linspace(0, 1, 20, dtype=torch.float64)) @ torch.linalg.qr(normal(20, 20)).Q
    exact = F @ F.T
    P = preconditioner.preconditioner(F, ridge)
    assert float((P.U.T @ P.U - torch.eye(P.rank)).abs().max()) <= 64 * EPS
    tail = 10.0**-spread + ridge
    assert P.tail == pytest.approx(tail, rel=1e-6)
    dense = exact + ridge * Q @ Q.T + tail * (torch.eye(60) - Q @ Q.T)
    R = normal(60, 3)
    # over nine decades an angle of eps between eigenvectors is 1e-7 of the tail; the Gram matrix adds to that
    assert float((P(dense @ R) - P.tail * R).norm()) <= (1e-3 if spread else 1e-12) * tail * float(R.norm())


# ---- plans, options, progress


def test_auto_takes_it_where_no_matrix_fits(cloud, normal, relative):
    X, Y = cloud("spread", n=1000), normal(1000, 2)
    limit = 4e6  # a float64 matrix takes 8 MB
    text = fastagop.explain("solve", Laplace(2.0), X, Y, ridge=1e-3, memory_limit=limit)
    assert "method cg" in text
    assert "no n x n matrix fits into 4.0 MB" in text
    assert re.search(r"preconditioner of rank [1-9]\d* ", text)
    solution = fastagop.solve(Laplace(2.0), X, Y, ridge=1e-3, memory_limit=limit)
    assert solution.method == "cg"
    assert solution.residual <= 1e-6
    direct = fastagop.solve(Laplace(2.0), X, Y, ridge=1e-3)
    assert direct.method == "cholesky"
    assert relative(solution.alpha, direct.alpha) <= 1e-4
    with pytest.raises(MemoryError, match="method='cg'"):
        fastagop.solve(Laplace(2.0), X, Y, method="cholesky", memory_limit=limit)


def test_memory_error_where_nothing_fits(cloud, normal, least_memory):
    X, Y = cloud("spread", n=400), normal(400, 2)
    least = least_memory("solve", Laplace(2.0), X, Y)
    with pytest.raises(MemoryError, match=r"solve with n = 400 needs .* even without a kernel matrix") as error:
        fastagop.solve(Laplace(2.0), X, Y, memory_limit=least - 1)
    assert 390 <= int(re.search(r"n up to about (\d+) fits", str(error.value))[1]) <= 400
    assert fastagop.solve(Laplace(2.0), X, Y, memory_limit=least).residual <= 1e-6
    with pytest.raises(MemoryError, match="rank 399"):  # a rank that was asked for is not cut
        fastagop.solve(Laplace(2.0), X, Y, method=ConjugateGradients(rank=399), memory_limit=4 * least)


def test_peak_memory(peak_memory):
    """Within its own plan, which is a small part of the matrix."""
    setup = """
kernel, g, n = fastagop.Laplace(2.0), torch.Generator().manual_seed(0), 6000
X, Y = torch.randn(n, 8, generator=g).double(), torch.randn(n, 2, generator=g).double()
way = fastagop.ConjugateGradients(rank=200, tolerance=1e-2)
fastagop.solve(kernel, X[:700], Y[:700], method=way)
"""
    taken = peak_memory(setup, "fastagop.solve(kernel, X, Y, ridge=1e-3, method=way)")
    X = torch.randn(6000, 8, dtype=torch.float64)
    way = ConjugateGradients(rank=200, tolerance=1e-2)
    text = fastagop.explain("solve", Laplace(2.0), X, X[:, :2], ridge=1e-3, method=way)
    planned = float(re.search(r"memory\s+([\d.]+) MB", text)[1]) * 1e6
    assert taken <= planned <= 0.4 * 6000 * 6000 * 8


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("tolerance", value) for value in (0, -1e-3, None)),
        *(("rank", value) for value in (-1, 2.5, True)),
        *(("max_iterations", value) for value in (0, None)),
        ("seed", -1),
        ("progress", 1),
    ],
)
def test_options(name, value):
    with pytest.raises((TypeError, ValueError), match=f"^{name} must be"):
        ConjugateGradients(**{name: value})


def test_progress(cloud, normal, capfd, caplog):
    X, Y = cloud("spread", n=100), normal(100, 2)
    with caplog.at_level(logging.INFO, logger="fastagop"):
        quiet = fastagop.solve(Laplace(2.0), X, Y, method="cg")
    assert len([r for r in caplog.records if "step" in r.message]) == quiet.iterations
    assert capfd.readouterr().err == ""
    fastagop.solve(Laplace(2.0), X, Y, method=ConjugateGradients(progress=True))
    assert "residual" in capfd.readouterr().err


def test_units_and_layouts(cloud, normal, relative):
    """Points whose squares leave float32, and strided views."""
    X, Y = cloud("spread", n=160, d=24, dtype=torch.float32)[::2, ::2], normal(160, 6, dtype=torch.float32)[::2, ::3]
    plain = fastagop.solve(Laplace(2.0), X, Y, ridge=1e-3, method="cg")
    scaled = fastagop.solve(Laplace(2e25), X * 1e25, Y, ridge=1e-3, method="cg")
    assert relative(scaled.alpha, plain.alpha) <= 1e-5
