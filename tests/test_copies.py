"""Copies of a row: what counts as one point, what the solve makes of it, and what a fit gives back."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from fastagop.kernels import reference

import fastagop
from fastagop import DeepRFMClassifier, Gaussian, Laplace, RFMClassifier, RFMRegressor
from fastagop.deep_rfm.layer import normalise_rows
from fastagop.solvers import copies, near_rows

DTYPES = [torch.float32, torch.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def eps(dtype):
    return torch.finfo(dtype).eps


def exact_agop(kernel, X, alpha, weight=None):
    """Summed AGOP by differences of points, float64; a pair at distance zero adds nothing."""
    X, alpha = X.double().numpy(), alpha.double().numpy()
    weight = np.ones(len(X)) if weight is None else weight
    M = np.zeros((X.shape[1], X.shape[1]))
    for z, w in zip(X, weight, strict=True):
        D = X - z
        r = np.sqrt((D * D).sum(1))
        slope = reference.profile(kernel, r)[1]
        g = (np.where(r > 0, -slope / np.where(r > 0, r, 1), 0)[:, None] * alpha).T @ D
        M += w * g.T @ g
    return torch.from_numpy(M)


# ---- what is a copy


@dtypes
def test_rows_that_are_copies(dtype, normal):
    X = normal(60, 30, dtype=dtype)
    X[10] = X[3]  # to the bit
    X[11] = torch.nextafter(X[4], torch.full_like(X[4], 9.0))  # every entry one rounding up
    X[12], X[13] = 0.0, -0.0
    X[14] = X[5] * (1 + 2 * eps(dtype))
    rows = copies.find(X)
    assert rows.merged == 4
    for i, j in ((10, 3), (11, 4), (12, 13), (14, 5)):
        assert rows.group[i] == rows.group[j]
    assert torch.equal(rows.take(X)[rows.group[20]], X[20])
    assert float(rows.weight.sum()) == 60


@dtypes
@pytest.mark.parametrize("factor", [2.0, 3.0, 0.1, 1e-20])
def test_multiples_are_copies_once_rows_are_normalised(dtype, factor, normal):
    X = normal(40, 200, dtype=dtype)
    assert copies.find(normalise_rows(torch.cat([X, X * factor]))).merged == 40


@dtypes
def test_rows_moved_by_a_rotation_and_back_are_copies(dtype, normal):
    X, Q = normal(30, 100, dtype=dtype), torch.linalg.qr(normal(100, 100, dtype=dtype, seed=2)).Q
    assert copies.find(torch.cat([X, X @ Q @ Q.T])).merged == 30


@dtypes
def test_what_can_be_told_apart_is_no_copy(dtype, normal):
    points = {
        "apart by 100 roundings": normal(50, 20).repeat(2, 1) + 100 * eps(dtype) * normal(100, 20, seed=2),
        "counted beside a large offset": (1 / eps(dtype)) * 0.5 + torch.arange(100, dtype=torch.float64)[:, None],
        "a cloud beside a large offset": (1 / eps(dtype)) * 0.5 + 4.5 * normal(200, 20),
        "tiny": 1e-30 * normal(50, 3),
        "of every size": normal(40, 3) * 10.0 ** torch.linspace(-30, 5, 40, dtype=torch.float64)[:, None],
        "a grid": torch.cartesian_prod(*[torch.arange(5, dtype=torch.float64)] * 3),
        "collapsed": normal(5, 50).repeat(40, 1) + 50 * eps(dtype) * normal(200, 50, seed=3),
    }
    assert {name: copies.find(X.to(dtype)).merged for name, X in points.items()} == dict.fromkeys(points, 0)


@dtypes
def test_a_cloud_within_rounding_of_one_point_is_one(dtype, normal):
    X = normal(1, 20).repeat(500, 1)
    assert copies.find((X * (1 + eps(dtype) * normal(500, 20, seed=2))).to(dtype)).merged == 499


def test_all_pairs_agree_with_a_plain_search(normal):
    """Crowds of rows on both sides of the limit: a row is merged exactly where it has a partner."""
    X = normal(40, 8)[torch.arange(400) % 40]
    X = X + 1e-14 * 10.0 ** (-2 * torch.rand(400, 1, generator=torch.Generator().manual_seed(0))) * normal(
        400, 8, seed=4
    )
    rows = copies.find(X)
    limit = (4 + 0.5 * 8**0.5) * 2.0**-52  # docs/pages/solving.md
    x = X.numpy().astype(np.longdouble)
    apart, size = np.sqrt(((x[:, None] - x) ** 2).sum(-1)), np.sqrt((x * x).sum(1))
    for i in range(400):
        leader = int(rows.kept[rows.group[i]])
        assert apart[i, leader] <= limit * min(size[i], size[leader])
    kept = rows.kept.numpy()
    left = apart[np.ix_(kept, kept)] + 1e9 * np.eye(len(kept))
    assert (left >= 0.99 * limit * np.minimum(size[kept][:, None], size[kept])).all()
    assert 0 < rows.merged < 360


@dtypes
@pytest.mark.parametrize(("n", "d"), [(60, 7), (600, 7), (60, 1300)])
@pytest.mark.parametrize("exponent", [0.0, 0.8, -0.8])
def test_one_pair_of_copies(dtype, n, d, exponent, normal):
    """Wherever they stand, of every size, to the bit or to a rounding."""
    X = normal(n, d, dtype=dtype) * torch.finfo(dtype).max ** exponent
    assert copies.find(X).plain
    for i, j in ((0, n - 1), (30, 31), (n // 9, n // 2)):
        for copy in (X[i], torch.nextafter(X[i], torch.full_like(X[i], torch.inf))):
            Z = X.clone()
            Z[j] = copy
            rows = copies.find(Z)
            assert (rows.merged, rows.plain) == (1, False)
            assert rows.group[i] == rows.group[j]


@dtypes
def test_many_rows_in_crowds_that_some_projections_tell_apart(dtype, normal):
    X = normal(600, 3, dtype=dtype)
    place = near_rows._places(X, None)[0]
    one = np.zeros_like(place)  # 500 rows agree in the first one, halves in the second, pairs in the third
    one[500:, 0], one[:, 1], one[:, 2] = np.arange(100) + 1, np.arange(600) // 250, np.arange(600) // 2
    label = near_rows._crowds(one, np.full(600, 0.25))
    assert all(label[i] == label[i + 1] for i in range(0, 500, 2))
    assert len(np.unique(label)) == 350


@dtypes
@pytest.mark.parametrize(("n", "d", "period"), [(1024, 10, 2), (2000, 30, 8), (400, 64, 2)])
def test_a_tight_cluster_does_not_hide_copies_by_where_its_rows_stand(dtype, n, d, period, normal):
    """Every second or eighth row is one blank with noise, and one more a copy of it to rounding."""
    X = normal(n, d, dtype=dtype)
    X[::period] = normal(1, d, dtype=dtype, seed=2) + 100 * eps(dtype) * X[::period]
    X[1] = X[0]
    X[1, 0] = torch.nextafter(X[0, 0], torch.tensor(9.0, dtype=dtype))
    orders = [torch.arange(n)] + [torch.randperm(n, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    ones = torch.ones(n, dtype=torch.float64)
    found = [rows for order in orders for rows in (copies.find(X[order]), copies.find(X[order], ones))]
    assert len({rows.merged for rows in found}) == 1


def test_the_order_given_does_not_matter(normal):
    X, Y = normal(50, 6).repeat(3, 1), normal(150, 2, seed=2)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    one, other = copies.find(X), copies.find(X[order])
    assert torch.equal(one.take(X), other.take(X[order]))
    assert torch.equal(one.means(Y), other.means(Y[order]))


# ---- solve


@dtypes
@pytest.mark.parametrize("method", ["cholesky", "cholesky+cg", "eigh", "cg"])
def test_weights_are_copies(dtype, method, normal, relative):
    """K + ridge W^-1, against numpy; a weight of 2 and a row written twice are the same to the bit."""
    X, Y = normal(60, 5, dtype=dtype), normal(60, 2, dtype=dtype, seed=2)
    w = (torch.arange(60) % 4).to(dtype)
    how = {"ridge": 0.05, "method": method}
    weighted = fastagop.solve(Laplace(2.0), X, Y, sample_weight=w, **how)
    some = w > 0
    A = reference.kernel_matrix(Laplace(2.0), X[some]) + torch.diag(0.05 / w[some].double())
    exact = torch.from_numpy(np.linalg.solve(A.numpy(), Y[some].double().numpy()))
    assert relative(weighted.alpha[some], exact) <= (
        1e-4 if method == "cg" else 1e-11 if dtype == torch.float64 else 1e-5
    )
    assert not weighted.alpha[~some].any()
    index = torch.repeat_interleave(torch.arange(60), w.long()).flip(0)
    written = fastagop.solve(Laplace(2.0), X[index], Y[index], **how)
    summed = torch.zeros_like(weighted.alpha).index_add_(0, index, written.alpha)
    assert relative(summed, weighted.alpha) <= 4 * eps(dtype)
    first = torch.tensor([int((index == i).nonzero()[0]) for i in torch.nonzero(w == 2).squeeze(1)])
    assert torch.equal(2 * written.alpha[first], weighted.alpha[w == 2])


def test_uniform_weights_scale_the_ridge(normal, relative):
    X, Y = normal(50, 4), normal(50, 2, seed=2)
    weighted = fastagop.solve(Gaussian(1.0), X, Y, ridge=0.3, sample_weight=torch.full((50,), 3.0).double())
    assert relative(weighted.alpha, fastagop.solve(Gaussian(1.0), X, Y, ridge=0.1).alpha) <= 1e-12


@pytest.mark.parametrize("bad", [torch.ones(5), -torch.ones(6), torch.zeros(6), torch.full((6,), float("nan"))])
def test_weights_that_are_refused(bad, normal):
    with pytest.raises(ValueError, match=r"^sample_weight must"):
        fastagop.solve(Laplace(1.0), normal(6, 2), normal(6, 1), sample_weight=bad.double())


@dtypes
@pytest.mark.parametrize("method", ["auto", "eigh", "cg"])
@pytest.mark.parametrize("ridge", [0.0, 1e-8, 1e-3])
@pytest.mark.parametrize("kind", ["bits", "roundings"])
def test_contradictions(dtype, method, ridge, kind, normal, relative):
    """Three rows contradict theirs: the system of means is solved, without jitter, and coefficients stay small."""
    X, Y = normal(80, 6, dtype=dtype), normal(80, 2, dtype=dtype, seed=2)
    X[77:] = X[:3] if kind == "bits" else X[:3] * (1 + eps(dtype))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        solution = fastagop.solve(Laplace(2.0), X, Y, ridge=ridge, method=method)
    assert (solution.merged, solution.contradictions, solution.jitter) == (3, 6, 0.0)
    assert len(said) == int(ridge == 0)  # with a ridge, means are what kernel ridge regression answers
    if said:
        assert "6 rows are copies of each other" in str(said[0].message)
    mean, weight = Y[:77].double().clone(), torch.ones(77, dtype=torch.float64)
    mean[:3], weight[:3] = (Y[:3].double() + Y[77:].double()) / 2, 2.0
    A = reference.kernel_matrix(Laplace(2.0), X[:77]) + torch.diag(ridge / weight)
    exact = torch.linalg.solve(A, mean)
    summed = solution.alpha[:77].double().clone()
    summed[:3] += solution.alpha[77:]
    assert relative(summed, exact) <= (1e-4 if method == "cg" else 2e-5 if dtype == torch.float32 else 1e-9)
    answered = kind == "bits" and ridge > (0.0 if dtype == torch.float64 else 1e-6)
    if answered:  # the system of all rows has a solution that the dtype can bear
        full = reference.kernel_matrix(Laplace(2.0), X) + ridge * torch.eye(80)
        assert relative(solution.alpha, torch.linalg.solve(full, Y.double())) <= 1e-5
        assert solution.residual <= (1e-4 if dtype == torch.float32 else 2e-6)
    else:
        assert torch.equal(solution.alpha[77:], solution.alpha[:3])
    # the residual reported is the literal one of all rows
    K = reference.kernel_matrix(Laplace(2.0), X)
    literal = float((K @ solution.alpha.double() + ridge * solution.alpha - Y).norm() / Y.norm())
    assert solution.residual == pytest.approx(
        literal, rel=1e-3 if answered else 1e-5, abs=2e-16 * float(solution.alpha.abs().max())
    )
    assert solution.merged_residual <= (1e-4 if answered and dtype == torch.float32 else 2e-6)


# ---- fits


def digits(n=200):
    X, y = fastagop.datasets.load("digits", n=n)
    return fastagop.datasets.standardize(X, X)[0], y


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("drift", [0.0, 1.0])
def test_mislabelled_copies_in_a_deep_rfm(dtype, drift, relative):
    """Every layer sees one point: copies enter it equal to the bit, and M is the AGOP of its predictor."""
    X, y = digits()
    X = X.double() if dtype == "float64" else X
    X3, y3 = torch.cat([X, X[:3] * (1 + drift * eps(X.dtype))]), torch.cat([y, (y[:3] + 1) % 10])
    entering = [X3]
    watch = [lambda e: entering.append(e.features.clone())]
    model = DeepRFMClassifier(depth=4, width=128, dtype=dtype, random_state=0, agop_scale="sum", callbacks=watch)
    with pytest.warns(fastagop.NumericalWarning, match="6 rows are copies") as said:
        model.fit(X3, y3)
    assert len(said) == 1
    for index, record in enumerate(model.layers_):
        assert record.solution.alpha.shape == model.alphas_[index].shape == (203, 10)
        assert (record.solution.merged, record.solution.contradictions) == (3, 6)
        assert record.solution.jitter == 0
        P = normalise_rows(entering[index])
        if index > 0:
            assert torch.equal(P[200:], P[:3])
        P[200:] = P[:3]
        M = exact_agop(Laplace(2.0), P, record.solution.alpha)
        assert relative(torch.as_tensor(model.agops_[index]), M) <= (1e-9 if dtype == "float64" else 2e-5)
    clean = DeepRFMClassifier(depth=4, width=128, dtype=dtype, random_state=0).fit(X, y)
    assert np.mean(np.asarray(model.predict(X) == clean.predict(X))) >= 0.97


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_mislabelled_copies_in_an_rfm(dtype, diagonal, normal, relative):
    X = normal(150, 8, dtype=torch.float32)
    y = ((X[:, 0] + X[:, 1]) > 0).long()
    X[-5:], y[-5:] = X[:5], 1 - y[:5]
    how = {"iterations": 1, "ridge": 0.0, "dtype": dtype, "agop_scale": "sum", "diagonal": diagonal}
    with pytest.warns(fastagop.NumericalWarning, match="10 rows are copies"):
        model = RFMClassifier(Laplace(10.0), **how).fit(X, y)
    solution = model.iterations_[0].solution
    assert solution.merged == model.solution_.merged == 5
    M = exact_agop(Laplace(10.0), X, solution.alpha)
    found = torch.as_tensor(model.M_)
    assert relative(found, M.diagonal() if diagonal else M) <= 1e-5
    top = (found if diagonal else found.diagonal()).topk(2).indices
    assert sorted(top.tolist()) == [0, 1]


def test_events_files_and_checkpoints_have_the_rows_given(tmp_path):
    X, y = digits(120)
    X = torch.cat([X, X[:10], 2 * X[10:20]])
    y = torch.cat([y, y[:20]])
    seen = []
    how = {"depth": 3, "width": 64, "random_state": 0}
    watch = [lambda e: seen.append((e.projected.clone(), e.features.clone(), e.classes.clone()))]
    model = DeepRFMClassifier(**how, callbacks=watch, checkpoint_dir=tmp_path / "run").fit(X, y)
    for (projected, features, classes), record in zip(seen, model.layers_, strict=True):
        assert len(projected) == len(features) == len(record.solution.alpha) == 140
        assert torch.equal(features[120:], features[:20])
        assert torch.equal(classes, y)
        assert record.nc1["features"] == pytest.approx(fastagop.collapse.nc1(features, y), rel=1e-6)
    model.save(tmp_path / "model.safetensors")
    loaded = fastagop.load(tmp_path / "model.safetensors")
    assert torch.equal(loaded.decision_function(X), model.decision_function(X))
    assert torch.equal(loaded.solution_.alpha, model.solution_.alpha)
    assert loaded.solution_.merged == 20

    class Stop(Exception):
        pass

    def stop(event):
        if event.layer == 1:
            raise Stop

    with pytest.raises(Stop):
        DeepRFMClassifier(**how, callbacks=[stop], checkpoint_dir=tmp_path / "other").fit(X, y)
    resumed = DeepRFMClassifier(**how, checkpoint_dir=tmp_path / "other").fit(X, y)
    assert torch.equal(resumed.decision_function(X), model.decision_function(X))


@pytest.mark.parametrize("solver", ["auto", "cg", "eigh"])
def test_every_solver_in_a_fit(solver, normal, relative):
    """ "cg" stores no matrix, and its AGOP comes from the points; all find the same."""
    X = normal(150, 6, dtype=torch.float32)
    y = torch.sin(X[:, 0]) + 0.1 * X[:, 1]
    plain = RFMRegressor(iterations=2, ridge=1e-2).fit(X, y)
    other = RFMRegressor(iterations=2, ridge=1e-2, solver=solver).fit(X, y)
    assert other.solution_.method == {"auto": "cholesky"}.get(solver, solver)
    assert relative(other.M_, plain.M_) <= 1e-4
    assert relative(other.predict(X), plain.predict(X)) <= 1e-4


@pytest.mark.parametrize(("roundings", "differ"), [(7, False), (20, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_targets_of_copies_differ_by_more_than_rounding(roundings, differ, dtype, normal):
    """Eight roundings of the largest target, each way from the mean of two."""
    X, Y = normal(10, 3, dtype=dtype), torch.full((10, 1), 0.5, dtype=dtype)
    X[9], Y[0] = X[8], -1.0
    Y[9] += roundings * torch.finfo(dtype).eps
    rows = copies.find(X)
    assert rows.merged == 1
    assert rows.contradictions(Y, rows.means(Y)) == (2 if differ else 0)
    assert rows.contradictions(Y[:, :0], rows.means(Y)[:, :0]) == 0


@pytest.mark.parametrize(("bound", "apart"), [(5.1, True), (4.9, False)])
def test_copies_have_coefficients_of_their_own_where_these_are_bearable(bound, apart, normal):
    """w (y - mean) / ridge beyond a row's share."""
    X = normal(6, 3)
    X[5] = X[4]
    Y = torch.zeros(6, 1, dtype=torch.float64)
    Y[4], Y[5] = 1.0, 2.0  # half from their mean, 5 at a ridge of 0.1
    rows = copies.find(X)
    given = rows.given(Y, rows.means(Y), 0.1, bound)
    assert (given.beyond is not None) == apart
    if apart:
        assert given.beyond.flatten().tolist() == pytest.approx([0.0, 0.0, 0.0, 0.0, -5.0, 5.0])
    assert rows.given(Y, rows.means(Y), 0.0, 1e9).beyond is None
    assert copies.alone(X).given(Y, Y, 0.1, 1e9) is None
    assert given.share.tolist() == [1.0, 1.0, 1.0, 1.0, 0.5, 0.5]
    assert given.ridges.flatten().tolist() == pytest.approx([0.1] * 6)
    assert given.size == pytest.approx(5**0.5)


