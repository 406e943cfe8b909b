"""AGOP, NFA correlation and collapse split of networks, against Jacobians of single samples in float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset

from fastagop import network

LABELS = torch.tensor([7, -3, 7, 100, -3, 7, 100, 7, -3])


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def mlp(*widths: int, bias: bool = False, inplace: bool = False) -> nn.Sequential:
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b, bias=bias), nn.ReLU(inplace=inplace))]
    return nn.Sequential(*layers[:-1])


class Wrapped(nn.Module):
    """A module around a function of its submodules and the input."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.function(self, x)


def truth(model: nn.Module, X: torch.Tensor, name: str) -> torch.Tensor:
    """sum of J^T J over samples and calls of the layer, J by perturbing what enters the layer in one call."""
    layer, modes = model.get_submodule(name), [(module, module.training) for module in model.modules()]
    model.eval()
    total = 0.0
    for x in X:
        shapes: list = []
        handle = layer.register_forward_pre_hook(lambda _, args, to=shapes: to.append(args[0].shape))
        model(x[None])
        handle.remove()
        for call, shape in enumerate(shapes):

            def f(delta, x=x, call=call):
                calls = iter(range(10))
                handle = layer.register_forward_pre_hook(
                    lambda _, args: (args[0] + delta,) if next(calls) == call else None
                )
                out = model(x[None])
                handle.remove()
                return out.reshape(-1)

            J = torch.autograd.functional.jacobian(f, torch.zeros(shape, dtype=X.dtype)).reshape(-1, shape[-1])
            total = total + J.T @ J
    for module, mode in modes:
        module.training = mode
    return total


def tokens(m, x):
    return m.b(m.r(m.a(x)).mean(1))


def residual(m, x):
    x = x + m.c(m.r(m.b(m.r(m.a(x)))))
    return m.o(m.r(x)).square()


def twice(m, x):
    return m.o(torch.tanh(m.a(torch.tanh(m.a(x)))))


def relu():
    return nn.ReLU(inplace=True)


