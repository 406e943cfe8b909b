"""Torch backend: the AGOP in its two exact forms, summed over evaluation points and outputs.

With weights W_ij = w(||z_i - x_j||), A = alpha and s = W A, the gradient of output c at z_i is
g_ic = sum_j W_ij A_jc x_j - s_ic z_i, and M = sum_ic g_ic g_ic^T is either

gradient form  M = sum_c G_c^T G_c, G_c = W (A_c o X) - s_c o Z: 2 m n K d products, W made block by block;
gram form      n^2 m products by symmetry, whatever K is, with W stored (``torch_gram``).

The gram form's terms cancel, so it runs only while its guard says that the cancelled digits do not matter.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from ..calibration import rate, source
from ..checks import readable
from ..errors import warn
from ..gemm import add_squares_, square_bytes, symmetrise_
from ..plan import RAISE_LIMIT, ROWS, Plan, budget, empty_matrix, fitting_rows, format_bytes
from ..radial import Radial
from ..scaling import scaled_
from . import gram as torch_gram
from . import low_rank
from .distance import tile_bytes
from .gradients import Near, Nearness, block_gradients, dominant_offset, gradient_bytes, output_gradients
from .low_rank import LowRank
from .tiles import fill_symmetric, tiles, weight_tiles

log = logging.getLogger("fastagop")

# The gram form loses about LOSS_PER_EPS eps amplification of M (measured from spread 1 to 1e-6: a fifth of it to twice
# it). It runs in a dtype while that is below the dtype's limit; from a fourth of it on, a low-rank part pays.
LOSS_PER_EPS = 4.0
GRAM_LIMIT = {torch.float32: 4e-6, torch.float64: 1e-12}
LOW_RANK_THRESHOLD = 0.25
# What the gram form may lose before it gives way where it was asked for by name: float64 has the digits to spare.
GRAM_WARN_LOSS = 1e-7
# Rounding of a device's coarser products, and what "auto" lets the gram form lose in them; who asks for the gram form
# by name may lose as many bits in them as in float32.
PRODUCT_ROUNDING = {"bf16x3": (2.0**-16, 5e-5), "tf32": (2.0**-11, 5e-5)}
EXPLICIT_LOSS_FACTOR = 32.0
# Centred gradients are computed in float64 where rounding float32 weights would cost more of them than this, as seen at
# about so many points.
_CENTRED = 5e-7
_POINTS = 32
_WEIGHTS = 20  # stored weights and coefficients whose largest is within 2^-20 .. 2^20 are squared as they are
# Where the gram form would lose digits of M the gradient form loses some, too (1e-3 at a spread of 1e-4 in float32):
# float64 products are worth so many times its time.
FLOAT64_PREFERENCE = 4.0


@dataclass(frozen=True)
class InnerKernels:
    """Where the work of the two forms is done: a backend's version of each inner step.

    Attributes:
        gradients: (W, alpha, X, Z, shift, out) -> out, as ``torch_blocks.output_gradients``.
        lower: as of ``torch_gram.gram_form``, in X's dtype.
        products: what their rates are known by; None for X's dtype.
    """

    gradients: Callable
    lower: Callable
    products: str | None = None


TORCH_KERNELS = InnerKernels(output_gradients, torch_gram.lower_s)


@dataclass(frozen=True)
class GramDecision:
    """A form, the dtype of its products, and the part of the weights that the gram form need not square."""

    form: str
    dtype: torch.dtype
    low_rank: LowRank | None = None
    loss: float = 0.0  # of M, estimated


def flops(m: int, n: int, d: int, K: int, symmetric: bool) -> dict[str, float]:
    """Floating-point operations of each form, distances included."""
    gradient = 2.0 * m * n * d * (K + 1) + 2.0 * m * K * d * d
    if symmetric:
        gram = 1.0 * n * n * d + 1.0 * n**3 + 1.0 * n * n * d + 2.0 * n * d * d + 3.0 * n * n * K
    else:
        gram = 2.0 * m * n * d + 1.0 * n * n * m + 1.0 * n * n * d + 2.0 * m * n * d + 2.0 * (n + m) * d * d
    return {"gradient": gradient, "gram": gram}


def products_of(X: torch.Tensor, Z: torch.Tensor, device: str | None) -> dict[str, str]:
    """The word for each form's products: the dtype's own, or those of device steps, whose gram form is for Z = X."""
    symmetric = str(X.dtype).removeprefix("torch.")
    return {"gradient": device or symmetric, "gram": device if device and Z is X else symmetric}


def costs(X: torch.Tensor, Z: torch.Tensor, K: int, products: dict[str, str]) -> dict[str, float]:
    """Estimated seconds of each form: its operations at its rate."""
    work = flops(len(Z), len(X), X.shape[1], K, Z is X)
    return {form: work[form] / rate(form, products[form], X.device) for form in work}


def gradient_form_bytes(rows: int, X, alpha, Z, center: bool) -> int:
    """Most memory that the gradient form takes with blocks of that many rows."""
    (n, d), K, m, size = X.shape, alpha.shape[1], len(Z), X.element_size()
    copied = 0 if alpha.is_contiguous() else n * K
    held = 8 * d * d + size * (copied + 2 * (n + m) + rows * (n + K * d)) + (32 * K * d if center else 0)
    tile = tile_bytes(rows, n, m, d, size) + rows * n * size  # a weight takes a block of its own
    work = max(tile, gradient_bytes(rows, n, d, K, size), square_bytes(rows * K, d, size))
    # M in float32 comes when nothing else is alive, but an allocator may keep what was freed; libraries take some more.
    return held + held // 16 + work + (4 if size == 4 else 0) * d * d


def gram_form_bytes(rows: int, X, alpha, Z, wide: bool = False, rank: int = 1) -> int:
    """Most memory that the gram form takes with blocks of that many rows.

    wide: float32 weights are copied for products in float64. rank: columns of the smooth part.
    """
    (n, d), K, m, size = X.shape, alpha.shape[1], len(Z), X.element_size()
    others = 0 if Z is X else m
    stored = m * n * size + (8 * (m * n + (n + others) * d + n * K) if wide else 0)
    tile = tile_bytes(rows, n, m, d, size) + rows * n * size
    size = 8 if wide else size
    most = max(m, n)
    points = size * ((2 * n + others) * d + 2 * (m + n) * (K + 1))
    low_rank = torch_gram.low_rank_bytes(m, n, d, K, rank)
    step = size * (3 * rows * most + 2 * rows * (d + 2 * K)) + 8 * rows * (d + rank * K) + square_bytes(rows, d, size)
    narrow = (4 if X.element_size() == 4 else 0) * d * d
    held = stored + 8 * d * d
    return held + held // 16 + max(tile, points + low_rank + step) + narrow


def _plan_form(form: str, X, alpha, Z, limit: int, center: bool = False) -> tuple[int, int]:
    """(block rows, peak bytes) of a form, or MemoryError."""
    what, most = f"agop, {form} form,", max(len(Z), len(X)) if form == "gram" else len(Z)
    if form == "gradient":
        bytes_of = functools.partial(gradient_form_bytes, X=X, alpha=alpha, Z=Z, center=center)
    else:
        bytes_of = functools.partial(gram_form_bytes, X=X, alpha=alpha, Z=Z)
    return fitting_rows(bytes_of, limit, most, what, RAISE_LIMIT)


def _gradient_form_beside(X, alpha, Z, center: bool, room: int) -> tuple[int, int]:
    """(block rows, bytes) of the gradient form from stored weights; single rows where even these do not fit."""
    try:
        return _plan_form("gradient", X, alpha, Z, room, center)
    except MemoryError:
        return 1, gradient_form_bytes(1, X, alpha, Z, center)


def _at_most(form: str, rows: int, peak: int, X, alpha, Z, limit: int, center: bool) -> int:
    """Peak bytes where values ask for more than the form's least: float64 products, a larger smooth part."""
    most = peak
    if form == "gram":
        stored = len(X) * len(Z) * X.element_size()
        beside = stored + _gradient_form_beside(X, alpha, Z, center, limit - stored)[1]
        clipped = torch_gram.nonnegative_bytes(X.shape[1])
        most = max(beside, clipped + gram_form_bytes(rows, X, alpha, Z, X.dtype == torch.float32, low_rank.RANK))
    if center and X.dtype == torch.float32:
        x, a = (t.new_empty(t.shape, dtype=torch.float64, device="meta") for t in (X, alpha))
        z = x if Z is X else x.new_empty(Z.shape)
        bytes_of = gram_form_bytes if form == "gram" else functools.partial(gradient_form_bytes, center=True)
        most = max(most, wide_bytes(X, alpha, Z) + bytes_of(min(ROWS, max(len(X), len(Z))), x, a, z))
    return max(peak, min(most, limit))


