"""KeOps for kernels that are not radial: sums of their formulas, in the dtype that a kernel computes in."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..errors import BackendUnavailable
from ..pair_backend.blocks import checked, computed, dtype_of
from ..plan import AgopTask, Call, Plan
from ..precision import dtype_name
from ..profile import text
from ..scaling import Points
from . import reductions
from .backend import KeopsBackend, unusable

if TYPE_CHECKING:
    from ..backends import Request
    from ..kernel_operator import KernelOperator


class KeopsPairBackend(KeopsBackend):
    """Operations, but for solving, for kernels that are not radial; users know it as "keops"."""

    operations = ("kernel_matmul", "gradients", "agop")

    def refusal(self, request: Request) -> str | None:
        """Why it cannot serve a call, and what to change; None where it can."""
        if request.operation.startswith("solve"):
            return f"it solves with radial kernels only, and {request.kernel!r} is none"
        return super().refusal(request)

    def missing(self, request: Request) -> str | None:
        """Why KeOps cannot compute here, and what to change; None where it can."""
        if text(request.kernel, "keops") is None:
            return f"there is no KeOps formula of {request.kernel!r}"
        return unusable(request.X)

    def sums_in(self, request: Request) -> torch.dtype:
        """The dtype in which a call is summed."""
        return dtype_of(request.kernel, request.X.dtype)

    def matmul(self, operator: KernelOperator, V: torch.Tensor) -> Call:
        """The call that computes k(X, Z) V."""
        X, Z = _sized(operator.X, operator), _sized(operator.Z, operator)
        plan = reductions.plan_kernel_matmul(X, Z, _sized(V, operator), operator.why)
        return Call(
            _said(plan, operator), lambda at: checked(self.product(at, V, plan.block).to(V.dtype), "products", V.dtype)
        )

    def product(self, at: Points, V: torch.Tensor, rows: int) -> torch.Tensor:
        """K(X, Z) V in the dtype of the sums; the rows of a block mean nothing here."""
        x, z = computed(at.kernel, at.X, at.Z)
        return reductions.kernel_matmul(at.kernel, x, z, V.to(x.dtype))

    def gradients(self, operator: KernelOperator, alpha: torch.Tensor) -> Call:
        """Grad f_c(Z[i]); the coefficients come in their unit when it runs."""
        X, Z = _sized(operator.X, operator), _sized(operator.Z, operator)
        plan = reductions.plan_gradients(X, alpha, Z, operator.why)

        def run(at: Points, alpha: torch.Tensor) -> torch.Tensor:
            x, z = computed(at.kernel, at.X, at.Z)
            found = reductions.gradients(at.kernel, x, alpha.to(x.dtype), z)
            return checked(found.to(alpha.dtype), "gradients", alpha.dtype)

        return Call(_said(plan, operator), run)

    def agop(self, operator: KernelOperator, alpha: torch.Tensor, task: AgopTask) -> Call:
        """The gradient form, in float64 where gradients are centred, as what that leaves of them may be small."""
        self.refuse_gram(task)
        dtype, points = _dtype(operator, task.center), operator.X
        if reason := reductions.too_wide("agop", operator.kernel, points.shape[1], dtype, points.device):
            raise BackendUnavailable(
                f"backend 'keops' cannot serve agop with center=True: {reason}; use backend='torch' or 'auto'"
            )
        X, Z = _sized(operator.X, operator, task.center), _sized(operator.Z, operator, task.center)
        plan = reductions.plan_agop(X, alpha, Z, task.limit, operator.why)

        def run(at: Points, alpha: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
            x, z = computed(at.kernel, at.X, at.Z)
            if task.center:
                x, z = x.double(), z.double()
            w = weights if weights is None else weights.to(x.dtype)
            M = reductions.agop(Points(at.kernel, x, z), alpha.to(x.dtype), task.center, plan.block, w)
            return checked(M, "gradients", at.X.dtype)

        return Call(_said(plan, operator, task.center), run)


def _dtype(operator: KernelOperator, wide: bool) -> torch.dtype:
    return torch.float64 if wide else dtype_of(operator.kernel, operator.X.dtype)


def _sized(X: torch.Tensor, operator: KernelOperator, wide: bool = False) -> torch.Tensor:
    """A matrix of that shape in the dtype of the sums, of which one number exists: plans ask for its size."""
    return X.new_empty((1, 1), dtype=_dtype(operator, wide)).expand(X.shape)


def _said(plan: Plan, operator: KernelOperator, wide: bool = False) -> Plan:
    """A plan with the dtype of the sums, and what copies of points and operands in it take."""
    dtype = _dtype(operator, wide)
    numbers = (len(operator.X) + len(operator.Z)) * operator.X.shape[1] if dtype != operator.X.dtype else 0
    words = dtype_name(dtype)
    return replace(plan, precision=words, peak_bytes=plan.peak_bytes + dtype.itemsize * numbers)
