"""What people use today: compositions of torch calls, torch.func, xrfm, and KeOps by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.func import jacrev, vmap

import fastagop
from bench.problems import LAYERS, Problem

Predictor = Callable[[torch.Tensor], Any]


def profile(kernel, r: torch.Tensor) -> torch.Tensor:
    """k from distances."""
    L = kernel.bandwidth
    return torch.exp(-r / L) if isinstance(kernel, fastagop.Laplace) else torch.exp(-r.square() / (2 * L * L))


def weight(kernel, r: torch.Tensor) -> torch.Tensor:
    """Gradient weight from distances, zero on the diagonal, where r is infinite."""
    L, value = kernel.bandwidth, profile(kernel, r)
    return value / (L * r) if isinstance(kernel, fastagop.Laplace) else value / (L * L)


def kernel_matrix(X: torch.Tensor, kernel) -> torch.Tensor:
    """Kernel matrix by cdist."""
    return profile(kernel, torch.cdist(X, X))


def gradients(X: torch.Tensor, A: torch.Tensor, kernel, rows: torch.Tensor | slice = slice(None)) -> torch.Tensor:
    """Gradients at (some of) the points: cdist, weights, one product for all outputs."""
    Z, d = X[rows], X.shape[1]
    exact = X.dtype == torch.float64  # then this is the truth
    r = torch.cdist(Z, X, compute_mode=f"{'donot_' if exact else ''}use_mm_for_euclid_dist")
    diagonal = torch.arange(len(X), device=X.device)[rows]
    r[torch.arange(len(Z), device=X.device), diagonal] = torch.inf
    W = weight(kernel, r)
    del r
    right = (A[:, :, None] * X[:, None, :]).reshape(len(X), -1)
    return (W @ right).view(len(Z), -1, d) - (W @ A)[:, :, None] * Z[:, None, :]


def composition(X: torch.Tensor, A: torch.Tensor, kernel) -> torch.Tensor:
    """AGOP as one writes it by hand: gradients, and one product for M."""
    G = gradients(X, A, kernel).reshape(-1, X.shape[1])
    return G.T @ G


def solve(X: torch.Tensor, Y: torch.Tensor, kernel, ridge: float) -> torch.Tensor:
    """Coefficients by the library's dense solver."""
    K = kernel_matrix(X, kernel)
    K.diagonal().add_(ridge)
    return torch.linalg.solve(K, Y)


def layer(X: torch.Tensor, y: torch.Tensor, kernel, ridge: float) -> torch.Tensor:
    """A layer of Deep RFM by hand, in X's dtype; returns M divided by its largest entry."""
    X = torch.nn.functional.normalize(X)
    Y = 2.0 * torch.nn.functional.one_hot(y).to(X) - 1.0
    M = composition(X, solve(X, Y, kernel, ridge), kernel)
    M = M / M.max()
    values, vectors = torch.linalg.eigh(M)
    root = vectors * values.clamp(min=0.0).sqrt() @ vectors.T
    torch.relu(X @ root @ torch.randn(X.shape[1], min(1024, X.shape[1]), dtype=X.dtype, device=X.device))
    return M


def _xrfm_kernel(L: float):
    from xrfm.rfm_src.kernels import LaplaceKernel  # pyright: ignore[reportMissingImports]

    return LaplaceKernel(bandwidth=L, exponent=1.0)


def xrfm_agop(X: torch.Tensor, A: torch.Tensor, L: float) -> torch.Tensor:
    """xrfm.rfm_src.kernels.LaplaceKernel.get_agop."""
    return _xrfm_kernel(L).get_agop(X, X, A.T.contiguous())


def xrfm_l1_agop(X: torch.Tensor, A: torch.Tensor, L: float) -> torch.Tensor:
    """xrfm.rfm_src.kernels.ProductLaplaceKernel.get_agop, which adds gradients of several outputs before it squares."""
    from xrfm.rfm_src.kernels import ProductLaplaceKernel  # pyright: ignore[reportMissingImports]

    return ProductLaplaceKernel(bandwidth=L, exponent=1.0).get_agop(X, X, A.T.contiguous())


def l1_agop(X: torch.Tensor, A: torch.Tensor, L: float) -> torch.Tensor:
    """Of exp(-||x - z||_1 / L) from all differences, a block of points at a time."""
    M = X.new_zeros(X.shape[1], X.shape[1])
    for Z in X.split(32):
        apart = X[None] - Z[:, None]
        W = (apart.abs().sum(2) / -L).exp() / L
        G = torch.einsum("zj,jc,zjd->zcd", W, A, apart.sign()).flatten(0, 1)
        M += G.T @ G
    return M


def xrfm_kernel_matrix(X: torch.Tensor, _: torch.Tensor, L: float) -> torch.Tensor:
    """xrfm.rfm_src.kernels.LaplaceKernel.get_kernel_matrix."""
    return _xrfm_kernel(L).get_kernel_matrix(X, X)


