"""Recursive feature machines that choose their own settings by rows held out: random or given ones, every iteration."""

from __future__ import annotations

import functools
import operator
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from sklearn import base
from sklearn.utils.metaestimators import available_if

from fastagop.estimators import inputs
from fastagop.estimators.calls import all_or_nothing, without_autograd_or_autocast
from fastagop.estimators.kernel_parameter import KernelParameter
from fastagop.estimators.progress import Progress, check_verbose
from fastagop.estimators.types import ClassWeight, Device, DType, Rows, Scoring, Seed, Self
from fastagop.kernels import checks
from fastagop.kernels.errors import warn
from fastagop.kernels.radial import Laplace, Radial
from fastagop.rfm import trials, validation
from fastagop.rfm.estimator import RFMClassifier, RFMRegressor
from fastagop.rfm.folds import folds_of
from fastagop.rfm.search_files import SavedSearch
from fastagop.rfm.settings import Setting, parameters_of, settings_of
from fastagop.rfm.trials import Task, Trial
from fastagop.solvers.table import Method

_MEDIAN = Laplace("median")
_refitted = operator.attrgetter("refit")  # some methods are there only with it
_PASSED = ("scale", "precision", "backend", "device", "dtype", "solver", "memory_limit")


class _Search(SavedSearch, KernelParameter):
    """What the classifier and the regressor share; ``_Base`` is the estimator that they search for."""

    _Base: type
    # These are parameters of both.
    n_settings: int
    cv: Any
    space: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None
    refit: bool
    n_jobs: int | None
    random_state: Seed
    scoring: Scoring
    average: int
    iterations: int
    validation_fraction: float
    kernel: Radial
    time_limit: float | None
    n_iter_no_change: int | None
    verbose: int
    # These are set by fit.
    n_features_in_: int
    best_estimator_: Any
    estimators_: list[Any]
    scorer_: Any
    cv_results_: dict[str, Any]
    n_splits_: int
    stopped_: str
    best_params_: dict[str, Any]
    best_index_: int
    best_score_: float
    best_iteration_: int

    def _validated_targets(self, y) -> np.ndarray:
        """Targets or labels as an array, checked."""
        raise NotImplementedError

    def _codes(self, y: np.ndarray, weights: np.ndarray | None) -> np.ndarray | None:
        """Class indices (n,), which mean nothing in rows of weight zero; None in regression."""
        return None

    def _estimator(self, setting: Setting, iterations: int):
        """An estimator, not fitted, with the parameters of a setting."""
        passed = {name: getattr(self, name) for name in (*_PASSED, "class_weight") if hasattr(self, name)}
        return self._Base(iterations=iterations, **parameters_of(self.kernel, setting), **passed)

    @all_or_nothing
    def fit(self, X: Rows, y: Rows, sample_weight: Rows | None = None) -> Self:
        """Score every setting on rows held out, and fit the best one, or the best few, to all rows.

        Args:
            X: samples (n, d), NumPy array, DataFrame or torch tensor.
            y: labels (n,) (classifier), floats (n,) or (n, K) (regressor).
            sample_weight: w >= 0, (n,), for the fits and, where the scorer takes them, the scores; a row of weight 0
                counts as left out.

        Returns:
            self, with ``cv_results_`` and, with ``refit``, ``best_estimator_``.

        Raises:
            ValueError, TypeError: naming the parameter or argument, or what every fit failed with.

        Warns:
            UserWarning: fits failed, no setting but the first was begun in time, or scores are NaN.
        """
        random, seconds, patience = self._generator_and_limits()
        for refitted in ("estimators_", "best_estimator_"):  # of an earlier fit
            vars(self).pop(refitted, None)
        rows = inputs.matrix(self, X, reset=True)
        answers = self._validated_targets(y)
        inputs.same_length("y", answers, len(rows))
        weights = inputs.weights(sample_weight, len(rows))
        codes = self._codes(answers, weights)
        settings = settings_of(self.space, self.n_settings, self.kernel, random)
        folds = folds_of(self, rows, answers, (codes, weights), random)
        estimators = [self._estimator(setting, self.iterations) for setting in settings]
        for model in estimators:
            model._regression_and_rules()
        self.scorer_, self._scored_by = validation.scorer_of(estimators[0], self.scoring), self.scoring
        numbers = rows if isinstance(X, torch.Tensor) else rows.numpy()
        deadline = None if seconds is None else time.time() + seconds
        task = Task(numbers, answers, weights, folds, self.scorer_, self.n_jobs is not None, deadline, patience)
        found = self._run(estimators, task)
        self._report_failures(found, len(settings))
        settings = settings[: len(found)]
        self.cv_results_, self.n_splits_ = trials.table(settings, found), len(folds)
        chosen = self._choose(settings, found)
        trials.warn_of_no_score(type(self).__name__, self.cv_results_, self.best_index_)
        if self.refit:
            targets = answers if codes is not None else y
            self.estimators_ = [model.fit(X, targets, sample_weight) for model in chosen]
            self.best_estimator_ = self.estimators_[0]
        return self

    def _generator_and_limits(self) -> tuple[np.random.RandomState, float | None, int | None]:
        """(the generator, seconds, patience), with all parameters checked that no estimator checks."""
        for name, least in (("n_settings", 1), ("average", 1), ("iterations", 0)):
            checks.integer(name, getattr(self, name), least)
        checks.flag("refit", self.refit)
        checks.kernel(self.kernel, settled=False)
        check_verbose(self.verbose)
        jobs = self.n_jobs
        if jobs is not None and (isinstance(jobs, bool) or not isinstance(jobs, (int, np.integer)) or jobs == 0):
            raise ValueError(f"n_jobs must be None or a whole number other than 0 (-1: all cores), got {jobs!r}")
        seconds = None if self.time_limit is None else checks.nonnegative("time_limit", self.time_limit)
        patience = self.n_iter_no_change
        patience = None if patience is None else checks.integer("n_iter_no_change", patience, 1)
        return inputs.random(self.random_state), seconds, patience

    def _explain_fit(self, X, y, sample_weight=None) -> str:
        """What ``fastagop.explain`` says of a fit."""
        from fastagop.rfm.search_plan import explain_fit

        return explain_fit(self, X, y, sample_weight)

    def _regression(self) -> None:
        """Check the parameters of a search that is read from a file."""
        self._generator_and_limits()

    def _run(self, estimators: list, task: Task) -> list[Trial]:
        """The trials that were begun; they are the first ones."""
        found = []
        with Progress(type(self).__name__, "setting", len(estimators), quiet=not self.verbose) as progress:
            for trial in trials.run(estimators, task, self.n_jobs):
                if trial is not None:
                    found.append(trial)
                    known = [score for t in found for score in t.means()[0] if not np.isnan(score)]
                    progress.step(**({"best": f"{max(known):.4g}"} if known else {}))
        return found

    def _report_failures(self, found: list[Trial], count: int) -> None:
        """Say what failed and what was left out: an error where all settings failed, else warnings and ``stopped_``."""
        failed, left = [trial.error for trial in found if trial.error], count - len(found)
        if len(failed) == len(found):
            raise ValueError(f"every setting failed, the first with {failed[0]}")
        if failed:
            warn(
                f"{type(self).__name__}: {len(failed)} of {len(found)} settings failed and have no score; the first "
                f"error is {failed[0]}. cv_results_['error'] has all of them",
                UserWarning,
            )
        self.stopped_ = "" if not left else f"time_limit of {self.time_limit:g} s: {left} of {count} settings left out"
        if left and len(found) == 1:
            warn(f"{type(self).__name__}: {self.stopped_}", UserWarning)

    def _choose(self, settings: list[Setting], found: list[Trial]) -> list:
        """Set the attributes of the best setting and iteration; returns the estimators to fit to all rows."""
        firsts, places, row = [], [], 0
        for index, trial in enumerate(found):
            if not trial.error:
                step, key = trials.best(*trial.means())
                places.append((key, -step, -index))
                firsts.append(row + step)
            row += trial.scores.shape[1]
        order = sorted(range(len(places)), key=places.__getitem__, reverse=True)[: self.average]
        steps = [(-places[i][2], -places[i][1]) for i in order]
        self.best_index_, self.best_iteration_ = firsts[order[0]], steps[0][1]
        self.best_params_ = dict(self.cv_results_["params"][self.best_index_])
        self.best_score_ = float(self.cv_results_["mean_test_score"][self.best_index_])
        return [self._estimator(settings[index], step) for index, step in steps]

    def _best(self, X):
        """The estimator that answers for rows X: the best one, or one whose outputs are the mean of the best few's."""
        self._check_refitted("this answer")
        if len(self.estimators_) == 1:
            return self.best_estimator_
        others = functools.partial(_mean_outputs, self.estimators_)
        return self.best_estimator_._with_outputs(others(X), X, others)

    @available_if(_refitted)
    def predict(self, X: Rows) -> Any:
        """What ``best_estimator_`` predicts; with ``average``, what the mean of the outputs of ``estimators_`` says."""
        return self._best(X).predict(X)

    @available_if(_refitted)
    @without_autograd_or_autocast
    def transform(self, X: Rows) -> Any:
        """``best_estimator_.transform(X)``: the points in the learned metric."""
        self._check_refitted("transform")
        return self.best_estimator_.transform(X)

    def _score(self, X: Rows, y: Rows, sample_weight: Rows | None) -> float:
        """The score of ``scoring``."""
        self._check_refitted("score")
        X, y, sample_weight = map(inputs.on_cpu, (X, y, sample_weight))
        weighted = sample_weight is not None and validation.takes_weights(self.scorer_)
        return self.scorer_(self._best(X), X, y, **({"sample_weight": sample_weight} if weighted else {}))

    @property
    def feature_importances_(self) -> Any:
        """How much each feature counts: (d,), that of ``best_estimator_``."""
        self._check_refitted("feature_importances_")
        return self.best_estimator_.feature_importances_

    @property
    def _n_features_out(self) -> int:
        """Columns of ``transform``, which scikit-learn names."""
        return self.n_features_in_


