"""The documentation's site: it builds strictly, and in headless Chromium nothing is cut at 1400 or 390 pixels."""

from __future__ import annotations

import functools
import html as html_text
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import fastagop

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "docs/mkdocs.yml"
PAGES = sorted((ROOT / "docs/pages").glob("*.md"))
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
WIDTHS = (1400, 390)
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"),
]
pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="the docs' tools need Python 3.11")
# One page that opens all others in frames of each width, and writes down how wide they and what cuts their text are.
MEASURE = """<!doctype html><body><script>
const pages = PAGES, widths = WIDTHS, found = [];
async function measure(page, width) {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width:${width}px;height:900px;border:0`;
  await new Promise(done => { frame.onload = done; frame.src = page; document.body.append(frame); });
  await new Promise(done => setTimeout(done, 150));
  const root = frame.contentDocument.documentElement;
  const cut = [...root.querySelectorAll("pre > code")].filter(code => code.scrollWidth > code.clientWidth + 1);
  const wide = [...root.querySelectorAll(".formula")].filter(formula => formula.scrollWidth > formula.clientWidth + 1);
  const texts = [...cut, ...wide].map(part => part.textContent.slice(0, 60));
  found.push({page, width, scrolls: root.scrollWidth, cut: texts, formulas: root.querySelectorAll("math").length});
  frame.remove();
}
(async () => {
  for (const page of pages) for (const width of widths) await measure(page, width);
  document.body.dataset.found = JSON.stringify(found);
  document.title = "measured";
})();
</script></body>"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site; a broken link, anchor, name or docstring section fails, and so does an example."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(CONFIG), "-d", str(folder)]
    one = {**os.environ, "OMP_NUM_THREADS": "1"}  # what runs beside this has the other cores
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=one)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def address(site):
    """Where the site is served."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=site)
    handler.func.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_site(site, request, tmp_path):
    """One test, so that one process builds it once."""
    has_everything_and_fetches_nothing(site)
    if CHROMIUM is None:
        pytest.skip("the site is whole; Chromium, which would look at it, is not installed here")
    nothing_is_cut_or_fails_in_a_browser(site, request.getfixturevalue("address"), tmp_path)


def has_everything_and_fetches_nothing(site):
    for page in PAGES:
        html = (site / page.name).with_suffix(".html").read_text()
        assert f"fastagop {fastagop.__version__}" in html.split('class="md-copyright"')[1]
        assert 'class="arithmatex"' not in html
        assert not re.findall(r"<(?:script|img|iframe)[^>]+src=\"?(?:https?:)?//", html)
        assert not [tag for tag in re.findall(r"<link[^>]+>", html) if "stylesheet" in tag and "//" in tag]
    html = (site / "api.html").read_text()
    for name in set(fastagop.__all__) - {"explain"}:
        assert f'id="fastagop.{name}"' in html, name
    assert 'id="fastagop.explain.explain"' in html
    measured = (site / "benchmarks.html").read_text()
    names = re.findall(r"<!-- table (\w+) -->", (ROOT / "docs/pages/benchmarks.md").read_text())
    assert {"agop_cpu", "network_cpu", "cg_cpu", "keops_cpu", "operations_cpu"} <= set(names)
    for plot in ("agop_time", "roofline"):  # once in the repository, twice on the site's pages
        assert f'src="results/{plot}.png"' in (site / "gallery.html").read_text()
        assert f'src="results/{plot}.png"' in measured
        assert (site / "results" / f"{plot}.png").stat().st_size > 5000
    for name in names:
        assert f"the file is <code>bench/results/{name}.json" in measured
    assert ">Output</span>" in (site / "index.html").read_text()


def nothing_is_cut_or_fails_in_a_browser(site, address, tmp_path):
    pages = sorted(path.name for path in site.glob("*.html") if path.name != "404.html")
    measure = MEASURE.replace("PAGES", json.dumps(pages)).replace("WIDTHS", json.dumps(WIDTHS))
    (site / "measure.htm").write_text(measure)
    budget = f"--virtual-time-budget={1000 * len(pages) * len(WIDTHS)}"
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path}", budget, "--dump-dom", f"{address}/measure.htm"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    (found,) = re.findall(r'data-found="([^"]*)"', done.stdout)
    measured = json.loads(html_text.unescape(found))
    assert len(measured) == len(pages) * len(WIDTHS)
    assert [entry for entry in measured if entry["scrolls"] > entry["width"] or entry["cut"]] == []
    assert {entry["page"] for entry in measured if entry["formulas"]} >= {
        "index.html",
        "deep_rfm.html",
        "measures.html",
    }
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line and "error" in line.lower()] == []
