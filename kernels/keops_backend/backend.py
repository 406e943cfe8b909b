"""The KeOps backend's door: what it serves and why not, and its calls, planned."""

from __future__ import annotations

import importlib.util
import os
import shutil
from typing import TYPE_CHECKING

import torch

from ..errors import BackendUnavailable
from ..plan import AgopTask, Call
from ..precision import describe_precision
from ..profile import text
from ..scaling import Points
from . import reductions

if TYPE_CHECKING:
    from ..backends import Request
    from ..kernel_operator import KernelOperator


class KeopsBackend:
    """Products, gradients and the gradient form of the AGOP, without a block of the kernel matrix."""

    name = "keops"
    operations = ("kernel_matmul", "gradients", "agop", "solve with method 'cg'")
    shares_triangle = False

    def refusal(self, request: Request) -> str | None:
        """Why it cannot serve a call, and what to change; None where it can."""
        if request.operation not in self.operations:
            reason = "it would store the kernel matrix and KeOps never does"
            return reason + ("; method='cg' solves without it" if request.operation == "solve" else "")
        return self.missing(request) or reductions.too_wide(
            request.operation, request.kernel, request.X.shape[-1], self.sums_in(request), request.X.device
        )

    def sums_in(self, request: Request) -> torch.dtype:
        """The dtype in which a call is summed."""
        return torch.float64 if request.operation == "solve with method 'cg'" else request.X.dtype

    def missing(self, request: Request) -> str | None:
        """Why KeOps cannot compute here, and what to change; None where it can."""
        if importlib.util.find_spec("pykeops") is not None and text(request.kernel, "keops") is None:
            name = type(request.kernel).__name__
            return f"{name} has no KeOps formula; give its class one, as those in kernels/radial.py have"
        return unusable(request.X)

    def describe_precision(self, precision: str, X: torch.Tensor) -> str:
        """What a precision means for this tensor, in words."""
        return describe_precision(precision, X)

    def products(self, precision: str, X: torch.Tensor) -> str:
        """The word that the rate of its sums is known by."""
        return "keops"

    def matmul(self, operator: KernelOperator, V: torch.Tensor) -> Call:
        """The call that computes k(X, Z) V."""
        plan = reductions.plan_kernel_matmul(operator.X, operator.Z, V, operator.why)
        return Call(plan, lambda at: self.product(at, V, plan.block))

    def product(self, at: Points, V: torch.Tensor, rows: int) -> torch.Tensor:
        """K(X, Z) V of scaled points; the rows of a block mean nothing here."""
        return reductions.kernel_matmul(at.kernel, at.X, at.Z, V)

    def gradients(self, operator: KernelOperator, alpha: torch.Tensor) -> Call:
        """Grad f_c(Z[i]); the coefficients come in their unit when it runs."""
        plan = reductions.plan_gradients(operator.X, alpha, operator.Z, operator.why)
        return Call(plan, lambda at, alpha: reductions.gradients(at.kernel, at.X, alpha, at.Z))

    def agop(self, operator: KernelOperator, alpha: torch.Tensor, task: AgopTask) -> Call:
        """The gradient form; coefficients and weights come in their units when it runs."""
        self.refuse_gram(task)
        plan = reductions.plan_agop(operator.X, alpha, operator.Z, task.limit, operator.why)
        return Call(plan, lambda at, alpha, weights: reductions.agop(at, alpha, task.center, plan.block, weights))

    @staticmethod
    def refuse_gram(task: AgopTask) -> None:
        """Refuse the form that stores the weights."""
        if task.method == "gram":
            raise BackendUnavailable(
                "backend 'keops' cannot serve agop with method 'gram': that form stores the weights and KeOps stores "
                "nothing; use method='gradient' or 'auto' with it, or backend='torch' or 'auto'"
            )


def unusable(X: torch.Tensor) -> str | None:
    """Why this machine's KeOps cannot compute with these points; None where it can."""
    if importlib.util.find_spec("pykeops") is None:
        return "pykeops is not installed; pip install 'fastagop[keops]'"
    if X.device.type not in ("cpu", "cuda"):
        return f"X is on {X.device} and it runs on the CPU and on CUDA; move the tensors with .cpu() or .cuda()"
    if not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++") if name):
        return "it compiles its formulas and there is no C++ compiler; install g++, or set CXX to a compiler's path"
    if X.device.type == "cuda" and not reductions.pykeops_module().config.gpu_available:
        return "pykeops finds no CUDA (libcuda, libnvrtc and headers); see pykeops.check_health()"
    return None
