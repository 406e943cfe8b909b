"""What the process has set for float32 products (TF32; on the CPU bfloat16): no fit and no derivative sees it."""

from __future__ import annotations

import contextlib
import threading

import numpy as np
import pytest
import torch
from fastagop.kernels.kernel_operator import KernelOperator
from fastagop.kernels.plan import AgopTask
from fastagop.kernels.precision import Switch, full_products, matmul_precision
from torch.utils._python_dispatch import TorchDispatchMode

import fastagop
from fastagop import autograd
from fastagop.deep_rfm import layer as deep
from fastagop.distributed.engine import LOCAL, Predictor
from fastagop.solvers import copies

NEWER = hasattr(torch.backends.cuda.matmul, "fp32_precision")  # torch >= 2.9
FULL = {"ieee", "none", "highest"}
CPU = torch.device("cpu")
X = torch.randn(90, 16, generator=torch.Generator().manual_seed(0)) + 1.0
Y = (torch.arange(90) % 3).eq(torch.arange(3)[:, None]).float().T.contiguous()
Z = X[:20] + 0.1


def in_force() -> str:
    """In what precision the processor's float32 products run."""
    return torch.backends.mkldnn.matmul.fp32_precision if NEWER else torch.get_float32_matmul_precision()


class Watch(TorchDispatchMode):
    """Notes the precision of each float32 product, which processors without bfloat16 do not show in numbers."""

    def __init__(self):
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        product = func.overloadpacket.__name__.strip("_") in ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "linear")
        if product and any(isinstance(part, torch.Tensor) and part.dtype == torch.float32 for part in args):
            self.seen.add(in_force())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def medium():
    before = torch.get_float32_matmul_precision()

    def switch(value="medium"):
        torch.set_float32_matmul_precision(value)

    yield switch
    torch.set_float32_matmul_precision(before)


def deep_rfm() -> list:
    model = fastagop.DeepRFMClassifier(depth=2, width=40, random_state=0, device="cpu").fit(X, Y.argmax(1))
    return [*model.agops_, model.decision_function(Z), model.transform(Z), model.predict_proba(Z)]


def rfm(**parameters) -> list:
    model = fastagop.RFMClassifier(iterations=2, random_state=0, device="cpu", **parameters).fit(X, Y.argmax(1))
    return [model.M_, model.decision_function(Z), model.transform(Z), model.gradients(Z), model.directions(2).vectors]


def tree() -> list:
    model = fastagop.RFMTreeRegressor(leaf_size=45, iterations=1, random_state=0, device="cpu").fit(X, Y)
    return [model.predict(Z), model.transform(Z)]


def one_layer() -> list:
    settings = deep.Settings(kernel=fastagop.Laplace(2.0), depth=1, features="cos", width=40)
    layer, made = deep.LayerTraining(Y, settings, copies.alone(X), Y.argmax(1)).layer(X, 0)
    return [layer.agop, made.features]


def diagonal(kernel) -> list:
    task = AgopTask("sum", center=True)
    return [LOCAL.agop_diagonal(Predictor(kernel, X, Y.double(), "highest", "auto"), task)]


CALLS = {
    "deep RFM": deep_rfm,
    "RFM": rfm,
    "RFM, product kernel": lambda: rfm(kernel=fastagop.ProductLaplace(8.0)),
    "RFM, diagonal": lambda: rfm(kernel=fastagop.ProductLaplace(8.0), diagonal=True),
    "tree": tree,
    "layer": one_layer,
    "diagonal": lambda: diagonal(fastagop.ProductLaplace(4.0)),
    "diagonal, radial": lambda: diagonal(fastagop.Laplace(4.0)),
    "mean gradient": lambda: [KernelOperator("agop", fastagop.ProductLaplace(4.0), X, Z).mean_gradient(Y)],
    "mean gradient, radial": lambda: [KernelOperator("agop", fastagop.Laplace(4.0), X, Z).mean_gradient(Y)],
}


@pytest.mark.parametrize("name", CALLS)
def test_no_call_sees_the_setting(name, medium):
    medium("highest")
    expected = CALLS[name]()
    medium()
    with Watch() as watch:
        found = CALLS[name]()
    assert torch.get_float32_matmul_precision() == "medium"
    assert watch.seen <= FULL
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other), equal_nan=True)


