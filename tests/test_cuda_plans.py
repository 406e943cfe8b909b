"""What calls would do on CUDA: plans for a chip that is not there, of tensors that name its device without numbers."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fastagop.kernels import calibration, checks, reference
from fastagop.kernels.kernel_operator import KernelOperator
from fastagop.kernels.plan import AgopTask
from fastagop.kernels.torch_backend import agop as torch_agop
from fastagop.kernels.torch_backend import backend, costs, distance, gradients, gram
from fastagop.kernels.triton_backend import backend as triton_door
from fastagop.kernels.triton_backend import stored_product

import fastagop
from bench import problems
from fastagop import Laplace, linalg
from fastagop.solvers import direct, half, pinned
from fastagop.solvers.problem import FULL_MATRIX_ROWS
from fastagop.solvers.solve import SolveOptions, prepare
from fastagop.solvers.symmetric_blocks import default_rows

GB = 10**9
CHIPS = {  # compute capability and memory
    "A100": ((8, 0), 80 * GB),
    "RTX 4090": ((8, 9), 24 * GB),
    "H200": ((9, 0), 141 * GB),
    "B200": ((10, 0), 180 * GB),
    "B300": ((10, 3), 288 * GB),
    "RTX 5090": ((12, 0), 32 * GB),
}


class OnCuda(torch.Tensor):
    """A tensor without numbers that says it is on CUDA."""

    device = property(lambda self: torch.device("cuda"))
    is_cuda = True


def cuda(rows: int, columns: int, dtype=torch.float32) -> torch.Tensor:
    return torch.empty(rows, columns, dtype=dtype, device="meta").as_subclass(OnCuda)


@pytest.fixture
def on(monkeypatch):
    """on(chip): calls find that chip, with all of its memory free, and nothing measured on it."""

    def pretend(chip: str) -> None:
        capability, memory = CHIPS[chip]
        found = {"get_device_capability": capability, "get_device_name": chip, "mem_get_info": (memory, memory)}
        found |= {"memory_reserved": 0, "memory_allocated": 0}
        for name, value in found.items():
            monkeypatch.setattr(torch.cuda, name, lambda device=None, value=value: value)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(calibration, "measured", lambda device: calibration.Measured())
        monkeypatch.setattr(checks, "finite", lambda value: True)  # there are no values
        monkeypatch.setattr(checks, "_is_wrapper", lambda value: False)

    return pretend


def rows_of(text: str) -> int:
    return int(re.search(r"blocks of (\d+) rows", text)[1])


# ---- memory of the host


@pytest.mark.parametrize(("free", "way"), [(90, "refined"), (60, "from points"), (20, None)])
def test_pinned_memory_is_planned(on, monkeypatch, free, way):
    """n = 100,000: 43 GB in float64 and 21 GB in float32."""
    on("RTX 4090")
    monkeypatch.setattr(half, "host_bytes", lambda: free * GB)
    X, Y = cuda(100_000, 64), cuda(100_000, 10)
    task = {"method": fastagop.CholeskyCG(place="host")}
    if way is None:
        with pytest.raises(MemoryError, match=r"place='host' needs .* GB of pinned memory for n = 100000, but 18.0 GB"):
            prepare(Laplace(30.0), X, Y, SolveOptions(**task))
        return
    solver = prepare(Laplace(30.0), X, Y, SolveOptions(**task)).solver
    assert solver.run is {"refined": half.refined, "from points": half.from_points}[way]


@pytest.mark.parametrize(
    ("free", "kept", "way", "returned"),
    [(90, 64, "refined", 0), (26, 64, "refined", 1), (25, 25, "from points", 0), (5, 30, "from points", 1)],
)
def test_pinned_memory_of_an_earlier_solve_is_there_for_the_next(on, monkeypatch, free, kept, way, returned):
    """PyTorch keeps it, so that the system calls it taken; it is returned only where that makes enough."""
    on("RTX 4090")
    host, calls = {"free": free * GB}, []

    def give_back(device):
        calls.append(device)
        host["free"] = (free + kept) * GB

    monkeypatch.setattr(half, "host_bytes", lambda: host["free"])
    monkeypatch.setattr(pinned, "held_bytes", lambda: kept * GB + free * GB - host["free"])
    monkeypatch.setattr(pinned, "give_back", give_back)
    X, Y = cuda(100_000, 64), cuda(100_000, 10)
    solver = prepare(Laplace(30.0), X, Y, SolveOptions(method=fastagop.CholeskyCG(place="host"))).solver
    assert solver.run is {"refined": half.refined, "from points": half.from_points}[way]
    assert calls == [X.device] * returned


# ---- row blocks


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("op", ["agop", "gradients"])
@pytest.mark.parametrize("chip", CHIPS)
def test_the_gradient_form_takes_blocks_that_fill_a_gpu(on, op, chip, backend):
    on(chip)
    how = {"method": "gradient"} if op == "agop" else {}
    text = fastagop.explain(op, Laplace(30.0), cuda(50_000, 1024), cuda(50_000, 10), backend=backend, **how)
    assert rows_of(text) == 2048


@pytest.mark.parametrize(("n", "least"), [(1000, 1000), (200_000, 512), (10**6, 128)])
def test_blocks_stay_below_four_gibibytes(on, n, least):
    """Fewer rows than one block are one; blocks of many points have fewer rows."""
    on("H200")
    X, alpha = cuda(n, 64), cuda(n, 10)
    rows = rows_of(fastagop.explain("agop", Laplace(30.0), X, alpha, method="gradient"))
    assert least <= rows <= max(least, 2048)
    if rows > 128:
        more, fewer = (costs.gradient_form_bytes(r, X, alpha, X, False) for r in (rows, 1))
        assert more - fewer <= 1.2 * 2**32  # rows by the mean bytes of 2048


@pytest.mark.parametrize("limit", [1.5e9, 4e8])
def test_blocks_that_memory_permits(on, limit):
    on("A100")
    X, alpha = cuda(50_000, 64), cuda(50_000, 10)
    text = fastagop.explain("agop", Laplace(30.0), X, alpha, method="gradient", memory_limit=limit)
    rows = rows_of(text)
    assert 1 <= rows < 2048
    assert (
        costs.gradient_form_bytes(rows, X, alpha, X, False)
        <= limit
        < costs.gradient_form_bytes(rows + 1, X, alpha, X, False)
    )


def test_blocks_on_the_cpu_stay_near_its_caches(block_of):
    X = torch.zeros(1, 1).expand(50_000, 64)
    assert block_of("agop", Laplace(30.0), X, X[:, :7], method="gradient") == 128


@pytest.mark.parametrize(
    ("kind", "beside", "blocks"),
    [
        ("cpu", None, [100] * 6),
        ("cuda", None, [256, 256, 88]),  # the aim here is that of the CPU
        ("cpu", 90, [90] * 6 + [60]),
        ("cuda", 90, [90] * 6 + [60]),
    ],
)
def test_blocks_of_stored_weights(kind, beside, blocks, monkeypatch, cloud, normal, relative):
    """A fit's AGOP: blocks as asked for on the CPU, the gradient form's own on CUDA, fewer rows where memory ends."""
    seen, gradient_form = [], torch_agop.gradient_form

    def watched(blocks, *args, **kwargs):
        return gradient_form(((seen.append(len(W)), (row, W, near))[1] for row, W, near in blocks), *args, **kwargs)

    monkeypatch.setattr(torch_agop, "gradient_form", watched)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    X, alpha = cloud("spread", n=600), normal(600, 3)
    monkeypatch.setattr(torch_agop, "on_gpu", lambda device: kind == "cuda")
    W = torch_agop.weights(Laplace(2.0), X, X, 100)
    limit = None
    if beside is not None:
        limit = W.numel() * W.element_size() + costs.gradient_form_bytes(beside, X, alpha, X, False)
    task = AgopTask("sum", method="gradient", limit=limit)
    M = torch_agop.agop_from_weights_(W, Laplace(2.0), X, alpha, X, task, symmetric=True, rows=100)
    assert seen == blocks
    assert relative(M, reference.agop(Laplace(2.0), X, alpha, reduction="sum")) <= 1e-12


@pytest.mark.parametrize(("chunk", "most"), [(2**12, 40), (2**18, 150), (2**24, 150)])
def test_steps_of_near_pairs_have_a_devices_rows(chunk, most, monkeypatch, cloud, normal, relative):
    """A class's near pairs in few products of many rows on CUDA, in products that stay in caches on the CPU."""
    rows, add = [], gradients._add_product
    monkeypatch.setattr(gradients, "chunk_of", lambda device: chunk)
    monkeypatch.setattr(gradients, "_add_product", lambda W, *rest: (rows.append(len(W)), add(W, *rest))[1])
    X, alpha = cloud("collapsed 1e-2", n=600, d=12, dtype=torch.float32), normal(600, 3).float()
    assert relative(fastagop.gradients(Laplace(2.0), X, alpha), reference.gradients(Laplace(2.0), X, alpha)) <= 1e-5
    assert len(rows) > 0
    assert max(rows) <= most
    assert (len(rows) > 20) == (chunk == 2**12)


