"""The table of backends: one entry for radial kernels and one for the others, each asked for its own kernels."""

from __future__ import annotations

import pytest
import torch
from fastagop.kernels import backends
from fastagop.kernels.pair_backend.backend import PairBackend
from fastagop.kernels.torch_backend.backend import TorchBackend

import fastagop
from fastagop import BackendUnavailable, Laplace, Polynomial


class Pairs:
    """Kernel matrices of kernels that are not radial, by the torch backend's."""

    name = "toy"
    operations = ("kernel_matrix",)
    shares_triangle = False

    def __init__(self):
        self.torch, self.asked = PairBackend(), []

    def refusal(self, request):
        self.asked.append(request.kernel)
        return None if request.operation in self.operations else "it has kernel_matrix only"

    def describe_precision(self, precision, X):
        return "the toy's"

    def products(self, precision, X):
        return self.torch.products(precision, X)

    def matrix(self, operator, out, ridge):
        return self.torch.matrix(operator, out, ridge)


class Radial(TorchBackend):
    """The torch backend by another name."""

    name = "toy"


class Refusing(Pairs):
    """A backend that has a reason to serve nothing."""

    def refusal(self, request):
        return f"it is closed to {request.kernel!r}"


@pytest.fixture(autouse=True)
def _table(monkeypatch):
    monkeypatch.setattr(backends, "_TABLE", dict(backends._TABLE))


@pytest.fixture
def X(normal):
    return torch.as_tensor(normal(30, 4))


KERNEL = Polynomial(2, 1.0, 1.0)


def test_a_backend_for_pairs_is_asked(X):
    toy = Pairs()
    backends.register(toy, kernels="pairs")
    K = fastagop.kernel_matrix(KERNEL, X, ridge=0.5, backend="toy")
    assert torch.equal(K, fastagop.kernel_matrix(KERNEL, X, ridge=0.5))
    assert toy.asked == [KERNEL]
    assert "backend toy" in str(fastagop.explain("kernel_matrix", KERNEL, X, backend="toy"))
    with pytest.raises(BackendUnavailable, match=r"^backend 'toy' cannot serve agop: it has kernel_matrix only; use"):
        fastagop.agop(KERNEL, X, X, backend="toy")


def test_a_backend_for_pairs_refuses_by_itself(X):
    backends.register(Refusing(), kernels="pairs")
    with pytest.raises(BackendUnavailable, match=r"^backend 'toy' cannot serve kernel_matrix: it is closed to Polynom"):
        fastagop.kernel_matrix(KERNEL, X, backend="toy")
    with pytest.raises(BackendUnavailable, match=r"^backend 'toy' cannot serve solve: it is closed to Polynomial"):
        fastagop.solve(KERNEL, X, X, backend="toy")


def test_other_kernels_are_refused_with_what_adds_them(X):
    backends.register(Pairs(), kernels="pairs")
    with pytest.raises(
        BackendUnavailable, match=r"no radial kernels, and Laplace.*\bregister\(\.\.\., kernels='radial'\)"
    ):
        fastagop.kernel_matrix(Laplace(2.0), X, backend="toy")
    request = backends.Request("kernel_matrix", Laplace(2.0), X)
    assert backends.serving("toy", request) == "auto"
    backends.register(Radial())
    assert backends.serving("toy", request) == "toy"
    assert torch.equal(fastagop.kernel_matrix(Laplace(2.0), X, backend="toy"), fastagop.kernel_matrix(Laplace(2.0), X))


def test_a_radial_backend_has_no_others(X):
    backends.register(Radial())
    with pytest.raises(
        BackendUnavailable, match=r"radial kernels only, and Poly.*\bregister\(\.\.\., kernels='pairs'\)"
    ):
        fastagop.kernel_matrix(KERNEL, X, backend="toy")


@pytest.mark.parametrize("kernels", backends.KINDS)
@pytest.mark.parametrize("name", backends.names())
def test_names_of_the_package_are_taken(kernels, name):
    toy, taken = Pairs(), ", ".join(map(repr, backends.names()))
    toy.name = name
    with pytest.raises(ValueError, match=rf"^name must be none of {taken}, got '{name}'"):
        backends.register(toy, kernels=kernels)


def test_kinds_of_kernels():
    with pytest.raises(ValueError, match=r"^kernels must be one of 'radial', 'pairs', got 'dot'"):
        backends.register(Pairs(), kernels="dot")


def test_names():
    before = backends.names()
    assert before[:4] == ("auto", "torch", "triton", "keops")
    assert {"torch", "triton"} <= set(backends.names("solve")) <= set(before) - {"keops"}
    backends.register(Pairs(), kernels="pairs")
    assert backends.names() == (*before, "toy")
    assert backends.names("kernel_matrix")[-1] == "toy"
    assert "toy" not in backends.names("agop")
