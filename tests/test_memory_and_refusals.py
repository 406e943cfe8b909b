"""A memory limit bounds what a call takes, and calls that mean nothing or lose everything are refused."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fastagop.kernels.kernel_operator import KernelOperator
from fastagop.kernels.pair_backend.composite import pairs_of
from fastagop.kernels.torch_backend.tiles import BLOCKS_ALIVE

import fastagop
from fastagop import NTK, ArcCosine, Laplace, LpLaplace, Polynomial, distributed
from fastagop.distributed.communicator import Communicator
from fastagop.solvers.solve import SolveOptions, prepare

UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}


def planned(*call, **options) -> float:
    """Bytes that explain names, three digits of them."""
    found = re.search(r"memory +([\d.]+) (\w+) beyond", fastagop.explain(*call, **options))
    assert found
    return float(found[1]) * UNITS[found[2]]


@pytest.fixture
def alone(tmp_path):
    """A group of this process only."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


# ---- Memory


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("limit", [6e5, 1e6])
def test_the_gradient_form_keeps_to_its_limit(shared, limit, cloud, normal, tensor_memory, relative, request):
    """Blocks shrink with the limit, in a group of processes, too; without one the call takes more than either."""
    if shared:
        request.getfixturevalue("alone")
    agop = distributed.agop if shared else fastagop.agop
    X, alpha, how = cloud("spread", n=400, d=20), normal(400, 10), {"method": "gradient"}
    free, most = tensor_memory(lambda: agop(Laplace(2.0), X, alpha, **how))
    assert most > 1.2e6
    M, taken = tensor_memory(lambda: agop(Laplace(2.0), X, alpha, memory_limit=limit, **how))
    assert taken <= limit
    assert relative(M, free) <= 1e-12


@pytest.mark.parametrize("limit", [2.5, 2.9])  # of W: a float64 copy alone takes 2
def test_weights_that_are_stored_count_for_the_copy(limit, cloud, normal, tensor_memory):
    """Near collapse the gram form wants a float64 copy of its weights; beside them there is no room for it."""
    n = 300
    X, alpha = cloud("collapsed 1e-4", n=n, d=7, dtype=torch.float32), normal(n, 8, dtype=torch.float32)
    limit *= 4 * n * n
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        _, taken = tensor_memory(lambda: fastagop.agop(Laplace(2.0), X, alpha, method="gram", memory_limit=limit))
    assert taken <= limit
    assert [warning.category for warning in said] == [fastagop.NumericalWarning]


def test_the_gradient_form_in_the_place_of_a_gram_form_keeps_to_the_limit(normal, tensor_memory):
    """Of a kernel that is not radial and many outputs: gradients take far more than the gram form's matrices."""
    X, alpha, kernel = normal(64, 100), normal(64, 200, seed=2), Laplace(2.0) + Polynomial(1)
    X[1::2] = X[::2] + 1e-7 * X[1::2]
    alpha[1::2] = -alpha[::2]
    limit = 16e6
    assert "method gram" in fastagop.explain("agop", kernel, X, alpha, memory_limit=limit)
    M, taken = tensor_memory(lambda: fastagop.agop(kernel, X, alpha, memory_limit=limit))
    assert taken <= limit
    torch.testing.assert_close(M, fastagop.agop(kernel, X, alpha, method="gradient"))


OF_PAIRS = [NTK(1), NTK(2), NTK(5), ArcCosine(0), ArcCosine(2), Polynomial(3)]
OF_PAIRS += [Laplace(2.0) + NTK(3), 2.0 * Laplace(2.0) * NTK(2) * Polynomial(2)]


@pytest.mark.parametrize("kernel", OF_PAIRS, ids=repr)
@pytest.mark.parametrize("what", ["values", "gradients", "combination"])
def test_kernels_of_pairs_say_how_many_blocks_they_take(kernel, what, normal, tensor_memory):
    """Plans go by that number; points of so many features have no near pairs, whose steps are planned for beside."""
    X, Z, alpha, row = normal(3000, 9), normal(40, 9, seed=2), normal(3000, 1, seed=3), slice(0, 40)
    pairs = pairs_of(kernel, X, Z)
    calls = {
        "values": lambda: pairs.values(row),
        "gradients": lambda: pairs.add_gradients(row, None, alpha, X.new_zeros(40, 1, 9)),
        "combination": lambda: pairs.combination(row),
    }
    _, taken = tensor_memory(calls[what])
    assert taken <= 8 * 40 * 3000 * (kernel.blocks_alive() + 1)  # and the points, prepared


@pytest.mark.parametrize("limit", [9e6, 2e7, 2**33])
def test_keops_plans_within_the_limit(limit, monkeypatch):
    """4000 points, 50 features, 10 outputs: all gradients at once would be 8 MB, and take three times that."""
    monkeypatch.setattr(fastagop.kernels.keops_backend.backend, "unusable", lambda X: None)  # nothing runs
    X, alpha = torch.zeros(4000, 50), torch.zeros(4000, 10)
    plan = planned("agop", Laplace(2.0), X, alpha, backend="keops", memory_limit=limit)
    assert 0.5 * min(limit, 2.4e7) <= plan <= 1.001 * limit


def test_processes_of_one_machine_share_its_memory(alone, little_memory, monkeypatch):
    little_memory(4e6)
    ranks = Communicator(alone, "agop", torch.device("cpu"))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    _, whole = ranks.agree(lambda: None, "the same")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    _, quarter = ranks.agree(lambda: None, "the same")
    assert 3e6 <= whole <= 4e6
    assert quarter == whole // 4


