"""Whether what is exported is typed to the last parameter: pyright's own verdict on every name of the reference.

``make types`` runs it on build/types, where the packages lie as they install. pyright --verifytypes judges every
module; what counts is what docs/pages/api.md names, the attributes of it, and the classes that it derives from.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Said of a class alone whose base is of a library without types, such as xRFM.
FOREIGN = ("Type of metaclass unknown", "Type of base class unknown")


def public() -> dict[str, object]:
    """What the reference shows, by the name that it goes by there."""
    found = {}
    text = (ROOT / "docs/pages/api.md").read_text()
    for path, options in re.findall(r"^::: ([\w.]+)\n((?: .*\n)*)", text, re.MULTILINE):
        names = path.split(".")
        module = next(cut for cut in range(len(names), 0, -1) if importable(".".join(names[:cut])))
        try:
            value = functools.reduce(getattr, names[module:], importlib.import_module(".".join(names[:module])))
        except AttributeError:  # an integration with a library that is not here; tests/test_docs.py finds wrong names
            continue
        if inspect.ismodule(value):
            (members,) = re.findall(r"members: \[(.*)\]", options)
            found |= {f"{path}.{name}": getattr(value, name) for name in members.split(", ")}
        else:
            found[path] = value
    return found


def importable(name: str) -> bool:
    """Whether a module of that name is there."""
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def homes(found: dict[str, object]) -> set[str]:
    """Where those are defined, and where the classes that they derive from are."""
    names = set()
    for path, value in found.items():
        parts = inspect.getmro(value) if inspect.isclass(value) else (value,)
        own = [part for part in parts if getattr(part, "__module__", "").startswith("fastagop")]
        names |= {f"{part.__module__}.{part.__qualname__}" for part in own if hasattr(part, "__qualname__")} or {path}
    return names


def symbols() -> list[dict]:
    """pyright's verdict on every symbol of the package."""
    path = os.pathsep.join(str(ROOT / folder) for folder in ("build/types", ".ci/stubs"))
    words = ["--verifytypes", "fastagop", "--ignoreexternal", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run(
        [sys.executable, "-m", "pyright", *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT / "build",
        env={**os.environ, "PYTHONPATH": path},
    )
    return json.loads(done.stdout)["typeCompleteness"]["symbols"]


def strict() -> bool:
    """Whether tests/typed_api.py passes in strict mode, as in a project of its own that has the packages installed."""
    project = ROOT / "build/user"
    project.mkdir(exist_ok=True)
    shutil.copy(ROOT / "tests/typed_api.py", project)
    (project / "pyrightconfig.json").write_text('{"pythonVersion": "3.10", "extraPaths": ["../types"]}')
    words = ["--project", project, "--pythonpath", sys.executable]
    return subprocess.run([sys.executable, "-m", "pyright", *words], check=False).returncode == 0


def main() -> int:
    """Say what is not typed; 1 where something is not."""
    passed = strict()
    names, judged, wrong = homes(public()), 0, []
    for symbol in symbols():
        name = symbol["name"]
        if name not in names and name.rpartition(".")[0] not in names:
            continue
        judged += 1
        said = [one["message"] for one in symbol["diagnostics"]]
        if (not symbol["isTypeKnown"] or symbol["isTypeAmbiguous"]) and not (said and set(said) <= set(FOREIGN)):
            wrong.append(f"{name}: {'; '.join(said) or 'of a part of it'}")
    print(*wrong, f"{judged - len(wrong)} of {judged} exported symbols are typed", sep="\n")
    return 0 if passed and not wrong and judged >= len(names) else 1


if __name__ == "__main__":
    sys.exit(main())
