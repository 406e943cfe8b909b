"""What float32 costs the AGOP of a fit, as seen at a few of its points, half of them those of largest coefficients."""

from __future__ import annotations

import torch

from fastagop.kernels.gemm import random_signs
from fastagop.kernels.operations import gradients
from fastagop.kernels.profile import Kernel, Profile
from fastagop.kernels.torch_backend import smooth, tiles
from fastagop.kernels.torch_backend.products import differences_at_few

LIMIT = 2e-6  # of the gradients: M is off by twice that, and float32 sums cost some more; 1e-5 is promised
_LOSS = 8e-6  # of M at these points, sums and all; the errors of all points have no direction in common
_POINTS = 8


def _telling(alpha: torch.Tensor, weights: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(numbers of the points that tell, the two sums of the outputs (K, 2) that stand for all of them)."""
    (n, K), points = alpha.shape, min(len(alpha), _POINTS)
    size = alpha.abs().amax(1) * (1.0 if weights is None else weights.sqrt())
    index = torch.cat([torch.arange(points, device=alpha.device) * n // points, size.topk(points)[1]])
    signs = random_signs(K, 2, alpha) if K > 2 else torch.eye(K, dtype=alpha.dtype, device=alpha.device)
    return index, signs


def costs(kernel: Kernel, X: torch.Tensor, alpha: torch.Tensor, center: bool, weights) -> bool:
    """Whether rounding coefficients and weights to X's dtype costs the gradients too much, at a few of the points.

    Half of these points have the largest coefficients: there the gradients of nearly singular problems are largest.
    Two random sums of the outputs stand for all of them.
    """
    if alpha.shape[1] == 0:
        return False
    index, signs = _telling(alpha, weights)
    x, root = X.double(), 1.0 if weights is None else weights[index].sqrt()[:, None]
    if not isinstance(kernel, Profile):
        pair = (gradients(kernel, x, a @ signs, x[index]) for a in (alpha, alpha.to(X.dtype).double()))
        exact, rounded = (g if weights is None else g * weights[index].sqrt()[:, None, None] for g in pair)
        exact, rounded = (g - g.mean(0) for g in (exact, rounded)) if center else (exact, rounded)
        return float((exact - rounded).square().sum()) > LIMIT * LIMIT * float(exact.square().sum())
    z, W = x[index], torch.cat([kernel.weight_(tile) for _, tile in tiles.tiles(x, x[index], len(index))])
    both, total, lost = (alpha @ signs, alpha.to(X.dtype).double() @ signs), 0.0, 0.0
    # This is ``products.differences_product`` by output: the weights of a pair are rounded apart from its coefficients.
    for exact, rounded in zip(both[0].T, both[1].T, strict=True):
        terms = W * exact
        apart = (W.to(X.dtype).double() * rounded).sub_(terms)
        g, change = ((part @ x - part.sum(1, keepdim=True) * z) * root for part in (terms, apart))
        g = g - g.mean(0) if center else g
        total, lost = total + float(g.square().sum()), lost + float(change.square().sum())
    return lost > LIMIT * LIMIT * total


def loss_of(found: torch.Tensor, exact: torch.Tensor) -> float:
    """What errors of gradients (p, K, d) cost the AGOP of their points, of its size."""
    found, exact = (part.double().reshape(-1, part.shape[2]) for part in (found, exact))
    M = exact.T @ exact
    size = float(torch.linalg.matrix_norm(M))
    return float(torch.linalg.matrix_norm(found.T @ found - M)) / size if size > 0 else float("inf")


def line_of(kernel: Kernel, X: torch.Tensor, alpha: torch.Tensor, center: bool, weights) -> smooth.Line | None:
    """The line beside which float32 products of float64 coefficients lose little of M; None where there is none."""
    if not isinstance(kernel, Profile) or alpha.shape[1] == 0 or (line := smooth.Line.of(kernel, X)) is None:
        return None
    index, signs = _telling(alpha, weights)
    x, sums = X.double(), alpha @ signs
    z, W = x[index], torch.cat([kernel.weight_(tile) for _, tile in tiles.tiles(x, x[index], len(index))])
    pair = [smooth.gradients(line, X, sums, X[index]), differences_at_few(W, sums, x, z)]
    if weights is not None:
        pair = [g * weights[index].sqrt()[:, None, None] for g in pair]
    found, exact = (g - g.mean(0) if center else g for g in pair)
    return line if loss_of(found, exact) <= _LOSS else None
