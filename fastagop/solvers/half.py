"""Direct solves with half of a matrix stored: float64 with a float32 factor beside it, or one factor alone.

* ``refined``: K in float64 and its factor in float32, 6 n^2 bytes. The factor preconditions conjugate gradients, whose
  steps read K once for all outputs; where they would take longer than a float64 factor, that takes over, in K's place.
* ``in_place``: a float64 factor, 4 n^2 bytes. K is made again where it is asked for.
* ``from_points``: a float32 factor, 2 n^2 bytes, and products with K made of the points.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from fastagop.kernels import calibration
from fastagop.kernels.gemm import PanelProducts
from fastagop.kernels.memory.free import host_bytes
from fastagop.kernels.plan import Plan, format_bytes
from fastagop.kernels.torch_backend.distance import near_chunk, tile_bytes
from fastagop.kernels.torch_backend.panels import MixedPanels
from fastagop.kernels.torch_backend.tiles import BLOCKS_ALIVE
from fastagop.solvers import cg, direct, pinned
from fastagop.solvers.direct import LinearSystem
from fastagop.solvers.factor_products import may_round, mixed, products_of
from fastagop.solvers.found import Found, measure_all
from fastagop.solvers.limits import bound, times
from fastagop.solvers.options import CholeskyCG  # noqa: F401 (pickles of earlier versions look for it here)
from fastagop.solvers.problem import Problem
from fastagop.solvers.symmetric_blocks import FILL, SymmetricBlocks, default_rows, half_bytes, shapes_of

log = logging.getLogger("fastagop")

_GOOD = 1e-9  # residual with which a refined solution is taken though its steps ended before the tolerance
_LEAST_STEPS = 12  # of refinement before a float64 factor takes over; more where they take half of its time at most
_LIKELY_STEPS = 4  # at which the time of a refined solve is estimated
_READ = {"cpu": 6e9, "cuda": 1e12}  # bytes of a matrix a second that a product with a few vectors gets through
# Block rows that a factorisation holds beside the matrix: copies of a row and of a panel's factor; on a device to which
# blocks are streamed also the panel's row, the one that is worked on, and the next (``Staging``). The two copies end a
# block before the row does, which leaves room for the tiles by which blocks come and go.
_BESIDE, _STREAMED = 2, 5
_SHARE = 0.9  # of the host's free memory that may be pinned
_POINTS_ROWS = 128  # of a block of k(X, X) made of the points


@dataclass(frozen=True)
class HalfMatrix:
    """Half of k(X, X) as a direct solve sees it; ``fill`` writes it again after a factorisation, by ``products``."""

    blocks: SymmetricBlocks
    fill: Callable[[SymmetricBlocks], SymmetricBlocks]
    products: PanelProducts
    K: None = None

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the factorisation."""
        return self.blocks.dtype

    def largest_row_sum(self) -> float:
        """The largest sum of a row of K."""
        return self.blocks.largest_row_sum()

    def factor(self, diagonal: float | torch.Tensor) -> int:
        """Factor K with a diagonal; 0, or which pivot failed."""
        return self.blocks.cholesky_(diagonal, self.products)

    def restore(self) -> None:
        """Fill the blocks with K again, which the factor has overwritten."""
        self.fill(self.blocks)

    def solve(self, B: torch.Tensor) -> torch.Tensor:
        """The solution of L L^T X = B by the factor L."""
        return self.blocks.solve(B)


# ---- what each takes


def refined_bytes(problem: Problem) -> int:
    """The most bytes that ``refined`` takes at once."""
    n = len(problem.X)
    rows = default_rows(n, problem.X.device)
    wide, narrow = (_stored(problem, dtype) for dtype in (torch.float64, torch.float32))
    streamed = 8 * (_beside(problem) - _BESIDE) * rows * n  # of the products' float64 rows
    factored = 4 * _beside(problem) * rows * n + (MixedPanels.bytes_of(n, rows) if may_round(problem) else 0)
    return wide + max(_fill_bytes(problem), narrow + _vectors(problem) + max(factored, streamed))


