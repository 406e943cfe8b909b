"""Validation rows, early stopping, stages, metric_samples, time_limit and intercept of recursive feature machines."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch
from sklearn.metrics import get_scorer

import fastagop
from fastagop import Laplace, RFMClassifier, RFMRegressor
from fastagop.estimators import base
from fastagop.rfm import learning, validation


def data(n=60, d=4, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d))
    return X, X[:, 0] * X[:, 1] + 0.5 * rng.normal(size=n)


def model(make=RFMRegressor, **more):
    return make(**{"kernel": Laplace(3.0), "iterations": 3, "dtype": "float64", **more})


def labels(y, *names):
    return np.array(names)[np.digitize(y, np.linspace(-0.5, 0.5, len(names) - 1) if len(names) > 2 else [0.0])]


def test_nothing_is_trained_on_given_rows():
    X, y = data()
    fit = model(kernel=Laplace("median"), scale="standard").fit(X[:40], y[:40], X_val=X[40:] * 9, y_val=y[40:])
    plain = model(kernel=Laplace("median"), scale="standard", iterations=fit.best_iteration_).fit(X[:40], y[:40])
    assert np.array_equal(fit.predict(X), plain.predict(X))
    assert np.array_equal(fit.M_, plain.M_)


@pytest.mark.parametrize(
    ("make", "scoring"),
    [
        (RFMRegressor, None),
        (RFMRegressor, "r2"),
        (RFMRegressor, "neg_mean_absolute_error"),
        (RFMRegressor, "neg_max_error"),  # takes no weights
        (RFMClassifier, None),
        (RFMClassifier, "roc_auc"),
        (RFMClassifier, "neg_log_loss"),
        (RFMClassifier, lambda estimator, X, y: float((estimator.predict(X) == y).mean())),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@pytest.mark.parametrize("weighted", [False, True])
def test_scores_are_those_of_the_stages(make, scoring, weighted):
    """Of the rows that given or held out; the best one predicts."""
    X, y = data()
    y = y if make is RFMRegressor else labels(y, "down", "up")
    weights = np.linspace(0.5, 2.0, 40) if weighted else None
    fit = model(make, scoring=scoring).fit(X[:40], y[:40], weights, X_val=X[40:], y_val=y[40:])
    scorer = scoring if callable(scoring) else get_scorer(scoring or ("r2" if make is RFMRegressor else "accuracy"))
    for count, score in enumerate(fit.validation_score_):
        plain = model(make, iterations=count).fit(X[:40], y[:40], weights)
        assert score == pytest.approx(scorer(plain, X[40:], y[40:]), abs=1e-12)
    assert len(fit.validation_score_) == 4
    assert fit.validation_score_[fit.best_iteration_] == fit.validation_score_.max()
    assert [record.score for record in fit.iterations_] == list(fit.validation_score_[:3])


@pytest.mark.parametrize("make", [RFMRegressor, RFMClassifier])
@pytest.mark.parametrize("weighted", [False, True])
def test_early_stopping_by_hand(make, weighted):
    """The held rows are found again, the stages refitted without them, and the last solve made with the best M."""
    X, y = data()
    y = y if make is RFMRegressor else labels(y, "a", "b", "c")
    weights = np.where(np.arange(60) % 2, 2.0, 1.0) if weighted else None
    seen = []
    scorer = get_scorer("r2" if make is RFMRegressor else "accuracy")

    def scoring(estimator, Z, answers, sample_weight=None):
        seen.append((Z, answers, sample_weight))
        return scorer(estimator, Z, answers, sample_weight=sample_weight)

    settings = {"early_stopping": True, "validation_fraction": 0.25, "random_state": 3}
    fit = model(make, scoring=scoring, **settings).fit(X, y, weights)
    Z, answers, part = seen[0]
    held = np.array([int(np.abs(X - z).sum(1).argmin()) for z in Z])
    assert len(held) == 15
    assert list(held) == sorted(set(held))
    assert np.allclose(Z, X[held], atol=1e-12)
    assert (part is None) == (weights is None)
    assert weights is None or np.array_equal(part, weights[held])
    if make is RFMClassifier:
        assert np.array_equal(answers, y[held])
        kinds = [(y == label).sum() / 4 for label in fit.classes_]
        assert np.allclose([(answers == label).sum() for label in fit.classes_], kinds, atol=1.0)
    stay = np.setdiff1d(np.arange(60), held)
    kept = None if weights is None else weights[stay]
    for count, score in enumerate(fit.validation_score_):
        plain = (
            model(make, iterations=count, fit_intercept=False)
            if make is RFMRegressor
            else model(make, iterations=count)
        )
        # the mean of all rows is subtracted before any are held out
        mean = np.average(y, weights=weights) if make is RFMRegressor else None
        plain.fit(X[stay], y[stay] if mean is None else y[stay] - mean, kept)
        expected = scorer(plain, Z, answers if mean is None else answers - mean, sample_weight=part)
        assert score == pytest.approx(expected, abs=1e-9)
        if count == fit.best_iteration_:
            assert np.allclose(fit.M_, plain.M_, rtol=1e-9, atol=1e-12)
            last = model(make, iterations=0).fit(plain.transform(X), y, weights)
            ask = "predict" if make is RFMRegressor else "decision_function"
            assert np.allclose(getattr(fit, ask)(X + 0.1), getattr(last, ask)(plain.transform(X + 0.1)), atol=1e-8)
    assert len(fit.solution_.alpha) == 60
    assert make is RFMClassifier or model(scoring="neg_max_error", **settings).fit(X, y, weights).best_iteration_ >= 0
    again = model(make, **settings).fit(X, y, weights)
    assert np.array_equal(again.predict(X), fit.predict(X))
    assert np.array_equal(again.validation_score_, fit.validation_score_)


def test_equal_scores_are_decided_by_squared_errors_and_then_by_the_first():
    X, y = data()
    weights = np.where(np.arange(60) % 2, 2.0, 1.0)
    for make, answers in ((RFMRegressor, y), (RFMClassifier, labels(y, "down", "up"))):
        fit = model(make, scoring=lambda estimator, X, y: 1.0).fit(
            X[:40], answers[:40], X_val=X[40:], y_val=answers[40:]
        )
        targets = answers[40:] if make is RFMRegressor else np.where(answers[40:] == "up", 1.0, -1.0)
        errors = []
        for count in range(4):
            plain = model(make, iterations=count).fit(X[:40], answers[:40])
            outputs = plain.predict(X[40:]) if make is RFMRegressor else plain.decision_function(X[40:])
            errors.append(((outputs - targets) ** 2).mean())
        assert fit.best_iteration_ == np.argmin(errors)
        assert np.allclose(fit._validation_ties, -np.array(errors), rtol=1e-9)
    none = model().fit(X[:40], np.zeros(40), X_val=X[40:], y_val=np.zeros(20))
    assert none.best_iteration_ == 0
    outputs, codes = torch.tensor([[1.0], [0.0]]), torch.zeros(2, 1)
    held = validation.HeldOut(codes, None, weights[:2], codes, np.array([3.0, 1.0]), lambda estimator, X, y: 1.0)
    assert held.score(types.SimpleNamespace(_with_outputs=lambda outputs, X: None), outputs) == (1.0, -0.75)


def test_iterations_end_where_scores_do_not_grow():
    X, y = data()
    falling = iter([0.0, 1.0, 0.5, 0.4, 0.3, 2.0])
    fit = model(iterations=9, n_iter_no_change=2, scoring=lambda estimator, X, y: next(falling))
    fit.fit(X[:40], y[:40], X_val=X[40:], y_val=y[40:])
    assert list(fit.validation_score_) == [0.0, 1.0, 0.5, 0.4]
    assert fit.best_iteration_ == 1
    assert len(fit.iterations_) == 4
    assert np.array_equal(fit.predict(X), model(iterations=1).fit(X[:40], y[:40]).predict(X))


@pytest.mark.parametrize("validated", [False, True])
@pytest.mark.parametrize(("limit", "made"), [(0, 1), (2.5, 1), (3.0, 2), (100.0, 4)])
def test_time_limit(monkeypatch, validated, limit, made):
    """An iteration takes a second of a clock that the test keeps; the last solve, and its score, come on top."""
    X, y = data()
    time = iter(np.arange(0.0, 1000.0, 0.5))
    monkeypatch.setattr(learning, "time", types.SimpleNamespace(perf_counter=lambda: next(time)))
    more = {"X_val": X[40:], "y_val": y[40:]} if validated else {}
    fit = model(iterations=4, time_limit=limit).fit(X[:40], y[:40], **more)
    assert len(fit.iterations_) == made
    assert len(list(fit.staged_predict(X))) == made + 1
    assert not validated or len(fit.validation_score_) == made + 1


@pytest.mark.parametrize("make", [RFMRegressor, RFMClassifier])
def test_stages_are_refits_with_fewer_iterations(make):
    X, y = data()
    y = y if make is RFMRegressor else labels(y, "a", "b", "c")
    stages = model(make).fit(X, y).staged_predict(X + 0.1)
    assert iter(stages) is stages
    found = list(stages)
    assert len(found) == 4
    for count, stage in enumerate(found):
        assert np.array_equal(stage, model(make, iterations=count).fit(X, y).predict(X + 0.1))


@pytest.mark.parametrize("samples", [20, 1 / 3])
def test_the_metric_is_learnt_from_samples(samples):
    X, y = data()
    fit = model(metric_samples=samples, random_state=0, fit_intercept=False).fit(X, y)
    part = fit._learnt[1].numpy()
    rows = np.array([int(np.abs(X - x).sum(1).argmin()) for x in part])
    assert len(set(rows)) == 20
    plain = model(fit_intercept=False).fit(X[rows], y[rows])
    assert np.allclose(fit.M_, plain.M_, rtol=1e-10)
    last = model(iterations=0, fit_intercept=False).fit(plain.transform(X), y)
    assert np.allclose(fit.predict(X + 0.1), last.predict(plain.transform(X + 0.1)), atol=1e-9)
    assert len(fit.solution_.alpha) == 60
    whole = model(metric_samples=1.0, random_state=0).fit(X, y)
    assert np.array_equal(whole.predict(X), model().fit(X, y).predict(X))


def test_labels_that_are_new():
    X, y = data()
    y = labels(y, "a", "b", "c")
    strange = np.where(np.arange(20) % 5, y[40:], "z")
    with pytest.warns(UserWarning, match=r"y_val holds labels that y does not, such as 'z': 4 of 20 rows") as told:
        fit = model(RFMClassifier).fit(X[:40], y[:40], X_val=X[40:], y_val=strange)
    assert len(told) == 1
    assert fit.validation_score_.max() <= 0.8
    with pytest.raises(ValueError, match=r"y_val holds none of y's labels \['a', 'b', 'c'\], but such as 1;"):
        model(RFMClassifier).fit(X[:40], y[:40], X_val=X[40:], y_val=np.ones(20, dtype=int))
    with pytest.warns(UserWarning, match="y_val holds"), pytest.raises(ValueError, match=r"scoring: .*"):
        model(RFMClassifier, scoring="neg_log_loss").fit(X[:40], y[:40], X_val=X[40:], y_val=strange)


@pytest.mark.parametrize("asked", ["M_", "feature_importances_", "best_iteration_", "solution_", "transform"])
def test_a_scorer_is_not_given_the_results_of_an_earlier_fit(asked):
    """The metric, the points and the records are those of the last fit until this one ends: asked for, they are an
    error, in the first fit and in every other.
    """
    X, y = data()

    def scoring(estimator, rows, answers):
        found = getattr(estimator, asked)
        return float(np.sum(found(rows) if callable(found) else 1.0))

    fit = model(early_stopping=True, random_state=0)
    for _ in range(2):
        with pytest.raises(AttributeError, match=r"^scoring: .*; a scorer may ask the estimator for predict"):
            fit.set_params(scoring=scoring).fit(X, y)
        fit.set_params(scoring=None).fit(X, y)
        before = fit.predict(X)
    with pytest.raises(AttributeError, match=r"^scoring: "):
        fit.set_params(scoring=scoring).fit(X[:20], y[:20])
    assert np.array_equal(fit.predict(X), before)


def test_a_scorer_is_not_given_the_temperature_of_an_earlier_tree():
    X, y = data()
    tree = fastagop.RFMTreeRegressor(Laplace(3.0), iterations=1, leaf_size=20, random_state=0).fit(X, y)
    tree.set_params(early_stopping=False, scoring=lambda estimator, X, y: float(estimator.transform(X)[0, 0]))
    with pytest.raises(AttributeError, match=r"^scoring: .*'temperature_'"):
        tree.fit(X, y)


class Elsewhere(torch.Tensor):
    """A tensor that NumPy cannot read where it lies, as one on a GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __array__(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def detach(self):
        return self

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_scorers_by_name_read_answers_for_rows_of_a_gpu(monkeypatch):
    plain = base.KernelEstimator._like_input

    def like_input(self, value, rows, wide=False):
        answer = plain(self, value, rows, wide)
        return answer.as_subclass(Elsewhere) if isinstance(rows, Elsewhere) else answer

    X, y = (torch.tensor(part) for part in data())
    far, kinds = X.as_subclass(Elsewhere), y > 0
    given = {"X_val": X[40:].as_subclass(Elsewhere), "y_val": kinds[40:]}
    here = model(RFMClassifier, scoring="roc_auc").fit(X[:40], kinds[:40], X_val=X[40:], y_val=kinds[40:])
    search = fastagop.RFMClassifierCV(n_settings=1, cv=2, iterations=0, scoring="roc_auc").fit(X, kinds)
    probes = fastagop.probes.fit([X], kinds, scoring="roc_auc", iterations=0, aggregate=False)
    monkeypatch.setattr(base.KernelEstimator, "_like_input", like_input)
    there = model(RFMClassifier, scoring="roc_auc").fit(X[:40], kinds[:40], **given)
    assert np.array_equal(there.validation_score_, here.validation_score_)
    assert search.score(far, kinds.as_subclass(Elsewhere)) == search.score(X, kinds)
    assert probes.score([far], kinds) == probes.score([X], kinds)


def test_a_scorer_of_another_kind_of_estimator_is_named():
    X, y = data()
    with pytest.raises(AttributeError, match=r"^scoring: .* has none of the following attributes: predict_proba;"):
        model(early_stopping=True, random_state=0, scoring="neg_log_loss").fit(X, y)


def test_scores_are_saved_and_do_not_outlive_their_fit(tmp_path):
    X, y = data()
    scores = iter([1.0, float("nan"), 3.0, 2.0])
    with pytest.warns(UserWarning, match="is NaN"):
        fit = model(scoring=lambda estimator, X, y: next(scores)).fit(X[:40], y[:40], X_val=X[40:], y_val=y[40:])
    fit.set_params(scoring=None).save(tmp_path / "model")
    again = fastagop.load(tmp_path / "model")
    assert np.array_equal(again.validation_score_, [1.0, np.nan, 3.0, 2.0], equal_nan=True)
    assert str([record.score for record in again.iterations_]) == "[1.0, nan, 3.0]"
    assert again.best_iteration_ == 2
    with pytest.raises(ValueError, match="staged_predict"):
        again.staged_predict(X)
    fit.fit(X, y)
    assert not hasattr(fit, "validation_score_")
    assert fit.iterations_[0].score is None
    assert not any(callable(value) for value in vars(fit).values() if not isinstance(value, Laplace))


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.filterwarnings("ignore")  # R^2 of one row is none
def test_few_rows(n):
    X, y = data(n)
    fit = model(early_stopping=True, random_state=0).fit(X, y)
    assert np.isfinite(fit.predict(X)).all()
    kinds = np.array(["a", "b", "a", "b", "c"])[:n]  # too few of each to hold out some of each
    assert set(model(RFMClassifier, early_stopping=True, random_state=0).fit(X, kinds).predict(X)) <= set(kinds)


@pytest.mark.parametrize(
    ("parameters", "given", "name"),
    [
        ({}, {"X_val": np.zeros((2, 4))}, "y_val"),
        ({}, {"y_val": np.zeros(2)}, "X_val"),
        ({}, {"X_val": np.zeros((2, 3)), "y_val": np.zeros(2)}, "X_val"),
        ({}, {"X_val": np.full((2, 4), np.nan), "y_val": np.zeros(2)}, "X_val"),
        ({}, {"X_val": np.zeros((2, 4)), "y_val": np.zeros(3)}, "y_val"),
        ({}, {"X_val": np.zeros((2, 4)), "y_val": np.zeros((2, 2))}, "y_val"),
        ({}, {"X_val": np.zeros((2, 4)), "y_val": [np.nan, 1.0]}, "y_val"),
        ({"scoring": "no such"}, {"X_val": np.zeros((2, 4)), "y_val": np.zeros(2)}, "scoring"),
        ({"scoring": {"a": "r2"}}, {"X_val": np.zeros((2, 4)), "y_val": np.zeros(2)}, "scoring must be .*; one score"),
        ({"scoring": 3}, {"X_val": np.zeros((2, 4)), "y_val": np.zeros(2)}, "scoring"),
        ({"early_stopping": 1}, {}, "early_stopping"),
        ({"early_stopping": True, "validation_fraction": 0.0}, {}, "validation_fraction"),
        ({"early_stopping": True, "validation_fraction": 1}, {}, "validation_fraction"),
        ({"early_stopping": True, "validation_fraction": True}, {}, "validation_fraction"),
        ({"n_iter_no_change": 0}, {}, "n_iter_no_change"),
        ({"n_iter_no_change": 1.5}, {}, "n_iter_no_change"),
        ({"metric_samples": 0}, {}, "metric_samples"),
        ({"metric_samples": 1.5}, {}, "metric_samples"),
        ({"metric_samples": True}, {}, "metric_samples"),
        ({"metric_samples": "half"}, {}, "metric_samples"),
        ({"time_limit": -1.0}, {}, "time_limit"),
        ({"time_limit": "soon"}, {}, "time_limit"),
        ({"random_state": -1}, {}, "random_state"),
        ({"scale": "minmax"}, {}, "scale"),
        ({"fit_intercept": None}, {}, "fit_intercept"),
    ],
    ids=str,
)
def test_errors_name_what_is_wrong(parameters, given, name):
    X, y = data(20)
    with pytest.raises((ValueError, TypeError), match=name):
        model(**parameters).fit(X, y, **given)
    with pytest.raises(ValueError, match=r"early_stopping needs at least two rows, .*; use early_stopping=False"):
        model(early_stopping=True).fit(X[:1], y[:1])


@pytest.mark.parametrize("columns", [0, 2])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_intercept_is_the_mean(columns, weighted):
    X, y = data()
    y = np.stack([y, 3 - 2 * y], 1) if columns else y
    weights = np.linspace(0.5, 2.0, 60) if weighted else None
    mean = np.average(y, axis=0, weights=weights)
    fit = model().fit(X, y, weights)
    plain = model(fit_intercept=False).fit(X, y - mean, weights)
    assert np.allclose(fit.intercept_, mean, rtol=1e-14)
    assert np.allclose(fit.predict(X + 0.1) - mean, plain.predict(X + 0.1), atol=1e-10)
    assert np.allclose(fit.predict(X + 1e6), np.broadcast_to(mean, y.shape), atol=1e-12)  # far from all points
    zero = model(fit_intercept=False).fit(X, y, weights)
    assert not np.any(zero.intercept_)
    assert np.allclose(model().fit(X, y + 1e9, weights).predict(X) - 1e9, fit.predict(X), atol=1e-5)
    assert (
        model(dtype="float32").fit(X.astype(np.float32), y.astype(np.float32)).predict(np.float32(X)).dtype
        == np.float32
    )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("n", "held"), [(4, 2), (5, 2), (12, 2), (14, 2), (15, 2), (30, 3)])
