"""The comparison of learners on small tables, and that of whole RFMs: what they measure and what they make of it."""

import json
import warnings

import numpy as np
import pytest
import torch
from sklearn.dummy import DummyClassifier, DummyRegressor

import fastagop
from bench import contenders, peers, rfm_cpu, scale_cpu, tables_cpu, tables_summary
from bench.__main__ import main
from bench.tables_contenders import CONTENDERS, LABELS
from bench.tables_data import CLASSIFICATION, QUICK, REGRESSION, SETS, Table

SHAPES = {
    "iris": (150, 4, 3),
    "wine": (178, 13, 3),
    "breast cancer": (569, 30, 2),
    "digits": (1797, 64, 10),
    "diabetes": (442, 10, None),
    "Friedman 1": (1000, 10, None),
    "Friedman 2": (1000, 4, None),
    "Friedman 3": (1000, 4, None),
    "moons": (600, 2, 2),
    "clusters": (1200, 20, 3),
    "5 of 100": (1000, 100, 2),
    "one-hot": (1200, 30, 2),
    "mixed units": (1000, 10, 2),
    "sparse linear": (600, 60, None),
}


def test_there_are_fourteen_tables():
    assert list(SHAPES) == list(SETS)
    assert len(SETS) == 14
    assert set(QUICK) < set(SETS)
    assert {SETS[name]().task for name in QUICK} == {CLASSIFICATION, REGRESSION}
    assert list(LABELS) == list(CONTENDERS)


@pytest.mark.parametrize("name", SETS)
def test_tables_are_the_same_each_time(name):
    one, two = SETS[name](), SETS[name]()
    n, d, classes = SHAPES[name]
    assert one.facts == {"task": REGRESSION if classes is None else CLASSIFICATION, "n": n, "d": d, "classes": classes}
    assert one.X.shape == (n, d)
    assert one.X.dtype == np.float64
    assert one.y.shape == (n,)
    assert np.array_equal(one.X, two.X)
    assert np.array_equal(one.y, two.y)
    if classes is None:
        assert one.y.dtype == np.float64
    else:
        counts = np.bincount(one.y)
        assert len(counts) == classes  # labels 0, 1, ...
        assert counts.min() > 0.25 * len(one.y) / classes


def test_tables_have_what_their_names_say():
    hot, mixed = SETS["one-hot"]().X, SETS["mixed units"]().X
    assert np.array_equal(hot.reshape(-1, 6, 5).sum(2), np.ones((1200, 6)))
    assert set(np.unique(hot)) == {0.0, 1.0}
    assert np.ptp(np.log10(mixed.std(0))) > 4
    for name in ("Friedman 2", "Friedman 3"):
        assert np.ptp(np.log10(SETS[name]().X.std(0))) > 2


# ---- The summary


def row(name, contender, score=None, loss=None, seconds=(1.0, 0.0), **more):
    measured = {"score": score, "log_loss": loss, "fit_seconds": seconds[0], "predict_seconds": seconds[1]}
    return {"set": name, "n": 9, "d": 2, "contender": contender, **({} if score is None else measured), **more}


ROWS = [
    row("a", "boosting", 0.5, 0.2, (1.0, 1.0)),
    row("a", "svm", 0.5, 0.4, (3.0, 0.0)),
    row("a", "pytabkit", 0.75, 0.6, (0.5, 0.5)),
    row("b", "boosting", 0.875, seconds=(4.0, 0.0)),
    row("b", "svm", 0.625, seconds=(1.0, 1.0)),
    row("b", "pytabkit", error="ValueError: no"),
]


def test_gaps_are_to_the_best_of_a_table_and_equal_scores_share_ranks():
    gaps, ranks = tables_summary.gaps(ROWS), tables_summary.ranks(ROWS)
    assert gaps == {
        ("a", "boosting"): 0.25,
        ("a", "svm"): 0.25,
        ("a", "pytabkit"): 0.0,
        ("b", "boosting"): 0.0,
        ("b", "svm"): 0.25,
    }
    assert ranks == {
        ("a", "boosting"): 2.5,
        ("a", "svm"): 2.5,
        ("a", "pytabkit"): 1.0,
        ("b", "boosting"): 1.0,
        ("b", "svm"): 2.0,
    }


def test_the_summary_compares_on_tables_that_both_finished():
    boosting, svm, pytabkit = tables_summary.summary(ROWS)
    assert (boosting["gap"], boosting["worst_gap"], boosting["rank"], boosting["sets"]) == (0.125, 0.25, 1.75, 2)
    assert (svm["at_or_above"], svm["compared"], svm["log_loss"], svm["seconds"]) == (1, 2, 0.4, 5.0)
    assert (boosting["at_or_above"], boosting["times_pytabkit"], svm["times_pytabkit"]) == (2, 2.0, 3.0)
    assert (pytabkit["sets"], pytabkit["of"], pytabkit["at_or_above"], pytabkit["compared"]) == (1, 2, 1, 1)
    assert pytabkit["errors"] == ["ValueError: no"]


