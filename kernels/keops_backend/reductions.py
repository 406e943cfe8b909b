"""KeOps backend: kernel_matmul, gradients and agop as map-reduce formulas; no block of the kernel matrix exists.

KeOps compiles a formula per kernel, feature and output count and dtype when it first meets it, and keeps the result
in its own folder (``pykeops.get_build_folder()``, or KEOPS_CACHE_FOLDER).
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import re
from collections.abc import Callable

import torch

from ..errors import BackendUnavailable
from ..gemm import add_squares_, symmetrise_
from ..plan import RAISE_LIMIT, Plan, block_rows, budget
from ..precision import dtype_name
from ..profile import Formulas, Kernel, constants, text
from ..scaling import Points

log = logging.getLogger("fastagop")

_OUTPUTS = 1024  # numbers per point that one reduction sums at most: more spill, each further one measures r again
_BLOCK = 2**26  # bytes of gradients alive at once in agop
# On CUDA a thread holds a point's features and columns in shared memory, of which a block has so many bytes: KeOps 2.3
# divides by zero where these do not fit. Of a formula that goes by one of these alone it holds 64 features at a time.
_SHARED = 49152
_IN_PARTS = ("SqDist(x, z)", "Sum(Abs(x - z))", "(x | z)")


@functools.cache
def pykeops_module():
    """Pykeops, imported without what it prints: a missing CUDA matters, and is said, where CUDA is asked for."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            import pykeops.torch
    except Exception as error:  # it probes compilers, drivers and folders on import
        raise BackendUnavailable(
            f"backend 'keops' cannot serve this call: pykeops fails on import with {error!r}; "
            "use backend='torch' or 'auto' to compute without it"
        ) from error
    log.debug("pykeops: %s", printed.getvalue().strip())
    return pykeops


class _Announcer(io.StringIO):
    """What KeOps prints while it loads a formula; the first sign of compilation is said aloud."""

    def __init__(self, title: str):
        super().__init__()
        self.what = title

    def write(self, text: str) -> int:
        if not self.tell() and ("Generating" in text or "Compiling" in text):
            log.warning("KeOps compiles %s: about 10 s, once; later runs find it in KeOps' folder", self.what)
        return super().write(text)


@functools.cache
def _reduction(
    title: str, formula: str, pair: str, d: int, width: int, parameters: int, dtype: torch.dtype, device: str
):
    """The compiled callable (rows, columns, b, c) -> sums of a formula over the columns, one per row.

    ``pair`` names rows and columns, (., d) both, as the formula does; b (columns, width); c (parameters,).
    """
    title = f"{title}, {d} features, {width} columns, {dtype_name(dtype)}, {device}"
    aliases = [f"{pair[0]}=Vi(0,{d})", f"{pair[1]}=Vj(1,{d})", f"b=Vj(2,{width})", f"c=Pm(3,{parameters})"]
    tiny = [torch.ones(shape, dtype=dtype, device=device) for shape in ((1, d), (1, d), (1, width), (parameters,))]
    mode = "GPU_1D" if device.startswith("cuda") else "CPU"
    pykeops, printed = pykeops_module(), _Announcer(title)
    try:
        with contextlib.redirect_stdout(printed):
            made = pykeops.torch.Genred(formula, aliases, reduction_op="Sum", axis=1)
            reduce = functools.partial(_ordered, functools.partial(made, backend=mode))
            reduce(*tiny)
    except Exception as error:
        raise BackendUnavailable(
            f"backend 'keops' cannot serve this call: compiling {title} failed with {error!r}. It needs a C++ "
            "compiler and Python's headers (apt install g++ python3-dev); use backend='torch' or 'auto' to compute "
            f"without it. KeOps printed: {printed.getvalue()!r}"
        ) from error
    return reduce


