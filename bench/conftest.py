"""``pytest bench --benchmark-only``: options, ceilings, and what is recorded beside a time."""

from __future__ import annotations

import functools

import pytest
import torch

from bench import clock, costs, machine, problems
from bench.contenders import OPERATIONS, Unable
from bench.harness import Harness
from bench.problems import Problem

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
    """Most float32 operations of square products a second, and most bytes copied, on this device."""
    ceilings = clock.ceilings(device)
    return ceilings["float32"]["flops"], ceilings["copy"]["bytes"]


@pytest.fixture(scope="session")
def problem(device):
    """problem(n, d, K, kernel): drawn once for all of its contenders."""
    return functools.lru_cache(maxsize=1)(functools.partial(problems.draw, device=device))


@pytest.fixture
def harness(benchmark, device) -> Harness:
    """The harness, with pytest-benchmark's rounds of its one contender."""

    def rounds(calls, device, repeats):
        ((name, run),) = calls.items()

        def finished():
            run()
            clock.synchronise(device)

        benchmark.pedantic(finished, rounds=repeats, iterations=1)
        return {name: benchmark.stats.stats.data}

    return Harness(device, ROUNDS, rounds)


@pytest.fixture
def measure(benchmark, harness, roof):
    """measure(op, problem, contender): time it, and record rate, share of the ceiling, peak memory and error."""

    def run(op: str, problem: Problem, contender: str) -> None:
        case = {"n": problem.n, "d": problem.d, "K": problem.K, "kernel": problem.family}
        benchmark.group = f"{op} n={problem.n} d={problem.d} K={problem.K} {problem.family}"
        try:
            who = {contender: OPERATIONS[op][contender]}
            (row,) = harness.rows(who, problem, functools.partial(costs.error, op))
        except Unable as reason:
            pytest.skip(str(reason))
        flops, intensity = costs.work(op, problem), costs.work(op, problem) / costs.traffic(op, problem)
        rate, ceiling = flops / row["seconds"], min(roof[0], intensity * roof[1])
        benchmark.extra_info.update(
            {
                **{"op": op, "contender": contender, **case},
                **{"GFLOP/s": rate / 1e9, "share of ceiling": rate / ceiling, "flop/byte": intensity},
                **{"product ceiling GFLOP/s": roof[0] / 1e9, "copy GB/s": roof[1] / 1e9},
                **{"peak_bytes": row["peak_bytes"], "error": row["error"]},
            }
        )
        assert row["error"] <= 1e-2, "it is fast, but wrong"

    return run
