"""Which rows a dtype cannot tell apart: candidates by random projections, then by distances."""

from __future__ import annotations

import numpy as np
import torch

from fastagop.kernels.torch_backend.distance import medians

_ITEMS = 2**16  # of a block of rows, small enough for a cache
_FEW, _PAIRS = 512, 2**22  # rows, and items of all their differences, up to which all pairs are compared at once
_DIRECTIONS = 3  # random projections that rows must agree in before they are compared
_ROUNDS = 8  # representatives tried for every candidate at once; larger crowds are thinned out first
_SAMPLE = 256  # rows that say how far apart points are
_USUAL = 100  # exponent of a float64 number up to which squares of what is far smaller stay in range


def all_apart(X: torch.Tensor) -> bool:
    """Whether it takes little to see that no two rows of X (n, d) are copies; False says nothing."""
    n, d = X.shape
    if n < 2 or d == 0:
        return False
    few = n <= _FEW and n * n * d <= _PAIRS and not X.is_cuda
    return _far_apart(X) if few else _uncrowded(X)


def _far_apart(X: torch.Tensor) -> bool:
    """Whether few rows are so far from each other, by the distances of all pairs, that no two are copies."""
    if not X.any():
        return False
    wide = torch.ldexp(X.double(), -torch.frexp(X.abs().max())[1])
    longest = float(torch.linalg.vector_norm(wide, dim=1).max())
    least = float(torch.pdist(wide.to(X.dtype)).min())  # in float32 ten times as fast, and to a few eps
    return least > 1.001 * _tolerance(X) * longest


def _uncrowded(X: torch.Tensor) -> bool:
    """Whether no two rows agree in their projections, so that none need be compared.

    Within reach is what rounding makes of a row's whole length, which is more than ``leaders`` asks for and, unlike the
    spread of some of the rows, does not depend on the order given.
    """
    place, length = _projected(X, _exponent(X), None)
    return int(np.bincount(_crowds(place, _tolerance(X) * length + _slack(X, length))).max()) == 1


def _tolerance(X: torch.Tensor) -> float:
    """What a dtype's rounding makes of a row, as a share of its size."""
    return (4 + 0.5 * X.shape[1] ** 0.5) * torch.finfo(X.dtype).eps


