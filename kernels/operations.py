"""The public operations on all pairs: check the input, pick the backend, obey its plan."""

from __future__ import annotations

import dataclasses

import torch

from . import checks
from .backends import NAMES, choose, describe_precision
from .keops_backend import reductions
from .plan import Plan
from .precision import matmul_precision
from .radial import Radial
from .scaling import in_range, scale_points
from .torch_backend import tiles


def _begin(op: str, kernel: Radial, X, Z, precision: str, backend: str) -> tuple[torch.Tensor, str, str]:
    """(evaluation points, backend, why), everything that all operations share checked."""
    checks.kernel(kernel)
    checks.choice("precision", precision, checks.PRECISIONS)
    checks.choice("backend", backend, NAMES)
    Z = checks.points(X, Z)
    return Z, *choose(backend, op, kernel, X, precision, float(len(X)) * len(Z))


def _served(plan: Plan, backend: str, precision: str, X: torch.Tensor) -> Plan:
    """The plan as the chosen backend carries it out; Triton's blocks and costs are torch's."""
    return dataclasses.replace(plan, backend=backend, precision=describe_precision(precision, X, backend))


def _triton():
    from .triton_backend import launch  # imports triton

    return launch


def plan_kernel_matrix(kernel, X, Z=None, *, out=None, ridge=0.0, precision="highest", backend="auto"):
    """(Plan, checked arguments) of a kernel_matrix call."""
    Z, backend, why = _begin("kernel_matrix", kernel, X, Z, precision, backend)
    ridge = checks.ridge(ridge, X.dtype)
    if ridge and Z is not X:
        raise ValueError(f"ridge belongs on the diagonal of k(X, X), got ridge {ridge!r} with other points Z; omit one")
    if out is not None:
        dense = isinstance(out, torch.Tensor) and out.layout == torch.strided and not out.is_nested
        if not dense or out.shape != (len(X), len(Z)):
            raise ValueError(f"out must be a dense tensor of shape {(len(X), len(Z))}, got {_describe(out)}")
        if out.dtype != X.dtype or out.device != X.device:
            raise ValueError(f"out must be {X.dtype} on {X.device}, got {_describe(out)}")
        checks.apart("out", out, X, Z)
    plan = tiles.plan_kernel_matrix(X, Z, out, why, "")
    return _served(plan, backend, precision, X), (X, Z, out, ridge)


def _describe(value) -> str:
    if isinstance(value, torch.Tensor) and value.is_nested:
        return "a nested tensor"
    if isinstance(value, torch.Tensor) and value.layout != torch.strided:
        return f"layout {value.layout}"
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)} on {value.device}"
    return type(value).__name__


@torch.no_grad()
def kernel_matrix(
    kernel: Radial,
    X: torch.Tensor,
    Z: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    ridge: float = 0.0,
    precision: str = "highest",
    backend: str = "auto",
) -> torch.Tensor:
    """Kernel matrix k(X, Z).

    Formula: K_ij = phi(||X[i] - Z[j]||_2). With Z omitted half of it is computed and mirrored, and the diagonal
    is exactly phi(0) + ridge = 1 + ridge. Near pairs are measured by direct differences or around a local centre,
    so that collapsed classes keep the dtype's accuracy.

    Args:
        kernel: a kernel such as ``Laplace(2.0)``.
        X: points (n, d), float32 or float64.
        Z: points (m, d); default X.
        out: tensor (n, m) to write into.
        ridge: added to the diagonal of k(X, X), for a solver of your own; needs Z omitted.
        precision: "highest", "high" or "medium"; see the package documentation.
        backend: "auto", "torch", "triton" or "keops". KeOps (every operation but this one, which stores its result)
            compiles a formula on first use, about ten seconds. "auto" takes torch: KeOps measured faster nowhere.

    Returns:
        Tensor (n, m) of X's dtype and device, without autograd history.

    Raises:
        TypeError, ValueError: naming the argument. BackendUnavailable: the backend cannot serve the call.
    """
    plan, (X, Z, out, ridge) = plan_kernel_matrix(
        kernel, X, Z, out=out, ridge=ridge, precision=precision, backend=backend
    )
    kernel, X, Z, _ = scale_points(kernel, X, Z)
    with matmul_precision(precision, X.device):
        if plan.backend == "triton":
            return _triton().kernel_matrix(kernel, X, Z, out, precision, ridge)
        return tiles.kernel_matrix(kernel, X, Z, out, plan, ridge)


