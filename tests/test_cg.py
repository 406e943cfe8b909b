"""solve(method="cg"): the same solution as a factorisation, without the matrix, and honest where it cannot be had."""

from __future__ import annotations

import dataclasses

import pytest
import scipy.linalg
import scipy.sparse.linalg
import torch
from fastagop.kernels import reference

import fastagop
from fastagop import ConjugateGradients, Gaussian, Laplace

EPS = 2.0**-52
TIGHT = ConjugateGradients(tolerance=1e-11)
RANKS = [0, 7, 60, None]  # none; less than a proposal block; a good share of the spectrum; the default
kernels = pytest.mark.parametrize("kernel", [Laplace(2.0), Gaussian(1.0)], ids=repr)


def system(kernel, X, ridge):
    """k(X, X) + ridge I of the reference."""
    K = reference.kernel_matrix(kernel, X)
    K.diagonal().add_(ridge)
    return K


def residual(A, alpha, Y):
    return float(torch.linalg.vector_norm(A @ alpha.double() - Y.double()) / torch.linalg.vector_norm(Y.double()))


@kernels
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_dense_solution(kernel, rank, ridge, cloud, normal, relative):
    """alpha and the predictions at new points agree with scipy's dense solve to the residual times the condition."""
    X, Y, Z = cloud("spread", n=300), normal(300, 4), cloud("spread", n=50, seed=3)
    A = system(kernel, X, ridge)
    exact = torch.from_numpy(scipy.linalg.solve(A.numpy(), Y.numpy(), assume_a="pos"))
    values = torch.linalg.eigvalsh(A)
    solution = fastagop.solve(kernel, X, Y, ridge=ridge, method=dataclasses.replace(TIGHT, rank=rank))
    assert solution.method == "cg"
    assert solution.stopped == ""
    assert solution.jitter == 0
    assert solution.iterations >= 1
    assert solution.residual <= TIGHT.tolerance
    assert abs(solution.residual - residual(A, solution.alpha, Y)) <= 64 * EPS * float(values[-1] / values[0])
    bound = 2 * TIGHT.tolerance * float(values[-1] / values[0])
    assert relative(solution.alpha, exact) <= bound
    K = reference.kernel_matrix(kernel, Z, X)
    assert relative(K @ solution.alpha, K @ exact) <= bound


def test_preconditioner_pays(cloud, targets):
    """More rank, fewer steps; and without one, as many as scipy's conjugate gradients take."""
    X, Y = cloud("collapsed 1", n=400), targets(400)
    steps = []
    for rank in (0, 20, 100, 300):
        solution = fastagop.solve(Gaussian(1.0), X, Y, ridge=1e-3, method=ConjugateGradients(rank=rank))
        assert solution.rank == rank
        steps.append(solution.iterations)
    assert steps == sorted(steps, reverse=True)
    assert steps[2] <= steps[0] / 2
    count = 0

    def tick(_):
        nonlocal count
        count += 1

    A = system(Gaussian(1.0), X, 1e-3).numpy()
    slowest = 0
    for y in Y.numpy().T:
        count = 0
        scipy.sparse.linalg.cg(A, y, rtol=1e-6, atol=0.0, maxiter=1000, callback=tick)
        slowest = max(slowest, count)
    assert abs(steps[0] - slowest) <= 0.05 * slowest + 1
