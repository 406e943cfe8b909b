"""The paper's theory against numbers: ``python -m reproduce.theory`` (float64, CPU, seconds).

Proposition A.1. Formula (5) is right, and so is the 1/D of the variance. The sentence that distances increase is
not: with W ~ N(0, 2/D) squared distances shrink, by a factor from 1/2 (opposite points) to 1 (equal points). Close
points shrink least, so the conclusion that NC1 gets slightly worse stands.

Theorem 4.3. The proof uses y y^T (A*)^-1 = (1 + 1/lambda_Phi) y y^T, but lemma B.2 gives y y^T / (q + lambda_Phi)
with q the eigenvalue of y y^T: the class size for one-hot y, 1 for columns of unit length. No q > 0 makes the two
agree. Hence with the paper's kappa = 1 - 2 lambda_k (1 + 1/lambda_Phi) the iteration does collapse exponentially,
but to s y y^T with s > 1: ||X~^T X~ - y y^T|| stalls at first order in lambda_k, not at O(lambda_k^2 /
lambda_Phi^2). With kappa = 1 - 2 lambda_k / (q + lambda_Phi) the theorem's order holds, and with
kappa = (1 + lambda_k / (q + lambda_Phi))^-2 the limit is y y^T itself and the rate at most
lambda_k / lambda_Phi, without the bound's factor n. NC1 and NC2 do not see the factor s: collapse stands.

Theorem 4.4. No kernel tried exceeds y y^T, whose objective is C n^2 / (n + mu) with n the class size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

F64 = torch.float64
Row = tuple[object, ...]


# ---- Proposition A.1: random ReLU features


def cosine_and_sine(r: float | Tensor) -> tuple[Tensor, Tensor]:
    """r and sqrt(1 - r^2) in float64."""
    r = torch.as_tensor(r, dtype=F64)
    if not bool((r.abs() <= 1).all()):
        raise ValueError(f"r must be a cosine in [-1, 1], got {r}; normalise the vectors first")
    return r, ((1 - r) * (1 + r)).sqrt()


def relu_inner_product(r: float | Tensor) -> Tensor:
    """E relu(Wx)^T relu(Wy) for unit x, y with x^T y = r in [-1, 1] and W (D, d) ~ N(0, 2/D): formula (5)."""
    r, s = cosine_and_sine(r)
    return (s**3 + r**2 * s) / math.pi + r / 2 + r / math.pi * torch.atan2(r, s)


def relu_variance(r: float | Tensor) -> Tensor:
    """D times the variance of relu(Wx)^T relu(Wy); from the arc-cosine kernel of degree 2 (Cho and Saul, 2009)."""
    r, s = cosine_and_sine(r)
    square = 3 * r * s + (math.pi - torch.acos(r)) * (1 + 2 * r**2)
    return 2 / math.pi * square - relu_inner_product(r) ** 2


def monte_carlo(r: float, width: int, draws: int, generator: torch.Generator) -> tuple[float, float, float]:
    """Mean of relu(Wx)^T relu(Wy) over draws of W, its standard error, and width times its variance."""
    x, y = torch.eye(2, dtype=F64)[0], torch.stack(cosine_and_sine(r))  # The law depends on r alone.
    W = torch.randn(draws, width, 2, generator=generator, dtype=F64) * math.sqrt(2 / width)
    products = ((W @ x).relu() * (W @ y).relu()).sum(1)
    variance = products.var().item()
    return products.mean().item(), math.sqrt(variance / draws), width * variance


# ---- Theorem 4.3: linearised Deep RFM


def labels(classes: int, size: int, unit: bool = False) -> Tensor:
    """One-hot y (classes * size, classes), sorted; unit=True scales its columns to length 1."""
    y = torch.eye(classes, dtype=F64).repeat_interleave(size, 0)
    return y / math.sqrt(size) if unit else y


def data_gram(classes: int, size: int, d: int, least: float, generator: torch.Generator) -> Tensor:
    """X^T X of d-dimensional Gaussian clusters, scaled to the least eigenvalue that assumption 4.2 asks for."""
    means = torch.randn(classes, d, generator=generator, dtype=F64).repeat_interleave(size, 0)
    X = means + torch.randn(classes * size, d, generator=generator, dtype=F64)
    A = X @ X.T
    return A * (least / torch.linalg.eigvalsh(A)[0])


def kappas(q: float, ridge: float, shift: float) -> dict[str, float]:
    """The paper's kappa and two that follow from lemma B.2; ridge = lambda_k, shift = lambda_Phi."""
    return {
        "paper": 1 - 2 * ridge * (1 + 1 / shift),
        "first order": 1 - 2 * ridge / (q + shift),
        "exact": (1 + ridge / (q + shift)) ** -2,
    }


