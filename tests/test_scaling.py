"""Units of length, of targets and of coefficients, against whole-number arithmetic of powers of two."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from fastagop.kernels import checks, gemm, reference, scaling
from fastagop.kernels.radial import Radial
from fastagop.kernels.scaling import Amplitude, in_range, scale_points

import fastagop
from fastagop import ArcCosine, Gaussian, GeneralisedLaplace, Laplace, LpLaplace, Matern52, ProductLaplace
from fastagop.solvers.solve import scale_targets, unscale_coefficients


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [-2.0, -1.5, -0.9, -0.1, 0.0, 0.1, 0.9, 1.5, 1.9])
def test_powers_of_two_in_steps_that_stay_within_the_dtype(dtype, share):
    """From the end of the dtype's range to the other: no factor of 2^200 is a float32 number."""
    range_ = 126 if dtype == torch.float32 else 1022
    exponent = int(share * range_)
    start = 0.75 * 2.0 ** (range_ if exponent < 0 else -range_)
    values = torch.tensor([start, -start, 0.0], dtype=dtype)
    wanted = torch.tensor([math.ldexp(start, exponent), -math.ldexp(start, exponent), 0.0], dtype=dtype)
    assert torch.equal(scaling.scaled_(values, exponent), wanted)
    assert torch.equal(values, wanted)  # in place


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_size_of_the_largest_item(dtype):
    A = torch.tensor([[1.0, -3.0], [2.0, 0.0]], dtype=dtype)
    assert checks.largest(A) == checks.largest(A.T) == checks.largest(-A) == 3.0
    assert checks.largest(A[:0]) == checks.largest(A[:, :0]) == 0.0
    assert math.isnan(checks.largest(A * float("nan")))
    assert checks.largest(A - math.inf) == math.inf


def test_random_signs_are_the_same_in_every_dtype():
    signs = gemm.random_signs(50, 4, torch.zeros(1))
    assert signs.abs().eq(1.0).all()
    assert 0.2 < float(signs.gt(0).double().mean()) < 0.8
    assert torch.equal(gemm.random_signs(50, 4, torch.zeros(1, dtype=torch.float64)), signs.double())


def test_points_of_a_capture_are_not_looked_at(monkeypatch):
    monkeypatch.setattr(checks, "readable", lambda value: False)
    X = torch.tensor([[1e30, 0.0]])
    assert scale_points(Laplace(2.0), X, X) == (Laplace(2.0), X, X, 1.0)
    kernel, alpha, amplitude = in_range(Laplace(2.0), X, X.T, 0.25)
    assert (kernel, alpha.data_ptr()) == (Laplace(2.0), X.data_ptr())
    assert amplitude == Amplitude(1.0, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("own", [True, False])
def test_the_unit_of_two_sets_of_points_is_that_of_the_larger(dtype, own):
    X = torch.tensor([[3.0, 0.0], [1.0, 2.0]], dtype=dtype)
    Z = X if own else 2.0**30 * X
    small = scale_points(Laplace(3.0), X, Z)
    assert small.unit == (1.0 if own else 2.0**32)
    assert torch.equal(small.X * small.unit, X)
    assert torch.equal(small.Z * small.unit, Z)
    assert small.kernel.bandwidth == 3.0 / small.unit


@pytest.mark.parametrize("bandwidth", [1e-300, 1.0, 1e300])
@pytest.mark.parametrize("size", [2.0**-1000, 2.0**1000])
def test_bandwidths_stay_numbers_in_the_unit_of_float64_points(size, bandwidth):
    X = torch.tensor([[size, -size]], dtype=torch.float64)
    points = scale_points(Laplace(bandwidth), X, X)
    wide = math.frexp(bandwidth)[1]
    assert points.unit == 2.0 ** max(wide - 1000, min(wide + 1000, math.frexp(size)[1]))
    assert 2.0**-1001 <= points.kernel.bandwidth <= 2.0**1000
    assert points.kernel.bandwidth * points.unit == bandwidth
    assert torch.equal(points.X * points.unit, X)


def test_bandwidths_of_float32_points_end_where_floats_end():
    """float32 points have the unit of their own size whatever the bandwidth is."""
    X = torch.tensor([[2.0**-100, 0.0]])
    assert scale_points(Laplace(1e300), X, X).kernel.bandwidth == 2.0**1023
    assert scale_points(Laplace(1e300), X, X).unit == 2.0**-99
    X = torch.tensor([[2.0**100, 0.0]])
    assert scale_points(Laplace(5e-324), X, X).kernel.bandwidth == 5e-324


@dataclass(frozen=True)
class Damped(Radial):
    """exp(-r / L) cos(r / period), or with ``share`` exp(-u) cos(u / period), u = r / L: a length, or a share of L."""

    period: float
    share: bool = False

    def value_(self, sq):
        r = sq.sqrt_()
        return r.copy_(torch.exp(-r / self.bandwidth) * torch.cos(r / self.period / (self.bandwidth**self.share)))


@pytest.mark.parametrize("size", [1e-8, 1e8])
def test_lengths_beside_the_bandwidth_are_refused_where_they_would_not_follow(size, normal):
    """In a unit of length only the bandwidth changes; at usual sizes there is no such unit."""
    X = normal(6, 3)
    lengths, shares = Damped(2.0, 3.0), Damped(2.0, 1.5, True)
    usual = fastagop.kernel_matrix(lengths, X)
    torch.testing.assert_close(usual, fastagop.kernel_matrix(shares, X))
    torch.testing.assert_close(usual, fastagop.kernel_matrix(Damped(2.0 * size, 1.5, True), X * size))
    with pytest.raises(TypeError, match=r"Damped\.value_ must depend on r / bandwidth alone"):
        fastagop.kernel_matrix(Damped(2.0 * size, 3.0 * size), X * size)


@pytest.mark.parametrize(("factor", "exponent"), [(1.0, 0), (1.0, 3), (1.5, 0), (1.5, -4)])
@pytest.mark.parametrize("further", [0, 5])
def test_amplitudes_are_restored(factor, exponent, further):
    amplitude, g = Amplitude(factor, exponent), torch.tensor([1.0, -3.0], dtype=torch.float64)
    wanted = g * factor * 2.0**exponent
    assert torch.equal(amplitude.restore(g.clone()), wanted)
    assert torch.equal(amplitude.restore_squares(g.square(), further), wanted.square() * 2.0**further)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 45), (torch.float64, 300)])
