"""Means of targets: exact sums, whatever the size of targets and weights."""

from __future__ import annotations

import itertools
import math

import numpy as np

from fastagop.estimators import inputs

# Targets and weights beyond these, and weights far below 1, are divided by a power of two, which changes no digit of a
# mean, so that no sum of their products leaves float64.
_LARGE, _HEAVY = 2.0**960, 2.0**30


def offset(y: np.ndarray, row_weights: np.ndarray | None) -> np.ndarray:
    """The offset of each column of targets (n, K) without which a narrower dtype keeps their differences: (K,).

    The (weighted) mean where it exceeds the spread around it many times, as in coordinates and time stamps, else 0:
    other targets are learnt as they are.
    """
    if _clearly_none(y, row_weights):
        return np.zeros(y.shape[1])
    middle = mean(y, row_weights)
    with np.errstate(over="ignore", invalid="ignore"):  # Where differences leave float64, nothing is subtracted.
        unit = np.abs(y - middle).max(0)
        scaled = (y - middle) / np.where(unit > 0, unit, 1.0)
        spread = unit * np.sqrt(np.average(scaled**2, axis=0, weights=row_weights))
    return np.where(np.abs(middle) > inputs.FAR * spread, middle, 0.0)


def _clearly_none(y: np.ndarray, row_weights: np.ndarray | None) -> bool:
    """Whether no column has an offset, as means tell that are not exact but take a hundredth of the time."""
    with np.errstate(over="ignore", invalid="ignore"):  # What leaves float64 is not clear.
        middle = np.average(y, axis=0, weights=row_weights)
        spread = np.sqrt(np.average((y - middle) ** 2, axis=0, weights=row_weights))
        return bool(np.all((np.abs(middle) <= 0.5 * inputs.FAR * spread) & np.isfinite(spread)))


def mean(y: np.ndarray, row_weights: np.ndarray | None) -> np.ndarray:
    """The (weighted) mean of each column (K,) of targets (n, K).

    Sums are exact, so that a weight of two and a row that is there twice give the same bits; they are taken from the
    smallest target on, so that constant targets have exactly their value as the mean.
    """
    largest = np.abs(y).max(initial=0.0)
    if _LARGE < largest < math.inf:
        return mean(y * 2.0**-64, row_weights) * 2.0**64
    base = y.min(0)
    row_weights = np.ones(len(y)) if row_weights is None else row_weights
    if not 1.0 / _HEAVY <= (heaviest := row_weights.max()) <= _HEAVY:
        row_weights = row_weights / math.ldexp(1.0, math.frexp(heaviest)[1] - 1)
    weighted = row_weights[:, None].astype(np.longdouble) * (y - base)
    upper = weighted.astype(np.float64)
    lower = (weighted - upper).astype(np.float64)
    total = math.fsum(row_weights)
    sums = [math.fsum(itertools.chain(a, b)) for a, b in zip(upper.T.tolist(), lower.T.tolist(), strict=True)]
    return base + np.array(sums) / total
