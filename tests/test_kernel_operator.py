"""What a KernelOperator adds to a backend: units of points and of weights, estimates, samples of a product."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fastagop.kernels import calibration, kernel_operator
from fastagop.kernels.kernel_operator import KernelOperator, product_of_points, scale_weights
from fastagop.kernels.plan import Plan, computed_once

import fastagop
from fastagop import Laplace


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("other", [False, True])
def test_the_mean_gradient_is_per_unit_of_the_points(size, weighted, other, normal, relative):
    X, alpha, kernel = size * normal(40, 6), normal(40, 3, seed=2), Laplace(2.0 * size)
    Z = size * normal(23, 6, seed=3) if other else None
    operator = KernelOperator("gradients", kernel, X, Z)
    G = fastagop.gradients(kernel, X, alpha, Z)
    w = torch.arange(1, len(G) + 1, dtype=torch.float64) if weighted else torch.ones(len(G), dtype=torch.float64)
    mean = operator.mean_gradient(alpha, w if weighted else None, rows=7)
    assert relative(mean, (w[:, None, None] * G).sum(0) / w.sum()) <= 1e-12


@pytest.mark.parametrize(("n", "looked_at"), [(2048, 2048), (2049, 512)])
def test_all_products_of_few_points_are_looked_at_and_a_sample_of_many(n, looked_at, normal, relative):
    X, V = normal(n, 1), normal(n, 2, seed=2)
    index, rows = product_of_points(Laplace(1.0), X, 2).sampled(V)
    assert len(index) == looked_at
    assert (int(index[0]), int(index[-1])) == (0, n - 1 if looked_at == n else 511 * n // 512)
    steps = index.diff()
    assert int(steps.max()) - int(steps.min()) <= 1
    some = [0, 5, -1]
    wanted = fastagop.kernel_matrix(Laplace(1.0), X[index[some]], X) @ V
    assert relative(rows[some], wanted) <= 1e-12


def test_a_product_is_a_matrix_to_a_solver(normal, relative):
    X, V = normal(50, 6), normal(50, 2, seed=2)
    product = product_of_points(Laplace(2.0), X, 2)
    K = fastagop.kernel_matrix(Laplace(2.0), X)
    assert len(product) == 50
    assert relative(product.matmul(V), K @ V) <= 1e-13
    index = torch.tensor([3, 0, 49])
    assert relative(product.columns(index), K[:, index]) <= 1e-13


def test_blocks_of_a_product_leave_room_for_its_columns(normal, little_memory):
    """What fits beside one column does not fit beside a thousand."""
    X = normal(400, 6)
    little_memory(4e6)
    few, many = (product_of_points(Laplace(2.0), X, columns).rows for columns in (1, 800))
    assert few > many >= 1


@pytest.mark.parametrize("size", [1e-300, 0.75, 3.0, 1e300])
def test_weights_get_a_unit(size, normal):
    """The largest is between 1/2 and 1 then; a mean needs no unit, a sum takes it back."""
    w, Z = size * torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64), normal(3, 2)
    exponent = math.frexp(size)[1]
    for reduction in ("mean", "sum"):
        weights, divisor, further = scale_weights(w, Z, reduction)
        assert 0.5 <= float(weights.max()) < 1.0
        assert torch.equal(weights * 2.0 ** (exponent // 2) * 2.0 ** (exponent - exponent // 2), w)
        if reduction == "mean":
            assert (divisor, further) == (float(weights.sum()), 0)
        else:
            assert (divisor, further) == (1.0, exponent)
    assert float(w[-1]) == size  # the caller's own stay


def test_no_weights_and_no_points(normal):
    Z = normal(3, 2)
    assert scale_weights(None, Z, "mean") == (None, 3.0, 0)
    assert scale_weights(None, Z, "sum") == (None, 1.0, 0)
    weights, divisor, exponent = scale_weights(Z[:0, 0], Z[:0], "sum")
    assert (len(weights), divisor, exponent) == (0, 1.0, 0)


def test_weights_in_a_capture_are_not_looked_at(normal, monkeypatch):
    monkeypatch.setattr(kernel_operator.checks, "readable", lambda value: False)
    w, Z = torch.tensor([1.0, 3.0]), normal(2, 2)
    weights, divisor, exponent = scale_weights(w, Z, "mean")
    assert torch.equal(weights, w)
    assert (float(divisor), exponent) == (4.0, 0)
    assert scale_weights(w, Z, "sum")[1:] == (1.0, 0)


@pytest.mark.parametrize(
    ("op", "method", "own", "halves", "form"),
    [
        ("kernel_matrix", "blocked", True, True, "gradient"),
        ("kernel_matrix", "blocked", False, False, "gradient"),
        ("gradients", "blocked", True, False, "gradient"),
        ("agop", "gradient", True, False, "gradient"),
        ("agop", "gram", True, True, "gram"),
        ("solve", "cg", True, True, "gradient"),
    ],
)
def test_estimated_seconds(op, method, own, halves, form, normal):
    """Operations at the rate of the products that they are, and half of the pairs where their mirror is known."""
    X = normal(30, 4, dtype=torch.float32)
    Z = X if own else normal(20, 4, dtype=torch.float32)
    operator = KernelOperator("agop", Laplace(2.0), X, Z)
    plan, cpu = Plan(op, "torch", method, "", "", 1e12, 0, 1), torch.device("cpu")
    pairs = 30.0 * len(Z) * (0.5 if halves else 1.0)
    assert operator.seconds(plan) == calibration.seconds(1e12, pairs, cpu, form, "float32")
    assert operator.seconds(plan, torch.float32) == operator.seconds(plan)
    wide = operator.seconds(plan, torch.float64, passes=7e6)
    assert wide == pytest.approx(calibration.seconds(1e12, 7e6 * pairs, cpu, form, "float64"))
    assert wide > operator.seconds(plan, torch.float64)
    stored = operator.seconds(plan, stored=True)  # whatever the solver that keeps a matrix is called
    assert stored == calibration.seconds(1e12, pairs, cpu, "gram", "float32")


def test_a_negative_view_of_the_points_is_no_copy_of_them(normal):
    """It has their memory, and other values: the imaginary part of a conjugate."""
    X = torch.complex(normal(9, 3), normal(9, 3, seed=2))
    here, there = X.imag, X.conj().imag
    assert there.is_neg()
    assert torch.equal(there, -here)
    found = fastagop.kernel_matrix(Laplace(2.0), here, there)
    assert torch.equal(found, fastagop.kernel_matrix(Laplace(2.0), here, there.clone()))


def test_points_are_scaled_without_a_lock(normal, monkeypatch):
    """A thread that is stopped while it scales its points, as a fork stops it for ever, keeps no other from its own."""
    inside, leave = threading.Event(), threading.Event()
    scale, X = kernel_operator.scale_points, normal(5, 2)

    def slowly(kernel, *points):
        if kernel == Laplace(3.0):
            inside.set()
            leave.wait()
        return scale(kernel, *points)

    monkeypatch.setattr(kernel_operator, "scale_points", slowly)
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(fastagop.kernel_matrix, Laplace(3.0), X)
        inside.wait()
        try:
            assert pool.submit(fastagop.kernel_matrix, Laplace(2.0), X).result(timeout=20).shape == (5, 5)
        finally:
            leave.set()
        assert waiting.result().shape == (5, 5)


def test_what_is_computed_once_is_kept():
    class Counter:
        calls = 0

        @computed_once
        def value(self):
            """A number."""
            self.calls += 1
            return object()

    counter = Counter()
    assert counter.value is counter.value
    assert counter.calls == 1
    assert Counter.value.__doc__ == "A number."
