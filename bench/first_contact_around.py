"""First contact, what lies around the operations: CUDA graphs, torch.compile and export, ranks, the suite's tests."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import fastagop
from bench import checkout
from bench.first_contact_layers import settings
from bench.first_contact_run import Run, relative
from bench.problems import LAPLACE, Problem, draw
from fastagop.deep_rfm.layer import LayerTraining
from fastagop.deep_rfm.module import DeepRFMModule, Readout
from fastagop.solvers import copies

Operation = Callable[[Problem], torch.Tensor]
# What can be captured: the gradient form, since the gram form's estimate looks at values.
CAPTURED: dict[str, Operation] = {
    "kernel_matrix": lambda p: fastagop.kernel_matrix(p.kernel, p.X, backend="triton"),
    "kernel_matmul": lambda p: fastagop.kernel_matmul(p.kernel, p.X, None, p.alpha, backend="triton"),
    "gradients": lambda p: fastagop.gradients(p.kernel, p.X, p.alpha, backend="triton"),
    "agop": lambda p: fastagop.agop(p.kernel, p.X, p.alpha, method="gradient", backend="triton"),
}


def graph(run: Run) -> None:
    """Every operation captured in a CUDA graph and replayed on other points; in a dry run called twice."""
    n, d = run.few(2000, 30), run.few(256, 19)
    for name, call in CAPTURED.items():
        facts = {"n": n, "d": d, "captured": not run.dry}
        run.record(name, functools.partial(_captured, run, call, n, d), **facts)


def _captured(run: Run, call: Operation, n: int, d: int) -> dict[str, Any]:
    p, other = (draw(rows, d, 3, device=run.device) for rows in (n, n + 1))
    first = call(p)
    if run.dry:
        return {"error": relative(call(p), first.double())}
    eager = run.seconds(lambda: call(p))
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        result = call(p)
    p.X.copy_(other.X[1:])
    captured.replay()
    torch.cuda.synchronize()
    wrong = relative(result, call(p).double())
    return {"seconds": run.seconds(captured.replay), "eager": eager, "error": wrong}


def trained(run: Run) -> tuple[DeepRFMModule, torch.Tensor]:
    """A Deep RFM of two layers as a module, without the estimators, and rows for it."""
    p = draw(run.few(2000, 30), run.few(256, 9), 10, device=run.device)
    Y = 2.0 * torch.nn.functional.one_hot(p.y).to(p.X) - 1.0
    small = settings(run, 2, "torch")
    training, points, layers = LayerTraining(Y, small, copies.alone(p.X), p.y), p.X, []
    for seed in range(2):
        layer, made = training.layer(points, seed)
        layers.append(layer)
        points = made.points
    centers, solved = training.readout(points)
    module = DeepRFMModule(layers, Readout(LAPLACE, centers, solved.alpha), binary=False, flat=False)
    return module, p.X + 0.01


def compile(run: Run) -> None:
    """to_module() by torch.compile and torch.export beside itself: seconds, breaks of the graph, difference."""
    made = functools.cache(functools.partial(trained, run))

    def compiled(options: dict[str, Any]) -> dict[str, Any]:
        module, X = made()
        torch._dynamo.reset()
        faster = torch.compile(module, fullgraph=True, **options)
        first = run.seconds(lambda: faster(X))
        error = relative(faster(X), module(X).double())
        seconds, eager = (min(run.seconds(lambda f=f: f(X)) for _ in range(3)) for f in (faster, module))
        return {"seconds": seconds, "eager": eager, "first": first, "error": error}

    def breaks() -> dict[str, Any]:
        module, X = made()
        torch._dynamo.reset()
        found = torch._dynamo.explain(module)(X)
        return {"breaks": found.graph_break_count, "graphs": found.graph_count}

    def exported() -> dict[str, Any]:
        module, X = made()
        program = torch.export.export(module, (X,))
        return {"error": relative(program.module()(X), module(X).double())}

    ways: dict[str, dict[str, Any]] = {"aot_eager": {"backend": "aot_eager"}}
    if not run.dry:
        ways = {"inductor": {}, "inductor, reduced overhead": {"mode": "reduce-overhead"}, **ways}
    run.record("breaks of the graph", breaks)
    for name, options in ways.items():
        run.record(f"torch.compile, {name}", functools.partial(compiled, options))
    run.record("torch.export", exported)


def ranks(run: Run) -> None:
    """The distributed operations by NCCL in one process, and by gloo in one and two, beside one process alone."""
    n, d = run.few(4000, 60), run.few(256, 7)
    for backend, size in (("gloo", 2),) if run.dry else (("nccl", 1), ("gloo", 1), ("gloo", 2)):
        facts = {"n": n, "d": d, "ranks": size, "backend": backend}
        run.record(f"{backend}, {size} ranks", functools.partial(_ranks, run, backend, size, n, d), **facts)


def _ranks(run: Run, backend: str, size: int, n: int, d: int) -> dict[str, Any]:
    """The largest error of any rank and its seconds; every rank is a process of its own, all on one device."""
    with tempfile.TemporaryDirectory() as folder:
        words = [backend, str(size), str(n), str(d), run.device.type, str(Path(folder) / "meeting")]
        code = "from bench import checkout; checkout.place(); from bench import first_contact_around as a; a.rank()"
        command = [sys.executable, *(["-S"] if sys.flags.no_site else []), "-c", code]
        started = [
            subprocess.Popen(
                [*command, str(rank), *words],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=checkout.ROOT,
            )
            for rank in range(size)
        ]
        left = max(5.0, run.stop - time.monotonic())
        try:
            said = [process.communicate(timeout=left) for process in started]
        finally:
            for process in started:
                process.kill()
        for process, (_, errors) in zip(started, said, strict=True):
            if process.returncode:
                raise ChildProcessError((errors.strip().splitlines() or ["a rank failed without a word"])[-1])
    found = [dict(zip(("error", "seconds"), map(float, out.split()[-2:]), strict=True)) for out, _ in said]
    return {key: max(row[key] for row in found) for key in ("error", "seconds")}


def rank() -> None:
    """One rank: AGOP, product and solve of the group against this process alone; prints the largest error."""
    index, backend, size, n, d, device, meeting = sys.argv[1:]
    where = torch.device(device)
    dist.init_process_group(backend, init_method=f"file://{meeting}", rank=int(index), world_size=int(size))
    p = draw(int(n), int(d), 3, device=where)
    start = time.perf_counter()
    M = fastagop.distributed.agop(p.kernel, p.X, p.alpha)
    product = fastagop.distributed.kernel_matmul(p.kernel, p.X, None, p.alpha)
    alpha = fastagop.distributed.solve(p.kernel, p.X, p.alpha, ridge=1e-3).alpha
    seconds = time.perf_counter() - start
    pairs = (
        (M, fastagop.agop(p.kernel, p.X, p.alpha)),
        (product, fastagop.kernel_matmul(p.kernel, p.X, None, p.alpha)),
        (alpha, fastagop.solve(p.kernel, p.X, p.alpha, ridge=1e-3).alpha),
    )
    worst = max(relative(found, alone.double()) for found, alone in pairs)
    dist.destroy_process_group()
    print(worst, seconds)


def tests(run: Run) -> None:
    """The suite's cases of the Triton kernels, on the device; what each said is in a text file beside the lines."""
    run.record(
        "triton_cases.py", lambda: _tests(run, "nothing_to_do" if run.dry else "not beyond_32_bits", "tests.txt")
    )
    if not run.dry:  # by itself: an offset that overflows takes the process's device along
        run.record("offsets beyond 32 bits", lambda: _tests(run, "beyond_32_bits", "tests_beyond_32_bits.txt"))


