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


@pytest.mark.parametrize("case", re.findall(r"^<!-- (\w+) -->$", README, re.MULTILINE))
def test_tables_are_the_committed_results(case):
    module = importlib.import_module(f"bench.{case}_cpu")
    rows = json.loads((ROOT / f"bench/results/{case}_cpu.json").read_text())["rows"]
    inside = README.split(f"<!-- {case} -->")[1].split(f"<!-- /{case} -->")[0]
    assert inside.strip() == module.table(rows)
