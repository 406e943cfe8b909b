"""First contact with a GPU, without one: its lines, what becomes of parts that die, its report, and a dry run."""

from __future__ import annotations

import importlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastagop.kernels.keops_backend import backend as keops
from fastagop.kernels.triton_backend import launch_config

import fastagop
from bench import first_contact, first_contact_launches, first_contact_lines, first_contact_run, gpu_report
from bench.__main__ import main
from bench.first_contact import PARTS, Worker, supervise
from bench.first_contact_lines import DRY, FILE, STOPPED, WHOLE
from bench.first_contact_run import OutOfTime, Run, Unusable
from bench.first_contact_worker import MODULES

ROOT = Path(__file__).resolve().parents[1]
MADE_UP = "MADE UP for a test, no chip"
ABOUT = {"dry_run": False, "chip": MADE_UP, "versions": {"torch": "0"}, "sources": "0" * 12}
DRY_ABOUT = {**ABOUT, "dry_run": True, "chip": DRY}


def lines(folder: Path) -> list[dict]:
    return first_contact_lines.read(folder)


def put(folder: Path, part: str, case: str, about=ABOUT, **found) -> None:
    first_contact_lines.append(folder, first_contact_lines.line(about, part, case, **found))


# ---- Lines


def test_a_line_says_where_it_comes_from(tmp_path):
    put(tmp_path, "solve", "a case", seconds=0.5, error=float("nan"), bytes=8, stages={"agop": float("inf")}, n=7)
    (text,) = (tmp_path / FILE).read_text().splitlines()
    row = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert set(first_contact_lines.FIELDS) <= set(row)
    assert (row["chip"], row["part"], row["case"], row["seconds"], row["bytes"]) == (MADE_UP, "solve", "a case", 0.5, 8)
    assert (row["error"], row["stages"], row["n"], row["failure"]) == ("nan", {"agop": "inf"}, 7, None)
    assert row["date"].startswith("20")


def test_half_a_line_is_no_line_and_spoils_none(tmp_path):
    put(tmp_path, "solve", "one", seconds=1.0)
    with open(tmp_path / FILE, "a") as file:
        file.write('{"part": "solve", "ca')  # a writer was killed here
    put(tmp_path, "solve", "two", seconds=2.0)
    assert [row["case"] for row in lines(tmp_path)] == ["one", "two"]


def test_another_file_is_named(tmp_path, capsys):
    (tmp_path / FILE).write_text('{"part": "solve"}\n')
    with pytest.raises(ValueError, match=r"first_contact\.jsonl, line 1, is not what"):
        lines(tmp_path)
    assert main(["gpu_report", str(tmp_path)]) == 2
    assert FILE in capsys.readouterr().err


@pytest.mark.parametrize("key", ["chip", "dry_run", "sources", "versions"])
def test_lines_of_two_origins_are_never_mixed(tmp_path, key):
    """A dry run never goes on with a GPU's lines, nor the other way round."""
    put(tmp_path, "solve", "one", seconds=1.0)
    other = {**ABOUT, key: {"chip": "another", "dry_run": True, "sources": "1" * 12, "versions": {"torch": "1"}}[key]}
    with pytest.raises(ValueError, match=f"lines of another first contact .{key}"):
        first_contact_lines.check(tmp_path, other)
    first_contact_lines.check(tmp_path, ABOUT)
    put(tmp_path, "solve", "two", about=other, seconds=1.0)
    with pytest.raises(ValueError, match="lines of 2 origins"):
        gpu_report.write(tmp_path)


def test_what_lack_of_time_stopped_is_measured_again(tmp_path):
    put(tmp_path, "solve", "measured", seconds=1.0)
    put(tmp_path, "solve", "failed", failure="RuntimeError: no")
    put(tmp_path, "solve", "late", failure=f"{STOPPED}: the part's 3 s were over")
    assert first_contact_lines.done(lines(tmp_path)) == {("solve", "measured"), ("solve", "failed")}


