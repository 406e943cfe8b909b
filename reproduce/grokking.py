"""Grokking: a recursive feature machine learns modular addition long after it fits its training pairs.

Mallinar, Beaglehole, Zhu, Radhakrishnan, Pandit and Belkin, "Emergence in non-neural models: grokking modular
arithmetic via average gradient outer product" (2024): the training pairs are interpolated from the first iteration on
and test accuracy is that of guessing, until M, whose blocks become circulant, turns the kernel into one of a + b.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastagop import Polynomial, agop, commands, kernel_matmul, solve
from reproduce import files, grokking_plot, options, plots
from reproduce.about import About

NAME = "grokking"
_SOLVED = 0.999  # test accuracy at which there is nothing left to see
_QUICK = {"modulus": 31, "fraction": 0.75}


ABOUT = About(
    "Grokking modular addition (Mallinar et al., 2024)",
    "A kernel machine with a quadratic kernel fits all training pairs at once and guesses on the others, until the "
    "AGOP, iteration by iteration, has found block-circulant features; then it is right on all pairs",
    "a quadratic kernel machine that learns modular addition late, by its AGOP",
    reads_data=False,
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add = parser.add_argument
    text = f"modulus {_QUICK['modulus']}, {_QUICK['fraction']} of the pairs, where not given: seconds"
    add("--quick", action="store_true", help=text)
    add("--modulus", type=commands.count, help="p: the task is (a + b) mod p; default 61")
    add("--fraction", type=options.positive, help="of all pairs, for training; default 0.5")
    add("--iterations", type=commands.count, default=40, help="at most; default %(default)s")
    add("--power", type=options.positive, default=0.5, help="s of M = AGOP^s; default %(default)s")
    add("--ridge", type=options.positive, default=1e-3, help=options.RIDGE)
    add("--seed", type=options.seed, default=0, help="of the choice of training pairs; default %(default)s")
    options.add_out(parser, "out")


def command(args: argparse.Namespace) -> int:
    """Learn, draw, write, and say what to see; 0."""
    plots.require()
    quick = _QUICK if args.quick else {}
    settings = {
        "modulus": args.modulus or quick.get("modulus", 61),
        "fraction": args.fraction or quick.get("fraction", 0.5),
        **{name: getattr(args, name) for name in ("iterations", "power", "ridge", "seed")},
    }
    if settings["modulus"] < 2:
        raise ValueError(f"--modulus must be 2 or more, so that pairs are left to test on, got {settings['modulus']}")
    if settings["fraction"] >= 1:
        raise ValueError(f"--fraction must be below 1, so that pairs are left to test on, got {settings['fraction']}")
    start = time.perf_counter()
    rows, metrics = run(**settings)
    seconds = time.perf_counter() - start
    figure = grokking_plot.draw(rows, pictured(metrics, rows), f"(a + b) mod {settings['modulus']}")
    written = plots.save(figure, args.out / NAME)
    origin = {"settings": settings, "environment": files.environment("cpu"), "seconds": seconds}
    print(f"\n{lesson(rows)}")
    written += _record(args.out / NAME, rows, origin)
    print(f"wrote {', '.join(map(str, written))}")
    return 0


def _record(stem: Path, rows: list[dict[str, Any]], origin: dict[str, Any]) -> list[Path]:
    table, source = stem.with_suffix(".csv"), stem.with_suffix(".json")
    files.write_csv(table, rows)
    files.write_json(source, {"runs": [origin], "lessons": [lesson(rows)]})
    return [table, source]


def run(
    modulus: int, fraction: float, iterations: int, power: float, ridge: float, seed: int
) -> tuple[list[dict[str, Any]], list[Tensor]]:
    """Rows of accuracies and structure, printed as they come, and M, by iteration until the test pairs are right."""
    X, y = pairs(modulus)
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(seed))
    train, test = order.tensor_split([max(1, round(fraction * len(X)))])
    rows, metrics = [], []
    print(f"{'iteration':>9} |{'training':>10}{'test':>8} |{'circulant':>10}")
    for iteration, (M, scores) in zip(range(iterations + 1), learn(X, y, train, test, power, ridge), strict=False):
        rows.append({"iteration": iteration, **scores, "circulant": circulant_share(M)})
        metrics.append(M)
        print("{iteration:>9} |{train:>10.3f}{test:>8.3f} |{circulant:>10.3f}".format(**rows[-1]), flush=True)
        if scores["test"] >= _SOLVED:
            break
    return rows, metrics


def pairs(modulus: int) -> tuple[Tensor, Tensor]:
    """All pairs (a, b) as two one-hot vectors side by side (p^2, 2 p), and (a + b) mod p."""
    a, b = torch.cartesian_prod(torch.arange(modulus), torch.arange(modulus)).T
    one_hot = [torch.nn.functional.one_hot(number, modulus) for number in (a, b)]
    return torch.cat(one_hot, 1).double(), (a + b) % modulus


def learn(
    X: Tensor, y: Tensor, train: Tensor, test: Tensor, power: float, ridge: float
) -> Iterator[tuple[Tensor, dict[str, float]]]:
    """The AGOP and the accuracies of the predictor of every iteration, the first with M = I, without end."""
    kernel, Y = Polynomial(degree=2, offset=0.0, scale=1.0), torch.nn.functional.one_hot(y).double()
    root = torch.eye(X.shape[1], dtype=X.dtype)  # M^(1/2) of the kernel (x^T M z)^2
    while True:
        Z = X @ root
        alpha = solve(kernel, Z[train], Y[train], ridge=ridge).alpha
        scores = {}
        for name, part in (("train", train), ("test", test)):
            predicted = kernel_matmul(kernel, Z[part], Z[train], alpha).argmax(1)
            scores[name] = float((predicted == y[part]).double().mean())
        M = root @ agop(kernel, Z[train], alpha) @ root  # gradients with respect to X are root times those to Z
        yield M, scores
        values, vectors = torch.linalg.eigh(M / M.diagonal().max())
        root = (vectors * values.clamp_min(0) ** (power / 2)) @ vectors.T


def circulant_share(M: Tensor) -> float:
    """R^2 of M's four blocks, each less its mean, explained by the mean along every wrapped diagonal.

    1 where all blocks are circulant. M's own diagonal is left out: every matrix with a strong one would score.
    """
    p = len(M) // 2
    apart = (torch.arange(p)[None, :] - torch.arange(p)[:, None]) % p
    total = left = 0.0
    for row in (slice(p), slice(p, None)):
        for column in (slice(p), slice(p, None)):
            block, counted = M[row, column], apart >= (1 if row == column else 0)
            means = torch.zeros(p, dtype=M.dtype).index_add_(0, apart.flatten(), block.flatten()) / p
            total += float((block[counted] - block[counted].mean()).square().sum())
            left += float((block - means[apart])[counted].square().sum())
    return 1.0 - left / total if total > 0 else 0.0


def pictured(metrics: list[Tensor], rows: list[dict[str, Any]]) -> dict[int, Tensor]:
    """M of the first iteration, of the first that has half of the test pairs right, and of the last."""
    turn = next((row["iteration"] for row in rows if row["test"] >= 0.5), 0)
    return {iteration: metrics[iteration] for iteration in sorted({0, turn, len(metrics) - 1})}


def lesson(rows: list[dict[str, Any]]) -> str:
    """When training and test pairs become right, and how circulant M became."""
    first = next((row["iteration"] for row in rows if row["train"] == 1.0), None)
    clearest, last = max(rows, key=lambda row: row["circulant"]), rows[-1]
    fitted = "never all" if first is None else f"all from iteration {first} on"
    return (
        f"training pairs right: {fitted}; test accuracy {rows[0]['test']:.3f} at first, {last['test']:.3f} after "
        f"{last['iteration']} iterations; circulant matrices explain {100 * rows[0]['circulant']:.0f}% of M at "
        f"first and {100 * clearest['circulant']:.0f}% at iteration {clearest['iteration']}"
    )
