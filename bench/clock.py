"""Times and peaks of one call on any device."""

from __future__ import annotations

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
    """Device memory that a call takes beyond what was there before it; on the CPU the call runs, and None."""
    if device.type != "cuda":
        run()
        return None
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    synchronise(device)
    return torch.cuda.max_memory_allocated(device) - before
