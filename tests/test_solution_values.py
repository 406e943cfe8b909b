"""How exact solutions and what follows from them are, and that nothing more is altered than has to be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fastagop.kernels import calibration, reference

import fastagop
from fastagop import DeepRFMClassifier, Gaussian, Laplace, RFMRegressor
from fastagop.solvers import full_refined, preconditioner
from fastagop.solvers.limits import both, worst_column
from fastagop.solvers.limits import relative as relative_size

EPS = 2.0**-52


def normalised(rows: torch.Tensor) -> torch.Tensor:
    """What a layer of Deep RFM makes of its rows."""
    from fastagop.deep_rfm.layer import normalise_rows

    return normalise_rows(rows)


def pivoted_cholesky(K: torch.Tensor, rank: int) -> torch.Tensor:
    return preconditioner.pivoted_cholesky(lambda index: K[:, index].clone(), K.diagonal().clone(), rank, 0.0)


def near_copies(normal, X: torch.Tensor, rows: slice, of: slice) -> None:
    """Overwrite rows by others moved by 1e-10: points of their own, which a Gaussian kernel cannot tell apart."""
    X[rows] = X[of].repeat(len(X[rows]) // len(X[of]), 1) + 1e-10 * normal(len(X[rows]), X.shape[1], seed=9)


@pytest.mark.parametrize(
    ("name", "dtype"), [("near copies", torch.float64), ("line", torch.float64), ("line", torch.float32)]
)
def test_a_ridge_holds_every_eigenvalue(name, dtype, cloud, normal):
    """k + ridge I has no eigenvalue below the ridge: eigh drops none, though those of k itself reach rounding."""
    X, Y = cloud("line" if name == "line" else "spread", n=100, dtype=dtype), normal(100, 3, dtype=dtype)
    if name == "near copies":
        near_copies(normal, X, slice(50, 100), slice(0, 50))
    values = torch.linalg.eigvalsh(reference.kernel_matrix(Gaussian(5.0), X))
    assert float(values[0]) < 100 * EPS * float(values[-1])
    solution = fastagop.solve(Gaussian(5.0), X, Y, ridge=1e-3, method="eigh")
    assert solution.rank == 100
    assert solution.residual <= (1e-10 if dtype == torch.float64 else 1e-3)


@pytest.mark.parametrize(
    ("kernel", "differ"), [(Gaussian(1.0), False), (Gaussian(1.0), True), (Gaussian(0.2), False), (Gaussian(0.2), True)]
)
@pytest.mark.parametrize("first", [10, 350])  # copies in the first block of columns, and in a later one
def test_no_more_jitter_than_it_takes(kernel, differ, first, cloud, normal):
    """With a fifth of the jitter a plain solve's coefficients leave what float64 bears; equal targets take rounding."""
    X, Y = cloud("spread", n=400), normal(400, 2)
    near_copies(normal, X, slice(first, first + 40), slice(first - 10, first))
    Y[first : first + 40] = Y[first - 10 : first].repeat(4, 1) + float(differ)
    with pytest.warns(fastagop.NumericalWarning, match="jitter"):
        solution = fastagop.solve(kernel, X, Y)
    K = reference.kernel_matrix(kernel, X)
    least = EPS * float(K.sum(1).max())
    if not differ:
        assert 0 < solution.jitter <= 2 * least
        return
    assert solution.jitter > 1e3 * least
    bound = float(Y.abs().max()) / EPS**0.5
    tried = torch.linalg.solve(K + 0.2 * solution.jitter * torch.eye(400), Y)
    assert float(tried.abs().max()) > 2 * bound
    assert float(solution.alpha.abs().max()) <= bound


def test_a_float32_factor_is_refined_to_float64(cloud):
    """Layers of a float32 fit with a ridge keep alpha in float64 and solve their equations to the matrix' rounding."""
    X, y = cloud("collapsed 1e-1", n=200, dtype=torch.float32), torch.arange(200) % 5
    model = DeepRFMClassifier(Laplace(2.0), depth=2, width=32, ridge=1e-3, random_state=0, dtype="float32").fit(X, y)
    for solution in [*(layer.solution for layer in model.layers_), model.solution_]:
        assert solution.alpha.dtype == torch.float64
        assert solution.residual <= 2.5e-7  # one step of refinement leaves 5e-7


def test_small_distances_do_not_pass_through_a_float32_kernel_matrix(cloud, normal, relative):
    """1 - exp(-1e-4) has four digits in float32: the weights of near pairs are made from the points again."""
    X = cloud("collapsed 1e-4", n=120, d=64, dtype=torch.float32)
    Y = normal(5, 40, dtype=torch.float32)[torch.arange(120) % 5]
    model = RFMRegressor(Laplace(2.0), iterations=1, agop_scale="sum", ridge=1e-3, dtype="float32").fit(X, Y)
    solution = model.iterations_[0].solution
    expected = 120 * reference.agop(Laplace(2.0), X, solution.alpha)
    assert relative(model.M_, expected) <= 5e-7  # 8e-8; by way of the kernel matrix 2e-5