def collapse(A: Tensor, y: Tensor, ridge: float, shift: float, kappa: float, layers: int) -> list[Tensor]:
    """The matrices X~^T X~ = A (A + ridge I)^-1 y y^T (A + ridge I)^-1 A / kappa, A <- X~^T X~ + shift I."""
    eye, grams = torch.eye(len(A), dtype=F64), []
    for _ in range(layers):
        projected = torch.linalg.solve(A + ridge * eye, A @ y)
        grams.append(projected @ projected.T / kappa)
        A = grams[-1] + shift * eye
    return grams


def fixed_point(q: float, ridge: float, shift: float, kappa: float) -> tuple[float, float]:
    """The s with fixed point s y y^T, and the rate at which small deviations from it shrink in a layer.

    A deviation within the span of y shrinks by 2 b ridge q / (a + ridge)^2 / kappa, one between it and its
    complement by b ridge q / ((a + ridge) (shift + ridge)) / kappa, with a = s q + shift, b = a / (a + ridge).
    """
    s = 1.0
    for _ in range(200):
        s = ((s * q + shift) / (s * q + shift + ridge)) ** 2 / kappa
    a = s * q + shift
    common = a / (a + ridge) * ridge * q / (a + ridge) / kappa
    return s, common * max(2 / (a + ridge), 1 / (shift + ridge))


def distances(grams: list[Tensor], target: Tensor) -> list[float]:
    """Spectral norm of every matrix minus the target."""
    return [torch.linalg.matrix_norm(G - target, 2).item() for G in grams]


def last_ratio(steps: list[float]) -> float:
    """Ratio of the last two distances that stand clear of rounding."""
    clear = [step for step in steps if step > 1e-10]
    return clear[-1] / clear[-2]


# ---- Theorem 4.4: the collapsed kernel is optimal


def objective(k: Tensor, y: Tensor, mu: float) -> float:
    """sum_c y_c^T (k + mu I)^-1 k y_c, formula (4)'s maximand, as ||y||^2 - mu tr(y^T (k + mu I)^-1 y)."""
    factor = torch.linalg.cholesky(k + mu * torch.eye(len(k), dtype=F64))
    return (y.square().sum() - mu * (y * torch.cholesky_solve(y, factor)).sum()).item()


