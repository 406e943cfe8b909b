"""The AGOP in both exact forms against the float64 reference."""

from __future__ import annotations

import warnings

import pytest
import torch
from fastagop.kernels import reference
from fastagop.kernels.kernel_operator import KernelOperator
from hypothesis import given, settings
from hypothesis import strategies as st

import fastagop
from fastagop import Gaussian, Laplace, Matern52

# Acceptance: relative Frobenius error of M on well-spread data.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
COLLAPSED = 1e-3  # acceptance: float32 at spread 1e-3, given alpha
GRAM = 1e-4  # what "auto" may lose against the gradient form, and what the gram form may lose without a warning
DTYPES = [torch.float32, torch.float64]
METHODS = ["gradient", "gram", "auto"]
KERNELS = [Laplace(2.0), Gaussian(1.0)]  # singular and smooth at distance zero; unit data: within reach of both
WELL_SPREAD = [
    "spread",  # nothing near, no duplicates
    "collapsed 1",  # classes overlap; exact duplicates
    "offset",  # norms a thousand times the distances
    "zero-rows",
]
NEAR = [  # reasons in test_distance.py
    "collapsed 1e-2",
    "collapsed 1e-3",
    "collapsed 1e-4",
    "nested",
    "scales",
    "line",
    "pairs",
]
kernels = pytest.mark.parametrize("kernel", KERNELS, ids=repr)
dtypes = pytest.mark.parametrize("dtype", DTYPES)
methods = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="session")
def coefficients(normal, targets):
    """coefficients(kind, kernel, X): random ones, or those of a kernel regression on class labels."""

    def build(kind, kernel, X):
        if kind != "solved":  # 40 outputs: the gram form is the cheaper one
            return normal(len(X), {"random": 3, "many": 40}[kind], dtype=X.dtype)
        k = reference.kernel_matrix(kernel, X)
        # a ridge well above float64's rounding: the coefficients are bounded by 1e6
        k.diagonal().add_(1e-6)
        return torch.linalg.solve(k, targets(len(X))).to(X.dtype)

    return build


def no_nan(M):
    assert bool(M.isfinite().all())
    return M


# ---- accuracy


@kernels
@dtypes
@methods
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        # random coefficients: test_contract.py
        # not zero-rows: equal rows with unequal labels, whose coefficients of 1e6 cancel
        ("spread", "solved"),
        ("collapsed 1", "solved"),
        ("offset", "solved"),
    ],
)
def test_well_spread(kernel, dtype, method, kind, name, cloud, coefficients, relative):
    X = cloud(name, dtype=dtype)
    alpha = coefficients(kind, kernel, X)
    M = fastagop.agop(kernel, X, alpha, method=method)
    assert M.dtype == dtype
    assert relative(M, reference.agop(kernel, X, alpha)) <= TOLERANCE[dtype]


@pytest.mark.usefixtures("each_way")
@kernels
@dtypes
@pytest.mark.parametrize("kind", ["random", "many", "solved"])
@pytest.mark.parametrize("name", [*NEAR, "collapsed 1e-5", "collapsed 1e-6"])
def test_near_pairs(kernel, dtype, kind, name, cloud, coefficients, relative, gradient_bound):
    X = cloud(name, dtype=dtype)
    alpha = coefficients(kind, kernel, X)
    true = reference.agop(kernel, X, alpha)
    error, bound = {}, gradient_bound(kernel, X, alpha)
    for method in METHODS:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            error[method] = relative(no_nan(fastagop.agop(kernel, X, alpha, method=method)), true)
        assert method == "gram" or not said
        if not said:  # rounded weights may leave nothing else of cancelling coefficients; few points' are not rounded
            assert error[method] <= (1.5 if method == "gram" else 1.0) * max(error["gradient"], bound) + GRAM
    # M is quadratic in the gradients, and its own sums round once more
    assert error["gradient"] <= 2 * bound + 4 * torch.finfo(dtype).eps
    if name == "collapsed 1e-3" and dtype == torch.float32:
        assert error["gradient"] <= COLLAPSED
        assert error["auto"] <= COLLAPSED


