"""One error vocabulary: a bad argument is refused by name, with the documented type, before anything runs."""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from fastagop.kernels import checks
from fastagop.kernels.families.dot_product import DotProduct
from fastagop.kernels.memory import free
from fastagop.kernels.pair_backend.angle import AngleProfile
from fastagop.kernels.pair_backend.coordinates import CoordinateProfile
from fastagop.kernels.pair_backend.dot import DotProfile
from fastagop.kernels.pair_backend.pairs import PairKernel
from fastagop.kernels.profile import constants
from fastagop.kernels.radial import Radial

import fastagop
from fastagop import Gaussian, Laplace

N, D, K = 20, 4, 3


@pytest.fixture
def valid(cloud, normal):
    """valid(op): keyword arguments of a call that works."""

    def build(op):
        X, Z = cloud("spread", n=N, d=D), cloud("spread", n=8, d=D, seed=2)
        words = {"kernel": Laplace(2.0), "X": X}
        return {
            "kernel_matrix": {**words, "Z": Z},
            "kernel_matmul": {**words, "Z": Z, "V": normal(8, K)},
            "gradients": {**words, "alpha": normal(N, K), "Z": Z},
            "agop": {**words, "alpha": normal(N, K), "Z": Z},
            "solve": {**words, "Y": normal(N, K)},
        }[op]

    return build


def call(op, words):
    return getattr(fastagop, op)(**words)


TENSORS = {
    "kernel_matrix": ["X", "Z"],
    "kernel_matmul": ["X", "Z", "V"],
    "gradients": ["X", "alpha", "Z"],
    "agop": ["X", "alpha", "Z"],
    "solve": ["X", "Y"],
}
EVERY_TENSOR = [(op, name) for op, names in TENSORS.items() for name in names]
FOLLOWERS = [(op, name) for op, name in EVERY_TENSOR if name != "X"]  # those that must agree with X
ops = pytest.mark.parametrize("op", TENSORS)
every_tensor = pytest.mark.parametrize(("op", "name"), EVERY_TENSOR)
followers = pytest.mark.parametrize(("op", "name"), FOLLOWERS)


@ops
def test_the_call_that_the_others_break_works(op, valid):
    assert call(op, valid(op)) is not None


# ---- tensors


@every_tensor
@pytest.mark.parametrize(
    "make",
    [
        lambda t: t.numpy(),  # arrays are for the estimators
        lambda t: t.tolist(),
        lambda t: 1.0,
        lambda t: "data",
    ],
    ids=["array", "list", "number", "text"],
)
def test_no_tensor(op, name, make, valid):
    words = valid(op)
    with pytest.raises(TypeError, match=rf"^{name} must be a torch.Tensor"):
        call(op, {**words, name: make(words[name])})


@every_tensor
@pytest.mark.parametrize(
    "dtype",
    [torch.int64, torch.int32, torch.bool, torch.float16, torch.bfloat16, torch.complex64, torch.complex128],
    ids=str,
)
def test_dtype(op, name, dtype, valid):
    words = valid(op)
    with pytest.raises(TypeError, match=rf"^{name} must be float32 or float64, got {dtype}"):
        call(op, {**words, name: words[name].to(dtype)})


@every_tensor
@pytest.mark.parametrize(
    "make", [lambda t: t[0], lambda t: t[None], lambda t: t.sum()], ids=["vector", "stack", "scalar"]
)
def test_dimensions(op, name, make, valid):
    words = valid(op)
    with pytest.raises(ValueError, match=rf"^{name} must be a matrix, got shape"):
        call(op, {**words, name: make(words[name])})


@every_tensor
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0), (-1, -1)])  # first and last: nothing is skipped
def test_not_finite(op, name, value, place, valid):
    words = valid(op)
    bad = words[name].clone()
    bad[place] = value
    with pytest.raises(ValueError, match=rf"^{name} holds NaN or infinity"):
        call(op, {**words, name: bad})


@every_tensor
def test_infinities_that_cancel(op, name, valid):
    words = valid(op)
    bad = words[name].clone()
    bad[0, 0], bad[1, 0] = math.inf, -math.inf
    with pytest.raises(ValueError, match=rf"^{name} holds NaN or infinity"):
        call(op, {**words, name: bad})


