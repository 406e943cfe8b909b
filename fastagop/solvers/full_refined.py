"""Direct solve of some thousand float32 points on the CPU: k(X, X) in float64 and a float32 factor, both in full.

The factor preconditions conjugate gradients, whose steps read k(X, X) once for all outputs. A float64 factor takes
twice the time of a float32 one, which is most of a solve's; the steps take a tenth of it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch

from fastagop.kernels import calibration
from fastagop.kernels.gemm import rows_of, times_few
from fastagop.kernels.memory.matrices import empty_matrix
from fastagop.kernels.plan import Plan
from fastagop.kernels.profile import Profile
from fastagop.kernels.torch_backend.distance import (
    FEW,
    NEAR_OF_ROUNDED,
    around_mean,
    factors,
    near_again_,
    squared_distances,
    squared_norms,
)
from fastagop.solvers import cg, direct, float64_small
from fastagop.solvers.found import Found, measure_all
from fastagop.solvers.limits import bound, times
from fastagop.solvers.problem import Problem
from fastagop.solvers.single_factor import factor_

log = logging.getLogger("fastagop")

TOLERANCE = 1e-9  # of the residual of every output
STEPS = 12  # after which a float64 factor is the faster way
GAVE_WAY = f"a float32 factor does not lead to {TOLERANCE:.0e} in {STEPS} steps"
FLOAT64_ROWS = float64_small.MAX_POINTS  # up to which a float64 factor is the faster way
_ITEM = 20  # bytes an item: k(X, X), a float32 copy that becomes its factor, weights, and a copy that a product makes
# Products with K in full take 0.4 to 0.6 of the time of those with half of it where a cache holds K (n = 700 to 4000,
# two cores of a Xeon with a large last level); elsewhere they read twice as much from memory.
_IN_CACHE = 2
_ROWS = 256  # of a block, whose distances, values and weights are made while they are in cache


@dataclass(frozen=True)
class Matrices:
    """k(X, X) of n points in float64 and in float32 and, where asked for, the gradient weights in float32.

    Attributes:
        K: (n, n), on and above the diagonal, and of the blocks on the diagonal all; see ``full``.
        A: K in float32, on and above the diagonal; ``solve`` overwrites it.
        W: (n, n), or None.
        whole: whether K has its lower triangle as well.
    """

    K: torch.Tensor
    A: torch.Tensor
    W: torch.Tensor | None
    whole: bool

    @classmethod
    def of(cls, kernel: Profile, x: torch.Tensor, weights: bool) -> Matrices:
        """Those of points x (n, d) in float64, which were rounded to float32."""
        n, of_x = len(x), squared_norms(x)
        pair = factors(x, of_x) if x.shape[1] > FEW else None
        K, A = empty_matrix(n, n, x), empty_matrix(n, n, x, torch.float32)
        W = empty_matrix(n, n, x, torch.float32) if weights else None
        whole = _IN_CACHE * K.nbytes <= calibration.cache_bytes()
        for start in range(0, n, _ROWS):
            stop = min(n, start + _ROWS)
            sq, rounded = K[start:stop, start:], A[start:stop, start:]
            part = x[start:stop], x[start:], of_x[start:stop], of_x[start:]
            if pair is None:
                squared_distances(*part, sq, 0)
            else:
                torch.mm(pair[0][start:stop], pair[1][start:].T, out=sq)
                near_again_(sq, *part, 0, NEAR_OF_ROUNDED)
            square = sq[:, : stop - start]
            square.copy_(torch.add(square, square.T).mul_(0.5))  # symmetric to the bit, as all that is made of it
            if W is not None:
                W[start:stop, start:] = sq
            rounded.copy_(kernel.value_(sq))
            if whole:
                K[stop:, start:stop] = sq[:, stop - start :].T
            if W is not None:
                block = W[start:stop, start:]
                made = kernel.weight_beside_(block, rounded)
                if made is not block:
                    block.copy_(made)
                W[stop:, start:stop] = block[:, stop - start :].T
        return cls(K, A, W, whole)

    def full(self) -> torch.Tensor:
        """K after its lower triangle has been filled, in place."""
        for start in range(0, 0 if self.whole else len(self.K), _ROWS):
            rows, below = slice(start, start + _ROWS), slice(start + _ROWS, None)
            self.K[below, rows] = self.K[rows, below].T
        return self.K

    def matmul(self, V: torch.Tensor) -> torch.Tensor:
        """K V; without the lower triangle every item of the upper one is read once for all columns of V.

        V's columns lie as rows then: products with few of them take half to three quarters of the time.
        """
        if self.whole:
            return self.K @ V
        R = rows_of(V)
        out = torch.zeros_like(R)
        for start in range(0, len(self.K), _ROWS):
            rows, stop = slice(start, start + _ROWS), start + _ROWS
            out[:, rows] += times_few(self.K[rows, start:], R[:, start:])
            if stop < len(self.K):
                out[:, stop:].addmm_(R[:, rows], self.K[rows, stop:])
        return out[: V.shape[1]].T.contiguous()

    def solve(self, Y: torch.Tensor, ridge, out: torch.dtype) -> cg.CGResult | None:
        """(K + ridge I) alpha = Y to ``TOLERANCE``; None where a float32 factor does not lead there in ``STEPS`` steps.

        Once: A becomes the factor.

        Args:
            Y: (n, K), float64.
            ridge: a number, or one for each point (n,).
            out: the dtype that bounds coefficients.
        """
        self.A.diagonal().add_(ridge)
        if (factor := factor_(self.A)) is None:
            return None

        def matmul(V: torch.Tensor) -> torch.Tensor:
            return self.matmul(V).add_(times(ridge, V))

        def precondition(R: torch.Tensor) -> torch.Tensor:
            return factor.solve(R.float()).double()

        options = cg.ConjugateGradients(tolerance=TOLERANCE, max_iterations=STEPS)
        found = cg.conjugate_gradients(matmul, Y, precondition, options, bound(Y, out))
        return None if found.singular or found.stopped else found


def bytes_of(problem: Problem) -> int:
    """Most bytes that the solver takes."""
    (n, d), wide = problem.X.shape, problem.needed_bytes(torch.float64)
    return max(wide, _ITEM * n * n + 8 * n * (3 * d + 4 + 10 * problem.outputs))


def plan(problem: Problem, why: str) -> Plan:
    """The plan of a solve with k(X, X) and its float32 factor stored in full."""
    n, d = problem.X.shape
    work = float(n) * n * d + n**3 / 3.0 + 8.0 * n * n * problem.outputs
    precision = "k(X, X) in float64, a float32 factor, float64 conjugate gradients on it"
    name, rows = problem.operator.backend.name, min(n, _ROWS)
    peak = bytes_of(problem)
    return Plan("solve", name, "cholesky+cg", why, precision=precision, flops=work, peak_bytes=peak, block=rows)


def run(problem: Problem, plan: Plan, Y: torch.Tensor, ridge, out: torch.dtype) -> Found:
    """Solve with both matrices, or with a float64 factor where that is no good; arguments as of ``cg.solve``."""
    if (found := _found(problem, Y, ridge, out)) is not None:
        return found
    log.info("solve: %s; a float64 factor takes over", GAVE_WAY)
    wide = direct.cholesky(direct.system(problem.operator, ridge, plan, out, torch.float64), Y)
    assert wide is not None
    return replace(wide, method="cholesky", fallback=GAVE_WAY)


def _found(problem: Problem, Y: torch.Tensor, ridge, out: torch.dtype) -> Found | None:
    points = problem.operator.points
    matrices = Matrices.of(points.kernel, around_mean(points.X)[0], weights=False)
    if (result := matrices.solve(Y, ridge, out)) is None:
        return None

    def matmul(V: torch.Tensor) -> torch.Tensor:
        return matrices.matmul(V).add_(times(ridge, V))

    return Found(
        alpha=result.alpha,
        jitter=0.0,
        iterations=result.iterations,
        rank=len(points.X),
        dtype=torch.float32,
        measure=measure_all(matmul),
        measured=result.measured,
        K=matrices.full(),
        tolerance=TOLERANCE,
    )
