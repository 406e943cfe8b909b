"""What users hold on to: the signatures of everything that the reference names, and calls as a type checker sees them.

`python tests/test_public.py` writes tests/stored/public.txt anew.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
from pathlib import Path

import pytest
from fastagop.kernels.profile import Kernel

HERE = Path(__file__).parent
STORED = HERE / "stored/public.txt"
POLICY = (
    "what is public changes by a deprecation alone (docs/CONTRIBUTING.md): keep the old way for a minor version, with "
    "a DeprecationWarning and a line in the changelog; after that version take it out of tests/stored/public.txt"
)


def module_of(path: Path):
    """A file that is in no package."""
    spec = importlib.util.spec_from_file_location(f"fastagop_test_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def written(value) -> str:
    """A signature without annotations; defaults that Python cannot read again are ``...``."""
    parameters = []
    for one in inspect.signature(value).parameters.values():
        if one.name in ("self", "cls"):
            continue
        plain = one.replace(annotation=inspect.Parameter.empty)
        try:
            ast.parse(repr(one.default))
        except SyntaxError:
            if one.default is not inspect.Parameter.empty:
                plain = plain.replace(default=Ellipsis)
        parameters.append(plain)
    return str(inspect.Signature(parameters)).replace("=Ellipsis", "=...")


def surface() -> list[str]:
    """A line for everything public: functions, classes as they are made, their methods, and their properties."""
    found = set()
    for name, value in module_of(HERE.parent / ".ci/typed.py").public().items():
        error = inspect.isclass(value) and issubclass(value, BaseException)
        found.add(f"{name}{written(value)}" if callable(value) and not error else name)
        if error or not inspect.isclass(value):
            continue
        ours = [part for part in inspect.getmro(value) if part.__module__.startswith("fastagop")]
        attributes = {key for part in ours for key in vars(part) if not key.startswith("_")}
        if issubclass(value, Kernel):  # the rest is between a kernel and its backends
            attributes &= {"get_params", "set_params"}
        for attribute in attributes:
            member = inspect.getattr_static(value, attribute)
            if isinstance(member, property):
                found.add(f"{name}.{attribute}")
            elif "sklearn.utils._metadata" not in type(member).__module__:  # its requests are its own
                member = getattr(value, attribute)
                if inspect.isfunction(member) or inspect.ismethod(member):
                    found.add(f"{name}.{attribute}{written(member)}")
    return sorted(found)


def arguments(text: str) -> tuple[list[str], set[str], dict[str, str], bool]:
    """(what may go by position, all names, defaults by name, whether there are ``**``) of a signature."""
    of = ast.parse(f"def f{text}: ...").body[0].args
    ordered = [one.arg for one in (*of.posonlyargs, *of.args)]
    given = zip(ordered[len(ordered) - len(of.defaults) :], of.defaults, strict=True)
    named = zip((one.arg for one in of.kwonlyargs), of.kw_defaults, strict=True)
    defaults = {name: ast.unparse(value) for name, value in (*given, *named) if value is not None}
    return ordered, {*ordered, *(one.arg for one in of.kwonlyargs)}, defaults, of.kwarg is not None


def broken(old: list[str], new: list[str]) -> list[str]:
    """What of the old lines no longer holds."""
    now = {line.partition("(")[0]: line for line in new}
    found = []
    for line in old:
        name, bracket, rest = line.partition("(")
        if name not in now or ("(" in now[name]) != bool(bracket):
            found.append(f"{name} is gone")
        elif bracket:
            ordered, names, defaults, _ = arguments(bracket + rest)
            later, all_later, later_defaults, anything = arguments(now[name][len(name) :])
            found += [f"{name} has no {gone} any more" for gone in sorted(names - all_later) if not anything]
            if later[: len(ordered)] != ordered and names <= all_later:
                found.append(f"{name} takes {', '.join(ordered)} in another order")
            changed = [key for key, value in defaults.items() if key in all_later and later_defaults.get(key) != value]
            found += [f"{name} has another default of {key}" for key in changed]
            needed = all_later - names - later_defaults.keys()
            found += [f"{name} asks for {key}" for key in sorted(needed)]
    return found


def test_nothing_public_breaks():
    pytest.importorskip("xrfm")  # FastKernel is there with xRFM alone
    old, new = STORED.read_text().splitlines(), surface()
    assert broken(old, new) == [], POLICY
    added = sorted(set(new) - set(old))
    assert added == [], "new, and promised from now on: python tests/test_public.py, and a line in the changelog"


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("f(a)", "g(a)", "f is gone"),
        ("f(a)", "f", "f is gone"),
        ("f(a, b=1)", "f(a)", "f has no b any more"),
        ("f(a, b=1)", "f(a, *, b=1)", "f takes a, b in another order"),
        ("f(a, b=1)", "f(a, c=0, b=1)", "f takes a, b in another order"),
        ("f(a, *, b=1)", "f(a, *, b=2)", "f has another default of b"),
        ("f(a, b=1)", "f(a, b)", "f has another default of b"),
        ("f(a)", "f(a, b)", "f asks for b"),
    ],
)
def test_breaks_are_found(old, new, what):
    assert broken([old], [new]) == [what]


@pytest.mark.parametrize("new", ["f(a, b=1, c=2)", "f(a, b=1, *, c=2)", "f(a, b=1, **more)"])
def test_additions_are_not(new):
    assert broken(["f(a, b=1)"], [new, "g(a)"]) == []


def test_what_type_checks_runs(tmp_path):
    module_of(HERE / "typed_api.py").run(tmp_path)


if __name__ == "__main__":
    STORED.write_text("".join(f"{line}\n" for line in surface()))
