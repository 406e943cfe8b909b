"""Which solver runs, what it is said to take, and the limits at which one algorithm gives way to another."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from fastagop.kernels import calibration
from fastagop.kernels.kernel_operator import KernelOperator
from fastagop.kernels.plan import block_rows, format_bytes
from fastagop.kernels.torch_backend.tiles import BLOCKS_ALIVE

import fastagop
from fastagop import ConjugateGradients, Gaussian, Laplace, Matern52
from fastagop.solvers import cg, direct, limits, preconditioner, table
from fastagop.solvers.problem import Advice, Problem
from fastagop.solvers.solve import SolveOptions, prepare

CPU = torch.device("cpu")
F32, F64 = torch.float32, torch.float64
N, D, K = 300, 40, 3
DEFAULTS = ConjugateGradients()


def problem(n=N, d=D, ridge=1e-3, room=10**12, dtype=F32, options=DEFAULTS, float64_alpha=False):
    X = torch.zeros(1, 1, dtype=dtype).expand(n, d)
    operator = KernelOperator("solve", Laplace(2.0), X)
    return Problem(operator, K, ridge, room, options, float64_alpha, Advice())


def row_of(name, dtype):
    return next(row for row in table.TABLE if (row.name, row.dtype) == (name, dtype))


def prepared(n=N, ridge=1e-3, method="auto", dtype=F32, **options):
    X = torch.zeros(1, 1, dtype=dtype).expand(n, D)
    return prepare(Laplace(2.0), X, X[:, :K], SolveOptions(ridge, method, memory_limit=1e10, **options))


# ---- the choice


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"dtype": F64}, ("cholesky", F64, "float64 input")),
        ({"dtype": F64, "ridge": 0.0}, ("cholesky", F64, "float64 input")),
        ({"ridge": 0.0}, ("cholesky", F64, "ridge 0 needs float64: near collapse")),
        ({}, ("cholesky", F32, "float32 input with a ridge")),
        ({"float64_alpha": True, "n": 512}, ("cholesky", F64, "few rows: float64 takes about as long")),
        ({"float64_alpha": True, "n": 513}, ("cholesky+cg", F32, "a few thousand rows: a float32 factor")),
        ({"float64_alpha": True, "n": 4096}, ("cholesky+cg", F32, "a few thousand rows: a float32 factor")),
        ({"float64_alpha": True, "n": 4097}, ("cholesky+cg", F32, "k(X, X) is read once a step for all outputs")),
        ({"n": 128}, ("cholesky", F64, "few rows: float64 takes about as long")),
        ({"n": 129}, ("cholesky", F32, "float32 input with a ridge")),
        ({"method": "eigh"}, ("eigh", F64, "eigh asked for; it runs in float64")),
        ({"method": "cg"}, ("cg", F64, "cg asked for")),
    ],
)
def test_the_solver_that_is_taken(how, expected):
    made = prepared(**how)
    assert (made.solver.name, made.solver.dtype) == expected[:2]
    assert made.plan.method == expected[0]
    assert expected[2] in made.plan.why


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
@pytest.mark.parametrize("beyond", [0, 1])
def test_float64_is_taken_where_it_fits(ridge, beyond):
    """To the byte; without room a float32 matrix serves a ridge of 0, too."""
    needed = N * N * 8 + N * N * 2 + N * D * 8  # the matrix, its workspace, the points in float64
    asked = problem(ridge=ridge, room=needed - beyond, float64_alpha=True)
    solver, why = table.choose(asked, "cholesky")
    assert solver.dtype == (F32 if beyond else F64)
    if beyond:
        words = "float32 input with a ridge" if ridge else f"a float64 matrix does not fit into {format_bytes(needed)}"
        assert why == words


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_coarse_products_make_a_preconditioner(ridge, monkeypatch):
    monkeypatch.setattr(Problem, "coarse", True)
    solver, why = table.choose(problem(ridge=ridge, float64_alpha=True), "cholesky")
    assert (solver.dtype, why) == (F32, "the precision asked for makes the factor a preconditioner")
    assert table.choose(problem(ridge=ridge, dtype=F64), "cholesky")[0].dtype == F64


# ---- memory and seconds


@pytest.mark.parametrize(
    ("name", "dtype", "items"), [("cholesky", F32, 1.25), ("cholesky", F64, 1.25), ("eigh", F64, 4.25)]
)
def test_memory_of_a_matrix(name, dtype, items):
    matrix = int(items * N * N * dtype.itemsize)
    assert row_of(name, dtype).memory(problem()) == matrix + (8 * N * N if name == "eigh" else N * D * 8)
    assert direct.needed_bytes(N, D, dtype) == int(1.25 * N * N * dtype.itemsize) + N * D * 8


@pytest.mark.parametrize(("name", "dtype"), [("cholesky", F32), ("cholesky", F64), ("eigh", F64), ("cholesky+cg", F32)])
def test_the_largest_system_that_fits_is_named(name, dtype):
    row, asked = row_of(name, dtype), problem(room=10**5)
    needed = row.memory(asked)
    largest = next(n for n in range(N, 0, -1) if row.memory(problem(n=n)) <= 10**5)
    with pytest.raises(MemoryError) as error:
        row.plan(asked, "why")
    assert str(error.value) == (
        f"solve with n = 300 needs {format_bytes(needed)} ({dtype} matrix of {format_bytes(N * N * dtype.itemsize)} "
        f"and its workspace), but 100.0 kB may be used; n up to about {largest} fits. "
        "Use fewer points, method='cg', or raise memory_limit where memory is free"
    )


@pytest.mark.parametrize("given", [F32, F64])
@pytest.mark.parametrize(("name", "dtype"), [("cholesky", F64), ("eigh", F64), ("cholesky", F32)])
def test_the_plan_of_a_matrix(name, dtype, given):
    asked = problem(ridge=0.0, dtype=given)
    plan = direct.plan(asked, name, dtype, "why")
    work = N * N * D + (N**3 / 3 if name == "cholesky" else 9 * N**3) + 4.0 * N * N * K
    matrix = int(5.25 * N * N * 8) if name == "eigh" else int(1.25 * N * N * dtype.itemsize)
    points = 0 if given == dtype else N * D * dtype.itemsize
    assert (plan.op, plan.backend, plan.method, plan.why) == ("solve", "torch", name, "why")
    assert plan.flops == pytest.approx(work)
    assert plan.peak_bytes == matrix + points
    workspace = max(2**18, int(0.25 * N * N * dtype.itemsize) // 3)
    assert plan.block == block_rows(N * dtype.itemsize, 0, workspace, N, "solve")
    single = "float32, highest factorisation, float64 refinement" if given == F32 else "float32 factorisation"
    assert plan.precision == ("float64 factorisation" if dtype == F64 else single)


@pytest.mark.parametrize("weighted", [False, True])
def test_an_eigendecomposition_takes_what_is_planned(weighted, normal, tensor_memory):
    """K, the eigenvectors and 2 n^2 numbers of LAPACK's work, all of which torch allocates for so few points."""
    n, weights = 500, normal(500).abs() + 0.1 if weighted else None
    X, Y, how = normal(n, 5), normal(n, 2, seed=2), {"ridge": 1e-3, "method": "eigh", "sample_weight": weights}
    plain, taken = tensor_memory(lambda: fastagop.solve(Laplace(2.0), X, Y, **how))
    assert 4.0 * 8 * n * n <= taken <= 4.25 * 8 * n * n
    assert row_of("eigh", F64).memory(problem(n=n)) >= taken
    assert row_of("eigh", F64).memory(problem(n=2000)) == 4.25 * 8 * 2000**2 + 2**22
    A = fastagop.kernel_matrix(Laplace(2.0), X, ridge=0.0)
    A.diagonal().add_(1e-3 if weights is None else 1e-3 / weights)
    torch.testing.assert_close(plain.alpha, torch.linalg.solve(A, Y), rtol=1e-8, atol=1e-8)
    assert plain.residual < 1e-10