@pytest.mark.parametrize("chunk", [2**10, 2**18, 2**21])
def test_steps_of_distances_have_a_devices_items(chunk, monkeypatch, cloud, relative):
    """Near pairs that no group serves, in few steps on CUDA, where each waits for the GPU."""
    steps, measure = [], distance._measure_directly
    monkeypatch.setattr(distance, "near_chunk", lambda device: chunk)
    monkeypatch.setattr(distance, "_measure_directly", lambda *given: (steps.append(1), measure(*given))[1])
    X = cloud("collapsed 1e-2", n=300, d=12, dtype=torch.float32)
    assert relative(fastagop.kernel_matrix(Laplace(2.0), X), reference.kernel_matrix(Laplace(2.0), X)) <= 1e-5
    assert (len(steps) > 20) == (chunk == 2**10)


def test_what_steps_of_distances_take_is_planned(on):
    on("H200")
    assert [distance.near_chunk(torch.device(kind)) for kind in ("cpu", "cuda")] == [2**18, 2**21]
    small, large = (distance.tile_bytes(2048, 50_000, 50_000, 1024, 4, chunk) for chunk in (2**18, 2**21))
    assert large - small == (16 + 3 * 4) * 2**21 - 5 * 4 * 16 * 50_000  # sixteen rows are more than the small chunk
    X, alpha = cuda(50_000, 1024), cuda(50_000, 1)
    for rows in (1, 256):
        form = costs.gram_form_bytes(rows, X, alpha, X, symmetric=True)
        assert form >= 4 * 50_000**2 + distance.tile_bytes(rows, 50_000, 50_000, 1024, 4, 2**21)


