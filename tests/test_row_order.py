"""Points are trained on in the order of their classes on CUDA: nothing that a fit gives back may show it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fastagop.kernels.torch_backend import distance

import fastagop
from fastagop import DeepRFMClassifier, DeepRFMRegressor, Laplace, RFMClassifier, RFMRegressor
from fastagop.solvers import copies, row_order

N, D, CLASSES = 150, 12, 4


@pytest.fixture(scope="module")
def data(normal):
    """(X, y, weights): shuffled classes, two copies, a row written with another weight and one without any."""
    y = (torch.arange(N) % CLASSES)[torch.randperm(N, generator=torch.Generator().manual_seed(5))]
    X = 2.0 * normal(CLASSES, D, seed=2)[y] + normal(N, D)
    X[7], y[7] = X[100], y[100]
    weights = torch.ones(N, dtype=torch.float64)
    weights[3], weights[11] = 2.5, 0.0
    return X, y, weights


@pytest.fixture
def sorting(monkeypatch):
    """sorting(on): what CUDA does, on the CPU; it returns the orders that fits have used."""
    used, ordered = [], row_order.ordered

    def turn(on: bool) -> list:
        used.clear()
        monkeypatch.setattr(row_order, "on_gpu", lambda device: on)
        monkeypatch.setattr(row_order, "ordered", lambda rows, order: used.append(order) or ordered(rows, order))
        return used

    return turn


def deep(kind, dtype, **more):
    return kind(Laplace("median"), depth=3, width=32, random_state=0, dtype=dtype, solver="cholesky", **more)


def rfm(kind, dtype, **more):
    return kind(Laplace("median"), iterations=2, dtype=dtype, solver="cholesky", random_state=0, **more)


def given_back(estimator, X) -> dict:
    """Every number that a fit gives back, but seconds and the residual's rounding."""
    found = {"bandwidth": estimator.kernel_.bandwidth, "alpha": estimator.solution_.alpha}
    if hasattr(estimator, "agops_"):
        found |= {f"agop {i}": M for i, M in enumerate(estimator.agops_)}
        found |= {f"alpha {i}": a for i, a in enumerate(estimator.alphas_)}
        found |= {f"nc1 {i} {k}": v for i, layer in enumerate(estimator.layers_) for k, v in layer.nc1.items()}
        found |= {"features": estimator.transform(X)}
    else:
        found |= {"M": estimator.M_}
    answer = estimator.decision_function if hasattr(estimator, "decision_function") else estimator.predict
    return found | {"outputs": answer(X), "merged": estimator.solution_.merged}


def close(one: dict, other: dict, tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        a, b = (torch.as_tensor(np.asarray(v)).double() for v in (value, other[name]))
        assert float((a - b).abs().max()) <= tolerance * float(b.abs().max()), name


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("make", "kind"), [(deep, DeepRFMClassifier), (rfm, RFMClassifier), (deep, DeepRFMRegressor), (rfm, RFMRegressor)]
)
def test_a_fit_does_not_show_the_order(make, kind, dtype, weighted, data, sorting):
    X, y, weights = (value.numpy() for value in data)
    classes = kind in (DeepRFMClassifier, RFMClassifier)
    targets = y if classes else np.stack([np.sin(X[:, 0]), X[:, 1] * X[:, 2]], 1)
    made = []
    for on in (False, True):
        used = sorting(on)
        estimator = make(kind, dtype).fit(X, targets, sample_weight=weights if weighted else None)
        assert bool(used) == (on and classes)  # targets that are no classes are left alone
        made.append(given_back(estimator, X))
    # Coefficients are those of nearly interpolated data: rounding grows by the condition of k(X, X), below 1e4 here.
    close(*made, 2e-9 if dtype == "float64" else 2e-3)


