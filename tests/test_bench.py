"""The benchmarks run, say what they did not run and why, and their report is made of what they measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import clock, report, suite

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


@pytest.mark.filterwarnings("ignore::fastagop.NumericalWarning")
def test_suite(tmp_path, capsys):
    out = tmp_path / "cpu.json"
    suite.main(CPU, out, 1, 60, (5,))
    result = json.loads(out.read_text())
    cases = {"kernel_matrix", "agop", "solve", "kernel_matmul", "kernel_matrix collapsed"}
    assert cases <= {row["case"] for row in result["rows"]}
    measured = [row for row in result["rows"] if row["contender"] != "xrfm"]  # it need not be installed
    assert [row for row in measured if "seconds" not in row] == []
    assert all(row["error"] < 1e-3 for row in measured if row["case"].startswith(("kernel", "agop")))
    assert result["ceilings"]["copy"]["bytes"] > 0
    assert "kernel_matmul" in capsys.readouterr().out


def test_a_failing_contender_is_a_row(tmp_path):
    run = suite.Suite(CPU, tmp_path / "out.json", 10, 1)
    run.case("case", 1.0, [suite.Contender("bad", lambda: 1 / 0), suite.Contender("good", lambda: 1)], None, d=1)
    bad, good = run.rows
    assert bad["note"] == "ZeroDivisionError: division by zero"
    assert good["seconds"] >= 0
    run.start -= 2 * suite.LIMIT
    run.case("late", 1.0, [suite.Contender("late", lambda: 1 / 0)], None)
    assert run.rows[-1]["note"] == "not run: out of time"


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A few of the pytest benchmarks, for real."""
    result = tmp_path_factory.mktemp("bench") / "result.json"
    some = "(test_agop and 500x) or (test_kernel_matmul and x16x)"
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", "--quick", "-k", some]
    command += [f"--benchmark-json={result}", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "it runs on CUDA" in done.stdout  # contenders that cannot compete say why
    return report.rows(json.loads(result.read_text()))


def test_pytest_benchmarks(measured):
    assert {row["op"] for row in measured} == {"agop", "kernel_matmul"}
    for row in measured:
        assert row["seconds"] > 0
        assert row["GFLOP/s"] > 0
        assert row["error"] < 1e-4
    assert {"fastagop", "torch composition"} <= {row["contender"] for row in measured}


def test_report(measured, tmp_path):
    text = report.table(measured)
    assert text.count("\n") == len(measured) + 1
    ours = [line for line in text.splitlines() if "| fastagop |" in line]
    assert ours
    assert all("| 1.0 |" in line for line in ours)
    for file in report.plots(measured, tmp_path):
        assert file.stat().st_size > 5000


@pytest.mark.skipif(clock.peak_bytes(lambda: None, CPU) is None, reason="needs Linux")
def test_peak_bytes():
    def run():
        torch.ones(30_000_000).add_(1)

    assert 110e6 < clock.peak_bytes(run, CPU) < 140e6
