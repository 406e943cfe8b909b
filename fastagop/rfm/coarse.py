"""Fits in float32 that a search compares: their scores have three digits or more, in a part of the time of a fit.

The formulas are those of a fit. Squared distances are float64 products, made once for all settings while M = I; kernel
values, factor and gradients are float32. The outputs at the training points are off by at most the residual of the
solve, since K (K + ridge)^-1 shortens every vector: it is measured, refined once where that helps, and where it stays
above ``RESIDUAL``, or anything else is out of the ordinary, a fit of the usual kind takes over.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from sklearn.base import clone

from fastagop.distributed.engine import LOCAL
from fastagop.estimators.calls import without_autograd_or_autocast
from fastagop.estimators.kernel_ridge import mirrored
from fastagop.estimators.mixed_fit import SQUARABLE
from fastagop.kernels.checks import largest
from fastagop.kernels.memory.matrices import empty_matrix
from fastagop.kernels.plan import budget, computed_once
from fastagop.kernels.profile import Kernel, Profile, median_factor
from fastagop.kernels.scaling import is_usual
from fastagop.kernels.torch_backend.products import differences_product, outer_products
from fastagop.rfm.learning import MergedPoints, Rules
from fastagop.rfm.metric import Metric
from fastagop.rfm.validation import HeldOut, accuracy, r_squared
from fastagop.solvers.bandwidth import settled_at
from fastagop.solvers.limits import relative, tells_points_apart
from fastagop.solvers.single_factor import factor_
from fastagop.solvers.solve import scale_targets

RESIDUAL = 1e-3  # of the targets, that a coarse solve may leave
_REFINED = 1e-4  # beyond which it is refined
_FEW = 64  # rows whose kernel values say whether a bandwidth says anything
_SETTING = ("kernel", "ridge", "diagonal", "center", "agop_scale")


class Squares(NamedTuple):
    """Squared distances of the points (n, n), and of validation rows from them (m, n), float32."""

    inner: torch.Tensor
    cross: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor, v: torch.Tensor, beyond: torch.Tensor | None = None) -> Squares:
        """Those of points x (n, r) and rows v (m, r), float64; ``beyond``: to add to each row's (m,)."""
        inner, cross = _squares(x, x), _squares(v, x)
        inner.fill_diagonal_(0.0)
        return cls(inner, cross if beyond is None else cross.add_(beyond[:, None]))


