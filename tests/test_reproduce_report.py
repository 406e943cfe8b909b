"""python -m reproduce all and report: every figure of a folder on one page that stands alone."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import reproduce.__main__
from reproduce import everything, figures, options, report, settings
from reproduce.__main__ import FIGURES, main, parser
from reproduce.about import About
from reproduce.pictures import PICTURES

SMALL = ["--dataset", "digits", "--n", "120", "--depth", "3", "--width", "32"]


class Page(HTMLParser):
    """What a page holds; ``open`` are tags that were not closed."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.words, self.sources, self.links = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.sources += [values["src"]] if "src" in values else []
        self.links += [values["href"]] if "href" in values else []
        if tag not in {"meta", "img"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def page(out) -> Page:
    found = Page((out / report.NAME).read_text())
    assert found.open == []
    assert all(source.startswith("data:image/png;base64,") for source in found.sources)
    assert all("/" not in link for link in found.links)
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    assert main(["figure3", *SMALL, "--out", str(out)]) == 0
    return out


def test_a_figure_beside_what_the_paper_says(results):
    assert main(["report", "--out", str(results)]) == 0
    found = page(results)
    text = "".join(found.words)
    assert "Figure 3. Neural collapse in Deep RFM, ReLU features" in text
    assert f"Paper: {FIGURES['figure3'].shows}." in text
    assert "Here: digits, ReLU: NC1 after M^(1/2) goes from" in text
    assert "python -m reproduce figure12" in text  # not made yet
    assert len(found.sources) == 1
    assert found.links == ["figure3.csv", "figure3.json", "figure3.pdf"]


def test_no_folder_of_this_machine_is_named(results):
    main(["report", "--out", str(results)])
    assert str(results.parent) not in (results / report.NAME).read_text()
    assert str(results.parent) not in (results / "figure3.json").read_text()


def test_a_run_under_way_is_shown_with_the_layers_it_has(results, tmp_path):
    (folder,) = (results / "runs").iterdir()
    there = tmp_path / "runs" / folder.name
    there.mkdir(parents=True)
    (there / "settings.json").write_bytes((folder / "settings.json").read_bytes())
    lines = (folder / "layers.csv").read_text().splitlines()
    (there / "layers.csv").write_text("\n".join(lines[:3]) + "\n")
    report.write(tmp_path, FIGURES)
    found = page(tmp_path)
    assert "2 of 3 layers: NC1 after M^(1/2) goes from" in "".join(found.words)
    assert len(found.sources) == 1


def test_text_is_text(tmp_path):
    (tmp_path / "theory.txt").write_text("a < b & c\n")
    report.write(tmp_path, FIGURES)
    assert "a < b & c\n" in page(tmp_path).words


def test_a_folder_without_results_and_a_damaged_one(tmp_path, capsys):
    assert main(["report", "--out", str(tmp_path)]) == 2
    assert "holds no results; make some first" in capsys.readouterr().err
    (tmp_path / "figure3.json").write_text("{")
    assert main(["report", "--out", str(tmp_path)]) == 2
    assert "figure3.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[]", "null", "{}", '{"runs": null}', '{"runs": ["a"]}', "[" * 100_000])
def test_json_of_another_kind_is_damaged(text, tmp_path, capsys):
    (tmp_path / "figure3.json").write_text(text)
    (tmp_path / "figure3.csv").write_text("dataset,features\ndigits,relu\n")
    for command in ("report", "draw"):
        assert main([command, "--out", str(tmp_path)]) == 2
        said = capsys.readouterr().err
        assert "damaged" in said
        assert str(tmp_path / "figure3") in said


@pytest.mark.parametrize(
    ("settings", "layers"), [(None, "layer\n1\n"), ("{}", "layer\n1\n"), ('{"settings": {"n": 3}}', "layer\nabc\n")]
)
def test_a_damaged_run_under_way_is_named(settings, layers, tmp_path, capsys):
    folder = tmp_path / "runs" / "digits"
    folder.mkdir(parents=True)
    (folder / "layers.csv").write_text(layers)
    if settings is not None:
        (folder / "settings.json").write_text(settings)
    assert main(["report", "--out", str(tmp_path)]) == 2
    assert f"{folder} is damaged or of another program" in capsys.readouterr().err


