"""Every measure of collapse over batches: it takes the words of the function of its name, and gives its number."""

from __future__ import annotations

import inspect
import itertools

import numpy as np
import pytest

from fastagop import collapse
from fastagop.collapse.classifier import ERRORS
from fastagop.collapse.measures import METRICS
from fastagop.collapse.moments import WEIGHTINGS

# Those of the functions that are measures of features in memory: nc4 reads batches, and the others have no form over
# batches.
MEASURES = {
    name: getattr(collapse, name)
    for name in collapse.__all__
    if inspect.isfunction(getattr(collapse, name)) and name not in ("gram", "of_stages", "nc4")
}
METRICS_OF = {"nc1": METRICS, "nc3": ERRORS}


def words(measure) -> dict[str, str]:
    """The arguments that go by name, with their defaults."""
    found = inspect.signature(measure).parameters
    return {key: one.default for key, one in found.items() if one.kind == one.KEYWORD_ONLY}


@pytest.mark.parametrize("name", MEASURES)
def test_an_accumulator_has_every_measure(name):
    measure, method = MEASURES[name], getattr(collapse.Accumulator, name, None)
    assert method is not None, "give collapse.Accumulator a method of the name of the measure"
    assert words(method) == words(measure)
    rng, labels = np.random.default_rng(0), np.repeat([-3, 7, 8, 100, 104], [12, 20, 9, 15, 1])  # sizes differ
    X = 1e3 * (
        2.0 * rng.normal(size=(5, 9))[np.unique(labels, return_inverse=True)[1]] + rng.normal(size=(57, 9)) + 3.0
    )
    found = collapse.Accumulator(covariance=True).extend((X[i : i + 10], labels[i : i + 10]) for i in range(0, 57, 10))
    first = (rng.normal(size=(5, 9)),) if "W" in inspect.signature(measure).parameters else ()
    choices = {"weighting": WEIGHTINGS, "metric": METRICS_OF.get(name)}
    for values in itertools.product(*(choices[word] for word in words(measure))):
        how = dict(zip(words(measure), values, strict=True))
        if how != {"metric": "pinv", "weighting": "classes"}:  # which an accumulator refuses
            wanted = measure(*first, X, labels, **how)
            assert getattr(found, name)(*first, **how) == pytest.approx(wanted, rel=1e-12), how
