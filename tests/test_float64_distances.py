"""Distances of many float32 points by float64 products, where near pairs by themselves would take longer.

Truth is the sum of squared differences in float64.
"""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
from fastagop.kernels.plan import AgopTask
from fastagop.kernels.scaling import Points
from fastagop.kernels.torch_backend import costs, distance, tiles, wide

import fastagop

F32, F64 = torch.float32, torch.float64
# A pair above 2^-32 of the squared norms loses 2^-52 of these a rounding: of norms, product and two sums. Nearer pairs
# are measured again. Then r^2 is rounded to float32.
TOLERANCE = 4 * 2.0**-20 + 2.0**-24
CLOUDS = ["spread", "collapsed 1e-2", "collapsed 1e-4", "collapsed 1e-6", "nested", "offset", "zero-rows", "scales"]
CLOUDS += ["identical", "line", "pairs"]


def truth(Z, X):
    return (Z.double()[:, None] - X.double()[None]).square().sum(-1)


def check(sq, true):
    """Relative error of every entry; zeros are zeros."""
    assert bool((sq[true == 0] == 0).all())
    far = true > 0
    assert float(((sq.double() - true)[far].abs() / true[far]).max()) <= TOLERANCE if far.any() else True


@pytest.fixture
def in_float64(monkeypatch):
    """All float32 points with enough features are measured in float64."""
    monkeypatch.setattr(tiles, "float64_pays", lambda X, Z: X.dtype == F32 and X.shape[1] > distance.FEW)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("rows", [30, 100, 256])
@pytest.mark.parametrize("name", CLOUDS)
def test_blocks(name, rows, lower, cloud):
    X = cloud(name, dtype=F32)
    true, seen = truth(X, X), 0
    for row, block in tiles.tiles(X, X, rows, lower=lower):
        assert block.dtype == F32
        width = row.stop if lower else len(X)
        assert block.shape[1] == width
        check(block, true[row, :width])
        assert not bool(torch.diagonal(block, row.start).any())
        seen += len(block)
    assert seen == len(X)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("name", CLOUDS)
def test_two_sets_of_points_and_a_place_to_write_to(name, cloud):
    points = cloud(name, n=150, dtype=F32)
    Z, X = points[::3], points[1:]  # some rows are common to both, none of them announced
    out = X.new_full((len(Z), len(X)), torch.nan)
    for _ in tiles.tiles(X, Z, 20, out=out):
        pass
    check(out, truth(Z, X))


@pytest.mark.usefixtures("in_float64")
def test_matrices_are_symmetric_to_the_bit(cloud):
    X = cloud("collapsed 1e-3", dtype=F32)
    K = fastagop.kernel_matrix(fastagop.Laplace(1.0), X)
    assert torch.equal(K, K.T)
    assert float((K.double() - torch.exp(-truth(X, X).sqrt())).abs().max()) <= 1e-6


@pytest.mark.parametrize("d", [20, 300])
@pytest.mark.parametrize("spread", [1e-2, 1e-4])
def test_operations_on_crowds(spread, d, normal, relative):
    """1200 points in 12 crowds: enough pairs, and near ones, without a fixture that says so."""
    centers = torch.nn.functional.normalize(normal(12, d))
    X = (centers.repeat_interleave(100, 0) + spread / d**0.5 * normal(1200, d, seed=2)).float()
    assert distance.float64_pays(X, X)
    kernel, alpha, x = fastagop.Laplace(1.0), normal(1200, 2, dtype=F32), X.double()
    sq = truth(X, X)
    W = torch.where(sq > 0, torch.exp(-sq.sqrt()) / sq.sqrt(), 0.0)
    G = torch.stack([(W * a) @ x - (W @ a)[:, None] * x for a in alpha.double().T], 1)
    assert relative(fastagop.gradients(kernel, X, alpha), G) <= 2e-6
    M = torch.einsum("icd,ice->de", G, G) / len(X)
    for center in (False, True):
        true = M - torch.einsum("cd,ce->de", G.mean(0), G.mean(0)) if center else M
        assert relative(fastagop.agop(kernel, X, alpha, center=center), true) <= 5e-6
    product = torch.exp(-sq.sqrt()) @ alpha.double()
    assert relative(fastagop.kernel_matmul(kernel, X, X, alpha), product) <= 1e-6


def crowds(normal, count, spread, n=1100, d=100):
    labels = torch.arange(n) % count
    return (normal(count, d)[labels] + spread * normal(n, d, seed=2)).float()


@pytest.mark.parametrize(
    ("d", "count", "spread", "pays"),
    [
        (100, 1100, 0.0, False),  # no pair is near
        (100, 10, 1e-2, True),  # a tenth of the pairs are near
        (100, 100, 1e-2, True),  # a hundredth
        (100, 10, 1e-7, False),  # too near for float64 as well
        (20, 1100, 0.0, True),  # few features
        (20, 10, 1e-7, False),
        (4, 10, 1e-2, False),  # every difference is formed
    ],
)
def test_when_it_pays(d, count, spread, pays, normal):
    X = crowds(normal, count, spread, d=d)
    assert distance.float64_pays(X, X) == pays
    assert distance.float64_pays(X, X.clone()) == pays
    assert not distance.float64_pays(X.double(), X.double())
    assert not distance.float64_pays(X[:900], X)  # too few pairs to look at them


