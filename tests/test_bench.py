"""The benchmarks run, say what they did not run and why, and their report is made of what they measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fastagop.kernels import calibration
from fastagop.kernels.memory import matrices

from bench import agop_cpu, clock, contenders, costs, harness, keops_cpu, machine, problems, report, suite
from bench.__main__ import MEASURES, OPTIONS, Case, main, parser

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


def case(name, **contenders):
    return suite.Case(name, problems.draw(10, 2, 1), contenders, 1.0, lambda *_: None)


def test_a_failing_contender_is_a_row(tmp_path):
    run = suite.Suite(CPU, tmp_path / "out.json", 10, 1)
    run.run(case("case", bad=lambda _: 1 / 0, good=lambda _: 1))
    bad, good = run.rows
    assert bad["note"] == "ZeroDivisionError: division by zero"
    assert good["seconds"] >= 0
    run.start -= 2 * suite.LIMIT
    run.run(case("late", late=lambda _: 1 / 0))
    assert run.rows[-1]["note"] == "not run: out of time"
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == run.rows


def test_contenders_take_turns():
    """Each loads what it needs on few points, then is checked; every round that is timed then runs all of them."""
    seen, errors = [], {"a": 0.5, "b": 0.25}
    calls = {name: lambda p, name=name: seen.append((name, p.n)) or name for name in errors}
    rows = harness.Harness(repeats=2).rows(calls, problems.draw(400, 2, 1), lambda _, result: errors[result])
    assert seen == [("a", 300), ("a", 400), ("b", 300), ("b", 400), *[("a", 400), ("b", 400)] * 2]
    assert [(row["contender"], row["error"]) for row in rows] == [("a", 0.5), ("b", 0.25)]
    assert rows[0]["ratio"] == 1.0
    assert all(row["seconds"] > 0 for row in rows)


def test_a_process_of_its_own_measures(tmp_path):
    row = harness.alone("cg_cpu", "rank 0", 200)
    assert (row["n"], row["rank"], row["stopped"]) == (200, 0, "")
    assert row["seconds"] > 0
    assert "peak_bytes" in row
    again = harness.alone("cg_cpu", "rank 0", 200, twice=True)
    assert again["first_seconds"] > 0
    assert again["seconds"] > 0
    with pytest.raises(ChildProcessError, match="exit code 1"):
        harness.alone("cg_cpu", "no contender", 200)


@pytest.mark.skipif(clock.peak_bytes(lambda: None, CPU) is None, reason="needs Linux")
def test_kept_memory_stays_with_the_process():
    def left() -> int:
        before = clock._status("VmRSS")
        block = torch.ones(2**25)  # 128 MiB, which the system would have back at once
        block.add_(1.0)
        del block
        return clock._status("VmRSS") - before

    assert left() < 2**26
    with clock.kept_memory():
        assert left() > 2**26


def test_errors_are_seen():
    """What is recorded as error is that of the result: a wrong one stands out in every operation."""
    drawn = problems.draw(40, 5, 3)
    for op in ("kernel_matrix", "kernel_matmul", "gradients", "agop", "solve"):
        result = contenders.OPERATIONS[op]["fastagop"](drawn)
        assert costs.error(op, drawn, result) < 1e-4
        assert 0.05 < costs.error(op, drawn, 1.1 * result) < 0.2


def test_the_machine_is_named_by_one_reader(monkeypatch):
    """The name that calibration's files go by, with family and model where Linux tells them."""
    assert machine.describe()["processor"].startswith(calibration.name(CPU))
    told = {"model name": "Some CPU", "cpu family": "6", "model": "79"}
    monkeypatch.setattr(calibration, "cpuinfo", lambda: told)
    assert machine.describe()["processor"] == "Some CPU (family 6, model 79)"
    monkeypatch.setattr(calibration, "cpuinfo", dict)
    monkeypatch.setattr("platform.processor", lambda: "another")
    assert machine.describe()["processor"] == "another"