def test_a_matrix_of_few_rows_has_a_block():
    assert direct.plan(problem(n=3), "cholesky", F64, "why").block == 3  # a few rows are one block
    assert direct.plan(problem(n=3000), "cholesky", F64, "why").block == 250  # a twelfth of the matrix


@pytest.mark.parametrize("fits", [True, False])
def test_the_plan_says_what_a_coarse_float32_matrix_leads_to(fits):
    needed = direct.needed_bytes(N, D, F64)
    plan = direct.plan(problem(room=needed - (not fits)), "cholesky", F32, "why")
    if fits:
        assert plan.precision.endswith("; a float64 matrix where the float32 one leaves a residual above 1e-05")
        assert plan.peak_bytes == needed
    else:
        assert plan.precision.endswith(" from the points where its matrix is too coarse")
        assert plan.peak_bytes == int(1.25 * N * N * 4)
    plain = direct.plan(problem(ridge=0.0), "cholesky", F32, "why")
    assert plain.precision == "float32, highest factorisation, float64 refinement"


@pytest.mark.parametrize("n", [300, 5000])
@pytest.mark.parametrize("ridge", [0.0, 1e-3])
@pytest.mark.parametrize(("name", "dtype"), [("cholesky", F64), ("eigh", F64), ("cholesky", F32)])
def test_seconds_of_a_matrix(name, dtype, ridge, n):
    """Its operations, half of its pairs, and for float32 float64 products: a sample's, twice, or five passes."""
    asked, row = problem(n=n, ridge=ridge), row_of(name, dtype)
    plan, _ = row.plan(asked, "why")
    word = str(dtype).removeprefix("torch.")
    expected = calibration.seconds(plan.flops, 0.5 * n * n, CPU, "gram", word)
    if dtype == F32:
        pairs = 2.0 * min(n, 2048) * n if ridge else 5.0 * n * n
        expected += calibration.seconds(pairs * D, 0.5 * pairs, CPU, "gram", "float64")
    assert row.seconds(asked, plan) == pytest.approx(expected)