def test_what_steps_of_near_pairs_take_is_planned(on):
    on("H200")
    assert [gradients.chunk_of(torch.device(kind)) for kind in ("cpu", "cuda")] == [2**18, 2**24]
    X, alpha = cuda(50_000, 1024), cuda(50_000, 10)
    assert costs.gradient_form_bytes(2048, X, alpha, X, False) > 68 * 2**24 + 5 * 4 * 2048 * 50_000
    few = costs.gradient_form_bytes(1, X, alpha, X, False)
    assert few < 2 * 48 * 50_000 + 16 * X.numel() + 8 * 16 * 50_000 + 2**26 + 8 * 3 * 1024**2 + 8 * 10 * X.numel()


@pytest.mark.parametrize(("room", "method"), [(72, "gradient"), (100, "gram")])
def test_split_halves_of_stored_weights_are_planned(on, room, method):
    """W of 100,000 points takes 40 GB, and as many once more where its products are of fp16 halves."""
    on("H200")
    X, alpha, task = cuda(100_000, 2048), cuda(100_000, 100), AgopTask(limit=room * GB)
    least = costs.halves_bytes(100_000, "fp16x3")
    assert 40 * GB < least < 40.1 * GB
    split = costs.plan(X, alpha, X, task, "", "fp16x3", symmetric=True)
    assert split.method == method
    assert ("does not fit into 72.0 GB" in split.why) == (method == "gradient")
    assert costs.plan(X, alpha, X, task, "", "tf32", symmetric=True).method == "gram"  # one float32 factor
    if method == "gram":
        assert split.peak_bytes > 80 * GB
    with pytest.raises(MemoryError, match=r"agop, gram form, needs 8\d.* GB for a single row block"):
        costs.plan(X, alpha, X, AgopTask(method="gram", limit=72 * GB), "", "fp16x3", symmetric=True)


