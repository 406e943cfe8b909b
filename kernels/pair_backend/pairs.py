"""What the operations ask of a kernel that is not radial: blocks of values, and blocks of gradients.

A rotation-invariant kernel's gradient is sum_j alpha_jc (u_ij x_j + v_ij z_i): a radial kernel's with u = w, v = -w, a
dot product's with u = kappa'(x.z), v = 0. This is the one home of those sums, in the form that loses no digits:

    sum_j alpha_jc (u_ij x_j + v_ij z_i + w_ij (x_j - z_i)),

whose last part goes by differences, near pairs and all, as the radial kernels' do.
"""

from __future__ import annotations

import torch

from ..gemm import matmul_nt
from ..profile import Kernel
from ..torch_backend.gradients import Near, block_gradients


class Pairs:
    """A kernel at centers X (n, d) and evaluation points Z (m, d), X itself where they are the same; block by block.

    Points come in the dtype that the kernel computes in. What is precomputed of them takes O((n + m) d).
    """

    def __init__(self, X: torch.Tensor, Z: torch.Tensor):
        self.X, self.Z = X, Z
        self.symmetric: bool = Z is X

    def values(self, row: slice, width: int | None = None) -> torch.Tensor:
        """k(Z[row], X[:width]), a block (b, width) that the caller may overwrite."""
        raise NotImplementedError

    def add_gradients(self, row: slice, factor: torch.Tensor | None, alpha: torch.Tensor, out: torch.Tensor) -> None:
        """out[i, c] += sum_j factor_ij alpha_jc grad_z k(z_i, x_j) for the points Z[row]; out is (b, K, d).

        ``factor`` (b, n) of any sign, default 1, is what products of kernels need; it stays as it is.
        """
        raise NotImplementedError

    def combination(self, row: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(u, v) of grad_z k(z_i, x_j) = u_ij x_j + v_ij z_i, blocks (b, n) of the caller's; None where v = 0.

        Only for kernels with the AGOP's form "gram".
        """
        raise NotImplementedError


class PairKernel(Kernel):
    """A kernel that is not radial: it says how its pairs are computed."""

    def pairs(self, X: torch.Tensor, Z: torch.Tensor) -> Pairs:
        """The kernel at centers X and evaluation points Z."""
        raise self._lacks("pairs(X, Z)")

    def diagonal(self, X: torch.Tensor) -> torch.Tensor:
        """k(x, x) of each point (n,)."""
        return X.new_ones(len(X))

    def blocks_alive(self) -> int:
        """Blocks (b, n) that exist at once beside the result, at most: memory is planned by it."""
        return 10


def add_combination(
    u: torch.Tensor,
    v: torch.Tensor | None,
    alpha: torch.Tensor,
    X: torch.Tensor,
    Z: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """out[i, c] += sum_j alpha_jc (u_ij x_j + v_ij z_i): u, v are (b, n), Z the block's points, out (b, K, d)."""
    K, d = alpha.shape[1], X.shape[1]
    if d <= len(u):  # alpha is applied to the centers, which are the smaller factor, for a few outputs at once
        step = max(1, len(u) // d)
        for some in range(0, K, step):
            right = (alpha.T[some : some + step, None] * X.T).flatten(0, 1)
            out[:, some : some + step] += matmul_nt(u, right).view(len(u), -1, d)
    else:
        scaled = torch.empty_like(u)
        for c in range(K):
            out[:, c] += torch.mul(u, alpha[:, c], out=scaled) @ X
    if v is not None:
        out.addcmul_((v @ alpha)[:, :, None], Z[:, None])


def add_differences(
    w: torch.Tensor,
    near: Near | None,
    alpha: torch.Tensor,
    X: torch.Tensor,
    Z: torch.Tensor,
    out: torch.Tensor,
    shift: torch.Tensor | None = None,
) -> None:
    """out[i, c] += sum_j w_ij alpha_jc (x_j - z_i), w (b, n) is used up; near pairs as ``Nearness`` finds them."""
    out += block_gradients(w, near, alpha, X, Z, shift, torch.empty_like(out))
