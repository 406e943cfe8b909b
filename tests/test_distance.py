"""Squared distances stay accurate where classes collapse; truth is the sum of squared differences in float64."""

from __future__ import annotations

import pytest
import torch
from fastagop.kernels.torch_backend import distance, tiles
from fastagop.kernels.torch_backend.distance import factors, medians, near_again_, squared_distances, squared_norms
from hypothesis import given, settings
from hypothesis import strategies as st

import fastagop
from fastagop import NTK, Laplace, autograd

# Relative error of r^2: the expansion of a pair that is not near costs a few eps / NEAR, and NEAR is 2^-6 in
# float32 and 2^-10 in float64; near pairs are far better. Roundings of both norms, the product and two sums: 4 eps.
TOLERANCE = {torch.float32: 4 * 2.0**6 * 2.0**-23, torch.float64: 4 * 2.0**10 * 2.0**-52}
DTYPES = [torch.float32, torch.float64]
CLOUDS = [
    "spread",  # nothing is near
    "collapsed 1",  # classes overlap
    "collapsed 1e-2",  # the first spread at which float32's expansion is noise
    "collapsed 1e-3",  # the acceptance line's spread
    "collapsed 1e-4",  # where twenty layers end
    "nested",  # one centre per class is not enough
    "offset",  # every pair is near
    "zero-rows",  # bounds from norms are zero
    "identical",  # every distance is zero
    "scales",  # the largest norm says nothing about the others
    "line",  # pairs on both sides of the bound
    "pairs",  # stragglers: too few for a product of their own
]
pytestmark = pytest.mark.usefixtures("each_way")


def measure(Z, X, self_offset=None, out=None):
    out = X.new_full((len(Z), len(X)), torch.nan) if out is None else out
    return squared_distances(Z, X, squared_norms(Z), squared_norms(X), out, self_offset)


def truth(Z, X):
    return (Z.double()[:, None] - X.double()[None]).square().sum(-1)


def check(sq, true, dtype=None):
    """Relative error of every entry; zeros are zeros."""
    assert bool((sq[true == 0] == 0).all())
    far = true > 0
    error = (sq.double() - true)[far].abs() / true[far]
    assert far.sum() == 0 or float(error.max()) <= TOLERANCE[dtype or sq.dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CLOUDS)
def test_every_pair_is_accurate(cloud, name, dtype):
    X = cloud(name, dtype=dtype)
    check(measure(X, X, self_offset=0), truth(X, X))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CLOUDS)
def test_two_sets_of_points(cloud, name, dtype):
    points = cloud(name, n=150, dtype=dtype)
    Z, X = points[::3], points[1:]  # some rows are common to both, none of them announced
    check(measure(Z, X), truth(Z, X))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", ["spread", "collapsed 1e-3", "offset", "line", "pairs"])
def test_few_features(cloud, name, d, dtype):
    """Most pairs are near there. A rounded difference, squares and d - 1 sums: d + 2 roundings of r^2 up to d = 4."""
    X = cloud(name, n=300, d=d, dtype=dtype)
    found, true = measure(X, X, self_offset=0), truth(X, X)
    check(found, true)
    if d <= 4:
        assert torch.equal(found, found.T)
        away = true > 0
        worst = ((found.double() - true)[away].abs() / true[away]).max() if away.any() else torch.zeros(())
        assert float(worst) <= 2 * (d + 2) * torch.finfo(dtype).eps  # float64's truth is as rounded as what it judges


@pytest.mark.parametrize("first", [0, 1, 77, 90])  # first, second, middle and last block of 30 rows
@pytest.mark.parametrize("name", ["spread", "collapsed 1e-4", "offset"])
def test_self_pairs_of_a_block_are_zero_by_index(cloud, name, first):
    X = cloud(name, dtype=torch.float32)
    block = X[first : first + 30]
    sq = measure(block, X, self_offset=first)
    assert bool((torch.diagonal(sq, first) == 0).all())
    check(sq, truth(block, X))


