"""The kernels that are not radial that the suites run over, each with its definition. A new kernel is one entry.

``CASES`` is the list. test_families.py, triton_cases.py, test_machine_code.py and test_keops.py take their kernels from
it, on the devices those whose class gives the language. Definitions are differentiated automatically, and go by other
steps than the library's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from fastagop.kernels.profile import Kernel, text
from kernel_cases import case_of

from fastagop import NTK, ArcCosine, Gaussian, Laplace, LpLaplace, Matern52, Polynomial, ProductLaplace


@dataclass(frozen=True)
class PairCase:
    """Kernels of one class by the names of their tests, and what k(x, z) is by definition.

    ``definition(kernel, x, z)`` is of pairs (..., d) in float64, differentiable in z.
    """

    kernels: Mapping[str, Kernel]
    definition: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]
    without: tuple[str, ...] = ()  # kernels of which KeOps compiles nothing, since a sibling says the same


def polynomial(kernel, x, z):
    return (kernel.scale * (x * z).sum(-1) + kernel.offset) ** kernel.degree


def of_differences(kernel, x, z):
    p, q = getattr(kernel, "p", 1.0), getattr(kernel, "q", 1.0)
    ties = x == z  # which have no derivative
    rho = torch.where(ties, 0.0, torch.where(ties, 1.0, x - z).abs() ** p).sum(-1)
    equal = ties.all(-1)
    return torch.where(equal, 1.0, torch.exp(-(torch.where(equal, 1.0, rho) ** (q / p)) / kernel.bandwidth**q))


def acos(cosine):
    """The angle; 0, without a derivative, where vectors are parallel to rounding."""
    same = 1 - cosine < 1e-13
    return torch.where(same, 0.0, torch.acos(torch.where(same, 0.0, cosine)))


def lengths_and_cosine(x, z):
    a, b = torch.linalg.vector_norm(x, dim=-1), torch.linalg.vector_norm(z, dim=-1)
    return a * b, ((x / a[..., None]) * (z / b[..., None])).sum(-1)


def arc_cosine(kernel, x, z):
    lengths, cosine = lengths_and_cosine(x, z)
    theta = acos(cosine)
    s, left = torch.sin(theta), math.pi - theta
    J = (left, s + left * cosine, 3 * s * cosine + left * (1 + 2 * cosine**2))[kernel.order]
    return lengths**kernel.order * J / math.pi


def ntk(kernel, x, z):
    lengths, cosine = lengths_and_cosine(x, z)
    theta, total = acos(cosine), cosine
    for _ in range(kernel.depth):
        value = (torch.sin(theta) + (math.pi - theta) * cosine) / math.pi
        total = total * (math.pi - theta) / math.pi + value
        cosine, theta = value, acos(value)
    return lengths * total


CASES = [
    PairCase({"l1": ProductLaplace(3.0)}, of_differences),
    PairCase(
        {"lp": LpLaplace(1.4, 0.8, 3.0), "lp below 1": LpLaplace(0.7, 0.7, 2.0), "l2": LpLaplace(2.0, 1.3, 2.0)},
        of_differences,
        without=("l2",),
    ),
    PairCase({"polynomial": Polynomial(3, 0.5, 0.2), "linear": Polynomial(1, 0.0)}, polynomial, without=("linear",)),
    PairCase({f"arc-cosine {order}": ArcCosine(order) for order in (0, 1, 2)}, arc_cosine),
    PairCase({"ntk": NTK(1), "deep ntk": NTK(4)}, ntk),
]
COMBINED = {
    "sum": Laplace(3.0) + 0.5 * Polynomial(2),
    "product": Gaussian(2.0) * Polynomial(3, 1.0, 0.3),
    "mixed": ProductLaplace(4.0) * ArcCosine(1) + 2.0 * Matern52(2.0),
}
KERNELS = {name: kernel for case in CASES for name, kernel in case.kernels.items()} | COMBINED


def on(language: str) -> dict[str, Kernel]:
    """The kernels that a device's backend serves, by name: those whose class gives "triton" or "keops"."""
    left_out = {name for case in CASES for name in case.without if language == "keops"}
    return {name: kernel for name, kernel in KERNELS.items() if name not in left_out and text(kernel, language)}


def defined(kernel, x, z):
    """k(x, z) of pairs (..., d), differentiable in z, by its definition."""
    name = type(kernel).__name__
    if name in ("Sum", "Product"):
        a, b = defined(kernel.left, x, z), defined(kernel.right, x, z)
        return a + b if name == "Sum" else a * b
    if name == "Multiple":
        return kernel.factor * defined(kernel.kernel, x, z)
    if kernel.radial:
        sq = ((x - z) ** 2).sum(-1)
        return torch.where(sq == 0, 1.0, case_of(kernel).profile(kernel, torch.where(sq == 0, 1.0, sq).sqrt()))
    for case in CASES:
        if any(type(one) is type(kernel) for one in case.kernels.values()):
            return case.definition(kernel, x, z)
    raise LookupError(f"no entry of CASES in tests/pair_cases.py has a kernel of the class {name}; add one")


def truth(kernel, X, alpha, Z):
    """(kernel matrix, gradients (m, K, d)) by automatic differentiation in float64."""
    x, z = torch.broadcast_tensors(X.cpu().double()[:, None], Z.cpu().double())
    z = z.clone().requires_grad_()
    K = defined(kernel, x, z)
    (slopes,) = torch.autograd.grad(K.sum(), z)
    return K.detach(), torch.einsum("jc,jid->icd", alpha.cpu().double(), slopes)
