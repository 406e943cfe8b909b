"""Every operation, every contender: ``pytest bench --benchmark-only`` (``--quick``: small sizes).

The error against float64 stands beside each time, so that nobody wins by being wrong.
"""

import pytest

from bench.contenders import OPERATIONS
from fastagop import Gaussian, Laplace

# (n, d, K): many points, few features; the paper's MNIST and its classes; many outputs. Growing n draws the plot.
SIZES = {
    "kernel_matrix": [(4000, 784, 1), (4000, 16, 1)],
    "kernel_matmul": [(4000, 784, 10), (10000, 16, 10)],
    "gradients": [(2000, 784, 10), (2000, 16, 10)],
    "agop": [(500, 784, 10), (1000, 784, 10), (2000, 784, 10), (4000, 784, 10), (2000, 784, 100), (4000, 16, 10)],
    "solve": [(2000, 784, 10), (4000, 784, 10)],
    "layer": [(2000, 784, 10), (4000, 784, 10)],
    "network_agop": [(2000, 784, 10)],
}
QUICK = {op: [(min(n, 800), d, min(K, 10)) for n, d, K in sizes[:2]] for op, sizes in SIZES.items()}
KERNELS = {"Laplace": Laplace(2.0), "Gaussian": Gaussian(2.0), "MLP": None}
OF = {"kernel_matrix": ("Laplace", "Gaussian"), "solve": ("Laplace", "Gaussian"), "network_agop": ("MLP",)}


def pytest_generate_tests(metafunc):
    quick = metafunc.config.getoption("--quick")
    op = metafunc.function.__name__.removeprefix("test_")
    sizes = dict.fromkeys((QUICK if quick else SIZES)[op])  # a size that two shrink to is taken once
    cases = [
        pytest.param(op, size, kernel, name, id=f"{size[0]}x{size[1]}x{size[2]}-{kernel}-{name.replace(' ', '_')}")
        for size in sizes
        for kernel in OF.get(op, ("Laplace",))
        for name in OPERATIONS[op]
    ]
    metafunc.parametrize(("op", "size", "kernel", "contender"), cases)


def _test(op):
    def test(op, size, kernel, contender, problem, measure):
        measure(op, problem(*size, KERNELS[kernel]), contender)

    test.__name__ = f"test_{op}"
    return test


test_kernel_matrix = _test("kernel_matrix")
test_kernel_matmul = _test("kernel_matmul")
test_gradients = _test("gradients")
test_agop = _test("agop")
test_solve = _test("solve")
test_layer = _test("layer")
test_network_agop = _test("network_agop")