@pytest.mark.parametrize("name", ["alpha", "Y", "V"])
def test_large_numbers_are_finite(name, valid):
    """A sum that overflows is no infinity in the data."""
    op = {"alpha": "gradients", "Y": "solve", "V": "kernel_matmul"}[name]
    words = {key: value.float() if isinstance(value, torch.Tensor) else value for key, value in valid(op).items()}
    words[name] = torch.full_like(words[name], 1e37)
    assert call(op, words) is not None


@followers
def test_dtype_of_the_others(op, name, valid):
    words = valid(op)
    with pytest.raises(ValueError, match=rf"^{name} is torch.float32 .*X is torch.float64"):
        call(op, {**words, name: words[name].float()})


@followers
def test_device_of_the_others(op, name, valid):
    words = valid(op)
    # the only other device there is everywhere holds no data, which is worth an error of its own
    with pytest.raises((TypeError, ValueError), match=rf"^{name} .* on meta"):
        call(op, {**words, name: words[name].to("meta")})


@followers
def test_shapes_that_do_not_fit(op, name, valid):
    words = valid(op)
    axis = "columns" if name == "Z" else "rows"
    short = words[name][:, :-1] if name == "Z" else words[name][:-1]
    partner = "Z" if name == "V" else "X"
    with pytest.raises(ValueError, match=rf"^{name} must have \d+ {axis} to agree with {partner}, got shape"):
        call(op, {**words, name: short})


def test_right_hand_side_without_evaluation_points(valid):
    words = {**valid("kernel_matmul"), "Z": None}
    with pytest.raises(ValueError, match=rf"^V must have {N} rows"):  # then it belongs to X
        call("kernel_matmul", words)


@ops
@pytest.mark.parametrize("shape", [(0, D), (N, 0), (0, 0)])
def test_no_data(op, shape, valid):
    with pytest.raises(ValueError, match=r"^X must have at least 1 row\(s\) and one column, got shape"):
        call(op, {**valid(op), "X": torch.zeros(shape, dtype=torch.float64)})


@ops
def test_missing(op, valid):
    with pytest.raises(TypeError, match=r"^X must be"):
        call(op, {**valid(op), "X": None})


# ---- kernels, words, numbers


@ops
@pytest.mark.parametrize("kernel", [None, 2.0, "laplace", Laplace, object()])
def test_kernel(op, kernel, valid):
    with pytest.raises(TypeError, match=r"^kernel must be a fastagop kernel"):
        call(op, {**valid(op), "kernel": kernel})


@ops
@pytest.mark.parametrize("word", ["double", "HIGHEST", "", None, 32])
def test_precision(op, word, valid):
    with pytest.raises(ValueError, match=r"^precision must be one of 'highest', 'high', 'medium'"):
        call(op, {**valid(op), "precision": word})


@ops
@pytest.mark.parametrize("word", ["cuda", "Torch", "", None])
def test_unknown_backend(op, word, valid):
    with pytest.raises(ValueError, match=r"^backend must be one of 'auto', .*'torch'.*, got"):
        call(op, {**valid(op), "backend": word})


@pytest.mark.parametrize(
    ("op", "word"), [*((op, "triton") for op in TENSORS), ("kernel_matrix", "keops"), ("solve", "keops")]
)
def test_backend_that_cannot_serve(op, word, valid):
    with pytest.raises(fastagop.BackendUnavailable) as error:
        call(op, {**valid(op), "backend": word})
    said = str(error.value)
    assert repr(word) in said  # which
    assert op in said  # for what
    assert "use backend='torch' or 'auto'" in said  # what to do
    assert isinstance(error.value, RuntimeError)


@ops
@pytest.mark.parametrize("word", ["auto", "torch"])
def test_backend_that_can(op, word, valid):
    assert call(op, {**valid(op), "backend": word}) is not None


@pytest.mark.parametrize(
    ("op", "name", "allowed"),
    [
        ("agop", "method", ("auto", "gradient", "gram")),
        ("agop", "reduction", ("mean", "sum")),
        ("solve", "method", ("auto", "cholesky", "eigh", "cg")),
    ],
)
def test_words(op, name, allowed, valid):
    for word in allowed:
        assert call(op, {**valid(op), name: word}) is not None
    for word in ("none", "", None, 1, [allowed[0]]):
        with pytest.raises(ValueError, match=f"^{name} must be one of .*{allowed[-1]!r}.*, got "):
            call(op, {**valid(op), name: word})


