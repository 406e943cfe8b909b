"""Pinned host memory, which comes in powers of two: block rows share pieces of it, and plans count what it takes."""

from __future__ import annotations

import pytest
import torch

from fastagop.solvers import pinned
from fastagop.solvers.symmetric_blocks import shapes_of

SHAPES = {
    "none": [],
    "one": [(3, 5)],
    "alike": [(4, 8)] * 5,
    "half of a matrix": shapes_of(1000, 64),
    "a tail": shapes_of(1000, 300),
    "mixed": [(1, 1), (7, 9), (2, 32), (64, 1), (5, 5)],
}


@pytest.fixture
def taken(monkeypatch):
    """Items of each allocation; nothing is pinned, which needs a GPU."""
    sizes, plain = [], torch.empty

    def empty(*size, pin_memory=False, **options):
        if pin_memory:
            sizes.append(size[0])
        return plain(*size, **options)

    monkeypatch.setattr(torch, "empty", empty)
    return sizes


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matrices_are_apart_and_take_what_is_said(shapes, dtype, taken):
    found = pinned.matrices(shapes, dtype)
    assert [tuple(matrix.shape) for matrix in found] == shapes
    assert all(matrix.is_contiguous() and matrix.dtype == dtype for matrix in found)
    for index, matrix in enumerate(found):
        matrix.fill_(index)
    assert all(bool((matrix == index).all()) for index, matrix in enumerate(found))
    rounded = [1 << (size * dtype.itemsize - 1).bit_length() for size in taken]
    assert pinned.bytes_of(shapes, dtype) == sum(rounded)
    assert sum(taken) == sum(rows * columns for rows, columns in shapes)


@pytest.mark.parametrize("n", [20_000, 50_000, 70_000, 100_000, 200_000])
def test_little_is_lost_to_powers_of_two(n):
    """Block rows by themselves would take 1.3 to 1.5 times their size."""
    shapes = shapes_of(n, 4096)
    assert 1.0 <= pinned.bytes_of(shapes, torch.float64) / sum(8 * rows * columns for rows, columns in shapes) < 1.15
