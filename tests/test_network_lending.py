"""Models that cannot be lent to a measure, and what is given back where something fails."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastagop import network

LABELS = torch.arange(9) % 3


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Dropout(), nn.Linear(5, 3))


def measures(model: nn.Module, X: torch.Tensor):
    """Every measure of a model, ready to be called."""
    yield lambda: network.agop(model, X)
    yield lambda: network.nfa_correlation(model, X)
    yield lambda: network.fact(model, X, LABELS, loss=lambda out, y: out[:, 0] * y, weight_decay=1.0)
    yield lambda: network.collapse_split(model, X, LABELS)
    if isinstance(model, nn.Sequential):
        yield lambda: network.split(model[0], X, LABELS)


def state(model: nn.Module) -> list[bool]:
    return [part.training for part in model.modules()] + [part.requires_grad for part in model.parameters()]


def test_parameters_of_inference_mode_are_refused():
    """torch freezes them and does not let them require gradients again."""
    with torch.inference_mode():
        model = mlp()
    model[2].eval()
    before, X = state(model), torch.randn(9, 4)
    for measure in measures(model, X):
        with pytest.raises(ValueError, match=r"parameter '(0\.)?weight' was made in torch\.inference_mode.*deepcopy"):
            measure()
        assert state(model) == before
    for measure in measures(copy.deepcopy(model), X):
        measure()
        with torch.inference_mode():
            measure()


class Stubborn(nn.Parameter):
    def requires_grad_(self, requires_grad=True):
        if requires_grad:
            raise RuntimeError("stays frozen")
        return super().requires_grad_(False)


def test_the_rest_is_given_back_where_a_parameter_cannot_be():
    model = mlp()
    model[0].bias = Stubborn(torch.zeros(5))
    before = state(model)
    with pytest.raises(RuntimeError, match="stays frozen"):
        network.agop(model, torch.randn(9, 4))
    assert state(model) == [*before[:6], False, *before[7:]]


def test_a_model_whose_eval_fails_is_given_back():
    class Model(nn.Sequential):
        def eval(self):
            super().eval()
            raise RuntimeError("no evaluation")

    model = Model(nn.Linear(4, 3))
    with pytest.raises(RuntimeError, match="no evaluation"):
        network.agop(model, torch.randn(9, 4))
    assert state(model) == [True] * 4


@pytest.mark.parametrize("inside", [False, True])
def test_data_parallel_models_are_refused_on_several_devices(inside):
    """Their replicas copy what stands in for a layer's forward, which computes with the layer's own weights."""
    parallel = nn.DataParallel(mlp())
    model = nn.Sequential(parallel, nn.Tanh()) if inside else parallel
    X = torch.randn(9, 4)
    if not torch.cuda.is_available():  # Then it is the module alone.
        assert list(network.agop(model, X)) == [f"{'0.' if inside else ''}module.{layer}" for layer in "03"]
    parallel.device_ids = [0, 1]
    before = state(model)
    message = r"model: ('0' in it|it) is a DataParallel on 2 devices.*; measure its \.module"
    for measure in list(measures(model, X))[:4]:
        with pytest.raises(ValueError, match=message):
            measure()
    assert state(model) == before
