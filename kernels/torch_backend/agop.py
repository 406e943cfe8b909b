"""Torch backend: the AGOP in its two exact forms, summed over evaluation points and outputs.

With weights W_ij = w(||z_i - x_j||), A = alpha and s = W A, the gradient of output c at z_i is
g_ic = sum_j W_ij A_jc x_j - s_ic z_i, and M = sum_ic g_ic g_ic^T is either

gradient form  M = sum_c G_c^T G_c, G_c = W (A_c o X) - s_c o Z: 2 m n K d products, W made block by block;
gram form      n^2 m products by symmetry, whatever K is, with W stored (``gram``).

The gram form's terms cancel, so it runs only while an estimate says that the cancelled digits do not matter.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from ..calibration import rate
from ..checks import largest
from ..gemm import add_squares_, symmetrise_
from ..memory.matrices import empty_matrix
from ..plan import ROWS, AgopTask, Plan, budget, on_gpu
from ..profile import Profile
from ..scaling import Points, scaled_
from . import gram as torch_gram
from .costs import costs, flops, gradient_form_beside, gram_form_bytes, halves_bytes, products_of
from .distance import NEAR_OF_FLOAT32, around_mean, dominant_offset
from .gradients import Near, Nearness, block_gradients, products_at_once
from .low_rank import RANK, LowRank, leading_part, mean_part
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
_WEIGHTS = 20  # stored weights and coefficients whose largest is within 2^-20 .. 2^20 are squared as they are
# Where the gram form would lose digits of M the gradient form loses some, too (1e-3 at a spread of 1e-4 in float32):
# float64 products are worth so many times its time.
FLOAT64_PREFERENCE = 4.0


@dataclass(frozen=True)
class InnerKernels:
    """Where the work of the two forms is done: a backend's version of each inner product.

    Attributes:
        gradients: (W, alpha, X, Z, shift, out) -> out, as ``gradients.output_gradients``; None for the library's.
        lower: as of ``gram.gram_form``, in X's dtype.
        products: what their rates are known by; None for X's dtype.
    """

    gradients: Callable | None
    lower: Callable
    products: str | None = None


TORCH_KERNELS = InnerKernels(None, torch_gram.lower_s)


@dataclass(frozen=True)
class GramDecision:
    """A form, the dtype of its products, and the part of the weights that the gram form need not square."""

    form: str
    dtype: torch.dtype
    low_rank: LowRank | None = None
    loss: float = 0.0  # of M, estimated


def agop(at: Points, alpha, task: AgopTask, plan: Plan, row_weights=None) -> torch.Tensor:
    """Sum_ic w_i g_ic g_ic^T, float64 (d, d), by the plan's form; w = row_weights, default 1."""
    kernel, X, Z, _ = at
    if len(Z) == 0 or alpha.shape[1] == 0 or (task.center and len(Z) == 1):
        return X.new_zeros(X.shape[1], X.shape[1], dtype=torch.float64)
    alpha = alpha.contiguous()  # products with a transposed one take several times as long
    if task.rounded:
        x, origin = around_mean(X)
        X, Z = x, x if Z is X else Z - origin
    if plan.method == "gradient":
        shift = dominant_offset(X)
        blocks = weight_tiles(kernel, X, Z, plan.block, shift, task.rounded)
        return gradient_form(blocks, alpha, X, Z, shift, task.center, roots=roots_of(row_weights))
    W, how = weights(kernel, X, Z, plan.block, task.rounded), {"rows": plan.block, "row_weights": row_weights}
    return agop_from_weights_(W, kernel, X, alpha, Z, task, symmetric=Z is X, **how)


