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
from fastagop.estimators.calls import in_full
from fastagop.estimators.kernel_ridge import mirrored
from fastagop.kernels.gemm import matmul_nt
from fastagop.kernels.plan import budget, empty_matrix
from fastagop.kernels.profile import Kernel, Profile, median_factor
from fastagop.kernels.radial import GeneralisedLaplace
from fastagop.rfm.learning import Points, Rules
from fastagop.rfm.metric import Metric
from fastagop.rfm.validation import HeldOut, accuracy, r_squared
from fastagop.solvers.bandwidth import settled_at
from fastagop.solvers.full_refined import by_factor, factor_
from fastagop.solvers.limits import largest, relative

RESIDUAL = 1e-3  # of the targets, that a coarse solve may leave
_REFINED = 1e-4  # beyond which it is refined
_USUAL = 2.0**20  # sizes of points and targets within this and its inverse need no unit of their own
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
class Room:
    """Coordinates in which a metric is learnt, float64.

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
    def of(cls, points: torch.Tensor, rows: torch.Tensor, diagonal: bool, kernel: Kernel) -> Room:
        """Those of points (n, d) and validation rows (m, d), for a radial kernel."""
        metric = Metric.before(points, diagonal, LOCAL, kernel)
        if metric.span is None:
            x = points.double()
            centre = x.mean(0)
            return cls(metric, x - centre, rows.double() - centre, None)
        apart = metric.span.with_distance(rows)
        return cls(metric, metric.coordinates(points), apart[:, :-1].contiguous(), apart[:, -1].square())

    @functools.cached_property
    def first(self) -> Squares:
        """Squared distances while M = I, which no setting changes."""
        return Squares.of(self.x, self.v, self.beyond)


class State(NamedTuple):
    """A metric, and the points and distances in it."""

    metric: Metric
    x: torch.Tensor
    squares: Squares


class Fold:
    """Rows of a fold as the fits of all settings see them.

    Args:
        estimator: any setting's.
        train: (X, y, weights or None) of the rows to train on.
        test: (X, y) of those to score on.
        scorer: (estimator, X, y) -> number.
    """

    @in_full
    def __init__(self, estimator, train: tuple, test: tuple, scorer):
        self.model: Any = clone(estimator)
        self.model.set_params(scoring=scorer)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            regression, _ = self.model._checked()
            data = self.model._training(*train)
            held = self.model._held(data, *test, None, LOCAL)[0]
        assert held is not None
        self.notes = [str(warning.message) for warning in said]
        self.held: HeldOut = held
        self.points = Points.of(data.X, data.Y, data.weights)
        rows = self.points.rows
        self._mirrored = mirrored(self.points.Y)
        Y = rows.means(self.points.Y)
        self._Y = Y[:, 1:] if self._mirrored else Y
        self._weights = None if rows.weights is None else rows.weights.float()
        self._rooms: dict[bool, Room] = {}
        self._room = budget(regression.memory_limit, data.X.device)
        plain = scorer.func if isinstance(scorer, functools.partial) else scorer
        self._default = hasattr(plain, "_estimator")  # scikit-learn's stand-in for the estimator's own score
        self._counted = scorer.keywords.get("sample_weight") if isinstance(scorer, functools.partial) else None

    @functools.cached_property
    def _median(self) -> float:
        return settled_at(replace(self.model.kernel, bandwidth="median"), self.points.X).bandwidth

    def usual(self, folds: int) -> bool:
        """Whether coarse fits of so many such folds are possible: a radial kernel, float32 on the CPU, usual sizes."""
        model, X, Y = self.model, self.points.X, self._Y
        ours = model.solver == "auto" and model.backend in ("auto", "torch") and model.process_group is None
        ours = ours and model.kernel.radial
        if not (ours and X.dtype == torch.float32 and X.device.type == "cpu" and Y.numel() and X.shape[1]):
            return False
        sizes = all(1.0 / _USUAL <= largest(part) <= _USUAL for part in (X, Y))
        return len(X) > 1 and sizes and folds * self._bytes() <= self._room

    def _bytes(self) -> int:
        """What a coarse fit takes at most, with the squared distances that all share."""
        (n, d), K, m = self.points.X.shape, self._Y.shape[1], len(self.held.points)
        return (8 + 4 * 6) * n * n + (8 + 4 * 3) * m * n + 4 * 3 * n * K * d + 8 * 4 * (n + m) * d

    def scores(self, estimator) -> Iterator[tuple[float, float]]:
        """(score, tie) after 0, 1, ... AGOPs with the setting of an estimator, up to where a fit has to tell."""
        regression, rules = estimator._checked()
        if regression.ridge == 0 or not regression.kernel.radial:
            return
        kernel, factor = regression.kernel, median_factor(regression.kernel)
        if factor is not None:
            kernel = replace(kernel, bandwidth=factor * self._median)
        view = copy.copy(self.model)
        for name in _SETTING:
            setattr(view, name, getattr(estimator, name))
        view.kernel_ = kernel
        machine = _Machine(kernel, regression.ridge, self._Y, self._weights)
        state = self._first(rules.diagonal)
        for step in range(rules.iterations + 1):
            found = self._step(machine, view, state)
            if found is None:
                return
            yield found[0]
            if step < rules.iterations and (state := self._next(machine, rules, state, *found[1:])) is None:
                return

    @in_full
    def _first(self, diagonal: bool) -> State:
        if diagonal not in self._rooms:
            self._rooms[diagonal] = Room.of(self.points.X, self.held.points, diagonal, self.model.kernel)
        room = self._rooms[diagonal]
        return State(room.metric, room.x, room.first)

    @in_full
    def _step(self, machine: _Machine, view, state: State):
        """((score, tie), alpha, K + ridge) of a kernel machine; None where a fit has to tell."""
        if (solved := machine.solve(state.squares.inner)) is None:
            return None
        outputs = machine.outputs(state.squares.cross, solved[0])
        outputs = torch.cat([-outputs, outputs], 1) if self._mirrored else outputs
        return (self._score(view, outputs), *solved) if bool(outputs.isfinite().all()) else None

    @in_full
    def _next(self, machine: _Machine, rules: Rules, state: State, alpha: torch.Tensor, K: torch.Tensor):
        """The state in the metric of the AGOP; None where a fit has to tell."""
        room = self._rooms[rules.diagonal]
        M = machine.agop(state.squares.inner, K, state.x, alpha, rules)
        if not bool(M.isfinite().all()):
            return None
        inner = M.mul_(2.0) if self._mirrored else M
        metric, _ = state.metric.updated(inner, rules.agop_scale, self.points.rows.total, room.x, LOCAL)
        if metric.root is None:
            return state
        x = metric.among(room.x)
        return State(metric, x, Squares.of(x, metric.among(room.v)))

    def _score(self, view, outputs: torch.Tensor) -> tuple[float, float]:
        """(score, tie) of outputs; the default scores are taken here, which saves half of a small fit's time."""
        held, weights = self.held, self._counted
        if not self._default:
            return held.score(view, outputs)
        codes = held.codes
        assert codes is not None
        if (classes := getattr(view, "classes_", None)) is not None:
            score = accuracy(classes, outputs, held.y, weights)
        else:
            score = r_squared(outputs, codes, weights)
        return held.score(view, outputs) if score is None else (score, held.tie(outputs))


