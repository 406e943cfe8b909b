"""Fits that a search compares: one for each setting and fold, each of which scores all of its iterations."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import joblib
import numpy as np
import torch
from sklearn.base import clone

from fastagop.estimators import inputs
from fastagop.kernels.errors import warn
from fastagop.kernels.plan import budget
from fastagop.rfm import validation
from fastagop.rfm.coarse import CoarseFold
from fastagop.rfm.settings import Setting

Fold = tuple[np.ndarray, np.ndarray]
_DIGITS = 12  # Means that agree to so many digits are equal: sums of the same terms may differ in the last one.


@dataclass(frozen=True)
class Task:
    """What every trial of a search is given.

    Attributes:
        X, y: rows as arrays or tensors, and labels or targets as arrays.
        weights: of the rows (n,), or None.
        folds: (rows to train on, rows to score on) of each.
        scorer: (estimator, X, y) -> a number, the larger the better.
        alone: whether torch may use one thread only.
        deadline: a time of ``time.time`` after which no setting begins; None for no end.
        patience: iterations without a better mean score after which a setting is given up; None for no end.
    """

    X: Any
    y: np.ndarray
    weights: np.ndarray | None
    folds: Sequence[Fold]
    scorer: Any
    alone: bool
    deadline: float | None
    patience: int | None


@dataclass(frozen=True)
class Trial:
    """What the folds said about a setting.

    Attributes:
        scores, ties: after 0, 1, ... AGOPs (folds, as many as were tried); NaN where a fit failed.
        seconds: of each fit (folds,).
        error: of the fits that failed; "" where none did.
        note: what the fits warned about.
        coarse: whether the scores are those of coarse fits alone.
    """

    scores: np.ndarray
    ties: np.ndarray
    seconds: np.ndarray
    error: str
    note: str
    coarse: bool

    def means(self) -> tuple[np.ndarray, np.ndarray]:
        """(mean scores, mean ties) after 0, 1, ... AGOPs."""
        return self.scores.mean(0), self.ties.mean(0)


def run(estimators: Sequence, task: Task, n_jobs: int | None) -> Iterator[Trial | None]:
    """The trials of estimators with their parameters set, in their order; None for one that was not begun in time."""
    jobs = jobs_of(n_jobs, len(estimators))
    share_memory(estimators, jobs, inputs.device(estimators[0].device))
    calls = (functools.partial(_trial, model, task, index == 0) for index, model in enumerate(estimators))
    if n_jobs is None or joblib.effective_n_jobs(n_jobs) == 1:
        shared: dict[int, CoarseFold] = {}
        return (call(shared) for call in calls)
    parallel = joblib.Parallel(n_jobs=n_jobs, return_as="generator")
    return iter(parallel(joblib.delayed(call)({}) for call in calls))  # pyright: ignore[reportArgumentType]


def jobs_of(n_jobs: int | None, settings: int) -> int:
    """How many settings are tried at a time."""
    return 1 if n_jobs is None else min(settings, joblib.effective_n_jobs(n_jobs))


def share_memory(estimators: Iterable, jobs: int, device: torch.device) -> None:
    """Give estimators that are fitted at a time a share of the memory each, where nobody has set a limit."""
    if jobs > 1:
        share = max(1, budget(None, device) // jobs)
        for model in estimators:
            model.memory_limit = share if model.memory_limit is None else model.memory_limit


def _trial(estimator, task: Task, always: bool, shared: dict[int, CoarseFold]) -> Trial | None:
    """All folds of one setting, iteration by iteration, until the mean score no longer grows.

    Args:
        estimator: with the setting's parameters.
        task: of all settings.
        always: also after the deadline.
        shared: folds that were read already.
    """
    if not always and task.deadline is not None and time.time() > task.deadline:
        return None
    shape, steps = (len(task.folds), estimator.iterations + 1), 0
    scores, ties, seconds = np.full(shape, np.nan), np.full(shape, np.nan), np.zeros(shape[0])
    errors, notes, full = [], [], []
    sources: list[Iterator | None] = [_stages(estimator, task, i, shared, notes, full) for i in range(len(task.folds))]
    with _alone(task.alone) as caught:
        for step in range(estimator.iterations + 1):
            for index, source in enumerate(sources):
                begin = time.perf_counter()
                try:
                    if source is not None:
                        scores[index, step], ties[index, step] = next(source)
                except Exception as error:  # a row of the results tells of it
                    errors.append(f"{type(error).__name__}: {error}")
                    sources[index], scores[index], ties[index] = None, np.nan, np.nan  # of its earlier iterations, too
                seconds[index] += time.perf_counter() - begin
            steps = step + 1
            if not errors and _tired(scores[:, :steps].mean(0), ties[:, :steps].mean(0), task.patience):
                break
    notes += [str(warning.message) for warning in caught]
    error, note = ("; ".join(dict.fromkeys(found)) for found in (errors, notes))
    return Trial(scores[:, :steps], ties[:, :steps], seconds, error, note, not full)


def best(scores: np.ndarray, ties: np.ndarray) -> tuple[int, tuple[bool, float, float]]:
    """(the first of the best mean scores, its ``validation.key``)."""
    pairs = [(round(float(s), _DIGITS), round(float(t), _DIGITS)) for s, t in zip(scores, ties, strict=True)]
    keys = [validation.key(*pair) for pair in pairs]
    step = max(range(len(keys)), key=lambda i: (*keys[i], -i))
    return step, keys[step]


def _tired(scores: np.ndarray, ties: np.ndarray, patience: int | None) -> bool:
    """Whether the best of the mean scores lies so many iterations back."""
    return patience is not None and len(scores) - 1 - best(scores, ties)[0] >= patience


def _stages(estimator, task: Task, index: int, shared: dict[int, CoarseFold], notes: list[str], full: list[int]):
    """(score, tie) after 0, 1, ... AGOPs on a fold: of a coarse fit and, from where that gives up, of a usual one.

    Notes of what was read, and the folds that took a usual fit, join the lists.
    """
    if index not in shared:
        X, y, weights, X_test, y_test, scorer = _parts(task, *task.folds[index])
        shared[index] = CoarseFold(estimator, (X, y, weights), (X_test, y_test), scorer)
    fold, done = shared[index], 0
    if fold.usual(len(task.folds)):
        for found in fold.scores(estimator):
            if done == 0:
                notes += fold.notes
            done += 1
            yield found
    if done <= estimator.iterations:
        full.append(index)
        model = _fitted(estimator, task, *task.folds[index])
        yield from list(zip(model.validation_score_, model._validation_ties, strict=True))[done:]


def _fitted(estimator, task: Task, train: np.ndarray, test: np.ndarray):
    """The estimator fitted to some rows, every iteration scored on others."""
    X, y, weights, X_test, y_test, scorer = _parts(task, train, test)
    model: Any = clone(estimator)
    model.set_params(scoring=scorer)
    model._of_fold = True
    return model.fit(X, y, weights, X_test, y_test)


def _parts(task: Task, train: np.ndarray, test: np.ndarray) -> tuple:
    """(X, y, weights or None) of the rows to train on, (X, y) of those to score on, and the scorer of a fold."""
    weights, scorer = None, task.scorer
    if task.weights is not None:
        weights = task.weights[train]
        if validation.takes_weights(scorer):
            scorer = functools.partial(scorer, sample_weight=task.weights[test])
    X, X_test = (validation.take(task.X, part) for part in (train, test))
    return X, task.y[train], weights, X_test, task.y[test], scorer


class _Turn:
    """A lock that a forked child has anew: it would wait for a thread of its parent that had the old one."""

    def __init__(self) -> None:
        self._renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self.lock = threading.RLock()


_TURN = _Turn()


@contextlib.contextmanager
def _alone(fewer: bool) -> Iterator[list[warnings.WarningMessage]]:
    """What is warned of within, and torch with one thread where the trials beside this one have theirs.

    Both are settings of the whole process: trials that joblib runs in threads of it take turns.
    """
    with _TURN.lock, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = torch.get_num_threads()
        torch.set_num_threads(1 if fewer else before)
        try:
            yield caught
        finally:
            torch.set_num_threads(before)


def warn_of_no_score(name: str, results: dict[str, Any], best_index: int) -> None:
    """Say that settings of a search have no score, as where some fold lacks a class; scikit-learn's warn, too."""
    lost = int((np.isnan(results["mean_test_score"]) & (results["error"] == "")).sum())
    if not math.isfinite(score := results["mean_test_score"][best_index]):
        note = results["note"][best_index]
        warn(
            f"{name}: the best mean score is {score}, and the squared error of the outputs chose among the settings"
            + (f"; their fits noted: {note}" if note else ""),
            UserWarning,
        )
    elif lost:
        warn(
            f"{name}: {lost} of {len(results['params'])} rows of cv_results_ have no score, since scoring was NaN on a "
            "fold; cv_results_['note'] says more",
            UserWarning,
        )


