"""Guards in half precision and under autocast: what they refuse in float32 they refuse there, and nothing else."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from fastagop import network

NARROW = ["bfloat16", "float16", "autocast"]
LABELS = torch.arange(12) % 3


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def narrow(model: nn.Module, X: torch.Tensor, how: str):
    """Model and inputs of a dtype, or float32 and autocast to bfloat16."""
    if how == "autocast":
        return model, X, torch.autocast("cpu", torch.bfloat16)
    dtype = getattr(torch, how)
    return model.to(dtype), X.to(dtype), contextlib.nullcontext()


def measures(model, X):
    yield lambda: network.agop(model, X)
    yield lambda: network.nfa_correlation(model, X, sketch=2)
    yield lambda: network.collapse_split(model, X, LABELS[: len(X)])


class Random(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, 0.5, True)


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


@pytest.mark.parametrize("how", NARROW)
@pytest.mark.parametrize("mixer", [nn.BatchNorm1d(6, track_running_stats=False), Centred(), Random()])
def test_mixing_and_randomness_are_refused(mixer, how):
    model = nn.Sequential(copy.deepcopy(mixer), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    model, X, context = narrow(model, torch.randn(12, 6), how)
    for measure in measures(model, X):
        with context, pytest.raises(ValueError, match=r"module '0' \(\w+\) mixes the samples of a batch, or is random"):
            measure()


class Blocked(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.end = nn.Linear(6, 5), nn.Linear(5, 3), nn.Softmax(1)

    def forward(self, x):
        return self.end(self.b(torch.relu(self.a(x)).detach()))


@pytest.mark.parametrize("how", NARROW)
def test_blocked_layers_are_refused(how):
    model, X, context = narrow(Blocked(), torch.randn(12, 6), how)
    with context, pytest.raises(ValueError, match="depend on 'a', but its forward detaches it"):
        network.agop(model, X)


def test_a_blocked_way_that_hardly_shows_is_refused():
    """Outputs of 1000 that a layer changes by a tenth."""

    class Faint(Blocked):
        def forward(self, x):
            return 1000 + super().forward(x) / 10

    with pytest.raises(ValueError, match="depend on 'a'"):
        network.agop(Faint(), torch.randn(12, 6))


class Experts(nn.Module):
    """Every sample goes to one of two layers, together with all others that go there."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(6, 2), nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x):
        out = torch.zeros_like(x)
        best = self.gate(x).argmax(1)
        for index, expert in enumerate(self.experts):
            out[best == index] = expert(x[best == index]).to(x.dtype)
        return x + out


def blocks(d: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d), nn.LayerNorm(d)) for _ in range(4)),
        nn.Linear(d, 3),
    )


def convolutions() -> nn.Module:
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 2), nn.GroupNorm(2, 4)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


def attention() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Flatten(), nn.Linear(40, 3))


ORDINARY = {
    "convolutions": (convolutions, (12, 1, 8, 8)),
    "attention": (attention, (12, 5, 8)),
    "LayerNorm": (lambda: blocks(16), (12, 16)),
    "experts": (lambda: nn.Sequential(Experts(), nn.Tanh(), nn.Linear(6, 3)), (12, 6)),
}


@pytest.mark.parametrize("how", [*NARROW, "float32"])
@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_models_are_not_refused(name, how):
    build, shape = ORDINARY[name]
    model, X, context = narrow(build(), torch.randn(shape), how)
    layers = "[!01]*" if name == "experts" else None  # an expert whom no sample asks is not called
    with context:
        assert network.agop(model, X, layers)


@dataclass
class Output:
    logits: torch.Tensor


RETURNED = {
    "dict": (lambda h: {"logits": h}, lambda out: out["logits"]),
    "dict in a tuple": (lambda h: (1, {"logits": h}), lambda out: out[1]["logits"]),
    "dataclass": (Output, lambda out: out.logits),
    "an object": (lambda h: type("Out", (), {"logits": h}), lambda out: out.logits),
}


@pytest.mark.parametrize("mixer", [Centred(), Random()])
@pytest.mark.parametrize("name", RETURNED)
def test_models_that_return_more_than_a_tensor_are_tried(name, mixer):
    wrap, outputs = RETURNED[name]

    class Model(nn.Module):
        def __init__(self, mixer):
            super().__init__()
            self.mixer, self.layer = mixer, nn.Linear(6, 3)

        def forward(self, x):
            return wrap(torch.tanh(self.layer(self.mixer(x))))

    X = torch.randn(12, 6)
    with pytest.raises(ValueError, match=r"model: module 'mixer' \(\w+\) mixes the samples of a batch, or is random"):
        network.agop(Model(mixer), X, outputs=outputs)
    assert list(network.agop(Model(nn.Identity()), X, outputs=outputs)) == ["layer"]


def test_what_is_not_differentiated_may_mix():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x):
            return {"logits": torch.tanh(self.layer(x)), "spread": x - x.mean(0)}

    assert list(network.agop(Model(), torch.randn(12, 6), outputs=lambda out: out["logits"])) == ["layer"]


def test_a_function_that_mixes_is_named():
    """Gradients keep to their samples, their size does not."""
    model, X = nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 2)), torch.randn(12, 6)
    with pytest.raises(ValueError, match="outputs: the function mixes the samples of a batch, or is random"):
        network.agop(model, X, outputs=lambda out: out * out.mean().detach())
    with pytest.raises(ValueError, match="loss: the function mixes the samples"):
        network.fact(model, X, LABELS, loss=lambda out, y: out[:, 0] * out.mean().detach(), weight_decay=0.1)


def test_the_first_batch_of_two_samples_is_tried():
    model, X = nn.Sequential(Centred(), nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 2)), torch.randn(12, 6)
    for measure in (network.agop, network.nfa_correlation):
        with pytest.raises(ValueError, match="mixes the samples of a batch"):
            measure(model, [X[:1], X[1:2], X[2:]])
    with pytest.raises(ValueError, match="mixes the samples of a batch"):
        network.collapse_split(model, [(X[:1], LABELS[:1]), (X[1:], LABELS[1:])])


def test_layers_that_a_later_batch_leaves_out():
    """A table of positions is shared by the samples, which one sample does not show."""

    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.layer = nn.Embedding(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            return torch.tanh(self.layer(x + self.table(torch.arange(4)))).flatten(1)

    X = torch.randn(5, 4, 6)
    model = Positions()
    with pytest.warns(UserWarning, match="'table' .Embedding.: its inputs are shared"):
        found = network.agop(model, [X[:1], X[1:]])
    assert list(found) == ["layer"]
    torch.testing.assert_close(found["layer"], network.agop(model, X, "layer")["layer"])
