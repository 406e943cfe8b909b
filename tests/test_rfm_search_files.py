"""Searches in files: a loaded one answers as the one that was fitted, and damage is found."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from sklearn.datasets import load_iris
from sklearn.exceptions import NotFittedError
from sklearn.metrics import accuracy_score
from sklearn.model_selection import KFold

import fastagop
from fastagop import Gaussian, RFMClassifier, RFMClassifierCV, RFMRegressorCV
from tests.test_damage import changed, drop, forged, little_memory

SMALL = {"n_settings": 2, "cv": 2, "iterations": 1, "random_state": 0}
METHODS = ("predict", "predict_proba", "decision_function", "transform")


@pytest.fixture(scope="module")
def flowers():
    """(X, labels) of 60 irises, in a random order."""
    X, y = load_iris(return_X_y=True)
    index = np.random.default_rng(0).permutation(len(X))[:60]
    return X[index], np.array(["setosa", "versicolor", "virginica"])[y[index]]


def loaded(model, folder):
    """The search that comes back from a file."""
    model.save(folder / "search")
    return fastagop.load(folder / "search")


def alike(a, b):
    assert type(a) is type(b)
    assert a.dtype == b.dtype
    assert np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


def check_results(again, model):
    """Everything that fit has set is the same."""
    assert list(again.cv_results_) == list(model.cv_results_)
    for name, column in model.cv_results_.items():
        if name == "params":
            assert again.cv_results_[name] == column
        else:
            alike(again.cv_results_[name], column)
    for name in ("best_params_", "best_score_", "best_iteration_", "best_index_", "n_splits_", "stopped_"):
        assert getattr(again, name) == getattr(model, name)
        assert type(getattr(again, name)) is type(getattr(model, name))
    assert again.n_features_in_ == model.n_features_in_
    assert len(again.estimators_) == len(model.estimators_)
    assert again.best_estimator_ is again.estimators_[0]


@pytest.mark.parametrize("average", [1, 3])
def test_a_classifier_comes_back(flowers, tmp_path, average):
    X, y = flowers
    frame = pd.DataFrame(X, columns=["a", "b", "ç", "d"])
    how = {**SMALL, "n_settings": 3, "average": average, "scoring": "neg_log_loss", "class_weight": {"setosa": 2.0}}
    model = RFMClassifierCV(**how).fit(frame, y)
    again = loaded(model, tmp_path)
    assert type(again) is RFMClassifierCV
    check_results(again, model)
    alike(again.classes_, model.classes_)
    alike(again.feature_names_in_, model.feature_names_in_)
    assert again.get_params() == model.get_params()
    for data in (frame, frame[:1]):
        for method in METHODS:
            alike(getattr(again, method)(data), getattr(model, method)(data))
    assert again.score(frame, y) == model.score(frame, y)
    for one, other in zip(again.estimators_, model.estimators_, strict=True):
        assert isinstance(one, RFMClassifier)
        alike(one.decision_function(frame), other.decision_function(frame))
        alike(one.M_, other.M_)
    assert again.get_feature_names_out().tolist() == model.get_feature_names_out().tolist()
    check_results(loaded(again, tmp_path), model)  # what was loaded is saved like any other
    again.fit(frame, y)  # and fitted
    alike(again.decision_function(frame), model.decision_function(frame))


@pytest.mark.parametrize("columns", [0, slice(0, 1), slice(0, 2)])
def test_a_regressor_comes_back(flowers, tmp_path, columns):
    X, _ = flowers
    targets = X[:, columns] * 2.0
    model = RFMRegressorCV(**SMALL, average=2, kernel=Gaussian("median"), solver="cholesky").fit(X, targets)
    again = loaded(model, tmp_path)
    check_results(again, model)
    alike(again.predict(X), model.predict(X))
    assert again.score(X, targets) == model.score(X, targets)
    assert again.get_params() == model.get_params()


def test_tensors_stay_tensors(flowers, tmp_path):
    X = torch.from_numpy(flowers[0])
    model = RFMRegressorCV(**SMALL).fit(X, X[:, 0])
    again = loaded(model, tmp_path)
    assert torch.equal(again.predict(X), model.predict(X))
    assert isinstance(again.best_estimator_.M_, torch.Tensor)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("space", {"ridge": [1e-3, np.float32(0.5)], "diagonal": (True, False)}, None),
        ("space", [{"bandwidth": 1}, {"bandwidth": 0.5, "diagonal": True, "agop_scale": "mean"}], None),
        ("space", {"ridge": np.array([1e-3, 1.0])}, None),
        ("space", {"ridge": scipy.stats.loguniform(1e-3, 1.0)}, "default"),
        ("cv", np.int64(3), None),
        ("cv", "holdout", None),
        ("cv", KFold(2), "default"),
        ("cv", [(np.arange(40), np.arange(40, 60))], "default"),
        ("random_state", np.random.RandomState(0), "default"),
    ],
)
def test_parameters_that_a_file_holds(flowers, tmp_path, name, value, expected):
    X, y = flowers
    model = RFMClassifierCV(**{**SMALL, name: value}).fit(X, y)
    again = loaded(model, tmp_path)
    check_results(again, model)
    found, default = again.get_params()[name], RFMClassifierCV().get_params()[name]
    if expected == "default":
        assert found == default
    elif name == "cv":
        assert found == value
    else:
        refitted = again.fit(X, y)  # the same settings
        assert refitted.cv_results_["params"] == model.cv_results_["params"]


def test_a_scoring_function_stays_behind(flowers, tmp_path):
    X, y = flowers
    model = RFMClassifierCV(**SMALL, scoring=lambda estimator, X, y: accuracy_score(y, estimator.predict(X))).fit(X, y)
    again = loaded(loaded(model, tmp_path), tmp_path)
    assert again.scoring is None
    check_results(again, model)
    for weights in (None, np.ones(len(X))):
        with pytest.raises(ValueError, match=r"score needs the function that scoring was, which a file does not hold"):
            again.score(X, y, weights)
    assert again.best_estimator_.score(X, y) == model.best_estimator_.score(X, y)
    named = RFMClassifierCV(**SMALL, scoring="neg_log_loss").fit(X, y)
    named.set_params(scoring=None)  # of the next fit
    assert loaded(named, tmp_path).score(X, y) == named.score(X, y) < 0


def test_settings_that_fail_or_are_left_out(flowers, tmp_path):
    """Scores that are NaN, texts of errors, and an infinite score."""
    X, y = flowers

    def picky(estimator, X, y):
        if estimator.diagonal:
            raise ArithmeticError("no diägonal")
        return -np.inf

    space = [{"bandwidth": 1.0}, {"bandwidth": 0.5, "diagonal": True}]
    none, some = "best mean score is -inf", "1 of 2 settings failed"
    with pytest.warns(UserWarning, match=none), pytest.warns(UserWarning, match=some):
        model = RFMClassifierCV(**{**SMALL, "space": space}, scoring=picky).fit(X, y)
    again = loaded(model, tmp_path)
    check_results(again, model)
    assert "no diägonal" in again.cv_results_["error"][-1]
    assert again.best_score_ == -np.inf
    with pytest.warns(UserWarning, match="1 of 2 settings left out"):
        short = RFMClassifierCV(**SMALL, time_limit=0.0).fit(X, y)
    assert "1 of 2 settings left out" in loaded(short, tmp_path).stopped_


def test_what_cannot_be_saved(flowers, tmp_path):
    with pytest.raises(NotFittedError):
        RFMClassifierCV(**SMALL).save(tmp_path / "search")
    with pytest.raises(ValueError, match="save needs an estimator fitted to all rows, which refit=False leaves out"):
        RFMClassifierCV(**SMALL, refit=False).fit(*flowers).save(tmp_path / "search")

    class Mine(RFMClassifierCV):
        pass

    with pytest.raises(TypeError, match=r"save knows .*RFMClassifierCV.*, not Mine"):
        Mine(**SMALL).fit(*flowers).save(tmp_path / "search")
    assert not list(tmp_path.iterdir())


def test_devices(saved, tmp_path):
    path = tmp_path / "search"
    path.write_bytes(saved[1])
    again = fastagop.load(path, device="cpu")
    assert again.device == again.best_estimator_.device == "cpu"
    with pytest.raises(ValueError, match=r"device 'cuda:99' is not there"):
        fastagop.load(path, device="cuda:99")


# ---- Damage


@pytest.fixture(scope="module")
def saved(flowers, tmp_path_factory):
    """(fitted search, the bytes of its file)"""
    model = RFMClassifierCV(**SMALL, average=2).fit(*flowers)
    path = tmp_path_factory.mktemp("saved") / "search"
    model.save(path)
    return model, path.read_bytes()


def test_flipped_and_cut_searches(saved, flowers, tmp_path, damaged, outcome):
    model, data = saved
    expected, path = model.decision_function(flowers[0]), tmp_path / "search"
    for broken in damaged(data, 100):
        path.write_bytes(broken)
        found = outcome(lambda: fastagop.load(path).decision_function(flowers[0]), path)
        assert found is None or np.array_equal(found, expected)


def machine(*keys, value=None):
    """A change to the description of the first machine."""
    return lambda metadata, tensors: changed(*keys, value=value)(metadata["machines"][0], tensors)


def shorter(name):
    """A change that cuts a tensor's last row off."""

    def change(_, tensors):
        tensors[name] = tensors[name][:-1].clone()

    return change


