"""Squared Euclidean distances by block, accurate for far and for near pairs alike.

The expansion ||x||^2 + ||z||^2 - 2 x.z costs one matrix product, but its absolute error is about
eps (||x||^2 + ||z||^2): relative to a small distance that is noise, and once classes collapse a tenth of all
pairs are that small. Pairs whose expansion falls below ``NEAR[dtype]`` of the squared norms are therefore
measured again: crowded groups by the same product around a centre of their own, stragglers by direct
differences. In a space of so few dimensions that most points have near ones, all pairs are measured directly,
and so are those of a few points, for which a product is prepared and checked longer than differences take.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..gemm import matmul_nt

# A pair is near when r^2 < NEAR * (||x||^2 + ||z||^2). The expansion of a pair that is not near has a relative
# error of a few eps / NEAR in r^2: below 1e-5 in float32 and 1e-12 in float64.
NEAR = {torch.float32: 2.0**-6, torch.float64: 2.0**-10}
# In float64, pairs of points that were rounded to float32: the expansion's error in r, about eps |x|^2 / r, stays below
# what that rounding has cost, 2^-24 |x|, down to much smaller distances.
NEAR_OF_ROUNDED = 2.0**-36
NEAR_OF_FLOAT32 = 2.0**-32  # and where r^2 is promised to a few eps of float32: 2^-52 / 2^-32 of it is lost

_GROUP = 16  # fewer near columns than this are not worth a product of their own
_REACH = 8.0  # a group takes in points up to this multiple of the near bound
_CENTRE_SAMPLE = 128  # members that vote for a group's centre
_ROUNDS = 64  # groups tried per block before direct differences take the rest
# Items of one chunk of direct differences, and of one step of a group's product: on the CPU what stays in its caches.
# On CUDA every step looks at values, for which the host waits: fewer steps are fewer waits.
_CHUNK, _CUDA_CHUNK = 2**18, 2**21
FEW = 4  # features up to which all pairs are measured directly: no slower then than a product that is checked
_FEWEST = 16  # rows of one step of a group's product, at least
_CHEAP = 2**14  # items of points whose squares are formed: the product of pairs of rows costs more to start
_CACHED = 2**16  # pairs that are measured at once there, small enough for a processor's cache
# A near pair costs 3 to 7 microseconds on the CPU where crowds do not help. A float64 product of all pairs costs up to
# 7 ns a pair more than a float32 one (d = 784), or less, among few features, as it needs no check. Where a fiftieth to
# a fifth of the pairs are near, all are so measured in a third to a fortieth of the time (two cores of a Xeon).
_MANY, _ROWS, _COLUMNS = 2**20, 64, 512  # pairs from which on so many rows and columns of them are looked at
_NARROW, CROWDED = 64, 1e-3  # features, share of near pairs
FLOAT64_ROWS = 128  # whose distances are made in float64 at a time
_DIRECT = 2**16  # differences up to which all are formed: 35 microseconds, which product and check take for any block


def near_chunk(device: torch.device) -> int:
    """Items of a step of pairs that are measured again."""
    return _CUDA_CHUNK if device.type == "cuda" else _CHUNK


def tile_bytes(rows: int, n: int, m: int, d: int, size: int, chunk: int = _CHUNK) -> int:
    """Most memory that ``squared_distances`` takes for a block of that many rows, the block itself left out.

    The points in another unit; the norms; -2 Z, the library's copy of X; of suspect rows a copy, thresholds and a
    mask; a group's points around their centre, and the work of one step of it or of direct differences.
    """
    if d <= FEW:
        return size * ((2 * n + m) * d + n + m + 2 * min(rows * n, max(_CACHED, n)))
    pairs = min(rows * n, max(_FEWEST * n, chunk))
    work = max(5 * pairs * size, 16 * pairs + 3 * size * min(pairs * d, max(d, chunk)))
    copies = 4 if size == 4 else 2  # the float64 product takes its factors as they are
    most = size * (2 * (n + m) + 4 * rows * d + (copies * n + m) * d) + rows * n * (2 * size + 2) + work
    if size == 8 or chunk == _CUDA_CHUNK or n * m < _MANY:
        return most
    some = min(rows, FLOAT64_ROWS)  # of float64 distances, which are rounded
    return max(most, 8 * some * n + tile_bytes(some, n, some, d, 8, chunk))


def many_on_cpu(X: torch.Tensor, Z: torch.Tensor) -> bool:
    """Whether float32 points have pairs enough on the CPU to look at some of them first."""
    return X.dtype == torch.float32 and X.device.type == "cpu" and len(X) * len(Z) >= _MANY


def near_share(X: torch.Tensor, Z: torch.Tensor, near: float, origin: Callable | None = None) -> float:
    """Which part of the pairs is below that share of their squared norms, by a few rows and columns.

    origin: X -> where norms are taken from, or None.
    """
    # By chance: regular steps would see some classes only where these take turns.
    draw = torch.Generator().manual_seed(0)
    order = (torch.randperm(len(P), generator=draw, device="cpu") for P in (X, Z))
    x, z = (P[some[:count]].double() for P, some, count in zip((X, Z), order, (_COLUMNS, _ROWS), strict=True))
    shift = None if origin is None else origin(x)
    if shift is not None:
        x, z = x - shift, z - shift
    sizes = squared_norms(z)[:, None] + squared_norms(x)
    sq = torch.addmm(sizes, z, x.T, alpha=-2.0)
    # One pair a row says nothing: points of Z may be those of X.
    return float((sq < near * sizes).sum(1).sub_(1).clamp_(min=0).sum()) / sq.numel()


def around_mean(X: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(points in float64 around their mean, the mean): what they have in common is no part of any distance.

    For float32 points, whose digits float64 keeps then.
    """
    x = X.double()
    origin = x.mean(0)
    return (x - origin if x is X else x.sub_(origin)), origin