@pytest.mark.parametrize("value", [-1e-3, -1, math.nan, math.inf, None, "0", True, [0.0]])
def test_ridge(value, valid):
    with pytest.raises(ValueError, match=r"^ridge must be a finite number >= 0, got "):
        call("solve", {**valid("solve"), "ridge": value})


@pytest.mark.parametrize("value", [0, 1, 0.5, np.float32(0.5), np.int64(1)])
def test_ridge_of_any_number_type(value, valid):
    solution = call("solve", {**valid("solve"), "ridge": value})
    assert solution.ridge == float(value)
    assert type(solution.ridge) is float


@pytest.mark.parametrize("op", ["agop", "solve"])
@pytest.mark.parametrize("value", [0, -1, 0.5, math.nan, "1GB", True, [1]])
def test_memory_limit(op, value, valid):
    with pytest.raises(ValueError, match=r"^memory_limit must be a positive number of bytes or None, got "):
        call(op, {**valid(op), "memory_limit": value})


@pytest.mark.parametrize("op", ["agop", "solve"])
@pytest.mark.parametrize("value", [None, 10**9, 1e9, np.int64(10**9), np.float64(1e9)])
def test_memory_limit_of_any_number_type(op, value, valid):
    assert call(op, {**valid(op), "memory_limit": value}) is not None


@pytest.mark.parametrize("op", ["agop", "solve"])
def test_memory_limit_of_infinity(op, valid):
    assert call(op, {**valid(op), "memory_limit": math.inf}) is not None


@pytest.mark.parametrize("value", ["no", "mean", None, 2])
def test_center(value, valid):
    with pytest.raises((TypeError, ValueError), match="center"):
        call("agop", {**valid("agop"), "center": value})


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.empty(8, N, dtype=torch.float64), "shape"),  # turned round
        (torch.empty(N, 9, dtype=torch.float64), "shape"),
        (torch.empty(N * 8, dtype=torch.float64), "shape"),
        (torch.empty(N, 8), "float64"),
        (torch.empty(N, 8, dtype=torch.float64, device="meta"), "on cpu"),
        (np.empty((N, 8)), "tensor"),
        ("here", "tensor"),
    ],
)
def test_out(out, message, valid):
    with pytest.raises(ValueError, match=f"^out must be .*{message}"):
        call("kernel_matrix", {**valid("kernel_matrix"), "out": out})


@pytest.mark.parametrize("make", [lambda t: t.to_sparse(), lambda t: t.to("meta")], ids=["sparse", "meta"])
def test_tensors_without_plain_storage(make, valid):
    words = valid("kernel_matrix")
    with pytest.raises((TypeError, ValueError), match="X"):
        call("kernel_matrix", {**words, "X": make(words["X"]), "Z": None})


# ---- failures leave things as they were


@ops
def test_a_failure_leaves_nothing_behind(op, valid):
    before = torch.get_float32_matmul_precision(), torch.is_grad_enabled()
    words = valid(op)
    with pytest.raises(ValueError, match="X"):
        call(op, {**words, "X": words["X"] * math.nan})
    assert (torch.get_float32_matmul_precision(), torch.is_grad_enabled()) == before


def test_precision_is_restored_after_a_failure(valid, monkeypatch):
    def fail(self, sq):
        raise ArithmeticError("in the middle")

    monkeypatch.setattr(Gaussian, "value_", fail)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(ArithmeticError):
            fastagop.kernel_matrix(Gaussian(1.0), valid("kernel_matrix")["X"])
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_vocabulary_is_public():
    assert issubclass(fastagop.BackendUnavailable, RuntimeError)
    assert issubclass(fastagop.NumericalWarning, UserWarning)
    assert fastagop.BackendUnavailable.__doc__
    assert fastagop.NumericalWarning.__doc__


def test_coefficients_beyond_their_dtype(normal):
    X, Y = normal(20, 3, dtype=torch.float32), normal(20, 1, dtype=torch.float32)
    X[1:] = X[0] + 1e-3 * X[1:]
    with pytest.raises(ValueError, match="Y is so large"):
        fastagop.solve(Laplace(1.0), X, Y / Y.abs().max() * 1e38, ridge=1e-2)
    with pytest.raises(ValueError, match="alpha is so large"):
        fastagop.agop(Laplace(1.0), X, Y * 1e25)


