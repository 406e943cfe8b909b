"""What decides between the AGOP's forms and dtypes, each on both sides; and which pairs count as near."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from fastagop.kernels import checks, reference
from fastagop.kernels.kernel_operator import KernelOperator
from fastagop.kernels.plan import AgopTask
from fastagop.kernels.scaling import Points
from fastagop.kernels.torch_backend import agop as torch_agop
from fastagop.kernels.torch_backend import backend, costs, distance, gram, low_rank, wide
from fastagop.kernels.torch_backend.distance import dominant_offset
from fastagop.kernels.torch_backend.gradients import Nearness

import fastagop
from fastagop import Gaussian, Laplace

EPS = torch.finfo(torch.float32).eps


def pulled(c: float, n: int = 1, which: int = 0, m: int = 2) -> tuple[Points, torch.Tensor]:
    """Gradients a (c, -1), a (c, 1), ... of a very wide kernel: only center ``which`` has a coefficient."""
    X, Z, alpha = torch.zeros(n, 2), torch.zeros(m, 2), torch.zeros(n, 1)
    X[which, 0], alpha[which] = c, 1.0
    Z[::2, 1], Z[1::2, 1] = 1.0, -1.0
    return Points(Gaussian(1e4), X, Z), alpha


@pytest.mark.parametrize(("n", "which"), [(1, 0), (300, 299), (300, 3)])
@pytest.mark.parametrize("m", [2, 8, 64])
@pytest.mark.parametrize(("c", "cancels"), [(0.0, False), (4.0, False), (4.4, True), (100.0, True)])
def test_centring_cancels_where_gradients_nearly_agree(c, cancels, n, which, m):
    """Their mean is c, what centring leaves of them 1: rounding to float32 then costs c eps, and 5e-7 may be lost."""
    points, alpha = pulled(c, n, which, m)
    if m == 64:  # every second is looked at
        points.Z[:] = points.Z.roll(1, 0).repeat_interleave(2, 0)[:64]
    assert wide.centring_cancels(points, alpha) == cancels
    assert not wide.centring_cancels(Points(points.kernel, *(t.double() for t in points[1:3])), alpha.double())


def test_points_without_weight_hide_no_cancellation():
    points, alpha = pulled(10.0, m=4)
    points.Z[3, 1] = 1e4
    assert not wide.centring_cancels(points, alpha)
    assert not wide.centring_cancels(points, alpha, torch.ones(4))
    assert wide.centring_cancels(points, alpha, torch.tensor([1.0, 1.0, 1.0, 0.0]))
    assert not wide.centring_cancels(points, alpha, torch.zeros(4))


def test_nothing_to_centre(monkeypatch):
    points, alpha = pulled(10.0)
    assert not wide.centring_cancels(points._replace(Z=points.Z[:1]), alpha)
    assert not wide.centring_cancels(points, alpha[:, :0])
    monkeypatch.setattr(wide, "readable", lambda value: False)  # a CUDA graph is captured
    assert not wide.centring_cancels(points, alpha)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_the_agop_in_float64(own, weighted, normal, relative):
    """None where copies of points and coefficients and single rows do not fit."""
    X, alpha = normal(30, 6, dtype=torch.float32), normal(30, 3, dtype=torch.float32)
    Z = X if own else normal(20, 6, dtype=torch.float32, seed=4)
    w = torch.linspace(0.5, 1.0, len(Z)) if weighted else None
    points = Points(Laplace(2.0), X, Z)
    x, a = X.double(), alpha.double()
    z = x if own else Z.double()
    least = 8 * (30 * 6 + 30 * 3 + (0 if own else 20 * 6)) + costs.gradient_form_bytes(1, x, a, z, True)
    task = AgopTask("sum", True, "gradient", least, w)
    M = wide.agop_in_float64(points, alpha, task, w)
    v = w.double() if weighted else None
    wanted = fastagop.agop(Laplace(2.0), x, a, z, reduction="sum", center=True, sample_weight=v)
    assert relative(M, wanted) <= 1e-12
    assert wide.agop_in_float64(points, alpha, AgopTask("sum", True, "gradient", least - 1, w), w) is None


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("size", "exponent"), [(-21, -21), (-20, 0), (0, 0), (20, 0), (21, 21), (100, 100)])
def test_exponents_of_stored_weights(size, exponent, sign):
    assert torch_agop.exponent_of(sign * 0.75 * torch.tensor([[2.0**size, 0.0]])) == exponent


def test_exponents_of_nothing():
    for W in (torch.zeros(0, 3), torch.zeros(2, 2), torch.tensor([torch.inf, 1.0])):
        assert torch_agop.exponent_of(W) == 0


@pytest.mark.parametrize("method", ["gradient", "gram"])
@pytest.mark.parametrize(("a", "b"), [(60, 0), (0, 60), (-50, 70)])
def test_units_of_stored_weights(method, a, b, normal, relative):
    X, alpha = normal(40, 6, dtype=torch.float32), normal(40, 3, dtype=torch.float32)
    W = torch_agop.weights(Laplace(2.0), X, X, 16)
    given, task = alpha.clone(), AgopTask("sum", method=method)
    plain, scaled = (
        torch_agop.agop_from_weights_(
            W * 2.0**i, Laplace(2.0), X, alpha * 2.0**j, X, task, symmetric=True, rows=16, exponent=i
        )
        for i, j in ((0, 0), (a, b))
    )
    assert relative(scaled / 2.0 ** (2 * (a + b)), plain) <= 1e-5
    assert torch.equal(alpha, given)


def stored(X, dtype):
    """Weights of points in a dtype, in memory of their own."""
    return torch_agop.weights(Laplace(2.0), X.double(), X.double(), 64).to(dtype).clone()


def test_wider_weights_are_narrowed_in_their_own_memory(normal, relative, tensor_memory, monkeypatch):
    monkeypatch.setattr(low_rank, "_ROWS", 16)
    monkeypatch.setattr(torch_agop, "ROWS", 16)
    X, alpha, task = normal(600, 8, dtype=torch.float32), normal(600, 60, dtype=torch.float32), AgopTask("sum")
    how = {"symmetric": True, "rows": 16}
    W = stored(X, torch.float64)
    M, most = tensor_memory(lambda: torch_agop.agop_from_weights_(W, Laplace(2.0), X, alpha, X, task, **how))
    assert relative(M, fastagop.agop(Laplace(2.0), X.double(), alpha.double(), reduction="sum")) <= 1e-6
    assert most < 3 * 600**2  # a float32 copy of the weights takes 4 bytes an item
    by_columns = stored(X, torch.float64).T.contiguous().T
    assert torch.equal(torch_agop.agop_from_weights_(by_columns, Laplace(2.0), X, alpha, X, task, **how), M)


@pytest.mark.parametrize(("limit", "form"), [(None, "float64"), (8 * 400**2, "gradient")])
def test_stored_weights_keep_to_a_limit(limit, form, cloud, normal, caplog):
    """Where float32 loses digits, their float64 copy needs memory that the caller may not have left."""
    X, alpha = cloud("collapsed 1e-4", n=400, d=8, dtype=torch.float32), normal(400, 60, dtype=torch.float32)
    operator = KernelOperator("agop", Laplace(2.0), X)
    with caplog.at_level(logging.INFO, "fastagop"):
        operator.agop_from_weights_(stored(X, torch.float32), alpha, center=False, limit=limit)
    assert form in caplog.text.partition("running the")[2]


def test_the_weighted_mean_gradient(normal, relative):
    X, alpha, Z = normal(30, 6), normal(30, 3, seed=2), normal(20, 6, seed=3)
    w = torch.linspace(0.5, 4.0, 20, dtype=torch.float64)
    blocks = [(row, W * w[row, None]) for row, W, _ in torch_agop.weight_tiles(Laplace(2.0), X, Z, 7, None)]
    G = reference.gradients(Laplace(2.0), X, alpha, Z)
    mean = torch_agop.mean_gradient(blocks, alpha, X, Z, None, w.sum())
    assert relative(mean, (w[:, None, None] * G).sum(0) / w.sum()) <= 1e-12


def test_room_beside_stored_weights(little_memory):
    """What is free now leaves them out; a limit of the caller's counts them."""
    little_memory(1000)
    W = torch.zeros(5, 3, dtype=torch.float64)
    assert torch_agop._room(W, None) == 900 + 5 * 3 * 8
    assert torch_agop._room(W, 700) == 700


