"""Times and peaks of calls on any device: the only stopwatch and the only gauge of memory that the benchmarks have."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from fastagop.kernels.gemm import matmul_nt
from fastagop.kernels.memory import matrices

CPU = torch.device("cpu")
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of malloc.h
_KINDS = {"float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}  # others are float32


def synchronise(device: torch.device) -> None:
    """Wait for a device's queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def times(calls: Mapping[str, Callable], device: torch.device, repeats: int, warm: int = 0) -> dict[str, list[float]]:
    """Seconds of each call in every round, after rounds that warm up.

    Every round makes all calls, so that the machine's drift meets all of them.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(warm + repeats):
        for name, run in calls.items():
            synchronise(device)
            start = time.perf_counter()
            run()
            synchronise(device)
            if repeat >= warm:
                found[name].append(time.perf_counter() - start)
    return found


@contextlib.contextmanager
def kept_memory():
    """Memory that calls free stays with the process, whoever makes them (glibc; no effect elsewhere).

    A virtual machine may take two seconds to hand out a gigabyte, and takes back what was free for as long.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    before = ((_MMAP_MAX, 65536), (_TRIM_THRESHOLD, 2**17))  # glibc's own
    for name, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1)):
        mallopt(name, value)
    try:
        yield
    finally:
        for name, value in before:
            mallopt(name, value)


def seconds(run: Callable, device: torch.device, repeats: int = 3, warm: int = 1) -> float:
    """Median seconds of a call, after warm-up calls."""
    return statistics.median(times({"": run}, device, repeats, warm)[""])


def ceilings(device: torch.device, kinds: Sequence[str] = ("float32",)) -> dict[str, dict[str, float]]:
    """What a device does at most: bytes copied a second, and floating-point operations of square products by kind.

    A copy reads and writes. The products in float32 are those of the best library at hand.
    """
    block, out = torch.empty(2, 2**28 if device.type == "cuda" else 2**24, device=device).fill_(1.0)
    found = {"copy": {"bytes": 8 * block.numel() / seconds(lambda: out.copy_(block), device, 5)}}
    size = 8192 if device.type == "cuda" else 2048
    for kind in kinds:
        A = torch.randn(size, size, device=device).to(_KINDS.get(kind, torch.float32))
        libraries = [lambda A=A: torch.mm(A, A)]
        if kind == "float32":
            libraries.append(lambda A=A: matmul_nt(A, A))
        with tf32() if kind == "tf32" else contextlib.nullcontext():
            found[kind] = {"flops": 2 * size**3 / min(seconds(run, device, 5) for run in libraries)}
    return found


@contextlib.contextmanager
def tf32():
    """torch's float32 products in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def peak_bytes(run: Callable, device: torch.device) -> int | None:
    """Memory that a call takes beyond what was there before it: the allocator's on CUDA, the process's on Linux."""
    gc.collect()
    if device.type != "cuda":
        return _process_peak(run)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    synchronise(device)
    return torch.cuda.max_memory_allocated(device) - before


def _process_peak(run: Callable) -> int | None:
    """The largest resident size during a call over that before; libraries must be loaded already."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    except OSError:
        run()
        return None
    matrices.give_back()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # or freed memory that the process kept would serve the call unseen
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))
