"""Which rows a search trains on and which it scores on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import KFold, StratifiedKFold, check_cv

from fastagop.kernels import checks
from fastagop.kernels.errors import restated
from fastagop.rfm import validation
from fastagop.rfm.trials import Fold


def folds_of(
    search,
    rows: torch.Tensor,
    answers: np.ndarray,
    kinds: tuple[np.ndarray | None, np.ndarray | None],
    random: np.random.RandomState,
) -> list[Fold]:
    """(rows to train on, rows to score on) of each fold; rows of weight zero are not drawn from.

    Args:
        search: whose ``cv`` is "holdout", a number of folds, a splitter of scikit-learn, or (train, test) pairs.
        rows, answers: of the fit.
        kinds: class indices (n,), or None in regression; weights (n,), or None.
        random: the generator.

    Raises:
        ValueError, TypeError: naming cv or validation_fraction.
    """
    cv, (codes, weights) = search.cv, kinds
    kept = np.arange(len(rows)) if weights is None else np.flatnonzero(weights)
    seed, codes = int(random.randint(2**31 - 1)), None if codes is None else codes[kept]
    if isinstance(cv, str):
        checks.choice("cv", cv, ("holdout",), "a number of folds, a splitter, or pairs of indices")
        validation.check_fraction(search.validation_fraction)
        if len(kept) < 2:
            raise ValueError(f"cv='holdout' needs at least two rows, got n_samples={len(kept)}; give more rows")
        held = validation.held_out_count(search, len(kept))
        drawn = [validation.split(len(kept), codes, held, np.random.RandomState(seed))]
    elif isinstance(cv, (int, np.integer)) and not isinstance(cv, bool):
        number = checks.integer("cv", cv, 2)
        kind = KFold if codes is None else StratifiedKFold
        try:
            drawn = list(kind(number, shuffle=True, random_state=seed).split(kept, codes))
        except ValueError as error:
            raise ValueError(f"cv={number}: {error}") from error
    else:
        drawn = _given(cv, rows, answers)
        if weights is None:
            return drawn
        return [_weighing(fold, number, weights) for number, fold in enumerate(drawn)]
    return [(kept[train], kept[test]) for train, test in drawn]


def _given(cv, rows: torch.Tensor, answers: np.ndarray) -> list[Fold]:
    """The folds of a splitter, or of pairs."""
    if not hasattr(cv, "split") and (isinstance(cv, bool) or not isinstance(cv, Iterable)):
        raise ValueError(
            f"cv must be a number of folds, 'holdout', a splitter of scikit-learn or (train, test) pairs, got {cv!r}"
        )
    splitter: Any = check_cv(cv)  # pyright: ignore[reportArgumentType]
    try:
        pairs = list(splitter.split(rows.cpu().numpy(), answers))
    except (ValueError, TypeError) as error:
        if "groups" not in str(error):
            raise restated(error, f"cv: {error}") from error
        text = f"cv: {type(cv).__name__} needs groups; pass list(splitter.split(X, y, groups)) as cv"
        raise ValueError(text) from error
    drawn = [_indices(pair, len(rows), fold) for fold, pair in enumerate(pairs)]
    if not drawn:
        raise ValueError("cv gave no folds; of a generator, which gives its folds once, pass the list")
    return drawn


def _weighing(fold: Fold, number: int, weights: np.ndarray) -> Fold:
    """The rows of a fold whose weight is above 0."""
    train, test = (part[weights[part] > 0] for part in fold)
    for name, part in (("train", train), ("test", test)):
        if len(part) == 0:
            raise ValueError(f"cv: fold {number} has no rows to {name} on whose sample_weight is above 0")
    return train, test


def _indices(pair, n: int, fold: int) -> Fold:
    """A splitter's (train, test) of n rows as indices, which may be masks."""
    found = []
    for name, given in zip(("train", "test"), map(np.asarray, pair), strict=True):
        if given.ndim != 1 or (given.dtype == bool and len(given) != n):
            raise ValueError(f"cv must give indices of rows, or masks ({n},), got shape {given.shape} in fold {fold}")
        part = np.flatnonzero(given) if given.dtype == bool else given
        if len(part) == 0:
            raise ValueError(f"cv: fold {fold} has no rows to {name} on")
        if part.dtype.kind not in "iu":
            raise TypeError(f"cv must give indices of rows or masks, got {part.dtype} in fold {fold}")
        if part.min() < -n or part.max() >= n:
            raise ValueError(f"cv: fold {fold} has rows from {part.min()} to {part.max()}, of {n} rows in all")
        found.append(part.astype(np.int64))  # torch takes uint8 for a mask, and no others
    return found[0], found[1]