# name: (model, shape of one input); what is special about it stands beside it
MODELS = {
    "mlp": (lambda: mlp(6, 9, 9, 9, 9, 9, 3), (6,)),  # the paper's depth
    "biased, in place": (lambda: mlp(6, 9, 4, 3, bias=True, inplace=True), (6,)),  # widening and narrowing layers
    "one output": (lambda: mlp(6, 9, 1), (6,)),
    "one layer": (lambda: nn.Linear(6, 3), (6,)),
    "wide blocks": (lambda: mlp(5, 600, 520, 2), (5,)),  # several blocks of the symmetric sum, the last one short
    "outputs of shape ()": (lambda: Wrapped(lambda m, x: m.f(x)[:, 0], f=mlp(6, 9, 3)), (6,)),
    "outputs of shape (2, 3)": (lambda: nn.Sequential(mlp(6, 9, 6), nn.Unflatten(1, (2, 3))), (6,)),
    "tokens": (lambda: Wrapped(tokens, a=nn.Linear(4, 5), b=nn.Linear(5, 2), r=relu()), (3, 4)),
    "sequence first": (
        lambda: Wrapped(lambda m, x: tokens(m, x.mT).flatten(1), a=nn.Linear(3, 5), b=nn.Linear(5, 2), r=relu()),
        (3, 4),
    ),
    "residual": (
        lambda: Wrapped(
            residual, a=nn.Linear(6, 6), b=nn.Linear(6, 12), c=nn.Linear(12, 6), o=nn.Linear(6, 3), r=relu()
        ),
        (6,),
    ),
    "used twice": (lambda: Wrapped(twice, a=nn.Linear(6, 6), o=nn.Linear(6, 3)), (6,)),
    "batch norm and dropout": (
        lambda: nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(0.5), nn.Linear(9, 3)),
        (6,),
    ),
    "transformer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (4, 8)),
    "reparametrised": (
        lambda: nn.Sequential(
            parametrizations.weight_norm(nn.Linear(6, 5)), nn.Tanh(), parametrizations.spectral_norm(nn.Linear(5, 3))
        ),
        (6,),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_agop_is_the_sum_of_squared_jacobians(name, relative):
    build, shape = MODELS[name]
    model, X = build().double(), torch.randn(7, *shape, dtype=torch.float64)
    found = network.agop(model, X, batch_size=3, reduction="sum")
    linear = [n for n, m in model.named_modules() if type(m) is nn.Linear or "Parametrized" in type(m).__name__]
    projections = [n for n in found if "_proj" in n]  # of attention: test_network_attention.py
    assert [n for n in found if n not in projections] == [n for n in linear if "out_proj" not in n]
    for layer, M in ((n, M) for n, M in found.items() if n not in projections):
        assert relative(M, truth(model, X, layer)) <= 1e3 * torch.finfo(M.dtype).eps, layer


@pytest.mark.parametrize("trunk", ["resnet18", "vgg11"])
def test_convolutional_trunks(trunk, relative):
    from torchvision import models

    if trunk == "resnet18":
        model, shape = models.resnet18(num_classes=8), (3, 8, 8)
        model.fc = nn.Sequential(model.fc, nn.ReLU(), mlp(8, 8, 3))
    else:
        model, shape = nn.Sequential(models.vgg11().features[:10], nn.Flatten(), mlp(256, 8, 3)), (3, 4, 4)
    model, X = model.double(), torch.randn(4, *shape, dtype=torch.float64)
    found = network.agop(model, X, ["fc.*", "2.*"][trunk != "resnet18"])
    assert len(found) == (3 if trunk == "resnet18" else 2)
    for layer, M in found.items():
        assert relative(4 * M, truth(model, X, layer)) <= 1e3 * torch.finfo(M.dtype).eps, layer


def test_float32_sums_keep_their_digits(relative):
    model, X = mlp(20, 64, 64, 10), torch.randn(1500, 20)
    exact = network.agop(model.double(), X.double())
    model = model.float()
    for layer, M in network.agop(model, X).items():
        # float32 pre-activations of the other sign move single gradients; so few samples have none
        assert M.dtype == torch.float32
        assert torch.equal(M, M.T)
        assert relative(M, exact[layer]) <= 64 * torch.finfo(torch.float32).eps, layer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_sum_in_float32(dtype, relative):
    model, X = mlp(6, 16, 3).to(dtype), torch.randn(300, 6, dtype=dtype)
    exact = network.agop(model.double(), X.double())
    for layer, M in network.agop(model.to(dtype), X).items():
        assert M.dtype == torch.float32  # narrower ones may not hold it
        assert relative(M, exact[layer]) <= 4 * torch.finfo(dtype).eps


@settings(deadline=None, max_examples=20)
@given(n=st.integers(1, 12), size=st.integers(1, 13), seed=st.integers(0, 2**32 - 1))
def test_batches_change_nothing(n, size, seed):
    torch.manual_seed(seed)
    model, X = mlp(4, 7, 3).double(), torch.randn(n, 4, dtype=torch.float64)
    whole, parts = network.agop(model, X, batch_size=n), network.agop(model, X, batch_size=size)
    loader = network.agop(model, DataLoader(TensorDataset(X, torch.zeros(n)), batch_size=size))
    for name, M in whole.items():
        torch.testing.assert_close(parts[name], M)
        torch.testing.assert_close(loader[name], M)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(0.1, 10))
def test_laws(seed, scale):
    """Positive semi-definite, quadratic in the outputs, n times the mean is the sum, and W's rows span its range."""
    torch.manual_seed(seed)
    model, X = mlp(9, 4, 3).double(), torch.randn(6, 9, dtype=torch.float64)
    M = network.agop(model, X)["0"]
    total = network.agop(model, X, reduction="sum")["0"]
    torch.testing.assert_close(total, 6 * M)
    with torch.no_grad():
        model[2].weight *= scale
    torch.testing.assert_close(network.agop(model, X)["0"], scale**2 * M)
    assert torch.linalg.eigvalsh(M)[0] >= -1e-12 * M.trace()
    P = torch.linalg.pinv(model[0].weight) @ model[0].weight
    torch.testing.assert_close(P @ M, M)