# ---- The choice of the form


def decide(name, cloud, normal, n=300, **how):
    X, alpha = cloud(name, n=n, d=100, dtype=torch.float32), normal(n, 4, dtype=torch.float32)
    return torch_agop.choose_form(
        torch_agop.weights(Laplace(2.0), X, X, 64), X, alpha, X, AgopTask(**how), symmetric=True
    )


@pytest.fixture
def rates(monkeypatch):
    """rates(gradient, gram, float64): operations per second of both forms in float32, of the gram form in float64."""

    def set_(gradient: float, gram_: float, wide: float) -> None:
        known = {("gradient", "float32"): gradient, ("gram", "float32"): gram_, ("gram", "float64"): wide}
        for module in (torch_agop, costs):
            monkeypatch.setattr(module, "rate", lambda form, products, device: known[form, products])

    return set_


@pytest.mark.parametrize(("share", "form"), [(0.9, "gram"), (1.1, "gradient")])
def test_float64_products_are_worth_four_times_the_time(share, form, rates, cloud, normal):
    """Where the gram form would lose digits in float32 the gradient form loses some, too."""
    n, d, K = 300, 100, 4
    work = costs.flops(n, n, d, K, True)
    wide = work["gram"] + gram.low_rank_flops(n, n, d, K, low_rank.RANK)
    rates(1.0, 1e15, wide / (share * 4.0 * work["gradient"]))
    decision = decide("collapsed 1e-3", cloud, normal)
    assert decision.form == form
    assert decision.dtype == (torch.float64 if form == "gram" else torch.float32)


