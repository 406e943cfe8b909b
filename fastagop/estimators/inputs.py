"""The arguments of estimators, made ready: rows, labels, targets and weights, checked by name and never rounded early.

Everything is read in float64, or in float32 where it is given so. Offsets are subtracted there; only then does
anything become the dtype that a fit computes in.
"""

from __future__ import annotations

import contextlib
import datetime
import numbers
import operator
from collections.abc import Iterator, Mapping, Set
from typing import Any

import numpy as np
import torch
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_array, column_or_1d, validate_data

from fastagop.kernels import checks
from fastagop.kernels.precision import dtype_name

DTYPES = {"float32": torch.float32, "float64": torch.float64}
FAR = 4.0  # An offset is subtracted where it exceeds the spread around it so many times.
_LISTED = 5  # Columns that an error names.
_SHORT = 60  # Letters of a reason of torch's that an error repeats.
_SPARSE = (
    "Sparse data was passed for X, but dense data is required: use X.toarray(); in a pipeline "
    "OneHotEncoder(sparse_output=False), or FunctionTransformer(lambda X: X.toarray(), accept_sparse=True) as a step"
)
# What is to be done with columns of a frame that are no numbers, by what they hold.
_ENCODER = "as with OneHotEncoder(sparse_output=False) in a ColumnTransformer (docs: RFM on tables)"
_REMEDIES = {
    "strings": f"make numbers of {{them}}, {_ENCODER}",
    "dates": "use differences in days, as (column - column.min()).dt.days",
    "durations": "use their number of days, as column / pandas.Timedelta(days=1)",
    "missing values that are no NaN": "use a column of numbers, as pandas.to_numeric makes it, and fill them in",
}


def dtype(value) -> torch.dtype:
    """float32 or float64, given by name, as a torch dtype or as NumPy's."""
    name = value
    if isinstance(value, torch.dtype):
        name = dtype_name(value)
    elif isinstance(value, (np.dtype, type)):
        name = np.dtype(value).name
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"dtype must be 'float32' or 'float64', got {value!r}")
    return DTYPES[name]


def device(name) -> torch.device:
    """The device of that name, "auto" being CUDA where there is one."""
    try:
        found = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be 'auto' or a device of torch, got {name!r}; use 'auto' or 'cpu'") from error
    try:
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        reason = f" ({reason})" if len(reason) <= _SHORT else ""  # Of other devices torch lists its own internals.
        raise ValueError(f"device {name!r} is not there{reason}; use 'auto' or 'cpu'") from error
    if found.type == "meta":
        raise ValueError(f"device must be one that holds numbers, got {name!r}; use 'auto' or 'cpu'")
    return found


def alike(rows, X) -> bool:
    """Whether two arrays or tensors hold the same rows."""
    if isinstance(rows, torch.Tensor) and isinstance(X, torch.Tensor):
        return rows.shape == X.shape and rows.device == X.device and bool((rows == X).all())
    if isinstance(rows, torch.Tensor) or isinstance(X, torch.Tensor):
        return False
    return np.shape(rows) == np.shape(X) and bool(np.all(np.asarray(rows) == np.asarray(X)))


def random(random_state) -> np.random.RandomState:
    """The generator that a ``random_state`` stands for."""
    try:
        return check_random_state(random_state)
    except ValueError as error:
        raise ValueError(
            f"random_state must be an integer from 0 to 2^32 - 1, a numpy.random.RandomState or None, got "
            f"{random_state!r}"
        ) from error


def dense(name: str, value: torch.Tensor) -> torch.Tensor:
    """A tensor without history, refused where it holds no numbers of its own."""
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}; use {name}.to_dense()")
    if value.device.type == "meta":
        raise ValueError(f"{name} must hold numbers, got a tensor on the meta device; make it on the CPU or a GPU")
    if value.is_complex():
        raise ValueError(f"Complex data not supported: {name} must be real, got {value.dtype}; use {name}.real")
    return value.detach()


def numpy(name: str, value):
    """Tensors as NumPy arrays, halves as float32; arrays in this machine's byte order; anything else as it is."""
    if isinstance(value, torch.Tensor):
        value = dense(name, value)
        narrow = value.is_floating_point() and value.dtype not in DTYPES.values()
        return (value.float() if narrow else value).cpu().resolve_neg().numpy()
    checks.unmasked(name, value)
    if isinstance(value, np.ndarray) and not value.dtype.isnative:
        return value.astype(value.dtype.newbyteorder("="))
    return value


