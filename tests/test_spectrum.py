"""The spectrum of an AGOP against NumPy, its own laws, and the coverage that its intervals promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fastagop
from fastagop import Spectrum, spectrum

EPS = float(np.finfo(np.float64).eps)


def psd(d: int, rank: int, seed: int = 0) -> np.ndarray:
    R = np.random.default_rng(seed).normal(size=(d, rank))
    return R @ R.T


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("d", "rank"), [(1, 1), (6, 6), (6, 2), (40, 3)])
def test_eigenpairs(d, rank, dtype):
    M = psd(d, rank).astype(dtype)
    truth = np.linalg.eigvalsh(M.astype(np.float64))[::-1]
    found = spectrum(M, d)
    eps = float(np.finfo(dtype).eps)
    np.testing.assert_allclose(found.values, np.clip(truth, 0, None), atol=8 * d * eps * truth[0])
    V = found.vectors
    np.testing.assert_allclose(V @ V.T, np.eye(d), atol=16 * d * eps)
    np.testing.assert_allclose((V.T * found.values) @ V, M, atol=16 * d * eps * truth[0])
    assert (V[np.arange(d), np.abs(V).argmax(1)] > 0).all()
    assert V.dtype == found.values.dtype == dtype
    assert found.trace == pytest.approx(float(np.trace(M)), rel=8 * d * eps)
    np.testing.assert_allclose(found.gaps[:-1], found.values[:-1] - found.values[1:], atol=4 * eps * truth[0])
    assert found.gaps[-1] == found.values[-1]
    assert (found.values >= 0).all()


def test_tensors_and_defaults():
    M = torch.from_numpy(psd(14, 20)).requires_grad_()
    found = spectrum(M)
    assert found.values.shape == (10,)
    assert found.vectors.shape == (10, 14)
    assert not found.vectors.requires_grad
    assert torch.equal(spectrum(M.detach().T[::1].flip(0).flip(0), 3).vectors, found.vectors[:3])  # strided
    assert found.intervals is found.angles is None
    assert float(found.gaps[9]) == pytest.approx(float(found.values[9]) - np.linalg.eigvalsh(M.detach())[3], rel=1e-12)


def test_how_many_directions():
    flat = spectrum(np.eye(7), 2)
    assert flat.participation_ratio == pytest.approx(7)
    assert flat.effective_rank == pytest.approx(7)
    np.testing.assert_allclose(flat.shares, 1 / 7)
    single = spectrum(np.diag([0.0, 3.0, 0.0]))
    assert single.participation_ratio == pytest.approx(1)
    assert single.effective_rank == pytest.approx(1)
    np.testing.assert_array_equal(single.vectors[0], [0, 1, 0])
    p = np.array([0.6, 0.3, 0.1])
    mixed = spectrum(1e-200 * np.diag(p))
    assert mixed.participation_ratio == pytest.approx(1 / (p**2).sum())
    assert mixed.effective_rank == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    nothing = spectrum(np.zeros((3, 3)))
    assert nothing.participation_ratio == nothing.effective_rank == nothing.trace == 0.0
    np.testing.assert_array_equal(nothing.shares, 0)


def test_signs_do_not_hang_on_rounding():
    """(1, -1) / sqrt 2 has two largest entries, whichever rounding favours."""
    for nudge in (-1, 0, 1):
        M = np.array([[1.0 + 4 * nudge * EPS, -1.0], [-1.0, 1.0]])
        np.testing.assert_allclose(spectrum(M, 1).vectors[0], [0.5**0.5, -(0.5**0.5)], rtol=1e-12)


def test_clipping_is_reported():
    found = spectrum(np.diag([1.0, -1e-7]))
    assert found.values.tolist() == [1.0, 0.0]
    assert found.clipped == pytest.approx(1e-7)
    assert "clipped -1.0e-07" in repr(found)
    assert spectrum(np.eye(2)).clipped == 0.0
    assert repr(spectrum(np.eye(2))) == ("Spectrum(2 of 2 eigenvalues: 1, 1; participation ratio 2, effective rank 2)")


# ---- Bootstrap


def gradients(n=120, K=3, d=6, seed=0):
    scales = np.linspace(2, 0.2, d) ** 2
    return np.random.default_rng(seed).normal(size=(n, K, d)) * scales


def test_intervals_against_a_loop():
    G = gradients()
    found = spectrum(gradients=G, k=3, bootstrap=50, confidence=0.8, random_state=7)
    M = np.einsum("ncd,nce->de", G, G) / len(G)
    np.testing.assert_allclose(found.values, np.linalg.eigvalsh(M)[::-1][:3], rtol=1e-12)
    generator, values, angles = np.random.default_rng(7), [], []
    for _ in range(50):
        drawn = G[generator.integers(0, len(G), len(G))]
        w, V = np.linalg.eigh(np.einsum("ncd,nce->de", drawn, drawn) / len(G))
        values.append(w[::-1][:3])
        V = V[:, ::-1]
        cosines = [np.linalg.svd(found.vectors[:j] @ V[:, :j])[1].min() for j in (1, 2, 3)]
        angles.append(np.arccos(np.clip(cosines, 0, 1)))
    np.testing.assert_allclose(found.intervals, np.quantile(values, [0.1, 0.9], axis=0).T, rtol=1e-12)
    np.testing.assert_allclose(found.angles, np.quantile(angles, [0.1, 0.9], axis=0).T, rtol=1e-7)
    assert (found.draws, found.confidence) == (50, 0.8)
    assert repr(found).endswith("80% intervals of 50 draws)")


def test_a_seed_repeats_and_a_factor_of_M_scales():
    G = torch.from_numpy(gradients()).float()
    M = torch.einsum("ncd,nce->de", G, G)
    found, scaled = (
        spectrum(A, 2, 20, gradients=G, random_state=np.random.default_rng(1)) for A in (M / len(G), M / M.max())
    )
    factor = len(G) / float(M.max())
    torch.testing.assert_close(scaled.intervals, found.intervals * factor)
    torch.testing.assert_close(scaled.angles, found.angles, atol=1e-3, rtol=1e-3)
    assert scaled.intervals.dtype == torch.float32
    again = spectrum(M / len(G), 2, 20, gradients=G, random_state=1)
    assert torch.equal(again.intervals, found.intervals)
    other = spectrum(M / len(G), 2, 20, gradients=G, random_state=2)
    assert not torch.equal(other.intervals, found.intervals)


def test_identical_samples_leave_nothing_open():
    g = np.array([3.0, 4.0, 0.0])
    found = spectrum(gradients=np.tile(g, (10, 1)), bootstrap=20, random_state=0)
    np.testing.assert_allclose(found.intervals, [[25, 25], [0, 0], [0, 0]], atol=1e-13)
    np.testing.assert_allclose(found.angles[0], 0, atol=1e-12)  # arccos would give 1e-8
    np.testing.assert_allclose(found.angles[1:], [[0, math.pi / 2]] * 2)  # there is no second direction


def test_more_features_than_gradients():
    """The bootstrap then runs in the span of the gradients, with the same numbers."""
    G = gradients(n=8, K=2, d=6)
    wide = G @ np.linalg.qr(np.random.default_rng(3).normal(size=(300, 6)))[0].T
    few, many = (spectrum(gradients=A, k=4, bootstrap=30, random_state=5) for A in (G, wide))
    np.testing.assert_allclose(many.intervals, few.intervals, rtol=1e-10)
    np.testing.assert_allclose(many.angles, few.angles, rtol=1e-6)
    assert spectrum(gradients=wide, k=40, bootstrap=3, random_state=0).intervals.shape == (40, 2)


def test_intervals_hold_what_they_promise():
    """95% intervals of the two largest eigenvalues, over 60 data sets; 93% of them is what 60 draws give."""
    truth, held = np.array([4.0, 1.0]), np.zeros(2)
    for seed in range(60):
        G = np.random.default_rng(seed).normal(size=(400, 4)) * np.sqrt([4.0, 1.0, 0.2, 0.1])
        found = spectrum(gradients=G, k=2, bootstrap=60, random_state=seed).intervals
        held += (found[:, 0] <= truth) & (truth <= found[:, 1])
    assert (held >= 51).all(), held  # 3 standard deviations below


def test_given_draws():
    Ms = [psd(5, 8, seed) for seed in range(9)]
    found = spectrum(draws=Ms, k=2, confidence=0.5)
    np.testing.assert_allclose(found.values, np.linalg.eigvalsh(np.mean(Ms, 0))[::-1][:2])
    each = [np.linalg.eigvalsh(M)[::-1][:2] for M in Ms]
    np.testing.assert_allclose(found.intervals, np.quantile(each, [0.25, 0.75], axis=0).T)
    assert found.draws == 9
    stacked = spectrum(Ms[0], 2, draws=torch.from_numpy(np.array(Ms)))
    assert stacked.angles[0, 0] >= 0


def test_small_angles_keep_their_digits():
    """The cosine of 1e-9 is 1 in float64."""
    c, s = math.cos(1e-9), math.sin(1e-9)
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]])
    M = np.diag([3.0, 2.0, 1.0])
    found = spectrum(M, 2, draws=[turn @ M @ turn.T] * 2)
    np.testing.assert_allclose(found.angles[0], 1e-9, rtol=1e-5)
    assert (found.angles[1] < 1e-14).all()  # both turn within the plane


def test_of_an_rfm_and_its_gradients():
    X = torch.randn(60, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kernel = fastagop.Laplace(2.0)
    alpha = fastagop.solve(kernel, X, X[:, :1] ** 2).alpha
    M, G = fastagop.agop(kernel, X, alpha), fastagop.gradients(kernel, X, alpha)
    found = spectrum(M, 1, 50, gradients=G, random_state=0)
    assert isinstance(found, Spectrum)
    assert int(found.vectors[0].argmax()) == 0
    assert float(found.intervals[0, 0]) < float(found.values[0]) < float(found.intervals[0, 1])


G = gradients(20, 2, 4)
I = np.eye(4)
REFUSED = {
    "nothing": (ValueError, "M must be given", spectrum),
    "a bare M": (ValueError, "bootstrap needs samples, and a bare M", lambda: spectrum(I, 2, bootstrap=10)),
    "a list": (TypeError, "M must be a torch.Tensor", lambda: spectrum([[1.0]])),
    "integers": (TypeError, "M must be float32 or float64, got int64", lambda: spectrum(np.eye(2, dtype=int))),
    "a diagonal": (ValueError, "a diagonal is its own spectrum", lambda: spectrum(np.ones(4))),
    "no square": (ValueError, "M must be a square matrix", lambda: spectrum(np.ones((2, 3)))),
    "NaN": (ValueError, "M holds NaN", lambda: spectrum(I * np.nan)),
    "no symmetry": (ValueError, "M must be symmetric", lambda: spectrum(np.triu(np.ones((3, 3))))),
    "negative": (ValueError, "M must be positive semi-definite, but has the eigenvalue -2", lambda: spectrum(-2 * I)),
    "k": (ValueError, "k must be an integer from 1 to 4, got 5", lambda: spectrum(I, 5)),
    "bootstrap": (ValueError, "bootstrap must be an integer", lambda: spectrum(I, 1, -1)),
    "confidence": (ValueError, "confidence must be a number between 0 and 1", lambda: spectrum(I, confidence=95)),
    "seed": (ValueError, "random_state must be", lambda: spectrum(gradients=G, bootstrap=2, random_state="a")),
    "a generator of another kind": (
        ValueError,
        "random_state must be an integer >= 0, a numpy.random.Generator or None, got RandomState",
        lambda: spectrum(gradients=G, bootstrap=2, random_state=np.random.RandomState(0)),
    ),
    "a number of draws": (TypeError, r"draws must be matrices \(d, d\), .* got int", lambda: spectrum(draws=3)),
    "other gradients": (ValueError, "M must be the AGOP of gradients", lambda: spectrum(I, gradients=G, bootstrap=2)),
    "other width": (ValueError, "gradients must have 3", lambda: spectrum(np.eye(3), gradients=G, bootstrap=2)),
    "one sample": (ValueError, "at least 2 samples", lambda: spectrum(gradients=G[:1], bootstrap=2)),
    "gradients of one shape": (ValueError, "gradients must have shape", lambda: spectrum(gradients=G[0, 0])),
    "huge gradients": (ValueError, "squares beyond float64", lambda: spectrum(gradients=G * 1e200)),
    "draws and bootstrap": (ValueError, "draws are the resampled", lambda: spectrum(draws=[I, I], bootstrap=3)),
    "one draw": (ValueError, "at least 2 matrices", lambda: spectrum(draws=[I])),
    "draws of other shapes": (ValueError, r"draws\[1\] must have shape", lambda: spectrum(draws=[I, np.eye(3)])),
    "draws unlike M": (ValueError, "draws must have 3 columns", lambda: spectrum(np.eye(3), draws=[I, I])),
    "masked entries": (ValueError, "M holds masked entries", lambda: spectrum(np.ma.masked_equal(I, 1.0))),
    "masked draws": (ValueError, "holds masked", lambda: spectrum(draws=np.ma.masked_equal(np.stack([I, I]), 1.0))),
    "masked gradients": (ValueError, "gradients holds masked", lambda: spectrum(gradients=np.ma.masked_less(G, 0.0))),
    "one array of draws": (ValueError, "draws must be matrices", lambda: spectrum(draws=I)),
}


@pytest.mark.parametrize(("error", "message", "call"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_draws_may_come_one_by_one(normal):
    matrices = [G.T @ G for G in normal(4, 9, 5)]
    listed, coming = (fastagop.spectrum(draws=draws) for draws in (matrices, iter(matrices)))
    assert torch.equal(coming.values, listed.values)
    assert torch.equal(coming.intervals, listed.intervals)


@pytest.mark.parametrize(("size", "word"), [(1e200, "beyond"), (1e-200, "below"), (1e-155, "below")])
def test_gradients_whose_squares_leave_float64_are_refused(size, word, normal):
    with pytest.raises(ValueError, match=f"gradients have squares {word} float64"):
        fastagop.spectrum(gradients=size * normal(9, 5))
    assert not fastagop.spectrum(gradients=0 * normal(9, 5)).values.any()


@pytest.mark.parametrize(("size", "word"), [(1e-30, "below"), (1e25, "beyond")])
def test_eigenvalues_that_float32_does_not_hold_are_refused(size, word, normal):
    small = (size * normal(9, 5)).float()
    with pytest.raises(ValueError, match=rf"largest eigenvalue, .*, is {word} torch\.float32"):
        fastagop.spectrum(gradients=small)
    assert fastagop.spectrum(gradients=small.double()).values[0] > 0
