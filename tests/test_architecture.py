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
LINES, FUNCTION = 400, 60  # of a file and of a function, of what is installed
FLAT = {"kernels": 16, "fastagop": 9}  # files that lie beside the folders
# The floors of the house from the ground up: a module imports from floors below its own and from its own room.
FLOORS = (
    ("kernels.errors", "kernels.profile", "kernels.memory", "kernels.reference", "kernels.atomic_files"),
    ("kernels.first_use",),
    ("kernels.checks", "kernels.plan", "kernels.precision", "kernels.scaling", "kernels.gemm", "kernels.calibration"),
    ("kernels.torch_backend",),
    ("kernels.pair_backend",),
    ("kernels.triton_backend", "kernels.keops_backend"),
    ("kernels.backends",),
    ("kernels.kernel_operator",),
    ("kernels.operations",),
    ("kernels.families",),
    ("kernels.radial",),
    ("linalg", "collapse", "datasets", "locks", "commands", "estimates", "autograd", "spectra"),
    ("solvers",),
    ("distributed",),
    ("estimators", "network"),
    ("rfm", "deep_rfm", "integrations"),
    ("probes", "convolution"),
    ("explain", "plots"),
    ("",),  # fastagop/__init__.py
)


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


def module_of(path: Path) -> str:
    """A file of kernels or fastagop by its module's name, "fastagop." left out."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "kernels" else parts[1:]
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_of(path): path for room in ("kernels", "fastagop") for path in files(room)}


def imported(name: str) -> set[str]:
    """Modules of the project that a module imports, anywhere in it, but for what only type checkers see."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    tree, found, packages = ast.parse(path.read_text()), set(), set()
    for branch in ast.walk(tree):
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test):
            branch.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("fastagop").removeprefix(".") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                module = ".".join([*package[: len(package) - node.level + 1], *filter(None, [module])])
            elif module.split(".")[0] == "fastagop":
                module = module.removeprefix("fastagop").removeprefix(".")
            else:
                continue
            inner = {f"{module}.{alias.name}".removeprefix(".") for alias in node.names}
            found |= inner
            packages |= set() if inner & MODULES.keys() else {module}  # not where one of its modules is what is meant
    return ((found | packages) & MODULES.keys()) - {name}


def floor(name: str) -> tuple[int, str]:
    """(the floor, the room) of a module."""
    for level, rooms in enumerate(FLOORS):
        for room in rooms:
            if name == room or (room and name.startswith(f"{room}.")):
                return level, room
    return -1, name  # kernels/__init__.py holds nothing


GRAPH = {name: imported(name) for name in MODULES}


@pytest.mark.parametrize("name", sorted(GRAPH))
def test_arrows_go_down(name):
    """Lazy imports count: a circle that closes when a function runs is a circle."""
    level, room = floor(name)
    assert level >= 0 or MODULES[name].name == "__init__.py", f"{name} is on no floor: give its folder one in FLOORS"
    up = {other for other in GRAPH[name] if floor(other)[1] != room and floor(other)[0] > level}
    assert not up


def test_no_circles():
    order, seen, path = [], set(), []

    def visit(name: str) -> None:
        assert name not in path, f"circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name in seen:
            return
        path.append(name)
        for other in sorted(GRAPH[name]):
            visit(other)
        path.pop()
        seen.add(name)
        order.append(name)

    for name in sorted(GRAPH):
        visit(name)
    assert len(order) == len(MODULES)


def test_an_arrow_that_goes_up_is_found(monkeypatch, tmp_path):
    file = tmp_path / "linalg.py"
    file.write_text("def f():\n    from fastagop.solvers import cg\n    return cg")
    monkeypatch.setitem(MODULES, "linalg", file)
    assert imported("linalg") == {"solvers.cg"}
    assert floor("solvers.cg")[0] > floor("linalg")[0]


@pytest.mark.parametrize("room", ["kernels", "fastagop"])
def test_folders_hold_what_would_be_many_files(room):
    assert len(list((ROOT / room).glob("*.py"))) <= FLAT[room]


@pytest.mark.parametrize("room", ["kernels", "fastagop"])
def test_files_and_functions_stay_short(room):
    long = {}
    for path in files(room):
        source = path.read_text()
        if (lines := len(source.splitlines())) > LINES:
            long[path.name] = lines
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= FUNCTION:
                long[f"{path.name}:{node.name}"] = node.end_lineno - node.lineno + 1
    assert long == {}


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
    "ProductLaplace": "(bandwidth)",
    "LpLaplace": "(p, q, bandwidth)",
    "Polynomial": "(degree, offset=1.0, scale=1.0)",
    "ArcCosine": "(order)",
    "NTK": "(depth)",
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
