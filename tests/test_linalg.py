"""Dense linear algebra in place: factor below the diagonal, matrix above it."""

from __future__ import annotations

import pytest
import torch

from fastagop import linalg

DTYPES = [torch.float32, torch.float64]
SIZES = [
    1,
    5,
    255,  # one short of the module's own block
    256,  # one block
    257,  # a last block of one row
    600,  # two blocks and a tail
]
dtypes = pytest.mark.parametrize("dtype", DTYPES)
sizes = pytest.mark.parametrize("n", SIZES)


@pytest.fixture(scope="session")
def definite(normal):
    """definite(n, dtype): symmetric, well-conditioned, with unit diagonal like a kernel matrix."""

    def build(n, dtype=torch.float64):
        B = normal(n, n) / n**0.5
        A = 0.2 * (B @ B.T) + torch.eye(n, dtype=torch.float64)
        scale = A.diagonal().rsqrt()
        A = A * scale[:, None] * scale
        A = (A + A.T) / 2
        return A.fill_diagonal_(1.0).to(dtype)

    return build


def rounding(n, dtype):
    """Backward error of a factorisation of a well-conditioned matrix (condition below 3): n eps in the worst case."""
    return 4 * n**0.5 * torch.finfo(dtype).eps


# ---- Cholesky


@dtypes
@sizes
def test_cholesky(dtype, n, definite, relative):
    A = definite(n, dtype)
    whole = A.clone()
    assert linalg.cholesky_lower_(A, 1.0) == 0
    L = A.tril()
    assert relative(L @ L.T, whole) <= rounding(n, dtype)
    assert relative(L, torch.linalg.cholesky(whole.double())) <= 3 * rounding(n, dtype)
    assert torch.equal(A.triu(1), whole.triu(1))  # to the bit


@pytest.mark.parametrize("block", [1, 2, 7, 50, 99, 100, 101])  # single rows, tails of every kind, one block
def test_cholesky_blocks(block, definite, relative):
    A = definite(100)
    whole = A.clone()
    assert linalg.cholesky_lower_(A, 1.0, block=block) == 0
    assert relative(A.tril(), torch.linalg.cholesky(whole)) <= 3 * rounding(100, torch.float64)
    assert torch.equal(A.triu(1), whole.triu(1))


def test_cholesky_takes_the_diagonal_it_is_given(definite, relative):
    A = definite(90)
    whole = A.clone()
    A.fill_diagonal_(torch.nan)  # what is stored there does not count
    assert linalg.cholesky_lower_(A, 1.5, block=40) == 0
    whole.fill_diagonal_(1.5)
    assert relative(A.tril(), torch.linalg.cholesky(whole)) <= 3 * rounding(90, torch.float64)


def test_cholesky_of_a_part_of_a_larger_matrix(definite, relative):
    A = definite(70)
    large = torch.full((80, 75), -7.0, dtype=torch.float64)
    part = large[5:75, 3:73]
    part.copy_(A)
    assert linalg.cholesky_lower_(part, 1.0, block=30) == 0
    assert relative(part.tril(), torch.linalg.cholesky(A)) <= 3 * rounding(70, torch.float64)
    part.fill_(-7.0)
    assert bool((large == -7).all())


@dtypes
@pytest.mark.parametrize("pivot", [2, 3, 40, 41, 42, 90, 120])  # 1-based; first, both sides of a block's edge, last
def test_cholesky_reports_the_failing_pivot(dtype, pivot, definite):
    A = definite(120, dtype)
    # the 2 x 2 minor that ends at the pivot has determinant 1 - 4 < 0; every minor before it is as it was
    A[pivot - 1, pivot - 2] = A[pivot - 2, pivot - 1] = 2.0
    whole = A.clone()
    assert linalg.cholesky_lower_(A, 1.0, block=40) == pivot
    assert torch.equal(A.triu(1), whole.triu(1))
    linalg.restore_lower_(A)
    assert torch.equal(A.tril(-1), whole.tril(-1))
    assert torch.equal(A.triu(1), whole.triu(1))
    assert linalg.cholesky_lower_(A, 5.0, block=40) == 0  # and the matrix is good for another try
    assert torch.equal(A.triu(1), whole.triu(1))


def test_cholesky_of_a_singular_matrix_is_no_success_with_nan():
    A = torch.ones(300, 300, dtype=torch.float64)  # all points identical
    failed = linalg.cholesky_lower_(A, 1.0)
    assert failed == 2
    linalg.restore_lower_(A)
    assert linalg.cholesky_lower_(A, 1.0 + 1e-8) == 0
    assert bool(A.isfinite().all())