def slices(X: torch.Tensor) -> list[slice]:
    """Blocks of rows of X that fit into a cache."""
    rows = max(1, _ITEMS // max(1, X.shape[1]))
    return [slice(start, start + rows) for start in range(0, len(X), rows)]


def leaders(U: torch.Tensor) -> np.ndarray:
    """For rows no two of which are equal, the number of the first row that each is within rounding of, or its own."""
    leader = np.arange(len(U))
    if len(U) < 2 or U.shape[1] == 0:
        return leader
    exponent = _exponent(U)
    tolerance, label = _labels(U, exponent)
    rows = np.flatnonzero(np.bincount(label)[label] > 1)
    for turn in range(len(rows)):
        if len(rows) == 0:
            break
        if turn == _ROUNDS:
            rows = _thinned(U, exponent, tolerance, rows, label)
        _, at, inverse = np.unique(label[rows], return_index=True, return_inverse=True)
        head = rows[at[inverse]]  # the first row of each crowd that is left
        near = _distances(U, exponent, rows, head) < np.minimum(tolerance[rows], tolerance[head])
        near[at] = True
        leader[rows[near]] = head[near]
        rows = rows[~near]
    return leader


def _exponent(U: torch.Tensor) -> torch.Tensor | None:
    """That of a unit in which float64 has the squares of rows; None where it has them as they are."""
    if U.dtype == torch.float32:
        return None
    exponent = torch.frexp(U.abs().max())[1]
    return None if abs(int(exponent)) <= _USUAL else exponent


def _wide(U: torch.Tensor, exponent: torch.Tensor | None) -> torch.Tensor:
    """Rows in float64, in a power-of-two unit in which their squares stay in range."""
    return U.double() if exponent is None else torch.ldexp(U.double(), -exponent)


def _labels(U: torch.Tensor, exponent: torch.Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """(distance within which each row's copies lie, a number equal for rows that may be copies), (n,) each."""
    place, length, tolerance = _places(U, exponent)
    return tolerance, _crowds(place, tolerance + _slack(U, length))


def _slack(U: torch.Tensor, length: np.ndarray) -> np.ndarray:
    """What rounding makes of the projections of rows of some length."""
    return 4 * U.shape[1] ** 0.5 * np.finfo(np.float64).eps * length


def _places(U: torch.Tensor, exponent: torch.Tensor | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(projections on random directions (n, 3), lengths (n,), distance within which each row's copies lie (n,)).

    That distance is a few eps of the row's length, or of the cloud's spread if that is less: points beside a large
    offset may differ by little of their length and still be told apart.
    """
    sample = _wide(U[:: -(-len(U) // _SAMPLE)], exponent)
    middle = medians(sample)
    spread = float(torch.linalg.vector_norm(sample - middle, dim=1).median())
    place, length, apart = _projected(U, exponent, middle)
    apart, eps = np.maximum(apart, spread), _tolerance(U)
    one = apart < eps * length  # all points are one to rounding
    return place, length, eps * np.where(one, length, np.minimum(length, apart))


def _projected(U: torch.Tensor, exponent: torch.Tensor | None, middle: torch.Tensor | None) -> tuple[np.ndarray, ...]:
    """(projections on random directions (n, 3), lengths (n,) and, where a middle is given, distances from it (n,))."""
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(U.shape[1], _DIRECTIONS, generator=generator, dtype=torch.float64, device="cpu")
    directions = (directions / torch.linalg.vector_norm(directions, dim=0)).to(U.device)
    found = directions.new_empty(len(U), _DIRECTIONS + 1 + (middle is not None))
    blocks = slices(U)
    room = directions.new_empty(len(U[blocks[0]]), U.shape[1])  # for all: new pages take as long
    for s in blocks:
        wide = room[: len(U[s])].copy_(U[s])
        if exponent is not None:
            wide.copy_(torch.ldexp(wide, -exponent))
        found[s, :_DIRECTIONS] = wide @ directions
        found[s, _DIRECTIONS] = torch.linalg.vector_norm(wide, dim=1)
        if middle is not None:
            found[s, -1] = torch.linalg.vector_norm(wide.sub_(middle), dim=1)
    parts = found.cpu().numpy()
    return parts[:, :_DIRECTIONS], *parts.T[_DIRECTIONS:]


def _crowds(place: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """A number for each row, equal for rows that may be copies: their projections are within reach of each other."""
    order = np.argsort(place[:, 0], kind="stable")
    far = np.maximum.accumulate(place[order, 0] + reach[order])
    label = np.empty(len(place), dtype=np.int64)
    label[order] = np.cumsum(np.append(False, place[order[1:], 0] > far[:-1]))
    for k in range(1, _DIRECTIONS):
        rows = np.flatnonzero(np.bincount(label)[label] > 1)  # few, where rows are apart
        if len(rows) == 0:
            break
        fresh = label.max() + 1
        farthest = np.zeros(fresh)
        np.maximum.at(farthest, label[rows], reach[rows])
        order = rows[np.lexsort((place[rows, k], label[rows]))]
        same = label[order[1:]] == label[order[:-1]]
        near = np.diff(place[order, k]) <= farthest[label[order[1:]]]
        label[order] = fresh + np.cumsum(np.append(False, ~(same & near)))
    return label


def _distances(U: torch.Tensor, exponent: torch.Tensor | None, rows: np.ndarray, heads: np.ndarray) -> np.ndarray:
    """Distances of pairs of rows, float64."""
    found, step = np.empty(len(rows)), max(1, _ITEMS // U.shape[1])
    for start in range(0, len(rows), step):
        i, j = (torch.from_numpy(index[start : start + step]).to(U.device) for index in (rows, heads))
        apart = torch.linalg.vector_norm(_wide(U[i], exponent) - _wide(U[j], exponent), dim=1)
        found[start : start + step] = apart.cpu().numpy()
    return found


def _thinned(U, exponent, tolerance: np.ndarray, rows: np.ndarray, label: np.ndarray) -> np.ndarray:
    """The rows, without those of each crowd that are near no other: crowds of distinct points stop here.

    Squared distances come from products around the crowd's first row, within which differences lose no digits.
    """
    kept = []
    order = rows[np.argsort(label[rows], kind="stable")]
    for crowd in np.split(order, np.flatnonzero(np.diff(label[order])) + 1):
        x = _wide(U[torch.from_numpy(crowd).to(U.device)], exponent)
        x = x - x[:1]
        squares, farthest = x.square().sum(1), torch.from_numpy(tolerance[crowd]).to(U.device)
        slack = 1e-12 * float(squares.max())
        for start in range(0, len(crowd), 256):
            sq = squares[start : start + 256, None] + squares - 2.0 * (x[start : start + 256] @ x.T)
            reach = torch.minimum(farthest[start : start + 256, None], farthest)
            near = (sq <= reach.square() + slack).sum(1) > 1  # itself is one
            kept.append(crowd[start : start + 256][near.cpu().numpy()])
    return np.sort(np.concatenate(kept)) if kept else rows[:0]
