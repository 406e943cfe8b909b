"""Calls from several threads: right results, and the process's settings and the model as they were found."""

from __future__ import annotations

import copy
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fastagop.kernels import precision
from fastagop.kernels.precision import Switch, matmul_precision
from torch import nn

import fastagop
from fastagop import network

NEWER = hasattr(torch.backends.cuda.matmul, "fp32_precision")  # torch >= 2.9
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def settings():
    """All that says in which precision products run."""
    if not NEWER:
        return torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32
    backends = torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn, torch.backends.mkldnn.matmul
    return tuple(backend.fp32_precision for backend in backends)


@pytest.fixture(params=["as it comes", "medium", "high", "highest"])
def set_by_user(request):
    before = torch.get_float32_matmul_precision()
    if request.param != "as it comes":
        torch.set_float32_matmul_precision(request.param)
    yield
    torch.set_float32_matmul_precision(before)


class Failing(fastagop.Laplace):
    def value_(self, sq):
        raise RuntimeError("on purpose")


def test_product_settings_after_calls_in_threads(set_by_user, normal, relative):
    X, alpha = normal(200, 30, dtype=torch.float32), normal(200, 5, dtype=torch.float32)
    kernel, before = fastagop.Laplace(5.0), settings()
    exact = fastagop.agop(kernel, X.double(), alpha.double())

    def call(i):
        time.sleep(1e-3 * (i % 3))
        if i % 5 == 4:
            with pytest.raises(RuntimeError, match="on purpose"):
                fastagop.kernel_matmul(Failing(1.0), X, X, alpha)
            return 0.0
        return relative(fastagop.agop(kernel, X, alpha, precision=("highest", "medium")[i % 2]), exact)

    with ThreadPoolExecutor(4) as pool:
        errors = list(pool.map(call, range(40)))
    assert settings() == before
    assert max(errors) <= 1e-5


@pytest.mark.skipif(not NEWER, reason="settings by backend came with torch 2.9")
def test_a_setting_that_a_wider_one_implies_is_not_written_out():
    torch.backends.fp32_precision = "tf32"
    try:
        before = settings()
        with matmul_precision("highest", CPU):
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert settings() == before
    finally:
        torch.backends.fp32_precision = "none"
    assert settings()[1:] == ("none",) * 3 or "tf32" not in settings()


def test_nothing_is_written_where_the_setting_is_right(monkeypatch):
    written = []
    switch = Switch(lambda: "none", written.append, ("ieee",), same=lambda found, wanted: True)
    with switch.at("ieee"):
        pass
    assert written == []


class Setting:
    """A setting of the process, and what was ever written to it."""

    def __init__(self, value):
        self.value, self.written = value, []

    def write(self, value):
        self.value = value
        self.written.append(value)


def test_the_strongest_wish_is_in_force_and_the_last_one_out_restores():
    setting = Setting("low")
    switch = Switch(lambda: setting.value, setting.write, ("full", "half"))
    weak, strong = switch.at("half"), switch.at("full")
    weak.__enter__()
    assert setting.value == "half"
    strong.__enter__()
    assert setting.value == "full"
    with switch.at("half"):  # inside: nobody gets less than was asked for
        assert setting.value == "full"
    strong.__exit__(None, None, None)
    assert setting.value == "half"
    weak.__exit__(None, None, None)
    assert setting.value == "low"


def test_what_somebody_else_sets_meanwhile_stays():
    setting = Setting("low")
    switch = Switch(lambda: setting.value, setting.write, ("full",))
    with switch.at("full"):
        setting.value = "theirs"
    assert setting.value == "theirs"
    with switch.at("full"):
        setting.value = "theirs, too"
        with switch.at("full"):
            assert setting.value == "full"
    assert setting.value == "theirs, too"


def test_a_setting_that_cannot_be_written_is_not_counted():
    def refuse(value):
        raise RuntimeError("frozen")

    switch = Switch(lambda: "low", refuse, ("full",))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="frozen"), switch.at("full"):
            pass