def test_seconds_of_conjugate_gradients():
    """A plan counts fifty passes over half of the pairs."""
    asked = problem()
    plan, _ = cg.plan(asked, "why")
    expected = calibration.seconds(plan.flops, 50 * 0.5 * N * N, CPU, "gradient", "float64")
    assert row_of("cg", F64).seconds(asked, plan) == pytest.approx(expected)


# ---- conjugate gradients


def test_options_have_the_defaults_that_are_documented():
    options = dataclasses.astuple(ConjugateGradients())
    assert options == (1e-6, None, 1000, False, 0, False)
    assert dataclasses.astuple(ConjugateGradients(tolerance=1e-300, rank=0, max_iterations=1))[1:3] == (0, 1)


@pytest.mark.parametrize(("n", "asked", "rank"), [(15, None, 0), (1000, None, 62), (40000, None, 2000), (50, 60, 50)])
def test_the_rank_where_memory_is_no_matter(n, asked, rank):
    plan, settled = cg.plan(problem(n=n, options=ConjugateGradients(rank=asked)), "why")
    assert settled.options.rank == rank
    assert f"preconditioner of rank {rank} ({format_bytes(8 * n * rank)})" in plan.why


def cg_bytes(n, rank, dtype):
    """(of vectors, of one column of the preconditioner, of the pivots' draw, of a row of a block)."""
    vectors = 8 * n * (10 * K + 1) + (0 if dtype == F64 else 8 * n * D)
    return vectors, 8 * (n + min(n, 4096) + 5 * rank), 24 * n * min(128, rank), 8 * BLOCKS_ALIVE * n


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("rank", [0, 7, 200])
@pytest.mark.parametrize("n", [300, 5000])
def test_the_plan_of_conjugate_gradients(n, rank, dtype):
    plan, _ = cg.plan(problem(n=n, dtype=dtype, options=ConjugateGradients(rank=rank)), "reason")
    vectors, column, draw, row = cg_bytes(n, rank, dtype)
    needed = vectors + rank * column + draw
    rows = block_rows(row, needed, 10**12, n, "solve")
    assert plan.block == rows
    assert plan.peak_bytes == max(needed, vectors + 8 * n * rank + rows * row)
    step = n * n * (D + 2.0 * K)
    assert plan.flops == pytest.approx(50 * step + 4.0 * n * rank**2)
    assert (plan.backend, plan.method, plan.precision) == ("torch", "cg", "float64 passes")
    assert f"; reason; preconditioner of rank {rank} " in plan.why
    assert plan.why.endswith(f"one pass over all pairs a step ({step:.2g} flop), work given for 50 steps")


