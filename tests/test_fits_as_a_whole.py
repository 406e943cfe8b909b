"""A fit that fails leaves what there was; scorers, folds and class weights that meet rows of few classes."""

import warnings

import numpy as np
import pandas as pd
import pytest
from fastagop.kernels.errors import restated
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import KFold, cross_val_score

import fastagop
from fastagop import (
    DeepRFMClassifier,
    DeepRFMRegressor,
    Laplace,
    RFMClassifier,
    RFMClassifierCV,
    RFMRegressor,
    RFMRegressorCV,
    RFMTreeRegressor,
    probes,
)
from fastagop.rfm import validation

rng = np.random.RandomState(0)
X = rng.randn(60, 4)
y = 2.0 * X[:, 0]
labels = np.where(y > 0, "p", "n")
rare = np.repeat([0, 1, 2], [30, 28, 2])


def interrupt(event):
    raise KeyboardInterrupt


# ---- fits that fail


@pytest.mark.parametrize(
    ("model", "breaks", "error"),
    [
        (RFMRegressor(iterations=1), {"memory_limit": 2000.0}, MemoryError),
        (RFMRegressor(iterations=1), {"callbacks": [interrupt]}, KeyboardInterrupt),
        (DeepRFMRegressor(depth=2, width=16, random_state=0), {"callbacks": [interrupt]}, KeyboardInterrupt),
        (RFMTreeRegressor(iterations=1, leaf_size=30), {"memory_limit": 2000.0}, MemoryError),
        (RFMRegressorCV(n_settings=1, iterations=1), {"cv": []}, ValueError),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_fit_that_fails_changes_nothing(model, breaks, error):
    before = model.fit(X, y).predict(X[:5])
    with pytest.raises(error):
        model.set_params(**breaks).fit(X[:, :3], y + 1000)
    assert np.array_equal(model.predict(X[:5]), before)
    assert model.n_features_in_ == 4


@pytest.mark.parametrize("model", [RFMClassifier(iterations=1), DeepRFMClassifier(depth=1, width=16)])
def test_a_first_fit_that_fails_leaves_nothing(model):
    with pytest.raises(KeyboardInterrupt):
        model.set_params(callbacks=[interrupt]).fit(X, labels)
    assert not hasattr(model, "classes_")
    assert not hasattr(model, "n_features_in_")


def test_a_search_without_refit_keeps_no_machine():
    search = RFMClassifierCV(n_settings=1, iterations=1, cv=2).fit(X, labels)
    search.set_params(refit=False).fit(X[:, :3], labels)
    assert not hasattr(search, "best_estimator_")
    with pytest.raises(
        NotFittedError, match=r"^score needs an estimator fitted to all rows, which refit=False leaves out"
    ):
        search.score(X[:, :3], labels)


# ---- scorers


def test_a_scorer_asks_for_the_rows_it_is_given():
    def elsewhere(model, X, y):
        return model.score(X * 0 + 1e3, y)

    def copied(model, X, y):
        return model.score(X.copy(), y)

    with pytest.raises(ValueError, match="asks for outputs of other rows than those it is given"):
        RFMRegressor(iterations=1, scoring=elsewhere).fit(X, y, X_val=X, y_val=y)
    model = RFMRegressor(iterations=1, scoring=copied).fit(X, y, X_val=X, y_val=y)
    plain = RFMRegressor(iterations=1).fit(X, y, X_val=X, y_val=y)
    assert np.array_equal(model.validation_score_, plain.validation_score_)


def test_the_mean_of_a_few_answers_for_any_rows():
    """A scorer of a search that has been fitted may ask about rows of its own."""
    search = RFMRegressorCV(n_settings=3, average=2, iterations=1, random_state=0).fit(X, y)
    search.scorer_ = lambda model, X, y: model.predict(X + 1.0).sum()
    assert len(search.estimators_) == 2
    mean = np.mean([model.predict(X + 1.0) for model in search.estimators_], axis=0)
    assert search.score(X, y) == pytest.approx(mean.sum(), rel=1e-5)


@pytest.mark.parametrize("scoring", ["neg_log_loss", "roc_auc_ovr"])
def test_a_class_that_no_validation_row_has(scoring):
    X_val, y_val = X[:40], rare[:40]  # of two classes
    with pytest.warns(UserWarning, match="no validation row has the label 2") as told:
        model = RFMClassifier(iterations=2, scoring=scoring).fit(X, rare, X_val=X_val, y_val=y_val)
    assert len([one for one in told if "no validation row" in str(one.message)]) == 1
    assert np.isnan(model.validation_score_).all()


def test_held_out_rows_have_every_class_that_has_two():
    codes = np.repeat([0, 1, 2, 3], [100, 95, 4, 1])
    for seed in range(20):
        stay, out = validation.split(200, codes, 20, np.random.RandomState(seed))
        assert len(out) == 20
        assert sorted([*stay, *out]) == list(range(200))
        assert set(codes[out]) >= {0, 1, 2}
        assert set(codes[stay]) >= {0, 1, 2}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        X = np.random.RandomState(0).randn(199, 3)
        RFMClassifier(iterations=1, early_stopping=True, scoring="neg_log_loss", random_state=0).fit(X, codes[:199])


def test_two_rows_held_out_of_three_classes():
    stay, out = validation.split(6, np.array([0, 0, 1, 1, 2, 2]), 2, np.random.RandomState(0))
    assert len(out) == 2
    assert len(stay) == 4


@pytest.mark.parametrize(
    ("sizes", "held", "counts"),
    [
        ([3, 1], 1, [1, 0]),
        ([2, 1, 7, 1], 2, [1, 0, 1, 0]),
        ([40, 1, 20], 12, [8, 0, 4]),  # a class of one row leaves the others divided by class
        ([1, 1, 1], 2, None),  # no other rows can be held out
    ],
)
def test_the_row_of_a_class_of_one_is_learnt_from(sizes, held, counts):
    """Held out, it would leave the metric without its class."""
    codes = np.repeat(np.arange(len(sizes)), sizes)
    for seed in range(10):
        stay, out = validation.split(len(codes), codes, held, np.random.RandomState(seed))
        assert sorted([*stay, *out]) == list(range(len(codes)))
        assert len(out) == held
        assert counts is None or np.bincount(codes[out], minlength=len(sizes)).tolist() == counts


# ---- folds


@pytest.mark.parametrize(
    ("cv", "error", "message"),
    [
        ([], ValueError, "cv gave no folds"),
        ([(np.arange(30), [])], ValueError, "cv: fold 0 has no rows to test on"),
        ([(np.arange(30), np.array([0.5]))], TypeError, "cv must give indices of rows or masks, got float64 in fold 0"),
        ([(np.arange(30), np.array([60]))], ValueError, "cv: fold 0 has rows from 60 to 60, of 60 rows in all"),
    ],
)
def test_folds_that_are_none(cv, error, message):
    with pytest.raises(error, match=message):
        RFMClassifierCV(n_settings=1, iterations=1, cv=cv).fit(X, labels)


def test_a_generator_of_folds_serves_once():
    search = RFMClassifierCV(n_settings=1, iterations=1, cv=KFold(3).split(X)).fit(X, labels)
    assert search.n_splits_ == 3
    with pytest.raises(ValueError, match="of a generator, which gives its folds once, pass the list"):
        search.fit(X, labels)


# ---- class weights


def test_class_weights_of_a_class_that_a_fold_lacks():
    weights = {"n": 1.0, "p": 2.0, "q": 5.0}
    three = np.array([*labels[:-1], "q"])
    scores = cross_val_score(
        RFMClassifier(iterations=1, class_weight=weights), X, three, cv=KFold(3), error_score="raise"
    )
    assert np.isfinite(scores).all()
    RFMClassifierCV(n_settings=1, iterations=1, cv=KFold(3), class_weight=weights).fit(X, three)
    with pytest.raises(ValueError, match="class_weight names the label 'N', which y does not hold"):
        RFMClassifier(class_weight={"N": 2.0}).fit(X, labels)


# ---- words


def test_errors_whose_class_is_not_made_of_a_text():
    found = restated(UnicodeDecodeError("utf-8", b"x", 0, 1, "why"), "words")
    assert (type(found), str(found)) == (ValueError, "words")
    assert type(restated(fastagop.BackendUnavailable("a"), "b")) is fastagop.BackendUnavailable

    def subtracts(model, X, y):
        return -np.mean((model.predict(X) - y) ** 2)  # of strings

    with pytest.raises(TypeError, match="scoring: the validation rows have no score"):
        RFMClassifier(early_stopping=True, scoring=subtracts).fit(X, labels)


def test_frames_bring_no_warnings_of_torch():
    frame, target = pd.DataFrame(X), pd.Series(y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RFMRegressor(Laplace(3.0), iterations=1).fit(frame, target, X_val=frame, y_val=target)
        probes.fit({"layer": frame.to_numpy()}, pd.Series(labels), random_state=0)
        readonly = X.copy()
        readonly.flags.writeable = False
        probes.fit({"layer": readonly}, labels, random_state=0)


def test_scores_of_probes_need_a_label_for_each_row():
    found = probes.fit({"layer": X}, labels, validation_fraction=np.float32(0.25), random_state=0)
    with pytest.raises(ValueError, match="y must have one row per row of the layers: these have 60, y has 5"):
        found.score({"layer": X}, labels[:5])
    assert found.score({"layer": X}, labels)["layer"] > 0.5
    assert found.aggregate is not None
    with pytest.raises(ValueError, match="y must have one row per row of the layers"):
        found.aggregate.score_of({"layer": X}, labels[:5])
