"""Builds wheel and sdist of what is committed, looks them over, and tests the wheel where it will live: `make release`.

For every Python that pyproject.toml names and for the lowest and the newest torch there is a fresh environment outside
the checkout, which is deleted before the next one is made: torch and its CUDA libraries take 5 GB. On the oldest Python
"lowest" means the lowest declared version of everything that a user installs, on the others of torch alone.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
TORCH = ("lowest", "newest")
# Extras of those who work on the library: their lowest versions promise nothing.
TOOLS = ("test", "docs", "dev", "bench", "release")
# Files of tests that need nothing of the checkout but tests/, for every area and most of all for what leans on torch's
# and scikit-learn's own ways.
TESTS = (
    *("agop", "autograd", "collapse_measures", "contract", "convolution", "errors", "estimators", "gradients"),
    *("inputs", "integrations", "kernel_matrix", "linalg", "module", "network", "plots", "probes", "rfm"),
    *("rfm_search", "saved_state", "saving", "solution", "solve", "spectrum"),
)
# What an environment holds, and that the library is the installed one.
LOOK = """
import pathlib, sys, fastagop, numpy, sklearn, torch
assert pathlib.Path(fastagop.__file__).is_relative_to(sys.prefix), fastagop.__file__
print(*(f"{module.__name__} {module.__version__}" for module in (fastagop, torch, numpy, sklearn)), sep=", ")
"""


def run(*words: object, folder: Path, log: Path | None = None) -> str:
    """Run a command on one thread, with nothing of this process's environment on its path; its output."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(word) for word in words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        cwd=folder,
        env={**clean, "OMP_NUM_THREADS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    if log is not None:
        log.write_text(done.stdout)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, words[:6]))} failed:\n{done.stdout[-3000:]}")
    return done.stdout


def build(folder: Path) -> Path:
    """The wheel: built, with the sdist, of the last commit into dist/, and passed by twine and check-wheel-contents."""
    if changed := run("git", "status", "--porcelain", folder=ROOT):
        print(f"not committed, and so not in what is built:\n{changed}", end="")
    run("git", "archive", "--output", folder / "commit.tar", "HEAD", folder=ROOT)
    with tarfile.open(folder / "commit.tar") as archive:
        archive.extractall(folder / "commit")
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", ROOT / "dist", folder / "commit", folder=folder)
    built = sorted((ROOT / "dist").iterdir())
    print(run(sys.executable, "-m", "twine", "--no-color", "check", "--strict", *built, folder=folder), end="")
    (wheel,) = (ROOT / "dist").glob("*.whl")
    print(run(sys.executable, "-m", "check_wheel_contents", wheel, folder=folder), end="")
    return wheel


def requirements(wheel: Path) -> list[Requirement]:
    """What the wheel says that users need, with and without its extras."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = archive.read(name).decode().split("\n\n")[0]
    found = [Requirement(line) for line in re.findall(r"^Requires-Dist: (.+)$", text, re.MULTILINE)]
    return [one for one in found if not any(f'"{tool}"' in str(one.marker) for tool in TOOLS)]


def lowest(wheel: Path, everything: bool) -> list[str]:
    """Constraints that pin torch, or all that users need, to the lowest declared version."""
    pins = {one.name: one.specifier for one in requirements(wheel) if everything or one.name == "torch"}
    return [
        f"{name}=={spec.version}" for name, specifiers in pins.items() for spec in specifiers if spec.operator == ">="
    ]


def interpreter(version: str) -> str:
    """A Python of this version, such as "3.12": on the path or one of pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for path in (f"python{version}", *sorted(pyenv.glob(f"{version}.*/bin/python"))):
        try:
            done = subprocess.run([path, "-V"], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            continue
        if done.stdout.startswith(f"Python {version}."):
            return str(path)
    raise RuntimeError(f"no python{version} on the path or in {pyenv}; install it, or leave it out with --python")


def test(wheel: Path, version: str, torch: str, everything: bool, folder: Path) -> str:
    """Install the wheel into a fresh environment and run the tests there; what was there and what passed."""
    home, started = folder / f"{version}-{torch}", time.monotonic()
    home.mkdir()
    (home / "constraints").write_text("\n".join(lowest(wheel, everything) if torch == "lowest" else []))
    run(interpreter(version), "-m", "venv", home / "venv", folder=home)
    python = home / "venv/bin/python"
    pip = [python, "-m", "pip", "install", "--quiet", "--no-compile", "--constraint", home / "constraints"]
    run(*pip, f"{wheel}[test]", folder=home, log=folder / f"{version}-{torch}.install")
    shutil.copytree(folder / "commit/tests", home / "tests")
    shutil.copy(folder / "commit/pyproject.toml", home)  # pytest's settings
    installed, seconds = run(python, "-c", LOOK, folder=home).splitlines()[-1], time.monotonic() - started
    files = [f"tests/test_{name}.py" for name in TESTS]
    words = [python, "-m", "pytest", "--quiet", "-p", "no:cacheprovider", "-m", "not slow", *files]
    passed = run(*words, folder=home, log=folder / f"{version}-{torch}.tests").splitlines()[-1]
    shutil.rmtree(home)
    return f"{installed}: {passed} (installed in {seconds:.0f} s)"


def main() -> int:
    """Build, look over, test; 1 where an environment's tests did not pass."""
    text = (ROOT / "pyproject.toml").read_text()
    named = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', text)
    parser = argparse.ArgumentParser(prog="make release", description=__doc__.split("\n")[0])
    parser.add_argument("--python", nargs="+", default=named, help=f"versions; default: {' '.join(named)}")
    parser.add_argument("--torch", nargs="+", choices=TORCH, default=TORCH)
    options, failed = parser.parse_args(), 0
    with tempfile.TemporaryDirectory(prefix="fastagop-release-") as place:
        folder = Path(place)
        wheel = build(folder)
        for version in options.python:
            for torch in options.torch:
                try:
                    found = test(wheel, version, torch, version == named[0], folder)
                except RuntimeError as error:
                    failed, found = failed + 1, f"FAILED\n{error}"
                    shutil.rmtree(folder / f"{version}-{torch}", ignore_errors=True)
                print(f"Python {version}, {torch} torch: {found}", flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
