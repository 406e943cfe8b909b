"""The arrows point one way: reproduce, bench -> fastagop -> kernels. And the house stays readable."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import fastagop

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("kernels", "fastagop", "reproduce", "bench", "tests")
# What no file of a room may import. "kernels" alone is another project's package: ours is fastagop.kernels.
FORBIDDEN = {
    "kernels": {"fastagop", "kernels", "reproduce", "bench", "tests"},
    "fastagop": {"kernels", "reproduce", "bench", "tests"},
    "reproduce": {"kernels", "bench", "tests"},
    "bench": {"kernels", "tests"},
    "tests": {"kernels"},
}
LINES = 500


def imports(source: str) -> list[str]:
    """Top-level names that a file imports, anywhere in it; a relative import is "." or, above its package, "..".

    Calls of import_module, __import__ and find_spec with a constant name count too.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append("." * min(node.level, 2) if node.level else (node.module or "").split(".")[0])
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                found.append(node.args[0].value.split(".")[0])
    return found


def wrong(room: str, source: str) -> list[str]:
    """Imports that a file of a room must not have; the kernels room is flat and leaves it for nobody."""
    outside = {".."} if room == "fastagop" else set()
    return [name for name in imports(source) if name in FORBIDDEN[room] | outside]


def files(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("room", ROOMS)
def test_arrows(room):
    assert room not in ("kernels", "fastagop", "tests") or files(room)
    assert {
        str(path.relative_to(ROOT)): found for path in files(room) if (found := wrong(room, path.read_text()))
    } == {}


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("kernels", "import fastagop"),
        ("kernels", "from fastagop.solve import solve"),
        ("kernels", "from fastagop.kernels import distance"),  # relative imports only
        ("kernels", "def f():\n    import importlib\n    importlib.import_module('fastagop.solve')"),
        ("fastagop", "from kernels import distance"),
        ("fastagop", "import kernels.distance as d"),
        ("fastagop", "def f():\n    from reproduce import runs"),  # lazily is still an import
        ("fastagop", "import torch, bench"),
        ("fastagop", "from tests.conftest import cloud"),
        ("reproduce", "from kernels.distance import squared_norms"),
        ("bench", "import kernels"),
        ("tests", "from kernels import distance"),
    ],
)
def test_wrong_arrows_are_found(room, source):
    assert wrong(room, source)


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("kernels", "from . import _checks\nfrom ._plan import Plan\nimport torch"),
        ("fastagop", "from fastagop.kernels import torch_agop\nfrom . import linalg"),
        ("reproduce", "import fastagop\nfrom fastagop.kernels import reference\nfrom reproduce import files"),
        ("bench", "import fastagop"),
    ],
)
def test_right_arrows_are_not(room, source):
    assert not wrong(room, source)


@pytest.mark.parametrize("room", ROOMS)
def test_files_stay_short(room):
    lengths = {path.name: len(path.read_text().splitlines()) for path in files(room)}
    assert {name: n for name, n in lengths.items() if n > LINES} == {}


@pytest.mark.parametrize("room", ["kernels", "fastagop"])
def test_every_file_says_what_it_is(room):
    assert [p.name for p in files(room) if not ast.get_docstring(ast.parse(p.read_text()))] == []


@pytest.mark.parametrize("name", fastagop.__all__)
def test_public_names_are_documented(name):
    value = getattr(fastagop, name)
    assert inspect.getdoc(value)
    if inspect.isclass(value):  # not the inherited text of a base class
        assert value.__doc__
    for attribute, member in vars(value).items() if inspect.isclass(value) else ():
        if not attribute.startswith("_") and inspect.isfunction(member):
            assert inspect.getdoc(member), attribute


def test_public_names():
    assert fastagop.__all__ == sorted(fastagop.__all__)
    assert set(fastagop.__all__) <= set(dir(fastagop))
    with pytest.raises(AttributeError, match="no attribute 'kernel_matrices'"):
        _ = fastagop.kernel_matrices


# The public contract's signatures: names, order, what is keyword-only, and defaults.
CONTRACT = {
    "kernel_matrix": "(kernel, X, Z=None, *, out=None, ridge=0.0, precision='highest', backend='auto')",
    "kernel_matmul": "(kernel, X, Z=None, V=None, *, precision='highest', backend='auto')",
    "gradients": "(kernel, X, alpha, Z=None, *, precision='highest', backend='auto')",
    "agop": "(kernel, X, alpha, Z=None, *, reduction='mean', center=False, method='auto', precision='highest', "
    "backend='auto', memory_limit=None, sample_weight=None)",
    "solve": "(kernel, X, Y, *, ridge=0.0, method='auto', precision='highest', backend='auto', memory_limit=None, "
    "sample_weight=None)",
    "explain": "(op, *args, **kwargs)",
    "Laplace": "(bandwidth)",
    "Gaussian": "(bandwidth)",
    "GeneralisedLaplace": "(bandwidth, exponent)",
    "Matern52": "(bandwidth)",
}


@pytest.mark.parametrize("name", CONTRACT)
def test_signatures(name):
    signature = inspect.signature(getattr(fastagop, name))
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(plain)) == CONTRACT[name]


def test_importing_is_light(python):
    """`import fastagop` brings none of the libraries that only parts of it need, beyond what torch brings itself."""
    printed = python(
        """
import sys, torch
before = set(sys.modules)
def brought():
    print(*sorted(set(sys.modules) - before))
import fastagop
brought()
fastagop.solve(fastagop.Laplace(2.0), torch.eye(2), torch.eye(2))
brought()
fastagop.DeepRFMClassifier  # the estimators, and scikit-learn, come when asked for
print("sklearn" in sys.modules)
"""
    ).splitlines()
    unwanted = {
        "sklearn",
        "scipy",
        "matplotlib",
        "torchvision",
        "pykeops",
        "triton",
        "PIL",
        "pandas",
        "safetensors",
        "xrfm",
    }
    for line in printed[:2]:
        modules = line.split()
        tops = {name.split(".")[0] for name in modules}
        assert "fastagop" in tops
        assert not tops & unwanted
        assert "kernels" not in tops
        assert [name for name in modules if name.startswith(("torch._inductor", "torch._dynamo"))] == []
    assert printed[2] == "True"


def test_the_kernels_room_refuses_to_be_top_level(python):
    printed = python(
        f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
try:
    import kernels
except ImportError as error:
    print(error)
"""
    )
    assert "'kernels'" in printed
    assert "pip install" in printed