def test_rows_held_out_define_the_default_score(n, held):
    """R^2 wants two rows; other scores are taken of one."""
    X, y = data(n)
    fit = model(early_stopping=True, random_state=0).fit(X, y)
    assert np.isfinite(fit.validation_score_).all()
    assert len(fit._unseen_rows) == held
    least = max(1, round(0.1 * n))
    other = model(early_stopping=True, random_state=0, scoring="neg_mean_absolute_error").fit(X, y)
    assert len(other._unseen_rows) == least
    classifier = model(RFMClassifier, early_stopping=True, random_state=0).fit(X, np.arange(n) % 2)
    assert len(classifier._unseen_rows) == least


@pytest.mark.parametrize(("n", "held"), [(2, 1), (3, 1)])
def test_too_few_rows_for_the_default_score(n, held):
    X, y = data(n)
    with pytest.warns(UserWarning, match="less than two samples"):
        fit = model(early_stopping=True, random_state=0).fit(X, y)
    assert len(fit._unseen_rows) == held


@pytest.mark.parametrize("name", ["accuracy", "neg_max_error", None])
def test_a_lenient_scorer_takes_weights_where_its_own_does(name):
    """Leaves hand the weights of their rows to the scorer that they wrap."""
    scorer = validation.scorer_of(RFMClassifier(), name)
    assert validation.takes_weights(validation.Lenient(scorer)) == validation.takes_weights(scorer)
    assert validation.takes_weights(scorer) == (name != "neg_max_error")
