"""What estimators are given: every kind of array that works gives the same answer, and the rest is refused by name."""

from __future__ import annotations

import inspect
import logging
import os

import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import check_array_api_input

import fastagop
from fastagop import DeepRFMClassifier, DeepRFMRegressor, RFMClassifier, RFMRegressor
from fastagop.estimators import inputs

MAKE = {
    "RFMClassifier": lambda **more: RFMClassifier(iterations=1, **more),
    "RFMRegressor": lambda **more: RFMRegressor(iterations=1, **more),
    "DeepRFMClassifier": lambda **more: DeepRFMClassifier(depth=1, width=16, random_state=0, **more),
    "DeepRFMRegressor": lambda **more: DeepRFMRegressor(depth=1, width=16, random_state=0, **more),
}
every = pytest.mark.parametrize("name", MAKE)
classifiers = pytest.mark.parametrize("name", [name for name in MAKE if "Classifier" in name])


def data(n=40, d=4):
    X = np.random.default_rng(0).normal(size=(n, d)).round(2)
    return X, (X[:, 0] * X[:, 1] > 0).astype(int)


@classifiers
@pytest.mark.parametrize("labels", [">i8", ">i4", ">f8", "u8", "u2", "i1", "f2", "g", "?", "U3", "O", "M8[D]"])
@pytest.mark.parametrize("rows", ["numpy", "torch"])
def test_labels_of_any_kind(name, labels, rows):
    X, y = data()
    y = np.array(["no", "yes"])[y] if labels == "O" else y
    X = X if rows == "numpy" else torch.from_numpy(X)
    model = MAKE[name]().fit(X, y.astype(labels))
    assert (np.asarray(model.predict(X)) == y.astype(labels)).mean() > 0.9
    assert model.score(X, y.astype(labels)) > 0.9
    assert isinstance(model.predict(X), torch.Tensor) == (rows == "torch" and labels not in ("g", "U3", "O", "M8[D]"))


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.uint8, torch.bool])
def test_torch_targets_of_any_kind(name, dtype):
    X, y = data()
    model = MAKE[name]().fit(torch.from_numpy(X), torch.from_numpy(y).to(dtype))
    plain = MAKE[name]().fit(torch.from_numpy(X), torch.from_numpy(y))
    assert torch.equal(model.predict(torch.from_numpy(X)).double(), plain.predict(torch.from_numpy(X)).double())
    assert model.score(torch.from_numpy(X), torch.from_numpy(y).to(dtype)) > 0.9


@every
@pytest.mark.parametrize(
    "kind",
    [torch.bfloat16, torch.float16, torch.int64, torch.int8, np.float16, np.int64, ">f8", ">f4", ">i4", "g", "O"],
)
def test_rows_of_any_kind(name, kind):
    X, y = data()
    X = (4 * X).round()
    converted = torch.from_numpy(X).to(kind) if isinstance(kind, torch.dtype) else X.astype(kind)
    model, plain = MAKE[name]().fit(converted, y), MAKE[name]().fit(X, y)
    found = model.transform(converted)
    floating = isinstance(kind, torch.dtype) and kind.is_floating_point
    assert found.dtype == (kind if floating else torch.float64 if isinstance(kind, torch.dtype) else np.float64)
    tolerance = torch.finfo(kind).eps if floating else 1e-12
    expected = plain.transform(X)
    np.testing.assert_allclose(
        torch.as_tensor(found).double(), expected, rtol=tolerance, atol=tolerance * np.abs(expected).max()
    )


