"""Derivatives of the operations: against finite differences and plain autograd, twice, in blocks, and compiled."""

from __future__ import annotations

import io
import math

import pytest
import torch
from kernel_cases import MODULE, cases

import fastagop
from fastagop import Gaussian, GeneralisedLaplace, Laplace, autograd

KERNELS = [case.at(1.2).kernel for case in cases(MODULE)]
NAMES = ["kernel_matrix", "kernel_matmul", "gradients", "agop"]


def made(n=6, m=5, d=3, K=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    X, Z, alpha, V = (
        torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((n, d), (m, d), (n, K), (m, K))
    )
    return tuple(t.to(dtype).requires_grad_() for t in (X, Z, alpha, V))


def call(name, kernel, X, Z, alpha, V, bandwidth=None):
    if name == "kernel_matrix":
        return autograd.kernel_matrix(kernel, X, Z, bandwidth=bandwidth)
    if name == "kernel_matmul":
        return autograd.kernel_matmul(kernel, X, Z, V if Z is not None else alpha, bandwidth=bandwidth)
    return getattr(autograd, name)(kernel, X, alpha, Z, bandwidth=bandwidth)


def plain(name, kernel, X, Z, alpha, V, bandwidth):
    """The operations by autograd from the definition, float64, for a Gaussian or a Laplace kernel."""

    def k(z, x):
        sq = (z - x).square().sum(-1)
        if isinstance(kernel, Gaussian):
            return torch.exp(-sq / (2 * bandwidth**2))
        return torch.exp(-sq.sqrt() / bandwidth)

    Z = X if Z is None else Z
    if name == "kernel_matrix":
        return k(X[:, None], Z[None])
    if name == "kernel_matmul":
        return k(X[:, None], Z[None]) @ V
    slopes = torch.func.vmap(torch.func.jacrev(lambda z: k(z[None], X) @ alpha))(Z)
    return slopes if name == "gradients" else torch.einsum("ica,icb->ab", slopes, slopes) / len(Z)


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_the_operations(name, kernel):
    X, Z, alpha, V = made()
    found = call(name, kernel, X, Z, alpha, V)
    arguments = {"kernel_matrix": (X, Z), "kernel_matmul": (X, Z, V)}.get(name, (X, alpha, Z))
    assert torch.equal(found, getattr(fastagop, name)(kernel, *(t.detach() for t in arguments)))
    assert found.requires_grad


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("alone", [False, True], ids=["Z", "Z is X"])
def test_finite_differences(name, kernel, alone):
    X, Z, alpha, V = made()
    width = torch.tensor(1.2, dtype=torch.float64, requires_grad=True)
    inputs = (X, alpha, width) if alone else (X, Z, alpha, V, width)

    def function(*given):
        if alone:
            return call(name, kernel, given[0], None, given[1], given[1], given[2])
        return call(name, kernel, *given)

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
@pytest.mark.parametrize("name", ["kernel_matrix", "kernel_matmul", "gradients"])
def test_finite_differences_twice(name, kernel):
    if name == "gradients" and not isinstance(kernel, (Gaussian, GeneralisedLaplace)):
        return  # third derivatives of the others go by the same formula
    X, Z, alpha, V = made(n=4, m=3, d=2)
    width = torch.tensor(1.2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda *g: call(name, kernel, *g), (X, Z, alpha, V, width), fast_mode=True)


@pytest.mark.parametrize(("n", "m", "d", "budget"), [(20, 500, 300, 2**22), (400, 250, 50, 2**20)])
def test_derivatives_keep_to_their_memory(n, m, d, budget, tensor_memory, monkeypatch):
    """Few centers of many features: work tensors of a block are as wide as those. Many blocks: their sums add up."""
    X, Z, alpha, _ = (t.detach() for t in made(n=n, m=m, d=d, dtype=torch.float32))
    given = [Z, X, alpha, torch.tensor(20.0), torch.ones(d, d)]
    monkeypatch.setattr(autograd, "_BLOCK_BYTES", budget)
    read = autograd._Spec.read("agop, Gaussian, apart, bandwidth 20.0")
    found, most = tensor_memory(lambda: autograd._by_blocks(read, 1, given))
    assert [t.shape for t in found] == [t.shape for t in given[:4]]
    assert most <= budget + 8 * (d * d + 6 * n * d)  # and, of all blocks, products of features, points in float64


@pytest.mark.parametrize("kernel", [Laplace(1.3), Gaussian(1.1)], ids=["Laplace", "Gaussian"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_derivatives_of_the_definition(name, kernel, dtype, monkeypatch):
    monkeypatch.setattr(autograd, "_BLOCK_BYTES", 400)  # a row or two a block
    given = made(n=9, m=7, d=4, K=3, dtype=dtype)
    wide = tuple(t.detach().double().requires_grad_() for t in given)
    narrow_width = torch.tensor(1.2, dtype=dtype, requires_grad=True)
    width = torch.tensor(narrow_width.item(), dtype=torch.float64, requires_grad=True)
    found, expected = call(name, kernel, *given, narrow_width), plain(name, kernel, *wide, width)
    towards = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    slopes = torch.autograd.grad(found, (*given, narrow_width), towards.to(dtype), allow_unused=True)
    true = torch.autograd.grad(expected, (*wide, width), towards, allow_unused=True)
    for a, b in zip(slopes, true, strict=True):
        assert (
            (a is None or not a.any())
            if b is None
            else (a - b).norm() <= (1e-5 if a.dtype == torch.float32 else 1e-12) * b.norm()
        )


@pytest.mark.parametrize("kernel", [Laplace(1.3), Gaussian(1.1), GeneralisedLaplace(1.2, 0.7)], ids=repr)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("power", [-83, 83])
def test_derivatives_in_any_unit_of_length(name, kernel, power):
    """Squared distances, and powers of the bandwidth, leave float32 in most of these units; derivatives do not."""
    slope = {"gradients": 1, "agop": 2}.get(name, 0)  # the operation is that of points in another unit times its power
    found = []
    for unit in (1.0, 2.0 ** (power if name != "agop" else math.copysign(30, power))):  # its own derivatives leave it
        X, Z, alpha, V = (t.detach() for t in made(dtype=torch.float32))
        given = [t.requires_grad_() for t in (X * unit, Z * unit, alpha, V, torch.tensor(1.2 * unit))]
        out = call(name, kernel, *given) * unit**slope
        towards = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
        places = [i for i in range(5) if i not in {"kernel_matrix": (2, 3), "kernel_matmul": (2,)}.get(name, (3,))]
        lengths = [unit if i in (0, 1, 4) else 1.0 for i in places]
        inputs = [given[i] for i in places]
        once = torch.autograd.grad(out, inputs, towards, create_graph=True)
        once = [slope * size for slope, size in zip(once, lengths, strict=True)]
        twice = torch.autograd.grad(sum(slope.sum() for slope in once), inputs)
        found.append([*once, *(slope * size for slope, size in zip(twice, lengths, strict=True))])
    for there, here in zip(*found, strict=True):
        assert (there - here).norm() <= 1e-5 * there.norm()


def test_a_smooth_kernels_hessian_where_points_meet():
    x = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    z = torch.zeros(1, 2, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(lambda x: autograd.kernel_matrix(Gaussian(2.0), x, z).sum(), x)
    torch.testing.assert_close(hessian.reshape(2, 2), -torch.eye(2, dtype=torch.float64) / 4)
    hessian = torch.autograd.functional.hessian(lambda x: autograd.kernel_matrix(Laplace(2.0), x, z).sum(), x)
    assert torch.equal(hessian.reshape(2, 2), torch.zeros(2, 2, dtype=torch.float64))  # a kink counts as 0


def test_collapsed_points_far_from_the_origin():
    """Derivatives keep their digits where an expansion of distances would not."""
    X, Z, alpha, V = (t.detach() for t in made(n=8, m=6))
    X, Z = (1e-3 * X + 100.0), (1e-3 * Z + 100.0)
    given = tuple(t.float().double().float().requires_grad_() for t in (X, Z, alpha, V))
    wide = tuple(t.detach().double().requires_grad_() for t in given)
    kernel, width = Gaussian(1e-3), torch.tensor(1e-3, dtype=torch.float64)
    found = torch.autograd.grad(call("kernel_matmul", kernel, *given).sum(), given[:2])
    true = torch.autograd.grad(plain("kernel_matmul", kernel, *wide, width).sum(), wide[:2])
    for a, b in zip(found, true, strict=True):
        assert (a - b).norm() <= 1e-3 * b.norm()  # float32 points at 100 are 8e-6 apart, a hundredth of the spread


@pytest.mark.parametrize("name", NAMES)
def test_the_operator_is_torchs(name):
    """Schema, fake tensors and registration of derivatives, as torch checks them."""
    X, Z, alpha, V = made()
    spec = f"{name}, Laplace, apart, bandwidth 1.3"
    more = {"kernel_matrix": [], "kernel_matmul": [V]}.get(name, [alpha])
    rows, others = (X, Z) if name.startswith("kernel") else (Z, X)
    width = torch.tensor(1.3, dtype=torch.float64)
    torch.library.opcheck(torch.ops.fastagop.blockwise.default, (spec, 0, [rows, others, *more, width]))


def test_compiles_without_a_break():
    X, Z, _, V = made(dtype=torch.float32)
    kernel = Laplace(1.3)

    def function(X, Z, V):
        return autograd.kernel_matmul(kernel, X, Z, V).square().sum()

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(function(X, Z, V), (X, Z, V))
    found = torch.autograd.grad(compiled(X, Z, V), (X, Z, V))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_call_is_saved_and_keeps_its_derivatives():
    X, Z, _, V = made(dtype=torch.float32)
    traced, file = torch.jit.trace(lambda *of: autograd.kernel_matmul(Laplace(1.3), *of), (X, Z, V)), io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    given = [t.detach() + 0.1 for t in (X, Z, V)]
    results = []
    for function in (torch.jit.load(file), lambda *of: autograd.kernel_matmul(Laplace(1.3), *of)):
        tensors = [t.clone().requires_grad_() for t in given]
        out = function(*tensors)
        results.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("call_", "message"),
    [
        (lambda X: autograd.kernel_matrix(fastagop.Polynomial(2, 1.0, 1.0), X), "radial kernels only, got Polynomial"),
        (lambda X: autograd.kernel_matrix(Laplace(1.0), X, bandwidth=2.0), "bandwidth must be a tensor of one number"),
        (lambda X: autograd.kernel_matrix(Laplace(1.0), X, bandwidth=torch.tensor(2)), "of one number, floating, got"),
    ],
)
def test_what_is_refused(call_, message):
    with pytest.raises(TypeError, match=message):
        call_(made()[0])


def test_what_holds_no_numbers_is_named():
    """Of tensors of which one is on device meta torch computes none, and the result was whatever lay in its memory."""
    X, Z, alpha, _ = made()
    meta, kernel = X.detach().to("meta"), Gaussian(1.0)
    for name, call_ in {
        "X": lambda: autograd.kernel_matrix(kernel, meta, Z),
        "Z": lambda: autograd.agop(kernel, X, alpha, meta),
        "V": lambda: autograd.kernel_matmul(kernel, X, None, alpha.detach().to("meta")),
        "bandwidth": lambda: autograd.kernel_matrix(kernel, X, bandwidth=torch.ones((), device="meta")),
    }.items():
        with pytest.raises(
            ValueError, match=f"{name} must hold numbers as the other tensors do, got one on device meta"
        ):
            call_()
    assert autograd.kernel_matrix(kernel, meta).shape == (6, 6)
    with pytest.raises(TypeError, match=r"V must be a torch\.Tensor, got NoneType"):
        autograd.kernel_matmul(kernel, X, Z, None)
    with pytest.raises(TypeError, match=r"Z must be a torch\.Tensor, got ndarray"):
        autograd.gradients(kernel, X, alpha, Z.detach().numpy())


def test_a_batch_of_nothing():
    X, Z, alpha, _ = (t.detach() for t in made())
    batched = torch.func.vmap(lambda z: autograd.gradients(Laplace(1.0), X, alpha, z), in_dims=1)
    assert batched(Z[:, None].repeat(1, 0, 1)).shape == (0, 5, 2, 3)
    slopes = torch.func.vmap(torch.func.grad(lambda z: autograd.kernel_matrix(Laplace(1.0), z, X).sum()))
    assert slopes(Z[None][:0]).shape == (0, 5, 3)


def test_no_points():
    X, Z, alpha, _ = made(m=0)
    out = autograd.gradients(Laplace(1.0), X, alpha, Z)
    assert out.shape == (0, 2, 3)
    assert all(not g.any() for g in torch.autograd.grad(out.sum(), (X, Z, alpha)))


def test_near_pairs_keep_their_digits_in_float32():
    """A kink's weight grows like 1 / r, and its differences would cancel."""
    generator = torch.Generator().manual_seed(0)
    X, a = torch.randn(40, 6, generator=generator), torch.randn(40, 2, generator=generator)
    Z = (X + 1e-5 * torch.randn(40, 6, generator=generator)).requires_grad_()
    kernel = Laplace(2.0)
    found = torch.autograd.grad(autograd.kernel_matmul(kernel, Z, X, a).sum(), Z)[0]
    true = fastagop.gradients(kernel, X.double(), a.double(), Z.detach().double()).sum(1)
    assert (found - true).norm() <= 1e-5 * true.norm()


@pytest.mark.parametrize("kernel", [Laplace, Gaussian])
@pytest.mark.parametrize("bandwidth", [1e-50, 1e-25, 1e17, 1e25, 1e50])
def test_bandwidths_far_from_the_points(kernel, bandwidth):
    """A kernel's own bandwidth may be beyond float32, and so may the points divided by it."""
    X, found = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), []
    for x in (X.requires_grad_(), X.detach().double().requires_grad_()):
        K = autograd.kernel_matrix(kernel(bandwidth), x)
        assert torch.equal(K, fastagop.kernel_matrix(kernel(bandwidth), x))
        slope = torch.autograd.grad(K.sum(), x, create_graph=True)[0]
        found.append((slope.detach(), torch.autograd.grad(slope[0].sum(), x)[0]))
    for narrow, wide in zip(*found, strict=True):
        torch.testing.assert_close(narrow, wide.float(), rtol=1e-5, atol=0.0)


def test_a_class_that_hides_another_is_refused():
    class Matern52(fastagop.Matern52):
        """Another kernel of that name."""

    with pytest.raises(TypeError, match="another kernel class is called Matern52, too"):
        autograd.kernel_matrix(fastagop.Matern52(1.0), made()[0])
    Matern52.__name__ = "Hidden"  # later tests find the other one again


def test_no_outputs_and_arrays():
    X, _, _, _ = made()
    nothing = torch.zeros(len(X), 0, dtype=torch.float64)
    out = autograd.agop(Gaussian(1.0), X, nothing)
    assert not torch.autograd.grad(out.sum(), X)[0].any()
    with pytest.raises(TypeError, match=r"X must be a torch\.Tensor, got ndarray"):
        autograd.kernel_matrix(Gaussian(1.0), X.detach().numpy())


@pytest.mark.parametrize("kernel", [Gaussian(1.2), Laplace(1.2)], ids=repr)
@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_and_functional_transforms_are_those_of_the_definition(name, kernel):
    inputs = [t.detach() for t in (*made(), torch.tensor(1.2, dtype=torch.float64))]
    steps = [t.detach() for t in (*made(seed=1), torch.tensor(0.7, dtype=torch.float64))]

    def ours(*inputs):
        return call(name, kernel, *inputs[:-1], bandwidth=inputs[-1])

    def truth(*inputs):
        return plain(name, kernel, *inputs)

    places = tuple(range(len(inputs)))
    found = [
        (
            torch.func.jvp(f, tuple(inputs), tuple(steps)),
            torch.func.grad(lambda *given, f=f: f(*given).square().sum(), argnums=places)(*inputs),
            torch.func.vmap(f)(*(torch.stack([a, b]) for a, b in zip(inputs, steps, strict=True))),
            torch.func.vmap(torch.func.grad(lambda x, f=f: f(x, *inputs[1:]).sum()))(
                torch.stack([inputs[0], steps[0]])
            ),
        )
        for f in (ours, truth)
    ]
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_forward_mode_over_reverse_mode_gives_second_derivatives_of_same_points():
    X, _, alpha, _ = (t.detach() for t in made())
    distinct = ~torch.eye(len(X), dtype=torch.bool)  # The definition has no derivative where a point meets itself.

    def ours(X):
        return autograd.kernel_matrix(Laplace(1.2), X)[distinct].square().sum()

    def truth(X):
        sq = (X[:, None] - X[None]).square().sum(-1)[distinct]
        return torch.exp(-sq.sqrt() / 1.2).square().sum()

    torch.testing.assert_close(torch.func.hessian(ours)(X), torch.func.hessian(truth)(X), rtol=1e-9, atol=1e-12)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(alpha, torch.ones_like(alpha))
        moved = torch.autograd.forward_ad.unpack_dual(autograd.kernel_matmul(Laplace(1.2), X, None, dual)).tangent
    torch.testing.assert_close(moved, fastagop.kernel_matmul(Laplace(1.2), X, X, torch.ones_like(alpha)))


@pytest.mark.parametrize("kernel", [Laplace(1.2), Gaussian(1.2)], ids=repr)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_derivatives_among_collapsed_points(offset, name, kernel, cloud):
    """Products around one mean for all points lose the ratio of spread and distance of their digits (Laplace: 1e-6)."""
    points = cloud("collapsed 1e-9", n=30, d=6) + offset
    points = points[points.unique(dim=0, return_inverse=True)[1].unique()]  # a kink has no derivative
    X, Z, bandwidth = points[:15], points[15:], torch.tensor(1.2, dtype=torch.float64)
    alpha, V = torch.linspace(-1, 2, 2 * len(X), dtype=X.dtype).view(-1, 2), torch.ones(len(Z), 2, dtype=X.dtype)
    both = []
    for f in (
        lambda X, Z: call(name, kernel, X, Z, alpha, V),
        lambda X, Z: plain(name, kernel, X, Z, alpha, V, bandwidth),
    ):
        given = X.clone().requires_grad_(), Z.clone().requires_grad_()
        found = f(*given)
        weights = torch.linspace(1, 3, found.numel(), dtype=X.dtype).view(found.shape)
        once = torch.autograd.grad((found * weights).sum(), given, create_graph=True)
        steps = [torch.linspace(-1, 1, t.numel(), dtype=X.dtype).view(t.shape).cos() for t in once]
        twice = torch.autograd.grad(sum((g * s).sum() for g, s in zip(once, steps, strict=True)), given)
        both.append([*once, *twice])
    for got, true in zip(*both, strict=True):
        assert float((got - true).norm() / true.norm()) <= 1e-9