FORGERIES = {
    "no machines": changed("machines", value=[]),
    "machines no list": changed("machines", value=3),
    "a regressor": machine("estimator", value="RFMRegressor"),
    "a search in a search": machine("estimator", value="RFMClassifierCV"),
    "a machine without a kernel": machine("kernel"),
    "a machine of other classes": machine("attributes", "classes_", value={"array": [1, 2, 3], "dtype": "<i8"}),
    "a machine of other features": machine("attributes", "n_features_in_", value=7),
    "other classes": changed("attributes", "classes_", value={"array": [1, 2, 3], "dtype": "<i8"}),
    "no centers": drop("0/centers"),
    "no second machine": drop("1/alpha"),
    "no scores": drop("results/mean_test_score"),
    "fewer scores": shorter("results/mean_test_score"),
    "columns no list": changed("columns", value=3),
    "no column": changed("columns", value=["params"]),
    "a column unknown": changed("columns", value=["params", "nonsense"]),
    "no index": changed("best_index"),
    "an index beyond": changed("best_index", value=400),
    "an index below": changed("best_index", value=-1),
    "an index of text": changed("best_index", value="first"),
    "a huge column": changed("texts", "note", value={"array": ["a"], "dtype": "U500000000"}),
    "a scorer unknown": changed("scored_by", value={"name": "os.system"}),
    "a scorer of a number": changed("scored_by", value=3),
    "a parameter unknown": changed("parameters", "nonsense", value=1),
    "a parameter of another kind": changed("parameters", "n_settings", value="many"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_searches_with_a_right_checksum(saved, tmp_path, name):
    path = tmp_path / "search"
    path.write_bytes(forged(saved[1], FORGERIES[name]))
    with little_memory(), pytest.raises(ValueError, match="search") as caught:
        fastagop.load(path)
    assert str(path) in str(caught.value)


def test_unforged_is_loaded(saved, flowers, tmp_path):
    """The forger itself does no harm."""
    (tmp_path / "search").write_bytes(forged(saved[1], lambda metadata, tensors: None))
    check_results(fastagop.load(tmp_path / "search"), saved[0])
