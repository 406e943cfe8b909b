"""Rows that were held out, what predictions for them are worth, and which rows these are."""

from __future__ import annotations

import contextlib
import inspect
import math
import numbers
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sklearn.base import RegressorMixin
from sklearn.exceptions import UndefinedMetricWarning
from sklearn.metrics import check_scoring
from sklearn.model_selection import train_test_split

from fastagop.distributed.engine import Local
from fastagop.kernels.errors import restated, warn

_ASKED = (
    "a scorer may ask the estimator for predict, decision_function or predict_proba of these rows, and for no results "
    "of the fit, which goes on"
)
_NONE = "scoring: the score of the validation rows is NaN"


@dataclass(frozen=True)
class HeldOut:
    """Validation rows.

    Attributes:
        points: the rows as the kernel sees them before a metric (m, d), float64.
        X, y: the rows and their labels or targets as scikit-learn's scorers take them.
        codes: targets (m, K) as the kernel machine has them; the squared error decides between equal scores.
        weights: of the rows (m,), or None.
        scorer: (estimator, X, y) -> a number, the larger the better.
        told: what has been warned of.
    """

    points: torch.Tensor
    X: Any
    y: np.ndarray
    codes: torch.Tensor
    weights: np.ndarray | None
    scorer: Any
    told: list[str] = field(default_factory=list)

    def score(self, model, outputs: torch.Tensor) -> tuple[float, float]:
        """(score, what decides between equal scores) of outputs (m, K) for the rows.

        Args:
            model: the estimator, whose ``predict`` and the like are asked for what it makes of the outputs.
            outputs: of its kernel machine, float64.

        Warns:
            UserWarning: once, of a score that is NaN.
        """
        options = {} if self.weights is None or not takes_weights(self.scorer) else {"sample_weight": self.weights}
        try:
            score = float(self.scorer(model._with_outputs(outputs, self.X), self.X, self.y, **options))
        except AttributeError as error:
            text = f"scoring: the validation rows have no score, since {str(error).rstrip('.')}; {_ASKED}"
            raise restated(error, text) from error
        except (ValueError, TypeError) as error:
            if not (missing := self._missing(model)):
                raise restated(error, f"scoring: the validation rows have no score, since {error}") from error
            text = f"scoring: no validation row has the label {missing[0]!r}, and the scorer refuses them ({error})"
            self._say(f"{text}; the squared error of the outputs decides")
            score = math.nan
        if math.isnan(score):
            self._say(
                f"{_NONE}, which counts as the worst; the squared error of the outputs decides between such scores"
            )
        return score, self.tie(outputs)

    def _say(self, text: str) -> None:
        """Warn, once."""
        if not self.told:
            self.told.append(text)
            warn(text, UserWarning)

    def _missing(self, model) -> list:
        """The labels of a classifier that no row has."""
        return [label for label in getattr(model, "classes_", np.empty(0)).tolist() if not np.any(self.y == label)]

    def tie(self, outputs: torch.Tensor) -> float:
        """What decides between equal scores: the (weighted) mean squared error of the outputs, negative."""
        errors = (outputs - self.codes).square().mean(1).cpu().numpy()
        return -float(np.average(errors, weights=self.weights))


class Lenient:
    """A scorer for the few rows of a leaf: NaN, so that squared errors decide, where it refuses them.

    Rows of one class, or of fewer than the leaf has, are no error here; the score on the rows of all leaves is taken
    by the scorer itself.
    """

    def __init__(self, scorer):
        self.scorer = scorer

    def __call__(self, model, X, y, **options) -> float:
        """The score of (estimator, X, y), or NaN."""
        with few_rows(leaf=True):
            try:
                return float(self.scorer(model, X, y, **options))
            except ValueError:
                return math.nan


@contextlib.contextmanager
def few_rows(leaf: bool = False) -> Iterator[None]:
    """While few rows are scored, scikit-learn does not warn of scores that they do not define.

    Nor does ``HeldOut`` while the rows are those of a leaf, of which the others may have a score.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UndefinedMetricWarning)
        if leaf:
            warnings.filterwarnings("ignore", message=_NONE, category=UserWarning)
        yield


def key(score: float, tie: float) -> tuple[bool, float, float]:
    """What is larger for a better (score, tie): of equal scores, and of those that are NaN, the tie decides."""
    known = not math.isnan(score)
    return known, score if known else 0.0, tie


def accuracy(classes: np.ndarray, outputs: torch.Tensor, y: np.ndarray, weights: np.ndarray | None) -> float:
    """The (weighted) share of rows whose label is the class of their largest output."""
    return float(np.average(classes[outputs.argmax(1).cpu().numpy()] == y, weights=weights))


def r_squared(outputs: torch.Tensor, targets: torch.Tensor, weights: np.ndarray | None) -> float | None:
    """Mean over the targets (m, K) of R^2; None where a target does not vary, whose R^2 is scikit-learn's to define."""
    found, wanted = outputs.cpu().numpy(), targets.cpu().numpy()
    left = np.average((found - wanted) ** 2, axis=0, weights=weights)
    spread = np.average((wanted - np.average(wanted, axis=0, weights=weights)) ** 2, axis=0, weights=weights)
    return float(np.mean(1.0 - left / spread)) if len(found) > 1 and bool((spread > 0).all()) else None


