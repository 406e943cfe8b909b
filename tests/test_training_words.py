"""Records and events of a fit in words, units of targets, copies on both sides of a limit, and locks."""

from __future__ import annotations

import dataclasses
import gc
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from fastagop import Laplace, collapse, locks
from fastagop.deep_rfm import layer as deep
from fastagop.deep_rfm.random_features import FeatureMap
from fastagop.estimators import kernel_ridge
from fastagop.locks import FolderInUse, Lock
from fastagop.rfm import IterationEvent, IterationRecord
from fastagop.solvers import copies
from fastagop.solvers.solution import Solution
from fastagop.solvers.solve import scale_targets, unscale_coefficients

F32, F64 = torch.float32, torch.float64
SOLUTION = Solution(torch.zeros(4, 2, dtype=F64), 1e-12, 0.0, 0.0, "cholesky", F64, 0, 4, 0.5)
RECORD = deep.LayerRecord({"projected": 0.25}, {}, SOLUTION, 3.0, 1.5, {}, 7)


def test_records_in_words():
    assert repr(RECORD) == f"LayerRecord(NC1 2.5e-01, agop_scale 3, 1.5 s, {SOLUTION})"
    plain = dataclasses.replace(RECORD, nc1={})
    assert repr(plain) == f"LayerRecord(agop_scale 3, 1.5 s, {SOLUTION})"
    event = deep.LayerEvent(1, 5, plain, torch.zeros(4, 3), torch.zeros(4, 8), None)
    assert repr(event) == f"LayerEvent(layer 1 of 5, projected 4 x 3, features 4 x 8, {plain})"
    record = IterationRecord(SOLUTION, 3.0, 1.5)
    assert repr(record) == f"IterationRecord(agop_scale 3, 1.5 s, {SOLUTION})"
    event = IterationEvent(0, 2, record, torch.zeros(3))
    assert repr(event) == f"IterationEvent(iteration 0 of 2, M 3, {record})"


def test_layers_in_words():
    cos = FeatureMap("cos", torch.zeros(8, 3), torch.zeros(8))
    layer = deep.Layer(torch.eye(3), torch.eye(3), cos, RECORD)
    assert repr(layer) == f"Layer(agop 3 x 3, cos features 8, {RECORD})"
    assert repr(layer.copy()) == "Layer(agop 3 x 3, cos features 8)"
    assert layer.copy().bias is not layer.bias
    relu = deep.Layer(torch.eye(3), torch.eye(3), FeatureMap("relu", torch.zeros(8, 3)))
    assert repr(relu) == "Layer(agop 3 x 3, relu features 8)"
    assert relu.copy().bias is None


def test_a_seed_for_each_layer():
    drawn = deep.seeds(np.random.RandomState(3), 4)
    assert drawn == np.random.RandomState(3).randint(0, 2**31 - 1, size=4).tolist()
    assert all(type(seed) is int for seed in drawn)


def test_stages_of_a_layer_add_up_to_its_seconds(normal):
    X, Y = normal(30, 3), normal(30, 2)
    settings = deep.Settings(kernel=Laplace(2.0), depth=1, features="relu", width=8, ridge=1e-3)
    classes = torch.arange(30) % 2
    layer, made = deep.train_layer(X, Y, settings, 0, classes)
    stages = layer.record.stages
    assert list(stages) == ["solve", "agop", "root", "features", "measures"]
    assert layer.record.seconds == pytest.approx(sum(stages.values()))
    assert all(seconds > 0 for seconds in stages.values())
    assert list(layer.record.nc1) == list(layer.record.nc2) == ["input", "projected", "features"]
    assert made.rest is None
    assert torch.equal(made.points, made.features)
    for none in (None, torch.zeros(30, dtype=torch.int64)):
        assert deep.train_layer(X, Y, settings, 0, none)[0].record.nc1 == {}


# ---- targets and copies


