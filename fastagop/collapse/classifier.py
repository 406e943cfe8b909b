"""NC3 and NC4: how a linear classifier W x + b relates to the class means."""

from __future__ import annotations

import numpy as np
import torch

from fastagop.collapse.moments import WEIGHTINGS, Moments, by_largest, checked, floating, moments
from fastagop.kernels import checks

ERRORS = ("structure", "distance")
_EPS = torch.finfo(torch.float64).eps
_ROWS = 1024  # samples that are decided at once


@torch.no_grad()
def nc3(
    W: torch.Tensor | np.ndarray,
    X: torch.Tensor | np.ndarray,
    y: torch.Tensor | np.ndarray,
    *,
    metric: str = "structure",
    weighting: str = "samples",
) -> float:
    """Self-duality: how far a classifier's weights are from the centred class means, up to scale; 0 where they agree.

    Formula: with rows mu_c - mu_G of C, "structure" is || W C^T / ||W C^T||_F - (I - 1 1^T / K) / sqrt(K - 1) ||_F, 0
    where W is also a simplex equiangular tight frame (Kothapalli 2023); "distance" is
    || W / ||W||_F - C / ||C||_F ||_F^2, 0 where W is a positive multiple of C (Papyan, Han & Donoho 2020).

    Args:
        W: weights (K, d) of the last layer; row c belongs to the c-th of y's labels in ascending order.
        X, y, weighting: as in ``nc1``.
        metric: "structure" or "distance".

    Returns:
        A float without units, the same for rescaled W or X.

    Raises:
        TypeError, ValueError: naming the argument, as in ``nc1``; W C^T = 0, so there is no direction to compare.
    """
    checks.choice("metric", metric, ERRORS)
    checks.choice("weighting", weighting, WEIGHTINGS)
    return duality_error(W, moments(*checked(X, y)), metric, weighting)


@torch.no_grad()
def nc4(
    W: torch.Tensor | np.ndarray,
    b: torch.Tensor | np.ndarray | None,
    X: torch.Tensor | np.ndarray,
    y: torch.Tensor | np.ndarray,
    *,
    weighting: str = "samples",
) -> float:
    """Agreement of a linear classifier with the nearest class mean, from 0 to 1; 1 once they always decide alike.

    Formula: the share of samples with argmax_c (W x_i + b)_c = argmin_c ||x_i - mu_c|| (Papyan, Han & Donoho 2020),
    right or wrong; ties go to the first class. Decided in float64, ties of distances by direct differences.

    Args:
        W, X, y: as in ``nc3``.
        b: bias (K,), or None.
        weighting: "samples", or "classes" for the mean of the classes' shares, a sample's class being its label.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    checks.choice("weighting", weighting, WEIGHTINGS)
    points, classes = checked(X, y)
    rule = Rule(W, b, moments(points, classes), points[0])
    shares = [float(rule.agrees(points[rows]).double().mean()) for rows in classes]
    sizes = [len(rows) for rows in classes]
    return weighted(shares, sizes if weighting == "samples" else [1] * len(sizes))


def weighted(shares: list[float], weights: list[int]) -> float:
    """A weighted mean."""
    return sum(share * weight for share, weight in zip(shares, weights, strict=True)) / sum(weights)


def duality_error(W, found: Moments, metric: str, weighting: str) -> float:
    """NC3 of moments."""
    C = found.centred(weighting)
    W = _weights(W, C)
    K = len(C)
    if metric == "distance":
        return (_by_norm("W", W) - _by_norm("X", C)).square_().sum().item()
    products = _by_norm("W", W) @ _by_norm("X", C).T
    if float(torch.linalg.matrix_norm(products)) <= _EPS * K:
        raise ValueError("W is orthogonal to all centred class means of X, so NC3 is undefined; does W read X?")
    frame = torch.eye(K, dtype=C.dtype, device=C.device) - 1 / K
    return torch.linalg.matrix_norm(_by_norm("W", products) - frame / (K - 1) ** 0.5).item()


def _by_norm(name: str, A: torch.Tensor) -> torch.Tensor:
    """A over its Frobenius norm."""
    A = by_largest(A.reshape(1, -1)).reshape(A.shape)
    norm = float(torch.linalg.matrix_norm(A))
    if norm == 0:
        raise ValueError(f"{name} must not be all zero: it has no direction to compare")
    return A / norm


def _weights(W, means: torch.Tensor) -> torch.Tensor:
    W, (K, d) = floating("W", W), means.shape
    if W.shape != (K, d):
        raise ValueError(
            f"W must have a row for each of the {K} classes of y and a column for each of the {d} columns of X, got "
            f"shape {tuple(W.shape)}; leave out the rows of classes that y lacks"
        )
    return W.double().to(means.device)


class Rule:
    """Whether a linear classifier and the nearest class mean decide alike."""

    def __init__(self, W, b, found: Moments, first: torch.Tensor):
        self._centre, rest = found.mean_of_means(first)
        means = torch.from_numpy((found.means - found.means.mean(0)).astype(np.float64)).to(found.error)
        self._means, self._rest, self._scale = means, rest, found.scale
        self._half = means.square().sum(1) / 2
        self._W = _weights(W, means)
        self._b = torch.zeros_like(self._half)
        if b is not None:
            b = floating("b", b)
            if b.shape != (len(means),):
                raise ValueError(
                    f"b must have shape ({len(means)},), one bias a class, or be None, got {tuple(b.shape)}"
                )
            self._b = b.double().to(means.device)

    def agrees(self, X: torch.Tensor) -> torch.Tensor:
        """By row of X (n, d): whether both decide alike."""
        return torch.cat([self._linear(rows) == self._nearest(rows) for rows in X.split(_ROWS)])

    def _linear(self, X: torch.Tensor) -> torch.Tensor:
        return (X.double().to(self._W.device) @ self._W.T + self._b).argmax(1)

    def _nearest(self, X: torch.Tensor) -> torch.Tensor:
        x = (X.double().to(self._centre.device) - self._centre).mul_(self._scale).sub_(self._rest)
        far = self._half - x @ self._means.T  # half of the squared distance, without what all classes share
        best = far.argmin(1)
        two = far.topk(2, dim=1, largest=False).values
        reach = (x.square().sum(1) + self._half.max()).mul_(4 * _EPS * x.shape[1])
        doubtful = two[:, 1] - two[:, 0] <= reach
        if bool(doubtful.any()):
            apart = torch.cdist(x[doubtful], self._means, compute_mode="donot_use_mm_for_euclid_dist")
            best[doubtful] = apart.argmin(1)
        return best
