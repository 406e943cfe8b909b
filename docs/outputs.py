"""What a page's Python blocks print: run in their order, as a reader would enter them, and shown below each block."""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import tempfile
import warnings
from pathlib import Path

_BLOCK = re.compile(r"^```python\n(.*?)^```$\n?", re.DOTALL | re.MULTILINE)


def with_outputs(markdown: str, page: str) -> str:
    """The page with the output of each block below it; files that blocks write go to a folder that is removed.

    Raises:
        RuntimeError: naming the page and the block that failed.
    """
    names: dict = {"__name__": "__main__"}
    with tempfile.TemporaryDirectory() as folder, _inside(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _BLOCK.sub(lambda found: found[0] + _shown(output(found[1], names, page)), markdown)


def output(code: str, names: dict, page: str) -> str:
    """What a block prints, and the value of its last line where that is an expression, as Python's prompt shows it."""
    tree = ast.parse(code)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
            exec(compile(tree, page, "exec"), names)
            if last is not None:
                value = eval(compile(ast.Expression(last.value), page, "eval"), names)
                print(repr(value) if value is not None else "", end="")
    except Exception as error:
        raise RuntimeError(f"a block of {page} fails with {error!r}:\n{code}") from error
    return printed.getvalue().rstrip()


def _shown(printed: str) -> str:
    return f'\n```text title="Output"\n{printed}\n```\n' if printed else ""


@contextlib.contextmanager
def _inside(folder: str):
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