@pytest.mark.parametrize(("n", "bytes_"), [(1, 4 * 65), (64, 64 * 4 * 65), (65, 65 * 4 * 129)])
def test_halves_are_padded(n, bytes_):
    """By what an operand has: two halves of two bytes an item, and a scale of four bytes a row."""
    split = pytest.importorskip("fastagop.kernels.triton_backend.split", exc_type=ImportError)
    assert costs.halves_bytes(n, "fp16x3") == n * (4 * split.padded(n) + 4) == bytes_
    assert costs.halves_bytes(n, "tf32") == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_halves_of_a_fits_weights_are_counted(dtype, monkeypatch, cloud, normal):
    """The halves of weights in the points' dtype come beside the memory that a fit has left for these."""
    monkeypatch.setattr(torch_agop, "rate", lambda form, products, device: {"gram": 1e12, "gradient": 1.0}[form])
    monkeypatch.setattr(costs, "rate", torch_agop.rate)
    X, alpha = cloud("spread", n=300, d=5, dtype=torch.float32), normal(300, 4, dtype=torch.float32)
    W = torch_agop.weights(Laplace(2.0), X, X, 64).to(dtype)
    needed = costs.gram_form_bytes(64, X, alpha, X, symmetric=True, products="fp16x3")
    needed += 300 * 300 * (dtype.itemsize - 4)
    assert needed >= 300 * 300 * (dtype.itemsize + 4)
    made = []
    for limit in (needed, needed - 1):
        task = AgopTask("sum", limit=limit)
        how = {"symmetric": True, "products": "fp16x3", "rows": 64}
        decision = torch_agop.choose_form(W, X, alpha, X, task, **how)
        made.append((decision.form, decision.dtype))
    assert made[0] == ("gram", torch.float32)
    assert made[1] != made[0]


# ---- what Triton refuses


@pytest.mark.parametrize("kernel", [Laplace(2.0), fastagop.ProductLaplace(2.0)], ids=repr)
def test_amd_is_refused(on, kernel, monkeypatch):
    """An MI300 says that it has compute capability 9.4, and takes neither the register limits nor the products."""
    on("H200")
    X = cuda(30, 10)
    assert fastagop.explain("kernel_matrix", kernel, X, backend="triton").startswith("kernel_matrix: backend triton")
    monkeypatch.setattr(torch.version, "hip", "6.3")
    with pytest.raises(fastagop.BackendUnavailable, match=r"NVIDIA's GPUs and this torch is built for AMD's \(ROCm\)"):
        fastagop.explain("kernel_matrix", kernel, X, backend="triton")
    assert fastagop.explain("kernel_matrix", kernel, X).startswith("kernel_matrix: backend torch")


# ---- products with the kernel matrix


@pytest.mark.parametrize("chip", ["A100", "H200"])
@pytest.mark.parametrize(("d", "stored"), [(1024, True), (16, False)])
def test_row_blocks_are_stored_where_that_wins(on, d, stored, chip):
    on(chip)
    call = ("kernel_matmul", Laplace(30.0), cuda(50_000, d), None, cuda(50_000, 10))
    text = fastagop.explain(*call, backend="triton")
    words = "row blocks of K, stored, and the library's product" if stored else "fused, K never stored"
    assert text.startswith(f"kernel_matmul: backend triton, method {words}\n")
    fused, by_blocks = map(float, re.search(r"fused about (\S+) s, by stored row blocks (\S+) s", text).groups())
    assert (by_blocks < fused) == stored
    assert rows_of(text) == 2048
    assert "blocks of 2048 rows" in fastagop.explain(*call)  # torch's, too


