"""What a call will do, decided before it does it: backend, method, cost, memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, overload

import torch

from .memory.free import host_bytes, plenty

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """What a call will do; ``fastagop.explain`` prints it, and the call itself obeys it."""

    op: str
    backend: str
    method: str
    why: str
    precision: str
    flops: float
    peak_bytes: int
    block: int  # rows of one block
    seconds: float | None = None  # estimate: operations at the device's rates; None where nobody asked for it

    def __str__(self) -> str:
        seconds = "" if self.seconds is None else f"  seconds    about {self.seconds:.2g}\n"
        return (
            f"{self.op}: backend {self.backend}, method {self.method}\n"
            f"  why        {self.why}\n"
            f"  precision  {self.precision}\n"
            f"  work       {self.flops:.3g} floating-point operations\n"
            f"{seconds}"
            f"  memory     {format_bytes(self.peak_bytes)} beyond the inputs, in blocks of {self.block} rows"
        )


@dataclass(frozen=True)
class AgopTask:
    """What an AGOP is asked for beside its predictor; ``fastagop.agop`` has the meanings, checked here already.

    Attributes:
        reduction: "mean" or "sum".
        center: subtract the mean gradient of each output.
        method: "auto", "gradient" or "gram".
        limit: bytes that may be taken, or None.
        weights: of the evaluation points, as they were given, or None for 1 each.
        rounded: the points, float64, are float32 ones: their distances have no more digits than that rounding left
            them, and float64 products keep these of every pair, so that no near pair is measured again.
    """

    reduction: str = "mean"
    center: bool = False
    method: str = "auto"
    limit: float | None = None
    weights: torch.Tensor | None = None
    rounded: bool = False


@dataclass(frozen=True)
class Call:
    """A call, checked and planned, of which nothing has run.

    ``explain`` prints its plan with its estimated seconds; ``run`` computes. A backend's ``run`` takes the points in
    their unit of length, and what the operation has beside them; that of a ``KernelOperator`` takes nothing.
    """

    plan: Plan
    run: Callable[..., torch.Tensor]
    seconds: Callable[[], float] = lambda: 0.0


def format_bytes(count: float) -> str:
    """A number of bytes as text, such as "1.5 MB"."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def on_gpu(device: torch.device) -> bool:
    """Whether a device is a GPU, which works while the host goes on."""
    return device.type == "cuda"


def available_bytes(device: torch.device) -> int:
    """Memory that can still be taken on a device."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cuda":
        (free, total), taken = torch.cuda.mem_get_info(device), torch.cuda.memory_allocated(device)
        return max(0, min(free + torch.cuda.memory_reserved(device), int(_share(device) * total)) - taken)
    return host_bytes()


def _share(device: torch.device) -> float:
    """What of a GPU's memory torch may take: as ``torch.cuda.set_per_process_memory_fraction`` says, else all."""
    asked = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # the first versions cannot tell
    return asked(device) if asked is not None and torch.cuda.is_initialized() else 1.0


def budget(limit: float | None, device: torch.device) -> int:
    """Bytes a call may take beyond its inputs: the caller's limit, else most of what is free."""
    return int(limit) if limit is not None else int(0.9 * available_bytes(device))


def fits(needed: int, limit: float | None, device: torch.device) -> bool:
    """Whether a call may take so many bytes; for a small part of what was free, memory is not read at every step."""
    return (limit is None and device.type == "cpu" and plenty(needed)) or needed <= budget(limit, device)


RAISE_LIMIT = "raise memory_limit, or free memory"  # advice of calls that take one
ROWS = 256  # of a block, at most
_LEAST_ROWS = 128  # that a block aims at, at least, however many bytes they take
_CACHED = 2**25  # bytes of a block: elementwise work stays near the caches
AIM = (ROWS, _CACHED)  # rows of a block, and bytes that so many may take


USE_LESS = "use fewer points, or free memory"  # advice of the others


def block_rows(
    row_bytes: int, fixed_bytes: int, limit: int, max_rows: int, purpose: str, advice: str = USE_LESS
) -> int:
    """Rows of a block such that fixed_bytes + rows * row_bytes stays within the limit; as ``fitting_rows``."""
    return fitting_rows(lambda rows: fixed_bytes + rows * row_bytes, limit, max_rows, purpose, advice)[0]


def fitting_rows(
    bytes_of: Callable[[int], int],
    limit: int,
    max_rows: int,
    purpose: str,
    advice: str = USE_LESS,
    aim: tuple[int, int] = AIM,
) -> tuple[int, int]:
    """(rows of a block, bytes) such that bytes_of(rows), which grows with them, stays within the limit.

    Blocks aim at no more rows and bytes than ``aim`` says, and at 128 rows at least. ``advice``: what the caller of
    ``purpose`` can do where not even one row fits.
    """
    if max_rows <= _LEAST_ROWS and (most := bytes_of(max(1, max_rows))) <= limit:  # all rows are wished for, and fit
        return max(1, max_rows), most
    least = bytes_of(1)
    if least > limit:
        raise MemoryError(
            f"{purpose} needs {format_bytes(least)} for a single row block, but "
            f"{format_bytes(limit)} may be used; {advice}"
        )
    each = max(1, (bytes_of(aim[0]) - least) // max(1, aim[0] - 1))
    low, high = 1, int(max(1, min(max(_LEAST_ROWS, min(aim[0], aim[1] // each)), max_rows)))
    if (most := bytes_of(high)) <= limit:
        return high, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if bytes_of(middle) <= limit else (low, middle - 1)
    return low, bytes_of(low)


def longest_first(count: int, rows: int) -> range:
    """First rows of the blocks of a lower triangle; memory that a block frees then has room for the next one's."""
    return range(0, count, rows)[::-1]


class computed_once(Generic[T]):
    """An attribute that is computed where it is first read, and kept: ``functools.cached_property`` without a lock.

    Until Python 3.12 that one holds a lock of the whole class while it computes: other threads wait with objects of
    their own, and a process that is forked meanwhile waits for ever. Here two threads may both compute one value.
    """

    def __init__(self, compute: Callable[[Any], T]):
        self._compute, self.__doc__ = compute, compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> computed_once[T]: ...

    @overload
    def __get__(self, instance: object, owner: type) -> T: ...

    def __get__(self, instance: object | None, owner: type) -> computed_once[T] | T:
        return self if instance is None else vars(instance).setdefault(self._name, self._compute(instance))
