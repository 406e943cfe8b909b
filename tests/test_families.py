"""Kernels that are not radial, against automatic differentiation of their definitions in float64."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil

import pytest
import torch
from fastagop.kernels.families.dot_product import DotProduct
from fastagop.kernels.pair_backend import categories
from pair_cases import KERNELS, on, truth

import fastagop
from fastagop import NTK, ArcCosine, Gaussian, Laplace, LpLaplace, Polynomial, ProductLaplace

kernels = pytest.mark.parametrize("kernel", KERNELS.values(), ids=list(KERNELS))
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
# float32 points are exact in float64: what is left is the rounding of results, and of l1's sums.
CLOSE = {torch.float32: 1e-5, torch.float64: 1e-12}


def apart(found, true):
    return float((found.double() - true).norm() / true.norm())


@pytest.fixture(scope="module")
def data():
    """Points with ties in a feature and a multiple of another point, coefficients of both signs, other points."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(14, 6, generator=generator)
    X[3, :2] = X[5, :2]
    X[7] = X[2]  # a duplicate
    X[9] = 2.0 * X[4]  # parallel
    return X, torch.randn(14, 3, generator=generator), torch.randn(8, 6, generator=generator)


@kernels
@dtypes
@pytest.mark.parametrize("other", [False, True], ids=["X", "Z"])
def test_against_autograd(kernel, dtype, other, data):
    X, alpha, Z = (t.to(dtype) for t in data)
    Z = Z if other else X
    K, g = truth(kernel, X, alpha, Z)
    close, given = CLOSE[dtype], Z if other else None
    found = fastagop.kernel_matrix(kernel, X, given)
    assert found.dtype == dtype
    assert apart(found, K) <= close
    assert torch.equal(found, kernel(X, given))
    V = alpha[: len(Z)]
    assert apart(fastagop.kernel_matmul(kernel, X, given, V=V), K @ V.double()) <= close
    assert apart(fastagop.gradients(kernel, X, alpha, given), g) <= close
    M = torch.einsum("icd,ice->de", g, g)
    assert apart(fastagop.agop(kernel, X, alpha, given, reduction="sum"), M) <= 2 * close
    weights = torch.arange(1.0, len(Z) + 1, dtype=dtype)
    weighted = torch.einsum("i,icd,ice->de", weights.double(), g, g) / float(weights.sum())
    assert apart(fastagop.agop(kernel, X, alpha, given, sample_weight=weights), weighted) <= 2 * close
    centred = g - g.mean(0)
    if float(centred.norm()) > 1e-6 * float(g.norm()):
        M = torch.einsum("icd,ice->de", centred, centred) / len(Z)
        assert apart(fastagop.agop(kernel, X, alpha, given, center=True), M) <= 2 * close


COMPILED = on("keops")  # Formulas compile for seconds each: one size serves all.
needs_keops = pytest.mark.skipif(
    importlib.util.find_spec("pykeops") is None or not (shutil.which("g++") or shutil.which("clang++")),
    reason="needs pykeops and a C++ compiler",
)
KEOPS = {"backend": "keops"}


@needs_keops
@dtypes
@pytest.mark.parametrize("kernel", COMPILED.values(), ids=list(COMPILED))
def test_keops(kernel, dtype, data):
    """Products, gradients and the AGOP, against the definition; and against torch where that has no derivative."""
    close = CLOSE[dtype]
    X, alpha, Z = data[0][:, :5].to(dtype), data[1].to(dtype), data[2][:, :5].to(dtype)
    Z[0] = X[0]
    for where in (None, Z):
        points = X if where is None else where
        K, g = truth(kernel, X, alpha, points)
        V = alpha[: len(points)]
        assert apart(fastagop.kernel_matmul(kernel, X, where, V=V, **KEOPS), K @ V.double()) <= close
        assert apart(fastagop.gradients(kernel, X, alpha, where, **KEOPS), g) <= close
        M = torch.einsum("icd,ice->de", g, g) / len(points)
        found = fastagop.agop(kernel, X, alpha, where, **KEOPS)
        assert found.dtype == dtype
        assert apart(found, M) <= 2 * close
    X = X.clone()
    X[10], X[11], X[12] = 0.0, -3.0 * X[4], 0.0  # zero vectors, opposite ones
    weights = torch.arange(1.0, 15, dtype=dtype)
    for op, how in (
        (fastagop.gradients, {}),
        (fastagop.agop, {"center": True}),
        (fastagop.agop, {"sample_weight": weights}),
    ):
        assert apart(op(kernel, X, alpha, **how, **KEOPS), op(kernel, X, alpha, **how).double()) <= 2 * close
    found, same = (fastagop.kernel_matmul(kernel, X, V=alpha, **how) for how in (KEOPS, {}))
    assert apart(found, same.double()) <= close
    plan = fastagop.explain("gradients", kernel, X, alpha, **KEOPS)
    assert "backend keops" in plan
    assert f"precision  {'float64' if kernel.wide else str(dtype).removeprefix('torch.')}" in plan


