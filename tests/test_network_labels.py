"""Labels that the batches of collapse_split bring, beside those that a caller gives."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn

from fastagop import collapse, network

Y = torch.arange(30) % 3


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


def test_two_sets_of_labels():
    """A shuffled loader brings its own labels; those of the unshuffled data would be silently wrong."""
    X, y = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    batches = [(X[:10], y[:10]), (X[10:], y[10:])]
    brought, both = network.collapse_split(model, batches), network.collapse_split(model, batches, y)
    assert brought["0"].nc1 == both["0"].nc1
    with pytest.raises(ValueError, match="y differs from the labels that the batches of X bring"):
        network.collapse_split(model, batches, y.flip(0))


def one_hot(y: torch.Tensor) -> torch.Tensor:
    return nn.functional.one_hot(y).double()


SAME = {  # the classes of y, in other numbers
    "floats": lambda y: y.float(),
    "bfloat16": lambda y: y.bfloat16(),
    "bytes": lambda y: y.to(torch.uint8),
    "a list": lambda y: y.tolist(),
    "NumPy": lambda y: y.numpy(),
    "a column": lambda y: y[:, None],
    "one-hot": one_hot,
    "one-hot with signs": lambda y: 2 * one_hot(y) - 1,
    "one-hot in another order": lambda y: one_hot(y).flip(1),
}
OTHER = {  # no labels at all
    "texts": lambda y: [f"sample {i}" for i in y.tolist()],
    "a dictionary": lambda y: {"labels": y, "text": "abc"},
    "targets": lambda y: torch.randn(len(y), 2),
    "images": lambda y: torch.randn(len(y), 1, 4, 4),
    "one number": lambda y: 3,
}


@pytest.mark.parametrize("name", [*SAME, *OTHER])
def test_labels_that_are_given_count(name):
    make, net, X = {**SAME, **OTHER}[name], model(), torch.randn(30, 4)
    for y in (Y, 7 * Y - 5) if "one-hot" in name else (Y,):
        plain = network.collapse_split(net, [X[:10], X[10:]], y)
        found = network.collapse_split(net, [(X[:10], make(Y[:10])), (X[10:], make(Y[10:]))], y)
        assert {name: parts.nc1 for name, parts in found.items()} == {name: parts.nc1 for name, parts in plain.items()}


@pytest.mark.parametrize("name", SAME)
def test_labels_in_another_order_are_refused(name):
    net, X, make = model(), torch.randn(30, 4), SAME[name]
    shuffled = Y[torch.randperm(30)]
    with pytest.raises(ValueError, match=r"y differs from the labels that the batches of X bring \(is X shuffled"):
        network.collapse_split(net, [(X[:10], make(shuffled[:10])), (X[10:], make(shuffled[10:]))], Y)


@pytest.mark.parametrize("name", ["texts", "a dictionary"])
def test_labels_that_are_no_numbers_are_refused_where_there_are_no_others(name):
    with pytest.raises(TypeError, match="X: the labels of a batch must be a tensor or numbers, got "):
        network.collapse_split(model(), [(torch.randn(30, 4), OTHER[name](Y))])


def test_labels_that_are_given_are_checked():
    batches = [(torch.randn(30, 4), Y.tolist())]
    with pytest.raises(ValueError, match="y must have one label for each of the 30 rows of X"):
        network.collapse_split(model(), batches, Y[:20])
    with pytest.raises(TypeError, match="y must hold integer labels, got <U1"):
        network.collapse_split(model(), batches, ["a"] * 30)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.bool, torch.complex64])
def test_labels_must_be_integers(dtype):
    X, y = torch.randn(30, 4), Y.to(dtype)
    message = re.escape(f"y must hold integer labels, got {str(dtype)[6:]}; number the classes")
    for measure in (collapse.nc1, collapse.nc2, collapse.cdnv, collapse.gram, collapse.Accumulator().update):
        with pytest.raises(TypeError, match=message):
            measure(X, y)
    with pytest.raises(TypeError, match=message):
        network.collapse_split(model(), X, y)
    assert collapse.Accumulator().update(X[:0], y[:0]).counts == []
    assert collapse.nc1(X, Y.to(torch.uint8)) == collapse.nc1(X, np.asarray(Y)) == collapse.nc1(X, Y.tolist())


WITHOUT_NUMBERS = {"meta": lambda y: y.to("meta"), "sparse": lambda y: y.to_sparse()}


@pytest.mark.parametrize("name", WITHOUT_NUMBERS)
def test_labels_without_numbers_are_refused(name):
    X, y = torch.randn(30, 4), WITHOUT_NUMBERS[name](Y)
    loss = nn.CrossEntropyLoss(reduction="none")
    words = "y must (be a dense|hold numbers|be dense)|labels of a batch must hold numbers"
    for measure in (
        lambda: network.collapse_split(model(), X, y),
        lambda: network.collapse_split(model(), [(X, y)]),
        lambda: network.split(nn.Linear(4, 3), X, y),
        lambda: network.fact_correlation(model(), X, y, loss=loss),
        lambda: network.agop(model(), [(X, y)], outputs=loss),
        lambda: collapse.nc1(X, y),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            measure()


def test_one_label_for_a_batch_is_refused():
    with pytest.raises(ValueError, match="X: the labels of a batch must be one for each of its 30 samples, got 3"):
        network.collapse_split(model(), [(torch.randn(30, 4), 3)])
