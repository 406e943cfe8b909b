"""The spectrum of an AGOP: top eigenpairs, how many directions matter, and what sampling says of both."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastagop import linalg
from fastagop.kernels import checks
from fastagop.kernels.precision import dtype_name

Matrix = torch.Tensor | np.ndarray
_WRONG = 1e-3  # relative asymmetry or negative eigenvalue that no rounding explains
_TIE = 64  # steps of the dtype within which two entries of an eigenvector count as equally large
_DEFAULT = 10
_SMALLEST = 1e-146  # of the largest gradient: its square and what is a step of float64 beside it are normal numbers


@dataclass(frozen=True, repr=False, eq=False)
class Spectrum:
    """What ``spectrum`` found; arrays or tensors, as the matrix was.

    Attributes:
        values: the k largest eigenvalues, in descending order, none below 0.
        vectors: unit eigenvectors (k, d), a row each, as directions are elsewhere; the first of a row's largest entries
            is positive. Where eigenvalues coincide (a gap of 0) the vectors are one basis of many.
        gaps: each eigenvalue minus the next one of all d; the last of all d has no next one: its gap is its value. The
            subspace of the first j eigenvectors is as stable as gaps[j - 1] is large beside the matrix's error.
        trace: sum of all eigenvalues.
        participation_ratio: (sum of eigenvalues)^2 / sum of their squares: 1 for one direction, d for equal ones.
        effective_rank: exp of the entropy of the eigenvalues' shares (Roy & Vetterli 2007), from 1 to d.
        clipped: size of the most negative eigenvalue that was set to 0; 0.0 where there was none.
        intervals: of each eigenvalue (k, 2), or None without draws.
        angles: of the largest principal angle, in radians, between the subspace of the first j eigenvectors and that of
            a draw, (k, 2): 0 where they agree, pi/2 where a direction of one is orthogonal to the other. 0 to pi/2
            where the matrix has fewer than j directions. None without draws.
        draws: number of matrices behind the intervals.
        confidence: share of the draws that an interval holds.
    """

    values: Any
    vectors: Any
    gaps: Any
    trace: float
    participation_ratio: float
    effective_rank: float
    clipped: float = 0.0
    intervals: Any = None
    angles: Any = None
    draws: int = 0
    confidence: float = 0.95

    @property
    def shares(self) -> Any:
        """Each eigenvalue's share of the trace (k,); 0 where the matrix is 0."""
        return self.values / (self.trace or 1.0)

    def __repr__(self) -> str:
        k, d = self.vectors.shape
        shown = ", ".join(f"{float(value):.3g}" for value in self.values[:4]) + (", ..." if k > 4 else "")
        text = f"Spectrum({k} of {d} eigenvalues: {shown}; participation ratio {self.participation_ratio:.3g}, "
        text += f"effective rank {self.effective_rank:.3g}"
        rounding = d * np.finfo(dtype_name(self.values.dtype)).eps * float(self.values[0])
        text += f", clipped -{self.clipped:.1e}" if self.clipped > rounding else ""
        return text + (f"; {self.confidence:.0%} intervals of {self.draws} draws)" if self.draws else ")")


