"""What plans promise, against lists of what is alive at the worst moment; where two moments compete, both are tried."""

from __future__ import annotations

import pytest
import torch
from fastagop.kernels import calibration, gemm
from fastagop.kernels.plan import AgopTask
from fastagop.kernels.torch_backend import backend, costs, diagonal, distance, gradients, gram, matrix, tiles
from fastagop.kernels.torch_backend.backend import plan_gradients
from fastagop.kernels.torch_backend.low_rank import RANK

CHUNK = 2**18  # items of a step's work
CPU = torch.device("cpu")
HUGE = 10**15


def points(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor that takes no memory: plans look at shapes."""
    return torch.zeros(1, dtype=dtype).expand(*shape)


def own(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


# ---- Blocks


@pytest.mark.parametrize(("d", "K", "rows"), [(73, 7, 128), (64, 8, 384), (511, 1, 128), (512, 1, 384)])
def test_blocks_have_more_rows_where_a_weight_multiplies_many_numbers(d, K, rows):
    X, alpha, Z = points(20_000, d), points(20_000, K), points(3000, d)
    task = AgopTask("sum", False, method="gradient")
    assert costs.plan(X, alpha, Z, task, "", symmetric=False).block == rows
    assert plan_gradients(X, alpha, Z, "").block == rows


@pytest.mark.parametrize(("n", "rows"), [(511, 256), (512, 384), (8000, 384)])
def test_blocks_of_the_gram_form_have_more_rows_among_many_points(n, rows):
    X, task = points(n, 50), AgopTask("sum", False, method="gram")
    assert costs.plan(X, points(n, 3), X, task, "", symmetric=True).block == rows


@pytest.mark.parametrize(
    ("rows", "d", "K", "columns"),
    [(128, 50, 10, 510), (128, 51, 10, 0), (300, 299, 4, 1200), (300, 300, 4, 0), (127, 5, 1, 0), (384, 4, 1, 0)],
)
def test_columns_at_once(rows, d, K, columns, monkeypatch):
    """Four for each row; none where memory is short, where every difference is formed, and on a GPU."""
    n = 20_000
    assert gradients.columns_at_once(rows, d, K, torch.device("cpu")) == columns
    assert gradients.columns_at_once(rows, d, K, torch.device("cuda")) == 0
    X, Z, alpha = points(n, d), points(rows, d), points(n, K)

    def peaks():
        return plan_gradients(X, alpha, Z, "").peak_bytes, costs.gradient_form_bytes(rows, X, alpha, Z, False)

    counted = peaks()
    for module in (costs, backend):
        monkeypatch.setattr(module, "columns_at_once", lambda rows, d, K, device: 0)
    of_gradients, of_agop = (more - less for more, less in zip(counted, peaks(), strict=True))
    items = 4 * n * columns
    assert of_gradients == items
    assert of_agop == items + items // 16


@pytest.mark.parametrize(("size", "copies"), [(4, 4), (8, 2)])
def test_a_block_of_distances(size, copies):
    """Points in a unit of their own and copies for the product, norms twice, four copies of the block's own points."""
    rows, n, m, d = 10, 100, 80, 6
    held = size * (copies * n * d + m * d + 4 * rows * d + 2 * (n + m))
    suspects = rows * n * (2 * size + 2)  # a copy, thresholds, and a mask with its complement
    direct = 16 * rows * n + 3 * size * rows * n * d  # two indices of a pair, and its differences three times
    assert distance.tile_bytes(rows, n, m, d, size) == held + suspects + direct


def test_a_block_of_distances_of_many_points():
    """One step of a group's product has sixteen rows then, and five copies of them exceed a chunk of differences."""
    rows, n, m, d, size = 256, 60_000, 500, 10, 4
    held = size * (4 * n * d + m * d + 4 * rows * d + 2 * (n + m)) + rows * n * (2 * size + 2)
    narrow = held + 5 * 16 * n * size
    wide = 8 * 128 * n + distance.tile_bytes(128, n, 128, d, 8)  # 128 rows in float64, which are rounded
    assert distance.tile_bytes(rows, n, m, d, size) == wide > narrow
    assert distance.tile_bytes(rows, n, 17, d, size) == narrow - size * (m - 17) * (d + 2)  # pairs too few for that
    few, m = 4000, 200  # here a chunk of pairs with its differences does
    held = size * (4 * few * d + m * d + 4 * rows * d + 2 * (few + m)) + rows * few * (2 * size + 2)
    assert distance.tile_bytes(rows, few, m, d, size) == held + 16 * CHUNK + 3 * size * CHUNK


def test_a_block_of_distances_of_many_features():
    """A pair with more features than a chunk has items is measured by itself."""
    rows, n, m, d, size = 2, 3, 4, CHUNK + 5, 4
    held = size * (4 * n * d + m * d + 4 * rows * d + 2 * (n + m)) + rows * n * (2 * size + 2)
    assert distance.tile_bytes(rows, n, m, d, size) == held + 16 * rows * n + 3 * size * d


@pytest.mark.parametrize("d", [1, 4])
@pytest.mark.parametrize(("rows", "n", "at_once"), [(10, 100, 1000), (256, 1000, 2**16), (4, 10**5, 10**5)])
def test_a_block_of_distances_of_few_features(d, rows, n, at_once):
    m, size = 80, 8
    expected = size * (2 * n * d + m * d + n + m + 2 * at_once)
    assert distance.tile_bytes(rows, n, m, d, size) == expected


def test_a_block_of_gradients():
    """Everything fits into one chunk: rows 10, centers 100, features 6, outputs 20 of which 16 go at once."""
    rows, n, d, K, size = 10, 100, 6, 20, 4
    weights = 5 * rows * n * size + rows * n  # of W: near pairs, a copy, the other factor three times; a mask
    shifted = 2 * n * d * size + rows * d * size + 2 * rows * K * size + rows * rows * size
    sums = size * (2 * n * 16 + 4 * rows * 16)  # of the rounding of sixteen outputs
    group = 8 * n * (2 * d + 16) + 48 * rows * n
    outputs = rows * K * d * (16 + size)
    assert gradients.gradient_bytes(rows, n, d, K, size) == weights + shifted + sums + group + outputs


@pytest.mark.parametrize(("rows", "n", "pairs"), [(256, 4000, CHUNK), (256, 20_000, 16 * 20_000)])
@pytest.mark.parametrize(("K", "outputs"), [(1, 256 * 20), (200, CHUNK)])
def test_a_block_of_gradients_beyond_a_chunk(rows, n, pairs, K, outputs):
    d, size, some = 20, 8, min(K, 16)
    weights = 5 * rows * n * size + rows * n
    shifted = 2 * n * d * size + rows * d * size + 2 * rows * K * size + rows * rows * size
    sums = size * (2 * n * some + 4 * rows * some)
    group = 8 * n * (2 * d + some) + 48 * pairs
    expected = weights + shifted + sums + group + outputs * (16 + size)
    assert gradients.gradient_bytes(rows, n, d, K, size) == expected


def test_a_block_of_gradients_of_large_points():
    """More features than rows: W is scaled for all outputs at once, whose sums of a row count by features."""
    rows, n, d, K, size = 2, 10, CHUNK, 3, 4
    fixed = (4 + K) * rows * n * size + rows * n + size * (2 * n * d + rows * (d + 2 * K + K * d))
    group = size * (2 * n * K + 4 * rows * K) + 8 * n * (2 * d + K) + 48 * rows * n
    assert gradients.gradient_bytes(rows, n, d, K, size) == fixed + group + rows * d * (16 + size)


@pytest.mark.parametrize(("d", "few"), [(4, True), (5, False)])
def test_a_block_of_gradients_of_few_features(d, few):
    rows, n, K, size = 10, 100, 7, 4
    expected = size * (2 * rows * n + 2 * rows * K + n * K)
    assert (gradients.gradient_bytes(rows, n, d, K, size) == expected) == few


@pytest.mark.parametrize(
    ("rows", "d", "panel", "factor"),
    [(10, 100, 100 * 100, 1000), (10**4, 2000, 2**20, 2**20), (100, 20_000, 64 * 20_000, 64 * 20_000)],
)
def test_a_panel_of_squares(rows, d, panel, factor):
    """A panel of the product and its float64 copy; both factors."""
    assert gemm.square_bytes(rows, d, 4) == panel * (8 + 4) + 2 * 4 * factor


def test_a_low_rank_part():
    m, n, d, K = 30, 20, 5, 3
    assert gram.low_rank_bytes(m, n, d, K, 16) == 8 * 16 * (2 * (30 + 20) + 3 * 3 * 5 + 256 * 3)
    assert gram.low_rank_flops(m, n, d, K, 16) == 2 * (20 + 30) * 16 * 3 * 5
    assert gram.low_rank_flops(n, m, d, K, 16) == 2 * (30 + 30) * 16 * 3 * 5


@pytest.mark.parametrize(("d", "matrices"), [(2048, 4), (2049, 0)])
def test_eigenvalues_are_looked_at_up_to_so_many_features(d, matrices):
    assert gram.nonnegative_bytes(d) == matrices * 8 * d * d


# ---- Plans


@pytest.mark.parametrize("other", [False, True])
def test_a_kernel_matrix_holds_its_result(other):
    X = own(100, 6)
    Z = own(80, 6) if other else X
    m = len(Z)
    plan = matrix.plan_kernel_matrix(X, Z, None, "why")
    rows = plan.block
    assert rows == 100  # of X, all at once
    step = max(distance.tile_bytes(rows, m, 100, 6, 4), 3 * rows * rows * 4)
    assert plan.peak_bytes == 100 * m * 4 + rows * m * 4 + step
    assert plan.flops == (2.0 if other else 1.0) * 100 * m * 6
    assert plan.method == ("blocked" if other else "blocked, half of it and mirrored")
    given = matrix.plan_kernel_matrix(X, Z, own(100, m), "why")
    assert plan.peak_bytes - given.peak_bytes == 100 * m * 4


def test_the_square_on_the_diagonal_may_be_the_larger_part():
    """Three copies of it, beside a few columns."""
    X, Z = own(256, 1), own(2, 1)
    plan = matrix.plan_kernel_matrix(X, Z, None, "")
    assert plan.block == 256
    assert plan.peak_bytes == 256 * 2 * 4 * 2 + 3 * 256 * 256 * 4


@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("p", [2, 5000])
def test_a_product_holds_its_result_and_a_block(other, p):
    X = own(100, 6, dtype=torch.float64)
    Z = own(80, 6, dtype=torch.float64) if other else X
    m = len(Z)
    plan = matrix.plan_kernel_matmul(X, Z, points(m, p, dtype=torch.float64), "why")
    step = max(distance.tile_bytes(100, m, 100, 6, 8), 100 * (m + p) * 8)
    assert plan.block == 100
    assert plan.peak_bytes == 100 * p * 8 + 100 * m * 8 + step
    assert plan.flops == (2.0 if other else 1.0) * 100 * m * 6 + 2.0 * 100 * m * p


@pytest.mark.parametrize("d", [3, 6])
def test_gradients_hold_their_result_and_coefficients(d):
    X, Z, K = own(100, d), own(40, d), 7
    plan = plan_gradients(X, own(100, K), Z, "why")
    step = max(distance.tile_bytes(40, 100, 40, d, 4), 100 * K * 4 + gradients.gradient_bytes(40, 100, d, K, 4))
    assert plan.block == 40
    assert plan.peak_bytes == 40 * K * d * 4 + 40 * 100 * 4 + step
    assert plan.flops == 2.0 * 40 * 100 * d * (K + 1)


@pytest.mark.parametrize(("K", "d", "some"), [(7, 30, 7), (10, 2**14, 4), (10, 2**17, 1), (1, 1, 1)])
def test_the_diagonal_makes_a_few_outputs_at_once(K, d, some):
    """2^16 entries of a point's gradients."""
    assert diagonal.outputs_at_once(K, d) == some
    rows, peak = diagonal.plan_rows(points(50, d), K, HUGE)
    assert rows == 50
    coefficients_and_points, sums, block = 50 * (K + d) * 4, 8 * d * (1 + 3 * some), (5 * 50 + 3 * some * d) * 4
    assert peak == coefficients_and_points + sums + rows * block


def test_the_diagonal_counts_columns_at_once():
    """As if they grew with the rows: at least what they take, at 128 rows and more."""
    n, d, K = 20_000, 50, 6
    rows, peak = diagonal.plan_rows(points(n, d), K, HUGE)
    assert rows == 128
    assert gradients.columns_at_once(rows, d, K, torch.device("cpu")) == 306
    block = ((tiles.BLOCKS_ALIVE + 1 + 3) * n + 3 * K * d) * 4
    assert peak == n * (K + d) * 4 + 8 * d * (1 + 3 * K) + rows * block


# ---- The two forms of the AGOP


def test_operations_of_both_forms():
    """Distances, products with K outputs and squares; W^T W by symmetry, S X, X^T (S X), and the parts of S."""
    m, n, d, K = 30, 20, 5, 3
    other = costs.flops(m, n, d, K, False)
    assert other["gradient"] == 2 * m * n * d + 2 * m * n * d * K + 2 * m * K * d * d
    assert other["gram"] == 2 * m * n * d + n * n * m + n * n * d + 2 * m * n * d + 2 * (n + m) * d * d
    own_points = costs.flops(n, n, d, K, True)
    assert own_points["gradient"] == 2 * n * n * d * (1 + K) + 2 * n * K * d * d
    assert own_points["gram"] == n * n * d + n**3 + n * n * d + 2 * n * d * d + 3 * n * n * K


def test_words_of_products():
    X = own(3, 2)
    assert costs.products_of(X, None, symmetric=True) == {"gradient": "float32", "gram": "float32"}
    assert costs.products_of(X, "tf32", symmetric=True) == {"gradient": "tf32", "gram": "tf32"}
    assert costs.products_of(X, "tf32", symmetric=False) == {"gradient": "tf32", "gram": "float32"}


def test_seconds_of_both_forms():
    X, K = own(20, 5, dtype=torch.float64), 3
    work, words = costs.flops(20, 20, 5, K, True), costs.products_of(X, None, symmetric=True)
    expected = {form: work[form] / calibration.rate(form, "float64", CPU) for form in ("gradient", "gram")}
    assert costs.costs(X, X, K, words, symmetric=True) == pytest.approx(expected)


def gradient_form(rows, n, m, d, K, size, *, copied=0, centred=False):
    """(what is held, the three moments that compete) of the gradient form."""
    held = 8 * d * d + size * (copied + 2 * (n + m) + rows * n + rows * K * d) + centred * 32 * K * d
    moments = {
        "tile": distance.tile_bytes(rows, n, m, d, size) + rows * n * size,
        "gradients": gradients.gradient_bytes(rows, n, d, K, size),
        "squares": gemm.square_bytes(rows * K, d, size),
    }
    return held, moments


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("rows", "n", "d", "K", "worst"), [(8, 60, 3, 1, "tile"), (8, 60, 12, 60, "gradients"), (1, 2, 90, 1, "squares")]
)
def test_the_gradient_form(dtype, rows, n, d, K, worst):
    X, Z, alpha, size = own(n, d, dtype=dtype), own(9, d, dtype=dtype), own(n, K, dtype=dtype), dtype.itemsize
    held, moments = gradient_form(rows, n, 9, d, K, size)
    assert max(moments, key=lambda name: moments[name]) == worst
    result = 4 * d * d if dtype == torch.float32 else 0
    taken = costs.gradient_form_bytes(rows, X, alpha, Z, False)
    assert taken == held + held // 16 + moments[worst] + result
    # Means in float64: a block's, that of the sum, and what they differ by.
    means, _ = gradient_form(rows, n, 9, d, K, size, centred=True)
    assert costs.gradient_form_bytes(rows, X, alpha, Z, True) - taken == means + means // 16 - held - held // 16
    if K > 1:
        copies, _ = gradient_form(rows, n, 9, d, K, size, copied=n * K)
        across = costs.gradient_form_bytes(rows, X, alpha.T.contiguous().T, Z, False)
        assert across - taken == copies + copies // 16 - held - held // 16


