"""Probes: planted directions are found, with signs; rows held out stay unseen; the metric asked for decides."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn.metrics import roc_auc_score

import fastagop
from fastagop import GeneralisedLaplace, Laplace, RFMClassifier
from fastagop.probes import fitting, scores

QUICK = {"bandwidths": ["median"], "centers": [False], "iterations": 1, "random_state": 0, "dtype": "float64"}


def labels(n, seed=0, classes=2):
    return np.random.default_rng(seed).permutation(np.arange(n) % classes)


def noise(n, d, seed=1):
    return np.random.default_rng(seed).normal(size=(n, d))


def planted(y, d, strength, seed=1, rows=0):
    """(activations, the unit vector along which they grow with y) in Gaussian noise, other noise for other ``rows``."""
    v = np.random.default_rng(100 + seed).normal(size=d)
    v /= np.linalg.norm(v)
    return noise(len(y), d, seed + 50 * rows) + strength * np.outer(y - y.mean(), v), v


@pytest.fixture(scope="module")
def found():
    """(y, activations, planted vectors, probes) of three layers: noise, a strong direction, a weaker one."""
    y = labels(120)
    strong, v = planted(y, 512, 8.0)
    weak, w = planted(y, 64, 3.0, seed=2)
    activations = {"noise": noise(120, 64, 3), ("mlp", 3): strong, 7: weak}
    return y, activations, {("mlp", 3): v, 7: w}, fastagop.probes.fit(activations, y, iterations=2, random_state=0)


def test_planted_directions_are_found(found):
    y, _, planted_at, probes = found
    assert list(probes.layers) == list(probes.scores) == ["noise", ("mlp", 3), 7]
    assert probes.best_layer == ("mlp", 3)
    assert probes.scores["mlp", 3] == 1.0
    assert probes.scores[7] > 0.85
    assert probes.scores["noise"] < 0.85
    for name, v in planted_at.items():
        probe = probes.layers[name]
        assert probe.directions.shape == (1, len(v))
        assert np.linalg.norm(probe.directions) == pytest.approx(1.0, abs=1e-6)
        assert probe.directions[0] @ v > (0.9 if name == ("mlp", 3) else 0.7)  # towards class 1
        assert probe.correlations[0] > 0.5
    assert len(probes.held_out) == 24
    assert np.bincount(y[probes.held_out]).tolist() == [12, 12]


def test_signs_follow_the_labels(found):
    y, activations, planted_at, _ = found
    v, X = planted_at["mlp", 3], activations["mlp", 3]
    for target, sign in ((1 - y, -1.0), (np.where(y == 1, "yes", "no"), 1.0), (np.where(y == 1, "a", "b"), -1.0)):
        probe = fastagop.probes.fit([X], target, aggregate=False, **QUICK).layers[0]
        assert sign * (probe.directions[0] @ v) > 0.9


def test_signs_follow_the_targets():
    y = np.random.default_rng(0).normal(size=100)
    X, v = planted(y, 150, 6.0)
    for sign in (1.0, -1.0):
        probes = fastagop.probes.fit({"a": X}, 5.0 + sign * y, directions=3, **QUICK)
        assert probes.scoring == "correlation"
        assert probes.scores["a"] > 0.9
        assert sign * (probes.layers["a"].directions[0] @ v) > 0.9
        assert probes.layers["a"].directions.shape == (3, 150)
        values = probes.layers["a"].values
        assert values.shape == (3,)
        assert np.all(np.diff(values) <= 0)


def test_without_a_metric_directions_are_those_of_one_agop():
    y = labels(100)
    X, v = planted(y, 60, 6.0)
    probe = fastagop.probes.fit([X], y, **{**QUICK, "iterations": 0}).layers[0]
    assert probe.iterations == probe.estimator.best_iteration_ == 0
    assert probe.directions[0] @ v > 0.9


@pytest.mark.parametrize("scoring", [None, "balanced_accuracy"])
def test_a_score_is_of_rows_that_its_predictor_has_not_seen(scoring):
    """Every score of every setting is that of an RFM of the other rows; the estimator is one of all rows."""
    y = labels(60)
    activations = {"a": planted(y, 10, 2.0)[0], "b": planted(y, 80, 2.0, seed=2)[0]}
    grid = {**QUICK, "bandwidths": [3.0, "median"], "centers": [False, True], "iterations": 2}
    probes = fastagop.probes.fit(activations, y, scoring=scoring, aggregate=False, **grid)
    out = probes.held_out
    learn = np.setdiff1d(np.arange(60), out)
    for name, X in activations.items():
        probe = probes.layers[name]
        assert set(probe.settings) == {(b, c) for b in (3.0, "median") for c in (False, True)}
        for (bandwidth, center), tried in probe.settings.items():
            for count, score in enumerate(tried):
                machine = RFMClassifier(Laplace(bandwidth), iterations=count, center=center, dtype="float64")
                machine.fit(X[learn], y[learn])
                outputs = machine.decision_function(X[out])
                right = (y[out] == 1) == (outputs > 0)
                expected = roc_auc_score(y[out], outputs) if scoring is None else right.mean()  # equal classes
                assert score == pytest.approx(expected)
        assert probe.score == max(tried.max() for tried in probe.settings.values())
        assert (probe.center, probe.iterations) == (probe.estimator.center, probe.estimator.iterations)
        assert probe.settings[probe.estimator.kernel.bandwidth, probe.center][probe.iterations] == probe.score
        assert probe.bandwidth == fastagop.settled(probe.estimator.kernel, torch.from_numpy(X)).bandwidth
        whole = RFMClassifier(probe.estimator.kernel, probe.iterations, center=probe.center, dtype="float64")
        assert np.array_equal(whole.fit(X, y).decision_function(X), probes.decision_function({name: X})[name])


def test_the_metric_that_is_asked_for_decides():
    """Minus AUC, as a score, chooses what AUC likes least."""
    y = labels(80)
    X, _ = planted(y, 40, 2.0)
    grid = {**QUICK, "bandwidths": [2.0, 20.0], "centers": [False, True], "iterations": 3, "aggregate": False}
    best = fastagop.probes.fit([X], y, **grid).layers[0]
    worst = fastagop.probes.fit([X], y, scoring=lambda *call: -scores.auc(*call), **grid).layers[0]
    assert best.score == max(tried.max() for tried in best.settings.values())
    assert -worst.score == min(tried.min() for tried in best.settings.values())
    assert best.score > -worst.score


def test_all_layers_have_the_same_rows_held_out():
    y = labels(50, classes=3)
    seen = []

    def scoring(estimator, X, y):
        seen.append((X[:, -1].round().astype(int), y))
        return 0.0

    activations = [np.c_[noise(50, 5 + i, i), np.arange(50)] for i in range(3)]
    probes = fastagop.probes.fit(activations, y, scoring=scoring, **QUICK)
    assert len(seen) == 3 * 2 + 1  # iterations of three layers, and the combination, which has other columns
    for rows, answers in seen[:-1]:
        assert np.array_equal(rows, probes.held_out)
        assert np.array_equal(answers, y[probes.held_out])
    assert np.array_equal(seen[-1][1], y[probes.held_out])


def test_rows_are_held_out_by_class():
    y = np.repeat([0, 1, 2], [80, 15, 2])
    probes = fastagop.probes.fit([noise(97, 4)], y, aggregate=False, **QUICK)
    assert np.bincount(y[probes.held_out]).tolist() == [16, 3, 1]
    assert probes.scoring == "mean one-vs-rest AUC"
    again = fastagop.probes.fit([noise(97, 4)], y, aggregate=False, **QUICK)
    other = fastagop.probes.fit([noise(97, 4)], y, aggregate=False, **{**QUICK, "random_state": 1})
    assert np.array_equal(again.held_out, probes.held_out)
    assert not np.array_equal(other.held_out, probes.held_out)


def test_nothing_is_learnt_from_given_validation_rows():
    y, z = labels(60), labels(20, 1)
    X, Z = planted(y, 70, 3.0)[0], planted(z, 70, 3.0)[0]
    given = fastagop.probes.fit({"a": X}, y, validation=({"a": Z}, z), **QUICK)
    plain = RFMClassifier(Laplace("median"), given.layers["a"].iterations, dtype="float64").fit(X, y)
    assert given.held_out is None
    assert np.array_equal(given.decision_function({"a": Z})["a"], plain.decision_function(Z))
    assert given.scores == given.score({"a": Z}, z)
    assert given.scores["a"] == roc_auc_score(z, plain.decision_function(Z))
    wrong = fastagop.probes.fit({"a": X}, y, validation=({"a": Z}, 1 - z), **{**QUICK, "iterations": 0})
    assert wrong.scores["a"] < 0.5
    assert wrong.aggregate.weights["a"] > 0  # of the rows to learn from alone


def test_the_combination_sees_no_outputs_of_machines_that_know_the_labels(monkeypatch):
    """No row that it is fitted or scored on is among the points of the machine that answers for it."""
    y, calls = labels(40), []

    def spied(machine, rows):
        calls.append((machine._centers, rows))
        return plain(machine, rows)

    plain = fitting.outputs
    monkeypatch.setattr(fitting, "outputs", spied)
    layers = [planted(y, 5, 1.0, seed)[0] for seed in (1, 2)]
    probes = fastagop.probes.fit(layers, y, **{**QUICK, "iterations": 0})
    assert len(calls) == 2 * (5 + 1)
    for centers, rows in calls:
        assert float(torch.cdist(centers, torch.from_numpy(rows)).min()) > 0
    assert sorted(len(rows) for _, rows in calls) == sorted([6, 6, 6, 7, 7, len(probes.held_out)] * 2)


def test_the_combination_adds_what_layers_know():
    y = labels(300)
    layers = {name: planted(y, 20, 1.5, seed)[0] for name, seed in (("a", 1), ("b", 2))}
    layers["noise"] = noise(300, 20, 9)
    probes = fastagop.probes.fit(layers, y, **QUICK)
    weights = probes.aggregate.weights
    assert min(weights["a"], weights["b"]) > 2 * abs(weights["noise"])
    z = labels(1000, 5)
    new = {name: planted(z, 20, 1.5, seed, rows=1)[0] for name, seed in (("a", 1), ("b", 2))}
    new["noise"] = noise(1000, 20, 10)
    combined = probes.aggregate
    assert combined.score_of(new, z) > max(probes.score(new, z).values()) + 0.02
    assert combined.score_of(new, z) == pytest.approx(roc_auc_score(z, combined.decision_function(new)))
    assert (combined.predict(new) == z).mean() > 0.75
    assert combined.score == pytest.approx(combined.score_of(new, z), abs=0.1)


def test_more_classes_and_more_targets():
    y = labels(90, classes=3)
    names = np.array(["x", "y", "z"])[y]
    X = noise(90, 30) + 4.0 * np.eye(30)[y]
    probes = fastagop.probes.fit({"a": X, "b": X[:, :20]}, names, **QUICK)
    assert probes.classes.tolist() == ["x", "y", "z"]
    assert probes.decision_function({"b": X[:, :20]})["b"].shape == (90, 3)
    assert probes.aggregate.decision_function({"a": X, "b": X[:, :20]}).shape == (90, 3)
    assert (probes.predict({"a": X})["a"] == names).mean() > 0.9
    assert probes.aggregate.weights["a"].shape == (3, 3)
    assert min(probes.scores.values()) > 0.9

    Y = X[:, :2] + X[:, 2:4]
    probes = fastagop.probes.fit({"a": X}, Y, **QUICK)
    assert probes.classes is None
    assert probes.predict({"a": X})["a"].shape == probes.aggregate.predict({"a": X}).shape == (90, 2)
    assert probes.aggregate.weights["a"].shape == (2, 2)
    with pytest.raises(AttributeError, match="regression"):
        probes.decision_function({"a": X})


@pytest.mark.parametrize(
    "kind", [float, bool, lambda y: y[:, None], torch.from_numpy, lambda y: torch.tensor(y).half()]
)
def test_two_whole_numbers_are_classes(kind):
    y = labels(40)
    X, _ = planted(y, 10, 3.0)
    probes = fastagop.probes.fit(
        [X], kind(y) if callable(kind) and not isinstance(kind, type) else y.astype(kind), **QUICK
    )
    plain = fastagop.probes.fit([X], y, **QUICK)
    assert probes.scoring == "AUC"
    assert probes.scores == plain.scores
    assert probes.score([X], kind(y) if not isinstance(kind, type) else y.astype(kind)) == plain.score([X], y)


def test_floats_are_targets():
    y = np.where(labels(40), 0.25, 0.75)
    assert fastagop.probes.fit([noise(40, 5)], y, **QUICK).scoring == "correlation"


def test_kinds_of_activations():
    """Halves are read as what they hold; directions and predictions are tensors where activations were."""
    y = labels(40)
    X = np.stack([planted(y, 50, 4.0, seed)[0] for seed in (1, 2)])
    options = {**QUICK, "dtype": "float32"}
    for half in (torch.float16, torch.bfloat16):
        tensor = torch.from_numpy(X).to(half)
        expected = fastagop.probes.fit(tensor.float().numpy(), y, **options)
        for given in (
            (tensor, {0: tensor[0], 1: tensor[1].requires_grad_()}) if half is torch.float16 else (list(tensor),)
        ):
            probes = fastagop.probes.fit(given, torch.from_numpy(y), **options)
            assert probes.scores == expected.scores
            assert isinstance(probes.layers[1].directions, torch.Tensor)
            assert np.array_equal(probes.layers[1].directions.numpy(), expected.layers[1].directions)
            outputs = probes.decision_function(given)[0]
            assert outputs.dtype == torch.float32
            assert np.array_equal(outputs.numpy(), expected.decision_function(tensor.float().numpy())[0])
            assert probes.aggregate.score == expected.aggregate.score
    narrow = fastagop.probes.fit(X.astype(np.float16), y, **options)
    assert isinstance(narrow.layers[0].directions, np.ndarray)
    assert narrow.layers[0].directions.dtype == np.float32


def test_kernels_and_bandwidths():
    y = labels(40)
    X, _ = planted(y, 10, 3.0)
    options = {**QUICK, "bandwidths": [2.0, ("median", 0.5)], "aggregate": False}
    listed = fastagop.probes.fit([X], y, **{**options, "bandwidths": [["median", 0.5]]})  # as JSON has pairs
    assert {bandwidth for bandwidth, _ in listed.layers[0].settings} == {("median", 0.5)}
    probe = fastagop.probes.fit([X], y, kernel=GeneralisedLaplace(1.0, 0.7), **options).layers[0]
    assert probe.estimator.kernel_ == GeneralisedLaplace(probe.bandwidth, 0.7)
    assert list(probe.settings) == [(2.0, False), (("median", 0.5), False)]
    probe = fastagop.probes.fit([X], y, kernel=fastagop.Gaussian, **options).layers[0]
    assert probe.estimator.kernel_ == fastagop.Gaussian(probe.bandwidth)


def test_a_layer_that_says_nothing():
    y = labels(40)
    probes = fastagop.probes.fit({"dead": np.ones((40, 6)), "live": planted(y, 6, 5.0)[0]}, y, **QUICK)
    assert probes.scores["dead"] == 0.5
    assert probes.best_layer == "live"
    assert probes.aggregate.score > 0.9


def test_warnings_name_the_layer_and_are_of_what_is_kept():
    y = labels(40)
    layers = {"near": planted(y, 6, 5.0)[0], "far": 1e3 * planted(y, 6, 5.0)[0]}
    with pytest.warns(fastagop.NumericalWarning, match=r"layer 'far': solve.*: at bandwidth 1 ") as caught:
        fastagop.probes.fit(layers, y, **{**QUICK, "bandwidths": [1.0]})
    assert len(caught) == 1
    fastagop.probes.fit(layers, y, **{**QUICK, "bandwidths": [1.0, 1e3]})  # the useless bandwidth is not kept


def test_scores():
    rng = np.random.default_rng(0)
    y, outputs = rng.integers(0, 3, 50), rng.normal(size=(50, 3)).round(1)  # with ties

    class Model:
        classes_ = np.arange(3)

        def decision_function(self, X):
            return X if self.classes_.size == 3 else X[:, 1]

        def predict(self, X):
            return X

    model = Model()
    each = [roc_auc_score(y == label, outputs[:, label]) for label in range(3)]
    assert scores.auc(model, outputs, y) == pytest.approx(np.mean(each))
    assert scores.auc(model, outputs[y < 2], y[y < 2]) == pytest.approx(
        np.mean([roc_auc_score(y[y < 2] == label, outputs[y < 2, label]) for label in range(2)])
    )
    with pytest.raises(ValueError, match=r"AUC needs rows of at least two classes, got \[1\]"):
        scores.auc(model, outputs[y == 1], y[y == 1])
    model.classes_ = np.arange(2)
    assert scores.auc(model, outputs, y == 1) == pytest.approx(each[1])
    targets = outputs + rng.normal(size=(50, 3))
    expected = [np.corrcoef(outputs[:, k], targets[:, k])[0, 1] for k in range(3)]
    assert scores.correlation(model, outputs, targets) == pytest.approx(np.mean(expected))
    assert scores.correlation(model, outputs[:, 0], targets[:, 0]) == pytest.approx(expected[0])
    assert scores.correlation(model, np.ones(50), targets[:, 0]) == 0.0


def test_prints_as_a_table(found):
    lines = repr(found[3]).splitlines()
    assert lines[0] == "Probes of 120 rows (24 of them held out); score: AUC; best layer: ('mlp', 3)"
    assert lines[1].split() == ["layer", "score", "bandwidth", "center", "iterations"]
    assert [line[:10].strip() for line in lines[2:]] == ["noise", "('mlp', 3)", "7", "aggregate"]
    assert len({len(line) for line in lines[1:5]}) == 1
    assert repr(found[3].layers[7]).startswith("Probe(7: score 0.")
    assert repr(found[3].aggregate).startswith("Aggregate(score ")


def test_directions_are_counted_before_any_layer_is_searched(monkeypatch):
    monkeypatch.setattr(fitting, "_search", lambda *_: pytest.fail("a layer was searched"))
    with pytest.raises(ValueError, match="layer 'narrow': directions must be an integer from 1 to 2, got 3"):
        fastagop.probes.fit({"wide": noise(20, 3), "narrow": noise(20, 2)}, labels(20), directions=3)


BAD = noise(20, 3)
BAD[[4, 7], 1] = np.nan


@pytest.mark.parametrize(
    ("activations", "changes", "message"),
    [
        ({"a": noise(20, 3), "b": BAD}, {}, r"layer 'b' holds NaN or infinity in 2 of 20 rows, of which row 4 is the"),
        ([torch.full((20, 3), 7e4).half()], {}, "layer 0 holds NaN or infinity in 20 of 20 rows"),
        ({"a": noise(20, 3), "b": noise(19, 3), "c": noise(20, 2)}, {}, "numbers differ: 20 in 'a', 'c'; 19 in 'b'"),
        ({"a": noise(19, 3)}, {}, "y must have one row per row of the layers: these have 19, y has 20"),
        ({"a": noise(60, 3).reshape(20, 3, 3)}, {}, r"layer 'a' must have shape \(n, d\) .* of tokens"),
        (noise(20, 3), {}, r"activations must have shape \(layers, n, d\), got \(20, 3\)"),
        ({}, {}, "at least one layer"),
        ("abc", {}, "activations must be a mapping"),
        ([np.full((20, 3), "x")], {}, "layer 0 must hold real numbers"),
        ([noise(20, 3)], {"directions": 4}, "layer 0: directions must be an integer from 1 to 3, got 4"),
        ([noise(20, 3)], {"directions": 0}, "directions must be an integer >= 1"),
        ([[[1.0, 2.0], [3.0]] * 10], {}, r"^layer 0 must have shape \(n, d\), rows of the same length"),
        ([scipy.sparse.csr_array(noise(20, 3))], {}, "^layer 0 must be a dense array, got csr_array; use toarray"),
        ([noise(20, 3)], {"validation": 3}, r"^validation must be a pair \(activations, y\), got int"),
        ([noise(20, 3)], {"y": 3}, r"^y must be labels \(n,\), .* got 3$"),
        ([noise(20, 3)], {"y": None}, r"^y must be labels \(n,\), .* got None$"),
        ([noise(20, 3)], {"bandwidths": "median"}, "bandwidths must be a sequence"),
        ([noise(20, 3)], {"bandwidths": []}, "bandwidths must hold at least one value"),
        ([noise(20, 3)], {"bandwidths": [-1.0]}, "bandwidth must be a positive finite number"),
        ([noise(20, 3)], {"centers": [1]}, "centers must be True or False"),
        ([noise(20, 3)], {"kernel": "laplace"}, "kernel must be a fastagop kernel"),
        ([noise(20, 3)], {"kernel": fastagop.LpLaplace}, "kernel must be a class that is made of a bandwidth, such as"),
        ([noise(20, 3)], {"kernel": fastagop.Polynomial}, "kernel must be a class .*, got Polynomial; give"),
        ([noise(20, 3)], {"verbose": "yes"}, "verbose must be an integer >= 0, got 'yes'"),
        ([noise(20, 3)], {"scoring": "rocauc"}, "scoring must be None, the name of a scorer"),
        ([noise(20, 3)], {"validation_fraction": 1.0}, "validation_fraction must be a number between 0 and 1"),
        (
            [noise(20, 3)],
            {"y": np.arange(20) // 19},
            "class 1 of y has one row.* validation=, or y as floats, which mean reg",
        ),
        ([noise(20, 3)], {"y": torch.arange(20)}, "^class 0 of y has one row.* or y as floats, which mean regression$"),
        ([noise(20, 3)], {"y": np.array(["a"] + ["b"] * 19)}, "^class 'a' of y has one row, .*; give validation=$"),
        (
            [noise(20, 3)],
            {"y": np.arange(20) // 18},
            "aggregate=True needs at least two rows of every class.* class 1 has",
        ),
        ([noise(20, 3)], {"y": np.zeros(20)}, "y: all targets are equal"),
        (
            [noise(20, 3)],
            {"y": np.where(labels(20), np.nan, 1.0)},
            "^y holds missing labels or targets in 10 of 20 rows",
        ),
        ([noise(20, 3)], {"validation": noise(20, 3)}, "validation must be a pair"),
        ({"a": noise(20, 3)}, {"validation": ({"b": noise(9, 3)}, labels(9))}, r"the layers \['a'\], got \['b'\]"),
        ([noise(20, 3)], {"validation": ([noise(9, 2)], labels(9))}, "validation: layer 0 must have 3 columns, got 2"),
        ([noise(20, 3)], {"validation": ([noise(9, 3)], labels(8))}, "y of validation must have one row per row"),
        ([noise(20, 3)], {"validation": ([noise(9, 3)], np.zeros(9, int))}, "labels of validation must be those of y"),
        ([noise(20, 3)], {"y": np.zeros(20, int)}, "y must hold at least two classes, got one class: 0$"),
        ([noise(20, 3)], {"y": noise(20, 2), "validation": ([noise(9, 3)], noise(9, 3))}, "must have the columns of y"),
        ([noise(20, 3)], {"validation": ([BAD], labels(20))}, "validation: layer 0 holds NaN"),
    ],
)
def test_what_is_wrong_is_said(activations, changes, message):
    options = {"y": labels(20), **QUICK, **changes}
    with pytest.raises((ValueError, TypeError), match=message):
        fastagop.probes.fit(activations, options.pop("y"), **options)


def test_unknown_and_missing_layers(found):
    _, activations, _, probes = found
    with pytest.raises(ValueError, match=r"not probed: \['other'\]"):
        probes.predict({"other": noise(5, 3)})
    with pytest.raises(ValueError, match="these are missing: \\['noise'\\]"):
        probes.aggregate.predict({name: X for name, X in activations.items() if name != "noise"})
    assert list(probes.predict({7: activations[7]})) == [7]
    narrow = {name: X[:, :2] for name, X in activations.items()}
    first, d = next((name, X.shape[1]) for name, X in activations.items())
    for call in (probes.predict, probes.decision_function, probes.aggregate.predict):
        with pytest.raises(ValueError, match=rf"^layer {first!r} must have {d} columns, as in probes.fit, got 2$"):
            call(narrow)


def test_labels_to_score_are_those_of_fit(normal):
    """Digits scored by a probe of "above 4", and the other way about: neither may pass for a score."""
    X, y = normal(200, 6), torch.arange(200) % 10
    two, ten = fastagop.probes.fit([X], y > 4, **QUICK), fastagop.probes.fit([X], y, **QUICK)
    assert two.score([X], (y > 4).long()) == two.score([X], y > 4)
    words = fastagop.probes.fit([X], np.where(y.numpy() > 4, "hi", "lo"), **QUICK)
    for found, given in ((two, y), (ten, y > 4), (words, np.where(y.numpy() > 4, "HI", "LO"))):
        with pytest.raises(ValueError, match="y must hold labels that fit has seen"):
            found.score([X], given)
    both = fastagop.probes.fit({"a": X, "b": X}, y > 4, **QUICK, aggregate=True).aggregate
    with pytest.raises(ValueError, match="y must hold labels that fit has seen"):
        both.score_of({"a": X, "b": X}, y)
