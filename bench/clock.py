"""Times and peaks of calls on any device: medians, interleaved contenders, memory beyond what was held before."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from fastagop.kernels.gemm import matmul_nt

CPU = torch.device("cpu")


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


def product_rate(device: torch.device) -> float:
    """Floating-point operations per second of square float32 products on a device, by the best library at hand."""
    size = 8192 if device.type == "cuda" else 2048
    A = torch.randn(size, size, device=device)
    return 2 * size**3 / min(seconds(run, device, 5) for run in (lambda: torch.mm(A, A), lambda: matmul_nt(A, A)))


def interleaved(contenders: Mapping[str, Callable], first: str, repeats: int) -> list[dict]:
    """One row per contender on the CPU: median seconds, median ratio to the first one's, and the last result.

    Every round runs all of them, so that the machine's drift meets all; the first round warms up.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    results = {}
    for repeat in range(repeats + 1):
        for name, run in contenders.items():
            start = time.perf_counter()
            results[name] = run()
            if repeat:
                times[name].append(time.perf_counter() - start)
    return [
        {
            "contender": name,
            "seconds": statistics.median(own),
            "ratio": statistics.median(t / one for t, one in zip(own, times[first], strict=True)),
            "result": results[name],
        }
        for name, own in times.items()
    ]


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
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # or freed memory that the process kept would serve the call unseen
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def alone(code: str, *arguments: object) -> str:
    """The last line that a fresh process prints: peaks do not depend on what ran before."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    root = Path(__file__).resolve().parents[1]  # the process finds bench/ there, wherever this one was started
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, cwd=root)
    if done.returncode or not done.stdout:
        raise ChildProcessError(f"a process that measures ended with exit code {done.returncode}; its error is above")
    return done.stdout.splitlines()[-1]
