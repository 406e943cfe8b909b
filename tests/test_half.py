"""Direct solves by half of a matrix: the same answers as by all of it, in less memory."""

import os
import shutil
import types
import warnings

import pytest
import torch
from fastagop.kernels import reference
from fastagop.kernels.plan import AgopTask
from fastagop.kernels.torch_backend.gradients import Nearness

import fastagop
from fastagop import CholeskyCG, ConjugateGradients, Gaussian, GeneralisedLaplace, Laplace, Matern52
from fastagop.estimators import kernel_ridge
from fastagop.estimators.kernel_ridge import KernelRidge
from fastagop.solvers import full_refined, half, solve
from fastagop.solvers.solve import SolveOptions, prepare
from fastagop.solvers.symmetric_blocks import default_rows, half_bytes

KERNELS = [Laplace(4.0), Gaussian(1.5), Matern52(4.0), GeneralisedLaplace(4.0, 0.7)]
DTYPES = [torch.float32, torch.float64]
N = 330  # more than one step of the fill, and a tail


@pytest.fixture
def problem(cloud, normal):
    """(X, Y) in a dtype."""

    def build(dtype=torch.float32, n: int = N, name: str = "spread"):
        return cloud(name, n=n, dtype=dtype), normal(n, 3, dtype=dtype)

    return build


@pytest.fixture
def large(monkeypatch):
    """The rules of large problems, and blocks that are small beside them, for a few hundred points."""
    monkeypatch.setattr("fastagop.solvers.problem.FULL_MATRIX_ROWS", 64)
    monkeypatch.setattr(half, "_POINTS_ROWS", 32)


def quietly(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fastagop.solve(*args, **kwargs)


def true_residual(kernel, X, Y, solution, ridge=0.0):
    alpha = solution.alpha.double()
    left = reference.kernel_matrix(kernel, X) @ alpha + (ridge + solution.jitter) * alpha - Y.double()
    return float(left.norm() / Y.double().norm())


# ---- "cholesky+cg"


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.3])
def test_it_reaches_its_tolerance_in_few_steps(kernel, ridge, problem):
    X, Y = problem(torch.float64)
    solution = quietly(kernel, X, Y, ridge=ridge, method="cholesky+cg")
    assert (solution.method, solution.dtype, solution.fallback) == ("cholesky+cg", torch.float32, "")
    assert true_residual(kernel, X, Y, solution, ridge) <= 1e-10 * 3**0.5  # of every output by itself
    assert abs(solution.residual - true_residual(kernel, X, Y, solution, ridge)) <= 1e-11
    assert solution.jitter == 0
    assert solution.tolerance == fastagop.CholeskyCG().tolerance == 1e-10
    assert 1 <= solution.iterations <= 12
    assert solution.rank == solution.residual_rows == N


