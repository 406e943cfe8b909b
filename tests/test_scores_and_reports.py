"""Estimators' scores weigh samples as scikit-learn's do, and a fit warns once for each solve that was altered."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from fastagop import (
    DeepRFMClassifier,
    DeepRFMRegressor,
    Gaussian,
    NumericalWarning,
    RFMClassifier,
    RFMRegressor,
    RFMRegressorCV,
)
from fastagop.rfm.folds import folds_of

RNG = np.random.default_rng(0)
X, Z = RNG.normal(size=(40, 4)), RNG.normal(size=(30, 4))
y, z = (X[:, 0] > 0).astype(int), (Z[:, 0] > 0).astype(int)
WEIGHTS = np.where(np.arange(30) < 10, 5.0, 0.1)
DEEP, RFM = {"depth": 2, "width": 16, "random_state": 0}, {"iterations": 2}


@pytest.mark.parametrize(("kind", "how"), [(DeepRFMClassifier, DEEP), (RFMClassifier, RFM)])
def test_accuracy_weighs_samples(kind, how):
    model = kind(**how).fit(X, y)
    right = model.predict(Z) == z
    assert 0 < right.mean() < 1
    assert model.score(Z, z) == pytest.approx(right.mean(), rel=1e-12)
    weighted = (WEIGHTS * right).sum() / WEIGHTS.sum()
    assert abs(weighted - right.mean()) > 1e-3  # the weights matter here
    assert model.score(Z, z, sample_weight=WEIGHTS) == pytest.approx(weighted, rel=1e-12)


@pytest.mark.parametrize(("kind", "how"), [(DeepRFMRegressor, DEEP), (RFMRegressor, RFM)])
def test_r_squared_weighs_samples(kind, how):
    model = kind(**how).fit(X, np.sin(4 * X[:, 0]))
    target = np.sin(4 * Z[:, 0])
    error = model.predict(Z) - target

    def r_squared(w):
        return 1 - (w * error**2).sum() / (w * (target - (w * target).sum() / w.sum()) ** 2).sum()

    plain, weighted = r_squared(np.ones(30)), r_squared(WEIGHTS)
    assert abs(weighted - plain) > 1e-3
    assert model.score(Z, target) == pytest.approx(plain, rel=1e-9)
    assert model.score(Z, target, sample_weight=WEIGHTS) == pytest.approx(weighted, rel=1e-9)


@pytest.mark.parametrize(
    ("kind", "how", "solves"),
    [
        (DeepRFMClassifier, DEEP, 3),
        (DeepRFMRegressor, {**DEEP, "depth": 1}, 2),
        (RFMClassifier, {"iterations": 2, "ridge": 0.0}, 3),
        (RFMRegressor, {"iterations": 0, "ridge": 0.0}, 1),
        (RFMRegressor, {"iterations": 1, "ridge": 0.0}, 2),
    ],
)
def test_every_altered_solve_is_reported(kind, how, solves):
    """A bandwidth of 1e7: all kernel values are 1 to rounding, so that every solve needs a jitter."""
    model = kind(Gaussian(1e7), **how)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model.fit(X, y)
    records = model.layers_ if hasattr(model, "layers_") else model.iterations_
    altered = [record.solution for record in records] + [model.solution_]
    assert len(altered) == solves
    assert all(solution.jitter > 0 for solution in altered)
    words = [str(warning.message) for warning in said if warning.category is NumericalWarning]
    assert len(words) == solves
    for solution, text in zip(altered, words, strict=True):
        assert f"jitter {solution.jitter:.1e}" in text


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("scoring", "held"), [(None, 2), ("neg_mean_absolute_error", 1)])
def test_a_search_holds_out_the_rows_that_its_score_needs(scoring, held):
    """R^2 is defined for two rows or more; 0.2 of five rows are one."""
    few = {"n_settings": 2, "iterations": 1, "cv": "holdout", "scoring": scoring, "random_state": 0}
    search = RFMRegressorCV(**few).fit(X[:5], X[:5, 0])
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    (fold,) = folds_of(search, torch.from_numpy(X[:5]), X[:5, 0], (None, None), np.random.RandomState(0))
    assert [len(part) for part in fold] == [5 - held, held]


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.uint64])
def test_folds_of_tensors_by_integers_of_any_kind(kind):
    """torch takes uint8 for a mask, and no other short integers: twice the first 20 of 40 rows would be all rows."""
    train = np.tile(np.arange(20), 2)
    found = []
    for dtype, rows in ((np.int64, X), (kind, torch.from_numpy(X))):
        cv = [(train.astype(dtype), np.arange(20, 40).astype(dtype))]
        search = RFMRegressorCV(space=[{}], iterations=0, cv=cv, refit=False).fit(rows, np.sin(4 * X[:, 0]))
        found.append(search.cv_results_["mean_test_score"])
    np.testing.assert_array_equal(*found)
