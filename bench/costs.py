"""What a result costs at least, and how wrong one is: operations, bytes, and the error against float64."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools

import torch

import fastagop
from bench import peers
from bench.problems import OUTPUTS, WIDTHS, Problem

_CHECKED = 64  # rows on which results of n rows are checked


def work(op: str, p: Problem) -> float:
    """The least floating-point operations that the result needs by the known ways, symmetry used."""
    n, d, K = float(p.n), float(p.d), float(p.K)
    if op == "network_agop":  # a forward pass, K vector-Jacobian products, and half of each layer's G^T G
        layers = list(itertools.pairwise(WIDTHS))
        weights = sum(a * b for a, b in layers) + WIDTHS[-1] * OUTPUTS
        return n * (2.0 * weights * (1 + OUTPUTS) + OUTPUTS * sum(min(a, b) ** 2 for a, b in layers))
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
        layers = itertools.pairwise(WIDTHS)
        return 4.0 * (n * WIDTHS[0] + sum(a * b for a, b in layers) + sum(a * a for a in WIDTHS[:-1]))
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
        truth = _kernel_rows(p) if op == "kernel_matrix" else _kernel_rows(p) @ p.alpha.double()
        return relative(result[_rows(p)].double() - truth, truth)
    if op == "gradients":
        truth = peers.gradients(p.X.double(), p.alpha.double(), p.kernel, _rows(p))
        return relative(result[_rows(p)].double() - truth, truth)
    if op in ("agop", "layer"):
        truth = agop64(p) if op == "agop" else _layer64(p)
        return relative(result.double() - truth, truth)
    if op == "network_agop":
        return largest_difference(result, _network64(p))
    alpha, target = result.double().to(p.device), p.alpha[_rows(p)].double()
    return relative(_kernel_rows(p) @ alpha + p.ridge * alpha[_rows(p)] - target, target)


def relative(difference: torch.Tensor, truth: torch.Tensor) -> float:
    """Frobenius norm of a difference over that of the truth."""
    return float(difference.norm() / truth.norm())


def largest_difference(result: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of the AGOPs of a network's layers."""
    return max(relative(result[at] - M.to(result[at].dtype), M) for at, M in truth.items())


def _rows(p: Problem) -> torch.Tensor:
    return torch.linspace(0, p.n - 1, min(_CHECKED, p.n), device=p.device).long()


@functools.lru_cache(maxsize=1)
def _kernel_rows(p: Problem) -> torch.Tensor:
    """The checked rows of k(X, X) in float64, from direct differences."""
    r = torch.cdist(p.X[_rows(p)].double(), p.X.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return peers.profile(p.kernel, r)


@functools.lru_cache(maxsize=1)
def agop64(p: Problem, method: str = "gradient") -> torch.Tensor:
    """The AGOP by the torch backend in float64."""
    options = {"reduction": "sum", "method": method, "backend": "torch"}
    return fastagop.agop(p.kernel, p.X.double(), p.alpha.double(), **options)


@functools.lru_cache(maxsize=1)
def _layer64(p: Problem) -> torch.Tensor:
    return peers.layer(p.X.double(), p.y, p.kernel, p.ridge)


@functools.lru_cache(maxsize=1)
def _network64(p: Problem) -> dict[str, torch.Tensor]:
    double = dataclasses.replace(p, X=p.X.double(), model=copy.deepcopy(p.model).double())
    return peers.jacobians(double, 256)
