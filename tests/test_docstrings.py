"""What docstrings name exists: parameters under "Args:", fields, properties and attributes under "Attributes:"."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("kernels", "fastagop", "bench", "reproduce")
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
CLASSES = {
    node.name: node
    for path in FILES
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.ClassDef)
}


def named(node, section: str) -> set[str]:
    """Names that begin the entries of a section of a docstring, "a, b: text" being two."""
    text = ast.get_docstring(node) or ""
    entries = re.search(rf"^{section}:\n((?:    .*\n|\n)*)", text + "\n", re.MULTILINE)
    starts = re.findall(r"^    (?! )([*\w`, ]+):", entries[1], re.MULTILINE) if entries else []
    return {name.strip(" *`") for start in starts for name in start.split(",")}


def parameters(function) -> set[str]:
    """Names of a function's parameters."""
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    return {argument.arg for argument in every if argument is not None}


def members(node: ast.ClassDef) -> set[str]:
    """Fields, methods and attributes of a class and of those that it derives from, as far as they are the project's."""
    found = set()
    for part in ast.walk(node):
        if isinstance(part, FUNCTIONS):
            found.add(part.name)
        elif isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store) and ast.unparse(part.value) == "self":
            found.add(part.attr)
    for part in node.body:
        targets = part.targets if isinstance(part, ast.Assign) else [getattr(part, "target", None)]
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    bases = [CLASSES[name] for base in node.bases if (name := ast.unparse(base).rpartition(".")[2]) in CLASSES]
    return found.union(*(members(base) for base in bases if base is not node))


def missing(source: str) -> dict[str, set[str]]:
    """What the docstrings of a file name that does not exist, by function and class."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, FUNCTIONS):
            found[node.name] = named(node, "Args") - parameters(node)
        elif isinstance(node, ast.ClassDef):
            made = [parameters(part) for part in node.body if isinstance(part, FUNCTIONS) and part.name == "__init__"]
            found[node.name] = named(node, "Attributes") - members(node)
            found[node.name] |= named(node, "Args") - (made[0] if made else members(node))
    return {name: wrong for name, wrong in found.items() if wrong}


@pytest.mark.parametrize("room", ROOMS)
def test_docstrings_name_what_exists(room):
    own = [path for path in FILES if path.is_relative_to(ROOT / room)]
    assert {str(path.relative_to(ROOT)): wrong for path in own if (wrong := missing(path.read_text()))} == {}


def test_names_that_do_not_exist_are_found():
    source = '''
class Part:
    """A part.

    Attributes:
        P, Q: factors.
        own: whether they agree.
        rank: a property; this is no name: of the text.
    """

    Q: int

    def __init__(self):
        self.P = 1

    @property
    def rank(self):
        """Columns."""


def form(low_rank, *args, **how):
    """A form.

    Args:
        smooth: what to take out.
        low_rank, **how: what is
            left: of it.
    """
'''
    assert missing(source) == {"Part": {"own"}, "form": {"smooth"}}
