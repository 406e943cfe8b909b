"""gradients and kernel_matmul against the float64 reference, and the reference against automatic differentiation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from fastagop.kernels import reference
from fastagop.kernels.radial import Radial
from fastagop.kernels.torch_backend import gradients as torch_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import CONTRACT, case_of, cases

import fastagop
from fastagop import Gaussian, Laplace, Matern52

# Acceptance: relative Frobenius error on well-spread data.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
WELL_SPREAD = ("spread", "collapsed 1", "offset", "zero-rows")
DTYPES = [torch.float32, torch.float64]
KERNELS = [Laplace(2.0), Gaussian(1.0), Laplace(0.05)]  # reasons in test_kernel_matrix.py
COLLAPSED = [f"collapsed {spread}" for spread in ("1", "1e-2", "1e-3", "1e-4")]
CLOUDS = ["spread", *COLLAPSED, "nested", "offset", "zero-rows", "scales", "line", "pairs"]  # see test_distance.py
kernels = pytest.mark.parametrize("kernel", KERNELS, ids=repr)
every_kernel = pytest.mark.parametrize("kernel", [case.kernel for case in cases(CONTRACT)], ids=repr)
dtypes = pytest.mark.parametrize("dtype", DTYPES)
pytestmark = pytest.mark.usefixtures("each_way")


def predictor(kernel, X, alpha, z):
    """f(z) for one z, by torch operations that autograd differentiates; the point itself is left out by index."""
    difference = X - z
    other = (difference != 0).any(1)
    sq = difference[other].square().sum(1)
    return case_of(kernel).profile(kernel, sq.sqrt()) @ alpha[other]


# ---- products of all outputs at once


@every_kernel
@pytest.mark.parametrize("name", CLOUDS)
@pytest.mark.parametrize("K", [1, 3])
@dtypes
def test_all_outputs_at_once(kernel, name, K, dtype, cloud, normal, gradient_bound, monkeypatch):
    """The same gradients, to rounding, as by a few outputs after the others, in blocks of which the last is shorter."""
    X, alpha = cloud(name, n=300, d=7, dtype=dtype), normal(300, K, dtype=dtype)
    assert torch_gradients.products_at_once(alpha, X, None, 256) is not torch_gradients.output_gradients
    found = fastagop.gradients(kernel, X, alpha).double()
    monkeypatch.setattr(torch_gradients, "LEAST_ROWS", 10**9)
    apart = fastagop.gradients(kernel, X, alpha).double()
    assert float((found - apart).norm()) <= 2 * gradient_bound(kernel, X, alpha) * float(apart.norm())


# ---- weights of either sign


@dataclass(frozen=True)
class Wave(Radial):
    """exp(-t) cos(3 t) with t = (r / L)^2 / 2, whose gradient weight is negative at some distances."""

    def value_(self, sq):
        t = sq.mul_(0.5 / self.bandwidth**2)
        return t.copy_(torch.exp(-t) * torch.cos(3.0 * t))

    def weight_(self, sq):
        t = sq * (0.5 / self.bandwidth**2)
        weight = torch.exp(-t) * (torch.cos(3.0 * t) + 3.0 * torch.sin(3.0 * t)) / self.bandwidth**2
        return sq.copy_(weight.masked_fill_(sq == 0, 0.0))


@dtypes
@pytest.mark.parametrize("copies", [3, 20], ids=["stragglers", "crowds"])
def test_near_pairs_of_negative_weight_count(copies, dtype, normal, relative):
    """Points far from the origin have a few near ones, or many, and the weights of near pairs have either sign."""
    centres, n = 10.0 * normal(300 // copies, 8), 300
    X = (centres.repeat(copies, 1) + 0.1 * normal(n, 8, seed=2)).to(dtype)
    alpha = normal(n, 2, seed=3).to(dtype)
    x, kernel = X.double(), Wave(0.15)
    apart = x[None] - x[:, None]
    weight = kernel.weight_(apart.square().sum(2))
    assert (weight < 0).any()
    true = torch.einsum("ij,jc,ijd->icd", weight, alpha.double(), apart)
    assert relative(fastagop.gradients(kernel, X, alpha), true) <= (2e-4 if dtype == torch.float32 else 1e-12)


# ---- the reference itself


@every_kernel
@pytest.mark.parametrize("name", ["spread", "collapsed 1e-3"])
def test_reference_against_autograd(kernel, name, cloud, normal, relative):
    X, alpha = cloud(name, n=40, d=5), normal(40, 3)
    Z = torch.cat([cloud("spread", n=6, d=5, seed=4), X[:5], X[12:13]])  # own rows, and one that has a duplicate
    by_hand = torch.stack(
        [torch.autograd.functional.jacobian(lambda z: predictor(kernel, X, alpha, z), z) for z in Z.unbind()]
    )
    # float64 both times: within the roundings of differences of unit vectors at distance 1e-3 or more
    assert relative(reference.gradients(kernel, X, alpha, Z), by_hand) <= 1e-12
    M = torch.einsum("icd,ice->de", by_hand, by_hand)
    assert relative(reference.agop(kernel, X, alpha, Z, reduction="sum"), M) <= 1e-12
    assert relative(reference.agop(kernel, X, alpha, Z), M / len(Z)) <= 1e-12
    g = by_hand - by_hand.mean(0)
    M = torch.einsum("icd,ice->de", g, g) / len(Z)
    assert relative(reference.agop(kernel, X, alpha, Z, center=True), M) <= 1e-12


# ---- gradients: accuracy


@kernels
@dtypes
def test_duplicates_contribute_nothing(kernel, dtype, cloud, normal):
    X = cloud("collapsed 1e-3", dtype=dtype)
    alpha = torch.zeros(120, 2, dtype=dtype)
    alpha[[2, 7, 12]] = normal(3, 2, dtype=dtype)  # one point three times, and no other has a coefficient
    g = fastagop.gradients(kernel, X, alpha)
    # w (x - z) is zero in exact arithmetic; the sum w x - (sum w) z rounds to eps w |x|, with w = 1 / L^2 for the
    # Gaussian (the Laplace weight is zero there)
    assert float(g[[2, 7, 12]].abs().max()) <= 8 * torch.finfo(dtype).eps / kernel.bandwidth**2
    assert float(g[0].abs().max()) > 0


@pytest.mark.parametrize("kernel", [Gaussian(0.5), Matern52(0.3)], ids=repr)
@pytest.mark.parametrize("other", [True, False])
def test_self_pairs_are_left_out_where_all_else_is_tiny(kernel, other, normal):
    """Their weight is finite, and w (x - x) in rounded parts would be ten digits above the answer."""
    X, alpha = normal(30, 20, dtype=torch.float32), normal(30, 2, dtype=torch.float32)
    Z = torch.cat([X, X[:3]]) if other else X
    got, truth = fastagop.gradients(kernel, X, alpha, Z), reference.gradients(kernel, X, alpha, Z)
    # exponents are as large as r^2 / (2 L^2), near 100, and their rounding is the values' relative error
    assert float((got.double() - truth).norm() / truth.norm()) <= 1000 * torch.finfo(torch.float32).eps
    for method in ("gradient", "gram"):
        M, true = fastagop.agop(kernel, 1.0 * X, alpha, Z, method=method), reference.agop(kernel, X, alpha, Z)
        assert float((M.double() - true).norm() / true.norm()) <= 2000 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("length", [1e-10, 1e-6])  # 1 / L^2 squared leaves float32
def test_weights_that_overflow_when_squared(length, normal):
    X, alpha = normal(3, 3, dtype=torch.float32), normal(3, 2, dtype=torch.float32)
    assert not fastagop.agop(Gaussian(length), X, alpha, torch.cat([X, -X])).any()


def test_inverse_squares_of_bandwidths_leave_float32(normal):
    """w = exp(-r / L) / (L r) is a float32 number there, 1 / L^2 is none."""
    X, alpha = normal(20, 6, dtype=torch.float32), normal(20, 2, dtype=torch.float32)
    for size, length in ((1.0, 1e25), (1e-25, 1.0), (1e-18, 1e6)):
        truth = reference.gradients(Laplace(length), size * X, alpha)
        assert (
            float((fastagop.gradients(Laplace(length), size * X, alpha).double() - truth).norm() / truth.norm()) <= 1e-5
        )


def test_autocast_changes_nothing(normal):
    X, alpha = normal(60, 5, dtype=torch.float32), normal(60, 2, dtype=torch.float32)

    def results():
        return [
            fastagop.gradients(Laplace(1.5), X, alpha),
            fastagop.agop(Laplace(1.5), X, alpha),
            fastagop.kernel_matrix(Laplace(1.5), X),
            fastagop.solve(Laplace(1.5), X, alpha, ridge=1e-2).alpha,
        ]

    plain = results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, results(), plain))


def test_another_default_device(normal):
    X, alpha = normal(60, 5), normal(60, 2)
    torch.set_default_device("meta")
    try:
        fastagop.agop(Laplace(1.5), X, alpha, method="gram")
        fastagop.solve(Laplace(1.5), X, alpha, ridge=1e-2, method="cg")
    finally:
        torch.set_default_device(None)


@kernels
@dtypes
@pytest.mark.parametrize("word", ["identical", "one row"])
def test_nothing_to_differ_from(kernel, dtype, word, cloud, normal):
    n = 1 if word == "one row" else 50
    X, alpha = cloud("identical", n=n, dtype=dtype), normal(n, 2, dtype=dtype)
    g = fastagop.gradients(kernel, X, alpha)
    assert float(g.abs().max()) <= n * torch.finfo(dtype).eps / kernel.bandwidth**2 * float(alpha.abs().max())


@pytest.mark.parametrize("r", [1.0, 1e-2, 1e-4])  # from apart to collapsed, where the slope is all there is
def test_slope_of_a_single_bump(r):
    # f = exp(-|z - x| / L) around x = 0 and the gradient points from z back to x, with length exp(-r/L) / L
    X, alpha = torch.zeros(1, 3), torch.ones(1, 1)
    Z = r * torch.tensor([[0.6, 0.0, 0.8]])
    wanted = -math.exp(-r / 2) / 2 * torch.tensor([[0.6, 0.0, 0.8]])
    assert torch.allclose(fastagop.gradients(Laplace(2.0), X, alpha, Z)[:, 0], wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("K", [0, 1, 2, 7])  # none, one, few, many outputs
@pytest.mark.parametrize("m", [0, 1, 33])  # no point, one, several
@dtypes
def test_counts(K, m, dtype, cloud, normal, relative, gradient_bound):
    X, alpha = cloud("spread", n=30, d=50, dtype=dtype), normal(30, K, dtype=dtype)  # d > n
    Z = cloud("spread", n=m, d=50, dtype=dtype, seed=3)
    g = fastagop.gradients(Laplace(2.0), X, alpha, Z)
    assert g.shape == (m, K, 50)
    if m and K:
        assert relative(g, reference.gradients(Laplace(2.0), X, alpha, Z)) <= gradient_bound(Laplace(2.0), X, alpha, Z)


@kernels
@pytest.mark.parametrize("name", ["spread", "collapsed 1e-3", "offset"])
@pytest.mark.parametrize("own", [True, False])
def test_many_blocks(kernel, name, own, cloud, normal, relative, gradient_bound, tight_memory):
    X, alpha = cloud(name, n=131, dtype=torch.float32), normal(131, 3, dtype=torch.float32)
    Z = None if own else cloud(name, n=90, dtype=torch.float32, seed=4)
    m = 131 if own else 90
    block = tight_memory("gradients", kernel, X, alpha, Z)
    assert 1 <= block < 40
    assert m % block
    error = relative(fastagop.gradients(kernel, X, alpha, Z), reference.gradients(kernel, X, alpha, Z))
    assert error <= gradient_bound(kernel, X, alpha, Z)


@dtypes
@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_layouts(dtype, layout, laid_out, relative, gradient_bound):
    X, alpha = laid_out(layout, "collapsed 1e-2", dtype)
    for Z in (None, X[4:20], X.clone()):
        error = relative(fastagop.gradients(Laplace(2.0), X, alpha, Z), reference.gradients(Laplace(2.0), X, alpha, Z))
        assert error <= gradient_bound(Laplace(2.0), X, alpha, Z)


def test_inputs_are_left_alone_and_no_history_is_kept(cloud, normal):
    X, alpha, Z = cloud("offset", n=40), normal(40, 3).requires_grad_(), cloud("offset", n=20, seed=2)
    before = X.clone(), alpha.detach().clone(), Z.clone()
    g = fastagop.gradients(Laplace(2.0), X, alpha, Z)
    out = fastagop.kernel_matmul(Laplace(2.0), X, None, alpha)
    assert not g.requires_grad
    assert not out.requires_grad
    for now, then in zip((X, alpha.detach(), Z), before, strict=True):
        assert torch.equal(now, then)


@kernels
@pytest.mark.parametrize("size", [1e-20, 1e-12, 1e12, 1e20])  # squares of points, or of their inverses, are no float32
def test_units_do_not_matter(kernel, size, cloud, normal, relative):
    X, alpha = cloud("collapsed 1", dtype=torch.float32) * size, normal(120, 3, dtype=torch.float32)
    kernel = type(kernel)(kernel.bandwidth * size)
    for Z in (None, cloud("collapsed 1", n=30, dtype=torch.float32, seed=2) * size):
        g = fastagop.gradients(kernel, X, alpha, Z)
        assert relative(g, reference.gradients(kernel, X, alpha, Z)) <= TOLERANCE[torch.float32]


# ---- gradients: laws


@settings(derandomize=True, deadline=None, max_examples=15)
@given(seed=st.integers(0, 1000), spread=st.sampled_from(["1", "1e-2"]), kernel=st.sampled_from(KERNELS[:2]))
def test_laws(seed, spread, kernel, cloud, normal, relative):
    X, Z = cloud(f"collapsed {spread}", n=40, d=6, seed=seed), cloud("spread", n=25, d=6, seed=seed + 1)
    alpha, beta = normal(40, 2, seed=seed), normal(40, 2, seed=seed + 1)
    g = fastagop.gradients(kernel, X, alpha, Z)
    # float64 throughout: well-conditioned sums of 40 terms; 1e-12 is the acceptance, once for either side
    combined = fastagop.gradients(kernel, X, 2.0 * alpha - 3.0 * beta, Z)
    assert relative(combined, 2.0 * g - 3.0 * fastagop.gradients(kernel, X, beta, Z)) <= 4e-12
    swapped = fastagop.gradients(kernel, X, alpha.flip(1), Z)
    assert relative(swapped, g.flip(1)) <= 2e-12
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    assert relative(fastagop.gradients(kernel, X[order], alpha[order], Z), g) <= 2e-12
    shift = 3.0 * normal(1, 6, seed=seed)
    assert relative(fastagop.gradients(kernel, X + shift, alpha, Z + shift), g) <= 2e-12
    turn = torch.linalg.qr(normal(6, 6, seed=seed)).Q
    assert relative(fastagop.gradients(kernel, X @ turn, alpha, Z @ turn), g @ turn) <= 2e-12
    wider = type(kernel)(4.0 * kernel.bandwidth)
    assert relative(4.0 * fastagop.gradients(wider, 4.0 * X, alpha, 4.0 * Z), g) <= 2e-12
    # the fall between two close points is the gradient along the way: error of the central difference h^2 / L^3
    step = 1e-4 * normal(25, 6, seed=seed + 2)
    fall = fastagop.kernel_matmul(kernel, Z + step, X, alpha) - fastagop.kernel_matmul(kernel, Z - step, X, alpha)
    assert relative(fall, 2.0 * torch.einsum("icd,id->ic", g, step)) <= 1e-5


# ---- kernel_matmul


@pytest.mark.parametrize("p", [0, 1, 8])  # none, one, many columns
@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 20), (20, 1), (30, 50)])
def test_matmul_shapes(p, n, m, cloud, normal):
    X, Z, V = cloud("spread", n=n), cloud("spread", n=m, seed=2), normal(m, p)
    out = fastagop.kernel_matmul(Laplace(2.0), X, Z, V)
    assert out.shape == (n, p)
    assert torch.allclose(out, reference.kernel_matmul(Laplace(2.0), X, Z, V), rtol=0.0, atol=1e-12 * m)


def test_matmul_with_no_points(cloud, normal):
    out = fastagop.kernel_matmul(Laplace(2.0), cloud("spread", n=9), cloud("spread", n=0), normal(0, 2))
    assert torch.equal(out, torch.zeros(9, 2, dtype=torch.float64))


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("name", ["spread", "collapsed 1e-3"])
def test_matmul_in_many_blocks(own, name, cloud, normal, relative, tight_memory):
    X = cloud(name, n=131, dtype=torch.float32)
    Z = None if own else cloud(name, n=90, dtype=torch.float32, seed=4)
    V = normal(131 if own else 90, 4, dtype=torch.float32).abs()  # one sign: the sum cannot vanish
    block = tight_memory("kernel_matmul", Laplace(2.0), X, Z, V)
    assert 1 <= block < 40
    assert 131 % block
    out = fastagop.kernel_matmul(Laplace(2.0), X, Z, V)
    assert relative(out, reference.kernel_matmul(Laplace(2.0), X, X if Z is None else Z, V)) <= TOLERANCE[X.dtype]


def test_matmul_layouts(cloud, normal, relative):
    X, V = cloud("collapsed 1e-2", n=80, d=24)[::2, ::3], normal(80, 8).abs()[::2, ::2]
    assert not V.is_contiguous()
    true = reference.kernel_matmul(Laplace(2.0), X, X, V)
    assert relative(fastagop.kernel_matmul(Laplace(2.0), X, None, V), true) <= 1e-12
    assert relative(fastagop.kernel_matmul(Laplace(2.0), X, X.clone(), V.T.contiguous().T), true) <= 1e-12


def test_matmul_holds_no_kernel_matrix(cloud, normal, little_memory):
    X, V = cloud("spread", n=1000, dtype=torch.float32), normal(1000, 2, dtype=torch.float32)
    little_memory(1000 * 1000 * 4 / 5)  # a fifth of the kernel matrix is all there is
    out = fastagop.kernel_matmul(Laplace(2.0), X, None, V)
    assert torch.allclose(out.double(), reference.kernel_matmul(Laplace(2.0), X, X, V), rtol=0.0, atol=1e-5 * 1000)
