"""First contact, launch configurations and row blocks: what each costs beside the table's own."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from fastagop.kernels.kernel_operator import KernelOperator
from fastagop.kernels.plan import AgopTask
from fastagop.kernels.triton_backend import launch_config
from fastagop.kernels.triton_backend.launch_config import Config

from bench import calibrate
from bench.first_contact_run import Run

Numbers = tuple[int, int, int, int, int]
# (rows, columns, inner, warps, stages) that a reading of the compiled code speaks for, beside those that ``calibrate``
# tries: more rows than warps allow twice the work, a longer inner dimension waits half as often.
MORE: dict[str, list[Numbers]] = {
    "matrix": [(128, 128, 64, 8, 3), (64, 64, 16, 8, 3), (64, 64, 16, 4, 4), (128, 64, 16, 8, 3)],
    "matmul": [(64, 64, 32, 4, 3), (128, 32, 32, 4, 3)],
    "gradient": [(128, 64, 32, 8, 3), (128, 64, 64, 8, 3)],
    "gram": [(128, 64, 32, 8, 3), (64, 64, 32, 4, 3), (128, 128, 64, 8, 3), (64, 32, 32, 4, 3)],
    "update": [(128, 128, 64, 8, 3)],
}
CAPS = (0, 128, 168)  # registers a thread at most (maxnreg); 0: the compiler's choice. 128 lets two blocks of 256 run
# Those of the highest precision first: they are what a Deep RFM waits for.
ORDER = ("fp64", "fp16x3", "tf32x3", "bf16x3", "tf32")


class Capped(Config):
    """A configuration with a limit on registers, which the table's entries have not."""

    cap = 0

    @property
    def launch(self) -> dict[str, int]:
        """Options of a launch."""
        return {**super().launch, **({"maxnreg": self.cap} if self.cap else {})}


def capped(numbers: Numbers, cap: int) -> Config:
    """A configuration of five numbers and a limit."""
    made = Capped(*numbers)
    object.__setattr__(made, "cap", cap)
    return made


def launches(run: Run) -> None:
    """Every operation and products: the table's configuration, then the candidates with and without a limit."""
    n, d, K = run.few(16_384, run.sizes.n), run.sizes.d, run.sizes.K
    calls = functools.cache(lambda: calibrate.launches(run.device, n, d, K))
    truths: dict[tuple[str, str], torch.Tensor] = {}
    pairs = sorted(launch_config.TABLE[8], key=lambda pair: (ORDER.index(pair[1]), pair[0]))
    for operation, products in pairs:
        if run.dry and products == "bf16x3":  # the interpreter has none
            continue
        for config in _candidates(run, operation, products):
            numbers = _numbers(config)
            cap = getattr(config, "cap", 0)
            present = numbers == _numbers(_present(run, operation, products)) and not cap
            facts = {"operation": operation, "products": products, "config": numbers, "maxnreg": cap}
            facts |= {"present": present, "n": n, "d": d, "K": K}
            words = " ".join(map(str, numbers)) + (f" maxnreg {cap}" if cap else "")
            measure = functools.partial(_timed, run, calls, truths, (operation, products), config)
            run.record(f"{operation} {products}: {words}", measure, **facts)


def _timed(run: Run, calls: Callable, truths: dict, which: tuple[str, str], config: Config) -> dict[str, Any]:
    """Seconds under a configuration that computes what the table's does; the error is the difference from that."""
    call = calls()[which]
    if which not in truths:
        truths[which] = call().clone()
    with launch_config.trial(*which, config):
        result = call()
        difference = float((result - truths[which]).norm() / truths[which].norm())
        if not calibrate.agree(result, truths[which], which[1]):
            raise ValueError(f"it computes something else: {difference:.1e} apart from the table's configuration")
        times = sorted(run.seconds(call) for _ in range(run.few(5, 1)))
    return {"seconds": times[len(times) // 2], "apart": difference}


def _present(run: Run, operation: str, products: str) -> Config:
    return launch_config.config(operation, products, run.device)


def _numbers(config: Config) -> Numbers:
    return (config.rows, config.columns, config.inner, config.warps, config.stages)


def _candidates(run: Run, operation: str, products: str) -> Iterator[Config]:
    """The present one first, and nothing twice."""
    present = _present(run, operation, products)
    yield present
    if run.dry:
        yield capped((32, 32, 16, 4, 1), 128)
        return
    seen = {(_numbers(present), 0)}
    for numbers in (_numbers(present), *calibrate.CANDIDATES[operation], *MORE[operation]):
        for cap in CAPS:
            if (numbers, cap) not in seen:
                seen.add((numbers, cap))
                yield capped(numbers, cap)


def blocks(run: Run) -> None:
    """The gradient form by rows of a block, in both backends, and what the plan takes by itself."""
    s = run.sizes
    n = min(s.n, run.few(30_000, s.n))
    for backend in ("triton", "torch"):
        for rows in (0, *((128, 256, 512, 1024, 2048, 4096, 8192) if not run.dry else (32, 64))):
            prepare = functools.partial(_gradient_form, run, backend, n, rows)
            work = 2.0 * n * n * s.d * (s.K + 1) + 2.0 * n * s.K * s.d * s.d
            facts = {"n": n, "d": s.d, "K": s.K, "backend": backend, "rows": rows, "flop": work}
            name = f"blocks of {rows} rows" if rows else "blocks as planned"
            run.measure(f"gradient form, {backend}, {name}", prepare, repeats=2, **facts)


def _gradient_form(run: Run, backend: str, n: int, rows: int) -> Callable[[], torch.Tensor]:
    """The AGOP of a call whose plan has other rows."""
    p = run.problem(n)
    operator = KernelOperator("agop", p.kernel, p.X, backend=backend)
    task = AgopTask("sum", method="gradient")
    if not rows:
        return operator.agop(p.alpha, task).run
    plan = dataclasses.replace(operator.agop(p.alpha, task).plan, block=rows)
    return functools.partial(_by_plan, operator, backend, p.alpha, task, plan)


def _by_plan(operator: KernelOperator, backend: str, alpha: torch.Tensor, task: AgopTask, plan) -> torch.Tensor:
    with operator.products():
        if backend == "triton":
            from fastagop.kernels.triton_backend import launch

            return launch.agop(operator.points, alpha, task, plan, operator.precision)
        from fastagop.kernels.torch_backend import agop as torch_agop

        return torch_agop.agop(operator.points, alpha, task, plan)
