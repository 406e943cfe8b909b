"""Kernels that are not radial, against automatic differentiation of their definitions in float64."""

from __future__ import annotations

import math

import pytest
import torch

import fastagop
from fastagop import NTK, ArcCosine, Gaussian, Laplace, LpLaplace, Matern52, Polynomial, ProductLaplace

KERNELS = {
    "l1": ProductLaplace(3.0),
    "lp": LpLaplace(1.4, 0.8, 3.0),
    "lp below 1": LpLaplace(0.7, 0.7, 2.0),
    "l2": LpLaplace(2.0, 1.3, 2.0),
    "polynomial": Polynomial(3, 0.5, 0.2),
    "linear": Polynomial(1, 0.0),
    "arc-cosine 0": ArcCosine(0),
    "arc-cosine 1": ArcCosine(1),
    "arc-cosine 2": ArcCosine(2),
    "ntk": NTK(1),
    "deep ntk": NTK(4),
    "sum": Laplace(3.0) + 0.5 * Polynomial(2),
    "product": Gaussian(2.0) * Polynomial(3, 1.0, 0.3),
    "mixed": ProductLaplace(4.0) * ArcCosine(1) + 2.0 * Matern52(2.0),
}
kernels = pytest.mark.parametrize("kernel", KERNELS.values(), ids=list(KERNELS))
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
# float32 points are exact in float64: what is left is the rounding of results, and of l1's sums.
CLOSE = {torch.float32: 1e-5, torch.float64: 1e-12}


def acos(cosine):
    """The angle; 0, without a derivative, where vectors are parallel to rounding."""
    same = 1 - cosine < 1e-13
    return torch.where(same, 0.0, torch.acos(torch.where(same, 0.0, cosine)))


def defined(kernel, x, z):
    """k(x, z) of pairs (..., d), differentiable in z, by its definition and by other steps than the library's."""
    name = type(kernel).__name__
    if name in ("Sum", "Product"):
        a, b = defined(kernel.left, x, z), defined(kernel.right, x, z)
        return a + b if name == "Sum" else a * b
    if name == "Multiple":
        return kernel.factor * defined(kernel.kernel, x, z)
    if name == "Polynomial":
        return (kernel.scale * (x * z).sum(-1) + kernel.offset) ** kernel.degree
    if name in ("ProductLaplace", "LpLaplace"):
        p, q = (1.0, 1.0) if name == "ProductLaplace" else (kernel.p, kernel.q)
        ties = x == z  # which have no derivative
        rho = torch.where(ties, 0.0, torch.where(ties, 1.0, x - z).abs() ** p).sum(-1)
        equal = ties.all(-1)
        return torch.where(equal, 1.0, torch.exp(-(torch.where(equal, 1.0, rho) ** (q / p)) / kernel.bandwidth**q))
    if name in ("Laplace", "Gaussian", "Matern52"):
        sq = ((x - z) ** 2).sum(-1)
        r = torch.where(sq == 0, 1.0, sq).sqrt() / kernel.bandwidth
        s = math.sqrt(5.0) * r
        each = {"Laplace": torch.exp(-r), "Gaussian": torch.exp(-r * r / 2)}
        return torch.where(sq == 0, 1.0, each.get(name, (1 + s + s * s / 3) * torch.exp(-s)))
    a, b = torch.linalg.vector_norm(x, dim=-1), torch.linalg.vector_norm(z, dim=-1)
    cosine = ((x / a[..., None]) * (z / b[..., None])).sum(-1)
    theta = acos(cosine)
    if name == "ArcCosine":
        s, left = torch.sin(theta), math.pi - theta
        J = (left, s + left * cosine, 3 * s * cosine + left * (1 + 2 * cosine**2))[kernel.order]
        return (a * b) ** kernel.order * J / math.pi
    total = cosine
    for _ in range(kernel.depth):
        value = (torch.sin(theta) + (math.pi - theta) * cosine) / math.pi
        total = total * (math.pi - theta) / math.pi + value
        cosine, theta = value, acos(value)
    return a * b * total


def truth(kernel, X, alpha, Z):
    """(kernel matrix, gradients (m, K, d)) by automatic differentiation in float64."""
    x, z = torch.broadcast_tensors(X.double()[:, None], Z.double())
    z = z.clone().requires_grad_()
    K = defined(kernel, x, z)
    (slopes,) = torch.autograd.grad(K.sum(), z)
    return K.detach(), torch.einsum("jc,jid->icd", alpha.double(), slopes)


def apart(found, true):
    return float((found.double() - true).norm() / true.norm())


@pytest.fixture(scope="module")
def data():
    """Points with ties in a feature and a multiple of another point, coefficients of both signs, other points."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(14, 6, generator=generator)
    X[3, :2] = X[5, :2]
    X[7] = X[2]  # a duplicate
    X[9] = 2.0 * X[4]  # parallel
    return X, torch.randn(14, 3, generator=generator), torch.randn(8, 6, generator=generator)


@kernels
@dtypes
@pytest.mark.parametrize("other", [False, True], ids=["X", "Z"])
def test_against_autograd(kernel, dtype, other, data):
    X, alpha, Z = (t.to(dtype) for t in data)
    Z = Z if other else X
    K, g = truth(kernel, X, alpha, Z)
    close, given = CLOSE[dtype], Z if other else None
    found = fastagop.kernel_matrix(kernel, X, given)
    assert found.dtype == dtype
    assert apart(found, K) <= close
    assert torch.equal(found, kernel(X, given))
    V = alpha[: len(Z)]
    assert apart(fastagop.kernel_matmul(kernel, X, given, V=V), K @ V.double()) <= close
    assert apart(fastagop.gradients(kernel, X, alpha, given), g) <= close
    M = torch.einsum("icd,ice->de", g, g)
    assert apart(fastagop.agop(kernel, X, alpha, given, reduction="sum"), M) <= 2 * close
    weights = torch.arange(1.0, len(Z) + 1, dtype=dtype)
    weighted = torch.einsum("i,icd,ice->de", weights.double(), g, g) / float(weights.sum())
    assert apart(fastagop.agop(kernel, X, alpha, given, sample_weight=weights), weighted) <= 2 * close
    centred = g - g.mean(0)
    if float(centred.norm()) > 1e-6 * float(g.norm()):
        M = torch.einsum("icd,ice->de", centred, centred) / len(Z)
        assert apart(fastagop.agop(kernel, X, alpha, given, center=True), M) <= 2 * close
