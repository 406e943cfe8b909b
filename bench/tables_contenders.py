"""Who learns the tables: fastagop, xRFM and pytabkit's XRFM_D with their own defaults, and scikit-learn's learners.

A contender is a function of the task and the threads that makes an estimator for raw features; ``Unable`` says what is
not installed. The names are what ``--only`` takes, LABELS what tables of results say.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import TransformedTargetRegressor
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, SVR

import fastagop
from bench.contenders import Unable, installed
from bench.tables_data import CLASSIFICATION

Builder = Callable[[str, int], Any]
HELD_OUT = 0.2  # of the rows for what needs some to choose its iteration by: pytabkit's own share


def ours(family: str, scaled: bool = False, **options) -> Builder:
    """An estimator of fastagop's, by its name without the task; ``scaled``: on standardised features."""

    def build(task: str, threads: int):
        found = getattr(fastagop, family.format(task), None)
        if found is None:
            raise Unable(f"this fastagop has no {family.format(task)}")
        model = found(**options)
        return standardised(task, model) if scaled else model

    return build


def standardised(task: str, model: Any):
    """The model on standardised features, and targets where they are numbers."""
    made = make_pipeline(StandardScaler(), model)
    return made if task == CLASSIFICATION else TransformedTargetRegressor(made, transformer=StandardScaler())


class HeldOut(BaseEstimator):
    """xRFM with its defaults, as an estimator that holds out the rows that it chooses its iteration by.

    ``leaf``: rows of a leaf of its tree at most; default its own, 60,000.
    """

    def __init__(self, task: str, leaf: int | None = None):
        self.task, self.leaf = task, leaf

    def fit(self, X, y):
        """Fit on four fifths of the rows."""
        import torch
        from xrfm import xRFM  # pyright: ignore[reportMissingImports]

        stratify = y if self.task == CLASSIFICATION else None
        X, X_held, y, y_held = train_test_split(X, y, test_size=HELD_OUT, stratify=stratify, random_state=0)
        leaves: dict[str, Any] = {} if self.leaf is None else {"max_leaf_size": self.leaf}
        self.model_ = xRFM(device=torch.device("cpu"), verbose=False, random_state=0, **leaves)
        self.model_.fit(X, y, X_held, y_held)
        return self

    def predict(self, X):
        """Labels, or targets (m,)."""
        return np.ravel(self.model_.predict(X))

    def predict_proba(self, X):
        """Probabilities of the classes."""
        return self.model_.predict_proba(X)


def xrfm(scaled: bool, leaf: int | None = None) -> Builder:
    """xRFM, on standardised features or on those that there are."""

    def build(task: str, threads: int):
        installed("xrfm")
        made = HeldOut(task, leaf)
        return standardised(task, made) if scaled else made

    return build


def _pytabkit(task: str, threads: int):
    """One fit of its default setting; it scales features and holds a fifth of the rows out itself."""
    installed("pytabkit")
    installed("xrfm")
    interfaces = importlib.import_module("pytabkit.models.sklearn.sklearn_interfaces")
    return getattr(interfaces, f"XRFM_D_{task}")(random_state=0, device="cpu", n_threads=threads, val_fraction=HELD_OUT)


def _boosting(task: str, threads: int):
    from sklearn import ensemble

    return getattr(ensemble, f"HistGradientBoosting{task}")(random_state=0)


def _forest(task: str, threads: int):
    from sklearn import ensemble

    return getattr(ensemble, f"RandomForest{task}")(random_state=0, n_jobs=threads)


class CalibratedSVC(CalibratedClassifierCV):
    """SVC's own labels, and probabilities that cross-validation calibrates: six fits."""

    def __init__(self):
        options: dict = {"ensemble": False}
        super().__init__(make_pipeline(StandardScaler(), SVC()), **options)

    def predict(self, X):
        """Labels of the SVC that all rows were given to."""
        fitted: Any = self.calibrated_classifiers_
        return fitted[0].estimator.predict(X)


def _svm(task: str, threads: int):
    return CalibratedSVC() if task == CLASSIFICATION else standardised(task, SVR())


CONTENDERS: dict[str, Builder] = {
    "fastagop": ours("RFM{}", scale="standard", early_stopping=True, random_state=0, device="cpu"),
    "fastagop-cv": ours("RFM{}CV", n_settings=12, cv="holdout", average=3, random_state=0, device="cpu"),
    "fastagop-default": ours("RFM{}", scaled=True, device="cpu"),
    "xrfm": xrfm(scaled=True),
    "xrfm-raw": xrfm(scaled=False),
    "pytabkit": _pytabkit,
    "boosting": _boosting,
    "forest": _forest,
    "svm": _svm,
}
LABELS = {
    "fastagop": "fastagop, scaled, early stopping",
    "fastagop-cv": "fastagop CV, 12 settings, mean of 3",
    "fastagop-default": "fastagop default, standardised",
    "xrfm": "xRFM, standardised",
    "xrfm-raw": "xRFM, raw",
    "pytabkit": "pytabkit XRFM_D",
    "boosting": "HistGradientBoosting",
    "forest": "random forest",
    "svm": "SVM, standardised",
}
