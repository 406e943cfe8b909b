"""A Deep RFM as a module: casts, function transforms, derivatives of first and second order, round trips."""

from __future__ import annotations

import copy
import io
import warnings

import numpy as np
import pytest
import torch
from kernel_cases import MODULE, KernelCase, cases

import fastagop
from fastagop.deep_rfm.module import DeepRFMModule, Readout
from fastagop.deep_rfm.random_features import FEATURES

CASES = [case.at(0.9) for case in cases(MODULE)]  # about the distances of unit points
every_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(autouse=True)
def _quiet():
    """torch's own rules for derivatives use parts of torch that it calls deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield


def readout(case: KernelCase, normal) -> DeepRFMModule:
    """A module without layers: f(x) = sum_j a_j k(x / ||x||, c_j)."""
    centers = torch.nn.functional.normalize(normal(9, 3))
    return DeepRFMModule([], Readout(case.kernel, centers, normal(9, 2, seed=2)), binary=False, flat=False)


def fitted(kernel=None, features="relu", classes=3, **parameters):
    X = torch.randn(40, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale = None if features == "relu" else 0.5
    settings = {"depth": 2, "width": 16, "random_state": 0, "ridge": 1e-3, "feature_scale": scale, **parameters}
    model = fastagop.DeepRFMClassifier(kernel or fastagop.Laplace(2.0), features=features, **settings)
    return model.fit(X.numpy(), (np.arange(40) % classes)), X


def values(case: KernelCase, module: DeepRFMModule, x: np.ndarray) -> np.ndarray:
    """f of one row in long double, written apart."""
    h = x / np.sqrt((x * x).sum())
    c, a = (t.numpy().astype(np.longdouble) for t in (module.readout.centers, module.readout.alpha))
    return case.profile(case.kernel, np.sqrt(((h - c) ** 2).sum(1))) @ a


def hessian(case: KernelCase, module: DeepRFMModule, x: torch.Tensor, step: float = 1e-4) -> torch.Tensor:
    """Second derivatives (2, 3, 3) by central differences in long double."""
    x = x.numpy().astype(np.longdouble)
    e = step * np.eye(3, dtype=np.longdouble)

    def second(u, v):
        up, down = (values(case, module, x + s * u + v) - values(case, module, x + s * u - v) for s in (1, -1))
        return (up - down) / (4 * step**2)

    H = [[second(u, v) for v in e] for u in e]
    return torch.from_numpy(np.array(H, dtype=np.float64)).movedim(-1, 0)


def jacobian(case: KernelCase, module: DeepRFMModule, x: torch.Tensor, step: float = 1e-5) -> torch.Tensor:
    x, e = x.numpy().astype(np.longdouble), step * np.eye(3, dtype=np.longdouble)
    J = [(values(case, module, x + u) - values(case, module, x - u)) / (2 * step) for u in e]
    return torch.from_numpy(np.array(J, dtype=np.float64)).T


def transforms(module):
    """Ways to first and second derivatives at rows Z."""

    def f(z):
        return module(z[None])[0]

    func = torch.func

    def plain(Z):
        return torch.stack([torch.autograd.functional.jacobian(f, z) for z in Z])

    def twice(Z):
        return torch.stack(
            [
                torch.stack([torch.autograd.functional.hessian(lambda x, c=c: f(x)[c], z) for c in range(len(f(z)))])
                for z in Z
            ]
        )

    first = {
        "autograd": plain,
        "vmap(jacrev)": func.vmap(func.jacrev(f)),
        "vmap(jacfwd)": func.vmap(func.jacfwd(f)),
        "jacrev(vmap)": lambda Z: torch.einsum("icjd,ij->icd", func.jacrev(func.vmap(f))(Z), torch.eye(len(Z)).to(Z)),
        "vectorised": lambda Z: torch.einsum(
            "icjd,ij->icd", torch.autograd.functional.jacobian(module, Z, vectorize=True), torch.eye(len(Z)).to(Z)
        ),
    }
    second = {
        "autograd": twice,
        "vmap(hessian)": func.vmap(func.hessian(f)),
        "vmap(jacrev(jacrev))": func.vmap(func.jacrev(func.jacrev(f))),
        "vmap(jacrev(jacfwd))": func.vmap(func.jacrev(func.jacfwd(f))),
    }
    return first, second


@every_case
def test_derivatives(case, normal, relative):
    module, Z = readout(case, normal), normal(4, 3, seed=3)
    first, second = transforms(module)
    J = torch.stack([jacobian(case, module, z) for z in Z])
    H = torch.stack([hessian(case, module, z) for z in Z])
    for way, f in first.items():
        assert relative(f(Z), J) <= 1e-8, way
    for way, f in second.items():
        assert relative(f(Z), H) <= 1e-6, way
    points = Z.clone().requires_grad_()
    assert torch.autograd.gradcheck(module, (points,), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(module, (points,))


@every_case
def test_derivatives_at_centers(case, normal, relative):
    """At a center of a kernel with a kink that center adds nothing; a smooth one has its second derivative."""
    module = readout(case, normal)
    Z = 1.7 * module.readout.centers[:3].clone()  # the length does not count
    first, second = transforms(module)
    for index, z in enumerate(Z):
        rest = copy.deepcopy(module)
        if not case.smooth_at_zero:
            rest.readout.alpha[index] = 0
        J = jacobian(case, rest, z)
        # Where phi has no third derivative, the error of differences is proportional to their step.
        H = 2 * hessian(case, rest, z, step=5e-5) - hessian(case, rest, z, step=1e-4)
        for way, f in first.items():
            assert relative(f(z[None])[0], J) <= 1e-7, way
        for way, f in second.items():
            assert relative(f(z[None])[0], H) <= 1e-6, way


def test_gradients_at_training_points_do_not_see_rounding(relative):
    """The features of a training point, computed alone, differ from its center in the last digits."""
    model, X = fitted(dtype="float64", ridge=0.0)
    module = model.to_module()
    single = torch.stack([torch.autograd.functional.jacobian(lambda z: module(z[None])[0], x) for x in X])
    whole = torch.einsum("icid->icd", torch.autograd.functional.jacobian(module, X))
    assert relative(single, whole) <= 1e-6
    assert relative(torch.func.vmap(torch.func.jacrev(lambda z: module(z[None])[0]))(X), whole) <= 1e-6


@pytest.mark.parametrize("depth", [1, 4])
def test_gradients_at_training_points_of_a_float32_fit(depth, relative):
    """A center lies off its own row there by what float32 layers round; its kink would add a vector."""
    X = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    y = (X[:, 0] * X[:, 1] > 0).long()
    found = []
    for dtype in ("float32", "float64"):
        model = fastagop.DeepRFMClassifier(depth=depth, width=64, random_state=0, dtype=dtype, device="cpu")
        module = model.fit(X, y).to_module()
        points = X.double().requires_grad_()
        found.append(torch.autograd.grad(module(points).sum(), points)[0])
    assert relative(*found) <= 1e-4


@pytest.mark.parametrize("features", ["relu", "cos"])
def test_derivatives_through_layers(features, relative):
    model, X = fitted(features=features)
    module, Z = model.to_module(), X[:3] + 0.1
    first, second = transforms(module)
    step = 1e-6
    J = torch.stack([(module(Z + step * e) - module(Z - step * e)) / (2 * step) for e in torch.eye(4).double()], -1)
    for way, f in first.items():
        assert relative(f(Z), J) <= 1e-6, way
    expected = second["autograd"](Z)
    for way, f in second.items():
        assert relative(f(Z), expected) <= 1e-9, way
    moved = [(Z + step * e, Z - step * e) for e in torch.eye(4).double()]
    H = torch.stack([(first["autograd"](up) - first["autograd"](down)) / (2 * step) for up, down in moved], -1)
    assert relative(expected, H) <= 1e-5


def test_kernels_without_a_slope_say_so(normal):
    from fastagop.kernels.radial import Radial

    class Cauchy(Radial):
        def value_(self, sq):
            return sq.div_(self.bandwidth**2).add_(1).reciprocal_()

        def weight_(self, sq):
            zero = sq == 0
            k = self.value_(sq)
            return k.square_().mul_(2 / self.bandwidth**2).masked_fill_(zero, 0.0)

    centers = torch.nn.functional.normalize(normal(9, 3))
    module = DeepRFMModule([], Readout(Cauchy(1.0), centers, normal(9, 2, seed=2)), binary=False, flat=False)
    z = normal(1, 3, seed=3)
    assert torch.autograd.gradcheck(module, (z.clone().requires_grad_(),))
    with pytest.raises(TypeError, match="kernel Cauchy has no second derivatives"):
        torch.autograd.functional.hessian(lambda x: module(x)[0, 0], z)


CASTS = {
    "float": lambda m: m.float(),
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "to dtype": lambda m: m.to(torch.float32),
    "to device and dtype": lambda m: m.to("cpu", torch.float16),
    "to tensor": lambda m: m.to(torch.zeros(1, dtype=torch.float16)),
    "type": lambda m: m.type(torch.float32),
    "cpu": lambda m: m.cpu(),
    "as part of a model": lambda m: torch.nn.Sequential(torch.nn.Identity(), m).half(),
}


@pytest.mark.parametrize("name", CASTS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_casts_leave_the_numbers(name, dtype):
    model, X = fitted(dtype=dtype)
    module = model.to_module()
    expected, before = module(X), {key: t.clone() for key, t in module.state_dict().items()}
    cast = CASTS[name](module)
    assert torch.equal(cast(X), expected)
    for key, t in module.state_dict().items():
        assert torch.equal(t, before[key])
        assert t.dtype == before[key].dtype
    for narrow in (torch.float16, torch.bfloat16, torch.float32):
        assert cast(X.to(narrow)).dtype == narrow


def test_moves_are_followed():
    model, X = fitted()
    module = model.to_module().to("meta", torch.float16)
    assert {t.device.type for t in module.state_dict().values()} == {"meta"}
    assert module.readout.alpha.dtype == torch.float64
    empty = module.to_empty(device="cpu")
    empty.load_state_dict(model.to_module().state_dict())
    assert torch.equal(empty(X), model.to_module()(X))


def test_autocast_changes_nothing():
    model, X = fitted()
    module = model.to_module()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(X), model.to_module()(X))
        found = module(X)
    assert torch.equal(found, module(X))


def test_round_trips(tmp_path):
    model, X = fitted(features="cos")
    module = model.to_module()
    expected = module(X)
    assert torch.equal(copy.deepcopy(module)(X), expected)
    held = io.BytesIO()
    torch.save(module.state_dict(), held)
    held.seek(0)
    state = torch.load(held, weights_only=True)
    fresh = fitted(features="cos", random_state=5)[0].to_module()
    fresh.load_state_dict(state)
    assert torch.equal(fresh(X), expected)
    torch.save(module, tmp_path / "module.pt")
    assert torch.equal(torch.load(tmp_path / "module.pt", weights_only=False)(X), expected)
    assert torch.equal(torch.func.functional_call(module, state, (X,)), expected)


def test_ensembles_by_stacked_buffers():
    """vmap over the buffers of several modules: centers are batched, too."""
    modules = [fitted(random_state=seed, dtype="float64")[0].to_module() for seed in range(3)]
    X = fitted()[1][:5]
    stacked = {name: torch.stack([m.state_dict()[name] for m in modules]) for name in modules[0].state_dict()}
    found = torch.func.vmap(lambda state: torch.func.functional_call(modules[0], state, (X,)))(stacked)
    for row, module in zip(found, modules, strict=True):
        torch.testing.assert_close(row, module(X))
    held = modules[0].readout
    alpha = torch.func.jacrev(lambda a: torch.func.functional_call(modules[0], {"readout.alpha": a}, (X,)))(held.alpha)

    def outputs(centers):
        return torch.func.functional_call(modules[0], {"readout.centers": centers}, (X,))

    centers = torch.func.jacrev(outputs)(held.centers)
    assert alpha.isfinite().all()
    step = torch.zeros_like(held.centers)
    step[3, 2] = 1e-6
    up, down = (outputs(held.centers + s * step) for s in (1, -1))
    torch.testing.assert_close(centers[..., 3, 2], (up - down) / 2e-6, rtol=1e-5, atol=1e-7)


def test_exports_and_compiles():
    model, X = fitted()
    module = model.to_module()
    exported = torch.export.export(module, (X,))
    torch.testing.assert_close(exported.module()(X), module(X))
    compiled = torch.compile(module, backend="aot_eager")
    points = X.clone().requires_grad_()
    torch.testing.assert_close(
        torch.autograd.grad(compiled(points).square().sum(), points)[0],
        torch.autograd.grad(module(points).square().sum(), points)[0],
    )


@pytest.mark.parametrize("form", ["binary", "flat", "neither"])
def test_an_offset_is_added_to_the_outputs(form, normal):
    centers, alpha = torch.nn.functional.normalize(normal(9, 3)), normal(9, 1 if form == "flat" else 2, seed=2)
    flags = {"binary": form == "binary", "flat": form == "flat"}
    offset = torch.tensor([0.5] if form == "flat" else [0.25, -3.0])
    parts = fastagop.Laplace(1.0), centers, alpha
    plain, moved = (DeepRFMModule([], Readout(*parts, added), **flags) for added in (None, offset))
    Z = normal(4, 3, seed=3)
    expected = plain(Z) + {"binary": -3.0, "flat": 0.5, "neither": offset.double()}[form]
    torch.testing.assert_close(moved(Z), expected)
    assert torch.equal(moved.state_dict()["readout.offset"], offset.double())
    assert "readout.offset" not in plain.state_dict()


@pytest.mark.parametrize("features", FEATURES)
def test_is_the_estimators_layers_in_sequence(features):
    """A layer is a module by itself: it returns what transform does, its buffers are copies, and casts spare it."""
    model, X = fitted(features=features, dtype="float64")
    module = model.to_module()
    entering = X
    for index, layer in enumerate(module.layers):
        expected = {"agop", "root", "weight"} | ({"bias"} if model._layers[0].bias is not None else set())
        assert set(layer.state_dict()) == expected
        entering = layer.half()(entering)
        assert torch.equal(entering, torch.from_numpy(model.transform(X.numpy(), layer=index + 1)))
        assert np.array_equal(layer.agop.numpy(), model.agops_[index])
    assert torch.equal(module.readout(entering), module(X))
    before = model.decision_function(X.numpy())
    for held in module.state_dict().values():
        held.zero_()
    assert np.array_equal(model.decision_function(X.numpy()), before)
