"""AGOP of a Laplace machine on the CPU against its peers: time, peak memory and accuracy of each in one run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from fastagop.kernels.torch_backend import costs

import fastagop
from bench import clock, files, machine, peers

L = 2.0
CASES = ((4000, 784, 10), (2000, 784, 100))
_PEAK = """
import sys
from bench import clock
from bench.agop_cpu import CONTENDERS, problem
name, n, d, K = sys.argv[1], *map(int, sys.argv[2:])
X, A = problem(n, d, K)
CONTENDERS[name](*problem(64, d, K))  # libraries loaded, threads started
print(clock.peak_bytes(lambda: CONTENDERS[name](X, A), clock.CPU))
"""


def problem(n: int, d: int, K: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit rows around ten class centres, and the ridgeless coefficients of +-1 labels (random ones for K > 10)."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 10
    X = torch.randn(10, d, generator=generator)[y] + 2.0 * torch.randn(n, d, generator=generator)
    X = X / X.norm(dim=1, keepdim=True)
    code = torch.randint(0, 2, (10, K), generator=generator) if K > 10 else torch.eye(10)
    noise = (torch.rand(n, K, generator=generator) < 0.1) if K > 10 else torch.zeros(n, K)
    Y = 2.0 * ((code[y] + noise) % 2) - 1.0
    return X, fastagop.solve(fastagop.Laplace(L), X, Y).alpha


def ours(X: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """fastagop.agop."""
    return fastagop.agop(fastagop.Laplace(L), X, A, reduction="sum")


CONTENDERS: dict[str, Callable] = {
    "fastagop": ours,
    "xrfm": lambda X, A: peers.xrfm_agop(X, A, L),
    "torch composition": lambda X, A: peers.composition(X, A, fastagop.Laplace(L)),
}


def measure(n: int, d: int, K: int, repeats: int) -> list[dict]:
    """One row per contender."""
    X, A = problem(n, d, K)
    truth = fastagop.agop(fastagop.Laplace(L), X.double(), A.double(), reduction="sum", method="gradient")
    calls = {name: functools.partial(run, X, A) for name, run in CONTENDERS.items()}
    rows = []
    for row in clock.interleaved(calls, "fastagop", repeats):
        M = row.pop("result")
        peak = int(clock.alone(_PEAK, row["contender"], n, d, K))
        error = float((M - truth).norm() / truth.norm())
        rows.append({"n": n, "d": d, "K": K, **row, "peak_bytes": peak, "error": error})
    return rows


def main(out: Path, repeats: int, n: int | None = None, d: Sequence[int] | None = None) -> None:
    """Measure every case, or those of the n and d that are asked for; print the table, write the result file."""
    rate = clock.product_rate(clock.CPU)
    cases = dict.fromkeys((n or rows, columns, K) for rows, width, K in CASES for columns in d or (width,))
    rows = [row for case in cases for row in measure(*case, repeats)]
    for row in rows:
        row["floor"] = min(costs.flops(row["n"], row["n"], row["d"], row["K"], symmetric=True).values()) / rate
    result = {"machine": machine.describe(), "product GFLOP/s": rate / 1e9, "repeats": repeats, "rows": rows}
    files.write_json(out, result)
    print(table(rows))


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table; the floor is the time of the cheaper form's products at this machine's rate."""
    lines = [
        "| n | K | | seconds | times fastagop's | times the floor | peak memory | relative error of M |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['n']} | {r['K']} | {r['contender']} | {r['seconds']:.2f} | {r['ratio']:.1f} "
        f"| {r['seconds'] / r['floor']:.1f} | {r['peak_bytes'] / 1e6:.0f} MB | {r['error']:.0e} |"
        for r in rows
    ]
    return "\n".join(lines)
