"""Blocks in pinned memory that a GPU computes with, by a GPU that is not there: order, memory, copies and numbers."""

from __future__ import annotations

import pytest
import torch
from simulated_gpu import SimulatedGpu

from fastagop.solvers.symmetric_blocks import SymmetricBlocks

SIZES = [(1, 1), (5, 2), (64, 64), (130, 64), (130, 32), (96, 16), (97, 16)]


def positive(n: int) -> torch.Tensor:
    A = torch.randn(n, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    A = A @ A.T / n
    return A.tril() + A.tril(-1).T


def filled(A: torch.Tensor, rows: int, place: str = "host", dtype: torch.dtype = torch.float64) -> SymmetricBlocks:
    blocks = SymmetricBlocks(len(A), dtype, rows=rows, place=place)
    return blocks.fill_(lambda out, start: out.copy_(A[start : start + len(out), : out.shape[1]]))


@pytest.fixture
def gpu(monkeypatch):
    with SimulatedGpu(monkeypatch) as gpu:
        yield gpu
    assert gpu.races == []


@pytest.mark.parametrize(("n", "rows"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_streamed_is_what_lies_on_the_device(n, rows, dtype, gpu):
    A, V = positive(n), torch.randn(n, 3, dtype=dtype)
    found = []
    for place in ("host", "device"):
        half = filled(A, rows, place, dtype).apply_(lambda part: part.mul_(0.5), 0.5)
        parts = [half.full(), half.matmul(V)]
        parts += [tile.clone() for _, tile in half.row_tiles(max(1, rows // 3), torch.float32)]
        narrow = half.to(torch.float32)
        for factor in (narrow, half):
            assert factor.cholesky_(2.0) == 0
            parts += [factor.full().tril(), factor.solve(V.to(factor.dtype))]
        found.append(parts)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=10 * torch.finfo(one.dtype).eps)


@pytest.mark.parametrize(("n", "rows"), [(130, 32), (96, 16)])
def test_the_host_waits_for_no_copy(n, rows, gpu):
    """Nothing goes through pageable memory but a diagonal, and passes are enqueued without a wait."""
    half, V = filled(positive(n), rows), torch.randn(n, 3, dtype=torch.float64)
    assert half.cholesky_(2.0) == 0
    assert all(len(shape) == 1 for shape in gpu.indirect)
    over = gpu.host.clock["compute"]
    half.matmul(V)
    half.solve(V)
    half.apply_(torch.exp_, 0.0)
    assert sum(len(tile) for _, tile in half.row_tiles(10, torch.float32)) == n
    assert gpu.host.clock["compute"] == over


@pytest.mark.parametrize("backwards", [False, True])
def test_the_next_block_comes_while_this_one_is_worked_on(backwards, gpu):
    half, sent, ended = filled(positive(96), 16), [], []
    for _, block in half._streamed(backwards=backwards):
        sent.append(gpu.copies[-1])  # the last tile of this block
        block.sum()
        ended.append(gpu.compute.clock["compute"])
    assert {(stream, way, at_once) for stream, _, way, at_once in sent} == {("side", "in", True)}
    known = [clock["compute"] for _, clock, *_ in sent]
    assert all(work <= when < later for work, when, later in zip(ended, known[2:], ended[1:], strict=False))


def test_a_pass_that_is_broken_off_ends_before_its_memory_is_free(gpu, monkeypatch):
    """Else what is on its way were written over the numbers that take its place."""
    half, read = filled(positive(96), 16), SymmetricBlocks._read

    def interrupted(self, i, *out):
        read(self, i, *out)
        if i == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(SymmetricBlocks, "_read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        half.matmul(torch.ones(96, 1, dtype=torch.float64))
    assert gpu.compute.clock["side"] == gpu.side.clock["side"] > 0


@pytest.mark.parametrize(("n", "rows"), [(640, 32), (650, 64)])
def test_memory_of_the_device(n, rows, gpu, monkeypatch):
    """A pass holds two block rows and a tile; a factorisation a row and a copy of it, and a few tiles, besides."""
    half, V, row, tile = filled(positive(n), rows), torch.ones(n, 1, dtype=torch.float64), 8 * n * rows, 8 * rows**2
    before, gpu.peak = sum(gpu.live.values()), 0
    half.matmul(V)
    assert 2 * row + tile <= gpu.peak - before <= 2 * row + tile + 10 * 8 * n
    gpu.peak, made, staging = 0, [], SymmetricBlocks._staging
    monkeypatch.setattr(SymmetricBlocks, "_staging", lambda self: made.append(1) or staging(self))
    assert half.cholesky_(float(n)) == 0
    assert len(made) == 1
    assert 3 * row <= gpu.peak - before <= 4 * row + 4 * tile