def test_rows_and_their_weights(normal):
    X, w = normal(5, 2), torch.tensor([2.0, 0.0, 1.0, 1.0, 0.5], dtype=torch.float64)
    X[3] = X[2]
    rows = copies.find(X, w)
    assert (rows.merged, rows.total, rows.plain, rows.exact) == (1, 4.5, False, True)
    assert rows.left.tolist() == [1]
    assert sorted(rows.weight.tolist()) == [0.5, 2.0, 2.0]
    assert rows.rest(X).tolist() == X[1:2].tolist()
    back = rows.all(rows.take(X), rows.rest(X))
    assert torch.equal(back, X)
    assert rows.shared(torch.ones(3, 1, dtype=torch.float64)).flatten().tolist() == [1.0, 0.0, 0.5, 0.5, 1.0]
    plain = copies.find(X[:3])
    assert (plain.plain, plain.weights, plain.rest(X), plain.total) == (True, None, None, 3.0)
    assert plain.take(X) is X


def test_rows_that_a_division_by_their_length_makes_one_are_told_so():
    """Deep RFM sees directions only: of one positive feature all rows are one point."""
    X = torch.linspace(1.0, 2.0, 20)[:, None]
    with pytest.warns(fastagop.NumericalWarning, match=r"20 rows .* once divided by their length \(x and 2 x are one"):
        fastagop.DeepRFMRegressor(depth=1, width=8, ridge=0.0, device="cpu").fit(X, X[:, 0])
