"""The precision of torch's products: a setting of the whole process that a call needs changed.

Threads share the change, and the last one undoes it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.amp.autocast_mode import is_autocast_available


class Switch:
    """One setting of the process, lent to any number of calls at once.

    The first call that needs another value saves and sets, the last one restores. While calls need different values,
    the first of ``order`` among them is in force for all: order lists the values from the one that serves every call
    to the one that serves fewest, so that nobody waits and nobody gets less than was asked for. What somebody else
    sets meanwhile is theirs: it is left alone when the calls end, and set aside while another call starts.

    Args:
        read: the value in force.
        write: set a value.
        order: the values that calls may ask for.
        same: whether a value in force is as good as one that is wanted; default equality.
        restore: write a value that was found; default ``write``.
    """

    def __init__(
        self,
        read: Callable[[], Any],
        write: Callable[[Any], None],
        order: Sequence[Any],
        *,
        same: Callable[[Any, Any], bool] | None = None,
        restore: Callable[[Any], None] | None = None,
    ):
        self._read, self._write, self._order = read, write, tuple(order)
        self._same = same if same is not None else lambda found, needed: found == needed
        self._restore = restore if restore is not None else write
        self._users = dict.fromkeys(self._order, 0)
        self._found: Any = None  # the value before ours
        self._set: Any = None  # the value that this switch wrote
        self._changed = False
        self._threads = threading.local()  # its ``default``: what a thread's outer block asks for, None where inner do
        self._lock = threading.Lock()
        if hasattr(os, "register_at_fork"):  # a fork while another thread holds the lock must not block the child
            os.register_at_fork(after_in_child=self._renew)

    def at(self, value: Any) -> Use:
        """Keep the setting at a value, or at an earlier one of the order, while the block runs."""
        return Use(self, value, False)

    def default(self, value: Any) -> Use:
        """As ``at``, but blocks inside, of the same thread, may ask for a later value of the order."""
        return Use(self, value, True)

    def _begin(self, value: Any, default: bool) -> Any:
        """Count a use; returns the default that it stands in for until it ends."""
        outer = getattr(self._threads, "default", None)
        with self._lock:
            self._count(value, outer)
            try:
                self._settle()
            except BaseException:
                self._count(outer, value)
                raise
        self._threads.default = value if default else None
        return outer

    def _end(self, value: Any, outer: Any) -> None:
        self._threads.default = outer
        with self._lock:
            self._count(outer, value)
            if self._changed or outer is not None:
                self._settle()

    def _count(self, more: Any, less: Any) -> None:
        if more is not None:
            self._users[more] += 1
        if less is not None:
            self._users[less] -= 1

    def _settle(self) -> None:
        """Bring the setting to what the present users need; the lock is held."""
        needed = next((value for value in self._order if self._users[value]), None)
        found = self._read()
        if self._changed and found != self._set:  # somebody else has changed it: their value is the one to keep
            self._changed = False
        if needed is None:
            if self._changed:
                self._changed = False
                self._restore(self._found)
        elif not self._same(found, needed):
            if not self._changed:
                self._found = found
            self._write(needed)
            self._set, self._changed = self._read(), True

    def _renew(self) -> None:
        self._lock = threading.Lock()


class Use:
    """One call's use of a switch, as a ``with`` block; a class, as generators cost a small call a tenth of its time."""

    __slots__ = ("_default", "_outer", "_switch", "_value")

    def __init__(self, switch: Switch, value: Any, default: bool):
        self._switch, self._value, self._default = switch, value, default

    def __enter__(self) -> None:
        self._outer = self._switch._begin(self._value, self._default)

    def __exit__(self, *raised: object) -> None:
        self._switch._end(self._value, self._outer)


