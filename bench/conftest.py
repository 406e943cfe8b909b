"""``pytest bench --benchmark-only``: options, ceilings, and what is recorded beside a time."""

from __future__ import annotations

import pytest
import torch
from fastagop.kernels._products import product

from bench import clock, machine
from bench.contenders import CONTENDERS, Problem, Unable, error, work

ROUNDS = 3


def pytest_addoption(parser):
    group = parser.getgroup("fastagop benchmarks")
    group.addoption("--quick", action="store_true", help="small sizes, under three minutes on two cores")
    group.addoption("--device", default="cpu", help="cpu (default) or cuda")


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["fastagop"] = machine.describe()


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def ceiling(device) -> float:
    """Floating-point operations per second of square float32 products on this device, by the best library at hand."""
    size = 8192 if device.type == "cuda" else 2048
    A = torch.randn(size, size, device=device)
    return 2 * size**3 / min(clock.seconds(run, device, 5) for run in (lambda: torch.mm(A, A), lambda: product(A, A)))


@pytest.fixture(scope="session")
def problem():
    """problem(...): a Problem, drawn once."""
    drawn: dict[tuple, Problem] = {}

    def build(*key) -> Problem:
        if key not in drawn:
            drawn.clear()
            drawn[key] = Problem(*key)
        return drawn[key]

    return build


@pytest.fixture
def measure(benchmark, ceiling, device):
    """measure(op, problem, contender): time it, and record rate, share of the ceiling, peak memory and error."""

    def run(op: str, problem: Problem, contender: str) -> None:
        compute = CONTENDERS[op][contender]
        try:
            kept = []
            peak = clock.peak_bytes(lambda: kept.append(compute(problem)), device)
        except Unable as reason:
            pytest.skip(str(reason))
        found = error(op, problem, kept.pop())
        benchmark.group = f"{op} n={problem.n} d={problem.d} K={problem.K} {type(problem.kernel).__name__}"

        def once():
            compute(problem)
            clock.synchronise(device)

        benchmark.pedantic(once, rounds=ROUNDS, iterations=1)
        rate = work(op, problem) / benchmark.stats.stats.median
        benchmark.extra_info.update(
            {
                **{"op": op, "contender": contender, "n": problem.n, "d": problem.d, "K": problem.K},
                **{"kernel": type(problem.kernel).__name__, "GFLOP/s": rate / 1e9, "share of ceiling": rate / ceiling},
                **{"peak_bytes": peak, "error": found},
            }
        )
        assert found is None or found <= 1e-2, "it is fast, but wrong"

    return run