def derivatives(operation: str) -> list:
    points, coefficients = X.clone().requires_grad_(), Y.clone().requires_grad_()
    if operation == "kernel_matmul":
        value = autograd.kernel_matmul(fastagop.Laplace(4.0), points, None, coefficients)
    else:
        value = autograd.agop(fastagop.Laplace(4.0), points, coefficients, Z)
    return list(torch.autograd.grad(value.square().sum(), (points, coefficients)))


@pytest.mark.parametrize("operation", ["kernel_matmul", "agop"])
def test_no_derivative_sees_the_setting(operation, medium, monkeypatch):
    medium("highest")
    expected, seen, original = derivatives(operation), set(), autograd._by_blocks
    medium()
    monkeypatch.setattr(autograd, "_by_blocks", lambda *given: (seen.add(in_force()), original(*given))[1])
    found = derivatives(operation)
    assert seen
    assert seen <= FULL
    assert all(map(torch.equal, found, expected))


def test_a_call_inside_has_its_own_precision_and_the_rest_full_products():
    log, value = [], "user's"

    def write(new):
        nonlocal value
        value = new
        log.append(new)

    switch = Switch(lambda: value, write, ("full", "half"))
    with switch.default("full"):
        assert value == "full"
        with switch.at("half"):
            assert value == "half"
        assert value == "full"
        with pytest.raises(RuntimeError), switch.at("half"):
            raise RuntimeError
        assert value == "full"
    assert value == "user's"
    assert log == ["full", "half", "full", "half", "full", "user's"]


def test_another_threads_default_is_not_suspended():
    value = "user's"

    def write(new):
        nonlocal value
        value = new

    switch, seen = Switch(lambda: value, write, ("full", "half")), []

    def call():
        with switch.at("half"):
            seen.append(value)

    with switch.default("full"):
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    assert seen == ["full"]


def test_full_products_decorate(medium):
    @full_products()
    def call() -> str:
        with matmul_precision("highest", CPU):
            assert in_force() in FULL
        return in_force()

    medium()
    assert call() in FULL
    assert torch.get_float32_matmul_precision() == "medium"
    assert in_force() not in FULL


# ---- The process's older and newer settings, which can be read without a GPU

CUDA = torch.device("cuda")


def settings() -> list:
    """All that says in which precision products run, in torch >= 2.9."""
    backends = torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn, torch.backends.mkldnn.matmul
    return [backend.fp32_precision for backend in backends]


def said() -> list:
    """What the older interface says; torch raises an error where the newer one disagrees."""
    return [torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32]


@pytest.mark.skipif(not NEWER, reason="settings by backend came with torch 2.9")
@pytest.mark.parametrize("call", ["highest", "medium"])
@pytest.mark.parametrize("user", ["as it comes", "highest", "high", "allow_tf32"])
@pytest.mark.parametrize("within", [False, True])
def test_the_older_interface_can_be_read_during_a_call_on_cuda(user, call, within, monkeypatch):
    """By other threads, too, whose compilers ask it. "high" is what most scripts set."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.get_float32_matmul_precision()
    try:
        if user == "allow_tf32":
            torch.backends.cuda.matmul.allow_tf32 = True
        elif user != "as it comes":
            torch.set_float32_matmul_precision(user)
        found = settings(), said()
        with full_products() if within else contextlib.nullcontext():
            with matmul_precision(call, CUDA):
                assert said() == (["high", True] if call == "medium" else ["highest", False])
                assert (torch.backends.cuda.matmul.fp32_precision == "tf32") == (call == "medium")
            if within:
                assert said() == ["highest", False]
        assert (settings(), said()) == found
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(not NEWER, reason="settings by backend came with torch 2.9")
@pytest.mark.parametrize("call", ["highest", "medium"])
@pytest.mark.parametrize(
    ("legacy", "cuda", "onednn"),
    [("highest", "tf32", "none"), ("high", "ieee", "bf16"), ("medium", "tf32", "bf16"), ("medium", "none", "none")],
)
def test_settings_that_disagree_are_left_so(legacy, cuda, onednn, call):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(legacy)
        torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision = cuda, onednn
        found = settings()
        with matmul_precision(call, CUDA):
            assert torch.backends.cuda.matmul.fp32_precision in (("tf32",) if call == "medium" else ("ieee", "none"))
        assert settings() == found
        torch.backends.cuda.matmul.fp32_precision = "ieee" if legacy == "highest" else "tf32"
        torch.backends.mkldnn.matmul.fp32_precision = "ieee"
        assert torch.get_float32_matmul_precision() == legacy
    finally:
        torch.set_float32_matmul_precision(before)
