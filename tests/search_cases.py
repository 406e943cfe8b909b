"""A random search for small calls that are wrong: values that hurt, against sums in long double.

    python tests/search_cases.py 20000         # seed 0: the worst error of each operation, every call beyond its bound
    python tests/search_cases.py 20000 7       # another seed
    python tests/search_cases.py --call 7 123  # one call again, in words

The truth shares no code with the library: differences of points, profiles written from their formulas, plain sums. An
error is measured against what rounding may do (docs/pages/numerics.md): every pair's weight and difference have a few
rounding errors of their own size, so a gradient may be off by
TOLERANCE eps sum_j |w_ij alpha_jc| r_ij (1 + |d ln w / d ln r|); values below the dtype's smallest number may be lost.
A gram form that was asked for by name and warns has said what it loses.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch

import fastagop

Long = np.longdouble
# Of gradients, docs/pages/numerics.md; of squared distances, and thereby of values, kernels/distance.py.
TOLERANCE = {torch.float32: 64.0, torch.float64: 512.0}
VALUES = {torch.float32: 1e-5, torch.float64: 1e-12}
# What of M the gram form may lose: with "auto", and where it is asked for by name and does not warn.
AUTO, NAMED = {torch.float32: 2e-5, torch.float64: 1e-11}, 3e-5


@dataclass
class Call:
    """One call with random arguments, drawn from (seed, number)."""

    seed: int
    number: int
    words: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.rng = np.random.default_rng([self.seed, self.number])
        self.dtype = self.pick("dtype", [torch.float32, torch.float64])
        self.n = int(self.pick("n", [1, 2, 3, 8, 20, 33]))
        self.d = int(self.pick("d", [1, 2, 3, 5, 8, 17]))
        self.outputs = int(self.pick("K", [1, 1, 2, 5]))
        self.X = self.points(self.n)
        self.kernel = self.draw_kernel()
        self.alpha = self.coefficients(self.n, self.outputs)
        self.Z = self.evaluation_points()

    def pick(self, name: str, options: list):
        value = options[int(self.rng.integers(len(options)))]
        self.words.append(f"{name}={value}")
        return value

    def normal(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape)

    def points(self, n: int) -> torch.Tensor:
        """A cloud of rows, as a tensor that need not be contiguous."""
        d, kind = self.d, self.pick("cloud", list(CLOUDS))
        X = CLOUDS[kind](self, n, d)
        scale = float(self.pick("scale", [1.0, 1.0, 1.0, 1e-3, 1e5, 1e-13, 1e-25, 1e-38, 1e-41, 1e13, 1e18]))
        with np.errstate(all="ignore"):
            X = (X * scale).astype(np.float32 if self.dtype == torch.float32 else np.float64)
        tensor = torch.from_numpy(np.ascontiguousarray(X))
        layout = self.pick("layout", ["plain", "plain", "transposed", "strided"])
        if layout == "transposed":
            return tensor.T.contiguous().T
        if layout == "strided":
            wide = tensor.new_zeros(2 * n, d + 3)
            wide[::2, 1 : d + 1] = tensor
            return wide[::2, 1 : d + 1]
        return tensor

    def draw_kernel(self):
        """A kernel whose bandwidth is related to the points' size, mostly."""
        size = float(np.median(np.abs(self.X.numpy()))) or 1.0
        factor = 10.0 ** float(self.pick("log10 bandwidth / size", [-2, -1, 0, 0.5, 1, 2, 4]))
        L = min(max(size * factor, 1e-300), 1e300)
        name = self.pick("kernel", ["Laplace", "Gaussian", "GeneralisedLaplace", "Matern52"])
        if name == "GeneralisedLaplace":
            return fastagop.GeneralisedLaplace(L, float(self.pick("exponent", [0.5, 1.0, 1.3, 2.0])))
        return getattr(fastagop, name)(L)

    def coefficients(self, n: int, K: int) -> torch.Tensor:
        kind = self.pick("alpha", ["normal", "normal", "cancelling", "zero", "tiny", "huge", "one", "decades"])
        A = self.normal(n, K)
        if kind == "cancelling":
            A -= A.mean(0)
            A *= 1e3
        A *= {"zero": 0.0, "tiny": 1e-30, "huge": 1e6}.get(kind, 1.0)
        if kind == "one":
            A[1:] = 0.0
        if kind == "decades":
            A *= 10.0 ** self.rng.uniform(-6, 6, size=(n, 1))
        return torch.from_numpy(A).to(self.dtype)

    def evaluation_points(self) -> torch.Tensor | None:
        kind = self.pick("Z", ["none", "none", "X", "subset", "other", "near", "one"])
        if kind == "none":
            return None
        if kind == "X":
            return self.X
        if kind == "subset":
            return self.X[:: int(self.rng.integers(1, 4))]
        if kind == "one":
            return self.X[:1] * 1.5
        if kind == "near":
            eps = torch.finfo(self.dtype).eps
            return self.X * (1 + 3 * eps * torch.from_numpy(self.normal(self.n, self.d)).to(self.dtype))
        return self.X.flip(0) + 0.5 * self.X

    def __str__(self):
        return ", ".join(self.words)