def _mean_outputs(estimators: list, X) -> torch.Tensor:
    """The mean of some estimators' outputs (m, K) for rows X."""
    return functools.reduce(torch.add, [model._outputs(X) for model in estimators]) / len(estimators)


class RFMClassifierCV(base.ClassifierMixin, _Search):
    """``RFMClassifier`` that chooses bandwidth, ridge, diagonal, centring, exponent and the number of iterations.

    Settings are drawn at random, or given. Every setting is fitted once a fold, and after 0, 1, ... AGOPs scored on
    the rows held out, until the score no longer grows. Such fits of float32 rows on the CPU are coarse: kernel values
    and factor are float32. Those of ``refit``, and all with ``dtype="float64"`` or a ``solver``, are fits as any other.
    The best mean score wins; among equal ones the smaller squared error of the outputs, then fewer iterations. The
    first setting that is tried is the default one: the kernel as it is, a ridge of 1e-3, a full metric.

    Args:
        n_settings: number of settings, where ``space`` is not a list of them.
        cv: number of folds, stratified and shuffled; "holdout": one split; a splitter of scikit-learn, or pairs of
            indices (train, test).
        space: names to lists of values or distributions (with ``rvs``, as SciPy's); or a list of settings (dicts), of
            which each is tried as it is. Names: "bandwidth" (what the kernel's own bandwidth is multiplied by),
            "ridge", "diagonal", "center", "agop_scale" and "exponent" (of a Laplace kernel). Default: bandwidths from
            0.2 to 8 and ridges from 1e-4 to 3, spread evenly by their logarithms; diagonal and center True or False;
            exponents 0.7, 1 and 1.4.
        refit: fit the best setting to all rows.
        n_jobs: settings that are tried at a time, by joblib; each then has one torch thread. Results do not depend on
            the number, but None, which tries one after the other with all of torch's threads, may differ by roundings.
        random_state: seed of the draws of settings and folds.
        scoring: name of a scikit-learn scorer or a function (estimator, X, y) -> number; default accuracy, or R^2.
        average: how many of the best settings are fitted to all rows and answer together, by the mean of their outputs.
        iterations: number of AGOPs at most.
        validation_fraction: of the rows, held out by "holdout".
        scale: "standard" divides every feature by its standard deviation over the rows of a fit; None leaves units
            alone.
        kernel: its bandwidth is the one that settings multiply. ``Laplace("median")``: the median distance of the
            points of a fit.
        device, dtype, precision, backend, solver, memory_limit, class_weight: as in ``RFMClassifier``.
        time_limit: seconds after which no further setting is begun.
        verbose: 1 shows a progress bar on a terminal, and logs every setting at INFO.
        n_iter_no_change: iterations without a better mean score after which a setting is given up; None tries all.

    Attributes:
        cv_results_: a row for each setting and number of AGOPs that was tried, as ``GridSearchCV``'s; "error" and
            "note" say what failed and what fits warned about, "mean_test_tie" what decided between equal scores,
            "coarse" whether all scores are those of coarse fits.
        best_params_: the best setting, with "iterations".
        best_index_, best_score_, best_iteration_: its row, its mean score, and its number of AGOPs.
        best_estimator_: an ``RFMClassifier`` or ``RFMRegressor`` with the best setting, fitted to all rows, with
            ``M_``, ``directions`` and a ``save`` of its own.
        estimators_: with the best ``average`` settings, the best one first.
        scorer_: what scores were taken by. n_splits_: number of folds.
        stopped_: what ``time_limit`` left out; "" where nothing.
        feature_importances_: that of ``best_estimator_``, (d,).
        classes_: the labels. n_features_in_: d.
    """

    _Base = RFMClassifier

    def __init__(
        self,
        n_settings: int = 12,
        cv: Any = 5,
        space: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        refit: bool = True,
        n_jobs: int | None = None,
        random_state: Seed = None,
        scoring: Scoring = None,
        average: int = 1,
        iterations: int = 5,
        validation_fraction: float = 0.2,
        scale: str | None = "standard",
        kernel: Radial = _MEDIAN,
        device: Device = "auto",
        dtype: DType = "float32",
        precision: str = "highest",
        backend: str = "auto",
        solver: Method = "auto",
        memory_limit: float | None = None,
        class_weight: ClassWeight = None,
        time_limit: float | None = None,
        verbose: int = 0,
        n_iter_no_change: int | None = 1,
    ):
        self._store(locals())

    def _validated_targets(self, y):
        return inputs.labels(y)

    def _codes(self, y, weights):
        self.classes_: np.ndarray = np.unique(y if weights is None else y[weights > 0])
        if len(self.classes_) < 2:
            raise ValueError(f"y must hold at least two classes, got one class: {self.classes_.tolist()[0]!r}")
        return np.searchsorted(self.classes_, y)

    def score(self, X: Rows, y: Rows, sample_weight: Rows | None = None) -> float:
        """The score of ``scoring``; by default accuracy."""
        return self._score(X, y, sample_weight)

    @available_if(_refitted)
    def predict_proba(self, X: Rows) -> Any:
        """Probabilities of the classes (m, K), as ``RFMClassifier.predict_proba`` takes them from outputs."""
        return self._best(X).predict_proba(X)

    @available_if(_refitted)
    def decision_function(self, X: Rows) -> Any:
        """Outputs f(X): shape (m,) for two classes (positive means the second), (m, K) otherwise."""
        return self._best(X).decision_function(X)