def test_callbacks_and_files_come_in_the_order_given(data, sorting, tmp_path):
    X, y, _ = data
    events = {}
    for on in (False, True):
        sorting(on)
        seen = events.setdefault(on, [])

        def look(event, seen=seen):
            assert torch.equal(event.classes, y)
            seen.append((event.projected.clone(), event.features.clone()))

        estimator = deep(DeepRFMClassifier, "float64", callbacks=(look,), checkpoint_dir=tmp_path / str(on)).fit(X, y)
        estimator.save(tmp_path / f"{on}.st")
        loaded = fastagop.load(tmp_path / f"{on}.st")
        assert torch.equal(loaded.decision_function(X), estimator.decision_function(X))
        module = estimator.to_module()(X)
        assert torch.allclose(module, estimator.decision_function(X), rtol=1e-9, atol=1e-12)
    for plain, ordered in zip(events[False], events[True], strict=True):
        for a, b in zip(plain, ordered, strict=True):
            assert torch.allclose(a, b, rtol=1e-8, atol=1e-9)


def test_a_fit_resumes_in_another_order(data, sorting, tmp_path):
    """A checkpoint's rows are those given: CUDA goes on where the CPU has stopped."""
    X, y, _ = data
    sorting(False)
    whole = deep(DeepRFMClassifier, "float64").fit(X, y)

    class Stop(Exception):
        pass

    def stop(event):
        raise Stop

    with pytest.raises(Stop):
        deep(DeepRFMClassifier, "float64", callbacks=(stop,), checkpoint_dir=tmp_path).fit(X, y)
    assert sorting(True) == []
    resumed = deep(DeepRFMClassifier, "float64", checkpoint_dir=tmp_path).fit(X, y)
    close(given_back(resumed, X), given_back(whole, X), 2e-9)


@pytest.mark.parametrize("weighted", [False, True])
def test_rows_in_order(data, weighted, sorting, monkeypatch):
    """Sorted within a class by the order given; rows, weights and copies come back to where they were."""
    X, y, weights = data
    found = copies.find(X, weights if weighted else None)
    assert row_order.by_class(found, y) is found  # on the CPU
    sorting(True)
    rows = row_order.by_class(found, y)
    assert row_order.by_class(found, None) is found
    assert row_order.by_class(rows, y) is rows  # sorted already
    of_points = y[rows.kept]
    assert torch.equal(of_points, of_points.sort().values)
    for one in range(CLASSES):
        assert torch.equal(rows.kept[of_points == one], found.kept[y[found.kept] == one])
    assert torch.equal(rows.all(rows.take(X), rows.rest(X)), found.all(found.take(X), found.rest(X)))
    assert torch.equal(
        rows.all(rows.weight[:, None], rows.rest(X[:, :1])), found.all(found.weight[:, None], found.rest(X[:, :1]))
    )
    assert (rows.merged, rows.total, rows.plain) == (found.merged, found.total, False)
    A = X[:, :2]
    assert torch.equal(rows.all(rows.means(A), rows.rest(A)), found.all(found.means(A), found.rest(A)))
    coefficients = torch.randn(len(rows.kept), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    order = torch.argsort(y[found.kept], stable=True)
    assert torch.equal(rows.shared(coefficients[order]), found.shared(coefficients))


@pytest.mark.parametrize("tile", [32, 64])
def test_sorted_classes_leave_few_tiles_with_near_pairs(tile, normal, sorting):
    """Ten classes, collapsed: every tile of shuffled points has a near pair, of sorted ones one in ten."""
    sorting(True)
    y = (torch.arange(1280) % 10)[torch.randperm(1280, generator=torch.Generator().manual_seed(1))]
    X, shares = normal(10, 16, seed=2)[y] + 1e-2 * normal(1280, 16), []
    for rows in (copies.find(X), row_order.by_class(copies.find(X), y)):
        x = rows.take(X)
        sq, norms = torch.cdist(x, x).square().fill_diagonal_(torch.inf), x.square().sum(1)
        near = sq < distance.NEAR[torch.float32] * (norms[:, None] + norms)
        shares.append(float(near.unflatten(1, (-1, tile)).any(2).unflatten(0, (-1, tile)).any(1).float().mean()))
    assert shares == pytest.approx([1.0, 0.1])