@pytest.mark.parametrize(("share", "form"), [(0.9, "gram"), (1.1, "gradient")])
def test_well_spread_points_take_the_cheaper_form(share, form, rates, cloud, normal):
    work = costs.flops(300, 300, 100, 4, True)
    rates(work["gradient"], work["gram"] / share, 1.0)
    assert decide("spread", cloud, normal).form == form


@pytest.mark.parametrize(("share", "rank"), [(0.9, low_rank.RANK), (1.1, 1)])
def test_a_low_rank_part_must_leave_the_gram_form_the_cheaper_one(share, rank, rates, cloud, normal):
    """These points lose so few digits that float32 does without it, too; whoever names the gram form gets the part."""
    n, d, K = 300, 100, 4
    work, more = costs.flops(n, n, d, K, True), gram.low_rank_flops(n, n, d, K, low_rank.RANK)
    rates(work["gradient"], 1e30, more / share)
    for method, expected in (("auto", rank), ("gram", low_rank.RANK)):
        decision = decide("collapsed 3e-1", cloud, normal, method=method)
        assert (decision.form, decision.dtype, decision.low_rank.rank) == ("gram", torch.float32, expected)


@pytest.mark.parametrize(("n", "rank"), [(64, 1), (65, 16)])
def test_few_points_have_no_low_rank_part(n, rank, cloud, normal):
    """From four times as many points as it has columns."""
    assert decide("collapsed 3e-1", cloud, normal, n=n, method="gram").low_rank.rank == rank


@pytest.mark.parametrize(("products", "rounding"), [("bf16x3", 2.0**-16), ("tf32", 2.0**-11), ("float32", 2.0**-23)])
def test_the_loss_goes_by_the_digits_of_the_products(products, rounding, monkeypatch, cloud, normal):
    """TF32 has eleven bits, three bf16 products have sixteen."""
    for module in (torch_agop, costs):
        monkeypatch.setattr(module, "rate", lambda form, products, device: 1e9)
    X, alpha = cloud("spread", n=60, d=100, dtype=torch.float32), normal(60, 4, dtype=torch.float32)
    W = torch_agop.weights(Laplace(2.0), X, X, 64)
    found = torch_agop.choose_form(W, X, alpha, X, AgopTask(method="gram"), symmetric=True, products=products)
    plain = torch_agop.choose_form(W, X, alpha, X, AgopTask(method="gram"), symmetric=True)
    assert found.loss == pytest.approx(plain.loss * rounding / EPS)


