"""solve: what it returns solves the equations, and what it says about itself is true."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import warnings

import numpy as np
import pytest
import torch
from fastagop.kernels import reference
from fastagop.kernels.radial import Radial

import fastagop
from fastagop import Gaussian, Laplace
from fastagop.solvers.solve import warn_about

DTYPES = [torch.float32, torch.float64]
METHODS = ["auto", "cholesky", "cholesky+cg", "eigh"]
ROADS = ["auto", "cholesky+cg", "eigh"]  # for large grids: "auto" is "cholesky" (test_auto_is_cholesky)
RIDGES = [
    0.0,
    1e-3,  # what the authors' code uses
    0.5,  # of the size of the diagonal
]
LIMIT = {torch.float32: 1e-3, torch.float64: 1e-6}  # residuals above this are warned about
dtypes = pytest.mark.parametrize("dtype", DTYPES)
methods = pytest.mark.parametrize("method", METHODS)
ridges = pytest.mark.parametrize("ridge", RIDGES)


def residual(A, alpha, Y):
    return float(torch.linalg.vector_norm(A @ alpha.double() - Y.double()) / torch.linalg.vector_norm(Y.double()))


def rounding(A, alpha, Y):
    """||(|A| |alpha|)|| / ||Y||: what one rounding of every entry does to the residual, in units of eps."""
    return float(torch.linalg.vector_norm(A.abs() @ alpha.double().abs()) / torch.linalg.vector_norm(Y.double()))


def honest(solution, A, Y):
    """The residual is that of the alpha returned, without the jitter, up to rounding of the matrix it used."""
    # the kernel matrix is stored in solution.dtype: a rounding of the entry and about one of its distance;
    # sums of n terms in float64 cost a little more
    slack = 2 * torch.finfo(solution.dtype).eps + 16 * 2.0**-52
    true = residual(A, solution.alpha, Y)
    assert abs(solution.residual - true) <= slack * rounding(A, solution.alpha, Y) + 1e-12 * true


def quietly(*args, **kwargs):
    """(solution, warnings) of a call that may warn; it warns exactly when something was altered or missed."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        solution = fastagop.solve(*args, **kwargs)
    altered = solution.jitter > 0 or solution.rank < len(solution.alpha)
    # with a ridge, means of contradicting copies are what kernel ridge regression answers
    met = solution.residual if solution.merged_residual is None else solution.merged_residual
    missed = met > LIMIT[solution.alpha.dtype] or (solution.ridge == 0 and solution.contradictions > 0)
    assert len(said) == int(altered or missed)
    assert all(w.category is fastagop.NumericalWarning and w.filename == __file__ for w in said)
    return solution, [str(w.message) for w in said]


# ---- accuracy


@pytest.fixture(scope="session")
def well_conditioned(cloud, normal, system):
    """(X, Y, k + ridge I, numpy's solution, condition), once per kernel, dtype and ridge."""

    @functools.lru_cache
    def build(kernel, dtype, ridge):
        X, Y = cloud("spread", n=300, dtype=dtype), normal(300, 4, dtype=dtype)  # more than one block
        A = system(kernel, X, ridge)
        exact = torch.from_numpy(np.linalg.solve(A.numpy(), Y.double().numpy()))
        values = torch.linalg.eigvalsh(A)
        return X, Y, A, exact, float(values[-1] / values[0])

    return build


@pytest.mark.parametrize("kernel", [Laplace(2.0), Gaussian(0.5)], ids=repr)  # conditions of a few hundred
@dtypes
@pytest.mark.parametrize("method", ["auto", "eigh"])  # "cholesky+cg" ends at its tolerance (test_half)
@ridges
@pytest.mark.parametrize("K", [1, 4])
def test_well_conditioned(kernel, dtype, method, ridge, K, well_conditioned, relative):
    X, Y, A, exact, condition = well_conditioned(kernel, dtype, ridge)
    Y, exact = Y[:, :K], exact[:, :K]
    solution, said = quietly(kernel, X, Y, ridge=ridge, method=method)
    assert not said
    # alpha is rounded to dtype at the end; before that, the error of a backward stable solve in solution.dtype
    bound = torch.finfo(dtype).eps + 16 * torch.finfo(solution.dtype).eps * condition
    assert relative(solution.alpha, exact) <= bound
    assert solution.alpha.dtype == dtype
    # the equations hold up to one rounding of alpha and two of the matrix
    assert residual(A, solution.alpha, Y) <= 2 * torch.finfo(dtype).eps * rounding(A, exact, Y)
    honest(solution, A, Y)
    assert solution.jitter == 0
    assert solution.ridge == ridge
    assert solution.rank == 300
    assert solution.method == ("eigh" if method == "eigh" else "cholesky")


