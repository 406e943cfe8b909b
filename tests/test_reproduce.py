"""python -m reproduce: what it writes, what it reuses, how it resumes, and what it says when it cannot run."""

from __future__ import annotations

import csv
import json
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from fastagop import DeepRFMClassifier, Laplace, datasets
from reproduce import deep_rfm_runs, figures, layers, plots, runs, settings, theory
from reproduce.__main__ import FIGURES, main, parser

SMALL = ["--dataset", "digits", "--n", "150", "--depth", "3", "--width", "64"]
STAGES = ["input", "projected", "features"]


@pytest.fixture
def no_computation(monkeypatch):
    def refuse(*_):
        raise AssertionError("a complete run was computed again")

    monkeypatch.setattr(deep_rfm_runs.DeepRFMProcedure, "compute", refuse)


@pytest.fixture(scope="module")
def figure6(tmp_path_factory):
    """The folder of an uninterrupted figure 6 of digits."""
    out = tmp_path_factory.mktemp("figure6")
    assert main(["figure6", *SMALL, "--out", str(out)]) == 0
    return out


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def only_run(out: Path) -> Path:
    (folder,) = (out / "runs").iterdir()
    return folder


def check_image(path: Path) -> None:
    from matplotlib.image import imread

    pixels = imread(path)
    assert min(pixels.shape[:2]) > 300
    assert pixels[..., :3].std() > 0.05  # something is drawn


# ---- Settings


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("figure1", [("cifar10", "cos", "laplace", 4096), ("mnist", "relu", "gaussian", 1024)]),
        (
            "figure3",
            [
                ("cifar10", "relu", "laplace", 1024),
                ("mnist", "relu", "gaussian", 1024),
                ("svhn", "relu", "laplace", 1024),
            ],
        ),
        ("figure4", [(name, "cos", "laplace", 4096) for name in ("cifar10", "mnist", "svhn")]),
        ("figure5", [(name, "cos", "laplace", 4096) for name in ("cifar10", "svhn", "mnist")]),
        (
            "figure6",
            [
                ("cifar10", "relu", "laplace", 1024),
                ("svhn", "relu", "laplace", 1024),
                ("mnist", "relu", "gaussian", 1024),
            ],
        ),
    ],
)
def test_defaults_are_the_papers(name, rows):
    args = parser().parse_args([name])
    family = FIGURES[name].family
    found = [s for row in figures.rows_of(FIGURES[name].rows, []) for s in figures.settings_of(family, row, args)]
    assert [(s.dataset, s.features, s.kernel, s.width) for s in found] == rows
    for s in found:
        assert (s.n, s.depth, s.bandwidth, s.ridge) == (50_000, 20, 2.0, 0.0)
        assert s.feature_scale == (0.05 if s.features == "cos" else None)
        assert (s.agop_scale, s.standardize, s.dtype, s.seed, s.score) == ("max", True, "float32", 0, False)


def test_datasets_restrict_and_replace():
    assert figures.rows_of(FIGURES["figure1"].rows, ["mnist"]) == (("mnist", "relu"),)
    assert figures.rows_of(FIGURES["figure1"].rows, ["digits"]) == (("digits", "cos"), ("digits", "relu"))
    assert figures.rows_of(FIGURES["figure4"].rows, ["svhn", "digits"]) == (("svhn", "cos"), ("digits", "cos"))
    assert figures.rows_of(FIGURES["figure4"].rows, ["digits", "digits"]) == (("digits", "cos"),)  # tables have one
    with pytest.raises(ValueError, match=r"--dataset must be files of different names, got a/x\.npz and b/x\.npz"):
        figures.rows_of(FIGURES["figure4"].rows, ["digits", "a/x.npz", "b/x.npz"])


def test_an_npz_is_known_by_its_content(tmp_path):
    keys = []
    for folder, value in (("a", 0.0), ("b", 0.0), ("c", 1.0)):
        (tmp_path / folder).mkdir()
        arrays = {"x_train": np.full((4, 2), value, np.float32), "y_train": np.arange(4)}
        np.savez(tmp_path / folder / "mine.npz", **arrays)
        keys.append(settings.paper(str(tmp_path / folder / "mine.npz"), "relu").key)
    assert keys[0] == keys[1] != keys[2]
    assert keys[0].startswith("mine-relu-laplace-n4-d20-w1024-s0-")


