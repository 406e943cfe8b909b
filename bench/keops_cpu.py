"""KeOps against the torch backend on the CPU: seconds by feature count, which "auto" goes by, and memory."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import torch

import fastagop
from bench import clock, machine

OPS: tuple[str, ...] = ("kernel_matmul", "gradients", "agop")
N, K, FEATURES = 8000, 10, (1, 2, 3, 4, 8, 16)
LARGE = (20_000, 16)
KERNEL = fastagop.Laplace(2.0)
_PEAK = """
import sys, torch
from bench import clock
from bench.keops_cpu import LARGE, call, problem
op, backend = sys.argv[1:]
small, large = problem(300, LARGE[1], torch.float32), problem(*LARGE, torch.float32)
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


def compare(op: str, d: int, dtype: torch.dtype, repeats: int) -> dict:
    """Median seconds of both backends, interleaved."""
    X, A = problem(N, d, dtype)
    seconds: dict[str, list[float]] = {"torch": [], "keops": []}
    for repeat in range(repeats + 1):
        for backend, times in seconds.items():
            start = time.perf_counter()
            call(op, backend, X, A)
            if repeat:  # the first round warms up, and compiles
                times.append(time.perf_counter() - start)
    medians = {backend: statistics.median(times) for backend, times in seconds.items()}
    return {"op": op, "n": N, "d": d, "K": K, "dtype": str(dtype).removeprefix("torch."), **medians}


def crossover(rows: list[dict]) -> dict[str, int]:
    """Per operation the feature count up to which KeOps was faster in both dtypes."""
    most = dict.fromkeys(OPS, 0)
    for op in OPS:
        for d in FEATURES:
            if any(row["keops"] >= row["torch"] for row in rows if row["op"] == op and row["d"] == d):
                break
            most[op] = d
    return most


def peak(op: str, backend: str) -> dict:
    """Peak memory beyond the inputs at the large size, in a process of its own."""
    printed = clock.alone(_PEAK, op, backend)
    n, d = LARGE
    return {"op": op, "backend": backend, "n": n, "d": d, "K": K, "peak_bytes": int(printed)}


def main(out: Path, repeats: int) -> None:
    """Measure every case, print the tables, write the result file."""
    dtypes = (torch.float32, torch.float64)
    rows = [compare(op, d, dtype, repeats) for op in OPS for d in FEATURES for dtype in dtypes]
    memory = [peak(op, backend) for op in ("kernel_matmul", "agop") for backend in ("torch", "keops")]
    result = {"machine": machine.describe(), "repeats": repeats, "crossover": crossover(rows)}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**result, "rows": rows, "memory": memory}, indent=1) + "\n")
    print(table(rows, memory))
    print(f"KeOps faster up to this many features (kernels/_backends.py, KEOPS_FEATURES): {result['crossover']}")


def table(rows: list[dict], memory: list[dict]) -> str:
    """Both results as Markdown tables."""
    lines = ["| | features | dtype | torch, s | keops, s |", "|---|---|---|---|---|"]
    lines += [f"| {r['op']} | {r['d']} | {r['dtype']} | {r['torch']:.3f} | {r['keops']:.3f} |" for r in rows]
    lines += ["", "| | backend | n | peak memory |", "|---|---|---|---|"]
    lines += [f"| {r['op']} | {r['backend']} | {r['n']} | {r['peak_bytes'] / 1e6:.0f} MB |" for r in memory]
    return "\n".join(lines)
