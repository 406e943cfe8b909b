"""RFMs that choose their own settings: what is tried, what is held out, what is chosen, and what the results say."""

from __future__ import annotations

import itertools
import pickle
from dataclasses import dataclass

import joblib
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from fastagop.kernels import plan
from fastagop.kernels.radial import Radial
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.feature_selection import SelectFromModel
from sklearn.metrics import accuracy_score, log_loss, make_scorer
from sklearn.model_selection import (
    GroupKFold,
    GroupShuffleSplit,
    LeaveOneGroupOut,
    LeaveOneOut,
    PredefinedSplit,
    StratifiedKFold,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import fastagop
from fastagop import Gaussian, GeneralisedLaplace, Laplace, RFMClassifier, RFMClassifierCV, RFMRegressor, RFMRegressorCV
from fastagop.rfm import settings, trials

SMALL = {"n_settings": 2, "cv": 2, "iterations": 1}
PAIR = [{"bandwidth": 1.0}, {"bandwidth": 0.5, "diagonal": True}]


@pytest.mark.filterwarnings("ignore::fastagop.NumericalWarning")
@parametrize_with_checks([RFMClassifierCV(**SMALL), RFMRegressorCV(**SMALL)])
def test_scikit_learn(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def flowers():
    """(X, labels) of 60 irises, in a random order."""
    X, y = load_iris(return_X_y=True)
    index = np.random.default_rng(0).permutation(len(X))[:60]
    return X[index], np.array(["setosa", "versicolor", "virginica"])[y[index]]


@pytest.fixture(scope="module")
def product():
    """(X, y) of a product of two of five features, which have units of their own."""
    random = np.random.default_rng(1)
    X = random.standard_normal((70, 5))
    return X * [1.0, 100.0, 1e-3, 1.0, 10.0], X[:, 0] * X[:, 1]


def test_every_row_is_a_fit_of_its_own(product):
    """Scores of one fit are those of fits with fewer iterations, and the best row is fitted to all rows."""
    X, y = product
    folds = [(np.arange(40), np.arange(40, 70)), (np.arange(30, 70), np.arange(30))]
    model = RFMRegressorCV(space=PAIR, cv=folds, iterations=2, dtype="float64").fit(X, y)
    results = pd.DataFrame(model.cv_results_)
    assert len(results) == 6
    for _, row in results.iterrows():
        kernel, diagonal = Laplace(("median", row.param_bandwidth)), row.param_diagonal
        single = RFMRegressor(kernel, row.param_iterations, diagonal, scale="standard", dtype="float64")
        for index, (train, test) in enumerate(folds):
            score = single.fit(X[train], y[train]).score(X[test], y[test])
            assert row[f"split{index}_test_score"] == pytest.approx(score, abs=1e-9)
    best = results.mean_test_score.argmax()
    assert (model.best_index_, model.best_params_) == (best, results.params[best])
    assert model.best_score_ == results.mean_test_score[best]
    assert model.best_iteration_ == results.param_iterations[best] == model.best_estimator_.iterations
    kernel = Laplace(("median", model.best_params_["bandwidth"]))
    single = RFMRegressor(kernel, model.best_iteration_, model.best_params_["diagonal"], scale="standard")
    single.set_params(dtype="float64").fit(X, y)
    assert np.array_equal(model.predict(X), single.predict(X))
    assert np.array_equal(model.transform(X), single.transform(X))
    assert model.score(X, y) == single.score(X, y)


def test_results_are_named_as_scikit_learns(flowers):
    model = RFMClassifierCV(n_settings=3, cv=3, iterations=1, random_state=0).fit(*flowers)
    results = model.cv_results_
    splits = [results[f"split{index}_test_score"] for index in range(3)]
    assert {len(column) for column in results.values()} == {6}
    assert np.array_equal(results["mean_test_score"], np.mean(splits, 0))
    assert np.allclose(results["std_test_score"], np.std(splits, 0))
    assert results["rank_test_score"][model.best_index_] == results["rank_test_score"].min() == 1
    assert results["param_iterations"].tolist() == [0, 1] * 3
    assert all(row["ridge"] == ridge for row, ridge in zip(results["params"], results["param_ridge"], strict=True))
    assert (results["mean_fit_time"] > 0).all()
    assert not any(results["error"])
    assert model.n_splits_ == 3


def test_equal_scores_go_to_the_smaller_error_then_to_fewer_iterations(flowers):
    X, y = flowers
    model = RFMClassifierCV(n_settings=4, cv=2, scoring=lambda estimator, X, y: 1.0, random_state=0, iterations=1)
    results = model.fit(X, y).cv_results_
    assert model.best_index_ == results["mean_test_tie"].argmax()
    regressor = RFMRegressorCV(n_settings=3, cv=2, scoring=lambda estimator, X, y: 1.0, iterations=1)
    results = regressor.fit(X, X[:, 0]).cv_results_
    assert regressor.best_index_ == results["mean_test_tie"].argmax()
    regressor.fit(X, X[:, 0] * 0.0)  # everything is equal
    assert (regressor.best_index_, regressor.best_iteration_) == (0, 0)


def test_the_first_setting_is_the_default_one(flowers):
    model = RFMClassifierCV(**SMALL, random_state=0).fit(*flowers)
    first, other = model.cv_results_["params"][::2]
    expected = {"bandwidth": 1.0, "ridge": 1e-3, "diagonal": False, "center": False, "exponent": 1.0, "iterations": 0}
    assert first == expected
    assert first["bandwidth"] != other["bandwidth"]


def test_more_settings_begin_with_the_same_ones():
    draw = [settings.settings_of(None, count, Laplace("median"), np.random.RandomState(3)) for count in (4, 9)]
    assert draw[1][:4] == draw[0]
    assert len({str(setting) for setting in draw[1]}) == 9


def test_settings_are_spread_evenly():
    drawn = settings.settings_of(None, 13, Laplace("median"), np.random.RandomState(5))[1:]
    for name, each in (("diagonal", 6), ("center", 6), ("exponent", 4)):
        assert set(np.unique([setting[name] for setting in drawn], return_counts=True)[1]) == {each}
    for name, low, high in (("bandwidth", 0.2, 8.0), ("ridge", 1e-4, 3.0)):
        shares = np.sort([np.log(setting[name] / low) / np.log(high / low) for setting in drawn])
        assert 0 <= shares[0] < shares[-1] <= 1
        assert np.diff(np.r_[shares, 1 + shares[0]]).max() < 0.2  # twelve random ones leave 0.26 as a rule


def test_distributions_of_scipy():
    space = {"ridge": scipy.stats.loguniform(1e-3, 1.0), "bandwidth": settings.LogUniform(0.5, 2.0)}
    drawn = settings.settings_of(space, 5, Laplace("median"), np.random.RandomState(0))
    assert all(type(setting["ridge"]) is float and 1e-3 <= setting["ridge"] <= 1.0 for setting in drawn)
    assert 0.5 <= settings.LogUniform(0.5, 2.0).rvs(np.random.RandomState(0)) <= 2.0


def test_a_space_of_lists_ends_where_it_is_tried():
    space = {"diagonal": [False, True], "ridge": np.array([1e-3, 1.0])}
    drawn = settings.settings_of(space, 20, Laplace("median"), np.random.RandomState(0))
    assert len(drawn) == 4


@pytest.mark.parametrize(
    ("kernel", "setting", "expected"),
    [
        (Laplace("median"), {}, Laplace("median")),
        (Laplace("median"), {"bandwidth": 0.5}, Laplace(("median", 0.5))),
        (Laplace(("median", 4.0)), {"bandwidth": 0.5}, Laplace(("median", 2.0))),
        (Laplace(10.0), {"bandwidth": 0.5}, Laplace(5.0)),
        (Laplace(10.0), {"exponent": 1.5}, GeneralisedLaplace(10.0, 1.5)),
        (GeneralisedLaplace("median", 1.5), {"bandwidth": 2.0}, GeneralisedLaplace(("median", 2.0), 1.5)),
        (GeneralisedLaplace("median", 1.5), {"exponent": 1.0}, Laplace("median")),
        (Gaussian("median"), {"bandwidth": 2.0}, Gaussian(("median", 2.0))),
    ],
    ids=str,
)
def test_kernels_of_settings(kernel, setting, expected):
    assert settings.kernel_of(kernel, setting) == expected


def test_a_family_with_an_exponent_says_so_itself():
    @dataclass(frozen=True)
    class Family(Radial):
        power: float

        @property
        def family_exponent(self):
            return self.power

        def with_exponent(self, exponent):
            return Family(self.bandwidth, exponent)

    kernel = Family("median", 3.0)
    assert "exponent" in settings.default_space(kernel)
    (first,) = settings.settings_of({"exponent": [2.0]}, 1, kernel, np.random.RandomState(0))
    assert first == {"exponent": 3.0}
    assert settings.kernel_of(kernel, {"exponent": 2.0, "bandwidth": 0.5}) == Family(("median", 0.5), 2.0)


def test_kernels_without_an_exponent(flowers):
    model = RFMClassifierCV(**SMALL, kernel=Gaussian("median")).fit(*flowers)
    assert "exponent" not in model.best_params_
    with pytest.raises(ValueError, match="exponent is a setting of Laplace"):
        model.set_params(space=[{"exponent": 1.2}]).fit(*flowers)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("space", {"bandwith": [1.0]}, "a name in space must be one of 'bandwidth', 'ridge'"),
        ("space", [{"gamma": 1.0}], "a name in space must be one of 'bandwidth', 'ridge'"),
        ("space", [], "space must hold at least one setting"),
        ("space", "wide", "space must be a dict"),
        ("space", [1.0], "space must be a list of settings"),
        ("space", {"ridge": 1.0}, "space\\['ridge'\\] must be a list"),
        ("space", {"ridge": {1.0, 2.0}}, "space\\['ridge'\\] must be a list"),
        ("space", [{"ridge": -1.0}], "ridge must be a finite number >= 0"),
        ("space", [{"bandwidth": "wide"}], "bandwidth must be a number"),
        ("n_settings", 0, "n_settings must be an integer >= 1"),
        ("average", 0, "average must be an integer >= 1"),
        ("cv", "loo", "cv must be one of 'holdout'"),
        ("cv", 1, "cv must be an integer >= 2"),
        ("cv", 2.5, "cv must be a number of folds"),
        ("cv", 100, "^cv=100: .*n_splits=100"),
        ("cv", [(1, 2, 3)], "^cv: too many values to unpack"),
        ("cv", [(0, 1)], r"^cv must give indices of rows, or masks \(60,\), got shape \(\) in fold 0"),
        ("cv", [(np.arange(9) < 5, np.arange(9) >= 5)], r"^cv must give .* masks \(60,\), got shape \(9,\) in fold 0"),
        ("validation_fraction", 1.0, "validation_fraction must be a number between 0 and 1"),
        ("refit", "yes", "refit"),
        ("n_jobs", True, "n_jobs must be None or a whole number other than 0"),
        ("n_jobs", 0, "n_jobs must be None or a whole number other than 0"),
        ("n_jobs", "all", "n_jobs must be None or a whole number other than 0"),
        ("time_limit", -1, "time_limit must be"),
        ("iterations", -1, "iterations must be"),
        ("scale", "log", "scale must be"),
        ("scoring", "best", "scoring must be"),
        ("scoring", ["accuracy", "f1"], r"^scoring must be .* got \['accuracy', 'f1'\]; one score decides"),
        ("kernel", "laplace", "kernel must be"),
        ("class_weight", 3, "class_weight must be"),
    ],
)
def test_bad_parameters_are_named(name, value, error, flowers):
    holdout = {"cv": "holdout"} if name == "validation_fraction" else {}
    with pytest.raises((ValueError, TypeError), match=error):
        RFMClassifierCV(**{**SMALL, **holdout, name: value}).fit(*flowers)


