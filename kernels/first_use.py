"""A kernel class, which may be anybody's, tried at its first use."""

from __future__ import annotations

import inspect
import math

import torch

from .profile import Kernel, Profile

_TRIED: set[type] = set()  # classes of kernels


def try_once(value: Kernel) -> None:
    """Try a class at its first use: a profile that returns another tensor leaves distances as values.

    Raises:
        TypeError: what a method returns is not what it was given, overwritten; or the class has parameters that are no
            dataclass fields. ValueError: k(x, x) is not 1, the weight there is not finite, or other weights do not
            belong to the values.
    """
    if type(value) in _TRIED:
        return
    _check_fields(type(value))
    if isinstance(value, Profile):
        sq, name = torch.tensor([[0.0, 1.0]], dtype=torch.float64, device="cpu"), type(value).__name__
        for method in ("value_", "weight_", "weight_from_value_"):
            if getattr(type(value), method) is getattr(Profile, method):
                continue  # says itself that it is missing, or is not needed
            given = sq.clone()
            try:
                found = getattr(value, method)(given)
            except NotImplementedError:  # as a class says that is asked for values only
                continue
            if type(given) is not torch.Tensor:
                return  # while a call is traced there are no numbers
            if found is None and method == "weight_from_value_":  # as a class says that has none for its parameters
                continue
            # A NaN equals nothing, not even itself.
            if found is not given and not (isinstance(found, torch.Tensor) and torch.equal(found, given)):
                raise TypeError(
                    f"kernel: {name}.{method} must overwrite the tensor that it is given and return it, as "
                    "sq.mul_(-0.5).exp_() does; it returns another one"
                )
            if method == "value_":
                _check_one(name, float(given[0, 0]))
            if method == "weight_" and not math.isfinite(weight := float(given[0, 0])):
                raise ValueError(
                    f"kernel: {name}.weight_ must be 0 at distance 0, got {weight:g}; set it there, as "
                    "masked_fill_(sq == 0, 0.0) does with a copy of what comes in"
                )
        _check_weights(value)
    elif value.unit_diagonal and hasattr(type(value), "value_"):
        zero = torch.zeros(1, dtype=torch.float64, device="cpu")
        if type(zero) is not torch.Tensor:
            return
        _check_one(type(value).__name__, float(value.value_(zero)))  # pyright: ignore[reportAttributeAccessIssue]
    _TRIED.add(type(value))


def _check_one(name: str, one: float) -> None:
    """Refuse a class whose value at distance 0 is another one than 1, which diagonals are filled with."""
    if not abs(one - 1.0) < 1e-6:
        raise ValueError(
            f"kernel: {name}.value_ must be 1 at distance 0, got {one:g}; write {one:g} * kernel for a multiple"
        )


def _check_fields(kind: type) -> None:
    """Refuse a class whose parameters nobody sees: comparison, repr, files and devices go by dataclass fields."""
    made = vars(kind)
    if "__dataclass_fields__" in made:
        return
    named = [name for name, of in inspect.get_annotations(kind).items() if "ClassVar" not in str(of)]
    if named or "__init__" in made:
        own = f"parameters ({', '.join(named)})" if named else "an __init__"
        raise TypeError(
            f"kernel: {kind.__name__} has {own} of its own and is no dataclass, so that they would be in no repr, "
            "comparison or file; write @dataclass(frozen=True) above the class, with parameters as its fields"
        )


def _check_weights(value: Profile) -> None:
    """Refuse a class whose weights are not -phi'(r) / r = -2 dphi / d(r^2), by differences of its values."""
    kind, L = type(value), value.bandwidth
    own = [getattr(kind, method) is not getattr(Profile, method) for method in ("value_", "weight_")]
    if not all(own) or not 1e-50 < L < 1e50:
        return
    radii = torch.tensor([[0.371, 0.829, 1.713]], dtype=torch.float64, device="cpu")  # of L; a kink is elsewhere
    sq, step = (L * radii).square(), 1e-4
    try:
        ends = [value.value_(sq * share) for share in (1.0 + step, 1.0 - step)]
        k = value.value_(sq.clone())
        made = {
            "weight_": value.weight_(sq.clone()),
            "weight_beside_": value.weight_beside_(sq.clone(), k.clone()),
            "weight_from_value_": value.weight_from_value_(k.clone()),
        }
    except NotImplementedError:
        return
    slopes = (ends[1] - ends[0]) / (step * sq)  # -2 dphi / d(r^2) by central differences
    for method, weights in made.items():
        if weights is not None and not bool(((weights - slopes).abs() <= 1e-3 * slopes.abs() + 1e-6 / L**2).all()):
            at = int((weights / slopes - 1.0).abs().argmax())
            raise ValueError(
                f"kernel: {kind.__name__}.{method} must give -phi'(r) / r, {float(slopes[0, at]):.4g} at "
                f"r = {float(radii[0, at])} L by the differences of value_, got {float(weights[0, at]):.4g}"
            )