@dtypes
@pytest.mark.parametrize("n", [1, 2, 47, 95, 96, 97, 191, 192, 193, 289, 500])  # both sides of every edge of a block
def test_upper_cholesky(dtype, n, definite, relative):
    A = definite(n, dtype)
    whole, A = A.clone(), A.masked_fill(torch.ones(n, n, dtype=torch.bool).tril(-1), torch.nan)  # nothing reads there
    assert linalg.cholesky_upper_(A) == 0
    U = A.triu()
    assert relative(U @ U.T, whole) <= 2 * rounding(n, dtype)
    expected = torch.linalg.cholesky(whole.double().flip(0, 1)).flip(0, 1)
    assert relative(U, expected) <= 6 * rounding(n, dtype)


@pytest.mark.parametrize("block", [1, 2, 7, 50, 99, 100, 101, 150])
def test_upper_cholesky_blocks(block, definite, relative):
    A = definite(150)
    whole = A.clone()
    assert linalg.cholesky_upper_(A, block=block) == 0
    assert relative(A.triu() @ A.triu().T, whole) <= 2 * rounding(150, torch.float64)
    below = torch.ones_like(A, dtype=torch.bool).tril(-block)
    assert torch.equal(A[below], whole[below])  # to the bit


@dtypes
@pytest.mark.parametrize("left", [2, 3, 95, 96, 97, 192, 193, 300])
def test_upper_cholesky_reports_the_failing_pivot(dtype, left, definite):
    A = definite(300, dtype)
    A[left - 1, left - 2] = A[left - 2, left - 1] = 2.0  # the minor from there to the end has a negative determinant
    failed = left - 1
    assert linalg.cholesky_upper_(A) == failed


@dtypes
@pytest.mark.parametrize(("n", "rows"), [(1, 256), (30, 7), (30, 30), (30, 1), (600, 256)])
def test_restore_lower(dtype, n, rows, normal):
    A = normal(n, n, dtype=dtype)
    before = A.clone()
    linalg.restore_lower_(A, rows)
    assert torch.equal(A.triu(), before.triu())
    assert torch.equal(A, A.T)


@sizes
@pytest.mark.parametrize("K", [1, 4])
@pytest.mark.parametrize("gaps", [0, 3])
@dtypes
def test_cholesky_solve(n, K, gaps, dtype, definite, normal, relative):
    A, B = definite(n, dtype), normal(n, K, dtype=dtype)
    factored = A.new_empty(n, n + gaps)[:, :n]
    factored.copy_(torch.linalg.cholesky(A) + torch.full_like(A, torch.nan).triu(1))  # above the diagonal is not read
    before = factored.clone(), B.clone()
    X = linalg.cholesky_solve(factored, B)
    assert relative(A.double() @ X.double(), B) <= 3 * rounding(n, dtype)
    assert torch.equal(B, before[1])
    assert torch.equal(factored.tril(), before[0].tril())


@pytest.mark.parametrize("gaps", [0, 3])
def test_cholesky_solve_never_copies_the_matrix(gaps, definite, normal, tensor_memory):
    A, B = definite(800, torch.float64), normal(800, 3)
    factored = A.new_empty(800, 800 + gaps)[:, :800].copy_(torch.linalg.cholesky(A))
    _, peak = tensor_memory(lambda: linalg.cholesky_solve(factored, B))
    assert peak <= 0.5 * A.nbytes


@sizes
@pytest.mark.parametrize("stored", DTYPES)
def test_upper_matmul(n, stored, definite, normal, relative):
    A, V = definite(n, stored), normal(n, 3)
    S = A.double()
    upper = A.triu(1) + torch.full_like(A, torch.nan).tril()  # a factor, or leftovers of one
    out = linalg.upper_matmul(upper, 1.7, V)
    assert out.dtype == torch.float64
    # float64 sums whatever A is stored in
    assert relative(out, S.fill_diagonal_(1.7) @ V) <= rounding(n, torch.float64)


def test_largest_row_sum():
    A = torch.tensor([[1.0, 2.0, 0.0], [0.5, 0.5, 3.0], [1.0, 0.0, 0.0]])
    assert linalg.largest_row_sum(A) == 4.0


# ---- square roots


def is_root(R, M):
    """Symmetric, positive semi-definite, and R R = M; sqrt halves relative errors, so R's are those of M."""
    eps = torch.finfo(M.dtype).eps
    d, size = len(M), float(torch.linalg.matrix_norm(M.double(), 2))
    wide = R.double()
    assert R.dtype == M.dtype
    assert bool(R.isfinite().all())
    assert float((wide - wide.T).abs().max()) <= eps * size**0.5
    assert float(torch.linalg.eigvalsh(wide)[0]) >= -4 * eps * d * size**0.5
    assert float((wide @ wide - M.double()).abs().max()) <= 4 * eps * d * size


@dtypes
@pytest.mark.parametrize("rank", [1, 3, 29, 30])  # one output near collapse, K, all but one, full
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])  # M's units are those of the targets squared
def test_psd_sqrt(dtype, rank, scale, normal):
    B = normal(30, rank)
    M = (scale * (B @ B.T)).to(dtype)
    is_root(linalg.psd_sqrt(M), M)


