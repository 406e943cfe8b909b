"""Plain float64 truth, for tests and accuracy columns; shares no code with the backends.

Everything is written from the definitions: direct differences for distances, the gradient of each kernel spelled
out, sums over pairs. Memory O(m n d): small problems only.
"""

from __future__ import annotations

import numpy as np
import torch


def _float64(*tensors: torch.Tensor) -> tuple[np.ndarray, ...]:
    return tuple(t.detach().cpu().numpy().astype(np.float64) for t in tensors)


def _differences(X: np.ndarray, Z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    difference = X[None, :, :] - Z[:, None, :]  # (m, n, d): x_j - z_i
    return difference, np.sqrt((difference**2).sum(-1))


def profile(kernel, r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """k and dk/dr (any number where it does not exist), from the kernel's name and parameters only."""
    L, name = kernel.bandwidth, type(kernel).__name__
    if name == "Laplace":
        k = np.exp(-r / L)
        return k, -k / L
    if name == "Gaussian":
        k = np.exp(-(r**2) / (2 * L**2))
        return k, -k * r / L**2
    if name == "GeneralisedLaplace":
        p, safe = kernel.exponent, np.where(r > 0, r, 1.0)
        k = np.exp(-((r / L) ** p))
        return k, -p * safe ** (p - 1) / L**p * k
    if name == "Matern52":
        a = np.sqrt(5.0) / L
        k = (1 + a * r + 5 * r**2 / (3 * L**2)) * np.exp(-a * r)
        return k, (a + 10 * r / (3 * L**2)) * np.exp(-a * r) - a * k
    raise ValueError(f"the reference knows no kernel {name!r}")


def kernel_matrix(kernel, X: torch.Tensor, Z: torch.Tensor | None = None) -> torch.Tensor:
    """k(X, Z), shape (n, m), float64."""
    x, z = _float64(X, X if Z is None else Z)
    _, r = _differences(z, x)
    return torch.from_numpy(profile(kernel, r)[0])


def kernel_matmul(kernel, X: torch.Tensor, Z: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
    """k(X, Z) V, shape (n, p), float64."""
    return kernel_matrix(kernel, X, Z) @ V.detach().cpu().double()


def gradients(kernel, X: torch.Tensor, alpha: torch.Tensor, Z: torch.Tensor | None = None) -> torch.Tensor:
    """grad f_c(Z[i]) with f_c(z) = sum_j alpha[j, c] k(z, X[j]), shape (m, K, d), float64."""
    x, a, z = _float64(X, alpha, X if Z is None else Z)
    out = np.zeros((len(z), a.shape[1], x.shape[1]))
    for i in range(len(z)):  # one evaluation point at a time keeps memory at n d
        difference, r = _differences(x, z[i : i + 1])
        slope = profile(kernel, r)[1][0]
        r = r[0]
        # d/dz r = (z - x) / r, and zero by definition where r = 0
        factor = np.divide(-slope, r, out=np.zeros_like(r), where=r > 0)
        out[i] = (a * factor[:, None]).T @ difference[0]
    return torch.from_numpy(out)


def agop(
    kernel,
    X: torch.Tensor,
    alpha: torch.Tensor,
    Z: torch.Tensor | None = None,
    *,
    reduction="mean",
    center=False,
) -> torch.Tensor:
    """Average gradient outer product, shape (d, d), float64."""
    g = gradients(kernel, X, alpha, Z).numpy()
    if center:
        g = g - g.mean(0, keepdims=True)
    M = np.einsum("icd,ice->de", g, g, optimize=True)
    return torch.from_numpy(M / len(g) if reduction == "mean" else M)
