"""The directions that a learnt metric stretches most, and their correlation with the targets."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastagop import linalg
from fastagop.kernels.errors import warn
from fastagop.rfm.learning import MergedPoints
from fastagop.rfm.metric import Metric


@dataclass(frozen=True)
class Targets:
    """What the points of a fit answered.

    Attributes:
        means: target of each point (r, K), the mean of its copies, float64.
        weights: of the points (r,), or None where all are 1.
        spread: standard deviation of the rows' targets (K,), float64; copies may contradict each other.
    """

    means: torch.Tensor
    weights: torch.Tensor | None
    spread: torch.Tensor

    @classmethod
    def of(cls, points: MergedPoints) -> Targets:
        """The targets of some points."""
        wide, rows = points.Y.double(), points.rows
        share = (rows.each / rows.each.sum()).to(wide)
        apart = wide - share @ wide
        return cls(rows.means(wide), rows.weights, (share @ apart.square()).sqrt())

    def correlations(self, projections: torch.Tensor, second: bool) -> torch.Tensor:
        """Signed correlation of each column of projections (r, k) with the targets; 0 where either is constant.

        Args:
            projections: of the points.
            second: take the second target; default that which a column is correlated with most.
        """
        share = torch.ones_like(self.means[:, 0]) if self.weights is None else self.weights.to(self.means)
        share = share / share.sum()
        projections, targets = (part - share @ part for part in (projections, self.means))
        size = (share @ projections.square()).sqrt()
        bound = size[:, None] * self.spread
        products = (share[:, None] * projections).T @ targets
        found = torch.where(bound > 0, products / torch.where(bound > 0, bound, 1.0), 0.0).clamp_(-1.0, 1.0)
        return found[:, 1] if second else found.gather(1, found.abs().argmax(1, keepdim=True))[:, 0]


def warn_of_identity(model, metric: Metric) -> None:
    """Say where a model was fitted with no AGOP, so that its metric tells no feature from another, and what does."""
    if metric.M is None and model.best_iteration_ == 0:
        warn(
            f"{type(model).__name__}: no metric was learnt (best_iteration_ = 0), so that M_ is the "
            "identity, in which all features count the same; outputs depend most on the features of which "
            "((model.gradients(X) * X.std(0)) ** 2).sum((0, 1)) is largest"
        )


def leading(
    metric: Metric, centers: torch.Tensor, d: int, k: int | None, eps: float, most: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(unit vectors (k, d), eigenvalues (k,) descending, the points along them (r, k)), float64.

    Args:
        metric: what was learnt.
        centers: the points in that metric.
        d: number of features.
        k: how many; None for those whose eigenvalue is above rounding.
        eps: of the dtype of the fit.
        most: with k None, no more than so many.

    The points have a length of 0 along vectors that the metric maps to 0.
    """
    if metric.M is None or metric.M.ndim == 1:
        return _leading_features(metric.M, centers, d, k, eps, most)
    values, inner, vectors = _axes(metric, metric.M)
    counted = _counted(values, eps)
    k = min(counted, most or counted) if k is None else k
    along = centers.double()[:, : len(inner)] @ inner[:, : min(k, counted)]
    if k > len(values):  # the rest of the features' space, which the metric maps to zero
        vectors = torch.cat([vectors, _beyond(vectors, k - len(values))], 1)
        values = torch.cat([values, values.new_zeros(k - len(values))])
    return vectors[:, :k].T, values[:k], _filled(along, k)


def _leading_features(
    diagonal: torch.Tensor | None, centers: torch.Tensor, d: int, k: int | None, eps: float, most: int | None
):
    """``leading`` where axes are features: of a diagonal metric (d,), or of M = I."""
    values = torch.ones(d, device=centers.device) if diagonal is None else diagonal
    values, order = values.double().sort(descending=True, stable=True)
    counted = _counted(values, eps)
    k = min(counted, most or counted) if k is None else k
    vectors = values.new_zeros(k, d).scatter_(1, order[:k, None], 1.0)
    return vectors, values[:k], _filled(centers.double()[:, order[: min(k, counted)]], k)


def _counted(values: torch.Tensor, eps: float) -> int:
    """How many of some eigenvalues, descending, are above rounding."""
    return max(1, int((values > len(values) * eps * values[0]).sum()))


def _filled(along: torch.Tensor, k: int) -> torch.Tensor:
    """Columns of zeros behind those there are, up to k."""
    return torch.cat([along, along.new_zeros(len(along), k - along.shape[1])], 1)


def _axes(metric: Metric, M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(eigenvalues, descending; eigenvectors in coordinates (r, r); those of the features (d, r)), float64."""
    values, inner = linalg.eigh(M.double())
    values, inner = values.flip(0).clamp_(min=0.0), inner.flip(1)
    return values, inner, inner if metric.span is None else metric.span.basis @ inner


def _beyond(basis: torch.Tensor, count: int) -> torch.Tensor:
    """Orthonormal columns (d, count) that are orthogonal to those of a basis (d, r)."""
    (d, r), (reflectors, factors) = basis.shape, torch.geqrf(basis)
    units = basis.new_zeros(d, count)
    units[r : r + count].fill_diagonal_(1.0)
    return torch.ormqr(reflectors, factors, units)
