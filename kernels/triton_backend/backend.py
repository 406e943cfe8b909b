"""The Triton backend's door: what it serves and why not, and its calls, planned. Triton is imported by what runs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ..calibration import source
from ..gemm import LIBRARY, PanelProducts
from ..plan import AgopTask, Call, Plan
from ..profile import Profile, text
from ..torch_backend import backend as torch_door
from ..torch_backend import costs, matrix
from ..torch_backend.agop import InnerKernels
from . import stored_product
from .launch_config import PRODUCTS, interpreted, version

if TYPE_CHECKING:
    from ..backends import Request
    from ..kernel_operator import KernelOperator

_WORDS = {"highest": "three fp16 products", "high": "three bf16 products", "medium": "TF32"}


def _launch():
    from . import launch  # imports triton

    return launch


class TritonBackend:
    """Every operation in float32 on CUDA, by fused kernels; blocks and costs are planned as torch's are."""

    name = "triton"
    operations = ("kernel_matrix", "kernel_matmul", "gradients", "agop", "solve")
    shares_triangle = False

    def refusal(self, request: Request) -> str | None:
        """Why it cannot serve a call, and what to change; None where it can."""
        if request.operation == "solve with method 'cg'":
            return "these products are in float64"
        if request.operation not in self.operations:
            return "this version of fastagop has no triton kernel for it"
        return self.missing(request) or _unusable(request.X) or _unserved(request)

    def missing(self, request: Request) -> str | None:
        """Why a kernel is not served; None where it is."""
        if importlib.util.find_spec("triton") is not None and text(request.kernel, "triton") is None:
            name = type(request.kernel).__name__
            return f"{name} has no Triton text; give its class one, as those in kernels/radial.py have"
        return None

    def stores_blocks(self, operator: KernelOperator, V: torch.Tensor, plan: Plan) -> tuple[Plan, bool]:
        """(the plan of kernel_matmul, whether row blocks of K are stored)."""
        return _plan_product(plan, operator, V)

    def describe_precision(self, precision: str, X: torch.Tensor) -> str:
        """What a precision means here, in words."""
        return f"float32, {precision} ({_WORDS[precision]})"

    def products(self, precision: str, X: torch.Tensor) -> str:
        """The word that the rate of its products is known by."""
        return PRODUCTS[precision]

    def matrix(self, operator: KernelOperator, out: torch.Tensor | None, ridge: float) -> Call:
        """K(X, Z), with the ridge on the diagonal where Z is X."""
        plan = matrix.plan_kernel_matrix(operator.X, operator.Z, out, operator.why)
        return Call(plan, lambda at: _launch().kernel_matrix(at, out, operator.precision, ridge))

    def matmul(self, operator: KernelOperator, V: torch.Tensor) -> Call:
        """The call that computes k(X, Z) V."""
        plan = matrix.plan_kernel_matmul(operator.X, operator.Z, V, operator.why)
        plan, stored = self.stores_blocks(operator, V, plan)
        if stored:
            return Call(plan, lambda at: stored_product.kernel_matmul(at, V, operator.precision, plan.block))
        return Call(plan, lambda at: _launch().kernel_matmul(at, V, operator.precision))

    def gradients(self, operator: KernelOperator, alpha: torch.Tensor) -> Call:
        """Grad f_c(Z[i]); the coefficients come in their unit when it runs."""
        plan = torch_door.plan_gradients(operator.X, alpha, operator.Z, operator.why)
        return Call(plan, lambda at, alpha: _launch().gradients(at, alpha, plan.block, operator.precision))

    def agop(self, operator: KernelOperator, alpha: torch.Tensor, task: AgopTask) -> Call:
        """Sum_i w_i sum_c g_ic g_ic^T; coefficients and weights come in their units when it runs."""
        symmetric, products = operator.symmetric and task.weights is None, PRODUCTS[operator.precision]
        plan = costs.plan(operator.X, alpha, operator.Z, task, operator.why, products, symmetric=symmetric)
        return Call(plan, lambda at, alpha, weights: _launch().agop(at, alpha, task, plan, operator.precision, weights))

    def inner_kernels(self, X: torch.Tensor, precision: str) -> InnerKernels:
        """Its inner steps of the AGOP's two forms, for these centers."""
        return _launch().inner_kernels(X, precision)

    def factor_kernels(self, dtype: torch.dtype, precision: str) -> torch_door.FactorKernels:
        """What a factorisation of k(X, X) needs of it; torch's where this Triton has no products in the dtype."""
        lacking = None if dtype == torch.float32 else _lacking_float64()
        if lacking is not None:
            found = torch_door.FactorKernels()
            found.note = f" of a matrix from the torch backend: {lacking}"
            return found
        return _FactorKernels(dtype, precision)