def test_an_unused_branch_is_zero_and_a_chosen_one_is_refused():
    model = Wrapped(lambda m, x: m.a(x) + 0 * m.b(x).detach(), a=nn.Linear(4, 3), b=nn.Linear(4, 3))
    X = torch.randn(5, 4)
    found = network.agop(model, X)
    assert bool((found["b"] == 0).all())
    assert bool((found["a"] != 0).any())
    with pytest.raises(ValueError, match="does not depend on them"):
        network.agop(model, X, "b")
    with pytest.raises(network.ConstantMatrixError, match="'b'"):
        network.nfa_correlation(model, X)
    assert list(network.nfa_correlation(model, X, "a")) == ["a"]


def test_layers_are_chosen_by_name_and_pattern():
    model = nn.ModuleDict({"body": mlp(4, 5, 6), "head": mlp(6, 3)})
    model = Wrapped(lambda m, x: m.parts["head"](m.parts["body"](x)), parts=model)
    X = torch.randn(5, 4)
    every = network.agop(model, X)
    assert list(every) == ["parts.body.0", "parts.body.2", "parts.head.0"]
    assert list(network.agop(model, X, "*.body.*")) == ["parts.body.0", "parts.body.2"]
    chosen = network.agop(model, X, ["parts.head.0", "parts.body.0"])
    assert list(chosen) == ["parts.body.0", "parts.head.0"]
    for name, M in chosen.items():  # the graph starts at another layer: the sums do not care
        torch.testing.assert_close(M, every[name])


def test_the_model_is_left_as_found():
    readout = parametrizations.spectral_norm(nn.Linear(5, 2))  # in training mode, reading its weight changes buffers
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(), readout)
    model[1].eval()  # modes differ between modules
    model[3].bias.requires_grad_(False)
    model[0].weight.grad = torch.ones(5, 4)
    modes, calls = [module.training for module in model.modules()], []
    model[0].register_forward_hook(lambda *_: calls.append("hook"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fused, rng = torch.backends.mha.get_fastpath_enabled(), torch.get_rng_state()

    def check():
        assert [module.training for module in model.modules()] == modes
        assert [p.requires_grad for p in model.parameters()] == [True, True, True, True, False, True]
        assert torch.equal(model[0].weight.grad, torch.ones(5, 4))
        assert [p.grad for p in model.parameters()][1:] == 5 * [None]
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        assert [len(module._forward_hooks) for module in model.modules()] == [0, 1, *(len(modes) - 2) * [0]]
        assert not any("forward" in vars(module) for module in model.modules())
        assert torch.backends.mha.get_fastpath_enabled() == fused
        assert torch.equal(torch.get_rng_state(), rng)
        assert torch.is_grad_enabled()

    X = torch.ones(9, 4) * torch.arange(9)[:, None]
    network.agop(model, X)
    assert calls  # the user's own hooks run
    network.nfa_correlation(model, X)
    network.collapse_split(model, X, LABELS)
    check()
    for function in (network.agop, network.nfa_correlation, network.collapse_split):
        with pytest.raises((RuntimeError, ValueError)):
            function(model, X[:, :3], *([LABELS] if function is network.collapse_split else []))
        check()


def test_inference_mode_and_no_grad_around():
    model, X = mlp(4, 5, 3), torch.randn(6, 4)
    expected = network.agop(model, X)
    with torch.inference_mode():
        inside = X.clone()
        found = network.agop(model, inside)
        assert torch.is_inference_mode_enabled()
    with torch.no_grad():
        again = network.agop(model, X)
    for name, M in expected.items():
        assert not M.requires_grad
        assert torch.equal(found[name], M)
        assert torch.equal(again[name], M)


def test_checkpointed_activations_are_computed_again():
    model, X = mlp(4, 5, 5, 3), torch.randn(6, 4)
    wrapped = Wrapped(lambda m, x: torch.utils.checkpoint.checkpoint(m.f, x, use_reentrant=False), f=model)
    for M, expected in zip(network.agop(wrapped, X).values(), network.agop(model, X).values(), strict=True):
        assert torch.equal(M, expected)


def test_compiled_models_are_measured_as_written():
    model, X = mlp(4, 5, 3), torch.randn(6, 4)
    compiled = torch.compile(model, backend="eager")
    compiled(X)
    found = network.agop(compiled, X)
    for (name, M), expected in zip(found.items(), network.agop(model, X).values(), strict=True):
        assert torch.equal(M, expected), name


# ---- Samples that interact


def centred(m, x):
    return m.a(x - x.mean(0))


MIXING = {
    "after a layer": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=False)),
        r"'1' \(BatchNorm1d\)",
    ),
    "before any layer": (
        lambda: nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 5)),
        r"'0' \(BatchNorm1d\)",
    ),
    "in a forward": (lambda: nn.Sequential(nn.Tanh(), Wrapped(centred, a=nn.Linear(4, 5))), r"'1' \(Wrapped\)"),
    "in the model's own": (lambda: Wrapped(centred, a=nn.Linear(4, 5)), "model: Wrapped mixes"),
    "at random": (lambda: Wrapped(lambda m, x: nn.functional.dropout(m.a(x)), a=nn.Linear(4, 5)), "or is random"),
}


