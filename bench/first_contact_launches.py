"""First contact, launch configurations and row blocks: what each costs beside the table's own."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from fastagop.kernels.kernel_operator import KernelOperator
from fastagop.kernels.plan import AgopTask
from fastagop.kernels.triton_backend import launch_config
from fastagop.kernels.triton_backend.launch_config import Config

from bench import calibrate, checkout
from bench.first_contact_run import Run
from bench.problems import LAPLACE

Numbers = tuple[int, int, int, int, int]
# (rows, columns, inner, warps, stages) that a reading of the compiled code speaks for, beside those that ``calibrate``
# tries: more rows than warps allow twice the work, a longer inner dimension waits half as often.
MORE: dict[str, list[Numbers]] = {
    "matrix": [(128, 128, 64, 8, 3), (64, 64, 16, 8, 3), (64, 64, 16, 4, 4), (128, 64, 16, 8, 3)],
    "matmul": [(64, 64, 32, 4, 3), (128, 32, 32, 4, 3)],
    "gradient": [(128, 64, 32, 8, 3), (128, 64, 64, 8, 3)],
    "gram": [(128, 64, 32, 8, 3), (64, 64, 32, 4, 3), (128, 128, 64, 8, 3), (64, 32, 32, 4, 3)],
    "panel": [(128, 64, 32, 8, 3), (128, 128, 64, 8, 3)],
    "update": [(128, 128, 64, 8, 3)],
}
LIMITS = (0, 128, 168)  # registers a thread at most (maxnreg); 0: the compiler's choice. 128 lets two blocks of 256 run
HIGHEST = ("fp64", "fp16x3", "tf32x3")  # products that a Deep RFM waits for: they come first
_COMPILERS, _COMPILED_AT = 12, 2048  # processes that compile ahead, at most, and rows that they do it at


_CODE = "from bench import checkout; checkout.place(); from bench import first_contact_launches as a; a.compile_all()"


class _Limited(Config):
    """A configuration with a limit on registers, where the table's own cannot have one."""

    limit = 0

    @property
    def launch(self) -> dict[str, int]:
        """Options of a launch."""
        return {**super().launch, "maxnreg": self.limit}


def configured(numbers: Sequence[int], limit: int) -> Config:
    """A configuration of five numbers and the most registers a thread may take, 0 for no limit."""
    rows, columns, inner, warps, stages = numbers[:5]
    if not limit:
        return Config(rows, columns, inner, warps, stages)
    if "registers" in Config.__dataclass_fields__:
        return Config(rows, columns, inner, warps, stages, **{"registers": limit})
    made = _Limited(rows, columns, inner, warps, stages)
    object.__setattr__(made, "limit", limit)
    return made


def _limit(config: Config) -> int:
    return config.launch.get("maxnreg", 0)


def launches(run: Run) -> None:
    """Every operation and products: the table's configuration, the candidates, and these with limits on registers."""
    n, d, K = run.few(16_384, run.sizes.n), run.sizes.d, run.sizes.K
    calls = functools.cache(lambda: calibrate.launches(run.device, n, d, K))
    truths: dict[tuple[str, str], torch.Tensor] = {}
    passes = [(HIGHEST, LIMITS[:1]), (HIGHEST, LIMITS[1:2]), (("bf16x3", "tf32"), LIMITS[:1]), (HIGHEST, LIMITS[2:])]
    for products, limits in passes:
        todo = [trial for trial in _trials(run, products, limits) if ("launches", _case(trial)) not in run.done]
        if todo and not run.dry:  # the interpreter compiles nothing
            _compile_ahead(run, todo)
        for trial in todo:
            facts = {"operation": trial.operation, "products": trial.products}
            facts |= {"config": _numbers(trial.config), "maxnreg": _limit(trial.config)}
            facts |= {"present": trial.present, "n": n, "d": d, "K": K}
            run.record(_case(trial), functools.partial(_timed, run, calls, truths, trial), **facts)


@dataclasses.dataclass(frozen=True)
class Trial:
    """A configuration of an operation and its products; ``present`` where it is the one that calls take now."""

    operation: str
    products: str
    config: Config
    present: bool = False


def _case(trial: Trial) -> str:
    numbers, limit = " ".join(map(str, _numbers(trial.config))), _limit(trial.config)
    return f"{trial.operation} {trial.products}: {numbers}" + (f" maxnreg {limit}" if limit else "")


