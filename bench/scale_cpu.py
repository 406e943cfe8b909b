"""n against seconds and peak memory on the CPU: a solve's steps, the AGOP, a layer; beside LAPACK and xrfm's solver.

Seconds are those of a second call, whose memory the process already has.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastagop.kernels.gemm import matmul_nt
from fastagop.kernels.plan import available_bytes

import fastagop
from bench import clock, drawing, files, harness, peers, problems
from bench.contenders import present
from fastagop.deep_rfm.layer import Settings, train_layer

SIZES, D = (2_000, 5_000, 10_000, 20_000), 512
# Most bytes by items of the matrix in full; 7 of those that have no number here.
_BYTES = {"potrf float64": 9, "torch's potrf float64": 9, "potrf float32": 5, "xrfm's solve": 13}
_RATE = 4096  # rows of the products whose rates the floors are made of


def problem(n: int, d: int = D) -> problems.Problem:
    """Unit rows around ten centres and their +-1 labels, float32, ridge 0."""
    drawn = problems.draw(n, d, problems.CLASSES)
    targets = 2.0 * torch.eye(problems.CLASSES)[drawn.y] - 1.0
    return dataclasses.replace(drawn, alpha=targets, ridge=0.0)


def solve(problem: problems.Problem) -> fastagop.Solution:
    """What "auto" takes."""
    return fastagop.solve(problem.kernel, problem.X, problem.alpha, ridge=problem.ridge)


def agop(problem: problems.Problem) -> torch.Tensor:
    """Of the labels as coefficients: its time does not depend on them."""
    return fastagop.agop(problem.kernel, problem.X, problem.alpha)


def layer(problem: problems.Problem) -> Any:
    """A layer of Deep RFM as wide as its input, ReLU features."""
    settings = Settings(kernel=problem.kernel, depth=1, features="relu", width=problem.d, ridge=problem.ridge)
    return train_layer(problem.X, problem.alpha, settings, 0, problem.y)[0]


def potrf(dtype: type) -> Callable[[problems.Problem], np.ndarray]:
    """SciPy's LAPACK factor of the kernel matrix; the clock inside counts the factorisation alone."""

    def run(problem: problems.Problem) -> np.ndarray:
        from scipy.linalg import lapack

        X = problem.X.to(torch.float64 if dtype is np.float64 else torch.float32)
        A = fastagop.kernel_matrix(problem.kernel, X).numpy().T
        start = time.perf_counter()
        factor = getattr(lapack, "dpotrf" if dtype is np.float64 else "spotrf")  # known at run time only
        _, info = factor(A, lower=0, overwrite_a=1, clean=0)
        return np.array([time.perf_counter() - start, info])

    return run


def torch_potrf(problem: problems.Problem) -> np.ndarray:
    """As ``potrf`` in float64, by the LAPACK that PyTorch brings: SciPy's crashes on some processors."""
    A = fastagop.kernel_matrix(problem.kernel, problem.X.double()).mT
    failed, start = torch.empty((), dtype=torch.int32), time.perf_counter()
    torch.linalg.cholesky_ex(A, out=(A, failed))
    return np.array([time.perf_counter() - start, int(failed)])


CONTENDERS: dict[str, Callable] = {
    "solve": solve,
    "agop": agop,
    "layer": layer,
    "xrfm's solve": lambda problem: peers.xrfm_solve(problem.X, problem.alpha, problem.kernel.bandwidth),
    "potrf float64": potrf(np.float64),
    "torch's potrf float64": torch_potrf,
    "potrf float32": potrf(np.float32),
}


def facts(result: Any) -> dict:
    """What a row says beside time and memory."""
    if isinstance(result, fastagop.Solution):
        return {"method": result.method, "residual": result.residual, "iterations": result.iterations}
    if isinstance(result, np.ndarray):
        return {"factor seconds": float(result[0]), "failed": int(result[1])}
    record = getattr(result, "record", None)
    return {} if record is None else {"stages": dict(record.stages), "method": record.solution.method}


def rates() -> dict[str, float]:
    """Operations a second of large products, those that the floors are made of."""
    found = {}
    for dtype in (torch.float32, torch.float64):
        A = torch.randn(_RATE, _RATE, dtype=dtype)
        out = torch.empty_like(A)
        taken = [clock.seconds(lambda A=A, out=out: matmul_nt(A, A, out=out), clock.CPU, 1) for _ in range(3)]
        found[str(dtype).removeprefix("torch.")] = 2.0 * _RATE**3 / statistics.median(taken)
    return found


def floors(n: int, d: int, K: int, rate: dict[str, float]) -> dict[str, float]:
    """Seconds of the products of each step at those rates: half of K in float64, n^3 / 3, the gradient form."""
    fill, factor = n * n * d / rate["float64"], n**3 / 3 / rate["float32"]
    forms = (2.0 * n * n * d * K + 2.0 * n * K * d * d, 1.0 * n**3 + n * n * d + 2.0 * n * d * d)
    agop = min(forms) / rate["float32"]
    return {"solve": fill + factor, "agop": agop, "layer": fill + factor + agop}


def main(out: Path, n: int | None = None, d: list[int] | None = None) -> None:
    """Measure every contender at every size that memory holds, each in a process of its own."""
    if d and len(d) > 1:
        raise ValueError(f"scale takes one --d, got {len(d)}")
    width = d[0] if d else D
    rate, rows = rates(), []
    there = present(CONTENDERS)
    for size in (n,) if n else SIZES:
        for name in there:
            needed = _BYTES.get(name, 7) * size * size
            if needed > 0.9 * available_bytes(clock.CPU):
                continue
            place = {"n": size, "contender": name}
            try:
                row = place | harness.alone("scale_cpu", name, size, width, twice=True)
            except ChildProcessError as error:  # some builds of LAPACK crash on large matrices
                rows.append(place | {"ended": str(error)})
                print(f"{size} {name}: {error}", flush=True)
                continue
            rows.append(row | {"floor": floors(size, width, problems.CLASSES, rate).get(name)})
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    case = {"d": width, "K": problems.CLASSES, "kernel": "Laplace(2.0)", "ridge": 0.0, "dtype": "float32"}
    files.write_result(out, {"case": case, "rates": rate, "rows": rows})
    print(table(rows))
    if n is None:
        plot(rows, out.with_suffix(".png"))


def measured(rows: list[dict]) -> list[dict]:
    """Those that came to an end."""
    return [row for row in rows if "ended" not in row]


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    columns = {"n": "{n}", "": "{contender}", "seconds": "{counted:.3g}", "times the floor": "{over}"}
    columns |= {"peak memory": "{peak}", "n² bytes": "{share:.1f}", "residual": "{rest}"}
    made = []
    for row in measured(rows):
        counted = row.get("factor seconds", row["seconds"])
        over = f"{counted / row['floor']:.2f}" if row.get("floor") else ""
        rest = f"{row['residual']:.0e}" if "residual" in row else ""
        made.append(row | {"counted": counted, "over": over, "rest": rest, "share": row["peak_bytes"] / row["n"] ** 2})
    return files.markdown(columns, made)


def plot(rows: list[dict], path: Path) -> None:
    """Seconds against n, one line a contender."""
    figure = drawing.new(5, 3.6)
    axes = figure.subplots()
    lines: dict[str, list] = {}
    for row in measured(rows):
        lines.setdefault(row["contender"], []).append((row["n"], row.get("factor seconds", row["seconds"])))
    drawing.by_n(axes, lines)
    axes.set_title("Two cores, float32 points, Laplace, ridge 0")
    print(f"written to {drawing.save(figure, path)}")