@pytest.mark.parametrize(
    ("size", "unit"),
    [(2.0**60, 1.0), (2.0**-60, 1.0), (1.5 * 2.0**60, 2.0**61), (0.75 * 2.0**-60, 2.0**-60), (0.0, 1.0), (3.0, 1.0)],
)
def test_targets_get_a_unit_where_they_are_far_from_one(size, unit):
    Y = size * torch.tensor([[1.0], [-0.5]], dtype=F64)
    scaled, found = scale_targets(Y)
    assert found == unit
    assert torch.equal(scaled, Y / unit)
    assert torch.equal(unscale_coefficients(scaled, found), Y)


@pytest.mark.parametrize("size", [1e308, 5e-324])
def test_a_unit_stays_in_range(size):
    scaled, unit = scale_targets(torch.tensor([[size]], dtype=F64))
    assert 2.0**-1000 <= unit <= 2.0**1000
    assert float(scaled) * unit == size
    assert 0 < abs(float(scaled)) < 2.0**100


@pytest.mark.parametrize(("roundings", "differ"), [(7, False), (20, True)])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_targets_of_copies_differ_by_more_than_rounding(roundings, differ, dtype, normal):
    """Eight roundings of the largest target, each way from the mean of two."""
    X, Y = normal(10, 3, dtype=dtype), torch.full((10, 1), 0.5, dtype=dtype)
    X[9], Y[0] = X[8], -1.0
    Y[9] += roundings * torch.finfo(dtype).eps
    rows = copies.find(X)
    assert rows.merged == 1
    assert rows.contradictions(Y, rows.means(Y)) == (2 if differ else 0)
    assert rows.contradictions(Y[:, :0], rows.means(Y)[:, :0]) == 0


@pytest.mark.parametrize(("bound", "apart"), [(5.1, True), (4.9, False)])
def test_copies_have_coefficients_of_their_own_where_these_are_bearable(bound, apart, normal):
    """w (y - mean) / ridge beyond a row's share."""
    X = normal(6, 3)
    X[5] = X[4]
    Y = torch.zeros(6, 1, dtype=F64)
    Y[4], Y[5] = 1.0, 2.0  # half from their mean, 5 at a ridge of 0.1
    rows = copies.find(X)
    given = rows.given(Y, rows.means(Y), 0.1, bound)
    assert (given.beyond is not None) == apart
    if apart:
        assert given.beyond.flatten().tolist() == pytest.approx([0.0, 0.0, 0.0, 0.0, -5.0, 5.0])
    assert rows.given(Y, rows.means(Y), 0.0, 1e9).beyond is None
    assert copies.alone(X).given(Y, Y, 0.1, 1e9) is None
    assert given.share.tolist() == [1.0, 1.0, 1.0, 1.0, 0.5, 0.5]
    assert given.ridges.flatten().tolist() == pytest.approx([0.1] * 6)
    assert given.size == pytest.approx(5**0.5)