@dtypes
@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_auto_is_cholesky(dtype, ridge, cloud, targets):
    X, Y = cloud("collapsed 1e-2", dtype=dtype), targets(120, dtype)
    auto, _ = quietly(Laplace(2.0), X, Y, ridge=ridge)
    asked, _ = quietly(Laplace(2.0), X, Y, ridge=ridge, method="cholesky")
    assert auto.method == asked.method == "cholesky"
    assert torch.equal(auto.alpha, asked.alpha)
    assert auto.jitter == asked.jitter


@pytest.mark.parametrize("spread", ["1", "1e-2", "1e-4"])  # from easy to within-class eigenvalues of 1e-5
@pytest.mark.parametrize("ridge", [1e-3, 1e-1])
def test_float32_with_a_ridge_is_refined(spread, ridge, cloud, targets, system):
    """A float32 factor, but residuals as good as those of the float64 solution rounded to float32."""
    X, Y = cloud(f"collapsed {spread}", n=300, dtype=torch.float32), targets(300, torch.float32)
    solution, said = quietly(Laplace(2.0), X, Y, ridge=ridge)
    assert not said
    assert solution.dtype == torch.float32
    assert solution.iterations >= 1
    A = system(Laplace(2.0), X, ridge)
    exact = torch.linalg.solve(A, Y.double())
    eps = torch.finfo(torch.float32).eps
    assert residual(A, solution.alpha, Y) <= residual(A, exact.float(), Y) + 2 * eps * rounding(A, exact, Y)
    honest(solution, system(Laplace(2.0), X, solution.ridge), Y)


def test_refinement_takes_what_the_factor_cannot(cloud, targets, system):
    """Condition 2e5: the float32 factor alone leaves a residual of 1e-5 and more."""
    X, Y = cloud("collapsed 1e-2", n=300, dtype=torch.float32), targets(300, torch.float32)
    solution, _ = quietly(Gaussian(1.0), X, Y, ridge=1e-3)
    assert solution.dtype == torch.float32
    A = system(Gaussian(1.0), X, 1e-3)
    eps = torch.finfo(torch.float32).eps
    assert residual(A, solution.alpha, Y) <= 2 * eps * rounding(A, solution.alpha, Y)


@dtypes
@pytest.mark.parametrize("method", ROADS)
@pytest.mark.parametrize("ridge", [0.0, 1e-3])
@pytest.mark.parametrize("kernel", [Gaussian(5.0)], ids=repr)  # test_contract.py has the better conditioned ones
@pytest.mark.parametrize(
    "name",
    [
        "collapsed 1",
        "collapsed 1e-2",
        "collapsed 1e-3",
        "collapsed 1e-4",  # all with exact duplicates of equal labels
        "nested",
        "offset",  # the kernel matrix is the identity, nearly
        "pairs",  # neighbours with different labels
        "zero-rows",  # equal rows with different labels
        "identical",
        "line",
    ],
)
def test_hard_problems(dtype, method, ridge, kernel, name, cloud, targets, bounded_solution, system):
    """Never NaN, never much worse than a plain solve with bounded coefficients, and never silent."""
    X, Y = cloud(name, dtype=dtype), targets(120, dtype)
    solution, _ = quietly(kernel, X, Y, ridge=ridge, method=method)
    assert bool(solution.alpha.isfinite().all())
    assert math.isfinite(solution.residual)
    honest(solution, system(kernel, X, solution.ridge), Y)
    assert solution.jitter >= 0
    if ridge and solution.dtype == torch.float64:
        assert solution.jitter == 0
    best = bounded_solution(system(kernel, X, ridge), X, Y, dtype)  # at most 0.8: alpha = 0 has 1
    assert solution.residual <= min(1.5 * best, 0.5 * (1 + best)) + (1e-6 if dtype == torch.float64 else 2e-3)