def competitors(y: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Random feasible kernels, one a family: positive semi-definite, unit diagonal, entries in [0, 1]."""
    spread, share = torch.rand(2, generator=generator, dtype=F64)
    means, noise = (torch.randn(m, 5, generator=generator, dtype=F64) for m in (y.shape[1], len(y)))
    X = 3 * y @ means + spread * noise
    r = torch.cdist(X, X, compute_mode="donot_use_mm_for_euclid_dist")
    rows = torch.nn.functional.normalize(noise.abs(), dim=1)
    near = torch.nn.functional.normalize(torch.cat([y, share * rows], 1), dim=1)
    return {
        "Gaussian": (-(r**2) / 2).exp(),
        "Laplace": (-r).exp(),
        "correlation": rows @ rows.T,
        "perturbed": near @ near.T,
        "mixed": share * rows @ rows.T + (1 - share) * y @ y.T,
    }


# ---- Report


def table(title: str, header: str, rows: Iterable[Row]) -> None:
    """Print right-aligned columns; floats with four digits."""
    print(f"\n{title}\n" + "".join(f"{name:>13}" for name in header.split(",")))
    for row in rows:
        print("".join(f"{cell:>13.4g}" if isinstance(cell, float) else f"{cell:>13}" for cell in row))


def relu_rows(generator: torch.Generator, draws: int = 20_000) -> Iterator[Row]:
    """Formula (5) and Monte Carlo, D times the variance at two D, and the factor on squared distances."""
    for r in (-1.0, -0.5, 0.0, 0.5, 0.9, 0.99, 1.0):
        narrow = monte_carlo(r, 32, draws, generator)[2]
        mean, error, wide = monte_carlo(r, 128, draws, generator)
        formula, variance = relu_inner_product(r).item(), relu_variance(r).item()
        factor = (1 - formula) / (1 - r) if r < 1 else 1.0
        yield r, formula, mean, error, variance, narrow, wide, factor


def collapse_rows(generator: torch.Generator, shift: float = 1.0) -> Iterator[Row]:
    """Rate per layer and distance to y y^T, measured and derived, beside the theorem's bound with C = 1."""
    A = data_gram(3, 20, 100, shift, generator)
    for unit, ridge in itertools.product((False, True), (0.01, 0.005)):
        y, q = labels(3, 20, unit), 1.0 if unit else 20.0
        bound, order = 2 * ridge * (1 + 1 / shift) * q / shift, (ridge / shift) ** 2
        for name, kappa in kappas(q, ridge, shift).items():
            grams = collapse(A, y, ridge, shift, kappa, layers=12)
            s, rate = fixed_point(q, ridge, shift, kappa)
            floor = distances(grams[-1:], y @ y.T)[0]
            measured = last_ratio(distances(grams, grams[-1]))
            kind = "unit" if unit else "one-hot"
            yield kind, name, ridge, measured, rate, bound, floor, q * abs(s - 1), order


def optimum_rows(generator: torch.Generator, draws: int = 200) -> Iterator[Row]:
    """1 minus the objective over its value at y y^T: the best of each family, and mixtures close to y y^T."""
    y = labels(3, 8)
    tried = [competitors(y, generator) for _ in range(draws)]
    for mu in (0.01, 0.1, 1.0, 10.0):
        best = objective(y @ y.T, y, mu)
        gaps = [{name: 1 - objective(k, y, mu) / best for name, k in kernels.items()} for kernels in tried]
        close = [(1 - t) * y @ y.T + t * tried[0]["Laplace"] for t in (1e-2, 1e-4)]
        yield (
            *(mu, best, 3 * 8**2 / (8 + mu)),
            *(min(gap[name] for gap in gaps) for name in gaps[0]),
            *(1 - objective(k, y, mu) / best for k in close),
        )


def main() -> None:
    """Print what was found and the three tables it rests on."""
    generator = torch.Generator().manual_seed(0)
    print(__doc__)
    header = "r,formula (5),Monte Carlo,std. error,D Var,at D = 32,at D = 128,sq. distance"
    table("Proposition A.1", header, relu_rows(generator))
    header = "y,kappa,lambda_k,rate,derived,bound,floor,derived,(lk/lPhi)^2"
    table("Theorem 4.3: lambda_Phi = 1, 3 classes of 20 in 100 dimensions", header, collapse_rows(generator))
    header = "mu,at y y^T,C n^2/(n+mu),Gaussian,Laplace,correlation,perturbed,mixed,1e-2 away,1e-4 away"
    table("Theorem 4.4: relative gaps below y y^T, smallest of 200 a family", header, optimum_rows(generator))


if __name__ == "__main__":
    torch.set_num_threads(1)  # Threads cost more than they bring for matrices of 60 rows.
    main()