@needs_keops
@pytest.mark.parametrize("kernel", [ProductLaplace(1.0), LpLaplace(1.4, 0.8, 1.0), LpLaplace(0.7, 0.7, 1.0)], ids=repr)
def test_keops_at_extreme_bandwidths(kernel, data):
    X, alpha = data[0][:, :5].double(), data[1].double()
    narrow, wide = (dataclasses.replace(kernel, bandwidth=L) for L in (1e-300, 1e300))
    same = (X[:, None] == X).all(-1).double()
    assert torch.equal(fastagop.kernel_matmul(narrow, X, V=alpha, **KEOPS), same @ alpha)
    assert not fastagop.gradients(narrow, X, alpha, **KEOPS).any()
    assert apart(fastagop.kernel_matmul(wide, X, V=alpha, **KEOPS), alpha.sum(0).expand(14, 3)) <= 1e-12
    assert bool(fastagop.gradients(wide, X, alpha, **KEOPS).isfinite().all())


@needs_keops
def test_keops_says_what_leaves_the_dtype(data):
    """Sums of float32 points are float64 numbers, which float32 need not hold."""
    X, alpha = data[0][:, :5], data[1]
    with pytest.raises(ValueError, match="X is so large that products"):
        fastagop.kernel_matmul(Polynomial(3, 0.5, 0.2), 1e8 * X, V=alpha, **KEOPS)


GRAM = {name: kernel for name, kernel in KERNELS.items() if "gram" in kernel.agop_forms}


@pytest.mark.parametrize("kernel", GRAM.values(), ids=list(GRAM))
@dtypes
def test_the_gram_form_is_the_gradient_form(kernel, dtype, data):
    X, alpha, Z = (t.to(dtype) for t in data)
    weights = torch.arange(1.0, 9.0, dtype=dtype)
    for arguments in ({}, {"Z": Z}, {"Z": Z, "sample_weight": weights}):
        both = [fastagop.agop(kernel, X, alpha, method=form, **arguments) for form in ("gradient", "gram")]
        assert apart(both[1], both[0].double()) <= (2e-7 if dtype == torch.float32 else 1e-11)


def test_many_outputs_take_the_gram_form_and_cancellation_the_other(data, caplog):
    generator = torch.Generator().manual_seed(1)
    X, alpha = torch.randn(200, 30, generator=generator), torch.randn(200, 40, generator=generator)
    assert "method gram" in fastagop.explain("agop", NTK(1), X, alpha)
    assert "method gradient" in fastagop.explain("agop", NTK(1), X, alpha[:, :1])
    assert "method gradient" in fastagop.explain("agop", ProductLaplace(2.0), X, alpha)
    close = 1.0 + 1e-5 * torch.randn(50, 4, generator=generator, dtype=torch.float64)  # gradients cancel in differences
    a = torch.cat([torch.ones(25, 1), -torch.ones(25, 1)]).double()
    with pytest.warns(fastagop.NumericalWarning, match="gradient form ran"):
        M = fastagop.agop(Polynomial(2), close, a, method="gram")
    assert torch.equal(M, fastagop.agop(Polynomial(2), close, a, method="gradient"))


