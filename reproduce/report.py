"""``report``: one HTML page of whatever lies in a folder of results, beside what the paper says of each figure.

The page is one file: pictures are inside it, it fetches nothing, and a browser's dark mode is followed.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from reproduce import files, layers, options, runs
from reproduce.deep_rfm_figures import FAMILY, lesson
from reproduce.settings import Settings

NAME = "report.html"
TEXTS = {  # Commands that print, and what their sections are called.
    "theory": "Proposition A.1 and theorems 4.3 and 4.4 against numbers",
    "nfa_table": "The neural feature ansatz and collapse in a small network trained on digits",
}
_SHOWN = ("dataset", "features", "network", "kernel", "n", "depth", "width", "epochs", "dtype", "seed")
_STYLE = """
:root { color-scheme: light dark; --edge: #8886; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-top: 1px solid var(--edge); padding-top: 1rem; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
blockquote { margin: .5rem 0; padding: .2rem 1rem; border-left: 3px solid var(--edge); }
.wide { overflow-x: auto; } pre { font-size: 12px; background: var(--soft); padding: .7rem; }
table { border-collapse: collapse; font-size: 14px; } td, th { padding: .15rem .7rem .15rem 0; text-align: left; }
"""


class Shown(Protocol):
    """What the page says of a picture: its title, and what its source says that one sees."""

    @property
    def title(self) -> str:
        """The title."""
        ...

    @property
    def shows(self) -> str:
        """The message."""
        ...

    @property
    def reads_data(self) -> bool:
        """Whether it reads a data set."""
        ...

    @property
    def has_runs(self) -> bool:
        """Whether it is made of runs, one or more a data set, that are resumed and keep checkpoints."""
        ...


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    options.add_out(parser, "out")


def command(figures: Mapping[str, Shown], args: argparse.Namespace) -> int:
    """Write the page and say where."""
    print(f"wrote {write(args.out, figures)}")
    return 0


def write(out: Path, figures: Mapping[str, Shown]) -> Path:
    """The page of a folder of results.

    Raises:
        ValueError: the folder has no result, or names a damaged one.
    """
    made = [name for name in figures if (out / f"{name}.json").exists()]
    texts = [name for name in TEXTS if (out / f"{name}.txt").exists()]
    unfinished = _unfinished(out)
    if not (made or texts or unfinished):
        raise ValueError(f"{out} holds no results; make some first, for example with: python -m reproduce all --quick")
    parts = [_whole(out / f"{name}.json", _figure, name, figures[name], out) for name in made]
    parts += [_section(TEXTS[name], _pre((out / f"{name}.txt").read_text())) for name in texts]
    parts += [_whole(folder, _under_way, folder) for folder in unfinished]
    if missing := [name for name in figures if name not in made]:
        parts.append(_section("Not made yet", _list(f"python -m reproduce {name}" for name in missing)))
    title = "Average gradient outer product as a mechanism for deep neural collapse, redone"
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    intro = _paragraph(
        "Each section has what the paper (Beaglehole, Súkeník, Mondelli, Belkin, NeurIPS 2024) says that one sees, "
        "what these runs show, and the settings that they were made with."
    )
    page = f"<!doctype html>\n<html lang='en'><head>{head}<style>{_STYLE}</style></head><body>"
    page += f"<h1>{title}</h1>{intro}{''.join(parts)}</body></html>\n"
    files.write(out / NAME, page)
    return out / NAME


def _whole(path: Path, section: Callable[..., str], *arguments: Any) -> str:
    """A section that is made of a file or a folder, whose damage is named."""
    try:
        return section(*arguments)
    except (LookupError, TypeError, AttributeError, ValueError, FileNotFoundError) as error:
        if str(path) in str(error) and not isinstance(error, OSError):
            raise
        reason = error if isinstance(error, OSError) else repr(error)
        raise ValueError(f"{path} is damaged or of another program ({reason}); remove it and run it again") from error


def _figure(name: str, figure: Shown, out: Path) -> str:
    about = files.read_json(out / f"{name}.json")
    said = f"<blockquote>Paper: {html.escape(figure.shows)}.</blockquote>"
    found = _list(f"Here: {text}." for text in about.get("lessons", []))
    picture = out / f"{name}.png"
    image = _image(picture.read_bytes(), figure.title) if picture.exists() else _paragraph(f"{name}.png is not here.")
    lacking = _list(f"Not drawn: {text}" for text in about.get("missing", []))
    links = [path for path in (out / f"{name}{suffix}" for suffix in (".csv", ".json", ".pdf")) if path.exists()]
    linked = " ".join(f'<a href="{path.name}">{path.name}</a>' for path in links)
    title = figure.title.replace("$", "")
    title = f"Figure {name.removeprefix('figure')}. {title}" if name.startswith("figure") else title
    body = said + found + image + _runs(about["runs"]) + lacking + f"<p>{linked}</p>"
    return _section(title, body)


def _runs(origins: Sequence[Mapping[str, Any]]) -> str:
    """A line a run: its settings, seconds, chip and date."""
    rows = []
    for origin in origins:
        settings, environment = origin["settings"], origin.get("environment", {})
        cells = {key: settings[key] for key in _SHOWN if settings.get(key) is not None}
        cells["seconds"] = f"{origin.get('seconds', float('nan')):.0f}"
        cells |= {"computed on": environment.get("device", ""), "date": str(environment.get("date", ""))[:10]}
        rows.append(cells)
    return _table(rows)


def _unfinished(out: Path) -> list[Path]:
    """Folders of Deep RFM runs that have layers and are not complete."""
    tables = sorted((out / "runs").glob("*/layers.csv")) if (out / "runs").is_dir() else []
    return [path.parent for path in tables if not runs.is_complete(path.parent) and files.read_csv(path)]


def _under_way(folder: Path) -> str:
    """The layers that a run has so far, as the curves of its figure and as numbers."""
    rows = files.read_csv(folder / "layers.csv")
    settings = Settings(**files.read_json(folder / "settings.json")["settings"])
    run = runs.Run(folder, settings, {"layers": rows})
    drawn = io.BytesIO()
    FAMILY.draw("curves", [[run]], settings.title).savefig(drawn, format="png", dpi=150)
    columns = ("layer", "nc1_projected", "nc2_projected", "method", "jitter", "residual", "seconds")
    shown = [{key: _short(row[key]) for key in columns} for row in rows]
    body = _paragraph(f"{len(rows)} of {settings.depth} layers: {lesson(rows)}.") + _paragraph(str(settings))
    return _section(f"Under way: {settings.title}", body + _image(drawn.getvalue(), settings.title) + _table(shown))


def _short(cell: str) -> str:
    try:
        return f"{layers.number(cell):.3g}" if cell else ""
    except ValueError:
        return cell


def _section(title: str, body: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>"


def _paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def _pre(text: str) -> str:
    return f'<div class="wide"><pre>{html.escape(text)}</pre></div>'


def _list(texts: Iterable[str]) -> str:
    items = "".join(f"<li>{html.escape(text)}</li>" for text in texts)
    return f"<ul>{items}</ul>" if items else ""


def _image(content: bytes, text: str) -> str:
    data = base64.b64encode(content).decode()
    return f'<img alt="{html.escape(text.replace("$", ""))}" src="data:image/png;base64,{data}">'


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    lines = ("".join(f"<td>{html.escape(str(row.get(name, '')))}</td>" for name in names) for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'
