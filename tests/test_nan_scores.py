"""Scores that are NaN are shown as such, count as the worst, and are warned of."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from fastagop import Laplace, RFMClassifier, RFMRegressor, RFMRegressorCV, RFMTreeRegressor, probes

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 3))
y = X[:, 0] + 0.1 * RNG.normal(size=60)
SMALL = {"kernel": Laplace("median"), "iterations": 2, "random_state": 0}
TOLD = "scoring: the score of the validation rows is NaN, which counts as the worst; the squared error"


def nowhere(estimator, X, y):
    return float("nan")


def where_full(estimator, X, y):
    return float("nan") if estimator.diagonal else estimator.score(X, y)


def test_of_a_fit():
    with pytest.warns(UserWarning, match=TOLD) as told:
        model = RFMRegressor(**SMALL, early_stopping=True, scoring=nowhere).fit(X, y)
    assert len(told) == 1
    assert np.isnan(model.validation_score_).all()
    assert model.best_iteration_ == model._validation_ties.argmax()
    scores = iter([float("nan"), -np.inf, float("nan")])
    with pytest.warns(UserWarning, match=TOLD):
        model.set_params(scoring=lambda estimator, X, y: next(scores)).fit(X, y)
    assert model.best_iteration_ == 1


@pytest.mark.filterwarnings("ignore:Only one class is present")
def test_of_scores_that_one_class_leaves_undefined():
    labels = np.where(y > 0, "a", "b")
    one = labels == "a"
    with pytest.warns(UserWarning, match=TOLD):
        model = RFMClassifier(**SMALL, scoring="roc_auc").fit(X, labels, X_val=X[one], y_val=labels[one])
    assert np.isnan(model.validation_score_).all()


def test_of_a_search():
    space = [{"diagonal": True}, {"diagonal": False}]
    with pytest.warns(UserWarning, match=r"\d of \d rows of cv_results_ have no score, since scoring was NaN"):
        search = RFMRegressorCV(space=space, **SMALL, cv=2, scoring=where_full).fit(X, y)
    results = search.cv_results_
    assert np.isnan(results["mean_test_score"]).tolist() == results["param_diagonal"].tolist()
    assert results["rank_test_score"][search.best_index_] == 1
    assert search.best_params_["diagonal"] is False
    assert TOLD in results["note"][0]


@pytest.mark.parametrize("answers", [y, y > 0])
def test_of_probes(answers):
    layers = {"none": X, "some": X.copy()}

    def scoring(estimator, rows, y):
        return next(scores)

    scores = iter([float("nan")] * 4 + [0.5, float("nan"), 0.7, 0.6])
    with pytest.warns(UserWarning, match=f"layer 'none': {TOLD}"), pytest.warns(UserWarning, match="layer 'some': "):
        found = probes.fit(
            layers, answers, scoring=scoring, bandwidths=[1.0], iterations=1, aggregate=False, random_state=0
        )
    assert np.isnan(found.scores["none"])
    assert found.scores["some"] == 0.7
    assert found.best_layer == "some"
    assert "nan" in str(found)
    with pytest.warns(UserWarning, match="scoring: the score of the aggregate is NaN"):
        probes.fit([X], answers, scoring=nowhere, bandwidths=[1.0], iterations=0, random_state=0)


def test_of_a_tree_the_rows_of_all_leaves_count():
    few = {**SMALL, "iterations": 1, "leaf_size": 3, "early_stopping": True}  # R^2 of one row is NaN
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RFMTreeRegressor(**few).fit(X, y)
    with pytest.warns(UserWarning, match=TOLD) as told:
        RFMTreeRegressor(**{**few, "leaf_size": 20}, scoring=nowhere).fit(X, y)
    assert len(told) == 1