@dataclass(frozen=True)
class _Machine:
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
        some = K[::step, ::step]
        if not bool((some.gt(eps) & some.lt(1.0 - 4.0 * eps)).any()):
            return None
        K.diagonal().add_(self.ridge if self.weights is None else self.ridge / self.weights)
        if (L := factor_(empty_matrix(len(K), len(K), K).copy_(K))) is None:
            return None
        alpha = by_factor(L, self.Y)
        left = self.Y - torch.mm(K, alpha)
        if not relative(left, self.Y) <= _REFINED:
            alpha = alpha + by_factor(L, left)
            left = self.Y - torch.mm(K, alpha)
        return (alpha.contiguous(), K) if relative(left, self.Y) <= RESIDUAL else None

    def outputs(self, cross: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        """Outputs for rows (m, K), float64."""
        return torch.mm(self.kernel.value_(cross.clone()), alpha).double()

    def _weights_(self, sq: torch.Tensor, K: torch.Tensor) -> torch.Tensor:
        """Gradient weights from squared distances and, where powers would take longest, from the values, which go.

        With t = (r / L)^p = -ln k the weight p t k / r^2 has t's error, eps / t of it: enough here.
        """
        if not isinstance(self.kernel, GeneralisedLaplace):
            return self.kernel.weight_(sq.clone())
        W = torch.log(K).mul_(K).mul_(-self.kernel.exponent).div_(sq)
        return torch.nan_to_num_(W, nan=0.0, posinf=0.0, neginf=0.0).fill_diagonal_(0.0)  # underflow, copies, itself

    def agop(self, sq: torch.Tensor, K: torch.Tensor, x: torch.Tensor, alpha: torch.Tensor, rules: Rules):
        """The AGOP (r, r), or its diagonal (r,), at points x (n, r), summed over them, float64."""
        W, z = self._weights_(sq, K), x.float()
        n, r = z.shape
        G = matmul_nt(W, (alpha[:, :, None] * z[:, None, :]).view(n, -1).T).view(n, -1, r)
        G.addcmul_(torch.mm(W, alpha)[:, :, None], z[:, None, :], value=-1.0)
        if rules.center:
            share = torch.ones(n) if self.weights is None else self.weights
            G -= (share @ G.view(n, -1)).div_(share.sum()).view(1, -1, r)
        if self.weights is not None:
            G.mul_(self.weights.sqrt()[:, None, None])
        flat = G.view(-1, r)
        return flat.double().square().sum(0) if rules.diagonal else matmul_nt(flat.T, flat.T).double()