def plan(
    X, alpha, Z, method: str, limit: int | None, why: str, precision: str, device: str | None = None, center=False
) -> Plan:
    """The road of agop: the cheaper form that fits into memory."""
    (n, d), K, m = X.shape, alpha.shape[1], len(Z)
    work, room = flops(m, n, d, K, Z is X), budget(limit, X.device)
    reason = f"{why}; method asked for"
    if method == "auto":
        cost = costs(X, Z, K, products_of(X, Z, device))
        method = min(cost, key=lambda form: cost[form])
        each = ", ".join(f"{form} form {work[form]:.2g} flop, about {seconds:.2g} s" for form, seconds in cost.items())
        reason = f"{why}; {each} ({source(X.device)})"
        try:
            _plan_form(method, X, alpha, Z, room, center)
        except MemoryError:
            method = "gradient" if method == "gram" else "gram"
            reason = f"{reason}, but the cheaper one does not fit into {format_bytes(room)}"
    rows, peak = _plan_form(method, X, alpha, Z, room, center)
    peak = _at_most(method, rows, peak, X, alpha, Z, room, center)
    if X.dtype == torch.float32 and method == "gram":
        reason += (
            "; float32 is guarded: near collapse a smooth part of the weights is split off, or its products run in "
            "float64, or the gradient form runs"
        )
    if X.dtype == torch.float32 and center:
        reason += "; centred gradients that nearly agree are computed in float64"
    return Plan("agop", "torch", method, reason, precision, work[method], peak, rows)


