"""KeOps against the torch backend on the CPU: seconds by feature count, which "auto" goes by, and memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import fastagop
from bench import clock, files, machine

OPS: tuple[str, ...] = ("kernel_matmul", "gradients", "agop")
N, K, FEATURES = 8000, 10, (1, 2, 3, 4, 8, 16)
LARGE = (20_000, 16)
KERNEL = fastagop.Laplace(2.0)
_PEAK = """
import sys, torch
from bench import clock
from bench.keops_cpu import call, problem
op, backend, n, d = *sys.argv[1:3], *map(int, sys.argv[3:])
small, large = problem(300, d, torch.float32), problem(n, d, torch.float32)
call(op, backend, *small)  # libraries loaded, formulas compiled
print(clock.peak_bytes(lambda: call(op, backend, *large), clock.CPU))
"""


def problem(n: int, d: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Standard normal points and coefficients of K outputs."""
    generator = torch.Generator().manual_seed(0)
    X, A = torch.randn(n, d, generator=generator), torch.randn(n, K, generator=generator)
    return X.to(dtype), A.to(dtype)


def call(op: str, backend: str, X: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """One call of an operation at the points themselves."""
    if op == "kernel_matmul":
        return fastagop.kernel_matmul(KERNEL, X, None, A, backend=backend)
    return getattr(fastagop, op)(KERNEL, X, A, backend=backend)


def compare(op: str, n: int, d: int, dtype: torch.dtype, repeats: int) -> dict:
    """Median seconds of both backends, interleaved."""
    X, A = problem(n, d, dtype)
    seconds: dict[str, list[float]] = {"torch": [], "keops": []}
    for repeat in range(repeats + 1):
        for backend, times in seconds.items():
            start = time.perf_counter()
            call(op, backend, X, A)
            if repeat:  # the first round warms up, and compiles
                times.append(time.perf_counter() - start)
    medians = {backend: statistics.median(times) for backend, times in seconds.items()}
    return {"op": op, "n": n, "d": d, "K": K, "dtype": str(dtype).removeprefix("torch."), **medians}


def crossover(rows: list[dict]) -> dict[str, int]:
    """Per operation the feature count up to which KeOps was faster in both dtypes."""
    most = dict.fromkeys(OPS, 0)
    for op in OPS:
        for d in sorted({row["d"] for row in rows}):
            if any(row["keops"] >= row["torch"] for row in rows if row["op"] == op and row["d"] == d):
                break
            most[op] = d
    return most


def peak(op: str, backend: str, n: int, d: int) -> dict:
    """Peak memory beyond the inputs, in a process of its own."""
    printed = clock.alone(_PEAK, op, backend, n, d)
    return {"op": op, "backend": backend, "n": n, "d": d, "K": K, "peak_bytes": int(printed)}


def main(out: Path, repeats: int, n: int | None = None, d: Sequence[int] | None = None) -> None:
    """Measure every case, or those of the n and d that are asked for; print the tables, write the result file."""
    dtypes = (torch.float32, torch.float64)
    rows = [compare(op, n or N, wide, dtype, repeats) for op in OPS for wide in d or FEATURES for dtype in dtypes]
    large = (n or LARGE[0], max(d) if d else LARGE[1])
    memory = [peak(op, backend, *large) for op in ("kernel_matmul", "agop") for backend in ("torch", "keops")]
    result = {"machine": machine.describe(), "repeats": repeats, "crossover": crossover(rows)}
    files.write_json(out, {**result, "rows": rows, "memory": memory})
    print(table(rows, memory))
    print(f"KeOps faster up to this many features (kernels/_backends.py, KEOPS_FEATURES): {result['crossover']}")


def table(rows: list[dict], memory: list[dict]) -> str:
    """Both results as Markdown tables."""
    lines = ["| | features | dtype | torch, s | keops, s |", "|---|---|---|---|---|"]
    lines += [f"| {r['op']} | {r['d']} | {r['dtype']} | {r['torch']:.3f} | {r['keops']:.3f} |" for r in rows]
    lines += ["", "| | backend | n | peak memory |", "|---|---|---|---|"]
    lines += [f"| {r['op']} | {r['backend']} | {r['n']} | {r['peak_bytes'] / 1e6:.0f} MB |" for r in memory]
    return "\n".join(lines)