@every
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda X, y: (X.to_sparse(), y), TypeError, r"^X must be a dense tensor.*X.to_dense\(\)"),
        (lambda X, y: (X.to_sparse_csr(), y), TypeError, r"^X must be a dense tensor.*X.to_dense\(\)"),
        (lambda X, y: (X.to("meta"), y), ValueError, "^X must hold numbers.*meta"),
        (lambda X, y: (X.to(torch.complex64), y), ValueError, "Complex data not supported: X"),
        (lambda X, y: (X[:, 0], y), ValueError, "Expected 2D array: X .*Reshape your data"),
        (lambda X, y: (X[None], y), ValueError, r"Expected 2D array: X .*X.reshape\(len\(X\), -1\)"),
        (lambda X, y: (X[:0], y[:0]), ValueError, "^X must have at least one row"),
        (lambda X, y: (X[:, :0], y), ValueError, "^X must have at least one row and one column"),
        (lambda X, y: (X / 0, y), ValueError, "^X holds NaN or infinity"),
        (lambda X, y: (X, None), ValueError, "requires y to be passed, but the target y is None"),
        (lambda X, y: (X, y.to_sparse()), TypeError, r"^y must be a dense tensor.*y.to_dense\(\)"),
        (lambda X, y: (X, y.to("meta")), ValueError, "^y must hold numbers.*meta"),
        (lambda X, y: (X, y.to(torch.complex64)), ValueError, "Complex data not supported: y"),
        (lambda X, y: (X, y[:-1]), ValueError, "^y must have one row per row of X: X has 40, y has 39"),
        (lambda X, y: (X, y / 0.0), ValueError, "^y holds missing (labels|targets) in .* of 40 rows"),
        (lambda X, y: (X, (y + 1) / 0.0), ValueError, "Input y contains infinity"),
        (lambda X, y: (X.numpy().astype(complex), y), ValueError, "Complex data not supported"),
        (lambda X, y: (X.numpy()[:, 0], y), ValueError, "Expected 2D array"),
        (lambda X, y: (X.numpy()[:0], y[:0]), ValueError, "0 sample"),
        (lambda X, y: (np.array([["a"] * 4] * 40, dtype=object), y), ValueError, "could not convert string to float"),
        (lambda X, y: (None, y), ValueError, "Expected 2D array|X"),
    ],
)
def test_bad_data_is_named(name, change, error, message):
    X, y = data()
    with pytest.raises(error, match=message):
        MAKE[name]().fit(*change(torch.from_numpy(X), torch.from_numpy(y)))


@every
def test_bad_new_rows_are_named(name):
    X, y = data()
    model = MAKE[name]().fit(X, y)
    methods = [model.predict, model.transform]
    methods += [model.decision_function, model.predict_proba] if hasattr(model, "predict_proba") else []
    T = torch.from_numpy(X)
    for method in methods:
        for bad, error, message in (
            (T.to_sparse(), TypeError, "^X must be a dense tensor"),
            (T[:, :3], ValueError, f"X has 3 features, but {name} is expecting 4 features"),
            (X[:, :3], ValueError, f"X has 3 features, but {name} is expecting 4 features"),
            (T[0], ValueError, "Expected 2D array: X"),
            (T.to("meta"), ValueError, "^X must hold numbers"),
        ):
            with pytest.raises(error, match=message):
                method(bad)


@every
def test_names_of_columns(name):
    """A refit on other data forgets the names of the one before; torch follows the rules of arrays."""
    pandas = pytest.importorskip("pandas")
    X, y = data()
    model = MAKE[name]().fit(pandas.DataFrame(X, columns=list("abcd")), y)
    assert model.feature_names_in_.tolist() == list("abcd")
    with pytest.raises(ValueError, match="feature names should match"):
        model.predict(pandas.DataFrame(X, columns=list("abce")))
    with pytest.warns(UserWarning, match="X does not have valid feature names"):
        model.predict(torch.from_numpy(X))
    for other in (torch.from_numpy(X[:, :3]), X[:, :3]):
        model.fit(pandas.DataFrame(X, columns=list("abcd")), y).fit(other, y)
        assert not hasattr(model, "feature_names_in_")
        assert model.n_features_in_ == 3
    with pytest.warns(UserWarning, match="X has feature names, but"):
        model.predict(pandas.DataFrame(X[:, :3], columns=list("abc")))