def _tests(run: Run, wanted: str, name: str) -> dict[str, Any]:
    if importlib.util.find_spec("pytest") is None:
        raise ModuleNotFoundError("pytest is not installed here")
    more = ["-n", "8"] if not run.dry and importlib.util.find_spec("xdist") else []  # hundreds of kernels compile
    words = ["tests/triton_cases.py", "-k", wanted, "-v", "--tb=line", "-p", "no:cacheprovider", "--noconftest", *more]
    code = f"from bench import checkout; checkout.place(); import pytest, sys; sys.exit(pytest.main({words!r}))"
    command = [sys.executable, *(["-S"] if sys.flags.no_site else []), "-c", code]
    said, started = run.folder / name, time.monotonic()
    environment = {**os.environ, "FASTAGOP_CACHE": tempfile.gettempdir(), "PYTHONUNBUFFERED": "1"}
    status = None
    with open(said, "w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, cwd=checkout.ROOT, env=environment, text=True
        )
        try:
            status = process.wait(timeout=max(5.0, run.stop - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
    text = said.read_text()
    facts: dict[str, Any] = {"passed": len(set(re.findall(r"(\S+) PASSED|PASSED (\S+)", text)))}
    facts |= {"failed": len(re.findall(r"^FAILED ", text, re.MULTILINE)), "status": status}
    facts["named"] = re.findall(r"^FAILED (\S+)", text, re.MULTILINE)[:40]
    if status not in (0, 1):
        facts["failure"] = "stopped: the time was over" if status is None else f"pytest ended with status {status}"
    return {"seconds": time.monotonic() - started, **facts}
