"""Half of a symmetric matrix in block rows, against the full matrix in float64."""

import errno
import os
import subprocess
import sys

import pytest
import torch

from fastagop.solvers.symmetric_blocks import ROWS, SymmetricBlocks, default_rows, half_bytes

# Tails, fills, and blocks whose triangles are inverted and whose squares are updated in parts.
SIZES = [(1, 1), (5, 2), (64, 64), (130, 64), (300, 150), (401, 128), (520, 64), (700, 300), (1000, 450)]


def positive(n: int, least: float = 0.5) -> torch.Tensor:
    """A positive definite matrix (n, n) with eigenvalues from ``least`` up."""
    A = torch.randn(n, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    A = A @ A.T / n + least * torch.eye(n, dtype=torch.float64)
    return A.tril() + A.tril(-1).T  # products are not symmetric to the bit on every processor


def blocks_of(A: torch.Tensor, rows: int, dtype=torch.float64, place: str = "device") -> SymmetricBlocks:
    """The matrix by rows that ask for no column beyond their own."""

    def write(out: torch.Tensor, start: int) -> None:
        assert out.shape[1] == start + len(out)
        out.copy_(A[start : start + len(out), : out.shape[1]])

    return SymmetricBlocks(len(A), dtype, rows=rows, place=place).fill_(write)


@pytest.fixture(params=["memory", "file"])
def place(request, tmp_path):
    return "device" if request.param == "memory" else str(tmp_path)


@pytest.mark.parametrize(("n", "rows"), SIZES)
def test_it_is_the_matrix(n, rows, place):
    A = positive(n)
    half = blocks_of(A, rows, place=place)
    assert len(half) == n
    assert torch.equal(half.full(), A)
    V = torch.randn(n, 3, dtype=torch.float64)
    torch.testing.assert_close(half.matmul(V), A @ V, rtol=1e-13, atol=1e-13)
    assert half.largest_row_sum() == pytest.approx(float(A.sum(1).max()), rel=1e-13)
    assert half.bytes == sum(block.numel() * 8 for block in half.blocks) == half_bytes(n, torch.float64, rows)
    assert all(block.is_contiguous() for block in half.blocks)


@pytest.mark.parametrize(("n", "rows"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factor_and_solve(n, rows, dtype, place):
    A, diagonal = positive(n), torch.linspace(2.0, 3.0, n, dtype=torch.float64)
    half = blocks_of(A, rows, dtype, place)
    A = A - torch.diag(A.diagonal()) + torch.diag(diagonal)
    assert half.cholesky_(diagonal) == 0
    L, eps = torch.linalg.cholesky(A), torch.finfo(dtype).eps
    found = half.full().double().tril()
    assert float((found - L).norm() / L.norm()) <= 20 * eps
    B = torch.randn(n, 4, dtype=torch.float64)
    given = B.to(dtype)
    X = half.solve(given).double()
    assert torch.equal(given, B.to(dtype))
    assert float((A @ X - B).norm() / B.norm()) <= 100 * eps
    assert X.shape == B.shape


@pytest.mark.parametrize("pivot", [1, 2, 64, 65, 129, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_pivot_that_fails_is_told(pivot, dtype):
    diagonal = torch.ones(130, dtype=torch.float64)
    diagonal[pivot - 1] = -1.0
    half = blocks_of(torch.eye(130, dtype=torch.float64), 64, dtype)
    assert half.cholesky_(diagonal) == pivot


def test_a_number_is_a_diagonal():
    half, other = (blocks_of(positive(70), 32) for _ in range(2))
    assert half.cholesky_(3.0) == other.cholesky_(torch.full((70,), 3.0, dtype=torch.float64)) == 0
    assert torch.equal(half.full().tril(), other.full().tril())


def test_a_copy_in_another_dtype_is_apart(place):
    A = positive(50)
    half = blocks_of(A, 16, place=place)
    narrow = half.to(torch.float32)
    assert narrow.dtype == torch.float32
    assert narrow.rows == half.rows
    assert narrow.place == half.place
    assert narrow.cholesky_(2.0) == 0
    assert torch.equal(half.full(), A)


@pytest.mark.parametrize("rows", [1, 7, 16, 500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_row_tiles_have_all_columns(rows, dtype):
    A = positive(100)
    half, seen = blocks_of(A, 16), []
    for row, tile in half.row_tiles(rows, dtype):
        assert tile.dtype == dtype
        assert len(tile) <= min(rows, 16)
        assert torch.equal(tile, A[row].to(dtype))
        seen += range(row.start, row.stop)
    assert seen == list(range(100))


def test_apply_changes_every_item_once_and_sets_the_diagonal():
    A = positive(300)
    half = blocks_of(A, 150).apply_(lambda part: part.mul_(2.0), 7.0)
    want = 2.0 * A
    want.fill_diagonal_(7.0)
    assert torch.equal(half.full(), want)


def test_rows_of_a_block():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert default_rows(10**5, cpu) == ROWS["cpu"] == 1024
    assert default_rows(10**5, cuda) == ROWS["cuda"] == 4096
    assert default_rows(80, cpu) == 10
    assert default_rows(81, cpu) == 11
    assert default_rows(1, cpu) == 1
    assert SymmetricBlocks(80, torch.float32).rows == 10
    assert half_bytes(80, torch.float32, 10) == 4 * 80 * 90 // 2  # half of the bytes, and half a block's diagonal


def test_a_file_has_no_name(tmp_path):
    half = blocks_of(positive(64), 16, place=str(tmp_path))
    assert os.listdir(tmp_path) == []
    assert half.cholesky_(2.0) == 0


def test_a_disk_without_room_is_an_error_that_names_the_place(tmp_path, monkeypatch):
    def refused(code: int):
        def fallocate(file: int, offset: int, size: int) -> None:
            assert (offset, size) == (0, half_bytes(64, torch.float64, 16))
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "posix_fallocate", fallocate, raising=False)
        return SymmetricBlocks(64, torch.float64, rows=16, place=str(tmp_path))

    with pytest.raises(MemoryError, match=f"place='{tmp_path}' lacks the 20.5 kB .*No space left on device"):
        refused(errno.ENOSPC)
    assert len(refused(errno.EOPNOTSUPP)) == 64
    monkeypatch.delattr(os, "posix_fallocate")
    assert len(SymmetricBlocks(64, torch.float64, rows=16, place=str(tmp_path))) == 64


def test_a_killed_process_leaves_no_file(tmp_path):
    code = (
        "import os, signal, sys, torch\n"
        "from fastagop.solvers.symmetric_blocks import SymmetricBlocks\n"
        "half = SymmetricBlocks(2000, torch.float64, place=sys.argv[1])\n"
        "half.fill_(lambda out, start: out.fill_(1.0))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, capture_output=True)
    assert ended.returncode == -9, ended.stderr
    assert os.listdir(tmp_path) == []
