"""What the two forms of the AGOP cost: operations, seconds at the device's rates, bytes; and the plan made of that."""

from __future__ import annotations

import functools

import torch

from ..calibration import rate, source
from ..gemm import square_bytes
from ..plan import AIM, RAISE_LIMIT, ROWS, AgopTask, Plan, budget, fitting_rows, format_bytes
from ..precision import dtype_name
from . import gram as torch_gram
from .distance import near_chunk, tile_bytes
from .gradients import chunk_of, columns_at_once, gradient_aim, gradient_bytes
from .low_rank import RANK


def flops(m: int, n: int, d: int, K: int, symmetric: bool) -> dict[str, float]:
    """Floating-point operations of each form, distances included."""
    gradient = 2.0 * m * n * d * (K + 1) + 2.0 * m * K * d * d
    if symmetric:
        gram = 1.0 * n * n * d + 1.0 * n**3 + 1.0 * n * n * d + 2.0 * n * d * d + 3.0 * n * n * K
    else:
        gram = 2.0 * m * n * d + 1.0 * n * n * m + 1.0 * n * n * d + 2.0 * m * n * d + 2.0 * (n + m) * d * d
    return {"gradient": gradient, "gram": gram}


def products_of(X: torch.Tensor, device: str | None, *, symmetric: bool) -> dict[str, str]:
    """The word for each form's products: the dtype's own, or those of device steps.

    symmetric: evaluation points are the centers, and none has a weight; the gram form of device steps is for these.
    """
    own = dtype_name(X.dtype)
    return {"gradient": device or own, "gram": device if device and symmetric else own}


def costs(X: torch.Tensor, Z: torch.Tensor, K: int, products: dict[str, str], *, symmetric: bool) -> dict[str, float]:
    """Estimated seconds of each form: its operations at its rate; symmetric: as of ``products_of``."""
    work = flops(len(Z), len(X), X.shape[1], K, symmetric)
    return {form: work[form] / rate(form, products[form], X.device) for form in work}


def gradient_form_bytes(rows: int, X, alpha, Z, center: bool) -> int:
    """Most memory that the gradient form takes with blocks of that many rows."""
    (n, d), K, m, size = X.shape, alpha.shape[1], len(Z), X.element_size()
    # A number that is expanded to the whole stands for coefficients without gaps, in a plan of tensors on meta.
    copied = 0 if alpha.is_contiguous() or not any(alpha.stride()) else n * K
    copied += n * columns_at_once(rows, d, K, X.device)
    held = 8 * d * d + size * (copied + 2 * (n + m) + rows * (n + K * d)) + (32 * K * d if center else 0)
    tile = tile_bytes(rows, n, m, d, size, near_chunk(X.device)) + rows * n * size  # a weight takes a block of its own
    near = gradient_bytes(rows, n, d, K, size, chunk_of(X.device))
    work = max(tile, near, square_bytes(rows * K, d, size))
    # M in float32 comes when nothing else is alive, but an allocator may keep what was freed; libraries take some more.
    return held + held // 16 + work + (4 if size == 4 else 0) * d * d


