"""collapse_split finds by numbers which layers no nonlinearity follows, however the model hands its tensors on."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastagop import collapse, network

LABELS = torch.arange(60) % 4


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


class Net(nn.Module):
    """Layers a (6, 9), b (9, 8) and what a function makes of b's output."""

    def __init__(self, end, between=torch.relu):
        super().__init__()
        self.a, self.b, self.end, self.between = nn.Linear(6, 9), nn.Linear(9, 8), end, between

    def forward(self, x):
        return self.end(self.b(self.between(self.a(x))))


def added(h):
    h += 2.5
    return h


def written(h):
    out = torch.empty_like(h)
    out[:] = h
    return out


BARE = {  # nothing, or nothing but another view, order, shift or scale of it
    "itself": lambda h: h,
    "view": lambda h: h.view(len(h), -1),
    "reshape": lambda h: h.reshape(len(h), 2, 4),
    "flatten": lambda h: h.flatten(1),
    "unsqueeze": lambda h: h.unsqueeze(1),
    "squeeze": lambda h: h.unsqueeze(2).squeeze(2),
    "clone": lambda h: h.clone(),
    "detach": lambda h: h.detach(),
    "data": lambda h: h.data,
    "written elsewhere": written,
    "Identity": nn.Identity(),
    "Flatten": nn.Flatten(),
    "Unflatten": nn.Unflatten(1, (4, 2)),
    "Dropout": nn.Dropout(0.5),
    "Dropout in place": nn.Dropout(0.5, inplace=True),
    "nested": nn.Sequential(nn.Identity(), nn.Sequential(nn.Dropout(), nn.ModuleList([nn.Flatten()])[0])),
    "contiguous": lambda h: h.t().contiguous().t(),
    "columns in another order": lambda h: h.flip(1),
    "scaled": lambda h: 0.1 * h,
    "shifted in place": added,
    "double": lambda h: h.double(),
    "BatchNorm": nn.BatchNorm1d(8),
}
# what follows, as it is written into the model and as a function of h
FOLLOWED = {
    "ReLU": (nn.ReLU(), torch.relu),
    "ReLU in place": (nn.ReLU(inplace=True), torch.relu),
    "relu_": (lambda h: h.relu_(), torch.relu),
    "F.relu in place": (lambda h: F.relu(h, inplace=True), torch.relu),
    "clamp_": (lambda h: h.clamp_(min=0), torch.relu),
    "masked in place": (lambda h: h.masked_fill_(h < 0, 0.0), torch.relu),
    "times its sign": (lambda h: h * (h > 0), torch.relu),
    "indexed": (lambda h: h.index_put_((h < 0,), torch.zeros(())), torch.relu),
    "view and ReLU": (lambda h: h.view(len(h), 2, 4).relu_().flatten(1), torch.relu),
    "LeakyReLU in place": (nn.LeakyReLU(0.2, inplace=True), lambda h: F.leaky_relu(h, 0.2)),
    "ELU in place": (nn.ELU(inplace=True), F.elu),
    "SELU in place": (nn.SELU(inplace=True), F.selu),
    "CELU in place": (nn.CELU(inplace=True), F.celu),
    "SiLU in place": (nn.SiLU(inplace=True), F.silu),
    "Mish in place": (nn.Mish(inplace=True), F.mish),
    "Hardswish in place": (nn.Hardswish(inplace=True), F.hardswish),
    "ReLU6 in place": (nn.ReLU6(inplace=True), F.relu6),
    "Hardtanh in place": (nn.Hardtanh(inplace=True), F.hardtanh),
    "Threshold in place": (nn.Threshold(0.1, 0.0, inplace=True), lambda h: F.threshold(h, 0.1, 0.0)),
    "tanh_": (lambda h: h.tanh_(), torch.tanh),
    "sigmoid_": (lambda h: h.sigmoid_(), torch.sigmoid),
    "GELU": (nn.GELU(), F.gelu),
    "Softplus": (nn.Softplus(), F.softplus),
    "abs_": (lambda h: h.abs_(), torch.abs),
    "square": (lambda h: h * h, torch.square),
    "sin_": (lambda h: h.sin_(), torch.sin),
    "sqrt of ReLU": (lambda h: h.relu_().sqrt_(), lambda h: h.relu().sqrt()),
}


