"""The operations as torch operators with derivatives of derivatives: block by block, and through torch.compile.

``kernel_matrix``, ``kernel_matmul``, ``gradients`` and ``agop`` here take the kernel and the tensors of those of
``fastagop``, and ``bandwidth=``, and compute the same numbers as those do by default; beside that, autograd knows their
derivatives in the points, the coefficients and the bandwidth. One operator, ``fastagop::blockwise``, is all of them: at
level 0 it is the operation, at level 1 the vector-Jacobian product of level 0, at level 2 that of level 1, and so on. A
level beyond 0 is computed from differentiable formulas for a block of rows at a time, so no n x m matrix is stored
where the operation stores none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastagop.kernels import checks, operations, radial
from fastagop.kernels.precision import matmul_precision
from fastagop.kernels.profile import Kernel, Profile
from fastagop.kernels.scaling import scaled_
from fastagop.kernels.torch_backend.derivatives import crowds, distances, towards, values, weights

_BLOCK_BYTES = 2**26  # of all work tensors of a block
_ALIVE = 20  # such tensors at once, by the memory that a first derivative took
_SQUARED = 50  # Points beyond 2^-50 and 2^50, in units of the bandwidth, have squares that float32 does not hold.
_USUAL = 8  # Bandwidths beyond 2^-8 and 2^8 become the unit of length: every derivative divides by one more of them.


# Of every operation, the arguments that are its rows, its other points, and what else is a tensor.
_NAMES = {
    "kernel_matrix": ("X", "Z"),
    "kernel_matmul": ("X", "Z", "V"),
    "gradients": ("Z", "X", "alpha"),
    "agop": ("Z", "X", "alpha"),
}


def kernel_matrix(kernel: Profile, X: Tensor, Z: Tensor | None = None, *, bandwidth: Tensor | None = None) -> Tensor:
    """k(X, Z), shape (n, m), differentiable in X, Z and the bandwidth; see ``fastagop.kernel_matrix``.

    Args:
        kernel: radial; other kernels are refused.
        X: points (n, d).
        Z: points (m, d); default X, whose derivative then has both parts.
        bandwidth: a tensor of one number to differentiate in; default the kernel's own number.

    Raises:
        TypeError: a kernel that is not radial, or without the second derivative that was asked for.
    """
    return _call("kernel_matrix", kernel, X, Z, (), bandwidth)


def kernel_matmul(
    kernel: Profile, X: Tensor, Z: Tensor | None, V: Tensor, *, bandwidth: Tensor | None = None
) -> Tensor:
    """k(X, Z) V, shape (n, p), differentiable in X, Z, V and the bandwidth; see ``fastagop.kernel_matmul``.

    The kernel matrix is stored in no derivative. Arguments and errors are those of ``kernel_matrix``, and V (m, p).
    """
    return _call("kernel_matmul", kernel, X, Z, (V,), bandwidth)


def gradients(
    kernel: Profile, X: Tensor, alpha: Tensor, Z: Tensor | None = None, *, bandwidth: Tensor | None = None
) -> Tensor:
    """grad f_c(Z[i]), shape (m, K, d), differentiable in X, alpha, Z and the bandwidth; see ``fastagop.gradients``.

    Arguments and errors are those of ``kernel_matrix``, and alpha (n, K). Where a point meets a center a kernel with a
    kink has the derivative 0.
    """
    return _call("gradients", kernel, X if Z is None else Z, X, (alpha,), bandwidth)


def agop(
    kernel: Profile, X: Tensor, alpha: Tensor, Z: Tensor | None = None, *, bandwidth: Tensor | None = None
) -> Tensor:
    """Mean over Z of sum_c grad f_c grad f_c^T, shape (d, d), differentiable as ``gradients`` is.

    Arguments and errors are those of ``gradients``; see ``fastagop.agop`` for its formula.
    """
    return _call("agop", kernel, X if Z is None else Z, X, (alpha,), bandwidth)


def _call(name: str, kernel: Kernel, rows: Tensor, others: Tensor | None, more: Sequence[Tensor], bandwidth) -> Tensor:
    """The operation on the points of its rows, the other points, further tensors, and a bandwidth."""
    checks.kernel(kernel)
    if not isinstance(kernel, Profile):
        raise TypeError(f"{name}: derivatives are known of radial kernels only, got {kernel!r}")
    width = bandwidth
    if bandwidth is not None and not (
        isinstance(bandwidth, Tensor) and bandwidth.numel() == 1 and bandwidth.is_floating_point()
    ):
        raise TypeError(f"bandwidth must be a tensor of one number, floating, got {bandwidth!r}")
    if not torch.compiler.is_compiling():
        named = dict(zip(_NAMES[name], (rows, others, *more), strict=True))
        _check(kernel, {**named, "bandwidth": bandwidth})
    if width is None:
        width = rows.new_tensor(kernel.bandwidth, dtype=torch.float64)  # float32 may not hold it
    same = others is None or others is rows
    parameters = [f"{key} {value}" for key, value in kernel.get_params().items()]  # torch.compile follows this
    spec = ", ".join([name, type(kernel).__name__, "same" if same else "apart", *parameters])
    tensors = [rows, rows if others is None else others, *more, width.reshape(())]
    traced = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage] (documented, not in __all__)
    if traced or torch.compiler.is_compiling():  # what is written down has the operator, which files can hold
        return _blockwise(spec, 0, tensors)[0]
    return _Transformable.apply(spec, 0, *tensors)[0]  # pyright: ignore


def _check(kernel: Profile, tensors: dict[str, Any]) -> None:
    """Refuse what is no tensor, and a kernel whose class another one of its name hides: the operator goes by names."""
    given: dict[str, Any] = {n: t for n, t in tensors.items() if t is not None or n not in ("Z", "bandwidth")}
    for name, value in given.items():
        checks.plain(name, value)
    for name, value in given.items():
        if value.is_meta and not all(other.is_meta for key, other in given.items() if key != "bandwidth"):
            raise ValueError(f"{name} must hold numbers as the other tensors do, got one on device meta")
    if radial.named(type(kernel).__name__) is not type(kernel):
        raise TypeError(
            f"kernel {kernel!r}: another kernel class is called {type(kernel).__name__}, too; give yours its own name"
        )


@dataclass(frozen=True)
class _Spec:
    """An operation and its kernel, as the operator's text says them."""

    name: str
    kernel: Profile
    same: bool  # whether both sets of points are one, whose pairs of a point with itself are zero by index

    @classmethod
    def read(cls, spec: str) -> _Spec:
        name, kernel, same, *parameters = spec.split(", ")
        numbers = {key: float(value) for key, value in (text.split() for text in parameters)}
        return cls(name, radial.named(kernel)(**numbers), same == "same")  # pyright: ignore

    @property
    def row_wise(self) -> tuple[list[bool], list[bool]]:
        """Of the operation's inputs and outputs, which go row by row; others belong to all rows, and add up."""
        inputs = [True, False, False] if self.name == "kernel_matrix" else [True, False, False, False]
        return inputs, [self.name != "agop"]

    def at(self, level: int) -> tuple[list[bool], list[bool]]:
        """The same of a level: it takes what the level below takes and gives, and gives what that takes."""
        return _raised(*self.row_wise, level)

    def lengths(self, level: int) -> tuple[list[int], list[int]]:
        """Where 1 / s is the unit of length: of a level's inputs, by which power of s each is multiplied, and of its
        outputs, by which power those are to be multiplied that come of such inputs.

        A level that is linear in u takes u in the unit of what it is paired with, the output of the level below.
        """
        count = len(self.row_wise[0])
        inputs, outputs = _raised([1, 1, *[0] * (count - 3), 1], [0], level)
        own = {"gradients": 1, "agop": 2}.get(self.name, 0)  # they are slopes, and products of two
        return inputs, [own + power for power in outputs]

    def shape(self, tensors: Sequence[Tensor]) -> tuple[int, ...]:
        """Of the operation's result."""
        m, d = tensors[0].shape
        return {
            "kernel_matrix": (m, len(tensors[1])),
            "kernel_matmul": (m, *tensors[2].shape[1:]),
            "gradients": (m, *tensors[2].shape[1:], d),
            "agop": (d, d),
        }[self.name]

    def result_shapes(self, level: int, tensors: Sequence[Tensor]) -> list[tuple[int, ...]]:
        """Of a level's results: the operation's own, or those of the inputs of the level below."""
        if level == 0:
            return [self.shape(tensors)]
        return [tuple(tensor.shape) for tensor in tensors[: len(self.at(level)[1])]]