def matmul_precision(precision: str, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Run torch's float32 products at the precision asked for, whatever the process has set globally.

    torch knows full float32 and TF32 (on the CPU bf16); what is less accurate than asked for is not taken, so "high"
    computes like "highest" here, and the CPU always does. Autocast, which rounds factors to bfloat16, is off.
    Calls of several threads share the setting: while any of them needs full float32, all compute in it.
    """
    rounds = is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    use = _switched(precision, device)
    return _without_autocast(device, use) if rounds else use


@contextlib.contextmanager
def full_products() -> Iterator[None]:
    """Run torch's float32 products in float32, on every device, but where a call inside asks for another precision.

    Also a decorator. For what is made of several calls and of products between them.
    """
    if _by_backend():
        cuda = _CUDA.default("ieee") if torch.cuda.is_available() else contextlib.nullcontext()
        with _ONEDNN.default("ieee"), cuda:
            yield
    else:
        with _OLDER.default("highest"):
            yield


@contextlib.contextmanager
def _without_autocast(device: torch.device, use: Use | _Both):
    with torch.autocast(device.type, enabled=False), use:
        yield


def _switched(precision: str, device: torch.device) -> Use | _Both:
    """The settings that torch's products obey, which belong to the whole process, at what a call needs."""
    cuda = device.type == "cuda"
    medium = cuda and precision == "medium"
    if not _by_backend():
        return _OLDER.at("medium" if medium else "highest")
    if not cuda:
        return _ONEDNN.at("ieee")
    # What torch.set_float32_matmul_precision has set for one backend does not stand beside "ieee" of the other.
    return _CUDA.at("tf32") if medium else _Both(_ONEDNN.at("ieee"), _CUDA.at("ieee"))


class _Both:
    """Two uses as one ``with`` block."""

    __slots__ = ("_first", "_second")

    def __init__(self, first: Use, second: Use):
        self._first, self._second = first, second

    def __enter__(self) -> None:
        self._first.__enter__()
        try:
            self._second.__enter__()
        except BaseException:
            self._first.__exit__()
            raise

    def __exit__(self, *raised: object) -> None:
        self._second.__exit__()
        self._first.__exit__()


@functools.cache
def _by_backend() -> bool:
    """Whether each backend has a setting of its own: torch >= 2.9."""
    products = torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)
    return all(hasattr(one, "fp32_precision") for one in products)


def _full(found: str, needed: str) -> bool:
    """Whether a value is as good as one that is needed; "none", where nothing sets it, computes like "ieee"."""
    return found == needed or (needed == "ieee" and found == "none")


def _written(products: Any, value: str) -> None:
    """Set a value that was found; one that a wider setting implies is not written out: it would outlive that one."""
    if value == "none" or any(getattr(wider, "fp32_precision", "none") != "none" for wider in _wider()):
        products.fp32_precision = "none"
    if products.fp32_precision != value:
        products.fp32_precision = value


def _wider() -> tuple:
    """Where products of torch >= 2.9 have their precision from while nobody sets it."""
    return torch.backends, torch.backends.cudnn, torch.backends.mkldnn


def _onednn() -> Switch:
    """The setting of the CPU's products in torch >= 2.9."""

    products: Any = getattr(torch.backends.mkldnn, "matmul", None)

    def write(value: str) -> None:
        products.fp32_precision = value

    def restore(value: str) -> None:
        _written(products, value)

    return Switch(lambda: products.fp32_precision, write, ("ieee", "tf32"), same=_full, restore=restore)


def _cuda() -> Switch:
    """The setting of CUDA's products in torch >= 2.9: (its value, that of the older interface where both agree).

    Where they do, both are switched: torch raises an error at who reads the older one while they say different things,
    in any thread. "medium" of the older one cannot be set back without the CPU's, and is left alone.
    """

    products: Any = torch.backends.cuda.matmul

    def read() -> tuple[str, str | None]:
        value = products.fp32_precision
        try:
            older = torch.get_float32_matmul_precision()
        except RuntimeError:  # they say different things
            return value, None
        return value, older if older == ("high" if value == "tf32" else "highest") else None

    def write(value: str) -> None:
        if read()[1] is None:
            products.fp32_precision = value
        else:
            products.allow_tf32 = value == "tf32"  # sets both

    def restore(found: tuple[str, str | None]) -> None:
        value, older = found
        if older is not None:
            products.allow_tf32 = older == "high"
        _written(products, value)

    def same(found: tuple[str, str | None], needed: str) -> bool:
        return _full(found[0], needed)

    return Switch(read, write, ("ieee", "tf32"), same=same, restore=restore)


_CUDA, _ONEDNN = _cuda(), _onednn()
_OLDER = Switch(
    torch.get_float32_matmul_precision,
    torch.set_float32_matmul_precision,
    ("highest", "medium"),
)


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name without its package: "float32"."""
    return str(dtype).removeprefix("torch.")


def describe_precision(precision: str, X: torch.Tensor, tf32: bool = False) -> str:
    """What a precision means where float32 products are full ones, or TF32 with "medium" where there are such."""
    if X.dtype == torch.float64:
        return "float64 (float64 tensors always compute in float64)"
    if precision == "medium" and tf32:
        return "float32, medium (TF32)"
    return "float32, highest" + (
        "" if precision == "highest" else f" ({precision!r} asked for: at least that accurate)"
    )
