"""Every operation's contract: kernels, clouds, backends, devices and dtypes of grid.py, against the float64 reference.

On a machine with CUDA the same tests run there. Triton's interpreter is chosen when triton is imported: without a GPU
``test_triton.py`` runs the Triton part of this file in a process of its own.
"""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from fastagop.kernels import backends, reference
from fastagop.kernels.torch_backend.backend import TorchBackend

import fastagop
from fastagop import BackendUnavailable, Gaussian, Laplace
from fastagop.solvers import table

K = 3  # outputs; every count is a formula of its own for KeOps
# Acceptance: relative Frobenius error on well-spread data.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
# Per entry: r is off by half of r^2's 4 eps / NEAR (see test_distance), and t exp(-t) <= 1/e, (t/2) exp(-t/2) <= 1/e
# turn that into at most 2 eps / (e NEAR) of k; exp and its argument round to another 2 eps.
ENTRY = {dtype: torch.finfo(dtype).eps * (2 / near / math.e + 2) for dtype, near in
         ((torch.float32, 2.0**-6), (torch.float64, 2.0**-10))}  # fmt: skip
LIMIT = {torch.float32: 1e-3, torch.float64: 1e-6}  # residuals of solve above this are warned about
GRAM = 1e-4  # what "auto" may lose against the gradient form, and what the gram form may lose without a warning
WELL_SPREAD = ("spread", "collapsed 1", "offset", "zero-rows")
OTHERS = ["none", "the same object", "a view", "a copy", "some rows", "other points"]  # what Z may be


def norm(value):
    return float(torch.linalg.vector_norm(value.double()))


def eps_of(place):
    return place.backend.coarseness * torch.finfo(place.dtype).eps


@pytest.fixture
def problem(grid_case, cloud, normal):
    """(kernel, place, points, coefficients, {kind of evaluation points: Z}) of a case."""
    kernel, name, place = grid_case
    n, d = place.backend.n, place.backend.d
    X = place.tensor(cloud(name, n=n, d=d))
    more = place.tensor(cloud(name, n=31, d=d, seed=9))
    Z = dict(zip(OTHERS, (None, X, X[:], X.clone(), X[5::3], more), strict=True))
    if len(place.backend.clouds) < 5:  # slow here, and the views are told apart before a backend is chosen
        Z = {kind: Z[kind] for kind in ("none", "a copy", "other points")}
    return kernel, place, X, place.tensor(normal(n, K)), Z


def skip_unless_served(grid_case, operation):
    if not grid_case.place.backend.serves(operation):
        pytest.skip("test_what_a_backend_does_not_serve has this one")


def outer_products(g, center):
    """The plain way to the AGOP: gradients of the dtype, squared in float64."""
    g = g.double().cpu()
    g = g - g.mean(0) if center else g
    return torch.einsum("icd,ice->de", g, g) / len(g)


# ---- the five operations


def test_kernel_matrix(grid_case, problem):
    skip_unless_served(grid_case, "kernel_matrix")
    kernel, place, X, _, others = problem
    words = {"backend": place.backend.name}
    for Z in others.values():
        result = fastagop.kernel_matrix(kernel, X, Z, **words)
        assert (result.dtype, result.device) == (X.dtype, X.device)
        true, found = reference.kernel_matrix(kernel, X, Z), result.cpu()
        assert found.shape == true.shape
        assert bool(found.isfinite().all())
        error = (found.double() - true).abs()
        assert float(error.max()) <= ENTRY[place.dtype]
        assert norm(error) <= TOLERANCE[place.dtype] * norm(true)
        assert float(found.max()) <= 1
        copies = (X[:, None] == (X if Z is None else Z)[None]).all(-1)
        assert bool((result[copies] == 1).all())
    whole = fastagop.kernel_matrix(kernel, X, **words)
    assert torch.equal(whole, whole.T)
    ridged = fastagop.kernel_matrix(kernel, X, ridge=0.5, **words)
    assert torch.equal(ridged, whole + 0.5 * torch.eye(len(X), dtype=X.dtype, device=X.device))