def in_place_bytes(problem: Problem) -> int:
    """The most bytes that ``in_place`` takes at once."""
    n = len(problem.X)
    rows = default_rows(n, problem.X.device)
    beside = max(_fill_bytes(problem), 8 * _beside(problem) * rows * n, _points_bytes(problem))
    return _stored(problem, torch.float64) + beside + _vectors(problem)


def from_points_bytes(problem: Problem) -> int:
    """The most bytes that ``from_points`` takes at once."""
    n = len(problem.X)
    rows = default_rows(n, problem.X.device)
    beside = max(_fill_bytes(problem) + 8 * FILL * n, 4 * _beside(problem) * rows * n, _points_bytes(problem))
    return _stored(problem, torch.float32) + beside + _vectors(problem)


def _stored(problem: Problem, dtype: torch.dtype) -> int:
    """Bytes of half a matrix in the device's memory: those in a file are the system's to keep or to drop."""
    n = len(problem.X)
    stored = half_bytes(n, dtype, default_rows(n, problem.X.device)) if problem.half.place == "device" else 0
    return stored // problem.ranks


def _pinned_bytes(problem: Problem, dtypes: tuple[torch.dtype, ...]) -> int:
    """Bytes of the host's pinned memory that halves of those dtypes take beside each other."""
    if problem.half.place != "host":
        return 0
    shapes = shapes_of(len(problem.X), default_rows(len(problem.X), problem.X.device))
    return sum(pinned.bytes_of(shapes, dtype) for dtype in dtypes)


def _beside(problem: Problem) -> int:
    """How many block rows a factorisation holds beside the stored ones."""
    return _STREAMED if problem.half.place != "device" and problem.X.device.type == "cuda" else _BESIDE


def _fill_bytes(problem: Problem) -> int:
    n, d = problem.X.shape
    return 8 * n * d + tile_bytes(FILL, n, n, d, 8, near_chunk(problem.X.device))


def _points_bytes(problem: Problem) -> int:
    n, d = problem.X.shape
    return 8 * n * d + 8 * BLOCKS_ALIVE * _POINTS_ROWS * n


def _vectors(problem: Problem) -> int:
    return 8 * 10 * len(problem.X) * problem.outputs


def refined_seconds(problem: Problem) -> float:
    """Estimated time of ``refined`` where it needs few steps."""
    factor = _factor_seconds(problem, products_of(problem).word)
    return _fill_seconds(problem) + factor + _LIKELY_STEPS * _step_seconds(problem)


def in_place_seconds(problem: Problem) -> float:
    """Estimated time of ``in_place``."""
    return _fill_seconds(problem) + _factor_seconds(problem, "float64")


def from_points_seconds(problem: Problem) -> float:
    """Estimated time of ``from_points``."""
    fill = _fill_seconds(problem)
    return fill + _factor_seconds(problem, products_of(problem).word) + (_LIKELY_STEPS + 1) * fill


def _fill_seconds(problem: Problem) -> float:
    n, d = problem.X.shape
    share = 1.0 / problem.ranks
    return calibration.seconds(float(n) * n * d * share, 0.5 * n * n * share, problem.X.device, "gradient", "float64")


def _factor_seconds(problem: Problem, products: str) -> float:
    """Estimated time of a factor. A GPU multiplies large blocks of a float32 factor by an inverse besides."""
    n, device = len(problem.X), problem.X.device
    inverted = default_rows(n, device) * n**2 if device.type == "cuda" and products != "float64" else 0
    return calibration.seconds((n**3 / 3.0 + inverted) / problem.ranks, 0.0, device, "gradient", products)


def _step_seconds(problem: Problem) -> float:
    """Estimated time of a step of refinement: K is read once, the factor twice."""
    n, kind = len(problem.X), "cuda" if problem.X.device.type == "cuda" else "cpu"
    return 8.0 * n * n / _READ[kind] / problem.ranks


# ---- what each does


def plan(problem: Problem, method: str, why: str, form: Form, peak: int) -> Plan:
    """The plan of one of the three forms."""
    n, d = problem.X.shape
    work = float(n) * n * d + n**3 / 3.0 + 8.0 * n * n * problem.outputs
    rows = default_rows(n, problem.X.device)
    note = MixedPanels.note if form.keeps and may_round(problem) else products_of(problem).note
    precision = form.precision.replace("float32 factor", f"float32 factor{note}")
    backend = problem.operator.backend.name
    return Plan("solve", backend, method, why, precision=precision, flops=work, peak_bytes=peak, block=rows)