@every
def test_set_output(name):
    pandas = pytest.importorskip("pandas")
    X, y = data()
    frame = pandas.DataFrame(X, columns=list("abcd"), index=range(100, 140))
    model = MAKE[name]().set_output(transform="pandas").fit(frame, y)
    found = model.transform(frame)
    width = 4 if name.startswith("RFM") else 16
    assert list(found.columns) == list(model.get_feature_names_out()) == [f"{name.lower()}{i}" for i in range(width)]
    assert found.index.equals(frame.index)
    plain = MAKE[name]().fit(X, y)
    np.testing.assert_array_equal(found.to_numpy(), plain.transform(X))
    if name.startswith("Deep"):
        first = model.transform(frame, layer=0)
        np.testing.assert_array_equal(first.to_numpy(), X)
        assert list(first.columns) == list("abcd")
        assert list(model.transform(frame, layer=1).columns) == list(found.columns)
        assert isinstance(plain.transform(X, layer=0), np.ndarray)
    assert model.fit_transform(frame, y).shape == (40, width)
    with pytest.warns(UserWarning, match="X does not have valid feature names"):
        np.testing.assert_array_equal(model.transform(torch.from_numpy(X)).to_numpy(), found.to_numpy())
    model.set_output(transform="default")
    assert isinstance(model.transform(X), np.ndarray)


@pytest.mark.parametrize("name", ["RFMClassifier", "RFMRegressor"])
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("rows", ["numpy", "torch"])
def test_feature_importances(name, diagonal, rows):
    X, y = data(200)
    X = X if rows == "numpy" else torch.from_numpy(X)
    model = MAKE[name](diagonal=diagonal)
    assert not hasattr(model, "feature_importances_")
    found = model.fit(X, y).feature_importances_
    assert type(found) is type(model.M_)
    expected = np.asarray(model.M_, dtype=float)
    expected = expected if diagonal else np.diag(expected)
    np.testing.assert_allclose(np.asarray(found), expected / expected.sum(), rtol=1e-12)
    assert set(np.argsort(np.asarray(found))[-2:].tolist()) == {0, 1}
    none = MAKE[name]().set_params(iterations=0).fit(X, y)
    with pytest.warns(fastagop.NumericalWarning, match=rf"{name}: no metric was learnt \(best_iteration_ = 0\)"):
        np.testing.assert_allclose(np.asarray(none.feature_importances_), 0.25)


@every
def test_autocast_changes_nothing(name):
    X, y = data()
    T = torch.from_numpy(X).float()
    settings = {"ridge": 1e-2}
    model = MAKE[name](**settings).fit(T, torch.from_numpy(y))
    methods = ["predict", "transform"] + (["decision_function", "predict_proba"] if "Classifier" in name else [])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = MAKE[name](**settings).fit(T, torch.from_numpy(y))
        answers = [getattr(inside, method)(T) for method in methods]
        answers += [inside.transform(T, layer=0)] if name.startswith("Deep") else []
        assert torch.is_autocast_enabled("cpu")  # as it was
    expected = [getattr(model, method)(T) for method in methods]
    expected += [model.transform(T, layer=0)] if name.startswith("Deep") else []
    for found, right in zip(answers, expected, strict=True):
        assert torch.equal(found, right)
    if name.startswith("RFM"):
        assert torch.equal(inside.M_, model.M_)


@every
@pytest.mark.parametrize("verbose", [0, 1])
def test_no_bar_without_a_terminal(name, verbose, capfd, caplog):
    X, y = data()
    with caplog.at_level(logging.INFO, logger="fastagop"):
        MAKE[name](verbose=verbose).fit(X, y)
    assert capfd.readouterr() == ("", "")
    lines = [r.getMessage() for r in caplog.records if " 1 of 1" in r.getMessage()]
    assert len(lines) == verbose


