"""AGOP of all hidden layers of an MLP on the CPU against Jacobians by torch.func: time and peak memory of each."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.func import jacrev, vmap

from bench import clock, files, machine
from fastagop import network

N, D, WIDTH, K, HIDDEN = 2000, 784, 512, 10, 5
LAYERS = [str(2 * i) for i in range(HIDDEN)]  # the Linear layers before the readout, in the Sequential
Agops = dict[str, torch.Tensor]
_PEAK = """
import sys
from bench import clock
from bench.network_cpu import CONTENDERS, problem
name, n = sys.argv[1], int(sys.argv[2])
CONTENDERS[name](*problem(n=64))  # libraries loaded, threads started
model, X = problem(n)
print(clock.peak_bytes(lambda: CONTENDERS[name](model, X), clock.CPU))
"""


def problem(n: int = N) -> tuple[nn.Sequential, torch.Tensor]:
    """The paper's MLP for MNIST with torch's own initialisation, and n Gaussian inputs."""
    torch.manual_seed(0)
    widths = [D] + HIDDEN * [WIDTH]
    hidden = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b, bias=False), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(WIDTH, K, bias=False)), torch.randn(n, D)


def work(n: int) -> float:
    """The least operations: one forward pass, K vector-Jacobian products, and half of each layer's G^T G."""
    widths = [D] + HIDDEN * [WIDTH]
    weights = sum(a * b for a, b in itertools.pairwise(widths)) + WIDTH * K
    return n * (2.0 * weights * (1 + K) + K * sum(min(a, b) ** 2 for a, b in itertools.pairwise(widths)))


def traffic(n: int) -> float:
    """The least bytes: inputs and weights read once, AGOPs written once."""
    widths = [D] + HIDDEN * [WIDTH]
    return 4.0 * (n * D + sum(a * b for a, b in itertools.pairwise(widths)) + sum(a * a for a in widths[:-1]))


def ours(model: nn.Sequential, X: torch.Tensor) -> Agops:
    """fastagop.network.agop."""
    return network.agop(model, X, LAYERS)


def jacobians(model: nn.Sequential, X: torch.Tensor, chunk: int | None = None) -> Agops:
    """vmap(jacrev) of the rest of the network at every layer, and one product for its AGOP."""
    found = {}
    with torch.no_grad():
        for i, name in enumerate(LAYERS):
            J = vmap(jacrev(model[2 * i :]), chunk_size=chunk)(X).reshape(-1, X.shape[1])
            found[name] = J.T @ J / len(X)
            X = model[2 * i : 2 * i + 2](X)
    return found


def chunked(model: nn.Sequential, X: torch.Tensor) -> Agops:
    """The same in chunks of 256 samples, which still hold the layer's whole Jacobian in the end."""
    return jacobians(model, X, 256)


CONTENDERS: dict[str, Callable[[nn.Sequential, torch.Tensor], Agops]] = {
    "fastagop": ours,
    "vmap(jacrev)": jacobians,
    "vmap(jacrev), chunks of 256": chunked,
}


def measure(repeats: int, n: int = N) -> list[dict]:
    """One row per contender."""
    model, X = problem(n)
    plain = jacobians(model, X)
    calls = {name: functools.partial(run, model, X) for name, run in CONTENDERS.items()}
    rows = []
    for row in clock.interleaved(calls, "fastagop", repeats):
        found = row.pop("result")
        difference = max(float((found[at] - M).norm() / M.norm()) for at, M in plain.items())
        facts = {"n": n, "width": WIDTH, "K": K, "layers": HIDDEN, **row}
        rows.append(facts | {"peak_bytes": int(clock.alone(_PEAK, row["contender"], n)), "difference": difference})
    return rows


def main(out: Path, repeats: int, n: int | None = None) -> None:
    """Measure, print the table, write the result file."""
    rows = measure(repeats, n or N)
    files.write_json(out, {"machine": machine.describe(), "repeats": repeats, "rows": rows})
    print(table(rows))


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    lines = [
        f"| five layers, n = {rows[0]['n']}, width 512, K = 10 "
        "| seconds | times fastagop's | peak memory | difference of M |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['contender']} | {r['seconds']:.2f} | {r['ratio']:.1f} "
        f"| {r['peak_bytes'] / 1e6:.0f} MB | {r['difference']:.0e} |"
        for r in rows
    ]
    return "\n".join(lines)
