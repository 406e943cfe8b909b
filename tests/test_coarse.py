"""Coarse fits of a search against fits of the usual kind, and the solver and the gradients of some thousand rows."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from fastagop.kernels import reference

import fastagop
from fastagop import (
    Gaussian,
    GeneralisedLaplace,
    Laplace,
    ProductLaplace,
    RFMClassifierCV,
    RFMRegressor,
    RFMRegressorCV,
)
from fastagop.estimators import kernel_ridge, mixed_fit, rounding
from fastagop.estimators.kernel_ridge import KernelRidge
from fastagop.rfm import trials
from fastagop.solvers import full_refined

SPACE = [
    {"bandwidth": 1.0, "ridge": 1e-3},
    {"bandwidth": 6.0, "ridge": 1e-4, "center": True},
    {"bandwidth": 0.5, "ridge": 0.1, "diagonal": True, "exponent": 0.7},
    {"bandwidth": 2.0, "ridge": 1e-2, "exponent": 1.4, "agop_scale": "mean"},
]


def _rows(case: str):
    """(X, y, weights) of rows that hurt, in float64 as users have them."""
    random = np.random.default_rng(0)
    X = random.standard_normal((90, 5))
    y = X[:, 0] * X[:, 1] + 0.1 * random.standard_normal(90)
    weights = None
    if case == "copies":
        X[45:] = X[:45]
    elif case == "offset":
        X += 1000.0
    elif case == "units":
        X *= 10.0 ** np.arange(-4, 6, 2)
    elif case == "collapsed":  # each half is one point to 1e-4
        X = np.sign(X[:, :1]) * np.ones(5) + 1e-4 * X
        y = np.sign(X[:, 0])
    elif case == "wide":
        X = random.standard_normal((90, 200))
    elif case == "weights":
        weights = random.integers(0, 3, 90).astype(float)
    elif case == "constant":
        X[:, 2] = 7.0
    elif case == "two outputs":
        y = np.stack([y, -y + 1.0], 1)
    return X, y, weights


CASES = ("plain", "copies", "offset", "units", "collapsed", "wide", "weights", "constant", "two outputs")


def _both(model, X, y, weights, monkeypatch):
    coarse = model.fit(X, y, weights).cv_results_
    monkeypatch.setattr(trials.CoarseFold, "usual", lambda self, folds: False)
    full = model.fit(X, y, weights).cv_results_
    return coarse, full


@pytest.mark.filterwarnings("ignore::fastagop.NumericalWarning")
@pytest.mark.parametrize("case", CASES)
def test_coarse_scores_are_those_of_fits(case, monkeypatch):
    X, y, weights = _rows(case)
    how = {"cv": 2, "iterations": 2, "refit": False, "device": "cpu", "n_iter_no_change": None}
    model = RFMRegressorCV(space=SPACE, **how, random_state=0)
    coarse, full = _both(model, X, y, weights, monkeypatch)
    assert not any(coarse["error"])
    assert coarse["coarse"].any()
    assert not full["coarse"].any()
    assert np.abs(coarse["mean_test_score"] - full["mean_test_score"]).max() < 1e-3
    assert np.abs(coarse["mean_test_tie"] - full["mean_test_tie"]).max() < 1e-3 * np.var(y)
    assert coarse["note"].tolist() == full["note"].tolist()


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("scoring", [None, "neg_log_loss"])
def test_coarse_scores_of_a_classifier(classes, scoring, monkeypatch):
    X, y, _ = _rows("plain")
    labels = np.array(["a", "b", "c"])[np.digitize(y, [0.0] if classes == 2 else [-0.5, 0.5])]
    how = {"space": SPACE, "cv": "holdout", "iterations": 2, "refit": False, "device": "cpu"}
    model = RFMClassifierCV(**how, scoring=scoring, n_iter_no_change=None, random_state=0)
    coarse, full = _both(model, X, labels, None, monkeypatch)
    assert coarse["coarse"].all()
    assert np.abs(coarse["mean_test_score"] - full["mean_test_score"]).max() < 1e-3
    assert np.abs(coarse["mean_test_tie"] - full["mean_test_tie"]).max() < 1e-3


def test_float64_and_a_solver_ask_for_fits_of_the_usual_kind():
    X, y, _ = _rows("plain")
    for how in ({"dtype": "float64"}, {"solver": "cholesky"}, {"memory_limit": 1e5}):
        model = RFMRegressorCV(space=SPACE[:1], cv="holdout", iterations=1, refit=False, device="cpu", **how)
        assert not model.fit(X, y).cv_results_["coarse"].any()


def test_a_ridge_of_zero_and_a_bandwidth_that_says_nothing_take_usual_fits():
    X, y, _ = _rows("plain")
    space = [{"ridge": 0.0}, {"bandwidth": 1e-6}, {}]
    model = RFMRegressorCV(space=space, cv="holdout", iterations=1, refit=False, device="cpu", n_iter_no_change=None)
    results = model.fit(X, y).cv_results_
    assert results["coarse"].tolist() == [False, False, False, False, True, True]
    assert "bandwidth" in results["note"][2]


@pytest.mark.parametrize(("patience", "rows"), [(None, 5), (1, 2), (2, 3)])
def test_a_setting_is_given_up(patience, rows):
    X, y, _ = _rows("plain")
    model = RFMRegressorCV(
        space=SPACE[:1], cv=2, iterations=4, refit=False, device="cpu", n_iter_no_change=patience,
        scoring=lambda estimator, X, y: 1.0, dtype="float64",
    )  # fmt: skip
    results = model.fit(X, X[:, 0] * 0.0).cv_results_
    assert results["param_iterations"].tolist() == list(range(rows))
    with pytest.raises(ValueError, match="n_iter_no_change must be"):
        model.set_params(n_iter_no_change=0).fit(X, y)


def _points(n: int, case: str):
    random = torch.Generator().manual_seed(1)
    X = torch.randn(n, 6, generator=random)
    if case == "offset":
        X = X + 500.0
    elif case == "crowded":  # two crowds, near copies within
        X = X.sign()[:, :1] * torch.ones(6) + 1e-3 * X
    Y = torch.stack([torch.tanh(3 * X[:, 0] - X[:, 1]), X[:, 2].sin()], 1)
    return X, Y


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("case", ["plain", "offset", "crowded"])
def test_a_fit_of_more_rows_is_that_of_float64(case, diagonal, center):
    X, Y = _points(600, case)
    kernel = Laplace(2.0)
    regression = KernelRidge(kernel, 1e-2, "highest", "auto")
    solved, M, _ = kernel_ridge.fit_and_agop(X, Y, regression, center=center, diagonal=diagonal)
    assert (solved.solution.method, solved.solution.dtype) == ("cholesky+cg", torch.float32)
    x, y = X.double(), Y.double()
    K = torch.exp(-torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / 2.0)
    alpha = torch.linalg.solve(K + 1e-2 * torch.eye(len(x), dtype=torch.float64), y)
    assert torch.linalg.norm(K @ solved.alpha + 1e-2 * solved.alpha - y) < 2e-9 * torch.linalg.norm(y)
    assert torch.linalg.norm(solved.alpha - alpha) < 1e-6 * torch.linalg.norm(alpha)
    G = reference.gradients(kernel, x, alpha, x)
    G = G - G.mean(0) if center else G
    exact = torch.einsum("icd,ice->de", G, G)
    exact = exact.diagonal() if diagonal else exact
    assert torch.linalg.norm(M - exact) < 1e-5 * torch.linalg.norm(exact)


def test_gradients_that_float32_would_spoil_go_on_in_float64():
    """With a loss that float32 cannot keep to, the other ways take over, and M is as exact."""
    X, Y = _points(600, "crowded")
    fit = mixed_fit.fit(Laplace(2.0), X, Y, 1e-2, weights=True)
    assert isinstance(fit, mixed_fit.MixedFit)
    found = [fit._gradients(dtype) for dtype in (torch.float32, torch.float64)]
    index = fit._telling(found[0][1])
    losses = [rounding.loss_of(G[index], fit._exact(index)) for G, _ in found]
    assert losses[1] < 0.2 * losses[0]


def test_short_sums_come_before_float64(monkeypatch):
    """They lose half and less of what long ones lose, and are left out where that would not do."""
    random = torch.Generator().manual_seed(0)
    X = torch.randn(2000, 10, generator=random)
    Y = (X[:, :1] * X[:, 1:2] + X[:, 2:3]).sub_(1.0)
    fit = mixed_fit.fit(Laplace(10.0), X, Y, 1e-3, weights=True)
    assert isinstance(fit, mixed_fit.MixedFit)
    G, losses = fit._gradients(torch.float32)
    index = fit._telling(losses)
    exact = fit._exact(index)
    long, short = (rounding.loss_of(G[index], exact) for G in (G, fit._gradients(torch.float32, short=True)[0]))
    assert short < 0.7 * long
    ways, gradients = [], mixed_fit.MixedFit._gradients

    def noted(self, dtype, short=False):
        ways.append((dtype, short))
        return gradients(self, dtype, short)

    monkeypatch.setattr(mixed_fit.MixedFit, "_gradients", noted)
    first, second, third = (torch.float32, False), (torch.float32, True), (torch.float64, True)
    expected = fit.agop(False, False)
    for limit, taken in ((2 * long, [first]), (0.9 * long, [first, second]), (0.2 * long, [first, third])):
        ways.clear()
        monkeypatch.setattr(mixed_fit, "_LOSS", limit)
        M = fit.agop(False, False)
        assert ways == taken
        assert torch.linalg.norm(M - expected) < 4 * long * torch.linalg.norm(expected)


@pytest.mark.parametrize("whole", [False, True])
def test_what_memory_held_before_says_nothing_of_a_bandwidth(whole, monkeypatch):
    """Of k(X, X) only one triangle may have been written."""
    empty = full_refined.empty_matrix
    monkeypatch.setattr(full_refined, "empty_matrix", lambda *args: empty(*args).fill_(0.5))
    monkeypatch.setattr(full_refined, "_IN_CACHE", 0 if whole else float("inf"))
    X, Y = _points(700, "plain")
    assert mixed_fit.fit(Gaussian(1e-3), X, Y, 1e-3, weights=True) == ""
    assert isinstance(mixed_fit.fit(Gaussian(3.0), X, Y, 1e-3, weights=True), mixed_fit.MixedFit)


@pytest.mark.parametrize("seed", [50, 52])
def test_errors_that_have_a_direction_in_common_are_seen(seed):
    """Those at the points of largest coefficients cancel by chance (seed 52), those of all others add up."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((900, 1))
    X[:18] *= 30
    X, Y = X.astype(np.float32), rng.standard_normal((900, 5)).astype(np.float32)
    options = {"kernel": Gaussian(4.3), "iterations": 1, "ridge": 1.67e-3, "device": "cpu", "agop_scale": "sum"}
    found, exact = (RFMRegressor(dtype=dtype, **options).fit(X, Y).M_ for dtype in ("float32", "float64"))
    assert np.linalg.norm(found - exact) < 1e-5 * np.linalg.norm(exact)