@every
def test_a_bar_on_a_terminal(name, monkeypatch, capfd):
    X, y = data()
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    MAKE[name](verbose=1).fit(X, y)
    assert "1/1" in capfd.readouterr().err


def test_no_check_of_scikit_learn_is_skipped():
    """The packages and the setting that its array API checks ask for are there."""
    pytest.importorskip("pandas")
    if "expect_only_array_outputs" not in inspect.signature(check_array_api_input).parameters:
        pytest.skip("this scikit-learn's check wants arrays of everything")
    assert os.environ["SCIPY_ARRAY_API"] == "1"
    for make in MAKE.values():
        check_array_api_input("", make(), "numpy", expect_only_array_outputs=False)


def frame_of(column, names=("k",)):
    pandas = pytest.importorskip("pandas")
    X, _ = data()
    return pandas.DataFrame({"x": X[:, 0], **{name: pandas.Series(column) for name in names}})


def columns_that_are_no_numbers():
    pandas = pytest.importorskip("pandas")
    words, days = ["u", "v"] * 20, pandas.date_range("2020", periods=40)
    strings = r"strings: make numbers of it, as with OneHotEncoder\(sparse_output=False\).*RFM on tables"
    dates = "dates: use differences in days"
    return {
        "str": (pandas.Series(words), ValueError, strings),
        "with gaps": (pandas.Series([None, np.nan, *words[2:]], dtype=object), ValueError, strings),
        "object": (pandas.Series([1.0, "2.5", *words[2:]], dtype=object), ValueError, strings),
        "category": (pandas.Series(words).astype("category"), ValueError, strings),
        "dates": (pandas.Series(days), TypeError, dates),
        "dates of a zone": (pandas.Series(days.tz_localize("UTC")), TypeError, dates),
        "Python's dates": (pandas.Series(list(days.date), dtype=object), TypeError, dates),
        "periods": (pandas.Series(pandas.period_range("2020", periods=40)), TypeError, dates),
        "durations": (pandas.Series(days - days[0]), TypeError, "durations: use their number of days"),
        "intervals": (pandas.Series(pandas.interval_range(0, 40)), TypeError, "values of type Interval: make numbers"),
        "NA": (pandas.Series([pandas.NA, *range(39)], dtype=object), TypeError, "missing values that are no NaN: use"),
    }


@every
def test_columns_of_frames_that_are_no_numbers_are_named(name):
    _, y = data()
    model = MAKE[name]().fit(frame_of(np.arange(40.0)), y)
    for case, (column, error, message) in columns_that_are_no_numbers().items():
        frame = frame_of(column)
        for call in (lambda frame=frame: MAKE[name]().fit(frame, y), lambda frame=frame: model.predict(frame)):
            with pytest.raises(error, match=f"^X: column 'k' holds {message}"):
                call()
        assert case
    words = frame_of(["u", "v"] * 20)
    with pytest.raises(ValueError, match="feature names should match"):
        model.predict(words.rename(columns={"k": "other"}))
    with pytest.raises(ValueError, match=r"^X: columns 'a', 'b' hold strings: make numbers of them"):
        MAKE[name]().fit(frame_of(["u", "v"] * 20, names=("a", "b")), y)
    with pytest.raises(ValueError, match="'e' and 1 more hold strings"):
        MAKE[name]().fit(frame_of(["u", "v"] * 20, names="abcdef"), y)


@pytest.mark.parametrize("name", ["RFMClassifier", "RFMRegressor"])
def test_columns_of_frames_that_can_be_read_as_numbers(name):
    pandas = pytest.importorskip("pandas")
    _, y = data()
    numbers = np.arange(40) % 7
    plain = MAKE[name]().fit(frame_of(numbers.astype(float)), y)
    texts = [str(number) for number in numbers]
    for column in (
        pandas.Series(numbers, dtype="Int64"),
        pandas.Series(list(numbers), dtype=object),
        pandas.Series(numbers).astype("category"),
        texts,
        pandas.Series(texts).astype("category"),
    ):
        frame = frame_of(column)
        np.testing.assert_array_equal(plain.predict(frame), plain.predict(frame_of(numbers.astype(float))))
        MAKE[name]().fit(frame, y)
    with pytest.raises(ValueError, match="unique"):
        MAKE[name]().fit(pandas.DataFrame(np.ones((40, 2)), columns=["x", "x"]), y)


