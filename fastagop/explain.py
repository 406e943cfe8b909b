"""What would run for a call, and what it would cost, without running it."""

from __future__ import annotations

from fastagop.agop import agop, plan_agop
from fastagop.kernels.operations import (
    gradients,
    kernel_matmul,
    kernel_matrix,
    plan_gradients,
    plan_kernel_matmul,
    plan_kernel_matrix,
)
from fastagop.solve import plan_solve, solve

_PLANS = {
    kernel_matrix: plan_kernel_matrix,
    kernel_matmul: plan_kernel_matmul,
    gradients: plan_gradients,
    agop: plan_agop,
    solve: plan_solve,
}
_NAMES = {function.__name__: plan for function, plan in _PLANS.items()}


def explain(op, *args, **kwargs) -> str:
    """Say which backend and method would run for a call, why, its floating-point operations and peak memory.

    Args:
        op: "kernel_matrix", "kernel_matmul", "gradients", "agop" or "solve", or that function itself.
        *args, **kwargs: what the call would be given; checked as the call would, but nothing runs.

    Returns:
        Text of a few lines.

    Raises:
        TypeError, ValueError, MemoryError, BackendUnavailable: what the call itself would raise before it computes.
    """
    found = next((plan for function, plan in _PLANS.items() if function is op), None)
    found = _NAMES.get(op) if isinstance(op, str) else found
    if found is None:
        raise ValueError(f"op must be one of {', '.join(map(repr, _NAMES))} or that function, got {op!r}")
    try:
        plan, _ = found(*args, **kwargs)
    except TypeError as error:
        if str(error).startswith("plan_"):  # arguments that the call would not take either
            raise TypeError(str(error).removeprefix("plan_")) from None
        raise
    return str(plan)
