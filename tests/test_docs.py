"""The documentation's promises: its examples run, its names, commands and pages exist, and the site builds."""

from __future__ import annotations

import ast
import builtins
import functools
import importlib
import inspect
import re
from pathlib import Path

import pytest
from fastagop.kernels import backends
from fastagop.kernels.profile import Kernel

import fastagop
from fastagop.deep_rfm import random_features
from fastagop.solvers import table

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "docs/mkdocs.yml"
PAGES = sorted((ROOT / "docs/pages").glob("*.md"))
API = (ROOT / "docs/pages/api.md").read_text()
NOT_RUN = "{.python .not-run}"  # needs torchrun, CUDA or minutes of compilation
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path, kind: str) -> list[str]:
    return [code for info, code in FENCE.findall(page.read_text()) if info == kind]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_examples_run(page, tmp_path, monkeypatch):
    """The blocks of a page in their order, as a reader would enter them; files go to the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(backends, "_TABLE", dict(backends._TABLE))  # a page may register one
    names = {"__name__": "__main__"}
    for number, code in enumerate(blocks(page, "python"), 1):
        exec(compile(code, f"{page.name}, block {number}", "exec"), names)


@pytest.fixture
def outputs(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("outputs")


def test_blocks_show_what_they_print(outputs):
    shown = outputs.with_outputs("```python\nx = 2\n```\nThen\n```python\nprint(x)\nx + 1\n```\n", "page.md")
    assert shown == (
        '```python\nx = 2\n```\nThen\n```python\nprint(x)\nx + 1\n```\n\n```text title="Output"\n2\n3\n```\n'
    )


def test_a_block_that_fails_is_named(outputs):
    with pytest.raises(RuntimeError, match=r"a block of page.md fails with ZeroDivisionError"):
        outputs.with_outputs("```python\n1 / 0\n```\n", "page.md")


@pytest.fixture
def mathml(monkeypatch):
    pytest.importorskip("latex2mathml")  # the docs' tools need Python 3.11
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("mathml")


def test_formulas_become_mathml(mathml):
    page = (
        'a <span class="arithmatex">\\(x &lt; -y\\)</span> b <div class="arithmatex">\\[\na \\qquad f(-b_1)\n\\]</div>'
    )
    inline, first, second = re.findall(r"<math.*?</math>", mathml.with_mathml(page, "page.md"))
    assert mathml.with_mathml(page, "page.md") == f'a {inline} b <div class="formula">{first}{second}</div>'
    assert 'display="inline"' in inline
    assert "&#x0003C;" in inline or "&lt;" in inline
    assert 'display="block"' in first
    assert "<msub><mi>b</mi><mn>1</mn></msub>" in second
    assert '<mo form="prefix">&#x02212;</mo>' in second
    bars = mathml.with_mathml('<span class="arithmatex">\\(\\lVert x \\rVert_2\\)</span>', "page.md")
    assert bars.count('<mo stretchy="false">&#x02016;</mo>') == 2


def test_a_formula_nobody_knows_is_named(mathml):
    with pytest.raises(ValueError, match=r"page.md: latex2mathml does not know .alhpa in"):
        mathml.with_mathml('<span class="arithmatex">\\(\\alhpa\\)</span>', "page.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_example_escapes(page):
    """Every block is Python that runs, Python that is marked, or commands."""
    text = page.read_text()
    assert {info for info, _ in FENCE.findall(text)} <= {"python", NOT_RUN, ""}
    assert text.count("```") == 2 * len(FENCE.findall(text))
    assert text.count("```python\n") == len(blocks(page, "python"))
    for code in blocks(page, NOT_RUN):
        ast.parse(code)
    for code in blocks(page, ""):
        assert "import " not in code


def test_the_gallery_has_every_picture_and_none_twice():
    gallery = (ROOT / "docs/pages/gallery.md").read_text()
    shown = re.findall(r"^\[!\[[^]]+\]\(([^)]+)\)\]\(([^)]+)\)$", gallery, re.MULTILINE)
    assert shown
    for picture, link in shown:
        assert picture == link
        assert (ROOT / "docs/pages" / picture).stat().st_size < 150_000, picture
    assert len({picture for picture, _ in shown}) == len(shown)
    assert {f"../../bench/results/{path.name}" for path in (ROOT / "bench/results").glob("*.png")} <= dict(shown).keys()


def test_nav_lists_every_page():
    listed = re.findall(r"^  - .+: (\w+\.md)$", CONFIG.read_text(), re.MULTILINE)
    assert sorted(listed) == [page.name for page in PAGES]


def test_reference_has_every_public_name():
    shown = re.findall(r"^(?:::: |      heading: )fastagop\.(\w+)$", API, re.MULTILINE)
    assert set(fastagop.__all__) - set(shown) == set()
    for module in (
        fastagop.collapse,
        fastagop.datasets,
        fastagop.network,
        fastagop.distributed,
        fastagop.plots,
        fastagop.probes,
        fastagop.convolution,
        fastagop.autograd,
    ):
        name = module.__name__.split(".")[1]
        (members,) = re.findall(rf"^::: fastagop\.{name}\n    options:\n      members: \[(.*)\]$", API, re.MULTILINE)
        own = {key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
        public = set(getattr(module, "__all__", {key for key in own if not key.startswith("_")}))
        assert public - {"Array"} == set(members.split(", ")), f"list it in docs/pages/api.md, at fastagop.{name}"


def test_reference_has_what_estimators_give():
    for module in (importlib.import_module("fastagop.rfm"), importlib.import_module("fastagop.deep_rfm")):
        for name in set(module.__all__) - {"Callback"}:  # a word for type checkers
            assert {f"::: fastagop.{name}", f"::: {module.__name__}.{name}"} & set(API.splitlines()), name


def test_kernels_are_listed_where_users_choose_one():
    """In the reference's table of formulas, the README's row, and the table of what KeOps and Triton serve."""
    exported = {name: getattr(fastagop, name) for name in fastagop.__all__}
    kernels = {name: kind for name, kind in exported.items() if inspect.isclass(kind) and issubclass(kind, Kernel)}
    assert kernels.keys() - set(re.findall(r"^\| `(\w+)\(", API, re.MULTILINE)) == set()
    (row,) = re.findall(r"^\| kernels \| .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert kernels.keys() - set(re.findall(r"`(\w+)\(", row)) == set()
    on_devices = {name for name, kind in kernels.items() if not kind.radial and {"keops", "triton"} & vars(kind).keys()}
    served = re.findall(r"^\| (`[A-Z][^|]*)\|", (ROOT / "docs/pages/choosing.md").read_text(), re.MULTILINE)
    assert on_devices - set(re.findall(r"\w+", " ".join(served))) == set()


@pytest.mark.parametrize("method", table.methods()[1:])
def test_solvers_are_listed_where_users_choose_one(method):
    """In the docstring of solve, in the tables of the pages, and in what a Solution says of its method."""
    assert f'"{method}"' in inspect.getdoc(fastagop.solve)
    assert re.search(rf'^    method: .*"{re.escape(method)}"', inspect.getdoc(fastagop.Solution), re.MULTILINE)
    for page, row in (
        ("choosing", rf'^\| `"{re.escape(method)}"`'),
        ("solving", rf'^\| `method` \|.*"{re.escape(method)}"'),
    ):
        assert re.search(row, (ROOT / f"docs/pages/{page}.md").read_text(), re.MULTILINE), page


@pytest.mark.parametrize("name", random_features.FEATURES)
def test_feature_maps_are_listed_where_users_choose_one(name):
    """In the docstring of the classifier, to which the regressor's refers, and in the table of parameters."""
    assert f'"{name}"' in inspect.getdoc(fastagop.DeepRFMClassifier)
    (row,) = re.findall(r"^\| `features` \|.*$", (ROOT / "docs/pages/deep_rfm.md").read_text(), re.MULTILINE)
    assert f'`"{name}"`' in row


