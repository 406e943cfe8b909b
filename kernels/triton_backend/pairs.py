"""Triton for kernels that are not radial: those of the dot product and of the l1 distance, in float32."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..errors import BackendUnavailable
from ..plan import AgopTask, Call, Plan
from ..profile import constants, text
from ..scaling import Points
from ..torch_backend import backend as torch_door
from ..torch_backend import costs
from .backend import TritonBackend

if TYPE_CHECKING:
    from ..backends import Request
    from ..kernel_operator import KernelOperator


def _launch():
    from . import pair_launch  # imports triton

    return pair_launch


class TritonPairBackend(TritonBackend):
    """Operations, but for solving, for kernels that are not radial; users know it as "triton"."""

    operations = ("kernel_matrix", "kernel_matmul", "gradients", "agop")

    def refusal(self, request: Request) -> str | None:
        """Why it cannot serve a call, and what to change; None where it can."""
        if request.operation.startswith("solve"):
            return f"it solves with radial kernels only, and {request.kernel!r} is none"
        return super().refusal(request)

    def missing(self, request: Request) -> str | None:
        """Why a kernel is not served; None where it is."""
        if not text(request.kernel, "triton"):
            return f"there is no Triton text of {request.kernel!r}"
        largest = torch.finfo(torch.float32).max
        beyond = any(abs(value) > largest for value in constants(request.kernel, torch.float32).values())
        return f"a parameter of {request.kernel!r} is beyond float32" if beyond else None

    def stores_blocks(self, operator: KernelOperator, V: torch.Tensor, plan: Plan) -> tuple[Plan, bool]:
        """Products are fused, always."""
        return replace(plan, method="fused, K never stored"), False

    def matrix(self, operator: KernelOperator, out: torch.Tensor | None, ridge: float) -> Call:
        """K(X, Z), with the ridge on the diagonal where Z is X."""
        return _said(operator, super().matrix(operator, out, ridge))

    def gradients(self, operator: KernelOperator, alpha: torch.Tensor) -> Call:
        """Grad f_c(Z[i]); the coefficients come in their unit when it runs."""
        plan = torch_door.plan_gradients(operator.X, alpha, operator.Z, operator.why)
        call = Call(plan, lambda at, alpha: _launch().gradients(at, alpha, plan.block, operator.precision))
        return _said(operator, call)

    def agop(self, operator: KernelOperator, alpha: torch.Tensor, task: AgopTask) -> Call:
        """The gradient form; coefficients and weights come in their units when it runs."""
        reason = ""
        if task.method == "gram":
            reason = "method 'gram': it has the gradient form; use method='gradient' or 'auto'"
        elif task.center:
            reason = "center=True: what centring leaves may be lost in float32; use backend='torch' or 'auto'"
        if reason:
            raise BackendUnavailable(f"backend 'triton' cannot serve agop of {operator.kernel!r} with {reason}")
        gradient = replace(task, method="gradient")
        plan = costs.plan(operator.X, alpha, operator.Z, gradient, operator.why, symmetric=False)

        def run(at: Points, alpha: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
            return _launch().agop(at, alpha, plan.block, operator.precision, weights)

        return _said(operator, Call(plan, run))


def _said(operator: KernelOperator, call: Call) -> Call:
    """A call whose plan says that sums of absolute differences take no products."""
    precision = "float32" if operator.kernel.measure == "l1" else call.plan.precision
    return Call(replace(call.plan, precision=precision), call.run)
