"""Communicator compare inputs by a hash of their bytes: every value counts at its place, and storage does not."""

from __future__ import annotations

import hashlib

import pytest
import torch

from fastagop.distributed.communicator import _hash


@pytest.fixture
def X(normal):
    return normal(40, 6)


def one_hot(labels: torch.Tensor) -> torch.Tensor:
    return 2.0 * torch.nn.functional.one_hot(labels, 3).double() - 1.0


LABELS = torch.arange(40) % 3
DIFFERENT = {
    "rows permuted": lambda X: (X, X[torch.arange(40).roll(1)]),
    "two rows swapped": lambda X: (X, X[[1, 0, *range(2, 40)]]),
    "columns permuted": lambda X: (X, X[:, [1, 0, 2, 3, 4, 5]]),
    "reversed": lambda X: (X, X.flip(0, 1)),
    "labels permuted": lambda X: (one_hot(LABELS), one_hot(LABELS.roll(1))),  # equal sums of all rows and columns
    "labels permuted within a class's reach": lambda X: (one_hot(LABELS), one_hot(LABELS[torch.arange(40).roll(7)])),
    "four entries that keep all sums": lambda X: (
        torch.tensor([[1.0, 2.0], [2.0, 1.0]]),
        torch.tensor([[2.0, 1.0], [1.0, 2.0]]),
    ),
    "the transpose of a square": lambda X: (X[:6].clone(), X[:6].T.contiguous()),
    "one bit": lambda X: (X, X.index_put((torch.tensor(39), torch.tensor(5)), X[39, 5].nextafter(X[0, 0] + 9))),
    "the sign of a zero": lambda X: (torch.zeros(3, 2), -torch.zeros(3, 2)),
    "another shape": lambda X: (X, X.reshape(6, 40)),
    "another dtype of the same bytes": lambda X: (X[:, :2].clone(), X[:, :2].clone().view(torch.float32)),
    "zeros, fewer": lambda X: (torch.zeros(4, 2), torch.zeros(3, 2)),
    "no rows, other columns": lambda X: (torch.zeros(0, 2), torch.zeros(0, 3)),
    "nothing and no rows": lambda X: (None, torch.zeros(0, 2)),
}


@pytest.mark.parametrize("pair", DIFFERENT.values(), ids=DIFFERENT.keys())
def test_other_inputs_have_other_hashes(pair, X):
    first, second = pair(X)
    assert _hash(first) != _hash(second)


EQUAL = {
    "a copy": torch.clone,
    "stored by columns": lambda X: X.T.contiguous().T,
    "every second row of a larger one": lambda X: X.repeat_interleave(2, 0)[::2],
    "with gradients wanted": lambda X: X.clone().requires_grad_(),
}


@pytest.mark.parametrize("make", EQUAL.values(), ids=EQUAL.keys())
def test_storage_plays_no_part(make, X):
    assert _hash(make(X)) == _hash(X)


def test_nan_is_compared_like_any_number():
    X = torch.full((3, 2), torch.nan)
    assert _hash(X) == _hash(X.clone())
    assert _hash(X) != _hash(torch.zeros(3, 2))


def test_hashed_in_blocks_or_at_once(X, monkeypatch):
    """The same number whatever the blocks, and that of the bytes written one after the other."""
    data = b"(40, 6) torch.float64" + X.numpy().tobytes()
    expected = int.from_bytes(hashlib.sha256(data).digest()[:8], "little", signed=True)
    assert _hash(X) == expected
    monkeypatch.setattr("fastagop.distributed.communicator._HASHED", 100)
    assert _hash(X) == expected


def test_weights_are_vectors(normal):
    w = normal(50).abs()
    assert _hash(w) != _hash(w.flip(0))
    assert _hash(w) != _hash(w[:, None])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_device_plays_no_part(X):
    assert _hash(X.cuda()) == _hash(X)
