"""explain of a fit: steps, seconds, memory, what does not fit; and of tensors that hold no numbers."""

from __future__ import annotations

import re

import numpy as np
import pandas
import pytest
import torch
from fastagop.kernels import checks
from torch._subclasses import FakeTensorMode

import fastagop
from fastagop import DeepRFMClassifier, DeepRFMRegressor, Laplace, RFMClassifier, RFMRegressor

KERNEL = Laplace(2.0)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 5))
Y = {DeepRFMClassifier: np.arange(60) % 3, RFMClassifier: np.arange(60) % 3}
ALL = [DeepRFMClassifier, DeepRFMRegressor, RFMClassifier, RFMRegressor]
every = pytest.mark.parametrize("make", ALL)


def y_of(make):
    return Y.get(make, X[:, 0])


def meta(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found, text
    return float(found[1])


@every
def test_a_fit_is_explained_and_not_run(make, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("explain ran the kernel")

    checks.kernel(Laplace(1.0))  # a class of kernels is tried at its first use
    for method in ("value_", "weight_", "weight_from_value_"):
        monkeypatch.setattr(Laplace, method, refuse)
    model = make(kernel=KERNEL)
    before = dict(vars(model))
    text = fastagop.explain(model, X, y_of(make))
    assert text.startswith(f"{make.__name__}.fit: 60 rows, 5 features, {3 if make in Y else 1} output(s), float32 on ")
    for word in ("solver ", "cholesky", "seconds ", "memory ", "free now", "solve "):
        assert word in text
    assert "does not fit" not in text
    assert number(r"seconds\s+about ([\d.e+-]+) in all", text) > 0
    assert vars(model) == before  # nothing was set


def test_steps_are_those_of_the_fit():
    text = fastagop.explain(DeepRFMClassifier(depth=4, width=32), X, Y[RFMClassifier])
    assert re.findall(r"^  (.*?), (\d+) features:", text, re.M) == [
        ("layer 1", "5"),
        ("layers 2 to 4", "32"),
        ("readout", "32"),
    ]
    assert ", measures " in text
    text = fastagop.explain(DeepRFMRegressor(depth=1), X, X)
    assert "5 output(s)" in text
    assert ", measures " not in text
    text = fastagop.explain(RFMRegressor(iterations=3, diagonal=True), X, X[:, 0])
    assert re.findall(r"^  (.*?), \d+ features:", text, re.M) == ["3 iterations", "last solve"]
    assert "root " not in text  # a diagonal needs no eigenvalues
    text = fastagop.explain(RFMRegressor(iterations=0), X, X[:, 0])
    assert re.findall(r"^  (.*?), \d+ features:", text, re.M) == ["last solve"]


def test_more_work_takes_longer():
    def seconds(**how):
        data = meta(how.pop("n", 2000), how.pop("d", 100)), meta(2000)
        return number(r"seconds\s+about ([\d.e+-]+)", fastagop.explain(RFMRegressor(**how), data[0], data[1]))

    assert seconds(iterations=10) > 1.8 * seconds(iterations=5)
    assert seconds(d=1000) > seconds(d=100)
    assert seconds(dtype="float64", solver="cg") > seconds(dtype="float64", solver="cholesky")


@pytest.mark.parametrize(
    "kind",
    [
        lambda A: A,
        pandas.DataFrame,
        torch.from_numpy,
        lambda A: torch.from_numpy(A).to("meta"),
        lambda A: A.tolist(),
    ],
    ids=["array", "frame", "tensor", "meta", "list"],
)
@every
def test_every_kind_of_data(make, kind):
    plain = fastagop.explain(make(), X, y_of(make))
    text = fastagop.explain(make(), kind(X), y_of(make))
    assert text.splitlines()[0] == plain.splitlines()[0]
    assert ("assumed" in text) == ("meta" in text)


def test_labels_and_targets_on_meta():
    text = fastagop.explain(RFMClassifier(), meta(10**5, 784), meta(10**5, dtype=torch.int64))
    assert "10 output(s)" in text
    assert "labels on meta hold no classes" in text
    assert "3 output(s)" in fastagop.explain(RFMRegressor(), meta(100, 7), meta(100, 3))
    with pytest.raises(ValueError, match="y must have one row per row of X"):
        fastagop.explain(RFMRegressor(), meta(100, 7), meta(99))
    with pytest.raises(ValueError, match=r"X must be a floating matrix"):
        fastagop.explain(RFMRegressor(), meta(100), meta(100))


def test_rows_without_weight_are_not_planned():
    weights, labels = np.where(np.arange(60) < 20, 0.0, 1.0), np.arange(60) % 3
    model = RFMClassifier(class_weight={0: 0.0})
    assert "Classifier.fit: 40 rows, 5 features, 3 output(s)" in fastagop.explain(model, X, labels)
    kept = int(((labels > 0) & (weights > 0)).sum())
    assert f"Classifier.fit: {kept} rows, 5 features, 3 output(s)" in fastagop.explain(model, X, labels, weights)
    model.fit(X, labels, weights)
    assert len(model.solution_.alpha) == kept


def test_solver_and_what_does_not_fit():
    assert "cg on torch" in fastagop.explain(RFMRegressor(solver="cg"), X, X[:, 0])
    assert "eigh on torch" in fastagop.explain(DeepRFMRegressor(solver="eigh", depth=1), X, X[:, 0])
    text = fastagop.explain(RFMRegressor(solver="cholesky", memory_limit=1e4), X, X[:, 0])
    assert re.search(r"does not fit: last solve, 5 features: solve with n = 60 needs .*solver='cg'", text)
    with pytest.raises(MemoryError):
        RFMRegressor(solver="cholesky", memory_limit=1e4).fit(X, X[:, 0])


def test_what_fit_refuses():
    cases = [
        (RFMRegressor(ridge=-1.0), X, X[:, 0], ValueError, "ridge must be"),
        (RFMRegressor(), np.full((60, 5), np.nan), X[:, 0], ValueError, "NaN"),
        (DeepRFMClassifier(depth=0), X, np.arange(60) % 2, ValueError, "depth must be"),
        (RFMClassifier(), X, X[:, 0], ValueError, "Unknown label type"),
        (RFMClassifier(), X, np.zeros(60, int), ValueError, "y must hold at least two classes, got one class: 0"),
        (RFMClassifier(class_weight={5: 1.0}), X, np.arange(60) % 2, ValueError, "class_weight names the label 5"),
    ]
    for model, data, y, error, words in cases:
        with pytest.raises(error, match=words):
            fastagop.explain(model, data, y)
    for args, words in (((X,), r"missing a required argument: 'y'"), ((X, X[:, 0], 1, 2), "too many")):
        with pytest.raises(TypeError, match=rf"^RFMRegressor\.fit\(\) {words}"):
            fastagop.explain(RFMRegressor(), *args)
    with pytest.raises(ValueError, match=r"got the class; use RFMRegressor\(\)"):
        fastagop.explain(RFMRegressor, X, X[:, 0])


def calls(n=4000, d=300, make=meta):
    return {
        "kernel_matrix": (make(n, d),),
        "kernel_matmul": (make(n, d), None, make(n, 4)),
        "gradients": (make(n, d), make(n, 4), make(50, d)),
        "agop": (make(n, d), make(n, 4), make(n, d)),
        "solve": (make(n, d), make(n, 2)),
    }


@pytest.mark.parametrize("op", calls())
def test_tensors_on_meta_are_planned_as_others_are(op):
    args = calls()[op]
    text = fastagop.explain(op, KERNEL, *args)
    assert "assumed    tensors on meta are planned for cpu" in text
    assert number(r"seconds    about ([\d.e+-]+)\n", text) > 0
    real = fastagop.explain(op, KERNEL, *(None if a is None else torch.zeros(a.shape) for a in args))
    memory = re.compile(r" fit into .*? GB| [\d.]+ GB are free now")
    assert memory.sub("", text.rsplit("\n", 1)[0]) == memory.sub("", real)


def test_one_tensor_on_meta_given_twice_is_one():
    A, alpha = meta(4000, 300), meta(4000, 4)
    own = fastagop.explain("agop", KERNEL, A, alpha)
    assert fastagop.explain("agop", KERNEL, A, alpha, A) == own
    assert fastagop.explain("agop", KERNEL, A, alpha, meta(4000, 300)) != own


def test_nothing_as_large_as_the_tensors_is_made():
    """A million rows of a million features, 4 TB: planned at once, and refused as the call would be."""
    with pytest.raises(MemoryError, match=r"gradients needs [\d.]+ GB"):
        fastagop.explain("gradients", KERNEL, meta(10**6, 10**6), meta(10**6, 1), meta(3, 10**6))
    assert "blocks of" in fastagop.explain("kernel_matmul", KERNEL, meta(10**6, 100), None, meta(10**6, 1))


def test_meta_tensors_are_checked():
    with pytest.raises(TypeError, match=r"^X must be float32 or float64, got torch.bfloat16"):
        fastagop.explain("agop", KERNEL, meta(5, 3, dtype=torch.bfloat16), meta(5, 2))
    with pytest.raises(ValueError, match=r"^alpha must have 5 rows"):
        fastagop.explain("agop", KERNEL, meta(5, 3), meta(4, 2))
    with pytest.raises(TypeError, match="got a FakeTensor"):
        fastagop.explain("kernel_matrix", KERNEL, FakeTensorMode().from_tensor(torch.ones(3, 2)))


@pytest.mark.parametrize("op", calls())
def test_unknown_arguments_blame_the_call(op):
    args = calls()[op]
    with pytest.raises(TypeError, match=rf"^{op}\(\) got an unexpected keyword argument 'color'"):
        fastagop.explain(op, KERNEL, *args, color="red")
    with pytest.raises(TypeError, match=rf"^{op}\(\) "):
        fastagop.explain(op)


def test_functions_of_ranks_are_named():
    with pytest.raises(ValueError, match=r"got distributed\.agop; explain\('agop', \.\.\.\) plans it for one process"):
        fastagop.explain(fastagop.distributed.agop, KERNEL, meta(5, 3), meta(5, 1))