def test_control_groups(tmp_path, monkeypatch):
    """The tightest limit on the way up counts, without the file pages that the system can drop; both versions."""
    monkeypatch.setattr(free, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(free, "_MOUNT", tmp_path / "mount")

    def group(path, **files):
        folder = tmp_path / "mount" / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name.replace("__", ".")).write_text(f"{text}\n")

    assert free.group_bytes() == math.inf  # no such file: no Linux
    (tmp_path / "groups").write_text("0::/job/step\n3:cpuset:/\n")
    assert free.group_bytes() == math.inf  # not mounted
    group("job", memory__max=1000, memory__current=700, memory__stat="anon 1\ninactive_file 50")
    group("job/step", memory__max="max", memory__current=600, memory__stat="inactive_file 0")
    assert free.group_bytes() == 350
    group("job/step", memory__max=640)
    assert free.group_bytes() == 40
    (tmp_path / "groups").write_text("4:memory,cpu:/docker/not_mounted\n")
    held = {"memory__usage_in_bytes": 90, "memory__stat": "inactive_file 1\ntotal_inactive_file 20"}
    group("memory", memory__limit_in_bytes=100, **held)
    assert free.group_bytes() == 30
    assert free.host_bytes() == 30


def test_what_is_free_stays_a_number_while_another_thread_forgets_it(monkeypatch):
    """A reading that is taken back between a look at its age and its use is still that reading."""

    class Forgetting(type(free._FREE)):
        """A path whose comparison is the moment at which the other thread forgets."""

        def __eq__(self, other):
            free.forget()
            return True

        __hash__ = type(free._FREE).__hash__

    places = (free._GROUPS, free._MOUNT, Forgetting(free._FREE))
    monkeypatch.setattr(free, "_last", (time.monotonic() + 60.0, places, 123))
    assert free.host_bytes() == 123


@pytest.mark.parametrize("bandwidth", ["2", True, b"2"])
def test_bandwidths_are_numbers(bandwidth):
    with pytest.raises(TypeError, match="bandwidth must be a number"):
        Laplace(bandwidth)


def test_numbers_that_a_dtype_does_not_hold(normal):
    with pytest.raises(ValueError, match="bandwidth must be a positive finite number"):
        Laplace(10**400)
    X = normal(4, 2, dtype=torch.float32)
    for call in (fastagop.kernel_matrix, lambda *args, **how: fastagop.solve(*args, X, **how)):
        with pytest.raises(ValueError, match="ridge 1e\\+39 is beyond"):
            call(Laplace(1.0), X, ridge=1e39)


def test_out_overlaps_itself(normal):
    X, room = normal(4, 2), torch.zeros(16, dtype=torch.float64)
    for out in (room.as_strided((4, 4), (1, 1)), room[:4].expand(4, 4), room.as_strided((4, 4), (3, 1))):
        with pytest.raises(ValueError, match="out overlaps itself"):
            fastagop.kernel_matrix(Laplace(1.0), X, out=out)
    fastagop.kernel_matrix(Laplace(1.0), X, out=room.view(4, 4).T)


@pytest.mark.parametrize("limit", [1, 1.0, 1.5, 2**90])
def test_memory_limits_are_bytes(limit):
    assert checks.memory_limit(limit) == int(limit)
    assert checks.memory_limit(None) is None
    assert checks.memory_limit(float("inf")) is None
    for wrong in (0, 0.99, -1, True, float("nan"), "1"):
        with pytest.raises(ValueError, match="memory_limit must be a positive number of bytes or None, got "):
            checks.memory_limit(wrong)


def test_integers_have_bounds():
    assert [checks.integer("depth", value, 1, 3) for value in (1, 3)] == [1, 3]
    assert checks.integer("depth", 10**9, 1) == 10**9
    for wrong in (0, 4, 2.0, True, None):
        with pytest.raises(ValueError, match=f"^depth must be an integer from 1 to 3, got {wrong}$"):
            checks.integer("depth", wrong, 1, 3)
    with pytest.raises(ValueError, match=r"^depth must be an integer >= 1, got 0$"):
        checks.integer("depth", 0, 1)


def test_numbers_are_finite_and_not_negative():
    assert [checks.nonnegative("ridge", value) for value in (0, 2.5)] == [0.0, 2.5]
    for wrong in (-1e-9, float("inf"), float("nan"), True, "1", None):
        with pytest.raises(ValueError, match=r"^ridge must be a finite number >= 0, got "):
            checks.nonnegative("ridge", wrong)
    largest = torch.finfo(torch.float32).max
    assert checks.ridge(largest, torch.float32) == largest
    assert checks.ridge(1e39, torch.float64) == 1e39


