"""Seconds that a plan would take: its operations at the device's rates, and what its pairs of points cost beside."""

from __future__ import annotations

import dataclasses

import torch

from fastagop.kernels import calibration
from fastagop.kernels.backends import PRODUCTS
from fastagop.kernels.plan import Plan
from fastagop.solvers import cg

_PASSES, _SAMPLE = 5, 2048  # of refinement over all pairs at ridge 0; rows whose residual is measured elsewhere


def timed(plan: Plan, X: torch.Tensor, Z: torch.Tensor, dtype: torch.dtype, precision: str = "highest") -> Plan:
    """The plan with its seconds.

    Args:
        plan: of a call. X, Z: its points, one tensor where they are the same.
        dtype: of its large products. precision: asked for.
    """
    products = _products(plan, X.device, dtype, precision)
    form = "gram" if plan.method in ("gram", "cholesky", "eigh") else "gradient"
    halves = Z is X and plan.op != "gradients" and plan.method != "gradient"  # of the pairs the mirror image is known
    pairs = float(len(X)) * len(Z) * (0.5 if halves else 1.0) * (cg.STEPS if plan.method == "cg" else 1.0)
    seconds = calibration.seconds(plan.flops, pairs, X.device, form, products, plan.backend)
    return dataclasses.replace(plan, seconds=seconds)


def solve(plan: Plan, X: torch.Tensor, ridge: float, how, precision: str = "highest") -> Plan:
    """The plan of a solve with its seconds; ``how`` as ``plan_solve`` gives it."""
    dtype = how[0] if isinstance(how, tuple) else torch.float64  # of the factorisation, or of the passes of "cg"
    plan = timed(plan, X, X, dtype, precision)
    if dtype == torch.float64:
        return plan
    n = float(len(X))
    passes = 2.0 * min(n, _SAMPLE) * n if ridge else _PASSES * n * n  # in float64, after a float32 factor
    more = calibration.seconds(passes * X.shape[1], passes / 2, X.device, "gram", "float64")
    return dataclasses.replace(plan, seconds=(plan.seconds or 0.0) + more)


def _products(plan: Plan, device: torch.device, dtype: torch.dtype, precision: str) -> str:
    """The word that the rate of these products is known by."""
    word = str(dtype).removeprefix("torch.")
    if word == "float64" or device.type != "cuda":
        return word
    if plan.backend == "triton":
        return PRODUCTS[precision]
    return "tf32" if precision == "medium" else word


def of_eigh(d: int, device: torch.device) -> float:
    """A float64 eigendecomposition (d, d)."""
    return calibration.seconds(9.0 * d**3, 0.0, device, "gram", "float64")


def of_products(flops: float, X: torch.Tensor) -> float:
    """Products of matrices in X's dtype."""
    return calibration.seconds(flops, 0.0, X.device, "gram", str(X.dtype).removeprefix("torch."))