@kernels
@dtypes
@methods
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "other",
    [
        "none",
        "the same object",
        "a view",
        "a copy",  # zero distances off any diagonal
        "some rows",
        "fewer points",
        "more points",  # m > n
        "one point",
    ],
)
def test_evaluation_points(kernel, dtype, method, center, reduction, other, cloud, normal, relative):
    X, alpha = cloud("collapsed 1", n=70, d=9, dtype=dtype), normal(70, 4, dtype=dtype)
    Z = {
        "none": None,
        "the same object": X,
        "a view": X[:],
        "a copy": X.clone(),
        "some rows": X[5::3],
        "fewer points": cloud("spread", n=23, d=9, dtype=dtype, seed=5),
        "more points": cloud("spread", n=101, d=9, dtype=dtype, seed=5),
        "one point": cloud("spread", n=1, d=9, dtype=dtype, seed=5),
    }[other]
    words = {"reduction": reduction, "center": center}
    M = fastagop.agop(kernel, X, alpha, Z, method=method, **words)
    true = reference.agop(kernel, X, alpha, Z, **words)
    if other == "one point" and center:  # one gradient minus itself: nothing but rounding is left of |g|^2
        g = reference.gradients(kernel, X, alpha, Z)
        assert float(M.abs().max()) <= 16 * torch.finfo(dtype).eps * float(g.square().sum())
    else:
        assert relative(M, true) <= TOLERANCE[dtype]
    assert M.shape == (9, 9)


@dtypes
@methods
@pytest.mark.parametrize(
    ("n", "d", "K"),
    [
        (1, 4, 2),  # one row: no gradient
        (2, 1, 1),  # the smallest AGOP
        (20, 60, 3),  # d > n
        (90, 5, 1),  # one output
        (90, 5, 30),  # many
    ],
)
def test_shapes(dtype, method, n, d, K, cloud, normal, relative):
    X, alpha = cloud("spread", n=n, d=d, dtype=dtype), normal(n, K, dtype=dtype)
    M = fastagop.agop(Laplace(2.0), X, alpha, method=method)
    assert relative(M, reference.agop(Laplace(2.0), X, alpha)) <= TOLERANCE[dtype]
    Z = cloud("spread", n=7, d=d, dtype=dtype, seed=3)
    M = fastagop.agop(Laplace(2.0), X, alpha, Z, method=method)
    assert relative(M, reference.agop(Laplace(2.0), X, alpha, Z)) <= TOLERANCE[dtype]


@methods
@pytest.mark.parametrize("m", [1, 2, 3])
def test_centring_few_points(method, m, cloud, normal, relative):
    """One gradient is its own mean; two leave half of their difference."""
    X, alpha, Z = cloud("spread", n=40), normal(40, 3), cloud("spread", n=m, seed=2)
    M = fastagop.agop(Laplace(2.0), X, alpha, Z, center=True, method=method)
    if m == 1:
        assert not M.any()
    else:
        assert relative(M, reference.agop(Laplace(2.0), X, alpha, Z, center=True)) <= 1e-10


@methods
@pytest.mark.parametrize("size", [0.3, 0.03])  # of the cloud of points that looks at the centers from afar
def test_centring_gradients_that_nearly_agree(method, size, cloud, normal, relative):
    X, alpha = cloud("spread", n=150, d=10, dtype=torch.float32), normal(150, 3, dtype=torch.float32)
    Z = 3 + size * cloud("spread", n=80, d=10, dtype=torch.float32, seed=2)
    true = reference.agop(Laplace(2.0), X, alpha, Z, center=True)
    # the plain version: the same float32 gradients, centred before they are squared
    g = fastagop.gradients(Laplace(2.0), X, alpha, Z).double()
    g = g - g.mean(0)
    plain = relative(torch.einsum("icd,ice->de", g, g) / len(g), true)
    M = fastagop.agop(Laplace(2.0), X, alpha, Z, center=True, method=method)
    assert relative(M, true) <= 10 * plain + 16 * torch.finfo(torch.float32).eps