def test_rows_and_their_weights(normal):
    X, w = normal(5, 2), torch.tensor([2.0, 0.0, 1.0, 1.0, 0.5], dtype=F64)
    X[3] = X[2]
    rows = copies.find(X, w)
    assert (rows.merged, rows.total, rows.plain, rows.exact) == (1, 4.5, False, True)
    assert rows.left.tolist() == [1]
    assert sorted(rows.weight.tolist()) == [0.5, 2.0, 2.0]
    assert rows.rest(X).tolist() == X[1:2].tolist()
    back = rows.all(rows.take(X), rows.rest(X))
    assert torch.equal(back, X)
    assert rows.shared(torch.ones(3, 1, dtype=F64)).flatten().tolist() == [1.0, 0.0, 0.5, 0.5, 1.0]
    plain = copies.find(X[:3])
    assert (plain.plain, plain.weights, plain.rest(X), plain.total) == (True, None, None, 3.0)
    assert plain.take(X) is X


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("wide", [True, False])
def test_an_agop_is_that_of_the_backend_asked_for(wide, dtype, backend, normal, monkeypatch):
    """Float64 points stay with it; float32 ones that are computed in float64 go to whoever serves them."""
    made = []
    plain = kernel_ridge.Predictor
    monkeypatch.setattr(kernel_ridge, "Predictor", lambda *args: made.append(args) or plain(*args))
    monkeypatch.setattr(kernel_ridge, "_rounding_costs", lambda *args: wide)
    monkeypatch.setattr(kernel_ridge.float64_fit, "fit", lambda *args: None)
    how = kernel_ridge.KernelRidge(Laplace(2.0), 1e-3, "highest", backend)
    kernel_ridge.fit_and_agop(normal(20, 3, dtype=dtype), normal(20, 2, dtype=dtype), how)
    widened = wide and dtype == F32
    assert made[0][1].dtype == (F64 if widened else dtype)
    assert made[0][4] == ("auto" if widened else backend)


# ---- collapse


@pytest.mark.parametrize(("size", "fits"), [(1e140, True), (1.01e140, False)])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_largest_features(size, fits, sign):
    X = torch.tensor([[0.0], [0.1], [1.0], [0.9]], dtype=F64) * size * sign
    y = torch.tensor([0, 0, 1, 1])
    if fits:
        assert collapse.nc1(X, y) == pytest.approx(0.0025 / 0.2025)
    else:
        with pytest.raises(ValueError, match=r"X must be finite and within \+-1e\+140"):
            collapse.nc1(X, y)


def test_the_gram_matrix_is_made_in_blocks(normal, monkeypatch):
    X, y = normal(50, 4), torch.arange(50) % 3
    whole = collapse.gram(X, y)
    monkeypatch.setattr("fastagop.collapse.measures._ROWS", 7)
    torch.testing.assert_close(collapse.gram(X, y), whole, rtol=1e-13, atol=1e-13)


# ---- locks


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files as Linux lists them")
def test_locks_leave_no_file_open(tmp_path):
    Lock(tmp_path).close()
    gc.collect()
    before = open_files()
    with Lock(tmp_path):
        assert open_files() == before + 1
        for _ in range(3):
            with pytest.raises(FolderInUse):
                Lock(tmp_path)
        assert open_files() == before + 1
    assert open_files() == before
    assert not (tmp_path / ".lock").exists()


def test_a_file_that_names_nobody(tmp_path):
    assert locks._read(tmp_path / "none") is None
    path = tmp_path / ".lock"
    for text in ("", "[]", "{}", '{"pid": "x"}', '{"pid": 1, "host": "h", "since": "s"}'):
        path.write_text(text)
        assert locks._read(path) is None
    entry = '{"pid": 1, "host": "h", "since": "s", "token": "t"}'
    path.write_text(entry + " " * (4096 - len(entry)) + "x")  # at most 4096 bytes are read
    assert locks._read(path) == locks.Holder(1, "h", "s", "t")
    path.write_text(" " * (4097 - len(entry)) + entry)
    assert locks._read(path) is None


def test_what_a_lock_says_of_its_holder(tmp_path, monkeypatch):
    with Lock(tmp_path):
        holder = locks._read(tmp_path / ".lock")
    assert holder.pid == os.getpid()
    start = f"process {holder.pid} on {holder.host} (since {holder.since}"
    for state, words in (
        (locks.atomic_files.STOPPED, f", which is stopped: `kill -CONT {holder.pid}` continues it"),
        (locks.atomic_files.ENDED, ", which has ended, but left a process behind that holds the lock"),
        (locks.atomic_files.ELSEWHERE, ", which cannot be asked from here"),
        ("any other", ""),
    ):
        monkeypatch.setattr(locks.atomic_files, "process_state", lambda token, state=state: state)
        assert str(holder) == f"{start}{words})"
