"""The directions of a learnt metric: eigenvectors of M_, their signs, and their correlation with the targets."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastagop
from fastagop import Laplace, RFMClassifier, RFMRegressor, RFMTreeRegressor


def data(n=50, d=5, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d))
    return X, X[:, 0] - 2 * X[:, 1] * X[:, 2]


def model(make=RFMRegressor, **more):
    return make(**{"kernel": Laplace(3.0), "iterations": 2, "dtype": "float64", **more})


@pytest.mark.parametrize("shape", [(50, 5), (12, 20)])
@pytest.mark.parametrize("diagonal", [False, True])
def test_are_eigenvectors(shape, diagonal):
    X, y = data(*shape)
    fit = model(diagonal=diagonal).fit(X, y)
    found = fit.directions(shape[1])
    M = np.diag(fit.M_) if diagonal else fit.M_
    assert found.vectors.shape == (shape[1], shape[1])
    assert np.allclose(found.vectors @ found.vectors.T, np.eye(shape[1]), atol=1e-12)
    assert np.allclose(M @ found.vectors.T, found.vectors.T * found.values, atol=1e-12)
    assert (np.diff(found.values) <= 0).all()
    assert np.allclose(found.values, np.linalg.eigvalsh(M)[::-1], atol=1e-12)
    top = fit.directions(2)
    for a, b in zip(top, found, strict=True):
        assert np.allclose(a, b[:2], rtol=1e-12, atol=1e-12)
    counted = fit.directions()
    assert len(counted.values) == min(shape[0] - 1, shape[1]) if not diagonal else len(counted.values) == shape[1]


@pytest.mark.filterwarnings("ignore:.*no metric was learnt:fastagop.NumericalWarning")
@pytest.mark.parametrize("how", [{"diagonal": True}, {"iterations": 0}, {}, {"k": 14}], ids=str)
def test_no_direction_beyond_those_asked_for_is_written_out(how, tensor_memory):
    """Of many features: (d, d) numbers may not fit."""
    X, y = data(12, 600)
    k = how.get("k", 3)
    fit = model(kernel=Laplace(30.0), **{name: value for name, value in how.items() if name != "k"}).fit(X, y)
    found, taken = tensor_memory(lambda: fit.directions(k))
    assert taken < 8 * 600**2 / 5
    assert np.allclose(found.vectors @ found.vectors.T, np.eye(k), atol=1e-12)


@pytest.mark.parametrize("diagonal", [False, True])
def test_splits_of_a_tree_write_out_few_directions(diagonal, tensor_memory):
    X, y = data(12, 600)
    how = {"iterations": 0, "diagonal": diagonal, "leaf_size": 8, "soft": False, "early_stopping": False}
    tree, taken = tensor_memory(lambda: RFMTreeRegressor(**how).fit(X, y))
    assert len(tree.leaves_) == 2
    assert taken < 8 * 600**2 / 5


@pytest.mark.parametrize("scale", [None, "standard"])
@pytest.mark.parametrize("kind", ["one", "two", "binary", "classes"])
@pytest.mark.parametrize("shape", [(50, 5), (12, 20)])
def test_signs_and_correlations(shape, kind, scale):
    """As NumPy has them, over the training rows: copies that contradict each other, and weights, count as they do."""
    X, y = data(*shape)
    X, y = np.r_[X, X[:2]] * np.linspace(1, 3, shape[1]), np.r_[y, y[:2] + 3.0]
    answers = {"one": y, "two": np.stack([y, X[:, 0]], 1), "binary": y > 0}.get(kind, np.digitize(y, [-1.0, 1.0]))
    make = RFMRegressor if kind in ("one", "two") else RFMClassifier
    fit = model(make, scale=scale).fit(X, answers)
    targets = answers.reshape(len(y), -1) if make is RFMRegressor else answers[:, None] == fit.classes_
    targets = targets[:, 1:] if kind == "binary" else targets
    found = fit.directions(4)
    assert np.allclose(np.linalg.norm(found.vectors, axis=1), 1.0)
    for vector, correlation in zip(found.vectors, found.correlations, strict=True):
        each = [np.corrcoef(X @ vector, target)[0, 1] for target in targets.T.astype(float)]
        strongest = max(each, key=abs)
        assert strongest > 0
        assert correlation == pytest.approx(strongest, rel=1e-7, abs=1e-9)
    weights = np.where(np.arange(len(y)) % 2, 2.0, 1.0)
    twice = np.repeat(np.arange(len(y)), weights.astype(int))
    for a, b in zip(
        model(make).fit(X, answers, weights).directions(2),
        model(make).fit(X[twice], answers[twice]).directions(2),
        strict=True,
    ):
        assert np.allclose(a, b, atol=1e-8)


def test_where_nothing_was_learnt():
    X, y = data()
    plain = model(iterations=0).fit(X, y)
    with pytest.warns(fastagop.NumericalWarning, match="no metric was learnt"):
        found = plain.directions()
    assert np.array_equal(np.abs(found.vectors), np.eye(5))
    assert np.array_equal(found.values, np.ones(5))
    expected = [abs(np.corrcoef(column, y)[0, 1]) for column in X.T]
    assert np.allclose(found.correlations, expected, atol=1e-12)
    few = model().fit(X[:3], np.ones(3)).directions(4)  # M = I, and nothing to be correlated with
    assert few.vectors.shape == (4, 5)
    assert not few.correlations.any()


def test_kinds_and_errors(tmp_path, normal):
    X, y = normal(20, 3), normal(20, seed=2)
    fit = RFMRegressor(iterations=1).fit(X, y)
    found = fit.directions(2)
    assert all(isinstance(value, torch.Tensor) and value.dtype == torch.float32 for value in found)
    fit.save(tmp_path / "model")
    for a, b in zip(fastagop.load(tmp_path / "model").directions(2), found, strict=True):
        assert torch.equal(a, b)
    for k in (0, 4, 1.5, True):
        with pytest.raises((ValueError, TypeError), match="k"):
            fit.directions(k)
