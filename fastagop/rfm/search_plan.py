"""The plan of a search's fit: that of one fit on a fold, how many there are at most, and the refits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from sklearn.base import clone

from fastagop.estimates import on_meta
from fastagop.estimators import inputs
from fastagop.estimators.fit_plans import Data, Step, data_of, iteration_steps, text_of
from fastagop.kernels import checks
from fastagop.kernels.plan import AgopTask, available_bytes, budget, format_bytes
from fastagop.kernels.profile import unsettled
from fastagop.rfm import coarse, trials, validation
from fastagop.rfm.folds import folds_of
from fastagop.rfm.settings import settings_of
from fastagop.solvers.bandwidth import settled_at


@dataclass(frozen=True)
class _Fit:
    """The steps of one fit, and the bytes that it keeps."""

    steps: list[tuple[str, int, Step]]
    held: int

    @property
    def seconds(self) -> float:
        return sum(times * step.total for _, times, step in self.steps)

    @property
    def peak(self) -> int:
        return max(step.peak_bytes for *_, step in self.steps)

    @property
    def refused(self) -> bool:
        return any(step.refused for *_, step in self.steps)


def _costliest(fits: list[_Fit]) -> _Fit:
    """The fit that takes longest, or does not fit."""
    return max(fits, key=lambda fit: (fit.refused, fit.seconds))


@dataclass(frozen=True)
class _Folds:
    """How many folds there are, and the most rows that one trains on and scores on."""

    count: int
    train: int
    test: int


def explain_fit(search, X, y, sample_weight=None) -> str:
    """The text of ``fastagop.explain(search, X, y)``; parameters and data are checked as fit would."""
    if isinstance(search.cv, Iterator):
        raise ValueError("cv is a generator, which gives its folds once and to fit; pass the list of them")
    fresh: Any = clone(search)  # the search stays as it is
    fresh._generator_and_limits()
    model = fresh._estimator({}, fresh.iterations)
    model._regression()
    data = data_of(model, X, y, sample_weight)
    state = np.random.get_state()  # noqa: NPY002 (a random_state of None is this generator, which stays as it is)
    try:
        estimators, folds = _drawn(fresh, X, y, sample_weight)
    finally:
        np.random.set_state(state)  # noqa: NPY002
    kinds = {(model.diagonal, model.center): model for model in reversed(estimators)}  # costs depend on little more
    for model in kinds.values():
        if unsettled(model.kernel):  # no plan depends on a bandwidth
            model.set_params(kernel=settled_at(model.kernel, torch.zeros(1, 1, device="cpu")))
    part = replace(data, X=data.X[:1].expand(folds.train, -1), Y=data.Y[:1].expand(folds.train, -1))
    refits = [_fit(model, data, 0) for model in kinds.values()]
    trials.share_memory(kinds.values(), trials.jobs_of(fresh.n_jobs, len(estimators)), data.X.device)
    fits = [_fit(model, part, folds.test) for model in kinds.values()]
    costly = _costliest(fits)
    name = type(estimators[0]).__name__
    lines = text_of(name, part, costly.steps, costly.held, 1).splitlines()
    count = len(estimators)
    what = f"{_counted(count, 'setting')}, {_counted(folds.count, 'fold')}"
    head = f"{type(fresh).__name__}.fit: {what}; one of the fits:"
    return "\n".join([head, *lines, *_totals(fresh, data, (count, folds), (fits, refits), estimators[0])])


def _counted(count: int, name: str) -> str:
    return f"{count} {name}{'' if count == 1 else 's'}"


def _drawn(search, X, y, sample_weight) -> tuple[list, _Folds]:
    """(an estimator for each setting, the folds) as a fit of the search would draw them."""
    random, _, _ = search._generator_and_limits()
    codes = weights = None
    if on_meta(X) or on_meta(y):
        rows, answers = torch.zeros(len(X), 1, device="cpu"), np.zeros(len(X))
    else:
        rows, answers = inputs.matrix(search, X, reset=True), search._validated_targets(y)
        weights = None if on_meta(sample_weight) else inputs.weights(sample_weight, len(rows))
        codes = search._codes(answers, weights)
    settings = settings_of(search.space, search.n_settings, search.kernel, random)
    folds = folds_of(search, rows, answers, (codes, weights), random)
    estimators = [search._estimator(setting, search.iterations) for setting in settings]
    for model in estimators:
        model._regression_and_rules()
    validation.scorer_of(estimators[0], search.scoring)
    train, test = (max(len(part) for part in parts) for parts in zip(*folds, strict=True))
    return estimators, _Folds(len(folds), train, test)


def _fit(model, data: Data, scored: int) -> _Fit:
    """A fit of an estimator, every iteration of which is scored on some rows."""
    regression, rules = model._regression_and_rules()
    work = (rules.iterations, model.diagonal)
    return _Fit(*iteration_steps(data, regression, 1, AgopTask("sum", model.center), work, (len(data.X), scored)))


def _totals(search, data: Data, counts: tuple[int, _Folds], kinds: tuple[list[_Fit], list[_Fit]], model) -> list[str]:
    """Lines about all fits of a search, of kinds of fits on a fold and to all rows."""
    (settings, folds), n, (fit, refit) = counts, len(data.X), map(_costliest, kinds)
    jobs, slower = 1, 1  # settings at a time, and how many times longer one of them takes then, at most
    if search.n_jobs is not None:
        jobs = trials.jobs_of(search.n_jobs, settings)
        slower = torch.get_num_threads() if data.X.device.type == "cpu" else jobs
    how = "one after the other" if jobs == 1 else f"{jobs} settings at a time, beside the start of their processes"
    label = f"  search     at most {settings * folds.count} such fits, {how}"
    lines, seconds, needed, failing = [], 0.0, 0, fit.refused
    if fit.refused:
        lines.append(f"{label}: they do not fit")
    else:
        seconds = -(-settings // jobs) * folds.count * slower * fit.seconds
        size, note = _held_bytes(data, folds, kinds[0], model)
        needed = jobs * size
        lines += [f"{label}: about {seconds:.2g} s for all of them; settings that are given up take less", *note]
    if search.refit and refit.refused:
        reason, failing = next(step.refused for *_, step in refit.steps if step.refused), True
        lines.append(f"  refit      does not fit: {reason}")
    elif search.refit:
        again = min(settings, search.average)
        seconds += again * refit.seconds
        needed = max(needed, *(one.peak + again * one.held for one in kinds[1]))
        lines.append(f"  refit      {_counted(again, 'fit')} to all {n} rows: about {again * refit.seconds:.2g} s")
    if failing:
        return lines
    free = available_bytes(data.X.device)
    size = f"at most about {format_bytes(needed)} beyond X and y, where all folds of a setting are held at once"
    lines.append(f"  in all     about {seconds:.2g} s; {size}; {format_bytes(free)} are free now")
    if needed > free:
        lines.append("  may not fit: all of it together; use fewer rows, folds or jobs")
    return lines


def _held_bytes(data: Data, folds: _Folds, fits: list[_Fit], model) -> tuple[int, list[str]]:
    """(bytes that a setting takes at most, lines about coarse fits): one fit, beside all folds, coarse or not."""
    part, K = data.X[:1].expand(folds.train, -1), data.Y.shape[1]
    needed = max(fit.peak + folds.count * fit.held for fit in fits)
    needed += folds.count * 16 * (folds.train + folds.test) * data.X.shape[1]  # rows as they are given, and points
    if not coarse.serves(model, data.X):
        return needed, []
    size = folds.count * coarse.fold_bytes(part, K, folds.test)
    if size > budget(checks.memory_limit(model.memory_limit), data.X.device):
        return needed, [f"  coarse     no fits: those of float32 rows on the CPU would hold {format_bytes(size)}"]
    return needed + size, ["  coarse     float32 rows on the CPU: fits that are compared are coarse and take less"]
