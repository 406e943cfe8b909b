"""Triton backend: the launches behind kernel_matrix, kernel_matmul, gradients, agop and solve, float32.

The algorithms around the kernels (blocks, the estimate of cancellation, centring, float64 accumulation; the
factorisation) are those of ``torch_backend`` and of the solvers. Only the kernel matrix of a float64 factorisation is
made in float64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

from ..memory.matrices import WIDE, wide_rows
from ..pair_backend.blocks import checked
from ..plan import AgopTask, Plan
from ..profile import Kernel, Profile
from ..scaling import Points
from ..torch_backend import agop as torch_agop
from ..torch_backend.distance import NEAR, NEAR_OF_ROUNDED, dominant_offset, squared_norms
from ..torch_backend.gradients import Nearness, block_gradients, chunk_of, gradient_bytes
from .agop import _gradient_kernel, _gram_kernel
from .cholesky import _update_kernel
from .launch_config import GROUPS, PRODUCTS, Config, config
from .matmul import _matmul_kernel
from .matrix import _matrix_kernel
from .panels import _panel_kernel
from .profile import constants_of, device_profile
from .split import Operand, operand, padded

# Factors that are made on the fly, or change as columns are factored, are split inside the instruction.
INSIDE = {"fp16x3": "tf32x3", "bf16x3": "bf16x3", "tf32": "tf32"}
# A block of gradients splits W and alpha o X before their product where its rows b and the features of all outputs K d
# have b K d / (b + K d) at least this large: that moves 12 bytes an item of both, and by the rates of
# bench/predictions.py the product's loop, which then splits nothing, wins more from 650 (H200) to 935 (H100) on.
SPLIT_FIRST = 1024


def _rows(X: torch.Tensor) -> torch.Tensor:
    return X if X.stride(1) == 1 or X.shape[1] == 1 else X.contiguous()


def _current(X: torch.Tensor):
    """Launches go to the current device: make it X's."""
    return torch.cuda.device(X.device) if X.is_cuda else contextlib.nullcontext()


