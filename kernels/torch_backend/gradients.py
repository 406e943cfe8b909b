"""Torch backend: the gradients of one row block, accurate relative to their terms.

g_ic = sum_j W_ij A_jc (x_j - z_i) is one product, W (A_c o X) - s_c o Z with s = W A, whose rounding is about
eps W_ij |A_jc| (|x_j| + |z_i|) a pair. For a near pair that is many times its term W_ij |A_jc| ||x_j - z_i||, and where
weights grow as 1 / r nothing hides it. Near pairs are therefore taken out of the product and added by themselves:
crowds by a float64 product around a centre of their own, stragglers by direct differences. With few features, where
most points have near ones, every difference is formed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..checks import readable
from ..gemm import accumulate_, matmul_nt
from ..plan import AIM
from .distance import FEW, NEAR, medians, norms_from, squared_distances, squared_norms

# Around a local centre, in float64, a pair is served when r^2 is at least this share of its squared norms there: the
# error of its term is then below 2^15 eps of float64, and 2^5 eps for float64 points.
_SERVED = {torch.float32: 2.0**-30, torch.float64: NEAR[torch.float64]}
_GROUP = 16  # fewer near columns than this are not worth a product of their own
_CENTRE_SAMPLE = 128  # members that vote for a group's centre
_ROUNDS = 64  # groups tried per block before direct differences take the rest
_OUTPUTS = 16  # outputs of one step beside the product
_FEWEST = 16  # rows of one step of a group's product, at least
# Items of a step's work tensors: on the CPU what stays in its caches; a GPU's products want thousands of rows each, and
# its launches cost microseconds.
_CHUNK, _CUDA_CHUNK = 2**18, 2**24
# A product of 128 rows with tiles of 128 by 128 is 80 programs for K = 10 and d = 1024, and a GPU has more processors;
# 2048 rows are ten waves and more. Blocks stay near 4 GiB.
_CUDA_AIM = (2048, 2**32)
# On the CPU blocks of 128 rows stay near its caches. Where a weight is multiplied by many numbers, products with more
# rows win more than that: a tenth to a fifth of the time (n = 5000 to 50,000, two cores of a Zen 3).
_WIDE, _WIDE_AIM = 512, (384, 2**28)
# Where the other factor of the products is at most this many columns for each row of a block, it is made once for all
# blocks, unless these have so few rows that memory is short: the products take 10 to 50 % less time, an AGOP of 5000 to
# 20,000 points up to 30 % less (d = 20 to 300, two cores of a Xeon).
_AT_ONCE, LEAST_ROWS = 4, 128
# On the CPU weights are scaled for several outputs, one below the other, up to so many rows, and so many columns at a
# time: points come from memory once for these outputs, all else stays in cache. Rates are 330 GFLOP/s instead of 272
# in float32, and 170 instead of 125 in float64 (n = 50,000, d = 1024, K = 10, two cores of a Xeon).
_STACKED, _COLUMNS = 2048, 1024
_ALIKE = 1.5  # ratio of squared norms up to which one bound serves a row


@dataclass
class Near:
    """Near pairs of one row block.

    Attributes:
        rows: index of the block's rows that have near pairs.
        mask: (len(rows), n), True at the near pairs.
        x2, z2: squared norms of all points (n,) and of the rows, shifted as the product will see them.
    """

    rows: torch.Tensor
    mask: torch.Tensor
    x2: torch.Tensor
    z2: torch.Tensor


class Nearness:
    """Finds the near pairs of points, from squared distances or from stored weights.

    Squared norms are those of the shifted points that the product will see.
    """

    def __init__(self, X: torch.Tensor, Z: torch.Tensor, shift: torch.Tensor | None):
        self.X, self.Z, self.symmetric = X, Z, Z is X
        self.few = X.shape[1] <= FEW  # every difference is formed there
        if not self.few:
            self.x2 = norms_from(X, shift)
            self.z2 = self.x2 if self.symmetric else norms_from(Z, shift)
            self._most = self.x2.amax()
            self._plain: tuple[torch.Tensor, torch.Tensor] | None = None

    def among(self, sq: torch.Tensor, row: slice) -> Near | None:
        """Near pairs of a row block from its squared distances; pairs at distance zero weigh nothing."""
        if self.few or not readable(sq) or sq.numel() == 0:
            return None
        self_pairs = torch.diagonal(sq, row.start) if self.symmetric else None
        if self_pairs is not None:
            self_pairs.fill_(torch.inf)
        near, z2 = NEAR[sq.dtype], self.z2[row]
        rows = (sq.amin(1) < near * (z2 + self._most)).nonzero().squeeze(1)
        found = None
        if len(rows):
            sub = sq if len(rows) == len(sq) else sq[rows]
            mask = (sub < near * (z2[rows, None] + self.x2)).logical_and_(sub > 0)
            some = mask.any(1)
            if not bool(some.all()):
                rows, mask = rows[some], mask[some]
            found = Near(rows, mask, self.x2, z2[rows]) if len(rows) else None
        if self_pairs is not None:
            self_pairs.zero_()
        return found

    def among_weights(self, W: torch.Tensor, row: slice, kernel=None) -> Near | None:
        """Near pairs of a row block whose squared distances are gone.

        Weights decrease with the distance: only rows whose largest weight belongs to a near pair are measured again,
        all of them where the kernel is not known.
        """
        if self.few or not readable(W) or W.numel() == 0:
            return None
        suspects = torch.arange(len(W), device=W.device)
        if kernel is not None:
            bound = kernel.weight_(NEAR[self.X.dtype] * (self.z2[row] + self._most))
            suspects = (W.amax(1) >= 0.999 * bound).nonzero().squeeze(1)
            if len(suspects) == 0:
                return None
        if self._plain is None:
            x2 = squared_norms(self.X)
            self._plain = x2, x2 if self.symmetric else squared_norms(self.Z)
        x2, z2 = self._plain[0], self._plain[1][row]
        sq = W.new_empty(len(W), len(self.X), dtype=self.X.dtype)
        squared_distances(self.Z[row], self.X, z2, x2, sq, row.start if self.symmetric else None)
        return self.among(sq, row)

    def among_stored(
        self, W: torch.Tensor, row: slice, weight_: Callable, factors: torch.Tensor | None = None
    ) -> Near | None:
        """Near pairs of a row block of stored weights, which decrease with the distance, without measuring again.

        Where norms differ little, a row's bound is that of the largest norm: a few more pairs count as near.

        Args:
            W: the block (b, n).
            row: its rows of Z.
            weight_: overwrites squared distances by what the weights were before they were multiplied by ``factors``.
            factors: of the block's rows (b,).
        """
        if self.few or not readable(W) or W.numel() == 0:
            return None
        near, z2 = NEAR[self.X.dtype], self.z2[row]
        bound = weight_((near * (z2 + self._most)).to(W.dtype))[:, None]
        bound = bound if factors is None else bound * factors[:, None]
        rows = (W.amax(1, keepdim=True) >= bound).squeeze(1).nonzero().squeeze(1)
        if len(rows) == 0:
            return None
        w = W if len(rows) == len(W) else W[rows]
        if float(self._most) > _ALIKE * float(self.x2.amin()):
            bounds = weight_((near * (z2[rows, None] + self.x2)).to(W.dtype))
            mask = w >= (bounds if factors is None else bounds.mul_(factors[rows, None]))
        else:
            mask = w >= bound[rows]
        mask.logical_and_(w > 0)  # a weight of zero is that of a pair at distance zero
        some = mask.any(1)
        rows, mask = (rows, mask) if bool(some.all()) else (rows[some], mask[some])
        return Near(rows, mask, self.x2, z2[rows]) if len(rows) else None


def block_gradients(
    W: torch.Tensor,
    near: Near | None,
    alpha: torch.Tensor,
    X: torch.Tensor,
    Z: torch.Tensor,
    shift: torch.Tensor | None,
    out: torch.Tensor,
    step: Callable | None = None,
) -> torch.Tensor:
    """sum_j W_ij alpha_jc (x_j - z_i) for one row block, into out (b, K, d); W may be changed.

    ``step`` is a backend's product: (W, alpha, X, Z, shift, out) -> out; default ``output_gradients``.
    """
    if X.shape[1] <= FEW:
        return _by_feature(W, alpha, X, Z, out)
    step = step or output_gradients
    if near is None:
        return step(W, alpha, X, Z, shift, out)
    taken = _take_(W, near, alpha)
    step(W, alpha, X, Z, shift, out)
    if taken is not None:
        rows, weights = taken
        z = Z[rows]
        _add_crowds(weights, alpha, X, z, rows, out)
        _add_directly(weights, alpha, X, z, rows, out)
    return out


def output_gradients(
    W: torch.Tensor, alpha: torch.Tensor, X: torch.Tensor, Z: torch.Tensor, shift, out: torch.Tensor
) -> torch.Tensor:
    """W (alpha_c o X) - s_c o Z with s = W alpha, for one row block, into out (b, K, d).

    ``products.differences_product`` is the same formula where one product of all outputs fits into memory.
    """
    if shift is not None:  # a gradient sees differences of points only
        X, Z = X - shift, Z - shift
    s, d, K = W @ alpha, X.shape[1], alpha.shape[1]
    if d <= len(W):  # alpha is applied to the centers, which are the smaller factor, for a few outputs at once
        for some in range(0, K, max(1, len(W) // d)):
            c = slice(some, some + max(1, len(W) // d))
            right = (alpha.T[c, None] * X.T).flatten(0, 1)
            torch.addcmul(matmul_nt(W, right).view(len(W), -1, d), s[:, c, None], Z[:, None], value=-1.0, out=out[:, c])
        return out
    if not W.is_cuda:
        return _in_columns(W, alpha, X, Z, s, out)
    scaled = torch.empty_like(W)
    for c in range(K):
        torch.mul(W, alpha[:, c], out=scaled)
        torch.addcmul(matmul_nt(scaled, X.T), s[:, c, None], Z, value=-1.0, out=out[:, c])
    return out


def _in_columns(W: torch.Tensor, alpha: torch.Tensor, X: torch.Tensor, Z: torch.Tensor, s, out) -> torch.Tensor:
    """``output_gradients`` with W scaled, for several outputs and some columns at a time, as ``_STACKED`` says."""
    (b, n), d, K = W.shape, X.shape[1], alpha.shape[1]
    factors, at_once = alpha.T.contiguous(), max(1, min(K, _STACKED // b, _beside(n)))
    for first in range(0, K, at_once):
        c = slice(first, min(K, first + at_once))
        sums = W.new_zeros((c.stop - first) * b, d)
        for start in range(0, n, _COLUMNS):
            some = slice(start, start + _COLUMNS)
            accumulate_(sums, (W[:, some] * factors[c, None, some]).flatten(0, 1), X[some].T)
        sums = sums.view(-1, b, d).transpose(0, 1)
        torch.addcmul(sums, s[:, c, None], Z[:, None], value=-1.0, out=out[:, c])
    return out


def _beside(n: int) -> int:
    """For how many outputs W may be scaled at once: all of these columns take no more than four blocks."""
    return 4 * n // max(1, min(n, _COLUMNS))


def columns_at_once(rows: int, d: int, K: int, device: torch.device) -> int:
    """Columns of the factor by which ``products_at_once`` multiplies a block of that many rows; 0 where it has none."""
    columns = K * (d + 1)
    fits = rows >= LEAST_ROWS and columns <= _AT_ONCE * rows
    return columns if d > FEW and fits and device.type == "cpu" else 0


def products_at_once(alpha: torch.Tensor, X: torch.Tensor, shift: torch.Tensor | None, rows: int) -> Callable:
    """``output_gradients`` with all of X and alpha, for blocks of at most that many rows.

    On the CPU, where few outputs and features make it small, the other factor, alpha_c o X and alpha_c of every output
    c, is made once for all blocks.
    """
    (n, d), K = X.shape, alpha.shape[1]
    if not columns_at_once(rows, d, K, X.device):
        return output_gradients
    right = X.new_empty(K, d + 1, n)
    points = (X if shift is None else X - shift).T.contiguous()
    torch.mul(alpha.T[:, None], points, out=right[:, :d])
    right[:, d] = alpha.T
    right = right.view(-1, n)

    def step(W, alpha, X, Z, shift, out: torch.Tensor) -> torch.Tensor:
        Z = Z if shift is None else Z - shift
        sums = matmul_nt(W, right).view(len(W), K, d + 1)
        return torch.addcmul(sums[:, :, :d], sums[:, :, d:], Z[:, None], value=-1.0, out=out)

    return step


def gradient_bytes(rows: int, n: int, d: int, K: int, size: int, chunk: int = _CHUNK) -> int:
    """Most memory that ``block_gradients`` takes for a block of that many rows, W and the result left out.

    Of W: the near pairs and a copy, the other factor of the product, made and copied twice, or W scaled for several
    outputs and its product; shifted points, the library's copy and, in float64, a group's; of the result a few outputs;
    one step's work with a group.
    """
    if d <= FEW:
        return size * (2 * rows * n + 2 * rows * K + n * K)
    pairs, some = min(rows * n, max(_FEWEST * n, chunk)), min(K, _OUTPUTS)
    outputs = min(rows * K * d, max(rows * d, chunk)) * (16 + size)
    near = size * (2 * n * some + 4 * rows * some) + 8 * n * (2 * d + some) + pairs * 48 + outputs
    stacked = min(rows * K, max(rows, _STACKED), rows * _beside(n))
    scaled = max(rows * (n + d), stacked * (min(n, _COLUMNS) + d) if d > rows else 0)
    return size * (4 * rows * n + scaled + 2 * n * d + rows * (max(rows, d) + 2 * K)) + rows * n + near


def chunk_of(device: torch.device) -> int:
    """Items of the work tensors of a step of near pairs."""
    return _CUDA_CHUNK if device.type == "cuda" else _CHUNK


def gradient_aim(device: torch.device, width: int = 0) -> tuple[int, int]:
    """(rows, bytes) that a block aims at, as of ``plan.fitting_rows``; width: how many numbers a weight multiplies."""
    if device.type == "cuda":
        return _CUDA_AIM
    return _WIDE_AIM if width >= _WIDE else AIM


def _by_feature(W, alpha, X, Z, out: torch.Tensor) -> torch.Tensor:
    """Every difference of every feature formed: nothing cancels."""
    terms = torch.empty_like(W)
    for k in range(X.shape[1]):
        torch.sub(X[:, k], Z[:, k : k + 1], out=terms).mul_(W)
        out[:, :, k] = matmul_nt(terms, alpha.T)
    return out


def _take_(W, near: Near, alpha: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(rows, their near pairs' weights, zero elsewhere), taken out of W where they would spoil the product.

    A row's near pairs stay in where the rounding that they bring, |W| |alpha| (|x| + |z|) eps, is below that of all
    other pairs: bounded weights near a point change nothing then.
    """
    everything = W[near.rows].abs_()
    among = everything * near.mask
    x, z = near.x2.sqrt()[:, None], near.z2.sqrt()[:, None]
    spoilt = torch.zeros_like(near.rows, dtype=torch.bool)

    def rounding(weights: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        return matmul_nt(weights, (x * size).T).addcmul_(matmul_nt(weights, size.T), z)

    for part in alpha.split(_OUTPUTS, 1):
        size = part.abs()
        spoilt |= (rounding(among, size) > 0.5 * rounding(everything, size)).any(1)  # more than the others' part of it
    del everything, among
    if not bool(spoilt.any()):
        return None
    rows, mask = near.rows[spoilt], near.mask[spoilt]
    taken = W[rows]
    W[rows] = taken.masked_fill(mask, 0.0)
    return rows, taken.mul_(mask)


def _add_crowds(weights, alpha, X, Z, rows, out: torch.Tensor) -> None:
    """Add what groups of near pairs contribute, by float64 products around centres of their own.

    weights (r, n) belong to out's ``rows``, whose points Z are; what is served becomes zero there.
    """
    chunk = chunk_of(X.device)
    for _ in range(_ROUNDS):
        mask = weights != 0
        crowd = mask.sum(1)
        leader = int(crowd.argmax())
        if crowd[leader] < _GROUP:
            return
        company = mask[leader].nonzero().squeeze(1)
        # The median is robust: a few far members must not drag the centre off the crowd.
        centre = medians(X[company[:: max(1, len(company) // _CENTRE_SAMPLE)]]).double()
        members = mask[:, company].any(1).nonzero().squeeze(1)
        del mask
        x = X[company].double().sub_(centre)
        x2, helped = squared_norms(x), False
        for some in members.split(max(_FEWEST, chunk // len(company))):
            z = Z[some].double().sub_(centre)
            z2 = squared_norms(z)
            far = matmul_nt(-2.0 * z, x, x2).add_(z2[:, None]) >= _SERVED[X.dtype] * (z2[:, None] + x2)
            index = (some[:, None], company)
            served = weights[index] * far
            weights[index] -= served
            _add_product(served.double(), alpha, company, x, z, rows[some], out)
            helped = helped or bool(served[some == leader].any())
        if not helped:  # the centre did not help this row: no second try
            one = slice(leader, leader + 1)
            _add_directly(weights[one], alpha, X, Z[one], rows[one], out)
            weights[leader] = 0.0


def _add_product(W, alpha, company, x, z, rows, out: torch.Tensor) -> None:
    """Add W (alpha_c o x) - s_c o z to out's rows, a few outputs at a time; x and float64 W are of the company."""
    K, d = out.shape[1:]
    some = max(1, min(_OUTPUTS, chunk_of(x.device) // (len(W) * d)))
    for first in range(0, K, some):
        c = slice(first, first + some)
        a = alpha[company, c].double()
        part = output_gradients(W, a, x, z, None, W.new_empty(len(W), a.shape[1], d))
        out[:, c].index_add_(0, rows, part.to(out.dtype))


def _add_directly(weights, alpha, X, Z, rows, out: torch.Tensor) -> None:
    """Add sum_j weights_ij alpha_jc (x_j - z_i) to out's rows from differences of points."""
    (K, d), counts = out.shape[1:], (weights != 0).sum(1)
    counts, order = counts.sort(descending=True)
    done, end = 0, int((counts > 0).sum())
    while done < end:
        longest = int(counts[done])
        step = max(1, chunk_of(X.device) // (longest * (K + d) + K * d))
        index = order[done : min(end, done + step)]
        j = weights[index].abs_().topk(longest, dim=1, sorted=False).indices  # shorter rows are filled up with zeros
        w = weights[index[:, None], j]
        terms = torch.bmm((w[:, :, None] * alpha[j]).transpose(1, 2), X[j] - Z[index, None])
        out.index_add_(0, rows[index], terms)
        done += step