# ---- Results


def test_figure_writes_everything(figure6):
    check_image(figure6 / "figure6.png")
    assert (figure6 / "figure6.pdf").read_bytes().startswith(b"%PDF")
    rows = read(figure6 / "figure6.csv")
    assert list(rows[0]) == ["dataset", "features", "seed", "layer", "stage", "nc1", "nc2"]
    assert [(row["layer"], row["stage"]) for row in rows] == [(str(i), stage) for i in (1, 2, 3) for stage in STAGES]
    assert {(row["dataset"], row["features"], row["seed"]) for row in rows} == {("digits", "relu", "0")}
    projected = [float(row["nc1"]) for row in rows if row["stage"] == "projected"]
    assert projected[0] > projected[1] > projected[2]  # collapse
    about = json.loads((figure6 / "figure6.json").read_text())
    assert about["missing"] == []
    assert about["runs"][0]["settings"]["n"] == 150
    assert about["runs"][0]["seconds"] > 0


def test_run_folder_is_complete_and_tidy(figure6):
    folder = only_run(figure6)
    names = {path.name for path in folder.iterdir()}
    assert names == {"settings.json", "layers.csv", "record.json", "gram.npz"}
    rows = read(folder / "layers.csv")
    assert [row["layer"] for row in rows] == ["1", "2", "3"]
    assert {"residual", "jitter", "method", "iterations", "fallback", "seconds_solve", "peak_bytes"} <= set(rows[0])
    record = json.loads((folder / "record.json").read_text())
    assert len(record["layers"]) == 3
    assert record["classes"] == 10
    assert {"python", "torch", "numpy", "fastagop", "device", "commit", "date"} <= set(record["environment"])
    with np.load(folder / "gram.npz") as panels:
        assert set(panels) == {"layer_01", "layer_02", "layer_03"}
        for gram in panels.values():
            assert gram.shape == (150, 150)  # no class has more than 60 of the first 150 digits
            np.testing.assert_allclose(np.diag(gram), 1.0, atol=1e-3)


def test_the_kernels_room_stays_inside_the_package(figure6):
    assert "kernels" not in sys.modules


def test_seeds_are_runs_of_their_own(tmp_path):
    assert main(["figure4", *SMALL, "--seeds", "0", "1", "0", "--out", str(tmp_path)]) == 0
    rows = read(tmp_path / "figure4.csv")
    assert [row["seed"] for row in rows] == ["0"] * 9 + ["1"] * 9
    assert rows[0]["nc1"] == rows[9]["nc1"]  # the input of layer 1 knows no seed
    assert rows[2]["nc1"] != rows[11]["nc1"]
    check_image(tmp_path / "figure4.png")


def test_keep_checkpoint(tmp_path):
    assert main(["figure6", *SMALL, "--out", str(tmp_path), "--keep-checkpoint"]) == 0
    assert (only_run(tmp_path) / "checkpoint" / "manifest.json").exists()


def demo_accuracy() -> float:
    """Share of the test digits that the demo's estimator answers rightly, shifted and scaled as its training points."""
    X, y = (part.numpy() for part in datasets.load("digits", n=150))
    Z, z = (part.numpy() for part in datasets.load("digits", split="test"))
    mean, spread = X.mean(0), X.std(0)
    spread[spread == 0] = np.inf  # constant pixels say nothing
    model = DeepRFMClassifier(Laplace(2.0), depth=3, width=64, random_state=0)
    share = float((model.fit((X - mean) / spread, y).predict((Z - mean) / spread) == z).mean())
    assert 0.5 < share < 0.95
    return share


def test_demo(tmp_path, capsys):
    assert main(["demo", "--n", "150", "--depth", "3", "--width", "64", "--out", str(tmp_path)]) == 0
    check_image(tmp_path / "gram.png")
    check_image(tmp_path / "curves.png")
    assert len(read(tmp_path / "numbers.csv")) == 9
    printed = capsys.readouterr().out
    for excerpt in (
        "NC1",
        "cholesky float64",
        "accuracy on the training points",
        "the test points",
        "gram.png",
    ):
        assert excerpt in printed
    accuracy = json.loads((tmp_path / "numbers.json").read_text())["runs"][0]["accuracy"]
    assert accuracy == {"training": 1.0, "test": pytest.approx(demo_accuracy(), abs=0.01)}


