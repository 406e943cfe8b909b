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
