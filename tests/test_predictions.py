"""Predicted seconds on GPUs: they follow from counts, every term is shown, and the page holds what the model says."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from fastagop.kernels.gemm import PanelProducts
from fastagop.kernels.torch_backend.gradients import gradient_aim

from bench import predictions
from bench.__main__ import main
from bench.predictions import CHIPS, MARKS, PAGE, STEPS, UNITS, Problem
from fastagop.solvers.symmetric_blocks import ROWS, SymmetricBlocks, half_bytes

H200, H100, A100, CONSUMER = CHIPS
TERMS = predictions.terms(Problem())


def named(stage: str, words: str, p: Problem | None = None) -> predictions.Term:
    (term,) = (term for term in predictions.terms(p or Problem()) if term.stage == stage and words in term.what)
    return term


def test_the_aims():
    assert predictions.total(H200) < 25.0
    assert predictions.total(A100) < 60.0
    assert predictions.total(H200) <= predictions.total(H100) < predictions.total(A100) < predictions.total(CONSUMER)


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_the_total_is_the_sum_of_what_is_shown(chip):
    shown = sum(term.count / UNITS[term.unit].peak(chip) / UNITS[term.unit].share(chip) * term.layers for term in TERMS)
    again = sum(term.seconds(chip) for term in TERMS if term.again)
    assert predictions.total(chip) == pytest.approx(shown + again)
    assert all(0 < term.floor(chip) <= term.seconds(chip) for term in TERMS)


def test_stages():
    """Everything that a layer does, and what a readout does once more."""
    stages = {
        "fill",
        "near pairs",
        "factor",
        "CG",
        "weights",
        "guard",
        "gradient AGOP",
        "eigh",
        "features",
        "NC",
        "syncs",
    }
    assert {term.stage for term in TERMS} == stages
    assert {term.stage for term in TERMS if term.again} == {"fill", "near pairs", "factor", "CG", "syncs"}


def test_floors_by_hand():
    """n = 50,000, d = 1024, K = 10: a kernel matrix, a float32-accurate AGOP and their bytes by long division."""
    assert named("fill", "X X^T").floor(A100) == pytest.approx(2.5e9 * 1024 / 19.5e12)
    assert named("gradient AGOP", "W (A o X)").floor(H200) == pytest.approx(3 * 2 * 2.5e9 * 1024 * 10 / 989e12)
    assert named("weights", "both halves").floor(H200) == pytest.approx(3 * 1e10 / 4.8e12)
    assert named("factor", "n³ / 3").floor(H200) == pytest.approx(1.25e14 / 989e12)
    assert named("factor", "n³ / 3").seconds(CONSUMER) == pytest.approx(1.25e14 / 3 / 82.6e12 / 0.8)


def test_counts_of_the_factor_by_its_loops():
    """Products, panels, inverses and what is split of ``SymmetricBlocks.cholesky_``, block by block."""
    p = Problem(n=64 * predictions.BLOCK)
    assert ROWS["cuda"] == predictions.BLOCK
    n, b, panels, products, inverses, split = p.n, predictions.BLOCK, 0, 0, 0, 0
    for start in range(0, n, b):
        below = n - start - b
        products += 2 * b * start * (b + below)  # the blocks on and below the diagonal less what lies left of them
        split += 12 * (b + below) * start + 12 * b * (b + below)  # read, read and written as halves; panels, inverses
        panels += b * b * below  # half of an inverse is zero
        inverses += b**3
    assert named("factor", "products", p).count == pytest.approx(products, rel=0.03)
    assert named("factor", "triangle", p).count == pytest.approx(panels, rel=0.03)
    assert named("factor", "inverses", p).count == pytest.approx(inverses)
    assert named("factor", "split", p).count == pytest.approx(split, rel=0.05)


class Counted(PanelProducts):
    """The library's products, counted: floating-point operations of updates and of triangles, items split."""

    def __init__(self):
        self.products = self.triangles = self.split = 0

    def ready(self, A, diagonal=None):
        self.split += A.numel()
        return A.contiguous()

    def subtract_(self, C, A, B):
        self.split += 0 if A is B else A.numel()
        self.products += 2 * C.numel() * A.shape[1]
        super().subtract_(C, A, B)

    def times_triangle_(self, A, T):
        self.split += A.numel()
        self.triangles += A.numel() * len(T)
        super().times_triangle_(A, T)


def test_counts_of_the_factor_by_running_it(monkeypatch):
    monkeypatch.setattr(predictions, "BLOCK", 16)
    n, counted = 1024, Counted()
    blocks = SymmetricBlocks(n, torch.float32, rows=16)
    blocks.fill_(lambda out, start: out.zero_())
    assert blocks.cholesky_(1.0, counted) == 0
    p = Problem(n=n)
    assert named("factor", "products", p).count == pytest.approx(counted.products, rel=0.03)
    assert named("factor", "triangle", p).count == pytest.approx(counted.triangles, rel=0.03)
    assert named("factor", "split", p).count == pytest.approx(12 * counted.split, rel=0.05)


