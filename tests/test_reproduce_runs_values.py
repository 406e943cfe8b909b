"""A Deep RFM run's record holds the numbers of that run, and nothing is lost when writing it fails."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from reproduce import files, runs, settings
from reproduce.deep_rfm_runs import DeepRFMProcedure
from reproduce.settings import RunLocation

CLASSES = 3


@pytest.fixture
def points(tmp_path):
    """The path of a data set whose test points are training points of class 0, every fourth with another label.

    Ridge 0 interpolates, so a test point is answered by its training label: three of four are right, to the digit.
    All of them lie in one class: shifted by their own mean they would lie elsewhere.
    """
    rng = np.random.default_rng(0)
    y = np.arange(60) % CLASSES
    X = (4 * rng.normal(size=(CLASSES, 5))[y] + rng.normal(size=(60, 5))).astype(np.float32)
    few = np.flatnonzero(y == 0)
    labels = np.where(np.arange(len(few)) % 4 == 0, 1, 0)
    path = tmp_path / "points.npz"
    np.savez(path, x_train=X, y_train=y, x_test=X[few], y_test=labels)
    return str(path)


def run(dataset, out, **changes):
    """The record of a small scored run."""
    chosen = settings.paper(dataset, "relu", **{"depth": 2, "width": 32, "score": True, **changes})
    return runs.run(DeepRFMProcedure(), chosen, RunLocation(out, device="cpu")).record


def test_test_points_are_scored_as_training_points_were_shifted(points, tmp_path):
    accuracy = run(points, tmp_path)["accuracy"]
    assert accuracy == {"training": 1.0, "test": 0.75}


def test_the_time_of_a_run_includes_its_readout(points, tmp_path):
    record = run(points, tmp_path)
    assert record["readout"]["seconds"] > 0
    layers = sum(row["seconds"] for row in record["layers"])
    assert record["seconds"] == pytest.approx(layers + record["readout"]["seconds"], rel=1e-12)


def test_a_record_that_cannot_be_written_costs_no_layer(points, tmp_path, monkeypatch):
    """The checkpoint goes once the record is there, not before."""
    plain = os.replace

    def full(source, target, **options):
        if Path(target).name == "record.json":
            raise OSError(28, "No space left on device")
        plain(source, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space"):
            run(points, tmp_path)
    again = run(points, tmp_path)
    assert again["resumed"]
    (folder,) = (tmp_path / "runs").iterdir()
    assert not (folder / "checkpoint").exists()
    assert json.loads((folder / "record.json").read_text())["layers"] == again["layers"]


# ---- Files


def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path, seen, plain = tmp_path / "table.csv", [], os.replace
    files.write(path, "old")

    def spy(source, target, **options):
        seen.append((path.read_text(), Path(source).read_text(), os.path.dirname(source), os.fspath(target)))
        return plain(source, target, **options)

    monkeypatch.setattr(os, "replace", spy)
    files.write(path, "new")
    assert seen == [("old", "new", str(tmp_path), str(path))]
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["table.csv"]


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_numbers_that_are_not_finite_are_left_empty(tmp_path, value):
    files.write_json(tmp_path / "a.json", {"nc1": value, "list": [value, 1.5], "text": "inf"})
    assert json.loads((tmp_path / "a.json").read_text()) == {"nc1": None, "list": [None, 1.5], "text": "inf"}
    files.write_csv(tmp_path / "a.csv", [{"nc1": value, "nc2": 0.5}])
    assert (tmp_path / "a.csv").read_text() == "nc1,nc2\n,0.5\n"


def test_the_commit_says_whether_files_differ_from_it(tmp_path, monkeypatch):
    def git(*words):
        who = ("-c", "user.name=n", "-c", "user.email=n@example.org", "-c", "commit.gpgsign=false")
        return subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    (tmp_path / "code.py").write_text("a = 1\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    commit = git("rev-parse", "HEAD").strip()
    monkeypatch.setattr(files, "__file__", str(tmp_path / "code.py"))
    assert files.environment("cpu")["commit"] == commit
    (tmp_path / "code.py").write_text("a = 2\n")
    assert files.environment("cpu")["commit"] == f"{commit}-dirty"
