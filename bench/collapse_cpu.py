"""What collapse costs the AGOP on the CPU: seconds and errors by the spread of classes around their centres.

Where many pairs are near, float64 products measure all of them; float32 products with near pairs measured again, which
take longer then, are here beside them, and xrfm and plain torch.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from unittest import mock

import torch
from fastagop.kernels.torch_backend import distance, wide

from bench import contenders, costs, files, harness, problems

N, D, K = 3000, 300, 5
SPREADS = (2.0, 1e-1, 1e-2, 1e-3, 1e-4)
_OPERATION = contenders.OPERATIONS["agop"]


def apart(p: problems.Problem) -> torch.Tensor:
    """The AGOP with float32 products of all pairs, near ones measured again."""
    with mock.patch.object(distance, "many_on_cpu", _no), mock.patch.object(wide, "many_on_cpu", _no):
        return _OPERATION["fastagop"](p)


def _no(*_) -> bool:
    return False


CONTENDERS = {"fastagop": _OPERATION["fastagop"], "fastagop, near pairs apart": apart}
CONTENDERS |= {name: _OPERATION[name] for name in ("xrfm", "torch composition")}


def problem(n: int, spread: float) -> problems.Problem:
    """Unit rows of ten shuffled classes and random coefficients of K outputs."""
    drawn = problems.collapsed(n, D, spread)
    alpha = torch.randn(n, K, generator=torch.Generator().manual_seed(1))
    return dataclasses.replace(drawn, alpha=alpha)


def main(out: Path, repeats: int, n: int | None = None) -> None:
    """Measure every spread in turns, print the table, write the result file."""
    rows, there = [], contenders.present(CONTENDERS)
    for spread in SPREADS:
        drawn = problem(n or N, spread)
        found = harness.Harness(repeats=repeats).rows(there, drawn, functools.partial(costs.error, "agop"))
        rows += [{"spread": spread} | row for row in found]
    facts = {"n": n or N, "d": D, "K": K, "kernel": repr(problems.LAPLACE), "repeats": repeats}
    files.write_result(out, {"case": facts, "rows": rows})
    print(table(rows))


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    columns = {"spread": "{spread:g}", "": "{contender}", "seconds": "{seconds:.3f}", "times fastagop's": "{ratio:.1f}"}
    return files.markdown(columns | {"relative error of M": "{error:.0e}"}, rows)