def test_kernel_matmul(grid_case, problem, normal):
    skip_unless_served(grid_case, "kernel_matmul")
    kernel, place, X, _, others = problem
    for Z in others.values():
        points = X if Z is None else Z
        V = place.tensor(normal(len(points), K, seed=2))
        result = fastagop.kernel_matmul(kernel, X, Z, V, backend=place.backend.name)
        assert (result.dtype, result.device) == (X.dtype, X.device)
        # relative to the sum's terms: with random signs the sum itself may vanish
        size = norm(reference.kernel_matmul(kernel, X, points, V.abs()))
        assert norm(result.cpu() - reference.kernel_matmul(kernel, X, points, V)) <= TOLERANCE[place.dtype] * size


def test_gradients(grid_case, problem, relative, gradient_bound):
    skip_unless_served(grid_case, "gradients")
    kernel, place, X, alpha, others = problem
    for kind, Z in others.items():
        g = fastagop.gradients(kernel, X, alpha, Z, backend=place.backend.name)
        assert (g.dtype, g.device) == (X.dtype, X.device)
        true = reference.gradients(kernel, X, alpha, Z)
        if not true.any():  # all points are one: what is left is rounding of (sum w) x - sum w x
            assert norm(g) <= len(X) * eps_of(place) / kernel.bandwidth**2 * norm(alpha)
            continue
        error = relative(g, true)
        assert error <= place.backend.coarseness * gradient_bound(kernel, X, alpha, Z)
        # far into the tail of an exponential (distances of 100 bandwidths) eps times the exponent is the acceptance
        if kind == "none" and grid_case.cloud in WELL_SPREAD and kernel.bandwidth >= 1:
            assert error <= TOLERANCE[place.dtype]


@pytest.mark.parametrize("center", [False, True])
def test_agop(grid_case, center, problem, relative, gradient_bound):
    skip_unless_served(grid_case, "agop")
    kernel, place, X, alpha, others = problem
    words = {"center": center, "backend": place.backend.name}
    own = place.backend.name if place.backend.serves("gradients") else "torch"
    # Where calls take seconds, what is centred is so at X and at other points.
    for kind in ("none", "a copy", "other points")[:: 2 if center and place.backend.slow else 1]:
        Z = others[kind]
        true = reference.agop(kernel, X, alpha, Z, center=center)
        if not reference.gradients(kernel, X, alpha, Z).any():
            continue  # test_agop.py's test_zero
        g = fastagop.gradients(kernel, X, alpha, Z, backend=own)
        plain, error = relative(outer_products(g, center), true), {}
        for method in place.backend.agop_methods:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                M = fastagop.agop(kernel, X, alpha, Z, method=method, **words)
            # Triton's interpreter warns of infinities in lanes that nothing stores.
            said = [warning for warning in caught if issubclass(warning.category, fastagop.NumericalWarning)]
            assert (M.dtype, M.device) == (X.dtype, X.device)
            assert bool(M.isfinite().all())
            assert method == "gram" or not said
            error[method] = relative(M, true)
            if not said:  # both forms see the same rounded weights: cancelling coefficients may leave nothing else
                assert error[method] <= (1.5 if method == "gram" else 1.0) * error["gradient"] + GRAM
            if grid_case.cloud in WELL_SPREAD and kernel.bandwidth >= 1:
                assert error[method] <= TOLERANCE[place.dtype]
        assert error["gradient"] <= 10 * plain + 16 * eps_of(place)
        if not center:  # M is quadratic in the gradients, and its own sums round once more
            bound = gradient_bound(kernel, X, alpha, Z)
            assert error["gradient"] <= place.backend.coarseness * (2 * bound + 4 * torch.finfo(place.dtype).eps)
    total = fastagop.agop(kernel, X, alpha, reduction="sum", method="gradient", **words)
    mean = fastagop.agop(kernel, X, alpha, method="gradient", **words)
    assert norm(total - len(X) * mean) <= 4 * torch.finfo(place.dtype).eps * norm(total)


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_solve(grid_case, ridge, problem, targets, bounded_solution):
    """Never NaN, never much worse than a plain solve with bounded coefficients, and honest about the residual."""
    skip_unless_served(grid_case, "solve")
    kernel, place, X, _, _ = problem
    columns = K if place.backend.name == "keops" else None  # as the other tests have: another count is a formula more
    Y = place.tensor(targets(len(X))[:, :columns])
    A, b = reference.kernel_matrix(kernel, X), Y.double().cpu()
    A.diagonal().add_(ridge)
    best = bounded_solution(A, X.cpu(), Y.cpu(), place.dtype)  # at most 0.8: alpha = 0 has 1
    for method in place.backend.solve_methods:
        if method == "cg" and not ridge:
            continue  # test_cg.py: how far conjugate gradients come without a ridge depends on their steps
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            solution = fastagop.solve(kernel, X, Y, ridge=ridge, method=method, backend=place.backend.name)
        alpha = solution.alpha.double().cpu()
        assert (solution.alpha.dtype, solution.alpha.device) == (X.dtype, X.device)
        assert bool(alpha.isfinite().all())
        assert solution.residual <= min(1.5 * best, 0.5 * (1 + best)) + (1e-6 if X.dtype == torch.float64 else 2e-3)
        # the kernel matrix is stored in solution.dtype: a rounding of the entry and about one of its distance;
        # sums of n terms in float64 cost a little more
        true = norm(A @ alpha - b) / norm(b)
        slack = 2 * place.backend.coarseness * torch.finfo(solution.dtype).eps + 16 * 2.0**-52
        slack *= (
            1 if kernel.bandwidth >= 1 else 4
        )  # narrow: r / L, a few units where k matters, multiplies r's rounding
        rounding = norm(A.abs() @ alpha.abs()) / norm(b)
        device_fill = place.backend.name == "triton" and solution.dtype != X.dtype
        lost = norm(lost_of_rounded(kernel, X.cpu()) @ alpha.abs()) / norm(b) if device_fill else 0.0
        assert abs(solution.residual - true) <= slack * rounding + 1e-12 * true + lost
        if method != "cg":
            # a bandwidth at which all points look alike, or none, is a warning of its own
            said = [w for w in said if "at bandwidth" not in str(w.message)]
            assert len(said) == int(should_warn(solution, place.dtype))
            if ridge and solution.dtype == torch.float64:
                assert solution.jitter == 0


