"""AGOP and NFA correlation of convolutions, against jacrev on patches that are cut out of the input one by one."""

from __future__ import annotations

import contextlib
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from fastagop import network


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def cut(conv: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The patches (positions, c k ... k) of one input (c, ...), by plain indexing."""
    dims = len(conv.kernel_size)
    pads = []
    for k, d, p in zip(conv.kernel_size, conv.dilation, itertools.cycle([conv.padding])):
        total = d * (k - 1)
        pads.append((total // 2, total - total // 2) if p == "same" else (0, 0))
    if not isinstance(conv.padding, str):
        pads = [(p, p) for p in conv.padding]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = nn.functional.pad(x[None], [p for pair in reversed(pads) for p in pair], mode=mode)[0]
    spans = [d * (k - 1) + 1 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    starts = [range(0, n - span + 1, s) for n, span, s in zip(x.shape[1:], spans, conv.stride, strict=True)]
    patches = []
    for corner in itertools.product(*starts):
        index = [slice(a, a + span, d) for a, span, d in zip(corner, spans, conv.dilation, strict=True)]
        patches.append(x[(slice(None), *index)].reshape(-1))
    assert dims == len(starts)
    return torch.stack(patches)


def of_patches(conv: nn.Module, patches: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """What the convolution makes of patches, (c_out, ...)."""
    groups, W = conv.groups, conv.weight.flatten(1)
    parts = zip(patches.chunk(groups, 1), W.chunk(groups), strict=True)
    out = torch.cat([p @ w.T for p, w in parts], 1)
    out = out if conv.bias is None else out + conv.bias
    return out.T.reshape(shape)


def squares(J: torch.Tensor, groups: int) -> torch.Tensor:
    """Sum of J^T J over all but the last dimension, the blocks of the groups."""
    blocks = torch.stack([b.T @ b for b in J.flatten(0, -2).chunk(groups, 1)])
    return blocks[0] if groups == 1 else blocks


def truth(conv: nn.Module, tail: nn.Module, X: torch.Tensor) -> torch.Tensor:
    """Sum over samples of J^T J of f = tail(conv(x)) with respect to the patches of x."""
    total = 0.0
    for x in X:
        shape = conv(x[None])[0].shape
        J = torch.func.jacrev(lambda p, shape=shape: tail(of_patches(conv, p, shape)[None])[0])(cut(conv, x))
        total = total + squares(J, conv.groups)
    return total.detach()


# name: (convolution, shape of one input); every case has a reason of its own
CASES = {
    "plain": (lambda: nn.Conv2d(3, 4, 3), (3, 5, 6)),
    "no bias": (lambda: nn.Conv2d(3, 4, 3, bias=False), (3, 5, 6)),
    "more filters than patch items": (lambda: nn.Conv2d(1, 12, 2), (1, 4, 4)),
    "1x1": (lambda: nn.Conv2d(5, 3, 1), (5, 3, 3)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1), (4, 4, 4)),
    "depthwise, two filters a channel": (lambda: nn.Conv2d(3, 6, (2, 3), groups=3), (3, 4, 4)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), (4, 5, 5)),
    "stride above the kernel": (lambda: nn.Conv2d(2, 3, 2, stride=3), (2, 8, 8)),  # some pixels are in no patch
    "strides and padding by dimension": (lambda: nn.Conv2d(2, 3, (3, 2), stride=(1, 2), padding=(2, 1)), (2, 5, 6)),
    "dilated": (lambda: nn.Conv2d(2, 3, 3, dilation=(2, 1), padding=1), (2, 6, 5)),
    "same": (lambda: nn.Conv2d(2, 3, (4, 3), padding="same"), (2, 5, 5)),  # an even kernel pads one side more
    "same, reflected": (lambda: nn.Conv2d(2, 3, 3, padding="same", padding_mode="reflect"), (2, 5, 5)),
    "valid": (lambda: nn.Conv2d(2, 3, 3, padding="valid"), (2, 4, 4)),
    "reflect": (lambda: nn.Conv2d(2, 3, 3, padding=2, padding_mode="reflect"), (2, 5, 5)),
    "replicate": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="replicate", stride=2), (2, 5, 5)),
    "circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular", groups=1), (2, 4, 4)),
    "1d": (lambda: nn.Conv1d(3, 4, 5, stride=2, padding=2, padding_mode="circular"), (3, 9)),
    "3d": (lambda: nn.Conv3d(2, 4, (1, 2, 3), padding=(0, 1, 1), groups=2), (2, 2, 3, 4)),
    "several blocks of the result": (lambda: nn.Conv2d(40, 6, 3), (40, 3, 4)),  # the last one short
    "kernel as large as the input": (lambda: nn.Conv2d(2, 3, 4), (2, 4, 4)),  # one patch
}


def build(name: str, n: int = 4):
    """(convolution, what follows, inputs) in float64."""
    make, shape = CASES[name]
    conv, X = make().double(), torch.randn(n, *shape, dtype=torch.float64)
    width = conv(X[:1]).numel()
    return conv, nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Linear(width, 3)).double(), X


@pytest.mark.parametrize("name", CASES)
def test_the_patch_agop_is_that_of_jacrev(name, relative):
    conv, tail, X = build(name)
    model, expected = nn.Sequential(conv, tail), truth(conv, tail, X)
    found = network.agop(model, X, reduction="sum", batch_size=3)
    assert list(found) == ["0", "1.2"]
    assert found.skipped == {}
    M = found["0"]
    assert M.dtype == torch.float64
    assert M.shape == expected.shape
    assert torch.equal(M, M.mT)
    assert relative(M, expected) <= 1e-12
    narrow = network.agop(model.float(), X.float(), "0", reduction="sum")["0"]
    assert narrow.dtype == torch.float32
    assert relative(narrow, expected) <= 1e-5


@pytest.mark.parametrize("name", ["plain", "more filters than patch items", "groups", "depthwise", "1d"])
def test_the_ansatz_compares_filters_and_patches(name):
    """Pearson correlation of all entries, of the blocks of the groups where there are any."""
    conv, tail, X = build(name)
    model = nn.Sequential(conv, tail)
    W = conv.weight.detach().flatten(1).reshape(conv.groups, conv.out_channels // conv.groups, -1)
    values, vectors = np.linalg.eigh(truth(conv, tail, X).reshape(conv.groups, W.shape[2], W.shape[2]).numpy())
    roots = vectors * np.sqrt(np.clip(values, 0, None))[:, None] @ vectors.swapaxes(1, 2)
    expected = np.corrcoef((W.mT @ W).numpy().ravel(), roots.ravel())[0, 1]
    assert network.nfa_correlation(model, X)["0"] == pytest.approx(expected, abs=1e-6)


class Twice(nn.Module):
    """One convolution, called twice in a forward pass."""

    def __init__(self):
        super().__init__()
        self.conv, self.tail = nn.Conv2d(3, 3, 3, padding=1), nn.Sequential(nn.Flatten(), nn.Linear(48, 2))

    def forward(self, x):
        return self.tail(torch.tanh(self.conv(torch.tanh(self.conv(x)))))


def test_a_convolution_that_is_used_twice(relative):
    model, X = Twice().double(), torch.randn(3, 3, 4, 4, dtype=torch.float64)
    end = nn.Sequential(nn.Tanh(), model.tail)
    expected = truth(model.conv, nn.Sequential(nn.Tanh(), model.conv, end), X)
    expected += truth(model.conv, end, torch.tanh(model.conv(X)).detach())
    assert relative(network.agop(model, X, reduction="sum")["conv"], expected) <= 1e-12


@pytest.mark.parametrize("name", ["plain", "depthwise", "1d", "kernel as large as the input"])
def test_a_batch_of_one(name, relative):
    conv, tail, X = build(name, n=1)
    assert relative(network.agop(nn.Sequential(conv, tail), X)["0"], truth(conv, tail, X)) <= 1e-12


@pytest.mark.parametrize("name", ["plain", "groups"])
def test_layouts_in_memory(name, relative):
    """Gaps between items, other strides, channels last in inputs and weights: the same numbers."""
    conv, tail, X = build(name)
    model, expected = nn.Sequential(conv, tail), truth(conv, tail, X)
    gaps = torch.zeros(*X.shape, 2, dtype=X.dtype)
    gaps[..., 1] = X
    turned = X.transpose(0, 3).contiguous().transpose(0, 3)
    for inputs in (gaps[..., 1], turned, X.to(memory_format=torch.channels_last)):
        assert relative(network.agop(model, inputs, "0", reduction="sum")["0"], expected) <= 1e-12
    model.to(memory_format=torch.channels_last)
    last = X.to(memory_format=torch.channels_last)
    assert relative(network.agop(model, last, "0", reduction="sum")["0"], expected) <= 1e-12


class Mixed(nn.Module):
    """Work in place, a residual branch, pooling: what convolutional networks do between their layers."""

    def __init__(self, again=lambda function, x: function(x)):
        super().__init__()
        self.again = again
        self.a = parametrizations.weight_norm(nn.Conv2d(2, 4, 3, padding=1))
        self.b, self.o = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Linear(16, 3)

    def forward(self, x):
        h = nn.functional.relu_(self.a(x))
        h = self.again(lambda h: h + self.b(h).sigmoid_(), h)
        return self.o(nn.functional.avg_pool2d(h, 2).flatten(1))


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_work_in_place_and_checkpoints(reentrant, relative):
    again = {} if reentrant is None else {"again": lambda f, x: checkpoint(f, x, use_reentrant=reentrant)}
    model, X = Mixed(**again).double(), torch.randn(5, 2, 4, 4, dtype=torch.float64)
    plain = Mixed().double()
    plain.load_state_dict(model.state_dict())
    h = torch.relu(plain.a(X)).detach()
    pool = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), plain.o)

    class Rest(nn.Module):
        def forward(self, out):
            h = torch.relu(out)
            return pool(h + torch.sigmoid(plain.b(h)))

    expected = {"a": truth(plain.a, Rest(), X), "b": 0.0}
    for one in h.split(1):
        expected["b"] += truth(plain.b, nn.Sequential(nn.Sigmoid(), _Add(one), pool), one)
    found = network.agop(model, X, reduction="sum")
    for name in "ab":
        assert relative(found[name], expected[name]) <= 1e-12, name


class _Add(nn.Module):
    def __init__(self, term):
        super().__init__()
        self.term = term

    def forward(self, h):
        return h + self.term


def test_autocast(relative):
    """The model runs as it does under autocast; products of gradients and sums do not."""
    conv, tail, X = build("plain", n=30)
    expected, model = truth(conv, tail, X), nn.Sequential(conv, tail).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = network.agop(model, X.float(), reduction="sum")["0"]
    assert found.dtype == torch.float32
    assert relative(found, expected) <= 5e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, relative):
    conv, tail, X = build("groups", n=30)
    expected, model = truth(conv, tail, X), nn.Sequential(conv, tail).to(dtype)
    found = network.agop(model, X.to(dtype), reduction="sum")["0"]
    assert found.dtype == torch.float32
    assert relative(found, expected) <= 8 * torch.finfo(dtype).eps


def test_a_weight_that_changes_with_every_batch(relative):
    conv, tail, X = build("depthwise")
    clean, expected = conv.weight.detach().clone(), 0.0
    for x in X:
        with torch.no_grad():
            conv.weight.copy_(clean * (1 + x.abs().mean()))
        expected = expected + truth(conv, tail, x[None])

    def hook(m, args):
        m.weight.data.copy_(clean * (1 + args[0].abs().mean()))

    conv.register_forward_pre_hook(hook)
    model = nn.Sequential(conv, tail)
    assert relative(network.agop(model, X, "0", batch_size=1, reduction="sum")["0"], expected) <= 1e-12
    with pytest.raises(ValueError, match="the weight of '0' changes"):
        network.nfa_correlation(model, X, "0", batch_size=1)


# ---- What is left out


class Own(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(2 * input, weight, bias)


class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.dead = nn.Conv2d(1, 2, 3), nn.Conv2d(1, 1, 1)
        self.own, self.up, self.o = Own(2, 2, 1), nn.ConvTranspose2d(2, 2, 2), nn.Linear(18, 3)

    def forward(self, x):
        with torch.no_grad():
            h = self.body(x)
        return self.o(self.up(self.own(torch.tanh(h))).flatten(1))


def test_what_is_left_out_is_named_with_its_reason():
    model, X = Frozen(), torch.randn(5, 1, 4, 4)
    with pytest.warns(UserWarning, match="network measures leave out") as caught:
        found = network.agop(model, X)
    assert list(found) == ["o"]
    reasons = {"own": "forward of its own", "up": "transposed", "body": "runs it without grad", "dead": "not call it"}
    assert sorted(found.skipped) == sorted(reasons)
    for name, words in reasons.items():
        assert words in found.skipped[name]
        assert f"{name!r} (" in str(caught[0].message)
    with pytest.raises(ValueError, match="depend on 'body', but its forward runs it without gradients"):
        network.agop(model, X, ["body", "o"])
    with pytest.raises(ValueError, match="does not call 'dead'"):
        network.agop(model, X, ["dead", "o"])
    with pytest.raises(TypeError, match=r"'own' must be .* got a Own: it has a forward of its own"):
        network.agop(model, X, "own")


class Implicit(nn.Module):
    """A fixed point of a convolution, found again in the backward pass."""

    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Conv1d(1, 1, 1), nn.Linear(4, 2)

    def forward(self, x):
        z = torch.tanh(self.a(x[:, None]))
        if z.requires_grad:
            inner = z.detach().requires_grad_()
            again = torch.tanh(self.a(inner))
            pull = lambda g: torch.autograd.grad(again, inner, g, retain_graph=True)[0]  # noqa: E731
            z.register_hook(lambda g: g + pull(g + pull(g)))
        return self.o(z[:, 0])


def test_an_implicit_layer_is_left_out():
    model, X = Implicit(), torch.randn(5, 4)
    with pytest.warns(UserWarning, match="goes more than once through a call of it"):
        found = network.agop(model, X)
    assert list(found) == ["o"]
    with pytest.raises(ValueError, match="more than once through a call of 'a'"):
        network.agop(model, X, "a")


@pytest.mark.parametrize("enabling", [torch.enable_grad, contextlib.nullcontext])
def test_a_model_that_differentiates(relative, enabling):
    """f = dE/dx: the gradient of f at the patches goes through a derivative of the convolution.

    What enters the last layer has no part in f, also where the forward relies on gradients being enabled.
    """

    class Forces(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv1d(1, 3, 2), nn.Linear(9, 1)

        def energy(self, x, added):
            z = (x.unfold(0, 2, 1) + added) @ self.a.weight[:, 0].T + self.a.bias
            return self.b(torch.tanh(z).T.flatten())

        def forward(self, x):
            with enabling():
                x = x.detach().requires_grad_()
                energy = self.b(torch.tanh(self.a(x[:, None])).flatten(1))
                return torch.autograd.grad(energy.sum(), x, create_graph=True)[0]

    model, X, expected = Forces().double(), torch.randn(3, 4, dtype=torch.float64), 0.0
    for x in X:
        x.requires_grad_()

        def f(added, x=x):
            return torch.autograd.grad(model.energy(x, added).sum(), x, create_graph=True)[0]

        J = torch.autograd.functional.jacobian(f, torch.zeros(3, 2, dtype=X.dtype)).reshape(-1, 2)
        expected = expected + J.T @ J
    found = network.agop(model, X.detach(), reduction="sum")
    assert relative(found["a"], expected) <= 1e-12
    assert not found["b"].any()


def test_lazy_convolutions(relative):
    model, X = nn.Sequential(nn.LazyConv2d(3, 2), nn.Flatten()).double(), torch.randn(3, 2, 3, 3, dtype=torch.float64)
    found = network.agop(model, X, reduction="sum")["0"]
    W = model[0].weight.detach().flatten(1)
    assert relative(found, 3 * 4 * W.T @ W) <= 1e-12


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["plain", "groups", "3d"])
def test_the_gpu_agrees(name, relative):
    conv, tail, X = build(name)
    expected, model = truth(conv, tail, X), nn.Sequential(conv, tail).cuda()
    found = network.agop(model, X, "0", reduction="sum")["0"]
    assert found.device.type == "cuda"
    assert relative(found.cpu(), expected) <= 1e-12
    here, there = (network.agop(m, X, "0", sketch=4)["0"] for m in (nn.Sequential(conv, tail).cpu(), model.cuda()))
    assert relative(there.cpu(), here) <= 1e-12  # the same signs