def _duplicates(call: Call, n: int, d: int) -> np.ndarray:
    return call.normal(max(1, n // 3), d)[call.rng.integers(max(1, n // 3), size=n)]


CLOUDS = {
    "normal": lambda call, n, d: call.normal(n, d),
    "collapsed": lambda call, n, d: call.normal(3, d)[np.arange(n) % 3] + 1e-4 * call.normal(n, d),
    "collapsed further": lambda call, n, d: call.normal(3, d)[np.arange(n) % 3] + 1e-6 * call.normal(n, d),
    "nested": lambda call, n, d: (
        call.normal(2, d)[np.arange(n) % 2] + 1e-2 * call.normal(4, d)[np.arange(n) % 4] + 1e-5 * call.normal(n, d)
    ),
    "pairs": lambda call, n, d: call.normal(n, d)[np.arange(n) // 2] + 1e-4 * call.normal(n, d),
    "duplicates": _duplicates,
    "one point": lambda call, n, d: np.repeat(call.normal(1, d), n, 0),
    "offset": lambda call, n, d: 1e3 + call.normal(n, d),
    "two far clusters": lambda call, n, d: call.normal(n, d) + 1e4 * np.where(np.arange(n) % 2, 1, -1)[:, None],
    "mixed units": lambda call, n, d: call.normal(n, d) * 10.0 ** call.rng.integers(-4, 5, size=d),
    "line": lambda call, n, d: np.linspace(0, 1, n)[:, None] * call.normal(1, d),
    "lattice": lambda call, n, d: call.rng.integers(-2, 3, size=(n, d)).astype(float),
    "zero rows": lambda call, n, d: call.normal(n, d) * (np.arange(n) % 3 > 0)[:, None],
    "decades": lambda call, n, d: call.normal(n, d) * 10.0 ** np.linspace(-4, 2, n)[:, None],
}


def long(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy().astype(Long)


@dataclass
class Truth:
    """Values, weights and their sensitivities of all pairs (m, n), in long double."""

    value: np.ndarray
    weight: np.ndarray
    r: np.ndarray
    difference: np.ndarray
    lost: np.ndarray  # what a kernel value lost by underflow, of size 1, is in the weight: w / k
    value_slope: np.ndarray  # |d ln k / d ln r|
    weight_slope: np.ndarray  # |d ln w / d ln r|


def truth_of(kernel, X: torch.Tensor, Z: torch.Tensor) -> Truth:
    x, z, L = long(X), long(Z), Long(kernel.bandwidth)
    difference = x[None] - z[:, None]
    unit = np.abs(difference).max(-1, initial=0)
    safe_unit = np.where(unit > 0, unit, 1)
    r = safe_unit * np.sqrt(((difference / safe_unit[..., None]) ** 2).sum(-1)) * (unit > 0)
    safe = np.where(r > 0, r, 1)
    t, name = r / L, type(kernel).__name__
    if name == "Laplace":
        k = np.exp(-t)
        w, value_slope, weight_slope = k / (L * safe), t, 1 + t
    elif name == "Gaussian":
        k = np.exp(-t * t / 2)
        w, value_slope, weight_slope = k / L / L, t * t, t * t
    elif name == "GeneralisedLaplace":
        p = Long(kernel.exponent)
        u = t**p
        k = np.exp(-u)
        w, value_slope, weight_slope = p * u * k / safe / safe, p * u, 2 + p * u
    else:
        s = np.sqrt(Long(5)) * t
        k = (1 + s + s * s / 3) * np.exp(-s)
        w = Long(5) / 3 / L / L * (1 + s) * np.exp(-s)
        value_slope, weight_slope = s * s, s * s
    lost = np.where(r > 0, w / np.where(k > 0, k, 1), 0)
    return Truth(k, np.where(r > 0, w, 0), r, difference, lost, value_slope, weight_slope)


def gradient_truth(truth: Truth, alpha: np.ndarray, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """(gradients (m, K, d), how far off each may be (m, K))."""
    info = torch.finfo(dtype)
    G = np.einsum("ij,jc,ijk->ick", truth.weight, alpha, truth.difference)
    rounded = TOLERANCE[dtype] * info.eps * truth.weight * (1 + truth.weight_slope)
    return G, ((rounded + 100 * Long(info.tiny) * truth.lost) * truth.r) @ np.abs(alpha)


def agop_truth(G: np.ndarray, off: np.ndarray, center: bool, reduction: str) -> tuple[np.ndarray, Long]:
    """(M, how far off it may be (Frobenius) where gradients are off by that much)."""
    if center:
        G, off = G - G.mean(0), off + off.mean(0)
    M = np.einsum("icd,ice->de", G, G)
    size = np.sqrt((G**2).sum(-1))
    loose = (2 * size * off + off**2).sum()
    return (M / len(G), loose / len(G)) if reduction == "mean" else (M, loose)


def check(call: Call) -> tuple[str, float, str]:
    """(operation, error over its bound, what went wrong or "")."""
    eps, tiny = torch.finfo(call.dtype).eps, torch.finfo(call.dtype).tiny
    at = call.X if call.Z is None else call.Z
    op = call.pick("op", ["kernel_matrix", "kernel_matmul", "gradients", "agop", "agop", "agop", "solve"])
    most = VALUES[call.dtype]
    backend = {"backend": "torch"}
    if op == "kernel_matrix":
        got = fastagop.kernel_matrix(call.kernel, call.X, call.Z, **backend)
        truth = truth_of(call.kernel, at, call.X)
        return op, *over(got, truth.value, most * (truth.value * (1 + truth.value_slope)), tiny)
    if op == "solve":
        return op, *check_solution(call)
    if op == "kernel_matmul":
        V = call.coefficients(len(at), call.outputs)
        got = fastagop.kernel_matmul(call.kernel, call.X, at, V, **backend)
        truth = truth_of(call.kernel, at, call.X)
        bound = most * (truth.value * (1 + truth.value_slope)) @ np.abs(long(V))
        return op, *over(got, truth.value @ long(V), bound, tiny)
    truth = truth_of(call.kernel, call.X, at)
    with np.errstate(all="ignore"):
        G, off = gradient_truth(truth, long(call.alpha), call.dtype)
    if op == "gradients":
        got = fastagop.gradients(call.kernel, call.X, call.alpha, call.Z, **backend)
        bound = np.repeat(off[..., None], call.d, -1)
        return op, *over(got, G, bound, tiny)
    how = {
        "center": bool(call.pick("center", [False, True])),
        "reduction": call.pick("reduction", ["mean", "sum"]),
        "method": call.pick("method", ["auto", "auto", "gradient", "gram"]),
    }
    with np.errstate(all="ignore"):
        M, loose = agop_truth(G, off, how["center"], how["reduction"])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", fastagop.NumericalWarning)
        got = fastagop.agop(call.kernel, call.X, call.alpha, call.Z, **how, **backend)
    symmetric = torch.equal(got, got.T)
    size = float(got.abs().max())
    spread = size * float(torch.linalg.eigvalsh(got.double() / size).min()) if 0 < size < 1e300 else 0.0
    gram = {"auto": AUTO[call.dtype], "gram": NAMED, "gradient": 0.0}[how["method"]]
    bound = loose + gram * np.sqrt((M**2).sum())
    ratio, wrong = over(got, M, np.full(M.shape, bound), tiny)
    if how["method"] == "gram" and said and wrong != "not finite":
        return "agop gram, warned", 0.0, "" if symmetric else "M is not symmetric"
    if not symmetric:
        wrong = wrong or "M is not symmetric"
    if spread < -4 * call.d * size * eps - float(bound) - tiny * 1e3:  # M is rounded to its dtype
        wrong = wrong or f"M has the eigenvalue {spread:.1e} beside entries of {size:.1e}"
    return f"agop {how['method']}", ratio, wrong


def check_solution(call: Call) -> tuple[float, str]:
    """(error of the reported residual over its bound, what went wrong or "")."""
    Y, ridge = call.coefficients(call.n, call.outputs), float(call.pick("ridge", [0.0, 1e-10, 1e-6, 1e-3, 1.0]))
    method = call.pick("method", ["auto", "cholesky", "cholesky+cg", "eigh", "cg"])
    solution = fastagop.solve(call.kernel, call.X, Y, ridge=ridge, method=method, backend="torch")
    if solution.alpha.dtype != call.dtype or not bool(torch.isfinite(solution.alpha).all()):
        return np.inf, f"alpha is {solution.alpha.dtype}, or not finite"
    K = truth_of(call.kernel, call.X, call.X).value + Long(ridge) * np.eye(call.n, dtype=Long)
    alpha, y = long(solution.alpha), long(Y)
    size = np.sqrt((y**2).sum())
    if size == 0:
        return 0.0, "" if solution.residual == 0 and not alpha.any() else "not zero for targets of zero"
    residual = float(np.sqrt(((K @ alpha - y) ** 2).sum()) / size)
    rounding = 1e-12 * float(np.sqrt(((K @ np.abs(alpha)) ** 2).sum()) / size)
    ratio = abs(solution.residual - residual) / (1e-3 * residual + rounding + 1e-12)
    return ratio, "" if ratio <= 1 else f"residual {solution.residual:.3e} is said, {residual:.3e} is true"


def over(got: torch.Tensor, want: np.ndarray, bound: np.ndarray, tiny: float) -> tuple[float, str]:
    """(largest error over its bound, what went wrong or "")."""
    if tuple(got.shape) != want.shape:
        return np.inf, f"shape {tuple(got.shape)}, not {want.shape}"
    if not bool(torch.isfinite(got).all()):
        return np.inf, "not finite"
    with np.errstate(all="ignore"):
        error = np.abs(long(got) - want)
        ratio = float((error / (bound + 100 * Long(tiny))).max(initial=0))
    if ratio <= 1:
        return ratio, ""
    place = np.unravel_index(int((error / (bound + 100 * Long(tiny))).argmax()), want.shape)
    return ratio, f"{float(got.numpy()[place]):.6e}, not {float(want[place]):.6e} at {tuple(map(int, place))}"


def refused_rightly(call: Call, error: Exception) -> bool:
    """Whether a refusal is due: results beyond the dtype, or rows too far apart for it."""
    text = str(error)
    if isinstance(error, ValueError) and ("cannot hold the distances" in text or "leave" in text or "beyond" in text):
        largest, at = torch.finfo(call.dtype).max, call.X if call.Z is None else call.Z
        if "cannot hold the distances" in text:
            return True
        G, _ = gradient_truth(truth_of(call.kernel, call.X, at), long(call.alpha), call.dtype)
        return float(np.abs(G).max(initial=0)) > largest**0.5 / 100 or float(np.abs(G).max(initial=0)) > largest / 100
    return False


def search(count: int, seed: int, report=print) -> list[int]:
    """Numbers of the calls that went wrong."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    wrong, worst, counts, refusals = [], {}, Counter(), Counter()
    for number in range(count):
        call = Call(seed, number)
        try:
            with np.errstate(all="ignore"):
                op, ratio, what = check(call)
        except Exception as error:  # whatever it is, it is a finding
            op, ratio = "refused", 0.0
            what = "" if refused_rightly(call, error) else f"{type(error).__name__}: {error}"
            refusals[str(error)[:60] if not what else "unexpected"] += 1
        counts[op] += 1
        worst[op] = max(worst.get(op, 0.0), ratio)
        if what:
            wrong.append(number)
            report(f"call {number} ({ratio:.1e} of its bound): {what}\n    {call}")
    for op in sorted(counts):
        report(f"{op}: {counts[op]} calls, largest error {worst[op]:.2f} of its bound")
    report(f"{count} calls, {len(wrong)} wrong; refused: {dict(refusals)}")
    return wrong


if __name__ == "__main__":
    if sys.argv[1] == "--call":
        one = Call(int(sys.argv[2]), int(sys.argv[3]))
        try:
            print(check(one), one, sep="\n")
        except Exception:
            print(one)
            raise
    else:
        sys.exit(bool(search(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)))
