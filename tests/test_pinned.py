"""Pinned host memory, which comes in powers of two: block rows share pieces of it, and plans count what it takes."""

from __future__ import annotations

import pytest
import torch
from fastagop.kernels import plan
from fastagop.kernels.memory import free

from fastagop.solvers import pinned
from fastagop.solvers.symmetric_blocks import SymmetricBlocks, shapes_of

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


# ---- what PyTorch keeps of it


@pytest.fixture
def cache(monkeypatch):
    """What is done to PyTorch's cache of pinned memory, as of a process that has used a GPU."""
    done = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append(str(device)))
    monkeypatch.setattr(torch.accelerator, "empty_host_cache", lambda: done.append("public"), raising=False)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: done.append("private"), raising=False)
    return done


def test_what_is_kept_is_returned_once_copies_have_ended(cache, monkeypatch):
    pinned.give_back(torch.device("cuda:1"))
    assert cache == ["cuda:1", "public"]
    monkeypatch.delattr(torch.accelerator, "empty_host_cache")  # PyTorch 2.6
    pinned.give_back(torch.device("cuda:1"))
    assert cache[2:] == ["cuda:1", "private"]
    monkeypatch.delattr(torch._C, "_host_emptyCache")
    pinned.give_back(torch.device("cuda:1"))
    assert len(cache) == 4


def test_nothing_is_returned_before_cuda_is_used(cache, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    pinned.give_back(torch.device("cuda"))
    assert cache == []


def test_memory_that_was_returned_is_seen_at_once(cache, monkeypatch):
    """A reading of the host's memory is good for a while otherwise."""
    readings = iter([3, 5])
    monkeypatch.setattr(free, "_free_bytes", lambda: next(readings))
    free.forget()
    assert [free.host_bytes(), free.host_bytes()] == [3, 3]
    pinned.give_back(torch.device("cuda"))
    assert free.host_bytes() == 5
    free.forget()


def test_a_small_part_of_free_memory_is_there_without_another_reading(monkeypatch):
    readings = iter([3200, 50])
    monkeypatch.setattr(free, "_free_bytes", lambda: next(readings))
    free.forget()
    assert not free.plenty(0)  # nothing has been read
    free.host_bytes()
    assert (free.plenty(100), free.plenty(101)) == (True, False)
    assert plan.fits(100, None, torch.device("cpu"))
    assert not plan.fits(100, 99, torch.device("cpu"))  # the caller's limit counts in any case
    later = free.time.monotonic() + 2.0
    monkeypatch.setattr(free.time, "monotonic", lambda: later)
    assert not free.plenty(100)
    assert not plan.fits(100, None, torch.device("cpu"))  # it was read again
    free.forget()


@pytest.mark.parametrize(
    ("stats", "held"),
    [
        (lambda: {}, 0),
        (lambda: {"allocated_bytes.current": 8, "active_bytes.current": 2}, 8),
        (lambda: {"allocated_bytes.current": 2, "reserved_bytes.current": 8}, 8),  # earlier versions' words
        (None, float("inf")),
    ],
)
def test_bytes_that_pytorch_has(stats, held, monkeypatch):
    monkeypatch.setattr(torch.cuda, "host_memory_stats", stats, raising=False)
    assert pinned.held_bytes() == held


def test_dropped_blocks_are_returned(cache, taken, monkeypatch):
    half = SymmetricBlocks(8, torch.float64, rows=3, place="host")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: cache.append(len(half.blocks)))
    half.drop()
    assert cache == [0, "public"]
    other = SymmetricBlocks(8, torch.float64, rows=3)
    other.drop()
    assert len(cache) == 2
