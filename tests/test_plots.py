"""What the pictures show, that they take and return Axes as matplotlib's own do, and what they refuse."""

from __future__ import annotations

import io
import itertools
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fastagop
from fastagop import plots

pytest.importorskip("matplotlib")

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

RNG = np.random.default_rng(0)
M = np.diag([1.0, 5.0, 0.5, 3.0]) + 0.1
# Linear RGB as people without one kind of cone see it (Machado, Oliveira & Fernandes 2009, severity 1).
SEEN = {
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritanopia": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
    "all cones": np.eye(3),
}


@pytest.fixture
def ax():
    return Figure().subplots()


@pytest.mark.parametrize("cones", SEEN)
def test_everybody_can_tell_the_stages_apart(cones):
    styles = list(plots.STAGES.values())
    assert len({style.marker for style in styles}) == 3
    seen = [
        np.clip(np.array(SEEN[cones]) @ np.array(to_rgb(style.color)) ** 2.2, 0, 1) ** (1 / 2.2) for style in styles
    ]
    assert all(np.linalg.norm(a - b) > 0.5 for a, b in itertools.combinations(seen, 2))


def test_curves_of_records_and_of_seeds(ax):
    records = [SimpleNamespace(nc1={s: 10.0 ** -(i + j) for j, s in enumerate(plots.STAGES)}) for i in range(4)]
    assert plots.collapse_curves(records, floor="float32", ax=ax) is ax
    assert ax.get_yscale() == "log"
    lines = {line.get_label(): line for line in ax.lines}
    for j, style in enumerate(plots.STAGES.values()):
        line = lines[style.name]
        assert (line.get_color(), line.get_marker()) == (style.color, style.marker)
        np.testing.assert_allclose(line.get_xydata(), [(i + 1, 10.0 ** -(i + j)) for i in range(4)])
    assert ax.lines[-1].get_ydata()[0] == float(np.finfo(np.float32).eps) ** 2
    assert [text.get_text() for text in ax.texts] == ["rounding of float32"]
    estimator = SimpleNamespace(layers_=records)
    again = plots.collapse_curves(estimator, ax=Figure().subplots(), labels={"input": "before"}, legend=False)
    assert len(again.lines) == 3
    assert again.lines[0].get_label() == "before"
    assert again.get_legend() is None


def test_gaps_and_bands(ax):
    seeds = np.array([[1.0, 0.0, np.inf, 4.0], [3.0, 1.0, 1.0, 2.0]])
    plots.collapse_curves({"projected": seeds}, ax=ax)
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [2.0, np.nan, np.nan, 3.0])
    corners = ax.collections[0].get_paths()
    assert {tuple(v) for path in corners for v in path.vertices} >= {(1, 1.0), (1, 3.0), (4, 2.0), (4, 4.0)}
    other = plots.collapse_curves({"input": seeds[0]}, measure="nc2", ax=Figure().subplots())
    np.testing.assert_array_equal(other.lines[0].get_ydata(), [1.0, 0.0, np.nan, 4.0])  # 0 has a place here
    assert other.get_yscale() == "linear"
    assert not other.collections


def test_the_floor_is_that_of_storing_collapsed_features():
    """Samples that differ by less than float32 holds, of unit length around orthogonal means: NC1 below eps^2."""
    y = np.arange(200) % 4
    X = np.linalg.qr(RNG.normal(size=(64, 64)))[0][:4][y] * (1 + 1e-7 * RNG.random((200, 1)))
    found, level = fastagop.collapse.nc1(X.astype(np.float32), y), float(np.finfo(np.float32).eps) ** 2
    assert level / 100 < found <= level


def test_a_spectrum_with_intervals(ax):
    found = fastagop.spectrum(gradients=RNG.normal(size=(30, 4)) * [4, 2, 1, 0], bootstrap=20, random_state=0)
    assert plots.spectrum(found, ax=ax, label="M") is ax
    np.testing.assert_allclose(ax.lines[0].get_ydata()[:3], found.values[:3])
    assert np.isnan(ax.lines[0].get_ydata()[3])  # 0 has no place on a logarithmic axis
    for segment, (low, high) in zip(ax.collections[0].get_segments()[:3], found.intervals, strict=False):
        np.testing.assert_allclose(segment[:, 1], [low, high])
    assert ax.get_title() == "95% intervals of 20 draws"
    plots.spectrum(np.array([3.0, 1.0]), log=False, ax=ax)
    assert ax.lines[0].get_color() != ax.lines[1].get_color()
    nothing = fastagop.spectrum(draws=[np.zeros((2, 2))] * 2)
    plots.spectrum(nothing, ax=Figure().subplots()).figure.savefig(io.BytesIO())


