"""First contact, whole layers: a Deep RFM of 20 layers by stage, and the stages of the solve."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from fastagop.kernels.gemm import LIBRARY, PanelProducts
from fastagop.kernels.kernel_operator import KernelOperator
from fastagop.kernels.torch_backend.tiles import weights_from_upper_

import fastagop
from bench.first_contact_run import OutOfTime, Run
from bench.problems import LAPLACE
from fastagop import linalg
from fastagop.deep_rfm.layer import LayerTraining, Settings
from fastagop.solvers import copies, half
from fastagop.solvers.symmetric_blocks import SymmetricBlocks


def settings(run: Run, depth: int, backend: str, solver: Any = "auto") -> Settings:
    """Of a Deep RFM with ReLU features as many as there are features, no ridge, as in the paper."""
    d = run.sizes.d
    return Settings(kernel=LAPLACE, depth=depth, features="relu", width=d, backend=backend, solver=solver)


def deep_rfm(run: Run) -> None:
    """The layers one after the other, a line each, and a readout: by the solver that is chosen, then by the other.

    It takes the layers as the estimators do, but not the estimators, which bring scikit-learn.
    """
    ways = [("auto", "triton"), ("cholesky", "triton"), ("auto", "torch"), ("cholesky+cg", "triton")]
    for solver, backend in ways[:3] if run.dry else ways:
        name = f"{run.sizes.depth} layers, {backend}, {solver}"
        if run.wanted(name):
            _trained(run, name, backend, solver)


def _trained(run: Run, name: str, backend: str, solver: str) -> None:
    facts = {"n": run.sizes.n, "d": run.sizes.d, "K": 10, "backend": backend, "solver": solver}
    try:
        p = run.problem()
        Y = 2.0 * torch.nn.functional.one_hot(p.y).to(p.X) - 1.0
        training = LayerTraining(Y, settings(run, run.sizes.depth, backend, solver), copies.find(p.X), p.y)
        points = p.X
        run.seconds(lambda: None)  # the device has done what was asked of it
        start = time.perf_counter()
        for layer in range(run.sizes.depth):
            if time.monotonic() > run.stop:
                raise OutOfTime
            made, output = training.layer(points, layer)
            points = output.points
            run.write(f"layer {layer + 1}, {backend}, {solver}", **facts, layer=layer + 1, **_layer_facts(made.record))
    except OutOfTime:
        raise
    except Exception as failure:  # of a layer: those behind it have no input
        words = (str(failure).splitlines() or [""])[0][:300]
        run.write(name, failure=f"{type(failure).__name__}: {words}", **facts)
        del failure
        run.look_after_the_device()
        return

    def readout() -> dict[str, Any]:
        _, solved = training.readout(points)
        run.seconds(lambda: None)
        found = solved.solution
        return {"seconds": time.perf_counter() - start, "residual": found.residual, "method": found.method}

    run.record(name, readout, **facts, depth=run.sizes.depth)


def _layer_facts(record) -> dict[str, Any]:
    found = record.solution
    facts = {"seconds": record.seconds, "stages": dict(record.stages), "bytes": record.peak_bytes}
    facts |= {"residual": found.residual, "jitter": found.jitter, "method": found.method, "dtype": str(found.dtype)}
    facts |= {"iterations": found.iterations, "fallback": found.fallback, "nc1": record.nc1.get("projected")}
    return facts


def solve(run: Run) -> None:
    """The whole solve by each method, then its stages: fill, factor, products and triangular solves, by dtype."""
    n, d, K = run.sizes.n, run.sizes.d, run.sizes.K
    p = functools.cache(run.problem)
    work = 1.0 * n * n * d + n**3 / 3.0
    for backend in ("triton", "torch"):
        for method in ("cholesky+cg", "cholesky"):
            facts = {"n": n, "d": d, "K": K, "backend": backend, "method": method, "flop": work}
            run.record(f"solve, {backend}, {method}", functools.partial(_solved, run, p, backend, method), **facts)
    for backend in ("triton", "torch"):
        _half(run, p, backend)
    _full(run, p)


def _solved(run: Run, p: Callable, backend: str, method: str) -> dict[str, Any]:
    problem, found = p(), []
    took = run.seconds(
        lambda: found.append(
            fastagop.solve(problem.kernel, problem.X, problem.alpha, ridge=0.0, method=method, backend=backend)
        )
    )
    (s,) = found
    facts = {"iterations": s.iterations, "jitter": s.jitter, "ran": s.method, "fallback": s.fallback}
    return {"seconds": took, "error": s.residual, **facts}


def _half(run: Run, p: Callable, backend: str) -> None:
    """The stages of "cholesky+cg": half a matrix in float64, its float32 factor, a step of conjugate gradients."""
    n, d, K = run.sizes.n, run.sizes.d, run.sizes.K

    @functools.cache
    def filled() -> SymmetricBlocks:
        operator = KernelOperator("solve", p().kernel, p().X, backend=backend)
        return half.filler_of(operator)(SymmetricBlocks(n, torch.float64, run.device))

    def factored(products: PanelProducts) -> tuple[SymmetricBlocks, dict[str, Any]]:
        made, failed = filled().to(torch.float32), []
        took = run.seconds(lambda: failed.append(made.cholesky_(1.0, products)))
        return made, {"seconds": took, "failed_pivot": failed[0]}

    @functools.cache
    def factor() -> tuple[SymmetricBlocks, dict[str, Any]]:
        operator = KernelOperator("solve", p().kernel, p().X, backend=backend)
        return factored(operator.backend.factor_kernels(torch.float32, "highest").panels)

    def copied() -> dict[str, Any]:
        K = filled()
        return {"seconds": run.seconds(lambda: K.to(torch.float32))}

    def vectors(dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(n, K, device=run.device, dtype=dtype)

    def fill() -> Callable:
        operator = KernelOperator("solve", p().kernel, p().X, backend=backend)
        blocks, fill = SymmetricBlocks(n, torch.float64, run.device), half.filler_of(operator)
        return lambda: fill(blocks)

    name = f"half of a matrix, {backend}"
    run.measure(f"{name}: float64 fill", fill, repeats=2, flop=1.0 * n * n * d, n=n)
    if backend == "torch":  # the rest is the same
        return

    def product() -> Callable:
        K, V = filled(), vectors(torch.float64)
        return lambda: K.matmul(V)

    def triangular() -> Callable:
        L, V = factor()[0], vectors(torch.float32)
        return lambda: L.solve(V)

    name = "half of a matrix"
    run.record(f"{name}: float32 copy", copied, moved=6.0 * n * n, n=n)
    run.record(f"{name}: float32 factor", lambda: factor()[1], flop=n**3 / 3.0, n=n)
    run.record(f"{name}: float32 factor, library", lambda: factored(LIBRARY)[1], flop=n**3 / 3.0, n=n)
    run.measure(f"{name}: float64 product", product, moved=4.0 * n * n, n=n)
    run.measure(f"{name}: two triangular solves", triangular, moved=4.0 * n * n, n=n)


def _full(run: Run, p: Callable) -> None:
    """The stages of a float64 factorisation of a full matrix, which becomes the weights in place."""
    n, K = run.sizes.n, run.sizes.K

    @functools.cache
    def matrix() -> torch.Tensor:
        K64 = torch.empty(n, n, dtype=torch.float64, device=run.device)
        return fastagop.kernel_matrix(p().kernel, p().X.double(), out=K64)

    def vectors() -> torch.Tensor:
        return torch.randn(n, K, device=run.device, dtype=torch.float64)

    def factored() -> dict[str, Any]:
        A, failed = matrix(), []
        took = run.seconds(lambda: failed.append(linalg.cholesky_lower_(A, 1.0)))
        return {"seconds": took, "failed_pivot": failed[0]}

    def bound(call: Callable) -> Callable:
        A, B = matrix(), vectors()
        return lambda: call(A, B)

    run.record("full matrix: float64 factor", factored, flop=n**3 / 3.0, n=n)
    run.measure("full matrix: cholesky_solve", lambda: bound(linalg.cholesky_solve), moved=8.0 * n * n, n=n)
    run.measure("full matrix: upper_matmul", lambda: bound(_upper_matmul), moved=8.0 * n * n, n=n)

    def weights() -> dict[str, Any]:
        A = matrix()
        return {"seconds": run.seconds(lambda: weights_from_upper_(p().kernel, A))}

    run.record("full matrix: weights in place", weights, moved=12.0 * n * n, n=n)


def _upper_matmul(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    return linalg.upper_matmul(A, 1.0, B)
