"""Every Triton kernel against the float64 reference: on a GPU as it is, elsewhere in Triton's interpreter.

``test_triton.py`` runs this file in a process of its own, because the interpreter is chosen when triton is imported.
Blocks are 32 x 32 x 32 there and 64 rows or more on a GPU: N points and 37 features are a whole block and a tail.
"""

import contextlib

import pytest
import torch
import triton
import triton.language as tl
from fastagop.kernels import checks, reference
from fastagop.kernels.gemm import LIBRARY
from fastagop.kernels.scaling import Points
from fastagop.kernels.triton_backend import launch as triton_launch
from fastagop.kernels.triton_backend import launch_config, pair_launch, stored_product
from fastagop.kernels.triton_backend.backend import TritonBackend, has_products
from fastagop.kernels.triton_backend.launch import DevicePoints
from fastagop.kernels.triton_backend.launch_config import interpreted
from fastagop.kernels.triton_backend.profile import constants_of, device_profile
from fastagop.kernels.triton_backend.split import operand
from fastagop.kernels.triton_backend.tiles import tile_of
from kernel_cases import DEVICES, GAUSSIAN, LAPLACE, cases
from pair_cases import on, truth

import fastagop
from bench import calibrate
from fastagop import Gaussian, Laplace, Polynomial, ProductLaplace, linalg
from fastagop.solvers import symmetric_blocks, table
from fastagop.solvers.symmetric_blocks import SymmetricBlocks

DEVICE = "cuda" if torch.cuda.is_available() and not interpreted() else "cpu"
EPS = torch.finfo(torch.float32).eps
N = 40 if interpreted() else 70
# Relative errors of sums of about 100 products in float32; "medium" rounds factors to 11 bits on a GPU.
TOLERANCE = {"highest": 16 * EPS, "high": 1e-4, "medium": 1e-2}
kernels = pytest.mark.parametrize("kernel", [Laplace(2.0), Gaussian(2.0)], ids=repr)
TRITON = {"backend": "triton"}


def points(n=N, d=37, spread=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, d, generator=generator)
    if spread is not None:
        X = torch.randn(4, d, generator=generator)[torch.arange(n) % 4] + spread * X
    return torch.nn.functional.normalize(X).to(DEVICE)


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(9)).to(DEVICE)


def error(result, truth):
    assert bool(result.isfinite().all())
    return float((result.cpu().double() - truth).norm() / truth.norm())


@kernels
@pytest.mark.parametrize("spread", [None, 1e-3])  # 1e-3: a quarter of all pairs take the direct differences
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_kernel_matrix(kernel, spread, precision):
    if interpreted() and precision == "high":
        pytest.skip("needs a GPU: the interpreter has no bf16 product")
    X, Z = points(spread=spread), points(45, spread=spread, seed=1)
    Z[:3] = X[:3]
    poison = torch.full((N, N), float("nan"), device=DEVICE)
    K = fastagop.kernel_matrix(kernel, X, out=poison, precision=precision, **TRITON)
    assert K is poison
    assert error(K, reference.kernel_matrix(kernel, X)) <= TOLERANCE[precision]
    assert torch.equal(K, K.T)
    assert torch.equal(K.diagonal(), torch.ones(N, device=DEVICE))
    ridged = fastagop.kernel_matrix(kernel, X, ridge=0.5, precision=precision, **TRITON)
    assert torch.equal(ridged, K + 0.5 * torch.eye(N, device=DEVICE))
    cross = fastagop.kernel_matrix(kernel, X, Z, precision=precision, **TRITON)
    assert error(cross, reference.kernel_matrix(kernel, X, Z)) <= TOLERANCE[precision]


@kernels
@pytest.mark.parametrize(("n", "d"), [(1, 5), (33, 1), (32, 32), (40, 130)])  # one row; tails; exact; d > n
def test_shapes(kernel, n, d):
    X, alpha = 3.0 * normal(n, d), normal(n, 1)
    assert error(fastagop.kernel_matrix(kernel, X, **TRITON), reference.kernel_matrix(kernel, X)) <= 16 * EPS
    truth = reference.agop(kernel, X, alpha)
    for method in ("gradient", "gram"):
        M = fastagop.agop(kernel, X, alpha, method=method, **TRITON)
        assert float((M.cpu().double() - truth).norm()) <= 64 * EPS * max(float(truth.norm()), 1e-3)


@pytest.mark.parametrize(  # one column; a full tile; more than one pass of 64
    ("kernel", "p"), [(Laplace(2.0), 1), (Gaussian(2.0), 16), (Laplace(2.0), 70)]
)
def test_kernel_matmul(kernel, p):
    X, Z = points(), points(45, spread=1e-3, seed=1)
    V = normal(45, p)
    product = fastagop.kernel_matmul(kernel, X, Z, V, **TRITON)
    assert error(product, reference.kernel_matmul(kernel, X, Z, V)) <= 16 * EPS
    V = normal(N, p)
    product = fastagop.kernel_matmul(kernel, X, None, V, **TRITON)
    assert error(product, reference.kernel_matmul(kernel, X, X, V)) <= 16 * EPS


# whole tiles; a tail, and more columns than a pass takes; one block; one point
@pytest.mark.parametrize(("n", "p", "rows"), [(70, 3, 32), (40, 70, 33), (40, 3, 70), (1, 1, 32)])
def test_kernel_matmul_by_stored_blocks(n, p, rows):
    """What CUDA takes from some hundred features on, in the interpreter."""
    kernel, X, Z = Laplace(2.0), points(n, spread=1e-3), points(45, seed=1)
    for points_at in (X, Z):
        V = normal(len(points_at), p)
        product = stored_product.kernel_matmul(Points(kernel, X, points_at), V, "highest", rows)
        assert error(product, reference.kernel_matmul(kernel, X, points_at, V)) <= 16 * EPS
    assert stored_product.kernel_matmul(Points(kernel, X, X[:0]), V[:0], "highest", rows).tolist() == [[0.0] * p] * n


