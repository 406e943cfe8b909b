"""Calls on a few points beside plain torch: what a call costs before it computes anything. One thread, microseconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import fastagop
from bench import files, problems
from fastagop import commands

N, D, K, RIDGE = 60, 10, 3, 1e-3
CALLS, TURNS = 200, 9  # a turn's figure is its median call; a row's is the median turn
LIMITS = {"kernel_matrix": 6.0, "agop": 4.0, "solve": 8.0}  # times plain torch, that the project aims at


def plain_matrix(problem: problems.Problem) -> torch.Tensor:
    """The Laplace kernel's matrix by torch's distances."""
    return torch.cdist(problem.X, problem.X).div_(-problems.LAPLACE.bandwidth).exp_()


def plain_agop(problem: problems.Problem) -> torch.Tensor:
    """The Laplace kernel machine's AGOP, every gradient formed."""
    X, alpha, L = problem.X, problem.alpha, problems.LAPLACE.bandwidth
    r = torch.cdist(X, X)
    W = torch.exp(r / -L).div_(r.mul_(L)).fill_diagonal_(0.0)
    G = torch.einsum("ij,jc,jd->icd", W, alpha, X) - (W @ alpha)[:, :, None] * X[:, None]
    G = G.flatten(0, 1)
    return G.T @ G / len(X)


def plain_solve(problem: problems.Problem) -> torch.Tensor:
    """The kernel ridge regression's coefficients by torch's Cholesky."""
    A = plain_matrix(problem)
    A.diagonal().add_(RIDGE)
    return torch.cholesky_solve(problem.alpha, torch.linalg.cholesky(A))


PAIRS: dict[str, tuple[Callable, Callable]] = {
    "kernel_matrix": (plain_matrix, lambda p: fastagop.kernel_matrix(p.kernel, p.X)),
    "agop": (plain_agop, lambda p: fastagop.agop(p.kernel, p.X, p.alpha)),
    "solve": (plain_solve, lambda p: fastagop.solve(p.kernel, p.X, p.alpha, ridge=RIDGE)),
    "gradients": (plain_agop, lambda p: fastagop.gradients(p.kernel, p.X, p.alpha)),
    "kernel_matmul": (lambda p: plain_matrix(p) @ p.alpha, lambda p: fastagop.kernel_matmul(p.kernel, p.X, V=p.alpha)),
}


def main(out: Path, n: int | None = None) -> None:
    """Measure every pair in turns; print the table, write the result file."""
    with commands.threads(1):  # two threads of so few numbers wait for each other
        problem = problems.normal(n or N, D, K, torch.float32)
        rows = [row(name, problem, *pair) for name, pair in PAIRS.items()]
    case = {"n": problem.n, "d": D, "K": K, "kernel": f"Laplace({problems.LAPLACE.bandwidth})", "ridge": RIDGE}
    files.write_result(out, {"case": case | {"dtype": "float32", "threads": 1}, "rows": rows})
    print(table(rows))


def row(name: str, problem: problems.Problem, plain: Callable, ours: Callable) -> dict:
    """Microseconds of a call by plain torch and by fastagop, and their ratio: medians of turns that make both."""
    taken: list[tuple[float, float]] = []
    for _ in range(TURNS):
        taken.append((microseconds(plain, problem), microseconds(ours, problem)))
    ratio = statistics.median(b / a for a, b in taken)
    first, second = (statistics.median(column) for column in zip(*taken, strict=True))
    return {"call": name, "plain": first, "fastagop": second, "ratio": ratio, "aim": LIMITS.get(name)}


def microseconds(call: Callable, problem: problems.Problem) -> float:
    """The median call of a turn."""
    found = []
    for _ in range(CALLS):
        start = time.perf_counter()
        call(problem)
        found.append(time.perf_counter() - start)
    return 1e6 * statistics.median(found)


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    columns = {"": "{call}", "plain torch, µs": "{plain:.0f}", "fastagop, µs": "{fastagop:.0f}"}
    columns |= {"times plain torch's": "{ratio:.1f}", "aim": "{wish}"}
    return files.markdown(columns, [r | {"wish": "" if r["aim"] is None else f"{r['aim']:.0f}"} for r in rows])
