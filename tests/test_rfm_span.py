"""Fewer points than features: what is learnt in the span of the points is what is learnt in all features."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

import fastagop
from fastagop import Gaussian, Laplace, Matern52, RFMClassifier, RFMRegressor
from fastagop.rfm.metric import Metric

CLOSE = 1e-10


@pytest.fixture
def both(monkeypatch):
    """both(make, *fit): the same fit in the span of its points, and in all features."""

    def fits(make, *data, **more):
        inside = make().fit(*data, **more)
        with monkeypatch.context() as patch:
            patch.setattr(Metric, "before", classmethod(lambda cls, X, diagonal, engine, kernel: cls()))
            full = make().fit(*data, **more)
        assert all(stage.metric.span is None for stage in full._learnt[0])
        return inside, full

    return fits


pytestmark = pytest.mark.filterwarnings("ignore:.*no metric was learnt:fastagop.NumericalWarning")


def wide(n=14, d=30, seed=0):
    """(X, y): fewer rows than features."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d))
    return X, X[:, 0] * X[:, 1] + np.sin(X[:, 2])


def apart(a, b):
    """Relative distance of two arrays."""
    return np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b))


def alike(inside, full, Z, bound=CLOSE):
    """Every answer of two fits for rows Z that lie outside the span."""
    assert apart(inside.M_, full.M_) <= bound
    assert np.array_equal(inside.M_, inside.M_.T)
    assert apart(inside.gradients(Z), full.gradients(Z)) <= bound
    assert apart(inside.feature_importances_, full.feature_importances_) <= bound
    points, others = inside.transform(Z), full.transform(Z)
    # square roots of eigenvalues that are zero: half of the digits
    assert apart(points @ points.T, others @ others.T) <= bound
    ask = "decision_function" if hasattr(inside, "classes_") else "predict"
    assert apart(getattr(inside, ask)(Z), getattr(full, ask)(Z)) <= bound
    stages = [list(model._staged(Z)) for model in (inside, full)]
    assert len(stages[0]) == len(stages[1])
    for a, b in zip(*stages, strict=True):
        assert apart(a, b) <= bound


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"kernel": Gaussian(4.0), "center": True},
        {"kernel": Matern52(5.0), "agop_scale": "mean"},
        {"agop_scale": "sum", "center": True},
        {"scale": "standard"},
        {"iterations": 0},
        {"metric_samples": 9, "random_state": 0},  # the last solve has rows outside the span of the learnt ones
        {"early_stopping": True, "validation_fraction": 0.4, "random_state": 0},
        {"early_stopping": True, "validation_fraction": 0.4, "random_state": 0, "n_iter_no_change": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [RFMClassifier, RFMRegressor])
def test_is_the_full_form(both, make, parameters):
    X, y = wide()
    y = np.where(y > 0, "up", "down") if make is RFMClassifier else y
    settings = {"kernel": Laplace(5.0), "iterations": 3, "dtype": "float64", "ridge": 1e-2, **parameters}
    inside, full = both(lambda: make(**settings), X, y)
    alike(inside, full, wide(6, seed=1)[0])
    if "agop_scale" not in parameters and "scale" not in parameters:
        assert inside.M_.max() == pytest.approx(1.0, rel=1e-14)
    assert np.linalg.eigvalsh(inside.M_).min() >= -1e-13 * np.abs(inside.M_).max()


def test_weights_copies_and_offsets(both):
    X, y = wide()
    X, y = np.r_[X, X[:3]], np.r_[y, y[:3] + 0.1]
    weights = np.r_[np.full(10, 2.0), np.zeros(2), np.ones(5)]
    Z = wide(6, seed=1)[0]

    def make(**more):
        return RFMRegressor(Laplace(5.0), iterations=3, dtype="float64", ridge=1e-2, **more)

    alike(*both(make, X, y, weights), Z)
    written = RFMRegressor(Laplace(5.0), iterations=3, dtype="float64", ridge=1e-2)
    kept = np.repeat(np.arange(17), weights.astype(int))
    written.fit(X[kept], y[kept])
    assert apart(make().fit(X, y, weights).M_, written.M_) <= CLOSE
    near, far = make().fit(X, y), make().fit(X + 1e6, y + 1e6)
    assert apart(far.M_, near.M_) <= 1e-8  # the sum has lost as many digits
    assert apart(far.predict(Z + 1e6) - 1e6, near.predict(Z)) <= 1e-7


