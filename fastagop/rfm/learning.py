"""The iterations of a recursive feature machine: solve, score, take the AGOP, and do it again in its metric."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from fastagop.distributed.engine import Local
from fastagop.estimators import kernel_ridge
from fastagop.estimators.kernel_ridge import KernelRidge
from fastagop.kernels import backends
from fastagop.kernels.memory.matrices import kept_matrices
from fastagop.rfm.metric import Metric
from fastagop.rfm.records import IterationRecord
from fastagop.rfm.validation import key
from fastagop.solvers import copies, row_order
from fastagop.solvers.copies import Rows
from fastagop.solvers.solution import Solved

log = logging.getLogger("fastagop")


@dataclass(frozen=True)
class MergedPoints:
    """Rows of which a kernel machine is made, copies merged.

    Attributes:
        X: the points (r, d), as the kernel sees them before a metric.
        Y: targets of the rows (n, K).
        rows: how these became points.
    """

    X: torch.Tensor
    Y: torch.Tensor
    rows: Rows

    @classmethod
    def of(cls, X: torch.Tensor, Y: torch.Tensor, weights: torch.Tensor | None) -> MergedPoints:
        """The points of rows X (n, d)."""
        rows = copies.find(X, weights)
        return cls(rows.take(X), Y, rows)

    def by_class(self, X: torch.Tensor, classes: torch.Tensor | None) -> MergedPoints:
        """The same points of rows X (n, d) in the order of ``row_order.by_class``."""
        rows = row_order.by_class(self.rows, classes)
        return self if rows is self.rows else replace(self, X=rows.take(X), rows=rows)

    def solve(self, metric: Metric, regression: KernelRidge, engine: Local) -> tuple[torch.Tensor, Solved]:
        """(the points in a metric, the kernel regression on them)."""
        centers = metric.points(self.X)
        return centers, self.solve_at(centers, regression, engine)

    def solve_at(self, centers: torch.Tensor, regression: KernelRidge, engine: Local) -> Solved:
        """The kernel regression at the points as they are in a metric."""
        regression = served(regression, centers)
        return kernel_ridge.solve(centers, self.Y.to(centers), regression, engine, rows=self.rows)


def served(regression: KernelRidge, centers: torch.Tensor) -> KernelRidge:
    """The regression with a backend that has the points' dtype: a span's points are float64 in any case."""
    if centers.dtype != torch.float64:
        return regression
    request = backends.Request("solve", regression.kernel, centers)
    return replace(regression, backend=backends.serving(regression.backend, request))


@dataclass(frozen=True)
class Stage:
    """A kernel machine after so many AGOPs: its metric, and its coefficients at the points (r, K)."""

    metric: Metric
    alpha: torch.Tensor

    @property
    def bare(self) -> Stage:
        """The kernel machine alone: M is left out, of which outputs need but the root."""
        return Stage(replace(self.metric, M=None), self.alpha)

    def centers(self, coordinates: torch.Tensor) -> torch.Tensor:
        """The points, given by their coordinates, as the kernel machine has them."""
        centers = self.metric.among(coordinates)
        if self.metric.span is not None and self.metric.root is None:  # new rows have a distance from the span
            centers = torch.cat([centers, centers.new_zeros(len(centers), 1)], 1)
        return centers


@dataclass(frozen=True)
class Rules:
    """How many iterations there are, and what ends them earlier.

    Attributes:
        iterations: at most so many AGOPs.
        diagonal, center, agop_scale: of the AGOP.
        patience: iterations without a better score after which nothing better is expected; None for no end.
        seconds: after which no iteration is begun; None for no end.
    """

    iterations: int
    diagonal: bool = False
    center: bool = False
    agop_scale: str = "max"
    patience: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Learnt:
    """What the iterations came to.

    Attributes:
        stages: the kernel machines after 0, 1, ... AGOPs.
        solved: the last one's solution, and the best one's where there are scores.
        records: of the iterations that took an AGOP.
        scores: of the stages; empty where nothing is validated.
        ties: what decides between equal scores.
        best: the stage that predicts.
        coordinates: of the points (r, .), for the stages' centers.
    """

    stages: list[Stage]
    solved: Solved
    records: list[IterationRecord]
    scores: list[float]
    ties: list[float]
    best: int
    coordinates: torch.Tensor

    @property
    def stage(self) -> Stage:
        """The stage that predicts, the best one."""
        return self.stages[self.best]

    def everywhere(self) -> Metric:
        """Its metric, of rows anywhere."""
        return self.stage.metric.everywhere()


Scored = Callable[[Stage, torch.Tensor], tuple[float, float]]


class Learner:
    """Runs the iterations on some points.

    Args:
        points: what is learnt from.
        regression: of every stage.
        rules: of the iterations.
        engine: who does the work.
        score: (stage, coordinates of the points) -> (score, tie), or None.
        after: called with (index, record, metric) after each iteration.
    """

    def __init__(
        self,
        points: MergedPoints,
        regression: KernelRidge,
        rules: Rules,
        engine: Local,
        score: Scored | None = None,
        after: Callable[[int, IterationRecord, Metric], None] = lambda index, record, metric: None,
    ):
        self.points, self.regression, self.rules, self.engine = points, regression, rules, engine
        self.score, self.after = score, after
        self._start = time.perf_counter()

    @kept_matrices()
    def run(self) -> Learnt:
        """All iterations, or as many as the rules allow."""
        points, rules, engine = self.points, self.rules, self.engine
        metric = (
            Metric.before(points.X, rules.diagonal, engine, self.regression.kernel) if rules.iterations else Metric()
        )
        coordinates = metric.coordinates(points.X)
        Y, regression = points.Y.to(coordinates), served(self.regression, coordinates)
        stages, records, scores, kept = [], [], [], None
        for index in range(rules.iterations):
            begin = time.perf_counter()
            solved, inner, _ = kernel_ridge.fit_and_agop(
                metric.among(coordinates), Y, regression, engine,
                rows=points.rows, center=rules.center, diagonal=rules.diagonal,
            )  # fmt: skip
            regression = regression.after(solved.solution)
            stages.append(Stage(metric, solved.alpha))
            kept = self._scored(stages, scores, coordinates, solved, kept)
            update = rules.agop_scale, points.rows.total, coordinates, engine, points.X.dtype
            metric, scale = metric.updated(inner, *update)
            score = scores[-1][0] if scores else None
            records.append(IterationRecord(solved.solution, scale, time.perf_counter() - begin, score))
            done, device = functools.partial(self.after, index, records[-1], metric), points.X.device
            engine.together(done, "what follows an iteration (callbacks, warnings)", device)
            stopped = self._tired(scores) or self._late(time.perf_counter() - begin, engine)
            if stopped:
                log.info("RFM: %s, after %d of %d iterations", stopped, index + 1, rules.iterations)
                break
        if not self._tired(scores):
            solved = points.solve_at(metric.among(coordinates), regression, engine)
            stages.append(Stage(metric, solved.alpha))
            kept = self._scored(stages, scores, coordinates, solved, kept)
        assert kept is not None
        best = _best(scores) if scores else len(stages) - 1
        firsts, ties = [score for score, _ in scores], [tie for _, tie in scores]
        return Learnt(stages, kept, records, firsts, ties, best, coordinates)

    def _scored(self, stages, scores, coordinates, solved: Solved, kept: Solved | None) -> Solved:
        """Add the last stage's score; the solution to keep is the best one's, or the last one's without scores."""
        if self.score is None:
            return solved
        score = functools.partial(self.score, stages[-1], coordinates)
        scores.append(self._agreed(self.engine.together(score, "scoring", self.points.X.device)))
        better = kept is None or _best(scores) == len(scores) - 1
        return solved if better else kept  # pyright: ignore[reportReturnType]

    def _agreed(self, score: tuple[float, float]) -> tuple[float, float]:
        """The first rank's score, which decides on every rank."""
        pair = torch.tensor(score, dtype=torch.float64, device=self.points.X.device)
        first, tie = self.engine.broadcast(pair).tolist()
        return first, tie

    def _tired(self, scores: list) -> str:
        """Why nothing better is expected after these scores; "" where something is."""
        patience = self.rules.patience
        if patience is None or not scores:
            return ""
        best = _best(scores)
        return f"no better score in {patience} iterations" if len(scores) - 1 - best >= patience else ""

    def _late(self, last: float, engine: Local) -> str:
        """Why there is no time for an iteration like the last one; "" where there is. The first rank's clock counts."""
        seconds = self.rules.seconds
        if seconds is None:
            return ""
        spent = time.perf_counter() - self._start
        over = self.points.X.new_full((1,), float(spent + last > seconds))
        if not bool(engine.broadcast(over)):
            return ""
        return f"time_limit of {seconds:g} s: {spent:.3g} s spent, another iteration takes {last:.3g} s"


def _best(scores: list[tuple[float, float]]) -> int:
    """The first of the best pairs of a score and what decides between equal ones."""
    return max(range(len(scores)), key=lambda i: (*key(*scores[i]), -i))
