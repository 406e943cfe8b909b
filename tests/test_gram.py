"""The gram form: what may be taken out of the weights, the guard that watches its digits, and what it says."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from fastagop.kernels import reference
from fastagop.kernels.plan import AgopTask
from fastagop.kernels.torch_backend import agop as torch_agop
from fastagop.kernels.torch_backend import costs, low_rank
from fastagop.kernels.torch_backend import gram as torch_gram
from fastagop.kernels.torch_backend.low_rank import LowRank
from hypothesis import given, settings
from hypothesis import strategies as st

import fastagop
from fastagop import Gaussian, Laplace

GRAM = 1e-4  # what "auto" may lose against the gradient form, and what the gram form may lose without a warning
EPS = torch.finfo(torch.float32).eps
METHODS = ["gradient", "gram", "auto"]
KERNELS = [Laplace(2.0), Gaussian(1.0)]
kernels = pytest.mark.parametrize("kernel", KERNELS, ids=repr)


def gram(W, X, alpha, Z, part, center=False, rows=50):
    return torch_gram.gram_form(W.clone(), X, alpha, Z, part, center=center, rows=rows)


def smooth_part(kind, W, own, normal, rank=3):
    """Some part, good or bad: the sum must not depend on it."""
    m, n = W.shape
    if kind == "constant":
        return low_rank.mean_part(W, own)
    if kind == "leading":
        return low_rank.leading_part(W, own, rank)
    Q = normal(n, rank, dtype=W.dtype, seed=7)  # as large as W, and nothing to do with it
    return LowRank(Q * torch.tensor([1.0, -2.0, 0.5], dtype=W.dtype) if own else normal(m, rank, dtype=W.dtype), Q, own)


# ---- the identity


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(["constant", "leading", "arbitrary"]),
    kernel=st.sampled_from(KERNELS),
    other=st.sampled_from(["own", "fewer", "more", "copy"]),
    center=st.booleans(),
    rows=st.sampled_from([7, 50, 1000]),
    seed=st.integers(0, 50),
)
def test_whatever_is_taken_out_comes_back(kind, kernel, other, center, rows, seed, cloud, normal, relative):
    X, alpha = cloud("collapsed 1", n=90, d=7, seed=seed), normal(90, 4, seed=seed)
    own = other == "own"
    Z = (
        X
        if own
        else X.clone()
        if other == "copy"
        else cloud("spread", n={"fewer": 31, "more": 140}[other], d=7, seed=3)
    )
    W = torch_agop.weights(kernel, X, Z, 64)
    part = smooth_part(kind, W, own, normal)
    M = gram(W, X, alpha, Z, part, center, rows)
    true = reference.agop(kernel, X, alpha, None if own else Z, center=center) * len(Z)
    assert relative(M, true) <= 1e-11  # an arbitrary part cancels digits
    assert torch.equal(M, M.T)


@pytest.mark.parametrize("kind", ["constant", "leading", "arbitrary"])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_left(kind, own, dtype, cloud, normal, relative):
    X = cloud("collapsed 1", n=300, d=7, dtype=dtype)  # more rows than one step takes
    Z = X if own else cloud("spread", n=270, d=7, dtype=dtype, seed=3)
    W = torch_agop.weights(Laplace(2.0), X, Z, 64)
    part = smooth_part(kind, W, own, normal)
    E = W.double() - part.P.double() @ part.Q.double().T
    if own:
        E.fill_diagonal_(0.0)
        assert relative(part.P @ part.Q.T, part.Q @ part.P.T) <= 4 * torch.finfo(dtype).eps
        assert relative(part.diagonal()[:, 0], (part.P.double() @ part.Q.double().T).diagonal()) <= 1e-6
    assert relative(part.residual_column_norms(W), E.square().sum(0)) <= 1e3 * torch.finfo(dtype).eps
    left = part.subtract_(W.clone())
    assert left.dtype == dtype
    assert relative(left, E) <= 4 * torch.finfo(dtype).eps  # P Q^T itself is not rounded to float32
    assert relative(part.project(left), E.T @ part.P.double()) <= 100 * torch.finfo(dtype).eps


@pytest.mark.parametrize("own", [True, False])
def test_the_leading_part_is_nearly_the_best(own, cloud, normal):
    X = cloud("collapsed 3e-1", n=200, d=9)
    Z = X if own else cloud("collapsed 3e-1", n=150, d=9, seed=0)
    W = torch_agop.weights(Laplace(2.0), X, Z, 64)
    best = torch.linalg.svdvals(W)[low_rank.RANK :].square().sum()
    constant, leading = (
        float(f(W, own).residual_column_norms(W).sum()) for f in (low_rank.mean_part, low_rank.leading_part)
    )
    assert leading <= 2 * float(best)  # the iteration need not converge
    assert leading < 0.1 * constant


@pytest.mark.parametrize("n", [1, 2])
def test_parts_of_very_little(n):
    W = torch.zeros(n, n)
    assert low_rank.mean_part(W, symmetric=True).residual_column_norms(W).tolist() == [0.0] * n
    assert low_rank.mean_part(W, symmetric=False).residual_column_norms(W).tolist() == [0.0] * n


# ---- what it is for


@pytest.mark.parametrize(
    ("name", "part", "least"),
    [
        ("spread", low_rank.mean_part, 10),  # distances are alike
        ("collapsed 3e-1", low_rank.leading_part, 5),  # and by pairs of classes
        ("collapsed 3e-2", low_rank.leading_part, 10),
    ],
)
def test_digits_that_a_smooth_part_saves(name, part, least, cloud, targets, relative):
    """float32, against the same form with nothing taken out: what the module exists for."""
    X = cloud(name, n=500, d=40, dtype=torch.float32)
    alpha = fastagop.solve(Laplace(2.0), X, targets(500, torch.float32), ridge=1e-4).alpha
    W = torch_agop.weights(Laplace(2.0), X, X, 64)
    true = reference.agop(Laplace(2.0), X, alpha) * 500
    none = LowRank(W.new_zeros(500, 1), W.new_zeros(500, 1), symmetric=True)
    without = relative(gram(W, X, alpha, X, none), true)
    assert relative(gram(W, X, alpha, X, part(W, symmetric=True)), true) <= without / least


@kernels
@pytest.mark.parametrize("part", [low_rank.mean_part, low_rank.leading_part])
@pytest.mark.parametrize(
    "name", ["spread", "collapsed 1", "collapsed 1e-1", "collapsed 1e-2", "collapsed 1e-3", "offset"]
)
@pytest.mark.parametrize("outputs", ["random", "solved"])
@pytest.mark.parametrize("own", [True, False])
def test_the_guard_bounds_the_loss(kernel, part, name, outputs, own, cloud, normal, targets, relative):
    """Its estimate, from a few points, against the error that float32 products make."""
    X = cloud(name, n=300, d=20, dtype=torch.float32)
    Z = X if own else cloud(name, n=200, d=20, dtype=torch.float32, seed=4)
    alpha = normal(300, 6, dtype=torch.float32)
    if outputs == "solved":
        alpha = fastagop.solve(kernel, X, targets(300, torch.float32), ridge=1e-2).alpha
    W = torch_agop.weights(kernel, X, Z, 64)
    guard = torch_gram.CancellationEstimate(W, X, alpha, Z, False)
    loss = torch_agop.LOSS_PER_EPS * EPS * guard.amplification(part(W, own))
    wide = [t.double() for t in (W, X, alpha, Z)]
    z = wide[1] if own else wide[3]
    true = gram(wide[0], wide[1], wide[2], z, low_rank.mean_part(wide[0], own))
    found = relative(gram(W, X, alpha, Z, part(W, own)), true)
    assert found <= 4 * loss + 8 * EPS
    assert torch_gram.CancellationEstimate(*wide[:3], z, False).amplification(part(wide[0], own)) > 0


def test_terms_that_cancel_are_those_of_the_form(cloud, normal):
    """sum_j |a_j|^2 |E_j|^2 |x_j - mean|^2 + sum_i |s_i|^2 |x_i - mean|^2, the diagonal of P Q^T being part of s."""
    X, alpha = cloud("spread", n=60, d=8), normal(60, 3)
    W = torch_agop.weights(Laplace(2.0), X, X, 64)
    part = low_rank.mean_part(W, symmetric=True)
    guard = torch_gram.CancellationEstimate(W, X, alpha, X, False)
    E = W - part.P * part.Q.T
    s = E.fill_diagonal_(0.0) @ alpha + (part.P @ part.Q.T) @ alpha
    squares = (X - X.mean(0)).square().sum(1)
    terms = (alpha.square().sum(1) * E.square().sum(0) * squares).sum() + (s.square().sum(1) * squares).sum()
    assert guard.amplification(part) * guard._trace == pytest.approx(float(terms), rel=1e-10)


def test_centred_gradients_are_weighed_by_what_is_left_of_them(cloud, normal):
    X, alpha = cloud("spread", n=150, d=10), normal(150, 3)
    Z = 3 + 0.03 * cloud("spread", n=80, d=10, seed=2)  # gradients there nearly agree
    W = torch_agop.weights(Laplace(2.0), X, Z, 64)
    part = low_rank.mean_part(W, symmetric=False)
    plain, centred = (
        torch_gram.CancellationEstimate(W, X, alpha, Z, center).amplification(part) for center in (False, True)
    )
    assert centred > 100 * plain


@pytest.mark.parametrize("part", [low_rank.mean_part, low_rank.leading_part])
@pytest.mark.parametrize("own", [True, False])
def test_centring_leaves_nothing_of_a_mean_that_dwarfs_the_rest(part, own, normal, relative):
    X = torch.nn.functional.normalize(normal(2, 50))[torch.arange(200) % 2] + 1e-3 * normal(200, 50, seed=2)
    Z, alpha, kernel = X if own else X[:120].clone(), normal(200, 5, seed=3), Gaussian(10.0)
    alpha -= alpha.mean(0)  # gradients agree to four digits
    W = torch_agop.weights(kernel, X, Z, 64)
    taken = part(W, own)
    amplified = torch_gram.CancellationEstimate(W, X, alpha, Z, True).amplification(taken)
    loss = torch_agop.LOSS_PER_EPS * torch.finfo(X.dtype).eps * amplified
    true = fastagop.agop(kernel, X, alpha, Z, center=True, method="gradient", reduction="sum")
    # A third of it to three times, by how a library orders its sums; what one projection leaves of the mean is 150.
    assert relative(gram(W, X, alpha, Z, taken, center=True), true) < 4.0 * loss


@pytest.mark.parametrize(("name", "form", "dtype", "rank"), [
    ("spread", "gram", torch.float32, 1),  # nothing to guard against
    ("collapsed 3e-1", "gram", torch.float32, low_rank.RANK),
    ("collapsed 1e-3", "gram", torch.float64, low_rank.RANK),
])  # fmt: skip
def test_the_decisions(name, form, dtype, rank, cloud, normal):
    X, alpha = cloud(name, n=300, d=100, dtype=torch.float32), normal(300, 4, dtype=torch.float32)
    decision = torch_agop.choose_form(
        torch_agop.weights(Laplace(2.0), X, X, 64), X, alpha, X, AgopTask(), symmetric=True
    )
    assert (decision.form, decision.dtype, decision.low_rank and decision.low_rank.rank) == (form, dtype, rank)


def test_coarse_products_lose_more(cloud, normal, monkeypatch):
    """Three bf16 products or TF32: "auto" must not lose what the gradient form would keep; by name it may."""
    X, alpha = cloud("collapsed 3e-1", n=300, d=100, dtype=torch.float32), normal(300, 4, dtype=torch.float32)
    W = torch_agop.weights(Laplace(2.0), X, X, 64)

    def decision(method, products):
        return torch_agop.choose_form(W, X, alpha, X, AgopTask(method=method), symmetric=True, products=products)

    for module in (torch_agop, costs):
        monkeypatch.setattr(module, "rate", lambda form, products, device: 1e9 if products == "float64" else 3e11)
    assert decision("auto", "fp16x3").low_rank
    assert decision("auto", "tf32").form == "gradient"
    assert decision("gram", "tf32").dtype == torch.float32


# ---- memory, warnings, the log


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["spread", "collapsed 1e-3", "collapsed 1e-4"])
def test_small_memory_in_float32(method, name, cloud, normal, relative, least_memory, tensor_memory):
    """Near collapse the gram form may need a float64 copy: with too little memory it must not take one."""
    X, alpha = cloud(name, n=61, d=7, dtype=torch.float32), normal(61, 8, dtype=torch.float32)
    limit = least_memory("agop", Laplace(2.0), X, alpha, method=method)
    true = reference.agop(Laplace(2.0), X, alpha)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        M, taken = tensor_memory(lambda: fastagop.agop(Laplace(2.0), X, alpha, method=method, memory_limit=limit))
        tight = relative(M, true)
    empty_matrix = relative(fastagop.agop(Laplace(2.0), X, alpha, method="gradient"), true)
    if method == "gram":
        assert said or tight <= empty_matrix + GRAM
        assert name != "collapsed 1e-4" or said
        assert all(issubclass(w.category, fastagop.NumericalWarning) for w in said)
    else:
        assert not said
        assert tight <= empty_matrix + GRAM
        assert taken <= limit


def test_the_lossy_gram_form_warns_its_caller(cloud, normal, least_memory):
    X, alpha = cloud("collapsed 1e-4", n=61, d=7, dtype=torch.float32), normal(61, 8, dtype=torch.float32)
    limit = least_memory("agop", Laplace(2.0), X, alpha, method="gram")
    with pytest.warns(fastagop.NumericalWarning, match="gram form loses") as said:
        fastagop.agop(Laplace(2.0), X, alpha, method="gram", memory_limit=limit)
    assert len(said) == 1


def test_the_warning_points_to_the_call(cloud, normal, least_memory):
    X, alpha = cloud("collapsed 1e-4", n=61, d=7, dtype=torch.float32), normal(61, 8, dtype=torch.float32)
    limit = least_memory("agop", Laplace(2.0), X, alpha, method="gram")
    with pytest.warns(fastagop.NumericalWarning) as said:
        fastagop.agop(Laplace(2.0), X, alpha, method="gram", memory_limit=limit)
    assert said[0].filename == __file__


def test_the_guard_is_logged(cloud, normal, caplog):
    X, alpha = cloud("collapsed 1e-4", dtype=torch.float32), normal(120, 40, dtype=torch.float32)
    assert "method gram" in fastagop.explain("agop", Laplace(2.0), X, alpha)
    with caplog.at_level(logging.INFO, "fastagop"):
        fastagop.agop(Laplace(2.0), X, alpha)
    assert "gram form would lose" in caplog.text
