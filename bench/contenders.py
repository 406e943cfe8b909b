"""Who computes what: for each operation, fastagop and what people use today, on one problem.

A contender is a function of a ``Problem``; ``Unable`` says why it does not compete there. Each brings nothing ready to
the call: building the kernel matrix is part of solving.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping

import torch
from fastagop.kernels.radial import Radial

import fastagop
from bench import peers
from bench.harness import Contender
from bench.problems import LAYERS, Problem
from fastagop import network
from fastagop.deep_rfm import layer as layer_module

BACKENDS: dict[str, dict] = {"fastagop": {"backend": "torch"}, "fastagop keops": {"backend": "keops"}}
FUSED: dict[str, dict] = {
    f"fastagop triton {precision}": {"backend": "triton", "precision": precision}
    for precision in ("highest", "high", "medium")
}


class Unable(ValueError):
    """Why a contender does not compete."""


def kernel_matrix(p: Problem, **options):
    """k(X, X)."""
    return fastagop.kernel_matrix(p.kernel, p.X, **options)


def kernel_matmul(p: Problem, **options):
    """k(X, X) alpha without k(X, X)."""
    return fastagop.kernel_matmul(p.kernel, p.X, None, p.alpha, **options)


def gradients(p: Problem, **options):
    """Gradients at the points."""
    return fastagop.gradients(p.kernel, p.X, p.alpha, **options)


def agop(p: Problem, **options):
    """Sum of the gradients' outer products."""
    return fastagop.agop(p.kernel, p.X, p.alpha, reduction="sum", **options)


def solve(p: Problem, **options):
    """The solution, with what happened on the way; the problem's ridge unless another is named."""
    return fastagop.solve(p.kernel, p.X, p.alpha, **{"ridge": p.ridge, **options})


def fastagop_by(call: Callable, ways: Mapping[str, dict], **options) -> dict[str, Contender]:
    """Contenders that make a call of fastagop in several ways; a backend that cannot serve says why."""

    def run(problem: Problem, way: dict):
        try:
            return call(problem, **way, **options)
        except fastagop.BackendUnavailable as reason:
            raise Unable(str(reason)) from None

    return {name: functools.partial(run, way=way) for name, way in ways.items()}


def _every_way(call: Callable) -> dict[str, Contender]:
    """fastagop by backend and, on CUDA, by precision; KeOps where it does not take minutes."""
    made = fastagop_by(call, BACKENDS | FUSED)
    keops = made["fastagop keops"]

    def few(problem: Problem):
        _few_features(problem)
        return keops(problem)

    return made | {"fastagop keops": few}


def _kernel(problem: Problem, kind: type[Radial], why: str) -> Radial:
    """The problem's kernel where it is of that kind, else why not."""
    if not isinstance(problem.kernel, kind):
        raise Unable(why)
    return problem.kernel


def installed(module: str) -> None:
    """Unable where a package is not there."""
    if importlib.util.find_spec(module) is None:
        raise Unable(f"{module} is not installed")


def present(contenders: Mapping[str, Contender]) -> dict[str, Contender]:
    """The contenders that can run: without those named after xrfm where it is not installed, of which a line tells."""
    try:
        installed("xrfm")
    except Unable as reason:
        print(f"{reason}: measured without it")
        return {name: run for name, run in contenders.items() if not name.startswith("xrfm")}
    return dict(contenders)


def _xrfm(method: str) -> Contender:
    def run(problem: Problem):
        installed("xrfm")
        kernel = _kernel(problem, fastagop.Laplace, "xrfm's LaplaceKernel has no such kernel")
        return getattr(peers, method)(problem.X, problem.alpha, kernel.bandwidth)

    return run


def _sklearn_ridge(problem: Problem):
    """scikit-learn's KernelRidge, whose kernels include the Gaussian."""
    from sklearn.kernel_ridge import KernelRidge

    kernel = _kernel(problem, fastagop.Gaussian, "scikit-learn has no l2 Laplace kernel")
    if problem.device.type != "cpu":
        raise Unable("scikit-learn runs on the CPU")
    options: dict = {"gamma": 0.5 / kernel.bandwidth**2, "alpha": problem.ridge}
    model = KernelRidge(kernel="rbf", **options)
    return torch.from_numpy(model.fit(problem.X.numpy(), problem.alpha.numpy()).dual_coef_)


def _few_features(problem: Problem) -> None:
    if problem.device.type == "cpu" and problem.d > 100:
        raise Unable("KeOps takes minutes for so many features on a CPU")


def _lazy_gradients(problem: Problem):
    """KeOps by hand: a LazyTensor, differentiated by autograd output by output."""
    installed("pykeops")
    _few_features(problem)
    return peers.lazy_gradients(problem.X, problem.alpha, problem.kernel)


def _lazy_agop(problem: Problem):
    G = _lazy_gradients(problem).reshape(-1, problem.d)
    return G.T @ G


def _kermac(problem: Problem):
    installed("kermac")
    if problem.device.type != "cuda":
        raise Unable("kermac runs on CUDA")
    import kermac  # pyright: ignore[reportMissingImports]

    return kermac.cdist(problem.X, problem.X, p=2.0)


def _layer(problem: Problem, backend: str, precision: str = "highest") -> torch.Tensor:
    """A layer as the estimators train it, collapse measures included; M divided by its largest entry."""
    width = min(1024, problem.d)
    options = layer_module.Settings(
        kernel=problem.kernel, depth=1, features="relu", width=width,
        ridge=problem.ridge, precision=precision, backend=backend,
    )  # fmt: skip
    Y = 2.0 * torch.nn.functional.one_hot(problem.y).to(problem.X) - 1.0
    return layer_module.train_layer(problem.X, Y, options, 0, problem.y)[0].agop


OPERATIONS: dict[str, dict[str, Contender]] = {
    "kernel_matrix": {
        **_every_way(kernel_matrix),
        "torch composition": lambda p: peers.kernel_matrix(p.X, p.kernel),
        "xrfm": _xrfm("xrfm_kernel_matrix"),
        "kermac (distances only)": _kermac,
    },
    "kernel_matmul": {
        **_every_way(kernel_matmul),
        "torch composition": lambda p: peers.kernel_matrix(p.X, p.kernel) @ p.alpha,
    },
    "gradients": {
        **_every_way(gradients),
        "torch composition": lambda p: peers.gradients(p.X, p.alpha, p.kernel),
        "KeOps LazyTensor": _lazy_gradients,
    },
    "agop": {
        **_every_way(agop),
        "torch composition": lambda p: peers.composition(p.X, p.alpha, p.kernel),
        "xrfm": _xrfm("xrfm_agop"),
        "KeOps LazyTensor": _lazy_agop,
    },
    "solve": {
        **_every_way(lambda p, **options: solve(p, **options).alpha),
        "torch composition": lambda p: peers.solve(p.X, p.alpha, p.kernel, p.ridge),
        "scikit-learn KernelRidge": _sklearn_ridge,
    },
    "layer": {
        **_every_way(_layer),
        "torch composition": lambda p: peers.layer(p.X, p.y, p.kernel, p.ridge),
    },
    "network_agop": {
        "fastagop": lambda p: network.agop(p.model, p.X, LAYERS),
        "vmap(jacrev)": peers.jacobians,
    },
}