def refuse_no_rows(name: str, value) -> None:
    """Refuse what NumPy would read as a single entry."""
    if isinstance(value, (str, bytes, Mapping, Set, Iterator)) and not hasattr(value, "toarray"):  # a sparse matrix
        raise TypeError(f"{name} must be an array, a list, a frame or a tensor, got {type(value).__name__}")


def on_cpu(X):
    """Tensors where scikit-learn's metrics can read what estimators answer for them; anything else as it is."""
    return X.cpu() if isinstance(X, torch.Tensor) else X


def frame_refusal(X) -> TypeError | ValueError | None:
    """Why a frame, or whatever else has ``columns`` and ``dtypes``, is no table of numbers; None where it is one.

    Columns of strings that are numbers, such as "1.5", count as numbers, as they do for scikit-learn.
    """
    if not (hasattr(X, "columns") and hasattr(X, "dtypes")):
        return None
    columns = list(X.columns)
    if len(set(columns)) < len(columns):
        return None  # scikit-learn refuses names that are not unique.
    found: dict[str, list] = {}
    for name, kind in zip(columns, X.dtypes, strict=True):
        if getattr(kind, "kind", "O") not in "iufbc" and (what := _other_than_numbers(X[name])):
            found.setdefault(what, []).append(name)
    if not found:
        return None
    texts = []
    for what, names in found.items():
        listed = ", ".join(map(repr, names[:_LISTED]))
        listed += f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        verb, them = ("column {} holds {}", "it") if len(names) == 1 else ("columns {} hold {}", "them")
        texts.append(f"{verb.format(listed, what)}: {_REMEDIES.get(what, 'make numbers of {them}').format(them=them)}")
    return (ValueError if "strings" in found else TypeError)(f"X: {'; '.join(texts)}")


def _other_than_numbers(column) -> str | None:
    """What a column of a frame holds beside numbers and NaN, as a word of ``_REMEDIES``; None where nothing."""
    values = np.asarray(column)
    if values.dtype.kind in "iufbc":
        return None
    if values.dtype.kind in "mM":
        return "dates" if values.dtype.kind == "M" else "durations"
    try:
        values.astype(np.float64)
    except (TypeError, ValueError):
        found = [_kind(value) for value in values.tolist()]
        return next((kind for kind in found if kind), "missing values that are no NaN")
    return None


def _kind(value: Any) -> str | None:
    """What a value is in words, where it is neither a number nor missing."""
    try:
        float(value)
    except (TypeError, ValueError):
        if missing(value):
            return None
        if isinstance(value, (datetime.date, np.datetime64)) or hasattr(value, "to_timestamp"):
            return "dates"
        if isinstance(value, (datetime.timedelta, np.timedelta64)):
            return "durations"
        return "strings" if isinstance(value, (str, bytes)) else f"values of type {type(value).__name__}"
    return None


def missing(value: Any) -> bool:
    """Whether a value of any kind is None, NaN, NaT or pandas' NA."""
    try:
        return value is None or bool(operator.ne(value, value))
    except TypeError:  # NA is neither equal to itself nor different.
        return True
    except ValueError:  # An array.
        return False


def matrix(estimator, X, *, reset: bool) -> torch.Tensor:
    """X as a float32 or float64 tensor that holds its numbers, where it lies; scikit-learn's rules for its columns.

    Args:
        estimator: whose ``n_features_in_`` and ``feature_names_in_`` are set (``reset``) or must be met.
    """
    if not isinstance(X, torch.Tensor):
        if callable(getattr(X, "toarray", None)):
            raise TypeError(_SPARSE)
        refuse_no_rows("X", X)
        checks.unmasked("X", X)
        if refusal := frame_refusal(X):
            if not reset:  # Names that do not match come first.
                validate_data(estimator, X, reset=False, skip_check_array=True)
            raise refusal
        if isinstance(X, np.ndarray) and X.dtype.kind in "mM":
            what = "dates" if X.dtype.kind == "M" else "durations"
            raise TypeError(f"X holds {what}: use numbers, as (X - X.min(0)) / numpy.timedelta64(1, 'D')")
        try:
            found = validate_data(estimator, X, reset=reset, dtype=[np.float64, np.float32])  # pyright: ignore[reportArgumentType]
        except ValueError as error:
            if not str(error).startswith("Input X contains"):
                raise
            raise ValueError(f"{str(error).partition('.')[0]}{_gaps(X)}") from error
        return torch.from_numpy(np.array(found, order="C"))
    tensor = dense("X", X)
    if tensor.ndim != 2:
        few = "X.reshape(-1, 1) for a single feature or X.reshape(1, -1) for a single sample"
        how = few if tensor.ndim < 2 else "X.reshape(len(X), -1)"
        asked = f"Expected 2D array: X must be a matrix (samples, features), got shape {tuple(X.shape)}"
        raise ValueError(f"{asked}. Reshape your data with {how}")
    if 0 in tensor.shape:
        raise ValueError(f"X must have at least one row and one column, got shape {tuple(X.shape)}")
    validate_data(estimator, X, reset=reset, skip_check_array=True)  # pyright: ignore[reportArgumentType]
    tensor = tensor if tensor.dtype in DTYPES.values() else tensor.double()
    if not checks.finite(tensor):
        raise ValueError(f"X holds NaN or infinity{checks.first_bad(tensor)}; leave such rows out, or fill them in")
    return tensor


