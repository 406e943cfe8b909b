"""What is neither radial nor a Linear layer, on the CPU: l1 kernels, convolutions, many outputs, each beside its peer.

* The AGOP of the l1 Laplace kernel beside xrfm's, at equal points and coefficients.
* The patch AGOP of the last block of a VGG, two convolutions, beside ``vmap(jacrev)`` of the rest of it at patches.
* A network of 2000 outputs by 64 random combinations, beside the same network with 64 outputs, which need none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.func import jacrev, vmap
from torch.nn import functional

import fastagop
from bench import costs, files, harness, peers, problems
from bench.contenders import present
from fastagop import network

L1 = fastagop.ProductLaplace(10.0)
_SIDE, _CHANNELS = 4, 128  # of what the block sees, for images of 32 x 32
_MANY, _SKETCH = 2000, 64  # outputs, combinations
_WIDTHS = problems.WIDTHS[:3]
ROWS = {"l1": 2000, "convolutions": 256, "outputs": 300}


@dataclasses.dataclass(frozen=True, eq=False)
class Images(problems.Problem):
    """``X`` are images (n, c, h, w) here."""

    @property
    def d(self) -> int:
        """Numbers of an image."""
        return self.X[0].numel()


def l1(n: int) -> problems.Problem:
    """Standard normal points among 100 features, coefficients of 5 outputs."""
    return problems.normal(n, 100, 5, torch.float32)


def convolutions(n: int) -> Images:
    """Gaussian channels and two convolutions 3 x 3 before ten outputs."""
    torch.manual_seed(0)
    first, second = (nn.Conv2d(_CHANNELS, _CHANNELS, 3, padding=1) for _ in range(2))
    last = nn.Linear((_SIDE // 2) ** 2 * _CHANNELS, 10)
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), last)
    X, nothing = torch.randn(n, _CHANNELS, _SIDE, _SIDE), torch.zeros(n, 10)
    return Images(X, nothing, torch.zeros(n, dtype=torch.long), None, model)


def outputs(n: int, K: int = _MANY) -> problems.Problem:
    """Two hidden layers before K outputs."""
    torch.manual_seed(0)
    a, b, c = _WIDTHS
    model = nn.Sequential(nn.Linear(a, b), nn.ReLU(), nn.Linear(b, c), nn.ReLU(), nn.Linear(c, K))
    return problems.Problem(torch.randn(n, a), torch.zeros(n, K), torch.zeros(n, dtype=torch.long), None, model)


def patch_jacobians(p: problems.Problem) -> dict[str, torch.Tensor]:
    """vmap(jacrev) with respect to the patches that a convolution multiplies, and one product for its AGOP."""
    found, X = {}, p.X
    with torch.no_grad():
        for i, module in enumerate(p.model):
            if isinstance(module, nn.Conv2d):
                J = vmap(jacrev(_of_patches(module, p.model[i + 1 :], X.shape[-1])), chunk_size=16)(_patches(module, X))
                J = J.transpose(-1, -2).reshape(-1, J.shape[-2])
                found[str(i)] = J.T @ J / len(X)
            X = module(X)
    return found


def _patches(conv: nn.Conv2d, X: torch.Tensor) -> torch.Tensor:
    return functional.unfold(X, 3, padding=1)


def _of_patches(conv: nn.Conv2d, rest: nn.Sequential, side: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """f of the patches (c k k, positions) of one image."""
    assert conv.bias is not None
    W, b = conv.weight.flatten(1), conv.bias

    def f(patches: torch.Tensor) -> torch.Tensor:
        return rest((W @ patches + b[:, None]).view(1, -1, side, side))[0]

    return f


PAIRS: dict[str, dict[str, Callable[[Any], Any]]] = {
    "l1": {
        "fastagop l1": lambda p: fastagop.agop(L1, p.X, p.alpha, reduction="sum"),
        "xrfm l1": lambda p: peers.xrfm_l1_agop(p.X, p.alpha, L1.bandwidth),
        "torch composition l1": lambda p: peers.l1_agop(p.X, p.alpha, L1.bandwidth),
    },
    "convolutions": {
        "fastagop convolutions": lambda p: network.agop(p.model, p.X, layers=["0", "2"]),
        "vmap(jacrev) at patches": patch_jacobians,
    },
    "outputs": {
        "64 combinations of 2000 outputs": lambda p: network.agop(p.model, p.X, sketch=_SKETCH),
        "64 outputs": lambda p: network.agop(_narrow(p), p.X) and None,  # it is another network: no error to tell
    },
}
CONTENDERS = {name: run for pair in PAIRS.values() for name, run in pair.items()}
_MAKES = {"l1": l1, "convolutions": convolutions, "outputs": outputs}


def _narrow(p: problems.Problem) -> nn.Sequential:
    """The network with the first outputs alone."""
    last, wide = nn.Linear(_WIDTHS[-1], _SKETCH), p.model[-1]
    assert isinstance(wide, nn.Linear)
    with torch.no_grad():
        last.weight.copy_(wide.weight[:_SKETCH])
    return nn.Sequential(*p.model[:-1], last)


def problem(n: int, which: int = 0) -> problems.Problem:
    """The problem of a case by its number, for a process that measures one contender."""
    return list(_MAKES.values())[which](n)


def truth(case: str, p: problems.Problem) -> Any:
    """In float64 by the definition; by Jacobians in the same dtype, in which ReLUs agree; over all outputs."""
    if case == "l1":
        return peers.l1_agop(p.X.double(), p.alpha.double(), L1.bandwidth)
    return network.agop(p.model, p.X) if case == "outputs" else patch_jacobians(p)


def error(case: str, true: Any, found: Any) -> float | None:
    """The largest relative difference of a matrix; of random combinations it is their sampling error."""
    if found is None:
        return None
    if case == "l1":
        return costs.relative(found.double() - true, true)
    return max(costs.relative(found[name].double() - M, M) for name, M in true.items())


def main(out: Path, repeats: int) -> None:
    """Measure every pair in turns, print the table, write the result file."""
    rows = []
    for number, (case, pair) in enumerate(PAIRS.items()):
        n = ROWS[case]
        p = _MAKES[case](n)
        true = truth(case, p)
        found = harness.Harness(repeats=repeats).rows(
            present(pair), p, lambda _, result, case=case, true=true: error(case, true, result)
        )
        for row in found:
            row["peak_bytes"] = harness.alone("beyond_cpu", row["contender"], n, number)["peak_bytes"]
        rows += [{"case": case, "n": n} | row for row in found]
        print(table(rows[-len(pair) :]).splitlines()[-1], flush=True)
    files.write_result(out, {"repeats": repeats, "rows": rows})
    print(table(rows))


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    columns = {"": "{case}", "n": "{n}", " ": "{contender}", "seconds": "{seconds:.3g}"}
    columns |= {"times the first": "{ratio:.2f}", "peak memory": "{peak}", "error of M": "{off}"}
    made = [row | {"off": "" if row["error"] is None else f"{row['error']:.0e}"} for row in rows]
    return files.markdown(columns, made)
