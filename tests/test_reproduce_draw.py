"""Pictures of the paper's figures: floors, fonts, sizes, and `python -m reproduce draw`, which draws them again."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from fastagop import datasets
from reproduce import network_figures, network_plots, plots, redraw
from reproduce.__main__ import FIGURES, main

ROOT = Path(__file__).resolve().parents[1]
STAGES = ["input", "projected", "features"]


@pytest.fixture(scope="module")
def figure6(tmp_path_factory):
    out = tmp_path_factory.mktemp("figure6")
    assert (
        main(["figure6", "--dataset", "digits", "--n", "60", "--depth", "2", "--width", "16", "--out", str(out)]) == 0
    )
    return out


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def assert_drawn(path: Path) -> None:
    from matplotlib.image import imread

    pixels = imread(path)
    assert min(pixels.shape[:2]) > 150
    assert pixels[..., :3].std() > 0.05


def test_the_floor_is_marked_where_curves_come_near():
    low, high = ({stage: np.array([[1.0, end]]) for stage in STAGES} for end in (1e-11, 1e-9))
    figure = plots.curves([plots.Curves("a", low, low), plots.Curves("b", high, high)], "floors", "ReLU")
    assert [[text.get_text() for text in axis.texts] for axis in figure.axes] == [["rounding of float32"], [], [], []]
    figure = plots.curves([plots.Curves("a", low, low, "float64")], "floors", "ReLU")
    assert not figure.axes[0].texts


def test_a_pdf_has_its_fonts_inside_as_outlines(tmp_path):
    stages = dict.fromkeys(STAGES, np.ones((1, 2)))
    for name in ("one", "two"):
        plots.save(plots.curves([plots.Curves("a", stages, stages)], "fonts", "ReLU"), tmp_path / name, ["pdf"])
    content = (tmp_path / "one.pdf").read_bytes()
    assert content == (tmp_path / "two.pdf").read_bytes()
    assert b"/FontFile2" in content
    assert b"/Type3" not in content
    assert b"/Subtype /Image" not in content


def test_a_small_picture_keeps_the_ends_of_the_bar(tmp_path):
    from matplotlib.image import imread

    noise = np.random.default_rng(0).uniform(-0.3, 0.3, (600, 600))
    panels = {layer: np.clip(noise + np.eye(600) * 2, -1, 1) for layer in range(1, 4)}
    figure = plots.strips([plots.Strip("a", panels, {}, classes=10)], "strip")
    plots.save_small(figure, tmp_path / "small.png")
    assert (tmp_path / "small.png").stat().st_size < 150_000
    pixels = imread(tmp_path / "small.png")[..., :3] * 255
    for seen in ((5, 48, 97), (103, 0, 31), (255, 255, 255)):  # -1 and 1 on the bar, and the paper
        assert np.abs(pixels - seen).sum(-1).min() == 0, seen


# ---- Drawn again


def test_figures_are_drawn_again_from_tables(figure6, tmp_path, capsys):
    for suffix in ("csv", "json"):  # Figures 3 and 6 have the same runs and tables.
        for name in ("figure3_n150", "figure6"):
            (tmp_path / f"{name}.{suffix}").write_bytes((figure6 / f"figure6.{suffix}").read_bytes())
    (tmp_path / "grokking.csv").write_text("iteration\n0\n")
    (tmp_path / "grokking.json").write_text("{}")
    assert main(["draw", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert_drawn(tmp_path / "figure3_n150.png")
    for name in ("figure6", "grokking"):  # What they show is in no table.
        assert f"left as it is: {tmp_path / name}.png: it shows" in printed
        assert not (tmp_path / f"{name}.png").exists()
    (tmp_path / "runs").symlink_to(figure6 / "runs")
    assert main(["draw", "--out", str(tmp_path)]) == 0
    assert_drawn(tmp_path / "figure6.png")


def test_what_is_drawn_again_is_what_was_drawn(figure6):
    lines, origins = read(figure6 / "figure6.csv"), json.loads((figure6 / "figure6.json").read_text())["runs"]
    ((with_runs,),) = redraw.runs_of(FIGURES["figure6"].family, origins, lines, figure6)
    ((from_table,),) = redraw.runs_of(FIGURES["figure6"].family, origins, lines, figure6 / "elsewhere")
    assert from_table.settings == with_runs.settings
    keys = [f"{measure}_{stage}" for measure in ("nc1", "nc2") for stage in STAGES]
    for row, expected in zip(from_table.rows, with_runs.rows, strict=True):
        assert row["layer"] == expected["layer"]
        assert [float(row[key]) for key in keys] == [expected[key] for key in keys]


def test_what_cannot_be_drawn_again(figure6, tmp_path, capsys):
    assert main(["draw", "--out", str(tmp_path)]) == 2
    assert "holds no .csv of results; make some first" in capsys.readouterr().err
    (tmp_path / "figure6.csv").write_text("dataset,features\ndigits,relu\n")
    (tmp_path / "figure6.json").write_bytes((figure6 / "figure6.json").read_bytes())
    assert main(["draw", "--out", str(tmp_path)]) == 2
    assert "figure6.csv and its .json do not belong together or are damaged" in capsys.readouterr().err


def test_a_network_is_drawn_from_its_table():
    """Losses are known where they were measured; every curve has markers."""
    measured = [(epoch, layer) for epoch in (0, 2, 4) for layer in range(1, 7)]
    names = [f"{measure}_{stage}" for measure in ("nc1", "nc2") for stage in STAGES]
    lines = [
        {"epoch": str(epoch), "layer": str(layer), "loss": str(1 / epoch) if epoch else "", "nfa": "0.5"}
        | dict.fromkeys(names, str(layer))
        for epoch, layer in measured
    ]
    record = network_figures.record_of(lines)
    np.testing.assert_array_equal(record["losses"], [np.nan, 0.5, np.nan, 0.25])
    assert [(row["epoch"], row["layer"]) for row in record["layers"]] == measured
    nc1 = {stage: np.ones((1, 3, 5)) for stage in STAGES}
    losses = np.array([record["losses"]])
    history = network_plots.TrainingHistory("a", np.array([0, 2, 4]), nc1, np.ones((1, 3, 5)), losses)
    *_, loss = network_plots.progress([history], "a").axes
    np.testing.assert_array_equal(loss.lines[0].get_xydata(), [[2, 0.5], [4, 0.25]])
    for axis in network_plots.splits([history], "a").axes:
        assert [line.get_marker() for line in axis.lines] == ["o", "s", "^"]
    styles = network_plots._layer_styles(5)
    assert len({marker for _, marker, _ in styles}) == len({color for color, _, _ in styles}) == 5


def test_eigenvectors(tmp_path, capsys):
    """Of scikit-learn's digits, against automatic differentiation of the definition."""
    n, bandwidth = 40, 10.0
    options = ["--dataset", "digits", "--n", str(n), "--count", "3", "--out", str(tmp_path)]
    assert main(["eigenvectors", *options]) == 0
    X, y = (part.double() if part.is_floating_point() else part for part in datasets.load("digits", n=n))
    K = torch.exp(-torch.cdist(X, X, compute_mode="donot_use_mm_for_euclid_dist") / bandwidth)
    alpha = torch.linalg.solve(K + 1e-3 * torch.eye(n), 2.0 * torch.nn.functional.one_hot(y).double() - 1.0)
    others = ~torch.eye(n, dtype=torch.bool)  # A point's own kink counts as slope 0.

    def outputs(z, mask):
        return torch.exp(-(z - X[mask]).square().sum(1).sqrt() / bandwidth) @ alpha[mask]

    slopes = [torch.autograd.functional.jacobian(lambda z, i=i: outputs(z, others[i]), X[i]) for i in range(n)]
    true = torch.linalg.eigvalsh(sum(G.T @ G for G in slopes) / n).flip(0)
    found = read(tmp_path / "eigenvectors.csv")
    np.testing.assert_allclose([float(row["eigenvalue"]) for row in found], true[:3], rtol=1e-4)
    np.testing.assert_allclose([float(row["share"]) for row in found], true[:3] / true.sum(), rtol=1e-4)
    assert all(float(row["low"]) <= float(row["high"]) for row in found)
    about = json.loads((tmp_path / "eigenvectors.json").read_text())
    assert about["lessons"][0] in capsys.readouterr().out
    assert_drawn(tmp_path / "eigenvectors.png")
    assert main(["draw", "--out", str(tmp_path)]) == 0
    assert "it shows matrices, which no table holds: python -m reproduce eigenvectors" in capsys.readouterr().out


def test_committed_results_name_no_place_of_a_machine():
    for path in (*(ROOT / "reproduce/results").glob("*.json"), *(ROOT / "bench/results").glob("*.json")):
        assert not re.search(r'"(?:/|out/|~)', path.read_text()), path


def test_committed_pictures_are_small_and_beside_their_tables():
    folder = ROOT / "reproduce/results"
    lacking = {path.stem for path in folder.glob("*.csv") if not path.with_suffix(".png").exists()}
    assert lacking <= {"figure1", "figure5"}  # Gram matrices with cos features: an hour of one core
    for path in (*folder.glob("*.png"), *(ROOT / "bench/results").glob("*.png")):
        assert path.stat().st_size < 150_000, path