def test_self_pairs_need_no_measurement():
    # An index that says "the same point" is believed, whatever rounding makes of it.
    X = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 7.0]])
    sq = measure(X[1:], X, self_offset=1)
    assert sq.tolist() == [[8.0, 0.0, 13.0], [41.0, 13.0, 0.0]]


@pytest.mark.parametrize(
    "crowd",
    [
        2,  # pairs only
        15,  # one fewer than a product is made for
        16,  # just a crowd without its own row
        17,  # just a crowd
        18,
        60,  # clearly one
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_crowds_of_every_size(normal, crowd, dtype):
    # crowds of the given size around four far centres, and 20 points of their own
    X = (normal(4, 8, seed=2).repeat_interleave(crowd, 0) + 1e-5 * normal(4 * crowd, 8)).to(dtype)
    X = torch.cat([normal(20, 8, seed=3).to(dtype), X])
    check(measure(X, X, self_offset=0), truth(X, X))


def test_more_crowds_than_rounds(normal):
    # 80 crowds of 18: what the groups leave over is still measured
    X = (normal(80, 4, seed=2).repeat_interleave(18, 0) + 1e-4 * normal(80 * 18, 4)).float()
    check(measure(X, X, self_offset=0), truth(X, X))


def test_crowd_whose_leader_stays_near(normal):
    # 30 points in a tiny core, 30 at a hundred times its size around it: from any centre the core is near again
    core, shell = 1e-6 * normal(30, 6, seed=2), 1e-4 * normal(30, 6, seed=3)
    X = (torch.cat([core, shell]) + normal(1, 6, seed=4)).double()
    check(measure(X, X, self_offset=0), truth(X, X))


def test_many_stragglers_in_many_columns(normal):
    # the list of pairs times d is far longer than one chunk of direct differences, and no multiple of it
    X = normal(101, 30_000, dtype=torch.float32).repeat(2, 1)
    X[101:] += 1e-4 * normal(101, 30_000, dtype=torch.float32, seed=2)
    sq = measure(X[101:], X[:101])
    true = (X[101:].double() - X[:101].double()).square().sum(1)
    near = sq.diagonal().double()
    assert float(((near - true) / true).abs().max()) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("near", [1, 30, 59, 60])  # few near rows are copied out; more than half are worked in place
def test_share_of_near_rows(normal, near):
    X = normal(60, 10, dtype=torch.float32)
    Z = normal(60, 10, dtype=torch.float32, seed=2)
    rows = torch.randperm(60, generator=torch.Generator().manual_seed(0))[:near]
    Z[rows] = X[:near] + 1e-4 * normal(near, 10, dtype=torch.float32, seed=3)
    check(measure(Z, X), truth(Z, X))


def test_near_in_one_column_only(normal):
    # a tiny point is near to nothing but its own kind: the bound goes by both norms
    X = torch.cat([normal(40, 6), 1e-3 * normal(3, 6, seed=2)]).float()
    Z = X[-3:] * (1 + 1e-4)
    check(measure(Z, X), truth(Z, X))


@pytest.mark.parametrize("name", ["spread", "collapsed 1e-3"])
def test_strided_out(cloud, name):
    X = cloud(name, n=50, dtype=torch.float32)
    plain = measure(X, X, self_offset=0)
    wide = torch.full((50, 80), -7.0)
    measure(X, X, self_offset=0, out=wide[:, 10:60])
    assert torch.equal(wide[:, 10:60], plain)
    assert bool((wide[:, :10] == -7).all())
    assert bool((wide[:, 60:] == -7).all())
    turned = torch.empty(50, 50).T
    check(measure(X, X, self_offset=0, out=turned), truth(X, X))


@pytest.mark.parametrize("name", ["spread", "collapsed 1e-3", "offset", "pairs"])
def test_points_are_left_alone(cloud, name):
    X = cloud(name, dtype=torch.float32)
    before = X.clone()
    measure(X, X, self_offset=0)
    measure(X[3:40], X)
    assert torch.equal(X, before)


def test_squared_norms(cloud):
    X = cloud("scales")
    assert torch.allclose(squared_norms(X), (X * X).sum(1), rtol=1e-14, atol=0.0)
    assert squared_norms(X).shape == (len(X),)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(data=st.data())
def test_lattice(data):
    """Small whole numbers: duplicates galore, and both the data and the truth are exact."""
    n, m, d = (data.draw(st.integers(1, high)) for high in (40, 40, 5))
    size = data.draw(st.sampled_from([1, 3, 40]))  # few sites: crowds of duplicates; many: hardly any
    offset = data.draw(st.sampled_from([0, 50, 700]))  # far pairs only; both kinds; near pairs only
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    X, Z = (offset + torch.randint(0, size + 1, (k, d), generator=generator).float() for k in (n, m))
    check(measure(Z, X), truth(Z, X))
    first = data.draw(st.integers(0, n - 1))
    check(measure(X[first:], X, self_offset=first), truth(X[first:], X))


@pytest.mark.parametrize("n", [1, 2, 5, 128])
def test_medians_by_sorting(n, normal):
    """What CUDA does where deterministic algorithms are asked for: the lower of two middle ones, as torch's median."""
    X = normal(n, 3)
    on_cuda = type("Sorted", (), {"is_cuda": True, "sort": X.sort, "__len__": lambda self: n})()
    assert torch.equal(medians(on_cuda), X.median(0).values)
    assert torch.equal(medians(X), X.median(0).values)


@pytest.mark.parametrize("d", [20, 600])  # a few columns of the product at a time from 512 on
@pytest.mark.parametrize("m", [1, 300])
def test_what_float64_points_have_in_common_makes_no_pair_near(m, d, cloud, monkeypatch):
    """All pairs are near before it is subtracted, and each would take a thousand times as long as by a product."""
    X = cloud("offset", n=600, d=d)
    Z = cloud("offset", n=300, d=d, seed=1)[:m]
    monkeypatch.setattr(distance, "_measure_near", None)
    [(_, block)] = tiles.tiles(X, Z, m)
    check(block, truth(Z, X))
    for kernel in (Laplace(2.0) + Laplace(3.0), NTK(1)):
        assert bool(fastagop.kernel_matrix(kernel, X, Z).isfinite().all())
    Z.requires_grad_()
    autograd.kernel_matrix(Laplace(2.0), X, Z).sum().backward()


@pytest.mark.parametrize("name", ["spread", "collapsed 1e-3", "nested", "line", "pairs", "identical"])
@pytest.mark.parametrize("shared", [1.0, 30.0, 1e6])
def test_near_pairs_beside_what_all_points_share(shared, name, cloud):
    """Subtracting it would round coordinates that it is no part of; near pairs are measured without."""
    X = 1e-9 * cloud(name, d=20)
    X[:, :3] += shared
    X[:, 3:6] *= 1e9
    for points in (X, X.clone()):
        for row, block in tiles.tiles(X, points, 50):
            check(block, truth(points[row], X))


@pytest.mark.parametrize("name", CLOUDS)
def test_rows_in_any_order_are_zero_from_themselves(cloud, name):
    X = cloud(name, dtype=torch.float64)
    index = torch.randint(0, len(X), (40,), generator=torch.Generator().manual_seed(0))
    check(measure(X[index], X, index), truth(X[index], X))
    Z = X[index] + 1.0  # it goes by the index, not by what the points come to
    moved = near_again_(truth(Z, X), Z, X, squared_norms(Z), squared_norms(X), index)
    assert bool((moved[torch.arange(40), index] == 0).all())


@pytest.mark.parametrize("name", CLOUDS)
def test_norms_among_the_factors_make_the_same_distances(cloud, name):
    X = cloud(name, dtype=torch.float64)
    x2, (left, right) = squared_norms(X), factors(X, squared_norms(X))
    check(near_again_(left @ right.T, X, X, x2, x2, 0), truth(X, X))
