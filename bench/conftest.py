"""``pytest bench --benchmark-only``: options, ceilings, and what is recorded beside a time."""

from __future__ import annotations

import pytest
import torch

from bench import clock, machine
from bench.contenders import CONTENDERS, Problem, Unable, error, traffic, work

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
def roof(device) -> tuple[float, float]:
    """What this device does at most: floating-point operations of square float32 products, and bytes copied, a second.

    A copy reads and writes.
    """
    block, out = torch.empty(2, 2**28 if device.type == "cuda" else 2**24, device=device).fill_(1.0)
    return clock.product_rate(device), 8 * block.numel() / clock.seconds(lambda: out.copy_(block), device, 5)


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
def measure(benchmark, roof, device):
    """measure(op, problem, contender): time it, and record rate, share of the ceiling, peak memory and error."""

    def run(op: str, problem: Problem, contender: str) -> None:
        compute = CONTENDERS[op][contender]
        try:
            kept = []
            peak = clock.peak_bytes(lambda: kept.append(compute(problem)), device)
        except Unable as reason:
            pytest.skip(str(reason))
        found = error(op, problem, kept.pop())
        benchmark.group = f"{op} n={problem.n} d={problem.d} K={problem.K} {problem.what}"

        def once():
            compute(problem)
            clock.synchronise(device)

        benchmark.pedantic(once, rounds=ROUNDS, iterations=1)
        flops, intensity = work(op, problem), work(op, problem) / traffic(op, problem)
        rate, ceiling = flops / benchmark.stats.stats.median, min(roof[0], intensity * roof[1])
        benchmark.extra_info.update(
            {
                **{"op": op, "contender": contender, "n": problem.n, "d": problem.d, "K": problem.K},
                **{"kernel": problem.what, "GFLOP/s": rate / 1e9, "share of ceiling": rate / ceiling},
                **{"flop/byte": intensity, "product ceiling GFLOP/s": roof[0] / 1e9, "copy GB/s": roof[1] / 1e9},
                **{"peak_bytes": peak, "error": found},
            }
        )
        assert found <= 1e-2, "it is fast, but wrong"

    return run
