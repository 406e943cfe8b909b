"""Torch backend: the AGOP in its two exact forms, summed over evaluation points and outputs.

With weights W_ij = w(||z_i - x_j||), A = alpha and s = W A, the gradient of output c at z_i is
g_ic = sum_j W_ij A_jc x_j - s_ic z_i, and M = sum_ic g_ic g_ic^T is either

gradient form  M = sum_c G_c^T G_c, G_c = W (A_c o X) - s_c o Z: 2 m n K d products, W made block by block;
gram form      M = X^T [(A A^T) o (W^T W)] X - X^T T^T Z - Z^T T X + Z^T diag(sum_c s_c^2) Z, T = W o (s A^T):
               n^2 m products by symmetry, whatever K is, with W stored.

The gram form's terms cancel: near collapse W has entries far larger than any gradient. It therefore runs only
while ``amplification`` says that the cancelled digits do not matter.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ._checks import NumericalWarning
from ._plan import Plan, block_rows, budget, human
from ._products import product
from ._rates import rate, source
from .distance import squared_norms
from .radial import Radial
from .torch_blocks import BLOCKS_ALIVE, dominant_offset, fill_symmetric, output_gradients, tiles

log = logging.getLogger("fastagop")

# The gram form loses about _LOSS eps amplification of M (measured: within a factor of three from spread 1 to 1e-6);
# it runs in a dtype while that is below the dtype's limit.
_LOSS = 4.0
GRAM_LIMIT = {torch.float32: 1e-5, torch.float64: 1e-7}
GRAM_SAID = 1e-5  # a gram form that was asked for warns above this
# Where the gram form would lose digits of M the gradient form loses some, too (1e-3 at a spread of 1e-4 in float32):
# float64 products are worth so many times its time.
_DIGITS = 4.0
_PROBES = 64
_SQUARE = 128  # rows of the steps along the diagonal


@dataclass(frozen=True)
class Steps:
    """Where the work of the two forms is done: a backend's version of each inner step.

    Attributes:
        gradients: (W, alpha, X, Z, shift, out) -> out, as ``torch_blocks.output_gradients``.
        lower: (W, alpha) -> the function (s, weight, start, stop) -> S[start:stop, :stop], diagonal halved, for the
            gram form on Z = X in X's dtype.
        products: what their rates are known by; None for X's dtype.
    """

    gradients: Callable
    lower: Callable
    products: str | None = None


def flops(m: int, n: int, d: int, K: int, own: bool) -> dict[str, float]:
    """Floating-point operations of each form, distances included."""
    gradient = 2.0 * m * n * d * (K + 1) + 2.0 * m * K * d * d
    if own:
        gram = 1.0 * n * n * d + 1.0 * n**3 + 1.0 * n * n * d + 2.0 * n * d * d + 3.0 * n * n * K
    else:
        gram = 2.0 * m * n * d + 1.0 * n * n * m + 1.0 * n * n * d + 2.0 * m * n * d + 2.0 * (n + m) * d * d
    return {"gradient": gradient, "gram": gram}


def products_of(X: torch.Tensor, Z: torch.Tensor, device: str | None) -> dict[str, str]:
    """The word for each form's products: the dtype's own, or those of device steps, whose gram form is for Z = X."""
    own = str(X.dtype).removeprefix("torch.")
    return {"gradient": device or own, "gram": device if device and Z is X else own}


def costs(X: torch.Tensor, Z: torch.Tensor, K: int, products: dict[str, str]) -> dict[str, float]:
    """Estimated seconds of each form: its operations at its rate."""
    work = flops(len(Z), len(X), X.shape[1], K, Z is X)
    return {form: work[form] / rate(form, products[form], X.device) for form in work}


def _plan_form(form: str, X, alpha, Z, limit: int) -> tuple[int, int]:
    """(block rows, peak bytes) of a form, or MemoryError."""
    (n, d), K, m, size = X.shape, alpha.shape[1], len(Z), X.element_size()
    if form == "gradient":
        fixed, row, most = d * d * (8 + size) + n * K * size, ((BLOCKS_ALIVE + 1) * n + K * d) * size, m
    else:
        fixed, row, most = (
            d * d * 16 + (m * n + n * d) * size,
            (max(BLOCKS_ALIVE - 1, 2) * n + d) * size,
            max(m, n),
        )
    rows = block_rows(row, fixed, limit, most, f"agop, {form} form,")
    return rows, fixed + rows * row


def plan(X, alpha, Z, method: str, limit: int | None, why: str, precision: str, device: str | None = None) -> Plan:
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
            _plan_form(method, X, alpha, Z, room)
        except MemoryError:
            method = "gradient" if method == "gram" else "gram"
            reason = f"{reason}, but the cheaper one does not fit into {human(room)}"
    rows, peak = _plan_form(method, X, alpha, Z, room)
    if method == "gram" and X.dtype == torch.float32:
        reason += "; float32 is guarded: near collapse its products run in float64, or the gradient form does"
    return Plan("agop", "torch", method, reason, precision, work[method], peak, rows)


def agop(kernel: Radial, X, alpha, Z, *, center: bool, method: str, limit: int | None, plan: Plan) -> torch.Tensor:
    """sum_ic g_ic g_ic^T in float64 accumulation, shape (d, d), of X's dtype; method is what the caller said."""
    if len(Z) == 0 or alpha.shape[1] == 0 or (center and len(Z) == 1):
        return X.new_zeros(X.shape[1], X.shape[1])
    alpha = alpha.contiguous()  # products with a transposed one take several times as long
    if plan.method == "gradient":

        def blocks():
            return ((row, kernel.weight_(block)) for row, block in tiles(X, Z, plan.block))

        return gradient_form(blocks, alpha, X, Z, center).to(X.dtype)
    W = weights(kernel, X, Z, plan.block)
    return agop_from_weights(W, X, alpha, Z, center=center, method=method, limit=limit, rows=plan.block)


