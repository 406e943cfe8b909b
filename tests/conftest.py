"""Data that hurts, and what the tests measure with.

The tests import nothing from each other but the kernels of kernel_cases.py, so what they share comes as fixtures;
these hold functions without state, and live for the whole session so that hypothesis may use them.
"""

from __future__ import annotations

import getpass
import importlib.util
import math
import os
import pickle
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import kernel_cases
import numpy as np
import pytest
import torch
from fastagop.kernels import plan, reference
from fastagop.kernels.torch_backend import distance as torch_distance
from fastagop.kernels.torch_backend import few as torch_few
from fastagop.kernels.torch_backend import gradients as torch_gradients

import fastagop

os.environ.setdefault("SCIPY_ARRAY_API", "1")  # before SciPy is imported: scikit-learn's array API checks want it
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
if WORKER:  # Two processes that compile one KeOps formula into one folder spoil it.
    os.environ.setdefault(
        "KEOPS_CACHE_FOLDER", str(Path(tempfile.gettempdir(), f"fastagop-keops-{getpass.getuser()}-{WORKER}"))
    )

CLASSES = 5


def _load(name: str):
    spec = importlib.util.spec_from_file_location(f"fastagop_test_{name}", Path(__file__).with_name(f"{name}.py"))
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GRID = _load("grid")
SLOW, FIRST = _load("slow").SLOW, _load("slow").FIRST
if GRID.INTERPRETED and importlib.util.find_spec("triton"):
    _load("interpreter")


def pytest_collection_modifyitems(items):
    """Marks what slow.py lists; a name there that its file does not define is an error."""
    for path in {item.path for item in items if item.path.parent == Path(__file__).parent and item.path.name in SLOW}:
        for name in SLOW[path.name]:
            if name != "*" and f"def {name}(" not in path.read_text():
                raise pytest.UsageError(f"slow.py lists {name}, which {path.name} does not define; correct the list")
    for item in items:
        names = SLOW.get(item.path.name, {})
        if "*" in names or item.name.partition("[")[0] in names:
            item.add_marker(pytest.mark.slow)
        if WORKER and "keops" in item.nodeid:  # one worker compiles each formula once: one has those of the families
            item.add_marker(pytest.mark.xdist_group("keops of " + item.path.name.replace("contract", "keops")))
    # A stable order within what FIRST names alike, and within the rest.
    items.sort(key=lambda item: next((k for k, name in enumerate(FIRST) if item.name.startswith(name)), len(FIRST)))


def pytest_generate_tests(metafunc):
    """A test that asks for ``grid_case`` or ``grid_place`` runs over all of those in grid.py."""
    for name, values in GRID.PARAMETERS.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values)


@pytest.fixture(scope="session")
def grid():
    """The lists of grid.py."""
    return GRID


def pytest_report_header(config):
    return f"fastagop {fastagop.__version__} of {Path(fastagop.__file__).parent}, torch {torch.__version__}"