def _gaps(X) -> str:
    """Which columns of a frame hold NaN or infinity, and what to do about it."""
    names = []
    if hasattr(X, "columns"):
        with contextlib.suppress(TypeError, ValueError):  # a kind of frame that tells less
            numbers = X.to_numpy(dtype=np.float64, na_value=np.nan) if hasattr(X, "isna") else np.asarray(X, np.float64)
            bad = np.asarray(~np.isfinite(numbers).all(0)).tolist()
            names = [repr(name) for name, gone in zip(map(str, X.columns), bad, strict=True) if gone]
    where = f", in {', '.join(names[:_LISTED])}" + (f" and {len(names) - _LISTED} more" if names[_LISTED:] else "")
    how = "leave such rows out, or fill them in, as with SimpleImputer(add_indicator=True) (docs: RFM on tables)"
    return f"{where if names else ''}: {how}"


def narrowed(name: str, value: torch.Tensor, to: torch.dtype) -> torch.Tensor:
    """Numbers in the dtype that a fit computes in; refused where it cannot hold them."""
    if value.dtype == to:
        return value
    found = value.to(to)
    largest = checks.largest(value)
    if not checks.finite(found) or 0 < largest < torch.finfo(to).tiny:
        size, remedy = ("large", "divide") if largest > 1 else ("small", "multiply")
        raise ValueError(
            f"{name} is too {size} for {to}: its largest entry is {largest:.1e}; "
            f"{remedy} {name} by a constant, or use dtype='float64'"
        )
    return found


def refuse_missing(name: str, y, what: str) -> None:
    """Refuse labels or targets of which some are None, NaN, NaT or pandas' NA.

    Raises:
        ValueError: saying in how many rows, and which is the first.
    """
    y = numpy(name, y)
    try:
        values = np.asarray(y)
        if values.dtype.kind in "US" and not isinstance(y, np.ndarray):  # NumPy makes a word of a NaN among words.
            values = np.asarray(y, dtype=object)
    except (TypeError, ValueError):  # No array: scikit-learn says why.
        return
    if values.dtype.kind not in "fmMO" or values.ndim == 0 or values.size == 0:
        return
    if values.dtype.kind == "O":
        gone = np.array([missing(value) for value in values.reshape(-1)])
    else:
        gone = np.isnan(values) if values.dtype.kind == "f" else np.isnat(values)
    gone = gone.reshape(len(values), -1).any(1)
    if gone.any():
        raise ValueError(
            f"{name} holds missing {what} in {gone.sum()} of {len(values)} rows, of which row {gone.argmax()} is the "
            "first; leave such rows out"
        )


def labels(y) -> np.ndarray:
    """Labels (n,) in their own kind."""
    if y is None:
        raise ValueError("requires y to be passed, but the target y is None")
    refuse_no_rows("y", y)
    y = numpy("y", y)
    refuse_missing("y", y, "labels")
    y = check_array(y, ensure_2d=False, dtype=None, input_name="y")  # pyright: ignore[reportArgumentType]
    y = column_or_1d(y, warn=True)
    objects = set(y.tolist()) if y.dtype == object else set()
    try:
        sorted(objects)
    except TypeError as error:
        kinds = ", ".join(sorted({type(label).__name__ for label in objects}))
        text = f"y must hold labels that have an order, got such of the types {kinds}; make all of them texts"
        raise TypeError(text) from error
    if objects and all(isinstance(label, (bool, int, np.bool_, np.integer)) for label in objects):
        kind = "bool" if all(isinstance(label, (bool, np.bool_)) for label in objects) else "int"
        text = "Unknown label type: y holds numbers as objects, as missing ones leave them"  # in scikit-learn's words
        raise ValueError(f"{text}; use y.astype({kind})")
    check_classification_targets(y)
    return y