@pytest.mark.parametrize("name", MIXING)
def test_refuses_models_that_mix_samples(name):
    build, message = MIXING[name]
    with pytest.raises(ValueError, match=message):
        network.agop(build(), torch.randn(6, 4))
    with pytest.raises(ValueError, match=message):
        network.collapse_split(build(), torch.randn(6, 4), LABELS[:6])


def test_refuses_a_layer_that_serves_all_samples_at_once():
    shared = nn.Linear(3, 4)
    model = Wrapped(lambda m, x: m.a(x * m.p(torch.ones(len(x), 3).mean(0))), a=nn.Linear(4, 5), p=shared)
    X = torch.randn(6, 4)
    with pytest.raises(ValueError, match="gradients at 'p' mix the samples"):
        network.agop(model, X)
    assert list(network.agop(model, X, "a")) == ["a"]
    alone = network.agop(model, X, batch_size=1)["p"]
    torch.testing.assert_close(6 * alone, truth(model, X, "p"))


def test_a_first_sample_without_neighbours_is_no_excuse():
    X = torch.randn(6, 4)
    X[:4] = X[0]  # duplicates at the front: the fifth sample is the first that could show the mixing
    with pytest.raises(ValueError, match="mixes"):
        network.agop(Wrapped(centred, a=nn.Linear(4, 5)), X)


# ---- Bad input


class Own(nn.Linear):
    def forward(self, input):
        return super().forward(2 * input)


