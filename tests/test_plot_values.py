"""What the figures of Deep RFM draw: the band of the seeds, and the colour between classes that have collapsed."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from reproduce import plots


def test_the_band_reaches_from_the_least_seed_to_the_largest():
    values = np.array([[1.0, 10.0, 0.1], [3.0, 20.0, 0.2], [2.0, 90.0, 0.6]])
    stages = {"input": values, "projected": 10 * values, "features": 100 * values}
    figure = plots.curves([plots.Curves("digits", stages, stages)], "title", "ReLU")
    for axis in figure.axes:
        assert axis.get_yscale() == ("log" if axis is figure.axes[0] else "linear")
        for factor, line, band in zip((1, 10, 100), axis.lines, axis.collections, strict=True):
            np.testing.assert_allclose(line.get_xydata(), [(i + 1, factor * v) for i, v in enumerate(values.mean(0))])
            corners = band.get_paths()[0].vertices
            for layer, column in enumerate(values.T, start=1):
                heights = corners[corners[:, 0] == layer, 1]
                assert heights.min() == pytest.approx(factor * column.min())
                assert heights.max() == pytest.approx(factor * column.max())


@pytest.mark.parametrize("classes", [3, 10])
def test_collapsed_classes_are_drawn_in_the_colour_of_the_middle(classes):
    """An equiangular tight frame of C classes has cosines -1 / (C - 1): the scale's white, and a tick of that name."""
    strip = plots.Strip("digits", {1: np.eye(4), 7: np.ones((4, 4))}, {1: 2.0, 7: 0.5}, classes)
    figure = plots.strips([strip], "title")
    first, second, bar = figure.axes
    norm = first.images[0].norm
    assert (norm.vmin, norm.vcenter, norm.vmax) == (-1, pytest.approx(-1 / (classes - 1)), 1)
    assert [axis.get_title() for axis in (first, second)] == ["layer 1", "layer 7"]
    assert [axis.get_xlabel() for axis in (first, second)] == ["NC1 = 2.0e+00", "NC1 = 5.0e-01"]
    ticks = dict(zip(bar.get_yticks(), (label.get_text() for label in bar.get_yticklabels()), strict=True))
    assert ticks[-1 / (classes - 1)] == f"$-$1/{classes - 1} (ETF)"