@pytest.mark.parametrize("size", [-60, -46, -45, -3, 0, 44, 45, 46, 100])
@pytest.mark.parametrize("unit", [2.0**-70, 2.0**-3, 1.0, 2.0**9, 2.0**70])
def test_coefficients_take_what_they_can_of_the_amplitude(dtype, bound, size, unit):
    """Their largest is 2^size times 3/4; gradients are per unit of length."""
    alpha, X = 0.75 * torch.tensor([[2.0**size], [0.0]], dtype=dtype), torch.ones(2, 3, dtype=dtype)
    before = alpha.clone()
    kernel, scaled, amplitude = in_range(Laplace(2.0), X, alpha, unit)
    assert kernel == Laplace(2.0)
    assert amplitude.factor == 1.0
    assert torch.equal(alpha, before)
    largest = math.frexp(float(scaled.max()))[1]
    assert largest == max(-bound, min(bound, size - round(math.log2(unit))))
    assert torch.equal(amplitude.restore(scaled.double()), before.double() / unit)


def test_no_coefficients_have_no_size():
    X = torch.ones(2, 3)
    for alpha in (torch.zeros(2, 1), torch.zeros(2, 0)):
        _, scaled, amplitude = in_range(Laplace(2.0), X, alpha, 0.5)
        assert scaled is alpha
        assert amplitude == Amplitude(1.0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("kernel", "power"),
    [(Laplace(1.0), -1), (Gaussian(1.0), -2), (Matern52(1.0), -2), (GeneralisedLaplace(1.0, 0.5), -0.5),
     (GeneralisedLaplace(1.0, 1.5), -1.5)],
)  # fmt: skip
def test_weights_of_wide_kernels_go_by_a_power_of_the_bandwidth(kernel, power, dtype, normal):
    """w(r) = p t / r^2 at t = (r / L)^p for small t: the amplitude makes up for a narrower bandwidth."""
    X, alpha = normal(6, 4).to(dtype), torch.ones(6, 1, dtype=dtype)
    wide = kernel.set_params(bandwidth=3.0 * 2.0**250)
    narrow, scaled, amplitude = in_range(wide, X, alpha)
    assert narrow.bandwidth < 2.0**250
    ratio = math.log2(wide.bandwidth) - math.log2(narrow.bandwidth)
    taken = math.log2(amplitude.factor) + amplitude.exponent + math.log2(float(scaled.max()))
    assert taken == pytest.approx(power * ratio, abs=1e-9)
    assert in_range(kernel.set_params(bandwidth=2.0**20), X, alpha)[0].bandwidth == 2.0**20


