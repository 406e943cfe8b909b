"""The float32 factor in one piece: by either library it solves as float64 does, and says when a pivot fails."""

import pytest
import torch
from fastagop.kernels import gemm

from fastagop.solvers import single_factor


@pytest.fixture(params=[True, False], ids=["by blocks", "by LAPACK"])
def way(request, monkeypatch):
    """Whether blocks are taken, whatever processor this is."""
    monkeypatch.setattr(single_factor, "favours_onednn", lambda: request.param)
    monkeypatch.setattr(gemm, "favours_onednn", lambda: request.param and torch.backends.mkldnn.is_available())
    monkeypatch.setattr(single_factor, "_BY_BLOCKS", 1)
    return request.param


def _matrix(n: int) -> torch.Tensor:
    X = torch.randn(n, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.exp(-torch.cdist(X, X)) + 1e-2 * torch.eye(n, dtype=torch.float64)


@pytest.mark.parametrize("n", [1, 96, 193, 700])
@pytest.mark.parametrize("columns", [1, 10])
def test_solves(way, n, columns):
    A = _matrix(n)
    R = torch.randn(n, columns, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    given = A.float().masked_fill_(torch.ones(n, n, dtype=torch.bool).tril(-1), torch.nan)  # nothing reads there
    factor = single_factor.factor_(given)
    assert factor is not None
    assert factor.upper == way
    assert factor.T.data_ptr() == given.data_ptr()
    found = factor.solve(R.float()).double()
    condition = torch.linalg.cond(A)
    bound = 4 * n**0.5 * condition * torch.finfo(torch.float32).eps
    assert torch.linalg.norm(found - torch.linalg.solve(A, R)) <= bound * torch.linalg.norm(torch.linalg.solve(A, R))
    assert torch.linalg.norm(A @ found - R) <= bound * torch.linalg.norm(R)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("row", [0, 150, 399])
def test_a_pivot_that_fails_is_told(row):
    A = _matrix(400).float()
    A[row, row] = -1.0
    assert single_factor.factor_(A) is None