def test_problems_are_the_same_each_time():
    makers = (
        lambda: problems.draw(30, 4, 3),
        lambda: problems.collapsed(30, 4, 1e-3),
        lambda: problems.interpolated(30, 4, 12),
        lambda: problems.labelled(30, 4),
        lambda: problems.normal(30, 4, 3, torch.float64),
        lambda: problems.network(30),
    )
    for make in makers:
        one, two = make(), make()
        assert one.n == 30
        assert torch.equal(one.X, two.X)
        assert torch.equal(one.alpha, two.alpha)
    collapsed = problems.collapsed(30, 4, 1e-3)
    assert collapsed.X[collapsed.y == 0].std(0).max() < 1e-2


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A few of the pytest benchmarks, for real."""
    result = tmp_path_factory.mktemp("bench") / "result.json"
    some = "(test_agop and 500x) or (test_kernel_matmul and x16x)"
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", "--quick", "-k", some]
    command += [f"--benchmark-json={result}", "-q", "-p", "no:cacheprovider"]
    # pytest-benchmark measures nothing where it sees the variables of a test run's workers.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    alone["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, check=False)
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

    # What other threads of the process take meanwhile comes on top.
    assert 110e6 < min(clock.peak_bytes(run, CPU) for _ in range(3)) < 140e6


@pytest.mark.skipif(clock.peak_bytes(lambda: None, CPU) is None, reason="needs Linux")
def test_peak_bytes_count_what_an_earlier_fit_has_left():
    def run():
        with matrices.kept_matrices():
            matrices.empty_matrix(2048, 2048, torch.zeros(1), torch.float64).fill_(1.0)

    run()
    assert clock.peak_bytes(run, CPU) > 30e6


# ---- The command line


VALUES = {
    "device": ["cpu"],
    "result": ["x.json"],
    "repeats": ["1"],
    "n": ["50"],
    "d": ["3"],
    "threads": ["1"],
    "only": ["svm"],
    "quick": [],
}


@pytest.mark.parametrize("case", OPTIONS)
def test_an_option_that_a_case_would_ignore_is_refused(case, capsys):
    for option in VALUES.keys() - set(OPTIONS[case]):
        if option == "device" and case in MEASURES:  # cpu is what they run on
            continue
        with pytest.raises(SystemExit) as stopped:
            main([case, f"--{option}", *VALUES[option]])
        assert stopped.value.code == 2
        assert f"{case} does not take --{option}" in capsys.readouterr().err


def test_a_case_is_an_entry_of_the_table(tmp_path, monkeypatch):
    """Its options are the arguments of its function; where it takes no device, the CPU's says nothing new."""
    seen = []
    monkeypatch.setitem(MEASURES, "agop", Case(lambda out, n=None: seen.append((out, n)), "a case of a test"))
    monkeypatch.setitem(OPTIONS, "agop", MEASURES["agop"].options)
    assert OPTIONS["agop"] == ("n",)
    assert main(["agop", "--n", "3", "--device", "cpu", "--out", str(tmp_path / "x.json")]) == 0
    assert seen == [(tmp_path / "x.json", 3)]
    assert "agop           a case of a test" in parser().format_help()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--n", "0"],
        ["--n", "x"],
        ["--d", "-1"],
        ["--repeats", "0"],
        ["--threads", "0"],
        ["--only", "nobody"],
        ["--device", "abacus"],
        ["--device", "meta"],
    ],
)
def test_bad_values_are_refused(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert f"argument {arguments[0]}" in capsys.readouterr().err


def test_agop_takes_n_and_d(tmp_path, monkeypatch):
    few = {name: agop_cpu.CONTENDERS[name] for name in ("fastagop", "torch composition")}
    monkeypatch.setattr(agop_cpu, "CONTENDERS", few)
    monkeypatch.setattr(harness, "alone", lambda *_: {"peak_bytes": 0})
    out = tmp_path / "deep" / "agop.json"
    assert main(["agop", "--n", "60", "--d", "5", "7", "--repeats", "1", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert {(row["n"], row["d"], row["K"]) for row in rows} == {(60, d, K) for d in (5, 7) for K in (10, 100)}
    assert [path.name for path in out.parent.iterdir()] == ["agop.json"]


def test_agop_is_measured_without_xrfm(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(contenders.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(harness, "alone", lambda *_: {"peak_bytes": 0})
    out = tmp_path / "agop.json"
    assert main(["agop", "--n", "60", "--d", "5", "--repeats", "1", "--out", str(out)]) == 0
    assert {row["contender"] for row in json.loads(out.read_text())["rows"]} == {"fastagop", "torch composition"}
    assert "xrfm is not installed" in capsys.readouterr().out


def test_other_cases_take_n(tmp_path, monkeypatch):
    asked, seen = [], []
    monkeypatch.setattr(harness, "alone", lambda *given: seen.append(given[-2:]) or {"peak_bytes": 0})
    monkeypatch.setattr(
        keops_cpu, "compare", lambda op, n, d, dtype, repeats: asked.append((n, d)) or {"op": op, "d": d}
    )
    with pytest.raises(KeyError):  # the rows are none
        keops_cpu.main(tmp_path / "k.json", 1, 70, (2, 3))
    assert set(asked) == {(70, 2), (70, 3)}
    assert set(seen) == {(70, 3)}  # memory at the widest
    seen.clear()
    monkeypatch.setattr("bench.network_cpu.problem", lambda n: seen.append(n) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["network", "--n", "80", "--out", str(tmp_path / "n.json")])
    monkeypatch.setattr(harness, "alone", lambda *given: seen.append(given[-1]) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["cg", "--n", "90", "--out", str(tmp_path / "c.json")])
    assert seen == [80, 90]


def one_line(capsys) -> str:
    (said,) = capsys.readouterr().err.splitlines()
    return said


GOOD = {"op": "agop", "n": 1, "d": 1, "K": 1, "kernel": "Laplace", "contender": "fastagop"}


WHOLE = {name: "text" if name in ("op", "kernel", "contender") else 1 for name in report._NEEDED}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        "[" * 5000,
        '{"runs": []}',
        '{"benchmarks": []}',
        '{"benchmarks": 3}',
        '{"benchmarks": [{}]}',
        '{"benchmarks": [{"extra_info": {}, "stats": {"median": 1}}]}',
        json.dumps({"benchmarks": [{"extra_info": GOOD, "stats": {"median": 1.0}}]}),
        '{"benchmarks": [{"extra_info": [], "stats": []}]}',
        *(json.dumps({"benchmarks": [{"extra_info": WHOLE, "stats": {"median": m}}]}) for m in (None, 0, "1")),
        *(
            json.dumps({"benchmarks": [{"extra_info": WHOLE | {name: value}, "stats": {"median": 1.0}}]})
            for name, value in (("n", "x"), ("copy GB/s", 0), ("share of ceiling", None), ("contender", ["x"]))
        ),
    ],
)
def test_report_of_another_file_names_it(tmp_path, capsys, content):
    path = tmp_path / "other.json"
    path.write_text(content)
    assert main(["report", "--result", str(path)]) == 2
    said = one_line(capsys)
    assert str(path) in said
    assert "--benchmark-json" in said
    assert [file.name for file in tmp_path.iterdir()] == ["other.json"]


@pytest.mark.parametrize("path", ["nowhere.json", "folder"])
def test_report_of_no_file(tmp_path, capsys, path):
    (tmp_path / "folder").mkdir()
    assert main(["report", "--result", str(tmp_path / path)]) == 2
    assert path in one_line(capsys)


def test_a_place_that_cannot_be_written_is_said_first(tmp_path, capsys, monkeypatch):
    """Before anything is measured."""
    monkeypatch.setattr(agop_cpu, "measure", lambda *_: 1 / 0)
    (tmp_path / "file").write_text("")
    for out in (tmp_path, tmp_path / "file" / "x.json", tmp_path / "file" / "deep" / "x.json"):
        assert main(["agop", "--out", str(out)]) == 2
        assert "--out" in one_line(capsys)


def test_a_full_disk_is_one_line_and_leaves_the_old_result(tmp_path, capsys, monkeypatch):
    out = tmp_path / "agop.json"
    out.write_text("old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(agop_cpu, "measure", lambda *_: [])
    monkeypatch.setattr(os, "fsync", full)
    assert main(["agop", "--out", str(out)]) == 2
    assert one_line(capsys) == f"python -m bench: {out}: No space left on device"
    assert out.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["agop.json"]


@pytest.mark.parametrize("room", ["bench", "reproduce"])
def test_from_another_folder(room, tmp_path):
    command = [sys.executable, str(ROOT / room), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"python -m {room}" in done.stdout


def test_small_and_scale_write_what_they_measure(tmp_path, monkeypatch, capsys):
    from bench import scale_cpu, small_cpu

    monkeypatch.setattr(small_cpu, "CALLS", 2)
    monkeypatch.setattr(small_cpu, "TURNS", 1)
    monkeypatch.setattr(scale_cpu, "_RATE", 64)
    rows = {"seconds": 1.0, "peak_bytes": 8000}

    def alone(case, name, n, d, twice):
        assert twice
        if name == "potrf float64":
            raise ChildProcessError("a process that measures ended with exit code -11")
        return rows | ({"factor seconds": 0.5} if name == "potrf float32" else {})

    monkeypatch.setattr(scale_cpu.harness, "alone", alone)
    main(["small", "--n", "9", "--out", str(tmp_path / "small.json")])
    main(["scale", "--n", "90", "--d", "5", "--out", str(tmp_path / "scale.json")])
    small, scale = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("small", "scale"))
    assert [row["call"] for row in small["rows"]] == list(small_cpu.PAIRS)
    assert all(row["ratio"] > 0 for row in small["rows"])
    assert [row["contender"] for row in scale["rows"]] == list(scale_cpu.CONTENDERS)
    assert "exit code -11" in scale["rows"][4]["ended"]
    assert scale["rows"][0]["floor"] == pytest.approx(
        90 * 90 * 5 / scale["rates"]["float64"] + 90**3 / 3 / scale["rates"]["float32"]
    )
    assert "| 90 | potrf float32 | 0.5 |" in capsys.readouterr().out
