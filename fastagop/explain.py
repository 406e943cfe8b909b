"""What would run for a call, and what it would cost, without running it."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from fastagop import estimates
from fastagop.kernels.agop import agop, plan_agop
from fastagop.kernels.operations import (
    gradients,
    kernel_matmul,
    kernel_matrix,
    plan_gradients,
    plan_kernel_matmul,
    plan_kernel_matrix,
)
from fastagop.kernels.plan import Plan, available_bytes, format_bytes
from fastagop.solvers.solve import plan_solve, solve

_PLANS = {
    kernel_matrix: plan_kernel_matrix,
    kernel_matmul: plan_kernel_matmul,
    gradients: plan_gradients,
    agop: plan_agop,
    solve: plan_solve,
}
_NAMES = {function.__name__: function for function in _PLANS}


def explain(op, *args, **kwargs) -> str:
    """Say which backend and method would run for a call, why, its operations, estimated seconds and peak memory.

    ``explain(estimator, X, y)`` says it of a fit, layer by layer or iteration by iteration, and what would not fit.

    Args:
        op: "kernel_matrix", "kernel_matmul", "gradients", "agop" or "solve", or that function itself; or one of
            fastagop's estimators.
        *args, **kwargs: what the call, or fit, would be given; checked as the call would, but nothing runs. Tensors on
            the device "meta" stand for ones on the default device (CUDA where there is one, else the CPU).

    Returns:
        Text of a few lines.

    Raises:
        TypeError, ValueError, MemoryError, BackendUnavailable: what the call itself would raise before it computes. A
            fit that does not fit is said in the text.
    """
    if hasattr(op, "fit") and hasattr(op, "_machine"):  # one of the estimators, which import scikit-learn
        from fastagop.estimators.fit_plans import explain_fit

        return _called(f"{getattr(op, '__name__', type(op).__name__)}.fit", explain_fit, op, *args, **kwargs)
    function = next((function for function in _PLANS if function is op), None)
    function = _NAMES.get(op) if isinstance(op, str) else function
    if function is None:
        raise ValueError(_unknown(op))
    given = _bound(function.__name__, inspect.signature(function), args, kwargs).arguments
    meta = [value for value in given.values() if on_meta(value)]
    device = next((value.device for value in given.values() if _held(value)), default_device())
    made = {id(value): stand_in(value, device) for value in meta}  # one for each, however often it is given
    bound: dict[str, Any] = {name: made.get(id(value), value) for name, value in given.items()}
    plan, checked = _PLANS[function](**bound)
    text = str(_timed(plan, bound["X"], checked, bound.get("precision", "highest")))
    return f"{text}\n  assumed    {assumption(device)}" if meta else text


def _timed(plan: Plan, X: torch.Tensor, checked: tuple, precision: str) -> Plan:
    """The plan with seconds; ``checked`` are the arguments as the plan's function gives them back."""
    if plan.op == "solve":
        return estimates.solve(plan, X, checked[2], checked[3], precision)
    return estimates.timed(plan, X, checked[1 if plan.op.startswith("kernel") else 2], X.dtype, precision)


def _bound(name: str, signature: inspect.Signature, args: tuple, kwargs: dict) -> inspect.BoundArguments:
    """Arguments by name; what a call would not take is refused in its name."""
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{name}() {error}") from None


def _called(name: str, function, op, *args, **kwargs) -> str:
    signature = inspect.signature(function)
    _bound(name, signature.replace(parameters=list(signature.parameters.values())[1:]), args, kwargs)
    return function(op, *args, **kwargs)


def _unknown(op) -> str:
    names = ", ".join(map(repr, _NAMES))
    if str(getattr(op, "__module__", "")).startswith("fastagop.distributed"):
        return (
            f"op must be one of {names} or that function, or an estimator, got distributed.{op.__name__}; "
            f"explain({op.__name__!r}, ...) plans it for one process, and the documentation's page "
            "'Beyond one device' says what ranks share"
        )
    return f"op must be one of {names} or that function, or an estimator of fastagop, got {op!r}"


def default_device() -> torch.device:
    """What "auto" means: CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def on_meta(value) -> bool:
    """Whether a value is a tensor that holds no numbers."""
    return isinstance(value, torch.Tensor) and value.device.type == "meta"


def _held(value) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type != "meta"


def stand_in(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the same shape and dtype that takes no memory: one item, repeated."""
    return torch.zeros((), dtype=value.dtype, device=device).expand(value.shape)


def assumption(device: torch.device) -> str:
    """What is assumed of tensors on meta."""
    return f"tensors on meta are planned for {device}, where {format_bytes(available_bytes(device))} are free now"
