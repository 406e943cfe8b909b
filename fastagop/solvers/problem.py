"""A system as far as the choice of its solver goes: what every solver plans from."""

from __future__ import annotations

import bisect
import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastagop.kernels.kernel_operator import KernelOperator
from fastagop.kernels.pair_backend.backend import blocks_alive
from fastagop.kernels.plan import format_bytes
from fastagop.kernels.torch_backend.tiles import BLOCKS_ALIVE
from fastagop.solvers.options import CholeskyCG, ConjugateGradients

FULL_MATRIX_ROWS = 4096  # up to which one matrix stored in full is the fastest
HALF = CholeskyCG()  # how half of a matrix is stored where nobody asks for something else
WORKSPACE = 0.25  # of n^2 items: panels of the factorisation, blocks of the kernel matrix
# Float64 matrices (n, K) alive at once in a direct solve: targets, coefficients, residuals; after a float32
# factorisation those of its refinement.
_VECTORS = {torch.float32: 11, torch.float64: 8}


@dataclass(frozen=True)
class Advice:
    """What a caller's user can change where memory is short: the words of its error."""

    method: str = "method"
    limit: str = "raise memory_limit where memory is free"

    def direct(self) -> str:
        """The remedy where no n x n matrix fits."""
        return f"Use fewer points, {self.method}='cg', or {self.limit}"

    def iterative(self, stored: bool = False) -> str:
        """The remedy where not even the vectors of "cg" fit, or half of a matrix that it was told to store."""
        change = "store=False" if stored else "a smaller rank"
        asked = "store=False" if stored else "rank=..."
        return f"Use fewer points, {change} in {self.method}=fastagop.ConjugateGradients({asked}), or {self.limit}"


@dataclass(frozen=True)
class Shared:
    """Processes that hold half of a matrix together: how many, and (n, dtype) -> blocks that ask them."""

    size: int
    blocks: Callable[[int, torch.dtype], Any]


@dataclass(frozen=True)
class Problem:
    """A system (k(X, X) + ridge W^-1) alpha = Y as far as the choice of its solver goes.

    Attributes:
        operator: the kernel and the points, checked, with the backend that serves them.
        outputs: columns of Y.
        ridge: mu >= 0.
        room: bytes that a solver may take.
        options: how conjugate gradients iterate.
        float64_alpha: whether the coefficients are wanted in float64.
        advice: the words of remedies in errors of memory.
        half: where half of a matrix is stored, and how exactly its factor is refined.
        shared: the processes that share half of a matrix; None where this one works alone.
        gave_way: why no float32 factor is tried; "" where one may be.
        least_jitter: what a similar problem needed, so that a factor with less is expected to be in vain.
    """

    operator: KernelOperator
    outputs: int
    ridge: float
    room: int
    options: ConjugateGradients
    float64_alpha: bool
    advice: Advice
    half: CholeskyCG = HALF
    shared: Shared | None = None
    gave_way: str = ""
    least_jitter: float = 0.0

    @property
    def ranks(self) -> int:
        """How many processes share the matrix."""
        return self.shared.size if self.shared else 1

    @property
    def X(self) -> torch.Tensor:
        """The points (n, d) of the operator."""
        return self.operator.X

    @property
    def many_rows(self) -> bool:
        """Whether there are more points than one matrix stored in full is the fastest for."""
        return len(self.X) > FULL_MATRIX_ROWS

    @property
    def coarse(self) -> bool:
        """Products below float32's accuracy were asked for, so that a factor is a preconditioner anyway."""
        return self.operator.backend.factor_kernels(torch.float32, self.operator.precision).coarse

    @property
    def large(self) -> bool:
        """More points, on the CPU or over ranks, than are solved fastest by one matrix stored in full."""
        alone = self.X.device.type == "cpu" or self.shared is not None
        return self.many_rows and alone and not self.coarse

    @property
    def rated(self) -> bool:
        """Whether the device's rates decide between a float64 factor and a refined float32 one: as ``large``, on a GPU.

        On the CPU the refined one is always the faster.
        """
        alone = self.X.device.type == "cuda" and self.shared is None
        return self.many_rows and alone and not self.coarse and self.X.dtype == torch.float32

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether a Cholesky factorisation in a dtype fits into memory."""
        shared = self.shared is not None and self.large  # in full it is one process's alone
        return not shared and self.needed_bytes(dtype) <= self.room

    def needed_bytes(self, dtype: torch.dtype) -> int:
        """What a Cholesky factorisation in a dtype takes."""
        n, d = self.X.shape
        return needed_bytes(n, d, dtype, self.outputs)

    def of_first(self, rows: int) -> Problem:
        """The problem of so many of the points, for what it would take."""
        operator = copy.copy(self.operator)
        operator.X = operator.Z = self.X[:rows]
        return replace(self, operator=operator)

    def most_points(self, memory: Callable[[Problem], int]) -> int:
        """Of how many of the points a problem fits, by what it takes; 0 where not even one does."""
        numbers = range(1, len(self.X))
        return bisect.bisect_right(numbers, self.room, key=lambda rows: memory(self.of_first(rows)))

    def too_large(self, dtype: torch.dtype, memory: Callable[[Problem], int]) -> MemoryError:
        """The error of a solver with a matrix in a dtype that needs more than the room there is."""
        n = len(self.X)
        return MemoryError(
            f"solve with n = {n} needs {format_bytes(memory(self))} ({dtype} matrix of "
            f"{format_bytes(n * n * dtype.itemsize)} and its workspace), but {format_bytes(self.room)} may be used; "
            f"n up to about {self.most_points(memory)} fits. {self.advice.direct()}"
        )

    @property
    def blocks_alive(self) -> int:
        """Blocks (b, n) that exist at once while k(X, X) is made of the points, at most."""
        kernel = self.operator.kernel
        return BLOCKS_ALIVE if kernel.radial else blocks_alive(kernel)


def vectors_bytes(n: int, outputs: int, dtype: torch.dtype) -> int:
    """What a direct solve with a factor in a dtype takes for targets, coefficients and residuals at once."""
    return 8 * _VECTORS[dtype] * n * outputs


def needed_bytes(n: int, d: int, dtype: torch.dtype, outputs: int = 0) -> int:
    """What a Cholesky factorisation in a dtype takes: one matrix, its workspace, the points in float64.

    Where there are so many outputs that targets and coefficients take more than the workspace, these count instead:
    they are needed when the factor is there.
    """
    beside = max(int(WORKSPACE * n * n * dtype.itemsize), vectors_bytes(n, outputs, dtype))
    return n * n * dtype.itemsize + beside + n * d * 8
