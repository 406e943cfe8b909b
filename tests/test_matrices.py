"""Matrices for work: their dtype and rows, and the memory that a fit keeps for the next one of a size."""

from __future__ import annotations

import contextvars
import threading
import tracemalloc

import pytest
import torch
from fastagop.kernels.memory import matrices
from fastagop.kernels.memory.matrices import empty_matrix, kept_matrices

LIKE = torch.zeros(1)
N = 1100  # float32 items of N^2 are beyond the size from which memory is kept


@pytest.fixture
def nothing_spare(monkeypatch):
    monkeypatch.setattr(matrices, "_spare", [])


@pytest.mark.parametrize("rows", [3, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_empty_matrix_has_the_dtype_asked_for(rows, dtype):
    like = torch.zeros(1, dtype=dtype)
    assert matrices.empty_matrix(rows, 1500, like).dtype == dtype
    wide = matrices.empty_matrix(rows, 1500, like, torch.float64)
    assert (wide.dtype, wide.shape, wide.device) == (torch.float64, (rows, 1500), like.device)


@pytest.mark.parametrize(("columns", "apart"), [(1, 16), (16, 16), (37, 48)])
def test_rows_of_work_on_a_gpu_are_aligned(columns, apart):
    like = torch.empty(0, device="meta")
    for made in (matrices.empty_matrix(3, columns, like), matrices.wide_rows(3, columns, like)):
        assert made.shape == (3, columns)
        assert made.stride() == (apart, 1)


@pytest.mark.usefixtures("nothing_spare")
def test_memory_of_a_fit_begins_with_a_huge_page_and_a_matrix_alone_takes_no_more_than_it_holds():
    with kept_matrices():
        assert [empty_matrix(N + i, N, LIKE).data_ptr() % 2**21 for i in range(3)] == [0] * 3
    tracemalloc.start()
    try:
        alone = empty_matrix(N, N, LIKE)
        assert tracemalloc.get_traced_memory()[0] <= alone.nbytes + 2**14
    finally:
        tracemalloc.stop()


@pytest.mark.usefixtures("nothing_spare")
def test_memory_of_a_matrix_that_is_gone_serves_the_next_of_its_size_within_a_fit():
    with kept_matrices():
        first = empty_matrix(N, N, LIKE)
        place, view = first.data_ptr(), first[3:, 5:]
        del first
        assert empty_matrix(N, N, LIKE).data_ptr() != place  # a part of it is still used
        del view
        with kept_matrices():  # a fit within a fit
            assert empty_matrix(N, N, LIKE).data_ptr() == place


@pytest.mark.usefixtures("nothing_spare")
def test_memory_serves_another_dtype_of_as_many_bytes():
    with kept_matrices():
        place = empty_matrix(N, N, LIKE).data_ptr()
        assert empty_matrix(N // 2, N, LIKE, torch.float64).data_ptr() == place


@pytest.mark.usefixtures("nothing_spare")
def test_some_memory_stays_for_the_next_fit_and_what_is_used_does_not(monkeypatch):
    monkeypatch.setattr(matrices, "_STAYS", 2 * 4 * N * N)
    with kept_matrices():
        first, *others = [empty_matrix(N, N, LIKE) for _ in range(5)]
        places = [matrix.data_ptr() for matrix in others]
        del others
    assert [buffer.ctypes.data for buffer in matrices._spare] == places[:2]
    with kept_matrices():
        assert matrices._spare == []
        assert empty_matrix(N, N, LIKE).data_ptr() in places[:2]
    assert sorted(buffer.ctypes.data for buffer in matrices._spare) == sorted(places[:2])
    assert first.numel() == N * N


def test_two_matrices_never_share_memory():
    with kept_matrices():
        there = [empty_matrix(N, N, LIKE).fill_(i) for i in range(4)]
        del there[1]
        there.append(empty_matrix(N, N, LIKE).fill_(4))
        assert [float(m.min()) for m in there] == [float(m.max()) for m in there] == [0, 2, 3, 4]


@pytest.mark.usefixtures("nothing_spare")
def test_memory_that_no_request_fits_is_given_back():
    with kept_matrices():
        empty_matrix(N, N, LIKE)
        other = empty_matrix(N, N + 1, LIKE)
        kept = matrices._here.kept
        assert kept is not None
        assert [len(buffer) for buffer, _ in kept.buffers] == [other.numel() * 4]
    assert matrices._here.kept is None


@pytest.mark.usefixtures("nothing_spare")
def test_nothing_large_is_kept_and_nothing_in_another_thread(monkeypatch):
    monkeypatch.setattr(matrices, "_LARGE", 4 * N * N)
    with kept_matrices():
        kept, seen = matrices._here.kept, []
        assert kept is not None
        empty_matrix(N, N + 1, LIKE)
        assert kept.buffers == []
        thread = threading.Thread(target=lambda: seen.append(matrices._here.kept))
        thread.start()
        thread.join()
        assert seen == [None]


@pytest.mark.usefixtures("nothing_spare")
def test_a_thread_that_copies_the_context_of_a_fit_has_memory_of_its_own():
    """As ``asyncio.to_thread`` does, and every thread of a Python without a global lock: two would take one buffer."""
    with kept_matrices():
        place, seen = empty_matrix(N, N, LIKE).data_ptr(), []
        copied = contextvars.copy_context()
        thread = threading.Thread(target=copied.run, args=(lambda: seen.append(empty_matrix(N, N, LIKE).data_ptr()),))
        thread.start()
        thread.join()
        assert len(seen) == 1
        assert seen != [place]


def test_a_step_that_fails_ends_it():
    def step():
        with kept_matrices():
            empty_matrix(N, N, LIKE)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        step()
    assert matrices._here.kept is None