@pytest.mark.parametrize("older", [False, True])
def test_different_wishes_at_once(older, monkeypatch):
    """On CUDA "medium" means TF32: while a call that needs full float32 runs, nobody computes in TF32."""
    if older:
        before = torch.get_float32_matmul_precision()
        monkeypatch.setattr(precision, "_by_backend", lambda: False)
        read, full, fast = torch.get_float32_matmul_precision, {"highest"}, "medium"
    else:
        if not NEWER:
            pytest.skip("settings by backend came with torch 2.9")
        before = torch.backends.cuda.matmul.fp32_precision
        read, full, fast = lambda: torch.backends.cuda.matmul.fp32_precision, {"ieee", "none"}, "tf32"
    wrong, seen = [], set()

    def call(i):
        precision = ("highest", "medium")[i % 2]
        for _ in range(50):
            with matmul_precision(precision, CUDA):
                for _ in range(5):
                    value = read()
                    seen.add(value)
                    if precision == "highest" and value not in full:
                        wrong.append(value)
                    time.sleep(0)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(call, range(4)))
    assert wrong == []
    assert read() == before
    with matmul_precision("medium", CUDA):
        assert read() == fast
    assert read() == before


def test_the_older_interface_is_left_as_found(monkeypatch):
    monkeypatch.setattr(precision, "_by_backend", lambda: False)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(RuntimeError, match="highest"), matmul_precision("high", CPU):
            raise RuntimeError(torch.get_float32_matmul_precision())
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_during_a_call_leaves_the_child_free(python):
    """The lock may be held by another thread when a process forks."""
    assert (
        python("""
import os, threading, torch, fastagop, warnings
from fastagop import network
from fastagop.kernels import precision
warnings.simplefilter("ignore")
torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(4, 3))
from fastagop.network import lending
from fastagop.rfm import trials
inside, leave = threading.Event(), threading.Event()
def hold():
    with lending._TURNS.changed, precision._ONEDNN._lock, trials._TURN.lock:
        inside.set()
        leave.wait()
thread = threading.Thread(target=hold)
thread.start()
inside.wait()
child = os.fork()
if child == 0:
    fastagop.agop(fastagop.Laplace(1.0), torch.eye(3), torch.eye(3))
    network.agop(model, torch.ones(2, 4))
    with trials._alone(False): os._exit(7)
leave.set()
thread.join()
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""").strip()
        == "7"
    )


# ---- One model in several threads


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


MEASURES = {
    "agop": lambda model, X, y: network.agop(model, X, batch_size=20),
    "nfa": lambda model, X, y: network.nfa_correlation(model, X, batch_size=20),
    "collapse": lambda model, X, y: {
        name: list(split.nc1.values()) for name, split in network.collapse_split(model, X, y, batch_size=20).items()
    },
}


def state_of(model):
    modules = [(m.training, "forward" in vars(m), len(m._forward_hooks)) for m in model.modules()]
    return modules, [(p.requires_grad, p.grad) for p in model.parameters()]


@pytest.mark.parametrize("share", ["the model", "its parts", "its parameters", "nothing"])
def test_measures_of_one_model_in_six_threads(share):
    model, X, y = net().double(), torch.randn(60, 8, dtype=torch.float64), torch.arange(60) % 3
    model.train()
    model[3].bias.requires_grad_(False)
    models = {
        "the model": lambda: model,
        "its parts": lambda: nn.Sequential(*model),  # another container of the same layers
        "its parameters": lambda: tied(model),
        "nothing": lambda: copy.deepcopy(model),
    }
    expected = {name: measure(copy.deepcopy(model), X, y) for name, measure in MEASURES.items()}
    before, others = state_of(model), [models[share]() for _ in range(6)]
    fused = torch.backends.mha.get_fastpath_enabled()

    def call(i):
        name = list(MEASURES)[i % 3]
        return name, MEASURES[name](others[i % 6], X, y)

    for _ in range(3):
        with ThreadPoolExecutor(6) as pool:
            for name, found in pool.map(call, range(18)):
                assert list(found) == list(expected[name])
                for layer, value in found.items():
                    torch.testing.assert_close(torch.as_tensor(value), torch.as_tensor(expected[name][layer]))
        assert state_of(model) == before
        assert torch.backends.mha.get_fastpath_enabled() == fused


