"""``draw``: the pictures of a folder of results once more, from its tables and records; nothing is computed.

figureN.csv, also with an ending such as figureN_n10000.csv, is drawn as that figure; a Deep RFM's table of another name
as curves. Gram matrices are in no table: they come from the folder's runs, or the picture is left as it is.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reproduce import files, options, plots
from reproduce.figures import Family, Figure
from reproduce.pictures import PICTURES
from reproduce.runs import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing


class NotInTable(Exception):
    """A picture shows what its table does not hold; the message says what, and which command draws it."""


_CURVES = {"relu": "figure3", "cos": "figure4"}  # The figures that are curves, by feature map.


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    options.add_out(parser, "out")


def command(figures: Mapping[str, Figure], args: argparse.Namespace) -> int:
    """Draw a small .png beside every table, and name the tables that do not hold their picture; 0.

    Raises:
        ValueError: the folder has no table, or a damaged one.
    """
    plots.require()
    tables = sorted(args.out.glob("*.csv"))
    if not tables:
        raise ValueError(f"--out {args.out} holds no .csv of results; make some first: python -m reproduce figure3")
    for table in tables:
        try:
            drawn = drawing(table, figures)
        except NotInTable as error:
            print(f"left as it is: {table.with_suffix('.png')}: {error}")
            if table.with_suffix(".png").exists():
                plots.shrink(table.with_suffix(".png"))
            continue
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            reason = str(error) if type(error) is ValueError else repr(error)
            raise ValueError(f"{table} and its .json do not belong together or are damaged ({reason})") from error
        plots.save_small(drawn, table.with_suffix(".png"))
        print(f"wrote {table.with_suffix('.png')}")
    return 0


def drawing(table: Path, figures: Mapping[str, Figure]) -> Drawing:
    """The picture of a table.

    Raises:
        NotInTable: neither the table nor the folder's runs hold what it shows.
    """
    source = table.with_suffix(".json")
    if not source.exists():
        raise ValueError(f"{source.name} is not there; make the figure again, or move a table of your own elsewhere")
    lines, about = files.read_csv(table), files.read_json(source)
    if (picture := PICTURES.get(table.stem)) is not None:
        draw = getattr(picture, "drawing", None)
        if draw is None:
            raise NotInTable(f"it shows matrices, which no table holds: python -m reproduce {table.stem}")
        return draw(about["runs"][0]["settings"], lines)
    name = table.stem.partition("_")[0]
    if "runs" not in about:  # A run's own table of layers.
        figure = figures[_CURVES[about["settings"]["features"]]]
        run = Run(table.parent, figure.family.settings(**about["settings"]), {"layers": lines})
        return figure.family.draw(figure.kind, [[run]], figure.title)
    if name not in figures:
        name = _CURVES[lines[0]["features"]]
    figure, rows = figures[name], runs_of(figures[name].family, about["runs"], lines, table.parent)
    if figure.kind == "strips" and not all((row[0].folder / "gram.npz").exists() for row in rows):
        raise NotInTable(f"it shows Gram matrices, which no table holds: python -m reproduce {name}")
    return figure.family.draw(figure.kind, rows, figure.title)


def runs_of(
    family: Family, origins: Sequence[Mapping[str, Any]], lines: list[dict[str, str]], folder: Path
) -> list[list[Run]]:
    """A figure's runs by row, from its table, or complete from the folder's own runs where these are there."""
    tables: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for line in lines:
        tables.setdefault(tuple(line[key] for key in list(line)[:3]), []).append(line)  # data set, kind, seed
    if len(tables) != len(origins):
        raise ValueError(f"{len(tables)} runs in the table, {len(origins)} in its .json")
    rows: dict[str, list[Run]] = {}
    for origin, table in zip(origins, tables.values(), strict=True):
        settings, there = family.settings(**origin["settings"]), folder / origin["folder"]
        record = family.record_of(table)
        if (there / "record.json").exists():
            record = files.read_record(there / "record.json", origin["settings"], family.procedure.parts)
        alike = json.dumps({**origin["settings"], "seed": None}, sort_keys=True)
        rows.setdefault(alike, []).append(Run(there, settings, record))
    return list(rows.values())