def refined(problem: Problem, plan: Plan, Y: torch.Tensor, ridge, out: torch.dtype) -> Found:
    """Solve with K in float64, its factor in float32, and conjugate gradients; by ``in_place`` where that is no good.

    Arguments as of ``cg.solve``.
    """
    fill = filler_of(problem.operator)
    K = fill(_blocks(problem, torch.float64))
    factor = K.to(torch.float32)
    products = mixed(factor, 1.0 + ridge) if may_round(problem) else products_of(problem)
    found = _refined_by(products, problem, K, factor, Y, ridge, out)
    if isinstance(found, str) and isinstance(products, MixedPanels) and products.has_rounded:
        log.info("solve: %s; its products were partly bfloat16's, and float32's take over", found)
        factor.drop()
        factor = K.to(torch.float32)
        found = _refined_by(products_of(problem), problem, K, factor, Y, ridge, out)
    if isinstance(found, Found):
        return found
    log.info("solve: %s; a float64 factor takes over, in place", found)
    factor.drop()
    return replace(_in_place(problem, K, fill, Y, ridge, out), method="cholesky", fallback=found)


def _refined_by(products: PanelProducts, problem: Problem, K, factor, Y: torch.Tensor, ridge, out) -> Found | str:
    """What is found by a float32 factor that is made by these products, in a copy of K; or why it is no good."""
    if failed := factor.cholesky_(1.0 + ridge, products):
        return f"pivot {failed} of the float32 factor is not positive"
    tolerance = problem.half.tolerance
    options = cg.ConjugateGradients(tolerance=tolerance, max_iterations=_most_steps(problem))

    def matmul(V: torch.Tensor) -> torch.Tensor:
        return K.matmul(V).add_(times(ridge, V))

    result = cg.conjugate_gradients(matmul, Y, functools.partial(_by_factor, factor), options, bound(Y, out))
    if result.singular or (result.stopped and result.residual > max(_GOOD, tolerance)):
        return f"{result.iterations} steps on a float32 factor left {result.residual:.0e}: {result.stopped}"
    return Found(
        alpha=result.alpha,
        jitter=0.0,
        iterations=result.iterations,
        rank=len(K),
        dtype=torch.float32,
        measure=measure_all(matmul),
        measured=result.measured,
        K=K if problem.shared is None else None,
        tolerance=tolerance,
    )


def _most_steps(problem: Problem) -> int:
    return max(_LEAST_STEPS, int(0.5 * _factor_seconds(problem, "float64") / _step_seconds(problem)))


def _by_factor(factor: SymmetricBlocks, R: torch.Tensor) -> torch.Tensor:
    return factor.solve(R.to(factor.dtype)).double()


def in_place(problem: Problem, plan: Plan, Y: torch.Tensor, ridge, out: torch.dtype) -> Found:
    """Solve with a float64 factor in the only matrix there is; arguments as of ``refined``."""
    fill = filler_of(problem.operator)
    K = fill(_blocks(problem, torch.float64))
    return _in_place(problem, K, fill, Y, ridge, out)


def _in_place(problem: Problem, K: SymmetricBlocks, fill, Y: torch.Tensor, ridge, out: torch.dtype) -> Found:
    system = _system(problem, HalfMatrix(K, fill, products_of(problem)), ridge, out)
    found = direct.cholesky(system, Y, least=problem.least_jitter)
    assert found is not None
    return found


def from_points(problem: Problem, plan: Plan, Y: torch.Tensor, ridge, out: torch.dtype) -> Found:
    """Solve with a float32 factor and products made of the points; arguments as of ``refined``."""
    fill = filler_of(problem.operator)
    blocks = fill(_blocks(problem, torch.float32))
    found = direct.cholesky(_system(problem, HalfMatrix(blocks, fill, products_of(problem)), ridge, out), Y)
    assert found is not None
    return found


def _blocks(problem: Problem, dtype: torch.dtype) -> SymmetricBlocks:
    if problem.shared is not None:
        return problem.shared.blocks(len(problem.X), dtype)
    return SymmetricBlocks(len(problem.X), dtype, problem.X.device, place=problem.half.place)


