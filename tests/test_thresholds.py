"""Constants that decide something: each is tried on both of its sides."""

from __future__ import annotations

import dataclasses
import re
import warnings

import pytest
import torch
from fastagop.kernels.kernel_operator import KernelOperator
from fastagop.kernels.memory import free
from fastagop.kernels.operations import prepared
from fastagop.kernels.precision import _by_backend, _switched
from fastagop.kernels.scaling import scale_points
from fastagop.kernels.torch_backend import costs, diagonal, distance, gradients, tiles

import fastagop
from fastagop import Laplace
from fastagop.network import sample_independence
from fastagop.solvers import pairs, table
from fastagop.solvers.problem import Advice, Problem
from fastagop.solvers.solution import Solution, warn_about

MATRIX = {"out": None, "ridge": 0.0, "precision": "highest", "backend": "auto"}


@pytest.mark.parametrize(("size", "unit"), [(2.0**-20, 1.0), (2.0**20, 1.0), (2.0**-21, 2.0**-20), (2.0**21, 2.0**22)])
def test_points_get_a_unit_where_they_are_far_from_one(size, unit):
    """frexp says 2^-21 = 0.5 * 2^-20: the largest entry is between 1/2 and 1 in its unit."""
    X = torch.tensor([[size, 0.0], [0.0, -size]])
    points = scale_points(Laplace(3.0), X, X)
    assert points.unit == unit
    assert points.Z is points.X
    assert torch.equal(points.X, X / unit)
    assert points.kernel.bandwidth == 3.0 / unit


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize(
    ("dtype", "rounding", "mixing"),
    [
        (torch.float64, 2e-13, 3e-13),
        (torch.float32, 1e-4, 1.3e-4),
        (torch.float16, 3e-3, 6e-3),
        (torch.bfloat16, 2e-2, 5e-2),
    ],
)
def test_outputs_differ_relative_to_their_size(size, dtype, rounding, mixing):
    b = size * torch.linspace(0.5, 1.0, 11, dtype=torch.float64)
    assert not sample_independence._differ([(b + size * rounding).to(dtype)], [b.to(dtype)])
    assert sample_independence._differ([(b + size * mixing).to(dtype)], [b.to(dtype)])


