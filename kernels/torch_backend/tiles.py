"""Torch backend, any device: kernel matrix, kernel product and gradients, one row block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from ..plan import Plan, budget, fitting_rows, longest_first
from ..radial import Radial
from .distance import squared_distances, squared_norms, tile_bytes
from .gradients import Near, Nearness, block_gradients, dominant_offset, gradient_bytes

# Blocks alive at once while near pairs are measured again: the block, its copy of suspect rows, thresholds, mask.
BLOCKS_ALIVE = 4


def tiles(
    X: torch.Tensor,
    Z: torch.Tensor,
    rows: int,
    *,
    lower: bool = False,
    out: torch.Tensor | None = None,
    starts: Iterable[int] | None = None,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Blocks of ||Z[i] - X[j]||^2 as (rows of Z, block); a block is overwritten when the next one is asked for.

    Args:
        X, Z: points; ``Z is X`` says that self-pairs exist.
        rows: rows of one block.
        lower: only columns up to the block's own last row (needs Z is X).
        out: (m, n) tensor to write the blocks into; by default one buffer serves all of them.
        starts: first rows of the blocks wanted; default all, those of the lower triangle longest first.
    """
    symmetric = Z is X
    x2 = squared_norms(X)
    z2 = x2 if symmetric else squared_norms(Z)
    m, n = len(Z), len(X)
    buffer = X.new_empty(min(rows, m) * n if out is None else 0)
    if starts is None:
        starts = longest_first(m, rows) if lower else range(0, m, rows)
    for start in starts:
        stop = min(m, start + rows)
        width = stop if lower else n
        if out is not None:
            block = out[start:stop, :width]
        else:
            block = buffer[: (stop - start) * width].view(stop - start, width)
        squared_distances(Z[start:stop], X[:width], z2[start:stop], x2[:width], block, start if symmetric else None)
        yield slice(start, stop), block


def fill_symmetric(out: torch.Tensor, X: torch.Tensor, rows: int, profile_) -> torch.Tensor:
    """Write profile_(||X[i] - X[j]||^2) into out: lower blocks are computed and mirrored, symmetric to the bit."""
    for row, block in tiles(X, X, rows, lower=True, out=out):
        profile_(block)
        square = block[:, row.start :]
        square.copy_(square.tril() + square.tril(-1).T)
        out[: row.start, row].copy_(block[:, : row.start].T)
    return out


def weights_from_upper_(kernel: Radial, K: torch.Tensor, rows: int = 256) -> torch.Tensor | None:
    """Turn kernel values in K's strict upper triangle into the full symmetric weights, zero diagonal, in place.

    None where the profile has no closed form for it; K is untouched then.
    """
    if kernel.weight_from_value_(K.new_empty(0)) is None:
        return None
    for start in range(0, len(K), rows):
        stop = min(len(K), start + rows)
        kernel.weight_from_value_(K[start:stop, start:])
        square = K[start:stop, start:stop]
        upper = square.triu(1)  # below it are leftovers of a factorisation
        square.copy_(upper + upper.T)
        K[stop:, start:stop].copy_(K[start:stop, stop:].T)
    return K


def _fit(op: str, X: torch.Tensor, Z: torch.Tensor, held: int, step: Callable[[int], int]) -> tuple[int, int]:
    """(rows of a block, peak bytes) of an operation on tiles of centers X and points Z.

    held: bytes of the result; step: bytes that an operation takes beside a block of that many rows.
    """
    n, m, d, size = len(X), len(Z), X.shape[1], X.element_size()

    def bytes_of(rows: int) -> int:
        return held + rows * n * size + max(tile_bytes(rows, n, m, d, size), step(rows))

    return fitting_rows(bytes_of, budget(None, X.device), max(1, m), op)