def gram_form(rows, n, m, others, d, K, size, *, wide=False, rank=1):
    """(what is held, the two moments that compete) of the gram form; ``others``: m where Z is not X, else 0."""
    stored = m * n * size + 8 * d * d
    tile = distance.tile_bytes(rows, n, m, d, size) + rows * n * size
    if wide:
        stored += 8 * m * n + 8 * (n + others) * d + 8 * n * K
        size = 8
    shifted = size * (2 * n * d + others * d)
    sums = 2 * size * (m + n) * (K + 1)
    block = size * (3 * rows * max(m, n) + 2 * rows * d + 4 * rows * K) + 8 * rows * (d + rank * K)
    part = 8 * rank * (2 * (m + n) + 3 * K * d + 256 * K)
    return stored, {"tile": tile, "products": shifted + sums + block + part + gemm.square_bytes(rows, d, size)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("m", [0, 40, 90])
@pytest.mark.parametrize(("K", "rank", "worst"), [(1, 1, "tile"), (40, 16, "products")])
def test_the_gram_form(dtype, m, K, rank, worst):
    """0 evaluation points stands for the centers themselves."""
    n, d, rows, size = 70, 11, 32, dtype.itemsize
    X, alpha = own(n, d, dtype=dtype), own(n, K, dtype=dtype)
    Z = own(m, d, dtype=dtype) if m else X
    for wide in (False, True):
        held, moments = gram_form(rows, n, len(Z), m, d, K, size, wide=wide, rank=rank)
        assert max(moments, key=lambda name: moments[name]) == worst
        result = 4 * d * d if dtype == torch.float32 else 0
        taken = costs.gram_form_bytes(rows, X, alpha, Z, wide, rank, symmetric=m == 0)
        assert taken == held + held // 16 + moments[worst] + result


def task(method: str, center: bool = False, limit: float = HUGE) -> AgopTask:
    return AgopTask("mean", center, method, limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("other", [False, True])
def test_a_gram_plan_counts_what_values_may_ask_for(dtype, other):
    """float64 products of float32 points, the largest low-rank part, the clipping; or the gradient form beside W."""
    n, d, K = 70, 11, 9
    X, alpha = own(n, d, dtype=dtype), own(n, K, dtype=dtype)
    Z = own(40, d, dtype=dtype) if other else X
    plan = costs.plan(X, alpha, Z, task("gram"), "why", symmetric=not other)
    assert plan.block == n
    wide = costs.gram_form_bytes(n, X, alpha, Z, dtype == torch.float32, RANK, symmetric=not other)
    beside = n * len(Z) * dtype.itemsize + costs.gradient_form_beside(X, alpha, Z, False, HUGE)[1]
    assert plan.peak_bytes == max(wide + 4 * 8 * d * d, beside)
    assert plan.flops == costs.flops(len(Z), n, d, K, not other)["gram"]


def test_a_gram_plan_counts_the_gradient_form_where_that_is_larger():
    """Many outputs of a few points; the gradient form has them all at once."""
    X, alpha = own(40, 60, dtype=torch.float64), own(40, 400, dtype=torch.float64)
    plan = costs.plan(X, alpha, X, task("gram"), "why", symmetric=True)
    beside = 40 * 40 * 8 + costs.gradient_form_bytes(40, X, alpha, X, False)
    assert plan.peak_bytes >= beside


@pytest.mark.parametrize("method", ["gradient", "gram"])
@pytest.mark.parametrize("other", [False, True])
def test_a_centred_plan_counts_float64(method, other):
    """Copies of points and coefficients, and the form in float64 with blocks of up to 256 rows."""
    n, d, K = 70, 11, 9
    X, alpha = own(n, d), own(n, K)
    Z = own(90, d) if other else X
    plan = costs.plan(X, alpha, Z, task(method, center=True), "why", symmetric=not other)
    x, a = X.double(), alpha.double()
    z = Z.double() if other else x
    rows = len(Z)
    copies = 8 * (n * d + n * K + (90 * d if other else 0))
    assert costs.wide_bytes(X, alpha, Z, symmetric=not other) == copies
    if method == "gradient":
        assert plan.peak_bytes == copies + costs.gradient_form_bytes(rows, x, a, z, True)
    else:
        wide = costs.gram_form_bytes(rows, X, alpha, Z, True, RANK, symmetric=not other) + 4 * 8 * d * d
        beside = n * len(Z) * 4 + costs.gradient_form_beside(X, alpha, Z, True, HUGE)[1]
        assert plan.peak_bytes == max(copies + costs.gram_form_bytes(rows, x, a, z, symmetric=not other), wide, beside)
    alone = costs.plan(X, alpha, Z, task(method), "why", symmetric=not other)
    assert alone.peak_bytes < plan.peak_bytes
    assert ("computed in float64" in plan.why, "computed in float64" in alone.why) == (True, False)


@pytest.mark.parametrize("method", ["gradient", "gram"])
def test_a_plan_promises_no_more_than_the_limit(method):
    """What values may ask for beyond it is not taken; what the form itself needs, and no less, must fit."""
    X, alpha = own(70, 11), own(70, 9)
    form = costs.gradient_form_bytes if method == "gradient" else costs.gram_form_bytes
    least = form(1, X, alpha, X, True) if method == "gradient" else form(1, X, alpha, X, symmetric=True)
    plan = costs.plan(X, alpha, X, task(method, center=True, limit=least), "why", symmetric=True)
    assert (plan.block, plan.peak_bytes) == (1, least)
    with pytest.raises(MemoryError, match=f"agop, {method} form, needs .* raise memory_limit, or free memory"):
        costs.plan(X, alpha, X, task(method, center=True, limit=least - 1), "why", symmetric=True)
