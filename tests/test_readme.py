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
    """In a process of its own: a kernel class stays known by its name."""
    page = (ROOT / "docs/pages/add_a_kernel.md").read_text()
    block, entry = re.findall(r"```\{\.python \.not-run\}\n(.*?)```", page, re.DOTALL)
    read = "def KernelCase(kernel, **facts):\n    return facts\n(case,) = " + entry
    check = """
r = torch.tensor([0.1, 1.0, 3.0, 1e4], dtype=torch.float64)
for method, formula in ((kernel.value_, case["profile"]), (kernel.weight_, case["weight"])):  # of tests/kernel_cases.py
    assert torch.allclose(method(r.square()), formula(kernel, r), rtol=1e-12, atol=0.0)
X, alpha = X.double(), solution.alpha.double()
Z, step = torch.randn(5, 8).double(), 1e-4 * torch.randn(5, 8).double()
fall = (kernel(Z + step, X) - kernel(Z - step, X)) @ alpha
along = 2 * torch.einsum("icd,id->ic", fastagop.gradients(kernel, X, alpha, Z), step)
print(float((fall - along).norm() / along.norm()), tuple(M.shape), solution.jitter, repr(kernel))
for L, value, weight in ((1e-25, 1e-25, 1e-25), (1e30, 1.0, 0.0)):  # 1 / L^2, or r^2 / L^2, is no float32 number
    extreme = RationalQuadratic(L, shape=0.5)
    for method, true in ((extreme.value_, [1.0, value, 0.0]), (extreme.weight_, [0.0, weight, 0.0])):
        found = method(torch.tensor([0.0, 1.0, float("inf")]))
        assert torch.allclose(found, torch.tensor(true), rtol=1e-5, atol=0.0), (L, found)
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


@pytest.mark.parametrize("case", ["agop", "tables"])
def test_tables_are_the_committed_results(case):
    module = importlib.import_module(f"bench.{case}_cpu")
    rows = json.loads((ROOT / f"bench/results/{case}_cpu.json").read_text())["rows"]
    inside = README.split(f"<!-- {case} -->")[1].split(f"<!-- /{case} -->")[0]
    assert inside.strip() == module.table(rows)
