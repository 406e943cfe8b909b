"""Times and peaks of one call on any device."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import time
from collections.abc import Callable

import torch


def synchronise(device: torch.device) -> None:
    """Wait for a device's queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable, device: torch.device, repeats: int = 3, warm: int = 1) -> float:
    """Median seconds of a call, after warm-up calls."""
    times = []
    for repeat in range(warm + repeats):
        synchronise(device)
        start = time.perf_counter()
        run()
        synchronise(device)
        if repeat >= warm:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


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
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the high-water mark starts anew
    except OSError:
        run()
        return None
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # or freed memory that the process kept would serve the call unseen
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))