X = torch.ones(3, 4)
BAD = {
    "no module": (TypeError, "model must be a torch.nn.Module", lambda: (torch.relu, X)),
    "no Linear layer": (ValueError, "model must have a layer to measure", lambda: (nn.Softplus(), X)),
    "a forward of its own": (
        TypeError,
        "'0' is a Own .* leave it out, layers=\\['1', '3'\\]",
        lambda: (nn.Sequential(Own(4, 4), nn.Linear(4, 4), Own(4, 4), nn.Linear(4, 2)), X, "*"),
    ),
    "none but with forwards of their own": (
        ValueError,
        "none is left that can be measured. '0': it has a forward of its own",
        lambda: (nn.Sequential(Own(4, 4), Own(4, 2)), X),
    ),
    "a forward of its own alone": (
        TypeError,
        "'0' is a Own .*; name other layers",
        lambda: (nn.Sequential(Own(4, 4), nn.Linear(4, 2)), X, "0"),
    ),
    "unknown layer": (
        ValueError,
        "no layer is called 'fc', there are '0', '2'",
        lambda: (mlp(4, 5, 2), X, "fc"),
    ),
    "not a Linear layer": (ValueError, "no layer is called '1'", lambda: (mlp(4, 5, 2), X, ["0", "1"])),
    "no layers": (ValueError, "layers must be None for all or name", lambda: (mlp(4, 5, 2), X, [])),
    "uncalled layer": (
        ValueError,
        "does not call 'b'",
        lambda: (Wrapped(lambda m, x: m.a(x), a=nn.Linear(4, 2), b=nn.Linear(4, 2)), X, "b"),
    ),
    "no samples": (ValueError, "X must have at least one sample", lambda: (mlp(4, 2), X[:0])),
    "no batches": (ValueError, "X must have at least one sample", lambda: (mlp(4, 2), [])),
    "NumPy": (TypeError, "X must be a torch.Tensor or an iterable", lambda: (mlp(4, 2), X.numpy())),
    "scalar": (ValueError, "X must have samples along its first", lambda: (mlp(4, 2), torch.tensor(1.0))),
    "X on meta": (TypeError, "X must hold numbers, got a tensor on meta", lambda: (mlp(4, 2), X.to("meta"))),
    "a model on meta": (ValueError, "model: '0.weight' is on meta", lambda: (mlp(4, 2).to("meta"), X)),
    "a part on meta": (
        ValueError,
        "model: 'b.weight' is on meta",
        lambda: (Wrapped(lambda m, x: m.b(m.a(x)), a=nn.Linear(4, 2), b=nn.Linear(2, 2, device="meta")), X),
    ),
    "sparse X": (TypeError, "X must be dense, got layout torch.sparse_coo", lambda: (mlp(4, 2), X.to_sparse())),
    "sparse batches": (TypeError, "X must be dense, got layout", lambda: (mlp(4, 2), [X.to_sparse()])),
    "bytes": (TypeError, r"parameters, torch.float32, got torch.uint8; use X.to", lambda: (mlp(4, 2), X.byte())),
    "integers": (TypeError, r"parameters, torch.float32, got torch.int64; use X.to", lambda: (mlp(4, 2), X.long())),
    "sparse out": (
        TypeError,
        "model must return one floating tensor, got a tensor of torch.float32, layout torch.sparse_coo",
        lambda: (Wrapped(lambda m, x: m.a(x).to_sparse(), a=nn.Linear(4, 2)), X),
    ),
    "a script": (ValueError, "give the module that torch.jit made it of", lambda: (torch.jit.trace(mlp(4, 2), X), X)),
    "an exported model": (
        ValueError,
        "give the module that it was exported from",
        lambda: (torch.export.export(mlp(4, 2), (X,)).module(), X),
    ),
    "complex weights": (
        ValueError,
        "none is left that can be measured. 'a': its weights are complex",
        lambda: (Wrapped(lambda m, x: m.a(x.cfloat()).abs(), a=nn.Linear(4, 2, dtype=torch.complex64)), X),
    ),
    "a complex layer": (
        TypeError,
        "'a' has complex weights",
        lambda: (Wrapped(lambda m, x: m.a(x.cfloat()).abs(), a=nn.Linear(4, 2, dtype=torch.complex64)), X, "a"),
    ),
    "odd batches": (TypeError, "X must give batches of tensors", lambda: (mlp(4, 2), [{"x": X}])),
    "tuple out": (
        TypeError,
        "model must return one floating tensor, got tuple",
        lambda: (Wrapped(lambda m, x: (m.a(x),), a=nn.Linear(4, 2)), X),
    ),
    "integers out": (
        TypeError,
        "got a tensor of torch.int64",
        lambda: (Wrapped(lambda m, x: m.a(x).argmax(1), a=nn.Linear(4, 2)), X),
    ),
    "fewer rows out": (
        ValueError,
        "a row for each sample of X",
        lambda: (Wrapped(lambda m, x: m.a(x[:2]), a=nn.Linear(4, 2)), X),
    ),
    "NaN": (ValueError, "model returns NaN or infinity", lambda: (mlp(4, 2), X * math.nan)),
    "detached": (
        ValueError,
        "its forward detaches it",
        lambda: (Wrapped(lambda m, x: m.a(x).detach(), a=nn.Linear(4, 2)), X),
    ),
}