def _raised(inputs: list, outputs: list, level: int) -> tuple[list, list]:
    """What is said of an operation's inputs and outputs, said of those of a level."""
    for _ in range(level):
        inputs, outputs = inputs + outputs, inputs
    return inputs, outputs


# torch 2.6 reads no list[Tensor] from annotations, so that the schema is written out.
_SCHEMA = "(str spec, int level, Tensor[] tensors) -> Tensor[]"


@torch.library.custom_op("fastagop::blockwise", mutates_args=(), schema=_SCHEMA)
def _blockwise(spec: str, level: int, tensors: Sequence[Tensor]) -> list[Tensor]:
    read, given = _Spec.read(spec), [tensor.detach() for tensor in tensors]
    return [_operation(read, given)] if level == 0 else _above_autograd(_in_unit, read, level, given)


def _above_autograd(function: Callable, *arguments: Any) -> Any:
    """Call a function in a thread of its own: torch has switched autograd off in the one that runs an operator."""
    tensor = arguments[-1][0]
    stream = torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None

    def run() -> Any:
        # Streams are a thread's own; None changes nothing.
        with torch.cuda.stream(stream), matmul_precision("highest", tensor.device):
            return function(*arguments)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def _in_unit(read: _Spec, level: int, given: Sequence[Tensor]) -> list[Tensor]:
    """A level beyond 0, in a unit of length in which powers of the bandwidth stay within the dtype."""
    bandwidth = given[len(read.row_wise[0]) - 1]
    exponent = -math.frexp(float(bandwidth))[1]
    if abs(exponent) <= _USUAL:
        return _by_blocks(read, level, given)
    size = max(checks.largest(points) for points in given[:2])
    wide = abs(math.frexp(size)[1] + exponent) > _SQUARED
    powers, restored = read.lengths(level)
    scaled = [t.double() if wide else t for t in given]
    scaled = [scaled_(t.clone(), p * exponent) if p else t for t, p in zip(scaled, powers, strict=True)]
    read = replace(read, kernel=read.kernel.set_params(bandwidth=math.ldexp(float(bandwidth), exponent)))
    found = zip(_by_blocks(read, level, scaled), restored, given, strict=False)
    return [scaled_(t, p * exponent).to(tensor.dtype) for t, p, tensor in found]