@kernels
@pytest.mark.parametrize("name", ["collapsed 1", "collapsed 1e-3", "collapsed 1e-5", "nested", "offset", "offset 1e-2"])
@pytest.mark.parametrize("other", ["own", "copy", "other"])
def test_centring_near_pairs(kernel, name, other, cloud, normal, relative):
    X, alpha = cloud(name, dtype=torch.float32), normal(120, 20, dtype=torch.float32)
    Z = {"own": None, "copy": X.clone(), "other": cloud(name, n=50, dtype=torch.float32, seed=3)}[other]
    true = reference.agop(kernel, X, alpha, Z, center=True)
    g = fastagop.gradients(kernel, X, alpha, Z).double()
    g = g - g.mean(0)
    plain = relative(torch.einsum("icd,ice->de", g, g) / len(g), true)
    error = {}
    for method in METHODS:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            error[method] = relative(fastagop.agop(kernel, X, alpha, Z, center=True, method=method), true)
        assert method == "gram" or not said
        if not said:
            assert error[method] <= error["gradient"] + GRAM
    assert error["gradient"] <= 10 * plain + 16 * torch.finfo(torch.float32).eps


@kernels
@dtypes
@methods
def test_zero(kernel, dtype, method, cloud, normal):
    X = cloud("identical", n=40, dtype=dtype)
    M = no_nan(fastagop.agop(kernel, X, normal(40, 3, dtype=dtype), method=method))
    assert float(M.abs().max()) <= (40 * torch.finfo(dtype).eps) ** 2 * 40  # gradients of rounding size, squared
    X = cloud("collapsed 1e-3", n=40, dtype=dtype)
    assert not fastagop.agop(kernel, X, torch.zeros(40, 3, dtype=dtype), method=method).any()
    assert not fastagop.agop(kernel, X, torch.zeros(40, 0, dtype=dtype), method=method).any()


@methods
def test_no_points(method, cloud, normal):
    X, alpha = cloud("spread"), normal(120, 3)
    M = fastagop.agop(Laplace(2.0), X, alpha, X[:0], reduction="sum", method=method)
    assert torch.equal(M, torch.zeros(12, 12, dtype=torch.float64))
    with pytest.raises(ValueError, match="Z must have at least one row"):
        fastagop.agop(Laplace(2.0), X, alpha, X[:0], method=method)


@methods
def test_no_points_centred(method, cloud, normal):
    X, alpha = cloud("spread"), normal(120, 3)
    M = fastagop.agop(Laplace(2.0), X, alpha, X[:0], reduction="sum", center=True, method=method)
    assert torch.equal(M, torch.zeros(12, 12, dtype=torch.float64))


# ---- blocks and memory


@kernels
@pytest.mark.parametrize("method", ["gradient", "gram"])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("other", ["own", "fewer", "more"])
@pytest.mark.parametrize("rows", [0, 5, 17])  # the least memory, and a few block rows more
def test_small_memory(kernel, method, center, other, rows, cloud, normal, relative, least_memory, block_of):
    X, alpha = cloud("collapsed 1", n=61, d=7), normal(61, 3)
    Z = {"own": None, "fewer": cloud("spread", n=29, d=7, seed=4), "more": cloud("spread", n=97, d=7, seed=4)}[other]
    call, words = (kernel, X, alpha, Z), {"method": method, "center": center}
    least = least_memory("agop", *call, **words)
    limit = least + rows * 61 * 8 * 4  # about four items a pair
    block = block_of("agop", *call, memory_limit=limit, **words)
    assert 1 <= block <= (1 if rows == 0 else 45)  # several blocks, the last one short
    M = fastagop.agop(*call, memory_limit=limit, **words)
    assert relative(M, reference.agop(*call, center=center)) <= TOLERANCE[torch.float64]
    with pytest.raises(MemoryError, match="memory_limit"):
        fastagop.agop(*call, memory_limit=least - 1, **words)