@pytest.mark.parametrize("spread", [1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("center", [False, True])
def test_a_small_crowd_among_others_spoils_no_metric(spread, center):
    """Its coefficients are small, since they share a label, so that large ones do not tell of it."""
    rng = np.random.default_rng(0)
    X, y = 2 * rng.normal(size=(600, 8)), rng.choice([-1.0, 1.0], 600)
    X[1:14], y[1:14] = X[1] + spread * rng.normal(size=(13, 8)), 1.0
    X = X.astype(np.float32)
    options = {"kernel": Laplace(3.0), "iterations": 1, "ridge": 1e-2, "center": center, "device": "cpu"}
    found, exact = (RFMRegressor(dtype=dtype, **options).fit(X, y).M_ for dtype in ("float32", "float64"))
    assert np.linalg.norm(found - exact) < 1e-5 * np.linalg.norm(exact)


@pytest.mark.parametrize("far", [1e2, 1e4, 1e5])
def test_two_small_groups_far_away_spoil_no_metric(far):
    g = torch.Generator().manual_seed(0)
    X = torch.randn(700, 8, generator=g) * 3
    for start, sign in ((1, 1), (301, -1)):  # between the rows that are looked at wherever they lie
        X[start : start + 20] = torch.randn(20, 8, generator=g) * 0.3 + sign * far
    Y = torch.randint(0, 2, (700, 1), generator=g).float() * 2 - 1
    Y[1:21], Y[301:321] = 1, -1
    _, M, _ = kernel_ridge.fit_and_agop(X, Y, KernelRidge(Laplace(1.0), 1e-3, "highest", "auto"))
    K = reference.kernel_matrix(Laplace(1.0), X)
    alpha = torch.linalg.solve(K + 1e-3 * torch.eye(700, dtype=torch.float64), Y.double())
    G = reference.gradients(Laplace(1.0), X, alpha)
    exact = torch.einsum("icd,ice->de", G, G)
    assert torch.linalg.norm(M - exact) < 1e-5 * torch.linalg.norm(exact)


def test_a_second_try_in_float64_stays_within_the_plan(tensor_memory):
    """Many outputs of many features, crowded so that float32 will not do."""
    g = torch.Generator().manual_seed(0)
    X, Y = torch.randn(600, 500, generator=g), torch.randn(600, 20, generator=g)
    X[300:] = X[:300] + 1e-4 * torch.randn(300, 500, generator=g)
    model = RFMRegressor(Laplace(60.0), 1, diagonal=True, device="cpu")
    _, peak = tensor_memory(lambda: model.fit(X, Y))
    planned = mixed_fit.bytes_of(X, Y)
    assert 0.5 * planned < peak < 1.1 * planned
    told = float(re.search(r"memory +([\d.]+) MB", str(fastagop.explain(model, X, Y)))[1])
    assert planned / 1e6 <= told < 1.1 * planned / 1e6


def test_a_float32_factor_that_fails_gives_way(monkeypatch):
    X, Y = _points(600, "plain")
    model = RFMRegressor(GeneralisedLaplace(2.0, 1.4), 1, device="cpu")
    expected = model.fit(X, Y).predict(X)
    tries = []
    monkeypatch.setattr(full_refined, "factor_", lambda A: tries.append(len(A)))
    solution = model.fit(X, Y).solution_
    assert tries == [600]  # and never again in the fit
    assert solution.fallback.startswith("as before, ")
    assert model.iterations_[0].solution.fallback == full_refined.GAVE_WAY
    assert (solution.method, solution.dtype) == ("cholesky", torch.float64)
    assert "float32 factor" in solution.fallback
    assert torch.allclose(model.predict(X), expected, rtol=0, atol=1e-5)


def test_what_explain_says_is_what_runs():
    X, Y = _points(600, "plain")
    model = RFMRegressor(Laplace(2.0), 1, device="cpu")
    assert "cholesky+cg" in str(fastagop.explain(model, X, Y))
    assert model.fit(X, Y).iterations_[0].solution.method == "cholesky+cg"


@pytest.mark.parametrize("kernel", [ProductLaplace(3.0), 2.0 * Laplace(3.0)], ids=repr)
def test_some_thousand_rows_of_a_kernel_that_is_not_radial(kernel):
    """They have no profile to evaluate in place: the usual solver answers, as for fewer rows."""
    X = torch.randn(600, 4, generator=torch.Generator().manual_seed(0))
    Y = torch.sin(X[:, :1])
    fit = RFMRegressor(kernel, iterations=1, ridge=1e-3).fit(X, Y)
    assert fit.score(X, Y) > 0.99
    assert (fit.solution_.method, fit.solution_.dtype) == ("cholesky", torch.float64)
