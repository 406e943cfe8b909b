"""Predicted seconds of a Deep RFM on GPUs, from counts and rates: a model, in which nothing was measured on a GPU.

Every term is a count (operations, bytes, instructions, dependent launches) over a rate, and a rate is the vendor's peak
times the share of it that such work is taken to reach. ``python -m bench predictions`` writes the table into
docs/pages/gpu.md. Terms are what the code does now, with the solver that the table of solvers takes on these chips.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.checkout import ROOT

PAGE = ROOT / "docs/pages/gpu.md"
MARKS = "<!-- predictions -->", "<!-- /predictions -->"


@dataclass(frozen=True)
class Chip:
    """Peaks of a chip by its vendor's data sheet (dense, without sparsity).

    Attributes:
        fp16: floating-point operations a second of tensor cores, fp16 factors and float32 sums.
        fp64: of float64 products, on tensor cores where there are such.
        fp64_vector: of float64 arithmetic outside them.
        fp32: of float32 arithmetic.
        bandwidth: bytes a second of the memory.
        sms: multiprocessors, of four schedulers each.
        clock: cycles a second.
        capability: whose compiled launches it takes.
    """

    name: str
    fp16: float
    fp64: float
    fp64_vector: float
    fp32: float
    bandwidth: float
    sms: int
    clock: float
    capability: int


CHIPS = (
    Chip("H200", 989e12, 67e12, 34e12, 67e12, 4.8e12, 132, 1.755e9, 90),
    Chip("H100 SXM", 989e12, 67e12, 34e12, 67e12, 3.35e12, 132, 1.755e9, 90),
    Chip("A100 80 GB", 312e12, 19.5e12, 9.7e12, 19.5e12, 2.04e12, 108, 1.41e9, 80),
    Chip("RTX 4090", 165e12, 1.29e12, 1.29e12, 82.6e12, 1.01e12, 128, 2.52e9, 80),
)
# Share of the tensor cores' peak that compiled loops reach at the least, by the cycles of their instructions: from the
# page's table of the machine code, as tests compare.
LOOPS = {
    ("panel", "fp16x3"): {80: 0.79, 90: 0.82},
    ("gradient", "fp16x3"): {80: 0.57, 90: 0.52},
    ("matrix", "fp64"): {80: 0.81, 90: 0.68},
}


@dataclass(frozen=True)
class Unit:
    """What is counted: its rate at the peak and the share of that which is assumed, both of a chip, and why."""

    words: str
    peak: Callable[[Chip], float]
    share: Callable[[Chip], float]
    why: str


def _loop(operation: str, products: str, words: str, peak: Callable[[Chip], float]) -> Unit:
    """What a compiled loop does."""
    why = "the least of the table of the machine code"
    return Unit(words, peak, lambda c: LOOPS[operation, products][c.capability], why)


def _split_pays(chip: Chip) -> bool:
    """Whether a float32 factor's products are the faster ones as three fp16 products, as ``products_of`` asks."""
    return LOOPS["panel", "fp16x3"][chip.capability] * chip.fp16 / 3.0 >= 0.8 * chip.fp32


