"""What would run for a call, and what it would cost, without running it."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch

from fastagop.estimates import assumption, default_device, on_meta, stand_in
from fastagop.kernels import checks
from fastagop.kernels.operations import agop, gradients, kernel_matmul, kernel_matrix, prepared
from fastagop.solvers.solve import PreparedSolve, SolveOptions, prepare, solve

_FUNCTIONS = (kernel_matrix, kernel_matmul, gradients, agop, solve)
_NAMES = {function.__name__: function for function in _FUNCTIONS}


def explain(op: Any, *args: Any, **kwargs: Any) -> str:
    """Say which backend and method would run for a call, why, its operations, estimated seconds and peak memory.

    ``explain(estimator, X, y)`` says it of a fit, layer by layer or iteration by iteration, and what would not fit;
    of a search, of one fit on a fold and of all of them.

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
    if hasattr(op, "fit") and hasattr(op, "_explain_fit"):  # one of the estimators
        if isinstance(op, type):
            raise ValueError(f"op must be an estimator with its parameters, got the class; use {op.__name__}()")
        name, signature = f"{type(op).__name__}.fit", inspect.signature(op._explain_fit)
        _bound(name, signature, args, kwargs)
        return op._explain_fit(*args, **kwargs)
    function = next((function for function in _FUNCTIONS if function is op), None)
    function = _NAMES.get(op) if isinstance(op, str) else function
    if function is None:
        raise ValueError(_unknown(op))
    arguments = _bound(function.__name__, inspect.signature(function), args, kwargs)
    arguments.apply_defaults()
    values = arguments.arguments
    meta = [value for value in values.values() if on_meta(value)]
    device = next((value.device for value in values.values() if _held(value)), default_device())
    made = {id(value): stand_in(value, device) for value in meta}  # one for each, however often it is given
    bound: dict[str, Any] = {name: made.get(id(value), value) for name, value in values.items()}
    call = _prepared(function.__name__, bound)
    seconds = call.seconds()
    text = str(dataclasses.replace(call.plan, seconds=seconds))
    text += "".join(f"\n  solver     {line}" for line in call.offers()) if isinstance(call, PreparedSolve) else ""
    return f"{text}\n  assumed    {assumption(device)}" if meta else text


def _prepared(name: str, arguments: dict[str, Any]):
    """The call as it would run: its ``plan``, and ``seconds()``."""
    if name != "solve":
        return prepared(name, **arguments)
    kernel, X, Y, weights = (arguments.pop(key) for key in ("kernel", "X", "Y", "sample_weight"))
    return prepare(kernel, X, Y, SolveOptions(**arguments), weights)


def _bound(name: str, signature: inspect.Signature, args: tuple, kwargs: dict) -> inspect.BoundArguments:
    """Arguments by name; what a call would not take is refused in its name."""
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{name}() {error}") from None


def _unknown(op) -> str:
    names = ", ".join(map(repr, _NAMES))
    if str(getattr(op, "__module__", "")).startswith("fastagop.distributed"):
        return (
            f"op must be one of {names} or that function, or an estimator, got distributed.{op.__name__}; "
            f"explain({op.__name__!r}, ...) plans it for one process, and the documentation's page "
            "'Beyond one device' says what ranks share"
        )
    asked = f"op must be one of {names} or that function, or an estimator of fastagop, got"
    if hasattr(op, "steps") and hasattr(op, "named_steps"):
        last = "explain(pipeline[-1], pipeline[:-1].fit_transform(X), y) plans its last step's fit"
        return f"{asked} a {type(op).__name__}; {last}"
    return f"{asked} {checks.shown(op)}"


def _held(value) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type != "meta"
