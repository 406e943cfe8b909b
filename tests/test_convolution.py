"""Kernel machines of image patches: kernel, regression, patch AGOP and layer, against float64 loops and autograd."""

from __future__ import annotations

import warnings

import pytest
import torch

import fastagop
from fastagop import Gaussian, Laplace
from fastagop.convolution import ConvLayerSettings, PatchMachine, Window, fit_layer, patch_kernel_matrix


def images(n: int = 6, c: int = 2, side: int = 5, dtype=torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, c, side, side, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def laplace(p: torch.Tensor, q: torch.Tensor, bandwidth: float) -> torch.Tensor:
    apart = (p[:, None] - q[None, :]).square().sum(-1)
    return torch.exp(-torch.where(apart > 0, apart, 1.0).sqrt() / bandwidth) * (apart > 0) + 1.0 * (apart == 0)


@pytest.mark.parametrize("power", [-110, -80, 80, 120])
def test_patches_of_any_size_have_length_one(power):
    """Squares of float32 numbers beyond 2^64 or below 2^-75 leave float32."""
    X = images(dtype=torch.float32)
    assert torch.equal(Window(3).patches(X * 2.0**power), Window(3).patches(X))


def test_many_images_are_normalised_in_parts(monkeypatch):
    X = images(5).requires_grad_()
    whole = Window(3).patches(X)
    monkeypatch.setattr("fastagop.convolution.window._IMAGES", 2)
    found = Window(3).patches(X)
    assert torch.equal(found, whole)
    slopes = [torch.autograd.grad(patches[:, :, 0].sum(), X)[0] for patches in (found, whole)]
    torch.testing.assert_close(*slopes)


def test_a_layer_under_autocast():
    X, y = images(12, 1, 5, torch.float32), torch.arange(12) % 3
    settings = ConvLayerSettings(Laplace(1.0), Window(3), width=8)
    layer = fit_layer(X, y, settings, seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        again = fit_layer(X, y, settings, seed=0)
        found = again(X)
    assert (again.nc1, again.nc2) == (layer.nc1, layer.nc2)
    assert torch.equal(found, layer(X))


def test_a_layer_of_images_with_history():
    """A layer is fitted to the numbers of images that a network made; its features have derivatives in them."""
    X, y = images(12, 1, 5, torch.float32), torch.arange(12) % 3
    settings = ConvLayerSettings(Laplace(1.0), Window(3), width=8)
    layer, grown = fit_layer(X, y, settings, seed=0), X.clone().requires_grad_()
    found = fit_layer(grown * 1.0, y, settings, seed=0)
    assert torch.equal(found.root, layer.root)
    assert not found.root.requires_grad
    assert torch.autograd.grad(layer(grown).sum(), grown)[0].any()


@pytest.mark.parametrize(("size", "stride", "padding"), [(3, 1, 0), (2, 2, 0), (3, 2, 1), (5, 1, 0), (1, 3, 0)])
def test_patches_are_those_of_a_convolution(size, stride, padding):
    X, window = images(), Window(size, stride, padding)
    weight = torch.randn(4, 2, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = window.patches(X, normalise=False) @ weight.flatten(1).T
    expected = torch.nn.functional.conv2d(X, weight, stride=stride, padding=padding)
    assert found.shape[1] == window.positions(5) ** 2
    torch.testing.assert_close(found.mT.reshape(expected.shape), expected)


def test_patches_have_length_one_or_are_zero():
    X = images()
    X[0] = 0.0
    length = Window(3).patches(X).norm(dim=2)
    torch.testing.assert_close(length[1:], torch.ones_like(length[1:]))
    assert not length[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kernel_is_the_mean_over_pairs(dtype, monkeypatch):
    monkeypatch.setattr("fastagop.convolution.machine._BLOCK_BYTES", 5000.0)  # several blocks
    A = Window(3).patches(images(dtype=dtype))
    B = Window(2, 3).patches(images(4, 2, 5, dtype, seed=1).expand(-1, -1, -1, -1))
    B = torch.nn.functional.pad(B, (0, A.shape[2] - B.shape[2]))
    B[0, 0] = A[0, 0]
    for other in (None, B):
        found = patch_kernel_matrix(Laplace(0.7), A, other)
        Z = A if other is None else other
        pairs = [[laplace(a.double(), b.double(), 0.7).mean() for b in Z] for a in A]
        expected = torch.tensor(pairs, dtype=torch.float64)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(found, expected, rtol=20 * eps, atol=0.0)
    assert torch.equal(patch_kernel_matrix(Laplace(0.7), A), patch_kernel_matrix(Laplace(0.7), A).T)


def test_the_regression_solves_its_equations():
    A, Y = Window(3).patches(images(8)), torch.randn(8, 3, generator=torch.Generator().manual_seed(2)).double()
    machine = PatchMachine.fit(Laplace(0.7), A, Y, ridge=0.01)
    K = patch_kernel_matrix(Laplace(0.7), A)
    torch.testing.assert_close(K @ machine.alpha + 0.01 * machine.alpha, Y, rtol=1e-12, atol=1e-12)
    assert machine.residual < 1e-13
    assert machine.jitter == 0.0
    torch.testing.assert_close(machine.predict(A), K @ machine.alpha)


def test_images_that_repeat_are_told():
    A = Window(3).patches(images(3).repeat(2, 1, 1, 1))
    Y = torch.randn(6, 1, generator=torch.Generator().manual_seed(2)).double()
    with pytest.warns(fastagop.NumericalWarning, match="images repeat, or take a larger ridge"):
        machine = PatchMachine.fit(Gaussian(1.0), A, Y, ridge=0.0)
    assert machine.jitter > 0.0
    assert machine.residual > 0.1  # contradicting targets cannot be met
    assert bool(machine.alpha.isfinite().all())


@pytest.mark.parametrize(("n", "m", "side"), [(1, 40, 6), (40, 1, 6), (30, 30, 5), (2, 2, 12)])
def test_blocks_hold_what_they_may(n, m, side, monkeypatch):
    """One image against many; one pair of images (100 x 100 patches) that is more than a block."""
    A, B = (Window(3).patches(images(count, 1, side, seed=count)) for count in (n, m))
    whole, sizes = patch_kernel_matrix(Laplace(0.7), A, B), []

    def measured(*args):
        found = fastagop.kernel_matrix(*args)
        sizes.append(found.numel() * found.element_size())
        return found

    monkeypatch.setattr("fastagop.convolution.machine._BLOCK_BYTES", 8 * 3000.0)
    monkeypatch.setattr("fastagop.convolution.machine.kernel_matrix", measured)
    torch.testing.assert_close(patch_kernel_matrix(Laplace(0.7), A, B), whole, rtol=1e-12, atol=0.0)
    assert 8 * 300 <= max(sizes) <= 8 * 3000
    assert sum(sizes) == 8 * n * m * A.shape[1] * B.shape[1]


def test_float32_patches_are_solved_in_float64():
    """With a kernel that is smooth and a small ridge, kernel values in float32 leave 1e-3 of the targets unmet."""
    A, Y = Window(3).patches(images(40, 1, 5, torch.float32)), torch.eye(40, dtype=torch.float64)[:, :3]
    machine = PatchMachine.fit(Gaussian(3.0), A, Y, ridge=1e-8)
    exact = PatchMachine.fit(Gaussian(3.0), A.double(), Y, ridge=1e-8)
    unmet = patch_kernel_matrix(Gaussian(3.0), A.double()) @ machine.alpha + 1e-8 * machine.alpha - Y
    assert float(unmet.norm() / Y.norm()) < 1e-8
    torch.testing.assert_close(machine.predict(A), exact.predict(A.double()), rtol=1e-6, atol=1e-6)
    M, expected = machine.agop(), exact.agop()
    assert M.dtype == torch.float32
    assert float((M.double() - expected).norm()) <= 1e-6 * float(expected.norm())
    weights = torch.rand(len(A) * A.shape[1], generator=torch.Generator().manual_seed(1))
    M, expected = (m.agop(sample_weight=weights.to(m.patches), Z=None, center=True) for m in (machine, exact))
    assert float((M.double() - expected).norm()) <= 1e-6 * float(expected.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_patch_agop_is_autograds(dtype):
    A = Window(3).patches(images(5, dtype=dtype))
    Y = torch.randn(5, 2, generator=torch.Generator().manual_seed(3)).double()
    machine = PatchMachine.fit(Laplace(0.7), A, Y)
    wide = A.double()

    def outputs(p):  # F of one patch
        k = torch.stack([laplace(p[None], x, 0.7).mean() for x in wide])
        return k @ machine.alpha

    moved = torch.randn(4, A.shape[2], generator=torch.Generator().manual_seed(4)).double()
    tried = torch.cat([wide.flatten(0, 1), moved])
    # At a center autograd meets the kink of its own pair, which counts as 0: leave that pair out by hand.
    jacobians = torch.stack([torch.func.jacrev(outputs)(p) for p in tried])[: len(wide) * wide.shape[1]]
    expected = torch.einsum("ica,icb->ab", jacobians, jacobians) / len(jacobians)
    found = machine.agop()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    assert (found.double() - expected).norm() <= tolerance * expected.norm()


def test_a_layer():
    generator = torch.Generator().manual_seed(5)
    y = torch.arange(24) % 3
    means = torch.randn(3, 1, 6, 6, generator=generator)
    X = means[y] + 0.8 * torch.randn(24, 1, 6, 6, generator=generator)
    settings = ConvLayerSettings(Laplace(1.0), Window(3), width=16)
    layer = fit_layer(X, y + 5, settings, seed=0)
    features = layer(X)
    assert features.shape == (24, 16, 4, 4)
    assert set(layer.nc1) == {"input", "projected", "features"}
    assert layer.nc1["projected"] < layer.nc1["input"]
    assert layer.accuracy == 1.0
    patch = X[2, :, 1:4, 3:6].flatten()
    expected = (layer.weight @ (layer.root @ (patch / patch.norm()))).relu()
    torch.testing.assert_close(features[2, :, 1, 3], expected, rtol=1e-4, atol=1e-5)
    again = fit_layer(X, y, settings, seed=0)
    assert torch.equal(again(X), features)  # names of classes do not matter
    assert not torch.equal(fit_layer(X, y, settings, seed=1)(X), features)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Window(0), "size must be an integer >= 1, got 0"),
        (lambda: Window(7).patches(images()), "a window of size 7 needs images of that side, got 5"),
        (lambda: Window(3).patches(images()[0]), r"images must be float32 or float64 of shape \(n, c, h, w\)"),
        (lambda: Window(3).patches(images() / 0.0), "images must be finite, but hold NaN or infinity"),
        (
            lambda: patch_kernel_matrix(Laplace(1.0), torch.full((2, 2, 3), torch.nan)),
            "patches must be finite, but holds",
        ),
        (lambda: patch_kernel_matrix(Laplace(1.0), images()[0, 0]), r"patches must have shape \(n, P, d\)"),
        (
            lambda: PatchMachine.fit(Laplace(1.0), Window(3).patches(images()), torch.ones(3, 1)),
            r"Y must be finite of shape \(6, K\), one row an image, got \(3, 1\)",
        ),
        (
            lambda: PatchMachine.fit(Laplace(1.0), Window(3).patches(images()), torch.ones(6, 1), ridge=-1.0),
            "ridge must be a finite number >= 0, got -1.0",
        ),
        (
            lambda: fit_layer(images(), torch.zeros(6), ConvLayerSettings(Laplace(1.0), Window(3)), 0),
            "y must have two classes or more, got 1",
        ),
        (
            lambda: fit_layer(images(), torch.zeros(5), ConvLayerSettings(Laplace(1.0), Window(3)), 0),
            r"y must have shape \(6,\), one label an image, got \(5,\)",
        ),
        (
            lambda: fit_layer(images(), torch.full((6,), torch.nan), ConvLayerSettings(Laplace(1.0), Window(3)), 0),
            "y must hold real labels, but holds NaN",
        ),
        (lambda: PatchMachine.fit(Laplace(1.0), torch.ones(0, 4, 3), torch.ones(0, 1)), "patches must be of one image"),
        (
            lambda: PatchMachine.fit(Laplace(1.0), Window(3).patches(images()), torch.ones(6, 1) * 1j),
            "Y must be real, got torch.complex64",
        ),
        (lambda: Window(1, padding=1).patches(images()[:, :0]), "images must have channels and pixels"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_machine_is_asked_about_patches_like_its_own():
    machine = PatchMachine.fit(Laplace(1.0), Window(3).patches(images()), torch.ones(6, 1))
    assert repr(machine).startswith("PatchMachine(Laplace(bandwidth=1.0), 6 images of 9 patches of 18, residual")
    with pytest.raises(ValueError, match="patches must be patches of 18 numbers"):
        machine.predict(Window(2).patches(images()))
    with pytest.raises(TypeError, match=r"patches must be a torch.Tensor, got ndarray; use torch.as_tensor\(patches\)"):
        machine.predict(Window(3).patches(images()).numpy())


def test_settings_are_checked_before_a_fit():
    for wrong, message in (({"width": 0}, "width must be an integer >= 1"), ({"ridge": "a"}, "ridge must be a finite")):
        with pytest.raises(ValueError, match=message):
            ConvLayerSettings(Laplace(1.0), Window(3), **wrong)
    with pytest.raises(TypeError, match="window must be a Window, got 3"):
        ConvLayerSettings(Laplace(1.0), 3)
    with pytest.raises(TypeError, match="settings must be ConvLayerSettings, got None"):
        fit_layer(images(), torch.arange(6) % 2, None, 0)


def test_a_layer_of_no_images_gives_none_and_its_seed_is_checked():
    y, settings = torch.arange(6) % 2, ConvLayerSettings(Laplace(1.0), Window(3), width=7)
    layer = fit_layer(images(), y, settings, 0)
    assert layer(images()[:0]).shape == (0, 7, 3, 3)
    with pytest.raises(ValueError, match="seed must be an integer >= 0, got 'a'"):
        fit_layer(images(), y, settings, "a")


def test_a_layer_of_images_that_are_all_the_same_has_infinite_nc1():
    layer = fit_layer(torch.ones(6, 2, 5, 5), torch.arange(6) % 2, ConvLayerSettings(Laplace(1.0), Window(3), 7), 0)
    assert set(layer.nc1.values()) == {float("inf")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_that_contradict_each_other_count_as_one_with_their_mean(dtype):
    """Without a ridge; a small one leads to the same."""
    some = torch.rand(12, 1, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    images = torch.cat([some, some[:2], some[:1]])
    y = torch.cat([torch.arange(12) % 3, torch.tensor([1, 2, 1])])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer, near = (
            fit_layer(images, y, ConvLayerSettings(Laplace(2.0), Window(3), 7, ridge), 0) for ridge in (0.0, 1e-7)
        )
    assert layer.jitter == 0.0
    assert layer.residual < 1e-9
    assert layer.accuracy == near.accuracy == pytest.approx(13 / 15)
    assert torch.linalg.norm(layer.root - near.root) < 1e-4 * torch.linalg.norm(near.root)


def test_a_layer_whose_patches_say_nothing_leaves_them_as_they_are():
    """Patches that are all one point have no gradients: M stays I, as in Deep RFM."""
    layer = fit_layer(torch.ones(6, 1, 4, 4), torch.arange(6) % 2, ConvLayerSettings(Laplace(1.0), Window(2), 7), 0)
    assert torch.equal(layer.root, torch.eye(4))


def test_a_layer_under_transforms():
    """Images one by one, and derivatives of each, are what the batch gives."""
    X, y = images(6, 1, 5), torch.arange(6) % 3
    layer = fit_layer(X, y, ConvLayerSettings(Laplace(1.0), Window(3, padding=1), width=4), 0)

    def one(image):
        return layer(image[None])[0]

    assert torch.equal(torch.func.vmap(one)(X), layer(X))
    assert torch.equal(torch.func.vmap(layer)(X.view(2, 3, 1, 5, 5)), layer(X).view(2, 3, 4, 5, 5))
    each = torch.stack([torch.func.jacrev(one)(image) for image in X])
    torch.testing.assert_close(torch.func.vmap(torch.func.jacrev(one))(X), each)
    with pytest.raises(ValueError, match="images must be finite"):
        layer(X / 0.0)