def agop_from_weights_(
    W,
    kernel: Profile,
    X,
    alpha,
    Z,
    task: AgopTask,
    *,
    symmetric: bool,
    rows: int,
    kernels=TORCH_KERNELS,
    row_weights=None,
    exponent=0,
) -> torch.Tensor:
    """The same in float64 from stored weights W (m, n); W is overwritten.

    W is 2^exponent times the kernel's weights; where evaluation points are the centers (symmetric), its diagonal is
    zero. W and alpha may be wider than X. With row_weights w, everything in the AGOP is linear in the rows of W: row i
    times sqrt(w_i) gives g_ic times sqrt(w_i), and the points are then treated as any others, as W is no longer
    symmetric.
    """
    exponents = exponent_of(W), exponent_of(alpha)
    if any(exponents):  # squares would leave their dtype
        W, alpha = scaled_(W, -exponents[0]), scaled_(alpha.clone(), -exponents[1])
        how = {"symmetric": symmetric, "rows": rows, "kernels": kernels, "row_weights": row_weights}
        how["exponent"] = exponent - exponents[0]
        return scaled_(agop_from_weights_(W, kernel, X, alpha, Z, task, **how), 2 * sum(exponents))
    roots = roots_of(row_weights)
    if roots is not None:
        W.mul_(roots.to(W.dtype)[:, None])
        symmetric = False
    narrow = alpha.to(X.dtype)
    how = {"symmetric": symmetric, "products": kernels.products, "roots": roots, "rows": rows}
    decision = choose_form(W, X, narrow, Z, task, **how)
    if decision.low_rank is None:
        shift = dominant_offset(X)
        room = _room(W, task.limit) - W.numel() * W.element_size()
        beside, _ = gradient_form_beside(X, alpha, Z, task.center, room)
        # On a GPU the gradient form's blocks are larger than those of the gram form.
        rows = beside if on_gpu(X.device) else min(rows, beside)
        blocks = stored_tiles(W, X, Z, rows, shift, lambda sq: scaled_(kernel.weight_(sq), exponent), roots)
        return gradient_form(blocks, narrow, X, Z, shift, task.center, kernels.gradients, roots, scaled=True)
    wide, x = decision.dtype, X.to(decision.dtype)
    z = x if symmetric else Z.to(wide)
    lower = kernels.lower if wide == X.dtype else torch_gram.lower_s
    W = _in_dtype_(W, wide)
    part = decision.low_rank.to(wide)
    M = torch_gram.gram_form(W, x, alpha.to(wide), z, part, center=task.center, rows=rows, lower=lower, roots=roots)
    eps = torch.finfo(X.dtype).eps
    if decision.loss > 8 * eps and torch_gram.nonnegative_bytes(len(M)) <= budget(task.limit, X.device):
        return torch_gram.nonnegative(M, eps)
    return M


def agop_from_tiles(
    blocks: Iterable, kernel: Profile, X, alpha, center: bool, *, step: Callable | None = None, row_weights=None
) -> torch.Tensor:
    """The gradient form at X in float64, from (rows, their stored weights in X's dtype), each overwritten by the next.

    The diagonal of the weights is zero. ``step`` as in ``gradient_form``.
    """
    exponent = exponent_of(alpha)
    alpha = scaled_(alpha.clone(), -exponent).to(X.dtype).contiguous()
    shift = dominant_offset(X)
    nearness = Nearness(X, X, shift)
    tiles = ((row, W, nearness.among_stored(W, row, kernel.weight_)) for row, W in blocks)
    M = gradient_form(tiles, alpha, X, X, shift, center, step, roots_of(row_weights))
    return scaled_(M, 2 * exponent)


def exponent_of(W: torch.Tensor) -> int:
    """The power of two of a tensor's largest entry, 0 where that is within 2^-20 .. 2^20."""
    size = largest(W)
    exponent = math.frexp(size)[1] if math.isfinite(size) else 0
    return exponent if abs(exponent) > _WEIGHTS else 0


def roots_of(row_weights: torch.Tensor | None) -> torch.Tensor | None:
    """Square roots of the evaluation points' weights."""
    return None if row_weights is None else row_weights.sqrt()


