"""The one harness: contenders on a problem, and for each a row with seconds, ratio, peak memory and error.

pytest's benchmarks and ``python -m bench`` both measure by it. A contender is a function of a ``Problem``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import clock
from bench.problems import Problem

Contender = Callable[[Problem], Any]
_SMALL = 300  # points of the call that comes before all others


@dataclass(frozen=True)
class Harness:
    """Where and how often contenders are timed.

    Attributes:
        device: the problems'.
        repeats: rounds that are timed.
        stopwatch: seconds of each call in every round; under pytest the rounds are pytest-benchmark's.
    """

    device: torch.device = clock.CPU
    repeats: int = 3
    stopwatch: Callable[[Mapping[str, Callable], torch.device, int], Mapping[str, list[float]]] = clock.times

    def rows(
        self, contenders: Mapping[str, Contender], problem: Problem, error: Callable[[Problem, Any], float | None]
    ) -> list[dict]:
        """One row per contender: median seconds, median ratio to the first's in the same round, peak memory, error.

        Peak and result are those of a call that comes before the rounds and warms up.
        """
        checked = {}
        for name, run in contenders.items():
            first, result = self.once(run, problem)
            checked[name] = {"peak_bytes": first["peak_bytes"], "error": error(problem, result)}
            del result
        calls = {name: functools.partial(run, problem) for name, run in contenders.items()}
        with clock.kept_memory():
            times = self.stopwatch(calls, self.device, self.repeats)
        base = next(iter(times.values()))
        return [
            {
                "contender": name,
                "seconds": statistics.median(taken),
                "ratio": statistics.median(t / one for t, one in zip(taken, base, strict=True)),
                **checked[name],
            }
            for name, taken in times.items()
        ]

    def once(self, run: Contender, problem: Problem) -> tuple[dict, Any]:
        """Seconds and peak memory of a single call, and its result."""
        run(problem.first(_SMALL))  # libraries loaded, threads started, formulas compiled: none of that is counted
        results, seconds = [], []

        def timed() -> None:
            seconds.append(clock.seconds(lambda: results.append(run(problem)), self.device, repeats=1, warm=0))

        peak = clock.peak_bytes(timed, self.device)
        return {"seconds": seconds[0], "peak_bytes": peak}, results[0]


def alone(case: str, contender: str, *size: int, twice: bool = False) -> dict:
    """Seconds and peak memory of one call in a fresh process, which do not depend on what ran before.

    ``bench.<case>`` brings CONTENDERS and problem(*size), and may say by facts(result) what else the row holds.
    ``twice``: seconds are a second call's, which finds the memory of the first one in the process (``kept_memory``);
    those of the first are ``first_seconds``.
    """
    code = f"from bench import harness; harness.measure_alone({twice})"
    command = [sys.executable, "-c", code, case, contender, *map(str, size)]
    root = Path(__file__).resolve().parents[1]  # the process finds bench/ there, wherever this one was started
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, cwd=root)
    if done.returncode or not done.stdout:
        raise ChildProcessError(f"a process that measures ended with exit code {done.returncode}; its error is above")
    return json.loads(done.stdout.splitlines()[-1])


def measure_alone(twice: bool = False) -> None:
    """What the fresh process does: print the row of sys.argv's case, contender and size."""
    case, contender = importlib.import_module(f"bench.{sys.argv[1]}"), sys.argv[2]
    run, problem = case.CONTENDERS[contender], case.problem(*map(int, sys.argv[3:]))
    with clock.kept_memory() if twice else contextlib.nullcontext():
        row, result = Harness().once(run, problem)
        if twice:
            del result
            start = time.perf_counter()
            result = run(problem)
            row |= {"seconds": time.perf_counter() - start, "first_seconds": row["seconds"]}
    facts = case.facts(result) if hasattr(case, "facts") else {}
    print(json.dumps(facts | row))