def agop(
    kernel: Radial, X, alpha, Z, *, center: bool, method: str, limit: int | None, plan: Plan, row_weights=None
) -> torch.Tensor:
    """sum_ic w_i g_ic g_ic^T, float64 (d, d); method is what the caller asked for; w = row_weights, default 1."""
    if len(Z) == 0 or alpha.shape[1] == 0 or (center and len(Z) == 1):
        return X.new_zeros(X.shape[1], X.shape[1], dtype=torch.float64)
    alpha = alpha.contiguous()  # products with a transposed one take several times as long
    if plan.method == "gradient":
        shift = dominant_offset(X)
        blocks = weight_tiles(kernel, X, Z, plan.block, shift)
        return gradient_form(blocks, alpha, X, Z, shift, center, roots=roots_of(row_weights))
    W = weights(kernel, X, Z, plan.block)
    how = {"center": center, "method": method, "limit": limit, "row_weights": row_weights}
    return agop_from_weights_(W, X, alpha, Z, rows=plan.block, **how)


def agop_from_weights_(
    W,
    X,
    alpha,
    Z,
    *,
    center: bool,
    method: str,
    limit: int | None,
    rows: int,
    steps: InnerKernels = TORCH_KERNELS,
    row_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same in float64 from stored weights W (m, n), zero diagonal where Z is X; W is overwritten.

    W and alpha may be wider than X. With row_weights w, everything in the AGOP is linear in the rows of W: row i times
    sqrt(w_i) gives g_ic times sqrt(w_i), and Z no longer counts as X, since W is no longer symmetric.
    """
    exponents = exponent_of(W), exponent_of(alpha)
    if any(exponents):  # squares would leave their dtype
        how = {"center": center, "method": method, "limit": limit, "steps": steps, "row_weights": row_weights}
        W, alpha = scaled_(W, -exponents[0]), scaled_(alpha.clone(), -exponents[1])
        return scaled_(agop_from_weights_(W, X, alpha, Z, rows=rows, **how), 2 * sum(exponents))
    roots = roots_of(row_weights)
    if roots is not None:
        W.mul_(roots.to(W.dtype)[:, None])
        Z = Z[:]  # another object
    road = choose_form(W, X, alpha.to(X.dtype), Z, center, method, limit, steps.products, roots, rows)
    if road.low_rank is None:
        shift = dominant_offset(X)
        room = _room(W, limit) - W.numel() * W.element_size()
        rows = min(rows, _gradient_form_beside(X, alpha, Z, center, room)[0])
        blocks = stored_tiles(W, X, Z, rows, shift)
        return gradient_form(blocks, alpha.to(X.dtype), X, Z, shift, center, steps.gradients, roots, scaled=True)
    wide, x = road.dtype, X.to(road.dtype)
    z = x if Z is X else Z.to(wide)
    lower = steps.lower if wide == X.dtype else torch_gram.lower_s
    if W.dtype != wide:
        W = empty_matrix(len(W), W.shape[1], W, wide).copy_(W)
    taken = road.low_rank.to(wide)
    how = {"center": center, "rows": rows, "lower": lower, "roots": roots}
    M = torch_gram.gram_form(W, x, alpha.to(wide), z, taken, **how)
    eps = torch.finfo(X.dtype).eps
    if road.loss > 8 * eps and torch_gram.nonnegative_bytes(len(M)) <= budget(limit, X.device):
        return torch_gram.nonnegative(M, eps)
    return M


def exponent_of(W: torch.Tensor) -> int:
    """The power of two of a tensor's largest entry, 0 where that is within 2^-20 .. 2^20."""
    largest = max((float(end.abs()) for end in torch.aminmax(W)), default=0.0) if W.numel() else 0.0
    exponent = math.frexp(largest)[1] if math.isfinite(largest) else 0
    return exponent if abs(exponent) > _WEIGHTS else 0


def roots_of(row_weights: torch.Tensor | None) -> torch.Tensor | None:
    """Square roots of the evaluation points' weights."""
    return None if row_weights is None else row_weights.sqrt()


def weights(kernel: Radial, X, Z, rows: int) -> torch.Tensor:
    """W (m, n) stored; the diagonal is zero where Z is X."""
    W = empty_matrix(len(Z), len(X), X)
    if Z is X:
        return fill_symmetric(W, X, rows, kernel.weight_).fill_diagonal_(0.0)
    for _, block in tiles(X, Z, rows, out=W):
        kernel.weight_(block)
    return W


def choose_form(
    W, X, alpha, Z, center: bool, method: str, limit: int | None, products: str | None = None, roots=None, rows=ROWS
) -> GramDecision:
    """The cheapest road that loses no digits of M and fits into memory, in blocks of that many rows.

    alpha is of X's dtype; roots: square roots of the points' weights, by which the rows of W have been multiplied.
    """
    if method == "gradient":
        return GramDecision(method, X.dtype)
    (m, n), d, K, symmetric = W.shape, X.shape[1], alpha.shape[1], Z is X
    word = products_of(X, Z, products)
    eps, most = PRODUCT_ROUNDING.get(word["gram"], (torch.finfo(X.dtype).eps, GRAM_LIMIT[X.dtype]))
    most = most if method == "auto" else max(most, EXPLICIT_LOSS_FACTOR * eps, GRAM_WARN_LOSS)
    cost = costs(X, Z, K, word)
    wide = rate("gram", "float64", X.device)
    more = torch_gram.low_rank_flops(m, n, d, K, low_rank.RANK) / wide
    room = _room(W, limit)

    def fits(dtype: torch.dtype, rank: int) -> bool:
        wide = W.dtype != dtype
        return not wide or gram_form_bytes(rows, X, alpha, Z, wide, rank) <= room

    guard, taken, price = (
        torch_gram.CancellationEstimate(W, X, alpha, Z, center, roots),
        low_rank.mean_part(W, symmetric),
        cost["gram"],
    )
    growth = LOSS_PER_EPS * guard.amplification(taken)
    plain = eps * growth  # what would be lost without further ado
    if (
        plain > LOW_RANK_THRESHOLD * most
        and (method == "gram" or price + more < cost["gradient"])
        and n > 4 * low_rank.RANK
        and gram_form_bytes(rows, X, alpha, Z, False, low_rank.RANK) <= room
    ):
        better = low_rank.leading_part(W, symmetric)
        if (less := LOSS_PER_EPS * guard.amplification(better)) < growth:
            taken, growth, price = better, less, price + more
    safe = (
        [(price, GramDecision("gram", X.dtype, taken, eps * growth))]
        if eps * growth <= most and fits(X.dtype, taken.rank)
        else []
    )
    narrow = bool(safe)
    loss = torch.finfo(torch.float64).eps * growth
    if X.dtype != torch.float64 and fits(torch.float64, taken.rank) and loss <= most:
        work = flops(m, n, d, K, symmetric)["gram"] + torch_gram.low_rank_flops(m, n, d, K, taken.rank)
        safe.append((work / wide, GramDecision("gram", torch.float64, taken, loss)))
    if method == "auto":
        safe.append((cost["gradient"] * (1.0 if narrow else FLOAT64_PREFERENCE), GramDecision("gradient", X.dtype)))
    elif not safe:
        _warn_of(growth * torch.finfo(torch.float64 if fits(torch.float64, taken.rank) else X.dtype).eps)
        return GramDecision("gradient", X.dtype)
    _, road = min(safe, key=lambda option: option[0])
    if plain > most:
        said = f"{road.form} form in {road.dtype}"
        said += f" with a smooth part of rank {road.low_rank.rank}" if road.low_rank else ""
        log.info("agop: the plain gram form would lose %.0e of M in %s; running the %s", plain, X.dtype, said)
    return road


def _room(W: torch.Tensor, limit: int | None) -> int:
    """Bytes a call may take, its stored weights included: of what is free now these are no part."""
    return budget(limit, W.device) + (W.numel() * W.element_size() if limit is None else 0)


def _warn_of(loss: float) -> None:
    """The gram form was asked for where it loses digits."""
    warn(
        f"agop: the gram form loses about {loss:.0e} of M on these points; the gradient form ran instead, as with "
        "method='auto'"
    )


def centring_cancels(kernel: Radial, X, alpha, Z, row_weights=None) -> bool:
    """Whether gradients agree so nearly that float32 weights cannot hold what centring leaves of them.

    From the float64 gradients of a few evaluation points, for a few random sums of the outputs.
    """
    m, K = len(Z), alpha.shape[1]
    if X.dtype != torch.float32 or m < 2 or K == 0 or not readable(X):
        return False
    index = torch.arange(0, m, max(1, m // _POINTS), device=X.device)
    signs = torch.randint(0, 2, (K, 2), generator=torch.Generator().manual_seed(0), device="cpu").mul_(2).sub_(1)
    mixed, origin, z = alpha.double() @ signs.to(alpha.device).double(), X.mean(0).double(), Z[index].double()
    g = X.new_zeros(len(index), 2, X.shape[1], dtype=torch.float64)
    for row in range(0, len(X), ROWS):
        x = X[row : row + ROWS].double()
        for _, W in tiles(x, z, len(z)):
            g += block_gradients(kernel.weight_(W), None, mixed[row : row + ROWS], x, z, origin, torch.empty_like(g))
    w = X.new_ones(len(index), dtype=torch.float64) if row_weights is None else row_weights[index].double()
    if not bool(w.sum() > 0):
        return False
    mean = torch.einsum("i,icd->cd", w, g) / w.sum()
    left = float(torch.einsum("i,icd->", w, (g - mean).square_()) / w.sum())
    return torch.finfo(X.dtype).eps * math.sqrt(float(mean.square().sum())) > _CENTRED * math.sqrt(left)


def agop_in_float64(kernel: Radial, X, alpha, Z, *, method: str, limit: int | None, **how) -> torch.Tensor | None:
    """``agop`` of float32 points with weights and products in float64; None where that does not fit into memory."""
    symmetric, room = Z is X, budget(limit, X.device) - wide_bytes(X, alpha, Z)
    x = X.double()
    z, a = x if symmetric else Z.double(), alpha.double()
    if how.get("row_weights") is not None:
        how["row_weights"] = how["row_weights"].double()
    try:
        wide = plan(x, a, z, method, room, "", "")
    except MemoryError:
        return None
    return agop(kernel, x, a, z, method=method, limit=room, plan=wide, **how)


def wide_bytes(X, alpha, Z) -> int:
    """Bytes of float64 copies of the points and the coefficients."""
    return 8 * (X.numel() + alpha.numel() + (0 if Z is X else Z.numel()))


def stored_tiles(W, X, Z, rows: int, shift) -> Iterator[tuple[slice, torch.Tensor, Near | None]]:
    """(rows of Z, their weights in X's dtype, their near pairs) of stored weights."""
    nearness = Nearness(X, Z, shift)
    for start in range(0, len(W), rows):
        row = slice(start, min(len(W), start + rows))
        block = W[row].to(X.dtype)
        yield row, block, nearness.among_weights(block, row)


def gradient_form(
    blocks: Iterable,
    alpha,
    X,
    Z,
    shift,
    center: bool,
    step: Callable | None = None,
    roots: torch.Tensor | None = None,
    scaled: bool = False,
) -> torch.Tensor:
    """sum_c G_c^T G_c; float64 (d, d).

    Args:
        blocks: (rows of Z, weights, near pairs), as ``weight_tiles`` gives them.
        shift: what to subtract from the points, or None.
        center: subtract the mean gradient. Every block is centred by its own mean before it is squared, and what the
            means differ by is added: in one pass, and no digit of M goes along with the mean.
        step: a backend's product, as in ``block_gradients``.
        roots: square roots of the points' weights; scaled: the rows of W have been multiplied by them.
    """
    K, d = alpha.shape[1], X.shape[1]
    M = X.new_zeros(d, d, dtype=torch.float64)
    means = Means(K * d, X) if center else None
    buffer = None
    for row, W, near in blocks:
        if roots is not None and not scaled:
            W.mul_(roots[row, None])
        z = Z[row]
        if buffer is None:
            buffer = X.new_empty(len(z), K, d)
        G = block_gradients(W, near, alpha, X, z, shift, buffer[: len(z)], step)
        if means is not None:
            apart = means.centre_(G.view(len(z), -1), None if roots is None else roots[row]).view(K, d)
            add_squares_(M, apart)
        add_squares_(M, G.view(-1, d))
    return symmetrise_(M)


class Means:
    """The mean gradient of the blocks seen so far: variances of blocks merge without losing digits."""

    def __init__(self, size: int, like: torch.Tensor):
        self.weight = like.new_zeros((), dtype=torch.float64)
        self.mean = like.new_zeros(size, dtype=torch.float64)

    def centre_(self, G: torch.Tensor, roots: torch.Tensor | None) -> torch.Tensor:
        """Subtract from a block G (b, size) its own mean; returns v, whose v v^T the merged sum of squares adds.

        roots: square roots of the rows' weights, by which the rows of G have been multiplied.
        """
        if roots is None:
            weight, mean = self.weight.new_full((), float(len(G))), G.mean(0)
            G -= mean
            rest = G.mean(0)  # what rounding left of it
            G -= rest
        else:
            weight = roots.double().square().sum()
            unit = (roots / weight.clamp(min=torch.finfo(torch.float64).tiny)).to(G.dtype)
            mean = unit @ G
            G.addmm_(roots[:, None], mean[None], alpha=-1.0)
            rest = unit @ G
            G.addmm_(roots[:, None], rest[None], alpha=-1.0)
        apart = mean.double() + rest - self.mean
        total = (self.weight + weight).clamp(min=torch.finfo(torch.float64).tiny)
        self.mean += apart * (weight / total)
        apart *= (self.weight * weight / total).sqrt()
        self.weight += weight
        return apart


def mean_gradient(blocks, alpha, X, Z, shift, roots=None) -> torch.Tensor:
    """mean_i g_ic, float64 (K, d), from row blocks of weights.

    With roots, the mean weighted by their squares; the rows of the weights have been multiplied by the roots then.
    """
    columns, against = (X.new_zeros(size, dtype=torch.float64) for size in (len(X), (alpha.shape[1], X.shape[1])))
    origin = (X.mean(0) if shift is None else shift).double()  # float64 holds what near pairs differ by
    wide = alpha.double()
    for row, block in blocks:
        W = block.double() if roots is None else block.double() * roots[row, None]
        columns += W.sum(0)
        against += (W @ wide).T @ (Z[row].double() - origin)
    for part, x in zip((wide * columns[:, None]).split(256), X.split(256), strict=True):
        against -= part.T @ (x.double() - origin)
    return against.div_(-len(Z) if roots is None else -roots.double().square().sum())
