"""First contact, the operations: their accuracy against float64, near pairs, and the peers' times.

The truths share no code with what they check: distances by differences, weights and products by hand (``bench.peers``),
and for duplicates the float64 reference in NumPy. They are made inside the try of the first case that asks.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from fastagop.kernels import reference

import fastagop
from bench import contenders, costs, problems
from bench import peers as by_hand
from bench.first_contact_run import Run, relative
from bench.problems import LAPLACE, Problem

PRECISIONS = ("highest", "high", "medium")
_MANY = 10_000  # rows from which on peers are timed only


@dataclass
class Points:
    """A problem, and its float64 results, each made when it is asked for."""

    name: str
    problem: Problem
    duplicates: bool = False

    @functools.cached_property
    def wide(self) -> Problem:
        """The problem in float64."""
        p = self.problem
        return replace(p, X=p.X.double(), alpha=p.alpha.double())

    @functools.cached_property
    def matrix(self) -> torch.Tensor:
        """k(X, X)."""
        if self.duplicates:
            return reference.kernel_matrix(self.problem.kernel, self.problem.X).to(self.problem.device)
        r = torch.cdist(self.wide.X, self.wide.X, compute_mode="donot_use_mm_for_euclid_dist")
        return by_hand.profile(self.problem.kernel, r)

    @functools.cached_property
    def product(self) -> torch.Tensor:
        """k(X, X) alpha."""
        return self.matrix @ self.wide.alpha

    @functools.cached_property
    def gradients(self) -> torch.Tensor:
        """Of all outputs at all points (n, K, d)."""
        p = self.wide
        if self.duplicates:
            return reference.gradients(p.kernel, p.X, p.alpha).to(p.device)
        return by_hand.gradients(p.X, p.alpha, p.kernel)

    @functools.cached_property
    def agop(self) -> torch.Tensor:
        """The sum of the gradients' outer products."""
        G = self.gradients.reshape(-1, self.problem.d)
        return G.T @ G

    def residual(self, alpha: torch.Tensor, ridge: float) -> float:
        """||(k + ridge I) alpha - Y|| / ||Y||, Y being the problem's coefficients taken as targets."""
        Y, a = self.wide.alpha, alpha.double()
        return costs.relative(self.matrix @ a + ridge * a - Y, Y)


def accuracy(run: Run) -> None:
    """The relative error of every operation by backend and precision, on points that hurt."""
    clouds = [(make.keywords["name"], functools.cache(make)) for make in _clouds(run)]
    for backend, precision in _ways(run):
        for index, (name, points) in enumerate(clouds):
            if run.dry and index and precision == "medium":  # the interpreter computes it as "highest"
                continue
            for operation, error in _errors(backend, precision).items():
                if run.dry and index and (backend != "triton" or operation not in ("kernel_matrix", "gradients")):
                    continue
                case = f"{operation}, {backend} {precision}, {name}"
                run.record(case, functools.partial(_judged, points, error), backend=backend, precision=precision)


def _judged(points: Callable[[], Points], error: Callable[[Points], Any]) -> dict[str, Any]:
    found = error(points())
    facts = {"n": points().problem.n, "d": points().problem.d, "K": points().problem.K}
    return facts | (found if isinstance(found, dict) else {"error": found})


def _ways(run: Run) -> Iterator[tuple[str, str]]:
    yield "triton", "highest"
    yield "torch", "highest"
    for precision in PRECISIONS[1:]:
        if not (run.dry and precision == "high"):  # the interpreter has no bf16 products
            yield "triton", precision
    if not run.dry and importlib.util.find_spec("pykeops"):  # a formula takes it long to compile
        yield "keops", "highest"