UNITS = {
    "panel": Unit(
        "flop of panels",
        lambda c: c.fp16 / 3.0 if _split_pays(c) else c.fp32,
        lambda c: LOOPS["panel", "fp16x3"][c.capability] if _split_pays(c) else 0.8,
        "three fp16 products, the least of the table of the machine code; the library's float32 where faster",
    ),
    "gradient": _loop("panel", "fp16x3", "flop of gradients as three fp16 products", lambda c: c.fp16 / 3.0),
    "wide": _loop("matrix", "fp64", "float64 flop, own kernel", lambda c: c.fp64),
    "library64": Unit("float64 flop, library", lambda c: c.fp64, lambda c: 0.8, "large library products"),
    "crowd64": Unit("float64 flop, crowds", lambda c: c.fp64, lambda c: 0.7, "library products of a class and a block"),
    "library32": Unit("float32 flop, library", lambda c: c.fp32, lambda c: 0.8, "large library products"),
    "square32": Unit("float32 flop, 1024 rows at once", lambda c: c.fp32, lambda c: 0.5, "64 tiles for all processors"),
    "instruction64": Unit("float64 instructions", lambda c: c.fp64_vector / 2.0, lambda c: 0.8, "no waits for memory"),
    "instruction": Unit(
        "warp instructions",
        lambda c: 4.0 * c.sms * c.clock,
        lambda c: 0.85,
        "near tiles then take the 17-fold time of a normal one that their compiled loop was read to take",
    ),
    "streamed": Unit("bytes, streamed", lambda c: c.bandwidth, lambda c: 0.9, "large copies"),
    "skinny": Unit("bytes, times a few vectors", lambda c: c.bandwidth, lambda c: 0.6, "products with K columns"),
    "step": Unit("dependent steps", lambda c: 1 / 2e-6, lambda c: 1.0, "2 µs inside a triangular solve; a guess"),
    "launch": Unit("dependent launches", lambda c: 1 / 10e-6, lambda c: 1.0, "10 µs with the wait before it; a guess"),
    "normal": Unit("normals on the host", lambda c: 6e7, lambda c: 1.0, "torch's generator on one core"),
}
LAYERS = 20
# Steps of conjugate gradients on a float32 factor to 1e-9, by layer: measured for layers 1, 2 to 11, 15, 18, 19 and 20
# on MNIST in float64 on a CPU (n = 2000, Laplace), filled in between.
STEPS = (2, *[3] * 10, 4, 4, 5, 5, 6, 8, 9, 42, 63)
NEAR_FROM = {"float32": 3, "float64": 11}  # the layer from which all pairs of a class are near, by bound; the second
# is a cautious guess for a bound of 2^-36
EPILOGUE = 60  # float64 instructions of a pair's square root and exponential, or of a logarithm and a division
# Instructions of a feature in the near path, as read of the loop before it was shortened; rows and warps of a tile.
NEAR_LOOP, TILE, WARPS = 206, 64, 8
BLOCK = 4096  # rows of a block of the stored half
GRADIENT_BLOCK = 2048  # rows of a block of gradients
SPLIT_BYTES = 12  # of an item that is split: read twice, written as halves


@dataclass(frozen=True)
class Problem:
    """Rows, features, outputs (classes) and layers; width of the features = features."""

    n: int = 50_000
    d: int = 1024
    K: int = 10
    depth: int = LAYERS


@dataclass(frozen=True)
class Term:
    """Work of one kind.

    Attributes:
        stage: of a layer.
        what: is done.
        count: of a layer in which it happens.
        unit: a key of UNITS.
        layers: in which it happens.
        again: whether the readout, which only solves, does it once more.
        needs: what it rests on.
    """

    stage: str
    what: str
    count: float
    unit: str
    layers: float
    again: bool = False
    needs: str = ""

    def floor(self, chip: Chip) -> float:
        """Seconds of a layer at the peak."""
        return self.count / UNITS[self.unit].peak(chip)

    def seconds(self, chip: Chip) -> float:
        """Predicted seconds of a layer in which it happens."""
        return self.floor(chip) / UNITS[self.unit].share(chip)

    def total(self, chip: Chip) -> float:
        """Predicted seconds of all layers and the readout."""
        return self.seconds(chip) * (self.layers + self.again)


# What terms rest on.
_ROWS = "rows of a layer sorted by class"
_BOUND = f"a near bound of 2^-36 for rounded points, {_ROWS}"


def terms(p: Problem) -> list[Term]:
    """What a Deep RFM does, layer by layer; K is the number of classes, too."""
    return [*_fill(p), *_solve(p), *_weights(p), *_agop(p), *_rest(p)]


def _fill(p: Problem) -> list[Term]:
    n, d, each = float(p.n), p.d, p.depth
    tiles = 0.5 * (n / TILE) ** 2 / p.K
    late = max(0, each - NEAR_FROM["float64"] + 1)
    return [
        Term("fill", "half of X X^T in float64: n² d", n * n * d, "wide", each, True),
        Term("fill", f"{EPILOGUE} instructions a pair: n² / 2", EPILOGUE * n * n / 2, "instruction64", each, True),
        Term("fill", "half a matrix written: 4 n²", 4 * n * n, "streamed", each, True),
        Term(
            "near pairs",
            f"{NEAR_LOOP} d instructions, {WARPS} warps, in 1 / K of the tiles",
            tiles * NEAR_LOOP * d * WARPS,
            "instruction",
            late,
            True,
            _BOUND,
        ),
    ]


def _solve(p: Problem) -> list[Term]:
    n, each = float(p.n), p.depth
    return [
        Term("factor", "float32 copy of the half: 6 n²", 6 * n * n, "streamed", each, True),
        Term(
            "factor",
            f"block rows read twice and split, once a step: 2 n³ / {BLOCK}, and panels: 6 n²",
            2 * n**3 / BLOCK + 6 * n * n,
            "streamed",
            each,
            True,
        ),
        Term("factor", "products: n³ / 3", n**3 / 3, "panel", each, True),
        Term("factor", f"panels times a triangle: {BLOCK} n² / 2", BLOCK * n * n / 2, "panel", each, True),
        Term("factor", f"inverses of the blocks: {BLOCK}² n", BLOCK**2 * n, "library32", each, True),
        Term("factor", "blocks' own factors: 3 n / 64 launches", 3 * n / 64, "launch", each, True),
        *_refinement(p),
    ]