def lost_of_rounded(kernel, X):
    """What a device's fill may lose of each k(x, z) of float32 points: 4 eps (|x|^2 + |z|^2) of r^2 in float64.

    Pairs below 2^-36 of the squared norms are measured by differences.
    """
    x = X.double()
    sq, norms = (x[:, None] - x).square().sum(-1), x.square().sum(1)
    sums, r = norms[:, None] + norms, sq.sqrt()
    slope = torch.from_numpy(reference.profile(kernel, r.numpy())[1]).abs()
    expanded = (sq >= 2.0**-36 * sums) & (sq > 0)
    return torch.where(expanded, slope * 4 * 2.0**-52 * sums / (2.0 * r.clamp(min=1e-300)), 0.0)


def should_warn(solution, dtype):
    """Exactly when something was altered or missed; with a ridge, means of contradicting copies are the answer."""
    met = solution.residual if solution.merged_residual is None else solution.merged_residual
    altered = solution.jitter > 0 or solution.rank < len(solution.alpha)
    return altered or met > LIMIT[dtype] or (solution.ridge == 0 and solution.contradictions > 0)


# ---- arguments as they come, once per place


@pytest.mark.parametrize(("n", "d", "outputs"), [(1, 5, 3), (4, 5, 3), (1, 1, 1), (7, 60, 1)])  # one row; K = 1; d > n
def test_shapes(grid_place, n, d, outputs, cloud, normal):
    if grid_place.backend.name == "keops" and (d, outputs) != (5, K):
        pytest.skip("a formula of its own that compiles for ten seconds")
    X, Z = (grid_place.tensor(cloud("spread", n=m, d=d, seed=seed)) for m, seed in ((n, 0), (6, 3)))
    alpha, kernel, words = grid_place.tensor(normal(n, outputs)), Laplace(2.0), {"backend": grid_place.backend.name}
    serves = grid_place.backend.serves
    for points in (None, Z, Z[:1], Z[:0]):
        count = n if points is None else len(points)
        V = grid_place.tensor(normal(count, outputs, seed=2))
        for operation, arguments in (
            ("kernel_matrix", (points,)),
            ("kernel_matmul", (X if points is None else points, V)),
            ("gradients", (alpha, points)),
            ("agop", (alpha, points)),
        ):
            if serves(operation) and (count or operation != "agop"):
                result = getattr(fastagop, operation)(kernel, X, *arguments, **words)
                close(result, getattr(reference, operation)(kernel, X, *arguments), grid_place)
        if serves("kernel_matmul") and points is None:
            product = fastagop.kernel_matmul(kernel, X, V=V, **words)
            close(product, reference.kernel_matmul(kernel, X, X, V), grid_place)
    if serves("agop"):
        assert not fastagop.agop(kernel, X, alpha[:, :0], **words).any()
        assert not fastagop.agop(kernel, X, alpha, X[:0], reduction="sum", **words).any()
        with pytest.raises(ValueError, match="Z must have at least one row"):
            fastagop.agop(kernel, X, alpha, X[:0], **words)


