"""Everything at the paper's size on one device: ceilings, each operation beside its peers, layers of Deep RFM.

Each row says seconds, effective GFLOP/s (the least operations that the result needs), the share of the measured ceiling
of the products that ran, peak memory and the error against float64. What a machine cannot run is a row with the reason.
"""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fastagop.kernels.triton_backend.launch_config import interpreted

import fastagop
from bench import clock, contenders, costs, files, problems
from bench.harness import Contender, Harness
from bench.problems import Problem

LIMIT = 520.0  # seconds after which no further case starts
_TORCH = {"fastagop": contenders.BACKENDS["fastagop"]}
# How many products of which kind the fused kernels take for one: what their share of the ceiling is taken of.
_PRODUCTS = {"highest": (3, "float16"), "high": (3, "bfloat16"), "medium": (1, "tf32"), "float64": (1, "float64")}


@dataclass(frozen=True)
class Case:
    """A problem, who computes it, the least operations, and the error of a result."""

    name: str
    problem: Problem
    contenders: Mapping[str, Contender]
    work: float
    error: Callable[[Problem, Any], float | None]


class Suite:
    """Rows of one run, saved after each, so that a run cut short leaves what it measured."""

    def __init__(self, device: torch.device, out: Path, n: int, repeats: int):
        self.device, self.out, self.n = device, out, n
        self.harness = Harness(device, repeats)
        self.fused = device.type == "cuda" or interpreted()
        self.start, self.rows, self.ceilings = time.perf_counter(), [], {}

    def save(self) -> None:
        """Write the result file."""
        files.write_result(self.out, {"n": self.n, "ceilings": self.ceilings, "rows": self.rows})

    def run(self, case: Case) -> None:
        """Measure the contenders of a case, one after the other; one that fails is a row with the reason."""
        for name in case.contenders:
            if "triton" in name and not self.fused:
                continue
            row = {"case": case.name, "contender": name, "d": case.problem.d, "K": case.problem.K}
            if time.perf_counter() - self.start > LIMIT:
                row["note"] = "not run: out of time"
            else:
                try:
                    row |= self._measure(case, name)
                except Exception as failure:  # one contender's failure is a row, not the end
                    reason = str(failure).splitlines()[0][:160] if str(failure) else ""
                    row["note"] = f"{type(failure).__name__}: {reason}"
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            print(line(row), flush=True)
            self.rows.append(row)
            self.save()

    def _measure(self, case: Case, name: str) -> dict:
        (row,) = self.harness.rows({name: case.contenders[name]}, case.problem, case.error)
        kinds = [products for word, products in _PRODUCTS.items() if word in name.split()]
        factor, kind = kinds[0] if kinds else (1, "float32")
        rate = case.work / row["seconds"]
        share = rate * factor / self.ceilings[kind]["flops"] if kind in self.ceilings else None
        facts = {key: row[key] for key in ("seconds", "peak_bytes", "error")}
        return facts | {"tflops": rate / 1e12, "share": share}


def line(row: dict) -> str:
    """A row as a line of the table."""
    size = f"d={row['d']} K={row['K']}"
    head = f"{row['case']:24} {size:14} {row['contender']:32}"
    if "seconds" not in row:
        return f"{head} {row['note']}"
    share = f"{100 * row['share']:5.0f}%" if row["share"] is not None else "     -"
    peak = f"{row['peak_bytes'] / 1e9:8.2f} GB" if row["peak_bytes"] is not None else "           "
    error = f"{row['error']:.0e}" if row["error"] is not None else ""
    return f"{head} {row['seconds']:9.4f} s {1e3 * row['tflops']:9.1f} GFLOP/s {share} {peak} {error}"


def _ways(call: Callable, **options) -> dict[str, Contender]:
    """fastagop on Triton at each precision, and on torch."""
    return contenders.fastagop_by(call, contenders.FUSED | _TORCH, **options)


def _peers(op: str, *names: str) -> dict[str, Contender]:
    return {name: contenders.OPERATIONS[op][name] for name in names}


def kernel_matrix(problem: Problem, name: str = "kernel_matrix") -> Case:
    """k(X, X): its floor is half of the product X X^T."""
    who = _ways(contenders.kernel_matrix) | _peers("kernel_matrix", "torch composition")
    return _case(name, "kernel_matrix", problem, who)


def kernel_matmul(problem: Problem) -> Case:
    """k(X, X) alpha without k(X, X)."""
    who = _ways(contenders.kernel_matmul) | _peers("kernel_matmul", "torch composition")
    return _case("kernel_matmul", "kernel_matmul", problem, who)


