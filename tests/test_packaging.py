"""The wheel and the editable install, each in a fresh place, beside a foreign package named kernels."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOT_SOURCE = shutil.ignore_patterns(
    ".git",
    ".venv",
    ".*cache*",
    ".hypothesis",
    ".benchmarks",
    "__pycache__",
    "build",
    "dist",
    "out",
    "data",
    "*.egg-info",
)
CHECK = """
import sys, torch
torch.set_num_threads(1)
import fastagop, fastagop.kernels.torch_backend.distance, kernels
X = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
M = fastagop.agop(fastagop.Laplace(2.0), X, X)
assert M.shape == (3, 3) and bool(M.isfinite().all()) and float(M.trace()) > 0
from fastagop.deep_rfm.estimator import DeepRFMClassifier
from importlib.metadata import version
assert version("fastagop") == fastagop.__version__
print(fastagop.__file__)
print(fastagop.kernels.__file__)
print(kernels.WHO, kernels.__file__)
"""


def run(*words, cwd, **environment):
    """Run a command outside the checkout; its output, or the test's failure."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**clean, "OMP_NUM_THREADS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def isolated() -> bool:
    """Whether the build needs an environment of its own: when this one's setuptools is too old, or missing."""
    try:
        return int(importlib.metadata.version("setuptools").split(".")[0]) < 77
    except importlib.metadata.PackageNotFoundError:
        return True


def test_the_citation_names_this_version():
    (named,) = re.findall(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    (built,) = re.findall(r'^version = "(\S+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert named == built


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the source tree: building leaves traces."""
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("copy") / "fastagop", ignore=NOT_SOURCE))


def test_a_checkout_works_as_it_lies(source):
    """Whatever is installed: a Python in its folder finds the package there, and the kernels beside it."""
    code = "import fastagop.kernels.torch_backend.distance; print(fastagop.__file__, fastagop.kernels.__file__)"
    found = run(sys.executable, "-c", code, cwd=source).split()
    assert found == [str(source / name / "__init__.py") for name in ("fastagop", "kernels")]


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    if importlib.util.find_spec("build") is not None and not isolated():
        run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source, cwd=out)
    else:
        run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", out, source, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture
def place(tmp_path):
    """(python, site-packages) of a new virtual environment with a foreign top-level package named kernels."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=False, system_site_packages=False)
    python = home / ("Scripts" if os.name == "nt" else "bin") / "python"
    words = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(python, "-I", "-c", words, cwd=tmp_path).strip())
    assert site.is_dir()
    foreign = site / "kernels"
    foreign.mkdir()
    (foreign / "__init__.py").write_text('WHO = "foreign"\n')
    return python, site


def install(python: Path, *what, tmp_path: Path):
    """pip of this environment, installing into that one; torch and the rest are not visible while it does."""
    words = ["--no-deps", "--no-index" if not isolated() else "--no-cache-dir"]
    tools = tmp_path / "tools"  # setuptools alone, where the build is not isolated
    tools.mkdir()
    if not isolated():
        words.append("--no-build-isolation")
        home = Path(sysconfig.get_path("purelib"))
        for name in ("setuptools", "pkg_resources", "_distutils_hack", *(p.name for p in home.glob("setuptools-*"))):
            if (home / name).exists():
                (tools / name).symlink_to(home / name)
    pip = [sys.executable, "-m", "pip", "--python", python]
    run(*pip, "install", "--quiet", *words, *what, cwd=tmp_path, PYTHONPATH=str(tools))


def borrow(site: Path) -> None:
    """Make torch, numpy and the rest importable; lines of a .pth add paths, and run no other .pth files there."""
    here = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "borrowed.pth").write_text("\n".join(sorted(here)) + "\n")


def test_wheel_contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        metadata = archive.read(next(n for n in names if n.endswith(".dist-info/METADATA"))).decode()
        tops = archive.read(next(n for n in names if n.endswith("top_level.txt"))).decode().split()
    info = next(name for name in names if name.endswith("/WHEEL")).removesuffix("/WHEEL")
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "fastagop").rglob("*.py")}
    expected |= {f"fastagop/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob("*.py")}
    expected |= {"fastagop/py.typed"}
    expected |= {f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "top_level.txt", "licenses/LICENSE")}
    assert names == expected  # and so no top-level kernels, tests, bench or reproduce
    assert tops == ["fastagop"]
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "License-Expression: MIT" in metadata
    for line in ("Name: fastagop", "Requires-Python: >=3.10", "Requires-Dist: torch>=2.6"):
        assert line in metadata


def test_sdist_is_the_checkout(source, tmp_path):
    """Its tests run, and its README's links lead somewhere."""
    if importlib.util.find_spec("build") is None or isolated():
        pytest.skip("needs build, and setuptools to build with")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, source, cwd=tmp_path)
    (built,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(built) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    rooms = ("fastagop", "kernels", "bench", "reproduce", "tests", "docs")
    expected = {
        str(path.relative_to(source)) for room in rooms for path in (source / room).rglob("*") if path.is_file()
    }
    expected |= {"CITATION.cff", "LICENSE", "Makefile", "README.md", "pyproject.toml"}
    assert expected - names == set()


def test_wheel_installs_beside_a_foreign_kernels(wheel, place, tmp_path):
    python, site = place
    install(python, wheel, tmp_path=tmp_path)
    borrow(site)
    mine, rooms, foreign = run(python, "-I", "-c", CHECK, cwd=tmp_path).splitlines()
    assert Path(mine) == site / "fastagop" / "__init__.py"
    assert Path(rooms) == site / "fastagop" / "kernels" / "__init__.py"
    assert foreign == f"foreign {site / 'kernels' / '__init__.py'}"


def test_editable_install_beside_a_foreign_kernels(source, place, tmp_path):
    python, site = place
    install(python, "--editable", source, tmp_path=tmp_path)
    borrow(site)
    mine, rooms, foreign = run(python, "-I", "-c", CHECK, cwd=tmp_path).splitlines()
    assert Path(mine) == source / "fastagop" / "__init__.py"
    assert Path(rooms) == source / "kernels" / "__init__.py"
    assert foreign == f"foreign {site / 'kernels' / '__init__.py'}"
