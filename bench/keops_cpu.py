"""KeOps against the torch backend on the CPU: seconds by number of features, and memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from bench import contenders, files, harness, problems

CALLS = {op: getattr(contenders, op) for op in ("kernel_matmul", "gradients", "agop")}
BACKENDS = {"torch": contenders.BACKENDS["fastagop"], "keops": contenders.BACKENDS["fastagop keops"]}
CONTENDERS = {
    f"{op} {name}": run for op, call in CALLS.items() for name, run in contenders.fastagop_by(call, BACKENDS).items()
}
N, K, FEATURES = 8000, 10, (1, 2, 3, 4, 8, 16)
LARGE = (20_000, 16)


def problem(n: int, d: int, dtype: torch.dtype = torch.float32) -> problems.Problem:
    """Standard normal points and coefficients of K outputs."""
    return problems.normal(n, d, K, dtype)


def compare(op: str, n: int, d: int, dtype: torch.dtype, repeats: int) -> dict:
    """Median seconds of both backends; compilation is not counted."""
    pair = {backend: CONTENDERS[f"{op} {backend}"] for backend in BACKENDS}
    rows = harness.Harness(repeats=repeats).rows(pair, problem(n, d, dtype), lambda *_: None)
    medians = {row["contender"]: row["seconds"] for row in rows}
    return {"op": op, "n": n, "d": d, "K": K, "dtype": str(dtype).removeprefix("torch."), **medians}


def crossover(rows: list[dict]) -> dict[str, int]:
    """Per operation the feature count up to which KeOps was faster in both dtypes."""
    last = dict.fromkeys(CALLS, 0)
    for op in CALLS:
        for d in sorted({row["d"] for row in rows}):
            if any(row["keops"] >= row["torch"] for row in rows if row["op"] == op and row["d"] == d):
                break
            last[op] = d
    return last


def peak(op: str, backend: str, n: int, d: int) -> dict:
    """Peak memory beyond the inputs, in a process of its own."""
    found = harness.alone("keops_cpu", f"{op} {backend}", n, d)
    return {"op": op, "backend": backend, "n": n, "d": d, "K": K, "peak_bytes": found["peak_bytes"]}


def main(out: Path, repeats: int, n: int | None = None, d: Sequence[int] | None = None) -> None:
    """Measure every case, or those of the n and d that are asked for; print the tables, write the result file."""
    dtypes = (torch.float32, torch.float64)
    rows = [compare(op, n or N, wide, dtype, repeats) for op in CALLS for wide in d or FEATURES for dtype in dtypes]
    large = (n or LARGE[0], max(d) if d else LARGE[1])
    memory = [peak(op, backend, *large) for op in ("kernel_matmul", "agop") for backend in BACKENDS]
    faster = crossover(rows)
    files.write_result(out, {"repeats": repeats, "crossover": faster, "rows": rows, "memory": memory})
    print(table(rows, memory))
    print(f"features up to which KeOps was faster: {faster}")


def table(rows: list[dict], memory: list[dict]) -> str:
    """Both results as Markdown tables."""
    seconds = {"": "{op}", "features": "{d}", "dtype": "{dtype}", "torch, s": "{torch:.3f}", "keops, s": "{keops:.3f}"}
    peaks = {"": "{op}", "backend": "{backend}", "n": "{n}", "peak memory": "{peak}"}
    return f"{files.markdown(seconds, rows)}\n\n{files.markdown(peaks, memory)}"