@dtypes
def test_psd_sqrt_of_simple_matrices(dtype):
    assert not linalg.psd_sqrt(torch.zeros(4, 4, dtype=dtype)).any()
    assert torch.allclose(linalg.psd_sqrt(torch.tensor([[9.0]], dtype=dtype)), torch.tensor([[3.0]], dtype=dtype))
    M = torch.diag(torch.tensor([4.0, 0.0, 1.0], dtype=dtype))
    assert torch.allclose(linalg.psd_sqrt(M), torch.diag(torch.tensor([2.0, 0.0, 1.0], dtype=dtype)))


@dtypes
def test_psd_sqrt_of_a_matrix_that_rounding_made_indefinite(dtype, normal):
    B = normal(30, 2, dtype=dtype)
    M = B @ B.T - 10 * torch.finfo(dtype).eps * torch.eye(30, dtype=dtype)
    assert float(torch.linalg.eigvalsh(M.double())[0]) < 0
    R = linalg.psd_sqrt(M)
    wide = R.double()
    assert bool(R.isfinite().all())
    assert float((wide @ wide - M.double()).abs().max()) <= 120 * torch.finfo(dtype).eps * float(M.abs().max())


def test_psd_sqrt_clips_what_is_negative():
    M = torch.diag(torch.tensor([4.0, -1e-3, 1.0], dtype=torch.float64))
    assert torch.allclose(linalg.psd_sqrt(M), torch.diag(torch.tensor([2.0, 0.0, 1.0], dtype=torch.float64)))


def test_psd_sqrt_symmetrises(normal):
    B = normal(12, 12)
    M, skew = B @ B.T, 1e-3 * (B - B.T)
    assert torch.allclose(linalg.psd_sqrt(M + skew), linalg.psd_sqrt(M), rtol=0.0, atol=1e-12)


def test_psd_sqrt_leaves_its_argument_alone(normal):
    B = normal(12, 3)
    M = B @ B.T
    before = M.clone()
    linalg.psd_sqrt(M)
    assert torch.equal(M, before)


@dtypes
@pytest.mark.parametrize("n", [1, 6, 25, 40])  # one row, fewer rows than columns, as many but one, more
def test_psd_sqrt_within_the_span_of_rows(dtype, n, normal):
    rows = normal(n, 26, dtype=dtype)
    if n > 4:
        rows[3] = rows[1]  # duplicates do not widen the span
        rows[4] = 0.0
    B = normal(5, n, dtype=dtype) @ rows
    M = B.T @ B
    R = linalg.psd_sqrt(M, rows=rows)
    is_root(R, M)


@pytest.mark.parametrize("failure", ["raises", "raises plainly", "nan"])
def test_eigh_of_a_device_that_fails(failure, normal, monkeypatch, caplog):
    """A GPU's solver is known to fail on low-rank matrices: the host's then answers, and says so."""
    thin = normal(30, 3)
    M, plain, asked = thin @ thin.T, torch.linalg.eigh, []

    class Elsewhere(torch.Tensor):
        device = torch.device("meta")  # any device that is not the CPU

        def cpu(self):
            return self.as_subclass(torch.Tensor)

    def fails(A):
        asked.append(type(A))
        if type(A) is not Elsewhere:
            return plain(A)
        if failure == "raises":
            raise torch.linalg.LinAlgError("cusolver error: 7\nmore")
        if failure == "raises plainly":
            raise RuntimeError("cusolver error: CUSOLVER_STATUS_INVALID_VALUE, when calling `cusolverDnDsyevd(...)`")
        return tuple(torch.full_like(B, torch.nan) for B in plain(A.as_subclass(torch.Tensor)))

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *_: self)
    values, vectors = linalg.eigh(M.as_subclass(Elsewhere))
    assert asked == [Elsewhere, torch.Tensor]
    assert torch.allclose(vectors * values @ vectors.T, M)
    assert "computing on the CPU" in caplog.text


@pytest.mark.parametrize("what", ["values", "vectors"])
def test_eigh_fails_aloud(what, monkeypatch):
    values, vectors = torch.ones(3), torch.eye(3)
    failed = (values * torch.nan, vectors) if what == "values" else (values, vectors * torch.nan)
    monkeypatch.setattr(torch.linalg, "eigh", lambda A: failed)
    with pytest.raises(torch.linalg.LinAlgError, match="it returned NaN"):
        linalg.eigh(torch.eye(3))


def test_eigh_hands_on_what_is_no_failure_of_a_solver(monkeypatch):
    def full(A):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.linalg, "eigh", full)
    with pytest.raises(torch.OutOfMemoryError):
        linalg.eigh(torch.eye(3))