@pytest.fixture(scope="session", autouse=True)
def _nothing_measured(tmp_path_factory):
    """What somebody measured on this machine must not decide what the tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTAGOP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Matrices of a few hundred rows: on a shared machine threads cost far more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _cloud(name: str, n: int = 120, d: int = 12, dtype=torch.float64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    noise = normal(n, d) / math.sqrt(d)  # rows of length about 1
    centres = torch.nn.functional.normalize(normal(CLASSES, d))
    y = torch.arange(n) % CLASSES
    word, _, spread = name.partition(" ")
    if word == "spread":  # all distances near sqrt 2
        X = noise
    elif word == "collapsed":  # unit class centres, within-class distances near 1.4 times the spread
        X = centres[y] + float(spread) * noise
    elif word == "nested":  # crowds inside the classes: no single centre serves a class
        X = centres[y] + 1e-2 * (normal(7, d) / math.sqrt(d))[torch.arange(n) % 7] + 1e-4 * noise
    elif word == "offset":  # norms say nothing about distances
        X = 1e3 + float(spread or 1) * normal(n, d)
    elif word == "zero-rows":  # what ReLU features of a dead row look like
        X = noise * (torch.arange(n) % 3 > 0)[:, None]
    elif word == "identical":
        X = noise[:1].repeat(n, 1)
    elif word == "scales":  # norms over seven decades
        X = noise * 10.0 ** torch.linspace(-5, 2, n, dtype=torch.float64)[:, None]
    elif word == "line":  # distances of every size, no crowds
        X = centres[:1] + torch.linspace(0, 1, n, dtype=torch.float64)[:, None] * normal(1, d)
    elif word == "pairs":  # every row has one close partner
        X = (normal(n, d) / math.sqrt(d))[torch.arange(n) // 2] + 1e-4 * noise
    else:
        raise ValueError(name)
    X = X.to(dtype)
    if word in ("collapsed", "nested", "pairs") and n > 15:
        X[7] = X[2]  # exact duplicates, of equal labels
        X[12] = X[2]
        X[n - 1] = X[n - 1 - CLASSES]
    return X


@pytest.fixture(scope="session")
def cloud():
    """cloud(name, n, d, dtype, seed): points of a named kind."""
    return _cloud


@pytest.fixture(scope="session")
def targets():
    """targets(n, dtype): +-1 one-hot columns of the classes that "collapsed" clouds are drawn from."""

    def build(n: int, dtype=torch.float64) -> torch.Tensor:
        return (2.0 * torch.nn.functional.one_hot(torch.arange(n) % CLASSES, CLASSES) - 1.0).to(dtype)

    return build


@pytest.fixture(scope="session")
def normal():
    """normal(*shape, dtype, seed): standard normal numbers, the same in every dtype up to rounding."""

    def build(*shape: int, dtype=torch.float64, seed: int = 1) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)

    return build


@pytest.fixture(scope="session")
def laid_out(cloud, normal):
    """laid_out(layout, name, dtype): points of a named kind and coefficients, "transposed" or "strided" in memory."""

    def build(layout: str, name: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        big, coefficients = cloud(name, n=80, d=24, dtype=dtype), normal(80, 6, dtype=dtype)
        if layout == "transposed":
            X, alpha = big.T.contiguous().T, coefficients.T.contiguous().T
        else:
            X, alpha = big[::2, ::3], coefficients[::2, ::2]
        assert not X.is_contiguous()
        assert not alpha.is_contiguous()
        return X, alpha

    return build


@pytest.fixture(scope="session")
def relative():
    """relative(a, b): Frobenius norm of a - b over that of b, in float64; of a alone where b is zero."""

    def measure(a: torch.Tensor, b: torch.Tensor) -> float:
        assert a.shape == b.shape
        a, b = a.double().cpu(), b.double().cpu()
        error, size = torch.linalg.vector_norm(a - b), torch.linalg.vector_norm(b)
        return float(error / size if size > 0 else error)

    return measure


@pytest.fixture(scope="module", params=[False, True], ids=["few", "many"])
def each_way(request):
    """The torch backend's steps for a few points on the CPU, and for as few points those that many points take."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param:
            patch.setattr(torch_few, "_WORK", 0)
            patch.setattr(torch_distance, "_DIRECT", 0)
            patch.setattr(torch_gradients, "LEAST_ROWS", 1)
        yield


@pytest.fixture(scope="session")
def gradient_bound():
    """gradient_bound(kernel, X, alpha, Z): relative error of the gradients that rounding explains.

    g_ic = sum_j W_ij A_jc x_j - s_ic z_i sums terms of size w |a| (|x| + |z|). Each term carries a few roundings
    of its own, and those of its weight: an exponent t such as r / L or r^2 / L^2 has a relative error of a few eps, so
    exp(-t) one of t times that. The bound is 4 eps times the sum of w (1 + t) |a| (|x| + |z|), over the norm of
    the true gradients; a method may move the origin to the points' mean, so the better of the two counts.
    """

    def bound(kernel, X: torch.Tensor, alpha: torch.Tensor, Z: torch.Tensor | None = None) -> float:
        eps = torch.finfo(X.dtype).eps
        x, a = X.double().cpu(), alpha.double().cpu()
        z = x if Z is None else Z.double().cpu()
        difference = x[None] - z[:, None]
        r = difference.square().sum(-1).sqrt()
        t = kernel_cases.case_of(kernel).exponent(kernel, r)
        slope = torch.from_numpy(reference.profile(kernel, r.numpy())[1])
        w = torch.where(r > 0, -slope / torch.where(r > 0, r, 1.0), 0.0)
        true = torch.einsum("ij,jc,ijk->ick", w, a, difference)
        w = w * (1.0 + t)
        sizes = []
        for origin in (torch.zeros_like(x[0]), x.mean(0)):
            xs, zs = (x - origin).abs(), (z - origin).abs()
            terms = torch.einsum("ij,jc,jk->ick", w, a.abs(), xs) + (w @ a.abs())[:, :, None] * zs[:, None, :]
            sizes.append(float(torch.linalg.vector_norm(terms)))
        return 4.0 * eps * min(sizes) / float(torch.linalg.vector_norm(true))

    return bound