@pytest.mark.parametrize("name", sorted(set(fastagop.collapse.__all__) - {"EqualMeansError", "of_stages"}))
def test_measures_of_collapse_are_listed_where_users_choose_one(name):
    assert re.search(rf"`{name}\b", (ROOT / "docs/pages/measures.md").read_text()), "name it in docs/pages/measures.md"


def resolve(path: str):
    """What a dotted path names; a module goes before the function of its name."""
    names = path.split(".")
    for cut in range(len(names), 0, -1):
        try:
            value = importlib.import_module(".".join(names[:cut]))
        except ModuleNotFoundError:
            continue
        except ImportError:  # a module for a library that is not here
            return None
        return functools.reduce(getattr, names[cut:], value)
    raise AssertionError(f"{path} names nothing")


def test_reference_shows_what_exists():
    for path in re.findall(r"^::: ([\w.]+)$", API, re.MULTILINE):
        value = resolve(path)
        assert value is None or inspect.getdoc(value), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_names_in_the_text_exist(page):
    for path in set(re.findall(r"(?<![\w/.])fastagop(?:\.\w+)+", page.read_text())):
        resolve(path)


def test_commands_exist():
    from bench.__main__ import CASES

    text = "\n".join(page.read_text() for page in PAGES)
    assert set(re.findall(r"python -m bench (\w+)", text)) <= set(CASES)
    table = (ROOT / "docs/pages/benchmarks.md").read_text()
    listed = set(re.findall(r"(?:`|-m bench )(\w+)(?![\w ]*-m)", table))
    assert set(CASES) - {"suite"} - listed == set(), "name it in the table of docs/pages/benchmarks.md"
    extras = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n\n")[0]
    for extra in set(re.findall(r"pip install (?:-e )?\"\.\[(\w+)\]\"", text)):
        assert re.search(rf"^{extra} = ", extras, re.MULTILINE), extra
    assert re.search(r"^docs:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("rfm", ["RFMClassifier", "RFMRegressor", "RFMClassifierCV", "RFMTreeClassifier"]),
        ("deep_rfm", ["DeepRFMClassifier"]),
    ],
)
def test_pages_have_every_parameter_of_their_estimators(page, names):
    text = (ROOT / f"docs/pages/{page}.md").read_text()
    parameters = {key for name in names for key in inspect.signature(getattr(fastagop, name)).parameters}
    assert {key for key in parameters if not re.search(rf"`{key}(?:=[^`]*)?`", text)} == set()