def agop(problem: Problem) -> Case:
    """Both forms against the plain composition and xrfm; the gradient form only of few outputs."""
    few = problem.K <= problems.CLASSES
    who = _ways(contenders.agop, method="gradient") if few else {}
    who |= {f"{name} gram": run for name, run in _ways(contenders.agop, method="gram").items()}
    who |= _peers("agop", "torch composition", "xrfm")

    def error(p: Problem, found: torch.Tensor) -> float:
        truth = costs.agop64(p, "gradient" if few else "gram")
        return costs.relative(found.double() - truth, truth)

    return Case("agop", problem, who, costs.work("agop", problem), error)


def solve(problem: Problem) -> Case:
    """float64 factorisation, and coarse factor with float64 refinement, against the library's Cholesky; no ridge."""

    def library(p: Problem) -> torch.Tensor:
        K = fastagop.kernel_matrix(p.kernel, p.X.double(), backend="torch")
        return torch.linalg.cholesky_ex(K).L[0, 0]

    ways = {
        "fastagop triton float64": {"backend": "triton", "ridge": 0.0},
        "fastagop triton float32, ridge": {"backend": "triton", "ridge": 1e-3},
        "fastagop triton high factor": {"backend": "triton", "ridge": 0.0, "precision": "high"},
        "fastagop triton medium factor": {"backend": "triton", "ridge": 0.0, "precision": "medium"},
        "fastagop float64": {"backend": "torch", "ridge": 0.0},
    }
    who = contenders.fastagop_by(contenders.solve, ways) | {"K and library Cholesky, float64": library}
    return Case("solve", problem, who, costs.work("solve", problem), lambda _, s: getattr(s, "residual", None))


def deep_rfm(problem: Problem, depth: int, backends: Mapping[str, dict]) -> Case:
    """Whole layers of Deep RFM with ReLU features of width d."""

    def fit(p: Problem, backend: str) -> fastagop.DeepRFMClassifier:
        options = {"depth": depth, "width": p.d, "random_state": 0, "device": p.device, "backend": backend}
        model = fastagop.DeepRFMClassifier(**options).fit(p.X, p.y)
        stages = {key: round(value, 3) for key, value in model.layers_[-1].stages.items()}
        print(f"  {backend} stages of the last layer: {stages}, NC1 {model.layers_[-1].nc1['projected']:.2e}")
        return model

    n, d, K = problem.n, problem.d, problem.K
    work = depth * (2.0 * n**2 * d + n**3 / 3 + 2.0 * n**2 * K * d)
    who = contenders.fastagop_by(fit, backends)
    return Case(f"deep_rfm, {depth} layers", problem, who, work, lambda _, model: model.solution_.residual)


def _case(name: str, op: str, problem: Problem, who: Mapping[str, Contender]) -> Case:
    return Case(name, problem, who, costs.work(op, problem), functools.partial(costs.error, op))


def main(device: torch.device, out: Path, repeats: int, n: int | None, d: Sequence[int] | None) -> None:
    """Run everything, print the rows as they come and a table at the end."""
    cuda = device.type == "cuda"
    suite = Suite(device, out, n or (50_000 if cuda else 2000), repeats)
    suite.ceilings = clock.ceilings(device, ("float32", "float64", *(("tf32", "float16", "bfloat16") if cuda else ())))
    for kind, rate in suite.ceilings.items():
        print(f"{kind}: " + ", ".join(f"{value / 1e12:.2f} T{unit}/s" for unit, value in rate.items()))
    suite.save()
    draw = functools.partial(problems.draw, suite.n, device=device)
    fused = {"fastagop triton": {"backend": "triton"}} if suite.fused else {}
    widths = d or ((1024, 3072) if cuda else (784,))
    for width in widths:
        suite.run(kernel_matrix(draw(width, 1)))
        suite.run(agop(draw(width, 10)))
        suite.run(deep_rfm(draw(width, 10), 1, fused | _TORCH))
    suite.run(solve(draw(widths[0], 10)))
    suite.run(agop(draw(widths[0], 100)))
    suite.run(kernel_matmul(draw(widths[0], 10)))
    suite.run(kernel_matrix(problems.collapsed(suite.n, widths[0], 1e-3, device), "kernel_matrix collapsed"))
    suite.run(deep_rfm(draw(widths[0], 10), 20 if cuda else 2, fused or _TORCH))
    print("\n".join(["", *map(line, suite.rows)]))
    print(f"{time.perf_counter() - suite.start:.0f} s, written to {out}")