@pytest.fixture(scope="session")
def peak_memory(python):
    """peak_memory(setup, call): bytes beyond what is held before that evaluating call takes, on Linux.

    The call runs in a fresh interpreter after the setup, which should warm up libraries and their work buffers.
    glibc is told to map every large block and to give it back when it is freed: memory kept for later use would
    hide what a call needs.
    """
    clear = Path("/proc/self/clear_refs")
    if not (clear.exists() and os.access(clear, os.W_OK)):
        pytest.skip("needs Linux's /proc/self/clear_refs")
    measure = """
def status(field):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(field))
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts again
before = status("VmRSS")
"""

    def run(setup: str, call: str) -> int:
        code = f"import torch, fastagop\ntorch.set_num_threads(1)\n{setup}\n{measure}\nresult = {call}\n"
        map_all = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        return int(python(code + 'print(status("VmHWM") - before)', **map_all))

    return run


@pytest.fixture(scope="session")
def tensor_memory():
    """tensor_memory(call): (result, bytes of CPU tensors alive at once beyond those before), also within operations.

    It reads torch's own allocations; matrices of 4 MB and more may come from NumPy and are not seen.
    """

    def run(call):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            result = call()
        events = profile.profiler.kineto_results.events()
        changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        alive = most = 0
        for _, count in changes:
            alive += count
            most = max(most, alive)
        return result, most

    return run


@pytest.fixture(scope="session")
def bounded_solution():
    """bounded_solution(A, X, Y, dtype): the relative residual of a dense float64 solve that dtype can bear.

    The diagonal of A grows by tens from eps times the largest row sum until torch's Cholesky factorisation succeeds
    and no coefficient exceeds that of Y divided by the square root of eps. Where equal rows of X have different
    targets and there is no ridge, the residual is at least that of answering them by their mean.
    """

    def solve(A: torch.Tensor, X: torch.Tensor, Y: torch.Tensor, dtype: torch.dtype) -> float:
        A, Y, eps = A.double(), Y.double(), torch.finfo(dtype).eps
        _, group = torch.unique(X, dim=0, return_inverse=True)
        same = (group[:, None] == group).double()
        least = float(torch.linalg.vector_norm(same @ Y / same.sum(1, keepdim=True) - Y) / torch.linalg.vector_norm(Y))
        least = least if float(A.diagonal().max()) == 1.0 else 0.0
        jitter, bound = 0.0, float(Y.abs().max()) / eps**0.5
        while True:
            L, failed = torch.linalg.cholesky_ex(A + jitter * torch.eye(len(A), dtype=A.dtype))
            if not failed:
                alpha = torch.cholesky_solve(Y, L)
                if float(alpha.abs().max()) <= bound:
                    return max(least, float(torch.linalg.vector_norm(A @ alpha - Y) / torch.linalg.vector_norm(Y)))
            jitter = max(10.0 * jitter, eps * float(A.sum(1).max()))

    return solve


@pytest.fixture(scope="session")
def system():
    """system(kernel, X, ridge): k(X, X) + ridge I of the reference."""

    def build(kernel, X: torch.Tensor, ridge: float) -> torch.Tensor:
        K = reference.kernel_matrix(kernel, X)
        K.diagonal().add_(ridge)
        return K

    return build