def test_the_table_leaves_nobody_out():
    nobody = [row(name, "xrfm", error="xrfm is not installed") for name in "ab"]
    lines = tables_summary.table(ROWS + nobody).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        f"| {LABELS[name]}" for name in ("pytabkit", "boosting", "svm", "xrfm")
    ]
    assert lines[3] == "| HistGradientBoosting | 0.125 | 0.250 | 1.8 | 2 of 2 | 0.200 | 6 | 2 |  |"
    assert "1 of 2: ValueError: no" in lines[2]
    assert "2 of 2: xrfm is not installed" in lines[5]
    assert "not finished" not in tables_summary.table(ROWS[:5])
    assert "| b | 9 | 2 | **0.875** | 0.625 |  |" in tables_summary.scores(ROWS)


def test_without_pytabkit_nothing_is_divided_by_it():
    assert {one["times_pytabkit"] for one in tables_summary.summary(ROWS[:2])} == {None}
    assert "| HistGradientBoosting | 0.000 |" in tables_cpu.table(ROWS[:2])  # as the documentation's pages call it


def test_plot(tmp_path):
    tables_cpu.plot(ROWS, tmp_path / "tables.png")
    assert (tmp_path / "tables.png").stat().st_size > 5000


# ---- The runs


def fails(task, threads):
    raise ZeroDivisionError("a\nlong story")


def missing(task, threads):
    raise contenders.Unable("it is not installed")


def constant(task, threads):
    print("noise of a contender")
    return DummyClassifier() if task == CLASSIFICATION else DummyRegressor()


def test_tables_are_measured_from_the_command_line(tmp_path, monkeypatch, capsys):
    few = {"fastagop": fails, "xrfm": missing, "boosting": constant, "svm": CONTENDERS["svm"]}
    monkeypatch.setattr(tables_cpu, "CONTENDERS", few | {"forest": fails})
    threads, out = torch.get_num_threads(), tmp_path / "tables.json"
    assert main(["tables", "--quick", "--threads", "1", "--only", *few, "--out", str(out)]) == 0
    assert torch.get_num_threads() == threads
    result = json.loads(out.read_text())
    assert result["machine"]["threads"] == 1
    assert {"scikit-learn", "pytabkit"} <= result["machine"]["versions"].keys()
    assert result["summary"] == tables_summary.summary(result["rows"])
    assert [(row["set"], row["contender"]) for row in result["rows"]] == [(name, who) for name in QUICK for who in few]
    iris = {row["contender"]: row for row in result["rows"] if row["set"] == "iris"}
    assert iris["fastagop"]["error"] == "ZeroDivisionError: a long story"
    assert iris["xrfm"]["error"] == "it is not installed"
    assert iris["boosting"]["score"] == pytest.approx(1 / 3)
    assert iris["boosting"]["log_loss"] == pytest.approx(np.log(3))
    assert iris["svm"]["score"] > 0.9
    assert iris["svm"]["log_loss"] < 0.3
    assert len(iris["svm"]["scores"]) == tables_cpu.QUICK_FOLDS
    said = capsys.readouterr().out
    assert "noise of a contender" not in said
    assert "3 of 3: it is not installed" in said
    assert [path.name for path in tmp_path.iterdir()] == ["tables.json"]


def test_every_contender_sees_the_same_folds(monkeypatch):
    seen = []

    class Counts(DummyRegressor):
        def fit(self, X, y):
            seen.append(tuple(X[:, 0]))
            return super().fit(X, y)

    data = Table(np.arange(20.0)[:, None], np.arange(20.0), REGRESSION)
    rows = tables_cpu.measure({"t": lambda: data}, {name: lambda *_: Counts() for name in ("svm", "forest")}, 4, 1)
    turns = seen[2:]  # after a fit each that is not counted
    assert turns[::2] == turns[1::2]
    assert len(set(turns)) == 4
    assert [len(row["scores"]) for row in rows] == [4, 4]
    assert rows[0]["log_loss"] is None


def test_a_certain_mistake_costs_what_the_least_probability_does():
    data, rows = Table(np.zeros((8, 1)), np.array([0, 1] * 4), CLASSIFICATION), np.arange(8)
    found = tables_cpu.attempt(lambda *_: DummyClassifier(strategy="constant", constant=1), 1, data, rows, rows)
    assert found["score"] == 0.5
    assert found["log_loss"] == pytest.approx(-np.log(tables_cpu.CLIP) / 2, rel=1e-5)


