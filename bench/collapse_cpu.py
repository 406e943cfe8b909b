"""What collapse costs on the CPU: seconds and errors by the number of classes and their spread around the centres.

Where many pairs are near, float64 products measure all of them; float32 products with near pairs measured again, which
take longer then, are here beside them, and xrfm and plain torch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from fastagop.kernels.torch_backend import distance, wide

from bench import contenders, costs, files, harness, problems

N, D, K = 3000, 300, 5
# (operation, classes, spread); a spread of 2 is none.
CASES = [("agop", 10, spread) for spread in (2.0, 1e-1, 1e-2, 1e-3, 1e-4)]
CASES += [("kernel_matrix", classes, 1e-2) for classes in (10, 50, 200)]
NAMES = ("fastagop", "xrfm", "torch composition")


def _no(*_) -> bool:
    return False


def apart(op: str, p: problems.Problem) -> torch.Tensor:
    """An operation with float32 products of all pairs, near ones measured again."""
    with mock.patch.object(distance, "many_on_cpu", _no), mock.patch.object(wide, "many_on_cpu", _no):
        return contenders.OPERATIONS[op]["fastagop"](p)


def contending(op: str) -> dict[str, Callable]:
    """Who computes an operation."""
    of_op = contenders.OPERATIONS[op]
    who = {"fastagop": of_op["fastagop"], "fastagop, near pairs apart": functools.partial(apart, op)}
    return contenders.present(who | {name: of_op[name] for name in NAMES if name in of_op})


def problem(n: int, classes: int, spread: float) -> problems.Problem:
    """Unit rows of shuffled classes and random coefficients of K outputs."""
    drawn = problems.collapsed(n, D, spread, classes=classes)
    alpha = torch.randn(n, K, generator=torch.Generator().manual_seed(1))
    return dataclasses.replace(drawn, alpha=alpha)


def main(out: Path, repeats: int, n: int | None = None) -> None:
    """Measure every case in turns, print the table, write the result file."""
    rows = []
    for op, classes, spread in CASES:
        drawn = problem(n or N, classes, spread)
        found = harness.Harness(repeats=repeats).rows(contending(op), drawn, functools.partial(costs.error, op))
        rows += [{"op": op, "classes": classes, "spread": spread} | row for row in found]
    facts = {"n": n or N, "d": D, "K": K, "kernel": repr(problems.LAPLACE), "repeats": repeats}
    files.write_result(out, {"case": facts, "rows": rows})
    print(table(rows))


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    columns = {"": "{op}", "classes": "{classes}", "spread": "{spread:g}", " ": "{contender}"}
    columns |= {"seconds": "{seconds:.3f}", "times fastagop's": "{ratio:.1f}", "relative error": "{error:.0e}"}
    return files.markdown(columns, rows)
