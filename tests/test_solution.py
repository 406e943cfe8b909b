"""What a Solution says is true of k(X, X) in float64, and what float32 cannot hold is computed in float64."""

from __future__ import annotations

import logging
import warnings

import numpy as np
import pytest
import torch
from fastagop.kernels import kernel_operator, reference

import fastagop
from fastagop import DeepRFMClassifier, Gaussian, GeneralisedLaplace, Laplace, Matern52, RFMClassifier, RFMRegressor
from fastagop.solvers import direct

DTYPES = [torch.float32, torch.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def residual(kernel, X, alpha, Y, ridge):
    """||(k + ridge I) alpha - Y|| / ||Y|| with kernel values from differences of points in float64."""
    K = reference.kernel_matrix(kernel, X)
    return float((K @ alpha.double() + ridge * alpha.double() - Y.double()).norm() / Y.double().norm())


def smooth_problem(n, d=3, seed=0):
    """Targets with noise on points in few dimensions: kernel matrices with eigenvalues of every size."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(n, d, generator=g)
    return X, torch.sin(2 * X[:, :1]) + 0.05 * torch.randn(n, 1, generator=g)


def quietly(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fastagop.solve(*args, **kwargs)


# ---- residuals

SMOOTH = [Matern52(10.0), Gaussian(3.0), Laplace(10.0), GeneralisedLaplace(5.0, 1.5)]


@pytest.mark.parametrize("kernel", SMOOTH, ids=repr)
@pytest.mark.parametrize("ridge", [1e-2, 1e-4, 1e-6, 0.0])
@dtypes
@pytest.mark.parametrize("method", ["auto", "eigh", "cg"])
def test_the_residual_is_that_of_the_points(kernel, ridge, dtype, method):
    X, Y = smooth_problem(250)
    X, Y = X.to(dtype), Y.to(dtype)
    solution = quietly(kernel, X, Y, ridge=ridge, method=method)
    true = residual(kernel, X, solution.alpha, Y, ridge)
    size = float(solution.alpha.double().norm() * 250 / Y.double().norm())  # of the terms that cancel
    assert abs(solution.residual - true) <= 1e-3 * true + 64 * 2.0**-52 * size
    assert solution.residual_rows == 250


@pytest.mark.parametrize("kernel", SMOOTH, ids=repr)
@pytest.mark.parametrize("ridge", [1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("road", ["float64 at once", "float64 after all", "float32 and the points"])
def test_a_fit_in_float32_solves_its_system(kernel, ridge, road, monkeypatch):
    """A float32 kernel matrix would leave 1e-5 to 1e-2 of the targets: alpha is then taken from float64 values."""
    X, Y = smooth_problem(300)
    if road != "float64 at once":
        monkeypatch.setattr("fastagop.solvers.problem.FULL_MATRIX_ROWS", 0)
        monkeypatch.setattr(direct, "_PASSES", 1000 if road == "float64 after all" else 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # ill-conditioned, but solved
        solution = RFMRegressor(kernel, iterations=0, ridge=ridge).fit(X, Y[:, 0]).solution_
    assert solution.residual <= 1e-6


def test_a_sample_stands_for_many_rows(monkeypatch):
    X, Y = smooth_problem(400)
    for module in (direct, kernel_operator):
        monkeypatch.setattr(module, "_FEW", 100)
    monkeypatch.setattr(kernel_operator, "_SAMPLE", 80)
    solution = quietly(Laplace(5.0), X, Y, ridge=1e-1)
    assert solution.dtype == torch.float32
    assert solution.residual_rows == 80
    assert "on 80 rows" in repr(solution)
    true = residual(Laplace(5.0), X, solution.alpha, Y, 1e-1)
    assert 0.5 * true <= solution.residual <= 2 * true


def test_a_float32_matrix_is_refined_from_the_points_where_no_float64_one_fits(monkeypatch):
    X, Y = smooth_problem(300)
    room = 1.3 * 300**2 * 4 + 300 * 3 * 8
    plain = quietly(Matern52(10.0), X, Y, ridge=1e-2, memory_limit=room)
    assert plain.dtype == torch.float32
    assert plain.residual == pytest.approx(residual(Matern52(10.0), X, plain.alpha, Y, 1e-2), rel=1e-3)
    exact = quietly(Matern52(10.0), X.double(), Y.double(), ridge=1e-2)
    rounded = residual(Matern52(10.0), X, exact.alpha.float(), Y, 1e-2)
    assert plain.residual <= 4 * rounded + 1e-6
    solution = RFMRegressor(Matern52(10.0), iterations=0, ridge=1e-2, memory_limit=room).fit(X, Y[:, 0]).solution_
    assert solution.dtype == torch.float32
    assert solution.residual <= 1e-6


@pytest.mark.parametrize("method", ["cholesky", "cholesky+cg", "eigh", "cg"])
def test_coefficients_that_vanish_are_not_called_a_solution(method, normal):
    """Targets near the smallest float32: alpha rounds to zero, or loses its digits, and the residual says so."""
    X = normal(30, 3, dtype=torch.float32)
    for size in (1e-44, 3e-41):
        Y = size * normal(30, 1, seed=2).sign().float()
        solution = quietly(Laplace(1.0), X, Y, ridge=1e5, method=method)
        true = residual(Laplace(1.0), X, solution.alpha, Y, 1e5)
        assert solution.residual == pytest.approx(true, rel=1e-3)
    assert not quietly(Laplace(1.0), X, 1e-44 * torch.ones(30, 1), ridge=1e5, method=method).alpha.any()


# ---- jitter


@pytest.mark.parametrize("ridge", [1e-7, 1e-8, 1e-10, 0.0])
@pytest.mark.parametrize("kernel", [Gaussian(2.0), Gaussian(5.0), Matern52(20.0)], ids=repr)
@pytest.mark.parametrize("fits", [True, False])
def test_small_ridges_in_float32(ridge, kernel, fits):
    """The residual is that of an exact solve with the jitter that was said; alpha is never zero."""
    X, Y = smooth_problem(300)
    limit = None if fits else 1.3 * 300**2 * 4 + 300 * 3 * 8
    solution = quietly(kernel, X, Y, ridge=ridge, memory_limit=limit)
    A = reference.kernel_matrix(kernel, X)
    exact = torch.linalg.solve(A + (ridge + solution.jitter) * torch.eye(300, dtype=torch.float64), Y.double())
    want = float((A @ exact + ridge * exact - Y).norm() / Y.norm())
    rounding = 2.0**-24 * float(torch.linalg.matrix_norm(A, 2) * exact.norm() / Y.norm())
    assert solution.residual <= 1.1 * want + 2 * rounding
    assert solution.residual < (0.2 if kernel == Gaussian(2.0) else 0.9)  # wider ones are smooth beyond float32
    assert solution.jitter <= 1e-2
    assert bool(solution.alpha.any())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("ridge", [0.0, 1e-8, 1e-6])
def test_small_ridges_in_a_fit(dtype, ridge):
    X, Y = smooth_problem(300)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = RFMRegressor(Gaussian(2.0), iterations=1, ridge=ridge, dtype=dtype).fit(X, Y[:, 0])
    assert model.score(X, Y[:, 0]) > 0.98


@dtypes
@pytest.mark.parametrize("ridge", [0.0, 1e-6, 1e-3])
def test_contradictions_do_not_spoil_the_other_rows(dtype, ridge, normal):
    X, Y = normal(200, 10, dtype=dtype), normal(200, 2, dtype=dtype, seed=2)
    X[190:] = X[:10]
    solution = quietly(Laplace(5.0), X, Y, ridge=ridge)
    assert solution.jitter <= 1e-2
    K, alpha = reference.kernel_matrix(Laplace(5.0), X), solution.alpha.double()
    R = K @ alpha + ridge * alpha - Y
    # Where the ridge is small, coefficients of copies that contradict are large, and rounding them moves every row.
    rounding = torch.finfo(dtype).eps * (K.square() @ alpha.square()).sqrt()
    assert float(R[10:190].norm()) < 1e-6 * float(Y[10:190].norm()) + float(rounding[10:190].norm())


# ---- alpha's digits


def exact_agop(kernel, X, alpha):
    X, alpha = X.double().numpy(), alpha.double().numpy()
    M = np.zeros((X.shape[1], X.shape[1]))
    for z in X:
        D = X - z
        r = np.sqrt((D * D).sum(1))
        slope = reference.profile(kernel, r)[1]
        g = (np.where(r > 0, -slope / np.where(r > 0, r, 1), 0)[:, None] * alpha).T @ D
        M += g.T @ g
    return torch.from_numpy(M)


@pytest.mark.parametrize("kernel", [Laplace(10.0), Gaussian(3.0), Matern52(10.0)], ids=repr)
@pytest.mark.parametrize("ridge", [0.0, 1e-6, 1e-3])
@pytest.mark.parametrize("center", [False, True])
def test_close_pairs_with_both_labels(kernel, ridge, center, normal, relative, caplog):
    """Nearly singular, but no copies: the digits of alpha that float32 would drop decide about M."""
    X = normal(200, 8, dtype=torch.float32)
    y = ((X[:, 0] + X[:, 1]) > 0).long()
    X[-5:] = X[:5] + 1e-4 * normal(5, 8, dtype=torch.float32, seed=3)
    y[-5:] = 1 - y[:5]
    how = {"iterations": 1, "ridge": ridge, "agop_scale": "sum", "center": center}
    caplog.set_level(logging.INFO, "fastagop")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = RFMClassifier(kernel, **how).fit(X, y)
    assert model.iterations_[0].solution.merged == 0
    if not center:
        M = exact_agop(kernel, X, model.iterations_[0].solution.alpha)
    else:
        M = fastagop.agop(kernel, X.double(), model.iterations_[0].solution.alpha, reduction="sum", center=True)
    assert relative(torch.as_tensor(model.M_), M) <= 1e-5
    if ridge == 0 and kernel != Laplace(10.0):
        assert "computing in float64" in caplog.text


def test_easy_problems_stay_in_float32(normal, caplog):
    caplog.set_level(logging.INFO, "fastagop")
    X = normal(150, 10, dtype=torch.float32)
    DeepRFMClassifier(depth=2, width=64, random_state=0).fit(X, (X[:, 0] > 0).long())
    assert "computing in float64" not in caplog.text


# ---- what users read


def test_reprs_are_short(normal):
    X, events = normal(60, 5, dtype=torch.float32), []
    y = (X[:, 0] > 0).long()
    X[59] = X[0]
    solution = quietly(Laplace(1.0), X, X)
    assert "1 rows merged" in repr(solution)
    assert "residual" in repr(solution)
    watch = [lambda e: events.append(repr(e))]
    deep = DeepRFMClassifier(depth=2, width=32, random_state=0, callbacks=watch).fit(X, y)
    rfm = RFMClassifier(iterations=2, callbacks=watch).fit(X, y)
    texts = [repr(deep.layers_[0]), repr(deep._layers[0]), repr(rfm.iterations_[0]), repr(solution), *events]
    for text in texts:
        assert len(text) <= 400
        assert "tensor(" not in text
        assert "\n" not in text
    assert texts[0].startswith("LayerRecord(NC1 ")
    assert events[0].startswith("LayerEvent(layer 0 of 2, projected 60 x 5, features 60 x 32, ")
    assert events[-1].startswith("IterationEvent(iteration 1 of 2, M 5 x 5, ")


def test_memory_errors_name_what_the_caller_has(normal, little_memory):
    X, Y = normal(200, 4), normal(200, 2)
    with pytest.raises(MemoryError, match=r"method='cg', or raise memory_limit") as error:
        fastagop.solve(Laplace(1.0), X, Y, method="cholesky", memory_limit=1000)
    for model in (
        RFMRegressor(solver="cholesky", memory_limit=1000),
        fastagop.DeepRFMRegressor(depth=1, width=16, solver="cholesky", memory_limit=1000),
    ):
        with pytest.raises(MemoryError, match=r"solver='cg', or raise memory_limit") as error:
            model.fit(X, Y)
        assert "method" not in str(error.value)
    with pytest.raises(MemoryError, match=r"smaller rank in solver=fastagop.ConjugateGradients") as error:
        RFMRegressor(solver="cg", memory_limit=1000).fit(X, Y)
    with pytest.raises(MemoryError, match="raise memory_limit"):
        fastagop.agop(Laplace(1.0), X, Y, memory_limit=1000)
    little_memory(1000)
    for call in (fastagop.kernel_matrix, fastagop.gradients, fastagop.kernel_matmul):
        arguments = {"kernel_matrix": (X,), "gradients": (X, Y), "kernel_matmul": (X, None, Y)}[call.__name__]
        with pytest.raises(MemoryError, match="use fewer points, or free memory") as error:
            call(Laplace(1.0), *arguments)
        assert "memory_limit" not in str(error.value)


# ---- bandwidths


@dtypes
@pytest.mark.parametrize("kernel", [Laplace, Gaussian, Matern52])
@pytest.mark.parametrize(("bandwidth", "words"), [(1e-3, "0 to rounding"), (1e18, "1 to rounding")])
@pytest.mark.parametrize("unit", [1.0, 1e-12, 1e15])
def test_bandwidths_that_say_nothing(dtype, kernel, bandwidth, words, unit, normal):
    X, Y = unit * 30 * normal(100, 5, dtype=dtype), normal(100, 1, dtype=dtype)
    with pytest.warns(fastagop.NumericalWarning, match=f"at bandwidth .*{words}.*a bandwidth of that size") as said:
        solution = fastagop.solve(kernel(unit * bandwidth), X, Y, ridge=1e-2)
    assert len(said) == 1
    text = str(said[0].message)
    assert solution.note in text
    assert f"at bandwidth {unit * bandwidth:.3g} " in text
    typical = float(text.split("typical distance is ")[1].split(":", maxsplit=1)[0])
    assert typical == pytest.approx(float(torch.pdist(X.double()).median()), rel=0.2)


@dtypes
def test_one_pair_that_says_something_is_enough(dtype, normal):
    """Isolated points but for one pair, which no sample need hold: no warning."""
    X, Y = 100 * normal(500, 5, dtype=dtype), normal(500, 1, dtype=dtype)
    X[401] = X[402] + 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fastagop.solve(Laplace(0.1), X, Y, ridge=1e-2).note == ""


@pytest.mark.parametrize(
    "model", [RFMRegressor(Laplace(1e-4)), fastagop.DeepRFMRegressor(Laplace(1e-5), depth=1, width=16)]
)
def test_a_fit_says_it_once(model, normal):
    X = normal(80, 4)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model.fit(X, X[:, 0])
    assert sum("at bandwidth" in str(w.message) for w in said) == 1
    assert all(w.filename == __file__ for w in said)
