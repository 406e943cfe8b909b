"""Blocks of squared distances and of gradient weights, which every operation of the torch backend goes through."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from ..plan import AIM, budget, fitting_rows, longest_first
from ..profile import Profile
from .distance import (
    FLOAT64_ROWS,
    NEAR_OF_FLOAT32,
    around_mean,
    common_offset,
    float64_pays,
    measured_directly,
    near_chunk,
    norms_from,
    squared_distances,
    squared_norms,
    tile_bytes,
)
from .gradients import Near, Nearness

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
    near: float | None = None,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Blocks of ||Z[i] - X[j]||^2 as (rows of Z, block); a block is overwritten when the next one is asked for.

    Args:
        X, Z: points; ``Z is X`` says that self-pairs exist.
        rows: rows of one block.
        lower: only columns up to the block's own last row (needs Z is X).
        out: (m, n) tensor to write the blocks into; by default one buffer serves all of them.
        starts: first rows of the blocks wanted; default all, those of the lower triangle longest first.
        near: as of ``squared_distances``.
    """
    symmetric, m, n = Z is X, len(Z), len(X)
    wide = InFloat64(X, min(rows, m)) if near is None and float64_pays(X, Z) else None
    x2 = z2 = origin = None
    if wide is None and not measured_directly(min(rows, m) * n, X):
        origin = common_offset(X) if near is None else None
        x2 = norms_from(X, origin)
        z2 = x2 if symmetric else norms_from(Z, origin)
    buffer = X.new_empty(min(rows, m) * n if out is None else 0)
    if starts is None:
        starts = longest_first(m, rows) if lower else range(0, m, rows)
    for start in starts:
        stop = min(m, start + rows)
        width = stop if lower else n
        row, whole = slice(start, stop), stop - start == m and width == n
        if out is not None:
            block = out if whole else out[row, :width]
        else:
            block = buffer[: (stop - start) * width].view(stop - start, width)
        z, x, zz, xx = (Z, X, z2, x2) if whole else (Z[row], X[:width], _part(z2, row), _part(x2, slice(width)))
        if wide is not None:
            wide.squared_distances(z, width, block, start if symmetric else None)
        else:
            squared_distances(z, x, zz, xx, block, start if symmetric else None, near, origin)
        yield row, block


class InFloat64:
    """Squared distances of float32 points by float64 products, which keep what rounding has left of nearly every pair.

    Within the memory that ``tile_bytes`` counts.
    """

    def __init__(self, X: torch.Tensor, rows: int):
        self.x, self.origin = around_mean(X)
        self.x2 = squared_norms(self.x)
        self.buffer = self.x.new_empty(min(rows, FLOAT64_ROWS) * len(X))

    def squared_distances(self, Z: torch.Tensor, width: int, out: torch.Tensor, self_offset: int | None) -> None:
        """Write ||Z[i] - X[j]||^2 of the first so many points into out, (b, width), in out's dtype."""
        x, x2 = self.x[:width], self.x2[:width]
        for start in range(0, len(Z), FLOAT64_ROWS):
            z = Z[start : start + FLOAT64_ROWS].double().sub_(self.origin)
            offset = None if self_offset is None else self_offset + start
            sq = self.buffer[: len(z) * width].view(len(z), width)
            squared_distances(z, x, squared_norms(z), x2, sq, offset, NEAR_OF_FLOAT32)
            out[start : start + FLOAT64_ROWS] = sq


def _part(norms: torch.Tensor | None, row: slice) -> torch.Tensor | None:
    return None if norms is None else norms[row]


def fill_symmetric(out: torch.Tensor, X: torch.Tensor, rows: int, profile_, near: float | None = None) -> torch.Tensor:
    """Write profile_(||X[i] - X[j]||^2) into out: lower blocks are computed and mirrored, symmetric to the bit."""
    for row, block in tiles(X, X, rows, lower=True, out=out, near=near):
        profile_(block)
        square = block[:, row.start :] if row.start else block
        below = square.tril(-1)
        square.tril_().add_(below.T)
        if row.start:
            out[: row.start, row].copy_(block[:, : row.start].T)
    return out


def weights_from_upper_(kernel: Profile, K: torch.Tensor, rows: int = 256) -> torch.Tensor | None:
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


def fit_rows(
    op: str, X: torch.Tensor, Z: torch.Tensor, held: int, step: Callable[[int], int], aim: tuple[int, int] = AIM
) -> tuple[int, int]:
    """(rows of a block, peak bytes) of an operation on tiles of centers X and points Z.

    held: bytes of the result; step: bytes that an operation takes beside a block of that many rows; aim: as of
    ``fitting_rows``.
    """
    n, m, d, size, chunk = len(X), len(Z), X.shape[1], X.element_size(), near_chunk(X.device)

    def bytes_of(rows: int) -> int:
        return held + rows * n * size + max(tile_bytes(rows, n, m, d, size, chunk), step(rows))

    return fitting_rows(bytes_of, budget(None, X.device), max(1, m), op, aim=aim)


def weight_tiles(
    kernel: Profile, X, Z, rows: int, shift, rounded: bool = False
) -> Iterator[tuple[slice, torch.Tensor, Near | None]]:
    """(rows of Z, their weights, their near pairs) block by block.

    shift: what the gradients' product subtracts; rounded: as of ``plan.AgopTask``, which leaves no pair near.
    """
    nearness = None if rounded else Nearness(X, Z, shift)
    for row, block in tiles(X, Z, rows, near=NEAR_OF_FLOAT32 if rounded else None):
        near = None if nearness is None else nearness.among(block, row)
        yield row, kernel.weight_(block), near