@pytest.mark.parametrize(("share", "safe"), [(0.9, True), (1.1, False)])
@pytest.mark.parametrize(
    ("method", "products", "allowed"),
    [("auto", None, 4e-6), ("gram", None, 32 * EPS), ("auto", "tf32", 5e-5), ("auto", "bf16x3", 5e-5),
     ("gram", "tf32", 32 * 2.0**-11), ("gram", "bf16x3", 32 * 2.0**-16)],
)  # fmt: skip
def test_what_the_gram_form_may_lose(method, products, allowed, share, safe, monkeypatch, cloud, normal):
    """Five bits of its products where it was asked for by name; float64 is then what is left, or the gradient form."""
    coarse = torch_agop.PRODUCT_ROUNDING.get(products, (EPS, 0.0))[0]
    growth = share * allowed / coarse
    monkeypatch.setattr(gram, "CancellationEstimate", estimate_of(growth / torch_agop.LOSS_PER_EPS))
    for module in (torch_agop, costs):
        monkeypatch.setattr(module, "rate", lambda form, products, device: 1.0 if form == "gradient" else 1e9)
    X, alpha = cloud("spread", n=60, d=30, dtype=torch.float32), normal(60, 4, dtype=torch.float32)
    W = torch_agop.weights(Laplace(2.0), X, X, 64)
    decision = torch_agop.choose_form(W, X, alpha, X, AgopTask(method=method), symmetric=True, products=products)
    assert (decision.form, decision.dtype) == ("gram", torch.float32 if safe else torch.float64)


def estimate_of(amplification: float):
    """A CancellationEstimate that found so much."""
    return lambda *_: SimpleNamespace(amplification=lambda part: amplification)


# ---- Rounding below zero


@pytest.mark.parametrize(
    ("loss", "room", "looked_at"), [(7.0, 0, False), (9.0, 0, True), (9.0, 1, False)]
)  # of eps; bytes that are missing
def test_eigenvalues_are_looked_at_where_digits_were_lost(loss, room, looked_at, monkeypatch, normal):
    X, alpha, seen = normal(30, 6, dtype=torch.float32), normal(30, 3, dtype=torch.float32), []
    W = torch_agop.weights(Laplace(2.0), X, X, 16)
    decision = torch_agop.GramDecision("gram", torch.float32, low_rank.mean_part(W, True), loss * EPS)
    monkeypatch.setattr(torch_agop, "choose_form", lambda *_, **__: decision)
    monkeypatch.setattr(gram, "nonnegative", lambda M, eps: seen.append(eps) or M)
    task = AgopTask("sum", limit=gram.nonnegative_bytes(6) - room)
    torch_agop.agop_from_weights_(W, Laplace(2.0), X, alpha, X, task, symmetric=True, rows=16)
    assert seen == [EPS] * looked_at


@pytest.mark.parametrize(("below", "clipped"), [(3.0, False), (5.0, True)])
def test_negative_eigenvalues_beyond_rounding_are_clipped(below, clipped):
    turn = torch.linalg.qr(torch.arange(9.0, dtype=torch.float64).view(3, 3).cos()).Q
    M = torch.diag(torch.tensor([1.0, 0.5, -below * EPS], dtype=torch.float64))
    found = gram.nonnegative(M, EPS)
    assert (found is M) == (not clipped)
    if clipped:
        assert float((found - M.clamp(min=0.0)).abs().max()) <= 1e-14
    M = turn @ torch.diag(torch.tensor([1.0, 0.5, -1e-3], dtype=torch.float64)) @ turn.T
    wanted = turn @ torch.diag(torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)) @ turn.T
    assert float((gram.nonnegative(M, EPS) - wanted).abs().max()) <= 1e-14


def test_what_has_no_eigenvalues_to_clip():
    for M in (torch.zeros(2, 2), torch.zeros(0, 0), torch.full((2, 2), torch.inf), -torch.eye(2049)):
        assert gram.nonnegative(M, EPS) is M
    bad = torch.eye(2048, dtype=torch.float64)
    bad[0, 0] = 0.0
    assert gram.nonnegative(bad, EPS) is bad