def agop_from_weights(
    W, X, alpha, Z, *, center: bool, method: str, limit: int | None, rows: int, steps: Steps | None = None
) -> torch.Tensor:
    """The same from stored weights W (m, n), zero diagonal where Z is X; W and alpha may be wider than X."""
    steps = steps or TORCH_STEPS
    form, wide = safe_form(W, X, alpha.to(X.dtype), Z, center, method, limit, steps.products)
    if form == "gradient":

        def blocks():
            return ((slice(i, i + rows), W[i : i + rows]) for i in range(0, len(W), rows))

        return gradient_form(blocks, alpha.to(X.dtype), X, Z, center, steps.gradients).to(X.dtype)
    W, x, alpha = W.to(wide), X.to(wide), alpha.to(wide)
    if Z is not X:
        return gram_form(W, x, alpha, Z.to(wide), center, rows).to(X.dtype)
    lower = (steps if wide == X.dtype else TORCH_STEPS).lower(W, alpha)
    return gram_form(W, x, alpha, x, center, rows, lower).to(X.dtype)


def weights(kernel: Radial, X, Z, rows: int) -> torch.Tensor:
    """W (m, n) stored; the diagonal is zero where Z is X."""
    W = X.new_empty(len(Z), len(X))
    if Z is X:
        return fill_symmetric(W, X, rows, kernel.weight_).fill_diagonal_(0.0)
    for _, block in tiles(X, Z, rows, out=W):
        kernel.weight_(block)
    return W