@pytest.mark.parametrize("function", [network.agop, network.nfa_correlation])
@pytest.mark.parametrize("name", BAD)
def test_refuses(function, name):
    error, message, call = BAD[name]
    with pytest.raises(error, match=message):
        function(*call())


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "8"])
def test_refuses_batch_sizes(size):
    with pytest.raises(ValueError, match="batch_size must be an integer >= 1"):
        network.agop(mlp(4, 2), X, batch_size=size)


def test_batch_sizes_may_be_numpys():
    model = mlp(4, 2)
    assert torch.equal(*(network.agop(model, X, batch_size=size)["0"] for size in (3, np.int64(3))))


def test_refuses_other_arguments():
    with pytest.raises(ValueError, match="reduction must be one of"):
        network.agop(mlp(4, 2), X, reduction="none")
    with pytest.raises(ValueError, match="batch_size must be None for an iterable"):
        network.agop(mlp(4, 2), [X], batch_size=2)
    with pytest.raises(ValueError, match="y must be given"):
        network.collapse_split(mlp(4, 2), X)
    with pytest.raises(ValueError, match="y must have one label"):
        network.collapse_split(mlp(4, 2), X, LABELS)
    with pytest.raises(TypeError, match=r"layer must be a torch\.nn\.Linear"):
        network.split(nn.ReLU(), X, LABELS[:3])
    with pytest.raises(ValueError, match="4 columns to agree with layer"):
        network.split(nn.Linear(4, 2), X[:, :3], LABELS[:3])


def test_features_must_be_matrices():
    token = Wrapped(tokens, a=nn.Linear(4, 5), b=nn.Linear(5, 2), r=relu())
    with pytest.raises(network.NotAMatrixError, match="'a' must be a matrix"):
        network.collapse_split(token, torch.randn(9, 3, 4), LABELS)
    assert list(network.collapse_split(token, torch.randn(9, 3, 4), LABELS, "b")) == ["b"]
    with pytest.raises(network.NotAMatrixError, match="'a' is called more than once"):
        network.collapse_split(Wrapped(twice, a=nn.Linear(4, 4), o=nn.Linear(4, 3)), torch.randn(9, 4), LABELS)


def test_memory_holds_no_jacobian(peak_memory):
    """n = 2000, K = 10, width 256: one layer's Jacobian would take 20 MB, all gradients 100 MB."""
    setup = """
from torch import nn
from fastagop import network
def net(n):
    layers = [m for _ in range(5) for m in (nn.Linear(256, 256, bias=False), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(256, 10)), torch.randn(n, 256)
network.agop(*net(64))
problem = net(2000)
"""
    assert peak_memory(setup, "network.agop(*problem)") < 18e6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_agrees(relative):
    model, X = mlp(6, 9, 9, 3).double(), torch.randn(50, 6, dtype=torch.float64)
    expected = network.agop(model, X)
    correlation = network.nfa_correlation(model, X)
    for name, M in network.agop(model.cuda(), X).items():  # batches move to the model
        assert M.device.type == "cuda"
        assert relative(M.cpu(), expected[name]) <= 1e-12
    assert network.nfa_correlation(model, X.cuda()) == pytest.approx(correlation, abs=1e-7)