@pytest.mark.parametrize("power", [-2.0, -1.0, -0.5, -1.3])
@pytest.mark.parametrize(("a", "b"), [(3.0, 2.0), (1e300, 1e-300), (1.7e-200, 5e100), (7.0, 7.0)])
def test_powers_of_ratios_that_no_float_holds(power, a, b):
    factor, exponent = scaling._power(a, b, power)
    assert math.log2(factor) + exponent == pytest.approx(power * (math.log2(a) - math.log2(b)), abs=1e-9)
    assert 2.0**-4 < factor < 2.0**4
    assert isinstance(exponent, int)


@pytest.mark.parametrize(("slope", "taken"), [(-1.0 + 1e-14, -1.0), (0.5 - 1e-13, 0.5), (-0.7, -0.7), (1e-11, 1e-11)])
def test_slopes_are_halves_to_rounding(slope, taken):
    assert scaling._snapped(slope) == taken


# ---- Squares


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [-0.99, -0.6, 0.0, 0.6, 0.99])
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_squares_beyond_the_dtype(dtype, share, rows, normal, relative):
    """Sums are float64; of float32 gradients of 1e30 their squares are, too, and of float64 ones what they hold."""
    size = 2.0 ** int(share * (120 if dtype == torch.float32 else 500))
    G = normal(rows, 6).to(dtype)
    M = torch.full((6, 6), 1.0, dtype=torch.float64).mul_(size).mul_(size)
    before = M.clone()
    gemm.add_squares_(M, (G * size).to(dtype))
    wanted = G.double().T @ G.double()
    tolerance = 4 * rows * torch.finfo(dtype).eps
    assert relative((M - before) / size / size, wanted) <= tolerance
    gemm.add_squares_(before, G[:0])


@pytest.mark.parametrize("d", [3, 70, 300])
def test_symmetric_to_the_bit(d, normal):
    M = normal(d, d)
    wanted = (M + M.T) / 2
    assert torch.equal(gemm.symmetrise_(M.clone()), wanted)
    assert torch.equal(gemm.symmetrise_(M.clone(), rows=64), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 31, 32, 40])
@pytest.mark.parametrize("strided", [False, True])
def test_products_with_a_bias(dtype, rows, strided, normal, relative):
    A, bias = normal(rows, 9).to(dtype), normal(7).to(dtype)
    B = normal(7, 20).to(dtype)[:, :9] if strided else normal(7, 9).to(dtype)
    tolerance = 16 * torch.finfo(dtype).eps
    assert relative(gemm.matmul_nt(A, B), A.double() @ B.double().T) <= tolerance
    assert relative(gemm.matmul_nt(A, B, bias), A.double() @ B.double().T + bias.double()) <= tolerance


def test_products_are_added_panel_by_panel(normal, relative):
    A, B = normal(300, 4), normal(20_000, 4)
    M = torch.ones(300, 20_000, dtype=torch.float64)
    gemm.add_product_(M, A, B, -0.5)
    assert relative(M, 1 - 0.5 * A @ B.T) <= 1e-14


@pytest.mark.parametrize(
    ("size", "unit"),
    [(2.0**60, 1.0), (2.0**-60, 1.0), (1.5 * 2.0**60, 2.0**61), (0.75 * 2.0**-60, 2.0**-60), (0.0, 1.0), (3.0, 1.0)],
)
def test_targets_get_a_unit_where_they_are_far_from_one(size, unit):
    Y = size * torch.tensor([[1.0], [-0.5]], dtype=torch.float64)
    scaled, found = scale_targets(Y)
    assert found == unit
    assert torch.equal(scaled, Y / unit)
    assert torch.equal(unscale_coefficients(scaled, found), Y)


@pytest.mark.parametrize("size", [1e308, 5e-324])
def test_a_unit_stays_in_range(size):
    scaled, unit = scale_targets(torch.tensor([[size]], dtype=torch.float64))
    assert 2.0**-1000 <= unit <= 2.0**1000
    assert float(scaled) * unit == size
    assert 0 < abs(float(scaled)) < 2.0**100