def test_float64_points_choose_no_form_that_loses_their_digits():
    generator = torch.Generator().manual_seed(1)
    centres = torch.nn.functional.normalize(torch.randn(2, 30, generator=generator, dtype=torch.float64))
    X = centres[torch.arange(80) % 2] + 1e-5 * torch.randn(80, 30, generator=generator, dtype=torch.float64)
    kernel = NTK(1)
    Y = torch.randn(2, 20, generator=generator, dtype=torch.float64)[torch.arange(80) % 2]
    alpha = fastagop.solve(kernel, X, Y, ridge=1e-3).alpha
    assert "method gram" in fastagop.explain("agop", kernel, X, alpha)
    true = fastagop.agop(kernel, X, alpha, method="gradient")
    assert apart(fastagop.agop(kernel, X, alpha), true) <= 1e-12


@kernels
def test_blocks(kernel, data):
    """Blocks of few rows give what one block gives; k(X, X) is symmetric to the bit, its diagonal k(x, x)."""
    generator = torch.Generator().manual_seed(2)
    X, alpha = torch.randn(300, 3, generator=generator), torch.randn(300, 1, generator=generator)
    X[10] = 0.0
    K = fastagop.kernel_matrix(kernel, X)
    assert torch.equal(K, K.T)
    assert apart(K, fastagop.kernel_matrix(kernel, X, X.clone()).double()) <= 1e-6
    assert apart(fastagop.kernel_matmul(kernel, X, V=alpha), K.double() @ alpha.double()) <= 1e-5
    M = fastagop.agop(kernel, X, alpha, method="gradient")
    tight = fastagop.agop(kernel, X, alpha, method="gradient", memory_limit=2**23 + 1.5e6)
    assert apart(tight, M.double()) <= 1e-6
    assert bool(M.isfinite().all())
    with pytest.raises(MemoryError, match="raise memory_limit"):
        fastagop.agop(kernel, X, alpha, memory_limit=1000)


@pytest.mark.parametrize("kernel", [ArcCosine(0), ArcCosine(1), ArcCosine(2), NTK(1), NTK(3)], ids=repr)
def test_small_angles(kernel):
    """Value and gradient of one pair, from 50 digits: what is lost is what rounding unit vectors loses across."""
    mpmath = pytest.importorskip("mpmath")
    x = torch.tensor([[0.3, -1.1, 0.7]], dtype=torch.float64)
    across = torch.tensor([[1.0, 0.2, -0.4]], dtype=torch.float64)
    for sign in (1.0, -1.0):
        for size in (1e-1, 1e-3, 1e-5, 1e-7):
            z = sign * 1.7 * x + size * across
            with mpmath.workdps(50):
                value, slope = _exactly(kernel, x[0].tolist(), z[0].tolist(), mpmath)
            scale = float(x.norm() * z.norm()) ** kernel.degree
            assert abs(float(kernel(x, z)) - value) <= 4e-15 * scale
            g = fastagop.gradients(kernel, x, torch.ones(1, 1, dtype=torch.float64), z)[0, 0]
            bound = 1e-12 + 8 * torch.finfo(torch.float64).eps / size
            assert float((g - slope).norm()) <= bound * scale / float(z.norm()), (sign, size)


def _exactly(kernel, x, z, mp):
    """(k, its gradient at z) in mpmath's digits."""

    def k(*z):
        a, b = (mp.sqrt(mp.fsum(mp.mpf(v) ** 2 for v in p)) for p in (x, z))
        cosine = mp.fsum(mp.mpf(p) * q for p, q in zip(x, z, strict=True)) / a / b
        theta = mp.acos(cosine)
        if isinstance(kernel, ArcCosine):
            s, left = mp.sin(theta), mp.pi - theta
            J = (left, s + left * cosine, 3 * s * cosine + left * (1 + 2 * cosine**2))[kernel.order]
            return (a * b) ** kernel.order * J / mp.pi
        total = cosine
        for _ in range(kernel.depth):
            value = (mp.sin(theta) + (mp.pi - theta) * cosine) / mp.pi
            total = total * (mp.pi - theta) / mp.pi + value
            cosine, theta = value, mp.acos(value)
        return a * b * total

    z = [mp.mpf(v) for v in z]
    slope = [mp.diff(k, z, tuple(int(i == j) for j in range(len(z))), h=mp.mpf(10) ** -20) for i in range(len(z))]
    return float(k(*z)), torch.tensor([float(v) for v in slope], dtype=torch.float64)