@pytest.mark.parametrize("method", ["cholesky", "eigh"])
@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("collapsed 1e-2", Gaussian(5.0)),  # eigenvalues all the way down to float64's rounding
        ("nested", Gaussian(5.0)),
        ("pairs", Gaussian(1.0)),  # neighbours at 1e-4 whose targets differ
    ],
)
def test_never_worse_than_no_solution_in_float32(method, name, kernel, cloud, targets):
    X, Y = cloud(name, dtype=torch.float32), targets(120, torch.float32)
    solution, _ = quietly(kernel, X, Y, method=method)
    assert solution.residual <= 1 + 1e-3


@dtypes
def test_a_large_residual_alone_is_said(dtype, cloud, normal):
    # solve avoids such solutions where it can, so the one that is reported here is made up
    solution, _ = quietly(Laplace(2.0), cloud("spread", dtype=dtype), normal(120, 2, dtype=dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_about(dataclasses.replace(solution, residual=0.9 * LIMIT[dtype]))
    for large in (1.1 * LIMIT[dtype], math.nan):
        with pytest.warns(fastagop.NumericalWarning, match="the relative residual is"):
            warn_about(dataclasses.replace(solution, residual=large))


# ---- duplicates


@dtypes
@methods
@pytest.mark.parametrize("kernel", [Laplace(2.0), Gaussian(1.0)], ids=repr)
def test_duplicates_with_equal_targets(dtype, method, kernel, cloud, normal, relative, system):
    """They are one point: nothing has to be added or dropped, and equal points share their coefficient."""
    X, Y = cloud("spread", n=100, dtype=dtype).repeat(3, 1), normal(100, 3, dtype=dtype).repeat(3, 1)
    solution, said = quietly(kernel, X, Y, method=method)
    assert not said
    assert (solution.merged, solution.contradictions, solution.jitter) == (200, 0, 0.0)
    assert solution.residual <= LIMIT[dtype]
    honest(solution, system(kernel, X, solution.ridge), Y)
    alone = torch.linalg.solve(reference.kernel_matrix(kernel, X[:100]), Y[:100].double()) / 3
    assert relative(solution.alpha, alone.repeat(3, 1)) <= torch.finfo(dtype).eps + 1e-10


@dtypes
@methods
def test_duplicates_with_contradicting_targets(dtype, method, cloud, normal, system):
    X, Y = cloud("spread", n=200, dtype=dtype), normal(200, 3, dtype=dtype)
    X[150], X[199] = X[10], X[20]
    Y[150], Y[199] = -Y[10], Y[20] + 1.0
    with pytest.warns(fastagop.NumericalWarning, match="4 rows are copies .* targets differ") as said:
        solution = fastagop.solve(Laplace(2.0), X, Y, method=method)
    assert len(said) == 1
    honest(solution, system(Laplace(2.0), X, solution.ridge), Y)
    # least squares answers the four rows by their means, and meets the others
    wrong = torch.cat([(Y[150] - Y[10]), (Y[199] - Y[20])]).double() / 2**0.5
    least = float(wrong.norm() / Y.double().norm())
    assert solution.residual == pytest.approx(least, rel=1e-5)
    assert solution.merged_residual <= LIMIT[dtype]
    predicted = (reference.kernel_matrix(Laplace(2.0), X) @ solution.alpha.double())[[10, 20]]
    mean = torch.stack([0 * Y[10], Y[20] + 0.5]).double()
    assert torch.allclose(predicted, mean, atol=1e-4)
    assert solution.jitter == 0
    assert float(solution.alpha.abs().max()) <= 100  # of the size of the targets


def nearly(X, seed=5):
    """Copies drawn apart by a hundred roundings: points of their own that no float64 factorisation can tell apart."""
    noise = torch.randn(X.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return X + 1e-14 * noise


@pytest.mark.parametrize(
    ("kernel", "first", "differ"),
    [
        (Gaussian(1.0), 10, False),  # the factorisation fails in its first block of columns
        (Gaussian(1.0), 350, False),  # in a later one, when the first has been overwritten
        (Laplace(2.0), 10, True),  # it succeeds with a jitter that must grow
        (Laplace(2.0), 350, True),
        # nearly diagonal: a matrix left over from the try before would factor too
        (Laplace(0.4), 350, True),
        (Gaussian(0.3), 350, False),
    ],
)
def test_another_try_starts_from_the_matrix(kernel, first, differ, cloud, normal, system):
    """Near copies of the rows before `first`: alpha solves the system with the jitter that was said."""
    X, Y = cloud("spread", n=400), normal(400, 2)
    X[first : first + 40] = X[first - 10 : first].repeat(4, 1)
    Y[first : first + 40] = Y[first - 10 : first].repeat(4, 1)
    if differ:
        Y[first : first + 40] += 1.0
    X = nearly(X)
    solution, said = quietly(kernel, X, Y)
    assert solution.merged == 0
    assert said
    solves_with_its_jitter(solution, system(kernel, X, solution.jitter), Y)
    if not differ:
        assert solution.residual <= LIMIT[torch.float64]


@pytest.mark.parametrize("name", ["identical", "zero-rows", "pairs", "collapsed 1e-4"])
@pytest.mark.parametrize("kernel", [Laplace(2.0), Gaussian(1.0)], ids=repr)
def test_the_jitter_said_is_the_jitter_added(name, kernel, cloud, targets, system):
    X, Y = nearly(cloud(name)), targets(120)
    solution, said = quietly(kernel, X, Y)
    assert solution.merged == 0
    if name not in ("collapsed 1e-4", "pairs"):
        assert said
    solves_with_its_jitter(solution, system(kernel, X, solution.jitter), Y)


def solves_with_its_jitter(solution, A, Y):
    """In float64 alpha solves A, the system with that very jitter, to backward stability."""
    size = torch.linalg.matrix_norm(A, 2) * torch.linalg.vector_norm(solution.alpha) / torch.linalg.vector_norm(Y)
    assert residual(A, solution.alpha, Y) <= 8 * 2.0**-52 * float(size)


# ---- methods, dtypes, memory


def test_which_dtype_factors(cloud, normal):
    X, Y = cloud("spread", n=150, dtype=torch.float32), normal(150, 2, dtype=torch.float32)
    single, double = 150 * 150 * 4, 150 * 150 * 8

    def dtype(X=X, Y=Y, **words):
        return quietly(Laplace(2.0), X, Y, **words)[0].dtype

    assert dtype() == torch.float64  # ridge 0
    assert dtype(ridge=1e-3) == torch.float32
    assert dtype(X=X.double(), Y=Y.double(), ridge=1e-3) == torch.float64
    assert dtype(ridge=1e-3, method="eigh") == torch.float64
    assert dtype(memory_limit=(single + double) / 2 * 1.1) == torch.float32  # no room for a float64 matrix
    assert dtype(memory_limit=2 * double) == torch.float64


def test_ridge_zero_in_float32_for_want_of_memory(cloud, targets, system):
    X, Y = cloud("collapsed 1e-2", n=150, dtype=torch.float32)[15:], targets(150, torch.float32)[15:, :2]
    solution, _ = quietly(Laplace(2.0), X, Y, memory_limit=1.5 * 150 * 150 * 4)
    assert solution.dtype == torch.float32
    assert solution.residual <= LIMIT[torch.float32]
    honest(solution, system(Laplace(2.0), X, solution.ridge), Y)


@dtypes
@pytest.mark.parametrize("ridge", [0.0, 1e-3])
@pytest.mark.parametrize("method", ["cholesky", "eigh"])
def test_memory_limit(dtype, ridge, method, cloud, normal):
    X, Y = cloud("spread", n=200, dtype=dtype), normal(200, 2, dtype=dtype)
    words = {"ridge": ridge, "method": method}
    limit = 200 * 200 * 2
    with pytest.raises(MemoryError, match=r"solve with n = 200 needs .*memory_limit") as error:
        fastagop.solve(Laplace(2.0), X, Y, memory_limit=limit, **words)
    largest = int(re.search(r"n up to about (\d+) fits", str(error.value))[1])
    # "about": what grows with n and not with n^2 is estimated
    fits = int(0.9 * largest)
    assert quietly(Laplace(2.0), X[:fits], Y[:fits], memory_limit=limit, **words)[0].alpha.shape == (fits, 2)
    beyond = int(1.1 * largest) + 2
    with pytest.raises(MemoryError, match="solve"):
        fastagop.explain("solve", Laplace(2.0), X[:beyond], Y[:beyond], memory_limit=limit, **words)


def test_peak_memory(peak_memory):
    """One n x n matrix, and less than 0.3 of another beside it."""
    setup = """
kernel, g, n = fastagop.Laplace(2.0), torch.Generator().manual_seed(0), 4000
X, Y = torch.randn(n, 16, generator=g).double(), torch.randn(n, 3, generator=g).double()
fastagop.solve(kernel, X[:700], Y[:700])
"""
    assert 1.0 <= peak_memory(setup, "fastagop.solve(kernel, X, Y)") / (4000 * 4000 * 8) <= 1.3


# ---- the result


@dtypes
def test_solution(dtype, cloud, normal):
    X, Y = cloud("spread", dtype=dtype), normal(120, 3, dtype=dtype)
    solution = fastagop.solve(Laplace(2.0), X, Y, ridge=1e-3)
    assert isinstance(solution, fastagop.Solution)
    assert solution.alpha.shape == (120, 3)
    assert not solution.alpha.requires_grad
    for field in ("residual", "ridge", "jitter", "seconds"):
        assert type(getattr(solution, field)) is float, field
    assert type(solution.iterations) is int
    assert type(solution.rank) is int
    assert solution.ridge == 1e-3
    assert solution.method == "cholesky"
    assert solution.seconds > 0
    assert (solution.iterations == 0) == (solution.dtype == torch.float64)
    with pytest.raises(dataclasses.FrozenInstanceError):
        solution.jitter = 0.0


@dtypes
@methods
@ridges
def test_small_problems(dtype, method, ridge, cloud, normal, relative, system):
    for n in (1, 2):
        X, Y = cloud("spread", n=n, dtype=dtype), normal(n, 2, dtype=dtype)
        solution, said = quietly(Laplace(2.0), X, Y, ridge=ridge, method=method)
        assert not said
        exact = torch.linalg.solve(system(Laplace(2.0), X, ridge), Y.double())
        assert relative(solution.alpha, exact) <= 16 * torch.finfo(solution.dtype).eps + torch.finfo(dtype).eps


@dtypes
@methods
def test_zero_targets(dtype, method, cloud):
    solution, said = quietly(
        Laplace(2.0), cloud("spread", dtype=dtype), torch.zeros(120, 2, dtype=dtype), method=method
    )
    assert not solution.alpha.any()
    assert solution.residual == 0.0
    assert not said


def test_no_targets(cloud, normal):
    assert fastagop.solve(Laplace(2.0), cloud("spread"), normal(120, 0)).alpha.shape == (120, 0)


@dtypes
@pytest.mark.parametrize("ridge", [0.0, 1e-2])
def test_layouts_and_inputs(dtype, ridge, cloud, normal, relative):
    X, Y = cloud("spread", n=160, d=24, dtype=dtype)[::2, ::2], normal(160, 6, dtype=dtype)[::2, ::3]
    assert not X.is_contiguous()
    assert not Y.is_contiguous()
    before = X.clone(), Y.clone()
    solution = fastagop.solve(Laplace(2.0), X.requires_grad_(), Y, ridge=ridge)
    plain = fastagop.solve(Laplace(2.0), before[0].contiguous(), before[1].contiguous(), ridge=ridge)
    assert relative(solution.alpha, plain.alpha) <= 1e3 * torch.finfo(dtype).eps  # the condition, roughly
    assert torch.equal(X.detach(), before[0])
    assert torch.equal(Y, before[1])


@pytest.mark.parametrize("ridge", [0.0, 1e-2])
def test_linear_in_the_targets(ridge, cloud, normal, relative):
    X, Y, Q = cloud("spread"), normal(120, 3), normal(120, 3, seed=2)

    def alpha(targets):
        return fastagop.solve(Laplace(2.0), X, targets, ridge=ridge).alpha

    bound = 1e3 * 2.0**-52 * 4  # the condition, roughly
    assert relative(alpha(2.0 * Y - 3.0 * Q), 2.0 * alpha(Y) - 3.0 * alpha(Q)) <= bound
    assert relative(alpha(Y[:, :1]), alpha(Y)[:, :1]) <= bound
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0))
    shuffled = fastagop.solve(Laplace(2.0), X[order], Y[order], ridge=ridge).alpha
    assert relative(shuffled, alpha(Y)[order]) <= bound


def test_columns_of_very_different_size(cloud, normal, relative, system):
    # one large target column must not hide that a small one is unsolved
    X = cloud("collapsed 1e-2", n=150, dtype=torch.float32)
    X = X + 1e-4 * normal(150, 12, dtype=torch.float32, seed=3)  # no copies
    Y = normal(150, 2, dtype=torch.float32) * torch.tensor([1.0, 1e-4])
    solution, _ = quietly(Laplace(2.0), X, Y, ridge=1e-1)
    exact = torch.linalg.solve(system(Laplace(2.0), X, 1e-1), Y.double())
    values = torch.linalg.eigvalsh(system(Laplace(2.0), X, 1e-1))
    bound = 16 * torch.finfo(torch.float32).eps * float(values[-1] / values[0])
    for c in range(2):
        assert relative(solution.alpha[:, c], exact[:, c]) <= bound


@pytest.mark.parametrize("size", [1e-25, 1e25])  # float32 numbers whose squares are not
@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_units_do_not_matter(size, ridge, cloud, normal, relative, system):
    X, Y = cloud("spread", dtype=torch.float32) * size, normal(120, 2, dtype=torch.float32)
    solution, said = quietly(Laplace(2.0 * size), X, Y, ridge=ridge)
    assert not said
    honest(solution, system(Laplace(2.0 * size), X, ridge), Y)


@pytest.mark.parametrize("word", ["highest", "high", "medium"])
def test_precision_words(word, cloud, normal, system):
    X, Y = cloud("spread", dtype=torch.float32), normal(120, 2, dtype=torch.float32)
    solution, said = quietly(Laplace(2.0), X, Y, ridge=1e-3, precision=word)
    assert not said
    honest(solution, system(Laplace(2.0), X, solution.ridge), Y)


@pytest.mark.parametrize("spread", [1e-1, 1e-3])
def test_a_float32_factor_without_a_ridge_is_refined_from_the_points(spread, normal):
    """The residual is that of the float64 kernel matrix, not of its float32 copy that was factored."""
    X = (normal(5, 12)[torch.arange(120) % 5] + spread * normal(120, 12)).float()
    Y = normal(120, 3, dtype=torch.float32)
    solution = fastagop.solve(Laplace(2.0), X, Y, memory_limit=1.6 * 120**2 * 4 + 120 * 12 * 8)
    assert solution.dtype == torch.float32
    K = reference.kernel_matrix(Laplace(2.0), X)
    alpha, target = solution.alpha.double(), Y.double()
    true = float((K @ alpha - target).norm() / target.norm())
    assert true == pytest.approx(solution.residual, rel=1e-4)
    rounding = torch.finfo(torch.float32).eps * float(K.norm() * alpha.norm() / target.norm())
    assert true <= rounding


@pytest.mark.parametrize("method", ["cholesky", "cholesky+cg", "eigh", "cg"])
@pytest.mark.parametrize("size", [2.0**700, 2.0**-700])  # squares leave float64
def test_the_size_of_targets_does_not_matter(method, size, normal):
    X, Y = normal(20, 3), normal(20, 2, seed=2)
    plain, scaled = (fastagop.solve(Laplace(1.0), X, y, method=method) for y in (Y, Y * size))
    torch.testing.assert_close(scaled.alpha / size, plain.alpha, rtol=1e-9, atol=1e-12)
    assert scaled.residual <= 1e-6


@pytest.mark.parametrize("method", ["cholesky", "cg"])
@pytest.mark.parametrize(
    ("kernel", "ridge"),
    [(fastagop.Polynomial(2, 1.0, 1.0), 1e-3), (fastagop.Gaussian(50.0), 1e-4)],
    ids=["low rank", "wide"],
)
def test_large_coefficients_under_a_ridge_need_no_jitter(kernel, ridge, method):
    """Targets that the kernel cannot fit: coefficients are about the targets over the ridge."""
    generator = torch.Generator().manual_seed(0)
    X, Y = torch.randn(120, 7, generator=generator), torch.randn(120, 3, generator=generator)
    with pytest.warns(fastagop.NumericalWarning, match="float64 points or a larger ridge|larger rank"):
        solution = fastagop.solve(kernel, X, Y, ridge=ridge, method=method)
    assert solution.jitter == 0.0
    assert solution.residual < 1e-2  # .7 to .9 with jitter


# ---- weights


@pytest.mark.parametrize("weight", [1e-320, 1e-40])
@pytest.mark.parametrize("method", ["auto", "cg", "eigh"])
@pytest.mark.parametrize("kernel", [Laplace(2.0), fastagop.Polynomial(2)], ids=repr)
def test_a_weight_below_what_the_ridge_may_be_divided_by_counts_as_none(kernel, method, weight, normal):
    """A likelihood of 1e-320, say: the ridge over it leaves float64."""
    X, Y, w = normal(40, 5), normal(40, 2, seed=2), normal(40, 1, seed=3)[:, 0].abs() + 0.1
    w[3] = weight
    found = fastagop.solve(kernel, X, Y, ridge=1e-3, method=method, sample_weight=w)
    w[3] = 0.0
    without = fastagop.solve(kernel, X, Y, ridge=1e-3, method=method, sample_weight=w)
    torch.testing.assert_close(found.alpha, without.alpha, rtol=1e-4, atol=1e-6 * float(without.alpha.abs().max()))
    assert found.residual <= 1e-6


# ---- kernels of one's own


@dataclasses.dataclass(frozen=True)
class Alike(Radial):
    """1 at distance 0 and one other value everywhere else, whatever the bandwidth is: no positive definite kernel."""

    elsewhere: float

    def value_(self, sq):
        return sq.copy_(torch.where(sq > 0, self.elsewhere, 1.0))


OF_ONES_OWN = [*METHODS, "cg", fastagop.ConjugateGradients(rank=3), fastagop.ConjugateGradients(rank=0, store=True)]


@pytest.mark.parametrize("method", OF_ONES_OWN, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(method, value, normal):
    """No jitter helps such a matrix, and every larger one would be tried."""
    X, Y = normal(30, 5), normal(30, 2, seed=2)
    with pytest.raises(ValueError, match="kernel must have finite values at all distances"):
        fastagop.solve(Alike(1.0, value), X, Y, ridge=1e-3, method=method)


@pytest.mark.parametrize("method", ["auto", "cholesky+cg"])
def test_jitter_rises_where_values_are_negative(method, normal):
    """The largest row sum, of which the least jitter is a share, is below zero."""
    X, Y = normal(30, 5, dtype=torch.float32), normal(30, 2, dtype=torch.float32, seed=2)
    with pytest.warns(fastagop.NumericalWarning, match="jitter"):
        found = fastagop.solve(Alike(1.0, -0.9), X, Y, ridge=1e-3, method=method)
    assert found.jitter > 0
    assert found.alpha.isfinite().all()
