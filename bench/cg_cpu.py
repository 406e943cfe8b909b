"""solve(method="cg") on the CPU at a size whose kernel matrix would not fit: steps, time and peak memory by rank."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch

import fastagop
from bench import clock, files, machine

N, D, L, RIDGE = 20_000, 16, 2.0, 1e-3
RANKS = (None, 0)  # the default preconditioner, and none
_RUN = """
import json, sys
from bench import clock
from bench.cg_cpu import problem, run
X, Y = problem(int(sys.argv[2]))
run(*problem(600), 30)  # libraries loaded, threads started
rows, rank = [], None if sys.argv[1] == "None" else int(sys.argv[1])
peak = clock.peak_bytes(lambda: rows.append(run(X, Y, rank)), clock.CPU)
print(json.dumps(rows[0] | {"peak_bytes": peak}))
"""


def problem(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit rows in 16 dimensions around ten class centres, and +-1 labels, float64."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 10
    X = torch.randn(10, D, generator=generator)[y] + 2.0 * torch.randn(n, D, generator=generator)
    return (X / X.norm(dim=1, keepdim=True)).double(), 2.0 * torch.eye(10, dtype=torch.float64)[y] - 1.0


def run(X: torch.Tensor, Y: torch.Tensor, rank: int | None) -> dict:
    """Solve once and say what it took."""
    start = time.perf_counter()
    solution = fastagop.solve(
        fastagop.Laplace(L), X, Y, ridge=RIDGE, method=fastagop.ConjugateGradients(rank=rank, max_iterations=2000)
    )
    seconds = time.perf_counter() - start
    return {
        "n": len(X),
        "rank": solution.rank,
        "iterations": solution.iterations,
        "residual": solution.residual,
        "stopped": solution.stopped,
        "seconds": seconds,
    }


def main(out: Path, n: int | None = None) -> None:
    """Measure every rank in a process of its own, print the table, write the result file."""
    rows = []
    for rank in RANKS:
        printed = clock.alone(_RUN, rank, n or N)
        rows.append(json.loads(printed))
    case = {"d": D, "K": 10, "kernel": f"Laplace({L})", "ridge": RIDGE, "dtype": "float64"}
    files.write_json(out, {"machine": machine.describe(), "case": case, "rows": rows})
    print(table(rows))


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table; the last column is what a stored kernel matrix would take."""
    lines = ["| n | rank | steps | seconds | residual | peak memory | K stored |", "|---|---|---|---|---|---|---|"]
    lines += [
        f"| {r['n']} | {r['rank']} | {r['iterations']} | {r['seconds']:.0f} | {r['residual']:.0e} "
        f"| {r['peak_bytes'] / 1e6:.0f} MB | {8 * r['n'] ** 2 / 1e6:.0f} MB |"
        for r in rows
    ]
    return "\n".join(lines)