def test_auto_falls_back_to_what_fits(cloud, normal, least_memory, relative):
    X, alpha = cloud("spread", n=200, d=5), normal(200, 60)  # many outputs: the gram form is cheaper
    call = (Laplace(2.0), X, alpha)
    assert "method gram" in fastagop.explain("agop", *call)
    limit = 200 * 200 * 8 - 1  # no room for the weights
    assert "method gradient" in fastagop.explain("agop", *call, memory_limit=limit)
    assert relative(fastagop.agop(*call, memory_limit=limit), reference.agop(*call)) <= TOLERANCE[torch.float64]


def test_auto_takes_what_fits(cloud, normal, least_memory, relative):
    X, alpha = cloud("spread", n=100, d=30), normal(100, 40)
    call = (Laplace(2.0), X, alpha)
    assert "method gram" in fastagop.explain("agop", *call)
    limit = least_memory("agop", *call, method="gram") - 1
    assert least_memory("agop", *call, method="gradient") <= limit
    assert "method gradient" in fastagop.explain("agop", *call, memory_limit=limit)
    assert relative(fastagop.agop(*call, memory_limit=limit), reference.agop(*call)) <= TOLERANCE[torch.float64]


@dtypes
@pytest.mark.parametrize("n", [257, 300, 500])  # one block, cut along the diagonal into steps of other sizes
@pytest.mark.parametrize("own", [True, False])
def test_one_large_block(dtype, n, own, cloud, normal, relative):
    X, alpha = cloud("spread", n=n, d=3, dtype=dtype), normal(n, 2, dtype=dtype)
    Z = None if own else cloud("spread", n=n + 20, d=3, dtype=dtype, seed=4)
    true = reference.agop(Laplace(2.0), X, alpha, Z)
    for method in ("gradient", "gram"):
        assert relative(fastagop.agop(Laplace(2.0), X, alpha, Z, method=method), true) <= TOLERANCE[dtype]


def test_blocks_as_they_come(cloud, normal, relative, block_of):
    X, alpha = cloud("collapsed 1", n=1100, d=3), normal(1100, 2)  # more than two blocks, the last one short
    true = reference.agop(Laplace(2.0), X, alpha)
    for method in ("gradient", "gram"):
        assert block_of("agop", Laplace(2.0), X, alpha, method=method) < 1100
        assert relative(fastagop.agop(Laplace(2.0), X, alpha, method=method), true) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize(
    ("call", "megabytes"),
    [
        ("fastagop.agop(kernel, X, alpha, memory_limit=20e6)", 25),  # and the BLAS's own buffers
        ("fastagop.kernel_matmul(kernel, X, None, alpha)", 72),  # blocks sized for caches; this is half the matrix
    ],
)
def test_peak_memory(call, megabytes, peak_memory):
    """Neither holds the n x n matrix of 144 MB, nor a share of it when half of all points need a second look."""
    setup = """
kernel, g = fastagop.Laplace(2.0), torch.Generator().manual_seed(0)
X, alpha = torch.randn(6000, 8, generator=g), torch.randn(6000, 2, generator=g)
X[:3000] = X[:5].repeat(600, 1) + 1e-3 * X[:3000]  # five collapsed classes
fastagop.agop(kernel, X[:3100:5], alpha[:3100:5], method="gradient")
fastagop.kernel_matmul(kernel, X[:3100:5], None, alpha[:3100:5])
"""
    assert peak_memory(setup, call) <= 1e6 * megabytes


