"""Split products of a float32 factor, emulated as tensor cores sum them: as accurate as float32's, and as good for CG.

``triton_cases.py`` has the kernels themselves, in the interpreter, which rounds each sum once; here sums of sixteen
products are cut off at float32's digits, one after the other, as tensor cores are reported to do.
"""

from __future__ import annotations

import pytest
import torch
from fastagop.kernels import reference
from fastagop.kernels.gemm import LIBRARY, PanelProducts

from fastagop import Laplace, datasets
from fastagop.solvers import cg
from fastagop.solvers.symmetric_blocks import SymmetricBlocks

INNER, CHAIN, CUT = 64, 16, (1 << 29) - 1  # of a step of the loop; of an instruction; digits that float32 has not


class Emulated(PanelProducts):
    """Three products of fp16 halves, in float64 with tensor cores' cuts; or only the first one."""

    def __init__(self, parts: int = 3, inner: int = INNER):
        self.parts, self.inner = parts, inner

    def ready(self, A, diagonal=None):
        """(h, l, e) of A = e (h + l / 2048), with e the power of two at the largest entry of a row."""
        e = torch.exp2(torch.floor(torch.log2(A.abs().amax(1, keepdim=True).double())))
        h = (A / e).half().double()
        return h, ((A / e - h) * 2048.0).half().double(), e

    def chained(self, a, b, t=None):
        """A b^T on top of t, cut off after every instruction."""
        t = a.new_zeros(len(a), len(b)) if t is None else t
        for x, z in zip(a.split(CHAIN, 1), b.split(CHAIN, 1), strict=True):
            t = torch.addmm(t, x, z.T)
            t.view(torch.int64).bitwise_and_(~CUT)
        return t

    def product(self, A, B):
        """Large parts are added up outside the instructions; the others, 2048 times smaller, are one chain."""
        acc, cross, (ah, al, e), (bh, bl, f) = torch.zeros(len(A[0]), len(B[0])), None, A, B
        for k in range(0, ah.shape[1], self.inner):
            s = slice(k, k + self.inner)
            acc += self.chained(ah[:, s], bh[:, s]).float()
            if self.parts == 3:
                cross = self.chained(ah[:, s], bl[:, s], self.chained(al[:, s], bh[:, s], cross))
        acc = acc if cross is None else acc + cross.float() / 2048.0
        return acc * e.float() * f.float().T

    def subtract_(self, C, A, B):
        C -= self.product(A if isinstance(A, tuple) else self.ready(A), B)

    def times_triangle_(self, A, T):
        A.copy_(self.product(self.ready(A), T))


def points(name: str) -> torch.Tensor:
    """Digits, or ten classes of a spread, as in late layers."""
    if name == "digits":
        return datasets.load("digits", n=700)[0]
    drawn = torch.Generator().manual_seed(0)
    centres = torch.randn(10, 48, generator=drawn)[torch.arange(700) % 10]
    return centres + float(name) * torch.randn(700, 48, generator=drawn)


def factored(K: torch.Tensor, products: PanelProducts) -> tuple[float, float, int]:
    """(error of the float32 factor F, ||L^-1 F F^T L^-T - I||, steps of conjugate gradients on it to 1e-10)."""
    blocks = SymmetricBlocks(len(K), torch.float32, rows=128)
    blocks.fill_(lambda out, start: out.copy_(K[start : start + len(out), : out.shape[1]]))
    assert blocks.cholesky_(K.diagonal(), products) == 0
    L, Y = torch.linalg.cholesky(K), torch.randn(len(K), 3, generator=torch.Generator().manual_seed(1)).double()
    F = blocks.full().tril().double()
    apart = torch.linalg.solve_triangular(L, F, upper=False)
    apart = torch.linalg.matrix_norm(apart @ apart.T - torch.eye(len(K)), 2)
    options = cg.ConjugateGradients(tolerance=1e-10, max_iterations=60)
    done = cg.conjugate_gradients(lambda V: K @ V, Y, lambda R: blocks.solve(R.float()).double(), options)
    assert done.residual <= 1e-9
    return float((F - L).norm() / L.norm()), float(apart), done.iterations


@pytest.mark.parametrize("name", ["digits", "1", "1e-2", "1e-3"])
def test_split_products_are_as_good_as_float32s(name):
    K = reference.kernel_matrix(Laplace(8.0), points(name))
    library, split = (factored(K, products) for products in (LIBRARY, Emulated()))
    assert split[0] <= 2.0 * library[0]
    assert split[1] <= 1.25 * library[1]  # what steps of conjugate gradients shrink residuals by
    assert split[2] <= library[2] + 1  # one may end just above the tolerance


def test_what_the_emulation_would_find():
    """One fp16 product loses four digits and takes more steps; one chain along the whole factor loses one digit."""
    K = reference.kernel_matrix(Laplace(8.0), points("digits"))
    library, one = (factored(K, products) for products in (LIBRARY, Emulated(parts=1)))
    assert one[0] > 20.0 * library[0]
    assert one[1] > 20.0 * library[1]
    assert one[2] > library[2] + 1
    long = torch.rand(8, 50_000, generator=torch.Generator().manual_seed(2))
    truth = long.double() @ long.double().T
    steps, chain = (
        float((how.product(how.ready(long), how.ready(long)) - truth).norm() / truth.norm())
        for how in (Emulated(), Emulated(inner=50_000))
    )
    assert steps <= 4 * torch.finfo(torch.float32).eps
    assert chain > 10.0 * steps
