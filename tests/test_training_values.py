"""One epoch of a network's training: the order of its points, the loss it reports, the mode it runs in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from reproduce import network_settings
from reproduce.settings import RunLocation
from reproduce.training import Training

N, BATCH = 10, 4  # the last batch has two points


def training(**changes) -> Training:
    changes = {"n": N, "width": 8, "batch": BATCH, "init_scale": 1.0, "epochs": 3, **changes}
    return Training(network_settings.paper("digits", "mlp", **changes), RunLocation(Path("."), device="cpu"))


def orders(one: Training, epochs: int) -> list[list[int]]:
    """Row numbers as the model meets them, epoch by epoch."""
    met: list[torch.Tensor] = []
    handle = one.model.register_forward_pre_hook(lambda _, inputs: met.append(inputs[0].detach().clone()))
    found = []
    for _ in range(epochs):
        met.clear()
        one.train_epoch()
        assert [len(rows) for rows in met] == [4, 4, 2]
        found.append([int((row == one.X).all(1).nonzero()) for row in torch.cat(met)])
    handle.remove()
    return found


def test_every_epoch_has_an_order_of_its_own():
    first = orders(training(), 3)
    assert all(sorted(order) == list(range(N)) for order in first)
    assert len({tuple(order) for order in first}) == 3
    assert orders(training(), 3) == first  # of seed and epoch alone
    assert orders(training(seed=1), 1)[0] != first[0]


def test_the_loss_of_an_epoch_is_the_mean_over_points():
    """A rate too small to move the weights: the epoch's loss is that of the network as it was."""
    one = training(learning_rate=1e-30, momentum=0.0)
    with torch.no_grad():
        expected = float((one.model(one.X) - one.Y).square().mean())
    assert one.train_epoch() == pytest.approx(expected, rel=1e-5)
    assert one.losses == [pytest.approx(expected, rel=1e-5)]


def test_an_epoch_is_plain_gradient_descent():
    """Three steps of heavy-ball SGD on the mean square over points and outputs, written out, in float64."""
    one = training(learning_rate=0.1, momentum=0.9)
    weights = [p.detach().double().requires_grad_() for p in one.model.parameters()]
    (order,) = orders(training(learning_rate=0.1, momentum=0.9), 1)
    X, Y, velocity = one.X.double(), one.Y.double(), [0.0] * len(weights)
    for start in range(0, N, BATCH):
        rows, out = order[start : start + BATCH], X[order[start : start + BATCH]]
        for weight in weights[:-1]:
            out = (out @ weight.T).relu()
        loss = (out @ weights[-1].T - Y[rows]).square().mean()
        for i, grad in enumerate(torch.autograd.grad(loss, weights)):
            velocity[i] = 0.9 * velocity[i] + grad
        with torch.no_grad():
            for weight, step in zip(weights, velocity, strict=True):
                weight.sub_(0.1 * step)
    one.train_epoch()
    for found, expected in zip(one.model.parameters(), weights, strict=True):
        assert float((found - expected).detach().norm() / expected.detach().norm()) < 1e-5


def test_an_epoch_trains_and_accuracy_does_not():
    """Running statistics of batch normalisation move in an epoch, also after the accuracy was asked for."""
    one = training()
    normalisation = nn.BatchNorm1d(one.X.shape[1])
    one.model = nn.Sequential(normalisation, one.model)
    before = normalisation.running_mean.clone()
    one.accuracy()
    assert torch.equal(normalisation.running_mean, before)
    one.train_epoch()
    assert int(normalisation.num_batches_tracked) == 3
    assert not torch.equal(normalisation.running_mean, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_ends_the_training(value):
    one = training()
    one.Y[0, 0] = value
    with pytest.raises(ValueError, match="training diverged in epoch 1"):
        one.train_epoch()
