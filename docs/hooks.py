"""What mkdocs does beside reading pages: packages laid out as they install, measured tables, pictures, formulas."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
from pathlib import Path

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).parent))
import mathml  # noqa: E402
import outputs  # noqa: E402

import fastagop  # noqa: E402

SOURCE = ROOT / "build" / "docs_source"
_TABLE = re.compile(r"<!-- table (\w+) -->\n\*The site shows .*")  # what a page says where no site is built


@event_priority(100)  # before mkdocstrings looks where its paths lead
def on_config(config):
    """Copy kernels into a copy of fastagop: mkdocstrings reads files and follows folders, not package-dir."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    unwanted = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "fastagop", SOURCE / "fastagop", ignore=unwanted)
    shutil.copytree(ROOT / "kernels", SOURCE / "fastagop" / "kernels", ignore=unwanted)
    config.copyright = version(fastagop.__version__, (ROOT / "docs/pages/changelog.md").read_text())
    return config


def version(number: str, changelog: str) -> str:
    """What the foot of every page says: the version that it documents, and where to read what has changed."""
    _, *unreleased = re.split(r"^## Unreleased\n+(?!## )", changelog, flags=re.MULTILINE)
    more = " and what is not released yet" if unreleased else ""
    return f'fastagop {number}{more}: <a href="changelog.html">what has changed</a>'


def on_files(files, config):
    """Bring the measured plots along."""
    for plot in (*sorted((ROOT / "bench/results").glob("*.png")), *sorted((ROOT / "reproduce/results").glob("*.png"))):
        files.append(File.generated(config, f"results/{plot.name}", abs_src_path=str(plot)))
    return files


def on_page_markdown(markdown: str, page, **_) -> str:
    """Show what blocks print, and replace ``<!-- table name -->`` by what bench/results/name.json holds.

    Plots lie in results/ here.
    """
    markdown = outputs.with_outputs(markdown, page.file.src_uri)
    return re.sub(
        r"\.\./\.\./(?:bench|reproduce)/results/", "results/", _TABLE.sub(lambda found: table(found[1]), markdown)
    )


def on_page_content(html: str, page, **_) -> str:
    """Write formulas as MathML."""
    return mathml.with_mathml(html, page.file.src_uri)


def table(name: str) -> str:
    """A committed result as a Markdown table, written by the module of bench that measured it, and its machine."""
    read = json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text())
    machine = read["machine_info"]["fastagop"] if "machine_info" in read else read["machine"]
    where = f"{machine['processor']}, threads: {machine['threads']}, torch {machine['versions']['torch']}"
    measured = [read[key] for key in ("rows", "memory") if key in read]
    maker = importlib.import_module("bench.report" if "benchmarks" in read else f"bench.{name}")
    rows = maker.table(*measured) if measured else maker.table(maker.rows(read))
    return f"{rows}\n\nMeasured {machine['date']} on {where}; the file is `bench/results/{name}.json`."