@torch.no_grad()
def spectrum(
    M: Matrix | None = None,
    k: int | None = None,
    bootstrap: int = 0,
    *,
    gradients: Matrix | None = None,
    draws: Sequence[Matrix] | Matrix | None = None,
    confidence: float = 0.95,
    random_state: int | np.random.Generator | None = None,
) -> Spectrum:
    """Top eigenpairs of a positive semi-definite matrix such as an AGOP, with what sampling says of them.

    Formula: M = sum_j lambda_j v_j v_j^T, lambda descending. A bootstrap draws n samples with replacement from
    gradients g_ic, all outputs of a sample together, takes the AGOP of each draw and then quantiles of its eigenvalues
    and of its angles with M's subspaces (percentile intervals, Efron 1979). The largest eigenvalues of a draw are too
    large on average where d is not small beside n.

    Args:
        M: (d, d), a tensor or NumPy array, float32 or float64; default the AGOP of ``gradients``, or the mean of
            ``draws``. It is symmetrised, and decomposed in float64.
        k: number of eigenpairs; default 10, or d where that is less.
        bootstrap: draws from ``gradients``; 0 for none. 200 are enough for standard errors, 1000 for intervals; each
            costs one AGOP of stored gradients, n K d^2, and one eigendecomposition.
        gradients: per-sample gradients (n, K, d), as ``fastagop.gradients`` gives them, or (n, d). With M, M must be
            their AGOP up to a factor; for a centred one subtract the mean gradient of each output first.
        draws: matrices (d, d) that stand for draws, of several seeds or folds for example, instead of gradients.
        confidence: share of the draws that an interval holds, the rest being cut off equally at both ends.
        random_state: a seed or generator, for draws that repeat.

    Raises:
        TypeError, ValueError: naming the argument; M is not symmetric or has negative eigenvalues beyond rounding; a
            bootstrap of a bare M, which does not tell how its samples vary.
    """
    draws = None if draws is None else _listed(draws)
    count = checks.integer("bootstrap", bootstrap, 0)
    level = _confidence(confidence)
    _sources(M, gradients, draws, count)
    samples = None if gradients is None else _gradients(gradients)
    given = None if draws is None else [_matrix(f"draws[{i}]", draw) for i, draw in enumerate(draws)]
    if given is not None and len(given) < 2:
        raise ValueError(f"draws must hold at least 2 matrices, got {len(given)}")
    like = next(part for part in (M, gradients, *(draws or ())) if part is not None)
    wide = _point(M, samples, given)
    d = len(wide)
    size = min(_DEFAULT, d) if k is None else checks.integer("k", k, 1, d)
    values, vectors, clipped = _decompose("M", wide)
    _check_range(values, like)
    vectors = _signed(vectors[:size], like)
    quantiles = None
    if count or given is not None:
        seen, drawn = vectors, given or []
        if samples is not None:
            factor, (samples, basis) = _factor(wide, samples), _in_span(samples)
            seen = vectors if basis is None else vectors @ basis
            drawn = _resampled(samples, factor, count, random_state)
        found = _compared(drawn, seen, values)
        quantiles = [_interval(column, level, wide) for column in found]
        count = count or len(given or ())
    return _result(like, size, values, vectors, clipped, quantiles, count, level)


def _sources(M, gradients, draws, count: int) -> None:
    """Refuse arguments that do not say where a spectrum, or its draws, come from."""
    if M is None and gradients is None and draws is None:
        raise ValueError("M must be given, or gradients or draws to make it of")
    if draws is not None and (gradients is not None or count):
        raise ValueError("draws are the resampled matrices themselves; leave out gradients and bootstrap=")
    if count and gradients is None:
        raise ValueError(
            "bootstrap needs samples, and a bare M does not tell how they vary; pass gradients= "
            "(fastagop.gradients(kernel, X, alpha)), or draws= with the M of several seeds or folds"
        )


def _confidence(value) -> float:
    try:
        inside = not isinstance(value, bool) and 0 < float(value) < 1
    except (TypeError, ValueError):
        inside = False
    if not inside:
        raise ValueError(f"confidence must be a number between 0 and 1, got {value!r}; 0.95 is usual")
    return float(value)


def _tensor(name: str, value) -> torch.Tensor:
    if isinstance(value, np.ndarray):
        checks.unmasked(name, value)
        if value.dtype.kind != "f" or value.dtype.itemsize not in (4, 8):
            raise TypeError(f"{name} must be float32 or float64, got {value.dtype}; use {name}.astype(float)")
        value = torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("="), order="C"))
    checks.plain(name, value)
    return value.detach()


def _matrix(name: str, value) -> torch.Tensor:
    """A symmetric matrix in float64."""
    M = _tensor(name, value)
    if M.ndim == 1:
        raise ValueError(f"{name} must be a matrix (d, d), got shape {tuple(M.shape)}; a diagonal is its own spectrum")
    checks.matrix(name, M)
    if M.shape[0] != M.shape[1] or not len(M):
        raise ValueError(f"{name} must be a square matrix (d, d), got shape {tuple(M.shape)}")
    wide = M.double()
    size = float(wide.abs().max())
    if float((wide - wide.T).abs().max()) > _WRONG * size:
        raise ValueError(f"{name} must be symmetric; take (M + M.T) / 2 if that is what you mean")
    return (wide + wide.T) * 0.5


def _listed(draws) -> list:
    """The matrices of a list, which may come one by one, or of one array (B, d, d)."""
    if not isinstance(draws, Iterable):
        raise TypeError(f"draws must be matrices (d, d), or one array (B, d, d), got {type(draws).__name__}")
    if isinstance(draws, (torch.Tensor, np.ndarray)) and draws.ndim != 3:
        raise ValueError(f"draws must be matrices (d, d), or one array (B, d, d), got shape {tuple(draws.shape)}")
    return list(draws)


