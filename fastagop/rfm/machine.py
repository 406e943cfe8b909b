"""What the recursive feature machines share: fit, and what can be asked of the learnt metric."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted

from fastagop.distributed.engine import Local, engine_of
from fastagop.estimators import inputs, shared_fits
from fastagop.estimators.base import KernelEstimator, Training
from fastagop.estimators.calls import all_or_nothing, without_autograd_or_autocast
from fastagop.estimators.kernel_ridge import KernelRidge
from fastagop.estimators.progress import Progress
from fastagop.estimators.types import Rows, Scoring, Seed, Self
from fastagop.kernels import checks
from fastagop.kernels.errors import restated
from fastagop.kernels.operations import gradients
from fastagop.kernels.plan import AgopTask
from fastagop.rfm import validation
from fastagop.rfm.directions import Targets, leading, warn_of_identity
from fastagop.rfm.learning import Learner, Learnt, MergedPoints, Rules, Stage
from fastagop.rfm.metric import Metric, Span
from fastagop.rfm.preparation import Preparation, check_scale, warn_of_faint_kernel
from fastagop.rfm.records import Directions, IterationEvent, IterationRecord, pack_record, pack_score, unpack_record
from fastagop.rfm.validation import HeldOut
from fastagop.solvers.solution import Solution, warn_about

# What a fit comes to after its iterations, or in the course of them.
_LEARNT = (
    *("iterations_", "best_iteration_", "validation_score_", "_validation_ties", "solution_"),
    *("_metric", "_centers", "_alpha", "_learnt", "_seen", "_unseen_rows"),
)


class RecursiveFeatureMachine(KernelEstimator):
    """The parts that the classifier and the regressor share; these say what an answer is to a scorer.

    Hooks: ``_answers``, ``_codes``. What trees, searches and probes use beside public methods: before a fit
    ``_regression_and_rules``, ``_training`` and ``_given``, and ``_steps`` for its plan; of a fitted machine
    ``_outputs_at``, ``_outputs_before_last_solve``, ``_unseen_rows``, ``_validation_ties``, ``_metric``, ``_centers``.
    """

    iterations: int
    diagonal: bool
    center: bool
    scale: str | None
    early_stopping: bool
    validation_fraction: float
    n_iter_no_change: int | None
    scoring: Scoring
    metric_samples: float | None
    time_limit: float | None
    random_state: Seed
    # These are set by fit.
    iterations_: list[IterationRecord]
    best_iteration_: int
    validation_score_: np.ndarray
    solution_: Solution
    _diagonal_of_fit: bool  # what ``diagonal`` was in fit, whatever the parameter has become
    _unseen_rows: torch.Tensor  # places of the training rows that M is not made of; a loaded machine has none
    _validation_ties: np.ndarray  # what decides between equal scores in validation_score_
    _learnt: tuple[list[Stage], torch.Tensor] | None
    _metric: Metric
    _preparation: Preparation
    _seen: Targets

    def _answers(self, name: str, y) -> np.ndarray:
        """Labels or targets of validation rows, checked; errors call them by that name."""
        raise NotImplementedError

    def _codes(self, y: np.ndarray) -> torch.Tensor:
        """Labels or targets as the kernel machine has them: +-1, or without the intercept; (m, K), float64."""
        raise NotImplementedError

    @all_or_nothing
    @without_autograd_or_autocast
    def fit(
        self, X: Rows, y: Rows, sample_weight: Rows | None = None, X_val: Rows | None = None, y_val: Rows | None = None
    ) -> Self:
        """Alternate kernel regression and AGOP, then solve once more with the last M, or with the best one.

        With validation rows, given or held out by ``early_stopping``, the kernel regression of every iteration is
        scored on them, and the best one predicts. Rows that were held out, or left out by ``metric_samples``, have no
        part in M, but in the last solve.

        Args:
            X: samples (n, d), NumPy array, DataFrame or torch tensor.
            y: labels (n,) (classifier), floats (n,) or (n, K) (regressor).
            sample_weight: w >= 0, (n,): the solve is (K + ridge W^-1) alpha = Y and the AGOP a weighted sum, so that
                a weight of 2 counts as a row written twice and a weight of 0 as a row left out. Default 1.
            X_val, y_val: validation rows (m, d) and their labels or targets; nothing is trained on them.

        Returns:
            self, with ``kernel_``, ``M_``, ``iterations_`` and ``solution_``.

        Raises:
            ValueError, TypeError: naming the parameter or argument. MemoryError: the kernel matrix does not fit.
            fastagop.distributed.RankLost: a process of the group died.

        Warns:
            NumericalWarning: per solve whose result had to be altered.
        """
        with shared_fits.refusals_told(self):
            regression, rules = self._regression_and_rules()
            if (X_val is None) != (y_val is None):
                raise ValueError(f"X_val and y_val belong together: {'X_val' if X_val is None else 'y_val'} is missing")
            data, engine = self._owned(self._training(X, y, sample_weight), X), engine_of(self.process_group)
            given = None if X_val is None else self._given(X_val, y_val)
        self._diagonal_of_fit = bool(self.diagonal)
        for name in _LEARNT:  # A scorer that asks for them would take those of an earlier fit for this one's.
            vars(self).pop(name, None)
        said = f"X_val {'None' if given is None else 'given'}"
        also = {} if given is None else {"X_val": given.points, "y_val": given.codes}
        shared_fits.agree(self, said, X=data.X, Y=data.Y, sample_weight=data.weights, **also)
        random = inputs.random(self.random_state)
        held, learn = self._held_out(data, given, random, engine)
        learn = self._sampled(data, learn, random, engine)
        self._unseen_rows = validation.others(len(data.X), learn, data.X.device)
        part = data if learn is None else _rows_of(data, learn)
        points, reported = MergedPoints.of(part.X, part.Y, part.weights), set()
        regression = self._with_bandwidth(regression, points.X)
        points = points.by_class(part.X, part.classes)
        first, learnt = points.X, self._learn(points, regression, rules, held, reported)
        self.iterations_, self.best_iteration_, self._metric = learnt.records, learnt.best, learnt.everywhere()
        if held is not None:
            self.validation_score_, self._validation_ties = np.array(learnt.scores), np.array(learnt.ties)
        if learn is None:
            self._centers, solved = self._metric.points(points.X), learnt.solved
        else:
            points = MergedPoints.of(data.X, data.Y, data.weights).by_class(data.X, data.classes)
            self._centers, solved = points.solve(self._metric, regression, engine)
        self._learnt, self._seen = ([stage.bare for stage in learnt.stages], learnt.coordinates), Targets.of(points)
        self.solution_, self._alpha = solved.solution, solved.alpha
        warn_about(self.solution_, reported, which="after the last iteration")
        warn_of_faint_kernel(self, first, data.weights, reported)
        return self

    def _owned(self, data: Training, X) -> Training:
        """The data without the caller's memory, which the caller may write to."""
        if isinstance(X, torch.Tensor) and data.X.untyped_storage().data_ptr() == X.untyped_storage().data_ptr():
            return dataclasses.replace(data, X=data.X.clone())
        return data

    def _learn(
        self, points: MergedPoints, regression: KernelRidge, rules: Rules, held: HeldOut | None, reported: set
    ) -> Learnt:
        """Run the iterations; records are reported and callbacks called as they come."""
        with Progress("RFM", "iteration", rules.iterations, quiet=shared_fits.quiet(self)) as progress:

            def after(index: int, record: IterationRecord, metric: Metric) -> None:
                warn_about(record.solution, reported, which=f"of iteration {index + 1}")
                if self.callbacks:
                    M = metric.matrix(points.X.shape[1], self.diagonal, points.X, points.X.dtype)
                    for callback in self.callbacks:
                        callback(IterationEvent(index, rules.iterations, record, M))
                progress.step()

            def score(stage: Stage, coordinates: torch.Tensor) -> tuple[float, float]:
                assert held is not None
                return held.score(self, self._stage_outputs(stage, coordinates, held.points))

            scored = None if held is None else score
            return Learner(points, regression, rules, engine_of(self.process_group), scored, after).run()

    def _held_out(
        self, data: Training, given: HeldOut | None, random, engine: Local
    ) -> tuple[HeldOut | None, torch.Tensor | None]:
        """(validation rows, those given or some of the data's, or None; the rows that remain, None for all)."""
        if given is not None or not self.early_stopping:
            return given, None
        scorer = validation.scorer_of(self, self.scoring)
        n = len(data.X)
        held = validation.held_out_count(self, n)
        if held < 1:
            raise ValueError(
                f"early_stopping needs at least two rows, got n_samples={n}; use early_stopping=False or more rows"
            )
        codes = None if data.classes is None else data.classes.cpu().numpy()
        stay, out = validation.chosen(validation.split(n, codes, held, random), engine, data.X.device)
        part = _rows_of(data, out)
        weights = None if part.weights is None else part.weights.cpu().numpy()
        y, points = self._original(part), part.X.double()
        rows = self._preparation.original(points).cpu().numpy()
        return HeldOut(points, rows, y, self._codes(y), weights, scorer), stay

    def _given(self, X_val, y_val) -> HeldOut:
        """Validation rows and their labels or targets, checked."""
        try:
            points = self._preparation.near(self._samples(X_val))
        except (ValueError, TypeError) as error:
            raise restated(error, f"X_val: {error}") from error
        y = self._answers("y_val", y_val)
        if len(y) != len(points):
            raise ValueError(f"y_val must have one row per row of X_val: X_val has {len(points)}, y_val has {len(y)}")
        return HeldOut(points, inputs.on_cpu(X_val), y, self._codes(y), None, validation.scorer_of(self, self.scoring))

    def _sampled(self, data: Training, learn: torch.Tensor | None, random, engine: Local) -> torch.Tensor | None:
        """The rows that M is learnt from: ``metric_samples`` of those there are; None for all."""
        rows = torch.arange(len(data.X), device=data.X.device) if learn is None else learn
        if self.metric_samples is None:
            return learn
        count = validation.count_of("metric_samples", self.metric_samples, len(rows))
        if count == len(rows):
            return learn
        codes = None if data.classes is None else data.classes[rows].cpu().numpy()
        stay, _ = validation.chosen(validation.split(len(rows), codes, len(rows) - count, random), engine, rows.device)
        return rows[stay]

    def _planned_fit(self):
        """For ``fastagop.explain``: (data, ranks) -> the steps of a fit, of parameters that are checked now."""
        return functools.partial(self._steps, self._regression_and_rules()[0])

    def _steps(self, regression: KernelRidge, data, share: int):
        """([(name, how often, step)], bytes that the fit keeps)."""
        from fastagop.estimators.fit_plans import iteration_steps

        task = AgopTask("sum", self.center)
        n, held = len(data.X), 0
        if self.early_stopping:
            held = validation.held_out_count(self, n)
        learn = n - held
        if self.metric_samples is not None:
            learn = validation.count_of("metric_samples", self.metric_samples, learn)
        return iteration_steps(data, regression, share, task, (int(self.iterations), self.diagonal), (learn, held))

    def _regression_and_rules(self) -> tuple[KernelRidge, Rules]:
        """The kernel regression of every iteration and what ends them, of parameters that are checked now."""
        regression, iterations = self._regression(), checks.integer("iterations", self.iterations, 0)
        for name in ("diagonal", "center", "early_stopping"):
            checks.flag(name, getattr(self, name))
        check_scale(self.scale)
        if self.early_stopping:
            validation.check_fraction(self.validation_fraction)
        inputs.random(self.random_state)
        patience, seconds = self.n_iter_no_change, self.time_limit
        patience = None if patience is None else checks.integer("n_iter_no_change", patience, 1)
        seconds = None if seconds is None else checks.nonnegative("time_limit", seconds)
        if self.metric_samples is not None:
            validation.count_of("metric_samples", self.metric_samples, 1)
        return regression, Rules(iterations, self.diagonal, self.center, self.agop_scale, patience, seconds)

    @property
    def M_(self) -> Any:
        """The metric in the units of the data, scaled: (d, d), or (d,) with ``diagonal``; made when it is asked for."""
        check_is_fitted(self)
        diagonal = getattr(self, "_diagonal_of_fit", self.diagonal)  # files of earlier versions have no other
        M = self._metric.matrix(self.n_features_in_, diagonal, self._centers, self._fitted_dtype)
        return self._like_fit_input(self._preparation.reported(M))

    @without_autograd_or_autocast
    def transform(self, X: Rows) -> Any:
        """X M^(1/2), the points in the learned metric: shape (m, d), of X's kind and dtype.

        With ``scale="standard"`` these are the standardised rows in the metric that was learnt for them.
        """
        check_is_fitted(self)
        rows = self._samples(X)
        if self._preparation.unit is not None:
            rows = self._preparation.near(rows)
        return self._like_input(self._metric.transformed(rows), X)

    @without_autograd_or_autocast
    def gradients(self, X: Rows) -> Any:
        """Gradients of the outputs at rows X, in the units of the data: (m, K, d), of X's kind and dtype.

        Formula: grad f_c(x) = R g_c(x R), with R = M^(1/2) and g_c the kernel machine's gradient. Outputs are those of
        ``decision_function`` with one column for each class (for two classes, the second is the negative of the
        first), or of ``predict``.
        """
        check_is_fitted(self)
        near = self._preparation.near(self._samples(X))
        centers = self._centers.double()
        points = self._metric.points_onto(centers, near, torch.finfo(self._fitted_dtype).eps)
        g = gradients(self.kernel_, centers, self._alpha.double(), points)
        return self._like_input(self._preparation.slopes(self._metric.pulled_back(g), X), X)

    @without_autograd_or_autocast
    def directions(self, k: int | None = None) -> Directions:
        """The k directions that the metric stretches most, largest first, with signs: ``Directions``.

        Eigenvectors of ``M_``; with ``scale="standard"`` those of the metric of the standardised features, written for
        the features as they are given. Only their number, d, limits k where the default None asks for all that count:
        eigenvalues above the rounding of the largest.

        Raises:
            ValueError: k is not between 1 and d.
        """
        check_is_fitted(self)
        k = None if k is None else checks.integer("k", k, 1, self.n_features_in_)
        warn_of_identity(self, self._metric)
        eps = torch.finfo(self._fitted_dtype).eps
        vectors, values, along = leading(self._metric, self._centers, self.n_features_in_, k, eps)
        correlations = self._seen.correlations(along, second=len(getattr(self, "classes_", ())) == 2)
        vectors = vectors * torch.where(correlations < 0, -1.0, 1.0)[:, None] + 0.0  # no minus zeros
        if self._preparation.unit is not None:
            vectors = vectors / (self._preparation.unit / self._preparation.unit.min())
            vectors = vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
        found = (value.to(self._fitted_dtype) for value in (vectors, values, correlations.abs()))
        return Directions(*map(self._like_fit_input, found))

    def _staged(self, X) -> Iterator[torch.Tensor]:
        """Outputs (m, K) of the kernel machines after 0, 1, ... AGOPs."""
        check_is_fitted(self)
        if self._learnt is None:
            raise ValueError("staged_predict needs the iterations of fit, which a file does not hold: fit again")
        stages, coordinates = self._learnt
        near = self._preparation.near(self._samples(X))
        for stage in stages:
            yield self._stage_outputs(stage, coordinates, near)

    def _stage_outputs(self, stage: Stage, coordinates: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
        """Outputs (m, K) of an iteration's kernel machine at rows (m, d) as the kernel sees them before a metric."""
        return self._product(stage.metric.points(near), stage.centers(coordinates), stage.alpha)

    def _outputs_before_last_solve(self, rows: torch.Tensor) -> torch.Tensor:
        """``_outputs_at`` of the best iteration's kernel machine, which ``_unseen_rows`` had no part in."""
        assert self._learnt is not None
        stages, coordinates = self._learnt
        return self._stage_outputs(stages[self.best_iteration_], coordinates, self._preparation.near(rows))

    @without_autograd_or_autocast
    def staged_predict(self, X: Rows) -> Iterator[Any]:
        """Predictions after 0, 1, ... AGOPs, up to the last that was taken: an iterator of what ``predict`` returns.

        They are those of the kernel machines of the iterations, which rows held out or left out by ``metric_samples``
        had no part in. A loaded estimator has none.
        """
        views: list[Any] = [self._with_outputs(outputs, X) for outputs in self._staged(X)]
        return iter([view.predict(X) for view in views])

    @property
    def feature_importances_(self) -> Any:
        """How much each feature counts in the learned metric: (d,), the diagonal of ``M_`` over its sum.

        With ``scale="standard"`` it is that of the standardised features. Warns where no metric was learnt.
        """
        check_is_fitted(self)
        warn_of_identity(self, self._metric)
        return self._importances()

    def _importances(self) -> Any:
        """``feature_importances_`` without a word."""
        spread = self._metric.spread(self.n_features_in_, self._centers)
        return self._like_fit_input((spread / spread.sum()).to(torch.float64))

    @property
    def _n_features_out(self) -> int:
        """Columns of ``transform``, which scikit-learn names."""
        return self.n_features_in_

    def _training_points(self, X: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        self._preparation = Preparation.of(X, weights, self.scale, self.kernel)
        return inputs.narrowed("X", self._preparation.near(X), self._dtype)

    def _kernel_inputs(self, X: torch.Tensor) -> torch.Tensor:
        return self._metric.points(self._preparation.near(X))

    def _packed(self):
        metric, preparation = self._metric, self._preparation
        seen = self._seen
        tensors = {"offset": preparation.offset, "targets": seen.means, "spread": seen.spread, **self._packed_alpha()}
        span = metric.span
        optional = {"unit": preparation.unit, "M": metric.M, "root": metric.root, "target_weights": seen.weights}
        optional |= {} if span is None else {"centre": span.centre, "basis": span.basis}
        tensors |= {name: value for name, value in optional.items() if value is not None}
        records = []
        for index, record in enumerate(self.iterations_):
            records.append(pack_record(record))
            alpha = record.solution.alpha  # the best iteration's is the last solve's; a file holds it twice
            tensors[f"{index}.alpha"] = alpha.clone() if alpha is self.solution_.alpha else alpha
        scores = getattr(self, "validation_score_", None)
        scores = None if scores is None else [pack_score(score) for score in scores.tolist()]
        return tensors, {"iterations": records, "best_iteration": self.best_iteration_, "scores": scores}

    def _restore(self, tensors: dict[str, torch.Tensor], metadata: dict) -> None:
        span = Span(tensors["centre"], tensors["basis"]) if "basis" in tensors else None
        root = tensors.get("root")  # Files of earlier versions hold M = I without a root.
        self._metric = Metric(None if root is None else tensors["M"], root, span)
        self._preparation, self._learnt = Preparation(tensors["offset"], tensors.get("unit")), None
        self.iterations_, self._alpha = [], tensors.get("readout", self.solution_.alpha)
        none = self._alpha.new_zeros(self._alpha.shape)
        means, spread = tensors.get("targets", none), tensors.get("spread", none.new_zeros(none.shape[1]))
        self._seen = Targets(means, tensors.get("target_weights"), spread)
        for index, record in enumerate(metadata["iterations"]):
            self.iterations_.append(unpack_record(record, tensors[f"{index}.alpha"]))
        self.best_iteration_ = metadata.get("best_iteration", len(self.iterations_))
        if metadata.get("scores") is not None:
            self.validation_score_ = np.array([float(score) for score in metadata["scores"]])


def _rows_of(data: Training, index: torch.Tensor) -> Training:
    """Some rows of the training data."""
    classes, weights = (value if value is None else value[index] for value in (data.classes, data.weights))
    return Training(data.X[index], data.Y[index], classes, weights)