def plan_kernel_matmul(kernel, X, Z=None, V=None, *, precision="highest", backend="auto"):
    """(Plan, checked arguments) of a kernel_matmul call."""
    if V is None:
        raise TypeError("V must be a torch.Tensor, got none; call kernel_matmul(kernel, X, Z, V) or (kernel, X, V=V)")
    Z, backend, why = _begin("kernel_matmul", kernel, X, Z, precision, backend)
    checks.matrix("V", V, like=X, rows=(len(Z), "Z"))
    plan = (reductions if backend == "keops" else tiles).plan_kernel_matmul(X, Z, V, why, "")
    return _served(plan, backend, precision, X), (X, Z, V)


@torch.no_grad()
def kernel_matmul(
    kernel: Radial,
    X: torch.Tensor,
    Z: torch.Tensor | None = None,
    V: torch.Tensor | None = None,
    *,
    precision: str = "highest",
    backend: str = "auto",
) -> torch.Tensor:
    """Kernel product k(X, Z) V without ever holding k(X, Z).

    Args:
        kernel: a kernel such as ``Laplace(2.0)``.
        X: points (n, d). Z: points (m, d); default X. V: right-hand sides (m, p), required: ``V=V`` where Z is omitted.
        precision, backend: as in ``kernel_matrix``.

    Returns:
        Tensor (n, p).

    Raises:
        TypeError, ValueError: naming the argument. BackendUnavailable: the backend cannot serve the call.
    """
    plan, (X, Z, V) = plan_kernel_matmul(kernel, X, Z, V, precision=precision, backend=backend)
    kernel, X, Z, _ = scale_points(kernel, X, Z)
    with matmul_precision(precision, X.device):
        if plan.backend == "triton":
            return _triton().kernel_matmul(kernel, X, Z, V, precision)
        return (reductions if plan.backend == "keops" else tiles).kernel_matmul(kernel, X, Z, V, plan)


def plan_gradients(kernel, X, alpha, Z=None, *, precision="highest", backend="auto"):
    """(Plan, checked arguments) of a gradients call."""
    Z, backend, why = _begin("gradients", kernel, X, Z, precision, backend)
    checks.matrix("alpha", alpha, like=X, rows=(len(X), "X"))
    plan = (reductions if backend == "keops" else tiles).plan_gradients(X, alpha, Z, why, "")
    return _served(plan, backend, precision, X), (X, alpha, Z)


@torch.no_grad()
def gradients(
    kernel: Radial,
    X: torch.Tensor,
    alpha: torch.Tensor,
    Z: torch.Tensor | None = None,
    *,
    precision: str = "highest",
    backend: str = "auto",
) -> torch.Tensor:
    """Gradients of a kernel predictor f_c(z) = sum_j alpha[j, c] k(z, X[j]) at the points Z.

    Formula: grad f_c(z) = sum_j w(||z - x_j||) alpha_jc (x_j - z) with w(r) = -phi'(r)/r; a pair at distance
    zero, exact duplicates included, contributes nothing.

    Args:
        kernel: a kernel such as ``Laplace(2.0)``.
        X: centers (n, d). alpha: coefficients (n, K). Z: evaluation points (m, d); default X.
        precision, backend: as in ``kernel_matrix``.

    Returns:
        Tensor (m, K, d); entry [i, c] is grad f_c(Z[i]).

    Raises:
        TypeError, ValueError: naming the argument; ValueError where gradients leave X's dtype.
        BackendUnavailable: the backend cannot serve the call.
    """
    plan, (X, alpha, Z) = plan_gradients(kernel, X, alpha, Z, precision=precision, backend=backend)
    kernel, X, Z, unit = scale_points(kernel, X, Z)
    kernel, alpha, amplitude = in_range(kernel, X, alpha, unit)
    with matmul_precision(precision, X.device):
        if plan.backend == "triton":
            result = _triton().gradients(kernel, X, alpha, Z, plan, precision)
        else:
            serving = reductions if plan.backend == "keops" else tiles
            result = serving.gradients(kernel, X, alpha, Z, plan)
    if not checks.finite(amplitude.restore(result)):
        raise ValueError(f"alpha is so large that a gradient leaves {X.dtype}; divide alpha by a constant")
    return result
