"""gradients and agop of a few float32 points: the numbers of the reference, and what is left to the longer way."""

from __future__ import annotations

import pytest
import torch
from fastagop.kernels import reference
from fastagop.kernels.torch_backend import agop as torch_agop
from fastagop.kernels.torch_backend import backend, few
from kernel_cases import CASES, one_of_each_class

import fastagop

KERNELS = [case.at(3.0).kernel for case in one_of_each_class(CASES)]
EPS = torch.finfo(torch.float32).eps
# Results are rounded to float32 once; what float64 loses of a term, 2e-9 at most, is below that.
TOLERANCE = 2 * EPS


def problem(normal, name="spread", n=40, d=7, K=3):
    """(X, alpha): Gaussian points; pairs that nearly touch; some written twice; far from zero."""
    X, alpha = normal(n, d), normal(n, K, seed=2)
    if name == "crowded":
        X = torch.cat([X[: n // 2], X[: n - n // 2] + 1e-5 * normal(n - n // 2, d, seed=3)])
    if name == "twice":
        X = torch.cat([X[: n // 2], X[: n - n // 2]])
    if name == "far":
        X = X + 1000.0
    return X.float(), alpha.float()


@pytest.fixture
def few_only(monkeypatch):
    """The longer way fails."""
    monkeypatch.setattr(torch_agop, "agop", lambda *_: pytest.fail("the longer way"))
    monkeypatch.setattr(backend, "predictor_gradients", lambda *_: pytest.fail("the longer way"))


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
@pytest.mark.parametrize("name", ["spread", "crowded", "twice", "far"])
@pytest.mark.usefixtures("few_only")
def test_is_the_definition(kernel, name, normal, relative):
    X, alpha = problem(normal, name)
    weights = normal(len(X), 1, seed=5)[:, 0].abs().float()
    for Z in (None, X[: len(X) // 2 + 1], normal(50, X.shape[1], seed=4).float() + X.mean(0)):
        true = reference.gradients(kernel, X, alpha, X if Z is None else Z)
        assert relative(fastagop.gradients(kernel, X, alpha, Z), true) <= TOLERANCE
        for center in (False, True):
            for w in (None, weights) if Z is None else (None,):
                share = torch.ones(len(true)).double() if w is None else w.double()
                share = share / share.sum()
                g = true - torch.einsum("i,icd->cd", share, true) if center else true
                M = torch.einsum("i,icd,ice->de", share, g, g)
                found = fastagop.agop(kernel, X, alpha, Z, center=center, sample_weight=w)
                assert torch.equal(found, found.T)
                assert relative(found, M) <= 2 * TOLERANCE


@pytest.mark.parametrize("layout", ["transposed", "strided", "negative"])
@pytest.mark.usefixtures("few_only")
def test_layouts(layout, normal, relative):
    X, alpha = problem(normal)
    true = reference.agop(KERNELS[0], X, alpha)
    if layout == "transposed":
        X, alpha = X.T.contiguous().T, alpha.T.contiguous().T
    if layout == "strided":
        X, alpha = (torch.stack([t, t], 2)[..., 0] for t in (X, alpha))
    if layout == "negative":
        X, alpha = (torch.complex(torch.zeros_like(t), -t).conj().imag for t in (X, alpha))
        assert X.is_neg()
    before = X.clone(), alpha.clone()
    assert relative(fastagop.agop(KERNELS[0], X, alpha), true) <= 2 * TOLERANCE
    assert torch.equal(X, before[0])
    assert torch.equal(alpha, before[1])


def test_points_that_float64_cannot_hold_around_one_centre(normal, relative):
    """Features of very different units: pairs equal in the large ones differ by less than float64's product keeps."""
    X, alpha = problem(normal)
    X = torch.cat([X[:, :3].round(), 1e-12 * X[:, 3:]], 1)
    X[::2, :3] = X[1::2, :3]
    assert few.gradients(KERNELS[0], X, alpha, X) is None
    true = reference.gradients(KERNELS[0], X, alpha, X)
    found = fastagop.gradients(KERNELS[0], X, alpha)
    for features in (slice(3), slice(3, None)):
        assert relative(found[..., features], true[..., features]) <= 32 * EPS


def test_what_is_left_to_the_longer_way(normal):
    X, _ = problem(normal)
    room = few.bytes_of(40, 40, 7, 3)
    assert few.serves(X, X, 3, room)
    assert not few.serves(X, X, 3, room - 1)
    assert not few.serves(X, X, 0, room)
    assert not few.serves(X.double(), X.double(), 3, room)
    assert not few.serves(X, X[:0], 3, room)
    assert not few.serves(X[:, :4], X[:, :4], 3, room)
    assert not few.serves(X.new_empty(2000, 7), X.new_empty(2000, 7), 3, 2**40)


def test_the_plan_says_so(normal):
    X, alpha = problem(normal)
    for name in ("agop", "gradients"):
        assert "few float32 points" in str(fastagop.explain(name, KERNELS[0], X, alpha))
        assert "few float32 points" not in str(fastagop.explain(name, KERNELS[0], X.double(), alpha.double()))