def test_what_is_held_out(flowers):
    X, y = flowers
    seen = []

    def score(estimator, X, y):
        seen.append(len(y))
        return 0.0

    RFMClassifierCV(**{**SMALL, "cv": "holdout"}, scoring=score, refit=False).fit(X, y)
    assert set(seen) == {12}
    seen.clear()
    weights = np.r_[np.zeros(20), np.ones(40)]
    RFMClassifierCV(**{**SMALL, "cv": 4}, scoring=score, refit=False).fit(X, y, weights)
    assert set(seen) == {10}
    folds = PredefinedSplit(np.r_[np.full(45, -1), np.zeros(15)])
    seen.clear()
    RFMClassifierCV(**{**SMALL, "cv": folds}, scoring=score, refit=False).fit(X, y)
    assert set(seen) == {15}
    pairs = [(np.arange(20), np.arange(20, 60)), (np.arange(20, 60), np.arange(20))]
    with pytest.raises(ValueError, match="cv: fold 0 has no rows to train on whose sample_weight is above 0"):
        RFMClassifierCV(**{**SMALL, "cv": pairs}).fit(X, y, weights)
    by_splitter = RFMClassifierCV(**{**SMALL, "cv": StratifiedKFold(2)}, random_state=0).fit(X, y)
    by_pairs = RFMClassifierCV(**{**SMALL, "cv": list(StratifiedKFold(2).split(X, y))}, random_state=0).fit(X, y)
    assert np.array_equal(by_splitter.cv_results_["split1_test_score"], by_pairs.cv_results_["split1_test_score"])