@pytest.mark.parametrize("kernel", [ProductLaplace(2.0), LpLaplace(1.0, 0.7, 2.0), LpLaplace(1.5, 1.5, 2.0)], ids=repr)
@pytest.mark.parametrize("tied", [0, 1, 5])
def test_ties(kernel, tied):
    """Columns of zeros and ones, one of five or all: a tie contributes nothing to its own feature."""
    generator = torch.Generator().manual_seed(3)
    X, Z = (torch.randn(rows, 5, generator=generator, dtype=torch.float64) for rows in (40, 30))
    X[:, :tied], Z[:, :tied] = X[:, :tied].sign(), Z[:, :tied].sign()
    alpha = torch.randn(40, 2, generator=generator, dtype=torch.float64)
    for points in (Z, X):
        _, g = truth(kernel, X, alpha, points)
        assert apart(fastagop.gradients(kernel, X, alpha, points), g) <= 1e-13


@pytest.fixture
def with_categories(monkeypatch):
    """Few points suffice for tables; (X, Z) with two categories as one-hot columns, flags, a constant, numbers."""
    monkeypatch.setattr(categories, "_POINTS", 1)
    monkeypatch.setattr(categories, "_PAIRS", 1)
    generator = torch.Generator().manual_seed(7)

    def drawn(n):
        codes = torch.randint(12, (n, 2), generator=generator)
        codes[:12] = torch.arange(12)[:, None]  # each there is
        flags = torch.randint(2, (n, 2), generator=generator) * 2.0 - 0.5
        scale = torch.rand(24, generator=torch.Generator().manual_seed(8)) + 0.2  # what a diagonal metric makes of them
        columns = torch.nn.functional.one_hot(codes, 12).flatten(1) * scale
        numbers = torch.randn(n, 3, generator=generator)
        return torch.cat([numbers[:, :1], columns, flags, torch.ones(n, 1), numbers[:, 1:]], 1).double()

    return drawn(40), drawn(30)


@pytest.mark.parametrize("kernel", [ProductLaplace(3.0), LpLaplace(1.4, 0.8, 3.0), LpLaplace(0.7, 0.7, 2.0)], ids=repr)
@dtypes
@pytest.mark.parametrize("other", [False, True], ids=["X", "Z"])
def test_categories(kernel, dtype, other, with_categories):
    """Look-ups are the one-hot columns' differences; equal points are at distance zero to the bit."""
    X, Z = (t.to(dtype) for t in with_categories)
    X[27], Z[3] = X[2], X[2]
    X[29, 1:] = X[2, 1:]  # of the same categories
    alpha = torch.randn(40, 2, generator=torch.Generator().manual_seed(9), dtype=dtype)
    Z = Z if other else X
    found = kernel.pairs(X, Z).categories
    assert found is not None
    assert found.columns.tolist() == list(range(1, 25))
    K, g = truth(kernel, X, alpha, Z)
    given, close = Z if other else None, 1e-5 if dtype == torch.float32 else 1e-13
    made = fastagop.kernel_matrix(kernel, X, given)
    assert apart(made, K) <= close
    assert float(made[2, 3] if other else made[2, 27]) == 1.0
    assert apart(fastagop.gradients(kernel, X, alpha, given), g) <= close
    assert (
        apart(fastagop.agop(kernel, X, alpha, given, reduction="sum"), torch.einsum("icd,ice->de", g, g)) <= 2 * close
    )
    both = kernel * Gaussian(3.0)  # weights of a product go into the sums
    _, g = truth(both, X, alpha, Z)
    assert apart(fastagop.gradients(both, X, alpha, given), g) <= close