def test_blocks_and_weights(grid_place, cloud, normal, least_memory):
    """More points than a block has rows, or than memory_limit lets into one; evaluation points of unequal weights."""
    backend, words = grid_place.backend, {"backend": grid_place.backend.name}
    X, kernel = grid_place.tensor(cloud("spread", n=backend.many, d=backend.d)), Laplace(2.0)
    alpha = grid_place.tensor(normal(len(X), K))
    for Z in (X, X[3:].clone()):
        V = grid_place.tensor(normal(len(Z), K, seed=2))
        for operation, arguments in (("kernel_matrix", (Z,)), ("kernel_matmul", (Z, V)), ("gradients", (alpha, Z))):
            if backend.serves(operation):
                result = getattr(fastagop, operation)(kernel, X, *arguments, **words)
                close(result, getattr(reference, operation)(kernel, X, *arguments), grid_place)
        if not backend.serves("agop"):
            continue
        weights = torch.linspace(0.0, 2.0, len(Z), dtype=X.dtype, device=X.device)
        w = (weights.double() / weights.double().sum()).cpu()
        g = reference.gradients(kernel, X, alpha, Z)
        for center in (False, True):
            how = {"center": center, "sample_weight": weights, **words}
            apart = g - torch.einsum("i,icd->cd", w, g) if center else g
            true = torch.einsum("i,icd,ice->de", w, apart, apart)
            limits = [None] if backend.many <= 256 else [None, least_memory("agop", kernel, X, alpha, Z, **how)]
            for limit in limits:
                close(fastagop.agop(kernel, X, alpha, Z, memory_limit=limit, **how), true, grid_place)


def close(result, truth, place):
    """Entries and sums of a few terms of size one."""
    assert result.shape == truth.shape
    assert norm(result.cpu() - truth) <= TOLERANCE[place.dtype] * max(norm(truth), 1.0)


@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_layouts(grid_place, layout, cloud, normal):
    """Views of larger tensors in and out: nothing beside them is touched, and the inputs stay as they are."""
    d = grid_place.backend.d
    plain, coefficients = (grid_place.tensor(t) for t in (cloud("collapsed 1", n=80, d=2 * d), normal(80, 2 * K)))
    if layout == "transposed":
        X, alpha = plain[::2, :d].T.contiguous().T, coefficients[::2, :K].T.contiguous().T
    else:
        X, alpha = plain[::2, ::2], coefficients[::2, ::2]
    assert not X.is_contiguous()
    assert not alpha.is_contiguous()
    before, kernel, words = (X.clone(), alpha.clone()), Laplace(2.0), {"backend": grid_place.backend.name}
    X.requires_grad_()
    for Z in (None, X[4:20], X.detach().clone()):
        V, backend, results = alpha if Z is None else alpha[: len(Z)], grid_place.backend, {}
        if backend.serves("kernel_matmul"):
            results["kernel_matmul"] = fastagop.kernel_matmul(kernel, X, Z, V, **words), (X if Z is None else Z, V)
        for operation in (fastagop.gradients, fastagop.agop):
            if backend.serves(operation.__name__):
                results[operation.__name__] = operation(kernel, X, alpha, Z, **words), (alpha, Z)
        if backend.serves("kernel_matrix"):
            m = len(V)
            wide = torch.full((44, 2 * m + 3), math.nan, dtype=X.dtype, device=X.device)
            block = wide[2:42, 1 : 2 * m : 2]
            assert fastagop.kernel_matrix(kernel, X, Z, out=block, **words) is block
            results["kernel_matrix"] = block.clone(), (Z,)
            block.fill_(math.nan)
            assert bool(wide.isnan().all())
        for name, (result, rest) in results.items():
            assert not result.requires_grad
            close(result, getattr(reference, name)(kernel, X, *rest), grid_place)
    assert torch.equal(X.detach(), before[0])
    assert torch.equal(alpha, before[1])