@pytest.mark.parametrize(("residual", "warns"), [(0.9e-4, False), (1.1e-4, True)])
def test_a_float32_matrix_promises_a_residual_to_float64_coefficients(residual, warns):
    alpha = torch.zeros(3, 1, dtype=torch.float64)
    solution = Solution(alpha, residual, 1e-3, 0.0, "cholesky", torch.float32, 3, 3, 0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_about(solution)
    assert [w.category for w in caught] == [fastagop.NumericalWarning] * warns


def test_single_rows_where_not_even_these_fit(normal):
    X, alpha = normal(50, 4), normal(50, 2)
    rows, needed = costs.gradient_form_beside(X, alpha, X, False, 0)
    assert (rows, needed) == (1, costs.gradient_form_bytes(1, X, alpha, X, False))
    roomy, taken = costs.gradient_form_beside(X, alpha, X, False, 10 * needed)
    assert roomy > 1
    assert taken <= 10 * needed


@pytest.mark.parametrize(
    ("rows", "n", "d", "K", "dtype"),
    [
        (200, 1000, 20, 1, torch.float32),
        (64, 4000, 20, 16, torch.float32),  # beside these, the factor of the outputs of one step
        (64, 200, 64, 100, torch.float64),  # outputs beyond a chunk of work
    ],
)
@pytest.mark.parametrize("crowd", [None, 15])  # every pair is near; too few for a product of their own
def test_a_block_of_near_pairs_takes_what_is_planned(rows, n, d, K, dtype, crowd, normal, tensor_memory):
    """Not more, and a third of it at least, of which one part left out would be missed.

    Direct differences of pairs are within what measuring distances took before, which plans compare with.
    """
    centers = normal(1, d).expand(n, d) if crowd is None else normal(n, d)[torch.arange(n) // crowd]
    X, alpha = (centers + 1e-3 * normal(n, d, seed=3)).to(dtype), normal(n, K, dtype=dtype)
    row, W, near = next(iter(tiles.weight_tiles(Laplace(2.0), X, X, rows, None)))
    out, Z = X.new_empty(rows, K, d), X[row]
    _, taken = tensor_memory(lambda: gradients.block_gradients(W, near, alpha, X, Z, None, out))
    planned = gradients.gradient_bytes(rows, n, d, K, X.element_size())
    if crowd is None:
        assert planned / 3 <= taken <= planned
    else:
        assert taken <= max(planned, distance.tile_bytes(rows, n, n, d, X.element_size()))


def test_the_diagonal_counts_copies_of_points_and_coefficients(normal):
    X, K = normal(500, 30, dtype=torch.float32), 7
    rows, peak = diagonal.plan_rows(X, K, 10**9)
    assert peak >= 500 * (K + 30) * 4 + rows * 500 * 4
    with pytest.raises(MemoryError, match="its diagonal"):
        diagonal.plan_rows(X, K, 500 * (K + 30) * 4)


def test_memory_of_a_system_that_does_not_say(monkeypatch, tmp_path):
    monkeypatch.setattr(free, "_FREE", tmp_path / "meminfo")
    monkeypatch.setattr("os.sysconf", lambda name: -1 if "PAGES" in name else 4096)
    assert free._free_bytes() == free._UNKNOWN

    def refuses(name):
        raise ValueError(name)

    monkeypatch.setattr("os.sysconf", refuses)
    assert free._free_bytes() == free._UNKNOWN


def test_two_rows_may_be_copies():
    """Rows that float32 cannot tell apart at their offset, and nothing else beside them."""
    X = torch.tensor([[1.0, 100.0], [1.0 + torch.finfo(torch.float32).eps, 100.0]])
    solution = fastagop.solve(Laplace(2.0), X, torch.tensor([[1.0], [1.0]]))
    assert solution.merged == 1
    assert solution.jitter == 0


def test_known_mirror_images_cost_no_time(normal):
    """The pairs of k(X, X) are estimated once; gradients visit all of them."""
    X, alpha = normal(400, 2), normal(400, 1)
    own = prepared("kernel_matrix", Laplace(2.0), X, None, **MATRIX).seconds()
    others = prepared("kernel_matrix", Laplace(2.0), X, X.clone(), **MATRIX).seconds()
    assert own == pytest.approx(0.5 * others, rel=0.05)
    call = {"precision": "highest", "backend": "auto"}
    both = [prepared("gradients", Laplace(2.0), X, alpha, Z, **call).seconds() for Z in (None, X.clone())]
    assert both[0] == pytest.approx(both[1], rel=0.01)


@pytest.mark.parametrize("solver", table.TABLE, ids=lambda solver: f"{solver.name}-{solver.dtype}")
def test_a_solver_plans_within_the_memory_that_the_table_says(solver, normal):
    X = normal(300, 6, dtype=torch.float32)
    operator = KernelOperator("solve", Laplace(2.0), X)
    problem = Problem(operator, 4, 1e-3, 0, fastagop.ConjugateGradients(), False, Advice())
    needed = solver.memory(problem)
    plan, _ = solver.plan(dataclasses.replace(problem, room=needed), "asked for")
    assert plan.method == solver.name
    with pytest.raises(MemoryError, match="solve with n = 300 needs"):
        solver.plan(dataclasses.replace(problem, room=needed - 1), "asked for")


def test_a_row_of_the_table_is_a_method(monkeypatch, normal):
    """The new row is last; "eigh" and "cg" of kernels that are not radial stay what they are."""
    twin = table._direct("twin", torch.float64, lambda problem: "twin asked for")
    X, Y = normal(40, 3), normal(40, 2)
    l1 = fastagop.ProductLaplace(2.0)
    before = [fastagop.solve(l1, X, Y, ridge=0.1, method=method).alpha for method in ("eigh", "cg")]
    with pytest.raises(ValueError, match="method must be one of"):
        fastagop.solve(Laplace(2.0), X, Y, method="twin")
    monkeypatch.setattr(table, "TABLE", (*table.TABLE, twin))
    solution = fastagop.solve(Laplace(2.0), X, Y, ridge=0.1, method="twin")
    assert solution.method == "twin"
    torch.testing.assert_close(solution.alpha, fastagop.solve(Laplace(2.0), X, Y, ridge=0.1, method="cholesky").alpha)
    text = fastagop.explain("solve", Laplace(2.0), X, Y, method="twin")
    assert "twin asked for" in text
    assert "twin, float64 matrix: about" in text
    seconds = [line for line in text.splitlines() if line.startswith("  seconds")]
    assert seconds[0] in fastagop.explain("solve", Laplace(2.0), X, Y, method="cholesky")
    sweep = dataclasses.replace(table.CG, name="sweep", offered="never")
    monkeypatch.setattr(table, "TABLE", (*table.TABLE, sweep))
    assert table.operation_of("sweep") == table.operation_of("cg") != table.operation_of("twin")
    assert fastagop.solve(Laplace(2.0), X, Y, ridge=0.1, method="sweep").rank < 40  # its preconditioner's
    assert "sweep" not in text
    fastagop.RFMRegressor(solver="twin", iterations=1).fit(X, Y)
    assert [(row.name, row.run) for row in table.PAIRS[1:]] == [
        ("eigh", pairs.eigh),
        ("cg", pairs.conjugate_gradients),
    ]
    for method, alpha in zip(("eigh", "cg"), before, strict=True):
        assert torch.equal(fastagop.solve(l1, X, Y, ridge=0.1, method=method).alpha, alpha)
    with pytest.raises(fastagop.BackendUnavailable, match=r"method='twin' cannot serve .*; use method='cholesky',"):
        fastagop.solve(l1, X, Y, method="twin")


def test_estimators_take_the_solvers_of_the_table():
    assert {"auto", "cholesky", "cholesky+cg", "eigh", "cg"} <= set(table.methods())
    names = re.escape(", ".join(map(repr, table.methods())))
    with pytest.raises(ValueError, match=f"solver must be one of {names}, got 'none'"):
        fastagop.RFMRegressor(solver="none").fit(torch.randn(9, 2), torch.randn(9))


def test_free_memory_is_what_the_system_calls_available(monkeypatch, tmp_path):
    """In units of 1024 bytes; paths of control groups may hold colons."""
    monkeypatch.setattr(free, "_FREE", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text("MemTotal:  900 kB\nMemFree:  100 kB\nMemAvailable:     300 kB\n")
    assert free._free_bytes() == 300 * 1024
    monkeypatch.setattr(free, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(free, "_MOUNT", tmp_path / "mount")
    (tmp_path / "groups").write_text("0::/job:7\n")
    (tmp_path / "mount" / "job:7").mkdir(parents=True)
    for name, text in (("memory.max", "500"), ("memory.current", "200"), ("memory.stat", "inactive_file 5")):
        (tmp_path / "mount" / "job:7" / name).write_text(text)
    assert free.group_bytes() == 305
    assert free.host_bytes() == 305


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_tf32_is_for_medium_on_a_gpu_only(kind, precision):
    """The settings of the process can be read without a GPU."""
    coarse, before = (kind, precision) == ("cuda", "medium"), torch.get_float32_matmul_precision()
    with _switched(precision, torch.device(kind)):
        if _by_backend():
            cuda, onednn = (one.matmul.fp32_precision for one in (torch.backends.cuda, torch.backends.mkldnn))
            assert (cuda == "tf32") == coarse
            assert onednn in ("ieee", "none")
        else:
            assert torch.get_float32_matmul_precision() == ("medium" if coarse else "highest")
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("method", table.methods()[1:])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_fit_has_the_same_metric_by_every_solver(method, dtype, normal):
    """Weights of the AGOP may come from what a solver has left of k(X, X): 520 points take no shorter path."""
    X = normal(520, 5)
    y = X[:, 0] * X[:, 1] + X[:, 2]
    fits = [
        fastagop.RFMRegressor(Laplace(4.0), ridge=0.1, iterations=1, dtype=dtype, solver=solver).fit(X, y)
        for solver in ("auto", method)
    ]
    assert fits[1].solution_.method == method
    torch.testing.assert_close(fits[1].M_, fits[0].M_, rtol=0.0, atol=1e-4 if dtype == "float32" else 1e-6)
