"""Ranks that are threads of one process: what each of them makes, and that together they make the plain result.

test_distributed.py starts processes for the same functions, which takes seconds; here a group costs milliseconds.
"""

from __future__ import annotations

import dataclasses
import math
import pickle
import pkgutil
import re
import threading
import warnings

import numpy as np
import pytest
import torch
from fastagop.kernels import plan, reference
from fastagop.kernels.plan import AgopTask
from fastagop.kernels.scaling import Points

import fastagop
from fastagop import CholeskyCG, DeepRFMRegressor, Gaussian, Laplace, RFMRegressor, distributed
from fastagop.distributed import communicator, engine
from fastagop.distributed import operations as shared
from fastagop.distributed.blocks import SharedBlocks
from fastagop.distributed.communicator import Communicator
from fastagop.distributed.engine import Predictor, Sharded
from fastagop.estimators import base, kernel_ridge, progress
from fastagop.estimators.kernel_ridge import KernelRidge

BOUND = {torch.float64: 1e-11, torch.float32: 1e-5}  # sums in another order; float32's forms differ by 1e-6


class Sent:
    """What travels: it is there once it is waited for."""

    def __init__(self, places, parts):
        self.places, self.parts = places, parts

    def wait(self):
        for place, part in zip(self.places, self.parts, strict=True):
            place.copy_(part)


class Threads:
    """What communicator.py uses of torch.distributed, for ranks that are threads; a collective is a meeting of all."""

    GroupMember, backend = torch.distributed.GroupMember, "gloo"

    def __init__(self, size: int):
        self.size, self.own = size, threading.local()
        self.meeting, self.brought = threading.Barrier(size, timeout=10), [None] * size
        self.ProcessGroup = Threads

    def is_available(self):
        return True

    is_initialized = is_available

    def get_rank(self, group=None):
        return self.own.rank

    def get_world_size(self, group=None):
        return self.size

    def get_backend(self, group=None):
        return self.backend

    def get_global_rank(self, group, rank):
        return rank

    def _meet(self, value):
        self.brought[self.own.rank] = value
        self.meeting.wait()
        found = list(self.brought)
        self.meeting.wait()
        return found

    def _tensors(self, tensor):
        assert tensor.is_contiguous()  # memory is what travels
        found = self._meet(tensor.clone())
        assert {(t.shape, t.dtype) for t in found} == {(tensor.shape, tensor.dtype)}
        return found

    def all_reduce(self, tensor, group=None):
        tensor.copy_(torch.stack(self._tensors(tensor)).sum(0))

    def reduce(self, tensor, to, group=None):
        found = self._tensors(tensor)
        tensor.copy_(torch.stack(found).sum(0) if self.own.rank == to else torch.full_like(tensor, torch.nan))

    def broadcast(self, tensor, source, group=None, async_op=False):
        sent = Sent([tensor], [self._tensors(tensor)[source]])
        return sent if async_op else sent.wait()

    def all_gather(self, places, tensor, group=None, async_op=False):
        sent = Sent(places, self._tensors(tensor))
        return sent if async_op else sent.wait()

    def all_gather_object(self, places, value, group=None):
        places[:] = map(pickle.loads, self._meet(pickle.dumps(value)))

    def broadcast_object_list(self, box, source, group=None):
        box[:] = pickle.loads(self._meet(pickle.dumps(box))[source])


@pytest.fixture
def together(monkeypatch):
    """together(size, call): what call(rank) returns or raises on every rank, as a list."""

    def run(size: int, call) -> list:
        group, results = Threads(size), [None] * size
        monkeypatch.setattr(communicator, "dist", group)
        run.group = group

        def work(rank):
            group.own.rank = rank
            try:
                results[rank] = call(rank)
            except Exception as error:
                results[rank] = error
                if isinstance(error, KeyError):  # as a process that dies
                    group.meeting.abort()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    return run


@pytest.fixture
def same(together, relative):
    """same(size, call, expected, bound): every rank returns the expected tensor, the same bits as the others."""

    def check(size, call, expected, bound):
        results = together(size, lambda rank: call())
        for found in results:
            assert isinstance(found, torch.Tensor), found
            assert found.dtype == expected.dtype
            assert torch.equal(found, results[0])
        assert relative(results[0], expected) <= bound

    return check


groups = pytest.mark.parametrize(("size", "dtype"), [(2, torch.float32), (3, torch.float64)])
own = pytest.mark.parametrize("own", [True, False], ids=["own points", "other points"])


