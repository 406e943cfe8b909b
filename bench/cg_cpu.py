"""solve(method="cg") on the CPU at a size whose kernel matrix would not fit: steps, time and peak memory by rank."""

from __future__ import annotations

import functools
from pathlib import Path

import fastagop
from bench import contenders, files, harness, problems

N, D, RIDGE = 20_000, 16, 1e-3
RANKS = {"default rank": None, "rank 0": 0}  # the default preconditioner, and none
CONTENDERS = {
    name: functools.partial(
        contenders.solve, ridge=RIDGE, method=fastagop.ConjugateGradients(rank=rank, max_iterations=2000)
    )
    for name, rank in RANKS.items()
}


def problem(n: int) -> problems.Problem:
    """Points in 16 dimensions and their labels."""
    return problems.labelled(n, D)


def facts(solution: fastagop.Solution) -> dict:
    """What a row says of a solution beside time and memory."""
    rows = {"n": len(solution.alpha), "rank": solution.rank, "iterations": solution.iterations}
    return rows | {"residual": solution.residual, "stopped": solution.stopped}


def main(out: Path, n: int | None = None) -> None:
    """Measure every rank once, in a process of its own; print the table, write the result file."""
    rows = [harness.alone("cg_cpu", name, n or N) for name in CONTENDERS]
    case = {"d": D, "K": problems.CLASSES, "kernel": f"Laplace({problems.LAPLACE.bandwidth})"}
    files.write_result(out, {"case": case | {"ridge": RIDGE, "dtype": "float64"}, "rows": rows})
    print(table(rows))


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table; the last column is what a stored kernel matrix would take."""
    columns = {"n": "{n}", "rank": "{rank}", "steps": "{iterations}", "seconds": "{seconds:.0f}"}
    columns |= {"residual": "{residual:.0e}", "peak memory": "{peak}", "K stored": "{stored:.0f} MB"}
    return files.markdown(columns, [row | {"stored": 8 * row["n"] ** 2 / 1e6} for row in rows])