# ---- Reuse and resumption


@pytest.mark.usefixtures("no_computation")
@pytest.mark.parametrize("name", ["figure6", "figure3"])
def test_runs_are_shared(figure6, name, capsys):
    assert main([name, *SMALL, "--out", str(figure6)]) == 0
    assert "complete, nothing to compute" in capsys.readouterr().out
    assert (figure6 / f"{name}.csv").read_bytes() == (figure6 / "figure6.csv").read_bytes()
    check_image(figure6 / f"{name}.png")


@pytest.mark.parametrize("stored", [False, True], ids=["layer without row and panel", "layer with row and panel"])
def test_an_interrupted_run_resumes(figure6, tmp_path, monkeypatch, capsys, stored):
    finish = layers.LayerRecorder.__call__

    def killed(self, event):
        if stored or event.layer < 1:
            finish(self, event)
        if event.layer == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(layers.LayerRecorder, "__call__", killed)
        assert main(["figure6", *SMALL, "--out", str(tmp_path)]) == 130
    assert len(read(only_run(tmp_path) / "layers.csv")) == 1 + stored
    assert not (tmp_path / "figure6.csv").exists()
    assert "resumes" in capsys.readouterr().err

    assert main(["figure6", *SMALL, "--out", str(tmp_path)]) == 0
    assert json.loads((only_run(tmp_path) / "record.json").read_text())["resumed"]
    assert (tmp_path / "figure6.csv").read_bytes() == (figure6 / "figure6.csv").read_bytes()
    lines = read(only_run(tmp_path) / "layers.csv")
    assert [line["layer"] for line in lines] == ["1", "2", "3"]
    printed = capsys.readouterr().out
    assert all(f"\n    {layer} | " in printed for layer in (1, 2, 3))
    with np.load(only_run(tmp_path) / "gram.npz") as found, np.load(only_run(figure6) / "gram.npz") as expected:
        assert set(found) == set(expected)
        for name in expected:  # float16: one unit in the last place, where a panel was computed again
            np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=2**-10)