def _system(problem: Problem, matrix: HalfMatrix, ridge, out: torch.dtype) -> LinearSystem:
    """The system whose products are made of the points, block by block."""
    points = functools.cache(functools.partial(problem.operator.float64_product, _POINTS_ROWS))

    def matmul(V: torch.Tensor) -> torch.Tensor:
        return points().matmul(V).add_(times(ridge, V))

    def sampled(V: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return points().sampled(V)

    return LinearSystem(
        matrix=matrix,
        ridge=ridge,
        matmul=matmul,
        from_points=matmul,
        check=sampled,
        steps=direct.STEPS["highest"],
        out=out,
    )


def filler_of(operator) -> Callable[[SymmetricBlocks], SymmetricBlocks]:
    """What writes k(X, X) of a ``KernelOperator`` into blocks; float32 ones are rounded from float64 values."""
    kernels = operator.backend.factor_kernels(torch.float64, operator.precision)

    def fill(blocks: SymmetricBlocks) -> SymmetricBlocks:
        rows = kernels.rows(operator.points.kernel, operator.points.X)

        def rounded(out: torch.Tensor, start: int) -> torch.Tensor:
            return out.copy_(rows(out.new_empty(out.shape, dtype=torch.float64), start))

        return blocks.fill_(rows if blocks.dtype == torch.float64 else rounded)

    return fill


# ---- the ways


class Form(NamedTuple):
    """A way to solve with half of a matrix.

    Attributes:
        stores: what lies in memory, in words.
        dtypes: of the halves that lie there beside each other.
        memory: problem -> most bytes.
        seconds: problem -> estimated time.
        precision: what it says of its precision.
        run: (problem, plan, targets, ridges, dtype of alpha) -> what was found.
        keeps: whether k(X, X) is left in float64 when it has run.
    """

    stores: str
    dtypes: tuple[torch.dtype, ...]
    memory: Callable[[Problem], int]
    seconds: Callable[[Problem], float]
    precision: str
    run: Callable[..., Found]
    keeps: bool = False

    def fits(self, problem: Problem) -> bool:
        """Whether the device and the host have the memory that the form takes."""
        needed = _pinned_bytes(problem, self.dtypes)
        return self.memory(problem) <= problem.room and needed <= _of_host(needed, problem.X.device)

    def check_host(self, problem: Problem) -> None:
        """Raise MemoryError where the host lacks the pinned memory that the form takes."""
        needed = _pinned_bytes(problem, self.dtypes)
        if needed > (free := _of_host(needed, problem.X.device)):
            raise MemoryError(
                f"place='host' needs {format_bytes(needed)} of pinned memory for n = {len(problem.X)}, but "
                f"{format_bytes(free)} of the host's may be used; give a folder as place, or fewer points"
            )


def _of_host(needed: int, device: torch.device) -> int:
    """Bytes of the host's memory that may be pinned.

    PyTorch keeps what earlier solves have pinned. Pinning takes time, so that PyTorch returns what it keeps only where
    that can make enough of too little.
    """
    free = _SHARE * host_bytes()
    if free < needed <= free + pinned.held_bytes():
        pinned.give_back(device)
        free = _SHARE * host_bytes()
    return int(free)


REFINED = Form(
    stores="half of a float64 matrix and of its float32 factor",
    dtypes=(torch.float64, torch.float32),
    memory=refined_bytes,
    seconds=refined_seconds,
    precision="half of k(X, X) in float64, a float32 factor, float64 conjugate gradients on it; a float64 factor in "
    "its place where these take too long",
    run=refined,
    keeps=True,
)
IN_PLACE = Form(
    stores="half of a float64 matrix",
    dtypes=(torch.float64,),
    memory=in_place_bytes,
    seconds=in_place_seconds,
    precision="float64 factorisation of half a matrix, in place",
    run=in_place,
)
FROM_POINTS = Form(
    stores="half of a float32 factor",
    dtypes=(torch.float32,),
    memory=from_points_bytes,
    seconds=from_points_seconds,
    precision="float32 factorisation of half a matrix, float64 conjugate gradients on it with k(X, X) from the points",
    run=from_points,
)