def test_a_table_without_its_json_is_named(tmp_path, capsys):
    (tmp_path / "mine.csv").write_text("a,b\n1,2\n")
    assert main(["draw", "--out", str(tmp_path)]) == 2
    assert "mine.json is not there; make the figure again, or move" in capsys.readouterr().err


def test_all_goes_on_past_what_cannot_be_made(tmp_path, monkeypatch, capsys):
    done = []

    def make(name, figure, args):
        done.append((name, args.quick, args.dataset, args.data_root))
        if name == "figure4":
            raise FileNotFoundError("no svhn here")
        if name == "figure5":
            raise ValueError("a number is wrong")
        if name == "figure6":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 0

    monkeypatch.setattr(figures, "make", make)
    monkeypatch.setattr(everything, "TEXTS", {"theory": "Theory"})
    monkeypatch.setattr("reproduce.theory.main", lambda: print("numbers"))
    for name, picture in PICTURES.items():

        def drawn(args, name=name, reads=picture.ABOUT.reads_data):
            done.append((name, args.quick, [args.dataset] if reads else ["digits"], args.data_root if reads else "d"))

        monkeypatch.setattr(picture, "command", drawn)
    assert main(["all", "--quick", "--dataset", "digits", "--data-root", "d", "--out", str(tmp_path)]) == 1
    assert [name for name, *_ in done] == [*FIGURES, *PICTURES]
    assert {tuple(map(str, rest)) for _, *rest in done} == {("True", "['digits']", "d")}
    printed = capsys.readouterr().out
    assert "figure4: no svhn here" in printed
    assert "figure5 failed: a number is wrong" in printed
    assert "figure6 failed: CUDA out of memory" in printed
    assert (tmp_path / "theory.txt").read_text() == "numbers\n"
    assert (tmp_path / report.NAME).exists()


def test_quick_stands_in_for_what_is_not_given():
    quick = parser().parse_args(["figure3", "--quick", "--dataset", "digits", "--depth", "4"])
    (row,) = figures.rows_of(FIGURES["figure3"].rows, quick.dataset)
    (found,) = figures.settings_of(FIGURES["figure3"].family, row, quick)
    assert (found.n, found.width, found.depth) == (settings.QUICK["n"], settings.QUICK["width"], 4)


def test_lessons_are_recorded(results):
    about = json.loads((results / "figure3.json").read_text())
    assert len(about["lessons"]) == 1


def test_a_picture_is_a_module_and_its_name(tmp_path, monkeypatch, capsys):
    """Its command, its options, its part of ``all``, of the page and of ``draw`` come with it."""
    done = []
    about = About("A new picture", "One sees this", "the new picture of a test", reads_data=False)
    made = SimpleNamespace(NAME="new", ABOUT=about, add_options=lambda parser: options.add_out(parser, "out"))
    made.command = lambda args: done.append(args.out) or 0
    monkeypatch.setitem(PICTURES, "new", made)
    monkeypatch.setattr(reproduce.__main__, "SHOWN", {"new": about})
    assert main(["new", "--out", str(tmp_path / "a")]) == 0
    assert "the new picture of a test" in parser().format_help()
    (tmp_path / "new.csv").write_text("x\n1\n")
    (tmp_path / "new.json").write_text(json.dumps({"runs": [{"settings": {}}], "lessons": []}))
    assert main(["draw", "--out", str(tmp_path)]) == 0
    assert "left as it is" in capsys.readouterr().out
    monkeypatch.setattr(everything, "TEXTS", {})
    assert main(["all", "--out", str(tmp_path)]) == 0
    assert done == [tmp_path / "a", tmp_path]
    assert "One sees this" in (tmp_path / report.NAME).read_text()
    made.drawing = lambda settings, lines: (
        done.append((settings, lines)) or pytest.importorskip("matplotlib.figure").Figure()
    )
    assert main(["draw", "--out", str(tmp_path)]) == 0
    assert done[-1] == ({}, [{"x": "1"}])


def test_every_command_is_in_the_readme():
    text = (Path(reproduce.__file__).parent / "README.md").read_text()
    (commands,) = (action for action in parser()._actions if action.choices)
    lacking = [name for name in commands.choices if not re.search(rf"python -m reproduce {name}\b|`{name}`", text)]
    assert lacking == [], "name it in reproduce/README.md"
