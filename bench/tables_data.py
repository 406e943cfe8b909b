"""The tables that learners are compared on: scikit-learn's small ones and generated ones, the same each time.

Features are as they come, in whatever units; what a learner wants of them, its contender does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

CLASSIFICATION, REGRESSION = "Classifier", "Regressor"  # as estimators' names end


@dataclass(frozen=True, eq=False)
class Table:
    """Rows to learn from.

    Attributes:
        X: features (n, d), float64.
        y: labels 0, 1, ... (n,), or float64 targets (n,).
        task: CLASSIFICATION or REGRESSION.
    """

    X: np.ndarray
    y: np.ndarray
    task: str

    @property
    def facts(self) -> dict:
        """Rows, features, and classes where there are any."""
        classes = len(np.unique(self.y)) if self.task == CLASSIFICATION else None
        return {"task": self.task, "n": len(self.X), "d": self.X.shape[1], "classes": classes}


def _bundled(name: str) -> Callable[[], Table]:
    def load() -> Table:
        from sklearn import datasets

        X, y = getattr(datasets, f"load_{name}")(return_X_y=True)
        task = REGRESSION if name == "diabetes" else CLASSIFICATION
        return Table(X.astype(np.float64), y if task == CLASSIFICATION else y.astype(np.float64), task)

    return load


def _made(name: str, task: str, **options) -> Callable[[], Table]:
    def make() -> Table:
        from sklearn import datasets

        X, y = getattr(datasets, f"make_{name}")(random_state=0, **options)
        return Table(X, y, task)

    return make


def one_hot() -> Table:
    """Two classes by pairs of categories: six columns of five categories each, written as 30 of zeros and ones."""
    random = np.random.default_rng(1)
    categories = random.integers(5, size=(1200, 6))
    a, b, c = categories[:, 0] % 2, categories[:, 1] < 2, categories[:, 2] == 4
    flipped = random.random(len(categories)) < 0.05
    y = (a ^ b ^ (c & (categories[:, 3] > 2)) ^ flipped).astype(int)
    return Table(np.eye(5)[categories].reshape(len(categories), -1), y, CLASSIFICATION)


def mixed_units() -> Table:
    """Two classes by four of ten features, each times a factor between 1e-3 and 1e3."""
    random = np.random.default_rng(2)
    X = random.standard_normal((1000, 10))
    y = (X[:, 0] * X[:, 1] + X[:, 2] + 0.5 * X[:, 3] > 0).astype(int)
    return Table(X * 10.0 ** random.uniform(-3, 3, 10), y, CLASSIFICATION)


def sparse_linear() -> Table:
    """A linear target of 6 of 60 features, a tenth of whose variance is noise."""
    random = np.random.default_rng(3)
    X = random.standard_normal((600, 60))
    y = X[:, :6] @ np.array([2.0, -1.5, 1.0, 1.0, -0.5, 0.5])
    return Table(X, y + random.standard_normal(len(X)) * y.std() / 3, REGRESSION)


SETS: dict[str, Callable[[], Table]] = {
    "iris": _bundled("iris"),
    "wine": _bundled("wine"),
    "breast cancer": _bundled("breast_cancer"),
    "digits": _bundled("digits"),
    "diabetes": _bundled("diabetes"),
    "Friedman 1": _made("friedman1", REGRESSION, n_samples=1000, noise=1.0),
    "Friedman 2": _made("friedman2", REGRESSION, n_samples=1000, noise=125.0),
    "Friedman 3": _made("friedman3", REGRESSION, n_samples=1000, noise=0.1),
    "moons": _made("moons", CLASSIFICATION, n_samples=600, noise=0.3),
    "clusters": _made("classification", CLASSIFICATION, n_samples=1200, n_features=20, n_informative=8, n_classes=3),
    "5 of 100": _made("classification", CLASSIFICATION, n_samples=1000, n_features=100, n_informative=5, n_redundant=0),
    "one-hot": one_hot,
    "mixed units": mixed_units,
    "sparse linear": sparse_linear,
}
QUICK = ("iris", "wine", "diabetes")