def test_tensors_beside_each_other_share_no_memory():
    """Neighbours in one piece of memory are apart; one item in common is not."""
    room = torch.zeros(20, dtype=torch.float64)
    checks.apart("out", room[4:8].view(2, 2), room[:4].view(2, 2), room[8:12])
    for start in (1, 7):
        with pytest.raises(ValueError, match="out shares memory with an input"):
            checks.apart("out", room[4:8].view(2, 2), room[start : start + 4])
    checks.apart("out", room[:0].view(0, 2), room)
    checks.apart("out", room.as_strided((2, 3), (3, 1)), torch.zeros(1))  # rows one after another
    checks.apart("out", room.as_strided((3, 2), (1, 3)), torch.zeros(1))
    checks.apart("out", room.view(4, 5)[:, ::2], torch.zeros(1))  # every second column, to the last
    with pytest.raises(ValueError, match=r"out overlaps itself \(strides \(2, 1\)\)"):
        checks.apart("out", room.as_strided((2, 3), (2, 1)), torch.zeros(1))


@pytest.mark.parametrize(("share", "refused"), [(1e-12, False), (1e-13, True)])
def test_rows_may_differ_in_size_as_far_as_float32_holds(share, refused):
    """Squares of the smaller ones' distances vanish beside those that are 2e12 times as large."""
    X = torch.full((5, 2), share)
    X[2] = 1.0
    if refused:
        with pytest.raises(ValueError, match=r"X\[2\] has an entry of size 1\.0e\+00 while half of the rows stay"):
            checks.spread(X, X, 1.0)
    else:
        checks.spread(X, X, 1.0)
    checks.spread(X.double(), X.double(), 1.0)


def _made(**methods):
    """A kernel class with these methods, as users write them."""
    return dataclass(frozen=True)(type("Own", (Radial,), {"__annotations__": {}, **methods}))(2.0)


OVERWRITES = lambda self, sq: sq.mul_(-0.5).exp_()  # noqa: E731


@pytest.mark.parametrize(
    ("methods", "kind", "text"),
    [
        ({"value_": lambda self, sq: torch.exp(-sq)}, TypeError, "Own.value_ must overwrite the tensor"),
        (
            {"value_": OVERWRITES, "weight_": lambda self, sq: 2 * sq},
            TypeError,
            "Own.weight_ must overwrite the tensor",
        ),
        (
            {"value_": OVERWRITES, "weight_from_value_": lambda self, k: 0.5 * k},
            TypeError,
            "Own.weight_from_value_ must overwrite the tensor",
        ),
        (
            {"value_": OVERWRITES, "weight_": lambda self, sq: sq.sqrt_().reciprocal_()},
            ValueError,
            "Own.weight_ must be 0 at distance 0, got inf",
        ),
        ({"value_": lambda self, sq: sq.add_(2.0)}, ValueError, "Own.value_ must be 1 at distance 0, got 2"),
    ],
)
def test_a_kernel_class_is_tried_once(methods, kind, text):
    """Blocks of distances that are not overwritten would be taken for kernel values."""
    X = torch.ones(3, 2)
    fastagop.kernel_matrix(Laplace(1.0) + Laplace(2.0), X)  # a sum of known classes says nothing of other sums
    for call in (
        lambda kernel: fastagop.kernel_matrix(kernel, X),
        lambda kernel: fastagop.agop(kernel + Laplace(2.0), X, X),
        lambda kernel: fastagop.solve(kernel, X, X, ridge=1.0),
        lambda kernel: fastagop.RFMRegressor(kernel).fit(X, X[:, 0]),
    ):
        with pytest.raises(kind, match=text):
            call(_made(**methods))


@dataclass(frozen=True)
class _Twice(CoordinateProfile):
    """Its value at distance 0 is 2, where kernels of sums over features have a diagonal of 1."""

    power = 1.0

    def value_(self, rho):
        return rho.neg_().exp_().mul_(2.0)


def test_a_kernel_of_sums_over_features_is_1_at_distance_0():
    for kernel in (_Twice(), Laplace(1.0) * _Twice()):
        with pytest.raises(ValueError, match=r"^kernel: _Twice\.value_ must be 1 at distance 0, got 2; write 2 \* k"):
            fastagop.kernel_matrix(kernel, torch.ones(3, 2))