def plan_kernel_matrix(X: torch.Tensor, Z: torch.Tensor, out: torch.Tensor | None, why: str, precision: str) -> Plan:
    """The road of kernel_matrix."""
    m, n, d = len(X), len(Z), X.shape[1]
    symmetric = Z is X
    held = 0 if out is not None else m * n * X.element_size()
    rows, peak = _fit("kernel_matrix", Z, X, held, lambda rows: 3 * rows * rows * X.element_size())
    return Plan(
        "kernel_matrix",
        "torch",
        "blocked, half of it and mirrored" if symmetric else "blocked",
        why,
        precision,
        (1.0 if symmetric else 2.0) * m * n * d,
        peak,
        rows,
    )


def kernel_matrix(kernel: Radial, X, Z, out: torch.Tensor | None, plan: Plan, ridge: float = 0.0) -> torch.Tensor:
    """k(X, Z), shape (n, m); + ridge I where Z is X."""
    result = X.new_empty(len(X), len(Z)) if out is None else out
    if Z is X:
        fill_symmetric(result, X, plan.block, kernel.value_).diagonal().add_(ridge)
        return result
    for _, block in tiles(Z, X, plan.block, out=result):
        kernel.value_(block)
    return result


def plan_kernel_matmul(X: torch.Tensor, Z: torch.Tensor, V: torch.Tensor, why: str, precision: str) -> Plan:
    """The road of kernel_matmul."""
    n, m, d, p = len(X), len(Z), X.shape[1], V.shape[1]
    size = X.element_size()
    rows, peak = _fit("kernel_matmul", Z, X, n * p * size, lambda rows: rows * (m + p) * size)
    half = 1.0 if Z is X else 2.0
    return Plan(
        "kernel_matmul",
        "torch",
        "blocked, K never stored",
        why,
        precision,
        half * n * m * d + 2.0 * n * m * p,
        peak,
        rows,
    )


def kernel_matmul(
    kernel: Radial, X: torch.Tensor, Z: torch.Tensor, V: torch.Tensor, plan: Plan, starts: Iterable[int] | None = None
) -> torch.Tensor:
    """k(X, Z) V, shape (n, p); with starts, what these row blocks contribute to it."""
    result = X.new_zeros(len(X), V.shape[1])
    symmetric = Z is X
    for row, block in tiles(Z, X, plan.block, lower=symmetric, starts=starts):
        kernel.value_(block)
        result[row].addmm_(block, V[: block.shape[1]])
        if symmetric:  # the mirrored block serves the rows above
            result[: row.start].addmm_(block[:, : row.start].T, V[row])
    return result


def plan_gradients(X: torch.Tensor, alpha: torch.Tensor, Z: torch.Tensor, why: str, precision: str) -> Plan:
    """The road of gradients."""
    (n, d), K, m = X.shape, alpha.shape[1], len(Z)
    size = X.element_size()

    def step(rows: int) -> int:
        return n * K * size + gradient_bytes(rows, n, d, K, size)

    rows, peak = _fit("gradients", X, Z, m * K * d * size, step)
    return Plan(
        "gradients",
        "torch",
        "blocked",
        why,
        precision,
        2.0 * m * n * d * (K + 1),
        peak,
        rows,
    )


def gradients(kernel: Radial, X: torch.Tensor, alpha: torch.Tensor, Z: torch.Tensor, plan: Plan) -> torch.Tensor:
    """grad f_c(Z[i]), shape (m, K, d)."""
    result = X.new_empty(len(Z), alpha.shape[1], X.shape[1])
    shift = dominant_offset(X)
    for row, W, near in weight_tiles(kernel, X, Z, plan.block, shift):
        block_gradients(W, near, alpha, X, Z[row], shift, result[row])
    return result


def weight_tiles(kernel: Radial, X, Z, rows: int, shift) -> Iterator[tuple[slice, torch.Tensor, Near | None]]:
    """(rows of Z, their weights, their near pairs) block by block; shift: what the gradients' product subtracts."""
    nearness = Nearness(X, Z, shift)
    for row, block in tiles(X, Z, rows):
        near = nearness.among(block, row)
        yield row, kernel.weight_(block), near