@pytest.fixture(scope="session")
def damaged():
    """damaged(data, count): flips of one bit and cuts at random places, and some special ones."""

    def spoil(data: bytes, count: int):
        rng = np.random.default_rng(0)
        for k in rng.integers(0, len(data), count):
            yield data[:k] + bytes([data[k] ^ 1 << int(rng.integers(8))]) + data[k + 1 :]
        for k in rng.integers(0, len(data), count // 5):
            yield data[:k]
        for k in rng.integers(0, len(data) - 8, count // 5):
            yield data[:k] + rng.bytes(8) + data[k + 8 :]
        yield from (b"", b"hi", data + b"\0", data * 2, pickle.dumps(data[:100]), b"\xff" * 300, b"[" * 3000)

    return spoil


@pytest.fixture(scope="session")
def outcome():
    """outcome(call, path): what the call returns, or None after a ValueError that names the file; no other error."""

    def tried(call, path: Path):
        try:
            return call()
        except ValueError as error:
            if path.name not in str(error):
                raise AssertionError(f"{error} does not name {path}") from error
            return None

    return tried


@pytest.fixture
def little_memory(monkeypatch):
    """little_memory(bytes): operations without a memory_limit find that much free, and work in small blocks."""

    def leave(count: float) -> None:
        monkeypatch.setattr(plan, "available_bytes", lambda device: int(count))

    return leave


@pytest.fixture(scope="session")
def block_of():
    """block_of(op, *args, **kwargs): rows of a block that the call would take, from explain's text."""

    def read(*args, **kwargs) -> int:
        text = fastagop.explain(*args, **kwargs)
        found = re.search(r"blocks of (\d+) rows", text)
        assert found, text
        return int(found[1])

    return read


@pytest.fixture(scope="session")
def least_memory():
    """least_memory(op, *args, **kwargs): the smallest memory_limit that the call accepts."""

    def search(*args, **kwargs) -> int:
        low, high = 1, 2**40
        while high - low > 1:
            middle = (low + high) // 2
            try:
                fastagop.explain(*args, memory_limit=middle, **kwargs)
            except MemoryError:
                low = middle
            else:
                high = middle
        return high

    return search


@pytest.fixture(scope="session")
def python():
    """python(code, **environment): what a fresh interpreter prints when it runs the code, on one thread."""

    def run(code: str, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code] if sys.version_info >= (3, 11) else [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            cwd=Path(__file__).parent,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="session")
def differences():
    """differences(model, X, name): sum of J^T J over samples, outputs and calls of a Linear layer, in evaluation mode.

    J by central differences of what enters the layer, one call at a time, without autograd; for float64 models.
    """

    def build(model: torch.nn.Module, X: torch.Tensor, name: str, step: float = 1e-5) -> torch.Tensor:
        layer, modes = model.get_submodule(name), [(module, module.training) for module in model.modules()]
        entered: list[torch.Tensor] = []
        added: dict[int, torch.Tensor] = {}

        def forward(input):
            entered.append(input)
            moved = input + added[len(entered) - 1] if len(entered) - 1 in added else input
            return torch.nn.functional.linear(moved, layer.weight, layer.bias)

        def outputs(x):
            entered.clear()
            return model(x[None]).reshape(-1)

        model.eval()
        layer.forward = forward
        total = torch.zeros(layer.in_features, layer.in_features, dtype=torch.float64)
        try:
            with torch.no_grad():
                for x in X:
                    outputs(x)
                    for call, shape in enumerate([e.shape for e in entered]):
                        columns = []
                        for unit in torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape):
                            added[call] = step * unit
                            up = outputs(x)
                            added[call] = -step * unit
                            columns.append((up - outputs(x)) / (2 * step))
                            del added[call]
                        J = torch.stack(columns, 1).reshape(-1, shape[-1])
                        total += J.T @ J
        finally:
            del layer.forward
            for module, mode in modes:
                module.training = mode
        return total

    return build


@pytest.fixture
def tight_memory(little_memory, block_of):
    """tight_memory(op, *args): leaves just enough memory for a few rows at a time; returns the rows of a block."""

    def leave(*call) -> int:
        count = 1e4
        while True:
            little_memory(count)
            try:
                rows = block_of(*call)
            except MemoryError:
                rows = 0
            if rows >= 7:
                return rows
            count *= 1.02

    return leave
