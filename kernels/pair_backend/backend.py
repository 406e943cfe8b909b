"""The door of kernels that are not radial: the torch backend's calls on them, planned, and what they cannot do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..calibration import rate
from ..errors import BackendUnavailable
from ..plan import RAISE_LIMIT, AgopTask, Call, Plan, budget, fitting_rows
from ..precision import dtype_name
from ..profile import Kernel
from ..scaling import Points
from ..torch_backend.agop import GRAM_LIMIT
from ..torch_backend.backend import FactorKernels, TorchBackend
from ..torch_backend.distance import near_chunk
from ..torch_backend.gram import warn_of_loss
from . import blocks
from .composite import diagonal_of, pairs_of
from .gram import gram, gram_bytes
from .pairs import PairKernel

if TYPE_CHECKING:
    from ..kernel_operator import KernelOperator

_LOSS = 1e-7  # of M, in the gram form: beyond it the gradient form runs
_LOSS_OF_FLOAT64 = GRAM_LIMIT[torch.float64]  # where float64 points have the digits, and nobody asked for that form


class PairBackend(TorchBackend):
    """Every operation of the torch backend for kernels that are not radial; users know it as "torch"."""

    shares_triangle = False

    def _plan(
        self, op: str, method: str, operator: KernelOperator, work: float, bytes_of: Callable[[int], int], **how
    ) -> Plan:
        limit, kernel = budget(how.get("limit"), operator.X.device), operator.kernel
        rows, peak = fitting_rows(bytes_of, limit, how["most"], op, *how.get("advice", ()))
        why = f"{operator.why}; {how.get('why') or _why(kernel)}"
        precision = dtype_name(blocks.dtype_of(kernel, operator.X.dtype))
        return Plan(op, self.name, method, why, precision, work, peak, rows)

    def matrix(self, operator: KernelOperator, out: torch.Tensor | None, ridge: float) -> Call:
        """K(X, Z), with the ridge on the diagonal where Z is X."""
        (n, d), m, kernel, X = operator.X.shape, len(operator.Z), operator.kernel, operator.X
        symmetric = operator.symmetric
        held = (0 if out is not None else n * m * X.element_size()) + _copies(operator)
        plan = self._plan(
            "kernel_matrix",
            "blocked, half of it and mirrored" if symmetric else "blocked",
            operator,
            (1.0 if symmetric else 2.0) * n * m * d * _depth(kernel),
            lambda rows: held + _block_bytes(operator, rows, m),
            most=n,
        )

        def run(at: Points) -> torch.Tensor:
            result = X.new_empty(n, m) if out is None else out
            result = blocks.kernel_matrix(at.kernel, at.X, at.Z, result, plan.block)
            if ridge:
                result.diagonal().add_(ridge)
            return result

        return Call(plan, run)

    def matmul(self, operator: KernelOperator, V: torch.Tensor) -> Call:
        """The call that computes k(X, Z) V."""
        (n, d), (m, p), size = operator.X.shape, V.shape, V.element_size()
        half = 1.0 if operator.symmetric else 2.0
        held = (n + m) * p * (8 + size) + _copies(operator)
        plan = self._plan(
            "kernel_matmul",
            "blocked, K never stored",
            operator,
            half * n * m * d * _depth(operator.kernel) + 2.0 * n * m * p,
            lambda rows: held + _block_bytes(operator, rows, m),
            most=n,
        )
        return Call(plan, lambda at: blocks.kernel_matmul(at.kernel, at.X, at.Z, V, plan.block))

    def product(self, at: Points, V: torch.Tensor, rows: int) -> torch.Tensor:
        """K(X, Z) V in blocks of that many rows."""
        return blocks.kernel_matmul(at.kernel, at.X, at.Z, V, rows)

    def gradients(self, operator: KernelOperator, alpha: torch.Tensor) -> Call:
        """Grad f_c(Z[i]); the coefficients come in their unit when it runs."""
        (n, d), K, m = operator.X.shape, alpha.shape[1], len(operator.Z)
        held = m * K * d * operator.X.element_size() + 8 * n * K + _copies(operator)
        plan = self._plan(
            "gradients",
            "blocked",
            operator,
            2.0 * m * n * d * (K + 1) * _depth(operator.kernel),
            lambda rows: held + _gradient_bytes(operator, rows, K),
            most=max(1, m),
        )
        return Call(plan, lambda at, alpha: blocks.gradients(at.kernel, at.X, alpha, at.Z, plan.block))

    def agop(self, operator: KernelOperator, alpha: torch.Tensor, task: AgopTask) -> Call:
        """Sum_i w_i sum_c g_ic g_ic^T; coefficients and weights come in their units when it runs."""
        kernel, K, d = operator.kernel, alpha.shape[1], operator.X.shape[1]
        (n, _), m = operator.X.shape, len(operator.Z)
        if task.method == "gram":
            self._refuse_gram(kernel, task.center)
        work = {
            "gradient": (2.0 * m * n * d * (K + 1) * _depth(kernel)) + 2.0 * m * K * d * d,
            "gram": 2.0 * m * n * (d * _depth(kernel) + n + 2 * K) + 2.0 * n * n * d + 4.0 * m * n * d,
        }
        method, why, limit = task.method, "method asked for", budget(task.limit, operator.X.device)
        alive = blocks_alive(kernel)
        least = gram_bytes(n, m, d, K, 1, alive)
        if method == "auto":
            form = dtype_name(blocks.dtype_of(kernel, operator.X.dtype))
            seconds = {name: flop / rate(name, form, operator.X.device) for name, flop in work.items()}
            allowed = "gram" in kernel.agop_forms and not task.center and least <= limit
            method = "gram" if allowed and seconds["gram"] < seconds["gradient"] else "gradient"
            why = _why(kernel)
        held = 8 * (3 * d * d + n * K) + (32 * K * d if task.center else 0) + _copies(operator)

        def gradient_bytes(rows: int) -> int:
            return held + _gradient_bytes(operator, rows, K)

        how = {"limit": task.limit, "advice": (RAISE_LIMIT,), "why": why}
        if method == "gradient":
            plan = self._plan("agop", method, operator, work[method], gradient_bytes, most=max(1, m), **how)
            return Call(plan, lambda at, alpha, weights: _agop(at, alpha, weights, task, plan, plan.block))
        bytes_of = functools.partial(gram_bytes, n, m, d, K, alive=alive)
        plan = self._plan("agop", method, operator, work[method], bytes_of, most=max(n, m), **how)
        # Where the gram form loses too much, the gradient form runs: in single rows where even these do not fit.
        rows, peak = fitting_rows(gradient_bytes, max(limit, gradient_bytes(1)), max(1, m), "agop")
        plan = replace(plan, peak_bytes=max(plan.peak_bytes, peak))
        return Call(plan, lambda at, alpha, weights: _agop(at, alpha, weights, task, plan, rows))

    @staticmethod
    def _refuse_gram(kernel: Kernel, center: bool) -> None:
        reason = ""
        if "gram" not in kernel.agop_forms:
            reason = "its gradient is no combination of the points, so there is no gram form"
        elif center:
            reason = "the gram form of a kernel that is not radial is not centred"
        if reason:
            raise BackendUnavailable(
                f"method='gram' cannot serve {kernel!r}: {reason}; use method='gradient' or 'auto'"
            )

    def diagonal(self, kernel: Kernel, X: torch.Tensor, alpha: torch.Tensor, task: AgopTask) -> torch.Tensor:
        """The diagonal of the AGOP at X, summed, float64 (d,)."""
        (n, d), K = X.shape, alpha.shape[1]
        held = 8 * (4 * d + n * K + 2 * n * d)
        each = 8 * (blocks_alive(kernel) * n + 4 * K * d)
        limit = budget(task.limit, X.device)
        rows, _ = fitting_rows(lambda rows: held + rows * each, limit, n, "agop, its diagonal,", RAISE_LIMIT)
        return blocks.agop(kernel, X, alpha, X, rows, center=task.center, weights=task.weights, diagonal=True)

    def factor_kernels(self, dtype: torch.dtype, precision: str) -> FactorKernels:
        """How a stored k(X, X) is filled: in full, by ``fill``; half of one is not offered."""
        return PairFactor()


class PairFactor(FactorKernels):
    """A stored k(X, X) of a kernel that is not radial."""

    def fill(self, out: torch.Tensor, kernel: Kernel, X: torch.Tensor, rows: int) -> torch.Tensor:
        """k(X, X) into out, in out's dtype."""
        X = X.to(out.dtype)
        return blocks.kernel_matrix(kernel, X, X, out, rows)

    def rows(self, kernel: Kernel, X: torch.Tensor):
        """Half of a matrix is not offered."""
        raise BackendUnavailable(f"half of a kernel matrix is stored for radial kernels only, got {kernel!r}")


