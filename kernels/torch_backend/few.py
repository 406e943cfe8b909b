"""Torch backend: gradients and AGOPs of a few float32 points on the CPU, in float64 and in as few steps as that takes.

g_ic = sum_j W_ij A_jc (x_j - z_i) is one product, W (A_c o X) - s_c o Z with s = W A. In float64 it loses about
eps |x| / r of a term, 2e-9 where float32 can tell two points of size |x| apart. So near pairs need no care, no square
leaves the dtype, and what larger problems look for would cost more than such a problem itself.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from ..checks import largest
from ..plan import Plan
from ..profile import Profile
from ..scaling import Points
from .distance import FEW, measured_directly, squared_distances, squared_norms
from .products import differences_product, outer_products

_WORK = 2**20  # multiplications of the largest product at most: float64's speed does not count below
_NEAR = 2.0**-22  # share of the squared norms above which a float64 product keeps 1e-9 of r^2
_NEAREST = 2.0**-24  # of the points' size: pairs at less than this distance are left to ``gradients``


def bytes_of(m: int, n: int, d: int, K: int) -> int:
    """Most memory that a call takes: distances, weights and their work; points, products and squares."""
    return 8 * (6 * m * n + (n + 2 * m) * K * d + 3 * (m + n) * d + 2 * (m + n) * K + 3 * d * d)


def serves(X: torch.Tensor, Z: torch.Tensor, K: int, room: int) -> bool:
    """Whether gradients at Z of a predictor with K outputs and centers X are made here, in so many bytes.

    Among few features ``gradients`` forms every difference, in less memory.
    """
    if X.dtype != torch.float32 or X.device.type != "cpu":
        return False
    (n, d), m = X.shape, Z.shape[0]
    return d > FEW and K > 0 and 0 < m * n * d * (K + 1) <= _WORK and bytes_of(m, n, d, K) <= room


def noted(plan: Plan) -> Plan:
    """The plan of larger problems, with what is done otherwise."""
    return replace(plan, why=f"{plan.why}; so few float32 points are computed in float64, unless two nearly coincide")


def distances(x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """||z_i - x_j||^2 of float64 points that were float32, (m, n); zero by index where z is x."""
    out = x.new_empty(z.shape[0], x.shape[0])
    x2 = z2 = None
    if not measured_directly(out.numel(), x):
        x2 = squared_norms(x)
        z2 = x2 if z is x else squared_norms(z)
    return squared_distances(z, x, z2, x2, out, 0 if z is x else None, _NEAR)


def _least(sq: torch.Tensor, same: bool) -> float:
    """The least squared distance above zero, infinite where there is none; ``same``: the diagonal is zero."""
    if same:
        least = sq.fill_diagonal_(math.inf).amin().item()
        sq.fill_diagonal_(0.0)
    else:
        least = sq.amin().item()
    return least if least > 0 else sq.masked_fill(sq == 0, math.inf).amin().item()


def gradients(kernel: Profile, X: torch.Tensor, alpha: torch.Tensor, Z: torch.Tensor) -> torch.Tensor | None:
    """grad f_c(Z[i]), (m, K, d), float64; None where two points are nearer than float64 can tell from others' size."""
    x, same = X.double(), Z is X
    origin = x.mean(0)
    x = x - origin
    z = x if same else Z.double().sub_(origin)
    sq = distances(x, z)
    size = largest(x) if same else max(largest(x), largest(z))
    if not _least(sq, same) >= x.shape[1] * (_NEAREST * size) ** 2:
        return None
    return differences_product(kernel.weight_(sq), alpha.double(), x, z)


def agop(at: Points, alpha: torch.Tensor, center: bool, weights: torch.Tensor | None = None) -> torch.Tensor | None:
    """The AGOP summed over points and outputs, (d, d), float64, or None as above."""
    G = gradients(at.kernel, at.X, alpha, at.Z)
    return None if G is None else outer_products(G, center, None if weights is None else weights.double())