def test_one_process_a_run(tmp_path, capsys):
    entered = threading.Event()

    def second():
        with runs.exclusive(tmp_path):
            entered.set()

    with runs.exclusive(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        assert not entered.wait(0.2)
    assert entered.wait(10)
    thread.join()
    assert "waiting" in capsys.readouterr().out


# ---- What cannot run


def one_line(capsys) -> str:
    (printed,) = capsys.readouterr().err.splitlines()
    return printed


def test_missing_data(tmp_path, capsys):
    arguments = ["figure3", "--dataset", "svhn", "--n", "50", "--data-root", str(tmp_path), "--out", str(tmp_path)]
    assert main(arguments) == 2
    printed = one_line(capsys)
    assert "train_32x32.mat" in printed
    assert "--download" in printed


def test_missing_data_of_one_row(figure6, tmp_path, capsys):
    (tmp_path / "runs").symlink_to(figure6 / "runs")
    arguments = ["figure6", "--dataset", "svhn", *SMALL, "--data-root", str(tmp_path), "--out", str(tmp_path)]
    assert main(arguments) == 0
    assert "not drawn: svhn needs intact files train_32x32.mat" in capsys.readouterr().out
    assert {row["dataset"] for row in read(tmp_path / "figure6.csv")} == {"digits"}
    assert "svhn" in json.loads((tmp_path / "figure6.json").read_text())["missing"][0]


@pytest.mark.parametrize(
    ("changed", "excerpt"),
    [
        (["--n", "5000"], "--n must be from 1 to 1437"),  # explicit and too large
        (["--dataset", "imagenet"], "'imagenet'"),
        (["--bandwidth", "-1"], "bandwidth"),
        (["--ridge", "-1"], "ridge"),
        (["--dataset", "nowhere.npz"], "no file nowhere.npz"),
    ],
)
def test_bad_settings_are_one_line(tmp_path, capsys, changed, excerpt):
    options = [*SMALL, *changed] if changed[0] != "--dataset" else changed
    assert main(["figure3", *options, "--out", str(tmp_path)]) == 2
    assert excerpt in one_line(capsys)


@pytest.mark.parametrize("changed", [["--width", "0"], ["--device", "abacus"], ["--kernel", "linear"]])
def test_bad_options_exit_2(capsys, changed):
    with pytest.raises(SystemExit) as stopped:
        main(["figure3", *changed])
    assert stopped.value.code == 2
    assert changed[0] in capsys.readouterr().err


def test_too_little_memory_is_one_line(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise MemoryError("solve with n = 150 needs\n25 GB")

    monkeypatch.setattr(deep_rfm_runs.DeepRFMProcedure, "compute", refuse)
    assert main(["figure3", *SMALL, "--out", str(tmp_path)]) == 2
    assert one_line(capsys) == "python -m reproduce: solve with n = 150 needs 25 GB (here: --n)"


def test_the_default_n_takes_what_there_is(tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(deep_rfm_runs.DeepRFMProcedure, "compute", stop)
    assert main(["figure3", "--dataset", "digits", "--out", str(tmp_path)]) == 130
    printed = capsys.readouterr().out
    assert printed.count("digits has 1437 training points, not the paper's 50000") == 1
    assert "n = 1437" in printed


# ---- Pieces


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        (1, [1]),
        (3, [1, 2, 3]),
        (19, [1, 4, 7, 10, 13, 16, 19]),
        (20, [1, 4, 7, 10, 13, 16, 19]),  # the paper's last is 19
        (10, [1, 2, 4, 6, 7, 8, 10]),
    ],
)
def test_panel_layers(depth, expected):
    assert layers.panel_layers(depth) == expected


def test_panel_rows_are_balanced_and_evenly_spaced():
    classes = np.repeat([3, 0, 7], [1000, 5, 61])
    rows = layers.panel_rows(classes)
    assert len(np.unique(rows)) == len(rows)
    labels, counts = np.unique(classes[rows], return_counts=True)
    assert dict(zip(labels, counts, strict=True)) == {0: 5, 3: 60, 7: 60}
    steps = np.diff(rows[classes[rows] == 3])
    assert {16, 17} == set(steps)


def test_a_line_has_the_columns_of_its_header(figure6):
    row = read(only_run(figure6) / "layers.csv")[0]
    groups, names = layers.HEADER.splitlines()
    line = layers.line({**row, "nc1_input": ""})
    assert len(line) == len(names)
    bars = [at for at, letter in enumerate(names) if letter == "|"]
    assert [at for at, letter in enumerate(line) if letter == "|"] == bars
    assert [at for at, letter in enumerate(groups) if letter == "|"] == bars
    assert "nan" in line


def test_gaps_are_drawn_as_gaps(tmp_path):
    values = np.array([[1.0, np.nan, 0.0, 1e-3], [2.0, 1.0, 1e-2, 1e-4]])
    stages = dict.fromkeys(STAGES, values)
    nothing = dict.fromkeys(STAGES, np.full((1, 4), np.nan))
    strip = plots.Strip("pair", {1: np.eye(4), 2: np.ones((4, 4))}, {1: np.inf, 2: 0.5}, classes=2)
    shorter = plots.Strip("ten", {1: np.eye(4)}, {1: 0.1}, classes=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        curves = plots.curves([plots.Curves("a", stages, stages), plots.Curves("b", nothing, nothing)], "gaps", "cos")
        plots.save(curves, tmp_path / "curves")
        plots.save(plots.strips([strip], "two classes"), tmp_path / "strip")
        plots.save(plots.strips([strip, shorter], "different numbers of classes"), tmp_path / "strips")
    drawn = np.asarray(curves.axes[0].lines[0].get_ydata())
    np.testing.assert_allclose(drawn, [1.5, np.nan, np.nan, 5.5e-4])
    for name in ("curves", "strip", "strips"):
        check_image(tmp_path / f"{name}.png")


def test_theory_is_a_command(monkeypatch):
    called, before = [], torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        monkeypatch.setattr(theory, "main", lambda: called.append(torch.get_num_threads()))
        assert main(["theory"]) == 0
        assert (called, torch.get_num_threads()) == ([1], 3)  # "all" makes its figures in the same process
    finally:
        torch.set_num_threads(before)