def test_reference_has_the_warnings_and_errors_that_it_names():
    """Whoever wants to filter or catch one finds it under its own path."""
    named = set()
    for path in re.findall(r"^::: ([\w.]+)$", API, re.MULTILINE):
        text = inspect.getdoc(resolve(path)) or ""
        members = re.findall(rf"^::: {re.escape(path)}\n    options:\n      members: \[(.*)\]$", API, re.MULTILINE)
        for name in members[0].split(", ") if members and inspect.ismodule(resolve(path)) else []:
            text += inspect.getdoc(getattr(resolve(path), name)) or ""
        named |= set(re.findall(r"\b(?:[A-Z][a-z]\w*)(?:Error|Warning|Unavailable|InUse|Lost)\b", text))
    named -= set(dir(builtins))
    assert {name for name in named if not re.search(rf"\b{name}\b", API)} == set()


@pytest.mark.parametrize("room", ["kernels", "fastagop"])
def test_the_tree_has_every_file_and_folder_of_a_room(room):
    page = (ROOT / "docs/pages/architecture.md").read_text()
    tree = set(re.findall(r"\w+", FENCE.findall(page)[0][1]))
    own = {path.stem for path in (ROOT / room).glob("*.py")}
    own |= {path.parent.name for path in (ROOT / room).glob("*/__init__.py") if not path.parent.is_symlink()}
    assert own - {"__init__"} - tree == set()