def _grid(config, m: int, n: int, outputs: int = 1) -> tuple[int]:
    return (-(-m // config.rows) * -(-n // config.columns) * outputs,)


def _tile(operation: str, config: Config) -> dict:
    """Tile, order of tiles and options of a launch."""
    tile = {"BM": config.rows, "BN": config.columns, "BK": config.inner}
    return tile | ({"GROUP": GROUPS[operation]} if operation in GROUPS else {}) | config.launch


def _padded(X: torch.Tensor) -> torch.Tensor:
    """X with rows a multiple of 16 items long and apart: a copy with zeros behind the ends, where they are not."""
    X, d = _rows(X), X.shape[1]
    if d % WIDE == 0 and X.stride(0) % WIDE == 0:
        return X
    return torch.nn.functional.pad(X, (0, -d % WIDE))


def _readable(W: torch.Tensor) -> int:
    """Columns of W that can be read: the next multiple of 16 where rows are that far apart, the last one included."""
    (rows, columns), ahead = W.shape, -W.shape[1] % WIDE
    items = W.untyped_storage().nbytes() // W.element_size() - W.storage_offset()
    fits = W.stride(0) % WIDE == 0 and (rows - 1) * W.stride(0) + columns + ahead <= items
    return columns + ahead if fits else columns


class DevicePoints:
    """Centers or evaluation points made ready once: rows, operand of the products, squared norms."""

    def __init__(self, X: torch.Tensor, prec: str):
        X = X.double() if prec == "fp64" else X
        self.rows = _rows(X) if prec == "fp16x3" else _padded(X)  # halves are padded themselves
        with _current(X):
            self.operand = operand(self.rows, prec == "fp16x3")
        self.norms = squared_norms(self.rows)
        self.prec = prec

    def __len__(self):
        return len(self.rows)

    def part(self, rows: slice) -> DevicePoints:
        """Some of the points."""
        part = object.__new__(DevicePoints)
        part.prec, o = self.prec, self.operand
        part.rows, part.norms = self.rows[rows], self.norms[rows]
        part.operand = Operand(o.high[rows], o.low[rows], o.scale[rows], o.split)
        return part


def products_of(kernel: Kernel, precision: str) -> str:
    """The products that a tile of a kernel takes: l1 distances take none, and their points are not split."""
    return "fp32" if kernel.measure == "l1" else PRODUCTS[precision]


def _pair(Z: DevicePoints, X: DevicePoints) -> tuple:
    z, x = Z.operand, X.operand
    return Z.rows, X.rows, z.high, z.low, x.high, x.low, z.scale, x.scale, Z.norms, X.norms


def _strides(Z: DevicePoints, X: DevicePoints) -> tuple:
    return Z.rows.stride(0), X.rows.stride(0), Z.operand.high.stride(0), X.operand.high.stride(0)


def fill(
    kernel: Kernel,
    Z: DevicePoints,
    X: DevicePoints,
    out: torch.Tensor,
    *,
    weight: bool,
    first: int | None,
    lower: bool = False,
    ridge: float = 0.0,
) -> torch.Tensor:
    """Kernel values or weights of (Z, X) into out; ``first``: the row of X that Z starts at, None for other points.

    Self-pairs get phi(0) + ridge = 1 + ridge, or weight 0. ``lower`` computes half and stores it twice.
    """
    c = config("matrix", X.prec, out.device)
    diagonal = out.new_full((1,), 0.0 if weight else 1.0 + ridge)
    near = NEAR[out.dtype] if out.dtype == torch.float32 else NEAR_OF_ROUNDED  # X is float32
    if out.numel():
        with _current(out):
            _matrix_kernel[_grid(c, len(Z), len(X))](
                *_pair(Z, X), out, len(Z), len(X), X.rows.shape[1], *_strides(Z, X), out.stride(0), near,
                constants_of(kernel, out), diagonal, first or 0, PROFILE=device_profile(kernel), WEIGHT=weight,
                OF=kernel.measure, SELF=first is not None, LOWER=lower, PREC=X.prec, **_tile("matrix", c),
            )  # fmt: skip
    return out


def kernel_matrix(at: Points, out, precision: str, ridge: float = 0.0) -> torch.Tensor:
    """k(X, Z), shape (n, m); + ridge I where Z is X."""
    kernel, X, Z, _ = at
    result = X.new_empty(len(X), len(Z)) if out is None else out
    target = result if result.stride(1) == 1 else torch.empty_like(result, memory_format=torch.contiguous_format)
    x, symmetric = DevicePoints(X, products_of(kernel, precision)), Z is X
    z = x if symmetric else DevicePoints(Z, x.prec)
    first = 0 if symmetric and kernel.radial else None
    fill(kernel, x, z, target, weight=False, first=first, lower=symmetric, ridge=ridge)
    if symmetric and not kernel.radial:
        target.diagonal().copy_(kernel.diagonal(X.double()) + ridge)
    if not kernel.radial:
        checked(target, "kernel values", target.dtype)
    return result if target is result else result.copy_(target)


def fill_symmetric(out: torch.Tensor, kernel: Profile, X) -> torch.Tensor:
    """k(X, X) of float32 points into out, to the accuracy of out's dtype."""
    x = DevicePoints(X, "fp64" if out.dtype == torch.float64 else "fp16x3")
    return fill(kernel, x, x, out, weight=False, first=0, lower=True)


def cholesky_update(precision: str):
    """The column-block update of ``fastagop.linalg.cholesky_lower_`` for a float32 matrix."""
    prec = INSIDE[PRODUCTS[precision]]

    def update(A: torch.Tensor, start: int, stop: int) -> None:
        c = config("update", prec, A.device)
        with _current(A):
            _update_kernel[_grid(c, len(A) - start, stop - start)](
                A, start, stop, len(A), A.stride(0), PREC=prec, **_tile("update", c)
            )

    return update


def rows_of_symmetric(kernel: Profile, X: torch.Tensor) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """(out, start) -> float64 out with rows start .. of k(X, X), up to their own last column."""
    x = DevicePoints(X, "fp64")

    def write(out: torch.Tensor, start: int) -> torch.Tensor:
        rows, columns = slice(start, start + len(out)), slice(0, out.shape[1])
        return fill(kernel, x.part(rows), x.part(columns), out, weight=False, first=start)

    return write


def split_rows(A: torch.Tensor) -> Operand:
    """The halves of A's rows, for several products."""
    A = _rows(A)
    with _current(A):
        return operand(A, True)


def subtract_product_(C: torch.Tensor, A: Operand, B: Operand) -> None:
    """C -= A B^T in place; C's rows are contiguous."""
    _panel(C, A, B, triangle=False)


def times_triangle_(A: torch.Tensor, T: Operand) -> None:
    """A <- A T^T in place, T lower triangular; A's rows are contiguous."""
    _panel(A, split_rows(A), T, triangle=True)


def _panel(out: torch.Tensor, A: Operand, B: Operand, *, triangle: bool) -> None:
    c, (m, d), n = config("panel", "fp16x3", out.device), A.high.shape, len(B.high)
    if out.numel():
        with _current(out):
            _panel_kernel[_grid(c, m, n)](
                A.high, A.low, B.high, B.low, A.scale, B.scale, out, m, n, d, A.high.stride(0), B.high.stride(0),
                out.stride(0), TRIANGLE=triangle, PREC="fp16x3", **_tile("panel", c),
            )  # fmt: skip


def kernel_matmul(at: Points, V, precision: str) -> torch.Tensor:
    """k(X, Z) V, shape (n, p): K lives in registers only."""
    kernel, X, Z, _ = at
    prec, symmetric, V = products_of(kernel, precision), Z is X, _rows(V)
    x = DevicePoints(X, prec)
    z = x if symmetric else DevicePoints(Z, prec)
    out, p = X.new_zeros(len(X), V.shape[1]), V.shape[1]
    c = config("matmul", prec, out.device)
    width = min(64, max(16, 1 << max(0, p - 1).bit_length()))
    if out.numel() and len(z):
        with _current(out):
            _matmul_kernel[(-(-len(x) // c.rows), -(-p // width))](
                *_pair(x, z), V, out, len(x), len(z), X.shape[1], p, *_strides(x, z), V.stride(0), out.stride(0),
                NEAR[torch.float32], constants_of(kernel, out), PROFILE=device_profile(kernel),
                OF=kernel.measure, SELF=symmetric and kernel.radial, PREC=prec,
                SECOND=INSIDE[PRODUCTS[precision]], BP=width, **_tile("matmul", c),
            )  # fmt: skip
    return out if kernel.radial else checked(out, "products", out.dtype)


def _blocks(kernel: Profile, x: DevicePoints, z: DevicePoints, symmetric: bool, rows: int):
    """(rows of Z, their weights) block by block."""
    buffer = wide_rows(min(rows, len(z)), len(x), x.rows)
    for start in range(0, len(z), rows):
        row = slice(start, min(len(z), start + rows))
        block = buffer[: row.stop - start]
        yield row, fill(kernel, z.part(row), x, block, weight=True, first=start if symmetric else None)


def _near_blocks(kernel: Profile, x: DevicePoints, z: DevicePoints, X, Z, shift, rows: int):
    """(rows of Z, their weights, their near pairs) block by block."""
    nearness = Nearness(X, Z, shift)
    for row, W in _blocks(kernel, x, z, Z is X, rows):
        yield row, W, nearness.among_weights(W, row, kernel)


def inner_kernels(X: torch.Tensor, precision: str) -> torch_agop.InnerKernels:
    """The device's steps of the two AGOP forms for these centers."""
    return _inner_kernels(DevicePoints(X, PRODUCTS[precision]))


def _inner_kernels(x: DevicePoints) -> torch_agop.InnerKernels:
    step = output_gradients(x, split_first=x.prec == "fp16x3")
    return torch_agop.InnerKernels(step, lambda W, alpha: _lower_s(W, alpha, x.prec), x.prec)


class _Shifted:
    """Centers less an offset that dominates them, made ready once for all blocks of a call."""

    def __init__(self, x: DevicePoints):
        self.x = x
        self.made: tuple | None = None

    def of(self, X: torch.Tensor, shift: torch.Tensor | None) -> DevicePoints:
        """The centers, X less ``shift`` where there is one."""
        if shift is None:
            return self.x
        if self.made is None or self.made[0] is not X or self.made[1] is not shift:
            self.made = X, shift, DevicePoints(X - shift, self.x.prec)
        return self.made[2]


class _Weighted:
    """The other factor of split weights, alpha_c o x by feature, (K d, n), as many outputs at once as memory has room.

    What column j of W is multiplied with is at most 1 in size, and a power of two of its coefficients and its point
    multiplies that column instead. A row's scale is then that of its largest term, whatever weighs little or much.
    """

    def __init__(self):
        self.of: tuple = ()

    def outputs(self, rows: int, X: torch.Tensor, shift: torch.Tensor | None, alpha: torch.Tensor) -> int:
        """Outputs whose halves fit into what a block's plan counts beside its other work; 0 where that does not pay."""
        (n, d), K = X.shape, alpha.shape[1]
        if not self._is_of(X, shift, alpha) and rows * K * d < SPLIT_FIRST * (rows + K * d):
            return 0
        # What near pairs took out of W, and their mask; W's halves; points by feature, once more while they are made.
        alive = 4 * (rows * (n + padded(n) + d + 2 * K + 2) + n * (2 * d + 2 * K + 4)) + rows * n
        room = gradient_bytes(rows, n, d, K, 4, chunk_of(X.device)) - alive
        return min(K, max(0, room) // (4 * d * (padded(n) + 1)))

    def _is_of(self, *of) -> bool:
        return bool(self.of) and all(a is b for a, b in zip(self.of, of, strict=True))

    def prepare(self, X: torch.Tensor, shift: torch.Tensor | None, alpha: torch.Tensor) -> None:
        """Make points, coefficients and the powers of two ready, once for all blocks of a call."""
        if self._is_of(X, shift, alpha):
            return
        self.of = X, shift, alpha
        self.points = (X if shift is None else X - shift).T.contiguous()
        sizes = alpha.abs().amax(1) * torch.maximum(self.points.amax(0), -self.points.amin(0))
        powers = torch.ldexp(torch.ones_like(sizes), torch.frexp(sizes.clamp_(2.0**-100, 2.0**100))[1])
        self.powers, self.factors = powers[None], (alpha.T / powers).neg_().contiguous()


def _add_products_(out: torch.Tensor, W: torch.Tensor, weighted: _Weighted, some: int) -> None:
    """out (b, K, d) += W (alpha_c o X), both factors split first; out's rows are contiguous."""
    with _current(out):
        left = operand(W, True, weighted.powers)
        for factors, part in zip(weighted.factors.split(some), out.split(some, 1), strict=True):
            subtract_product_(part.view(len(W), -1), left, operand(weighted.points, True, factors))


def output_gradients(x: DevicePoints, *, split_first: bool = False):
    """The row-block step of the gradient form, as ``gradients.output_gradients``; of W_ij x_j alone without along_z.

    split_first: large blocks of split products may split both factors before. The outputs of a row then share a scale,
    which an AGOP, their sum, does not see.
    """
    shifted, weighted = _Shifted(x), _Weighted()

    def gradients_of(W, alpha, X, Z, shift, out, along_z=True):
        W, Z = _rows(W), _rows(Z if shift is None else Z - shift)
        s = W @ alpha if along_z else W.new_zeros(len(W), alpha.shape[1])
        if split_first and (some := weighted.outputs(len(W), X, shift, alpha)):
            weighted.prepare(X, shift, alpha)
            torch.mul(s.neg_()[:, :, None], Z[:, None], out=out)
            _add_products_(out, W, weighted, some)
            return out
        o, At, (b, n), (K, d) = shifted.of(X, shift).operand, alpha.T.contiguous(), W.shape, out.shape[1:]
        c, wide = config("gradient", x.prec, out.device), _readable(W)
        with _current(out):
            _gradient_kernel[_grid(c, b, d, K)](
                W, At, s, o.high, o.low, o.scale, Z, out, b, n, d, K, wide, o.high.shape[1], W.stride(0),
                o.high.stride(0), Z.stride(0), out.stride(0), out.stride(1), WIDER=wide > n, PREC=x.prec,
                **_tile("gradient", c),
            )  # fmt: skip
        return out

    return gradients_of


def gradients(at: Points, alpha, rows: int, precision: str) -> torch.Tensor:
    """grad f_c(Z[i]), shape (m, K, d)."""
    kernel, X, Z, _ = at
    out = X.new_empty(len(Z), alpha.shape[1], X.shape[1])
    if not out.numel():
        return out
    x, shift = DevicePoints(X, PRODUCTS[precision]), dominant_offset(X)
    z, step = x if Z is X else DevicePoints(Z, x.prec), output_gradients(x)
    for row, W, near in _near_blocks(kernel, x, z, X, Z, shift, rows):
        block_gradients(W, near, alpha, X, Z[row], shift, out[row], step)
    return out


def _lower_s(W: torch.Tensor, alpha: torch.Tensor, prec: str):
    """The block rows of the gram form's S from stored weights."""
    alpha = alpha.contiguous()
    with _current(W):
        pair = operand(W, prec == "fp16x3")

    def lower(s, weight, start: int, stop: int) -> torch.Tensor:
        out = wide_rows(stop - start, stop, W)
        c = config("gram", prec, W.device)
        with _current(W):
            _gram_kernel[_grid(c, stop - start, stop)](
                W, pair.high, pair.low, pair.scale, alpha, s, weight, out, start, stop, len(W), alpha.shape[1],
                W.stride(0), pair.high.stride(0), out.stride(0), PREC=prec, **_tile("gram", c),
            )  # fmt: skip
        return out

    return lower


def agop(at: Points, alpha, task: AgopTask, plan: Plan, precision: str, row_weights=None) -> torch.Tensor:
    """Sum_i w_i sum_c g_ic g_ic^T, float64 (d, d); w = row_weights, default 1."""
    kernel, X, Z, _ = at
    if len(Z) == 0 or alpha.shape[1] == 0 or (task.center and len(Z) == 1):
        return X.new_zeros(X.shape[1], X.shape[1], dtype=torch.float64)
    symmetric, x = Z is X, DevicePoints(X, PRODUCTS[precision])
    z, inner = x if symmetric else DevicePoints(Z, x.prec), _inner_kernels(x)
    if plan.method == "gradient":
        shift, roots = dominant_offset(X), torch_agop.roots_of(row_weights)
        blocks = _near_blocks(kernel, x, z, X, Z, shift, plan.block)
        return torch_agop.gradient_form(blocks, alpha, X, Z, shift, task.center, inner.gradients, roots)
    W = wide_rows(len(Z), len(X), X)
    fill(kernel, z, x, W, weight=True, first=0 if symmetric else None, lower=symmetric)
    how = {"symmetric": symmetric, "rows": plan.block, "kernels": inner, "row_weights": row_weights}
    return torch_agop.agop_from_weights_(W, kernel, X, alpha, Z, task, **how)