def check(model: nn.Module, X: torch.Tensor, activation, name: str = "b") -> None:
    """The features of the last layer are the model's outputs."""
    model.eval()
    with torch.no_grad():
        out = model(X.clone()).flatten(1)
    found = network.collapse_split(model, X, LABELS, activation=activation)[name]
    tolerance = 1e-9 if X.dtype == torch.float64 else 1e-4
    assert found.nc1["features"] == pytest.approx(collapse.nc1(out, LABELS), rel=tolerance)
    assert found.nc2["features"] == pytest.approx(collapse.nc2(out, LABELS), rel=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", BARE)
def test_nothing_follows(name, dtype):
    model, X = Net(BARE[name]).to(dtype), torch.randn(60, 6, dtype=dtype)
    if name == "BatchNorm":  # scales by columns: compare with the layer's own output
        found = network.collapse_split(model, X, LABELS)["b"]
        with torch.no_grad():
            h = model.b(torch.relu(model.a(X)))
        assert found.nc1["features"] == pytest.approx(collapse.nc1(h, LABELS), rel=1e-4)
        return
    check(model, X, torch.relu)
    check(model, X, torch.tanh)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FOLLOWED)
def test_a_nonlinearity_follows(name, dtype):
    end, activation = FOLLOWED[name]
    check(Net(end).to(dtype), torch.randn(60, 6, dtype=dtype), activation)


@pytest.mark.parametrize("scale", [1e-6, 1e4])
@pytest.mark.parametrize("name", ["ReLU in place", "SiLU in place", "tanh_", "GELU"])
def test_small_and_large_preactivations(name, scale):
    end, activation = FOLLOWED[name]
    model = Net(end).double()
    with torch.no_grad():
        model.b.weight.mul_(scale)
        model.b.bias.mul_(scale)
    check(model, torch.randn(60, 6, dtype=torch.float64), activation)


def test_preactivations_of_one_sign():
    """Where relu changes nothing, either answer gives the same features; the layers before are not touched."""
    model, X = Net(nn.ReLU(inplace=True)).double(), torch.randn(60, 6, dtype=torch.float64)
    with torch.no_grad():
        model.b.bias.add_(100)
    check(model, X, torch.relu)


def test_a_head_of_zeros_says_nothing_of_the_layers_before():
    """The outputs do not depend on a then: the nonlinearity that was given holds."""
    model, X = Net(nn.Identity()).double(), torch.randn(60, 6, dtype=torch.float64)
    nn.init.zeros_(model.b.weight)
    found = network.collapse_split(model, X, LABELS)["a"]
    with torch.no_grad():
        assert found.nc1["features"] == pytest.approx(collapse.nc1(model.a(X).relu(), LABELS), rel=1e-9)


class Keyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.fc = nn.Linear(6, 9), nn.Linear(9, 4)

    def forward(self, x):
        return self.fc(input=torch.relu(self.a(input=x)))


def test_layers_called_by_keyword():
    check(Keyword().double(), torch.randn(60, 6, dtype=torch.float64), torch.relu, "fc")


