"""explain of a search: one fit on a fold, how many there are, all of it together; nothing runs and nothing changes."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from fastagop.kernels import checks
from sklearn.model_selection import KFold, PredefinedSplit

import fastagop
from fastagop import NTK, Laplace, RFMClassifier, RFMClassifierCV, RFMRegressor, RFMRegressorCV

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(60, 5)), np.array(["a", "b", "c"])[np.arange(60) % 3]


def line(label: str, text: str) -> str:
    """The one line of a plan with a label, or with the last of several."""
    found = [part for part in text.splitlines() if part.startswith(f"  {label} ")]
    assert found, text
    return found[-1]


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found, text
    return float(found[1])


def seconds(text: str) -> float:
    return number(r"about ([\d.e+-]+) s", line("in all", text))


def one(text: str) -> float:
    """Seconds of one fit."""
    return number(r"about ([\d.e+-]+) in all", line("seconds", text))


def held(text: str) -> float:
    """Bytes that all of it takes at most."""
    found = re.search(r"at most about ([\d.]+) ([kMG])B", line("in all", text))
    assert found, text
    return float(found[1]) * {"k": 1e3, "M": 1e6, "G": 1e9}[found[2]]


def test_nothing_runs_and_nothing_changes(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("explain ran the kernel")

    checks.kernel(Laplace(1.0))  # a class of kernels is tried at its first use
    for method in ("value_", "weight_", "weight_from_value_"):
        monkeypatch.setattr(Laplace, method, refuse)
    generator = np.random.RandomState(3)
    model = RFMClassifierCV(random_state=generator)
    before, state = dict(vars(model)), np.random.get_state()[1].copy()  # noqa: NPY002
    text = fastagop.explain(model, X, Y)
    assert text == fastagop.explain(model, X, Y) or "are free now" in text
    fastagop.explain(RFMClassifierCV(space={"ridge": scipy.stats.loguniform(1e-3, 1.0)}), X, Y)
    fastagop.explain(RFMClassifierCV(cv=KFold(3, shuffle=True)), X, Y)
    assert vars(model) == before
    assert np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    assert generator.randint(10**6) == np.random.RandomState(3).randint(10**6)


def test_one_fit_is_that_of_the_estimator():
    """On the rows of the largest fold, with the rows that are scored; then all of them."""
    text = fastagop.explain(RFMRegressorCV(cv=4, dtype="float64", average=2, random_state=0), X, X[:, 0])
    head, name, iterations, last = text.splitlines()[:4]
    assert head == "RFMRegressorCV.fit: 12 settings, 4 folds; one of the fits:"
    assert name.startswith("RFMRegressor.fit: 45 rows, 5 features, 1 output(s), float64 on ")
    assert "score" in iterations
    single = fastagop.explain(RFMRegressor(dtype="float64"), X[:45], X[:45, 0])
    assert last == single.splitlines()[2]
    assert "at most 48 such fits, one after the other: about" in line("search", text)
    found, of_one = number(r"about ([\d.e+-]+) s for all", line("search", text)), one(text)
    assert found == pytest.approx(48 * of_one, rel=0.1)
    whole = one(fastagop.explain(RFMRegressor(dtype="float64"), X, X[:, 0]))
    assert "  refit      2 fits to all 60 rows: about " in text
    assert seconds(text) == pytest.approx(48 * of_one + 2 * whole, rel=0.1)
    assert "coarse" not in text
    assert "refit" not in fastagop.explain(RFMRegressorCV(refit=False), X, X[:, 0])


@pytest.mark.parametrize(
    ("how", "settings", "folds", "rows"),
    [
        ({"cv": "holdout"}, "12 settings", "1 fold", 48),
        ({"cv": "holdout", "validation_fraction": 0.5}, "12 settings", "1 fold", 30),
        ({"cv": 7}, "12 settings", "7 folds", 52),
        ({"cv": KFold(2)}, "12 settings", "2 folds", 30),
        ({"cv": [(np.arange(40), np.arange(50, 60)), (np.arange(20), np.arange(50))]}, "12 settings", "2 folds", 40),
        ({"cv": PredefinedSplit(np.arange(60) % 6 - 1)}, "12 settings", "5 folds", 50),
        ({"n_settings": 1}, "1 setting", "5 folds", 48),
        ({"space": [{"ridge": 1.0}, {}, {"ridge": 2.0}]}, "3 settings", "5 folds", 48),
        ({"space": {"diagonal": [True, False]}}, "2 settings", "5 folds", 48),  # a space of lists ends
    ],
)
def test_settings_and_folds_are_those_of_the_fit(how, settings, folds, rows):
    for model in (RFMClassifierCV(**how), RFMRegressorCV(**how)):
        text = fastagop.explain(model, X, Y if isinstance(model, RFMClassifierCV) else X[:, 0])
        assert text.startswith(f"{type(model).__name__}.fit: {settings}, {folds}; one of the fits:\n")
        found = number(r"fit: (\d+) rows", text)
        assert found == rows or (how == {"cv": 7} and found == rows - 1)  # classes round for themselves


def test_the_costliest_setting_is_planned():
    diagonal, full = {"diagonal": True}, {"diagonal": False}
    data, targets = torch.empty(300, 200, device="meta"), torch.empty(300, device="meta")
    spaces = ([diagonal], [diagonal, full], [full, diagonal])
    text = [fastagop.explain(RFMRegressorCV(space=space), data, targets) for space in spaces]
    assert "root " not in text[0]
    assert "root " in text[1]
    assert text[1].splitlines()[:3] == text[2].splitlines()[:3]


def test_rows_of_weight_zero_are_no_rows():
    weights = np.repeat([1.0, 0.0], 30)
    text = fastagop.explain(RFMClassifierCV(cv=3), X, Y, weights)
    assert "RFMClassifier.fit: 20 rows" in text
    assert "1 fit to all 30 rows" in text


@pytest.mark.parametrize(
    "kind", [pd.DataFrame, torch.from_numpy, lambda A: A.tolist()], ids=["frame", "tensor", "list"]
)
def test_every_kind_of_data(kind):
    plain, text = (fastagop.explain(RFMRegressorCV(), data, X[:, 0]) for data in (X, kind(X)))
    assert text.splitlines()[:3] == plain.splitlines()[:3]


def test_tensors_on_meta():
    data, targets = torch.empty(20000, 50, device="meta"), torch.empty(20000, device="meta")
    text = fastagop.explain(RFMRegressorCV(cv=KFold(4), device="cpu"), data, targets)
    assert "RFMRegressor.fit: 15000 rows, 50 features" in text
    assert "assumed    tensors on meta are planned for cpu" in text
    labels = torch.empty(20000, device="meta", dtype=torch.int64)
    assert "10 output(s)" in fastagop.explain(RFMClassifierCV(), data, labels)
    with pytest.raises(ValueError, match="X must be a floating matrix"):
        fastagop.explain(RFMRegressorCV(), torch.empty((), device="meta"), targets)


def test_jobs_take_memory_and_save_time(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    how = {"dtype": "float64", "solver": "cholesky", "refit": False, "random_state": 0, "device": "cpu"}
    texts = [fastagop.explain(RFMRegressorCV(**how, n_jobs=jobs), X, X[:, 0]) for jobs in (None, 3)]
    assert "3 settings at a time" in line("search", texts[1])
    assert seconds(texts[0]) == pytest.approx(3 * seconds(texts[1]), rel=0.1)
    assert held(texts[1]) == pytest.approx(3 * held(texts[0]), rel=0.01)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)  # of which each of the three has one
    slower = fastagop.explain(RFMRegressorCV(**how, n_jobs=3), X, X[:, 0])
    assert seconds(slower) == pytest.approx(4 * seconds(texts[1]), rel=0.1)
    assert "2 settings at a time" in fastagop.explain(RFMRegressorCV(n_settings=2, n_jobs=3), X, X[:, 0])


def test_coarse_fits_hold_distances():
    how = {"device": "cpu", "random_state": 0}
    assert "fits that are compared are coarse" in line("coarse", fastagop.explain(RFMClassifierCV(**how), X, Y))
    data, targets = torch.empty(4000, 10, device="meta"), torch.empty(4000, device="meta")
    few, many = (fastagop.explain(RFMRegressorCV(**how, cv=cv, memory_limit=64e9), data, targets) for cv in (2, 4))
    usual = fastagop.explain(RFMRegressorCV(**how, cv=4, solver="cholesky"), data, targets)
    assert held(few) > 2 * (32 * 2000**2 + 20 * 2000**2)
    assert held(many) > 4 * (32 * 3000**2 + 20 * 3000 * 1000) > held(usual)
    text = fastagop.explain(RFMRegressorCV(**how, memory_limit=5e8), data, targets)
    assert "no fits: those of float32 rows on the CPU would hold" in line("coarse", text)
    assert "at most about" in line("in all", text)
    for other in ({"dtype": "float64"}, {"solver": "cholesky"}, {"backend": "keops"}):
        try:
            assert "coarse " not in fastagop.explain(RFMClassifierCV(**how, **other), X, Y)
        except fastagop.BackendUnavailable:
            assert "backend" in other


def test_what_does_not_fit(monkeypatch):
    model = RFMRegressorCV(dtype="float64", solver="cholesky", memory_limit=1e4, device="cpu")
    text = fastagop.explain(model, X, X[:, 0])
    assert "one after the other: they do not fit" in line("search", text)
    assert "does not fit: solve with n = 60" in line("refit", text)
    assert "  in all " not in text
    model.set_params(memory_limit=3e4)  # enough for the rows of a fold
    text = fastagop.explain(model, X[:, :2], X[:, 0])
    assert ("does not fit: solve with n = 60" in text) or "  in all " in text
    monkeypatch.setattr("fastagop.rfm.search_plan.available_bytes", lambda device: 1000)
    assert "may not fit: all of it together" in fastagop.explain(RFMRegressorCV(), X, X[:, 0])


def test_what_fit_refuses():
    cases = [
        (RFMRegressorCV(n_settings=0), X, X[:, 0], ValueError, "n_settings must be"),
        (RFMRegressorCV(space={"nonsense": [1]}), X, X[:, 0], ValueError, "a name in space"),
        (RFMRegressorCV(space=[{"ridge": -1.0}]), X, X[:, 0], ValueError, "ridge must be"),
        (RFMRegressorCV(scoring="nonsense"), X, X[:, 0], ValueError, "scoring must be"),
        (RFMRegressorCV(kernel=NTK(1)), X, X[:, 0], ValueError, "has none"),
        (RFMRegressorCV(kernel="laplace"), X, X[:, 0], TypeError, "kernel must be"),
        (RFMRegressorCV(cv=1), X, X[:, 0], ValueError, "cv must be"),
        (RFMRegressorCV(), np.full((60, 5), np.nan), X[:, 0], ValueError, "NaN"),
        (RFMRegressorCV(), X, X[:9, 0], ValueError, "y must have one row per row of X"),
        (RFMClassifierCV(), X, np.zeros(60, int), ValueError, "at least two classes"),
        (RFMClassifierCV(cv=KFold(2).split(X)), X, Y, ValueError, "cv is a generator, .* pass the list"),
    ]
    for model, data, y, error, words in cases:
        with pytest.raises(error, match=words):
            fastagop.explain(model, data, y)
    with pytest.raises(TypeError, match=r"^RFMClassifierCV\.fit\(\) missing a required argument: 'y'"):
        fastagop.explain(RFMClassifierCV(), X)
    with pytest.raises(ValueError, match=r"got the class; use RFMClassifierCV\(\)"):
        fastagop.explain(RFMClassifierCV, X, Y)
    assert fastagop.explain(RFMClassifier(), X, Y).startswith("RFMClassifier.fit: 60 rows")