def _by_blocks(read: _Spec, level: int, given: Sequence[Tensor]) -> list[Tensor]:
    """A level beyond 0, a block of rows at a time."""
    inputs, outputs = read.at(level)
    m, step = len(given[0]), max(1, _BLOCK_BYTES // (_ALIVE * _row_bytes(read.name, given)))
    if not m:
        return [torch.zeros_like(tensor) for tensor in given[: len(outputs)]]
    found: list[list[Tensor]] = [[] for _ in outputs]  # blocks of rows, or their sum
    for start in range(0, m, step):
        row = slice(start, min(m, start + step))
        block = [tensor[row] if by_row else tensor for tensor, by_row in zip(given, inputs, strict=True)]
        for kept, by_row, part in zip(found, outputs, _evaluate(read, level, block, start, m), strict=True):
            if by_row or not kept:
                kept.append(part.detach())
            else:
                kept[0] = kept[0].double() + part.detach()
    return [
        torch.cat(kept) if by_row else kept[0].to(tensor).contiguous()
        for kept, by_row, tensor in zip(found, outputs, given[: len(outputs)], strict=True)
    ]


def _row_bytes(name: str, given: Sequence[Tensor]) -> int:
    """What a row of one of the widest work tensors takes, which hold a number for each other point or each feature."""
    (n, d), size = given[1].shape, given[0].element_size()
    if name in ("gradients", "agop"):  # for each output, too, and in float64
        return 8 * max(1, n, d) * max(1, given[2].shape[-1])
    columns = given[2].shape[1] if name == "kernel_matmul" else 1
    return max(size * max(1, n, columns), 8 * d)


@_blockwise.register_fake
def _(spec: str, level: int, tensors: Sequence[Tensor]) -> list[Tensor]:
    read = _Spec.read(spec)
    if level == 0:
        return [tensors[0].new_empty(read.shape(tensors))]
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors[: len(read.at(level)[1])]
    ]


def _remember(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.spec, ctx.level, tensors = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, cotangents: list[Tensor | None]) -> tuple:
    tensors = list(ctx.saved_tensors)
    shapes = _Spec.read(ctx.spec).result_shapes(ctx.level, tensors)
    given = [
        tensors[0].new_zeros(shape) if cotangent is None else cotangent.contiguous()
        for cotangent, shape in zip(cotangents, shapes, strict=True)
    ]
    return None, None, _blockwise(ctx.spec, ctx.level + 1, [*tensors, *given])


_blockwise.register_autograd(_backward, setup_context=_remember)