class Residual(nn.Module):
    """h += x: what a layer returned is changed in place afterwards."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.o = nn.Linear(6, 9), nn.Linear(9, 6), nn.Linear(6, 4)

    def forward(self, x):
        h = self.b(torch.relu(self.a(x)))
        h += x
        return self.o(h.relu_())


def test_outputs_changed_in_place_after_the_layer():
    model, X = Residual().double(), torch.randn(60, 6, dtype=torch.float64)
    found = network.collapse_split(model, X, LABELS, batch_size=7)
    with torch.no_grad():
        a, b = model.a(X).relu(), model.b(model.a(X).relu())
        expected = {"a": (X, a), "b": (a, b.relu()), "o": ((b + X).relu(), model(X))}
    for name, (into, features) in expected.items():
        assert found[name].nc1["input"] == pytest.approx(collapse.nc1(into, LABELS), rel=1e-9)
        assert found[name].nc1["features"] == pytest.approx(collapse.nc1(features, LABELS), rel=1e-9)


@pytest.mark.parametrize("out", ["tuple", "dict", "list"])
def test_other_outputs_are_refused_by_name(out):
    kinds = {"tuple": lambda h: (h, h), "dict": lambda h: {"logits": h}, "list": lambda h: [h]}
    with pytest.raises(TypeError, match=f"model must return one floating tensor, got {out}"):
        network.collapse_split(Net(kinds[out]), torch.randn(60, 6), LABELS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """Measured in float32, from the model's own features and weights."""
    X = torch.randn(60, 6).to(dtype)
    for end, activation in ((nn.Flatten(), None), (nn.ReLU(inplace=True), torch.relu), (nn.Tanh(), torch.tanh)):
        model = Net(end).to(dtype)
        found = network.collapse_split(model, X, LABELS, activation=activation or torch.relu)["b"]
        with torch.no_grad():
            h = model.a(X).relu().float() @ model.b.weight.float().T
            out = h + model.b.bias.float()
        assert found.nc1["projected"] == pytest.approx(collapse.nc1(h, LABELS), rel=1e-4)
        expected = collapse.nc1(out if activation is None else activation(out), LABELS)
        assert found.nc1["features"] == pytest.approx(expected, rel=1e-4)
        alone = network.split(model.b, model.a(X).relu(), LABELS, activation)
        assert alone.nc1["features"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("activation", "error", "message"),
    [
        ("relu", TypeError, "activation must be a function of tensors such as torch.relu, or None, got 'relu'"),
        (torch.sum, ValueError, r"activation must return a row for each of the 60 rows .*, got \(\)"),
        (lambda h: h.tolist(), ValueError, "activation must return a row for each of the 60 rows .*, got list"),
    ],
)
def test_activations_are_functions_that_keep_rows(activation, error, message):
    X, model = torch.randn(60, 6), nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    for call in (
        lambda: network.split(model[0], X, LABELS, activation),
        lambda: network.collapse_split(model, X, LABELS, activation=activation),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize(
    "between", [torch.tanh, nn.GELU(), lambda h: 2.0 * torch.relu(h)], ids=["tanh", "GELU", "scaled"]
)
def test_an_activation_that_is_not_the_models_is_told(between):
    """Features are what the activation given makes of a layer's output; the next one's input shows the model's own."""
    model, X = Net(BARE["itself"], between), torch.randn(60, 6)
    with pytest.warns(UserWarning, match="collapse_split: what enters 'b' is not the activation of what 'a' returns"):
        network.collapse_split(model, X, LABELS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = network.collapse_split(model, X, LABELS, activation=between)
        network.collapse_split(Net(BARE["itself"]), X, LABELS)
        network.collapse_split(model, X, LABELS, "b")  # nothing after it tells
    assert found["a"].nc1["features"] == pytest.approx(found["b"].nc1["input"], rel=1e-4)


class Towers(nn.Module):
    """Layers that are called one after the other and do not feed each other."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        left, right = torch.relu(self.a(x)), torch.relu(self.b(x + 1.0))
        return torch.relu(self.c(left)) * torch.relu(self.d(right))


class Heads(Towers):
    """A mean and a variance, of which the mean goes on."""

    def forward(self, x):
        h = torch.relu(self.a(x))
        mean, variance = self.b(h), self.c(h)
        return torch.relu(self.d(torch.relu(mean))) * torch.relu(variance)


@pytest.mark.parametrize("model", [Towers, Heads])
def test_layers_side_by_side_say_nothing_of_each_other(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network.collapse_split(model(), torch.randn(60, 6), LABELS)


def test_layers_between_those_named_say_nothing():
    layers = [nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network.collapse_split(nn.Sequential(*layers), torch.randn(60, 6), LABELS, ["0", "4"])


def test_an_activation_of_float32_serves_half_precision():
    model = nn.Sequential(nn.Linear(6, 6), nn.PReLU(), nn.Linear(6, 3)).bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network.collapse_split(model, torch.randn(60, 6).bfloat16(), LABELS, activation=nn.PReLU())