def weights(kernel: Profile, X, Z, rows: int, rounded: bool = False) -> torch.Tensor:
    """W (m, n) stored; the diagonal is zero where Z is X. rounded: as of ``plan.AgopTask``."""
    W, near = empty_matrix(len(Z), len(X), X), NEAR_OF_FLOAT32 if rounded else None
    if Z is X:
        return fill_symmetric(W, X, rows, kernel.weight_, near).fill_diagonal_(0.0)
    for _, block in tiles(X, Z, rows, out=W, near=near):
        kernel.weight_(block)
    return W


def choose_form(
    W, X, alpha, Z, task: AgopTask, *, symmetric: bool, products: str | None = None, roots=None, rows=ROWS
) -> GramDecision:
    """The cheapest form that loses no digits of M and fits into memory, in blocks of that many rows.

    alpha is of X's dtype; symmetric: evaluation points are the centers, and none has a weight; roots: square roots of
    the points' weights, by which the rows of W have been multiplied.
    """
    if task.method == "gradient":
        return GramDecision("gradient", X.dtype)
    (m, n), d, K, explicit = W.shape, X.shape[1], alpha.shape[1], task.method != "auto"
    word = products_of(X, products, symmetric=symmetric)
    eps, allowed = PRODUCT_ROUNDING.get(word["gram"], (torch.finfo(X.dtype).eps, GRAM_LIMIT[X.dtype]))
    allowed = max(allowed, EXPLICIT_LOSS_FACTOR * eps, GRAM_WARN_LOSS) if explicit else allowed
    cost, room = costs(X, Z, K, word, symmetric=symmetric), _room(W, task.limit)
    float64_rate = rate("gram", "float64", X.device)
    more = torch_gram.low_rank_flops(m, n, d, K, RANK) / float64_rate

    def fits(dtype: torch.dtype, rank: int) -> bool:
        wide, split = _is_copied(W, dtype), word["gram"] if dtype == X.dtype else ""
        if not wide and not halves_bytes(n, split):
            return True
        left = 0 if wide else W.numel() * (W.element_size() - dtype.itemsize)  # of their memory, by narrowed weights
        return left + gram_form_bytes(rows, X, alpha, Z, wide, rank, symmetric=symmetric, products=split) <= room

    if not explicit and cost["gram"] > cost["gradient"]:
        wide = X.dtype != torch.float64 and fits(torch.float64, 1)
        least = flops(m, n, d, K, symmetric)["gram"] / float64_rate if wide else math.inf
        if least > FLOAT64_PREFERENCE * cost["gradient"]:
            return GramDecision("gradient", X.dtype)  # whatever the gram form would lose: no estimate
    estimate = torch_gram.CancellationEstimate(W, X, alpha, Z, task.center, roots)
    part, price = mean_part(W, symmetric), cost["gram"]
    growth = LOSS_PER_EPS * estimate.amplification(part)
    plain = eps * growth  # the loss where nothing but the mean is taken out
    if (
        plain > LOW_RANK_THRESHOLD * allowed
        and (explicit or price + more < cost["gradient"])
        and n > 4 * RANK
        and gram_form_bytes(rows, X, alpha, Z, False, RANK, symmetric=symmetric, products=word["gram"]) <= room
    ):
        better = leading_part(W, symmetric)
        if (less := LOSS_PER_EPS * estimate.amplification(better)) < growth:
            part, growth, price = better, less, price + more
    narrow, loss = eps * growth <= allowed and fits(X.dtype, part.rank), torch.finfo(torch.float64).eps * growth
    safe = [(price, GramDecision("gram", X.dtype, part, eps * growth))] if narrow else []
    if X.dtype != torch.float64 and fits(torch.float64, part.rank) and loss <= allowed:
        work = flops(m, n, d, K, symmetric)["gram"] + torch_gram.low_rank_flops(m, n, d, K, part.rank)
        safe.append((work / float64_rate, GramDecision("gram", torch.float64, part, loss)))
    if not explicit:
        safe.append((cost["gradient"] * (1.0 if narrow else FLOAT64_PREFERENCE), GramDecision("gradient", X.dtype)))
    elif not safe:
        torch_gram.warn_of_loss(growth * torch.finfo(torch.float64 if fits(torch.float64, part.rank) else X.dtype).eps)
        return GramDecision("gradient", X.dtype)
    _, decision = min(safe, key=lambda option: option[0])
    if plain > allowed:
        rank = f" with a low-rank part of rank {decision.low_rank.rank}" if decision.low_rank else ""
        chosen = f"{decision.form} form in {decision.dtype}{rank}"
        log.info("agop: the plain gram form would lose %.0e of M in %s; running the %s", plain, X.dtype, chosen)
    return decision