@pytest.mark.parametrize("kernel", [Laplace(1.0), Gaussian(1.0), Matern52(1.0), GeneralisedLaplace(1.0, 0.5)], ids=repr)
@pytest.mark.parametrize("size", [1e-8, 1e-10, 1e-12])
def test_points_far_from_all_centers_count_for_the_width_of_a_kernel(kernel, size, normal, relative):
    """The kernel is far wider than the centers, and not than the distances to the points."""
    X, alpha, Z = size * normal(5, 3), normal(5, 1, seed=2), normal(4, 3, seed=3)
    x, a, z = X.float(), alpha.float(), Z.float()
    assert relative(fastagop.gradients(kernel, x, a, z).double(), reference.gradients(kernel, x, a, z)) <= 1e-5
    assert relative(fastagop.agop(kernel, x, a, z).double(), reference.agop(kernel, x, a, z)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", [LpLaplace(2.0, 1.0, 1.0), LpLaplace(1.5, 1.0, 1.0), ProductLaplace(1.0)], ids=repr)
@pytest.mark.parametrize("share", [-0.9, -0.6, 0.6, 0.9])
def test_a_kernel_of_an_lp_distance_does_not_see_the_unit_of_length(kernel, dtype, share, normal, relative):
    """Powers of differences leave the dtype where the differences themselves do not."""
    unit = 2.0 ** round(share * (125 if dtype == torch.float32 else 1000))
    X, alpha, Z = normal(6, 4, dtype=dtype), normal(6, 2, dtype=dtype, seed=2), normal(5, 4, dtype=dtype, seed=3)
    scaled = kernel.set_params(bandwidth=unit)
    for other in (None, Z):
        wanted = fastagop.kernel_matrix(kernel, X, other)
        found = fastagop.kernel_matrix(scaled, unit * X, None if other is None else unit * other)
        assert relative(found, wanted) <= 1e-6
        wanted = fastagop.gradients(kernel, X, alpha, other)
        found = fastagop.gradients(scaled, unit * X, unit**0.5 * alpha, None if other is None else unit * other)
        assert relative(found * unit**0.5, wanted) <= 1e-6
    if dtype == torch.float32:  # systems are solved in float64, which holds the powers
        solution = fastagop.solve(scaled, unit * X, alpha, ridge=1e-3)
        assert relative(solution.alpha, fastagop.solve(kernel, X, alpha, ridge=1e-3).alpha) <= 1e-3


def test_squares_of_gradients_that_leave_float64_are_refused_by_name(normal):
    X, unit = normal(40, 3), 2.0**-600
    model = fastagop.RFMRegressor(kernel=ProductLaplace(2.0 * unit), iterations=1, ridge=1e-3, dtype="float64")
    with pytest.raises(ValueError, match=r"so large that gradients leave torch\.float64"):
        model.fit(unit * X.numpy(), X[:, 0].numpy())


@pytest.mark.parametrize("size", [2.0**-1000, 2.0**-500, 2.0**500, 2.0**1000])
@pytest.mark.parametrize("name", ["sum", "product", "multiple", "angle"])
def test_kernels_that_are_not_radial_at_any_size(name, size, normal):
    """Their values and gradients are those at size 1, per unit of length; squares of the points leave float64."""

    def at(unit):
        kernel = {"sum": Laplace(2.0 * unit) + Gaussian(3.0 * unit), "product": Laplace(2.0 * unit) * Gaussian(unit)}
        return {**kernel, "multiple": 2.0 * Laplace(unit), "angle": ArcCosine(0)}[name]

    X, alpha = normal(20, 6), normal(20, 2, seed=2)
    X[3] = X[4] * (1 + 1e-9)
    one = size * X
    for Z in (None, X[:7] + 0.1):
        z = None if Z is None else size * Z
        K, G = fastagop.kernel_matrix(at(size), one, z), fastagop.gradients(at(size), one, alpha, z)
        torch.testing.assert_close(K, fastagop.kernel_matrix(at(1.0), X, Z), rtol=1e-12, atol=1e-12)
        true = fastagop.gradients(at(1.0), X, alpha, Z)
        assert float((G * size - true).abs().max() / true.abs().max()) <= 1e-12
    if size == 2.0**-1000:
        with pytest.raises(ValueError, match="X is so small or so large that gradients leave"):
            fastagop.agop(at(size), one, alpha, method="gradient")