def test_sources_are_those_of_what_is_measured(tmp_path):
    for name in ("kernels", "fastagop", "bench"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file.py").write_text("a = 1")
    before = first_contact_lines.sources(tmp_path)
    (tmp_path / "bench/file.py").write_text("a = 2")
    assert first_contact_lines.sources(tmp_path) == before
    (tmp_path / "kernels/file.py").write_text("a = 2")
    assert first_contact_lines.sources(tmp_path) != before


# ---- A part


def a_run(folder: Path, **changes) -> Run:
    arguments = {"part": "solve", "folder": folder, "about": DRY_ABOUT, "sizes": first_contact_run.DRY_SIZES}
    return Run(**{**arguments, "dry": True, "stop": time.monotonic() + 60.0, **changes})


def test_a_failing_case_is_a_line(tmp_path, capsys):
    run = a_run(tmp_path)
    run.measure("setting up", lambda: 1 / 0)
    run.measure("the call", lambda: lambda: 1 / 0, n=5)
    run.measure("the truth", lambda: lambda: 1, error=lambda _: 1 / 0)
    run.measure("good", lambda: lambda: 2.0, error=lambda result: result / 4, flop=8.0)
    run.measure("good", lambda: pytest.fail("measured twice"))
    *failed, good = lines(tmp_path)
    assert [row["failure"] for row in failed] == ["ZeroDivisionError: division by zero"] * 3
    assert failed[1]["n"] == 5
    assert (good["failure"], good["error"], good["flop"]) == (None, 0.5, 8.0)
    assert good["seconds"] >= 0
    assert "division by zero" in capsys.readouterr().out


def test_no_case_starts_after_the_time(tmp_path):
    run = a_run(tmp_path, stop=time.monotonic() - 1.0, done={("solve", "there")})
    run.measure("there", lambda: pytest.fail("measured again"))
    with pytest.raises(OutOfTime):
        run.measure("late", lambda: pytest.fail("too late"))
    assert lines(tmp_path) == []


def test_a_device_that_answers_nothing_ends_the_process(tmp_path, monkeypatch):
    run = a_run(tmp_path, dry=False)

    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(Unusable, match="illegal memory access"):
        run.record("breaks the device", lost)
    assert "illegal" in lines(tmp_path)[0]["failure"]


def test_every_part_has_a_module_and_every_module_its_parts():
    assert list(MODULES) == list(PARTS)
    for part, module in MODULES.items():
        assert callable(getattr(importlib.import_module(f"bench.{module}"), part))


class Listed(Run):
    """A full run that measures nothing: the cases that it would."""

    @property
    def device(self):
        return torch.device("cpu")

    def few(self, full, tiny):
        return tiny

    def wanted(self, case):
        self.cases.append(case)
        return False


@pytest.mark.parametrize("part", PARTS)
def test_cases_of_a_full_run_have_names_of_their_own(part, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(first_contact_launches, "_compile_ahead", lambda run, todo: None)
    run = Listed(part, tmp_path, ABOUT, first_contact_run.DRY_SIZES, False, time.monotonic() + 60.0)
    run.cases = []
    getattr(importlib.import_module(f"bench.{MODULES[part]}"), part)(run)
    assert run.cases
    assert len(set(run.cases)) == len(run.cases)
    if part == "launches":  # those of the highest precision, without limits, before all others; the present ones first
        assert run.cases[0].startswith("gradient fp16x3: 32 32 32 4 1")
        assert "maxnreg" not in run.cases[10]
        assert "maxnreg 128" in " ".join(run.cases)
        assert max(i for i, case in enumerate(run.cases) if "maxnreg 128" in case) < min(
            i for i, case in enumerate(run.cases) if "bf16x3" in case
        )


# ---- Parts that die

DYING = f"""
import json, os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from bench import first_contact_lines as L
text = sys.stdin.read()
if not text:
    sys.exit()
order = json.loads(text)
folder, part = Path(order["folder"]), order["part"]
done = L.done(L.read(folder))
cases = {{"ceilings": ["start dies"], "accuracy": ["one", "killed", "unusable", "last"], "near": ["hangs"]}}
for case in cases.get(part, ["case"]):
    if case == "start dies":
        sys.exit(7)
    if (part, case) in done:
        continue
    (folder / "under_way").write_text(case)
    if case == "killed":
        os.kill(os.getpid(), 9)
    if case == "hangs":
        os.fork()  # what a part starts ends with it
        time.sleep(600)
    L.append(folder, L.line(order["about"], part, case, seconds=1.0, pid=os.getpid()))
    if case == "unusable":
        sys.exit(3)
L.append(folder, L.line(order["about"], part, L.WHOLE))
"""


def running(groups: list[int]) -> list[str]:
    """Processes of these groups that run: one that was killed may wait for its end to be read."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has ended meanwhile
            continue
        if int(group) in groups and state not in "ZX":
            found.append(path.parent.name)
    return found


def test_a_part_that_dies_ends_only_itself(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(Worker, "code", DYING)
    made = Worker.__init__
    monkeypatch.setattr(Worker, "__init__", lambda self, dry: (made(self, dry), started.append(self.process.pid))[0])
    monkeypatch.setattr(first_contact, "PARTS", {"ceilings": 1, "accuracy": 30, "near": 1, "solve": 30})
    monkeypatch.setattr(first_contact, "_LEAST", 0.1)
    missing = supervise(tmp_path, 40.0, False, ["ceilings", "accuracy", "near", "solve"], ABOUT)
    assert missing == ["ceilings", "near"]
    found = {(row["part"], row["case"]): row for row in lines(tmp_path)}
    assert found["ceilings", "start"]["failure"] == "the process ended with exit status 7"
    assert found["accuracy", "killed"]["failure"] == "the process ended by signal 9 (SIGKILL)"
    assert found["near", "hangs"]["failure"].startswith("stopped: the part's")
    assert len({found["accuracy", case]["pid"] for case in ("one", "unusable", "last")}) == 3
    assert ("solve", WHOLE) in found
    assert not running(started)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    # The same call goes on with what is missing, and with that alone.
    before = len(lines(tmp_path))
    monkeypatch.setattr(Worker, "code", DYING.replace('["hangs"]', '["hangs no more"]'))
    assert supervise(tmp_path, 40.0, False, ["ceilings", "accuracy", "near", "solve"], ABOUT) == ["ceilings"]
    assert [row["case"] for row in lines(tmp_path)[before:]] == ["start", "hangs no more", WHOLE]


@pytest.mark.parametrize("wrong", [False, True])
def test_candidates_are_compiled_ahead(wrong, capsys, monkeypatch):
    """What the processes are told, they launch under that configuration; one that fails ends nothing."""
    launched = []

    def launches(device, n, d, K):
        assert (device, n, d, K) == (torch.device("cpu"), first_contact_launches._COMPILED_AT, 24, 2)

        def call():
            launched.append(launch_config.config("gram", "fp16x3", device).launch)
            return 1 / wrong_or_one

        return {("gram", "fp16x3"): call}

    wrong_or_one = 0 if wrong else 1
    monkeypatch.setattr(first_contact_launches.calibrate, "launches", launches)
    trials = [("gram", "fp16x3", (64, 64, 32, 4, 3), cap) for cap in (0, 128)]
    order = {"device": "cpu", "n": first_contact_launches._COMPILED_AT, "d": 24, "K": 2, "trials": trials}
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(order)))
    first_contact_launches.compile_all()
    options = {"num_warps": 4, "num_stages": 3}
    assert launched == [options, options | {"maxnreg": 128}]
    assert capsys.readouterr().out.count("ZeroDivisionError") == 2 * wrong


def test_processes_that_compile_ahead(tmp_path, monkeypatch):
    """They are started, told, waited for within their share of the time, and then gone."""
    monkeypatch.setattr(first_contact_launches.calibrate, "launches", lambda *_: pytest.fail("here"))
    trials = [first_contact_launches.Trial("gram", "fp16x3", launch_config.Config(64, 64, 32, 4, 3))] * 4
    said = tmp_path / "said"
    told = f"import sys; open({str(said)!r}, 'a').write(sys.stdin.read() + chr(10))"
    monkeypatch.setattr(first_contact_launches, "_CODE", told)
    first_contact_launches._compile_ahead(a_run(tmp_path), trials)
    orders = [trial for line in said.read_text().splitlines() for trial in json.loads(line)["trials"]]
    assert orders == [["gram", "fp16x3", [64, 64, 32, 4, 3], 0]] * 4
    monkeypatch.setattr(first_contact_launches, "_CODE", "import time; time.sleep(600)")
    start = time.monotonic()
    first_contact_launches._compile_ahead(a_run(tmp_path, stop=start + 2.6), trials)
    assert time.monotonic() - start < 60.0


# ---- The command line


def test_without_a_gpu_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["first_contact", "--out", str(tmp_path)]) == 2
    assert "--dry-run" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--seconds", "0"], ["--seconds", "nan"], ["--only", "nothing"], []])
def test_bad_options_are_refused(tmp_path, capsys, words):
    with pytest.raises(SystemExit) as stopped:
        main(["first_contact", *(["--out", str(tmp_path)] if words else []), *words])
    assert stopped.value.code == 2
    assert "first_contact" in capsys.readouterr().err


# ---- The report


def a_first_contact(folder: Path, about: dict) -> None:
    """A few lines of most parts, made up."""
    for name in ("float16", "float64", "tf32"):
        put(folder, "ceilings", f"square product {name}", about, seconds=1.0, flop=3e14)
    put(folder, "ceilings", "copy", about, seconds=1.0, moved=4e12)
    present, fast = [128, 64, 32, 8, 3], [128, 128, 64, 8, 3]
    each = {"operation": "gradient", "products": "fp16x3", "n": 9}
    put(folder, "launches", "a", about, seconds=2e-3, config=present, maxnreg=0, present=True, **each)
    put(folder, "launches", "b", about, seconds=1e-3, config=fast, maxnreg=128, present=False, **each)
    put(folder, "launches", "c", about, failure="OutOfResources: shared memory", config=fast, present=False, **each)
    each |= {"operation": "gram"}
    put(folder, "launches", "d", about, seconds=1.02e-3, config=present, maxnreg=0, present=True, **each)
    put(folder, "launches", "e", about, seconds=1e-3, config=fast, maxnreg=0, present=False, **each)
    put(folder, "accuracy", "kernel_matrix, triton highest, aligned", about, error=5e-8, backend="triton")
    put(folder, "solve", "half of a matrix: float64 product", about, seconds=0.5, moved=1e12)
    peer = {"operation": "agop", "n": 50000, "flop": 1e13, "bytes": 2e9}
    put(folder, "peers", "agop", about, seconds=0.25, contender="fastagop triton highest", **peer)
    put(folder, "peers", "agop by hand", about, seconds=1.0, contender="torch composition", **peer)
    put(folder, "peers", "x", about, failure="Unable: xrfm | not installed", contender="xrfm", **{**peer, "flop": None})
    stages = {"solve": 0.5, "agop": 0.25}
    put(folder, "deep_rfm", "layer 1", about, seconds=0.75, stages=stages, iterations=3, method="cholesky+cg")
    put(folder, "deep_rfm", "20 layers", about, seconds=21.5, depth=20, n=50000, d=1024, residual=1e-10)


def test_the_report_of_made_up_lines(tmp_path):
    a_first_contact(tmp_path, ABOUT)
    written = {path.name: path for path in gpu_report.write(tmp_path)}
    launch, text = written["launch_config.md"].read_text(), written["report.md"].read_text()
    assert '("gradient", "fp16x3"): Config(128, 128, 64, 8, 3, registers=128),' in launch
    assert "| 2.00 | take it |" in launch
    assert "| 1.02 | keep |" in launch  # less than 3 % is noise
    assert '("gram"' not in launch
    assert "1 candidates could not run" in launch
    readme = written["readme.md"].read_text()
    assert "| agop | fastagop triton highest | 0.25 | 1.00 | 2.00 GB |" in readme
    assert "| agop | torch composition | 1 | 4.00 |" in readme
    assert "Unable: xrfm / not installed" in readme
    assert "| 20 layers | 50000 | 1024 | 21.5 |" in readme
    assert "| 40 % |" in written["roofline.md"].read_text()  # 4e13 of 1e14, three fp16 products for one
    assert "| 50 % |" in written["roofline.md"].read_text()  # 2 of 4 TB/s
    sections = text.split("## ")[1:]
    assert all(MADE_UP in section and "torch 0" in section and "; 20" in section for section in sections)
    assert "DRY RUN" not in text
    assert "nothing measured" in text  # of parts that did not run
    assert written["roofline.png"].stat().st_size > 5000


def test_a_dry_run_is_never_taken_for_a_gpu(tmp_path):
    a_first_contact(tmp_path, DRY_ABOUT)
    for path in gpu_report.write(tmp_path):
        if path.suffix == ".md":
            text = path.read_text()
            assert "take it" not in text
            assert "Config(" not in text
            assert all(section.startswith("DRY RUN, no GPU: ") for section in text.split("## ")[1:])
            blocks = [block for block in text.split("\n\n") if block.startswith("|")]
            assert all(block.startswith("| DRY RUN") for block in blocks)


# ---- A dry run, from a checkout where nothing is installed

BLOCKED = (
    "sklearn", "scipy", "matplotlib", "pykeops", "safetensors", "joblib", "pytest", "xrfm", "pandas", "hypothesis"
)  # fmt: skip
ALONE = f"""
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {BLOCKED!r} else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(f) for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")]
"""


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """(run(*words), the checkout, its files): a copy of the tree, and a Python that finds little beside torch."""
    folder = tmp_path_factory.mktemp("plain")
    tree, site = folder / "checkout", folder / "site"
    for name in ("fastagop", "kernels", "bench", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    site.mkdir()
    (site / "sitecustomize.py").write_text(ALONE)
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)

    def run(*words):
        command = [sys.executable, "-m", "bench", *map(str, words)]
        return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)

    return run, tree, held(tree)


def held(tree: Path) -> list[Path]:
    """Its files, but for compiled Python."""
    return sorted(path for path in tree.rglob("*") if "__pycache__" not in path.parts)


def test_a_dry_run_from_a_plain_checkout(plain, tmp_path):
    """Every part to its end, in a minute of processor time, and nothing left in the tree."""
    run, tree, before = plain
    pytest.importorskip("triton")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run("first_contact", "--dry-run", "--out", tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = lines(tmp_path)
    assert [row["part"] for row in rows if row["case"] == WHOLE] == list(PARTS)
    assert all(row["dry_run"] and row["chip"] == DRY for row in rows)
    failures = [row["failure"] for row in rows if row["failure"]]
    assert [words for words in failures if not words.startswith(("Unable", "ModuleNotFoundError"))] == []
    errors = [row for row in rows if row["part"] in ("accuracy", "graph", "ranks") and row["failure"] is None]
    errors = [row["error"] for row in errors if row["case"] != WHOLE]
    assert max(errors) <= 1e-4
    compiled = {row["case"]: row for row in rows if row["part"] == "compile"}
    assert (compiled["breaks of the graph"]["breaks"], compiled["breaks of the graph"]["graphs"]) == (0, 1)
    assert compiled["torch.compile, aot_eager"]["error"] <= 1e-12
    assert compiled["torch.export"]["error"] == 0
    assert sum(1 for row in rows if row.get("stages")) == 6  # layers, of three fits
    assert after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime < 90.0  # 60 where nothing else runs
    assert held(tree) == before
    again = run("first_contact", "--dry-run", "--out", tmp_path)  # nothing is missing
    assert again.returncode == 0
    assert len(lines(tmp_path)) == len(rows)
    reported = run("gpu_report", tmp_path)
    assert reported.returncode == 0, reported.stderr
    assert {path.name for path in tmp_path.iterdir()} == {
        FILE, "report.md", "launch_config.md", "roofline.md", "readme.md"
    }  # fmt: skip


def test_what_is_installed_is_not_asked_for(plain, tmp_path):
    """The light cases start where scikit-learn and safetensors are not; others say what is missing."""
    run, _, _ = plain
    put(tmp_path, "solve", "one", seconds=1.0)
    assert run("gpu_report", tmp_path).returncode == 0
    other = run("tables")
    assert other.returncode
    assert "sklearn" in other.stderr


# ---- torch.compile


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", ["classifier", "regressor"])
def test_a_module_compiles_to_one_graph(kind, backend):
    X = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    settings = {"depth": 2, "width": 8, "random_state": 0, "ridge": 1e-3}
    if kind == "classifier":
        model = fastagop.DeepRFMClassifier(fastagop.Laplace(2.0), **settings).fit(X, np.arange(30) % 3)
    else:
        model = fastagop.DeepRFMRegressor(fastagop.Matern52(2.0), features="cos", **settings).fit(X, X[:, 0])
    module, Z = model.to_module(), X[:7] + 0.25
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's compiler uses parts of torch that it calls deprecated
        torch._dynamo.reset()
        assert torch._dynamo.explain(module)(Z).graph_break_count == 0
        torch._dynamo.reset()
        compiled = torch.compile(module, backend=backend, fullgraph=True)
        torch.testing.assert_close(compiled(Z), module(Z), rtol=1e-12 if backend == "eager" else 1e-6, atol=0.0)
        compiled(X[:9])  # another number of rows
        assert torch.equal(torch.export.export(module, (Z,)).module()(Z), module(Z))


# ---- KeOps on CUDA, as far as it can be seen without


@pytest.mark.parametrize("found", [False, True])
def test_keops_on_cuda(found, monkeypatch):
    """Served where pykeops finds CUDA, refused with a reason where not; its formulas run in the GPU's mode."""
    asked = []

    class Genred:
        def __init__(self, formula, aliases, **options):
            asked.append((formula, aliases))

        def __call__(self, *tensors, backend):
            asked.append(backend)
            return "sums"

    torch_part = SimpleNamespace(Genred=Genred)
    stub = SimpleNamespace(config=SimpleNamespace(gpu_available=found), torch=torch_part)
    monkeypatch.setattr(keops.reductions, "pykeops_module", lambda: stub)
    monkeypatch.setattr(keops.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(keops.shutil, "which", lambda name: "/usr/bin/g++")
    X = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32)
    refusal = keops.unusable(X)
    assert refusal is None if found else "pykeops finds no CUDA" in refusal
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda shape, dtype, device: ones(shape, dtype=dtype))
    reduction = keops.reductions._reduction.__wrapped__
    for device, mode in (("cuda:0", "GPU_1D"), ("cpu", "CPU")):
        asked.clear()
        reduce = reduction("product", "x * z", "xz", 3, 2, 1, torch.float32, device)
        assert asked == [("x * z", ["x=Vi(0,3)", "z=Vj(1,3)", "b=Vj(2,2)", "c=Pm(3,1)"]), mode]
        assert (reduce(ones(1)), asked[-1]) == ("sums", mode)