@pytest.mark.parametrize("shape", [(1, 3), (2, 3), (2, 1), (1, 1), (3, 40)])
@pytest.mark.filterwarnings("ignore::fastagop.NumericalWarning")
def test_few_points(both, shape):
    X, y = np.random.default_rng(3).normal(size=shape), np.arange(float(shape[0]))
    inside, full = both(lambda: RFMRegressor(Laplace(3.0), iterations=2, dtype="float64"), X, y)
    assert apart(inside.M_, full.M_) <= CLOSE
    assert np.allclose(inside.predict(X + 0.3), full.predict(X + 0.3), rtol=CLOSE, atol=CLOSE)


def test_points_of_lower_rank(both):
    """Points in a plane of many features, and in one point of all but one."""
    rng = np.random.default_rng(0)
    for X in (rng.normal(size=(12, 2)) @ rng.normal(size=(2, 25)), rng.normal(size=(12, 1)) * np.eye(25)[3]):
        y = np.sin(X[:, 3])
        inside, full = both(lambda: RFMRegressor(Laplace(3.0), iterations=3, dtype="float64"), X, y)
        alike(inside, full, rng.normal(size=(5, 25)))


def test_a_constant_predictor(both):
    """M stays I, also for rows outside the span, which the last solve has where rows were held out."""
    X, _ = wide()
    for more in ({}, {"metric_samples": 8, "random_state": 0}):
        inside, full = both(lambda more=more: RFMRegressor(iterations=2, dtype="float64", **more), X, np.ones(14))
        assert np.array_equal(inside.M_, np.eye(30))
        assert np.array_equal(inside.predict(X + 1.0), full.predict(X + 1.0))


def test_rows_beyond_the_span_of_the_learnt_ones(both):
    """The first kernel machine is best, and the last solve has rows that are outside the span in different ways."""
    X, y = wide(20)

    def make():
        falling = iter([1.0, 0.0, 0.0])
        scoring = {"scoring": lambda estimator, X, y: next(falling), "random_state": 0}
        how = {"iterations": 2, "dtype": "float64", "early_stopping": True, "validation_fraction": 0.5, **scoring}
        return RFMRegressor(Laplace(5.0), **how)

    inside, full = both(make, X, y)
    assert inside.best_iteration_ == 0
    alike(inside, full, X[:5] + 0.1)


@pytest.mark.parametrize("diagonal", [False, True])
def test_saved_loaded_and_pickled(tmp_path, diagonal):
    X, y = wide()
    Z = wide(6, seed=1)[0]
    for more in ({}, {"iterations": 0}, {"metric_samples": 8, "random_state": 0}):
        model = RFMRegressor(**{"iterations": 2, "diagonal": diagonal, **more}).fit(X, y)
        model.save(tmp_path / "model")
        for again in (fastagop.load(tmp_path / "model"), pickle.loads(pickle.dumps(model))):
            for ask in (lambda m: m.M_, lambda m: m.predict(Z), lambda m: m.gradients(Z), lambda m: m.transform(Z)):
                assert np.array_equal(ask(again), ask(model))
            for a, b in zip(again.directions(3), model.directions(3), strict=True):
                assert np.array_equal(a, b)
        assert len(list(pickle.loads(pickle.dumps(model)).staged_predict(Z))) == model.get_params()["iterations"] + 1


def test_float32_is_no_worse_than_the_full_form(both):
    X, y = wide(40, 60)
    truth = both(lambda: RFMRegressor(Laplace(5.0), iterations=3, ridge=1e-2, dtype="float64"), X, y)[1]
    inside, full = both(lambda: RFMRegressor(Laplace(5.0), iterations=3, ridge=1e-2), X, y)
    Z = wide(20, 60, seed=1)[0]
    for ask in (lambda m: m.M_, lambda m: m.predict(Z)):
        assert apart(ask(inside), ask(truth)) <= 1.2 * apart(ask(full), ask(truth))


def test_tensors_stay_the_callers(normal):
    """Nothing of the caller's memory is kept, wherever the points come from."""
    for more in ({}, {"metric_samples": 8, "random_state": 0}, {"iterations": 0, "metric_samples": 8}):
        X = normal(20, 3)
        model = RFMRegressor(**{"iterations": 1, "dtype": "float64", **more}).fit(X, torch.zeros(20))
        before = model.predict(normal(4, 3, seed=2)), [part.clone() for part in model.staged_predict(normal(4, 3))]
        mine, theirs = model._centers.untyped_storage().data_ptr(), X.untyped_storage().data_ptr()
        assert mine != theirs
        assert model._learnt[1].untyped_storage().data_ptr() != theirs
        assert len(before) == 2
