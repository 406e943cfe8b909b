"""A whole RFM on the CPU at equal settings: fastagop, xrfm's RFM, the authors' update, and the floor of the work.

The torch composition is the authors' update with one kernel matrix an iteration where their code makes three. The error
is that of the predictions halfway between rows, against that composition in float64. The floor is the time
of the products and exponentials alone at the rates that large ones reach in the same run.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import fastagop
from bench import clock, costs, files, harness, peers, problems, scale_cpu
from bench.contenders import present

KERNEL, RIDGE = fastagop.Laplace(10.0), 1e-3
_CHECKED = 500  # rows that are predicted
_RATE = 2**22  # exponentials of which their rate is measured
_WARM = 60  # rows of the call that comes before all others


@dataclass(frozen=True, eq=False)
class Fit(problems.Problem):
    """Standardised rows and centred targets, ``alpha``, for so many iterations."""

    iterations: int = field(kw_only=True)
    turns: int = field(default=1, kw_only=True)  # a fit of milliseconds is timed so many times as often

    @property
    def Z(self) -> torch.Tensor:
        """New rows, halfway between neighbouring ones."""
        return (0.5 * (self.X + self.X.roll(1, 0)))[:_CHECKED]

    def first(self, n: int) -> Fit:
        """One iteration on a few rows, which loads and starts what there is."""
        few = min(n, _WARM)
        return dataclasses.replace(self, X=self.X[:few], alpha=self.alpha[:few], y=self.y[:few], iterations=1)


def _fit(X: torch.Tensor, Y: torch.Tensor, iterations: int, turns: int = 1) -> Fit:
    X, Y = X.double(), Y.double()
    X = (X - X.mean(0)) / X.std(0).clamp(min=1e-6)
    nothing = torch.zeros(len(X), dtype=torch.long)
    return Fit(X.float(), (Y - Y.mean(0)).float(), nothing, KERNEL, ridge=RIDGE, iterations=iterations, turns=turns)


def bundled(name: str, rows: int, iterations: int, turns: int = 1) -> Fit:
    """The first rows of a table of scikit-learn's, and its one-hot labels."""
    from sklearn import datasets

    X, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    labels = torch.nn.functional.one_hot(torch.as_tensor(y)[:rows])
    return _fit(torch.as_tensor(X)[:rows], labels, iterations, turns)


def normal(n: int, d: int, iterations: int) -> Fit:
    """Normal rows and the product of two of their features, plus a third."""
    X = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    return _fit(X, (X[:, 0] * X[:, 1] + X[:, 2])[:, None], iterations)


CASES: dict[str, Callable[[], Fit]] = {
    "wine": functools.partial(bundled, "wine", 178, 5, 15),
    "few rows, many features": functools.partial(normal, 300, 1536, 3),
    "normal": functools.partial(normal, 2000, 100, 5),
    "digits": functools.partial(bundled, "digits", 1437, 5),
}


def ours(p: Fit) -> peers.Predictor:
    """fastagop's regressor."""
    options = {"kernel": p.kernel, "iterations": p.iterations, "ridge": p.ridge, "device": "cpu"}
    return fastagop.RFMRegressor(**options, fit_intercept=False).fit(p.X, p.alpha).predict


def _by(fit: Callable[..., peers.Predictor]) -> Callable[[Fit], peers.Predictor]:
    return lambda p: fit(p.X, p.alpha, KERNEL.bandwidth, p.ridge, p.iterations)


CONTENDERS: dict[str, Callable] = {
    "fastagop": ours,
    "xrfm": _by(peers.xrfm_rfm),
    "authors' update": _by(peers.authors_rfm),
    "torch composition": _by(peers.composition_rfm),
}


@functools.lru_cache(maxsize=1)
def truth(p: Fit) -> torch.Tensor:
    """The predictions in float64."""
    return peers.composition_rfm(p.X.double(), p.alpha.double(), KERNEL.bandwidth, p.ridge, p.iterations)(p.Z.double())


def error(p: Any, predict: peers.Predictor) -> float:
    """Relative error of the predictions."""
    return costs.relative(predict(p.Z).double().reshape(truth(p).shape) - truth(p), truth(p))


def rates() -> dict[str, float]:
    """Operations a second of large products, and exponentials."""
    block = torch.rand(_RATE).neg_()
    taken = [clock.seconds(lambda: torch.exp(block), clock.CPU, 1) for _ in range(3)]
    return scale_cpu.rates() | {"exponentials": block.numel() / statistics.median(taken)}


def floor(p: Fit, rate: dict[str, float]) -> float:
    """Seconds of the least work: where n < d, everything happens among the n dimensions that the rows span."""
    width = min(p.n, p.d)
    steps = scale_cpu.floors(p.n, width, p.K, rate)
    projection = 2.0 * p.n * width**2 / rate["float32"]
    exponentials = 0.5 * p.n**2 / rate["exponentials"]
    once = p.n**2 * p.d / rate["float64"] if p.n < p.d else 0.0
    return once + p.iterations * (steps["layer"] + projection + exponentials) + steps["solve"] + exponentials


def main(out: Path, repeats: int) -> None:
    """Measure every case in turns, print the table, write the result file."""
    rate, rows = rates(), []
    who, missing = _there()
    for name, make in CASES.items():
        p = make()
        place = {"case": name, "n": p.n, "d": p.d, "K": p.K, "iterations": p.iterations, "floor": floor(p, rate)}
        found = harness.Harness(repeats=repeats * p.turns).rows(who, p, error)
        rows += [place | row for row in found + missing]
        print(table(rows[-len(CONTENDERS) :]).split("\n", 2)[2], flush=True)
    case = {"kernel": f"Laplace({KERNEL.bandwidth})", "ridge": RIDGE, "dtype": "float32", "repeats": repeats}
    files.write_result(out, {"case": case, "rates": rate, "rows": rows})
    print(f"\n{table(rows)}")


def _there() -> tuple[dict[str, Callable], list[dict]]:
    """The contenders that can run, and a row for each that is not installed."""
    there = present(CONTENDERS)
    return there, [{"contender": name, "note": "xrfm is not installed"} for name in CONTENDERS if name not in there]


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    columns = {"": "{case}", "n": "{n}", "d": "{d}", "K": "{K}", "iterations": "{iterations}", " ": "{contender}"}
    columns |= {"seconds": "{took}", "times fastagop's": "{times}", "times the floor": "{over}"}
    columns |= {"error of predictions": "{off}"}
    return files.markdown(columns, [row | _words(row) for row in rows])


def _words(row: dict) -> dict:
    if "note" in row:
        return {"took": row["note"], "times": "", "over": "", "off": ""}
    over = f"{row['seconds'] / row['floor']:.1f}"
    return {"took": f"{row['seconds']:.3g}", "times": f"{row['ratio']:.2f}", "over": over, "off": f"{row['error']:.0e}"}