def halves_bytes(n: int, products: str) -> int:
    """What products of split weights (n, n) take beside these: two fp16 halves, padded, and a scale a row."""
    return 4 * n * (-(-n // 64) * 64 + 1) if products == "fp16x3" else 0


def gram_form_bytes(
    rows: int, X, alpha, Z, wide: bool = False, rank: int = 1, *, symmetric: bool, products: str = ""
) -> int:
    """Most memory that the gram form takes with blocks of that many rows.

    wide: float32 weights are copied for products in float64. rank: columns of the low-rank part. symmetric: as of
    ``products_of``, and products: its word for the gram form, where they are a device's own.
    """
    (n, d), K, m, size = X.shape, alpha.shape[1], len(Z), X.element_size()
    others = 0 if symmetric else m
    stored = m * n * size + (8 * (m * n + (n + others) * d + n * K) if wide else 0)
    tile = tile_bytes(rows, n, m, d, size, near_chunk(X.device)) + rows * n * size
    size = 8 if wide else size
    longer = max(m, n)
    points = size * ((2 * n + others) * d + 2 * (m + n) * (K + 1))
    low_rank = torch_gram.low_rank_bytes(m, n, d, K, rank)
    step = size * (3 * rows * longer + 2 * rows * (d + 2 * K)) + 8 * rows * (d + rank * K) + square_bytes(rows, d, size)
    narrow = (4 if X.element_size() == 4 else 0) * d * d
    held = stored + 8 * d * d
    return held + held // 16 + max(tile, halves_bytes(n, products) + points + low_rank + step) + narrow


def _plan_form(form: str, X, alpha, Z, limit: int, center: bool, symmetric: bool, products: str) -> tuple[int, int]:
    """(block rows, peak bytes) of a form, or MemoryError; products: as of ``gram_form_bytes``."""
    return (
        _plan_gradient_form(X, alpha, Z, limit, center)
        if form == "gradient"
        else _plan_gram_form(X, alpha, Z, limit, symmetric, products)
    )


def _plan_gradient_form(X, alpha, Z, limit: int, center: bool) -> tuple[int, int]:
    bytes_of = functools.partial(gradient_form_bytes, X=X, alpha=alpha, Z=Z, center=center)
    aim = gradient_aim(X.device, alpha.shape[1] * X.shape[1])
    return fitting_rows(bytes_of, limit, len(Z), "agop, gradient form,", RAISE_LIMIT, aim)


def _plan_gram_form(X, alpha, Z, limit: int, symmetric: bool, products: str = "") -> tuple[int, int]:
    bytes_of = functools.partial(gram_form_bytes, X=X, alpha=alpha, Z=Z, symmetric=symmetric, products=products)
    aim = AIM if X.device.type == "cuda" else gradient_aim(X.device, len(X))  # rows of it are multiplied by n numbers
    return fitting_rows(bytes_of, limit, max(len(Z), len(X)), "agop, gram form,", RAISE_LIMIT, aim)


def gradient_form_beside(X, alpha, Z, center: bool, room: int) -> tuple[int, int]:
    """(block rows, bytes) of the gradient form from stored weights; single rows where even these do not fit."""
    try:
        return _plan_gradient_form(X, alpha, Z, room, center)
    except MemoryError:
        return 1, gradient_form_bytes(1, X, alpha, Z, center)


def _highest_peak(form: str, rows: int, peak: int, X, alpha, Z, limit: int, center: bool, symmetric: bool) -> int:
    """Peak bytes where values ask for more than the form's least: float64 products, a larger low-rank part."""
    highest = peak
    if form == "gram":
        stored = len(X) * len(Z) * X.element_size()
        beside = stored + gradient_form_beside(X, alpha, Z, center, limit - stored)[1]
        clipped = torch_gram.nonnegative_bytes(X.shape[1])
        wide = X.dtype == torch.float32
        highest = max(beside, clipped + gram_form_bytes(rows, X, alpha, Z, wide, RANK, symmetric=symmetric))
    if center and X.dtype == torch.float32:
        x, a = (t.new_empty(t.shape, dtype=torch.float64, device="meta") for t in (X, alpha))
        z, largest = x.new_empty(Z.shape), min(ROWS, max(len(X), len(Z)))
        form_bytes = (
            gram_form_bytes(largest, x, a, z, symmetric=symmetric)
            if form == "gram"
            else gradient_form_bytes(largest, x, a, z, center=True)
        )
        highest = max(highest, wide_bytes(X, alpha, Z, symmetric=symmetric) + form_bytes)
    return max(peak, min(highest, limit))


def plan(X, alpha, Z, task: AgopTask, why: str, products: str | None = None, *, symmetric: bool) -> Plan:
    """The plan of an agop: the cheaper form that fits into memory.

    products: the word that the rates of a device's own inner kernels are known by; None for torch's. symmetric: as of
    ``products_of``.
    """
    method, center = task.method, task.center
    (n, d), K, m = X.shape, alpha.shape[1], len(Z)
    work, room = flops(m, n, d, K, symmetric), budget(task.limit, X.device)
    words = products_of(X, products, symmetric=symmetric)
    reason, fitted = f"{why}; method asked for", None
    if method == "auto":
        cost = costs(X, Z, K, words, symmetric=symmetric)
        method = min(cost, key=lambda form: cost[form])
        each = ", ".join(f"{form} form {work[form]:.2g} flop, about {seconds:.2g} s" for form, seconds in cost.items())
        reason = f"{why}; {each} ({source(X.device)})"
        try:
            fitted = _plan_form(method, X, alpha, Z, room, center, symmetric, words["gram"])
        except MemoryError:
            method = "gradient" if method == "gram" else "gram"
            reason = f"{reason}, but the cheaper one does not fit into {format_bytes(room)}"
    rows, peak = fitted or _plan_form(method, X, alpha, Z, room, center, symmetric, words["gram"])
    peak = _highest_peak(method, rows, peak, X, alpha, Z, room, center, symmetric)
    if X.dtype == torch.float32 and method == "gram":
        reason += (
            "; float32 is guarded: near collapse a low-rank part of the weights is split off, or its products run in "
            "float64, or the gradient form runs"
        )
    if X.dtype == torch.float32 and center:
        reason += "; centred gradients that nearly agree are computed in float64"
    return Plan("agop", "torch", method, reason, "", work[method], peak, rows)


def wide_bytes(X, alpha, Z, *, symmetric: bool) -> int:
    """Bytes of float64 copies of the points, one copy where these are the same, and of the coefficients."""
    return 8 * (X.numel() + alpha.numel() + (0 if symmetric else Z.numel()))
