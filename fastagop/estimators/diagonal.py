"""The diagonal of the AGOP of a kernel predictor at its own points, alone or by the ranks of a group."""

from __future__ import annotations

import torch

from fastagop.distributed.communicator import Communicator
from fastagop.kernels import checks
from fastagop.kernels.agop import row_weights
from fastagop.kernels.plan import budget
from fastagop.kernels.precision import matmul_precision
from fastagop.kernels.radial import Radial
from fastagop.kernels.scaling import scaled_
from fastagop.kernels.torch_backend import diagonal as torch_diagonal


@torch.no_grad()
def agop_diagonal(
    kernel: Radial,
    X: torch.Tensor,
    alpha: torch.Tensor,
    *,
    center: bool = False,
    weights: torch.Tensor | None = None,
    precision: str = "highest",
    memory_limit: float | None = None,
    group=None,
) -> torch.Tensor:
    """sum_i w_i sum_c (d f_c / d x_k)(X[i])^2 for each feature k: (d,), float64, in O(d) memory beyond row blocks.

    Args:
        kernel: of the predictor. X: points (n, d). alpha: coefficients (n, K), of X's dtype.
        center: subtract the (weighted) mean gradient of each output. weights: w >= 0 (n,), default 1.
        precision: as in ``fastagop.agop``. memory_limit: bytes to take.
        group: ranks that share the rows; every one gets the sum.

    Raises:
        MemoryError: a single block exceeds memory_limit.
    """
    rows, _ = torch_diagonal.plan_rows(X, alpha.shape[1], budget(checks.memory_limit(memory_limit), X.device))
    scaled, _, exponent = row_weights(weights, X, "sum")
    how = {"center": center, "roots": None if scaled is None else scaled.sqrt()}
    if group is not None:
        ranks = Communicator(group, "agop", X.device)
        how |= {"span": ranks.rows(len(X)), "total": ranks.total}
    with matmul_precision(precision, X.device):
        return scaled_(torch_diagonal.agop_diagonal(kernel, X, alpha, rows, **how), exponent)