def xrfm_solve(X: torch.Tensor, Y: torch.Tensor, L: float) -> torch.Tensor:
    """xrfm's RFM.fit_predictor_lstsq with its default solver, LU, and no ridge."""
    from xrfm.rfm_src.recursive_feature_machine import RFM  # pyright: ignore[reportMissingImports]

    model = RFM(kernel=_xrfm_kernel(L), device="cpu", verbose=False)
    model.reg = 0.0
    return model.fit_predictor_lstsq(X, Y)


def xrfm_rfm(X: torch.Tensor, Y: torch.Tensor, L: float, ridge: float, iterations: int) -> Predictor:
    """xrfm's RFM, every iteration done and the last one kept: its validation sees one row."""
    from xrfm.rfm_src.recursive_feature_machine import RFM  # pyright: ignore[reportMissingImports]

    model = RFM(kernel=_xrfm_kernel(L), iters=iterations, device="cpu", verbose=False)
    options = {"reg": ridge, "return_best_params": False, "early_stop_rfm": False}
    model.fit((X, Y), (X[:1], Y[:1]), **options)
    return model.predict


def authors_rfm(X: torch.Tensor, Y: torch.Tensor, L: float, ridge: float, iterations: int) -> Predictor:
    """The update of the RFM authors' code: as ``composition_rfm``, but its AGOP makes kernel and distances anew."""
    return composition_rfm(X, Y, L, ridge, iterations, anew=True)


def composition_rfm(
    X: torch.Tensor, Y: torch.Tensor, L: float, ridge: float, iterations: int, anew: bool = False
) -> Predictor:
    """An RFM in X's dtype by the authors' formulas: distances by M itself, gradients through X M, M over its maximum.

    In float64 this is the truth: there a point's distance to itself is zero and not what products leave of it.
    """
    M = torch.eye(X.shape[1], dtype=X.dtype)
    for _ in range(iterations):
        r, K, alpha = _metric_machine(X, Y, L, ridge, M)
        if anew:
            K, r = torch.exp(-_metric_distances(X, X, M) / L), _metric_distances(X, X, M)
        M = _metric_agop(X, alpha, torch.where(r < 1e-10, 0.0, K / r), M) / L**2
        M /= M.max()
    alpha = _metric_machine(X, Y, L, ridge, M)[2]
    return lambda Z: torch.exp(-_metric_distances(Z, X, M) / L) @ alpha


def _metric_machine(X: torch.Tensor, Y: torch.Tensor, L: float, ridge: float, M: torch.Tensor):
    """(distances, kernel matrix, coefficients) of kernel ridge regression in the metric M."""
    r = _metric_distances(X, X, M)
    if X.dtype == torch.float64:
        r.fill_diagonal_(0.0)
    K = torch.exp(-r / L)
    A = K.clone()
    A.diagonal().add_(ridge)
    return r, K, torch.linalg.solve(A, Y)


def _metric_agop(X: torch.Tensor, alpha: torch.Tensor, W: torch.Tensor, M: torch.Tensor) -> torch.Tensor:
    """Sum of outer products of the gradients at the points, W being kernel over distance."""
    (n, d), XM = X.shape, X @ M
    right = (alpha[:, :, None] * XM[:, None, :]).reshape(n, -1)
    G = ((W @ right).view(n, -1, d) - (W @ alpha)[:, :, None] * XM[:, None, :]).reshape(-1, d)
    return G.T @ G


def _metric_distances(Z: torch.Tensor, X: torch.Tensor, M: torch.Tensor) -> torch.Tensor:
    ZM = Z @ M
    squares = (ZM * Z).sum(1)[:, None] + ((X @ M) * X).sum(1) - 2.0 * ZM @ X.T
    return squares.clamp_(min=0.0).sqrt_()


def lazy_gradients(X: torch.Tensor, A: torch.Tensor, kernel) -> torch.Tensor:
    """Gradients at the points by KeOps and autograd, one output at a time."""
    from pykeops.torch import LazyTensor

    Z = X.clone().requires_grad_(True)
    squares = ((LazyTensor(Z[:, None, :]) - LazyTensor(X[None, :, :])) ** 2).sum(-1)
    laplace, L = isinstance(kernel, fastagop.Laplace), kernel.bandwidth
    K = (-squares.sqrt() / L).exp() if laplace else (-squares / (2 * L * L)).exp()
    columns = [torch.autograd.grad((K @ a[:, None]).sum(), Z, retain_graph=False)[0] for a in A.T.contiguous()]
    return torch.stack(columns, 1)


def jacobians(problem: Problem, chunk: int | None = None) -> dict[str, torch.Tensor]:
    """vmap(jacrev) of the rest of a network at every layer, and one product for its AGOP.

    In chunks of samples it still holds the layer's whole Jacobian in the end.
    """
    model, X, found = problem.model, problem.X, {}
    with torch.no_grad():
        for i, name in enumerate(LAYERS):
            J = vmap(jacrev(model[2 * i :]), chunk_size=chunk)(X).reshape(-1, X.shape[1])
            found[name] = J.T @ J / len(X)
            X = model[2 * i : 2 * i + 2](X)
    return found
