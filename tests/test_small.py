"""Small problems, which go a shorter way: the numbers of the reference and of the long way, and what is left to it."""

from __future__ import annotations

import pytest
import torch
from fastagop.kernels import reference
from kernel_cases import CASES, one_of_each_class

from fastagop import Gaussian, Laplace
from fastagop.distributed.engine import Local
from fastagop.estimators import float64_fit, kernel_ridge
from fastagop.solvers import copies

KERNELS = [case.at(3.0).kernel for case in one_of_each_class(CASES)]


def problem(normal, name="spread", n=60, d=7, K=3):
    """(X, Y): Gaussian points; pairs that nearly touch; or far from zero."""
    X, Y = normal(n, d), normal(n, K, seed=2)
    if name == "crowded":
        X = torch.cat([X[: n // 2], X[: n - n // 2] + 1e-5 * normal(n - n // 2, d, seed=3)])
    if name == "far":
        X = X + 1000.0
    return X.float(), Y.float()


def regression(kernel=KERNELS[0], ridge=1e-3, **changes):
    return kernel_ridge.KernelRidge(kernel, ridge, "highest", "auto", **changes)


@pytest.fixture
def long_way(monkeypatch):
    """Calls what it is given where nothing is small."""

    def call(*args, **how):
        with monkeypatch.context() as patch:
            patch.setattr(float64_fit, "fit", lambda *_: None)
            return kernel_ridge.fit_and_agop(*args, **how)

    return call


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("name", ["spread", "crowded", "far"])
@pytest.mark.parametrize("how", [{}, {"center": True}, {"diagonal": True}, {"center": True, "diagonal": True}], ids=str)
def test_is_the_definition(kernel, name, how, normal, relative):
    X, Y = problem(normal, name)
    solved, M, _ = kernel_ridge.fit_and_agop(X, Y, regression(kernel), **how)
    K = reference.kernel_matrix(kernel, X.double(), X.double()) + 1e-3 * torch.eye(len(X), dtype=torch.float64)
    alpha = torch.linalg.solve(K, Y.double())
    rounding = 2.0**-52 * float(torch.linalg.cond(K))
    assert relative(solved.alpha, alpha) <= 4 * rounding
    assert solved.solution.residual <= 1e-12
    assert torch.equal(solved.solution.alpha, solved.alpha)
    g = reference.gradients(kernel, X.double(), alpha, X.double())
    g = g - g.mean(0) if how.get("center") else g
    expected = torch.einsum("icd,ice->de", g, g)
    assert relative(M, expected.diagonal() if how.get("diagonal") else expected) <= 1e-8 + 64 * rounding


@pytest.mark.parametrize("how", [{}, {"center": True}, {"diagonal": True}], ids=str)
@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_is_what_the_long_way_finds(how, ridge, normal, long_way, relative):
    X, Y = problem(normal)
    short, long = (call(X, Y, regression(ridge=ridge), **how) for call in (kernel_ridge.fit_and_agop, long_way))
    assert relative(short[1], long[1]) <= 4e-6
    assert relative(short[0].alpha, long[0].alpha) <= 1e-9
    for name in ("method", "jitter", "rank", "merged", "ridge", "residual_rows", "note", "fallback"):
        assert getattr(short[0].solution, name) == getattr(long[0].solution, name)


def test_marks_and_the_last_solve(normal, relative):
    X, Y = problem(normal)
    marks = []
    solved, _, planned = kernel_ridge.fit_and_agop(X, Y, regression(), mark=marks.append)
    assert marks == ["solve", "agop"]
    assert planned > 8 * 60 * 60
    assert torch.equal(kernel_ridge.solve(X, Y, regression()).alpha, solved.alpha)


def test_points_and_targets_stay_what_they_are(normal):
    X, Y = problem(normal)
    before = X.clone(), Y.clone()
    kernel_ridge.fit_and_agop(X, Y, regression(), center=True)
    assert torch.equal(X, before[0])
    assert torch.equal(Y, before[1])


def taken(X, Y, kernel=KERNELS[0], ridge=1e-3):
    return float64_fit.fit(kernel, X, Y, ridge) is not None


def test_what_is_out_of_the_ordinary_is_left_to_the_long_way(normal):
    X, Y = problem(normal)
    assert taken(X, Y)
    assert not taken(X.double(), Y.double())
    assert not taken(X[:1], Y[:1])
    assert not taken(X, Y[:, :0])
    assert not taken(X * 2.0**30, Y, Laplace(3.0 * 2.0**30))
    assert not taken(X, Y * 2.0**30)
    assert not taken(X, Y * 0.0)
    assert not taken(X, Y, Laplace(1e-3))  # every value is 0 to rounding
    assert not taken(X, Y, Laplace(1e9))  # or 1
    assert not taken(torch.cat([X, X[:5]]), torch.cat([Y, Y[:5]]), ridge=0.0)  # no factor, or no use
    near = X.clone()
    near[1] = near[0] * (1 + 2.0**-23)
    assert not taken(near, Y, Gaussian(3.0), ridge=0.0)
    assert not taken(normal(600, 3, dtype=torch.float32), normal(600, 1, dtype=torch.float32))
    assert not taken(normal(500, 400, dtype=torch.float32), normal(500, 2, dtype=torch.float32), Laplace(30.0))


@pytest.mark.parametrize("changes", [{"memory_limit": 8e4}, {"solver": "cholesky"}], ids=str)
def test_wishes_are_for_the_long_way(changes, normal, monkeypatch):
    X, Y = problem(normal)
    monkeypatch.setattr(float64_fit, "fit", lambda *_: pytest.fail("taken"))
    kernel_ridge.solve(X, Y, regression(**changes))


def test_weights_copies_and_other_engines_are_for_the_long_way(normal, monkeypatch):
    X, Y = problem(normal)

    class Other(Local):
        pass

    monkeypatch.setattr(float64_fit, "fit", lambda *_: pytest.fail("taken"))
    kernel_ridge.solve(X, Y, regression(), Other())
    for rows in (copies.find(X, torch.linspace(1, 2, 60, dtype=torch.float64)), copies.find(torch.cat([X, X[:3]]))):
        points = rows.take(X)
        kernel_ridge.solve(points, torch.cat([Y, Y[:3]])[: len(rows.group)], regression(), rows=rows)


def test_an_agop_beyond_float64_is_for_the_long_way(normal):
    X, Y = problem(normal)
    fitted = float64_fit.fit(Laplace(3.0), X, Y, 1e-3)
    assert fitted is not None
    fitted.solved.alpha.mul_(1e200)
    assert fitted.agop(False, False) is None


@pytest.mark.parametrize("n", [60, 700])
@pytest.mark.parametrize("how", [{}, {"center": True}, {"diagonal": True}], ids=str)
def test_two_columns_that_mirror_each_other_are_one(n, how, normal, relative, monkeypatch):
    """As with the labels of two classes; both are there afterwards."""
    X, y = normal(n, 6, dtype=torch.float32), normal(n, 1, seed=2, dtype=torch.float32)
    seen, plain = [], Local.solve
    monkeypatch.setattr(Local, "solve", lambda *args: seen.append(args[3].shape) or plain(*args))
    solved, M, _ = kernel_ridge.fit_and_agop(X, torch.cat([-y, y], 1), regression(), **how)
    one, half, _ = kernel_ridge.fit_and_agop(X, y, regression(), **how)
    assert torch.equal(solved.alpha, torch.cat([-one.alpha, one.alpha], 1))
    assert torch.equal(solved.solution.alpha, solved.alpha)
    assert relative(M, 2.0 * half) <= 1e-15
    assert torch.equal(kernel_ridge.solve(X, torch.cat([-y, y], 1), regression()).alpha, solved.alpha)
    assert set(seen) <= {(n, 1)}
    other, *_ = kernel_ridge.fit_and_agop(X, torch.cat([y, y], 1), regression(), **how)
    assert relative(other.alpha, torch.cat([one.alpha, one.alpha], 1)) <= 1e-9