def table(settings: Sequence[Setting], trials: Sequence[Trial]) -> dict[str, Any]:
    """``cv_results_``: a row for each setting and number of AGOPs, under the names of scikit-learn's searches."""
    counts = [trial.scores.shape[1] for trial in trials]
    each = [index for index, count in enumerate(counts) for _ in range(count)]  # the setting of every row
    params = [
        {**setting, "iterations": step}
        for setting, count in zip(settings, counts, strict=True)
        for step in range(count)
    ]
    seconds = np.array([trials[index].seconds for index in each])
    scores = np.concatenate([trial.scores.T for trial in trials])
    results: dict[str, Any] = {"mean_fit_time": seconds.mean(1), "std_fit_time": seconds.std(1)}
    results |= {f"param_{name}": np.array([row[name] for row in params]) for name in params[0]}
    results["params"] = params
    results |= {f"split{fold}_test_score": scores[:, fold] for fold in range(scores.shape[1])}
    with np.errstate(invalid="ignore"):  # scores of minus infinity
        results |= {"mean_test_score": scores.mean(1), "std_test_score": scores.std(1)}
    results["mean_test_tie"] = np.concatenate([trial.ties.mean(0) for trial in trials])
    results["rank_test_score"] = _ranks(results["mean_test_score"])
    results["coarse"] = np.array([trials[index].coarse for index in each])
    results["error"] = np.array([trials[index].error for index in each], dtype=object)
    results["note"] = np.array([trials[index].note for index in each], dtype=object)
    return results


def _ranks(means: np.ndarray) -> np.ndarray:
    """1 for the largest, equal ones alike, as scikit-learn ranks; what is NaN is last. ``best`` goes by the same."""
    known = np.array([-np.inf if math.isnan(mean) else round(float(mean), _DIGITS) for mean in means])
    last = 1 + int((~np.isnan(means)).sum())
    ranks = np.array([1 + int((known > mean).sum()) for mean in known], dtype=np.int32)
    return np.where(np.isnan(means), last, ranks).astype(np.int32)
