"""What predictions for rows are worth: AUC where there are classes, correlation where there are numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import rankdata

from fastagop.estimators import inputs
from fastagop.rfm import validation


def auc(estimator, X, y) -> float:
    """Area under the ROC curve of ``decision_function``; of more than two classes, the mean of each against the rest.

    Classes that no row has, or all rows have, do not count.

    Raises:
        ValueError: all rows are of one class.
    """
    outputs, y = inputs.numpy("outputs", estimator.decision_function(X)), np.asarray(inputs.numpy("y", y))
    classes = estimator.classes_
    columns = [(classes[1], outputs)] if outputs.ndim == 1 else zip(classes, outputs.T, strict=True)
    found = [_area(y == label, column) for label, column in columns if 0 < (y == label).sum() < len(y)]
    if not found:
        raise ValueError(f"AUC needs rows of at least two classes, got {np.unique(y).tolist()}")
    return float(np.mean(found))


def _area(true: np.ndarray, outputs: np.ndarray) -> float:
    """How often a row that is true has a larger output than one that is not; equal outputs count half."""
    count, others = int(true.sum()), int((~true).sum())
    return float(rankdata(outputs)[true].sum() - 0.5 * count * (count + 1)) / (count * others)


def correlation(estimator, X, y) -> float:
    """Pearson correlation of ``predict`` with the targets, the mean over outputs; 0 where one of both is constant."""
    predicted, y = (np.asarray(inputs.numpy("y", value), dtype=np.float64) for value in (estimator.predict(X), y))
    predicted, y = (value.reshape(len(value), -1) - value.reshape(len(value), -1).mean(0) for value in (predicted, y))
    sizes = np.linalg.norm(predicted, axis=0) * np.linalg.norm(y, axis=0)
    return float(np.mean((predicted * y).sum(0) / np.where(sizes > 0, sizes, 1.0)))


def default(classes):
    """The score of labels with these classes, or, where they are None, of targets of regression."""
    return correlation if classes is None else auc


def scorer(estimator, scoring) -> tuple[Any, str]:
    """(function (estimator, X, y) -> number, its name) that a ``scoring`` stands for."""
    several = len(getattr(estimator, "classes_", ())) > 2
    names: dict[Any, str] = {auc: "mean one-vs-rest AUC" if several else "AUC", correlation: "correlation"}
    name = scoring if isinstance(scoring, str) else getattr(scoring, "__name__", "score")
    return validation.scorer_of(estimator, scoring), names.get(scoring, name)