def test_shares_are_those_of_the_machine_code():
    """Of the page's table, whose first number is the least."""
    rows = re.findall(r"^\| (\w+) \| (\w+) \| sm_(\d+) .* (\d+)% to \d+% \|$", PAGE.read_text(), re.MULTILINE)
    found = {(operation, products, int(chip)): int(least) / 100 for operation, products, chip, least in rows}
    for (operation, products), shares in predictions.LOOPS.items():
        for chip, share in shares.items():
            assert share == found[operation, products, chip]


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_splitting_first_pays_where_blocks_do_it(chip):
    """The rule of the Triton backend is on the safe side of every chip's, and the page's blocks are within it."""
    rule = pytest.importorskip("fastagop.kernels.triton_backend.launch", exc_type=ImportError).SPLIT_FIRST
    least = predictions.split_first_from(chip)
    assert 0.5 * rule < least < rule
    b, p = predictions.GRADIENT_BLOCK, Problem()
    assert b == gradient_aim(torch.device("cuda"))[0]
    assert b * p.K * p.d / (b + p.K * p.d) >= rule
    # At the least both ways take the same time: by hand, for a block with as many features of all outputs as rows.
    inside, first = (predictions.LOOPS[loop, "fp16x3"][chip.capability] for loop in ("gradient", "panel"))
    rows, n = 2 * least, 1000.0
    work, split = 2 * rows * rows * n * 3 / chip.fp16, 12 * n * 2 * rows / (0.9 * chip.bandwidth)
    assert work / inside == pytest.approx(work / first + split)


def test_what_is_split_by_its_blocks():
    p = Problem()
    blocks = [min(2048, p.n - start) for start in range(0, p.n, 2048)]
    split = sum(12 * p.n * (rows + p.K * p.d) for rows in blocks)
    assert named("gradient AGOP", "W split").count == pytest.approx(split)


def test_bytes_of_half_a_matrix():
    n = 50_000
    half = half_bytes(n, torch.float64, ROWS["cuda"])
    assert named("fill", "written").count == pytest.approx(half, rel=0.1)
    assert named("factor", "copy").count == pytest.approx(1.5 * half, rel=0.1)


def test_near_tiles_by_counting_them():
    """Of the tiles of the lower half, those with two rows of one class, in sorted classes."""
    p = Problem(n=12_800)
    tiles = p.n // predictions.TILE
    first, last = ([(64 * i + j) * p.K // p.n for i in range(tiles)] for j in (0, 63))
    near = sum(first[i] <= last[j] for i in range(tiles) for j in range(i + 1))
    each = predictions.NEAR_LOOP * p.d * predictions.WARPS
    assert named("near pairs", "instructions", p).count == pytest.approx(near * each, rel=0.06)


def test_steps_of_conjugate_gradients():
    assert len(STEPS) == Problem().depth
    assert (STEPS[0], set(STEPS[1:11]), STEPS[14], STEPS[17], STEPS[18:]) == (2, {3}, 5, 9, (42, 63))
    assert list(STEPS) == sorted(STEPS)
    p = Problem(depth=3)
    assert named("CG", "triangular", p).count == pytest.approx(8 / 3 * p.n / 16)
    passes = [8 * (steps + 1) + 4 * steps for steps in STEPS[:3]]  # K is read twice a product, for each triangle
    assert named("CG", "of k(X, X)", p).count == pytest.approx(sum(passes) / 3 * p.n**2)


def test_other_ways_take_longer():
    for chip in (H200, H100, A100):
        assert predictions.total(chip) < predictions.with_float64(chip) < 2 * predictions.total(chip)
        assert predictions.total(chip) < predictions.with_library(chip)
    assert not any(term.needs.startswith("after ") for term in TERMS)
    table = predictions.table()
    for term in TERMS:
        (row,) = (row for row in table.splitlines() if row.startswith(f"| {term.stage}: {term.what} |"))
        assert row.endswith(f"| {term.layers:g} | {term.needs} |")


def test_a_faster_chip_is_faster():
    for name in ("fp16", "fp64", "fp32", "bandwidth"):
        faster = dataclasses.replace(A100, **{name: 2 * getattr(A100, name)})
        assert predictions.total(faster) < predictions.total(A100)


def test_the_page_holds_what_the_model_says(tmp_path, capsys):
    page = tmp_path / "gpu.md"
    page.write_text(PAGE.read_text())
    assert main(["predictions", "--out", str(page)]) == 0
    assert page.read_text() == PAGE.read_text()  # else: python -m bench predictions
    section = PAGE.read_text().split(MARKS[0])[1].split(MARKS[1])[0]
    assert section.strip().startswith("**PREDICTION, nothing here was measured on a GPU.**")
    assert "PREDICTION" in capsys.readouterr().out


def test_a_page_without_marks(tmp_path, capsys):
    for text in ("", MARKS[0], MARKS[0] + MARKS[1] + MARKS[0]):
        (tmp_path / "page.md").write_text(text)
        assert main(["predictions", "--out", str(tmp_path / "page.md")]) == 2
        assert MARKS[0] in capsys.readouterr().err
        assert (tmp_path / "page.md").read_text() == text


def test_every_unit_is_counted():
    assert {term.unit for term in TERMS} == set(UNITS)
    assert re.search(r"^# Ten minutes|^## First contact", Path(PAGE).read_text(), re.MULTILINE)