def _refinement(p: Problem) -> list[Term]:
    n, each, steps = float(p.n), p.depth, _steps(p)
    passes = f"{steps:.1f} steps: 8 n² of k(X, X), and once more; 4 n² of L"
    return [
        Term("CG", passes, (8 * (steps + 1) + 4 * steps) * n * n, "skinny", each, True),
        Term("CG", f"{steps:.1f} steps: 2 n / 32 in triangular solves", steps * n / 16, "step", each, True),
    ]


def _steps(p: Problem) -> float:
    """Mean over the layers."""
    found = [STEPS[min(layer, len(STEPS) - 1)] for layer in range(p.depth)]
    return sum(found) / p.depth


def _weights(p: Problem) -> list[Term]:
    n, each = float(p.n), p.depth
    late = max(0, each - NEAR_FROM["float32"] + 1)
    return [
        Term("weights", f"{EPILOGUE} instructions a pair: n² / 2", EPILOGUE * n * n / 2, "instruction64", each),
        Term("weights", "logarithm, quotient, factor, zeros: 36 n²", 36 * n * n, "streamed", each),
        Term("weights", "rows of float32 from both halves: 12 n²", 12 * n * n, "streamed", each),
        Term("guard", "largest weight of every row: 4 n²", 4 * n * n, "streamed", each),
        Term("guard", "near pairs found and taken out of the rows: 100 n²", 100 * n * n, "streamed", late, needs=_ROWS),
    ]


