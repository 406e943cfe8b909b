"""The average gradient outer product of a kernel predictor."""

from __future__ import annotations

import dataclasses
import logging
import math

import torch

from . import checks
from .backends import NAMES, PRODUCTS, choose, describe_precision
from .errors import warn
from .keops_backend import reductions
from .plan import ROWS
from .precision import matmul_precision
from .radial import Radial
from .scaling import in_range, scale_points, scaled_
from .torch_backend import agop as torch_agop

log = logging.getLogger("fastagop")


def plan_agop(
    kernel,
    X,
    alpha,
    Z=None,
    *,
    reduction="mean",
    center=False,
    method="auto",
    precision="highest",
    backend="auto",
    memory_limit=None,
    sample_weight=None,
):
    """(Plan, checked arguments) of an agop call."""
    checks.kernel(kernel)
    checks.choice("reduction", reduction, ("mean", "sum"))
    checks.choice("method", method, ("auto", "gradient", "gram"))
    checks.choice("precision", precision, checks.PRECISIONS)
    checks.flag("center", center)
    limit = checks.memory_limit(memory_limit)
    checks.choice("backend", backend, NAMES)
    Z = checks.points(X, Z)
    if not checks.readable(X):  # the gram form's guard looks at values
        if method == "gram":
            raise ValueError(
                "method='gram' measures its cancellation on the host, which a CUDA graph's capture forbids; "
                "use method='gradient' there"
            )
        method = "gradient"
    pairs = 0.0 if method == "gram" else float(len(X)) * len(Z)  # KeOps has no gram form
    backend, why = choose(backend, "agop", kernel, X, precision, pairs)
    if reduction == "mean" and len(Z) == 0:
        raise ValueError("Z must have at least one row for reduction='mean', got none; use reduction='sum'")
    checks.matrix("alpha", alpha, like=X, rows=(len(X), "X"))
    checks.sample_weight(sample_weight, Z, reduction)
    # Scaled rows of W are not symmetric: the gram form treats weighted points as other points.
    at = Z if sample_weight is None else Z[:]
    words = describe_precision(precision, X, backend)
    if backend == "keops":
        plan = reductions.plan_agop(X, alpha, Z, method, limit, why, words)
    else:
        device = PRODUCTS[precision] if backend == "triton" else None
        plan = torch_agop.plan(X, alpha, at, method, limit, why, words, device, center)
    return dataclasses.replace(plan, backend=backend), (X, alpha, Z, limit)


