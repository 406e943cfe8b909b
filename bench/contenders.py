"""Who computes what: for each operation, fastagop and what people use today, on one problem.

A contender is a function of a ``Problem``; ``Unable`` says why it does not compete there. Each brings nothing ready to
the call: building the kernel matrix is part of solving.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from fastagop.kernels.radial import Radial

import fastagop
from bench import network_cpu, peers
from fastagop.deep_rfm import layer as layer_module


class Unable(Exception):
    """Why a contender does not compete."""


@dataclass(frozen=True)
class Problem:
    """Unit rows around ten centres, targets, coefficients; truths in float64 where they are small enough."""

    n: int
    d: int
    K: int
    kernel: Radial | None  # None for a neural network's problem
    device: torch.device

    ridge = 1e-3

    @property
    def what(self) -> str:
        """The kernel's name, or the network's."""
        return "MLP" if self.kernel is None else type(self.kernel).__name__

    @functools.cached_property
    def mlp(self) -> tuple[torch.nn.Sequential, torch.Tensor]:
        """The paper's MLP and n inputs."""
        model, X = network_cpu.problem(self.n)
        return model.to(self.device), X.to(self.device)

    @functools.cached_property
    def _draw(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        y = torch.arange(self.n) % 10
        X = torch.randn(10, self.d, generator=generator)[y] + 2.0 * torch.randn(self.n, self.d, generator=generator)
        X = torch.nn.functional.normalize(X).to(self.device)
        alpha = torch.randn(self.n, self.K, generator=generator).to(self.device)
        return X, alpha, y.to(self.device)

    @property
    def X(self) -> torch.Tensor:
        """Points (n, d)."""
        return self._draw[0]

    @property
    def alpha(self) -> torch.Tensor:
        """Coefficients, right-hand sides or targets (n, K)."""
        return self._draw[1]

    @property
    def y(self) -> torch.Tensor:
        """Classes (n,)."""
        return self._draw[2]

    @property
    def rows(self) -> torch.Tensor:
        """The rows on which results of n rows are checked."""
        return torch.linspace(0, self.n - 1, min(64, self.n), device=self.device).long()

    @functools.cached_property
    def K64(self) -> torch.Tensor:
        """Those rows of k(X, X) in float64, from direct differences."""
        r = torch.cdist(self.X[self.rows].double(), self.X.double(), compute_mode="donot_use_mm_for_euclid_dist")
        return peers.profile(self.kernel, r)


def _ours(call: Callable, **options) -> dict[str, Callable]:
    """fastagop by backend and, on CUDA, by precision."""
    ways = {"fastagop": {"backend": "torch"}, "fastagop keops": {"backend": "keops"}}
    ways |= {f"fastagop triton {p}": {"backend": "triton", "precision": p} for p in ("highest", "high", "medium")}

    def run(problem: Problem, how: dict):
        if how["backend"] == "keops":
            _few_features(problem)
        try:
            return call(problem, **how, **options)
        except fastagop.BackendUnavailable as reason:
            raise Unable(str(reason)) from None

    return {name: functools.partial(run, how=how) for name, how in ways.items()}


def _kernel(problem: Problem, kind: type[Radial], why: str) -> Radial:
    """The problem's kernel where it is of that kind, else why not."""
    if not isinstance(problem.kernel, kind):
        raise Unable(why)
    return problem.kernel


def _installed(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise Unable(f"{module} is not installed")


def _xrfm(method: str) -> Callable:
    def run(problem: Problem):
        _installed("xrfm")
        kernel = _kernel(problem, fastagop.Laplace, "xrfm's LaplaceKernel has no such kernel")
        return getattr(peers, method)(problem.X, problem.alpha, kernel.bandwidth)

    return run


def _sklearn_ridge(problem: Problem):
    """scikit-learn's KernelRidge, whose kernels include the Gaussian."""
    from sklearn.kernel_ridge import KernelRidge

    kernel = _kernel(problem, fastagop.Gaussian, "scikit-learn has no l2 Laplace kernel")
    if problem.device.type != "cpu":
        raise Unable("scikit-learn runs on the CPU")
    how: dict = {"gamma": 0.5 / kernel.bandwidth**2, "alpha": problem.ridge}
    model = KernelRidge(kernel="rbf", **how)
    return torch.from_numpy(model.fit(problem.X.numpy(), problem.alpha.numpy()).dual_coef_)


def _few_features(problem: Problem) -> None:
    if problem.device.type == "cpu" and problem.d > 100:
        raise Unable("KeOps takes minutes for so many features on a CPU")


def _lazy_gradients(problem: Problem):
    """KeOps by hand: a LazyTensor, differentiated by autograd output by output."""
    _installed("pykeops")
    _few_features(problem)
    return peers.lazy_gradients(problem.X, problem.alpha, problem.kernel)


def _lazy_agop(problem: Problem):
    G = _lazy_gradients(problem).reshape(-1, problem.d)
    return G.T @ G


def _kermac(problem: Problem):
    _installed("kermac")
    if problem.device.type != "cuda":
        raise Unable("kermac runs on CUDA")
    import kermac  # pyright: ignore[reportMissingImports]

    return kermac.cdist(problem.X, problem.X, p=2.0)


def _layer(problem: Problem, backend: str, precision: str = "highest") -> torch.Tensor:
    """A layer as the estimators train it, collapse measures included; M divided by its largest entry."""
    width = min(1024, problem.d)
    how = layer_module.Settings(problem.kernel, 1, "relu", width, None, problem.ridge, "max", precision, backend)
    Y = 2.0 * torch.nn.functional.one_hot(problem.y).to(problem.X) - 1.0
    return layer_module.train_layer(problem.X, Y, how, 0, problem.y)[0].agop


CONTENDERS: dict[str, dict[str, Callable]] = {
    "kernel_matrix": {
        **_ours(lambda p, **how: fastagop.kernel_matrix(p.kernel, p.X, **how)),
        "torch composition": lambda p: peers.kernel_matrix(p.X, p.kernel),
        "xrfm": _xrfm("xrfm_kernel_matrix"),
        "kermac (distances only)": _kermac,
    },
    "kernel_matmul": {
        **_ours(lambda p, **how: fastagop.kernel_matmul(p.kernel, p.X, None, p.alpha, **how)),
        "torch composition": lambda p: peers.kernel_matrix(p.X, p.kernel) @ p.alpha,
    },
    "gradients": {
        **_ours(lambda p, **how: fastagop.gradients(p.kernel, p.X, p.alpha, **how)),
        "torch composition": lambda p: peers.gradients(p.X, p.alpha, p.kernel),
        "KeOps LazyTensor": _lazy_gradients,
    },
    "agop": {
        **_ours(lambda p, **how: fastagop.agop(p.kernel, p.X, p.alpha, reduction="sum", **how)),
        "torch composition": lambda p: peers.composition(p.X, p.alpha, p.kernel),
        "xrfm": _xrfm("xrfm_agop"),
        "KeOps LazyTensor": _lazy_agop,
    },
    "solve": {
        **_ours(lambda p, **how: fastagop.solve(p.kernel, p.X, p.alpha, ridge=p.ridge, **how).alpha),
        "torch composition": lambda p: peers.solve(p.X, p.alpha, p.kernel, p.ridge),
        "scikit-learn KernelRidge": _sklearn_ridge,
    },
    "layer": {
        **_ours(_layer),
        "torch composition": lambda p: peers.layer(p.X, p.y, p.kernel, p.ridge),
    },
    "network_agop": {
        "fastagop": lambda p: network_cpu.ours(*p.mlp),
        "vmap(jacrev)": lambda p: network_cpu.jacobians(*p.mlp),
    },
}


def work(op: str, p: Problem) -> float:
    """The least floating-point operations that the result needs by the known ways, symmetry used."""
    n, d, K = float(p.n), float(p.d), float(p.K)
    if op == "network_agop":
        return network_cpu.work(p.n)
    agop = min(2 * n * n * d * (K + 1) + n * K * d * d, n * n * d * 2 + n**3 + 2 * n * d * d + 3 * n * n * K)
    return {
        "kernel_matrix": n * n * d,
        "kernel_matmul": n * n * d + 2 * n * n * K,
        "gradients": n * n * d + 2 * n * n * K * (d + 1),
        "agop": agop,
        "solve": n * n * d + n**3 / 3 + 2 * n * n * K,
        "layer": n * n * d + n**3 / 3 + agop + 2 * n * d * d,
    }[op]


def traffic(op: str, p: Problem) -> float:
    """The least bytes that must move: inputs read once, results written once, float32."""
    n, d, K = float(p.n), float(p.d), float(p.K)
    if op == "network_agop":
        return network_cpu.traffic(p.n)
    results = {
        "kernel_matrix": n * n,
        "kernel_matmul": 2 * n * K,
        "gradients": n * K + n * K * d,
        "agop": n * K + d * d,
        "solve": 2 * n * K,
        "layer": n * K + d * d + n * min(1024, d),
    }
    return 4.0 * (n * d + results[op])


def error(op: str, p: Problem, result) -> float:
    """Relative Frobenius error against float64; of "solve" the residual, of "layer" M's."""
    if op in ("kernel_matrix", "kernel_matmul"):
        truth = p.K64 if op == "kernel_matrix" else p.K64 @ p.alpha.double()
        return _relative(result[p.rows].double() - truth, truth)
    if op == "gradients":
        truth = peers.gradients(p.X.double(), p.alpha.double(), p.kernel, p.rows)
        return _relative(result[p.rows].double() - truth, truth)
    if op in ("agop", "layer"):
        truth = _agop64(p) if op == "agop" else _layer64(p)
        return _relative(result.double() - truth, truth)
    if op == "network_agop":
        return max(float((result[at].double() - M).norm() / M.norm()) for at, M in _network64(p).items())
    alpha, target = result.double().to(p.device), p.alpha[p.rows].double()
    return _relative(p.K64 @ alpha + p.ridge * alpha[p.rows] - target, target)


@functools.lru_cache(maxsize=2)
def _agop64(p: Problem) -> torch.Tensor:
    return fastagop.agop(p.kernel, p.X.double(), p.alpha.double(), reduction="sum", method="gradient", backend="torch")


@functools.lru_cache(maxsize=1)
def _layer64(p: Problem) -> torch.Tensor:
    return peers.layer(p.X.double(), p.y, p.kernel, p.ridge)


@functools.lru_cache(maxsize=1)
def _network64(p: Problem) -> network_cpu.Agops:
    model, X = p.mlp
    return network_cpu.jacobians(copy.deepcopy(model).double(), X.double(), 256)


def _relative(difference: torch.Tensor, truth: torch.Tensor) -> float:
    return float(difference.norm() / truth.norm())