def _gradients(value) -> torch.Tensor:
    """Gradients (n, K, d) in float64, of at least two samples."""
    G = _tensor("gradients", value)
    if G.ndim == 2:
        G = G[:, None]
    if G.ndim != 3 or 0 in G.shape:
        raise ValueError(f"gradients must have shape (n, K, d) or (n, d), none of them 0, got {tuple(value.shape)}")
    if len(G) < 2:
        raise ValueError("gradients must be of at least 2 samples: one does not tell how they vary")
    checks.matrix("gradients", G.flatten(0, 1))
    wide = G.double()
    if 0 < checks.largest(wide) < _SMALLEST:
        raise ValueError(f"gradients have squares below float64, all are smaller than {_SMALLEST:.0e}; scale them up")
    return wide


def _point(M, samples: torch.Tensor | None, given: list[torch.Tensor] | None) -> torch.Tensor:
    """The matrix whose spectrum is asked for."""
    for i, draw in enumerate(given or []):
        if given is not None and draw.shape != given[0].shape:
            raise ValueError(
                f"draws[{i}] must have shape {tuple(given[0].shape)} like the first, got {tuple(draw.shape)}"
            )
    if M is not None:
        wide = _matrix("M", M)
    else:
        wide = _agop(samples) if samples is not None else torch.stack(given or []).mean(0)
    for name, d in (
        ("gradients", samples.shape[2] if samples is not None else None),
        ("draws", given and len(given[0])),
    ):
        if d is not None and d != len(wide):
            raise ValueError(f"{name} must have {len(wide)} columns to agree with M, got {d}")
    if not checks.finite(wide):
        raise ValueError("gradients have squares beyond float64; scale them down")
    return wide