class PairProduct:
    """k(X, X) as a solver sees it, made of float64 points block by block at every product."""

    def __init__(self, kernel: Kernel, X: torch.Tensor, rows: int):
        self.kernel, self.X, self.rows = kernel, X, rows

    def __len__(self) -> int:
        return len(self.X)

    def matmul(self, V: torch.Tensor) -> torch.Tensor:
        """The product k(X, X) V, made from the points."""
        return blocks.kernel_matmul(self.kernel, self.X, self.X, V, self.rows)

    def columns(self, index: torch.Tensor) -> torch.Tensor:
        """The columns k(X, X[index])."""
        return pairs_of(self.kernel, self.X, self.X[index]).values(slice(0, len(index))).T.contiguous()

    def sampled(self, V: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, those rows of k(X, X) V): all of them."""
        return torch.arange(len(self.X), device=self.X.device), self.matmul(V)

    def diagonal(self) -> torch.Tensor:
        """k(x, x) of each point (n,)."""
        return diagonal_of(self.kernel, self.X)


def _agop(
    at: Points, alpha: torch.Tensor, weights: torch.Tensor | None, task: AgopTask, plan: Plan, rows: int
) -> torch.Tensor:
    """The AGOP by the plan's form; rows: of a block of the gradient form, which may take the gram form's place."""
    kernel, X, Z, _ = at
    if task.center and X.dtype == torch.float32:  # what centring leaves may be small
        x = X.double()
        X, Z, alpha = x, x if Z is X else Z.double(), alpha.double()
    if plan.method == "gram":
        M, loss = gram(kernel, X, alpha, Z, plan.block, weights)
        exact = task.method == "auto" and X.dtype == torch.float64 and not task.rounded
        if loss <= (_LOSS_OF_FLOAT64 if exact else _LOSS):
            return M
        if task.method == "gram":
            warn_of_loss(loss)
    return blocks.agop(kernel, X, alpha, Z, rows, center=task.center, weights=weights)


def _why(kernel: Kernel) -> str:
    """What is said of how a kernel computes."""
    return f"{type(kernel).__name__} is not radial: its blocks are computed in " + (
        "float64, as their terms cancel" if kernel.wide else "the points' dtype, feature by feature"
    )


def _depth(kernel: Kernel) -> int:
    """Kernels that one is made of."""
    return sum(map(_depth, kernel.parts)) or 1


def blocks_alive(kernel: Kernel) -> int:
    """Blocks (b, n) that exist at once beside the result while pairs of a kernel are computed, at most."""
    return kernel.blocks_alive() if isinstance(kernel, PairKernel) else 8


def _copies(operator: KernelOperator) -> int:
    """Bytes of the points as the kernel has them: in its dtype, as unit vectors, transposed."""
    return 3 * 8 * (len(operator.X) + len(operator.Z)) * (operator.X.shape[1] + 2) * _depth(operator.kernel)


def _block_bytes(operator: KernelOperator, rows: int, width: int) -> int:
    kernel, size = operator.kernel, blocks.dtype_of(operator.kernel, operator.X.dtype).itemsize
    items = blocks_alive(kernel) * rows * width + rows * operator.X.shape[1]
    return size * items + 32 * near_chunk(operator.X.device)


def _gradient_bytes(operator: KernelOperator, rows: int, K: int) -> int:
    (n, d), size = operator.X.shape, blocks.dtype_of(operator.kernel, operator.X.dtype).itemsize
    return _block_bytes(operator, rows, n) + size * (5 * rows * K * d + max(n, rows) * d)