@pytest.mark.parametrize(
    ("name", "kernel"), [("spread", Laplace(2.0)), ("spread", Gaussian(5.0)), ("line", Gaussian(1.0))]
)
def test_pivots_go_on_down_to_rounding(name, kernel, cloud):
    """The trace that pivoted Cholesky leaves, and what it then is worth as a factor."""
    K = reference.kernel_matrix(kernel, cloud(name, n=200))
    F = pivoted_cholesky(K, 200)
    assert abs(float((K - F @ F.T).trace())) <= 20 * 200 * EPS
    assert float((K - F @ F.T).abs().max()) <= 200 * EPS


def test_fewer_pivots_leave_what_their_columns_do_not_say(cloud):
    """F F^T is the Nystroem approximation of its pivots: they agree on the pivots' rows."""
    K = reference.kernel_matrix(Laplace(2.0), cloud("spread", n=200))
    F = pivoted_cholesky(K, 30)
    assert F.shape == (200, 30)
    exact = (K - F @ F.T).abs().amax(1) <= 1e-12
    assert int(exact.sum()) == 30
    pivots = exact.nonzero().flatten()
    nystroem = K[:, pivots] @ torch.linalg.solve(K[pivots][:, pivots], K[pivots])
    assert float((F @ F.T - nystroem).abs().max()) <= 1e-10


def test_columns_that_repeat_others_add_no_rank(normal):
    """A preconditioner's U has orthonormal columns, whatever rounding makes of eigenvalues that are zero."""
    Q = torch.linalg.qr(normal(60, 20)).Q
    P = preconditioner.preconditioner(torch.cat([Q, Q[:, :5]], 1), 1e-3)
    assert P.rank == 20
    assert float((P.U.T @ P.U - torch.eye(20)).abs().max()) <= 1e-12
    assert P.tail == pytest.approx(1.001, rel=1e-12)  # eigenvalues of F F^T: fifteen of 1, five of 2
    assert float(P.values.max()) == pytest.approx(2.001, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_least_rows_keep_their_direction(dtype):
    """Subnormal numbers: their squares, and the inverse of their size, leave the dtype."""
    tiny = {torch.float32: 1e-41, torch.float64: 1e-320}[dtype]
    rows = torch.tensor([[tiny, 2 * tiny], [0.0, 0.0], [-3e30, 4e30]], dtype=dtype)
    exact = rows[0].double().numpy() / tiny  # rounded to few digits as they are
    expected = np.array([exact / np.hypot(*exact), [0.0, 0.0], [-0.6, 0.8]])
    np.testing.assert_allclose(normalised(rows).numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(normalised(rows).numpy()[0], [0.447, 0.894], rtol=2e-3)


@pytest.mark.parametrize(("n", "outputs"), [(700, 1), (1000, 3)])
def test_a_matrix_in_full_or_half_of_it_makes_the_same_fit(n, outputs, normal, relative, monkeypatch):
    X, Y = normal(n, 9), normal(n, outputs)
    fits = []
    for cache in (0, 2**40):
        monkeypatch.setattr(calibration, "cache_bytes", lambda cache=cache: cache)
        fits.append(fastagop.RFMRegressor(iterations=2, device="cpu").fit(X, Y))
        matrices = full_refined.Matrices.of(Laplace(10.0), X.double(), weights=True)
        assert matrices.whole == (cache > 0)
        K, V = reference.kernel_matrix(Laplace(10.0), X), Y.double()
        assert relative(matrices.matmul(V), K @ V) <= 1e-12
        assert relative(matrices.full(), K) <= 1e-12
        assert torch.equal(matrices.W, matrices.W.T)
        assert torch.equal(matrices.A.triu(), matrices.full().float().triu())
    assert relative(fits[0].M_, fits[1].M_) <= 1e-6


@pytest.mark.parametrize("columns", [1, 3])
def test_residuals_of_all_and_of_the_worst_column(columns, normal):
    R, Y = normal(50, columns).double(), normal(50, columns).double()
    Y[:, -1] *= 1e60
    R[:, -1] *= 1e50
    for y in (Y, torch.cat([Y, torch.zeros(50, 1)], 1), 0.0 * Y):
        r = torch.cat([R, torch.ones(50, y.shape[1] - columns)], 1).double()
        assert both(r, y) == pytest.approx((relative_size(r, y), worst_column(r, y)), rel=1e-14)
