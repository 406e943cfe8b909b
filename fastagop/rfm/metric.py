"""The metric that a recursive feature machine learns, and the coordinates in which it is small.

Gradients at the points are combinations of their differences, so M maps everything into the span of the points. With
fewer points than features it is M = Q M_r Q^T with Q (d, r) orthonormal: everything is learnt in coordinates C = X Q,
and M is written out only where somebody asks for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fastagop import linalg
from fastagop.distributed.engine import Local
from fastagop.estimators import kernel_ridge
from fastagop.kernels import checks
from fastagop.kernels.gemm import symmetrise_
from fastagop.kernels.profile import Kernel
from fastagop.kernels.torch_backend.distance import NEAR_OF_ROUNDED, squared_distances, squared_norms

_ROWS = 256  # of a block of distances
_ROUNDINGS = 4.0  # of a row and of its product with R


@dataclass(frozen=True)
class Span:
    """The affine span of some points: what is left of a row after ``centre`` has coordinates in ``basis``.

    Attributes:
        centre: a point of the span (d,), float64.
        basis: Q (d, r) with orthonormal columns, float64.
    """

    centre: torch.Tensor
    basis: torch.Tensor

    @classmethod
    def of(cls, X: torch.Tensor, engine: Local, kernel: Kernel) -> Span:
        """The span of points X (n, d), the same on every rank; through the origin where the kernel knows that."""
        wide = X.double()
        centre = wide.mean(0) if kernel.shift_invariant else torch.zeros_like(wide[0])
        return cls(engine.broadcast(centre), engine.broadcast(torch.linalg.qr((wide - centre).T).Q.contiguous()))

    def coordinates(self, X: torch.Tensor) -> torch.Tensor:
        """(X - centre) Q, shape (m, r), float64: rounding them would cost more than rounding X did."""
        return (X.double() - self.centre) @ self.basis

    def with_distance(self, X: torch.Tensor) -> torch.Tensor:
        """Coordinates and, last, the distance from the span: (m, r + 1).

        Distances to points of the span, whose last item is 0, are those of the rows.
        """
        apart = X.double() - self.centre
        inner = apart @ self.basis
        beyond = torch.linalg.vector_norm(apart - inner @ self.basis.T, dim=1, keepdim=True)
        return torch.cat([inner, beyond], 1)

    def lifted(self, M: torch.Tensor) -> torch.Tensor:
        """Q M Q^T (d, d), symmetric to the bit, float64."""
        return symmetrise_(self.basis @ M.double() @ self.basis.T)

    def diagonal(self, M: torch.Tensor) -> torch.Tensor:
        """The diagonal of Q M Q^T (d,), float64."""
        return (self.basis @ M.double()).mul_(self.basis).sum(1)


@dataclass(frozen=True)
class Metric:
    """M of ||x - z||_M, as it was learnt.

    Attributes:
        M: (r, r) in the coordinates of ``span``, (d, d) or, its diagonal alone, (d,); None before anything was learnt,
            when M = I.
        root: M^(1/2), of M's shape.
        span: of the points, where that has fewer dimensions than there are features; else None.
    """

    M: torch.Tensor | None = None
    root: torch.Tensor | None = None
    span: Span | None = None

    @classmethod
    def before(cls, X: torch.Tensor, diagonal: bool, engine: Local, kernel: Kernel) -> Metric:
        """M = I for points X (n, d), in the coordinates in which it will be learnt.

        A kernel that goes by features sees no coordinates of a span.
        """
        spanned = len(X) < X.shape[1] and not diagonal and kernel.rotation_invariant
        return cls(span=Span.of(X, engine, kernel) if spanned else None)

    def coordinates(self, X: torch.Tensor) -> torch.Tensor:
        """The points (n, r) as they are given to ``among``: X itself where there is no span."""
        return X if self.span is None else self.span.coordinates(X)

    def among(self, coordinates: torch.Tensor) -> torch.Tensor:
        """Points of the span, given by their coordinates, whose Euclidean distance is ||x - z||_M."""
        return project(coordinates, self.root)

    def points(self, X: torch.Tensor) -> torch.Tensor:
        """Any rows X (m, d) as points whose Euclidean distance is ||x - z||_M: the kernel machine's input.

        Those of a span are float64, others of X's dtype.
        """
        if self.span is None:
            return project(X, None if self.root is None else self.root.to(X))
        if self.root is None:
            return self.span.with_distance(X)
        return project(self.span.coordinates(X), self.root)

    def points_onto(self, centers: torch.Tensor, X: torch.Tensor, eps: float) -> torch.Tensor:
        """``points(X)`` in float64, those that rounding may have parted from a center (n, r) moved onto the nearest.

        Centers are training rows, rounded to a dtype of that eps. Where the kernel has a kink, a training row that lies
        off its own center by so little would see a gradient of it, of any direction.
        """
        X = X.double()
        return _onto(centers, self.points(X), _ROUNDINGS * eps * self._magnitude(X))

    def _magnitude(self, X: torch.Tensor) -> torch.Tensor:
        """Length of |x| |R| for rows X (m, d), (m,): what one eps of x and of the sums of x R comes to at most."""
        X = X.abs()
        if self.span is not None:
            X = (X + self.span.centre.abs()) @ self.span.basis.abs()
        return torch.linalg.vector_norm(project(X, None if self.root is None else self.root.to(X).abs()), dim=1)

    def transformed(self, X: torch.Tensor) -> torch.Tensor:
        """X M^(1/2) with the symmetric root of M, shape (m, d)."""
        if self.root is None:
            return X
        if self.span is None:
            return project(X, self.root.to(X))
        basis = self.span.basis.to(X)
        return (X @ basis) @ self.root.to(X) @ basis.T

    def pulled_back(self, gradients: torch.Tensor) -> torch.Tensor:
        """Gradients (m, K, .) with respect to ``points(X)`` as gradients (m, K, d) with respect to X.

        A metric without a root has no span here: see ``everywhere``.
        """
        if self.root is None:
            return gradients
        root = self.root.to(gradients)
        inner = gradients * root if root.ndim == 1 else gradients @ root
        return inner if self.span is None else inner @ self.span.basis.T.to(gradients)

    def updated(
        self, inner: torch.Tensor, scale: str, total: float, X: torch.Tensor, engine: Local, dtype: torch.dtype
    ):
        """(the metric of a new AGOP, its divisor); a constant predictor says nothing about features: M stays then.

        Args:
            inner: AGOP, or its diagonal, with respect to ``among(X)``, summed over rows.
            scale: ``agop_scale``.
            total: weight of the rows.
            X: the points' coordinates.
            engine: who works on the fit.
            dtype: in which M is written out.

        Raises:
            ValueError: that dtype does not hold M.
        """
        agop = pulled_back(inner, self.root)
        sizes = agop if self.span is None else self.span.diagonal(agop)
        divisor = kernel_ridge.agop_divisor(sizes, scale, total)
        if not bool(agop.any()):
            return self, divisor
        kernel_ridge.refuse_scale(checks.largest(sizes) / divisor, scale, dtype)
        M = (agop / divisor).to(X.dtype)
        root = M.clamp_(min=0.0).sqrt() if M.ndim == 1 else linalg.psd_sqrt(M)
        return replace(self, M=M, root=engine.broadcast(root)), divisor

    def everywhere(self) -> Metric:
        """This metric for rows outside the span as well: M = I has a distance from it only for a row of the span."""
        return Metric() if self.root is None else self

    def spread(self, d: int, like: torch.Tensor) -> torch.Tensor:
        """The diagonal of M (d,), float64, on the device of ``like``."""
        if self.M is None:
            return torch.ones(d, dtype=torch.float64, device=like.device)
        if self.M.ndim == 1:
            return self.M.double()
        return self.M.double().diagonal() if self.span is None else self.span.diagonal(self.M)

    def matrix(self, d: int, diagonal: bool, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """M written out: (d, d), or its diagonal (d,), on the device of ``like``, in a dtype."""
        if self.M is None:
            ones = like.new_ones(d, dtype=dtype)
            return ones if diagonal else ones.diag()
        return self.M if self.span is None else self.span.lifted(self.M).to(dtype)


def project(X: torch.Tensor, root: torch.Tensor | None) -> torch.Tensor:
    """X R, the points whose Euclidean distance is ||x - z||_M; R = root is M^(1/2), its diagonal, or None for I."""
    if root is None:
        return X
    return X * root if root.ndim == 1 else X @ root


def pulled_back(M: torch.Tensor, root: torch.Tensor | None) -> torch.Tensor:
    """The AGOP (or its diagonal) with respect to X from that with respect to X R: R M R, since gradients go by R."""
    M = M.double()
    if root is None:
        return M
    if M.ndim == 1:
        return M * root.double().square()
    return symmetrise_(root.double() @ M @ root.double())


def _onto(centers: torch.Tensor, points: torch.Tensor, reach: torch.Tensor) -> torch.Tensor:
    """Points (m, d), those that are within reach (m,) of centers (n, d) moved onto the nearest one; all float64."""
    found, of_centers = points.clone(), squared_norms(centers)
    for start in range(0, len(points), _ROWS):
        part = found[start : start + _ROWS]
        sq = part.new_empty(len(part), len(centers))
        squared_distances(part, centers, squared_norms(part), of_centers, sq, near=NEAR_OF_ROUNDED)
        least, nearest = sq.min(1)
        close = least <= reach[start : start + _ROWS].square()
        part[close] = centers[nearest[close]]
    return found