@pytest.mark.parametrize(("d", "taken"), [(1024, "stored"), (16, "fused")])
def test_the_call_does_what_its_plan_says(on, d, taken, monkeypatch):
    on("H200")
    ran = []
    monkeypatch.setattr(stored_product, "kernel_matmul", lambda at, V, precision, rows: ran.append(("stored", rows)))
    launch = SimpleNamespace(kernel_matmul=lambda at, V, precision: ran.append(("fused", 2048)))
    monkeypatch.setattr(triton_door, "_launch", lambda: launch)
    operator = KernelOperator("kernel_matmul", Laplace(30.0), cuda(50_000, d), backend="triton")
    operator.backend.matmul(operator, cuda(50_000, 10)).run(None)
    assert ran == [(taken, 2048)]


# ---- the estimate of what the gram form loses


class Estimated(Exception):
    """The estimate was asked for."""


@pytest.fixture
def no_estimate(monkeypatch):
    def refuse(*args):
        raise Estimated

    monkeypatch.setattr(gram, "CancellationEstimate", refuse)


@pytest.mark.parametrize(
    ("chip", "products"),
    [(chip, products) for chip in ("A100", "H200", "B200", "RTX 4090") for products in ("fp16x3", "tf32")]
    + [("RTX 4090", None)],  # elsewhere float64 is as fast as float32, and worth its time near collapse
)
def test_no_estimate_where_the_gradient_form_wins_whatever_it_says(on, no_estimate, chip, products):
    """The paper's size: the gram form takes 2.3 times the gradient form's work, and more in float64."""
    on(chip)
    X, alpha = cuda(50_000, 1024), cuda(50_000, 10)
    W = cuda(50_000, 50_000)
    cost = costs.costs(X, X, 10, costs.products_of(X, products, symmetric=True), symmetric=True)
    assert 1 < cost["gram"] / cost["gradient"] < 4
    assert torch_agop.choose_form(W, X, alpha, X, AgopTask("sum"), symmetric=True, products=products).form == "gradient"


@pytest.mark.parametrize("K", [10, 200])
@pytest.mark.parametrize("method", ["auto", "gram"])
def test_the_estimate_where_it_decides(on, no_estimate, method, K):
    on("H200")
    X, alpha = cuda(5000, 1024), cuda(5000, K)
    with pytest.raises(Estimated):
        torch_agop.choose_form(cuda(5000, 5000), X, alpha, X, AgopTask("sum", method=method), symmetric=True)


# ---- rates and solvers