def amplification(W, X, alpha, Z, center: bool = False) -> float:
    """How much larger the gram form's uncancelled terms are than M (centred where asked), in trace.

    The terms: sum_j |a_j|^2 (W^T W)_jj |x_j - mean|^2, and sum_ic s_ic^2 |z_i - mean|^2 where Z is not X. The
    trace of M, sum |g_ic|^2, is estimated on a few evaluation points with one random sign vector over the outputs
    each, whose squared norm is unbiased.
    """
    spread = torch.linalg.vector_norm(W, dim=1 if Z is X else 0).square_().to(X.dtype)
    mean = X.mean(0)
    total = (squared_norms(alpha) * spread * squared_norms(X - mean)).sum(dtype=torch.float64)
    if Z is not X:
        s = (W @ alpha.to(W.dtype)).to(X.dtype)
        total += (squared_norms(s) * squared_norms(Z - mean)).sum(dtype=torch.float64)
    m = len(Z)
    index = torch.arange(0, m, max(1, m // _PROBES), device=X.device)
    signs = torch.randint(0, 2, (alpha.shape[1], len(index)), generator=torch.Generator().manual_seed(0))
    signs = signs.to(alpha).mul_(2).sub_(1)
    mixed = W[index].to(X.dtype) * (alpha @ signs).T
    g = mixed @ X - mixed.sum(1, keepdim=True) * Z[index]
    if center:
        g -= signs.T @ (_gradient_sum(W.sum(0).to(X.dtype), (W @ alpha.to(W.dtype)).to(X.dtype), X, alpha, Z) / m)
    trace = g.square().sum(dtype=torch.float64) * m / len(index)
    return float(total / trace) if trace > 0 else (float("inf") if total > 0 else 0.0)


def _gradient_sum(column_sums, s, X, alpha, Z) -> torch.Tensor:
    """sum_i g_ic, shape (K, d), from the column sums of W and s = W alpha."""
    return (alpha * column_sums[:, None]).T @ X - s.T @ Z


def safe_form(
    W, X, alpha, Z, center: bool, method: str, limit: int | None, products: str | None = None
) -> tuple[str, torch.dtype]:
    """The cheapest (form, dtype of its products) that loses no digits of M and fits into memory."""
    if method == "gradient":
        return method, X.dtype
    growth = _LOSS * amplification(W, X, alpha, Z, center)
    work = flops(len(Z), len(X), X.shape[1], alpha.shape[1], Z is X)
    cost = costs(X, Z, alpha.shape[1], products_of(X, Z, products))
    room = budget(limit, X.device) - (0 if limit is None else W.numel() * W.element_size())
    safe, fitting = [], []
    for dtype in (X.dtype, torch.float64) if X.dtype != torch.float64 else (torch.float64,):
        items = 0 if W.dtype == dtype else W.numel() + X.numel() + (0 if Z is X else Z.numel())
        if items * dtype.itemsize <= room:
            fitting.append(dtype)
            if torch.finfo(dtype).eps * growth <= GRAM_LIMIT[X.dtype]:
                wide = rate("gram", "float64", X.device)
                price = cost["gram"] if dtype == X.dtype else work["gram"] / wide
                safe.append((price, "gram", dtype))
    if method == "gram":
        return "gram", safe[0][2] if safe else _lossy_gram(growth, X.dtype, fitting)
    narrow = all(option[2] != X.dtype for option in safe)
    other = cost["gradient"] * (_DIGITS if narrow else 1.0)
    _, form, dtype = min([*safe, (other, "gradient", X.dtype)], key=lambda option: option[0])
    if narrow:
        loss = torch.finfo(X.dtype).eps * growth
        log.info(
            "agop: the gram form would lose %.0e of M in %s; running %s form in %s",
            loss,
            X.dtype,
            form,
            dtype,
        )
    return form, dtype


def _lossy_gram(growth: float, dtype: torch.dtype, fitting: list[torch.dtype]) -> torch.dtype:
    """The gram form was asked for where it loses digits: the widest dtype that fits, said aloud if that is bad."""
    widest = fitting[-1] if fitting else dtype
    loss = torch.finfo(widest).eps * growth
    if loss > GRAM_SAID:
        warnings.warn(
            f"agop: the gram form loses about {loss:.0e} of M on these points even in {widest}; use method='auto' "
            "or 'gradient'",
            NumericalWarning,
            stacklevel=7,
        )
    return widest


def gradient_form(blocks: Callable, alpha, X, Z, center: bool, gradients=output_gradients) -> torch.Tensor:
    """sum_c G_c^T G_c; float64 (d, d). blocks() gives (rows of Z, weights) once more each time it is called.

    Centring takes a first pass for the mean: subtracted after squaring, it would take M's digits along.
    """
    K, d = alpha.shape[1], X.shape[1]
    shift = dominant_offset(X)
    M = X.new_zeros(d, d, dtype=torch.float64)
    mean = mean_gradient(blocks(), alpha, X, Z, shift) if center else None
    buffer = None
    for row, W in blocks():
        z = Z[row]
        if buffer is None:
            buffer = X.new_empty(len(z), K, d)
        G = gradients(W.to(X.dtype), alpha, X, z, shift, buffer[: len(z)])
        if mean is not None:
            G -= mean
        G = G.view(-1, d)
        M += product(G.T, G.T)
    return M


def mean_gradient(blocks, alpha, X, Z, shift) -> torch.Tensor:
    """mean_i g_ic, shape (K, d), from row blocks of weights."""
    if shift is not None:
        X, Z = X - shift, Z - shift
    columns, against = X.new_zeros(len(X)), X.new_zeros(alpha.shape[1], X.shape[1])
    for row, block in blocks:
        W = block.to(X.dtype)
        columns += W.sum(0)
        against += (W @ alpha).T @ Z[row]
    return ((alpha * columns[:, None]).T @ X - against) / len(Z)


def gram_form(W, X, alpha, Z, center: bool, rows: int, lower=None, starts=None) -> torch.Tensor:
    """X^T S X from stored weights; float64 (d, d). Blocks of S exist one at a time, lower part only.

    With starts, what these block rows of S contribute, for Z = X.
    """
    own = Z is X
    mean = X.mean(0)
    X = X - mean  # S annihilates constants
    Z = X if own else Z - mean
    n, d = X.shape
    s = product(W, alpha.T)
    weight = s.square().sum(1)  # sum_c s_ic^2
    lower = lower or _lower_s(W if own else W.T, W if own else None, alpha)
    half = X.new_zeros(d, d, dtype=torch.float64)  # M = half + half^T
    for start in range(0, n, rows) if starts is None else starts:
        stop = min(n, start + rows)
        row = slice(start, stop)
        S = lower(s, weight, start, stop)
        half += product(X[row].T, product(S, X[:stop].T).T)
    if not own:
        for start in range(0, len(Z), rows):
            row = slice(start, min(len(Z), start + rows))
            z = Z[row]
            T = product(s[row], alpha).mul_(W[row])
            half -= product(z.T, product(T, X.T).addcmul_(weight[row, None], z, value=-0.5).T)
    M = half + half.T
    if center:
        total = _gradient_sum(W.sum(0), s, X, alpha, Z)
        M -= (total.T @ total).double() / len(Z)
    return M


def _lower_s(Wt: torch.Tensor, W: torch.Tensor | None, alpha: torch.Tensor) -> Callable:
    """The block rows of S up to the diagonal, which is halved; W where Z is X, and S then holds all of M."""

    def lower(s, weight, start: int, stop: int) -> torch.Tensor:
        row = slice(start, stop)
        S = _lower_rows(Wt, start, stop)
        S.mul_(product(alpha[row], alpha[:stop]))
        if W is not None:  # T + T^T = W o (s A^T + A s^T)
            other = product(s[row], alpha[:stop]).addmm_(alpha[row], s[:stop].T)
            S.addcmul_(W[row, :stop], other, value=-1.0)
            S.diagonal(start).add_(weight[row])
        S.diagonal(start).mul_(0.5)
        S[:, start:].tril_()
        return S

    return lower


TORCH_STEPS = Steps(output_gradients, lambda W, alpha: _lower_s(W, W, alpha))


def _lower_rows(Wt: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Rows start:stop of W^T W up to the diagonal; of the square on the diagonal one half is mostly left undone."""
    width = stop - start
    if width < 2 * _SQUARE:
        return product(Wt[start:stop], Wt[:stop])
    out = Wt.new_zeros(width, stop)
    out[:, :start] = product(Wt[start:stop], Wt[:start])
    for i in range(0, width, _SQUARE):
        j = min(width, i + _SQUARE)
        out[i:j, start : start + j] = product(Wt[start + i : start + j], Wt[start : start + j])
    return out
