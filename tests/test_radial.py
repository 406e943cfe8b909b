"""Kernel profiles: values, gradient weights, and the kernels as values themselves."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from fastagop.kernels.radial import Radial
from fastagop.kernels.torch_backend.tiles import weights_from_upper_
from kernel_cases import PROFILE, case_of, cases, one_of_each_class

import fastagop
from fastagop import Gaussian, GeneralisedLaplace, Laplace

DTYPES = [torch.float32, torch.float64]
CASES = cases(PROFILE)
WIDTHS = [made for case in CASES for made in (case, case.at(0.3), case.at(5.0))]  # bandwidths on both sides of 1
# Those whose weights are known from their values, and the others, as the kernels say themselves.
CLOSED, OPEN = [], []
for _kernel in (*(case.kernel for case in WIDTHS), GeneralisedLaplace(1.0, 0.1), GeneralisedLaplace(2.0, 1.99)):
    (OPEN if _kernel.weight_from_value_(torch.rand(1)) is None else CLOSED).append(_kernel)
widths = pytest.mark.parametrize("kernel", [case.kernel for case in WIDTHS], ids=repr)
falling = pytest.mark.parametrize("kernel", [case.kernel for case in WIDTHS if not case.heavy_tailed], ids=repr)
classes = pytest.mark.parametrize("case", one_of_each_class(CASES), ids=lambda case: type(case.kernel).__name__)


def phi(kernel, r: float) -> float:
    return float(case_of(kernel).profile(kernel, np.float64(r)))


def weight(kernel, r: float) -> float:
    return float(case_of(kernel).weight(kernel, np.float64(r)))


def close(got, wanted, kernel, radii):
    """Within the roundings of the exponent t, which exp multiplies by t, and a few of the rest."""
    eps, tiny = torch.finfo(got.dtype).eps, torch.finfo(got.dtype).tiny
    for g, w, r in zip(got.tolist(), wanted, radii, strict=True):
        assert abs(g - w) <= 4 * eps * (1 + case_of(kernel).exponent(kernel, r)) * w + tiny, (r, g, w)


@widths
@pytest.mark.parametrize("dtype", DTYPES)
def test_value_and_weight(kernel, dtype):
    radii = [1e-9, 1e-3, 0.5, 1.0, 2.0, 3.0]  # from collapsed to far, short of underflow
    sq = torch.tensor(radii, dtype=torch.float64).square().to(dtype)
    exact = sq.double().sqrt().tolist()  # r^2 is rounded to dtype: measure against what was given
    close(kernel.value_(sq.clone()), [phi(kernel, r) for r in exact], kernel, exact)
    close(kernel.weight_(sq.clone()), [weight(kernel, r) for r in exact], kernel, exact)


@widths
def test_weight_is_minus_the_derivative_over_r(kernel):
    r = torch.linspace(0.1, 4.0, 40, dtype=torch.float64)
    h = 1e-5  # central differences: error h^2 / 6 of the third derivative, up to 1/L^3 = 40 (100 for exponent 0.5)
    slope = (kernel.value_((r + h).square()) - kernel.value_((r - h).square())) / (2 * h)
    assert torch.allclose(kernel.weight_(r.square()), -slope / r, rtol=0.0, atol=1e-7)


@widths
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_distance(kernel, dtype):
    zero = torch.zeros(3, dtype=dtype)
    assert kernel.value_(zero.clone()).tolist() == [1.0] * 3
    assert kernel.weight_(zero.clone()).tolist() == [0.0] * 3  # products would make w (x - x) of it, in rounded parts


@falling
@pytest.mark.parametrize("dtype", DTYPES)
def test_underflow_is_zero(kernel, dtype):
    far = torch.tensor([1e7, 1.8e19], dtype=dtype).square()  # nearly the last squares that float32 holds
    assert kernel.value_(far.clone()).tolist() == [0.0, 0.0], "of a power of r, the case is heavy_tailed=True"
    assert kernel.weight_(far.clone()).tolist() == [0.0, 0.0]
    rebuilt = kernel.weight_from_value_(torch.zeros(2, dtype=dtype))
    assert rebuilt is None or rebuilt.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("case", [case for case in CASES if not case.heavy_tailed], ids=str)
@pytest.mark.parametrize("bandwidth", [1e-20, 1e-40, 1e-200])  # 1 / L^2, or 1 / L, is no float32 number; or no float64
def test_narrow(case, bandwidth):
    kernel, sq = case.at(bandwidth).kernel, torch.tensor([0.0, 1e-6, 1.0])
    assert kernel.value_(sq.clone()).tolist() == [1.0, 0.0, 0.0]
    assert kernel.weight_(sq.clone()).tolist() == [0.0, 0.0, 0.0]
    X = torch.eye(4)
    assert torch.equal(kernel(X, X.clone()), X)
    assert not fastagop.gradients(kernel, X, X, X.clone()).any()


BANDWIDTHS = [1e-40, 1e-25, 1e-20, 1e20, 1e30, 1e39, 1e50, 1e60]
EXTREME = [*(case.kernel for case in CASES), GeneralisedLaplace(1.0, 0.01)]


@pytest.mark.parametrize("kernel", EXTREME, ids=repr)
@pytest.mark.parametrize("bandwidth", BANDWIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_bandwidths(kernel, bandwidth, dtype):
    """Where 1 / L, its square, or r^2 leaves a dtype: what it holds is right, the rest is 0, and nothing is NaN."""
    kernel, limits = dataclasses.replace(kernel, bandwidth=bandwidth), torch.finfo(dtype)
    sq = torch.tensor([1e-12, 1e-6, 1.0, 1e38], dtype=dtype)
    for method, formula in ((kernel.value_, phi), (kernel.weight_, weight)):
        for got, r in zip(method(sq.clone()).tolist(), sq.double().sqrt().tolist(), strict=True):
            true, exponent = formula(kernel, r), -math.log(max(phi(kernel, r), 1e-300))
            if true <= limits.max:
                assert abs(got - true) <= 16 * limits.eps * (1 + exponent) * true + 4 * limits.tiny, (r, got, true)
        # r^2 = 0; and beyond the dtype, where weights put it
        assert method(torch.tensor([0.0, math.inf], dtype=dtype)).tolist() == [float(method == kernel.value_), 0.0]
    rebuilt = kernel.weight_from_value_(kernel.value_(sq))
    assert rebuilt is None or not bool(rebuilt.isnan().any())


@pytest.mark.parametrize("kernel", CLOSED, ids=repr)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_from_value(kernel, dtype):
    r = torch.tensor([0.05, 0.5, 1.0, 3.0], dtype=dtype)
    k = kernel.value_(r.square())
    rebuilt = kernel.weight_from_value_(k.clone())
    assert rebuilt is not None
    # k has a rounding, and t of its exponent's; d ln w / d ln k times as much of it enters the weight
    radii, case = r.double().numpy(), case_of(kernel)
    up, down = ([np.log(f(kernel, s * radii)) for f in (case.weight, case.profile)] for s in (1 + 1e-5, 1 - 1e-5))
    slope = np.abs((up[0] - down[0]) / (up[1] - down[1]))
    wanted = case.weight(kernel, radii)
    allowed = 4 * torch.finfo(dtype).eps * (case.exponent(kernel, radii) + slope)
    assert (np.abs(rebuilt.double().numpy() - wanted) <= allowed * wanted + torch.finfo(dtype).tiny).all()
    assert bool(kernel.weight_from_value_(torch.ones(2, dtype=dtype)).isfinite().all())


@pytest.mark.parametrize("kernel", EXTREME, ids=repr)
@pytest.mark.parametrize("bandwidth", [1e-40, 1e-20, 1.0, 2.5, 1e20, 1e39])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_beside_values(kernel, bandwidth, dtype):
    """From r^2 and k they are those of r^2 alone, at duplicates and beyond the dtype as well; k stays."""
    kernel = dataclasses.replace(kernel, bandwidth=bandwidth)
    sq = torch.tensor([0.0, 1e-12, 1e-6, 0.3, 1.0, 40.0, 1e38, math.inf], dtype=dtype)
    k = kernel.value_(sq.clone())
    before = k.clone()
    limits = torch.finfo(dtype)
    torch.testing.assert_close(
        kernel.weight_beside_(sq.clone(), k), kernel.weight_(sq), rtol=16 * limits.eps, atol=4 * limits.tiny
    )
    assert torch.equal(k, before)


@widths
def test_rough_weights(kernel):
    """Three digits and zeros at duplicates, from r^2 and k, which stay, in float32; k of a pair itself may be wrong."""
    r = torch.tensor([0.0, 1e-2, 0.3, 1.0, 3.0, 1e4])
    sq, k = r.square(), kernel.value_(r.square())
    k[0] = 1.5  # a ridge was added
    # t = -ln k has the rounding of k, eps / t of it
    sure = torch.where(r > 0, -torch.log(k.double()), math.inf) >= 1e-4
    before = sq.clone(), k.clone()
    rough, exact = kernel.rough_weight(sq, k), kernel.weight_(sq.clone())
    torch.testing.assert_close(rough[sure], exact[sure], rtol=1e-3, atol=1e-30)
    assert rough[0] == 0.0
    assert bool(rough.isfinite().all())
    assert torch.equal(sq, before[0])
    assert torch.equal(k, before[1])


def test_families_of_exponents():
    assert [kernel.family_exponent for kernel in (Laplace(2.0), GeneralisedLaplace(2.0, 1.5))] == [1.0, 1.5]
    assert Laplace("median").with_exponent(1.5) == GeneralisedLaplace("median", 1.5)
    assert GeneralisedLaplace(2.0, 1.5).with_exponent(0.5) == GeneralisedLaplace(2.0, 0.5)
    assert GeneralisedLaplace(2.0, 1.5).with_exponent(1) == Laplace(2.0)
    assert Gaussian(2.0).family_exponent is None
    with pytest.raises(TypeError, match="has no exponent"):
        Gaussian(2.0).with_exponent(1.5)


def test_which_weights_are_known_from_values():
    assert {Laplace, Gaussian, GeneralisedLaplace} <= {type(kernel) for kernel in CLOSED}
    assert {kernel.exponent for kernel in CLOSED if isinstance(kernel, GeneralisedLaplace)} == {0.1, 0.5, 2.0}
    assert {kernel.exponent for kernel in OPEN if isinstance(kernel, GeneralisedLaplace)} == {1.5, 1.99}
    assert not {Laplace, Gaussian} & {type(kernel) for kernel in OPEN}


@pytest.mark.parametrize("kernel", OPEN, ids=repr)
def test_weights_without_a_closed_form(kernel):
    K = torch.rand(5, 5)
    before = K.clone()
    assert kernel.weight_from_value_(K) is None
    assert weights_from_upper_(kernel, K) is None
    assert torch.equal(K, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kernel", "twin"),
    [(GeneralisedLaplace(1.7, 1), Laplace(1.7)), (GeneralisedLaplace(1.7 * math.sqrt(2.0), 2), Gaussian(1.7))],
    ids=repr,
)
def test_kernels_that_are_the_same(kernel, twin, dtype):
    sq = torch.logspace(-6, 2, 50, dtype=dtype)
    close = {"rtol": 200 * torch.finfo(dtype).eps, "atol": 0.0}  # exponents up to 60
    torch.testing.assert_close(kernel.value_(sq.clone()), twin.value_(sq.clone()), **close)
    torch.testing.assert_close(kernel.weight_(sq.clone()), twin.weight_(sq.clone()), **close)
    k = torch.linspace(0.01, 0.99, 50, dtype=dtype)
    torch.testing.assert_close(kernel.weight_from_value_(k.clone()), twin.weight_from_value_(k.clone()), **close)


@pytest.mark.parametrize("kernel", [case.kernel for case in WIDTHS if case.kernel in CLOSED], ids=repr)
@pytest.mark.parametrize("rows", [1, 7, 30, 256])  # single rows, a short last block, one block, more than there is
def test_weights_of_a_stored_matrix(kernel, rows, cloud):
    """From kernel values above the diagonal, over whatever a factorisation left below: weights, zero for self."""
    X = cloud("collapsed 1", n=30)
    K = fastagop.kernel_matrix(kernel, X)
    left = K.triu(1) + torch.full_like(K, torch.nan).tril()
    W = weights_from_upper_(kernel, left, rows)
    assert W is left
    r = (X[:, None] - X[None]).square().sum(-1).sqrt()
    true = torch.tensor([[weight(kernel, x) if x > 0 else 0.0 for x in row] for row in r.tolist()], dtype=X.dtype)
    true.fill_diagonal_(0.0)
    other = r > 0  # duplicates: any finite weight does, it multiplies nothing
    # ln k is known to eps, and distances are 0.1 and more: t >= 2e-4
    assert torch.allclose(W[other], true[other], rtol=4 * 2.0**-52 * 5000, atol=0.0)
    assert torch.equal(W, W.T)
    assert bool((W.diagonal() == 0).all())
    assert bool(W.isfinite().all())


@widths
@pytest.mark.parametrize("method", ["value_", "weight_", "weight_from_value_"])
def test_profiles_work_in_place(kernel, method):
    block = torch.rand(4, 6)[:, 1:4]  # strided, as a block of a larger matrix is
    result = getattr(kernel, method)(block)
    assert method == "weight_from_value_" if result is None else result.data_ptr() == block.data_ptr()


@widths
def test_call_is_kernel_matrix(kernel, cloud):
    X, Z = cloud("collapsed 1e-2", n=30), cloud("spread", n=20)
    assert torch.equal(kernel(X, Z), fastagop.kernel_matrix(kernel, X, Z))
    assert torch.equal(kernel(X), fastagop.kernel_matrix(kernel, X))


@classes
def test_kernels_are_values(case):
    cls, further = type(case.kernel), case.further
    kernel = cls(2, *further)
    assert kernel == cls(2.0, *further)
    assert hash(kernel) == hash(cls(2.0, *further))
    assert kernel != cls(2.5, *further)
    assert type(kernel.bandwidth) is float
    assert {kernel: "found"}[cls(2.0, *further)] == "found"
    with pytest.raises(dataclasses.FrozenInstanceError):
        kernel.bandwidth = 3.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        del kernel.bandwidth
    for twin in (pickle.loads(pickle.dumps(kernel)), copy.copy(kernel), copy.deepcopy(kernel)):
        assert twin == kernel
        assert type(twin) is cls
    assert repr(kernel).startswith(f"{cls.__name__}(bandwidth=2.0")
    assert eval(repr(kernel), {cls.__name__: cls}) == kernel
    assert cls(**dataclasses.asdict(kernel)) == kernel


def test_kernels_of_different_kind_differ():
    assert Laplace(2.0) != Gaussian(2.0)
    assert len({Laplace(2.0), Gaussian(2.0), Laplace(2)}) == 2
    assert GeneralisedLaplace(2.0, 1.0) != Laplace(2.0)
    assert GeneralisedLaplace(2.0, 1) == GeneralisedLaplace(2.0, np.float32(1)) != GeneralisedLaplace(2.0, 1.5)


@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (2.0001, ValueError), (math.nan, ValueError), ("flat", TypeError)]
)
def test_bad_exponent(value, error):
    with pytest.raises(error, match="exponent"):
        GeneralisedLaplace(2.0, value)


@classes
@pytest.mark.parametrize(
    "value",
    [
        np.float32(0.5),  # not a float
        np.float64(0.5),  # a subclass of float
        np.array(0.5),
        torch.tensor(0.5),
        torch.tensor(0.5, dtype=torch.float64),
        Fraction(1, 2),
    ],
    ids=lambda v: type(v).__name__,
)
def test_any_number_is_a_bandwidth(case, value):
    kernel = type(case.kernel)(value, *case.further)
    assert kernel == case.at(0.5).kernel
    assert type(kernel.bandwidth) is float
    assert pickle.loads(pickle.dumps(kernel)) == kernel


@classes
@pytest.mark.parametrize(
    ("value", "error"),
    [
        (0, ValueError),
        (0.0, ValueError),
        (-1.0, ValueError),
        (math.nan, ValueError),
        (math.inf, ValueError),
        (np.float32(-1), ValueError),
        (np.nan, ValueError),
        (None, TypeError),
        (1j, TypeError),
        ([2.0], TypeError),
        (np.array([1.0, 2.0]), TypeError),
        ("wide", TypeError),
    ],
)
def test_bad_bandwidth(case, value, error):
    with pytest.raises(error, match="bandwidth"):
        type(case.kernel)(value, *case.further)


@pytest.mark.parametrize("method", ["value_", "weight_"])
def test_radial_alone_has_no_profile(method):
    with pytest.raises(
        TypeError, match=rf"^Radial defines no {method}\(sq\); give its class one, or use a kernel such"
    ):
        getattr(Radial(1.0), method)(torch.ones(1))


def test_a_kernel_without_a_weight_is_told_what_it_lacks():
    class Half(Radial):
        def value_(self, sq):
            return sq.sqrt_().div_(-self.bandwidth).exp_().add_(1.0).div_(2.0)

    X, alpha = torch.rand(5, 2, dtype=torch.float64), torch.rand(5, 1, dtype=torch.float64)
    assert Half(1.0)(X).shape == (5, 5)
    for call in (fastagop.agop, fastagop.gradients):
        with pytest.raises(TypeError, match=r"^Half defines no weight_\(sq\); give its class one"):
            call(Half(1.0), X, alpha)
