"""Everything at the paper's size on one device: ceilings, each operation beside its peers, a layer of Deep RFM.

Each row says seconds, effective GFLOP/s (the least operations that the result needs), the share of the measured ceiling
of the products that ran, peak memory and the error against float64. What a machine cannot run is a row with the reason.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from fastagop.kernels.triton_backend.launch_config import interpreted

import fastagop
from bench import clock, files, machine, peers

KERNEL = fastagop.Laplace(2.0)
LIMIT = 520.0  # seconds after which no further case starts
_PRODUCTS = {"fp16x3": (3, "float16"), "bf16x3": (3, "bfloat16"), "tf32": (1, "tf32")}
_WAYS = {"highest": "fp16x3", "high": "bf16x3", "medium": "tf32"}


@dataclass(frozen=True)
class Contender:
    """One way to compute a case: what to call, and the products that its share of the ceiling is taken of."""

    name: str
    run: Callable
    products: str = "float32"


class Suite:
    """Rows of one run, saved after each, so that a run cut short leaves what it measured."""

    def __init__(self, device: torch.device, out: Path, n: int, repeats: int):
        self.device, self.out, self.n, self.repeats = device, out, n, repeats
        self.fused = device.type == "cuda" or interpreted()
        self.start, self.rows, self.ceilings = time.perf_counter(), [], {}

    def save(self) -> None:
        """Write the result file."""
        result = {"machine": machine.describe(), "n": self.n, "ceilings": self.ceilings, "rows": self.rows}
        files.write_json(self.out, result)

    def case(self, name: str, work: float, contenders: list[Contender], error: Callable | None, **facts) -> None:
        """Measure the contenders of a case."""
        for contender in contenders:
            if contender.name.startswith("triton") and not self.fused:
                continue
            row = {"case": name, "contender": contender.name, **facts}
            if time.perf_counter() - self.start > LIMIT:
                row["note"] = "not run: out of time"
            else:
                try:
                    row |= self._measure(contender, work, error)
                except Exception as failure:  # one contender's failure is a row, not the end
                    row["note"] = (
                        f"{type(failure).__name__}: {str(failure).splitlines()[0][:160] if str(failure) else ''}"
                    )
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            print(line(row), flush=True)
            self.rows.append(row)
            self.save()

    def _measure(self, contender: Contender, work: float, error: Callable | None) -> dict:
        kept = []

        def run():
            kept[:] = [contender.run()]

        peak = clock.peak_bytes(run, self.device)  # the warm-up, compilation included
        found = float(error(kept[0])) if error is not None and kept[0] is not None else None
        kept.clear()
        took = clock.seconds(contender.run, self.device, self.repeats, warm=0)
        factor, ceiling = _PRODUCTS.get(contender.products, (1, contender.products))
        share = work * factor / took / self.ceilings[ceiling]["flops"] if ceiling in self.ceilings else None
        return {"seconds": took, "tflops": work / took / 1e12, "share": share, "peak_bytes": peak, "error": found}


def line(row: dict) -> str:
    """A row as a line of the table."""
    facts = " ".join(f"{key}={row[key]}" for key in ("d", "K") if key in row)
    head = f"{row['case']:28} {facts:14} {row['contender']:24}"
    if "seconds" not in row:
        return f"{head} {row['note']}"
    share = f"{100 * row['share']:5.0f}%" if row["share"] is not None else "     -"
    peak = f"{row['peak_bytes'] / 1e9:8.2f} GB" if row["peak_bytes"] is not None else "           "
    error = f"{row['error']:.0e}" if row["error"] is not None else ""
    return f"{head} {row['seconds']:9.4f} s {1e3 * row['tflops']:9.1f} GFLOP/s {share} {peak} {error}"


def ceilings(suite: Suite) -> None:
    """Copy bandwidth, and the library's square products by kind: what the shares are shares of."""
    device, size = suite.device, 8192 if suite.device.type == "cuda" else 1024
    block = torch.empty(size * size * 4, device=device)
    bandwidth = 2 * block.numel() * 4 / clock.seconds(block.clone, device, 5)
    suite.ceilings["copy"] = {"bytes": bandwidth}
    print(f"copy {bandwidth / 1e9:.0f} GB/s")
    del block
    kinds = {"float32": torch.float32, "float64": torch.float64}
    if device.type == "cuda":
        kinds |= {"tf32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    for name, dtype in kinds.items():
        A = torch.randn(size, size, device=device).to(dtype)
        with _tf32() if name == "tf32" else contextlib.nullcontext():
            flops = 2 * size**3 / clock.seconds(lambda A=A: A @ A, device, 5)
        suite.ceilings[name] = {"flops": flops}
        print(f"{name} products {flops / 1e12:.2f} TFLOP/s")
    suite.save()


@contextlib.contextmanager
def _tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def data(n: int, d: int, K: int, device: torch.device, spread: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit rows, spread out or in ten classes sorted and collapsed to a spread, and coefficients."""
    generator = torch.Generator(device).manual_seed(0)
    X = torch.randn(n, d, generator=generator, device=device)
    if spread is not None:
        X = (
            torch.randn(10, d, generator=generator, device=device)[torch.arange(n, device=device) * 10 // n]
            + spread * X
        )
    return torch.nn.functional.normalize(X), torch.randn(n, K, generator=generator, device=device) / n


def _some(n: int, device: torch.device) -> torch.Tensor:
    """Rows on which results of size n x n are checked."""
    return torch.linspace(0, n - 1, min(256, n), device=device).long()


def _truth(X: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows of k(X, X) in float64, from direct differences."""
    r = torch.cdist(X[rows].double(), X.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return torch.exp(-r / KERNEL.bandwidth)


def _ours(run: Callable, **more) -> list[Contender]:
    """fastagop on Triton at each precision, and on torch."""
    fused = [
        Contender(f"triton {precision}", lambda p=precision: run(backend="triton", precision=p, **more), products)
        for precision, products in _WAYS.items()
    ]
    return [*fused, Contender("torch", lambda: run(backend="torch", **more))]


def kernel_matrix(suite: Suite, d: int, spread: float | None) -> None:
    """k(X, X): its floor is half of the product X X^T."""
    X, _ = data(suite.n, d, 1, suite.device, spread)
    rows = _some(suite.n, suite.device)
    truth = _truth(X, rows)
    contenders = _ours(lambda **how: fastagop.kernel_matrix(KERNEL, X, **how))
    contenders.append(Contender("composition", lambda: peers.kernel_matrix(X, KERNEL)))
    name = "kernel_matrix" if spread is None else "kernel_matrix collapsed"
    suite.case(name, suite.n**2 * d, contenders, lambda K: (K[rows].double() - truth).norm() / truth.norm(), d=d, K=0)


def kernel_matmul(suite: Suite, d: int, K: int) -> None:
    """k(X, X) V without k(X, X)."""
    X, V = data(suite.n, d, K, suite.device, None)
    rows = _some(suite.n, suite.device)
    truth = _truth(X, rows) @ V.double()
    contenders = _ours(lambda **how: fastagop.kernel_matmul(KERNEL, X, None, V, **how))
    contenders.append(Contender("composition", lambda: peers.kernel_matrix(X, KERNEL) @ V))
    suite.case(
        "kernel_matmul",
        suite.n**2 * (d + 2 * K),
        contenders,
        lambda R: (R[rows].double() - truth).norm() / truth.norm(),
        d=d,
        K=K,
    )


def agop(suite: Suite, d: int, K: int) -> None:
    """Both forms against the plain composition and xrfm; the work is that of the cheaper form."""
    from fastagop.kernels.torch_backend import costs

    X, alpha = data(suite.n, d, K, suite.device, None)
    work = min(costs.flops(suite.n, suite.n, d, K, symmetric=True).values())
    truth = fastagop.agop(
        KERNEL, X.double(), alpha.double(), method="gram" if K > 10 else "gradient", reduction="sum", backend="torch"
    )

    def run(**how):
        return fastagop.agop(KERNEL, X, alpha, reduction="sum", **how)

    contenders = _ours(run, method="gradient") if K <= 10 else []
    contenders += [Contender(f"{c.name} gram", c.run, c.products) for c in _ours(run, method="gram")]
    contenders.append(Contender("composition", lambda: peers.composition(X, alpha, KERNEL)))
    contenders.append(Contender("xrfm", lambda: peers.xrfm_agop(X, alpha, KERNEL.bandwidth)))
    suite.case("agop", work, contenders, lambda M: (M.double() - truth).norm() / truth.norm(), d=d, K=K)


def solve(suite: Suite, d: int, K: int) -> None:
    """The two roads (float64 factorisation; coarse factor and float64 refinement) against the library's Cholesky."""
    X, Y = data(suite.n, d, K, suite.device, None)

    def ours(**how):
        return fastagop.solve(KERNEL, X, Y, **how)

    def library():
        K_ = fastagop.kernel_matrix(KERNEL, X.double(), backend="torch")
        return torch.linalg.cholesky_ex(K_).L[0, 0]

    contenders = [
        Contender("triton float64", lambda: ours(backend="triton"), "float64"),
        Contender("triton float32, ridge", lambda: ours(backend="triton", ridge=1e-3)),
        Contender("triton bf16x3 factor", lambda: ours(backend="triton", precision="high"), "bf16x3"),
        Contender("triton tf32 factor", lambda: ours(backend="triton", precision="medium"), "tf32"),
        Contender("torch float64", lambda: ours(backend="torch"), "float64"),
        Contender("K and library Cholesky", library, "float64"),
    ]
    work = suite.n**3 / 3 + suite.n**2 * d
    suite.case("solve", work, contenders, lambda s: getattr(s, "residual", float("nan")), d=d, K=K)


def deep_rfm(suite: Suite, d: int, depth: int) -> None:
    """Whole layers of Deep RFM with ReLU features of width d, from points around ten centres."""
    generator = torch.Generator(suite.device).manual_seed(0)
    y = torch.arange(suite.n, device=suite.device) % 10
    X = torch.randn(10, d, generator=generator, device=suite.device)[y]
    X = X + 2.0 * torch.randn(suite.n, d, generator=generator, device=suite.device)

    def fit(backend: str):
        how = {"depth": depth, "width": d, "random_state": 0, "device": suite.device, "backend": backend}
        model = fastagop.DeepRFMClassifier(**how).fit(X, y)
        stages = {key: round(value, 3) for key, value in model.layers_[-1].stages.items()}
        print(f"  {backend} stages of the last layer: {stages}, NC1 {model.layers_[-1].nc1['projected']:.2e}")
        return model

    n, backends = suite.n, ("triton", "torch") if depth == 1 or not suite.fused else ("triton",)
    contenders = [Contender(b, lambda b=b: fit(b)) for b in backends]
    work = depth * (2.0 * n**2 * d + n**3 / 3 + 2.0 * n**2 * 10 * d)
    suite.case(f"deep_rfm, {depth} layers", work, contenders, lambda m: m.solution_.residual, d=d, K=10)


def main(device: torch.device, out: Path, repeats: int, n: int | None, dims: tuple[int, ...] | None) -> None:
    """Run everything, print the rows as they come and a table at the end."""
    cuda = device.type == "cuda"
    suite = Suite(device, out, n or (50_000 if cuda else 2000), repeats)
    ceilings(suite)
    for d in dims or ((1024, 3072) if cuda else (784,)):
        kernel_matrix(suite, d, None)
        agop(suite, d, 10)
        deep_rfm(suite, d, 1)
    d = (dims or (1024 if cuda else 784,))[0]
    solve(suite, d, 10)
    agop(suite, d, 100)
    kernel_matmul(suite, d, 10)
    kernel_matrix(suite, d, 1e-3)
    deep_rfm(suite, d, 20 if cuda else 2)
    print("\n".join(["", *map(line, suite.rows)]))
    print(f"{time.perf_counter() - suite.start:.0f} s, written to {out}")
