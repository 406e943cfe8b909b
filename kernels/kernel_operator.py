"""KernelOperator: the kernel, its points and the backend of one call, checked, scaled, planned and served."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from . import backends, calibration, checks
from .errors import warn
from .pair_backend.backend import PairProduct
from .pair_backend.blocks import mean_gradient as pair_mean_gradient
from .plan import AgopTask, Call, Plan, computed_once
from .precision import dtype_name, matmul_precision
from .profile import Kernel, Profile
from .scaling import Points, in_range, scale_points, scaled_
from .torch_backend import agop as torch_agop
from .torch_backend import matrix, tiles, wide
from .torch_backend.distance import dominant_offset

log = logging.getLogger("fastagop")

_ROWS = 256  # of the blocks of a pass that no backend has planned


class KernelOperator:
    """k(X, Z) of one call, by the backend that serves it.

    ``matrix``, ``matmul``, ``gradients`` and ``agop`` check what they are given and return a ``Call``: its plan can be
    read, and ``run()`` computes. Lengths are in a power-of-two unit while a backend computes, products run at the
    precision asked for, and what comes out is in the units that came in.

    Args:
        operation: of the call, as ``backends.Request`` names it.
        kernel: a kernel.
        X: centers (n, d).
        Z: evaluation points (m, d), default X.
        precision, backend: as in ``fastagop.kernel_matrix``.

    Attributes:
        kernel, X, Z, precision: as given, Z being X where they are the same.
        symmetric: whether they are the same.
        backend: the ``Backend`` chosen.
        why: the reason, in words.
    """

    def __init__(self, operation: str, kernel: Any, X, Z=None, *, precision="highest", backend="auto"):
        checks.kernel(kernel)
        checks.choice("precision", precision, checks.PRECISIONS)
        checks.choice("backend", backend, backends.names())
        self.kernel, self.X, self.precision = kernel, X, precision
        self.Z = checks.points(X, Z)
        self.symmetric: bool = self.Z is X
        self.backend, self.why = backends.choose(backend, backends.Request(operation, kernel, X, precision))

    @computed_once
    def points(self) -> Points:
        """Kernel, X and Z in their unit of length."""
        return scale_points(self.kernel, self.X, self.Z)

    def products(self):
        """The context in which products run at the precision asked for."""
        return matmul_precision(self.precision, self.X.device)

    def _planned(self, call: Call, run: Callable[[], torch.Tensor]) -> Call:
        precision = call.plan.precision or self.backend.describe_precision(self.precision, self.X)
        plan = dataclasses.replace(call.plan, backend=self.backend.name, precision=precision)
        return Call(plan, run, lambda: self.seconds(plan))

    def _served(self, call: Call) -> Call:
        """The call on the scaled points, where nothing else has a unit."""

        def run() -> torch.Tensor:
            with self.products():
                return call.run(self.points)

        return self._planned(call, run)

    def seconds(
        self, plan: Plan, dtype: torch.dtype | None = None, passes: float = 1.0, *, stored: bool = False
    ) -> float:
        """Estimated time of a plan: its operations at the device's rates, and what its pairs of points cost beside.

        dtype: of its large products, default that of the points. passes: over all pairs. stored: what it makes of pairs
        is a matrix that is kept, as in the AGOP's gram form.
        """
        if dtype is None or dtype == self.X.dtype:
            products = self.backend.products(self.precision, self.X)
        else:
            products = dtype_name(dtype)
        form = "gram" if stored or plan.method == "gram" else "gradient"
        # The mirror image of half of the pairs is known.
        halves = self.symmetric and plan.op != "gradients" and plan.method != "gradient"
        pairs = float(len(self.X)) * len(self.Z) * (0.5 if halves else 1.0) * passes
        return calibration.seconds(plan.flops, pairs, self.X.device, form, products)

    def serves(self, operation: str) -> bool:
        """Whether its backend would serve another operation on these points, too."""
        return self.backend.refusal(backends.Request(operation, self.kernel, self.X, self.precision)) is None

    def float64_product(self, rows: int) -> PointsProduct | PairProduct:
        """k(X, X) of the scaled points in float64, which is never stored, in blocks of that many rows."""
        if not self.kernel.radial:
            return PairProduct(self.points.kernel, self.points.X.double(), rows)
        request = backends.Request("solve with method 'cg'", self.kernel, self.X)
        chosen, _ = backends.choose(backends.serving(self.backend.name, request), request)
        x = self.points.X.double()
        return PointsProduct(Points(self.points.kernel, x, x), rows, chosen)

    def matrix(self, out: torch.Tensor | None = None, ridge: float = 0.0) -> Call:
        """k(X, Z), shape (n, m); + ridge I where Z is X."""
        X, Z = self.X, self.Z
        ridge = checks.ridge(ridge, X.dtype)
        if ridge and not self.symmetric:
            raise ValueError(
                f"ridge belongs on the diagonal of k(X, X), got ridge {ridge!r} with other points Z; omit one"
            )
        if out is not None:
            checks.output("out", out, (len(X), len(Z)), X)
            checks.apart("out", out, X, Z)
        return self._served(self.backend.matrix(self, out, ridge))

    def matmul(self, V: torch.Tensor | None) -> Call:
        """k(X, Z) V, shape (n, p)."""
        if V is None:
            raise TypeError(
                "V must be a torch.Tensor, got none; call kernel_matmul(kernel, X, Z, V) or (kernel, X, V=V)"
            )
        checks.matrix("V", V, like=self.X, rows=(len(self.Z), "Z"))
        return self._served(self.backend.matmul(self, V))

    def gradients(self, alpha: torch.Tensor) -> Call:
        """grad f_c(Z[i]) of f_c(z) = sum_j alpha[j, c] k(z, X[j]), shape (m, K, d)."""
        checks.matrix("alpha", alpha, like=self.X, rows=(len(self.X), "X"))
        call = self.backend.gradients(self, alpha)

        def run() -> torch.Tensor:
            at = self.points
            kernel, scaled, amplitude = in_range(at.kernel, at.X, alpha, at.unit, at.Z)
            with self.products():
                result = call.run(at._replace(kernel=kernel), scaled)
            if not checks.finite(amplitude.restore(result)):
                raise ValueError(f"alpha is so large that a gradient leaves {self.X.dtype}; divide alpha by a constant")
            return result

        return self._planned(call, run)

    def agop(self, alpha: torch.Tensor, task: AgopTask) -> Call:
        """The AGOP of that predictor over Z, (d, d), in X's dtype."""
        Z, limit, method = self.Z, checks.memory_limit(task.limit), task.method
        if not checks.readable(self.X):  # the gram form's estimate looks at values
            if method == "gram":
                raise ValueError(
                    "method='gram' measures its cancellation on the host, which a CUDA graph's capture forbids; "
                    "use method='gradient' there"
                )
            method = "gradient"
        if task.reduction == "mean" and len(Z) == 0:
            raise ValueError("Z must have at least one row for reduction='mean', got none; use reduction='sum'")
        checks.matrix("alpha", alpha, like=self.X, rows=(len(self.X), "X"))
        checks.sample_weight(task.weights, Z, task.reduction)
        if (limit, method) != (task.limit, task.method):
            task = dataclasses.replace(task, limit=limit, method=method)
        call = self.backend.agop(self, alpha, task)
        return self._planned(call, lambda: self._agop(call, alpha, task))

    def _agop(self, call: Call, alpha: torch.Tensor, task: AgopTask) -> torch.Tensor:
        at, X = self.points, self.X
        kernel, scaled, amplitude = in_range(at.kernel, at.X, alpha, at.unit, at.Z)
        at = at._replace(kernel=kernel)
        weights, divisor, exponent = scale_weights(task.weights, at.Z, task.reduction)
        if weights is not None and checks.readable(X) and not weights.any():
            return X.new_zeros(X.shape[1], X.shape[1])
        with self.products():
            M = None
            if task.center and self.kernel.radial and wide.centring_cancels(at, scaled, weights):
                M = _in_float64(at, scaled, task, weights)
            M = call.run(at, scaled, weights) if M is None else M
        M = amplitude.restore_squares(M.double().div_(divisor), exponent)  # may leave float32 on the way
        return in_dtype(M, X.dtype)

    def agop_from_weights_(
        self, W: torch.Tensor, alpha: torch.Tensor, center: bool, weights: torch.Tensor | None = None, limit=None
    ) -> torch.Tensor:
        """The AGOP at X, summed, float64, from stored weights (n, n) of the scaled points; W is overwritten.

        W has a zero diagonal; W and alpha may be wider than X. weights (n,) count the evaluation points. The result is
        that of the scaled points. limit: bytes that the call may take, W included, as of ``plan.AgopTask``.
        """
        X = self.points.X
        with self.products():
            inner = self.backend.inner_kernels(X, self.precision)
            task = AgopTask("sum", center, limit=checks.memory_limit(limit))
            how = {"symmetric": True, "rows": _ROWS, "kernels": inner, "row_weights": weights}
            return torch_agop.agop_from_weights_(W, self.points.kernel, X, alpha, X, task, **how)

    def agop_from_tiles(
        self, blocks: Iterator, alpha: torch.Tensor, center: bool, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As ``agop_from_weights_``, by the gradient form, from (rows, their stored weights), block by block."""
        X = self.points.X
        with self.products():
            step = self.backend.inner_kernels(X, self.precision).gradients
            arguments = {"step": step, "row_weights": weights}
            return torch_agop.agop_from_tiles(blocks, self.points.kernel, X, alpha, center, **arguments)

    def tiles(self, rows: int = _ROWS) -> Iterator[tuple[slice, torch.Tensor]]:
        """(rows of Z, their squared distances to X in the scaled unit), each block overwritten by the next."""
        return tiles.tiles(self.points.X, self.points.Z, rows)

    def mean_gradient(self, alpha: torch.Tensor, weights: torch.Tensor | None = None, rows: int = _ROWS):
        """mean_i grad f_c(Z[i]), weighted where there are weights (m,), float64 (K, d)."""
        at = self.points
        kernel, scaled, amplitude = in_range(at.kernel, at.X, alpha, at.unit, at.Z)
        if not kernel.radial:
            with self.products():
                return amplitude.restore(pair_mean_gradient(kernel, at.X, scaled, at.Z, rows, weights))

        def blocks():
            for row, block in self.tiles(rows):
                W = kernel.weight_(block)
                yield row, W if weights is None else W.mul_(weights[row, None])

        total = len(at.Z) if weights is None else weights.sum(dtype=torch.float64)
        with self.products():
            mean = torch_agop.mean_gradient(blocks(), scaled, at.X, at.Z, dominant_offset(at.X), total)
        return amplitude.restore(mean)


_FEW, _SAMPLE = 2048, 512  # points whose products are all looked at, and rows of more that stand for all


@dataclasses.dataclass(frozen=True)
class PointsProduct:
    """The matrix k(X, X) as a solver sees it, made of float64 points block by block at every product.

    Attributes:
        at: the scaled points.
        rows: of a block.
        backend: that makes the products.
    """

    at: Points
    rows: int
    backend: backends.Serving

    def __len__(self) -> int:
        return len(self.at.X)

    def matmul(self, V: torch.Tensor) -> torch.Tensor:
        """The product k(X, X) V, made from the points."""
        return self.backend.product(self.at, V, self.rows)

    def columns(self, index: torch.Tensor) -> torch.Tensor:
        """The columns k(X, X[index])."""
        return matrix.kernel_matrix(self.at.kernel, self.at.X, self.at.X[index], None, self.rows)

    def diagonal(self) -> torch.Tensor:
        """k(x, x) of each point (n,): 1 for every radial kernel."""
        return self.at.X.new_ones(len(self))

    def sampled(self, V: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, those rows of k(X, X) V): all rows of few, a sample of many."""
        (kernel, X, _, _), n = self.at, len(self)
        if n <= _FEW:
            return torch.arange(n, device=X.device), matrix.kernel_matmul(kernel, X, X, V, self.rows)
        index = torch.arange(_SAMPLE, device=X.device) * n // _SAMPLE
        return index, matrix.kernel_matmul(kernel, X[index], X, V, self.rows)


def product_of_points(kernel: Kernel, X: torch.Tensor, columns: int) -> PointsProduct | PairProduct:
    """k(X, X) of float64 points that have been scaled, for products with so many columns."""
    if not isinstance(kernel, Profile):
        return PairProduct(kernel, X, _ROWS)
    plan = matrix.plan_kernel_matmul(X, X, X.new_zeros(1).expand(len(X), columns), "")
    chosen, _ = backends.choose("auto", backends.Request("kernel_matmul", kernel, X))
    return PointsProduct(Points(kernel, X, X), plan.block, chosen)


def _in_float64(at: Points, alpha, task: AgopTask, weights) -> torch.Tensor | None:
    """The centred AGOP of float32 points by float64 weights; None, and a warning, where these do not fit."""
    M = wide.agop_in_float64(at, alpha, task, weights)
    if M is None:
        warn(
            "agop: the gradients nearly agree, and what centring leaves of them is lost in float32; float64 weights do "
            "not fit into memory_limit: raise it, or pass float64 tensors"
        )
    else:
        log.info("agop: centred gradients that nearly agree; computing in float64 by the torch backend")
    return M


def in_dtype(M: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A float64 AGOP in a dtype, which must hold it."""
    M = M.to(dtype)
    if not checks.finite(M):
        raise ValueError(f"alpha is so large that the AGOP leaves {dtype}; divide alpha by a constant")
    return M


def scale_weights(sample_weight, Z, reduction: str) -> tuple[torch.Tensor | None, float | torch.Tensor, int]:
    """(weights in a unit of 2^e, what to divide M by, the e of 2^e to multiply M by) of checked sample weights.

    In that unit the largest weight is between 1/2 and 1, so that no square root or sum leaves the dtype.
    """
    if sample_weight is None:
        return None, float(len(Z)) if reduction == "mean" else 1.0, 0
    if not checks.readable(sample_weight):  # in a CUDA graph's capture no value can be looked at
        return sample_weight.detach(), sample_weight.detach().sum() if reduction == "mean" else 1.0, 0
    largest = float(sample_weight.max()) if len(sample_weight) else 0.0
    exponent = math.frexp(largest)[1]
    weights = scaled_(sample_weight.detach().clone(), -exponent)
    if reduction == "mean":
        return weights, float(weights.sum(dtype=torch.float64)), 0
    return weights, 1.0, exponent
