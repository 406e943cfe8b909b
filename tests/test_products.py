"""Matrix products: every layout gives the same numbers, and none sends oneDNN down its slow path."""

import itertools

import pytest
import torch
from fastagop.kernels import gemm

LAYOUTS = {
    "contiguous": lambda M: M.contiguous(),
    "transposed": lambda M: M.T.contiguous().T,
    "columns of a wider one": lambda M: torch.cat([M, M], 1)[:, : M.shape[1]],
    "rows of a wider one, transposed": lambda M: torch.cat([M.T, M.T], 1)[:, : len(M)].T,
    "every other row": lambda M: M.repeat_interleave(2, 0)[::2],
    "every other column": lambda M: M.repeat_interleave(2, 1)[:, ::2],
    "one row, repeated": lambda M: M[:1].expand(len(M), -1),
}


@pytest.fixture(params=[True, False], ids=["oneDNN", "torch.mm"])
def library(request, monkeypatch):
    """Products of any size by one library, whatever processor this is."""
    monkeypatch.setattr(gemm, "favours_onednn", lambda: request.param)
    monkeypatch.setattr(gemm, "_FEWEST", 1)
    monkeypatch.setattr(gemm, "_LEAST", 1)


@pytest.mark.parametrize(
    ("about", "favoured"),
    [
        ({"vendor_id": "AuthenticAMD", "flags": "fpu avx2 avx512f avx512_bf16"}, True),
        ({"vendor_id": "AuthenticAMD", "flags": "fpu avx2"}, False),  # Zen 3
        ({"vendor_id": "GenuineIntel", "flags": "fpu avx2 avx512f"}, False),
        ({}, False),  # no Linux
    ],
)
def test_where_onednn_is_the_faster_library(about, favoured, monkeypatch):
    monkeypatch.setattr(gemm, "cpuinfo", lambda: about)
    assert gemm.favours_onednn.__wrapped__() == favoured


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("first", "second"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_layouts(dtype, first, second, normal, relative):
    A, B = LAYOUTS[first](normal(9, 5, dtype=dtype)), LAYOUTS[second](normal(7, 5, dtype=dtype, seed=2))
    for bias in (None, normal(7, dtype=dtype, seed=3)):
        expected = A.double() @ B.double().T + (0.0 if bias is None else bias.double())
        assert relative(gemm.matmul_nt(A, B, bias), expected) <= 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_second_factor_has_no_gaps(layout, normal):
    """With gaps oneDNN's product takes a thousand times as long."""
    B = LAYOUTS[layout](normal(7, 5, dtype=torch.float32))
    dense = gemm._dense(B)
    assert torch.equal(dense, B)
    assert dense.is_contiguous() or dense.T.is_contiguous()
    assert (dense is B) == (layout in ("contiguous", "transposed"))  # the common ones are not copied


@pytest.mark.parametrize("shape", [(0, 5, 7), (9, 0, 7), (9, 5, 0), (1, 1, 1)])
def test_empty(shape):
    m, k, n = shape
    assert torch.equal(gemm.matmul_nt(torch.ones(m, k), torch.ones(n, k)), torch.full((m, n), float(k)))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_subtracted_products(dtype, layout, normal, relative):
    A, B = LAYOUTS[layout](normal(9, 5, dtype=dtype)), normal(7, 5, dtype=dtype, seed=2)
    for wide in (normal(9, 7, dtype=dtype, seed=3), normal(9, 12, dtype=dtype, seed=3)):
        C, beside = wide[:, :7], wide[:, 7:].clone()
        expected = C.double() - A.double() @ B.double().T
        gemm.subtract_product_(C, A, B)
        assert relative(C, expected) <= 16 * torch.finfo(dtype).eps
        assert torch.equal(wide[:, 7:], beside)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 9, 384, 385, 800])
def test_subtracted_squares(dtype, rows, normal, relative):
    """Below the diagonal; what lies above it is nobody's."""
    A, C = normal(rows, 6, dtype=dtype), normal(rows, rows, dtype=dtype, seed=2)
    expected = (C.double() - A.double() @ A.double().T).tril()
    gemm.LIBRARY.subtract_square_(C, gemm.LIBRARY.ready(A))
    assert relative(C.tril(), expected) <= 16 * torch.finfo(dtype).eps


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [0, 1, 2, 3, 4, 7, 8, 9, 12, 13])
def test_a_few_columns(dtype, columns, normal, relative):
    A, V = normal(40, 20, dtype=dtype), normal(20, columns, dtype=dtype, seed=2)
    for given in (V, V.T.contiguous().T):
        R = gemm.rows_of(given)
        assert R.is_contiguous()
        assert len(R) == (columns if columns < 3 else -(-columns // 4) * 4)
        assert torch.equal(R[:columns], V.T)
        assert not R[columns:].any()
        R.add_(1.0)
        assert torch.equal(given, V)  # it is a copy
    found = gemm.times_few(A, gemm.rows_of(V))[:columns]
    assert found.shape == (columns, 40)
    if columns:
        assert relative(found, (A.double() @ V.double()).T) <= 16 * torch.finfo(dtype).eps