def _plan_product(plan: Plan, operator: KernelOperator, V: torch.Tensor) -> tuple[Plan, bool]:
    """(the plan of kernel_matmul, whether row blocks of K are stored): what is the faster by the device's rates."""
    (n, d), products = operator.X.shape, PRODUCTS[operator.precision]
    if operator.X.device.type != "cuda":  # interpreted: nothing there is fast
        return replace(plan, method="fused, K never stored"), False
    fused, stored = stored_product.seconds(n, len(operator.Z), d, V.shape[1], products, operator.X.device)
    why = f"{plan.why}; fused about {fused:.2g} s, by stored row blocks {stored:.2g} s ({source(operator.X.device)})"
    method = "row blocks of K, stored, and the library's product" if stored < fused else "fused, K never stored"
    return replace(plan, method=method, why=why), stored < fused


class _FactorKernels(torch_door.FactorKernels):
    """The matrix made once by the fused kernel; a float32 one is factored by products of the precision asked for.

    Half of one is factored as accurately as by float32 products, by split ones; asked for less, by the library's.
    """

    def __init__(self, dtype: torch.dtype, precision: str):
        self.coarse = precision != "highest"
        self.panels = LIBRARY if self.coarse else _SplitPanels()
        if dtype == torch.float32:  # the library's float64 products are on tensor cores as they are
            self.update, self.precision = _launch().cholesky_update(precision), precision

    def fill(self, out: torch.Tensor, kernel: Profile, X: torch.Tensor, rows: int) -> torch.Tensor:
        """K(X, X) into out, in out's dtype."""
        return _launch().fill_symmetric(out, kernel, X)

    def rows(self, kernel: Profile, X: torch.Tensor) -> Callable[[torch.Tensor, int], torch.Tensor]:
        """(out, start) -> out with rows start .. of K(X, X), up to their own last column, in float64."""
        return _launch().rows_of_symmetric(kernel, X)


class _SplitPanels(PanelProducts):
    """Three fp16 products of factors that are split once each, with sums in float32."""

    word = "fp16x3"
    note = " by three fp16 products"

    def ready(self, A: torch.Tensor, diagonal: torch.Tensor | None = None) -> Any:
        """The rows of A, split into halves for products of fp16 numbers."""
        return _launch().split_rows(A)

    def subtract_(self, C: torch.Tensor, A: Any, B: Any) -> None:
        """C -= A B^T in place; A a tensor or split, B split."""
        _launch().subtract_product_(C, A if not isinstance(A, torch.Tensor) else self.ready(A), B)

    def times_triangle_(self, A: torch.Tensor, T: Any) -> None:
        """A <- A T^T in place, T split and lower triangular."""
        _launch().times_triangle_(A, T)


def _unusable(X: torch.Tensor) -> str | None:
    """Why this machine's Triton cannot compute with these points; None where it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton (Linux, CUDA)"
    if X.dtype != torch.float32:
        return f"it computes in float32 and X is {X.dtype}; convert with X.float()"
    if not interpreted():
        if X.device.type != "cuda":
            return f"X is on {X.device} and it runs on CUDA; move the tensors with .cuda()"
        if torch.version.hip is not None:
            return "its kernels are for NVIDIA's GPUs and this torch is built for AMD's (ROCm)"
        if torch.cuda.get_device_capability(X.device) < (8, 0):
            return f"{torch.cuda.get_device_name(X.device)} is older than compute capability 8.0; use a newer GPU"
    return None


def _unserved(request: Request) -> str | None:
    if request.precision == "high" and "bf16x3" not in input_precisions():
        return (
            "its Triton has no bf16x3 products, which precision='high' means; use another precision or a newer triton"
        )
    if request.precision == "medium" and request.operation != "solve" and _uncompiled(request.X.device):
        return (
            f"Triton {_words(version())} does not compile its TF32 kernels for {_chip(request.X.device)}, which "
            "precision='medium' means; use another precision, or Triton 3.8 or newer"
        )
    return None


def input_precisions() -> tuple[str, ...]:
    """What the installed Triton's products can do with float32 factors."""
    if interpreted():
        from triton.runtime.interpreter import InterpreterOptions as Options
    else:
        from triton.backends.nvidia.compiler import CUDAOptions as Options
    return Options().allowed_dot_input_precisions


def has_products(dtype: torch.dtype) -> bool:
    """Whether the installed Triton can make a kernel matrix of that dtype on every GPU here."""
    return dtype == torch.float32 or _lacking_float64() is None


def _lacking_float64() -> str | None:
    """Why the installed Triton makes no float64 matrix on one of the GPUs; None where it does on all of them."""
    if version() < (3, 5):
        return "this Triton is older than 3.5 and has no float64 products"
    devices = [torch.device("cuda", index) for index in range(max(1, torch.cuda.device_count()))]
    for device in () if interpreted() else filter(_uncompiled, devices):
        return f"Triton {_words(version())} does not compile float64 products for {_chip(device)}, and Triton 3.8 does"
    return None


def _uncompiled(device: torch.device) -> bool:
    """Whether this Triton's compiler fails at the distances' products with float64 or TF32 factors for a device.

    Seen with Triton 3.6 and 3.7 for compute capabilities 10.0 and 10.3, in its pass on tensor memory, which chips from
    12.0 on have not; Triton 3.8 compiles all.
    """
    if device.type != "cuda" or version() >= (3, 8):
        return False
    return torch.cuda.is_available() and (10, 0) <= torch.cuda.get_device_capability(device) < (12, 0)


def _chip(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"


def _words(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