def test_diagonal_bars(ax):
    assert plots.diagonal(torch.from_numpy(M), ["a", "b", "c", "d"], count=3, ax=ax) is ax
    np.testing.assert_allclose([bar.get_width() for bar in ax.patches], [5.1, 3.1, 1.1])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["b", "d", "a"]
    assert ax.yaxis_inverted()
    other = plots.diagonal(M.diagonal(), ax=Figure().subplots())
    assert [label.get_text() for label in other.get_yticklabels()] == ["1", "3", "0", "2"]


@pytest.mark.parametrize(("shape", "d"), [((2, 2), 4), ((3, 2, 2), 12)])
def test_eigenvectors_as_images(shape, d):
    found = fastagop.spectrum(np.diag(np.arange(d, 0.0, -1)), 3)
    figure = Figure()
    assert plots.eigenvectors(found, shape, count=2, figure=figure) is figure
    shown = [axis for axis in figure.axes if axis.images]
    assert [axis.get_title().split(" = ")[1].split()[0] for axis in shown] == [f"{d:g}", f"{d - 1:g}"]
    image = np.asarray(shown[1].images[0].get_array())
    if len(shape) == 2:
        np.testing.assert_array_equal(image, [[0, 1], [0, 0]])
        assert shown[1].images[0].norm(0) == 0.5
    else:
        np.testing.assert_array_equal(image[0, 1], [1, 0.5, 0.5])
        np.testing.assert_array_equal(image[1, 1], 0.5)
    assert len([a for a in plots.eigenvectors(found.vectors, shape, figure=Figure()).axes if a.images]) == 3


def test_gram_strip():
    panels = {1: np.eye(6), "last": torch.ones(6, 6)}
    figure = plots.gram_strip(panels, classes=3, nc1={1: 0.25}, label="digits", figure=Figure())
    first, last, bar = figure.axes
    assert [axis.get_title() for axis in (first, last)] == ["layer 1", "last"]
    assert [axis.get_xlabel() for axis in (first, last)] == ["NC1 = 2.5e-01", ""]
    assert first.get_ylabel() == "digits"
    assert first.images[0].norm(-0.5) == 0.5
    assert "(ETF)" in " ".join(label.get_text() for label in bar.get_yticklabels())
    given = Figure()
    axes = given.subplots(1, 3)
    assert plots.gram_strip(panels, axes=axes) is given
    assert len(given.axes) == 3
    assert not axes[2].axison


def test_new_figures_are_of_pyplot(tmp_path):
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    drawn = [
        plots.diagonal(M).figure,
        plots.spectrum(fastagop.spectrum(M)).figure,
        plots.collapse_curves({"input": [1.0, 0.1]}).figure,
        plots.eigenvectors(M, (2, 2)),
        plots.gram_strip({1: M}),
    ]
    assert len(set(plt.get_fignums()) - set(before)) == 5
    for i, figure in enumerate(drawn):
        figure.savefig(tmp_path / f"{i}.png")
        plt.close(figure)


def test_names_and_measures_are_dictionaries():
    with pytest.raises(TypeError, match=r"labels must be a dictionary \{stage: name\}, got list"):
        plots.collapse_curves({"input": [1.0]}, labels=["input"])
    for panels, nc1, name in (([M], None, "panels"), ({1: M}, [0.5], "nc1")):
        with pytest.raises(TypeError, match=rf"{name} must be a dictionary \{{layer: .*\}}, got list"):
            plots.gram_strip(panels, nc1=nc1)


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for call in (plots.require, lambda: plots.diagonal(M), lambda: plots.gram_strip({1: M})):
        with pytest.raises(ImportError, match=r"pip install 'fastagop\[plots\]'"):
            call()