# ---- arguments as they come


@dtypes
@methods
@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_layouts(dtype, method, layout, laid_out, relative):
    X, alpha = laid_out(layout, "collapsed 1", dtype)
    for Z in (None, X[4:20], X.clone()):
        M = fastagop.agop(Laplace(2.0), X, alpha, Z, method=method)
        assert relative(M, reference.agop(Laplace(2.0), X, alpha, Z)) <= TOLERANCE[dtype]


@methods
def test_inputs_are_left_alone_and_no_history_is_kept(method, cloud, normal):
    X, alpha, Z = cloud("offset", n=40).requires_grad_(), normal(40, 3), cloud("offset", n=20, seed=2)
    before = X.detach().clone(), alpha.clone(), Z.clone()
    for points in (None, Z):
        assert not fastagop.agop(Laplace(2.0), X, alpha, points, method=method, center=True).requires_grad
    for now, then in zip((X.detach(), alpha, Z), before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("word", ["highest", "high", "medium"])
@methods
def test_precision_words(word, method, cloud, normal, relative):
    X, alpha = cloud("spread", dtype=torch.float32), normal(120, 3, dtype=torch.float32)
    M = fastagop.agop(Laplace(2.0), X, alpha, precision=word, method=method)
    assert relative(M, reference.agop(Laplace(2.0), X, alpha)) <= TOLERANCE[torch.float32]


def test_twice_the_same(cloud, normal):
    X, alpha = cloud("collapsed 1e-2", dtype=torch.float32), normal(120, 3, dtype=torch.float32)
    torch.manual_seed(0)
    first = fastagop.agop(Laplace(2.0), X, alpha)
    state = torch.get_rng_state()
    assert torch.equal(fastagop.agop(Laplace(2.0), X, alpha), first)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers are his


# ---- laws


@settings(derandomize=True, deadline=None, max_examples=12)
@given(
    seed=st.integers(0, 1000),
    kernel=st.sampled_from(KERNELS),
    method=st.sampled_from(METHODS),
    center=st.booleans(),
    own=st.booleans(),
    scale=st.sampled_from([1e-3, 0.3, 8.0, 1e3]),
)
def test_laws(seed, kernel, method, center, own, scale, cloud, normal, relative):
    X, alpha = cloud("collapsed 1", n=40, d=6, seed=seed), normal(40, 3, seed=seed)
    Z = None if own else cloud("spread", n=25, d=6, seed=seed + 1)
    words = {"method": method, "center": center}

    def both(f):
        return f(X), None if own else f(Z)

    def agop(points, a=alpha, kernel=kernel, **more):
        x, z = points
        return fastagop.agop(kernel, x, a, z, **{**words, **more})

    M = agop((X, Z))
    same = 2 * TOLERANCE[torch.float64]  # the acceptance, on either side
    # symmetric to rounding, positive semi-definite to rounding of its largest eigenvalue
    assert relative(M, M.T) <= 4 * 2.0**-52
    values = torch.linalg.eigvalsh(M)
    assert float(values[0]) >= -6 * 2.0**-52 * 16 * float(values[-1])
    # the trace is the gradients' mean square
    g = fastagop.gradients(kernel, X, alpha, Z)
    g = g - g.mean(0) if center else g
    assert float(M.trace()) == pytest.approx(float(g.square().sum() / len(g)), rel=same)
    assert relative(agop((X, Z), reduction="sum"), M * len(g)) <= same
    # order of centers, of outputs, and any rotation of the outputs among each other
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    assert relative(agop((X[order], None if own else Z), alpha[order]), M) <= same
    mix = torch.linalg.qr(normal(3, 3, seed=seed)).Q
    assert relative(agop((X, Z), alpha @ mix), M) <= same
    assert relative(agop((X, Z), -2.0 * alpha), 4.0 * M) <= same
    # motions of space
    shift, turn = 3.0 * normal(1, 6, seed=seed), torch.linalg.qr(normal(6, 6, seed=seed)).Q
    assert relative(agop(both(lambda x: x + shift)), M) <= 2 * same  # the shift itself rounds
    assert relative(agop(both(lambda x: x @ turn)), turn.T @ M @ turn) <= 2 * same
    # units: points and bandwidth by s, gradients by 1 / s
    wider = type(kernel)(scale * kernel.bandwidth)
    assert relative(agop(both(lambda x: x * scale), kernel=wider) * scale**2, M) <= 2 * same
    if not center and not own:  # a sum over points
        parts = [agop((X, z), reduction="sum") for z in (Z[:9], Z[9:])]
        assert relative(parts[0] + parts[1], M * len(Z)) <= same


@kernels
@methods
def test_rank(kernel, method, cloud, normal):
    X, alpha, Z = cloud("spread", n=50, d=20), normal(50, 3), cloud("spread", n=2, d=20, seed=4)
    values = torch.linalg.eigvalsh(fastagop.agop(kernel, X, alpha, Z, method=method)).flip(0)
    # two points, three outputs: six gradients
    assert float(values[5]) > 1e-6 * float(values[0])
    assert float(values[6]) <= 20 * 2.0**-52 * 16 * float(values[0])


@methods
@pytest.mark.parametrize("size", [1e-25, 1e-12, 1e-6, 1e6, 1e9, 1e11, 1e13, 1e15, 1e18])  # M is 1e-38 .. 1e38 or so
def test_units_do_not_matter(method, size, cloud, normal, relative):
    """Ordinary float32 numbers in and out; squares of weights, and of points, may not be."""
    X, alpha = cloud("spread", dtype=torch.float32) * size, normal(120, 20, dtype=torch.float32)
    kernel = Laplace(2.0 * size)
    if size < 1e-18:
        alpha *= 1e-12  # M goes by alpha^2 / size^2
    for Z in (None, cloud("spread", n=30, dtype=torch.float32, seed=2) * size):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fastagop.NumericalWarning)
            M = fastagop.agop(kernel, X, alpha, Z, method=method)
        assert relative(M, reference.agop(kernel, X, alpha, Z)) <= GRAM


