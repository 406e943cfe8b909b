"""The public operations on all pairs: a few lines each over KernelOperator, which checks, plans and serves them.

``prepared(name, **arguments)`` is what each of them runs, and what ``fastagop.explain`` asks for its plan.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import checks
from .kernel_operator import KernelOperator
from .plan import AgopTask, Call
from .profile import Kernel


def _matrix(kernel, X, Z, *, out, ridge, precision, backend) -> Call:
    operator = KernelOperator("kernel_matrix", kernel, X, Z, precision=precision, backend=backend)
    return operator.matrix(out, ridge)


def _matmul(kernel, X, Z, V, *, precision, backend) -> Call:
    return KernelOperator("kernel_matmul", kernel, X, Z, precision=precision, backend=backend).matmul(V)


def _gradients(kernel, X, alpha, Z, *, precision, backend) -> Call:
    return KernelOperator("gradients", kernel, X, Z, precision=precision, backend=backend).gradients(alpha)


def agop_call(kernel, X, alpha, Z, task: AgopTask, *, precision, backend) -> Call:
    """The call of ``agop``, checked and planned."""
    checks.choice("reduction", task.reduction, ("mean", "sum"))
    checks.choice("method", task.method, ("auto", "gradient", "gram"))
    checks.flag("center", task.center)
    return KernelOperator("agop", kernel, X, Z, precision=precision, backend=backend).agop(alpha, task)


def _agop_of_arguments(kernel, X, alpha, Z, *, precision, backend, sample_weight, memory_limit, **task) -> Call:
    made = AgopTask(**task, limit=memory_limit, weights=sample_weight)
    return agop_call(kernel, X, alpha, Z, made, precision=precision, backend=backend)


_PREPARED: dict[str, Callable[..., Call]] = {
    "kernel_matrix": _matrix,
    "kernel_matmul": _matmul,
    "gradients": _gradients,
    "agop": _agop_of_arguments,
}


def prepared(name: str, *args, **kwargs) -> Call:
    """The call of a public operation, checked and planned; all of its arguments are given."""
    return _PREPARED[name](*args, **kwargs)


@torch.no_grad()
def kernel_matrix(
    kernel: Kernel,
    X: torch.Tensor,
    Z: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    ridge: float = 0.0,
    precision: str = "highest",
    backend: str = "auto",
) -> torch.Tensor:
    """Kernel matrix k(X, Z).

    Formula: K_ij = k(X[i], Z[j]), for radial kernels phi(||X[i] - Z[j]||_2). With Z omitted half of it is computed and
    mirrored, and the diagonal of a radial kernel is exactly phi(0) + ridge = 1 + ridge. Near pairs are measured by
    direct differences or around a local centre, so that collapsed classes keep the dtype's accuracy.

    Args:
        kernel: a kernel such as ``Laplace(2.0)``.
        X: points (n, d), float32 or float64.
        Z: points (m, d); default X.
        out: tensor (n, m) to write into.
        ridge: added to the diagonal of k(X, X), for a solver of your own; needs Z omitted.
        precision: "highest", "high" or "medium"; see the package documentation.
        backend: "auto" (torch), "torch", "triton" (CUDA, float32) or "keops" (every operation but this one, which
            stores its result; it compiles a formula on first use, about ten seconds). No other takes its place.

    Returns:
        Tensor (n, m) of X's dtype and device, without autograd history.

    Raises:
        TypeError, ValueError: naming the argument. BackendUnavailable: the backend cannot serve the call.
    """
    return _matrix(kernel, X, Z, out=out, ridge=ridge, precision=precision, backend=backend).run()


@torch.no_grad()
def kernel_matmul(
    kernel: Kernel,
    X: torch.Tensor,
    Z: torch.Tensor | None = None,
    V: torch.Tensor | None = None,
    *,
    precision: str = "highest",
    backend: str = "auto",
) -> torch.Tensor:
    """Kernel product k(X, Z) V without ever holding k(X, Z).

    Formula: out_ip = sum_j k(X[i], Z[j]) V_jp. ``kernel_matmul(kernel, X_new, X, alpha)`` gives the outputs at X_new of
    the predictor with centers X and coefficients alpha.

    Args:
        kernel: a kernel such as ``Laplace(2.0)``.
        X: points (n, d).
        Z: points (m, d); default X.
        V: right-hand sides (m, p), required: ``V=V`` where Z is omitted.
        precision, backend: as in ``kernel_matrix``.

    Returns:
        Tensor (n, p).

    Raises:
        TypeError, ValueError: naming the argument. BackendUnavailable: the backend cannot serve the call.
    """
    return _matmul(kernel, X, Z, V, precision=precision, backend=backend).run()


@torch.no_grad()
def gradients(
    kernel: Kernel,
    X: torch.Tensor,
    alpha: torch.Tensor,
    Z: torch.Tensor | None = None,
    *,
    precision: str = "highest",
    backend: str = "auto",
) -> torch.Tensor:
    """Gradients of a kernel predictor f_c(z) = sum_j alpha[j, c] k(z, X[j]) at the points Z.

    Formula: grad f_c(z) = sum_j alpha_jc grad_z k(z, x_j), for radial kernels sum_j w(||z - x_j||) alpha_jc (x_j - z)
    with w(r) = -phi'(r)/r, where a pair at distance zero, exact duplicates included, contributes nothing.

    Args:
        kernel: a kernel such as ``Laplace(2.0)``.
        X: centers (n, d).
        alpha: coefficients (n, K).
        Z: evaluation points (m, d); default X.
        precision, backend: as in ``kernel_matrix``.

    Returns:
        Tensor (m, K, d); entry [i, c] is grad f_c(Z[i]).

    Raises:
        TypeError, ValueError: naming the argument; ValueError where gradients leave X's dtype.
        BackendUnavailable: the backend cannot serve the call.
    """
    return _gradients(kernel, X, alpha, Z, precision=precision, backend=backend).run()


@torch.no_grad()
def agop(
    kernel: Kernel,
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
    semi-definite, in units of f^2 / X^2; with weights w it is sum_i w_i sum_c grad f_c(Z[i]) grad f_c(Z[i])^T over
    sum_i w_i.

    Args:
        kernel: a kernel such as ``Laplace(2.0)``.
        X: centers (n, d).
        alpha: coefficients (n, K).
        Z: evaluation points (m, d); default X.
        reduction: "mean" divides by m, or by the sum of the weights; "sum" does not.
        center: subtract the mean gradient of each output first (the weighted mean where there are weights).
        method: "gradient" (2 m n K d products, no n x n memory), "gram" (n^2 m products for any number of
            outputs, stores the (m, n) weights), or "auto", the cheaper one that fits into memory. Near collapse
            float32 cannot hold the gram form's cancellation, which is therefore measured: its products run in
            float64, or, with "auto", the gradient form runs (logged at INFO to "fastagop"). With "gram", where it
            would lose more than 4e-6 of M (float32 by precision "highest") or 1e-7 (float64, and kernels that are
            not radial), the gradient form runs instead, with a ``NumericalWarning``.
        precision, backend: as in ``kernel_matrix``.
        memory_limit: bytes the call may take beyond its inputs; default most of what is free.
        sample_weight: weights (m,) >= 0 of the evaluation points, of X's dtype and device; default 1 each. A weight of
            2 has the effect of writing that point twice.

    Returns:
        Tensor (d, d) of X's dtype and device, without autograd history.

    Raises:
        TypeError, ValueError: naming the argument. MemoryError: a single block exceeds memory_limit.
        BackendUnavailable: the backend cannot serve the call.

    Warns:
        NumericalWarning: ``method="gram"`` gave way to the gradient form; or, with ``center=True``, the gradients of
            a radial kernel nearly agree in float32, and the float64 weights that this needs do not fit into memory.
    """
    task = AgopTask(reduction, center, method, memory_limit, sample_weight)
    return agop_call(kernel, X, alpha, Z, task, precision=precision, backend=backend).run()