@groups
@own
@pytest.mark.parametrize("method", ["gradient", "gram"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize(("center", "reduction"), [(False, "mean"), (True, "sum")])
def test_agop(size, dtype, own, method, weighted, center, reduction, normal, same):
    X, alpha = normal(41, 5, dtype=dtype), normal(41, 6, seed=2, dtype=dtype)
    Z = None if own else normal(20, 5, seed=3, dtype=dtype)
    w = normal(41 if own else 20, seed=4, dtype=dtype).abs() if weighted else None
    options = {"method": method, "center": center, "reduction": reduction, "sample_weight": w}
    plain = fastagop.agop(Laplace(2.0), X, alpha, Z, **options)
    same(size, lambda: distributed.agop(Laplace(2.0), X, alpha, Z, **options), plain, BOUND[dtype])


@pytest.mark.parametrize("center", [False, True])
def test_agop_of_far_apart_means_and_lengths(center, normal, same):
    """Shares whose gradients have means of their own, one share without weight, lengths that need another unit."""
    X = 2.0**30 * normal(30, 3)
    w = (torch.arange(30) >= 10).double()
    for alpha in (normal(30, 2, seed=1), normal(30, 1, seed=1) + 5.0):
        options = {"center": center, "sample_weight": w}
        plain = fastagop.agop(Laplace(2.0**30), X, alpha, **options)
        same(3, lambda a=alpha, o=options: distributed.agop(Laplace(2.0**30), X, a, **o), plain, 1e-11)


@groups
@own
def test_kernel_products_and_gradients(size, dtype, own, normal, same, monkeypatch):
    """Results travel in many pieces, the last one shorter."""
    monkeypatch.setattr(communicator, "_PIECE", 64)
    monkeypatch.setattr(communicator, "_PIECE_ROWS", 3)
    X, alpha = normal(41, 5, dtype=dtype), normal(41, 2, seed=2, dtype=dtype)
    Z = None if own else normal(20, 5, seed=3, dtype=dtype)
    V = alpha if own else normal(20, 2, seed=4, dtype=dtype)
    for call, arguments in (("kernel_matmul", (Z, V)), ("gradients", (alpha, Z))):
        plain = getattr(fastagop, call)(Gaussian(2.0), X, *arguments)
        same(size, lambda c=call, a=arguments: getattr(distributed, c)(Gaussian(2.0), X, *a), plain, BOUND[dtype])


def test_halves_of_a_product_are_shared_by_area_and_rows_elsewhere(normal, together, monkeypatch):
    """k(X, X) V takes half of the pairs: a rank makes a part of the triangle; k(X, Z) V is shared by rows."""
    shares, plain = [], engine.matrix.kernel_matmul
    monkeypatch.setattr(engine.matrix, "kernel_matmul", lambda *args: shares.append(len(args)) or plain(*args))
    X, V = normal(40, 3), normal(40, 2, seed=1)
    together(2, lambda rank: distributed.kernel_matmul(Laplace(2.0), X, None, V))
    assert shares == [6, 6]  # with the blocks that are the rank's
    shares.clear()
    calls, rows = [], shared.operations.kernel_matmul
    monkeypatch.setattr(
        shared.operations,
        "kernel_matmul",
        lambda kernel, x, *rest, **words: calls.append(len(x)) or rows(kernel, x, *rest, **words),
    )
    together(2, lambda rank: distributed.kernel_matmul(Laplace(2.0), X, X.clone(), V))
    assert calls == [20, 20]


# ---- which form of the AGOP ranks make


@pytest.mark.parametrize(
    ("outputs", "size", "stored"),
    [
        # n = 60, d = 10: with two ranks the gram form's rows take 3600 * 10 * 1.5 + (60^3 + 10800 K) / 2 + 6000
        # operations, the gradient form's 30 * (1200 (K + 1) + 200 K): equal at K = 3.6; with eight ranks at 7.0
        (3, 2, False),
        (4, 2, True),
        (6, 8, False),
        (8, 8, True),
    ],
)
def test_weights_are_stored_where_that_pays(outputs, size, stored, normal):
    X = normal(60, 10)
    at, alpha = Points(Laplace(2.0), X, X), normal(60, outputs)
    found = engine._stored_weights(at, alpha, AgopTask(limit=10**9), size)
    assert (found is not None) is stored
    assert engine._stored_weights(at, alpha, AgopTask(method="gram", limit=10**9), size).method == "gram"
    assert engine._stored_weights(at, alpha, AgopTask(method="gradient", limit=10**9), size) is None
    assert engine._stored_weights(at._replace(Z=X.clone()), alpha, AgopTask(limit=10**9), size) is None
    assert engine._stored_weights(at, alpha, AgopTask(limit=10_000), size) is None
    with pytest.raises(MemoryError):
        engine._stored_weights(at, alpha, AgopTask(method="gram", limit=10_000), size)


@pytest.fixture
def forms(monkeypatch):
    """The forms that ranks make, in order: "rows of S" or the method of a share of points."""
    made = []
    gram, points = engine._rows_of_gram, engine._rows_of_points

    def spied_gram(*args):
        M = gram(*args)
        made.append("rows of S" if M is not None else "refused")
        return M

    def spied_points(predictor, Z, weights, task, ranks):
        made.append(task.method)
        return points(predictor, Z, weights, task, ranks)

    monkeypatch.setattr(engine, "_rows_of_gram", spied_gram)
    monkeypatch.setattr(engine, "_rows_of_points", spied_points)
    return made


@pytest.mark.parametrize(
    ("outputs", "other", "method", "expected"),
    [
        (40, False, "auto", "rows of S"),
        (1, False, "auto", "gradient"),  # S does not pay, nor would it on a rank's share
        (1, False, "gram", "rows of S"),
        (40, True, "auto", "auto"),  # every share chooses
        (40, True, "gram", "gram"),
        (40, False, "gradient", "gradient"),
    ],
)
def test_the_form_that_ranks_make(outputs, other, method, expected, normal, same, forms):
    X, alpha = normal(60, 10), normal(60, outputs)
    Z = X[:30].clone() if other else None
    plain = fastagop.agop(Laplace(2.0), X, alpha, Z, method=method)
    same(2, lambda: distributed.agop(Laplace(2.0), X, alpha, Z, method=method), plain, 1e-11)
    assert forms == [expected] * 2


@pytest.mark.parametrize(
    ("dtype", "made"),
    [
        (torch.float32, ["rows of S"] * 2),  # in float64, with a part of low rank
        (torch.float64, ["gradient"] * 2 + ["refused"] * 2),  # no wider dtype is left
    ],
)
def test_collapsed_classes_lose_no_digits(dtype, made, cloud, normal, together, forms, relative):
    """As one process: rows of S where a form of them loses no digits, or gradients."""
    X, alpha = cloud("collapsed 1e-4", n=120, dtype=dtype), normal(120, 60, dtype=dtype)
    truth = reference.agop(Laplace(1.0), X, alpha)
    here = relative(fastagop.agop(Laplace(1.0), X, alpha), truth)
    for found in together(2, lambda rank: distributed.agop(Laplace(1.0), X, alpha)):
        assert relative(found, truth) <= 2 * here + 4 * torch.finfo(dtype).eps
    assert sorted(forms) == made


@pytest.mark.parametrize(
    ("refusing", "made"), [(0, ["gradient", "gradient", "refused", "refused"]), (1, ["rows of S"] * 2)]
)
def test_the_first_rank_decides_what_all_make(refusing, made, normal, same, forms, monkeypatch):
    """Where rounding makes ranks see it differently, all of them follow the first."""
    X, alpha, choose = normal(60, 10), normal(60, 40), engine.torch_agop.choose_form
    plain = fastagop.agop(Laplace(2.0), X, alpha)

    def chosen(*args, **how):
        found = choose(*args, **how)
        return dataclasses.replace(found, low_rank=None) if communicator.dist.get_rank() == refusing else found

    monkeypatch.setattr(engine.torch_agop, "choose_form", chosen)
    same(2, lambda: distributed.agop(Laplace(2.0), X, alpha, method="auto"), plain, 1e-11)
    assert sorted(forms) == made


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_diagonal(center, weighted, normal, same):
    X, alpha = normal(41, 5), normal(41, 3, seed=2)
    w = normal(41, seed=4).abs() if weighted else None
    full = fastagop.agop(Laplace(2.0), X, alpha, center=center, reduction="sum", sample_weight=w)
    predictor, task = Predictor(Laplace(2.0), X, alpha), AgopTask("sum", center, "auto", None, w)
    same(3, lambda: Sharded(None).agop_diagonal(predictor, task), full.diagonal().contiguous(), 1e-11)


# ---- solves


@pytest.mark.parametrize("dtype", list(BOUND))
@pytest.mark.parametrize("method", ["auto", "eigh", "cg"])
@pytest.mark.parametrize("kind", ["plain", "weighted", "copies"])
def test_solve(dtype, method, kind, normal, together, relative):
    X, Y = normal(30, 5, dtype=dtype), normal(30, 2, seed=1, dtype=dtype)
    if kind == "copies":
        X[25:] = X[:5]
    options = {"ridge": 0.1, "method": method}
    options |= {"sample_weight": normal(30, seed=6, dtype=dtype).abs()} if kind == "weighted" else {}
    plain = fastagop.solve(Laplace(2.0), X, Y, **options)
    for found in together(3, lambda rank: distributed.solve(Laplace(2.0), X, Y, **options)):
        assert not isinstance(found, Exception), found
        assert found.alpha.dtype == dtype
        assert relative(found.alpha, plain.alpha) <= 1e-5
        assert (found.method, found.dtype, found.rank) == (plain.method, plain.dtype, plain.rank)
        assert abs(found.iterations - plain.iterations) <= 1  # sums are in another order
        assert found.merged == plain.merged
        assert found.residual == pytest.approx(plain.residual, abs=1e-6)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    ("method", "ridge", "dtype"),
    [
        ("auto", 0.0, torch.float32),
        ("cholesky+cg", 1e-3, torch.float64),
        ("cholesky", 0.0, torch.float64),
        ("cholesky", 1e-2, torch.float32),
    ],
)
def test_half_of_a_matrix_is_shared(size, method, ridge, dtype, normal, together, relative, monkeypatch):
    monkeypatch.setattr("fastagop.solvers.problem.FULL_MATRIX_ROWS", 64)
    X, Y = normal(150, 5, dtype=dtype), normal(150, 2, seed=1, dtype=dtype)
    how = {"method": method, "ridge": ridge}
    plain = fastagop.solve(Laplace(2.0), X, Y, **how)
    for found in together(size, lambda rank: distributed.solve(Laplace(2.0), X, Y, **how)):
        assert not isinstance(found, Exception), found
        assert relative(found.alpha, plain.alpha) <= (1e-9 if dtype == torch.float64 else 1e-6)
        assert (found.method, found.dtype, found.rank) == (plain.method, plain.dtype, plain.rank)
        assert found.jitter == plain.jitter == 0


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", list(BOUND))
def test_shared_blocks(size, dtype, together):
    """Fill, product, factor and solve of a matrix dealt out to ranks; more ranks than block rows included."""
    n, rows = 130, 32
    A = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    A = A @ A.T / n
    diagonal, V = torch.linspace(2.0, 3.0, n, dtype=torch.float64), torch.ones(n, 2, dtype=dtype)
    V[:, 1] = torch.arange(n)
    B = A - torch.diag(A.diagonal()) + torch.diag(diagonal)

    def call(rank):
        ranks = Communicator(None, "solve", torch.device("cpu"))
        blocks = SharedBlocks(n, dtype, ranks, rows)
        blocks.fill_(lambda out, start: out.copy_(A[start : start + len(out), : out.shape[1]]))
        kept = blocks.to(dtype)
        product, failed = ranks.total(blocks.matmul(V)), blocks.cholesky_(diagonal)
        bad = diagonal.clone()
        bad[70] = -1.0
        return len(blocks.blocks), product, failed, ranks.total(blocks.solve(V)), kept.cholesky_(bad)

    found = together(size, call)
    assert sum(held for held, *_ in found) == 5
    assert max(held for held, *_ in found) <= -(-5 // size)
    for _, product, failed, solution, pivot in found:
        assert (failed, pivot) == (0, 71)
        assert float((product.double() - A @ V.double()).norm()) <= BOUND[dtype] * float((A @ V.double()).norm())
        assert float((B @ solution.double() - V.double()).norm()) <= 10 * BOUND[dtype] * float(V.double().norm())


def test_ranks_try_no_float32_factor_after_one_that_gave_way(normal, together, monkeypatch):
    monkeypatch.setattr("fastagop.solvers.problem.FULL_MATRIX_ROWS", 64)
    X, Y = normal(150, 5, dtype=torch.float32), normal(150, 2, seed=1, dtype=torch.float32)
    regression = KernelRidge(Gaussian(30.0), 1e-9, "highest", "auto")

    def call(rank):
        first = kernel_ridge.solve(X, Y, regression, Sharded(None)).solution
        return first, kernel_ridge.solve(X, Y, regression.after(first), Sharded(None)).solution

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = together(2, call)
    for first, second in found:
        assert first.fallback.startswith("pivot ")
        assert second.fallback == f"as before, {first.fallback}"
        assert torch.equal(second.alpha, first.alpha)


def test_a_pivot_that_fails_is_told_to_the_solver(normal, together, monkeypatch):
    """The float64 factor takes over on all ranks, with jitter where it needs it."""
    monkeypatch.setattr("fastagop.solvers.problem.FULL_MATRIX_ROWS", 64)
    X, Y = normal(150, 5, dtype=torch.float32), normal(150, 2, seed=1, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = fastagop.solve(Gaussian(30.0), X, Y, ridge=1e-9)
        found = together(2, lambda rank: distributed.solve(Gaussian(30.0), X, Y, ridge=1e-9))
    for solution in found:
        assert not isinstance(solution, Exception), solution
        assert solution.method == plain.method == "cholesky"
        assert "of the float32 factor is not positive" in solution.fallback
        assert solution.jitter == pytest.approx(plain.jitter, rel=0.1)


def test_every_rank_warns_of_what_the_first_one_altered(normal, together):
    X, Y = normal(60, 6), normal(60, 2, seed=1)
    X[1], Y[1] = X[0] + 1e-12, Y[0] + 1.0
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        first, second = together(2, lambda rank: distributed.solve(Laplace(2.0), X, Y))
    assert first.jitter == second.jitter > 0
    assert [w.category for w in said] == [fastagop.NumericalWarning] * 2


def test_errors_of_the_first_rank_are_raised_on_all(normal, together):
    X, Y = normal(60, 6), normal(60, 2, seed=1)
    how = {"method": "cholesky", "memory_limit": 1000}
    for error in together(2, lambda rank: distributed.solve(Laplace(2.0), X, Y, **how)):
        assert isinstance(error, MemoryError)
        assert "may be used" in str(error)


def test_an_infinite_limit_is_none(normal, together, monkeypatch):
    """Every rank may then take what the poorest has."""
    X, Y = normal(60, 6), normal(60, 2, seed=1)
    monkeypatch.setattr(plan, "available_bytes", lambda device: 2000 if communicator.dist.get_rank() else 10**9)
    for error in together(2, lambda rank: distributed.solve(Laplace(2.0), X, Y, memory_limit=math.inf)):
        assert isinstance(error, MemoryError)
        assert "1.8 kB may be used" in str(error)


def test_blocks_of_ranks_lie_in_memory(normal, together, tmp_path):
    X, Y = normal(60, 6), normal(60, 2, seed=1)
    for place in (str(tmp_path), "host"):
        how = {"method": CholeskyCG(place=place)}
        for error in together(2, lambda rank, how=how: distributed.solve(Laplace(2.0), X, Y, **how)):
            assert isinstance(error, ValueError)
            assert f"place='{place}' is for one process" in str(error)
    how = {"method": CholeskyCG(place=tmp_path)}
    (found,) = together(1, lambda rank: distributed.solve(Laplace(2.0), X, Y, **how))
    assert found.method == "cholesky+cg"


def test_an_estimator_on_the_group(normal, together):
    X, y = normal(50, 4).numpy(), normal(50, seed=1).numpy()
    some = {"early_stopping": True, "metric_samples": 0.9, "random_state": 0}
    for more, d in (({}, 4), ({"diagonal": True}, 4), ({}, 70), (some, 4), (some, 70)):
        X = normal(50, d).numpy()
        alone = RFMRegressor(iterations=2, dtype="float64", ridge=0.1, **more).fit(X, y)

        def fit(rank, more=more, X=X):
            how = {"iterations": 2, "dtype": "float64", "ridge": 0.1, **more}
            # the first rank draws for all
            how |= {"random_state": rank} if "random_state" in how else {}
            return RFMRegressor(process_group=communicator.dist, **how).fit(X, y).M_

        first, second = together(2, fit)
        np.testing.assert_array_equal(first, second)
        np.testing.assert_allclose(first, alone.M_, rtol=1e-9, atol=1e-12)


def test_a_median_bandwidth_is_that_of_the_first_rank(normal, together, monkeypatch):
    """Machines may sum a distance in other orders: here the second one finds another number."""
    X, y = normal(50, 4).numpy(), normal(50, seed=1).numpy()
    alone = RFMRegressor(Laplace("median"), iterations=1, ridge=0.1).fit(X, y)
    found = base.settled_at

    def on(kernel, points):
        return dataclasses.replace(kernel, bandwidth=found(kernel, points).bandwidth + communicator.dist.get_rank())

    monkeypatch.setattr(base, "settled_at", on)
    estimators = (RFMRegressor, {"iterations": 1}), (DeepRFMRegressor, {"depth": 1, "width": 8, "random_state": 0})
    for make, more in estimators:

        def fit(rank, make=make, more=more):
            model = make(Laplace("median"), process_group=communicator.dist, ridge=0.1, **more).fit(X, y)
            return model.kernel_, model.predict(X)

        (first, f), (second, g) = together(2, fit)
        assert first == second
        np.testing.assert_array_equal(f, g)
        assert make is not RFMRegressor or first == alone.kernel_


@pytest.mark.parametrize("other", [Laplace(2.0), Laplace(("median", 2.0))], ids=repr)
def test_ranks_agree_on_how_a_bandwidth_is_chosen(other, normal, together):
    X, y = normal(50, 4).numpy(), normal(50, seed=1).numpy()

    def fit(rank):
        RFMRegressor((Laplace("median"), other)[rank], process_group=communicator.dist).fit(X, y)

    for error in together(2, fit):
        assert isinstance(error, ValueError)
        assert "rank 0 calls fit(Laplace(bandwidth='median'), agop_scale='max', " in str(error)
        assert f", rank 1 fit({other!r}, agop_scale='max', " in str(error)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("iterations", (1, 2)),
        ("diagonal", (False, True)),
        ("center", (False, True)),
        ("agop_scale", ("max", "mean")),
        ("early_stopping", (False, True)),
        ("validation_fraction", (0.1, 0.5)),
        ("metric_samples", (None, 0.5)),
        ("n_iter_no_change", (None, 1)),
        ("time_limit", (None, 100.0)),
    ],
)
def test_ranks_agree_on_what_a_fit_does(name, values, normal, together):
    """They would wait for each other until the group's timeout."""
    X, y = normal(50, 4).numpy(), normal(50, seed=1).numpy()

    def fit(rank):
        how = {"iterations": 1, "ridge": 0.1, name: values[rank]}
        RFMRegressor(process_group=communicator.dist, **how).fit(X, y)

    for error in together(2, fit):
        assert isinstance(error, ValueError)
        assert f"{name}={values[0]!r}" in str(error)
        assert f"{name}={values[1]!r}" in str(error)


def test_ranks_agree_on_whether_there_are_validation_rows(normal, together):
    X, y = normal(50, 4).numpy(), normal(50, seed=1).numpy()

    def fit(rank):
        held = (X, y) if rank else (None, None)
        RFMRegressor(process_group=communicator.dist, iterations=1, ridge=0.1).fit(X, y, None, *held)

    for error in together(2, fit):
        assert isinstance(error, ValueError)
        assert "X_val None), rank 1 " in str(error)
        assert str(error).endswith("X_val given)")


@pytest.mark.parametrize(
    ("make", "more"),
    [(RFMRegressor, {"iterations": 2}), (DeepRFMRegressor, {"depth": 2, "width": 8, "random_state": 0})],
    ids=["rfm", "deep_rfm"],
)
def test_the_first_rank_shows_how_far_a_fit_is(make, more, normal, together, monkeypatch):
    X, y = normal(50, 4).numpy(), normal(50, seed=1).numpy()
    lines = []
    monkeypatch.setattr(
        progress.log, "info", lambda text, *args: lines.append((communicator.dist.get_rank(), text % args))
    )

    def fit(rank):
        make(process_group=communicator.dist, ridge=0.1, verbose=1, callbacks=[], device="cpu", **more).fit(X, y)

    assert together(2, fit) == [None, None]
    assert [rank for rank, _ in lines] == [0, 0]
    assert " 2 of 2" in lines[1][1]


# ---- what ranks must agree on


def test_every_rank_may_take_what_the_poorest_has(together, monkeypatch):
    """Processes of one machine share its memory; torchrun says how many there are."""
    free = {0: 900_000, 1: 400_000, 2: 800_000}
    monkeypatch.setattr(plan, "available_bytes", lambda device: free[communicator.dist.get_rank()])

    def room(rank):
        return Communicator(None, "agop", torch.device("cpu")).agree(lambda: "made", "the same")

    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = together(3, room)
    monkeypatch.setattr(plan, "available_bytes", lambda device: 400_000)
    assert alone == [("made", plan.budget(None, torch.device("cpu")))] * 3
    monkeypatch.setattr(plan, "available_bytes", lambda device: free[communicator.dist.get_rank()])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert together(3, room) == [("made", alone[0][1] // 3)] * 3


def test_gpus_are_not_shared_by_the_processes_of_a_machine(together, monkeypatch):
    monkeypatch.setattr(plan, "available_bytes", lambda device: 900_000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    gpu = torch.device("cuda")
    (room,) = together(1, lambda rank: Communicator(None, "agop", gpu)._room())
    assert room == plan.budget(None, gpu)


def test_nccl_moves_cuda_tensors(together, monkeypatch):
    monkeypatch.setattr(Threads, "backend", "nccl")
    (error,) = together(1, lambda rank: Communicator(None, "agop", torch.device("cpu")))
    assert "the group's backend nccl moves CUDA tensors and X is on cpu" in str(error)
    (ranks,) = together(1, lambda rank: Communicator(None, "agop", torch.device("cuda")))
    assert ranks.wire == torch.device("cuda")
    monkeypatch.setattr(Threads, "backend", "gloo")
    (ranks,) = together(1, lambda rank: Communicator(None, "agop", torch.device("cuda")))
    assert ranks.wire == torch.device("cpu")


def test_a_group_that_is_none_is_refused(normal, together):
    X, Y = normal(9, 3), normal(9, 2)
    (error,) = together(1, lambda rank: distributed.agop(Laplace(2.0), X, Y, group="world"))
    assert isinstance(error, TypeError)
    assert "must be a torch.distributed process group or None, got 'world'" in str(error)
    outside = torch.distributed.GroupMember.NON_GROUP_MEMBER
    (error,) = together(1, lambda rank: distributed.agop(Laplace(2.0), X, Y, group=outside))
    assert isinstance(error, ValueError)
    assert "distributed.agop was called by a process that is not in the group" in str(error)


def test_an_error_that_cannot_travel_arrives_as_its_text(together):
    class Local(Exception):
        pass

    def fail(ask):
        raise Local("no such matrix")

    results = together(2, lambda rank: Communicator(None, "solve", torch.device("cpu")).run_on_root(fail))
    assert [str(error) for error in results] == ["Local: no such matrix"] * 2


def test_a_collective_that_fails_says_what_it_means(together, monkeypatch):
    """Of gloo's message the sentence that says something, without the place in its source."""

    def fails(self, tensor, group=None):
        raise RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer. This may be anything")

    monkeypatch.setattr(Threads, "all_reduce", fails)
    (error,) = together(1, lambda rank: Communicator(None, "agop", torch.device("cpu")).total(torch.ones(3)))
    assert isinstance(error, distributed.RankLost)
    assert "distributed.agop: rank 0 of 1 lost another rank (Connection closed by peer)." in str(error)


def test_a_limit_holds_on_every_rank(normal, together, forms):
    """The caller's memory_limit takes the place of what ranks have free: no room to store the weights."""
    X, alpha = normal(200, 6), normal(200, 40, seed=2)
    plain = fastagop.agop(Laplace(2.0), X, alpha)
    for limit, form in ((None, "rows of S"), (600_000, "gradient")):
        forms.clear()
        found = together(2, lambda rank, limit=limit: distributed.agop(Laplace(2.0), X, alpha, memory_limit=limit))
        assert forms == [form] * 2
        assert torch.allclose(found[0], plain, rtol=1e-10, atol=1e-12)


def moved(X: torch.Tensor) -> torch.Tensor:
    """X with another last bit somewhere."""
    X = X.clone()
    X[17, 2] = X[17, 2].nextafter(X[17, 2] + 1)
    return X


DISAGREE = {  # the call, what the second rank makes of X and Y and the options, and what both are told
    "points": (
        "agop",
        lambda X, Y: (moved(X), Y, {}),
        "agop: X must be the same .* rank 0 and rank 1 pass other values",
    ),
    "targets": ("solve", lambda X, Y: (X, Y.roll(1, 0), {}), "solve: Y must be the same on every rank"),
    "coefficients": ("gradients", lambda X, Y: (X, Y.roll(1, 0), {}), "gradients: alpha must be the same"),
    "vectors": ("kernel_matmul", lambda X, Y: (X, None, {"V": 2 * Y}), "kernel_matmul: V must be the same"),
    "shapes": (
        "agop",
        lambda X, Y: (X, Y[:, :1], {}),
        r"alpha .* torch.float64 \(40, 2\) and torch.float64 \(40, 1\);",
    ),
    "dtypes": ("agop", lambda X, Y: (X.float(), Y.float(), {}), "X must .* pass torch.float64 .* and torch.float32"),
    # equal numbers, but only one rank knows that the points are the centers
    "centers": ("gradients", lambda X, Y: (X, Y, {"Z": X.clone()}), r"Z must .* pass None and torch.float64 \(40, 3\)"),
    "weights": ("agop", lambda X, Y: (X, Y, {"sample_weight": Y[:, 0] ** 2}), "sample_weight must be the same"),
    "weights of a solve": (
        "solve",
        lambda X, Y: (X, Y, {"sample_weight": Y[:, 0] ** 2}),
        "sample_weight must be the same",
    ),
    "options": (
        "agop",
        lambda X, Y: (X, Y, {"center": True}),
        "must make the same call: rank 0 calls agop.*, rank 1 agop",
    ),
    "limits": ("agop", lambda X, Y: (X, Y, {"memory_limit": 1e9}), "must make the same call"),
    "ridges": ("solve", lambda X, Y: (X, Y, {"ridge": 0.5}), "must make the same call"),
    "precision": ("kernel_matmul", lambda X, Y: (X, None, {"V": Y, "precision": "high"}), "must make the same call"),
}


@pytest.mark.parametrize("name", DISAGREE)
def test_ranks_that_pass_different_things_are_told_so(name, normal, together):
    call, other, message = DISAGREE[name]
    X, Y = normal(40, 3), normal(40, 2, seed=1)

    def made(rank):
        x, y, options = other(X, Y) if rank else (X, None if call == "kernel_matmul" else Y, {})
        options = {"V": Y, **options} if call == "kernel_matmul" else options
        return getattr(distributed, call)(Laplace(2.0), x, y, **options)

    for error in together(2, made):
        assert isinstance(error, ValueError), error
        assert re.search(message, str(error)), error


def test_ranks_with_other_kernels_or_calls_are_told_so(normal, together):
    X, Y = normal(40, 3), normal(40, 2, seed=1)
    for error in together(2, lambda rank: distributed.agop(Laplace(2.0 + rank), X, Y)):
        assert re.search(r"rank 0 calls agop\(Laplace\(.*2\.0.* rank 1 agop\(Laplace\(.*3\.0", str(error)), error
    calls = distributed.agop, distributed.gradients
    for error in together(2, lambda rank: calls[rank](Laplace(2.0), X, Y)):
        assert "must make the same call: rank 0 calls agop" in str(error)
        assert "rank 1 gradients" in str(error)


def test_the_rank_that_differs_is_named(normal, together):
    X, Y = normal(40, 3), normal(40, 2, seed=1)
    for error in together(3, lambda rank: distributed.gradients(Laplace(2.0), X, Y + (rank == 2))):
        assert "rank 0 and rank 2 pass other values" in str(error)


def test_a_refusal_is_raised_where_it_happens_and_named_elsewhere(normal, together):
    X, Y = normal(40, 3), normal(40, 2, seed=1)
    zero, one, two = together(3, lambda rank: distributed.agop(Laplace(2.0), X, Y[:20] if rank == 1 else Y))
    assert isinstance(one, ValueError)
    assert "40 rows" in str(one)
    for error in (zero, two):
        assert isinstance(error, RuntimeError)
        assert "agop: rank 1 refused its arguments" in str(error)


def test_a_lost_rank_ends_the_others(normal, together):
    X, Y = normal(40, 3), normal(40, 2, seed=1)

    def call(rank):
        if rank == 1:
            raise KeyError("died")
        return distributed.solve(Laplace(2.0), X, Y)

    lost, died = together(2, call)
    assert isinstance(lost, distributed.RankLost)
    assert "distributed.solve: rank 0 of 2 lost another rank" in str(lost)
    assert isinstance(died, KeyError)


# ---- what fails on one rank


class Mine(ValueError):
    """What fails on one rank."""


def fails_on(rank, what="mine"):
    """A function of anything that fails on a rank; the others go on."""

    def call(*args, **options):
        if communicator.dist.get_rank() == rank:
            raise Mine(what)
        return 0.0

    return call


def check_told(results, failing, said):
    """The rank that failed raises its error, the others one that names it."""
    for rank, error in enumerate(results):
        assert isinstance(error, Mine if rank == failing else RuntimeError), (rank, error)
        assert rank == failing or re.search(said, str(error)), error


@pytest.mark.parametrize("failing", [0, 2])
def test_user_code_that_fails_on_one_rank_is_told_to_the_others(failing, normal, together, tmp_path, monkeypatch):
    """They raise as well, instead of waiting for the rank at its next step, and the group can go on."""
    X, y = normal(50, 4).numpy(), normal(50, seed=1).numpy()
    deep = {"depth": 2, "width": 8, "random_state": 0}
    for make, how, said in (
        (
            RFMRegressor,
            {"iterations": 2, "callbacks": [fails_on(failing)]},
            r"callbacks.* failed on rank \d; its error",
        ),
        (
            RFMRegressor,
            {"iterations": 2, "scoring": fails_on(failing), "early_stopping": True},
            "scoring failed on rank",
        ),
        (DeepRFMRegressor, {**deep, "callbacks": [fails_on(failing)]}, r"callbacks.* failed on rank \d; its error"),
    ):
        options = {"ridge": 0.1, "device": "cpu", "random_state": 0, **how}

        def fit(rank, make=make, options=options):
            return make(process_group=communicator.dist, **options).fit(X, y)

        results = together(3, fit)
        if "scoring" in options:  # The error of a scorer is told with its name.
            assert str(results[failing]) == "scoring: the validation rows have no score, since mine"
            results[failing] = Mine()
        check_told(results, failing, said)
    if failing == 0:  # which keeps the checkpoint
        monkeypatch.setattr("fastagop.deep_rfm.checkpoint.Checkpoint.save", fails_on(0))

        def kept(rank):
            return DeepRFMRegressor(process_group=communicator.dist, checkpoint_dir=tmp_path, **deep).fit(X, y)

        check_told(together(3, kept), 0, "checkpoint.* failed on rank 0")


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("what", ["fill_", "to", "matmul", "_factor"])
def test_a_rank_that_fails_within_a_shared_solve_is_told_to_the_others(what, failing, normal, together, monkeypatch):
    monkeypatch.setattr("fastagop.solvers.problem.FULL_MATRIX_ROWS", 64)
    X, Y = normal(150, 5, dtype=torch.float32), normal(150, 2, seed=1, dtype=torch.float32)
    plain, fails = getattr(SharedBlocks, what), fails_on(failing, "no memory")
    again = fastagop.solve(Laplace(2.0), X, Y)

    def once(self, *args):
        fails()
        return plain(self, *args)

    def solve(rank):
        return distributed.solve(Laplace(2.0), X, Y)

    with monkeypatch.context() as patch:
        patch.setattr(SharedBlocks, what, once)
        results = together(3, solve)
    for rank, error in enumerate(results):
        assert isinstance(error, (Mine, RuntimeError)), error
        named = re.search(rf"rank {failing} (failed|could not)", str(error))
        assert isinstance(error, Mine) if rank == failing else named or failing == 0, error
    for found in together(3, solve):
        assert torch.allclose(found.alpha, again.alpha, rtol=1e-4, atol=1e-5)


def test_a_product_that_fails_on_another_rank_is_told(normal, together, monkeypatch):
    X, Y = normal(60, 5), normal(60, 2, seed=1)
    plain = engine.area_of_product

    def area(*args):
        fails_on(1)()
        return plain(*args)

    monkeypatch.setattr(engine, "area_of_product", area)
    results = together(2, lambda rank: distributed.solve(Laplace(2.0), X, Y, ridge=0.1, method="cg"))
    check_told(results, 1, "rank 1 failed; its error says why")


@pytest.mark.parametrize(
    ("place", "how"),
    [
        ("fastagop.distributed.engine.KernelOperator.mean_gradient", {"method": "gradient", "center": True}),
        ("fastagop.distributed.engine.torch_agop.weights", {"method": "gram"}),
        ("fastagop.distributed.engine.torch_gram.gram_form", {"method": "gram"}),
    ],
)
def test_a_share_of_an_agop_that_fails_on_one_rank_is_told(place, how, normal, together, monkeypatch):
    X, alpha = normal(60, 5), normal(60, 8, seed=1)
    plain = fastagop.agop(Laplace(2.0), X, alpha, **how)
    with monkeypatch.context() as patch:
        owner, name = place.rsplit(".", 1)
        real = pkgutil.resolve_name(place)
        patch.setattr(pkgutil.resolve_name(owner), name, lambda *args, **more: fails_on(1)() or real(*args, **more))
        results = together(2, lambda rank: distributed.agop(Laplace(2.0), X, alpha, **how))
    check_told(results, 1, "its share failed on rank 1; its error says why")
    for found in together(2, lambda rank: distributed.agop(Laplace(2.0), X, alpha, **how)):
        torch.testing.assert_close(found, plain, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("failing", [0, 1])
def test_rows_of_a_result_that_fail_on_one_rank_are_told(failing, normal, together, monkeypatch):
    X, alpha = normal(60, 5), normal(60, 3, seed=1)
    calls = {
        "gradients": lambda rank: distributed.gradients(Laplace(2.0), X, alpha),
        "kernel_matmul": lambda rank: distributed.kernel_matmul(Laplace(2.0), X, X.clone(), alpha),
        "diagonal": lambda rank: Sharded(None).agop_diagonal(
            Predictor(Laplace(2.0), X, alpha), AgopTask("sum", True, "auto", None, None)
        ),
    }
    places = {name: (shared.operations, name) for name in ("gradients", "kernel_matmul")}
    places["diagonal"] = (engine.torch_diagonal, "agop_diagonal")
    calls["triangle"] = lambda rank: distributed.kernel_matmul(Laplace(2.0), X, None, alpha)
    places["triangle"] = (shared, "area_of_product")
    for name, call in calls.items():
        real = getattr(*places[name])
        with monkeypatch.context() as patch:
            patch.setattr(*places[name], lambda *args, real=real, **more: fails_on(failing)() or real(*args, **more))
            check_told(together(2, call), failing, f"its share failed on rank {failing}; its error says why")
        assert all(isinstance(found, torch.Tensor) for found in together(2, call))