def test_float32_points_have_float64_kernel_values(problem):
    X, Y = problem()
    solution = prepare(Laplace(4.0), X, Y, SolveOptions(method="cholesky+cg"))
    found, K = solution.run(Y, solve.copies.alone(X), torch.float64)
    assert found.alpha.dtype == torch.float64
    assert true_residual(Laplace(4.0), X, Y, found.solution) <= 1e-9
    torch.testing.assert_close(K.full(), reference.kernel_matrix(Laplace(4.0), X), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("form", [half.refined, half.in_place, half.from_points])
def test_every_point_has_its_own_ridge(form, problem, relative):
    X, Y = problem(torch.float64)
    prepared = prepare(Laplace(4.0), X, Y, SolveOptions(ridge=0.1, method="cholesky+cg"))
    ridge = torch.linspace(0.05, 0.5, N, dtype=torch.float64)
    found = form(prepared.problem, prepared.plan, Y, ridge, torch.float64)
    A = reference.kernel_matrix(Laplace(4.0), X) + torch.diag(ridge)
    assert relative(found.alpha, torch.linalg.solve(A, Y)) <= 1e-8
    rows, R = found.unmet(found.alpha, Y)
    assert float((R - (A @ found.alpha - Y)[rows]).norm()) <= 1e-12 * float(Y.norm()) * N


def test_options(problem):
    X, Y = problem(torch.float64)
    coarse = quietly(Laplace(4.0), X, Y, method=CholeskyCG(tolerance=1e-3))
    fine = quietly(Laplace(4.0), X, Y, method=CholeskyCG(tolerance=1e-13))
    assert coarse.iterations < fine.iterations
    assert fine.residual <= 1e-12 < coarse.residual <= 2e-3


def test_blocks_in_a_file_give_the_same_bits_and_leave_nothing(problem, tmp_path):
    X, Y = problem()
    at = CholeskyCG(place=tmp_path)
    assert at.place == str(tmp_path)
    alpha = quietly(Laplace(4.0), X, Y, method=CholeskyCG()).alpha
    assert torch.equal(quietly(Laplace(4.0), X, Y, method=at).alpha, alpha)
    assert os.listdir(tmp_path) == []
    model = fastagop.DeepRFMRegressor(Laplace(4.0), depth=1, width=16, solver=at).fit(X, Y)
    other = fastagop.DeepRFMRegressor(Laplace(4.0), depth=1, width=16, solver="cholesky+cg").fit(X, Y)
    assert torch.equal(model.agops_[0], other.agops_[0])


def test_bad_options(problem, tmp_path):
    X, Y = problem()
    with pytest.raises(ValueError, match="tolerance must be above 0, got 0"):
        CholeskyCG(tolerance=0)
    with pytest.raises(TypeError, match="place must be 'device', 'host' or a folder, got int"):
        CholeskyCG(place=3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="or a folder that exists, got '/nowhere'"):
        fastagop.solve(Laplace(4.0), X, Y, method=CholeskyCG(place="/nowhere"))
    with pytest.raises(ValueError, match="place='host' is for tensors on CUDA, and X is on cpu"):
        fastagop.solve(Laplace(4.0), X, Y, method=CholeskyCG(place="host"))


def test_options_are_saved_with_an_estimator(problem, tmp_path):
    X, Y = problem()
    for solver in (CholeskyCG(tolerance=1e-8), ConjugateGradients(rank=7, store=True)):
        model = fastagop.RFMRegressor(Laplace(4.0), iterations=1, solver=solver).fit(X, Y)
        model.save(tmp_path / "model.npz")
        assert fastagop.load(tmp_path / "model.npz").solver == solver


def test_a_model_is_loaded_without_its_solvers_folder(problem, tmp_path):
    X, Y = problem()
    (folder := tmp_path / "blocks").mkdir()
    model = fastagop.RFMRegressor(Laplace(4.0), iterations=1, solver=CholeskyCG(place=folder)).fit(X, Y)
    model.save(tmp_path / "model.npz")
    folder.rmdir()
    loaded = fastagop.load(tmp_path / "model.npz")
    assert torch.equal(loaded.predict(X), model.predict(X))
    with pytest.raises(ValueError, match="or a folder that exists, got "):
        loaded.fit(X, Y)


def test_a_disk_without_room_for_the_blocks_is_refused_by_name(problem, tmp_path, monkeypatch):
    X, Y = problem()
    at, needed = CholeskyCG(place=tmp_path), half_bytes(len(X), torch.float32, default_rows(len(X), X.device))

    def solved(free: int):
        usage = shutil.disk_usage(tmp_path)._replace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
        return prepare(Laplace(4.0), X, Y, SolveOptions(ridge=1e-3, method=at)).solver

    assert solved(3 * needed).run == half.REFINED.run
    assert solved(needed).run == solved(3 * needed - 1).run == half.FROM_POINTS.run
    with pytest.raises(MemoryError, match=f"place='{tmp_path}' needs .* of disk for n = {len(X)}, but .* are free "):
        solved(needed - 1)


# ---- falling over


def test_a_float64_factor_takes_over_where_a_float32_pivot_fails(problem):
    X, Y = problem()
    kernel = Gaussian(30.0)  # its smallest eigenvalues are far below float32's rounding
    solution = quietly(kernel, X, Y, ridge=1e-9, method="cholesky+cg")
    assert (solution.method, solution.dtype) == ("cholesky", torch.float64)
    assert "of the float32 factor is not positive" in solution.fallback
    assert f"fell back: {solution.fallback}" in repr(solution)
    direct = quietly(kernel, X, Y, ridge=1e-9, method="cholesky")
    assert solution.jitter == pytest.approx(direct.jitter, rel=1e-6)
    assert solution.residual == pytest.approx(direct.residual, rel=1e-3)


def test_a_float64_factor_takes_over_where_steps_are_not_enough(problem, monkeypatch, caplog):
    X, Y = problem(torch.float64)
    monkeypatch.setattr(half, "_most_steps", lambda problem: 1)
    with caplog.at_level("INFO", "fastagop"):
        solution = quietly(Laplace(4.0), X, Y, method="cholesky+cg")
    assert (solution.method, solution.dtype, solution.iterations) == ("cholesky", torch.float64, 0)
    assert solution.fallback.startswith("1 steps on a float32 factor left")
    assert "max_iterations = 1 steps were not enough" in solution.fallback
    assert "a float64 factor takes over, in place" in caplog.text
    assert true_residual(Laplace(4.0), X, Y, solution) <= 1e-12


class Factors(list):
    """The dtypes of factorisations of half a matrix, in order."""

    def __init__(self, monkeypatch):
        super().__init__()
        factor = half.SymmetricBlocks.cholesky_

        def noted(blocks, *args):
            self.append(blocks.dtype)
            return factor(blocks, *args)

        monkeypatch.setattr(half.SymmetricBlocks, "cholesky_", noted)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("solver", ["auto", "cholesky+cg"])
def test_a_fit_tries_a_float32_factor_until_one_gives_way(solver, problem, monkeypatch, tmp_path):
    X, Y = problem()
    factors = Factors(monkeypatch)

    def fitted(**options):
        factors.clear()
        how = {"depth": 3, "width": 16, "ridge": 1e-9, "solver": solver, "random_state": 0, **options}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return fastagop.DeepRFMRegressor(Gaussian(30.0), **how).fit(X, Y)

    model = fitted()
    solutions = [layer.solution for layer in model.layers_] + [model.solution_]
    reasons = [solution.fallback for solution in solutions]
    assert {(solution.method, solution.dtype) for solution in solutions} == {("cholesky", torch.float64)}
    assert reasons[0].startswith("pivot ")
    if solver != "auto":  # asked for by name, it is tried every time
        assert factors.count(torch.float32) == 4
        assert all(reason.startswith("pivot ") for reason in reasons)
        return
    assert factors.count(torch.float32) == 1
    assert reasons[1:] == 3 * [f"as before, {reasons[0]}"]

    def stop(event):
        if event.layer == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fitted(checkpoint_dir=tmp_path, callbacks=[stop])
    resumed = fitted(checkpoint_dir=tmp_path)
    assert torch.float32 not in factors
    assert [layer.solution.fallback for layer in resumed.layers_] == reasons[:3]
    assert torch.equal(resumed.alphas_[2], model.alphas_[2])


@pytest.mark.usefixtures("large")
def test_iterations_try_a_float32_factor_until_one_gives_way(problem, monkeypatch):
    X, Y = problem()
    factors = Factors(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = fastagop.RFMRegressor(Gaussian(30.0), iterations=2, ridge=1e-9).fit(X, Y)
    assert factors.count(torch.float32) == 1
    assert model.solution_.fallback == f"as before, {model.iterations_[0].solution.fallback}"


@pytest.mark.usefixtures("large")
def test_a_fit_begins_with_the_jitter_that_the_solve_before_needed(problem, monkeypatch):
    X, Y = problem()
    tried, factor = [], half.SymmetricBlocks.cholesky_

    def noted(blocks, diagonal, *args):
        tried[-1].append(float(diagonal) - 1.0)
        return factor(blocks, diagonal, *args)

    monkeypatch.setattr(half.SymmetricBlocks, "cholesky_", noted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tried.append([])
        model = fastagop.DeepRFMRegressor(
            Gaussian(30.0), depth=2, width=16, ridge=0.0, random_state=0, callbacks=[lambda event: tried.append([])]
        ).fit(X, Y)
    solutions = [layer.solution for layer in model.layers_] + [model.solution_]
    assert tried[0][0] == 0.0
    assert all(solution.jitter > 0 for solution in solutions)
    for values, solution, before in zip(tried[1:], solutions[1:], solutions, strict=False):
        assert values[0] == pytest.approx(before.jitter)
        assert values[-1] == pytest.approx(solution.jitter)


def test_a_fit_of_some_thousand_points_tries_a_float32_factor_until_one_gives_way(problem, monkeypatch):
    X, Y = problem(n=700)
    tried, factor = [], full_refined.factor_
    monkeypatch.setattr(full_refined, "factor_", lambda A: tried.append(len(A)) or factor(A))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = fastagop.RFMRegressor(Gaussian(30.0), iterations=2, ridge=1e-9).fit(X, Y)
    assert len(tried) <= 2  # both by the first solve
    assert model.solution_.fallback.startswith("as before, a float32 factor does not lead to")


def test_steps_that_may_be_taken(problem, monkeypatch):
    X, Y = problem()
    settled = prepare(Laplace(4.0), X, Y, SolveOptions(method="cholesky+cg")).problem
    assert half._most_steps(settled) == 12  # of few points all steps are short
    monkeypatch.setattr(half, "_factor_seconds", lambda problem, products: 100.0)
    monkeypatch.setattr(half, "_step_seconds", lambda problem: 2.0)
    assert half._most_steps(settled) == 25  # half of a float64 factor's time


def test_contradictions_of_close_points_raise_the_jitter(problem):
    X, Y = problem(torch.float64)
    X[100:200] = X[:100] + 1e-13
    solution = quietly(Laplace(4.0), X, Y, method="cholesky+cg")
    assert solution.method == "cholesky"
    assert solution.jitter > 0
    assert float(solution.alpha.abs().max()) < 1e9
    assert true_residual(Laplace(4.0), X, Y, solution) <= 1e-6  # with the jitter, which belongs to the system


# ---- less memory


def methods_by_room(X, Y, rooms, **options):
    return [prepare(Laplace(4.0), X, Y, SolveOptions(memory_limit=room, **options)) for room in rooms]


@pytest.mark.parametrize("dtype", DTYPES)
def test_half_a_float64_matrix_in_place(dtype, problem, relative):
    X, Y = problem(dtype)
    for kernel, ridge in ((Laplace(4.0), 0.0), (Gaussian(1.5), 1e-3)):
        prepared = prepare(kernel, X, Y, SolveOptions(ridge=ridge, method="cholesky"))
        found = half.in_place(prepared.problem, prepared.plan, Y.double(), ridge, dtype)
        A = reference.kernel_matrix(kernel, X) + ridge * torch.eye(N, dtype=torch.float64)
        assert relative(found.alpha, torch.linalg.solve(A, Y.double())) <= 1e-9
        assert (found.jitter, found.rank, found.K, found.dtype) == (0.0, N, None, torch.float64)


def test_a_restored_half_matrix_is_factored_again(problem):
    X, Y = problem(torch.float64)
    X[100:200] = X[:100] + 1e-13
    full = quietly(Laplace(4.0), X, Y, method="cholesky")
    prepared = prepare(Laplace(4.0), X, Y, SolveOptions(method="cholesky"))
    found = half.in_place(prepared.problem, prepared.plan, Y, 0.0, torch.float64)
    assert found.jitter > 0
    assert found.jitter == pytest.approx(full.jitter, rel=0.1)  # by tens and by what coefficients exceed their bound


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_a_float32_factor_and_products_from_the_points(ridge, problem):
    X, Y = problem()
    prepared = prepare(Laplace(4.0), X, Y, SolveOptions(method="cholesky+cg", ridge=ridge))
    found = half.from_points(prepared.problem, prepared.plan, Y.double(), ridge, torch.float64)
    A = reference.kernel_matrix(Laplace(4.0), X) + ridge * torch.eye(N, dtype=torch.float64)
    assert float((A @ found.alpha - Y.double()).norm() / Y.double().norm()) <= 1e-8
    assert (found.dtype, found.K) == (torch.float32, None)


def test_what_is_chosen_as_memory_shrinks(large):
    X, Y = torch.empty(20_000, 100, device="meta"), torch.empty(20_000, 3, device="meta")
    X, Y = (torch.zeros(1).expand(t.shape) for t in (X, Y))
    n2 = 20_000**2
    rows = [(p.solver.name, p.solver.stores) for p in methods_by_room(X, Y, [12 * n2, 7 * n2, 5.5 * n2, 3 * n2, n2])]
    both, factor = "half of a float64 matrix and of its float32 factor", "half of a float32 factor"
    quick = min(
        (half.in_place_seconds, half.from_points_seconds), key=lambda f: f(methods_by_room(X, Y, [n2])[0].problem)
    )
    middle = ("cholesky", "half of a float64 matrix") if quick is half.in_place_seconds else ("cholesky+cg", factor)
    assert rows == [("cholesky+cg", both), ("cholesky+cg", both), middle, ("cholesky+cg", factor), ("cg", "no matrix")]
    wide = X.double(), Y.double()
    rows = [(p.solver.name, p.solver.stores) for p in methods_by_room(*wide, [12 * n2, 6.5 * n2, 3 * n2])]
    assert rows == [("cholesky", "float64 matrix"), ("cholesky", "half of a float64 matrix"), ("cg", "no matrix")]
    for p in methods_by_room(X, Y, [12 * n2, 5.5 * n2, 3 * n2]):
        assert p.plan.peak_bytes == p.solver.memory(p.problem) <= p.problem.room


def test_the_method_by_name_says_what_does_not_fit():
    X, Y = (torch.zeros(1).expand(20_000, k) for k in (100, 3))
    with pytest.raises(MemoryError, match=r"solve with n = 20000 needs .* n up to about \d+ fits\. Use fewer points"):
        fastagop.solve(Laplace(1.0), X, Y, method="cholesky+cg", memory_limit=20_000**2)


def test_explain_lists_the_solvers(problem):
    X, Y = problem()
    text = fastagop.explain("solve", Laplace(4.0), X, Y)
    for name in ("cholesky+cg, half of a float64 matrix and of its float32 factor: about ", "cg, no matrix: about "):
        assert f"  solver     {name}" in text
    tight = fastagop.explain("solve", Laplace(4.0), X, Y, memory_limit=1e6)
    assert "cholesky, float64 matrix: 1.1 MB, which does not fit" in tight


def test_files_need_no_memory(tmp_path):
    X, Y = (torch.zeros(1).expand(20_000, k) for k in (100, 3))
    memory = {
        place: prepare(Laplace(1.0), X, Y, SolveOptions(method=CholeskyCG(place=place))).plan.peak_bytes
        for place in ("device", str(tmp_path))
    }
    assert memory["device"] > 6 * 20_000**2 > 9 * memory[str(tmp_path)]


# ---- conjugate gradients on a stored matrix


@pytest.mark.parametrize("dtype", DTYPES)
def test_conjugate_gradients_with_a_stored_matrix(dtype, problem, monkeypatch):
    X, Y = problem(dtype)
    options = {"ridge": 1e-2, "memory_limit": 1e9}
    made = quietly(Laplace(4.0), X, Y, method=ConjugateGradients(tolerance=1e-10), **options)
    passes = []
    product = fastagop.kernels.kernel_operator.PointsProduct.matmul
    monkeypatch.setattr(
        fastagop.kernels.kernel_operator.PointsProduct, "matmul", lambda *a: passes.append(1) or product(*a)
    )
    kept = quietly(Laplace(4.0), X, Y, method=ConjugateGradients(tolerance=1e-10, store=True), **options)
    assert not passes
    assert (kept.method, kept.iterations, kept.rank) == ("cg", made.iterations, made.rank)
    torch.testing.assert_close(kept.alpha, made.alpha, rtol=1e-5, atol=1e-7)
    plans = [
        prepare(Laplace(4.0), X, Y, SolveOptions(method=ConjugateGradients(store=s), memory_limit=1e9)).plan
        for s in (False, True)
    ]
    assert plans[1].peak_bytes - plans[0].peak_bytes == pytest.approx(4 * N * (N + 42), rel=0.02)
    assert "one pass over half of a stored matrix a step" in plans[1].why


# ---- the AGOP of what is stored


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
@pytest.mark.parametrize("name", ["spread", "collapsed 1e-3"])
@pytest.mark.parametrize("form", ["gradient", "gram"])
def test_a_fit_takes_the_weights_from_the_stored_half(kernel, name, form, problem, large, relative, monkeypatch):
    if kernel.weight_from_value_(torch.empty(0)) is None:
        pytest.skip("no closed form of the weight")
    X, Y = problem(name=name)
    seconds = {"gradient": 1.0, "gram": 1.0, form: 0.5}
    monkeypatch.setattr(kernel_ridge.costs, "costs", lambda *a, **k: seconds)
    measured = []
    monkeypatch.setattr(kernel_ridge.LOCAL, "agop", lambda *a: measured.append(1), raising=False)
    regression = KernelRidge(kernel, 1e-3, "highest", "auto", "cholesky+cg")
    solved, M, _ = kernel_ridge.fit_and_agop(X, Y, regression)
    solution = solved.solution
    assert solution.method == "cholesky+cg"
    assert not measured
    exact = torch.linalg.solve(reference.kernel_matrix(kernel, X) + 1e-3 * torch.eye(N), Y.double())
    assert relative(M, reference.agop(kernel, X.double(), exact) * N) <= 2e-5


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_tiles_of_the_stored_half_are_weighted_and_centred(center, weighted, problem, relative, monkeypatch):
    X, Y = problem()
    weight = torch.linspace(0.5, 2.0, N) if weighted else None
    rows = solve.copies.find(X, weight)
    found = []
    for solver, cheap in (("cholesky+cg", "gradient"), ("cholesky", "gram")):
        seconds = {"gradient": 1.0, "gram": 1.0, cheap: 0.5}
        monkeypatch.setattr(kernel_ridge.costs, "costs", lambda *a, seconds=seconds, **k: seconds)
        regression = KernelRidge(Laplace(4.0), 1e-2, "highest", "auto", solver)
        found.append(kernel_ridge.fit_and_agop(rows.take(X), Y, regression, rows=rows, center=center)[1])
    assert relative(found[0], found[1]) <= 1e-5


def test_weights_in_a_file_leave_the_limit_to_their_tiles(tmp_path):
    """Else each tile were a single row where the half is as large as the limit."""
    X, rows = torch.randn(1000, 5), {}
    for place in ("device", str(tmp_path)):
        W = half.SymmetricBlocks(1000, torch.float64, place=place).fill_(lambda out, start: out.fill_(0.0))
        task = AgopTask("sum", False, limit=W.bytes)
        first, _ = next(kernel_ridge._tiles_(W, X, X[:, :2], task))
        rows[place] = first.stop
    assert rows["device"] == 1
    assert rows[str(tmp_path)] > 30


@pytest.mark.parametrize("name", ["spread", "collapsed 1e-3", "scales", "identical"])
@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_near_pairs_from_stored_weights(kernel, name, cloud):
    X = cloud(name, n=100, dtype=torch.float32)
    exact = torch.cdist(X.double(), X.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    W = kernel.weight_(exact.clone()).fill_diagonal_(0.0)
    near = Nearness(X, X, None)
    found, want = torch.zeros(100, 100, dtype=torch.bool), torch.zeros(100, 100, dtype=torch.bool)
    for mask, pairs in (
        (found, near.among_stored(W.float(), slice(0, 100), kernel.weight_)),
        (want, near.among(exact.float(), slice(0, 100))),
    ):
        if pairs is not None:
            mask[pairs.rows] = pairs.mask
    norms = (X.double().square().sum(1)[:, None] + X.double().square().sum(1)).mul(2.0**-6)
    weighs = W.float() > 0
    assert bool((found | ~want | ~weighs)[(exact < 0.99 * norms)].all())  # every near pair that weighs something
    if name != "scales":  # where the largest norm is that of few
        assert not bool((found & (exact > 1.6 * norms)).any())  # and few others


@pytest.mark.parametrize(("place", "kind", "rows"), [("device", "cuda", 2), ("host", "cuda", 5), ("/tmp", "cpu", 2)])
def test_block_rows_on_a_device_beside_the_stored_ones(place, kind, rows):
    """Blocks that are streamed lie on the device, too, while they are worked on."""
    points = types.SimpleNamespace(device=torch.device(kind))
    problem = types.SimpleNamespace(half=types.SimpleNamespace(place=place), X=points)
    assert half._beside(problem) == rows
