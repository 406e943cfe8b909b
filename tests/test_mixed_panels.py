"""Products of a preconditioner's factor in bfloat16 where their rounding is small beside the pivots."""

from __future__ import annotations

import pytest
import torch
from fastagop.kernels import reference
from fastagop.kernels.gemm import LIBRARY, PanelProducts
from fastagop.kernels.torch_backend import panels
from fastagop.kernels.torch_backend.panels import MixedPanels

import fastagop
from fastagop import ConjugateGradients, Laplace, datasets
from fastagop.solvers import cg, factor_products, half, symmetric_blocks
from fastagop.solvers.symmetric_blocks import SymmetricBlocks

N, ROWS = 900, 128


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Parts, triangles and blocks of a few columns, so that some hundred rows have several of each."""
    monkeypatch.setattr(panels, "_FEWEST", 32)
    monkeypatch.setattr(panels, "_CHUNK", 100)
    monkeypatch.setitem(symmetric_blocks.INVERTED, "cpu", 32)
    monkeypatch.setitem(symmetric_blocks.ROWS, "cpu", ROWS)
    monkeypatch.setattr("fastagop.solvers.problem.FULL_MATRIX_ROWS", 64)


@pytest.fixture
def tiles(monkeypatch):
    """A processor with tiles for bfloat16; those without multiply slowly, and the same."""
    monkeypatch.setattr(factor_products, "has_tiles", lambda: True)


def points(name: str) -> torch.Tensor:
    """Rows that a factor meets in an order that hurts, or that are hard to tell apart."""
    drawn = torch.Generator().manual_seed(0)
    normal = torch.randn(N, 40, generator=drawn)
    centres = torch.randn(6, 40, generator=drawn)
    pairs = normal.clone()
    pairs[1::2] = pairs[::2] + 1e-3 * normal[1::2]
    return {
        "normal": normal,
        "digits": datasets.load("digits", n=N)[0],
        "classes, sorted": centres[torch.arange(N) * 6 // N] + 0.1 * normal,
        "a dense half, last": torch.cat([normal[: N // 2], 0.01 * normal[N // 2 :]]),
        "a dense half, first": torch.cat([0.01 * normal[N // 2 :], normal[: N // 2]]),
        "pairs": pairs,
        "a line": torch.linspace(0.0, 9.0, N)[:, None],
    }[name]


def blocks_of(K: torch.Tensor) -> SymmetricBlocks:
    blocks = SymmetricBlocks(len(K), torch.float32)
    assert len(blocks.slices) > 6
    return blocks.fill_(lambda out, start: out.copy_(K[start : start + len(out), : out.shape[1]]))


def factored(K: torch.Tensor, products: PanelProducts) -> tuple[SymmetricBlocks, float, int]:
    """(the factor F, ||L^-1 F F^T L^-T - I||, steps of conjugate gradients on it to 1e-10)."""
    blocks = blocks_of(K)
    assert blocks.cholesky_(K.diagonal(), products) == 0
    L, Y = torch.linalg.cholesky(K), torch.randn(len(K), 3, generator=torch.Generator().manual_seed(1)).double()
    apart = torch.linalg.solve_triangular(L, blocks.full().tril().double(), upper=False)
    apart = torch.linalg.matrix_norm(apart @ apart.T - torch.eye(len(K)), 2)
    options = cg.ConjugateGradients(tolerance=1e-10, max_iterations=60)
    done = cg.conjugate_gradients(lambda V: K @ V, Y, lambda R: blocks.solve(R.float()).double(), options)
    assert done.residual <= 1e-9
    return blocks, float(apart), done.iterations


@pytest.mark.parametrize(
    ("name", "bandwidth", "rounds"),
    [
        ("normal", 6.0, True),
        ("normal", 2.0, True),
        ("digits", 20.0, True),
        ("classes, sorted", 6.0, True),
        ("a dense half, last", 4.0, True),
        ("a dense half, first", 4.0, True),
        ("pairs", 6.0, False),
        ("a line", 1.0, True),
    ],
)
def test_a_rounded_factor_preconditions_nearly_as_well(name, bandwidth, rounds):
    K = reference.kernel_matrix(Laplace(bandwidth), points(name))
    mixed = factor_products.mixed(blocks_of(K), K.diagonal())
    exact, rounded = factored(K, LIBRARY), factored(K, mixed)
    assert mixed.has_rounded is rounds
    assert rounded[1] <= 0.5  # what steps shrink residuals by
    assert rounded[2] <= exact[2] + 5
    if not rounds:
        assert all(torch.equal(*pair) for pair in zip(exact[0].blocks, rounded[0].blocks, strict=True))


def test_what_the_test_would_find(monkeypatch):
    """Ten times as much rounding makes a poor preconditioner, and a hundred times as much lets pivots fail."""
    K = reference.kernel_matrix(Laplace(4.0), points("a dense half, last"))
    good = factored(K, factor_products.mixed(blocks_of(K), K.diagonal()))
    monkeypatch.setattr(panels, "_SHARE", 1.0)
    poor = factored(K, factor_products.mixed(blocks_of(K), K.diagonal()))
    assert poor[1] > 10.0 * good[1]
    assert poor[2] > good[2] + 5
    monkeypatch.setattr(panels, "_SHARE", 10.0)
    bad = blocks_of(K)
    assert bad.cholesky_(K.diagonal(), factor_products.mixed(bad, K.diagonal())) > 0


def test_the_least_pivot_is_estimated_from_pairs():
    K = reference.kernel_matrix(Laplace(2.0), points("pairs"))
    least = 1.0 - float((K - torch.eye(N)).max())
    assert 1.0 - blocks_of(K).largest_beside_diagonal() == pytest.approx(least, abs=1e-7)
    assert float(torch.linalg.eigvalsh(K)[0]) <= least < 1e-2
    assert SymmetricBlocks(1, torch.float64).fill_(lambda out, start: out.fill_(1.0)).largest_beside_diagonal() == 0.0


def test_a_column_that_takes_much_off_the_diagonal_is_exact():
    """By hand: eight parts of 32 columns, of which one is large and one takes what is allowed alone."""
    n, diagonal = 10_000, torch.full((ROWS,), 2.0)
    A = torch.full((ROWS, 8 * 32), 1e-4)
    A[:, 32:64] = 0.15
    allowed = panels._SHARE * 0.5 * 2**8 / n**0.5
    A[:, 96:128] = (0.9 * allowed / 32) ** 0.5
    mixed = MixedPanels(n, ROWS, 0.5)
    ready = mixed.ready(A, diagonal)
    assert columns(ready.fine) == [slice(32, 64)]
    assert columns(ready.coarse) == [slice(0, 32), slice(64, 160), slice(160, 256)]  # 100 at once at most
    assert all(torch.equal(part, A[:, some].bfloat16()) for some, part in ready.coarse)
    A[:, 96:128] *= 1.1
    assert columns(mixed.ready(A, diagonal).coarse) == [slice(0, 32), slice(64, 96), slice(128, 224), slice(224, 256)]
    assert mixed.ready(A, torch.full((ROWS,), float(A[0].square().sum()))).coarse == []  # no pivot is left
    assert mixed.ready(A).coarse == []


def columns(parts: list[tuple[slice, torch.Tensor]]) -> list[slice]:
    return [some for some, _ in parts]


# ---- within a solve


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    return points("normal"), torch.randn(N, 2, generator=torch.Generator().manual_seed(2))


def residual(X: torch.Tensor, Y: torch.Tensor, solution: fastagop.Solution) -> float:
    K = reference.kernel_matrix(Laplace(6.0), X.double())
    return float((K @ solution.alpha.double() - Y).norm() / Y.norm())


def test_a_solve_says_how_its_factor_was_made(tiles, monkeypatch):
    X, Y = problem()
    solution = fastagop.solve(Laplace(6.0), X.double(), Y.double(), method="cholesky+cg")
    assert (solution.method, solution.dtype, solution.fallback) == ("cholesky+cg", torch.float32, "")
    assert solution.residual <= 1e-10
    assert residual(X, Y, solution) <= 1e-9
    said = "a float32 factor by bfloat16 products where their rounding is small, float64 conjugate gradients"
    assert said in fastagop.explain("solve", Laplace(6.0), X, Y)
    monkeypatch.setattr(factor_products, "has_tiles", lambda: False)
    assert "bfloat16" not in fastagop.explain("solve", Laplace(6.0), X, Y)
    assert fastagop.solve(Laplace(6.0), X.double(), Y.double(), method="cholesky+cg").iterations <= solution.iterations


def test_float32_products_take_over_from_rounded_ones(tiles, monkeypatch, caplog):
    X, Y = problem()
    made, factor = [], SymmetricBlocks.cholesky_

    def noted(blocks, diagonal, products):
        made.append(products)
        return 7 if isinstance(products, MixedPanels) and factor(blocks, diagonal, products) == 0 else 0

    monkeypatch.setattr(SymmetricBlocks, "cholesky_", lambda *args: noted(*args) or factor(*args))
    with caplog.at_level("INFO", "fastagop"):
        solution = fastagop.solve(Laplace(6.0), X.double(), Y.double(), method="cholesky+cg")
    assert [type(products) for products in made] == [MixedPanels, PanelProducts]
    assert (solution.method, solution.fallback) == ("cholesky+cg", "")
    assert residual(X, Y, solution) <= 1e-9
    assert "pivot 7 of the float32 factor is not positive; its products were partly bfloat16's" in caplog.text


def test_what_nothing_was_rounded_for_is_not_tried_again(tiles, monkeypatch):
    X = points("normal")
    X[1::2] = X[::2] + 1e-7
    made, factor = [], SymmetricBlocks.cholesky_
    monkeypatch.setattr(SymmetricBlocks, "cholesky_", lambda *args: made.append(args[0].dtype) or factor(*args))
    solution = fastagop.solve(fastagop.Gaussian(6.0), X.double(), X[:, :2].double(), ridge=1e-9, method="cholesky+cg")
    assert solution.method == "cholesky"
    assert made.count(torch.float32) == 1


@pytest.mark.usefixtures("tiles")
def test_only_a_factor_beside_a_matrix_is_rounded():
    """The others are refined by products of the points, where a step costs as much as a fill."""
    X, Y = problem()
    prepared = fastagop.solvers.solve.prepare(
        Laplace(6.0), X, Y, fastagop.solvers.solve.SolveOptions(method="cholesky+cg")
    )
    assert factor_products.may_round(prepared.problem)
    assert prepared.solver.run == half.REFINED.run
    text = fastagop.explain("solve", Laplace(6.0), X, Y, method=ConjugateGradients(store=True))
    assert "bfloat16" not in text


@pytest.mark.usefixtures("tiles")
def test_a_backends_own_products_come_first(monkeypatch):
    """As Triton's split ones, which the interpreter runs on the CPU."""
    X, Y = problem()
    prepared = fastagop.solvers.solve.prepare(Laplace(6.0), X, Y, fastagop.solvers.solve.SolveOptions())
    assert factor_products.may_round(prepared.problem)
    monkeypatch.setattr(factor_products, "products_of", lambda problem: PanelProducts())
    assert not factor_products.may_round(prepared.problem)