@pytest.mark.parametrize(
    "capability", [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)]
)
def test_float64_is_slow_but_for_a_few_chips(on, capability, monkeypatch):
    on("A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cuda")
    narrow, wide = (calibration.rate("gradient", word, device) for word in ("float32", "float64"))
    if capability in ((8, 0), (9, 0), (10, 0)):
        assert wide <= narrow <= 2.1 * wide
    else:
        assert 55 <= narrow / wide <= 70
    coarse = [calibration.rate("gram", word, device) for word in ("bf16x3", "fp16x3", "tf32")]
    assert coarse == sorted(coarse)


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("chip", "refined"),
    [
        ("A100", False),  # float64 as fast as float32: refinement costs more than it saves
        ("H200", False),
        ("B200", True),  # half as fast
        ("B300", True),  # a 64th
        ("RTX 4090", True),
        ("RTX 5090", True),
    ],
)
def test_the_solver_of_a_chip(on, chip, refined, dtype, ridge):
    on(chip)
    refined = refined and dtype == torch.float32
    n = 30_000 if "RTX" in chip else 50_000
    text = fastagop.explain("solve", Laplace(30.0), cuda(n, 1024, dtype), cuda(n, 10, dtype), ridge=ridge)
    assert text.startswith(f"solve: backend torch, method {'cholesky+cg' if refined else 'cholesky'}\n")
    why = next(line for line in text.splitlines() if line.strip().startswith("why"))
    found = re.search(r"a float32 factor and its refinement take about (\S+) s, a float64 one (\S+) s \(default", why)
    if dtype == torch.float32 and (refined or ridge == 0):
        assert (float(found[1]) < float(found[2])) == refined
    else:
        assert found is None


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
@pytest.mark.parametrize("chip", CHIPS)
def test_split_products_make_a_float32_factor_the_faster_one(on, chip, ridge):
    """With the Triton backend on every chip, those with fast float64 included; both times are printed, and obeyed.

    Consumer chips' float32 is faster than three fp16 products, and serves them.
    """
    on(chip)
    n, consumer = (30_000, True) if "RTX" in chip else (50_000, False)
    X, Y = cuda(n, 1024), cuda(n, 10)
    text = fastagop.explain("solve", Laplace(30.0), X, Y, ridge=ridge, backend="triton")
    assert text.startswith("solve: backend triton, method cholesky+cg\n")
    assert ("a float32 factor by three fp16 products, float64 conjugate gradients on it" in text) != consumer
    found = re.search(r"a float32 factor and its refinement take about (\S+) s, a float64 one (\S+) s \(default", text)
    assert float(found[1]) < float(found[2])
    problem = prepare(Laplace(30.0), X, Y, SolveOptions(ridge=ridge, backend="triton")).problem
    word = "float32" if consumer else "fp16x3"
    assert half.products_of(problem).word == word
    rate = calibration.rate("gradient", word, torch.device("cuda"))
    factor = (n**3 / 3.0 + 4096 * n**2 if n > 32_768 else n**3 / 3.0 + -(-n // 8) * n**2) / rate
    steps = half._LIKELY_STEPS * half._step_seconds(problem)
    assert half.refined_seconds(problem) == pytest.approx(half._fill_seconds(problem) + factor + steps)


@pytest.mark.parametrize("chip", ["A100", "H200"])
def test_a_float32_factor_needs_its_room_and_its_precision(on, chip):
    """Where half a matrix and its factor do not fit, and where coarse products were asked for, one matrix as before."""
    on(chip)
    X, Y = cuda(50_000, 1024), cuda(50_000, 10)
    needed = half.refined_bytes(prepare(Laplace(30.0), X, Y, SolveOptions(backend="triton")).problem)
    plans = [fastagop.explain("solve", Laplace(30.0), X, Y, backend="triton", memory_limit=needed - i) for i in (0, 1)]
    assert ["method cholesky+cg\n" in text for text in plans] == [True, False]
    coarse = fastagop.explain("solve", Laplace(30.0), X, Y, backend="triton", precision="medium", method="cholesky+cg")
    assert "three fp16 products" not in coarse


def test_what_a_split_factor_takes_is_planned(on):
    """Of a step: halves of two block rows, and a few squares beside them."""
    on("H200")
    for n in (5000, 30_000, 50_000, 100_000):
        rows = default_rows(n, torch.device("cuda"))
        assert 4 * (2 * rows * n + 4 * rows**2) <= 4 * 3 * rows * n


def test_measured_rates_decide(on, monkeypatch):
    """A device that was calibrated: here float32 is three times as fast as float64."""
    on("H200")
    rates = {
        f"{form} {word}": rate for form in ("gradient", "gram") for word, rate in (("float32", 9e13), ("float64", 3e13))
    }
    monkeypatch.setattr(calibration, "measured", lambda device: calibration.Measured(rates=rates))
    text = fastagop.explain("solve", Laplace(30.0), cuda(50_000, 1024), cuda(50_000, 10))
    assert "method cholesky+cg" in text
    assert "(rates measured on this device, undated)" in text


@pytest.mark.parametrize("n", [4096, 4097])
def test_small_systems_take_one_matrix(on, n):
    on("RTX 4090")
    text = fastagop.explain("solve", Laplace(30.0), cuda(n, 64), cuda(n, 10))
    assert ("method cholesky+cg\n" in text) == (n > FULL_MATRIX_ROWS)


def test_coarse_products_keep_their_own_factor(on):
    on("B200")
    asked = {"backend": "triton", "precision": "medium"}
    text = fastagop.explain("solve", Laplace(30.0), cuda(50_000, 1024), cuda(50_000, 10), **asked)
    assert "method cholesky\n" in text
    assert "the precision asked for makes the factor a preconditioner" in text


def test_no_room_for_refinement(on):
    on("RTX 4090")
    X, Y = cuda(50_000, 1024), cuda(50_000, 10)
    needed = half.refined_bytes(prepare(Laplace(30.0), X, Y, SolveOptions()).problem)
    words = {
        limit: fastagop.explain("solve", Laplace(30.0), X, Y, memory_limit=limit) for limit in (needed, needed - 1)
    }
    assert "method cholesky+cg\n" in words[needed]
    assert "method cholesky\n" in words[needed - 1]


# ---- what a Triton does not compile


@pytest.mark.parametrize("op", ["kernel_matrix", "kernel_matmul", "gradients", "agop"])
@pytest.mark.parametrize(
    ("chip", "version", "refused"),
    [
        ("B200", (3, 6), True),
        ("B300", (3, 7), True),
        ("B200", (3, 8), False),
        ("H200", (3, 6), False),
        ("RTX 5090", (3, 6), False),
    ],
)
def test_tf32_on_blackwell(on, chip, version, refused, op, monkeypatch):
    on(chip)
    monkeypatch.setattr(triton_door, "version", lambda: version)
    X, alpha = cuda(900, 64), cuda(900, 10)
    call = (op, Laplace(2.0), X) if op == "kernel_matrix" else (op, Laplace(2.0), X, alpha)
    call = (op, Laplace(2.0), X, X, alpha) if op == "kernel_matmul" else call
    assert "backend triton" in fastagop.explain(*call, backend="triton")
    assert "backend torch" in fastagop.explain(*call, precision="medium")  # "auto" computes without it
    if refused:
        major, minor = CHIPS[chip][0]
        words = rf"Triton {version[0]}\.{version[1]} does not compile .*{chip} \(compute capability {major}\.{minor}\)"
        with pytest.raises(fastagop.BackendUnavailable, match=words):
            fastagop.explain(*call, backend="triton", precision="medium")
    else:
        assert "backend triton" in fastagop.explain(*call, backend="triton", precision="medium")


@pytest.mark.parametrize(
    ("chip", "version", "taken"), [("B200", (3, 6), False), ("B200", (3, 8), True), ("H200", (3, 6), True)]
)
def test_the_float64_matrix_on_blackwell(on, chip, version, taken, monkeypatch):
    """Torch's takes over where Triton compiles none, and the plan says so."""
    on(chip)
    monkeypatch.setattr(triton_door, "version", lambda: version)
    text = fastagop.explain("solve", Laplace(2.0), cuda(900, 64), cuda(900, 10), backend="triton")
    assert ("of a matrix from the torch backend: Triton 3.6 does not compile float64 products" in text) == (not taken)
    assert triton_door.has_products(torch.float64) == taken
    assert triton_door.has_products(torch.float32)


def test_the_float64_matrix_beside_a_blackwell(on, monkeypatch):
    """A factorisation is made ready without a device: each GPU here must have its float64 products."""
    on("H200")
    capabilities = {None: (9, 0), 0: (9, 0), 1: (10, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index])
    monkeypatch.setattr(triton_door, "version", lambda: (3, 6))
    for count, taken in ((1, True), (2, False)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert triton_door.has_products(torch.float64) == taken


# ---- float32 points in a float64 matrix


@pytest.fixture
def measured_again(monkeypatch):
    """Pairs that ``squared_distances`` has measured again."""
    found, measure_near = [], distance._measure_near
    monkeypatch.setattr(distance, "_DIRECT", 0)  # few points are all measured directly

    def counted(sq, mask, *args):
        found.append(int(mask.sum()))
        return measure_near(sq, mask, *args)

    monkeypatch.setattr(distance, "_measure_near", counted)
    monkeypatch.setattr(distance, "_DIRECT", 0)  # on the CPU few pairs are measured directly, all of them
    return found


def filled(kernel, X, rows):
    """k(X, X) in float64 by the blocks of a half matrix, mirrored."""
    n, write = len(X), backend.FactorKernels().rows(kernel, X)
    K = torch.zeros(n, n, dtype=torch.float64)
    for start in range(0, n, rows):
        stop = min(n, start + rows)
        K[start:stop, :stop] = write(torch.empty(stop - start, stop, dtype=torch.float64), start)
    return K.tril() + K.tril(-1).T


@pytest.mark.parametrize("name", ["collapsed 1e-2", "collapsed 1e-3", "collapsed 1e-6", "nested", "pairs", "offset"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_float64_matrix_for_a_solve(dtype, name, cloud, measured_again):
    """Of float32 points: within what their rounding has cost, 2^-24 |x| of every distance. Of float64 points: 1e-12."""
    X, kernel = cloud(name, d=24, dtype=dtype), Laplace(2.0)
    K = filled(kernel, X, 50)
    true = reference.kernel_matrix(kernel, X)
    error, size = (K - true).abs(), X.double().square().sum(1).max().sqrt()
    assert float(error.max()) <= (1e-12 if dtype == torch.float64 else 2.0**-24 * float(size) / 2.0)
    assert bool((K.diagonal() == 1).all())
    if name in ("collapsed 1e-2", "collapsed 1e-3", "pairs"):
        again = sum(measured_again)  # of float32 points the four pairs of copies, at most twice
        assert again <= 8 if dtype == torch.float32 else again > 100


def test_true_near_pairs_of_float32_points_are_measured(cloud, measured_again):
    """A few units in the last place apart: distances keep all their digits in float64."""
    X = cloud("spread", n=40, d=24, dtype=torch.float32)
    X[20:] = X[:20]
    X[20:, 3] = torch.nextafter(X[20:, 3], torch.full((20,), 9.0))
    r = (X[:20, 3].double() - X[20:, 3].double()).abs()
    K = filled(Laplace(1.0), X, 40)
    assert sum(measured_again) == 40  # each twice, in one block
    assert torch.allclose(K[:20, 20:].diagonal(), torch.exp(-r), rtol=4e-16, atol=0.0)


# ---- blocks of triangular solves and of products with one triangle


@pytest.mark.parametrize(("n", "rows"), [(100, 256), (4096, 256), (8000, 500), (16_384, 1024), (50_000, 1024)])
def test_rows_of_a_pass_over_a_matrix(n, rows):
    assert linalg._rows(cuda(n, n)) == rows
    assert linalg._rows(torch.empty(n, n, device="meta")) == 256
    assert rows == 256 or 8 * rows * n <= direct.WORKSPACE * 4 * n * n


@pytest.mark.parametrize("rows", [1, 50, 101, 256])
def test_passes_take_these_rows(rows, normal, relative, monkeypatch):
    solves, solve = [], torch.linalg.solve_triangular
    monkeypatch.setattr(
        torch.linalg, "solve_triangular", lambda L, B, **how: solves.append(len(L)) or solve(L, B, **how)
    )
    monkeypatch.setattr(linalg, "_rows", lambda A: rows)
    A, V = normal(101, 112)[:, :101] / 30 + 3.0 * torch.eye(101, dtype=torch.float64), normal(101, 3)
    wide = torch.zeros(101, 112, dtype=torch.float64)[:, :101].copy_(A)
    for matrix, count in ((wide, 2 * -(-101 // rows)), (A, 2)):  # rows with gaps between them, as on CUDA, and without
        solves.clear()
        assert relative(linalg.cholesky_solve(matrix, V), torch.cholesky_solve(V, A.tril())) <= 1e-13
        assert len(solves) == count
    symmetric = A.triu(1) + A.triu(1).T + 2.0 * torch.eye(101, dtype=torch.float64)
    assert relative(linalg.upper_matmul(A, 2.0, V), symmetric @ V) <= 1e-14


# ---- pages and benchmarks


@pytest.mark.parametrize(
    "text", [fastagop.__doc__, (Path(__file__).parents[1] / "docs" / "pages" / "gpu.md").read_text()]
)
def test_pages_warm_a_graph_up_with_the_form_that_it_captures(text):
    found = re.search(r"captured in a\s+CUDA graph after one call to warm up(.*?)\.\s", text, re.DOTALL)
    assert 'method="gradient"' in found[1]


def test_the_benchmark_of_near_pairs_shuffles_its_classes():
    """Sorted, a tenth of the tiles of 64 by 64 would have near pairs; shuffled, all have."""
    y = problems.collapsed(1280, 4, 1e-3).y
    assert torch.bincount(y).tolist() == [128] * 10
    assert all(len(part.unique()) == 10 for part in y.split(64))