def targets(y) -> np.ndarray:
    """Targets in float64, (n,) or (n, K)."""
    if y is None:
        raise ValueError("requires y to be passed, but the target y is None")
    refuse_no_rows("y", y)
    y = numpy("y", y)
    refuse_missing("y", y, "targets")
    plain = type(y) is np.ndarray and y.dtype.kind == "f" and y.itemsize <= 8 and y.ndim in (1, 2) and y.size > 0
    if plain and np.isfinite(y).all():
        return y.astype(np.float64, copy=False)  # what scikit-learn would come to in ten times the time
    return np.asarray(check_array(y, ensure_2d=False, dtype="float64", input_name="y"))


def same_length(name: str, value, n: int) -> None:
    """Refuse an argument that has not one row for each row of X."""
    if len(value) != n:
        raise ValueError(f"{name} must have one row per row of X: X has {n}, {name} has {len(value)}")


def weights(value, n: int) -> np.ndarray | None:
    """Sample weights in float64, (n,); None where there are none or all are 1."""
    if value is None:
        return None
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        value = np.full(n, float(value))
    value = numpy("sample_weight", value)
    try:
        found = np.asarray(value)
        if found.dtype.kind == "c":
            raise TypeError
        found = np.array(found, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"sample_weight must be real numbers, one for each row of X, got {value!r}") from None
    if found.shape != (n,):
        raise ValueError(f"sample_weight must have shape ({n},), one number for each row of X, got {found.shape}")
    if not np.isfinite(found).all():
        raise ValueError("sample_weight must be finite, but it holds NaN or infinity")
    if (found < 0).any():
        raise ValueError(f"sample_weight must not be negative, got {found.min():g}; a weight of 0 leaves a row out")
    if not found.any():
        raise ValueError("sample_weight must contain at least one non-zero number, got zeros only")
    finite_sum("sample_weight", found)
    return None if (found == 1.0).all() else found


def finite_sum(name: str, weights: np.ndarray) -> None:
    """Refuse weights whose sum leaves float64."""
    with np.errstate(over="ignore"):
        if not np.isfinite(weights.sum()):
            raise ValueError(
                f"{name} is so large that its sum leaves float64: the largest weight is {weights.max():.1e}; "
                f"divide {name} by a constant"
            )


def weighted_rows(row_weights: np.ndarray | None, rows: torch.Tensor, *arrays: np.ndarray | None) -> tuple:
    """(rows, arrays..., weights) without the rows of weight zero."""
    if row_weights is None or row_weights.all():
        return rows, *arrays, row_weights
    kept = row_weights > 0
    arrays = tuple(array if array is None else array[kept] for array in arrays)
    return rows[torch.from_numpy(kept).to(rows.device)], *arrays, row_weights[kept]


def class_weights(value, classes: np.ndarray, codes: np.ndarray, row_weights: np.ndarray | None) -> np.ndarray | None:
    """The weight that ``class_weight`` gives each row, (n,), beside ``row_weights``; None where it is None.

    "balanced" is (sum of weights) / (classes * sum of the class's weights), so that a weight counts as copies do.
    """
    if value is None:
        return None
    if isinstance(value, str) and value == "balanced":
        total = np.bincount(codes, weights=row_weights, minlength=len(classes))
        return (total.sum() / (len(classes) * total))[codes]
    if not isinstance(value, dict):
        raise ValueError(f"class_weight must be None, 'balanced' or a dict {{label: weight}}, got {value!r}")
    known = classes.tolist()
    factors = np.ones(len(classes))
    for key, given in value.items():
        label = key.item() if isinstance(key, np.generic) else key
        weight = checks.nonnegative(f"class_weight[{label!r}]", given)
        if label in known:
            factors[known.index(label)] = weight
        elif not all(one in value for one in known):  # else the rows of some fold lack a class
            raise ValueError(f"class_weight names the label {label!r}, which y does not hold; its labels are {known}")
    if (left := int((factors > 0).sum())) < 2:
        raise ValueError(
            f"class_weight must leave two of the labels {known} a weight above 0, got {value!r}: {left} left"
        )
    return factors[codes]