def _squares(z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """||z_i - x_j||^2 by one float64 product, whose error is far below the rounding of float32 points."""
    of_z, of_x = (part.square().sum(1, keepdim=True) for part in (z, x))
    left = torch.cat([z * -2.0, of_z, torch.ones_like(of_z)], 1)
    right = torch.cat([x, torch.ones_like(of_x), of_x], 1)
    return torch.mm(left, right.T).clamp_(min=0.0).float()


@dataclass
class Coordinates:
    """Points and validation rows in the coordinates in which a metric is learnt, float64.

    Attributes:
        metric: before anything was learnt.
        x: the points (n, r).
        v: the validation rows (m, r).
        beyond: what these have of squared distance from the points' span (m,), or None where that is all there is.
    """

    metric: Metric
    x: torch.Tensor
    v: torch.Tensor
    beyond: torch.Tensor | None

    @classmethod
    def of(cls, points: torch.Tensor, rows: torch.Tensor, diagonal: bool, kernel: Kernel) -> Coordinates:
        """Those of points (n, d) and validation rows (m, d), for a radial kernel."""
        metric = Metric.before(points, diagonal, LOCAL, kernel)
        if metric.span is None:
            x = points.double()
            centre = x.mean(0)
            return cls(metric, x - centre, rows.double() - centre, None)
        apart = metric.span.with_distance(rows)
        return cls(metric, metric.coordinates(points), apart[:, :-1].contiguous(), apart[:, -1].square())

    @computed_once
    def first(self) -> Squares:
        """Squared distances while M = I, which no setting changes."""
        return Squares.of(self.x, self.v, self.beyond)


class State(NamedTuple):
    """A metric, and the points and distances in it."""

    metric: Metric
    x: torch.Tensor
    squares: Squares


def serves(model, X: torch.Tensor) -> bool:
    """Whether coarse fits are made for the parameters of an estimator and points of X's dtype and device."""
    ours = model.solver == "auto" and model.backend in ("auto", "torch") and model.process_group is None
    return ours and model.kernel.radial and X.dtype == torch.float32 and X.device.type == "cpu"


def fold_bytes(X: torch.Tensor, K: int, m: int) -> int:
    """What a fold of points X (n, d), K outputs and m rows to score on takes at most, its squared distances with it."""
    n, d = X.shape
    return (8 + 4 * 6) * n * n + (8 + 4 * 3) * m * n + 4 * 3 * n * K * d + 8 * 4 * (n + m) * d


class CoarseFold:
    """Rows of a fold as the fits of all settings see them.

    Args:
        estimator: any setting's.
        train: (X, y, weights or None) of the rows to train on.
        test: (X, y) of those to score on.
        scorer: (estimator, X, y) -> number.
    """

    @without_autograd_or_autocast
    def __init__(self, estimator, train: tuple, test: tuple, scorer):
        self.model: Any = clone(estimator)
        self.model.set_params(scoring=scorer)
        self.model._of_fold = True
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            regression, _ = self.model._regression_and_rules()
            data = self.model._training(*train)
            held = self.model._given(*test)
        self.notes = [str(warning.message) for warning in caught]
        self.held: HeldOut = held
        self.points = MergedPoints.of(data.X, data.Y, data.weights)
        rows = self.points.rows
        self._mirrored = mirrored(self.points.Y)
        Y = rows.means(self.points.Y)
        self._Y = Y[:, 1:] if self._mirrored else Y
        self._weights = None if rows.weights is None else rows.weights.float()
        self._coordinates: dict[bool, Coordinates] = {}  # by whether a metric is diagonal
        self._memory = budget(regression.memory_limit, data.X.device)
        plain = scorer.func if isinstance(scorer, functools.partial) else scorer
        self._default = hasattr(plain, "_estimator")  # scikit-learn's stand-in for the estimator's own score
        self._counted = scorer.keywords.get("sample_weight") if isinstance(scorer, functools.partial) else None

    @computed_once
    def _median(self) -> float:
        """The bandwidth that is the median distance of the points."""
        return settled_at(replace(self.model.kernel, bandwidth="median"), self.points.X).bandwidth

    def usual(self, folds: int) -> bool:
        """Whether coarse fits of so many such folds are possible: a radial kernel, float32 on the CPU, usual sizes."""
        X, Y = self.points.X, self._Y
        if not (serves(self.model, X) and Y.numel() and X.shape[1]):
            return False
        sizes = all(is_usual(largest(part)) for part in (X, Y))
        return len(X) > 1 and sizes and folds * self._bytes() <= self._memory

    def _bytes(self) -> int:
        return fold_bytes(self.points.X, self._Y.shape[1], len(self.held.points))

    def scores(self, estimator) -> Iterator[tuple[float, float]]:
        """(score, tie) after 0, 1, ... AGOPs with an estimator's setting, up to where a usual fit has to take over."""
        regression, rules = estimator._regression_and_rules()
        if regression.ridge == 0 or not regression.kernel.radial:
            return
        kernel, factor = regression.kernel, median_factor(regression.kernel)
        if factor is not None:
            kernel = replace(kernel, bandwidth=factor * self._median)
        view = copy.copy(self.model)
        for name in _SETTING:
            setattr(view, name, getattr(estimator, name))
        view.kernel_ = kernel
        coarse = _CoarseRegression(kernel, regression.ridge, self._Y, self._weights)
        state = self._first(rules.diagonal)
        for step in range(rules.iterations + 1):
            found = self._step(coarse, view, state)
            if found is None:
                return
            yield found[0]
            if step < rules.iterations and (state := self._next(coarse, rules, state, *found[1:])) is None:
                return

    @without_autograd_or_autocast
    def _first(self, diagonal: bool) -> State:
        """The state before anything was learnt, M = I."""
        if diagonal not in self._coordinates:
            args = self.points.X, self.held.points, diagonal, self.model.kernel
            self._coordinates[diagonal] = Coordinates.of(*args)
        coordinates = self._coordinates[diagonal]
        return State(coordinates.metric, coordinates.x, coordinates.first)

    @without_autograd_or_autocast
    def _step(self, coarse: _CoarseRegression, view, state: State):
        """((score, tie), alpha, K + ridge) of a kernel machine; None where a usual fit has to take over."""
        if (solved := coarse.solve(state.squares.inner)) is None:
            return None
        outputs = coarse.outputs(state.squares.cross, solved[0])
        outputs = torch.cat([-outputs, outputs], 1) if self._mirrored else outputs
        return (self._score(view, outputs), *solved) if bool(outputs.isfinite().all()) else None

    @without_autograd_or_autocast
    def _next(self, coarse: _CoarseRegression, rules: Rules, state: State, alpha: torch.Tensor, K: torch.Tensor):
        """The state in the metric of the AGOP; None where a usual fit has to take over."""
        coordinates = self._coordinates[rules.diagonal]
        M = coarse.agop(state.squares.inner, K, state.x, alpha, rules)
        if not bool(M.isfinite().all()):
            return None
        inner = M.mul_(2.0) if self._mirrored else M
        update = rules.agop_scale, self.points.rows.total, coordinates.x, LOCAL, self.points.X.dtype
        metric, _ = state.metric.updated(inner, *update)
        if metric.root is None:
            return state
        x = metric.among(coordinates.x)
        return State(metric, x, Squares.of(x, metric.among(coordinates.v)))

    def _score(self, view, outputs: torch.Tensor) -> tuple[float, float]:
        """(score, tie) of outputs; the default scores are taken here, which saves half of a small fit's time."""
        held, weights = self.held, self._counted
        if not self._default:
            return held.score(view, outputs)
        if (classes := getattr(view, "classes_", None)) is not None:
            score = accuracy(classes, outputs, held.y, weights)
        else:
            score = r_squared(outputs, held.codes, weights)
        return held.score(view, outputs) if score is None else (score, held.tie(outputs))


@dataclass(frozen=True)
class _CoarseRegression:
    """Kernel ridge regression in float32 for given squared distances.

    Attributes:
        kernel, ridge: of a setting.
        Y: targets of the points (n, K).
        weights: of the points (n,), or None.
    """

    kernel: Profile
    ridge: float
    Y: torch.Tensor
    weights: torch.Tensor | None

    def solve(self, sq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(alpha (n, K) with a residual of at most ``RESIDUAL``, K + ridge), or None."""
        K = self.kernel.value_(sq.clone())
        step, eps = max(1, len(K) // _FEW), torch.finfo(K.dtype).eps
        if not tells_points_apart(K[::step, ::step], eps):
            return None
        K.diagonal().add_(self.ridge if self.weights is None else self.ridge / self.weights)
        if (factor := factor_(empty_matrix(len(K), len(K), K).copy_(K))) is None:
            return None
        alpha = factor.solve(self.Y)
        left = self.Y - torch.mm(K, alpha)
        if not relative(left, self.Y) <= _REFINED:
            alpha = alpha + factor.solve(left)
            left = self.Y - torch.mm(K, alpha)
        return (alpha.contiguous(), K) if relative(left, self.Y) <= RESIDUAL else None

    def outputs(self, cross: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        """Outputs for rows (m, K), float64."""
        return torch.mm(self.kernel.value_(cross.clone()), alpha).double()

    def agop(self, sq: torch.Tensor, K: torch.Tensor, x: torch.Tensor, alpha: torch.Tensor, rules: Rules):
        """The AGOP (r, r), or its diagonal (r,), at points x (n, r), summed over them, float64."""
        W, z = self.kernel.rough_weight(sq, K), x.float()  # the diagonal of K holds the ridge, that of sq is zero
        alpha, size = scale_targets(alpha, SQUARABLE)
        M = outer_products(differences_product(W, alpha, z, z), rules.center, self.weights, rules.diagonal)
        return M if size == 1.0 else M.mul_(size).mul_(size)