REFUSED = {
    "measure": ("measure must be one of", lambda: plots.collapse_curves({}, measure="nc3")),
    "stages": ("values must have stages among", lambda: plots.collapse_curves({"output": [1.0]})),
    "no stages": ("values must have stages among", lambda: plots.collapse_curves({})),
    "no records": ("values must be a fitted Deep RFM", lambda: plots.collapse_curves([1.0, 2.0])),
    "records of regression": ("values must be", lambda: plots.collapse_curves([SimpleNamespace(nc1={})])),
    "three dimensions": (
        "values.'input'. must have shape",
        lambda: plots.collapse_curves({"input": np.ones((2, 2, 2))}),
    ),
    "a class": ("values must be a fitted Deep RFM", lambda: plots.collapse_curves(fastagop.DeepRFMClassifier)),
    "a matrix": (r"got a matrix; fastagop.spectrum\(M\) has both", lambda: plots.spectrum(M)),
    "floor": ("floor must be one of", lambda: plots.collapse_curves({"input": [1.0]}, floor="float16")),
    "names": ("names must be of the 4 features", lambda: plots.diagonal(M, ["a"])),
    "M": ("M must be", lambda: plots.diagonal(np.ones((2, 3)))),
    "words": ("found must hold numbers", lambda: plots.spectrum(np.array(["a"]))),
    "a model": ("M must hold numbers, got DeepRFMClassifier", lambda: plots.diagonal(fastagop.DeepRFMClassifier())),
    "uneven rows": (
        "found must hold numbers in rows of one length, got list",
        lambda: plots.eigenvectors([[1, 2], [3]], (2, 1)),
    ),
    "shape": (r"shape must be .* of 4 numbers, got \(3, 3\)", lambda: plots.eigenvectors(M, (3, 3))),
    "one side": ("shape must be .* of 4 numbers, got 4", lambda: plots.eigenvectors(M, 4)),
    "negative sides": ("shape must be .* of 4 numbers", lambda: plots.eigenvectors(M, (-2, -2))),
    "panels that are not square": (r"panels\['a'\] must be a square", lambda: plots.gram_strip({"a": M[:2]})),
    "colours": ("shape must be", lambda: plots.eigenvectors(M, (2, 2, 1))),
    "count": ("count must be an integer from 1 to 4", lambda: plots.eigenvectors(M, (2, 2), count=5)),
    "no panels": ("panels must hold", lambda: plots.gram_strip({})),
    "a vector": ("panels.1. must hold numbers in 2", lambda: plots.gram_strip({1: np.ones(3)})),
    "few axes": ("axes must be one for each", lambda: plots.gram_strip({1: M, 2: M}, axes=[Figure().subplots()])),
    "one class": ("classes must be an integer >= 2", lambda: plots.gram_strip({1: M}, classes=1, figure=Figure())),
}


@pytest.mark.parametrize(("message", "call"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses(message, call):
    with pytest.raises(ValueError, match=message):
        call()


def test_refuses_to_draw_on_what_is_not_axes():
    several = Figure().subplots(2)
    for call in (plots.spectrum, plots.diagonal):
        with pytest.raises(TypeError, match=r"ax must be matplotlib's Axes, got ndarray"):
            call(np.ones(3), ax=several)
    with pytest.raises(TypeError, match=r"ax must be matplotlib's Axes, got Figure"):
        plots.collapse_curves({"input": [1.0]}, ax=Figure())
    with pytest.raises(TypeError, match=r"ax must be matplotlib's Axes, got int"):
        plots.curve(3, np.arange(2), np.ones(2), color="k")
    with pytest.raises(TypeError, match=r"axes must be a sequence of matplotlib's Axes, got Axes"):
        plots.gram_strip({1: M}, axes=several[0])
    with pytest.raises(TypeError, match=r"each of axes must be matplotlib's Axes, got ndarray"):
        plots.gram_strip({1: M}, axes=Figure().subplots(2, 2))
    for call in (lambda: plots.gram_strip({1: M}, figure=several[0]), lambda: plots.eigenvectors(M, (2, 2), figure=1)):
        with pytest.raises(TypeError, match="figure must be a matplotlib Figure or SubFigure, got"):
            call()
