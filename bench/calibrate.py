"""Measure this device once: rates of the AGOP forms and, on CUDA, the fastest launch configurations.

fastagop reads the file that this writes; nothing is ever tuned or timed inside a call.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path

import torch
from fastagop.kernels import calibration
from fastagop.kernels.torch_backend import costs
from fastagop.kernels.triton_backend import launch_config
from fastagop.kernels.triton_backend.launch_config import PRODUCTS, Config

import fastagop
from bench import clock, files, problems

KERNEL = problems.LAPLACE
_SIZES = {"cpu": (4000, 784, 10), "cuda": (16384, 1024, 10)}
# (rows, columns, inner, warps, stages, and registers where they are limited) worth a try beside the table's; what a
# chip cannot launch is skipped.
CANDIDATES = {
    "matrix": [
        (128, 128, 32, 8, 3),
        (128, 64, 32, 8, 3, 128),
        (128, 64, 32, 8, 4),
        (128, 64, 64, 8, 3),
        (64, 64, 32, 4, 4),
    ],
    "matmul": [(64, 64, 32, 4, 3), (64, 32, 32, 4, 3), (128, 32, 32, 8, 3), (64, 32, 64, 4, 3), (32, 32, 32, 4, 3)],
    "gradient": [
        (128, 128, 32, 8, 3),
        (128, 64, 32, 8, 3, 128),
        (128, 128, 32, 8, 4),
        (128, 128, 64, 8, 3),
        (128, 64, 32, 4, 4),
    ],
    "gram": [
        (128, 128, 32, 8, 3),
        (128, 64, 32, 8, 3),
        (128, 64, 32, 8, 3, 128),
        (64, 64, 32, 4, 4),
        (64, 64, 64, 4, 3),
    ],
    "panel": [(128, 128, 32, 8, 3), (128, 64, 64, 8, 3), (128, 64, 32, 8, 4), (64, 64, 32, 4, 4)],
    "update": [(128, 128, 16, 8, 3), (128, 128, 32, 8, 3), (128, 64, 32, 8, 3), (64, 64, 32, 4, 3)],
}


def rates(device: torch.device, n: int, d: int, K: int, repeats: int) -> dict[str, float]:
    """Floating-point operations per second of each AGOP form with each kind of products."""
    found = {}
    work, drawn = costs.flops(n, n, d, K, True), problems.draw(n, d, K, device=device)
    ways = [("torch", "highest", torch.float32, "float32"), ("torch", "highest", torch.float64, "float64")]
    if device.type == "cuda":
        ways += [("triton", precision, torch.float32, word) for precision, word in PRODUCTS.items()]
    for backend, precision, dtype, word in ways:
        X, alpha = drawn.X.to(dtype), drawn.alpha.to(dtype)
        for form in ("gradient", "gram"):

            def run(form=form, X=X, alpha=alpha, backend=backend, precision=precision):
                return fastagop.agop(KERNEL, X, alpha, method=form, backend=backend, precision=precision)

            found[f"{form} {word}"] = work[form] / clock.seconds(run, device, repeats)
    return found


def launches(device: torch.device, n: int, d: int, K: int) -> dict[tuple[str, str], Callable]:
    """One call for each (operation, products) of the table, that returns something to compare."""
    from fastagop.kernels.triton_backend import launch as triton_launch  # imports triton

    drawn = problems.draw(n, d, K, device=device)
    X, alpha = drawn.X, drawn.alpha
    W, wide = X.new_empty(n, n), X.new_empty(min(n, 8192), min(n, 8192), dtype=torch.float64)
    W = fastagop.kernel_matrix(KERNEL, X, backend="triton", out=W)
    out, block = X.new_empty(min(512, n), K, d), min(1024, n // 2)
    s = W @ alpha
    runs: dict[tuple[str, str], Callable] = {
        ("matrix", "fp64"): lambda: triton_launch.fill_symmetric(wide, KERNEL, X[: len(wide)]),
        ("panel", "fp16x3"): _panel_product(W),
    }
    for precision, word in PRODUCTS.items():
        steps = triton_launch.inner_kernels(X, precision)
        lower, update = steps.lower(W, alpha), triton_launch.cholesky_update(precision)
        inside, step = triton_launch.INSIDE[word], steps.gradients
        assert step is not None

        def kernel_matrix(precision=precision):
            return fastagop.kernel_matrix(KERNEL, X, backend="triton", precision=precision)

        def kernel_matmul(precision=precision):
            return fastagop.kernel_matmul(KERNEL, X, None, alpha, backend="triton", precision=precision)

        def gradient(step=step):
            return step(W[: len(out)], alpha, X, X[: len(out)], None, out)

        def gram(lower=lower):
            return lower(s, s.square().sum(1), n - block, n)

        def column_block(update=update):
            A = W.clone()
            update(A, n - block, n)
            return A[n - block :]

        runs |= {("matrix", word): kernel_matrix, ("matmul", word): kernel_matmul, ("gradient", word): gradient}
        runs |= {("gram", word): gram, ("update", inside): column_block}
    return runs


def _panel_product(W: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The update of a block of a float32 factor by all that lies left of it."""
    from fastagop.kernels.triton_backend import launch as triton_launch  # imports triton

    rows = min(4096, len(W) // 4)
    C, (left, below) = W.new_zeros(rows, rows), (triton_launch.split_rows(W[i : i + rows]) for i in (0, rows))

    def panel() -> torch.Tensor:
        triton_launch.subtract_product_(C.zero_(), below, left)
        return C

    return panel


def tune(runs: dict[tuple[str, str], Callable], device: torch.device, repeats: int) -> dict[str, tuple[int, ...]]:
    """The fastest configuration of each launch; a candidate that fails or computes something else is no candidate."""
    best = {}
    for (operation, products), run in runs.items():
        usual = launch_config.config(operation, products, device)
        truth, fastest, chosen = run().clone(), clock.seconds(run, device, repeats), usual
        for candidate in (Config(*numbers) for numbers in CANDIDATES[operation]):
            with launch_config.trial(operation, products, candidate):
                try:
                    if not agree(run(), truth, products):
                        raise ValueError("it computes something else")
                    took = clock.seconds(run, device, repeats, warm=0)
                except Exception as error:  # resources that the chip lacks come as many kinds of error
                    print(f"{operation} {products} {candidate}: skipped, {error}")
                    continue
            if took < 0.97 * fastest:  # less is noise
                fastest, chosen = took, candidate
        print(f"{operation} {products}: {chosen}, {fastest * 1e3:.3g} ms")
        best[f"{operation} {products}"] = chosen.numbers
    return best


def agree(result: torch.Tensor, truth: torch.Tensor, products: str) -> bool:
    """Whether two configurations computed the same, up to the products' rounding."""
    bound = {"tf32": 1e-2, "bf16x3": 1e-4, "fp64": 1e-12}.get(products, 1e-5)
    return float((result - truth).norm()) <= bound * float(truth.norm())


def main(device: torch.device, out: Path | None, repeats: int, n: int | None, *, configs: bool = True) -> Path:
    """Measure, write the device's file, and a copy to ``out``."""
    calibration.path(device)  # says now, and not after minutes, that there is no home directory
    size = _SIZES[device.type]
    size = size if n is None else (n, *size[1:])
    best = tune(launches(device, *size), device, repeats) if device.type == "cuda" and configs else {}
    result = rates(device, *size, repeats)
    about = {"device": calibration.name(device), "date": datetime.date.today().isoformat(), "size": str(size)}
    file = calibration.save(device, calibration.Measured(best, result, about))
    for key, value in result.items():
        print(f"{key:20} {value / 1e9:10.1f} GFLOP/s")
    print(f"written to {file}")
    if out is not None:
        files.write_result(out, {"rates": result, "configs": best})
    return file