def _agop(p: Problem) -> list[Term]:
    n, d, K, each = float(p.n), p.d, p.K, p.depth
    late = max(0, each - NEAR_FROM["float32"] + 1)
    crowds = "float64 products of the pairs of a class: 2 n² d (1 + 1 / K)"
    return [
        Term("gradient AGOP", "W alpha: 4 n²", 4 * n * n, "skinny", each),
        Term("gradient AGOP", "W (A o X): 2 n² d K", 2 * n * n * d * K, "gradient", each),
        Term(
            "gradient AGOP",
            f"W split, and A o X once a block of {GRADIENT_BLOCK} rows: {SPLIT_BYTES} (n² + n K d blocks)",
            SPLIT_BYTES * (n * n + n * K * d * -(-p.n // GRADIENT_BLOCK)),
            "streamed",
            each,
        ),
        Term("gradient AGOP", "G^T G: 2 n K d²", 2 * n * K * d * d, "square32", each),
        Term("gradient AGOP", "G written twice, looked at, read twice: 20 n K d", 20 * n * K * d, "streamed", each),
        Term("gradient AGOP", f"near pairs, {crowds}", 2 * n * n * d * (1 + 1 / K), "crowd64", late, needs=_ROWS),
        Term(
            "gradient AGOP", "near pairs, 100 for each 2048 rows", 100 * n / GRADIENT_BLOCK, "launch", late, needs=_ROWS
        ),
    ]


def _rest(p: Problem) -> list[Term]:
    n, d, each = float(p.n), p.d, p.depth
    return [
        Term("eigh", "float64, 6 launches a column", 6.0 * d, "launch", each),
        Term("eigh", "9 d³ of float64", 9.0 * d**3, "library64", each),
        Term("features", "projection and map: 4 n d²", 4 * n * d * d, "library32", each),
        Term("features", "d² normals drawn on the host", 1.0 * d * d, "normal", each),
        Term("NC", "18 passes over the rows: 72 n d", 72 * n * d, "streamed", each),
        Term("syncs", "150 looks of the host", 150.0, "launch", each, True),
    ]


def split_first_from(chip: Chip) -> float:
    """The least b K d / (b + K d) of a block from which splitting before the product of gradients is the faster.

    Splitting b rows of W and K d of A o X takes SPLIT_BYTES n (b + K d) of memory; of 2 b n K d operations each is then
    done by the loop that splits nothing.
    """
    inside, first = (LOOPS[loop, "fp16x3"][chip.capability] for loop in ("gradient", "panel"))
    won = 2.0 * 3.0 / chip.fp16 * (1.0 / inside - 1.0 / first)
    return SPLIT_BYTES / (chip.bandwidth * UNITS["streamed"].share(chip)) / won


def total(chip: Chip, p: Problem | None = None) -> float:
    """Predicted seconds of all layers and the readout."""
    p = p or Problem()
    return sum(term.total(chip) for term in terms(p))


def with_library(chip: Chip, p: Problem | None = None) -> float:
    """The same with the factor's products by the library in float32, as the torch backend has them."""
    p = p or Problem()
    changed = [replace(term, unit="library32") if term.unit == "panel" else term for term in terms(p)]
    return sum(term.total(chip) for term in changed)


def with_float64(chip: Chip, p: Problem | None = None) -> float:
    """The same with a float64 factor by the library and no steps behind it: n³ / 3 and one pass of its solves."""
    p = p or Problem()
    n = float(p.n)
    kept = [term for term in terms(p) if term.stage not in ("factor", "CG")]
    factor = Term("factor", "float64", n**3 / 3, "library64", p.depth, True)
    solved = Term("factor", "two triangular solves", 8 * n * n, "skinny", p.depth, True)
    steps = Term("factor", "their steps", n / 16, "step", p.depth, True)
    return sum(term.total(chip) for term in (*kept, factor, solved, steps))


def table(p: Problem | None = None) -> str:
    """The terms and the totals in Markdown, marked as predictions."""
    p = p or Problem()
    made = terms(p)
    lines = ["| milliseconds a layer | count | in | " + " | ".join(f"{c.name} floor, predicted" for c in CHIPS) + " |"]
    lines[0] += " layers | needs |"
    lines.append("|---" * (len(CHIPS) + 5) + "|")
    for term in made:
        cells = [f"{_ms(term.floor(c))}, {_ms(term.seconds(c))}" for c in CHIPS]
        unit = UNITS[term.unit].words
        cells = [f"{term.stage}: {term.what}", f"{term.count:.3g}", unit, *cells, f"{term.layers:g}", term.needs]
        lines.append(f"| {' | '.join(cells)} |")
    seconds = [f"**{total(c, p):.0f} s**" for c in CHIPS]
    library, wide = ([f"{by(c, p):.0f} s" for c in CHIPS] for by in (with_library, with_float64))
    lines.append(f"| **{p.depth} layers and a readout, predicted** | | | {' | '.join(seconds)} | | |")
    lines.append(f"| the same, the factor by the library's float32 products | | | {' | '.join(library)} | | |")
    lines.append(f"| the same, a float64 factor by the library and no CG | | | {' | '.join(wide)} | | |")
    return "\n".join(lines)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"


def rates() -> str:
    """The rates in Markdown."""
    lines = ["| counted | " + " | ".join(c.name for c in CHIPS) + " | share of the peak, and why |"]
    lines.append("|---" * (len(CHIPS) + 2) + "|")
    for unit in UNITS.values():
        shares = sorted({unit.share(c) for c in CHIPS})
        words = " to ".join(f"{share:g}" for share in shares)
        lines.append(f"| {unit.words} | {' | '.join(f'{unit.peak(c):.3g}' for c in CHIPS)} | {words}: {unit.why} |")
    return "\n".join(lines)


def section(p: Problem | None = None) -> str:
    """What stands between the marks of the page."""
    p = p or Problem()
    head = f"**PREDICTION, nothing here was measured on a GPU.** n = {p.n:,}, d = width = {p.d}, K = {p.K}, Laplace, "
    head += '`backend="triton"`, `precision="highest"`. A layer\'s terms are taken one after the other.'
    middle = "Peaks a second by the vendors' data sheets:"
    return f"{head}\n\n{table(p)}\n\n{middle}\n\n{rates()}"


def write(page: Path = PAGE) -> None:
    """Put the section between the marks of the page; ValueError where it lacks them."""
    text = page.read_text()
    if any(text.count(mark) != 1 for mark in MARKS):
        raise ValueError(f"{page} must have the marks {' and '.join(MARKS)} once each; put them where the table is due")
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    page.write_text(f"{before}{MARKS[0]}\n{section()}\n{MARKS[1]}{after}")


def command(argv: Sequence[str]) -> int:
    """Print the section and write it into the page."""
    made = argparse.ArgumentParser(prog="python -m bench predictions", description=__doc__)
    made.add_argument("--out", type=Path, default=PAGE, help="a page with the marks; default docs/pages/gpu.md")
    given = made.parse_args(argv)
    from fastagop import commands

    def run() -> None:
        write(given.out)
        print(section())

    return commands.run("python -m bench predictions", run)
