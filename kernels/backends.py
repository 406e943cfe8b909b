"""The backends: what one is, the one table of them, and who serves a call."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

import torch

from .checks import choice
from .errors import BackendUnavailable
from .keops_backend.backend import KeopsBackend
from .keops_backend.pairs import KeopsPairBackend
from .pair_backend.backend import PairBackend
from .plan import AgopTask, Call
from .profile import Kernel
from .scaling import Points
from .torch_backend.agop import InnerKernels
from .torch_backend.backend import FactorKernels, TorchBackend
from .triton_backend.backend import TritonBackend
from .triton_backend.pairs import TritonPairBackend

if TYPE_CHECKING:
    from .kernel_operator import KernelOperator


class Request(NamedTuple):
    """A call as far as a backend must know it to say whether it serves it.

    ``operation`` is "kernel_matrix", "kernel_matmul", "gradients", "agop", "solve" (by a stored matrix), or "solve with
    method 'cg'" (float64 products).
    """

    operation: str
    kernel: Kernel
    X: torch.Tensor
    precision: str = "highest"


class Backend(Protocol):
    """Where a call's large work is done, as far as every backend says it of itself; ``register`` adds one.

    What it serves it has a method for, see ``Serving``. docs/pages/architecture.md has an example.
    """

    @property
    def name(self) -> str:
        """What the argument ``backend`` calls it."""
        ...

    @property
    def operations(self) -> tuple[str, ...]:
        """Those that it has, as ``Request`` names them."""
        ...

    @property
    def shares_triangle(self) -> bool:
        """Whether ranks can share out the lower triangle of k(X, X), as torch's products and gram form can."""
        ...

    def refusal(self, request: Request) -> str | None:
        """Why it does not serve a call, and what to change; None where it does."""
        ...

    def describe_precision(self, precision: str, X: torch.Tensor) -> str:
        """What a precision means for these points, in words."""
        ...

    def products(self, precision: str, X: torch.Tensor) -> str:
        """The word that the rate of its products is known by in ``calibration``."""
        ...


class Serving(Backend, Protocol):
    """A backend that does not refuse a call; of the methods here it has those of the operations that it names.

    Each operation's method gets a ``KernelOperator`` (its X, Z, precision and the reason ``why`` are for the plan) and
    returns a ``Call``, planned but not run. Its ``run(points, ...)`` gets the points in a unit of length in which
    nothing leaves the dtype.
    """

    def matrix(self, operator: KernelOperator, out: torch.Tensor | None, ridge: float) -> Call:
        """k(X, Z) + ridge I, a ridge only where Z is X; ``run(points)`` gives (n, m), in ``out`` if there is one."""
        ...

    def matmul(self, operator: KernelOperator, V: torch.Tensor) -> Call:
        """k(X, Z) V; ``run(points)`` gives (n, p)."""
        ...

    def product(self, at: Points, V: torch.Tensor, rows: int) -> torch.Tensor:
        """For "solve with method 'cg'": k(X, Z) V of scaled float64 points, in blocks of that many rows."""
        ...

    def gradients(self, operator: KernelOperator, alpha: torch.Tensor) -> Call:
        """The predictor's gradients at Z; ``run(points, alpha)`` gives (m, K, d)."""
        ...

    def agop(self, operator: KernelOperator, alpha: torch.Tensor, task: AgopTask) -> Call:
        """The summed AGOP; ``run(points, alpha, weights)`` gives float64 (d, d)."""
        ...

    def inner_kernels(self, X: torch.Tensor, precision: str) -> InnerKernels:
        """For AGOPs from stored weights: the inner steps of its two forms."""
        ...

    def factor_kernels(self, dtype: torch.dtype, precision: str) -> FactorKernels:
        """For "solve": how a stored matrix is filled and factored."""
        ...


KINDS = ("radial", "pairs")  # of kernels: radial ones, and those that are not, which give blocks of pairs
_TABLE: dict[tuple[str, str], Backend] = {}  # by name and kind of kernels
_RESERVED: tuple[str, ...] = ()


def register(backend: Backend, *, kernels: str = "radial") -> None:
    """Add a backend to the table, or put it in the place of an earlier one; those of the package stay.

    Args:
        backend: the backend.
        kernels: those that it is asked for, "radial" or "pairs" (the others). A name may have a backend for each.

    Raises:
        ValueError: the name is "auto" or that of a backend of the package, or there are no such kernels.
    """
    choice("kernels", kernels, KINDS)
    if backend.name in _RESERVED:
        raise ValueError(f"name must be none of {', '.join(map(repr, _RESERVED))}, got {backend.name!r}; take another")
    _TABLE[backend.name, kernels] = backend


for _backend in (TorchBackend(), TritonBackend(), KeopsBackend()):
    register(_backend)
for _backend in (PairBackend(), TritonPairBackend(), KeopsPairBackend()):
    register(_backend, kernels="pairs")
_RESERVED = ("auto", *dict.fromkeys(name for name, _ in _TABLE))


def names(operation: str | None = None) -> tuple[str, ...]:
    """What the argument ``backend`` may be; of backends that have an operation for some kernels, where one is named."""
    found = (name for (name, _), backend in _TABLE.items() if operation is None or operation in backend.operations)
    return ("auto", *dict.fromkeys(found))


def choose(backend: str, request: Request) -> tuple[Serving, str]:
    """(backend, why) for a call, or BackendUnavailable.

    "auto" is torch: KeOps measured faster for gradients of float64 points of one feature alone
    (bench/results/keops_cpu.json), and the Triton kernels have not been measured on a GPU.
    """
    choice("backend", backend, names())
    if backend == "auto":
        return cast(Serving, _entry("torch", request.kernel)), "the torch backend serves every device"
    reason = _refusal(backend, request)
    if reason is not None:
        raise BackendUnavailable(
            f"backend {backend!r} cannot serve {request.operation}: {reason}; use backend='torch' or 'auto' to compute "
            "without it"
        )
    return cast(Serving, _entry(backend, request.kernel)), "asked for"


def serving(backend: str, request: Request) -> str:
    """The backend's name where it serves a call, else "auto"."""
    return backend if backend == "auto" or _refusal(backend, request) is None else "auto"


def _refusal(backend: str, request: Request) -> str | None:
    """Why a backend does not serve a call."""
    found = _entry(backend, request.kernel)
    if found is not None:
        return found.refusal(request)
    words = "no radial kernels, and {0!r} is one" if request.kernel.radial else "radial kernels only, and {0!r} is none"
    more = f"backends.register(..., kernels={_kind(request.kernel)!r}) adds one for such kernels"
    return f"it has {words.format(request.kernel)}; {more}"


def _entry(backend: str, kernel: Kernel) -> Backend | None:
    """The backend of a name for a kernel; None where it is registered for other kernels only."""
    return _TABLE.get((backend, _kind(kernel)))


def _kind(kernel: Kernel) -> str:
    """Which of KINDS a kernel is of."""
    return "radial" if kernel.radial else "pairs"