def _ordered(reduce: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """A reduction after the work that makes its tensors, on their device.

    KeOps launches on CUDA's default stream, whatever the current one is, and leaves the context of its device on top.
    It waits for its own result.
    """
    if not tensors[0].is_cuda:
        return reduce(*tensors)
    with torch.cuda.device(tensors[0].device):
        torch.cuda.current_stream().synchronize()
        return reduce(*tensors)


def _formulas(kernel: Kernel) -> Formulas:
    found = text(kernel, "keops")
    assert found is not None  # the backend has refused other kernels
    return found


def _constants(kernel: Kernel, like: torch.Tensor) -> torch.Tensor:
    """Numbers that the formulas know as c, a tensor like ``like``."""
    return like.new_tensor([*constants(kernel, like.dtype).values(), *_formulas(kernel).numbers])


def _name(kernel: Kernel) -> str:
    return type(kernel).__name__


def _chunks(B: torch.Tensor, widest: int) -> list[torch.Tensor]:
    """Columns of B in chunks of one width, so that one compiled formula serves all; zeros fill the last."""
    parts = -(-B.shape[1] // max(1, widest))
    width = -(-B.shape[1] // parts)
    wide = torch.nn.functional.pad(B, (0, parts * width - B.shape[1]))
    return [chunk.contiguous() for chunk in wide.split(width, dim=1)]


def _most_columns(formula: str, d: int, dtype: torch.dtype, device: torch.device) -> int:
    """Columns that one reduction of a formula may take beside d features; none where these are too many."""
    if device.type != "cuda" or any(_goes_by(part, formula) for part in _IN_PARTS):
        return _OUTPUTS
    return max(0, min(_OUTPUTS, _SHARED // dtype.itemsize - d))


def _goes_by(part: str, formula: str) -> bool:
    return formula.count(part) == 1 and not re.search(r"\b[xz]\b", formula.replace(part, ""))


def too_wide(operation: str, kernel: Kernel, d: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why KeOps cannot hold points of d features; None where it can."""
    found = _formulas(kernel)
    formula = found.slope if operation in ("gradients", "agop") else found.value
    if _most_columns(formula, d, dtype, device):
        return None
    return f"on CUDA it holds a point in 48 KiB of shared memory, and {d} features in {dtype_name(dtype)} take more"


def plan_kernel_matmul(X, Z, V, why: str) -> Plan:
    """The plan of kernel_matmul."""
    n, m, d, p = len(X), len(Z), X.shape[1], V.shape[1]
    peak = (2 * n * p + m * p) * X.element_size()
    return Plan("kernel_matmul", "keops", "one pass, K never stored", why, "", n * m * (3.0 * d + 2 * p), peak, n)


def kernel_matmul(kernel: Kernel, X, Z, V) -> torch.Tensor:
    """k(X, Z) V, shape (n, p)."""
    if not (len(X) and V.numel()):
        return X.new_zeros(len(X), V.shape[1])
    d, p = X.shape[1], V.shape[1]
    X, Z, c = X.contiguous(), Z.contiguous(), _constants(kernel, X)
    value = _formulas(kernel).value
    chunks = _chunks(V, _most_columns(value, d, X.dtype, X.device))
    formula, width = f"{value} * b", chunks[0].shape[1]
    title = f"kernel_matmul for {_name(kernel)}"
    reduce = _reduction(title, formula, "xz", d, width, len(c), X.dtype, str(X.device))
    return _joined([reduce(X, Z, chunk, c) for chunk in chunks], 1, p)


def _joined(parts: list[torch.Tensor], dim: int, size: int) -> torch.Tensor:
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim)).narrow(dim, 0, size)


def plan_gradients(X, alpha, Z, why: str) -> Plan:
    """The plan of gradients."""
    (n, d), K, m = X.shape, alpha.shape[1], len(Z)
    peak = 2 * m * K * d * X.element_size()
    return Plan("gradients", "keops", "one pass", why, "", m * n * d * (5.0 + 2 * K), peak, m)


def gradients(kernel: Kernel, X, alpha, Z) -> torch.Tensor:
    """grad f_c(Z[i]), shape (m, K, d), from differences of points."""
    (n, d), K, m = X.shape, alpha.shape[1], len(Z)
    if not (n and m and K):
        return X.new_zeros(m, K, d)
    X, Z, c = X.contiguous(), Z.contiguous(), _constants(kernel, X)
    chunks = _chunks(alpha, _OUTPUTS // d)
    formula, width = f"TensorProd(b, {_formulas(kernel).slope})", chunks[0].shape[1]
    reduce = _reduction(f"gradients for {_name(kernel)}", formula, "zx", d, width, len(c), X.dtype, str(X.device))
    return _joined([reduce(Z, X, chunk, c).view(m, width, d) for chunk in chunks], 1, K)


def plan_agop(X, alpha, Z, limit: float | None, why: str) -> Plan:
    """The plan of agop: the gradient form; the gram form stores the weights."""
    (n, d), K, m, size = X.shape, alpha.shape[1], len(Z), X.element_size()
    row, fixed, room = 3 * K * d * size, 2 * 8 * d * d + 2 * n * K * size, budget(limit, X.device)
    block_rows(row, fixed, room, m, "agop, gradient form,", RAISE_LIMIT)  # MemoryError where a single row does not fit
    rows = max(1, min(m, (room - fixed) // max(1, row), _BLOCK // max(1, row)))
    work = m * n * d * (5.0 + 2 * K) + 2.0 * m * K * d * d
    return Plan("agop", "keops", "gradient", why, "", work, fixed + rows * row, rows)


def agop(at: Points, alpha, center: bool, block: int, row_weights=None) -> torch.Tensor:
    """sum_i w_i sum_c g_ic g_ic^T, float64 (d, d), by blocks of evaluation points; w = row_weights, default 1."""
    kernel, X, Z, _ = at
    K, d = alpha.shape[1], X.shape[1]
    M = X.new_zeros(d, d, dtype=torch.float64)
    if len(Z) == 0 or K == 0 or (center and len(Z) == 1):
        return M
    w = X.new_ones(len(Z)) if row_weights is None else row_weights

    def blocks():
        return ((gradients(kernel, X, alpha, z), part) for z, part in zip(Z.split(block), w.split(block), strict=True))

    mean = X.new_zeros(K, d, dtype=torch.float64)
    if center:
        for G, part in blocks():
            mean += torch.einsum("i,icd->cd", part.double(), G.double())
        mean /= w.sum(dtype=torch.float64)
    mean = mean.to(X.dtype)
    for G, part in blocks():
        rows = (G.sub_(mean) if center else G).mul_(part.sqrt()[:, None, None]).reshape(-1, d)
        add_squares_(M, rows)
    return symmetrise_(M)