# ---- Near pairs


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("name", ["collapsed 1e-1", "offset"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_near_pairs_by_their_definition(own, name, dtype, cloud):
    """0 < r^2 < NEAR (|x|^2 + |z|^2), of the shifted points; a shift leaves few of them."""
    X = cloud(name, n=90, d=7, dtype=dtype)
    Z = X if own else X[20:70] + 0.01 * cloud("spread", n=50, d=7, dtype=dtype, seed=3)
    row = slice(10, 40)
    x2, z2 = distance.squared_norms(X), distance.squared_norms(Z)
    sq = X.new_empty(30, len(X))
    distance.squared_distances(Z[row], X, z2[row], x2, sq, 10 if own else None)
    for shift in {None, dominant_offset(X)}:
        x, z = (X, Z) if shift is None else (X - shift, Z - shift)
        sums = distance.squared_norms(z)[row, None] + distance.squared_norms(x)
        wanted = (sq < distance.NEAR[dtype] * sums) & (sq > 0)
        for words in ({}, {"kernel": Laplace(2.0)}):
            nearness, given = Nearness(X, Z, shift), sq.clone()
            if words:
                W = Laplace(2.0).weight_(sq.clone())
                near = nearness.among_weights(W, row, **words)
            else:
                near = nearness.among(given, row)
                assert torch.equal(given, sq)
            mask = torch.zeros_like(wanted)
            if near is not None:
                assert bool(near.mask.any(1).all())
                mask[near.rows] = near.mask
            assert torch.equal(mask, wanted)


@pytest.mark.parametrize(("d", "looked_for"), [(4, False), (5, True)])
def test_near_pairs_of_few_features_are_not_looked_for(d, looked_for, cloud):
    """Every difference is formed there."""
    X = cloud("collapsed 1e-2", n=30, d=d)
    sq = torch.cdist(X, X).square()
    assert (Nearness(X, X, None).among(sq, slice(0, 30)) is not None) == looked_for


@pytest.mark.parametrize("words", [{}, {"kernel": Laplace(2.0)}], ids=["any kernel", "Laplace"])
def test_a_single_near_pair_is_found_by_its_weight(words):
    X, Z = torch.eye(6, dtype=torch.float64), -torch.eye(6, dtype=torch.float64)
    Z[2] = X[4] + 1e-5
    W = torch_agop.weights(Laplace(2.0), X, Z, 8)
    near = Nearness(X, Z, None).among_weights(W, slice(0, 6), **words)
    assert near.rows.tolist() == [2]
    assert near.mask.nonzero().tolist() == [[0, 4]]


def test_no_near_pairs(cloud):
    X = torch.eye(30, dtype=torch.float64)
    sq = torch.full((30, 30), 2.0, dtype=torch.float64).fill_diagonal_(0.0)
    for points in (X, X[:, :4].contiguous()):
        assert Nearness(points, points, None).among(sq.clone(), slice(0, 30)) is None
        assert Nearness(points, points, None).among(sq[:0], slice(0, 0)) is None
    assert Nearness(X, X, None).among_weights(sq.clone(), slice(0, 30)) is None


# ---- Words


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("precision", checks.PRECISIONS)
def test_words_of_a_precision(kind, dtype, precision):
    """TF32 is what "medium" means on a GPU, for float32 only."""
    X, torch_backend = SimpleNamespace(dtype=dtype, device=torch.device(kind)), backend.TorchBackend()
    coarse = (kind, dtype, precision) == ("cuda", torch.float32, "medium")
    wide = dtype == torch.float64
    assert torch_backend.products(precision, X) == ("tf32" if coarse else str(dtype).removeprefix("torch."))
    text = torch_backend.describe_precision(precision, X)
    assert text.startswith("float64" if wide else "float32, medium (TF32)" if coarse else "float32, highest")
    assert ("asked for" in text) == (not wide and not coarse and precision != "highest")


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("method", ["gradient", "gram"])
def test_the_same_points_are_said_to_be_and_not_recognised(method, weighted, normal):
    """A view of the centers, and the centers themselves: what stored weights come to is the same to the bit."""
    X, alpha = normal(60, 6, dtype=torch.float32), normal(60, 3, dtype=torch.float32)
    W, w = torch_agop.weights(Laplace(2.0), X, X, 16), torch.linspace(0.5, 1.0, 60) if weighted else None
    task, how = AgopTask("sum", method=method), {"symmetric": True, "rows": 16, "row_weights": w}
    M, other = (
        torch_agop.agop_from_weights_(W.clone(), Laplace(2.0), X, alpha, Z, task, **how) for Z in (X, X.clone())
    )
    assert torch.equal(M, other)