# ---- Refusals and reports


def test_a_ridge_has_no_place_between_other_points(cloud):
    X, Z = cloud("spread", n=5, d=3), cloud("spread", n=5, d=3, seed=2)
    with pytest.raises(ValueError, match=r"ridge belongs on the diagonal of k\(X, X\)"):
        fastagop.kernel_matrix(Laplace(2.0), X, Z, ridge=0.5)
    K = fastagop.kernel_matrix(Laplace(2.0), X, ridge=0.5)
    assert torch.equal(K.diagonal(), torch.full((5,), 1.5, dtype=torch.float64))
    assert torch.equal(fastagop.kernel_matrix(Laplace(2.0), X, X, ridge=0.5), K)  # the same points


@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("size", [1e24, 1e30])
def test_one_row_far_out_is_refused_in_float32(size, other, cloud):
    """In its unit the distances of all other rows would be zero, and their kernel values 1."""
    X = cloud("spread", n=20, d=4, dtype=torch.float32)
    far = X.clone()
    far[3] *= size
    name = "Z" if other else "X"
    with pytest.raises(ValueError, match=rf"{name}\[3\] has an entry of size"):
        fastagop.kernel_matrix(Laplace(2.0), *((X, far) if other else (far,)))
    K = fastagop.kernel_matrix(Laplace(2.0), far.double())  # float64 holds both
    assert 0 < float(K[0, 1]) < 1
    assert float(K[0, 3]) == 0


def test_every_rank_knows_the_least_room_and_what_was_altered():
    words = [str(Path(__file__).with_name("rank_cases.py")), "2:least_room", "2:reports"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, timeout=300)
    for case in ("least_room", "reports"):
        assert f"2:{case} ended with 0" in done.stdout, done.stderr


def test_a_shared_solve_reports_what_it_altered(alone, cloud, normal):
    X, Y = cloud("spread", n=60), normal(60, 2)
    X[1], Y[1] = X[0] + 1e-12, Y[0] + 1.0
    with pytest.warns(fastagop.NumericalWarning, match="jitter") as said:
        solution = distributed.solve(Laplace(2.0), X, Y)
    assert len(said) == 1
    assert solution.jitter > 0


# ---- solves take what is planned


@pytest.mark.parametrize("method", ["cholesky", "eigh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_targets_of_many_outputs_are_part_of_the_plan(method, dtype, normal, tensor_memory):
    """Two and more times as many outputs as points: targets, coefficients and residuals take more than the matrix."""
    X, Y = normal(250, 5, dtype=dtype), normal(250, 600, dtype=dtype, seed=2)
    prepared = prepare(Laplace(2.0), X, Y, SolveOptions(1e-2, method))
    _, taken = tensor_memory(lambda: fastagop.solve(Laplace(2.0), X, Y, ridge=1e-2, method=method))
    assert 0.35 * prepared.plan.peak_bytes <= taken <= 1.02 * prepared.plan.peak_bytes
    limit = prepared.plan.peak_bytes / 2
    with pytest.raises(MemoryError, match=r"solve with n = 250 needs") as error:
        fastagop.solve(Laplace(2.0), X, Y, ridge=1e-2, method=method, memory_limit=limit)
    fits = int(re.search(r"n up to about (\d+) fits", str(error.value))[1])
    fastagop.solve(Laplace(2.0), X[:fits], Y[:fits], ridge=1e-2, method=method, memory_limit=limit)


@pytest.mark.parametrize("kernel", [NTK(depth=2), Laplace(2.0) + ArcCosine(1)], ids=repr)
def test_blocks_of_kernels_that_are_not_radial_are_part_of_the_plan(kernel, normal, tensor_memory):
    """Their blocks take several others to compute, so that fewer rows fit beside the matrix."""
    X, Y = normal(700, 5), normal(700, 2, seed=2)
    plan = prepare(kernel, X, Y, SolveOptions(1e-2, "cholesky")).plan
    _, taken = tensor_memory(lambda: fastagop.solve(kernel, X, Y, ridge=1e-2, method="cholesky"))
    assert 0.5 * plan.peak_bytes <= taken <= 1.02 * plan.peak_bytes


def test_whether_values_differ_is_seen_at_few_points(normal, tensor_memory):
    """A matrix of all pairs of a thousand points would take more than the matrix of this problem."""
    X, Y = normal(600, 5), normal(600, 2, seed=2)
    _, taken = tensor_memory(lambda: fastagop.solve(LpLaplace(1.5, 1.0, 2.0), X, Y, ridge=1e-2))
    assert taken <= 8 * 600 * 600 * 2.5


def test_float64_blocks_beside_a_float32_matrix_have_fewer_rows(normal, monkeypatch):
    rows = []
    product = KernelOperator.float64_product
    monkeypatch.setattr(KernelOperator, "float64_product", lambda op, block: rows.append(block) or product(op, block))
    X, Y = normal(2100, 5, dtype=torch.float32), normal(2100, 2, dtype=torch.float32, seed=2)
    fastagop.solve(Laplace(2.0), X, Y, ridge=1e-2, method="cholesky")
    assert rows
    assert all(8 * BLOCKS_ALIVE * 2100 * block <= 0.25 * 4 * 2100**2 for block in rows)
