"""RFM with diagonal=True: the AGOP's diagonal alone, in memory that grows with d and not with its square."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from fastagop.kernels import reference
from fastagop.kernels.torch_backend import diagonal as torch_diagonal

from fastagop import Gaussian, Laplace, Matern52, RFMClassifier, RFMRegressor


def gradients(kernel, X, alpha):
    """(n, K, d) in float64 from the definition, written out."""
    return torch.from_numpy(reference.gradients(kernel, X.double(), alpha.double()).numpy())


@pytest.mark.parametrize("kernel", [Laplace(2.0), Gaussian(3.0), Matern52(2.0)], ids=repr)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize(("n", "d", "K"), [(30, 4, 3), (17, 40, 1), (1, 3, 2), (30, 4, 0)])
def test_is_the_diagonal(kernel, weighted, center, n, d, K, normal, relative, monkeypatch):
    monkeypatch.setattr(torch_diagonal, "_COLUMNS", 2 * d)  # two outputs at once
    X, alpha = normal(n, d), normal(n, K, seed=2)
    w = torch.arange(1, n + 1, dtype=torch.float64) if weighted else torch.ones(n, dtype=torch.float64)
    g = gradients(kernel, X, alpha)
    g = g - (w[:, None, None] * g).sum(0) / w.sum() if center else g
    wanted = (w[:, None, None] * g.square()).sum((0, 1))
    how = {"center": center, "roots": w.sqrt() if weighted else None}
    found = torch_diagonal.agop_diagonal(kernel, X, alpha, 7, **how)
    assert relative(found, wanted) <= 1e-12
    narrow = torch_diagonal.agop_diagonal(kernel, X.float(), alpha.float(), 7, **how)
    assert relative(narrow, wanted) <= 1e-5


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_shares_add_up(center, weighted, normal, relative):
    """Two processes, each with its rows, in threads: what they exchange is added."""
    X, alpha, kernel = normal(30, 4), normal(30, 3, seed=2), Laplace(2.0)
    roots = torch.arange(1, 31, dtype=torch.float64).sqrt() if weighted else None
    how = {"center": center, "roots": roots}
    alone = torch_diagonal.agop_diagonal(kernel, X, alpha, 7, **how)
    spans, box, barrier = [(0, 11), (11, 30)], [None, None], threading.Barrier(2, timeout=30)

    def work(rank):
        def total(value):
            box[rank] = value.clone()
            barrier.wait()
            found = box[0] + box[1]
            barrier.wait()
            return found

        return torch_diagonal.agop_diagonal(kernel, X, alpha, 7, span=spans[rank], total=total, **how)

    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(work, [0, 1]):
            assert relative(found, alone) <= 1e-12


def test_near_points_keep_their_digits(cloud, relative):
    """Pairs 1e-4 apart in float32, far from zero."""
    X = cloud("pairs", n=200, d=20).float()
    alpha = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    wanted = gradients(Laplace(2.0), X, alpha).square().sum((0, 1))
    assert relative(torch_diagonal.agop_diagonal(Laplace(2.0), X, alpha, 64), wanted) <= 1e-5


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("ridge", [1e-3, 0.0])
def test_the_estimator_keeps_the_diagonal(dtype, ridge, relative):
    """One iteration: M is the diagonal of the full AGOP's M, divided by its largest entry."""
    X = np.random.default_rng(0).normal(size=(60, 6))
    Y = np.stack([X[:, 0] * X[:, 1], np.sin(X[:, 2])], 1)
    for center in (False, True):
        settings = {"iterations": 1, "dtype": dtype, "ridge": ridge, "center": center, "kernel": Laplace(3.0)}
        full = RFMRegressor(agop_scale="sum", **settings).fit(X, Y)
        thin = RFMRegressor(agop_scale="sum", diagonal=True, **settings).fit(X, Y)
        tolerance = 2e-5 if dtype == "float32" else 1e-10
        np.testing.assert_allclose(thin.M_, np.diag(full.M_), rtol=tolerance)


@pytest.mark.parametrize("make", [RFMRegressor, RFMClassifier])
def test_memory_grows_with_d_only(make, peak_memory):
    """d = 10,000: a d x d matrix would take 400 MB in float32, 800 in float64."""
    n, d = 60, 10_000
    setup = (
        f"X = torch.randn({n}, {d}); y = (X[:, 0] > 0).float()\n"
        f"def model(): return fastagop.{make.__name__}(fastagop.Laplace(100.0), iterations=2, diagonal=True)\n"
        "model().fit(X[:, :50], y)"
    )
    call = "[m := model().fit(X, y), m.predict(X), m.transform(X), m.feature_importances_]"
    assert peak_memory(setup, call) < 100e6