def _is_copied(W: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether W takes more memory in another dtype: narrower numbers have room where it is."""
    return W.dtype != dtype and (W.element_size() < dtype.itemsize or not W.is_contiguous())


def _in_dtype_(W: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """W in a dtype, in its own memory unless it ``_is_copied``."""
    if W.dtype == dtype:
        return W
    if _is_copied(W, dtype):
        return empty_matrix(len(W), W.shape[1], W, dtype).copy_(W)
    narrow = W.view(-1).view(dtype)[: W.numel()].view(W.shape)
    for start in range(0, len(W), ROWS):  # what is written lies before all that is still to be read
        row = slice(start, start + ROWS)
        narrow[row] = W[row].to(dtype)
    return narrow


def _room(W: torch.Tensor, limit: float | None) -> int:
    """Bytes a call may take, its stored weights included: of what is free now these are no part."""
    return budget(limit, W.device) + (W.numel() * W.element_size() if limit is None else 0)


def stored_tiles(
    W, X, Z, rows: int, shift, weight_: Callable, roots=None
) -> Iterator[tuple[slice, torch.Tensor, Near | None]]:
    """(rows of Z, their weights in X's dtype, their near pairs) of stored weights; the rest as in ``among_stored``."""
    nearness = Nearness(X, Z, shift)
    for start in range(0, len(W), rows):
        row = slice(start, min(len(W), start + rows))
        block = W[row].to(X.dtype)
        yield row, block, nearness.among_stored(block, row, weight_, None if roots is None else roots[row].to(block))


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
    """sum_c G_c^T G_c; float64 (d, d): ``products.outer_products`` of gradients that exist in blocks only.

    Args:
        blocks: (rows of Z, weights, near pairs), as ``weight_tiles`` gives them.
        shift: what to subtract from the points, or None.
        center: subtract the mean gradient. Every block is centred by its own mean before it is squared, and what the
            means differ by is added: in one pass, and no digit of M goes along with the mean.
        step: a backend's product, as in ``block_gradients``; None for the library's.
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
        if buffer is None:  # the first block is the largest
            buffer = X.new_empty(len(z), K, d)
            step = step or products_at_once(alpha, X, shift, len(z))
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
            unit = (roots.double() / weight.clamp(min=torch.finfo(torch.float64).tiny)).to(G.dtype)
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


def mean_gradient(blocks, alpha, X, Z, shift, total: float | torch.Tensor) -> torch.Tensor:
    """sum_i w_i g_ic / total, float64 (K, d), from (rows of Z, their gradient weights times the points' weights w)."""
    columns, against = (X.new_zeros(size, dtype=torch.float64) for size in (len(X), (alpha.shape[1], X.shape[1])))
    origin = (X.mean(0) if shift is None else shift).double()  # float64 holds what near pairs differ by
    wide = alpha.double()
    for row, block in blocks:
        W = block.double()
        columns += W.sum(0)
        against += (W @ wide).T @ (Z[row].double() - origin)
    for part, x in zip((wide * columns[:, None]).split(256), X.split(256), strict=True):
        against -= part.T @ (x.double() - origin)
    return against.div_(-total)