@kernels
@pytest.mark.parametrize("spread", [None, 1e-3])
def test_gradients_and_agop(kernel, spread):
    X, Z, alpha = points(spread=spread), points(45, seed=1), normal(N, 3)
    # The gradient form loses about eps |x| / r near collapse (fastagop.kernels.torch_backend.agop).
    limit = 32 * EPS if spread is None or isinstance(kernel, Gaussian) else 1e-3
    for where in (None, Z):
        truth = reference.gradients(kernel, X, alpha, where)
        assert error(fastagop.gradients(kernel, X, alpha, where, **TRITON), truth) <= limit
        for method in ("gradient", "gram"):
            for center in (False, True):
                how = {"method": method, "center": center, "reduction": "sum"}
                M = fastagop.agop(kernel, X, alpha, where, **how, **TRITON)
                truth = reference.agop(kernel, X, alpha, where, center=center, reduction="sum")
                assert error(M, truth) <= (1e-5 if method == "gram" else limit)


@kernels
@pytest.mark.parametrize("spread", [None, 1e-5])
def test_float64_kernel_matrix(kernel, spread):
    """What a float64 factorisation gets: float64 throughout, the bandwidth's digits included.

    Of unit points the expansion loses 8 eps of r^2: 4 eps / r^2 of r, which is far below what rounding them has cost.
    """
    if not has_products(torch.float64):
        pytest.skip("this Triton has no float64 products")
    kernel, X = type(kernel)(1.7), points(spread=spread)
    K = triton_launch.fill_symmetric(torch.empty(N, N, dtype=torch.float64, device=DEVICE), kernel, X)
    truth = reference.kernel_matrix(kernel, X)
    x = X.cpu().double()
    sq = (x[:, None] - x).square().sum(-1).fill_diagonal_(1.0)
    lost = 4 * torch.finfo(torch.float64).eps / sq
    assert error(K, truth) <= 1e-14 + float((lost * sq.sqrt()).max()) / 1.7
    distance = (1.0 - K).cpu().fill_diagonal_(1.0), (1.0 - truth).fill_diagonal_(1.0)
    if spread is None or isinstance(kernel, Laplace):  # 1 - k of a near pair is far above rounding
        assert bool((((distance[0] - distance[1]) / distance[1]).abs() <= 1e-9 + lost).all())


@pytest.mark.parametrize("case", [case for case in cases(DEVICES, "triton") if not case.heavy_tailed], ids=str)
@pytest.mark.parametrize("bandwidth", [1e-25, 1e-40])  # 1 / L^2, and 1 / L, is no float32 number
def test_narrow_kernels_and_duplicates(case, bandwidth):
    narrow, X, alpha = case.at(bandwidth).kernel, points(20), normal(20, 2)
    X[7] = X[3]
    same = (X[:, None] == X[None]).all(-1)
    assert torch.equal(fastagop.kernel_matrix(narrow, X, **TRITON), same.to(X))
    assert not fastagop.gradients(narrow, X, alpha, **TRITON).any()
    assert torch.equal(fastagop.kernel_matmul(narrow, X, X, alpha, **TRITON), same.to(X) @ alpha)


@pytest.mark.parametrize(
    "case", [case for case in cases(DEVICES, "triton") if case not in (LAPLACE, GAUSSIAN)], ids=str
)
@pytest.mark.parametrize("spread", [None, 1e-3])
def test_further_profiles(case, spread):
    """Value and weight, in float32 and the value in float64; all else is the same for every kernel."""
    kernel, X, alpha = case.at(1.7).kernel, points(40, 21, spread=spread), normal(40, 2)
    truth = reference.kernel_matrix(kernel, X)
    K = fastagop.kernel_matrix(kernel, X, **TRITON)
    assert error(K, truth) <= 16 * EPS
    assert float(K.max()) == 1.0
    product = fastagop.kernel_matmul(kernel, X, X[:35], alpha[:35], **TRITON)
    assert error(product, truth[:, :35] @ alpha[:35].cpu().double()) <= 16 * EPS
    limit = 32 * EPS if spread is None or case.smooth_at_zero else 1e-3
    assert error(fastagop.gradients(kernel, X, alpha, **TRITON), reference.gradients(kernel, X, alpha)) <= limit
    if has_products(torch.float64):
        wide = triton_launch.fill_symmetric(torch.empty(40, 40, dtype=torch.float64, device=DEVICE), kernel, X)
        assert error(wide, truth) <= (1e-14 if spread is None else 1e-12)  # near pairs' distances are rounded as above
    narrow = case.at(1e-25).kernel  # exponents whose squares overflow
    truth = reference.kernel_matrix(narrow, X)  # the identity, but for a heavy tail
    off = (fastagop.kernel_matrix(narrow, X, **TRITON).cpu().double() - truth).abs()
    # A power's logarithm is rounded, and exp multiplies that by its size: (1 - ln k) k, 0 where k is.
    assert bool((off <= 16 * EPS * (truth - torch.xlogy(truth, truth))).all())


