"""Torch backend: AGOPs of float32 points in float64, where float32 would lose what is asked for, or take longer."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import torch

from ..checks import readable
from ..gemm import random_signs
from ..plan import ROWS, AgopTask, Plan, budget
from ..scaling import Points
from .agop import agop
from .costs import plan, wide_bytes
from .distance import CROWDED, FEW, NEAR, dominant_offset, many_on_cpu, near_share
from .gradients import block_gradients
from .tiles import tiles

log = logging.getLogger("fastagop")

# Centred gradients are computed in float64 where rounding float32 weights would cost more of them than this, as seen at
# about so many points.
_CENTRED = 5e-7
_POINTS = 32
# Near pairs taken out of a float32 product cost 25 to 90 ns for each pair of a block, near or not, once a few of a
# thousand are near, and before that some microseconds each; a float64 product costs 8 ns more for each pair and
# thousand columns (K = 1 to 10, d = 50 to 800, two cores of a Xeon).
_NEAR, _EACH_NEAR, _PER_COLUMN = 25e-9, 4e-6, 8e-12
_LEAST = 4  # Blocks of less than one in so many rows that float32 has are slow.


def centring_cancels(at: Points, alpha, row_weights=None) -> bool:
    """Whether gradients agree so nearly that float32 weights cannot hold what centring leaves of them.

    From the float64 gradients of a few evaluation points, for a few random sums of the outputs.
    """
    kernel, X, Z, _ = at
    m, K = len(Z), alpha.shape[1]
    if X.dtype != torch.float32 or m < 2 or K == 0 or not readable(X):
        return False
    index = torch.arange(0, m, max(1, m // _POINTS), device=X.device)
    wide, origin, z = alpha.double(), X.mean(0).double(), Z[index].double()
    mixed = wide @ random_signs(K, 2, wide)
    g = X.new_zeros(len(index), 2, X.shape[1], dtype=torch.float64)
    for row in range(0, len(X), ROWS):
        x = X[row : row + ROWS].double()
        for _, W in tiles(x, z, len(z)):
            g += block_gradients(kernel.weight_(W), None, mixed[row : row + ROWS], x, z, origin, torch.empty_like(g))
    w = X.new_ones(len(index), dtype=torch.float64) if row_weights is None else row_weights[index].double()
    if not bool(w.sum() > 0):
        return False
    mean = torch.einsum("i,icd->cd", w, g) / w.sum()
    left = float(torch.einsum("i,icd->", w, (g - mean).square_()) / w.sum())
    return torch.finfo(X.dtype).eps * math.sqrt(float(mean.square().sum())) > _CENTRED * math.sqrt(left)


def agop_in_float64(at: Points, alpha, task: AgopTask, row_weights=None, least: int = 1) -> torch.Tensor | None:
    """``agop`` of float32 points with weights and products in float64; None where that does not fit into memory.

    least: rows that a block must have.
    """
    kernel, X, Z, unit = at
    symmetric, x, a = Z is X, X.double(), alpha.double()
    room = budget(task.limit, X.device) - wide_bytes(X, alpha, Z, symmetric=symmetric)
    z = x if symmetric else Z.double()
    weights = None if row_weights is None else row_weights.double()
    task = replace(task, limit=room, weights=weights)
    try:
        made = plan(x, a, z, task, "", symmetric=symmetric)
    except MemoryError:
        return None
    return None if made.block < least else agop(Points(kernel, x, z, unit), a, task, made, weights)


def agop_of_crowds(at: Points, alpha, task: AgopTask, made: Plan, row_weights=None) -> torch.Tensor | None:
    """``agop`` of float32 points by the gradient form in float64, where so many pairs are near that it takes less.

    None elsewhere, and where it would take more memory than the plan says.
    """
    X, Z, extra = at.X, at.Z, _PER_COLUMN * at.X.shape[1] * alpha.shape[1]
    if made.method != "gradient" or not many_on_cpu(X, Z) or X.shape[1] <= FEW or extra >= _NEAR:
        return None
    near = near_share(X, Z, NEAR[X.dtype], dominant_offset)
    if near <= CROWDED or min(_NEAR, _EACH_NEAR * near) <= extra:
        return None
    task = replace(task, method="gradient", limit=made.peak_bytes, rounded=True)
    M = agop_in_float64(at, alpha, task, row_weights, made.block // _LEAST)
    if M is not None:
        log.info("agop: %.2g of the pairs are near; computing in float64, which takes less", near)
    return M
