"""The torch backend's door: what it serves, and its calls, planned."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from ..gemm import LIBRARY, PanelProducts
from ..plan import AgopTask, Call, Plan
from ..precision import describe_precision, dtype_name
from ..profile import Profile
from ..scaling import Points
from . import agop as torch_agop
from . import costs, few, matrix, wide
from .distance import (
    NEAR_OF_ROUNDED,
    around_mean,
    common_offset,
    dominant_offset,
    norms_from,
    squared_distances,
)
from .gradients import (
    block_gradients,
    chunk_of,
    columns_at_once,
    gradient_aim,
    gradient_bytes,
    products_at_once,
)
from .tiles import fill_symmetric, fit_rows, weight_tiles

if TYPE_CHECKING:
    from ..backends import Request
    from ..kernel_operator import KernelOperator


class TorchBackend:
    """Every operation, on every device that torch has in float64, too."""

    name = "torch"
    operations = ("kernel_matrix", "kernel_matmul", "gradients", "agop", "solve", "solve with method 'cg'")
    shares_triangle = True

    def refusal(self, request: Request) -> str | None:
        """It serves every call."""
        return None

    def describe_precision(self, precision: str, X: torch.Tensor) -> str:
        """What a precision means for this tensor, in words."""
        return describe_precision(precision, X, tf32=X.device.type == "cuda")

    def products(self, precision: str, X: torch.Tensor) -> str:
        """The word that the rate of its products with these points is known by."""
        if X.dtype == torch.float32 and X.device.type == "cuda" and precision == "medium":
            return "tf32"
        return dtype_name(X.dtype)

    def matrix(self, operator: KernelOperator, out: torch.Tensor | None, ridge: float) -> Call:
        """K(X, Z), with the ridge on the diagonal where Z is X."""
        plan = matrix.plan_kernel_matrix(operator.X, operator.Z, out, operator.why)
        return Call(plan, lambda at: matrix.kernel_matrix(at.kernel, at.X, at.Z, out, plan.block, ridge))

    def matmul(self, operator: KernelOperator, V: torch.Tensor) -> Call:
        """The call that computes k(X, Z) V."""
        plan = matrix.plan_kernel_matmul(operator.X, operator.Z, V, operator.why)
        return Call(plan, lambda at: self.product(at, V, plan.block))

    def product(self, at: Points, V: torch.Tensor, rows: int) -> torch.Tensor:
        """K(X, Z) V of scaled points, in blocks of that many rows."""
        return matrix.kernel_matmul(at.kernel, at.X, at.Z, V, rows)

    def gradients(self, operator: KernelOperator, alpha: torch.Tensor) -> Call:
        """Grad f_c(Z[i]); the coefficients come in their unit when it runs."""
        X, Z = operator.X, operator.Z
        plan = plan_gradients(X, alpha, Z, operator.why)
        if not few.serves(X, Z, alpha.shape[1], plan.peak_bytes):
            return Call(plan, lambda at, alpha: predictor_gradients(at, alpha, plan.block))

        def run(at: Points, alpha: torch.Tensor) -> torch.Tensor:
            G = few.gradients(at.kernel, at.X, alpha, at.Z)
            return predictor_gradients(at, alpha, plan.block) if G is None else G.to(X.dtype)

        return Call(few.noted(plan), run)

    def agop(self, operator: KernelOperator, alpha: torch.Tensor, task: AgopTask) -> Call:
        """Sum_i w_i sum_c g_ic g_ic^T; coefficients and weights come in their units when it runs."""
        # Rows of W that are scaled by weights are not symmetric: the gram form treats weighted points as other points.
        symmetric = operator.symmetric and task.weights is None
        plan = costs.plan(operator.X, alpha, operator.Z, task, operator.why, symmetric=symmetric)
        if plan.method != "gradient" or not few.serves(operator.X, operator.Z, alpha.shape[1], plan.peak_bytes):

            def whole(at: Points, alpha: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
                M = wide.agop_of_crowds(at, alpha, task, plan, weights)
                return torch_agop.agop(at, alpha, task, plan, weights) if M is None else M

            return Call(plan, whole)

        def run(at: Points, alpha: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
            M = few.agop(at, alpha, task.center, weights)
            return torch_agop.agop(at, alpha, task, plan, weights) if M is None else M

        return Call(few.noted(plan), run)

    def inner_kernels(self, X: torch.Tensor, precision: str) -> torch_agop.InnerKernels:
        """Its inner steps of the AGOP's two forms."""
        return torch_agop.TORCH_KERNELS

    def factor_kernels(self, dtype: torch.dtype, precision: str) -> FactorKernels:
        """What a factorisation of k(X, X) needs of it."""
        return FactorKernels()


class FactorKernels:
    """How a stored k(X, X) is filled and factored: by torch, in full precision.

    Attributes:
        update: the column-block update of a blocked Cholesky factorisation; None for the library's products.
        panels: products of a float32 factor of half a matrix.
        coarse: products below float32's accuracy were asked for, so that a factor is a preconditioner only.
        precision: of the products of the update.
        note: what is done otherwise than asked for; "" where nothing is.
    """

    update: Callable | None = None
    panels: PanelProducts = LIBRARY
    coarse = False
    precision = "highest"
    note = ""

    def fill(self, out: torch.Tensor, kernel: Profile, X: torch.Tensor, rows: int) -> torch.Tensor:
        """K(X, X) into out, in out's dtype, every distance to its last digits."""
        return fill_symmetric(out, X.to(out.dtype), rows, kernel.value_)

    def rows(self, kernel: Profile, X: torch.Tensor) -> Callable[[torch.Tensor, int], torch.Tensor]:
        """(out, start) -> out with rows start .. of K(X, X), up to their own last column, in float64.

        Distances of float32 points are as good as their rounding: these are the blocks of large problems.
        """
        rounded = X.dtype == torch.float32
        x, near = (around_mean(X)[0], NEAR_OF_ROUNDED) if rounded else (X.double(), None)
        origin = None if rounded else common_offset(x)
        x2 = norms_from(x, origin)

        def write(out: torch.Tensor, start: int) -> torch.Tensor:
            stop = start + len(out)
            squared_distances(x[start:stop], x[:stop], x2[start:stop], x2[:stop], out, start, near, origin)
            return kernel.value_(out)

        return write


def plan_gradients(X: torch.Tensor, alpha: torch.Tensor, Z: torch.Tensor, why: str) -> Plan:
    """The plan of gradients."""
    (n, d), K, m = X.shape, alpha.shape[1], len(Z)
    size = X.element_size()

    def step(rows: int) -> int:
        held = n * (K + columns_at_once(rows, d, K, X.device)) * size
        return held + gradient_bytes(rows, n, d, K, size, chunk_of(X.device))

    rows, peak = fit_rows("gradients", X, Z, m * K * d * size, step, gradient_aim(X.device, K * d))
    return Plan(
        "gradients",
        "torch",
        "blocked",
        why,
        "",
        2.0 * m * n * d * (K + 1),
        peak,
        rows,
    )


def predictor_gradients(at: Points, alpha: torch.Tensor, rows: int) -> torch.Tensor:
    """Grad f_c(Z[i]), shape (m, K, d)."""
    kernel, X, Z, _ = at
    result = X.new_empty(len(Z), alpha.shape[1], X.shape[1])
    shift = dominant_offset(X)
    step = products_at_once(alpha, X, shift, min(rows, len(Z)))
    for row, W, near in weight_tiles(kernel, X, Z, rows, shift):
        block_gradients(W, near, alpha, X, Z[row], shift, result[row], step)
    return result
