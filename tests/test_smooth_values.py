"""The smooth part that the gram form takes out of its weights: what is left is exact, and small where it can be."""

from __future__ import annotations

import pytest
import torch
from fastagop.kernels.torch_backend import low_rank
from fastagop.kernels.torch_backend.distance import dominant_offset

EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("n", [60, 300])  # one block of rows, and two
def test_what_is_left_is_exact(own, rank, n, normal):
    """E is a millionth of W: subtracting in float32 would leave rounding of W, a thousand times what E's own is."""
    P = normal(n, rank, dtype=torch.float32)
    Q = P.clone() if own else normal(n, rank, seed=2, dtype=torch.float32)
    E = 1e-6 * normal(n, n, seed=3)
    W = (P.double() @ Q.double().T + E + E.T).float()
    exact = W.double() - P.double() @ Q.double().T
    if own:
        exact.fill_diagonal_(0.0)
    left = low_rank.LowRank(P, Q, own).subtract_(W.clone())
    assert float((left.double() - exact).abs().max()) <= 4 * EPS * float(exact.abs().max())


def symmetric(normal, values: torch.Tensor) -> torch.Tensor:
    """A symmetric matrix with these eigenvalues."""
    basis = torch.linalg.qr(normal(len(values), len(values))).Q
    return (basis * values) @ basis.T


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_leading_part_keeps_the_signs_of_its_eigenvalues(dtype, normal):
    """Eigenvalues 9, -8, 7, ... above a thousandth: a part of rank 16 leaves 0.3% of the sum of squares.

    Without the signs it leaves 1.6 times all of it, more than there was.
    """
    large = torch.tensor([9.0, -8.0, 7.0, -6.0, 5.0, -4.0, 3.0, -2.0], dtype=torch.float64)
    W = symmetric(normal, torch.cat([large, torch.full((112,), 1e-3, dtype=torch.float64)])).fill_diagonal_(0.0)
    W = W.to(dtype)
    part = low_rank.leading_part(W.clone(), symmetric=True)
    assert part.rank == 16
    total = float(W.double().square().sum())
    assert float(part.residual_column_norms(W).sum()) <= 0.004 * total
    E = W.double() - part.P.double() @ part.Q.double().T
    E.fill_diagonal_(0.0)  # the diagonal of W is free
    assert float(E.square().sum()) <= 0.004 * total
    assert float(part.residual_column_norms(W).sum()) == pytest.approx(float(E.square().sum()), rel=1e-2)


@pytest.mark.parametrize(("share", "taken"), [(0.98, False), (0.995, True)])
def test_when_points_are_centred(share, taken, normal):
    """From 0.99 on: the share of the mean in the points' mean square. Below it centring would round differences."""
    X = normal(500, 4)
    X = X - X.mean(0)
    spread = float(X.square().sum(1).mean())
    offset = torch.zeros(4, dtype=torch.float64)
    offset[1] = (share / (1 - share) * spread) ** 0.5
    found = dominant_offset(X + offset)
    assert (found is not None) == taken
    if taken:
        torch.testing.assert_close(found, offset, rtol=1e-9, atol=1e-9)