def test_in_the_capture_of_a_cuda_graph(cloud, normal, monkeypatch, relative):
    """The host must not look at values there: no guard can measure, so the gradient form runs."""
    X, alpha = cloud("spread", n=40, d=6), normal(40, 8)
    truth = reference.agop(Laplace(2.0), X, alpha)
    assert "method gram" in fastagop.explain("agop", Laplace(2.0), X, alpha)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr("fastagop.kernels.checks.readable", lambda value: False)
    assert "method gradient" in fastagop.explain("agop", Laplace(2.0), X, alpha)
    assert relative(fastagop.agop(Laplace(2.0), X, alpha), truth) <= 1e-12
    with pytest.raises(ValueError, match="method='gram' measures its cancellation on the host"):
        fastagop.agop(Laplace(2.0), X, alpha, method="gram")


@pytest.mark.parametrize("bandwidth", [1e30, 1e50, 2.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_mean_gradient_of_wide_kernels(bandwidth, weighted, normal, relative):
    """What ranks centre by: weights of such a kernel are no float32 numbers, and neither is their mean always."""
    X, alpha = normal(60, 5, dtype=torch.float32), normal(60, 3, dtype=torch.float32)
    weights = torch.linspace(0.5, 2.0, 60) if weighted else None
    for kernel in (Gaussian(bandwidth), Matern52(bandwidth)):
        mean = KernelOperator("agop", kernel, X).mean_gradient(alpha, weights)
        w = torch.ones(60, dtype=torch.float64) if weights is None else weights.double()
        true = torch.einsum("i,icd->cd", w / w.sum(), reference.gradients(kernel, X, alpha))
        assert relative(mean, true) <= 1e-5
