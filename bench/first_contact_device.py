"""First contact, what the device does at most: rates of products, bandwidth, and the library's dense algebra."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

from bench import clock
from bench.first_contact_run import Run

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def ceilings(run: Run) -> None:
    """Everything that a time of the other parts is a share of."""
    _copy(run)
    for name, dtype in _DTYPES.items():
        _square(run, name, dtype)
    _square(run, "tf32", torch.float32)
    _products_of_forms(run)
    _factorisation(run)
    _symmetric(run)
    _launches(run)


def _normal(run: Run, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, device=run.device, dtype=dtype)


def _copy(run: Run) -> None:
    count = run.few(2**29, 2**16)

    def prepare() -> Callable:
        block, out = torch.ones(count, device=run.device), torch.empty(count, device=run.device)
        return lambda: out.copy_(block)

    run.measure("copy", prepare, repeats=10, moved=8 * count)


def _square(run: Run, name: str, dtype: torch.dtype) -> None:
    m = run.few(8192, 64)

    def prepare() -> Callable:
        A, B = (_normal(run, m, m, dtype=dtype) for _ in range(2))

        def product() -> torch.Tensor:
            with clock.tf32() if name == "tf32" else contextlib.nullcontext():
                return A @ B

        return product

    run.measure(f"square product {name}", prepare, repeats=10, flop=2.0 * m**3, size=m)


def _products_of_forms(run: Run) -> None:
    """The library's product of a block of the gradient form in fp16, and of a float64 matrix with a few vectors."""
    s = run.sizes
    rows, inner = run.few(2048, 16), run.few(8192, 32)

    def block() -> Callable:
        W, R = (_normal(run, *shape, dtype=torch.float16) for shape in ((rows, inner), (inner, s.K * s.d)))
        return lambda: W @ R

    run.measure("fp16 product of the gradient form", block, repeats=10, flop=2.0 * rows * inner * s.K * s.d)
    n = min(s.n, run.few(32768, s.n))

    def wide() -> Callable:
        K, V = torch.full((n, n), 0.5, device=run.device, dtype=torch.float64), _normal(run, n, s.K)
        return lambda: K @ V

    run.measure("K @ V, float64", wide, repeats=5, moved=8.0 * n * n, flop=2.0 * n * n * s.K)

    def narrow() -> Callable:
        K, V = torch.full((n, n), 0.5, device=run.device), _normal(run, n, s.K, dtype=torch.float32)
        return lambda: K @ V

    run.measure("K @ V, float32", narrow, repeats=5, moved=4.0 * n * n, flop=2.0 * n * n * s.K)


def _factorisation(run: Run) -> None:
    """What a blocked Cholesky factorisation is made of."""
    n, b = run.sizes.n, run.few(1024, 16)
    for name in ("float64", "float32"):
        dtype = _DTYPES[name]
        rows, inner = n // 2, run.few(16384, 32)

        def panel(dtype: torch.dtype = dtype, rows: int = rows, inner: int = inner) -> Callable:
            A, B = _normal(run, rows, inner, dtype=dtype), _normal(run, b, inner, dtype=dtype)
            C = _normal(run, rows, b, dtype=dtype)
            return lambda: C.addmm_(A, B.T, alpha=-1.0)

        def trsm(dtype: torch.dtype = dtype, rows: int = rows) -> Callable:
            L = torch.eye(b, device=run.device, dtype=dtype).mul_(2.0).add_(1e-3).tril_()
            C = _normal(run, rows, b, dtype=dtype)
            return lambda: torch.linalg.solve_triangular(L.mT, C, upper=True, left=False)

        def potrf(dtype: torch.dtype = dtype) -> Callable:
            A = torch.eye(b, device=run.device, dtype=dtype).mul_(2.0).add_(1e-3)
            return lambda: torch.linalg.cholesky_ex(A)

        run.measure(f"panel product {name}", panel, flop=2.0 * rows * inner * b)
        run.measure(f"panel triangular solve {name}", trsm, flop=1.0 * rows * b * b)
        run.measure(f"factor of a block {name}", potrf, flop=b**3 / 3.0)


def _symmetric(run: Run) -> None:
    """The eigendecomposition behind M^(1/2), on the device and on the host."""
    d = run.sizes.d

    def prepare(device: torch.device) -> Callable:
        G = torch.randn(d, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        M = (G @ G.T).to(device)
        return lambda: torch.linalg.eigh(M)

    run.measure("eigh float64", lambda: prepare(run.device), size=d)
    run.measure("eigh float64 on the host", lambda: prepare(clock.CPU), size=d, threads=torch.get_num_threads())


def _launches(run: Run) -> None:
    """What a launch and a look at one value cost."""

    def small() -> Callable:
        x = torch.ones(32, device=run.device)

        def many() -> None:
            for _ in range(1000):
                x.add_(1.0)

        return many

    def looks() -> Callable:
        x = torch.ones(32, device=run.device)
        return lambda: [float(x[0]) for _ in range(100)]

    run.measure("1000 launches", small)
    run.measure("100 looks at a value", looks)