def _trials(run: Run, products: Sequence[str], limits: Sequence[int]) -> Iterator[Trial]:
    """The candidates of all operations with these products and limits; the present one comes first, among no limits."""
    for operation, word in sorted(launch_config.TABLE[8]):
        if word not in products or (run.dry and word == "bf16x3"):  # the interpreter has none of these
            continue
        present = launch_config.config(operation, word, run.device)
        found = [_numbers(present), *(numbers[:5] for numbers in calibrate.CANDIDATES[operation]), *MORE[operation]]
        if run.dry:
            found = [_numbers(present), *([(32, 32, 16, 4, 1)] if operation == "update" else [])]
        if 0 in limits:
            yield Trial(operation, word, present, True)
        if run.dry and 0 not in limits and operation != "update":
            continue
        for limit in limits:
            for numbers in dict.fromkeys(found):
                if (numbers, limit) != (_numbers(present), _limit(present)):
                    yield Trial(operation, word, configured(numbers, limit))


def _compile_ahead(run: Run, todo: Sequence[Trial]) -> None:
    """Let other processes compile what comes, into Triton's cache: a kernel takes seconds, and cores are idle.

    A candidate that fails or crashes there does so again when its turn comes, and is told then.
    """
    count = min(_COMPILERS, max(1, (os.cpu_count() or 2) - 2), -(-len(todo) // 2))
    left = 0.4 * (run.stop - time.monotonic())
    if left < 1.0:
        return
    command = [sys.executable, *(["-S"] if sys.flags.no_site else []), "-c", _CODE]
    orders = [
        [(t.operation, t.products, _numbers(t.config), _limit(t.config)) for t in todo[i::count]] for i in range(count)
    ]
    started = [subprocess.Popen(command, stdin=subprocess.PIPE, text=True, cwd=checkout.ROOT) for _ in orders]
    stop = time.monotonic() + left
    try:
        for process, order in zip(started, orders, strict=True):
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                place = {"device": run.device.type, "n": _COMPILED_AT, "d": run.sizes.d, "K": run.sizes.K}
                process.stdin.write(json.dumps({**place, "trials": order}))
                process.stdin.close()
        for process in started:
            process.wait(timeout=max(0.1, stop - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass  # the others compile when their turn comes
    finally:
        for process in started:
            process.kill()
            process.wait()


def compile_all() -> None:
    """What a process that compiles ahead does: run each of its trials once, on few points."""
    order = json.load(sys.stdin)
    calls = calibrate.launches(torch.device(order["device"]), order["n"], order["d"], order["K"])
    for operation, products, numbers, limit in order["trials"]:
        with launch_config.trial(operation, products, configured(numbers, limit)):
            try:
                calls[operation, products]()
            except Exception as failure:  # it is told when its turn comes
                print(f"compiling {operation} {products} {numbers}: {type(failure).__name__}", flush=True)
                if "CUDA error" in str(failure):  # this process can do no more
                    return


def _timed(run: Run, calls: Callable, truths: dict, trial: Trial) -> dict[str, Any]:
    """Seconds under a configuration that computes what the table's does, and how far apart the two are."""
    which = trial.operation, trial.products
    call = calls()[which]
    if which not in truths:
        truths[which] = call().clone()
    with launch_config.trial(*which, trial.config):
        result = call()
        apart = float((result - truths[which]).norm() / truths[which].norm())
        if not calibrate.agree(result, truths[which], trial.products):
            raise ValueError(f"it computes something else: {apart:.1e} apart from the table's configuration")
        times = sorted(run.seconds(call) for _ in range(run.few(5, 1)))
    return {"seconds": times[len(times) // 2], "apart": apart}


def _numbers(config: Config) -> Numbers:
    return (config.rows, config.columns, config.inner, config.warps, config.stages)


def blocks(run: Run) -> None:
    """The gradient form by rows of a block, in both backends, and what the plan takes by itself."""
    s = run.sizes
    n = min(s.n, run.few(30_000, s.n))
    for backend in ("triton", "torch"):
        for rows in (0, *((128, 256, 512, 1024, 2048, 4096, 8192) if not run.dry else (16,))):
            prepare = functools.partial(_gradient_form, run, backend, n, rows)
            work = 2.0 * n * n * s.d * (s.K + 1) + 2.0 * n * s.K * s.d * s.d
            facts = {"n": n, "d": s.d, "K": s.K, "backend": backend, "rows": rows, "flop": work}
            name = f"blocks of {rows} rows" if rows else "blocks as planned"
            run.measure(f"gradient form, {backend}, {name}", prepare, repeats=2, **facts)


def _gradient_form(run: Run, backend: str, n: int, rows: int) -> Callable[[], torch.Tensor]:
    """The AGOP of a call whose plan has other rows."""
    p = run.problem(n)
    operator = KernelOperator("agop", LAPLACE, p.X, backend=backend)
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