def test_categories_where_they_do_not_pay(with_categories, monkeypatch):
    X, Z = with_categories
    flags = torch.randint(2, (40, 8), generator=torch.Generator().manual_seed(10)).double()
    only = X[:, 1:25].contiguous()  # nothing is left to differences
    kernel = ProductLaplace(3.0)
    for points, tables in ((flags, False), (X[:, :4], False), (X[:, [0, 26, 27]], False), (only, True)):
        assert (kernel.pairs(points, points).categories is not None) == tables
    alpha = torch.ones(40, 1, dtype=torch.float64)
    assert apart(fastagop.gradients(kernel, only, alpha), truth(kernel, only, alpha, only)[1]) <= 1e-13
    monkeypatch.setattr(categories, "_PAIRS", 40 * 30 + 1)
    assert kernel.pairs(X, Z).categories is None
    assert kernel.pairs(X, X).categories is not None


def test_peers():
    pairwise = pytest.importorskip("sklearn.metrics.pairwise")
    X = torch.randn(20, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    K = pairwise.laplacian_kernel(X.numpy(), gamma=1 / 3.0)
    assert apart(ProductLaplace(3.0)(X), torch.from_numpy(K)) <= 1e-14
    K = pairwise.polynomial_kernel(X.numpy(), degree=3, gamma=0.3, coef0=0.7)
    assert apart(Polynomial(3, 0.7, 0.3)(X), torch.from_numpy(K)) <= 1e-14
    same, radial = LpLaplace(2.0, 1.3, 2.0), fastagop.GeneralisedLaplace(2.0, 1.3)
    alpha = torch.ones(20, 1, dtype=torch.float64)
    assert apart(fastagop.agop(same, X, alpha), fastagop.agop(radial, X, alpha)) <= 1e-12


@kernels
@pytest.mark.parametrize("method", ["auto", "eigh", "cg"])
def test_solve(kernel, method, data):
    X, Y = data[0].double(), data[1].double()
    Y[7] = Y[2]  # the targets of equal rows
    for factor in (1.0, 1e-12, 1e9):
        scaled = kernel if factor == 1.0 else factor * kernel
        ridge = 1e-2 * float(scaled(X).diagonal().max())
        solution = fastagop.solve(scaled, X, Y, ridge=ridge, method=method)
        A = scaled(X)
        true = A @ torch.linalg.solve(A + ridge * torch.eye(14, dtype=torch.float64), Y)
        assert apart(A @ solution.alpha, true) <= (1e-5 if method == "cg" else 1e-10)
        assert solution.residual <= 2e-6
        assert solution.jitter == 0
        assert solution.merged == 1
    narrow = fastagop.solve(kernel, X.float(), Y.float(), ridge=ridge / factor, method=method)
    assert narrow.residual <= 1e-4


def test_solve_without_a_ridge(data):
    X, Y = data[0].double(), data[2].new_ones(14, 1).double()
    solution = fastagop.solve(NTK(2), X[:9], Y[:9])  # x and 2 x are one point to a homogeneous kernel
    assert solution.residual <= 1e-8
    with pytest.warns(fastagop.NumericalWarning, match="singular"):
        fastagop.solve(Polynomial(1, 0.0), X, torch.randn(14, 1, dtype=torch.float64))
    with pytest.warns(fastagop.NumericalWarning, match="bandwidth 1e-09"):
        fastagop.solve(ProductLaplace(1e-9), X, Y)


def declared(kernel):
    names = "radial", "shift_invariant", "rotation_invariant", "unit_diagonal", "nonnegative"
    return {name for name in names if getattr(kernel, name)}


def test_what_a_kernel_declares():
    assert declared(KERNELS["mixed"]) == {"nonnegative"}
    assert KERNELS["mixed"].agop_forms == ("gradient",)
    product = Laplace(2.0) * Gaussian(3.0)
    assert declared(product) == {"shift_invariant", "rotation_invariant", "unit_diagonal", "nonnegative"}
    assert product.agop_forms == ("gradient", "gram")
    assert [k.norm for k in (product, ProductLaplace(2.0), LpLaplace(1.5, 1.0, 2.0), NTK(1))] == [None, 1.0, 1.5, None]
    assert len({product, Laplace(2.0) * Gaussian(3.0), Gaussian(3.0) * Laplace(2.0)}) == 2
    assert repr(2 * (Laplace(1.0) + NTK(1))) == "2.0 * (Laplace(bandwidth=1.0) + NTK(depth=1))"
    assert product.set_params(left__bandwidth=5.0) == Laplace(5.0) * Gaussian(3.0)
    assert product.left == Laplace(2.0)
    with pytest.raises(ValueError, match="Invalid parameter 'middle'"):
        product.set_params(middle=1)


@dataclasses.dataclass(frozen=True)
class Logarithm(DotProduct):
    """ln(x.z), which is no number where x.z is negative."""

    def value_(self, t):
        return t.log_()


def test_a_class_that_gives_nan_is_told_so(data):
    with pytest.raises(
        ValueError, match=r"leave torch.float32; .*; some are NaN: look at the methods of a class of your"
    ):
        fastagop.kernel_matrix(Logarithm(), data[0])


REFUSED = [  # (a call on points X and targets Y, error, what it says)
    (
        lambda X, Y: fastagop.kernel_matrix(NTK(1), X, backend="triton"),
        fastagop.BackendUnavailable,
        r"no Triton text of NTK\(depth=1\)",
    ),
    (
        lambda X, Y: fastagop.solve(ProductLaplace(1.0), X, Y, backend="triton"),
        fastagop.BackendUnavailable,
        "it solves with radial kernels only",
    ),
    (
        lambda X, Y: fastagop.kernel_matmul(NTK(2), X, V=Y, backend="keops"),
        fastagop.BackendUnavailable,
        r"no KeOps formula of NTK\(depth=2\)",
    ),
    (
        lambda X, Y: fastagop.gradients(0.5 * NTK(1), X, Y, backend="keops"),
        fastagop.BackendUnavailable,
        r"no KeOps formula of 0\.5 \* NTK",
    ),
    (
        lambda X, Y: fastagop.kernel_matrix(NTK(1), X, backend="keops"),
        fastagop.BackendUnavailable,
        "KeOps never does",
    ),
    (
        lambda X, Y: fastagop.solve(NTK(1), X, Y, method="cg", backend="keops"),
        fastagop.BackendUnavailable,
        r"solve with method 'cg': it solves with radial kernels only",
    ),
    (
        lambda X, Y: fastagop.agop(Polynomial(2), X, Y, method="gram", backend="keops"),
        fastagop.BackendUnavailable,
        "KeOps stores nothing",
    ),
    (lambda X, Y: fastagop.agop(ProductLaplace(1.0), X, Y, method="gram"), fastagop.BackendUnavailable, "no gram form"),
    (lambda X, Y: fastagop.agop(NTK(1), X, Y, method="gram", center=True), fastagop.BackendUnavailable, "not centred"),
    (
        lambda X, Y: fastagop.solve(NTK(1), X, Y, method="cholesky+cg"),
        fastagop.BackendUnavailable,
        "use method='cholesky'",
    ),
    (lambda X, Y: fastagop.solve(NTK(1), X, Y, method=fastagop.CholeskyCG()), fastagop.BackendUnavailable, "half of a"),
    (
        lambda X, Y: fastagop.solve(NTK(1), X, Y, method=fastagop.ConjugateGradients(store=True)),
        fastagop.BackendUnavailable,
        "store=True",
    ),
    (lambda X, Y: fastagop.RFMRegressor(NTK(1), backend="triton").fit(X, Y), fastagop.BackendUnavailable, "triton"),
    (lambda X, Y: fastagop.RFMRegressorCV(kernel=NTK(1)).fit(X, Y), ValueError, "has none"),
    (lambda X, Y: fastagop.kernel_matrix(Polynomial(30), 1e3 * X), ValueError, "X is so large"),
    (lambda X, Y: fastagop.kernel_matrix(ProductLaplace("median"), X), ValueError, "fastagop.settled"),
    (lambda X, Y: fastagop.kernel_matrix(NTK(1) + Laplace("median"), X), ValueError, "fastagop.settled"),
    (lambda X, Y: Polynomial(2, scale="median"), TypeError, "scale must be a number"),
    (lambda X, Y: Polynomial(0), ValueError, "degree must be an integer >= 1"),
    (lambda X, Y: Polynomial(2, -1.0), ValueError, "offset must be a finite number >= 0"),
    (lambda X, Y: ArcCosine(3), ValueError, "order must be an integer from 0 to 2"),
    (lambda X, Y: NTK(0), ValueError, "depth must be"),
    (lambda X, Y: LpLaplace(2.5, 1.0, 1.0), ValueError, "p must be a positive finite number up to 2"),
    (lambda X, Y: LpLaplace(1.0, 1.5, 1.0), ValueError, "q must be a positive finite number up to 1"),
    (lambda X, Y: -1.0 * NTK(1), ValueError, "factor must be a positive"),
    (lambda X, Y: NTK(1) + 1.0, TypeError, "unsupported operand"),
]


@pytest.mark.parametrize(("call", "error", "text"), REFUSED, ids=[text for *_, text in REFUSED])
def test_refused(call, error, text, data):
    with pytest.raises(error, match=text):
        call(data[0], data[1])


ESTIMATED = [
    ProductLaplace("median"),
    NTK(2),
    Polynomial(2, 1.0, 0.1),
    Laplace("median") * ProductLaplace(("median", 2.0)),
]


@pytest.mark.parametrize("kernel", ESTIMATED, ids=repr)
@pytest.mark.parametrize("diagonal", [False, True])
def test_recursive_feature_machine(kernel, diagonal, tmp_path):
    """Two iterations are two solves and AGOPs written out; fewer rows than features as well."""
    generator = torch.Generator().manual_seed(5)
    X = torch.randn(60, 5, generator=generator, dtype=torch.float64) + 2.0
    for rows, wide in ((60, X), (20, torch.cat([X, torch.randn(60, 30, generator=generator).double()], 1)[:20])):
        y, d = wide[:, 0] * wide[:, 1], wide.shape[1]
        model = fastagop.RFMRegressor(
            kernel, iterations=2, diagonal=diagonal, fit_intercept=False, dtype="float64", ridge=1e-2
        ).fit(wide, y)
        made, root = model.kernel_, torch.eye(d, dtype=torch.float64)
        assert made == fastagop.settled(kernel, wide)
        for step in range(3):
            points = wide @ root
            A = made(points) + 1e-2 * torch.eye(rows, dtype=torch.float64)
            alpha = torch.linalg.solve(A, y[:, None])
            if step < 2:
                M = root @ fastagop.agop(made, points, alpha, method="gradient") @ root
                M = (M.diagonal().diag() if diagonal else M) / (M.diagonal().max() if diagonal else M.max())
                values, vectors = torch.linalg.eigh(M)
                root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        other = torch.randn(9, d, generator=generator, dtype=torch.float64)
        true = made(other @ root, points) @ alpha
        assert apart(model.predict(other)[:, None], true) <= 1e-6
        model.save(tmp_path / "model.safetensors")
        again = fastagop.load(tmp_path / "model.safetensors")
        assert again.kernel_ == made
        assert torch.equal(again.predict(other), model.predict(other))


def test_deep_rfm_and_classifier(data):
    generator = torch.Generator().manual_seed(6)
    X = torch.randn(60, 5, generator=generator)
    y = X[:, 0] > 0
    deep = fastagop.DeepRFMClassifier(NTK(1), depth=1, width=16, random_state=0).fit(X, y)
    assert deep.score(X, y) == 1.0
    with pytest.raises(fastagop.BackendUnavailable, match="to_module serves radial kernels only"):
        deep.to_module()
    rfm = fastagop.RFMClassifier(ProductLaplace("median"), iterations=1, ridge=1e-4).fit(X, y)
    assert rfm.score(X, y) == 1.0
    assert "float64 factorisation" in fastagop.explain(fastagop.RFMClassifier(NTK(1)), X, y)