@pytest.mark.parametrize("rank", [None, 0, 7, 400])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_the_least_memory_of_conjugate_gradients(rank, dtype):
    asked = problem(dtype=dtype, options=ConjugateGradients(rank=rank))
    settled = min(rank or 0, N)
    vectors, column, draw, row = cg_bytes(N, settled, dtype)
    least = vectors + settled * column + draw + row
    assert cg.least_bytes(asked) == least
    plan, made = cg.plan(dataclasses.replace(asked, room=least), "why")
    assert (plan.block, made.options.rank) == (1, settled)
    with pytest.raises(MemoryError) as error:
        cg.plan(dataclasses.replace(asked, room=least - 1), "why")
    assert str(error.value).startswith(f"solve with n = 300 needs {format_bytes(least)} even without a kernel matrix ")
    assert f"preconditioner of rank {settled}), but {format_bytes(least - 1)} may be used" in str(error.value)
    assert ". Use fewer points, a smaller rank in method=fastagop.ConjugateGradients(rank=...), or " in str(error.value)


@pytest.mark.parametrize("options", [{}, {"rank": 50}, {"rank": 400}, {"store": True}, {"store": True, "rank": 9}])
def test_as_many_points_as_fit_are_named(options):
    """The preconditioner grows with the square of its rank, half of a matrix with that of the points."""
    asked = problem(options=ConjugateGradients(**options))
    for rows in (40, 200):
        room = cg.least_bytes(asked.of_first(rows))
        with pytest.raises(MemoryError) as error:
            cg.plan(dataclasses.replace(asked, room=room), "why")
        assert f" may be used; n up to about {rows} fits. " in str(error.value)
        cg.plan(dataclasses.replace(asked.of_first(rows), room=room), "why")
        with pytest.raises(MemoryError):
            cg.plan(dataclasses.replace(asked.of_first(rows + 1), room=room), "why")


def test_a_matrix_that_was_asked_for_is_named_where_it_does_not_fit():
    asked = problem(options=ConjugateGradients(store=True), room=10**5)
    with pytest.raises(MemoryError, match=r"needs .* with half of a kernel matrix stored \(method 'cg'") as error:
        cg.plan(asked, "why")
    assert " store=False in method=fastagop.ConjugateGradients(store=False), or " in str(error.value)