@pytest.mark.parametrize("d", [8, 100])
@pytest.mark.parametrize("spread", [1e-2, 1e-7])  # nothing is measured again, everything is
@pytest.mark.parametrize("rows", [64, 400])
def test_memory_is_within_what_is_planned(rows, spread, d, normal, tensor_memory):
    X, kept = crowds(normal, 5, spread, d=d), []
    patch = pytest.MonkeyPatch()
    with patch.context() as inside:
        inside.setattr(tiles, "float64_pays", lambda X, Z: True)
        _, taken = tensor_memory(lambda: kept.extend(row for row, _ in tiles.tiles(X, X, rows)))
    assert len(kept) == -(-len(X) // rows)
    n = len(X)
    assert taken <= 4 * rows * n + distance.tile_bytes(rows, n, n, d, 4)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_the_agop_of_crowds_in_float64(own, weighted, center, normal, relative, caplog):
    """It says so, keeps float32's result type, and is as accurate as float32's rounding of the result allows."""
    X, alpha = crowds(normal, 30, 1e-2, d=20), normal(1100, 2, dtype=F32)
    Z, w = None if own else X[1:].clone(), normal(1100 - (not own), seed=4).square().float() if weighted else None
    how = {"center": center, "method": "gradient"}
    with caplog.at_level(logging.INFO, "fastagop"):
        M = fastagop.agop(fastagop.Laplace(1.0), X, alpha, Z, sample_weight=w, **how)
    assert "of the pairs are near; computing in float64" in caplog.text
    assert M.dtype == F32
    in_float64 = [None if t is None else t.double() for t in (X, alpha, Z, w)]
    true = fastagop.agop(fastagop.Laplace(1.0), *in_float64[:3], sample_weight=in_float64[3], **how)
    assert relative(M, true) <= 1e-6


@pytest.mark.parametrize(
    ("d", "K", "count", "served"),
    [
        (20, 2, 30, True),
        (20, 2, 1100, False),  # no pair is near
        (20, 200, 30, False),  # products take longer than near pairs
        (4, 2, 30, False),  # every difference is formed
    ],
)
def test_when_the_agop_of_crowds_is_in_float64(d, K, count, served, normal):
    X, alpha = crowds(normal, count, 1e-2 if count < 1100 else 0.0, d=d), normal(1100, K, dtype=F32)
    task = AgopTask("sum", method="gradient")
    made = costs.plan(X, alpha, X, task, "", symmetric=True)
    points = Points(fastagop.Laplace(1.0), X, X, 1.0)
    assert (wide.agop_of_crowds(points, alpha, task, made) is not None) == served
    assert wide.agop_of_crowds(points, alpha, task, dataclasses.replace(made, method="gram")) is None
    little = dataclasses.replace(made, peak_bytes=8 * X.numel())  # no room for float64 blocks
    assert wide.agop_of_crowds(points, alpha, task, little) is None


def test_the_agop_of_crowds_takes_what_is_planned(normal, tensor_memory):
    X, alpha = crowds(normal, 30, 1e-2, n=1500, d=20), normal(1500, 2, dtype=F32)
    planned = costs.plan(X, alpha, X, AgopTask("sum", method="gradient"), "", symmetric=True).peak_bytes
    _, taken = tensor_memory(lambda: fastagop.agop(fastagop.Laplace(1.0), X, alpha, method="gradient"))
    assert taken <= planned


@pytest.mark.parametrize("own", [False, True])
def test_what_points_have_in_common_makes_no_pair_near(own, normal, monkeypatch):
    """Rows of length 1 within 1e-5 of each other: all pairs are near, and none is around their mean."""
    points, measured = torch.nn.functional.normalize(1.0 + 1e-5 * normal(2200, 100), dim=1).float(), []
    X = points[:1100]
    Z = X if own else points[1100:]
    assert distance.float64_pays(X, Z)
    measure = distance._measure_near
    monkeypatch.setattr(distance, "_measure_near", lambda sq, *rest: (measured.append(len(sq)), measure(sq, *rest)))
    found = torch.cat([block.clone() for _, block in tiles.tiles(X, Z, 128)])
    assert not measured
    check(found, truth(Z, X))
    fill = fastagop.kernels.torch_backend.backend.FactorKernels().rows(fastagop.Laplace(1.0), X)
    assert not measured
    K = torch.cat([fill(X.new_empty(100, start + 100, dtype=F64), start)[-1:, :100] for start in range(0, 1100, 100)])
    assert not measured
    rows = torch.arange(99, 1100, 100)
    exact = torch.exp(-truth(X[rows], X[:100]).sqrt())
    assert float(((1 - K) / (1 - exact) - 1)[exact < 1].abs().max()) <= 1e-6