class RFMRegressorCV(base.RegressorMixin, _Search):
    """``RFMRegressor`` that chooses bandwidth, ridge, diagonal, centring, exponent and the number of iterations.

    Parameters, attributes and the way it chooses are those of ``RFMClassifierCV``, without ``class_weight`` and
    ``classes_``; the default score is R^2, for which "holdout" holds out two rows at least, of four or more.
    """

    _Base = RFMRegressor

    def __init__(
        self,
        n_settings: int = 12,
        cv: Any = 5,
        space: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        refit: bool = True,
        n_jobs: int | None = None,
        random_state: Seed = None,
        scoring: Scoring = None,
        average: int = 1,
        iterations: int = 5,
        validation_fraction: float = 0.2,
        scale: str | None = "standard",
        kernel: Radial = _MEDIAN,
        device: Device = "auto",
        dtype: DType = "float32",
        precision: str = "highest",
        backend: str = "auto",
        solver: Method = "auto",
        memory_limit: float | None = None,
        time_limit: float | None = None,
        verbose: int = 0,
        n_iter_no_change: int | None = 1,
    ):
        self._store(locals())

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def _validated_targets(self, y):
        return inputs.targets(y)

    def score(self, X: Rows, y: Rows, sample_weight: Rows | None = None) -> float:
        """The score of ``scoring``; by default R^2."""
        return self._score(X, y, sample_weight)