def takes_weights(scorer) -> bool:
    """Whether a scorer takes sample weights: the estimator's own does, a metric or a function where it names them."""
    scorer = scorer.scorer if isinstance(scorer, Lenient) else scorer
    rule = getattr(scorer, "_score_func", None if hasattr(scorer, "_estimator") else scorer)
    return rule is None or "sample_weight" in inspect.signature(rule).parameters


def scorer_of(model, scoring):
    """The scorer of a name or a function (estimator, X, y) -> number; default the estimator's ``score``."""
    if not (scoring is None or isinstance(scoring, str) or callable(scoring)):
        raise TypeError(
            "scoring must be None, the name of one scorer or a function (estimator, X, y) -> number, got "
            f"{scoring!r}; one score decides"
        )
    try:
        return check_scoring(model, scoring=scoring)
    except (ValueError, TypeError) as error:
        text = f"scoring must be None, the name of a scorer or a function, got {scoring!r}: {error}"
        raise restated(error, text) from None


def split(n: int, codes: np.ndarray | None, held: int, random) -> tuple[np.ndarray, np.ndarray]:
    """(rows that stay, rows held out) of n, in ascending order.

    Stratified by class where classes are large enough; a class of two rows or more is on both sides where it can be,
    and the row of a class of one stays.
    """
    rows, alone = np.arange(n), np.zeros(n, dtype=bool)
    if codes is not None:
        alone = np.bincount(codes)[codes] == 1
        alone &= n - alone.sum() > held  # enough others are there to hold out
    drawn, stratify = rows[~alone], None
    if codes is not None:
        counts = np.bincount(codes[drawn])
        even = counts[counts > 0].min() >= 2 and min(held, len(drawn) - held) >= np.count_nonzero(counts)
        stratify = codes[drawn] if even else None
    stay, out = train_test_split(drawn, test_size=held, stratify=stratify, random_state=random)
    stay, out = np.append(stay, rows[alone]), np.asarray(out)
    if codes is not None:
        _complete_(out, stay, codes)
        _complete_(stay, out, codes)
    return np.sort(stay), np.sort(out)


def _complete_(to: np.ndarray, of: np.ndarray, codes: np.ndarray) -> None:
    """Exchange rows, so that ``to`` has one of every class of which ``of`` has two, while a class has two to spare."""
    for lacking in np.setdiff1d(codes[of], codes[to]):
        counts, there = np.bincount(codes[to]), np.flatnonzero(codes[of] == lacking)
        if len(there) < 2 or counts.max() < 2:
            continue
        here = np.flatnonzero(codes[to] == counts.argmax())[0]
        to[here], of[there[0]] = of[there[0]], to[here]


def chosen(part: tuple[np.ndarray, np.ndarray], engine: Local, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Rows that the first rank has drawn, on every rank."""
    return tuple(engine.broadcast(torch.from_numpy(index).to(device)) for index in part)


def take(rows, index: np.ndarray):
    """Some rows of an array or a tensor."""
    return rows[torch.from_numpy(index).to(rows.device)] if isinstance(rows, torch.Tensor) else rows[index]


def others(n: int, part: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """Places of those of n rows that a part of them leaves out, ascending; a part of None is all rows."""
    outside = torch.ones(n, dtype=torch.bool, device=device)
    outside[slice(None) if part is None else part] = False
    return outside.nonzero()[:, 0]


def check_fraction(value) -> None:
    """Refuse a ``validation_fraction`` that is no number between 0 and 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < float(value) < 1:
        raise ValueError(f"validation_fraction must be a number between 0 and 1, got {value!r}")


def held_out_count(model, n: int) -> int:
    """How many of n rows an estimator's ``validation_fraction`` holds out: at least one, but never all.

    R^2, the default score of regression, is defined for two rows or more: two are held out of four or more.
    """
    count = count_of("validation_fraction", float(model.validation_fraction), n)
    least = 2 if n >= 4 and model.scoring is None and isinstance(model, RegressorMixin) else 1
    return min(max(least, count), n - 1)


def count_of(name: str, value, n: int) -> int:
    """How many of n rows a whole number, or a fraction of them, asks for: one at least and n at most.

    Raises:
        ValueError, TypeError: naming the parameter.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number of rows or a fraction of them, got {value!r}")
    if isinstance(value, (int, np.integer)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value!r}")
        return min(int(value), n)
    if not (math.isfinite(value) and 0 < value <= 1):
        raise ValueError(f"{name} must be a fraction in (0, 1] or a whole number of rows, got {value!r}")
    return max(1, min(n, round(n * value)))
