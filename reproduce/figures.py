"""A figure of the paper, whatever family of experiments it shows: compute its runs, draw it, record its numbers."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reproduce import files, options, plots, runs
from reproduce.runs import Procedure, Run
from reproduce.settings import POINTS, Experiment, RunLocation

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

Row = tuple[str, str]  # A data set, and what is run on it: a feature map or a network.
Runs = Sequence[Sequence[Run]]  # There is one list a row of the figure; its runs differ in their seed only.


@dataclass(frozen=True)
class Family:
    """What the figures of a family of experiments have in common."""

    procedure: Procedure
    add_options: Callable[[argparse.ArgumentParser], None]
    paper: Callable[..., Experiment]  # It takes a row, a seed and the options below; it gives the run's settings.
    options: tuple[str, ...]
    seeds: tuple[int, ...]  # These are used where --seeds is not given, the first alone with --quick.
    draw: Callable[[str, Runs, str], Drawing]  # It takes the figure's kind, its runs and its title.
    csv_lines: Callable[[Run], list[dict[str, Any]]]
    record_of: Callable[[list[dict[str, str]]], dict[str, Any]]  # It takes a run's csv_lines; it gives what is drawn.
    settings: type[Any]  # This is the class of the runs' settings.
    recorded: tuple[str, ...]  # These keys of a run's record enter the figure's .json, where the record has them.
    lessons: Callable[[Runs], list[str]] = lambda _: []  # They are printed below the tables.
    # It takes the rows and the options, and refuses an option that none of the rows can use.
    check: Callable[[Sequence[Row], argparse.Namespace], None] = lambda rows, args: None


@dataclass(frozen=True)
class Figure:
    """A figure's family, rows and title, the kind of drawing, which the family's ``draw`` knows, and its message."""

    family: Family
    kind: str
    rows: tuple[Row, ...]
    title: str
    shows: str  # This is what the paper says that one sees.

    @property
    def reads_data(self) -> bool:
        """Whether it reads a data set, as every figure of the paper does."""
        return True

    @property
    def has_runs(self) -> bool:
        """Whether it is made of runs, as every figure of the paper is."""
        return True

    @property
    def description(self) -> str:
        """The title and the data sets, for the command line's help."""
        return f"{self.title}: {', '.join(dict.fromkeys(dataset for dataset, _ in self.rows))}".replace("$", "")


def settings_of(family: Family, row: Row, args: argparse.Namespace) -> list[Any]:
    """The settings of a row's runs, one a seed."""
    changes = {name: getattr(args, name) for name in family.options}
    seeds = args.seeds or (family.seeds[:1] if args.quick else family.seeds)
    return [family.paper(*row, seed=seed, **changes) for seed in dict.fromkeys(seeds)]


def make(name: str, figure: Figure, args: argparse.Namespace) -> int:
    """Compute what is missing, draw, and say what was written and which rows lack their data; 0.

    Raises:
        FileNotFoundError: where every row's data are missing.
    """
    plots.require()
    location, family = options.run_location(args), figure.family
    family.check(rows_of(figure.rows, args.dataset), args)
    rows, missing = present(figure, args, location)
    done = [[runs.run(family.procedure, settings, location) for settings in row] for row in rows]
    written = plots.save(family.draw(figure.kind, done, figure.title), args.out / name)
    written += record(family, done, args.out / name, missing.values())
    for lesson in family.lessons(done):
        print(f"\n{lesson}")
    print(f"\nwrote {', '.join(map(str, written))}")
    for message in missing:
        print(f"not drawn: {message}")
    return 0


def rows_of(rows: tuple[Row, ...], datasets: Sequence[str]) -> tuple[Row, ...]:
    """A figure's rows (data set, kind), or those of some data sets; one it does not show gets each of its kinds.

    Raises:
        ValueError: two files of one name, by which tables tell data sets apart.
    """
    datasets = list(dict.fromkeys(datasets))
    for name in (names := [Path(dataset).stem for dataset in datasets]):
        if names.count(name) > 1:
            alike = " and ".join(dataset for dataset in datasets if Path(dataset).stem == name)
            raise ValueError(f"--dataset must be files of different names, got {alike}; rename one of them")
    kinds = dict.fromkeys(kind for _, kind in rows)
    groups = [[row for row in rows if row[0] == dataset] or [(dataset, kind) for kind in kinds] for dataset in datasets]
    return tuple(row for group in groups for row in group) or rows


def present(figure: Figure, args: argparse.Namespace, location: RunLocation) -> tuple[list[list[Any]], dict[str, str]]:
    """(settings of the rows whose data are there, what is missing for the others); may mention a smaller n.

    What is missing is said twice: for the screen, and without this machine's folders for a result file.
    """
    available, missing = [], {}
    for row in rows_of(figure.rows, args.dataset):
        try:
            row_settings = settings_of(figure.family, row, args)
            for settings in row_settings:
                check_data(settings, location)
        except (FileNotFoundError, ImportError) as error:
            message = str(error)
            root = str(Path(location.data_root or "data").resolve())
            missing[message] = message.replace(root, "the data root").replace(row[0], Path(row[0]).name)
            continue
        available.append(row_settings)
        n = row_settings[0].n
        if args.n is None and not args.quick and n < POINTS:
            print(f"{row[0]} has {n} training points, not the paper's {POINTS}: all of them are used")
    if not available:
        raise FileNotFoundError("; ".join(missing))
    for message in missing:
        print(f"missing: {message}", flush=True)
    return available, missing


def check_data(settings: Experiment, location: RunLocation) -> None:
    """Raise what loading raises, before any hours are spent; a complete run needs no data."""
    if not runs.is_complete(location.folder(settings)):
        location.load(settings, n=1)


def record(family: Family, done: Runs, stem: Path, missing: Iterable[str] = ()) -> list[Path]:
    """The figure's numbers in long format, and where they come from."""
    all_runs = [run for row in done for run in row]
    table, source = stem.with_suffix(".csv"), stem.with_suffix(".json")
    files.write_csv(table, [line for run in all_runs for line in family.csv_lines(run)])
    origins = [
        {"folder": run.relative_folder, **{key: run.record[key] for key in family.recorded if key in run.record}}
        for run in all_runs
    ]
    about = {"runs": origins, "lessons": family.lessons(done), "missing": list(missing)}
    files.write_json(source, about | {"drawn with": files.environment("cpu")})
    return [table, source]