@pytest.mark.parametrize("column_count", [0, 1, 5, 17])
def test_the_rank_that_memory_has_room_for(column_count):
    """Beside 64 rows of a block, which a pass needs to be quick."""
    vectors, column, draw, row = cg_bytes(N, N // 16, F32)
    base = vectors + max(draw + row, 64 * row)
    room = base + column_count * column
    assert cg.plan(problem(room=room), "why")[1].options.rank == column_count
    assert cg.plan(problem(room=room + column - 1), "why")[1].options.rank == column_count


def test_a_preconditioner_of_one_column(normal):
    """P = u (f^2 + ridge) u^T + the same elsewhere: a multiple of the identity."""
    F, R = normal(6, 1), normal(6, 2, seed=2)
    square = float(F.square().sum())
    P = preconditioner.preconditioner(F.clone(), 0.5)
    assert (P.rank, P.largest, P.tail) == (1, pytest.approx(square + 0.5), pytest.approx(square + 0.5))
    torch.testing.assert_close(P(R), R)
    assert P.shifted(0.25).tail == pytest.approx(square + 0.75)
    assert preconditioner.preconditioner(F[:, :0], 0.5) is None


def test_a_hundred_steps_without_progress_are_enough():
    """Each step of this system makes the residual larger."""

    def turned(V):
        return V + 3 * torch.stack([-V[1], V[0]])

    options = ConjugateGradients(max_iterations=500)
    found = cg.conjugate_gradients(turned, torch.ones(2, 1, dtype=F64), None, options)
    assert (found.iterations, found.stopped, found.singular) == (100, "it makes no progress", False)
    assert not found.alpha.any()
    assert found.residual == 1


@pytest.mark.parametrize("out", [F32, F64])
def test_jitter_grows_by_tens_from_rounding(out, normal):
    """Without a preconditioner it is measured by the number of points."""
    X, Y = normal(60, 3), normal(60, 1)
    X[30:], Y[30:] = X[:30] + 1e-7 * normal(30, 3, seed=5), -Y[:30]
    way = ConjugateGradients(rank=0)
    made = prepare(Gaussian(2.0), X, Y, SolveOptions(method=way))
    found = made.solver.run(made.problem, made.plan, Y, 0.0, out)
    steps = math.log10(found.jitter / (torch.finfo(out).eps * 60))
    assert steps == pytest.approx(round(steps), abs=1e-6)
    assert steps >= 0
    assert float(found.alpha.abs().max()) <= float(Y.abs().max()) / torch.finfo(out).eps ** 0.5
    assert found.rank == 0
    assert found.dtype == F64


# ---- a float32 matrix and what comes after it


@pytest.mark.parametrize(("d", "outputs", "points"), [(14, 1, True), (15, 1, False), (12, 2, True), (13, 2, False)])
def test_refined_from_the_points_while_six_passes_cost_less_than_a_matrix(d, outputs, points, monkeypatch):
    """A pass over all pairs takes n^2 (d + 2 K) operations, a float64 factorisation n^3 / 3."""
    X = torch.zeros(300, d)
    X[:, :3] = torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
    Y = torch.sin(2 * X[:, :1]).repeat(1, outputs)
    called, refine = [], direct._refined_from_points

    def spy(system, found, Y, steps):
        called.append(steps)
        return refine(system, found, Y, steps)

    monkeypatch.setattr(direct, "_refined_from_points", spy)
    solution = fastagop.solve(Matern52(10.0), X, Y, ridge=1e-2)
    assert called == ([6] if points else [])
    assert solution.dtype == (F32 if points else F64)
    assert solution.residual <= 1e-4


def test_a_float64_matrix_where_the_passes_were_not_enough(monkeypatch):
    X = torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
    refine = direct._refined_from_points
    monkeypatch.setattr(direct, "_refined_from_points", lambda *args: (refine(*args)[0], False))
    assert fastagop.solve(Matern52(10.0), X, torch.sin(2 * X[:, :1]), ridge=1e-2).dtype == F64


def system(A, out=F64, ridge=0.0, rows=None):
    """A small dense system in place of k(X, X)."""
    n = len(A)
    rows = torch.arange(n) if rows is None else rows
    return direct.LinearSystem(
        direct.FullMatrix(A.float()),
        ridge,
        lambda V: A @ V + ridge * V,
        lambda V: A @ V + ridge * V,
        lambda V: (rows, (A @ V)[rows]),
        25,
        out,
    )


@pytest.mark.parametrize(("n", "residual", "coarse"), [
    (2048, 0.9e-6, False), (2048, 1.1e-6, True), (2049, 1.1e-6, False), (2049, 0.9e-5, False), (2049, 1.1e-5, True),
])  # fmt: skip
def test_the_residual_that_another_try_is_worth(n, residual, coarse):
    every, Y = torch.arange(n), torch.ones(n, 2, dtype=F64)
    blank = direct.FullMatrix(torch.zeros(n, 1))
    identity = direct.LinearSystem(blank, 0.0, None, None, lambda V: (every, V.clone()), 25, F64)
    error, checked = direct._coarse(identity, identity.found(Y * (1 + residual)), Y)
    assert error == (pytest.approx(residual, rel=1e-3) if coarse else 0.0)
    assert torch.equal(checked.measured[1][0], every)
    assert torch.allclose(checked.measured[1][1], torch.full_like(Y, residual), rtol=1e-6)


def test_a_sample_of_rows_is_scaled_to_all():
    A, Y = torch.eye(100, dtype=F64), torch.ones(100, 1, dtype=F64)
    sampled = system(A, rows=torch.arange(0, 100, 4))
    assert direct._coarse(sampled, sampled.found(1.01 * Y), Y)[0] == pytest.approx(0.01)


@pytest.mark.parametrize(("beyond", "coarse"), [(3.5, False), (4.5, True)])
def test_what_rounding_coefficients_costs_is_not_the_matrix_fault(beyond, coarse):
    """alpha is returned in float32: a residual of up to four times what that costs is as good as it gets."""
    A = 100.0 * torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=F64) + torch.eye(2, dtype=F64)
    alpha = torch.tensor([[1.0], [1.0 + 2.0**-25]], dtype=F64)
    floor = float((A @ (alpha - alpha.float().double())).norm())
    Y = A @ alpha - beyond * floor / 2**0.5
    rounded = system(A, out=F32)
    error, checked = direct._coarse(rounded, rounded.found(alpha), Y)
    assert (error > 0) == coarse
    # the residual that is said is that of the rounded coefficients
    torch.testing.assert_close(checked.measured[1][1], A @ alpha.float().double() - Y, rtol=1e-9, atol=1e-12)