def _agop(samples: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    rows = samples if weights is None else samples * weights.sqrt()[:, None, None]
    rows = rows.flatten(0, 1)
    return rows.T @ rows / len(samples)


def _factor(wide: torch.Tensor, samples: torch.Tensor) -> float:
    """What the gradients' AGOP is to be multiplied by to give M."""
    own = _agop(samples)
    size = float(torch.linalg.matrix_norm(own))
    if size == 0:
        return 1.0
    factor = float(((wide / size) * (own / size)).sum())
    apart = float(torch.linalg.matrix_norm(wide - factor * own))
    if apart > _WRONG * float(torch.linalg.matrix_norm(wide)) or factor <= 0:
        raise ValueError(
            "M must be the AGOP of gradients up to a factor, but differs; leave M out, or pass the gradients that it "
            "is made of (for a centred AGOP, gradients - gradients.mean(0))"
        )
    return factor


def _decompose(name: str, wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """All eigenvalues, descending and clipped at 0, the eigenvectors as rows, and how far one was below 0."""
    size = float(wide.abs().max())
    if size == 0:
        return wide.new_zeros(len(wide)), torch.eye(len(wide), dtype=wide.dtype, device=wide.device), 0.0
    unit = 2.0 ** -max(-1000, math.frexp(size)[1])  # Eigensolvers square entries.
    values, vectors = linalg.eigh(wide * unit)
    values, least = values.flip(0) / unit, float(values[0]) / unit
    if -least > _WRONG * float(values[0]):
        raise ValueError(f"{name} must be positive semi-definite, but has the eigenvalue {least:.2e}")
    return values.clamp(min=0.0), vectors.flip(1).T, max(0.0, -least)


def _check_range(values: torch.Tensor, like: Any) -> None:
    """Refuse eigenvalues that the dtype of what came in does not hold: float32 squares float32."""
    dtype = getattr(torch, dtype_name(like.dtype))
    largest, held = float(values[0]), float(values[0].to(dtype))
    if largest > 0 and (held == 0 or math.isinf(held)):
        side = "beyond" if held else "below"
        raise ValueError(
            f"the largest eigenvalue, {largest:.1e}, is {side} {dtype}, the result's dtype; give M, gradients "
            "or draws in float64, or in another unit"
        )


def _signed(vectors: torch.Tensor, like: Matrix) -> torch.Tensor:
    """Rows turned so that the first of their largest entries is positive; entries equal to rounding are equal."""
    single = like.dtype in (torch.float32, np.float32)
    eps = torch.finfo(torch.float32 if single else torch.float64).eps
    sizes = vectors.abs()
    first = (sizes >= sizes.amax(1, keepdim=True) * (1 - _TIE * eps)).to(torch.int8).argmax(1, keepdim=True)
    return vectors * torch.where(vectors.gather(1, first) < 0, -1.0, 1.0)


def _in_span(samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients in coordinates of their span, and its basis (d, r), where they are fewer than d."""
    n, K, d = samples.shape
    if n * K >= d:
        return samples, None
    basis = torch.linalg.qr(samples.flatten(0, 1).T).Q
    return samples @ basis, basis


def _resampled(
    samples: torch.Tensor, factor: float, count: int, random_state: int | np.random.Generator | None
) -> Iterable[torch.Tensor]:
    """AGOPs of samples drawn with replacement, one after the other."""
    whole = isinstance(random_state, numbers.Integral) and int(random_state) >= 0 and not isinstance(random_state, bool)
    if not (whole or random_state is None or isinstance(random_state, np.random.Generator)):
        raise ValueError(
            f"random_state must be an integer >= 0, a numpy.random.Generator or None, got {random_state!r}"
        )
    generator = np.random.default_rng(random_state)
    for _ in range(count):
        times = torch.from_numpy(np.bincount(generator.integers(0, len(samples), len(samples)), minlength=len(samples)))
        times = times.to(samples.device)
        drawn = times > 0
        yield _agop(samples[drawn], times[drawn].double()) * (factor * int(drawn.sum()) / len(samples))


def _compared(
    drawn: Iterable[torch.Tensor], vectors: torch.Tensor, values: torch.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues (B, k) of draws, and the largest angles of their subspaces with those given (B, k)."""
    k, least = len(vectors), len(values) * torch.finfo(values.dtype).eps
    known = int((values > least * values[0]).sum())
    found, angles = [], []
    for i, draw in enumerate(drawn):
        own, others, _ = _decompose(f"draws[{i}]", draw)
        there = int((own > least * own[0]).sum())
        row = [_angle(vectors[:j], others[:j]) if j <= there else math.pi / 2 for j in range(1, min(k, known) + 1)]
        found.append(np.pad(own[:k].cpu().numpy(), (0, max(0, k - len(own)))))
        angles.append(np.pad(np.array(row), (0, k - len(row)), constant_values=math.nan))
    return np.array(found), np.array(angles)


def _angle(U: torch.Tensor, V: torch.Tensor) -> float:
    """The largest principal angle of two subspaces with orthonormal rows; the sine holds small ones."""
    inner = V @ U.T
    cosine = float(torch.linalg.svdvals(inner)[-1])
    sine = float(torch.linalg.svdvals(V - inner @ U)[0])
    return math.atan2(sine, cosine)


def _interval(found: np.ndarray, level: float, like: torch.Tensor) -> torch.Tensor:
    """Quantiles by column (k, 2); what has none may be anything from 0 to pi/2."""
    ends = np.quantile(found, [(1 - level) / 2, (1 + level) / 2], axis=0)
    ends = np.where(np.isnan(ends), [[0.0], [math.pi / 2]], ends)
    return torch.from_numpy(ends.T.copy()).to(like.device)


def _result(like, size, values, vectors, clipped, quantiles, count, level) -> Spectrum:
    """The result in the kind and dtype of what came in."""

    def out(tensor: torch.Tensor | None):
        if tensor is None:
            return None
        if isinstance(like, np.ndarray):
            return tensor.cpu().numpy().astype(like.dtype)
        return tensor.to(like.dtype).to(like.device)

    below = torch.cat([values[1:], values.new_zeros(1)])
    shares = values / values.sum() if float(values[0]) > 0 else values
    entropy = -torch.special.xlogy(shares, shares).sum()
    intervals, angles = quantiles or (None, None)
    return Spectrum(
        values=out(values[:size]),
        vectors=out(vectors),
        gaps=out((values - below)[:size]),
        trace=float(values.sum()),
        participation_ratio=1 / float(shares.square().sum()) if float(values[0]) > 0 else 0.0,
        effective_rank=float(entropy.exp()) if float(values[0]) > 0 else 0.0,
        clipped=clipped,
        intervals=out(intervals),
        angles=out(angles),
        draws=count if quantiles else 0,
        confidence=level,
    )