@triton.jit
def _profile_kernel(sq_at, out, constants_at, n, PROFILE: tl.constexpr, WEIGHT: tl.constexpr, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    sq = tl.load(sq_at + at, at < n, 1.0)
    tl.store(out + at, PROFILE(sq, constants_at, WEIGHT), at < n)


@pytest.mark.parametrize("case", cases(DEVICES, "triton"), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_profiles_by_themselves(case, dtype):
    """No value exceeds 1 by a rounding, the weight is 0 where r^2 is, and where r^2 is infinite both of them are."""
    kernel, sq = case.kernel, torch.logspace(-12, 2, 20_001, dtype=dtype, device=DEVICE)
    sq = torch.cat([sq.new_tensor([0.0, torch.inf]), sq])
    value, weight = torch.empty_like(sq), torch.empty_like(sq)
    for out, of_weight in ((value, False), (weight, True)):
        constants, profile = constants_of(kernel, out), device_profile(kernel)
        launch = _profile_kernel[(triton.cdiv(len(sq), 1024),)]
        launch(sq, out, constants, len(sq), PROFILE=profile, WEIGHT=of_weight, SIZE=1024)
    assert value[:2].tolist() == [1.0, 0.0]
    assert weight[:2].tolist() == [0.0, 0.0]
    assert float(value.max()) == 1.0
    assert bool(weight.isfinite().all())


NOT_RADIAL = list(on("triton").values())


@pytest.mark.parametrize(  # tails of features, and one pair; of rows
    ("kernel", "n", "d"),
    [
        *((kernel, *shape) for kernel in NOT_RADIAL for shape in ((5, 35), (1, 1))),
        *((kernel, 40, 9) for kernel in NOT_RADIAL[:2]),
    ],
    ids=str,
)
def test_not_radial(kernel, n, d):
    """Matrix, product, gradients and AGOP: duplicates, ties, more columns than a pass takes."""
    X, Z, alpha = points(n, d), points(min(n, 35), d, seed=1), normal(n, 2)
    X[-1], Z[0] = X[0], X[0]
    Z[-1, : d // 2] = X[0, : d // 2]
    for where in (None, Z):
        at = X if where is None else where
        K, g = truth(kernel, X, alpha, at)
        made = fastagop.kernel_matrix(kernel, X, where, ridge=0.0 if where is not None else 0.5, **TRITON)
        if where is None:
            assert torch.equal(made, made.T)
            assert error(made, K + 0.5 * torch.eye(n)) <= 16 * EPS
        else:
            assert error(made, K) <= 16 * EPS
        V = normal(len(at), 70)
        assert error(fastagop.kernel_matmul(kernel, X, where, V, **TRITON), K @ V.cpu().double()) <= 16 * EPS
        if n > 1:  # one point has no gradient of the l1 kernel
            assert error(fastagop.gradients(kernel, X, alpha, where, **TRITON), g) <= 32 * EPS
            w = torch.arange(1.0, len(at) + 1, device=DEVICE)
            M = torch.einsum("i,icd,ice->de", w.cpu().double(), g, g)
            found = fastagop.agop(kernel, X, alpha, where, reduction="sum", sample_weight=w, **TRITON)
            assert error(found, M) <= 64 * EPS


def test_not_radial_in_blocks_and_what_is_refused():
    kernel, X, alpha = ProductLaplace(1e-25), points(36, 5), normal(36, 2)
    X[7] = X[3]
    same = (X[:, None] == X[None]).all(-1).to(X)
    assert torch.equal(fastagop.kernel_matrix(kernel, X, **TRITON), same)
    assert not fastagop.gradients(kernel, X, alpha, **TRITON).any()
    for kernel in NOT_RADIAL:
        whole = pair_launch.gradients(Points(kernel, X, X), alpha, 36, "highest")
        assert error(pair_launch.gradients(Points(kernel, X, X), alpha, 33, "highest"), whole.cpu().double()) <= 4 * EPS
        wide = torch.zeros(72, 10, device=DEVICE)
        wide[::2, ::2] = X
        view = fastagop.gradients(kernel, wide[::2, ::2], alpha.T.contiguous().T, **TRITON)
        assert error(view, whole.cpu().double()) <= 4 * EPS
        assert "backend triton, method gradient" in fastagop.explain("agop", kernel, X, alpha, **TRITON)
        for words, text in (({"method": "gram"}, "gradient form"), ({"center": True}, "lost in float32")):
            with pytest.raises(fastagop.BackendUnavailable, match=text):
                fastagop.agop(kernel, X, alpha, **words, **TRITON)
    with pytest.raises(ValueError, match="X is so large"):
        fastagop.kernel_matrix(Polynomial(3), 1e15 * X, **TRITON)
    with pytest.raises(fastagop.BackendUnavailable, match=r"a parameter of .* is beyond float32"):
        fastagop.kernel_matrix(Polynomial(2, 1.0, 1e40), X, **TRITON)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize(("n", "block"), [(1, 48), (48, 48), (150, 48), (97, 33)])  # one row; one block; tails
def test_cholesky_update(precision, n, block):
    if interpreted() and precision == "high":
        pytest.skip("needs a GPU: the interpreter has no bf16 product")
    X = points(n)
    A = fastagop.kernel_matrix(Laplace(2.0), X, backend="torch")
    upper = A.triu(1)
    assert linalg.cholesky_lower_(A, 1.5, block, triton_launch.cholesky_update(precision)) == 0
    assert torch.equal(A.triu(1), upper)
    L = A.tril().double()
    truth = upper.double() + upper.double().T + 1.5 * torch.eye(n, device=DEVICE)
    assert error(L @ L.T, truth.cpu()) <= {"highest": 16 * EPS, "high": 1e-4, "medium": 1e-2}[precision]


def split_panels():
    return TritonBackend().factor_kernels(torch.float32, "highest").panels


@pytest.mark.parametrize(  # one; tails; whole steps; by the interpreter's tiles and by those of production
    ("m", "n", "d", "tiles"), [(1, 1, 1, None), (33, 70, 37, None), (130, 66, 96, 8), (130, 66, 96, 9)]
)
def test_products_of_panels(m, n, d, tiles, monkeypatch):
    """Rows over six decades keep their digits, C is part of a wider matrix, and its neighbours stay as they are."""
    if tiles:
        monkeypatch.setattr(triton_launch, "config", lambda *launch: launch_config.TABLE[tiles][launch[:2]])
    products, wide = split_panels(), torch.full((m, n + 40), 7.0, device=DEVICE)
    A, B, C = normal(m, d + 16)[:, :d], normal(n, d), wide[:, 16 : 16 + n]
    A *= 10.0 ** torch.linspace(-3, 3, m, device=DEVICE)[:, None]
    C.copy_(A.norm(dim=1, keepdim=True) * (2.0 + normal(m, n)))
    truth = C.cpu().double() - A.cpu().double() @ B.cpu().double().T
    products.subtract_(C, A, products.ready(B))
    assert bool(((C.cpu() - truth).norm(dim=1) <= 16 * EPS * truth.norm(dim=1)).all())
    assert bool((wide[:, :16] == 7.0).all() & (wide[:, 16 + n :] == 7.0).all())
    products.subtract_(C, products.ready(A), products.ready(-B))
    truth += A.cpu().double() @ B.cpu().double().T
    assert bool(((C.cpu() - truth).norm(dim=1) <= 32 * EPS * truth.norm(dim=1)).all())


@pytest.mark.parametrize("tiles", [None, 8, 9])
@pytest.mark.parametrize(("m", "b"), [(1, 1), (70, 37), (40, 64), (66, 200)])  # less than a tile, whole ones, tails
def test_panels_times_a_triangle(m, b, tiles, monkeypatch):
    """What lies above an inverse's diagonal is not read: NaN there, beyond a tile on the diagonal, does no harm."""
    if tiles:
        monkeypatch.setattr(triton_launch, "config", lambda *launch: launch_config.TABLE[tiles][launch[:2]])
    products, wide, T = split_panels(), normal(m, b + 16), normal(b, b).tril()
    A = wide[:, :b]
    truth = A.cpu().double() @ T.cpu().double().T
    ready = products.ready(T)
    for part in (ready.high, ready.low):
        part[:16, 128:] = torch.nan
    products.times_triangle_(A, ready)
    assert error(A, truth) <= 16 * EPS
    assert torch.equal(wide[:, b:], normal(m, b + 16)[:, b:])


@pytest.mark.parametrize(("spread", "tiles"), [(None, None), (1e-2, 8), (1e-2, 9)])
def test_factors_of_half_a_matrix_by_panels(spread, tiles, monkeypatch):
    """As accurate as by the library's float32 products, block rows of other heights and a tail included."""
    if tiles:
        monkeypatch.setattr(triton_launch, "config", lambda *launch: launch_config.TABLE[tiles][launch[:2]])
    kernel, X = Laplace(2.0), points(150, spread=spread)
    K = reference.kernel_matrix(kernel, X).to(DEVICE)
    truth = torch.linalg.cholesky(K)
    errors = []
    for products in (LIBRARY, split_panels()):
        blocks = SymmetricBlocks(150, torch.float32, DEVICE, rows=64)
        blocks.fill_(lambda out, start: out.copy_(K[start : start + len(out), : out.shape[1]]))
        assert blocks.cholesky_(1.0, products) == 0
        errors.append(float((blocks.full().tril() - truth).norm() / truth.norm()))
    assert errors[1] <= 2.0 * errors[0]
    assert errors[1] != errors[0]


@pytest.mark.parametrize("spread", [None, 1e-5])
@pytest.mark.parametrize("rows", [32, 70])  # more blocks than one; one
def test_rows_of_half_a_float64_matrix(spread, rows):
    if not has_products(torch.float64):
        pytest.skip("this Triton has no float64 products")
    kernel, X = Laplace(1.7), points(70, spread=spread)
    write = TritonBackend().factor_kernels(torch.float64, "highest").rows(kernel, X)
    seen = []

    def counted(out, start):
        seen.append((start, out.shape))
        return write(out, start)

    half = SymmetricBlocks(70, torch.float64, DEVICE, rows=rows).fill_(counted)
    whole = triton_launch.fill_symmetric(torch.empty(70, 70, dtype=torch.float64, device=DEVICE), kernel, X)
    assert error(half.full(), whole.cpu()) <= 1e-15
    assert [start for start, _ in seen] == list(range(0, 70, rows))


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_a_refined_solve(precision, monkeypatch):
    """Half of a matrix by this backend: rows, factor and steps as torch's, by split products where all is asked for."""
    X, Y, launched = points(spread=1e-2), normal(N, 3), set()
    known = triton_launch.config
    monkeypatch.setattr(triton_launch, "config", lambda *key: launched.add(key[:2]) or known(*key))
    monkeypatch.setattr(symmetric_blocks, "default_rows", lambda n, device: 32)
    how = {"ridge": 0.0, "method": "cholesky+cg"}
    found = fastagop.solve(Laplace(2.0), X, Y, **how, precision=precision, **TRITON)
    truth = fastagop.solve(Laplace(2.0), X, Y, **how, backend="torch")
    assert (found.method, found.fallback) == ("cholesky+cg", "")
    assert found.iterations <= truth.iterations + 1
    assert error(found.alpha, truth.alpha.cpu().double()) <= 1e-6
    assert (("panel", "fp16x3") in launched) == (precision == "highest")
    assert ("matrix", "fp64") in launched or not has_products(torch.float64)


@kernels
@pytest.mark.parametrize("ridge", [0.0, 0.1])  # float64 and float32 factorisation
def test_solve(kernel, ridge, monkeypatch):
    monkeypatch.setattr(table, "FLOAT64_ROWS", 0)  # on the CPU, where this is interpreted, few rows take float64
    X, Y = points(), normal(N, 3)
    solution = fastagop.solve(kernel, X, Y, ridge=ridge, **TRITON)
    assert solution.dtype == (torch.float32 if ridge else torch.float64)
    truth = fastagop.solve(kernel, X.double(), Y.double(), ridge=ridge, backend="torch")
    K = reference.kernel_matrix(kernel, X) + ridge * torch.eye(N)
    loss = float(torch.linalg.cond(K)) * EPS
    assert error(solution.alpha, truth.alpha.cpu()) <= loss
    rounding = EPS * float(K.norm() * solution.alpha.norm() / Y.norm())  # of alpha, to float32
    assert solution.residual <= rounding


def test_a_coarse_factor_is_a_preconditioner():
    X, Y = points(), normal(N, 3)
    solution = fastagop.solve(Laplace(2.0), X, Y, precision="medium", **TRITON)
    assert solution.dtype == torch.float32
    assert solution.iterations > 0
    assert solution.residual <= 1e-6


@pytest.mark.parametrize("ridge", [0.0, 1e-3])  # weights from the stored float64 matrix; from the points again
def test_a_layer_of_deep_rfm(ridge):
    X, y = points(), (torch.arange(N) % 3).to(DEVICE)

    def fit(backend, dtype):
        how = {"depth": 2, "width": 48, "ridge": ridge, "random_state": 0, "device": DEVICE, "dtype": dtype}
        return fastagop.DeepRFMClassifier(**how, backend=backend).fit(X, y)

    truth, plain, fused = fit("torch", "float64"), fit("torch", "float32"), fit("triton", "float32")
    for M, rounded, found in zip(truth.agops_, plain.agops_, fused.agops_, strict=True):
        assert error(found, M.cpu()) <= 4 * error(rounded, M.cpu()) + 16 * EPS
    outputs = truth.decision_function(X).cpu().double()
    assert error(fused.decision_function(X), outputs) <= 4 * error(plain.decision_function(X), outputs) + 16 * EPS


def test_the_method_is_chosen_and_guarded():
    """Collapsed classes: the gram form is the cheaper one, and would lose what the tolerance forbids."""
    X, alpha = points(spread=1e-3), normal(N, 3)
    M = fastagop.agop(Laplace(2.0), X, alpha, **TRITON)
    assert "method gram" in fastagop.explain("agop", Laplace(2.0), X, alpha, **TRITON)
    assert error(M, reference.agop(Laplace(2.0), X, alpha)) <= 1e-3


def test_many_blocks():
    """A small memory limit makes row blocks that start within X: self-pairs lie off the block's own diagonal."""
    X, alpha = points(), normal(N, 3)
    whole = fastagop.agop(Laplace(2.0), X, alpha, method="gradient", **TRITON)
    limit, rows = 6e4, 0
    while not 7 <= rows < N:
        limit *= 1.02
        with contextlib.suppress(MemoryError):
            text = fastagop.explain("agop", Laplace(2.0), X, alpha, method="gradient", memory_limit=limit, **TRITON)
            rows = int(text.split("blocks of ")[1].split()[0])
    parts = fastagop.agop(Laplace(2.0), X, alpha, method="gradient", memory_limit=limit, **TRITON)
    assert error(parts, whole.cpu().double()) <= 16 * EPS


def test_layouts():
    X, alpha = points(), normal(N, 3)
    wide = torch.zeros(2 * N, 74, device=DEVICE)
    wide[::2, ::2] = X
    truth = reference.agop(Laplace(2.0), X, alpha)
    for view in (X.T.contiguous().T, wide[::2, ::2]):
        assert not view.is_contiguous()
        M = fastagop.agop(Laplace(2.0), view, alpha.T.contiguous().T, **TRITON)
        assert error(M, truth) <= 1e-5
        out = torch.full((N, 2 * N), float("nan"), device=DEVICE)
        fastagop.kernel_matrix(Laplace(2.0), view, out=out[:, ::2], **TRITON)
        assert error(out[:, ::2], reference.kernel_matrix(Laplace(2.0), X)) <= 16 * EPS
        assert bool(out[:, 1::2].isnan().all())


@pytest.fixture
def production(monkeypatch):
    """Launches take the tiles of sm_90 in the interpreter, too."""
    monkeypatch.setattr(
        triton_launch, "config", lambda operation, prec, device: launch_config.TABLE[9][operation, prec]
    )


@pytest.fixture
def far_apart(tmp_path):
    """A (40, 2^26) matrix, of which only pages that are touched exist: row 32 starts 2^31 items in.

    Before it lie as many items, so that an offset which leaves 32 bits reads zeros and does not end the process.
    """
    rows, stride, before = 40, 2**26, 2**31
    if DEVICE != "cpu":
        return torch.empty(rows * stride, device=DEVICE).view(rows, stride)
    return torch.from_file(str(tmp_path / "sparse"), True, before + rows * stride)[before:].view(rows, stride)


def placed(where, values):
    return where[:, : values.shape[1]].copy_(values)


@pytest.mark.usefixtures("production")
@pytest.mark.parametrize("prec", ["fp16x3", "tf32"])
@pytest.mark.parametrize("spread", [None, 1e-3])  # 1e-3: by direct differences, too
def test_offsets_of_the_matrix(prec, spread, far_apart):
    kernel, X = Laplace(2.0), points(40, spread=spread)
    truth = reference.kernel_matrix(kernel, X)
    x = DevicePoints(placed(far_apart[:, :64], X), prec)
    for lower in (True, False):
        out = far_apart[:, 64:104].fill_(torch.nan)
        triton_launch.fill(kernel, x, x, out, weight=False, first=0, lower=lower)
        assert error(out, truth) <= TOLERANCE[{"fp16x3": "highest", "tf32": "medium"}[prec]]


@pytest.mark.usefixtures("production")
@pytest.mark.parametrize("prec", ["fp16x3", "tf32"])
def test_offsets_of_the_product(prec, far_apart):
    X, V = points(40), normal(40, 3)
    far, precision = placed(far_apart[:, :64], X), {"fp16x3": "highest", "tf32": "medium"}[prec]
    at = Points(Laplace(2.0), far, far, 1.0)
    product = triton_launch.kernel_matmul(at, placed(far_apart[:, 64:], V), precision)
    assert error(product, reference.kernel_matmul(Laplace(2.0), X, X, V)) <= TOLERANCE[precision]


@pytest.mark.usefixtures("production")
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_offsets_of_the_agop(precision, far_apart):
    X, alpha = points(40), normal(40, 2)
    W = reference.kernel_matrix(Laplace(2.0), X).float().to(DEVICE)
    far, weights = placed(far_apart[:, :64], X), placed(far_apart[:, 64:128], W)
    steps = triton_launch.inner_kernels(far, precision)
    out = far_apart[:, 128 : 128 + 2 * 37].fill_(torch.nan).unflatten(1, (2, 37))
    G = steps.gradients(weights, alpha, far, far, None, out)
    plain, a = X.cpu().double(), alpha.cpu().double()
    right = torch.einsum("ij,jc,jf->icf", W.cpu().double(), a, plain)
    s = W.cpu().double() @ a
    assert error(G, right - s[:, :, None] * plain[:, None]) <= TOLERANCE[precision]
    S = steps.lower(weights, alpha)(s.float().to(DEVICE), torch.zeros(40, device=DEVICE), 0, 40)
    w, outer = W.cpu().double(), a @ a.T
    truth = outer * (w @ w) - w * (s @ a.T + a @ s.T)
    assert error(S + S.T, truth) <= TOLERANCE[precision]


@pytest.mark.usefixtures("production")
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_offsets_of_the_factor(precision, far_apart):
    K = reference.kernel_matrix(Laplace(2.0), points(40)) + torch.eye(40)
    A = placed(far_apart, K.float().to(DEVICE))
    triton_launch.cholesky_update(precision)(A, 4, 40)  # the columns from 4 on, less a product of the first 4
    truth = K.clone()
    truth[4:, 4:] -= (K[4:, :4] @ K[4:, :4].T).tril()
    assert error(A, truth) <= TOLERANCE[precision]


@triton.jit
def _places_kernel(out, rows, columns, GROUP: tl.constexpr):
    program = tl.program_id(0)
    row, col = tile_of(program, rows, columns, GROUP)
    tl.store(out + row * columns + col, program)


@pytest.mark.parametrize(
    ("rows", "columns", "group"),
    [(1, 1, 16), (3, 5, 16), (16, 2, 16), (17, 3, 16), (7, 4, 3), (9, 1, 4), (5, 6, 1)],  # fewer; exact; tails
)
def test_every_tile_has_its_program(rows, columns, group):
    """Groups of rows one after the other, each down its columns."""
    places = torch.full((rows, columns), -1, dtype=torch.int32, device=DEVICE)
    _places_kernel[(rows * columns,)](places, rows, columns, GROUP=group)
    expected, program = torch.empty(rows, columns, dtype=torch.int32), 0
    for first in range(0, rows, group):
        for col in range(columns):
            for row in range(first, min(rows, first + group)):
                expected[row, col] = program
                program += 1
    assert torch.equal(places.cpu(), expected)


def test_several_groups_of_tiles(monkeypatch):
    """Three rows of tiles in groups of two: a whole group, a half, and a tail in its tile."""
    monkeypatch.setattr(triton_launch, "GROUPS", dict.fromkeys(launch_config.GROUPS, 2))
    kernel, X, Z, alpha = Laplace(2.0), points(70), points(45, seed=1), normal(70, 2)
    assert error(fastagop.kernel_matrix(kernel, X, **TRITON), reference.kernel_matrix(kernel, X)) <= 16 * EPS
    assert error(fastagop.kernel_matrix(kernel, Z, X, **TRITON), reference.kernel_matrix(kernel, Z, X)) <= 16 * EPS
    truth = reference.agop(kernel, X, alpha)
    assert error(fastagop.agop(kernel, X, alpha, method="gradient", **TRITON), truth) <= 32 * EPS
    assert error(fastagop.agop(kernel, X, alpha, method="gram", **TRITON), truth) <= 1e-5
    A = fastagop.kernel_matrix(kernel, X, **TRITON)
    assert linalg.cholesky_lower_(A, 1.5, 35, triton_launch.cholesky_update("highest")) == 0
    L = A.tril().double().cpu()
    assert error(L @ L.T, reference.kernel_matrix(kernel, X) + 0.5 * torch.eye(70)) <= 16 * EPS


@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("width", [37, 64])  # what lies behind the ends of rows is another tensor's, or is not there
def test_what_lies_behind_rows_is_not_used(precision, width):
    """Weights whose rows are 48 items apart; NaN lies behind their ends, and behind the last one maybe nothing."""
    alpha, X, W = normal(37, 2), points(37, 21), normal(40, 37)
    held = torch.full((40 * 48 + 64,), float("nan"), device=DEVICE)[: 39 * 48 + width].clone()
    far = held.as_strided((40, 37), (48, 1)).copy_(W)
    steps, Z = triton_launch.inner_kernels(X, precision), points(40, 21, seed=1)
    G = steps.gradients(far, alpha, X, Z, None, torch.empty(40, 2, 21, device=DEVICE))
    w, a, x, z = (part.cpu().double() for part in (W, alpha, X, Z))
    truth = torch.einsum("ij,jc,jf->icf", w, a, x) - (w @ a)[:, :, None] * z[:, None]
    assert error(G, truth) <= TOLERANCE[precision]


def test_an_offset_is_split_once(monkeypatch):
    """Points far from the origin: centers less their mean are made ready once, however many blocks there are."""
    X, alpha = points() + 100.0, normal(N, 2)
    made = []
    make = triton_launch.operand
    monkeypatch.setattr(triton_launch, "operand", lambda rows, split: made.append(len(rows)) or make(rows, split))
    step = triton_launch.inner_kernels(X, "highest").gradients
    shift, W = X.mean(0), fastagop.kernel_matrix(Laplace(2.0), points(), **TRITON)
    made.clear()
    half = N // 2
    parts = [step(W[i : i + half], alpha, X, X[i : i + half], shift, X.new_empty(half, 2, 37)) for i in (0, half)]
    assert made == [N]
    w, a, x = W.cpu().double(), alpha.cpu().double(), (X - shift).cpu().double()
    truth = torch.einsum("ij,jc,jf->icf", w, a, x) - (w @ a)[:, :, None] * x[:, None]
    assert error(torch.cat(parts), truth) <= 16 * EPS
    step(W[:7], alpha, X, X[:7], shift + 1.0, X.new_empty(7, 2, 37))  # another offset
    assert made == [N, N]


def hard(case):
    """(W, alpha, X, shift) whose terms, or whose rows and columns, are of very different sizes."""
    X, alpha, shift = points(N, 24), normal(N, 3), None
    if case == "clusters":  # weights of 1e3 within, of 1e-3 between
        X = 3.0 * normal(N // 10, 24).repeat_interleave(10, 0) + 1e-3 * points(N, 24, seed=1)
    if case == "offset":
        X = X + 100.0
        shift = X.mean(0)
    if case == "coefficients":
        alpha = alpha * 10.0 ** torch.linspace(-4, 4, N, device=DEVICE)[:, None]
    if case == "outputs":
        alpha = alpha * torch.tensor([1e-5, 1.0, 1e4], device=DEVICE)
    if case == "norms":
        X = X * 10.0 ** torch.linspace(-2, 2, N, device=DEVICE)[:, None]
    if case == "nothing":  # rows of zeros, a point at the origin, one without coefficients
        X[3], alpha[5] = 0.0, 0.0
    x = X.double()
    r = torch.cdist(x, x).fill_diagonal_(1.0)
    W = (torch.exp(-r / 2.0) / r).float().fill_diagonal_(0.0)
    if case == "clusters":  # the most that such weights can hide: what is near weighs little in the sum
        alpha = alpha * torch.where(torch.arange(N, device=DEVICE) % 10 == 0, 1e3, 1e-4)[:, None]
    if case == "apart":  # each output has coefficients at points that weigh little for most rows of the other outputs
        alpha = alpha * (torch.arange(N, device=DEVICE)[:, None] % 3 == torch.arange(3, device=DEVICE))
        W = W * 10.0 ** (-3.0 * ((torch.arange(N)[:, None] + torch.arange(N)) % 3)).to(DEVICE)
    if case == "nothing":
        W[7] = 0.0
    return W, alpha, X, shift


def lost(G, W, alpha, X, shift, first=0, over=2):
    """Error of each row of the step, of and of each output unless ``over`` says (1, 2), relative to its terms."""
    w, a, x = W.cpu().double(), alpha.cpu().double(), (X if shift is None else X - shift).cpu().double()
    z = x[first : first + len(w)]
    truth = torch.einsum("ij,jc,jf->icf", w, a, x) - (w @ a)[:, :, None] * z[:, None]
    terms = torch.einsum("ij,jc,jf->icf", w, a.abs(), x.abs()) + (w @ a.abs())[:, :, None] * z.abs()[:, None]
    found = (G.cpu().double() - truth).norm(dim=over) / terms.norm(dim=over).clamp_min(1e-300)
    return found.max(), found.square().mean().sqrt()


HARD = ["plain", "clusters", "offset", "coefficients", "outputs", "norms", "nothing", "apart"]


@pytest.mark.parametrize("case", HARD)
def test_weights_split_first_lose_no_more(case, monkeypatch):
    """As accurate as what splits inside the loop: in each row and output; in rows where outputs lie far apart."""
    over = (1, 2) if case == "apart" else 2
    W, alpha, X, shift = hard(case)
    found = []
    for least in (0, 10**9):
        monkeypatch.setattr(triton_launch, "SPLIT_FIRST", least)
        step, out = triton_launch.inner_kernels(X, "highest").gradients, X.new_full((N, 3, 24), torch.nan)
        z = X.clone()
        found.append(lost(step(W.clone(), alpha, X, z, shift, out), W, alpha, X, shift, over=over))
    (worst, mean), (worst_inside, mean_inside) = found
    assert worst <= max(2.0 * worst_inside, EPS)
    assert mean <= max(2.0 * mean_inside, 0.25 * EPS)
    assert worst <= 4 * EPS


@pytest.fixture
def splits_first(monkeypatch):
    """Blocks of any size split first; (rows, weights' rows) of what is split."""
    made, make = [], triton_launch.operand

    def record(rows, split, weights=None):
        made.append((len(rows), 0 if weights is None else len(weights)))
        return make(rows, split, weights)

    monkeypatch.setattr(triton_launch, "SPLIT_FIRST", 0)
    monkeypatch.setattr(triton_launch, "operand", record)
    return made


@pytest.mark.parametrize("chip", [8, 9])
def test_tails_of_weights_split_first(chip, splits_first, monkeypatch):
    """Production tiles: a block of 130 rows and one of 66, 70 features, three outputs, 130 centers."""
    monkeypatch.setattr(triton_launch, "config", lambda *launch: launch_config.TABLE[chip][launch[:2]])
    kernel, X, alpha = Laplace(2.0), points(130, 70), normal(130, 3)
    W = fastagop.kernel_matrix(kernel, X, **TRITON)
    step = triton_launch.inner_kernels(X, "highest").gradients
    splits_first.clear()
    for first, rows in ((0, 130), (64, 66)):
        part, G = W[first : first + rows], X.new_full((rows, 3, 70), torch.nan)
        G = step(part, alpha, X, X[first : first + rows], None, G)
        assert lost(G, part, alpha, X, None, first)[0] <= 4 * EPS
    assert splits_first == [(130, 1), (70, 3), (66, 1), (70, 3)]


def test_whole_calls_by_weights_split_first(splits_first):
    """With near pairs, an offset and tails; each block splits its weights and, for its room, some outputs."""
    kernel, alpha = Laplace(2.0), normal(N, 3)
    for X in (points(), points(spread=1e-2), points() + 100.0):
        truth = reference.agop(kernel, X, alpha)
        assert error(fastagop.agop(kernel, X, alpha, method="gradient", **TRITON), truth) <= 32 * EPS
        splits_first.clear()
        M = fastagop.agop(kernel, X, alpha, X[:-5].clone(), method="gradient", **TRITON)
        assert error(M, reference.agop(kernel, X, alpha, X[:-5])) <= 32 * EPS
        assert (N - 5, 1) in splits_first
        splits_first.clear()
        fastagop.gradients(kernel, X[:32], alpha[:32], **TRITON)  # whose outputs may be far apart
        assert (32, 1) not in splits_first


@pytest.mark.parametrize(("room", "groups"), [(1, [1, 1, 1, 1, 1]), (2, [2, 2, 1]), (5, [5]), (9, [5]), (0, None)])
def test_outputs_split_first_by_room(room, groups, splits_first, monkeypatch):
    """As many outputs at once as a plan's bytes hold beside what else is there; without room the loop splits."""
    X, alpha = points(70, 24), normal(70, 5)
    W = fastagop.kernel_matrix(Laplace(2.0), X, **TRITON)
    alive = 4 * (40 * (70 + 128 + 24 + 12) + 70 * (48 + 14)) + 40 * 70
    more = room * 4 * 24 * 129
    monkeypatch.setattr(triton_launch, "gradient_bytes", lambda *shape: alive + more)
    step, shift = triton_launch.inner_kernels(X, "highest").gradients, X[0] + 1.0
    splits_first.clear()
    for _ in range(2):  # the second block finds points and coefficients made
        G = step(W[:40], alpha, X, X[:40], shift, X.new_full((40, 5, 24), torch.nan))
        assert lost(G, W[:40], alpha, X, shift)[0] <= 4 * EPS
    expected = [(70, 0)] if groups is None else 2 * [(40, 1), *((24, some) for some in groups)]
    assert splits_first == expected


def test_small_blocks_split_inside():
    """Blocks of few rows or few features of all outputs; by the rule 2048 rows of ten outputs split first."""
    X, alpha = torch.empty(50_000, 1024, device="meta"), torch.empty(50_000, 10, device="meta")
    weighted = triton_launch._Weighted()
    assert weighted.outputs(2048, X, None, alpha) == 10
    assert weighted.outputs(1024, X, None, alpha) == 0
    assert weighted.outputs(2048, X[:, :128], None, alpha) == 0
    assert 0 < weighted.outputs(2048, X, None, torch.empty(50_000, 100, device="meta")) < 100


@pytest.mark.parametrize("chip", [8, 9])
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_tails_of_production_tiles(chip, precision, monkeypatch):
    """Tiles as they are on a GPU, with two rows, two columns and six features beyond the last whole one."""
    monkeypatch.setattr(triton_launch, "config", lambda *launch: launch_config.TABLE[chip][launch[:2]])
    limit, how = TOLERANCE[precision], {"precision": precision, **TRITON}
    kernel, X, Z, alpha = Laplace(2.0), points(130, 70), points(66, 70, seed=1), normal(130, 2)
    Z[:3] = X[:3]
    K = reference.kernel_matrix(kernel, X)
    assert error(fastagop.kernel_matrix(kernel, X, **how), K) <= limit
    assert error(fastagop.kernel_matrix(kernel, X, Z, **how), reference.kernel_matrix(kernel, X, Z)) <= limit
    product = fastagop.kernel_matmul(kernel, Z, X, normal(130, 18), **how)
    assert error(product, reference.kernel_matmul(kernel, Z, X, normal(130, 18))) <= limit
    assert error(fastagop.gradients(kernel, X, alpha, Z, **how), reference.gradients(kernel, X, alpha, Z)) <= 2 * limit
    gram = fastagop.agop(kernel, X, alpha, method="gram", **how)
    assert error(gram, reference.agop(kernel, X, alpha)) <= max(1e-5, limit)
    if precision == "highest" and has_products(torch.float64):
        wide = torch.empty(130, 130, dtype=torch.float64, device=DEVICE)
        assert error(triton_launch.fill_symmetric(wide, kernel, X), K) <= 1e-14
    A = K.float().to(DEVICE)
    assert linalg.cholesky_lower_(A, 1.5, 64, triton_launch.cholesky_update(precision)) == 0
    L = A.tril().double().cpu()
    assert error(L @ L.T, K + 0.5 * torch.eye(130)) <= limit


def test_nothing_to_do():
    X, alpha = points(), normal(N, 3)
    assert fastagop.kernel_matrix(Laplace(2.0), X, X[:0], **TRITON).shape == (N, 0)
    assert torch.equal(fastagop.kernel_matmul(Laplace(2.0), X, X[:0], alpha[:0], **TRITON), torch.zeros_like(alpha))
    assert fastagop.gradients(Laplace(2.0), X, alpha, X[:0], **TRITON).shape == (0, 3, 37)
    assert not fastagop.agop(Laplace(2.0), X, alpha[:, :0], **TRITON).any()


def test_split_holds_22_bits_in_any_range():
    X = normal(60, 37) * 10.0 ** torch.linspace(-30, 30, 60, device=DEVICE)[:, None]
    halves = operand(X, True)
    back = (halves.high.double() + halves.low.double() / 2048.0)[:, :37] * halves.scale.double()[:, None]
    assert bool(((back - X.double()).abs().amax(1) <= 2.0**-22 * X.double().abs().amax(1)).all())
    assert bool(halves.high.isfinite().all() & halves.low.isfinite().all())


def test_wide_range():
    """Rows over four decades: each row has its own scale, so small rows keep their digits among large ones."""
    X = points() * 10.0 ** torch.linspace(-2, 2, N, device=DEVICE)[:, None]
    K, truth = fastagop.kernel_matrix(Laplace(1.0), X, **TRITON), reference.kernel_matrix(Laplace(1.0), X)
    small = slice(0, 20)
    assert error(K[small, small], truth[small, small]) <= 16 * EPS
    assert error(K, truth) <= 16 * EPS


def test_a_warm_up_launches_what_a_capture_does(monkeypatch):
    """Of "auto" the capture takes the gradient form: a warm-up by the gram form would leave kernels to be loaded."""
    X, alpha, launched = points(40), normal(40, 8), set()
    known = triton_launch.config
    monkeypatch.setattr(triton_launch, "config", lambda *key: launched.add(key[:2]) or known(*key))
    fastagop.agop(Laplace(2.0), X, alpha, **TRITON)
    assert ("gram", "fp16x3") in launched
    launched.clear()
    fastagop.agop(Laplace(2.0), X, alpha, method="gradient", **TRITON)
    warm = launched.copy()
    launched.clear()
    monkeypatch.setattr(checks, "readable", lambda value: False)
    fastagop.agop(Laplace(2.0), X, alpha, **TRITON)
    assert launched == warm == {("matrix", "fp16x3"), ("gradient", "fp16x3")}


@pytest.mark.parametrize("spread", [1e-2, 1e-4, 1e-6])
def test_a_float64_matrix_of_float32_points(spread, monkeypatch):
    """Near pairs are those below 2^-36 of the squared norms: what the expansion loses is below X's own rounding."""
    X, seen = points(spread=spread), []
    kernel = triton_launch._matrix_kernel
    near = kernel.arg_names.index("near")

    class Recorded:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: seen.append(args[near]) or kernel[grid](*args, **kwargs)

    monkeypatch.setattr(triton_launch, "_matrix_kernel", Recorded())
    K = triton_launch.fill_symmetric(torch.empty(N, N, dtype=torch.float64, device=DEVICE), Laplace(2.0), X)
    assert seen == [2.0**-36]
    assert float((K.cpu() - reference.kernel_matrix(Laplace(2.0), X)).abs().max()) <= 2.0**-25


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_cuda_graph():
    X, alpha = points(), normal(N, 3)

    def run():
        M = fastagop.agop(Laplace(2.0), X, alpha, method="gradient", **TRITON)
        return fastagop.kernel_matrix(Laplace(2.0), X, **TRITON), M

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        K, M = run()
    X.copy_(points(seed=5))
    graph.replay()
    assert error(K, reference.kernel_matrix(Laplace(2.0), X)) <= 16 * EPS
    assert error(M, reference.agop(Laplace(2.0), X, alpha)) <= 32 * EPS


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_other_gpu():
    X = points().to("cuda:1")
    K = fastagop.kernel_matrix(Laplace(2.0), X, **TRITON)
    assert K.device == X.device
    assert error(K, reference.kernel_matrix(Laplace(2.0), X)) <= 16 * EPS


@pytest.mark.skipif(not interpreted(), reason="on a GPU it is there")
def test_products_that_this_triton_has_not():
    with pytest.raises(fastagop.BackendUnavailable, match="bf16x3"):
        fastagop.kernel_matrix(Laplace(2.0), points(), precision="high", **TRITON)


@pytest.mark.parametrize("wrong", [False, True])
def test_tuning(wrong, capsys, monkeypatch):
    """Candidates are tried and compared; one that computes something else, or cannot run, is not taken."""
    taken, fails = (64, 32, 32, 4, 1), (33, 32, 32, 4, 1)  # 33 is no power of two
    monkeypatch.setattr(calibrate, "CANDIDATES", {"matrix": [taken, fails]})
    X, seen = points(), []

    def run():
        seen.append(launch_config.config("matrix", "fp16x3", X.device))
        K = fastagop.kernel_matrix(Laplace(2.0), X, **TRITON)
        return K * 0.5 if wrong and seen[-1] == launch_config.Config(*taken) else K

    best = calibrate.tune({("matrix", "fp16x3"): run}, X.device, 1)["matrix fp16x3"]
    assert {launch_config.Config(*taken), launch_config.Config(*fails)} <= set(seen)
    assert capsys.readouterr().out.count("skipped") == 1 + wrong
    assert best != fails
    assert best != taken or not wrong


def test_explain_names_the_backend():
    text = fastagop.explain("agop", Laplace(2.0), points(), normal(N, 3), **TRITON)
    assert "backend triton" in text
    assert "three fp16 products" in text