@torch.no_grad()
def agop(
    kernel: Radial,
    X: torch.Tensor,
    alpha: torch.Tensor,
    Z: torch.Tensor | None = None,
    *,
    reduction: str = "mean",
    center: bool = False,
    method: str = "auto",
    precision: str = "highest",
    backend: str = "auto",
    memory_limit: float | None = None,
    sample_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Average gradient outer product of f_c(z) = sum_j alpha[j, c] k(z, X[j]) over the points Z.

    Formula: M = (1/m) sum_ic grad f_c(Z[i]) grad f_c(Z[i])^T (paper, section 3.3), symmetric and positive
    semi-definite; with weights w, M = sum_i w_i sum_c grad f_c(Z[i]) grad f_c(Z[i])^T / sum_i w_i.

    Args:
        kernel: a kernel such as ``Laplace(2.0)``.
        X: centers (n, d). alpha: coefficients (n, K). Z: evaluation points (m, d); default X.
        reduction: "mean" divides by m, or by the sum of the weights; "sum" does not.
        center: subtract the mean gradient of each output first (the weighted mean where there are weights).
        method: "gradient" (2 m n K d products, no n x n memory), "gram" (n^2 m products for any number of
            outputs, stores the (m, n) weights), or "auto", the cheaper one that fits into memory. Near collapse
            float32 cannot hold the gram form's cancellation; it is measured beforehand, and its products then
            run in float64, or, with "auto", the gradient form may run (logged at INFO to "fastagop").
        precision, backend: as in ``kernel_matrix``.
        memory_limit: bytes the call may take beyond its inputs; default most of what is free.
        sample_weight: weights (m,) >= 0 of the evaluation points, of X's dtype and device; default 1 each. A weight of
            2 is the same as that point written twice.

    Returns:
        Tensor (d, d) of X's dtype and device, without autograd history.

    Raises:
        TypeError, ValueError: naming the argument. MemoryError: a single block exceeds memory_limit.
        BackendUnavailable: the backend cannot serve the call.
    """
    plan, (X, alpha, Z, limit) = plan_agop(
        kernel,
        X,
        alpha,
        Z,
        reduction=reduction,
        center=center,
        method=method,
        precision=precision,
        backend=backend,
        memory_limit=memory_limit,
        sample_weight=sample_weight,
    )
    kernel, X, Z, unit = scale_points(kernel, X, Z)
    kernel, alpha, amplitude = in_range(kernel, X, alpha, unit)
    weights, divisor, exponent = row_weights(sample_weight, Z, reduction)
    if weights is not None and checks.readable(X) and not weights.any():
        return X.new_zeros(X.shape[1], X.shape[1])
    with matmul_precision(precision, X.device):
        how = {"center": center, "method": method, "limit": limit, "row_weights": weights}
        M = None
        if center and torch_agop.centring_cancels(kernel, X, alpha, Z, weights):
            M = _in_float64(kernel, X, alpha, Z, **how)
        how["plan"] = plan
        if M is not None:
            pass
        elif plan.backend == "triton":
            from .triton_backend import launch as triton_launch  # imports triton

            M = triton_launch.agop(kernel, X, alpha, Z, precision=precision, **how)
        elif plan.backend == "keops":
            M = reductions.agop(kernel, X, alpha, Z, center=center, plan=plan, row_weights=weights)
        else:
            M = torch_agop.agop(kernel, X, alpha, Z, **how)
    M = amplitude.restore_squares(M.double().div_(divisor), exponent)  # may leave float32 on the way
    M = M.to(X.dtype)
    if not checks.finite(M):
        raise ValueError(f"alpha is so large that the AGOP leaves {X.dtype}; divide alpha by a constant")
    return M


def _in_float64(kernel, X, alpha, Z, **how) -> torch.Tensor | None:
    """The centred AGOP of float32 points by float64 weights; None, and a warning, where these do not fit."""
    M = torch_agop.agop_in_float64(kernel, X, alpha, Z, **how)
    if M is None:
        warn(
            "agop: the gradients nearly agree, and what centring leaves of them is lost in float32; float64 weights do "
            "not fit into memory_limit: raise it, or pass float64 tensors"
        )
    else:
        log.info("agop: centred gradients that nearly agree; computing in float64 by the torch backend")
    return M


def row_weights(sample_weight, Z, reduction: str) -> tuple[torch.Tensor | None, float | torch.Tensor, int]:
    """(weights in a unit of 2^e, what to divide M by, the e of 2^e to multiply M by) of checked sample weights.

    In that unit the largest weight is between 1/2 and 1, so that no square root or sum leaves the dtype.
    """
    if sample_weight is None:
        return None, float(len(Z)) if reduction == "mean" else 1.0, 0
    if not checks.readable(sample_weight):  # in a CUDA graph's capture no value can be looked at
        return sample_weight.detach(), sample_weight.detach().sum() if reduction == "mean" else 1.0, 0
    largest = float(sample_weight.max()) if len(sample_weight) else 0.0
    exponent = math.frexp(largest)[1]
    weights = scaled_(sample_weight.detach().clone(), -exponent)
    if reduction == "mean":
        return weights, float(weights.sum(dtype=torch.float64)), 0
    return weights, 1.0, exponent


def agop_from_weights_(
    W: torch.Tensor,
    X: torch.Tensor,
    alpha: torch.Tensor,
    precision: str,
    backend: str,
    center: bool = False,
    row_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Summed AGOP at X, float64, from its stored weights W (n, n), zero diagonal, by the backend that a plan named.

    W and alpha may be wider than X; W is overwritten. row_weights (n,) weigh the evaluation points.
    """
    rows = ROWS
    steps = torch_agop.TORCH_KERNELS
    with matmul_precision(precision, X.device):
        if backend == "triton":
            from .triton_backend import launch as triton_launch  # imports triton

            steps = triton_launch.steps(X, precision)
        return torch_agop.agop_from_weights_(
            W,
            X,
            alpha,
            X,
            center=center,
            method="auto",
            limit=None,
            rows=rows,
            steps=steps,
            row_weights=row_weights,
        )