@pytest.mark.parametrize("splitter", [GroupKFold(2), LeaveOneGroupOut(), GroupShuffleSplit(2)], ids=repr)
def test_splitters_of_groups_say_what_to_pass(flowers, splitter):
    X, y = flowers
    text = rf"^cv: {type(splitter).__name__} needs groups; pass list\(splitter.split\(X, y, groups\)\) as cv$"
    with pytest.raises(ValueError, match=text):
        RFMClassifierCV(**{**SMALL, "cv": splitter}).fit(X, y)
    folds = list(splitter.split(X, y, np.arange(60) // 2 % 2))
    assert RFMClassifierCV(**{**SMALL, "cv": folds}, refit=False).fit(X, y).n_splits_ == 2


def test_weights_are_copies(flowers):
    X, y = flowers
    weights = np.random.default_rng(0).integers(0, 3, 60)
    folds, copied = [np.arange(0, 60, 2), np.arange(1, 60, 2)], np.repeat(np.arange(60), weights)
    options = {"n_settings": 3, "iterations": 1, "random_state": 0, "dtype": "float64"}
    weighted = RFMClassifierCV(cv=[folds, folds[::-1]], **options).fit(X, y, weights)
    pairs = [np.flatnonzero(copied % 2 == part) for part in (0, 1)]
    repeated = RFMClassifierCV(cv=[pairs, pairs[::-1]], **options).fit(X[copied], y[copied])
    for name in ("mean_test_score", "split0_test_score"):
        assert np.allclose(weighted.cv_results_[name], repeated.cv_results_[name], rtol=1e-12)
    assert np.allclose(weighted.predict_proba(X), repeated.predict_proba(X), atol=1e-8)
    assert weighted.score(X, y, weights) == pytest.approx(repeated.score(X[copied], y[copied]))


def test_scorers_with_and_without_weights(flowers):
    X, y = flowers
    weights = np.random.default_rng(0).random(60) + 0.1
    plain = RFMClassifierCV(**SMALL, scoring=lambda estimator, X, y: accuracy_score(y, estimator.predict(X)))
    plain.fit(X, y, weights)
    assert set(np.round(plain.cv_results_["split0_test_score"] * 30, 9) % 1) == {0.0}
    made = RFMClassifierCV(**SMALL, scoring=make_scorer(accuracy_score), random_state=0).fit(X, y, weights)
    own = RFMClassifierCV(**SMALL, random_state=0).fit(X, y, weights)
    assert np.array_equal(made.cv_results_["mean_test_score"], own.cv_results_["mean_test_score"])


def test_score_is_that_of_the_scorer(product, flowers):
    X, y = flowers
    model = RFMClassifierCV(**SMALL, scoring="neg_log_loss", random_state=0).fit(X, y)
    assert model.score(X, y) == pytest.approx(-log_loss(y, model.predict_proba(X)))
    assert (model.cv_results_["mean_test_score"] < 0).all()
    regressor = RFMRegressorCV(**SMALL, scoring="neg_mean_squared_error").fit(*product)
    assert regressor.score(*product) == pytest.approx(-np.square(regressor.predict(product[0]) - product[1]).mean())


def test_masks_are_folds(flowers):
    X, y = flowers
    half = np.arange(60) % 2 == 0
    masks = RFMClassifierCV(**{**SMALL, "cv": [(half, ~half)]}).fit(X, y)
    places = RFMClassifierCV(**{**SMALL, "cv": [(np.flatnonzero(half), np.flatnonzero(~half))]}).fit(X, y)
    assert np.array_equal(masks.cv_results_["mean_test_score"][:2], places.cv_results_["mean_test_score"][:2])


def test_the_best_few_answer_by_the_mean_of_their_outputs(product, flowers):
    X, y = product
    model = RFMRegressorCV(n_settings=4, cv=2, iterations=1, average=3, random_state=0, dtype="float64").fit(X, y)
    assert len(model.estimators_) == 3
    assert model.best_estimator_ is model.estimators_[0]
    assert np.allclose(model.predict(X), np.mean([each.predict(X) for each in model.estimators_], 0))
    rows = pd.DataFrame(model.cv_results_).groupby("param_bandwidth").mean_test_score.max().sort_values()
    best = [each.kernel.bandwidth for each in model.estimators_]
    factors = [1.0 if bandwidth == "median" else bandwidth[1] for bandwidth in best]
    assert factors == rows.index[::-1][:3].tolist()
    X, labels = flowers
    classifier = RFMClassifierCV(**SMALL, average=5).fit(X, labels)
    assert len(classifier.estimators_) == 2
    mean = np.mean([each.decision_function(X) for each in classifier.estimators_], 0)
    assert np.allclose(classifier.decision_function(X), mean)
    assert np.array_equal(classifier.predict(X), classifier.classes_[mean.argmax(1)])
    assert np.allclose(classifier.predict_proba(X).sum(1), 1.0)


def fails_where_diagonal(estimator, X, y):
    """A scorer that refuses some estimators."""
    if estimator.diagonal:
        raise ArithmeticError("no diagonal")
    return estimator.score(X, y)


def test_a_fit_that_fails_is_a_row(flowers):
    model = RFMClassifierCV(space=PAIR, cv=2, iterations=1, scoring=fails_where_diagonal)
    with pytest.warns(UserWarning, match="1 of 2 settings failed.*ArithmeticError: no diagonal"):
        model.fit(*flowers)
    results = model.cv_results_
    assert results["error"].tolist() == ["", "", *["ArithmeticError: no diagonal"] * 2]
    assert np.isnan(results["mean_test_score"]).tolist() == [False, False, True, True]
    assert results["rank_test_score"].tolist()[2:] == [3, 3]
    assert model.best_params_["diagonal"] is False
    with pytest.raises(ValueError, match="every setting failed, the first with ArithmeticError: no diagonal"):
        model.set_params(space=PAIR[1:]).fit(*flowers)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_fold_whose_labels_were_not_learnt_scores_nothing(dtype):
    """As where one group has a class to itself: scikit-learn's searches count these rows as wrong."""
    X, y = np.random.default_rng(0).normal(size=(12, 2)), np.array([0, 1] * 4 + [2] * 4)
    folds = [(np.arange(8), np.arange(8, 12)), (np.arange(12)[::2], np.arange(12)[1::2])]
    model = RFMClassifierCV(n_settings=1, cv=folds, iterations=1, dtype=dtype, kernel=Laplace(3.0)).fit(X, y)
    assert model.cv_results_["split0_test_score"].tolist() == [0.0] * len(model.cv_results_["params"])
    assert "such as 2: 4 of 4 rows count as wrong" in model.cv_results_["note"][0]
    assert model.cv_results_["error"][0] == ""


def test_a_search_without_any_score_says_so():
    X = np.random.default_rng(0).normal(size=(12, 2))
    model = RFMRegressorCV(n_settings=1, cv=LeaveOneOut(), iterations=1, kernel=Laplace(3.0))
    with pytest.warns(UserWarning, match=r"best mean score is nan, .*squared error.*R\^2 score is not well-defined"):
        model.fit(X, X[:, 0])
    assert np.isnan(model.best_score_)


def test_a_setting_that_fails_late_has_no_score(flowers):
    """Not even of the iterations before: the best row would not be the first of the ranks."""
    asked = itertools.count()

    def fails_once(estimator, X, y):
        if next(asked) == 3:  # the second fold, after one AGOP
            raise ArithmeticError("late")
        return float((estimator.predict(X) == y).mean())

    space = [{}, {"ridge": 1e4}]  # the second one predicts badly
    model = RFMClassifierCV(space=space, cv=2, iterations=1, scoring=fails_once, n_iter_no_change=None, random_state=0)
    with pytest.warns(UserWarning, match="1 of 2 settings failed"):
        model.fit(*flowers)
    assert np.isnan(model.cv_results_["mean_test_score"]).tolist() == [True, True, False, False]
    assert model.best_index_ >= 2
    assert model.cv_results_["rank_test_score"][model.best_index_] == 1


def test_means_that_differ_by_rounding_share_a_rank():
    shares = np.array([[0.1, 0.3], [0.2, 0.2], [0.3, 0.1]])  # of three folds, after 0 and 1 AGOPs
    assert shares.mean(0)[0] != shares.mean(0)[1]
    trial = trials.Trial(shares, np.zeros((3, 2)), np.zeros(3), "", "", True)
    assert trials.table([{"ridge": 1.0}], [trial])["rank_test_score"].tolist() == [1, 1]


def test_what_fits_warn_about_is_a_note(flowers, recwarn):
    model = RFMClassifierCV(space=[{}, {"bandwidth": 1e-6}], cv=2, iterations=1).fit(*flowers)
    assert not [warning for warning in recwarn if issubclass(warning.category, fastagop.NumericalWarning)]
    notes = model.cv_results_["note"].tolist()
    assert notes[:2] == ["", ""]
    assert "every kernel value of two different points is 0" in notes[2]


@pytest.mark.parametrize("limit", [None, 7e6])
def test_settings_that_are_tried_at_a_time_share_the_memory(limit, flowers, monkeypatch):
    """Coarse fits and others: each of them would take most of what is free."""
    monkeypatch.setattr(plan, "available_bytes", lambda device: 10**9)
    seen, tried = [], trials._trial

    def trial(model, *given):
        seen.append(model._regression_and_rules()[0].memory_limit)
        return tried(model, *given)

    monkeypatch.setattr(trials, "_trial", trial)
    for jobs, share in ((None, None), (1, None), (2, 9 * 10**8 // 2), (8, 9 * 10**8 // 4)):
        seen.clear()
        with joblib.parallel_config(backend="threading"):
            RFMClassifierCV(**{**SMALL, "n_settings": 4}, n_jobs=jobs, memory_limit=limit, refit=False).fit(*flowers)
        assert seen == [share if limit is None else limit] * 4


def test_jobs_do_not_matter(flowers):
    """Two processes at a time find the bits of one."""
    models = [RFMClassifierCV(**SMALL, random_state=0, n_jobs=jobs).fit(*flowers) for jobs in (1, 2)]
    for name in ("mean_test_score", "mean_test_tie"):
        assert np.array_equal(*(model.cv_results_[name] for model in models))
    assert np.array_equal(*(model.predict_proba(flowers[0]) for model in models))


def test_a_time_limit_leaves_settings_out(flowers):
    model = RFMClassifierCV(**SMALL, time_limit=0.0)
    with pytest.warns(UserWarning, match="1 of 2 settings left out"):
        model.fit(*flowers)
    assert model.stopped_ == "time_limit of 0 s: 1 of 2 settings left out"
    assert len(model.cv_results_["params"]) == 2
    assert RFMClassifierCV(**SMALL, time_limit=1e6).fit(*flowers).stopped_ == ""


def test_without_refit(flowers):
    model = RFMClassifierCV(**SMALL, refit=False).fit(*flowers)
    assert model.best_params_["iterations"] in (0, 1)
    assert not hasattr(model, "predict")
    assert not hasattr(model, "best_estimator_")
    assert not hasattr(model, "feature_importances_")
    for what, call in (
        ("score", lambda: model.score(*flowers)),
        ("feature_importances_", lambda: model.feature_importances_),
    ):
        with pytest.raises(AttributeError, match=rf"^{what} needs .* which refit=False leaves out; use refit=True$"):
            call()


def test_frames_tensors_and_pipelines(flowers):
    X, y = flowers
    frame = pd.DataFrame(X, columns=["a", "b", "c", "d"])
    model = RFMClassifierCV(**SMALL, random_state=0).fit(frame, y)
    assert model.feature_names_in_.tolist() == model.best_estimator_.feature_names_in_.tolist() == ["a", "b", "c", "d"]
    assert model.score(frame, y) > 0.9
    assert model.set_output(transform="pandas").transform(frame).shape == (60, 4)
    codes = torch.from_numpy(np.unique(y, return_inverse=True)[1])
    tensor = RFMClassifierCV(**SMALL, random_state=0).fit(torch.from_numpy(X), codes)
    assert isinstance(tensor.predict(torch.from_numpy(X)), torch.Tensor)
    assert np.array_equal(tensor.cv_results_["mean_test_score"], model.cv_results_["mean_test_score"])
    chain = make_pipeline(StandardScaler(), clone(model)).fit(X, y)  # settings scale again, which changes nothing
    assert np.array_equal(chain[-1].cv_results_["mean_test_score"], model.cv_results_["mean_test_score"])


def test_saved_and_pickled(flowers, tmp_path):
    X, y = flowers
    model = RFMClassifierCV(**SMALL, random_state=0).fit(X, y)
    model.best_estimator_.save(tmp_path / "best.safetensors")
    loaded = fastagop.load(tmp_path / "best.safetensors")
    assert isinstance(loaded, RFMClassifier)
    again = pickle.loads(pickle.dumps(model))
    for other in (loaded, again):
        assert np.array_equal(other.predict_proba(X), model.predict_proba(X))


def test_feature_importances_are_those_of_the_best(product):
    X, y = product
    model = RFMRegressorCV(**SMALL, average=2, random_state=0)
    assert not hasattr(model, "feature_importances_")
    importances = model.fit(X, y).feature_importances_
    assert np.array_equal(importances, model.best_estimator_.feature_importances_)
    assert set(importances.argsort()[-2:]) == {0, 1}
    chosen = SelectFromModel(clone(model), max_features=2, threshold=-np.inf).fit(X, y)
    assert chosen.get_support().tolist() == [True, True, False, False, False]
    assert SelectFromModel(model, prefit=True).transform(X).shape == (70, 2)
    assert not hasattr(RFMRegressorCV(**SMALL, refit=False).fit(X, y), "feature_importances_")


def test_several_targets(product):
    X, y = product
    model = RFMRegressorCV(**SMALL).fit(X, np.stack([y, X[:, 0]], 1))
    assert model.predict(X).shape == (70, 2)
    assert model.predict(X.astype(np.float32)).dtype == np.float64  # as the targets