def test_refusals(grid_place, cloud, normal):
    """They name the argument, or the operation that a backend does not serve."""
    X, alpha = grid_place.tensor(cloud("spread", n=20, d=5)), grid_place.tensor(normal(20, K))
    kernel, words, backend = Gaussian(1.0), {"backend": grid_place.backend.name}, grid_place.backend
    for operation in (fastagop.gradients, fastagop.agop):
        if not backend.serves(operation.__name__):
            continue
        with pytest.raises(ValueError, match=r"^alpha must"):
            operation(kernel, X, alpha[:7], **words)
        with pytest.raises(ValueError, match=r"^Z must"):
            operation(kernel, X, alpha, X[:, :2], **words)
        with pytest.raises(TypeError, match=r"^kernel must"):
            operation("laplace", X, alpha, **words)
        with pytest.raises(ValueError, match=r"^X must"):
            operation(kernel, X[0], alpha, **words)
    if backend.serves("kernel_matmul"):
        with pytest.raises(ValueError, match=r"^V must"):
            fastagop.kernel_matmul(kernel, X, None, alpha[:7], **words)
    if backend.serves("kernel_matrix"):
        with pytest.raises(ValueError, match=r"^out must"):
            fastagop.kernel_matrix(kernel, X, out=X, **words)
        with pytest.raises(ValueError, match=r"^ridge "):
            fastagop.kernel_matrix(kernel, X, X[:3], ridge=0.5, **words)
    if backend.serves("solve"):
        method = backend.solve_methods[0]
        with pytest.raises(ValueError, match=r"^Y must"):
            fastagop.solve(kernel, X, alpha[:7], method=method, **words)
        with pytest.raises(ValueError, match=r"^ridge must"):
            fastagop.solve(kernel, X, alpha, ridge=-1.0, method=method, **words)


def test_what_a_backend_does_not_serve(grid, grid_place, cloud, normal):
    """BackendUnavailable with its reason, for every operation and form that its line in grid.py leaves out."""
    X, alpha = grid_place.tensor(cloud("spread", n=20, d=5)), grid_place.tensor(normal(20, K))
    backend, words = grid_place.backend, {"backend": grid_place.backend.name}
    calls = {
        "kernel_matrix": [((), {})],
        "kernel_matmul": [((X, alpha), {})],
        "gradients": [((alpha,), {})],
        "agop": [((alpha,), {"method": m}) for m in ("auto", "gradient", "gram") if m not in backend.agop_methods],
        "solve": [((alpha,), {"method": method}) for method in table.methods()],
    }
    assert list(calls) == grid.OPERATIONS
    if "agop" in backend.refuses:
        calls["agop"] = [((alpha,), {"method": "auto"})]
    for operation, tried in calls.items():
        if backend.serves(operation) and operation != "agop":
            continue
        for arguments, how in tried:
            with pytest.raises(BackendUnavailable, match=rf"backend '{backend.name}' cannot serve {operation}\b.*: "):
                getattr(fastagop, operation)(Gaussian(1.0), X, *arguments, **how, **words)


@pytest.mark.parametrize("operation", ["kernel_matrix", "kernel_matmul", "gradients", "agop", "solve"])
def test_a_backend_of_one_operation_is_a_line(operation, grid, cloud, normal, monkeypatch):
    """Every test of this file then holds, or is skipped with a reason."""

    class One(TorchBackend):
        name = "one"
        operations = (operation,)

        def refusal(self, request):
            return None if request.operation == operation else "it has one operation"

    monkeypatch.setitem(backends._TABLE, ("one", "radial"), One())
    others = tuple(name for name in grid.OPERATIONS if name != operation)
    line = grid.Backend("one", ["cpu"], refuses=others, solve_methods=("cholesky",) if operation == "solve" else ())
    place = grid.Place(line, "cpu", torch.float64)
    assert [name for name in grid.OPERATIONS if line.serves(name)] == [operation]
    for name in others:
        with pytest.raises(pytest.skip.Exception, match="has this one"):
            skip_unless_served(grid.Case(Laplace(2.0), "spread", place), name)
    test_refusals(place, cloud, normal)
    test_what_a_backend_does_not_serve(grid, place, cloud, normal)
    test_shapes(place, 4, 5, K, cloud, normal)
    test_layouts(place, "strided", cloud, normal)


def test_every_backend_has_a_line(grid):
    """A backend that the package registers is run by this suite; pages of the documentation register others."""
    table = backends._TABLE.items()
    package = {name for (name, _), backend in table if type(backend).__module__.startswith("fastagop.")}
    assert {backend.name for backend in grid.BACKENDS} == package
