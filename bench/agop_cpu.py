"""AGOP of a Laplace machine on the CPU against its peers: time, peak memory and accuracy of each in one run."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from bench import clock, contenders, costs, files, harness, problems

CASES = ((4000, 784, 10), (2000, 784, 100))
CONTENDERS = {name: contenders.OPERATIONS["agop"][name] for name in ("fastagop", "xrfm", "torch composition")}
problem = problems.interpolated


def measure(n: int, d: int, K: int, repeats: int, rate: float) -> list[dict]:
    """One row per contender; the floor is the least operations at the rate of this machine's products."""
    drawn = problem(n, d, K)
    there = contenders.present(CONTENDERS)
    rows = harness.Harness(repeats=repeats).rows(there, drawn, functools.partial(costs.error, "agop"))
    for row in rows:
        row["peak_bytes"] = harness.alone("agop_cpu", row["contender"], n, d, K)["peak_bytes"]
    return [{"n": n, "d": d, "K": K, **row, "floor": costs.work("agop", drawn) / rate} for row in rows]


def main(out: Path, repeats: int, n: int | None = None, d: Sequence[int] | None = None) -> None:
    """Measure every case, or those of the n and d that are asked for; print the table, write the result file."""
    rate = clock.ceilings(clock.CPU)["float32"]["flops"]
    cases = dict.fromkeys((n or rows, columns, K) for rows, width, K in CASES for columns in d or (width,))
    rows = [row for case in cases for row in measure(*case, repeats, rate)]
    files.write_result(out, {"product GFLOP/s": rate / 1e9, "repeats": repeats, "rows": rows})
    print(table(rows))


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table; the floor is the time of the cheaper form's products at this machine's rate."""
    columns = {"n": "{n}", "K": "{K}", "": "{contender}", "seconds": "{seconds:.2f}", "times fastagop's": "{ratio:.1f}"}
    columns |= {"times the floor": "{floors:.1f}", "peak memory": "{peak}", "relative error of M": "{error:.0e}"}
    return files.markdown(columns, [row | {"floors": row["seconds"] / row["floor"]} for row in rows])