def tied(model):
    other = copy.deepcopy(model)
    for layer, twin in zip(model, other, strict=True):
        if isinstance(layer, nn.Linear):
            twin.weight, twin.bias = layer.weight, layer.bias
    return other


def test_another_threads_forward_is_no_part_of_the_measure():
    """A model in use elsewhere: its numbers there are right, and add nothing to the sums here."""
    model, X = net().double().eval().requires_grad_(False), torch.randn(200, 8, dtype=torch.float64)
    expected, out = network.agop(model, X), model(X)
    stop, wrong = threading.Event(), []

    def use():
        while not stop.is_set():
            with torch.no_grad():
                if not torch.equal(model(X), out):
                    wrong.append("forward")
            inputs = X.clone().requires_grad_()
            if not torch.autograd.grad(model(inputs).sum(), inputs)[0].isfinite().all():
                wrong.append("backward")

    thread = threading.Thread(target=use)
    thread.start()
    try:
        for _ in range(10):
            for name, M in network.agop(model, X, batch_size=25).items():
                torch.testing.assert_close(M, expected[name])
    finally:
        stop.set()
        thread.join()
    assert wrong == []


def test_a_failing_measure_lets_the_next_one_in():
    model, X = net(), torch.randn(6, 8)
    with ThreadPoolExecutor(4) as pool:

        def call(i):
            if i % 2:
                with pytest.raises(ValueError, match="samples of a shape"):
                    network.agop(model, X[:, :5])
                return None
            return network.agop(model, X)

        results = list(pool.map(call, range(16)))
    assert all(r is not None for r in results[::2])
    assert model.training


def test_different_models_run_side_by_side():
    """Two models that wait for each other inside their forwards: with one lock for all they would wait for ever."""
    barrier = threading.Barrier(2, timeout=20)

    class Meeting(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.first = nn.Linear(4, 2), True

        def forward(self, x):
            if self.first:
                self.first = False
                barrier.wait()
            return self.f(x)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda model: network.agop(model, torch.randn(3, 4)), [Meeting(), Meeting()]))


def test_a_measure_within_a_measure_of_the_same_thread():
    inner = net().eval()

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.seen = nn.Linear(8, 2), []

        def forward(self, x):
            self.seen.append(network.agop(inner, x.detach()))
            return self.f(x)

    model, X = Outer(), torch.randn(3, 8)
    assert list(network.agop(model, X)) == ["f"]
    for name, M in network.agop(inner, X).items():
        torch.testing.assert_close(model.seen[-1][name], M)


def test_compiled_models_in_threads():
    """The stance of torch.compiler belongs to the process, too."""
    model, X = net().eval(), torch.randn(6, 8)
    compiled, count = torch.compile(model, backend="eager"), []
    compiled(X)
    expected = network.agop(model, X)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: network.agop(compiled, X), range(12)):
            for (name, M), other in zip(found.items(), expected.values(), strict=True):
                assert torch.equal(M, other), name

    def backend(graph, _):
        count.append(1)
        return graph.forward

    torch.compile(lambda x: x + 1, backend=backend)(X)
    assert count  # things compile again


def test_measures_that_would_wait_for_each_other_are_refused():
    """Two threads, each measuring one model inside the forward of the other: one of them is told, none hangs."""
    inner, barrier = [nn.Linear(4, 2), nn.Linear(4, 2)], threading.Barrier(2, timeout=20)

    class Outer(nn.Module):
        def __init__(self, own, other):
            super().__init__()
            self.own, self.other, self.first = own, [other], True

        def forward(self, x):
            if self.first:
                self.first = False
                barrier.wait()  # now both hold their own
            network.agop(self.other[0], x.detach())
            return self.own(x)

    def call(i):
        try:
            return len(network.agop(Outer(inner[i], inner[1 - i]), torch.randn(3, 4)))
        except RuntimeError as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        found = sorted(map(str, pool.map(call, range(2))))
    assert found[0] == "1"
    assert "threads wait for each other" in found[1]