def test_frames_of_any_library():
    """What has columns and dtypes is a frame; no library of frames is needed for it."""

    class Frame(dict):
        columns = property(list)
        dtypes = property(lambda self: [object() for _ in self])

    assert inputs.frame_refusal(Frame(a=np.ones(3), b=[1, None, 2.5], c=["1", "2", "3"])) is None
    assert inputs.frame_refusal(np.ones((3, 2))) is None
    refused = inputs.frame_refusal(Frame(a=["u", "1", "2"], b=np.array(["2020"] * 3, "M8[D]"), c=[b"x"] * 3))
    assert isinstance(refused, ValueError)
    assert str(refused).startswith("X: columns 'a', 'c' hold strings: make numbers of them, as with OneHotEncoder")
    assert str(refused).endswith(
        "; column 'b' holds dates: use differences in days, as (column - column.min()).dt.days"
    )


def answers_with_gaps(kind):
    """Labels or targets of 40 rows, of which rows 3 and 7 have none."""
    pandas = pytest.importorskip("pandas")
    words, numbers = np.array(["a", "b"] * 20), np.arange(40) % 2
    gaps = np.isin(np.arange(40), [3, 7])
    objects = np.where(gaps, None, words.astype(object))
    mixed = np.where(np.arange(40) == 7, np.nan, objects)
    return {
        "None and NaN": mixed,
        "a list": mixed.tolist(),
        "words and NaN": np.where(gaps, np.nan, words.astype(object)).tolist(),
        "a frame": pandas.DataFrame({"y": objects}),
        "a series": pandas.Series(objects),
        "pandas' string": pandas.Series(objects, dtype="string"),
        "pandas' category": pandas.Series(objects).astype("category"),
        "pandas' Int64": pandas.Series(numbers, dtype="Int64").mask(gaps),
        "pandas' boolean": pandas.Series(numbers == 0, dtype="boolean").mask(gaps),
        "floats": np.where(gaps, np.nan, numbers),
        "a column": np.where(gaps, np.nan, numbers)[:, None],
        "torch": torch.from_numpy(np.where(gaps, np.nan, numbers)).half(),
        "dates": np.where(gaps, np.datetime64("NaT"), np.datetime64("2020") + numbers),
    }[kind]


GAPS = ["None and NaN", "a list", "words and NaN", "a frame", "a series", "dates", "floats", "a column", "torch"]
GAPS += [f"pandas' {kind}" for kind in ("string", "category", "Int64", "boolean")]


@classifiers
@pytest.mark.parametrize("kind", GAPS)
def test_missing_labels_are_counted(name, kind):
    X, _ = data()
    with pytest.raises(ValueError, match=r"^y holds missing labels in 2 of 40 rows, of which row 3 is the first"):
        MAKE[name]().fit(X, answers_with_gaps(kind))


@classifiers
def test_labels_without_an_order_are_named(name):
    X, _ = data()
    with pytest.raises(TypeError, match=r"^y must hold labels that have an order, got such of the types int, str; "):
        MAKE[name]().fit(X, np.array([1, "one"] * 20, dtype=object))


@classifiers
@pytest.mark.parametrize("label", ["a", 3, 2.0, True])
def test_the_label_of_one_class_is_written_plainly(name, label):
    X, _ = data()
    with pytest.raises(ValueError, match=f"^y must hold at least two classes, got one class: {label!r}$"):
        MAKE[name]().fit(X, np.array([label] * 40))


