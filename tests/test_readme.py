"""The README's promises: its example runs, its commands exist, its figures come from the committed file."""

import importlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_example_runs(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(block.strip().splitlines()) <= 12
    exec(compile(block, "README.md", "exec"), {})
    assert "agop: backend torch" in capsys.readouterr().out


def test_the_kernel_that_docs_add(python):
    """It passes the tests of a kernel's profile with the page's own entry, as the page says.

    In a process of its own: a kernel class stays known by its name.
    """
    page = (ROOT / "docs/pages/add_a_kernel.md").read_text()
    block, entry = re.findall(r"```\{\.python \.not-run\}\n(.*?)```", page, re.DOTALL)
    read = (
        "import sys\nsys.path.append('.')\nimport kernel_cases\nfrom kernel_cases import KernelCase\n(case,) = " + entry
    )
    check = """
kernel_cases.CASES.append(case)
import test_radial
for dtype in test_radial.DTYPES:
    for made in (case.kernel, case.at(0.3).kernel, case.at(5.0).kernel):
        test_radial.test_value_and_weight(made, dtype)
        test_radial.test_zero_distance(made, dtype)
    for L in test_radial.BANDWIDTHS:
        test_radial.test_extreme_bandwidths(case.kernel, L, dtype)
test_radial.test_rough_weights(case.kernel)
X, alpha = X.double(), solution.alpha.double()
Z, step = torch.randn(5, 8).double(), 1e-4 * torch.randn(5, 8).double()
fall = (kernel(Z + step, X) - kernel(Z - step, X)) @ alpha
along = 2 * torch.einsum("icd,id->ic", fastagop.gradients(kernel, X, alpha, Z), step)
print(float((fall - along).norm() / along.norm()), tuple(M.shape), solution.jitter, repr(kernel))
"""
    error, *rest = python(block + read + check).split(" ", 1)
    assert float(error) <= 1e-5  # of a central difference
    assert rest == ["(8, 8) 0.0 RationalQuadratic(bandwidth=2.0, shape=1.5)\n"]


def test_commands_and_files_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"make {target}" in README
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    for path in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / path).exists(), path


def prose_of_results():
    """(page, text that it has to have), made from the committed result files."""
    (layer,) = rows_of("scale_50000_cpu")
    mnist, run = json.loads((ROOT / "reproduce/results/figure3_n50000.json").read_text())["runs"]
    quiet = [run["layers"][number - 1]["seconds"] for number in (2, 3, 10, 11, 12)]  # beside which no other work ran
    solves = {row["n"]: row for row in rows_of("scale_cpu") if row["contender"] == "solve"}
    factor = next(row for row in rows_of("scale_cpu") if "torch's" in row["contender"] and row["n"] == 20_000)
    hours = f"20 layers and the readout in {run['seconds'] / 3600:.1f} hours"
    least = json.loads((ROOT / "reproduce/results/demo.json").read_text())["runs"][0]["layers"][-1]["nc1_projected"]
    seconds = layer["first_seconds"]
    yield "README.md", f"takes {seconds / 60:.1f} minutes and {layer['peak_bytes'] / 1e9:.1f} GB"
    yield "README.md", f"{seconds / layer['floor']:.2f} times the time of its matrix products"
    yield "README.md", f"took {run['seconds'] / 3600:.1f} hours"
    ours, theirs = (
        next(row["error"] for row in rows_of("collapse_cpu") if row["spread"] == 1e-4 and row["contender"] == name)
        for name in ("fastagop", "xrfm")
    )
    yield "README.md", f"the relative error of M is {ours:.0e}, and that of xRFM {theirs:.1g}".replace("e-0", "e-")
    yield "README.md", hours
    yield "README.md", f"(NC1 {least:.0e})".replace("e-0", "e-")
    yield "reproduce/README.md", hours
    slower = f"{mnist['seconds'] / 3600:.1f}"
    yield "reproduce/README.md", f"20 layers and the readout in {slower} hours on the same computer"
    yield "README.md", f"MNIST (Gaussian) in {slower}"
    yield "reproduce/README.md", f"took {min(quiet):.0f} to {max(quiet):.0f} s"
    yield "docs/pages/tables.md", f"n = 10,000 rows takes {solves[10_000]['peak_bytes'] / 1e9:.1f} GB"
    yield "docs/pages/rfm.md", f"n = 20,000 takes {solves[20_000]['peak_bytes'] / 1e9:.1f} GB"
    yield "docs/pages/benchmarks.md", f"took {seconds:.0f} s and {layer['peak_bytes'] / 1e9:.1f} GB"
    share = solves[20_000]["seconds"] / factor["factor seconds"]
    yield "docs/pages/benchmarks.md", f"solving take {share:.2f} of the time of LAPACK's float64 factorisation"


def rows_of(name):
    return json.loads((ROOT / f"bench/results/{name}.json").read_text())["rows"]


def test_prose_has_the_numbers_of_the_committed_results():
    pages = {page: " ".join((ROOT / page).read_text().split()) for page, _ in prose_of_results()}
    assert [(page, text) for page, text in prose_of_results() if text not in pages[page]] == []


def test_keops_is_faster_where_pages_say_so():
    """choosing.md, scaling.md and the changelog: for float64 gradients and AGOPs of a single feature alone."""
    faster = {(row["op"], row["d"], row["dtype"]) for row in rows_of("keops_cpu") if row["keops"] < row["torch"]}
    assert faster == {("gradients", 1, "float64"), ("agop", 1, "float64")}
    for page in ("choosing", "scaling", "changelog"):
        text = " ".join((ROOT / f"docs/pages/{page}.md").read_text().split())
        assert "for float64 gradients and AGOPs of a single feature" in text, page


@pytest.mark.parametrize("case", re.findall(r"^<!-- (\w+) -->$", README, re.MULTILINE))
def test_tables_are_the_committed_results(case):
    module = importlib.import_module(f"bench.{case}_cpu")
    rows = json.loads((ROOT / f"bench/results/{case}_cpu.json").read_text())["rows"]
    inside = README.split(f"<!-- {case} -->")[1].split(f"<!-- /{case} -->")[0]
    assert inside.strip() == module.table(rows)