def float64_pays(X: torch.Tensor, Z: torch.Tensor) -> bool:
    """Whether float64 products of all pairs of float32 points take less than float32 ones with near pairs apart.

    On the CPU they do among few features, where products are the least part of the work, and from a small share of near
    pairs on, unless most of these are too near for float64 as well.
    """
    d = X.shape[1]
    if not many_on_cpu(X, Z) or d <= FEW:
        return False
    near = near_share(X, Z, NEAR[torch.float32])
    nearest = near_share(X, Z, NEAR_OF_FLOAT32, lambda x: x.mean(0))  # as ``around_mean``
    return nearest <= CROWDED if d <= _NARROW else near > max(CROWDED, 2.0 * nearest)


def medians(X: torch.Tensor) -> torch.Tensor:
    """The lower median of each column (d,) of X (n, d); on CUDA by sorting, which deterministic algorithms allow."""
    return X.sort(0).values[(len(X) - 1) // 2] if X.is_cuda else X.median(0).values


def squared_norms(X: torch.Tensor) -> torch.Tensor:
    """Squared row norms, shape (n,)."""
    if X.numel() <= _CHEAP and not X.is_cuda:
        return (X * X).sum(1)
    return torch.einsum("ij,ij->i", X, X)


def measured_directly(pairs: int, X: torch.Tensor) -> bool:
    """Whether ``squared_distances`` of so many pairs of points like X needs no norms."""
    d = X.shape[1]
    return d > 0 and (d <= FEW or (pairs * d <= _DIRECT and X.device.type == "cpu"))


def squared_distances(
    Z: torch.Tensor,
    X: torch.Tensor,
    z2: torch.Tensor | None,
    x2: torch.Tensor | None,
    out: torch.Tensor,
    selves: int | torch.Tensor | None = None,
    near: float | None = None,
) -> torch.Tensor:
    """Write ||Z[i] - X[j]||^2 into out, shape (b, n).

    Args:
        Z, X: points (b, d) and (n, d).
        z2, x2: their squared norms, where not ``measured_directly``.
        out: result; any strides that a matrix product can write to.
        selves: where Z is rows of X, the number of the first one, or of each (b,); these pairs are zero by index.
        near: share of the squared norms below which pairs are measured again; default by dtype.
    """
    if out.numel() == 0:
        return out
    if measured_directly(out.numel(), X):
        return _measure_all(Z, X, out)
    assert z2 is not None
    assert x2 is not None
    torch.add(matmul_nt(-2.0 * Z, X, x2, out), z2[:, None], out=out)
    return near_again_(out, Z, X, z2, x2, selves, near)


def near_again_(
    out: torch.Tensor,
    Z: torch.Tensor,
    X: torch.Tensor,
    z2: torch.Tensor,
    x2: torch.Tensor,
    selves: int | torch.Tensor | None = None,
    near: float | None = None,
) -> torch.Tensor:
    """Measure near pairs of ||Z[i] - X[j]||^2, which a product has written into out; arguments as there."""
    near = NEAR[out.dtype] if near is None else near
    _fill_selves(out, selves, torch.inf)  # never near
    suspects = out.amin(1) < near * (z2 + x2.amax())
    if suspects.any():
        rows = suspects.nonzero().squeeze(1)
        everything = len(rows) * 2 > len(out)  # then skip the copy of the suspect rows
        sub = out if everything else out[rows]
        z, zz = (Z, z2) if everything else (Z[rows], z2[rows])
        mask = sub < near * (zz[:, None] + x2)
        _measure_near(sub, mask, z, X, zz, x2, near)
        if not everything:
            out[rows] = sub
    _fill_selves(out, selves, 0.0)
    return out


def _fill_selves(out: torch.Tensor, selves: int | torch.Tensor | None, value: float) -> None:
    if isinstance(selves, torch.Tensor):
        out.scatter_(1, selves[:, None], value)
    elif selves is not None:
        torch.diagonal(out, selves).fill_(value)


def factors(X: torch.Tensor, x2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two matrices whose product L R^T has ||x_i - x_j||^2: norms among its columns save two passes over the result.

    It rounds as the expansion does, and is left to ``near_again_`` as that is.
    """
    d = X.shape[1]
    left, right = (X.new_empty(len(X), d + 2) for _ in range(2))
    torch.mul(X, -2.0, out=left[:, :d])
    right[:, :d] = X
    left[:, d] = right[:, d + 1] = x2
    left[:, d + 1] = right[:, d] = 1.0
    return left, right


def _measure_all(Z: torch.Tensor, X: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Write every sum_k (Z[i, k] - X[j, k])^2 into out, by feature where these are few; zero for equal points."""
    if X.shape[1] > FEW:
        return torch.square(torch.cdist(Z, X, compute_mode="donot_use_mm_for_euclid_dist"), out=out)
    columns = X.T.contiguous()
    rows = len(out) if out.is_cuda else max(1, _CACHED // len(X))
    for start in range(0, len(out), rows):
        part, z = out[start : start + rows], Z[start : start + rows]
        torch.sub(z[:, :1], columns[0], out=part).square_()
        for k in range(1, len(columns)):
            difference = z[:, k : k + 1] - columns[k]
            part.addcmul_(difference, difference)
    return out


def _measure_near(sq, mask, Z: torch.Tensor, X: torch.Tensor, z2: torch.Tensor, x2: torch.Tensor, near: float) -> None:
    """Measure the pairs under mask again, in place; mask is used up.

    Each round moves the origin into the most crowded row's company and repeats the product for all points within
    reach of it; pairs that are near even from there wait for a round of their own.
    """
    chunk = near_chunk(X.device)
    for _ in range(_ROUNDS):
        crowd = mask.sum(1)
        leader = int(crowd.argmax())
        if crowd[leader] < _GROUP:
            break
        company = mask[leader].nonzero().squeeze(1)
        # The median is robust: a few far members must not drag the centre off the crowd.
        centre = medians(X[company[:: max(1, len(company) // _CENTRE_SAMPLE)]])
        reach = _REACH * near * z2[leader]
        cols = ((sq[leader] < reach + _REACH * near * x2) | sq[leader].isinf()).nonzero().squeeze(1)
        rows = (squared_norms(Z - Z[leader]) < reach + _REACH * near * z2).nonzero().squeeze(1)
        x = X[cols].sub_(centre)
        xc2 = squared_norms(x)
        helped = False
        for some in rows.split(max(_FEWEST, chunk // len(cols))):
            index = (some[:, None], cols)
            z = Z[some].sub_(centre)
            zc2 = squared_norms(z)
            fresh = matmul_nt(z.mul_(-2.0), x, xc2).add_(zc2[:, None])
            group = mask[index]
            good = group & (fresh >= near * (zc2[:, None] + xc2))
            sq[index] = torch.where(good, fresh, sq[index])
            mask[index] = group & ~good
            helped = helped or bool(good.any())
        if not helped:  # the centre did not help this row: no second try
            _measure_directly(sq, torch.full_like(company, leader), company, Z, X)
            mask[leader] = False
    step = max(1, chunk // max(1, mask.shape[1]))
    for start in range(0, len(mask), step):
        i, j = mask[start : start + step].nonzero(as_tuple=True)
        _measure_directly(sq, i.add_(start), j, Z, X)


def _measure_directly(sq: torch.Tensor, i: torch.Tensor, j: torch.Tensor, Z: torch.Tensor, X: torch.Tensor) -> None:
    """Write sum_k (Z[i, k] - X[j, k])^2 into sq for a list of pairs."""
    step = max(1, near_chunk(X.device) // max(1, X.shape[1]))
    for k in range(0, len(i), step):
        a, b = i[k : k + step], j[k : k + step]
        difference = Z[a].sub_(X[b])
        sq[a, b] = squared_norms(difference)
