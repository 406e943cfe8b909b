"""AGOP of coefficients that float32 does not hold, on the CPU: beside a line in r^2, in float64, and in float32.

The coefficients are a solve's without much of a ridge, so that they cancel in every gradient. Errors are those of M,
against the products in float64.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from fastagop.kernels.plan import budget
from fastagop.kernels.torch_backend import smooth

import fastagop
from bench import clock, costs, files, harness, problems

N, D, RIDGE = 8000, 1024, 1e-8
KERNEL = fastagop.Gaussian(30.0)


def problem(n: int) -> problems.Problem:
    """Unit rows around ten centres in float32, and the float64 coefficients of their labels."""
    drawn = problems.labelled(n, D)
    alpha = fastagop.solve(KERNEL, drawn.X, drawn.alpha, ridge=RIDGE).alpha
    return dataclasses.replace(drawn, X=drawn.X.float(), alpha=alpha, kernel=KERNEL, ridge=RIDGE)


def beside_a_line(p: problems.Problem) -> torch.Tensor:
    """As fits take it where float32 coefficients would cost too much."""
    line = smooth.Line.of(KERNEL, p.X)
    assert line is not None
    rows, _ = smooth.plan_rows(p.X, p.alpha, False, budget(None, p.device))
    return smooth.agop(line, p.X, p.alpha, rows, center=False)


def _plain(p: problems.Problem, dtype: torch.dtype) -> torch.Tensor:
    return fastagop.agop(KERNEL, p.X.to(dtype), p.alpha.to(dtype), reduction="sum", method="gradient")


CONTENDERS = {
    "beside a line in r^2": beside_a_line,
    "float64": lambda p: _plain(p, torch.float64),
    "float32": lambda p: _plain(p, torch.float32),
}


def main(out: Path, repeats: int, n: int | None = None) -> None:
    """Measure in turns, print the table, write the result file."""
    drawn = problem(n or N)
    true = CONTENDERS["float64"](drawn)
    rows = harness.Harness(clock.CPU, repeats).rows(
        CONTENDERS, drawn, lambda _, M: costs.relative(M.double() - true, true)
    )
    facts = {"n": drawn.n, "d": D, "K": drawn.K, "kernel": f"Gaussian({KERNEL.bandwidth})", "ridge": RIDGE}
    largest = float(drawn.alpha.abs().max())
    files.write_result(out, {"case": facts | {"largest coefficient": largest}, "rows": [facts | row for row in rows]})
    print(table(rows))


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    columns = {"products": "{contender}", "seconds": "{seconds:.1f}", "times": "{ratio:.2f}"}
    return files.markdown(columns | {"peak memory": "{peak}", "relative error of M": "{error:.0e}"}, rows)
