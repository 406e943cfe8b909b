"""Gradients and the AGOP where the plain products cancel, against sums of differences in long double."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from fastagop.kernels.kernel_operator import KernelOperator
from fastagop.kernels.plan import AgopTask
from fastagop.kernels.torch_backend import agop as torch_agop

import fastagop
from fastagop import Gaussian, GeneralisedLaplace, Laplace, Matern52

Long = np.longdouble
# docs/pages/numerics.md: an entry of the gradients is off by at most so many eps of its terms.
ROUNDINGS = {torch.float32: 64.0, torch.float64: 512.0}
GRAM = {torch.float32: 4e-6, torch.float64: 1e-12}  # what "auto" lets the gram form lose, by its estimate
NAMED = 1e-5  # what the gram form may lose without a warning where it was asked for
TINY = {torch.float32: 1e-37, torch.float64: 1e-300}
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
METHODS = ["gradient", "gram", "auto"]


def long(t):
    return np.asarray(t.detach().numpy(), dtype=Long)


def weights(kernel, r):
    """(w(r), exponent t of the kernel's exponential), zero weight at distance zero."""
    L, s = Long(kernel.bandwidth), np.where(r > 0, r, Long(1))
    match kernel:
        case Laplace():
            t = s / L
            w = np.exp(-t) / (L * s)
        case Gaussian():
            t = s * s / (2 * L * L)
            w = np.exp(-t) / (L * L)
        case GeneralisedLaplace():
            t = (s / L) ** Long(kernel.exponent)
            w = Long(kernel.exponent) * t * np.exp(-t) / (s * s)
        case _:
            t = np.sqrt(Long(5)) * s / L
            w = 5 * (1 + t) * np.exp(-t) / (3 * L * L)
    return np.where(r > 0, w, Long(0)), t


def true_gradients(kernel, X, alpha, Z):
    """(g_ic, sum_j |W_ij alpha_jc| r_ij (1 + t_ij)): the last factor is the exponential's own rounding."""
    x, a, z = long(X), long(alpha), long(Z)
    g, terms = np.zeros((len(z), a.shape[1], x.shape[1]), Long), np.zeros((len(z), a.shape[1]), Long)
    for i in range(len(z)):
        difference = x - z[i]
        r = np.sqrt((difference * difference).sum(-1))
        w, t = weights(kernel, r)
        g[i] = (a * w[:, None]).T @ difference
        terms[i] = (w * r * (1 + t)) @ np.abs(a)
    return g, terms


def centred(g, terms, center, w=None):
    if not center:
        return g, terms
    share = np.full(len(g), Long(1) / len(g)) if w is None else w / w.sum()
    return g - np.einsum("i,icd->cd", share, g), terms + share @ terms


def squares(g, w=None):
    return np.einsum("i,icd,ice->de", np.ones(len(g), Long) if w is None else w, g, g)


def relative(got, true):
    return float(np.sqrt(((long(got) - true) ** 2).sum()) / np.sqrt((true**2).sum()))


# ---- a random search


def draw_points(rng, n, d):
    """A cloud that hurts: crowds, pairs, offsets, lines, scales, lattices, nested crowds."""
    normal = rng.standard_normal
    match rng.integers(0, 11):
        case 0:
            return normal((n, d))
        case 1:
            return normal((3, d))[rng.integers(0, 3, n)] + 10.0 ** -rng.integers(1, 8) * normal((n, d))
        case 2:
            pairs = normal((n, d))[rng.integers(0, max(1, n // 2), n)]
            return pairs + 10.0 ** -rng.integers(2, 8) * normal((n, d))
        case 3:
            return normal((n, d)) + 10.0 ** rng.integers(1, 6) * normal((1, d))
        case 4:
            return normal((n, d)) + 10.0 ** rng.integers(1, 6) * np.where(np.arange(n) % 2, 1.0, -1.0)[:, None]
        case 5:
            return normal((1, d)) + rng.random((n, 1)) * normal((1, d))
        case 6:
            return rng.random((n, d))
        case 7:
            return normal((n, d)) * 10.0 ** rng.uniform(-5, 2, (n, 1))
        case 8:
            crowds = normal((3, d))[rng.integers(0, 3, n)] + 1e-2 * normal((4, d))[rng.integers(0, 4, n)]
            return crowds + 1e-4 * normal((3, d))[rng.integers(0, 3, n)] + 1e-6 * normal((n, d))
        case 9:
            return np.round(2 * normal((n, d))) / 2
        case _:
            return normal((n, d)) * 10.0 ** rng.integers(-6, 1, (1, d))


def draw(seed):
    """(kernel, X, alpha, Z or None, center)."""
    rng, dtype = np.random.default_rng(seed), [torch.float32, torch.float64][seed % 2]
    n, d, K = int(rng.integers(1, 60)), int(rng.integers(1, 14)), int(rng.integers(1, 4))
    X = torch.from_numpy(draw_points(rng, n, d)).to(dtype)
    size = float((X - X.mean(0)).norm(dim=1).median()) + 1e-30
    L = size * 10.0 ** rng.uniform(-0.7, 1.5)
    kernel = [Laplace(L), Gaussian(L), GeneralisedLaplace(L, float(rng.uniform(0.2, 2))), Matern52(L)][seed // 2 % 4]
    Z = None
    if rng.random() < 0.5:  # rows of X, or points beside them
        Z = X[torch.from_numpy(rng.integers(0, n, int(rng.integers(1, 40))))]
        apart = 10.0 ** -float(rng.integers(0, 8)) if rng.random() < 0.5 else 0.0
        Z = Z + apart * torch.from_numpy(rng.standard_normal(tuple(Z.shape))).to(dtype)
    spread = rng.uniform(-3, 3, (n, 1) if rng.random() < 0.3 else (1, 1))
    alpha = torch.from_numpy(rng.standard_normal((n, K)) * 10.0**spread).to(dtype)
    return kernel, X, alpha, Z, bool(rng.random() < 0.5)


@pytest.mark.parametrize("first", range(0, 160, 20))
def test_random_problems(first):
    for seed in range(first, first + 20):
        kernel, X, alpha, Z, center = draw(seed)
        eps, tiny, c = torch.finfo(X.dtype).eps, TINY[X.dtype], ROUNDINGS[X.dtype]
        g, terms = true_gradients(kernel, X, alpha, X if Z is None else Z)
        got = long(fastagop.gradients(kernel, X, alpha, Z))
        assert (np.sqrt(((got - g) ** 2).sum(-1)) <= c * eps * terms + tiny * len(X)).all(), seed
        g, terms = centred(g, terms, center)
        true, size = squares(g), np.sqrt((g**2).sum(-1))
        bound = float((c * eps * terms * (2 * size + c * eps * terms)).sum()) + tiny * len(X)
        for method in METHODS:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                M = fastagop.agop(kernel, X, alpha, Z, center=center, method=method, reduction="sum")
            assert bool(M.isfinite().all()), (seed, method)
            assert torch.equal(M, M.T), (seed, method)
            values = torch.linalg.eigvalsh(M.double())
            assert float(values[0]) >= -8 * eps * float(values[-1]), (seed, method)
            assert method == "gram" or not said
            if not said:
                lost = {"gradient": 0.0, "auto": 4 * GRAM[X.dtype], "gram": 4 * NAMED}[method]
                error = np.sqrt(((long(M) - true) ** 2).sum())
                assert error <= bound + lost * np.sqrt((true**2).sum()), (seed, method)


# ---- near pairs


def pairs(generator, apart):
    base = torch.randn(150, 10, generator=generator)
    return torch.cat([base, base + apart * torch.randn(150, 10, generator=generator)]), 3.0


def clusters(generator):
    X = torch.randn(300, 10, generator=generator)
    return X + 1e4 * torch.where(torch.arange(300) % 2 == 0, 1.0, -1.0)[:, None], 3.0


def collapsed(generator, spread):
    centres = torch.nn.functional.normalize(torch.randn(5, 20, generator=generator))
    return centres[torch.randint(0, 5, (300,), generator=generator)] + spread * torch.randn(
        300, 20, generator=generator
    ), 2.0


def nested(generator):
    X = torch.randn(4, 12, generator=generator)[torch.randint(0, 4, (300,), generator=generator)]
    X = X + 1e-2 * torch.randn(7, 12, generator=generator)[torch.randint(0, 7, (300,), generator=generator)]
    return X + 1e-5 * torch.randn(300, 12, generator=generator), 2.0


CLOUDS = {
    "pairs 1e-3": lambda g: pairs(g, 1e-3),
    "pairs 1e-4": lambda g: pairs(g, 1e-4),
    "pairs 1e-6": lambda g: pairs(g, 1e-6),
    "two clusters far out": clusters,
    "on a line, one feature": lambda g: (torch.rand(500, 1, generator=g), 0.3),
    "on a line, many features": lambda g: (torch.rand(300, 1, generator=g) * torch.randn(1, 9, generator=g), 1.0),
    "collapsed": lambda g: collapsed(g, 1e-3),
    "collapsed far": lambda g: collapsed(g, 1e-5),
    "nested": nested,
}


@pytest.fixture(params=list(CLOUDS))
def crowded(request):
    """(kernel, X, coefficients of a kernel regression on noise, gradients, their terms), float32 points."""
    generator = torch.Generator().manual_seed(0)
    X, L = CLOUDS[request.param](generator)
    kernel, Y = Laplace(L), torch.randn(len(X), 2, generator=generator)
    K = torch.from_numpy(np.exp(-np.sqrt(((long(X)[:, None] - long(X)) ** 2).sum(-1)) / Long(L)).astype(float))
    alpha = torch.linalg.solve(K + 1e-3 * torch.eye(len(X), dtype=K.dtype), Y.double()).float()
    return kernel, X, alpha, *true_gradients(kernel, X, alpha, X)


def test_gradients_of_crowds(crowded):
    kernel, X, alpha, g, terms = crowded
    got = long(fastagop.gradients(kernel, X, alpha))
    error = np.sqrt(((got - g) ** 2).sum(-1))
    assert (error <= 16 * torch.finfo(torch.float32).eps * terms).all()
    assert relative(torch.from_numpy(got.astype(float)), g) <= 3e-5  # was 1e-4 to 3e-1


@pytest.mark.parametrize("center", [False, True])
def test_agop_of_crowds(crowded, center):
    kernel, X, alpha, g, terms = crowded
    true = squares(centred(g, terms, center)[0])
    for method in METHODS:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            M = fastagop.agop(kernel, X, alpha, center=center, method=method, reduction="sum")
        assert said or relative(M, true) <= {"gradient": 2e-6, "auto": 1e-5, "gram": 2e-5}[method]
        assert method == "gram" or not said


def test_weighted_agop_of_crowds(crowded):
    kernel, X, alpha, g, terms = crowded
    w = torch.linspace(0, 2, len(X))
    for center in (False, True):
        true = squares(centred(g, terms, center, long(w))[0], long(w))
        how = {"center": center, "reduction": "sum", "sample_weight": w}
        assert relative(fastagop.agop(kernel, X, alpha, method="gradient", **how), true) <= 2e-6


def test_other_points_in_crowds(crowded):
    kernel, X, alpha, g, _ = crowded
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(1))[:90]
    got = fastagop.gradients(kernel, X, alpha, X[order])
    assert relative(got, g[order.numpy()]) <= 3e-5
    assert (
        relative(fastagop.agop(kernel, X, alpha, X[order], method="gradient"), squares(g[order.numpy()]) / 90) <= 2e-6
    )


def test_stored_weights_of_crowds(crowded):
    """The gradient form from stored float64 weights, whose squared distances are gone."""
    kernel, X, alpha, g, _ = crowded
    r = np.sqrt(((long(X)[:, None] - long(X)) ** 2).sum(-1))
    for W in (torch.from_numpy(weights(kernel, r)[0].astype(float)), torch_agop.weights(kernel, X, X, 64)):
        task = AgopTask("sum", method="gradient")
        M = torch_agop.agop_from_weights_(W.clone(), kernel, X, alpha, X, task, symmetric=True, rows=64)
        assert relative(M, squares(g)) <= 2e-6
        operator = KernelOperator("agop", kernel, X)
        assert relative(operator.agop_from_weights_(W, alpha, center=False), squares(g)) <= 1e-5


@pytest.mark.parametrize("exponent", [-30, 0, 30])
def test_stored_weights_of_crowds_that_count_otherwise(crowded, exponent):
    """Rows of the weights are multiplied by roots, here far from 1, before near pairs are looked for."""
    kernel, X, alpha, g, _ = crowded
    w = torch.linspace(0.5, 2.0, len(X)) * 2.0**exponent
    W, task = torch_agop.weights(kernel, X, X, 64), AgopTask("sum", method="gradient")
    M = torch_agop.agop_from_weights_(W, kernel, X, alpha, X, task, symmetric=True, rows=64, row_weights=w)
    assert relative(M, squares(g, long(w))) <= 2e-6


def test_mean_gradient_of_crowds(crowded):
    kernel, X, alpha, g, terms = crowded
    tiles = ((row, W) for row, W, _ in torch_agop.weight_tiles(kernel, X, X, 64, None))
    mean = torch_agop.mean_gradient(tiles, alpha, X, X, None, len(X))
    error = np.abs(long(mean) - g.mean(0)).max()
    assert error <= 16 * torch.finfo(torch.float32).eps * terms.mean(0).max()


@dtypes
def test_far_points_without_coefficients_hide_nothing(dtype, normal):
    """A bounded weight: near pairs are all there is, beside a product of rounding size."""
    X, alpha = normal(40, 8, dtype=dtype), torch.zeros(40, 2, dtype=dtype)
    X[:3] = X[3] + 1e-4 * X[:3]
    alpha[:3] = normal(3, 2, dtype=dtype)
    for kernel in (Gaussian(1.0), Matern52(1.0), Laplace(1.0)):
        g, terms = true_gradients(kernel, X, alpha, X)
        got = long(fastagop.gradients(kernel, X, alpha))
        assert (np.sqrt(((got - g) ** 2).sum(-1)) <= ROUNDINGS[dtype] * torch.finfo(dtype).eps * terms).all()


# ---- what centring cancels


@pytest.mark.parametrize("L", [10.0, 30.0, 100.0, 1000.0])
@pytest.mark.parametrize("method", METHODS)
@dtypes
def test_centring_with_wide_bandwidths(L, method, dtype, normal):
    X, kernel = normal(100, 50, dtype=dtype), Gaussian(L)
    alpha = fastagop.solve(kernel, X, normal(100, 50, dtype=dtype, seed=2), ridge=1e-3).alpha
    g, terms = true_gradients(kernel, X, alpha, X)
    true = squares(centred(g, terms, True)[0]) / 100
    M = fastagop.agop(kernel, X, alpha, center=True, method=method)
    assert relative(M, true) <= {torch.float32: 5e-6, torch.float64: 1e-9}[dtype]  # was up to 1e3
    values = torch.linalg.eigvalsh(M.double())
    assert torch.equal(M, M.T)
    assert float(values[0]) >= -8 * torch.finfo(dtype).eps * float(values[-1])
    Z = normal(60, 50, dtype=dtype, seed=3)
    g, terms = true_gradients(kernel, X, alpha, Z)
    true = squares(centred(g, terms, True)[0]) / 60
    assert relative(fastagop.agop(kernel, X, alpha, Z, center=True, method=method), true) <= (
        5e-6 if dtype == torch.float32 else 1e-9
    )


def test_centring_that_needs_float64_says_so_without_memory(normal, least_memory):
    X, kernel = normal(100, 50, dtype=torch.float32), Gaussian(1000.0)
    alpha = fastagop.solve(kernel, X, normal(100, 50, dtype=torch.float32, seed=2), ridge=1e-3).alpha
    call, how = (kernel, X, alpha), {"center": True, "method": "gradient"}
    assert "computed in float64" in fastagop.explain("agop", *call, **how)
    with pytest.warns(fastagop.NumericalWarning, match="float64 weights do not fit"):
        fastagop.agop(*call, memory_limit=least_memory("agop", *call, **how), **how)


@dtypes
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize(("n", "m", "K"), [(1, 1, 1), (2, 1, 1), (30, 1, 1), (30, 2, 1), (2, 30, 1), (30, None, 1)])
def test_symmetric_and_positive(n, m, K, center, method, dtype, cloud, normal):
    X, alpha = cloud("collapsed 1e-2", n=n, d=15, dtype=dtype), normal(n, K, dtype=dtype)
    Z = None if m is None else cloud("spread", n=m, d=15, dtype=dtype, seed=5)
    for kernel in (Laplace(2.0), Gaussian(20.0)):
        M = fastagop.agop(kernel, X, alpha, Z, center=center, method=method)
        values = torch.linalg.eigvalsh(M.double())
        assert torch.equal(M, M.T)
        assert float(values[0]) >= -8 * torch.finfo(dtype).eps * float(values[-1].clamp(min=0))


# ---- very small and very large numbers


def close(got, true, terms, dtype):
    """Within a few roundings of the terms, and of the smallest numbers of the dtype."""
    info = torch.finfo(dtype)
    error = np.abs(long(got) - true).max()
    return error <= 300 * info.eps * np.abs(terms).max() + info.tiny * info.eps


@pytest.mark.parametrize("size", [1e-13, 1e-25, 1e-30, 1e-38, 3e-41, 1e15, 1e30])
@pytest.mark.parametrize("amplitude", [1e-30, 1e-10, 1e3, 1e25])
@pytest.mark.parametrize("relative_length", [None, 1e-3, 1.0])  # of 1, or of the points
def test_small_and_large_numbers_in_float32(size, amplitude, relative_length, normal):
    X, alpha = (size * normal(12, 6)).float(), (amplitude * normal(12, 2, seed=2)).float()
    L, most = 1.0 if relative_length is None else relative_length * size, torch.finfo(torch.float32).max
    for kernel in (Laplace(L), Gaussian(L), Matern52(L), GeneralisedLaplace(L, 0.3), GeneralisedLaplace(L, 1.5)):
        g, terms = true_gradients(kernel, X, alpha, X)
        if np.abs(g).max() > most:
            with pytest.raises(ValueError, match="alpha is so large that a gradient leaves"):
                fastagop.gradients(kernel, X, alpha)
        elif np.abs(g).max() < most / 4:
            assert close(fastagop.gradients(kernel, X, alpha), g, terms, torch.float32)
        true, size_of_m = squares(g) / 12, (terms**2).sum() / 12
        for method in ("gradient", "gram"):
            if np.abs(true).max() > most:
                with pytest.raises(ValueError, match="alpha is so large that the AGOP leaves"):
                    fastagop.agop(kernel, X, alpha, method=method)
            elif np.abs(true).max() < most / 4:
                assert close(fastagop.agop(kernel, X, alpha, method=method), true, size_of_m, torch.float32)


@pytest.mark.parametrize(("size", "amplitude"), [(1e-200, 1e-200), (1e-200, 1.0), (1e-310, 1e-150), (1e200, 1e200)])
def test_small_and_large_numbers_in_float64(size, amplitude, normal):
    X, alpha = size * normal(12, 6), amplitude * normal(12, 2, seed=2)
    for kernel in (Laplace(2.0 * size), Laplace(1.0), GeneralisedLaplace(size, 1.5)):
        g, terms = true_gradients(kernel, X, alpha, X)
        true, size_of_m = squares(g) / 12, (terms**2).sum() / 12
        if np.abs(g).max() < 1e300:
            assert close(fastagop.gradients(kernel, X, alpha), g, terms, torch.float64)
        for method in ("gradient", "gram"):
            if np.abs(true).max() < 1e300:
                assert close(fastagop.agop(kernel, X, alpha, method=method), true, size_of_m, torch.float64)


def test_huge_coefficients_with_tiny_weights(normal):
    """Far in the tail of an exponential: neither scaling of the coefficients nor squares may lose what is left."""
    X = 30 * torch.nn.functional.one_hot(torch.arange(6), 8).float() + 0.01 * normal(6, 8, dtype=torch.float32)
    alpha, kernel = 1e20 * normal(6, 2, dtype=torch.float32, seed=2), Laplace(0.6)
    g, _ = true_gradients(kernel, X, alpha, X)
    assert relative(fastagop.gradients(kernel, X, alpha), g) <= 1e-4  # exponents near 70
    for method in ("gradient", "gram"):
        assert relative(fastagop.agop(kernel, X, alpha, method=method), squares(g) / 6) <= 1e-4


@pytest.mark.parametrize("seed", range(3, 7))
def test_a_gram_form_of_a_negative_trace_is_all_rounding(seed, normal):
    """Terms of a kernel made of radial ones, far from zero: what they leave may have any sign."""
    X, alpha = 1e8 + normal(30, 2, seed=seed), normal(30, 1, seed=seed + 100)
    kernel = 2.0 * Gaussian(30.0)
    with pytest.warns(fastagop.NumericalWarning, match="gradient form ran"):
        M = fastagop.agop(kernel, X, alpha, method="gram")
    assert torch.equal(M, fastagop.agop(kernel, X, alpha, method="gradient"))