class _Transformable(torch.autograd.Function):
    """``_blockwise`` for ``torch.func`` and forward mode, which know no derivatives of a registered operator."""

    @staticmethod
    def forward(spec: str, level: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(_blockwise(spec, level, list(tensors)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.spec, ctx.level, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple:
        given = [cotangent.contiguous() for cotangent in cotangents]
        return None, None, *_Transformable.apply(ctx.spec, ctx.level + 1, *ctx.saved_tensors, *given)  # pyright: ignore

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple:
        """J t: the level above computes J^T u, which is linear in u, and the level above that its derivative J in u."""
        tensors = ctx.saved_tensors
        zeros = [tensors[0].new_zeros(shape) for shape in _Spec.read(ctx.spec).result_shapes(ctx.level, tensors)]
        steps = [torch.zeros_like(t) if dt is None else dt for t, dt in zip(tensors, tangents[2:], strict=True)]
        found = _Transformable.apply(ctx.spec, ctx.level + 2, *tensors, *zeros, *steps)  # pyright: ignore
        return tuple(found[-len(zeros) :])

    @staticmethod
    def vmap(  # pyright: ignore[reportIncompatibleMethodOverride]
        info: Any, in_dims: tuple, spec: str, level: int, *tensors: Tensor
    ) -> tuple:
        """One call for each item of a batch."""
        found = []
        dims = in_dims[2:]
        if info.batch_size == 0:  # There is no call that would tell shapes.
            item = [t if dim is None else t.movedim(dim, -1).sum(-1) for t, dim in zip(tensors, dims, strict=True)]
            outputs = tuple(item[0].new_empty(0, *shape) for shape in _Spec.read(spec).result_shapes(level, item))
            return outputs, (0,) * len(outputs)
        for i in range(info.batch_size):
            item = [t if dim is None else t.select(dim, i) for t, dim in zip(tensors, dims, strict=True)]
            found.append(_Transformable.apply(spec, level, *item))  # pyright: ignore
        outputs = tuple(torch.stack(parts) for parts in zip(*found, strict=True))
        return outputs, (0,) * len(outputs)


def _operation(spec: _Spec, tensors: Sequence[Tensor]) -> Tensor:
    """The operation itself, by the fastest backend."""
    rows, others, bandwidth = tensors[0], tensors[0] if spec.same else tensors[1], tensors[-1]
    kernel = spec.kernel.set_params(bandwidth=float(bandwidth))
    if spec.name == "kernel_matrix":
        return operations.kernel_matrix(kernel, rows, None if spec.same else others)
    if spec.name == "kernel_matmul":
        return operations.kernel_matmul(kernel, rows, others, tensors[2])
    operation = operations.gradients if spec.name == "gradients" else operations.agop
    return operation(kernel, others, tensors[2], None if spec.same else rows)


def _evaluate(spec: _Spec, level: int, tensors: Sequence[Tensor], start: int, total: int) -> list[Tensor]:
    """A level for a block of rows from ``start`` on, differentiable where its inputs are."""
    if level == 0:
        return [_FORMULAS[spec.name](spec, start, total, *tensors)]
    count = len(spec.at(level - 1)[0])
    with torch.enable_grad():
        points = [t if t.requires_grad else t.detach().requires_grad_() for t in tensors[:count]]
        below = _evaluate(spec, level - 1, points, start, total)
        found = torch.autograd.grad(below, points, list(tensors[count:]), create_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(points, found, strict=True)]


def _scaled(spec: _Spec, start: int, rows: Tensor, others: Tensor, bandwidth: Tensor) -> tuple[Tensor, Tensor]:
    """(r^2 in the unit of the kernel's own bandwidth, what a square of this unit is of the points' own)."""
    unit = (spec.kernel.bandwidth / bandwidth) ** 2
    return distances(rows, others, start if spec.same else None) * unit, unit


def _matrix(spec: _Spec, start: int, total: int, rows, others, bandwidth) -> Tensor:
    return values(_scaled(spec, start, rows, others, bandwidth)[0], spec.kernel)


def _matmul(spec: _Spec, start: int, total: int, rows, others, V, bandwidth) -> Tensor:
    return _matrix(spec, start, total, rows, others, bandwidth) @ V


def _gradients(spec: _Spec, start: int, total: int, rows, others, alpha, bandwidth) -> Tensor:
    """sum_j w_ij alpha_jc (x_j - z_i), around centres: an offset of all points, or of a crowd, would cancel."""
    dtype, (sq, unit) = rows.dtype, _scaled(spec, start, rows, others, bandwidth)
    weight = (weights(sq, spec.kernel) * unit).double()
    shared = crowds(sq / unit, rows, others, start if spec.same else None)
    rows, others = shared.around(rows.double(), others.double())  # near pairs cancel in float32
    return towards(weight[:, None, :] * alpha.double().T, rows, others, shared).to(dtype)


def _agop(spec: _Spec, start: int, total: int, *tensors) -> Tensor:
    flat = _gradients(spec, start, total, *tensors).flatten(0, 1)
    return flat.T @ flat / total


_FORMULAS: dict[str, Callable[..., Tensor]] = {
    "kernel_matrix": _matrix,
    "kernel_matmul": _matmul,
    "gradients": _gradients,
    "agop": _agop,
}