def test_warnings_are_counted_and_not_shown(recwarn):
    class Warns(DummyRegressor):
        def fit(self, X, y):
            warnings.warn("careful", UserWarning, stacklevel=1)
            return super().fit(X, y)

    data, rows = Table(np.zeros((8, 1)), np.arange(8.0), REGRESSION), np.arange(8)
    assert tables_cpu.attempt(lambda *_: Warns(), 1, data, rows, rows)["warnings"] == 1
    assert len(recwarn) == 0


@pytest.mark.parametrize("name", [name for name in CONTENDERS if name not in ("fastagop", "fastagop-cv")])
@pytest.mark.parametrize("table", ["wine", "diabetes"])
def test_contenders_learn(name, table):
    data = SETS[table]()
    (train, test), *_ = tables_cpu._splits(data, 2)
    found = tables_cpu.attempt(CONTENDERS[name], 1, data, train, test)
    if "error" in found:
        assert found["error"].endswith("is not installed")
    else:
        assert found["score"] > (0.6 if table == "wine" else 0.25)
        assert found["log_loss"] is None or found["log_loss"] < np.log(3)


@pytest.mark.parametrize("task", [CLASSIFICATION, REGRESSION])
def test_fastagops_default_is_built(task):
    model = CONTENDERS["fastagop-default"](task, 1)
    X = np.random.default_rng(0).standard_normal((30, 2))
    y = (X[:, 0] > 0).astype(int) if task == CLASSIFICATION else 100.0 + X[:, 0]
    assert model.fit(X, y).score(X, y) > 0.9


# ---- Whole RFMs


def test_whole_rfms_are_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scale_cpu, "_RATE", 64)
    monkeypatch.setattr(rfm_cpu, "_RATE", 64)
    monkeypatch.setattr(rfm_cpu, "CASES", {"wide": lambda: rfm_cpu.normal(40, 60, 2)})

    def installed(module):
        raise contenders.Unable(f"{module} is not installed")

    monkeypatch.setattr(contenders, "installed", installed)
    assert main(["rfm", "--repeats", "1", "--out", str(tmp_path / "rfm.json")]) == 0
    result = json.loads((tmp_path / "rfm.json").read_text())
    rows = {row["contender"]: row for row in result["rows"]}
    assert rows.keys() == rfm_cpu.CONTENDERS.keys()
    assert rows.pop("xrfm")["note"] == "xrfm is not installed"
    assert all(row["error"] < 1e-2 and row["seconds"] > 0 for row in rows.values())
    assert rows["fastagop"]["ratio"] == 1.0
    assert "| wide | 40 | 60 | 1 | 2 | xrfm | xrfm is not installed |" in capsys.readouterr().out


def test_the_truth_of_rfms_is_fastagops_in_float64():
    """Two ways to the same numbers, which share no code."""
    p = rfm_cpu.normal(50, 70, 3)
    options = {"iterations": 3, "ridge": p.ridge, "dtype": "float64", "fit_intercept": False}
    model = fastagop.RFMRegressor(kernel=p.kernel, **options)
    model.fit(p.X.double(), p.alpha.double())
    assert rfm_cpu.error(p, lambda Z: model.predict(Z.double())) < 1e-10


def test_the_floor_is_the_work_at_the_measured_rates():
    rate = {"float32": 1e9, "float64": 1e8, "exponentials": 1e7}
    tall, wide = rfm_cpu.normal(40, 10, 3), rfm_cpu.normal(10, 40, 3)
    solve, agop = 40 * 40 * 10 / 1e8 + 40**3 / 3 / 1e9, (2 * 40 * 40 * 10 + 2 * 40 * 10 * 10) / 1e9
    exponentials, projection = 40 * 40 / 2 / 1e7, 2 * 40 * 100 / 1e9
    expected = 4 * (solve + exponentials) + 3 * (agop + projection)
    assert rfm_cpu.floor(tall, rate) == pytest.approx(expected)
    square = rfm_cpu.normal(10, 10, 3)
    assert rfm_cpu.floor(wide, rate) - rfm_cpu.floor(square, rate) == pytest.approx(10 * 10 * 40 / 1e8)


def test_the_authors_update_makes_the_same_numbers_as_the_composition():
    p = rfm_cpu.normal(50, 6, 2)
    one, two = (fit(p.X, p.alpha, 10.0, 1e-3, 2)(p.Z) for fit in (peers.authors_rfm, peers.composition_rfm))
    assert torch.equal(one, two)
