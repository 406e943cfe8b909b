"""Kernels of sums over features: the l1 Laplace kernel of tables, and its generalisation to l_p."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..pair_backend.coordinates import CoordinateProfile
from ..profile import Bandwidth, Formulas, bandwidth_of, multiply_, without_duplicates_
from .composition import Combining

_SUM = "Exp(-(Elem(c, 0) * Sum(Abs(x - z))))"  # of ProductLaplace


def _log(f: str) -> str:
    """ln f in KeOps' words, 0 where f = 0, and bounded where f is infinite."""
    return f"ClampInt(Log({f} + (IntCst(1) - Sign({f}))), -1000, 1000)"


# Of LpLaplace, with c = (p, q, 1 / L): rho, and ln (r / L)^q of a logarithm of rho.
_RHO = "Sum(Exp(Elem(c, 0) * Log(Abs(x - z))))"
_LOG_POWER = "(Elem(c, 1) * (Log(Elem(c, 2)) + {} * Inv(Elem(c, 0))))"
_CUT = f"ClampInt({_LOG_POWER.format(_log(_RHO))}, -10000, 80)"  # where exp(-t) is zero, and t finite


@dataclass(frozen=True)
class ProductLaplace(Combining, CoordinateProfile):
    """Laplace kernel of the l1 distance, k(x, z) = prod_k exp(-|x_k - z_k| / L) = exp(-||x - z||_1 / L).

    Gradient at z: k sign(x_k - z_k) / L by feature, with sign(0) = 0: where a feature ties there is a kink, and of its
    subgradients this is the middle one. It is scikit-learn's ``laplacian`` with gamma = 1 / L.

    Args:
        bandwidth: L > 0, in the units of the data; or "median" or ("median", factor), which ``fit`` of an estimator and
            ``fastagop.settled`` make a number: the factor times the median l1 distance of the points.
    """

    bandwidth: Bandwidth

    norm: ClassVar[float | None] = 1.0
    measure: ClassVar[str] = "l1"
    triton = """
value = tl.exp(-l1 * inverse_bandwidth)
if WEIGHT:
    value = tl.where(l1 > 0.0, value * inverse_bandwidth, 0.0)
"""
    keops: ClassVar[Formulas] = Formulas(  # pyright: ignore[reportIncompatibleVariableOverride]
        _SUM, f"(Elem(c, 0) * {_SUM}) * Sign(x - z)"
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "bandwidth", bandwidth_of(self.bandwidth))

    @property
    def power(self) -> float:
        """Power of the differences that are summed: 1."""
        return 1.0

    def value_(self, rho: torch.Tensor) -> torch.Tensor:
        """Overwrite the l1 distance r by exp(-r / L)."""
        return multiply_(rho, -1.0 / self.bandwidth).exp_()

    def weight_(self, rho: torch.Tensor) -> torch.Tensor:
        """Overwrite r by exp(-r / L) / L, zero where r = 0."""
        return multiply_(self.value_(without_duplicates_(rho)), 1.0 / self.bandwidth)


@dataclass(frozen=True)
class LpLaplace(Combining, CoordinateProfile):
    """Laplace kernel of the l_p distance with an exponent, k(x, z) = exp(-(||x - z||_p / L)^q).

    Gradient at z: q r^(q-p) k |x_k - z_k|^(p-1) sign(x_k - z_k) / L^q with r = ||x - z||_p, zero where r = 0, and zero
    in a feature that ties: for p <= 1 there is a kink or a cusp. p = q = 1 is ``ProductLaplace``, p = 2 is
    ``GeneralisedLaplace``, which computes by products and is faster.

    Args:
        p: of the norm, 0 < p <= 2.
        q: exponent, 0 < q <= p, for which the kernel is positive definite.
        bandwidth: L, as in ``ProductLaplace``, of the l_p distance.
    """

    p: float
    q: float
    bandwidth: Bandwidth

    keops: ClassVar[Formulas] = Formulas(  # pyright: ignore[reportIncompatibleVariableOverride]
        f"Exp(-Exp({_LOG_POWER.format(f'Log({_RHO})')}))",
        f"(Elem(c, 1) * Exp({_CUT} - Exp({_CUT}) - {_log(_RHO)} + (Elem(c, 0) - IntCst(1)) * {_log('Abs(x - z)')}))"
        " * Sign(x - z)",
    )

    def __post_init__(self) -> None:
        self._positive("p", largest=2.0)
        self._positive("q", largest=self.p)
        object.__setattr__(self, "bandwidth", bandwidth_of(self.bandwidth))

    @property
    def norm(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        """p of the distance, which a bandwidth of "median" refers to."""
        return self.p

    @property
    def power(self) -> float:
        """Power of the differences that are summed: p."""
        return self.p

    def _power_(self, rho: torch.Tensor) -> torch.Tensor:
        """Overwrite rho = r^p by (r / L)^q."""
        root = self.bandwidth ** (-0.5 * self.q)
        return multiply_(rho.pow_(self.q / self.p), root, root)

    def value_(self, rho: torch.Tensor) -> torch.Tensor:
        """Overwrite r^p by exp(-(r / L)^q)."""
        return self._power_(rho).neg_().exp_()

    def weight_(self, rho: torch.Tensor) -> torch.Tensor:
        """Overwrite r^p by q t exp(-t) / r^p with t = (r / L)^q, zero where r = 0."""
        t = self._power_(rho.clone())
        torch.div(torch.exp(-t).mul_(t).mul_(self.q), rho, out=rho)
        return torch.nan_to_num_(rho, nan=0.0, posinf=0.0)