@pytest.mark.parametrize("name", ["RFMRegressor", "DeepRFMRegressor"])
@pytest.mark.parametrize("kind", ["floats", "a column", "torch", "pandas' Int64", "pandas' boolean", "two columns"])
def test_missing_targets_are_counted(name, kind):
    X, _ = data()
    y = np.stack([X[:, 0], answers_with_gaps("floats")], 1) if kind == "two columns" else answers_with_gaps(kind)
    with pytest.raises(ValueError, match=r"^y holds missing targets in 2 of 40 rows, of which row 3 is the first"):
        MAKE[name]().fit(X, y)


@every
def test_sparse_rows_are_refused_with_what_a_pipeline_can_do(name):
    X, y = data()
    model = MAKE[name]().fit(X, y)
    for sparse in (scipy.sparse.csr_array(X), scipy.sparse.coo_matrix(X)):
        for call in (lambda sparse=sparse: MAKE[name]().fit(sparse, y), lambda sparse=sparse: model.predict(sparse)):
            with pytest.raises(
                TypeError, match=r"^Sparse data was passed for X.*pipeline.*sparse_output=False"
            ) as info:
                call()
    remedy = FunctionTransformer(lambda X: X.toarray(), accept_sparse=True)
    assert "FunctionTransformer(lambda X: X.toarray(), accept_sparse=True)" in str(info.value)
    piped = make_pipeline(remedy, MAKE[name]()).fit(scipy.sparse.csr_array(X), y)
    np.testing.assert_array_equal(piped.predict(scipy.sparse.csr_array(X)), model.predict(X))


@pytest.mark.parametrize("name", ["RFMClassifier", "RFMRegressor"])
def test_gaps_are_named_by_column(name):
    pandas = pytest.importorskip("pandas")
    X, y = data()
    frame = pandas.DataFrame(X, columns=list("abcd"))
    frame.loc[3, "b"], frame.loc[5, "d"] = np.nan, np.inf
    text = r"^Input X contains NaN, in 'b', 'd': leave such rows out, or fill them in, as with SimpleImputer"
    with pytest.raises(ValueError, match=text):
        MAKE[name]().fit(frame, y)
    model = MAKE[name]().fit(pandas.DataFrame(X, columns=list("abcd")), y)
    with pytest.raises(ValueError, match=text):
        model.predict(frame)
    with pytest.raises(ValueError, match=r"^Input X contains NaN: leave such rows out"):
        MAKE[name]().fit(frame.to_numpy(), y)


def test_dates_in_arrays_are_refused():
    days = np.arange(60).astype("datetime64[D]")[:, None]
    with pytest.raises(TypeError, match="X holds dates: use numbers, as"):
        RFMRegressor().fit(days, np.arange(60.0))
    with pytest.raises(TypeError, match="X holds durations: use numbers, as"):
        RFMRegressor().fit(days - days[0], np.arange(60.0))


@pytest.mark.parametrize(
    ("labels", "kind"), [([True, False], "bool"), ([3, 5], "int"), ([np.int8(3), 5], "int")], ids=repr
)
def test_labels_that_are_objects_are_told_their_dtype(labels, kind):
    """As pandas leaves them beside missing ones; scikit-learn's metrics refuse them, too."""
    X, _ = data()
    y = np.empty(len(X), dtype=object)
    y[:] = [labels[i % 2] for i in range(len(X))]
    with pytest.raises(ValueError, match=rf"^Unknown label type: y holds .* use y.astype\({kind}\)$"):
        RFMClassifier(iterations=1).fit(X, y)
    RFMClassifier(iterations=1).fit(X, y.astype(kind)).score(X, y.astype(kind))


def test_gaps_of_nullable_columns_are_named():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": pandas.array([1, 2, None, 4], dtype="Int64"), "b": [1.0, 2.0, 3.0, 4.0]})
    with pytest.raises(ValueError, match=r"^Input X contains NaN, in 'a': leave such rows out"):
        RFMRegressor().fit(frame, [1.0, 2.0, 3.0, 4.0])