def test_a_coarse_matrix_is_judged_with_the_jitter_it_took():
    A, alpha = torch.eye(3, dtype=F64), torch.ones(3, 1, dtype=F64)
    under_ridge = system(A, ridge=0.5)
    with_jitter = under_ridge.found(alpha, jitter=0.25)
    assert direct._coarse(under_ridge, with_jitter, 1.75 * alpha)[0] == 0
    assert direct._coarse(under_ridge, with_jitter, 1.5 * alpha)[0] == pytest.approx(0.25 / 1.5)
    assert direct._coarse(under_ridge, with_jitter, 0 * alpha)[0] == 0


@pytest.mark.parametrize("out", [F32, F64])
@pytest.mark.parametrize("solves", [True, False])
@pytest.mark.parametrize("size", [0.99, 1.01, 1.5])
def test_coefficients_beyond_what_a_dtype_bears(size, solves, out):
    """They may be 1 / sqrt(eps) times the targets, or larger where they solve the system all the same."""
    Y = torch.tensor([[2.0], [1.0]], dtype=F64)
    bound = 2.0 / torch.finfo(out).eps ** 0.5
    assert limits.bound(Y, out) == pytest.approx(bound)
    alpha = torch.tensor([[size * bound], [-size * bound]], dtype=F64)
    A = torch.diag((Y / alpha)[:, 0]) if solves else torch.eye(2, dtype=F64)
    excess = system(A, out).excess(alpha, Y)
    assert excess == (0.0 if solves or size < 1 else pytest.approx(size))
    assert system(A, out).excess(alpha, 0 * Y) == 0


@pytest.mark.parametrize(("dtype", "least"), [(F32, 1e-3), (F64, 1e-6)])
def test_the_residual_that_counts_as_solved(dtype, least):
    assert limits.RESIDUAL[dtype] == least
    assert limits.MAX_JITTER == 1.0


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("place", [(0, 1), (0, 30), (2, 1)])  # among the values looked at first, and elsewhere
def test_one_value_between_0_and_1_tells_points_apart(place, dtype):
    eps = torch.finfo(dtype).eps
    values = torch.eye(40, dtype=dtype)
    values[1, 2] = 1.0 - 2.0 * eps
    values[2, 1] = eps
    assert not limits.tells_points_apart(values, eps)
    for between in (2.0 * eps, 0.5, 1.0 - 8.0 * eps):
        values[place] = between
        assert limits.tells_points_apart(values, eps)
