"""What a backend asks of a kernel: what it says about itself and, of a radial one, its value and its gradient weight.

A profile has phi(0) = 1, and r enters it as r / L. The radial kernels themselves are in ``radial``, the others in
``families``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

_MEDIAN = "median"


def nearest_factor(value: float, like: torch.Tensor) -> float:
    """The nearest factor that is neither zero nor infinite in a dtype, and has all of its digits."""
    limits = torch.finfo(like.dtype)
    return math.copysign(min(max(abs(value), limits.tiny), limits.max), value)


def multiply_(t: torch.Tensor, *factors: float) -> torch.Tensor:
    """Multiply t by all factors in place: by their product where the dtype holds it, else in steps that it holds.

    Zero stays zero and infinity stays infinite, as no step is either of them.
    """
    product, limits = math.prod(factors), torch.finfo(t.dtype)
    if limits.tiny <= abs(product) <= limits.max:
        return t.mul_(product)
    for factor in factors:
        size = min(max(abs(factor), 1e-300), 1e300)
        steps = max(1, math.ceil(abs(math.log2(size)) / 100))
        for _ in range(steps):
            t.mul_(size ** (1.0 / steps))
        if factor < 0:
            t.neg_()
    return t


def bounded_factor(value: float, like: torch.Tensor, beyond: float = math.inf) -> float:
    """A factor of finite numbers that a dtype holds: for larger ones ``beyond``, or its largest number.

    Smaller ones become zero: distances, which may be infinite, go by ``multiply_``.
    """
    largest = torch.finfo(like.dtype).max
    return value if value <= largest else min(beyond, largest)


def without_duplicates_(sq: torch.Tensor) -> torch.Tensor:
    """Overwrite zeros by infinity, where a profile and its weight vanish.

    A pair at distance zero adds nothing to a gradient; with a weight it would add w (x - x) in rounded parts, which may
    exceed everything else.
    """
    return sq.masked_fill_(sq == 0, math.inf)


@dataclass(frozen=True)
class Formulas:
    """k(x, z), and its gradient at z, as KeOps writes them; of a radial kernel phi(r), and w(r) (x - z), zero at r = 0.

    ``numbers`` follow the kernel's own in c: KeOps' constants have float32's digits only.
    """

    value: str
    slope: str
    numbers: tuple[float, ...] = ()


if TYPE_CHECKING:

    class Bandwidth:
        """What type checkers know of a bandwidth: what it may be given as, and that whoever computes sees a number."""

        def __get__(self, kernel: object, owner: object = None) -> float: ...

        def __set__(self, kernel: object, value: float | str | tuple[str, float]) -> None: ...

else:
    Bandwidth = float


class Kernel:
    """What every kernel says of itself, so that what cannot serve it says so by name; parameters are dataclass fields.

    Attributes:
        radial: a function of ||x - z||_2 with value 1 at 0, which all backends and solvers are made for.
        shift_invariant: k(x + a, z + a) = k(x, z): offsets of the points may be subtracted.
        rotation_invariant: k(Q x, Q z) = k(x, z) for orthogonal Q: fewer points than features may be turned into
            coordinates of their span.
        unit_diagonal: k(x, x) = 1.
        nonnegative: no value is negative.
        wide: blocks are computed in float64 whatever the dtype of the points is.
        agop_forms: of "gradient" and "gram".
        norm: the p of ||x - z||_p that a bandwidth of "median" is the median of; None for a kernel without bandwidth.
        parts: the kernels that it is made of.
        measure: the number of a pair by whose name its ``triton`` text knows it: "sq" is ||x - z||_2^2, "dot" x.z, "l1"
            ||x - z||_1.
    """

    radial: ClassVar[bool] = False
    # Kernels made of others have properties of these names, so their types are in the text above.
    shift_invariant: Any = False
    rotation_invariant: Any = False
    unit_diagonal: Any = False
    nonnegative: Any = False
    wide: Any = True
    agop_forms: ClassVar[tuple[str, ...]] = ("gradient",)
    norm: ClassVar[float | None] = None
    # The kernel in the languages of the devices, an attribute or a property of its class; a backend refuses a kernel
    # that has none in its own.
    triton: Any = None
    keops: Any = None
    measure: ClassVar[str] = ""

    @property
    def family_exponent(self) -> float | None:
        """Where the kernel stands in a family of exponents, which ``with_exponent`` goes through; None without one."""
        return None

    def with_exponent(self, exponent: float) -> Any:
        """The kernel of the same family and bandwidth with another exponent."""
        raise TypeError(f"kernel {self!r} has no exponent")

    @property
    def parts(self) -> tuple[Kernel, ...]:
        """None but for sums and products."""
        return ()

    def _positive(self, name: str, largest: float = math.inf) -> None:
        """Make a parameter a float; refuse what is no number, not finite, or outside (0, largest]."""
        value = getattr(self, name)
        limit = "" if largest == math.inf else f" up to {largest:g}"
        object.__setattr__(self, name, _positive(name, value, value, limit, largest))

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The kernel's parameters by name, as scikit-learn asks for them; with ``deep`` those of its parts, too."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}  # pyright: ignore[reportArgumentType]
        for name, part in list(found.items()):
            if deep and isinstance(part, Kernel):
                found |= {f"{name}__{inner}": value for inner, value in part.get_params().items()}
        return found

    def set_params(self, **params: Any) -> Any:
        """A changed copy: kernels never change themselves, so that they may be shared, hashed and compared.

        Raises:
            ValueError: a parameter that the kernel does not have. ValueError, TypeError: naming the parameter.
        """
        known, inner = self.get_params(deep=False), {}
        for name in list(params):
            first, _, rest = name.partition("__")
            if rest and isinstance(known.get(first), Kernel):
                inner.setdefault(first, {})[rest] = params.pop(name)
            elif name not in known:
                known = list(self.get_params())
                raise ValueError(f"Invalid parameter {name!r} for kernel {self!r}. Valid parameters are: {known!r}.")
        changed = {name: params.get(name, known[name]).set_params(**values) for name, values in inner.items()}
        return replace(self, **{**params, **changed})  # pyright: ignore[reportArgumentType]

    def __sklearn_clone__(self) -> Any:
        """Itself: what never changes needs no copy."""
        return self

    def _lacks(self, method: str) -> TypeError:
        """What a class is told of a method that it is to define."""
        name = type(self).__name__
        return TypeError(f"{name} defines no {method}; give its class one, or use a kernel such as Laplace or Gaussian")

    def weight_from_value_(self, value: torch.Tensor) -> torch.Tensor | None:
        """Overwrite kernel values by gradient weights; None where there is no closed form for it.

        The caller sets pairs at distance zero itself: the value 1 may also be a tiny distance rounded away.
        """
        return None


@dataclass(frozen=True)
class Profile(Kernel):
    """A radial kernel with a bandwidth; subclasses give the profile.

    The in-place methods below consume a tensor of squared distances (or kernel values) block by block, so that
    a block is transformed while it is in cache. The kernel's gradient at distance zero is zero by definition.

    A bandwidth that is "median" or ("median", factor) is a number only once there are points; ``checks.kernel`` keeps
    such kernels from all that computes.
    """

    bandwidth: Bandwidth

    radial = True
    shift_invariant = True
    rotation_invariant = True
    unit_diagonal = True
    nonnegative = True
    agop_forms: ClassVar[tuple[str, ...]] = ("gradient", "gram")
    norm: ClassVar[float | None] = 2.0
    measure: ClassVar[str] = "sq"
    triton: ClassVar[str | None] = None  # pyright: ignore[reportIncompatibleVariableOverride]
    keops: ClassVar[Formulas | None] = None  # pyright: ignore[reportIncompatibleVariableOverride]

    def __post_init__(self) -> None:
        object.__setattr__(self, "bandwidth", bandwidth_of(self.bandwidth))

    def value_(self, sq: torch.Tensor) -> torch.Tensor:
        """Overwrite squared distances r^2 by phi(r)."""
        raise self._lacks("value_(sq)")

    def weight_(self, sq: torch.Tensor) -> torch.Tensor:
        """Overwrite squared distances r^2 by the gradient weight w(r) = -phi'(r)/r, zero where r = 0."""
        raise self._lacks("weight_(sq)")

    def weight_beside_(self, sq: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """``weight_``, with the kernel values of the same pairs at hand, which it leaves as they are.

        Where w is made of k and r, a class saves the exponential.
        """
        return self.weight_(sq)

    def rough_weight(self, sq: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """The weights for a search that needs three digits of them, from r^2 and k of the same pairs; both stay.

        Where r = 0 the value may be any number; the weight there is zero.
        """
        return self.weight_(sq.clone())

    def _weight_slope(self, sq: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """dw/dt at t = r^2 > 0, from t and the weights there; differentiable in both."""
        raise TypeError(
            f"kernel {type(self).__name__} has no second derivatives; give its class a method _weight_slope"
        )

    @property
    def _weight_at_zero(self) -> float:
        """The gradient weight's limit at r = 0 where the kernel is twice differentiable there, and 0 elsewhere."""
        return 0.0


def _positive(name: str, value, given, allowed: str, largest: float = math.inf) -> float:
    """A number as a float; refused, as part of what was given, where it is none, not finite, or not in (0, largest]."""
    try:
        if isinstance(value, (bool, str, bytes)):
            raise TypeError
        number = float(value)  # numpy scalars, zero-dimensional tensors
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number{allowed}, got {given!r}") from None
    except OverflowError:
        number = math.inf
    if not (math.isfinite(number) and 0 < number <= largest):
        raise ValueError(f"{name} must be a positive finite number{allowed}, got {given!r}")
    return number


def bandwidth_of(given: Any) -> float | str | tuple[str, float]:
    """A bandwidth as a kernel stores it: a float, "median" or ("median", factor); a factor of 1 is the word alone."""
    words = f", {_MEDIAN!r} or ({_MEDIAN!r}, factor > 0)"
    word, factor = given if isinstance(given, (tuple, list)) and len(given) == 2 else (given, 1.0)
    if not isinstance(word, str) or word != _MEDIAN:
        return _positive("bandwidth", given, given, words)
    factor = _positive("bandwidth", factor, given, words)
    return _MEDIAN if factor == 1.0 else (_MEDIAN, factor)


def median_factor(kernel: Kernel) -> float | None:
    """What the median distance is to be multiplied by for a bandwidth; None where there is none, or it is a number."""
    stored: object = getattr(kernel, "bandwidth", None)
    if stored == _MEDIAN:
        return 1.0
    return stored[1] if isinstance(stored, tuple) else None


def unsettled(kernel: Kernel) -> bool:
    """Whether a bandwidth of the kernel, or of a part of it, is still to be chosen from points."""
    return median_factor(kernel) is not None or any(unsettled(part) for part in kernel.parts)


def weight_slope(kernel: Profile, sq: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The derivative of the gradient weight in r^2 where r > 0, which second derivatives of kernel machines need.

    Raises:
        TypeError: naming the kernel whose class does not define it.
    """
    return kernel._weight_slope(sq, weight)


def weight_at_zero(kernel: Profile) -> float:
    """The gradient weight's limit at r = 0, zero where there is a kink."""
    return kernel._weight_at_zero


def text(kernel: Kernel, language: str) -> Any:
    """A kernel in a device's language, "triton" or "keops"; None where its class itself gives none.

    What a parent class gives does not count: the class may have another profile.
    """
    return getattr(kernel, language) if language in vars(type(kernel)) else None


def constants(kernel: Kernel, dtype: torch.dtype) -> dict[str, float]:
    """A kernel's parameters as devices get them, by name, in the order of its fields: numbers of that dtype.

    In the place of a bandwidth L is "inverse_bandwidth", 1 / L, at most so large that times a difference of points
    (below 2^21, in units) it stays finite.
    """
    found = {field.name: getattr(kernel, field.name) for field in fields(kernel)}  # pyright: ignore[reportArgumentType]
    largest = torch.finfo(dtype).max * 2.0**-22
    inverse = {"bandwidth": "inverse_bandwidth"}
    return {
        inverse.get(name, name): min(1.0 / value, largest) if name in inverse else value
        for name, value in found.items()
    }