def _clouds(run: Run) -> list[functools.partial[Points]]:
    """Sizes that tiles divide and that they do not, classes that have collapsed, an offset, copies of rows."""
    size = (run.few(2048, 32), run.few(1024, 32), run.few(10, 2))
    odd = (run.few(3001, 31), run.few(1000, 15), 1)
    few = (run.few(150, 30), run.few(37, 19), 2)

    def drawn(name: str, n: int, d: int, K: int) -> Points:
        return Points(name, problems.draw(n, d, K, device=run.device))

    def collapsed(name: str, n: int, d: int, K: int) -> Points:
        p = problems.draw(n, d, K, device=run.device)
        return Points(name, replace(p, X=problems.collapsed(n, d, 1e-3, run.device).X))

    def offset(name: str, n: int, d: int, K: int) -> Points:
        p = problems.draw(n, d, K, device=run.device)
        return Points(name, replace(p, X=p.X + 10.0))

    def copies(name: str, n: int, d: int, K: int) -> Points:
        p = problems.draw(n, d, K, device=run.device)
        X = p.X.clone()
        X[n // 2 :] = X[: n - n // 2]
        return Points(name, replace(p, X=X), duplicates=True)

    made = [(drawn, "aligned", size), (drawn, "odd, K = 1", odd), (collapsed, "collapsed to 1e-3", size)]
    made += [(offset, "offset 10", few), (copies, "copies of rows", few)]
    return [functools.partial(make, name=name, n=n, d=d, K=K) for make, name, (n, d, K) in made]


def _errors(backend: str, precision: str) -> dict[str, Callable[[Points], Any]]:
    how: dict[str, Any] = {"backend": backend, "precision": precision}

    def agop(at: Points, method: str) -> dict[str, Any]:
        p = at.problem
        M = fastagop.agop(p.kernel, p.X, p.alpha, reduction="sum", method=method, **how)
        return {"error": relative(M, at.agop), "bound_by": "the truth's own gradients"}

    def solved(at: Points, method: Any, ridge: float) -> dict[str, Any]:
        p = at.problem
        found = fastagop.solve(p.kernel, p.X, p.alpha, ridge=ridge, method=method, **how)
        facts = {"method": found.method, "dtype": str(found.dtype), "iterations": found.iterations}
        facts |= {"jitter": found.jitter, "merged": found.merged, "said": found.residual, "fallback": found.fallback}
        return {"error": at.residual(found.alpha, ridge), **facts}

    made: dict[str, Callable[[Points], Any]] = {
        "kernel_matrix": lambda at: relative(fastagop.kernel_matrix(at.problem.kernel, at.problem.X, **how), at.matrix),
        "kernel_matmul": lambda at: relative(
            fastagop.kernel_matmul(at.problem.kernel, at.problem.X, None, at.problem.alpha, **how), at.product
        ),
        "gradients": lambda at: relative(
            fastagop.gradients(at.problem.kernel, at.problem.X, at.problem.alpha, **how), at.gradients
        ),
        "agop, gradient form": lambda at: agop(at, "gradient"),
        "agop, auto": lambda at: agop(at, "auto"),
        "solve, ridge 1e-3": lambda at: solved(at, "auto", 1e-3),
        "solve, ridge 0": lambda at: solved(at, "auto", 0.0),
    }
    if backend == "triton" and precision == "highest":
        made["float64 fill"] = _fill
        made["solve by cholesky+cg"] = lambda at: solved(at, "cholesky+cg", 1e-3)
    return made


def _fill(at: Points) -> float:
    """The float64 kernel matrix that a factorisation starts from."""
    from fastagop.kernels.triton_backend import launch

    p = at.problem
    out = torch.empty(p.n, p.n, dtype=torch.float64, device=p.device)
    return relative(launch.fill_symmetric(out, LAPLACE, p.X), at.matrix)


def near(run: Run) -> None:
    """What near pairs cost: collapsed classes in sorted and in shuffled order, beside points without any."""
    n, d = min(run.sizes.n, 30_000), run.sizes.d
    spreads = (1e-3,) if run.dry else (1e-1, 1e-2, 1e-3)
    orders = ("shuffled",) if run.dry else ("sorted", "shuffled")
    kinds = [(None, "as drawn"), *((spread, order) for spread in spreads for order in orders)]
    calls: dict[str, Callable[[Problem], Callable]] = {"kernel_matrix": _matrix_of, "float64 fill": _fill_of}
    for operation, call in (calls | {"gradient form": _form_of}).items():  # the last may take long
        for spread, order in kinds:

            def prepare(spread=spread, order=order, call=call) -> Callable:
                return call(_crowded(run, n, d, spread, order))

            facts = {"n": n, "d": d, "spread": spread, "order": order}
            work = 1.0 * n * n * d * (1.0 if operation != "gradient form" else 2.0 * (run.sizes.K + 1))
            name = f"{operation}, spread {spread:g}, {order}" if spread else f"{operation}, no near pairs"
            run.measure(name, prepare, repeats=2, flop=work, **facts)


def _crowded(run: Run, n: int, d: int, spread: float | None, order: str) -> Problem:
    p = run.problem(n, d)
    if spread is None:
        return p
    crowded = problems.collapsed(n, d, spread, run.device)
    mixed = torch.randperm(n, generator=torch.Generator().manual_seed(0)).to(run.device)
    rows = crowded.y.argsort(stable=True) if order == "sorted" else mixed
    return replace(p, X=crowded.X[rows].contiguous())


def _matrix_of(p: Problem) -> Callable:
    out = p.X.new_empty(p.n, p.n)
    return lambda: fastagop.kernel_matrix(p.kernel, p.X, out=out, backend="triton")


def _fill_of(p: Problem) -> Callable:
    from fastagop.kernels.triton_backend import launch

    out = torch.empty(p.n, p.n, dtype=torch.float64, device=p.device)
    return lambda: launch.fill_symmetric(out, LAPLACE, p.X)


def _form_of(p: Problem) -> Callable:
    return lambda: fastagop.agop(p.kernel, p.X, p.alpha, method="gradient", backend="triton")


def peers(run: Run) -> None:
    """Every operation by fastagop and by what people use today; what is not installed is a failure that says so."""
    some = [(name, False) for name in contenders.OPERATIONS if name != "network_agop"]
    for operation, compiles in [*some, *((name, True) for name, _ in some)]:
        for n in (run.sizes.n,) if run.dry else (10_000, run.sizes.n):
            p = functools.cache(functools.partial(run.problem, n))
            for name, call in contenders.OPERATIONS[operation].items():
                if ("keops" in name.lower()) != compiles or _left_out(run, operation, n, name):
                    continue

                def prepare(call=call, p=p) -> Callable:
                    problem = p()
                    return lambda: call(problem)

                def error(result: Any, operation=operation, p=p) -> float:
                    return costs.error(operation, p(), result)

                judge = None if n > _MANY or operation in ("layer", "agop") else error
                facts = {"n": n, "d": run.sizes.d, "K": run.sizes.K, "operation": operation, "contender": name}
                work = costs.work(operation, problems.Problem(*_shapes(run, n)))
                run.measure(f"{operation}, n = {n}, {name}", prepare, judge, 2, flop=work, **facts)


def _left_out(run: Run, operation: str, n: int, name: str) -> bool:
    """What takes (n, K, d) numbers, minutes, or says nothing where it runs."""
    if run.dry and ("keops" in name.lower() or "xrfm" in name):
        return True
    if {"high", "medium"} & set(name.split()) and (run.dry or operation == "layer"):
        return True
    return n > _MANY and (operation in ("gradients", "layer") or "xrfm" in name)


def _shapes(run: Run, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tensors without memory, of the problem's shapes."""
    d, K = run.sizes.d, run.sizes.K
    return torch.empty(n, d, device="meta"), torch.empty(n, K, device="meta"), torch.empty(n, device="meta")