def _fall(self, sq):
    """Exp(-r^2 / 2), whose weight at L = 1 is the value itself but at 0."""
    return sq.mul_(-0.5).exp_()


@pytest.mark.parametrize(
    ("base", "methods", "text"),
    [
        (
            Radial,
            {"value_": _fall, "weight_": lambda self, sq: _fall(self, sq).mul_(2.0)},
            "weight_ must give .* 0.9335 at",
        ),
        (Laplace, {"value_": _fall, "weight_": _fall}, "weight_beside_ must give"),  # what is inherited is another's
    ],
    ids=["of the class", "inherited"],
)
def test_weights_that_do_not_belong_to_the_values_are_refused(base, methods, text):
    """A wrong derivative would give a wrong AGOP without a word."""
    kernel = type("Own", (base,), methods)(1.0)
    for call in (fastagop.kernel_matrix, fastagop.settled):
        with pytest.raises(ValueError, match=rf"^kernel: Own\.{text}"):
            call(kernel, torch.randn(4, 2))


def _later(self, sq):
    raise NotImplementedError("no weight yet")


@pytest.mark.parametrize("methods", [{}, {"weight_": _later}])
def test_a_kernel_class_without_gradients_has_values(methods):
    X = torch.zeros(3, 2)
    kernel = _made(value_=OVERWRITES, **methods)
    assert torch.equal(fastagop.kernel_matrix(kernel, X), torch.ones(3, 3))
    with pytest.raises((TypeError, NotImplementedError), match=r"Own defines no|no weight yet"):
        fastagop.gradients(kernel, X, X)


class _Plain(DotProduct):
    """Without the decorator."""

    def __init__(self, scale):
        object.__setattr__(self, "scale", scale)


class _Typed(Radial):
    shape: float = 1.0


@pytest.mark.parametrize(("kernel", "what"), [(_Plain(2.0), "an __init__"), (_Typed(2.0), r"parameters \(shape\)")])
def test_a_kernel_class_with_parameters_is_a_dataclass(kernel, what):
    """Two kernels that differ in such a parameter would be equal, and a file would not hold it."""
    with pytest.raises(TypeError, match=rf"^kernel: _\w+ has {what} of its own and is no dataclass.*frozen=True"):
        fastagop.kernel_matrix(kernel, torch.zeros(3, 2))


@pytest.mark.parametrize(
    ("kind", "call", "method"),
    [
        (DotProfile, lambda kernel: kernel.slope_(torch.zeros(1)), r"slope_\(t\)"),
        (DotProfile, lambda kernel: kernel.value_(torch.zeros(1)), r"value_\(t\)"),
        (AngleProfile, lambda kernel: kernel.degree, "degree"),
        (AngleProfile, lambda kernel: kernel.tangent(None), r"tangent\(angles\)"),
        (CoordinateProfile, lambda kernel: kernel.weight_(torch.zeros(1)), r"weight_\(rho\)"),
        (PairKernel, lambda kernel: kernel.pairs(None, None), r"pairs\(X, Z\)"),
    ],
)
def test_a_kernel_class_is_told_which_method_it_lacks(kind, call, method):
    with pytest.raises(TypeError, match=rf"^Mine defines no {method}.*; give its class one"):
        call(type("Mine", (kind,), {})())


def test_a_further_parameter_may_be_a_bandwidth_by_its_name():
    kind = dataclasses.make_dataclass("Two", [("outer_bandwidth", float)], bases=(Radial,), frozen=True)
    assert constants(kind(2.0, 4.0), torch.float64) == {"inverse_bandwidth": 0.5, "outer_bandwidth": 4.0}


def test_a_kernel_class_sees_matrices_only():
    def value_(self, sq):
        assert sq.ndim == 2
        return sq.mul_(-0.5).exp_()

    assert torch.equal(fastagop.kernel_matrix(_made(value_=value_), torch.zeros(3, 2)), torch.ones(3, 3))


@pytest.mark.parametrize("name", ["X", "Z"])
def test_one_point_is_a_row(name):
    X = torch.ones(3, 2)
    points = {"X": X, "Z": X, name: X[0]}
    with pytest.raises(ValueError, match=rf"{name}\[None\] is one point, {name}\[:, None\] is 2 points of one feature"):
        fastagop.gradients(Laplace(2.0), points["X"], X, points["Z"])
