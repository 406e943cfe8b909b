"""Files to trust: tensors and their description in one safetensors file, there whole or not at all.

A file carries a SHA-256 of its description and its tensors, so that damage is found whichever byte it hits. The
description is JSON; nothing in a file can be executed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from fastagop.estimators.tensor_files import LONGEST_TEXT, parse_object, read_tensors, regular_size
from fastagop.kernels import atomic_files
from fastagop.kernels.precision import dtype_name
from fastagop.kernels.profile import Kernel
from fastagop.kernels.radial import named
from fastagop.solvers.solution import Solution
from fastagop.solvers.table import OPTIONS

FORMAT = "2"
_KINDS = "biufUSmMO"  # of NumPy's dtypes, of arrays that files hold
_DTYPES = {"float32": torch.float32, "float64": torch.float64}
# Reading or using the contents of a file that fastagop did not write raises one of these.
MALFORMED = (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, ValueError)


def fingerprint(tensors: Mapping[str, torch.Tensor], text: str = "") -> str:
    """SHA-256 of a text and of names, shapes, dtypes and bytes of tensors."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # pyright: ignore
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """The versions that a result may depend on, for the record."""

    return {
        "fastagop": importlib.metadata.version("fastagop"),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def write(path: Path, kind: str, tensors: Mapping[str, torch.Tensor], metadata: dict) -> str:
    """Write tensors and their description as one file of a kind; returns its checksum."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    text = json.dumps({"kind": kind, **metadata})
    if len(text) > LONGEST_TEXT:
        raise ValueError(
            f"{path} cannot hold a description of {len(text)} bytes, {LONGEST_TEXT} at most; "
            "shorten the labels or the feature names"
        )
    digest = fingerprint(tensors, text)
    atomic_files.write(path, save(tensors, metadata={"fastagop": FORMAT, "sha256": digest, "words": text}))
    return digest


def read(path: Path, kind: str) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors, description) of a file of a kind.

    The tensors are copies, aligned as torch's own: products of unaligned ones may round differently.

    Raises:
        ValueError: naming the file, which is damaged, of another kind, or no file of ours. OSError: it cannot be read.
    """
    tensors, header = read_tensors(path)
    found = header.get("fastagop")
    if found != FORMAT:
        reason = "was not written by fastagop" if found is None else f"is corrupt or has format {found[:80]}"
        raise ValueError(f"{path} {reason}; this version of fastagop reads its own format {FORMAT}")
    text = header.get("words", "")
    if fingerprint(tensors, text) != header.get("sha256"):
        raise ValueError(f"{path} is corrupt: its contents do not match its checksum")
    metadata = parse_json(path, text)
    if metadata.get("kind") != kind:
        raise ValueError(f"{path} holds a {metadata.get('kind')}, not a {kind}")
    return tensors, metadata


def parse_json(path: Path, text: str | bytes) -> dict:
    """The JSON object that a file holds; ValueError naming the file where it is none, too long or too deep."""
    try:
        return parse_object(text)
    except ValueError as error:
        raise ValueError(f"{path} is truncated or corrupt ({error})") from error


@contextlib.contextmanager
def restoring(path: Path) -> Iterator[None]:
    """While objects are made of a file's contents: whatever does not fit is a ValueError that names the file."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error
    except MALFORMED as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{path} is corrupt or of another version of fastagop ({reason})") from error


def write_json(path: Path, metadata: dict) -> None:
    """Write a description with its own checksum."""
    text = json.dumps(metadata, sort_keys=True)
    atomic_files.write(path, json.dumps({**metadata, "sha256": fingerprint({}, text)}, indent=1).encode())


def read_json(path: Path) -> dict:
    """A description that ``write_json`` wrote.

    Raises:
        ValueError: naming the file, which is damaged or was edited. OSError: it cannot be read.
    """
    if regular_size(path) > 2 * LONGEST_TEXT:
        raise ValueError(f"{path} is corrupt: no description is as long")
    metadata = parse_json(path, path.read_bytes())
    promised = metadata.pop("sha256", None)
    with restoring(path):
        found = fingerprint({}, json.dumps(metadata, sort_keys=True))
    if found != promised:
        raise ValueError(f"{path} is corrupt or was edited: its contents do not match its checksum")
    return metadata


def pack_kernel(kernel: Kernel) -> dict:
    """A kernel's class name and parameters, those of its parts within."""
    parameters = kernel.get_params(deep=False)
    packed = {key: pack_kernel(value) if isinstance(value, Kernel) else value for key, value in parameters.items()}
    return {"name": type(kernel).__name__, **packed}


def unpack_kernel(metadata: dict) -> Kernel:
    """The kernel of ``pack_kernel``; its class must be one that this process knows."""
    parameters = {
        key: unpack_kernel(value) if isinstance(value, dict) else value
        for key, value in metadata.items()
        if key != "name"
    }
    return named(metadata["name"])(**parameters)


def pack_value(value):
    """A parameter or attribute as JSON; arrays keep their dtype."""
    if isinstance(value, Kernel):
        return {"kernel": pack_kernel(value)}
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in _KINDS or (value.dtype.kind == "f" and value.dtype.itemsize > 8):
            raise TypeError(
                f"labels and parameters of dtype {value.dtype} cannot be saved; give them as float64 or int64"
            )
        plain = value.view(np.int64) if value.dtype.kind in "mM" else value  # Dates have no JSON.
        return {"array": plain.tolist(), "dtype": "O" if value.dtype == object else value.dtype.str}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.random.RandomState):
        return None
    if type(value) in OPTIONS:
        return {"options": dataclasses.asdict(value), "method": OPTIONS[type(value)]}
    if isinstance(value, (list, tuple)):
        return [pack_value(item) for item in value]
    if isinstance(value, dict):  # Keys are labels here, which need not be strings as JSON's keys are.
        return {"pairs": [[pack_value(key), pack_value(item)] for key, item in value.items()]}
    if isinstance(value, (torch.dtype, np.dtype, type)):
        return dtype_name(value) if isinstance(value, torch.dtype) else np.dtype(value).name
    return str(value) if isinstance(value, torch.device) else value


def unpack_value(value):
    """The value that ``pack_value`` packed."""
    if isinstance(value, list):
        return [unpack_value(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "options" in value:
        method = value.get("method", "cg")  # which is what files of earlier versions have options of
        return next(kind for kind in OPTIONS if OPTIONS[kind] == method)(**value["options"])
    if "pairs" in value:
        return {unpack_value(key): unpack_value(item) for key, item in value["pairs"]}
    return unpack_kernel(value["kernel"]) if "kernel" in value else _unpack_array(value["array"], value["dtype"])


def _unpack_array(entries: list, name: str) -> np.ndarray:
    """An array from its entries; a dtype that takes far more room than they do is refused before it takes any."""
    dtype = np.dtype(name)
    if dtype.kind not in _KINDS or not isinstance(entries, list):
        raise ValueError(f"an array of dtype {name!r} is none that fastagop writes")
    if len(entries) * dtype.itemsize > 2**20 + 256 * len(json.dumps(entries)):
        raise ValueError(f"an array of dtype {name!r} would take {len(entries) * dtype.itemsize} bytes")
    return np.array(entries, dtype)


def pack_solution(solution: Solution) -> dict:
    """A Solution as JSON, without its alpha, which is a tensor of the file."""
    metadata = {field.name: getattr(solution, field.name) for field in dataclasses.fields(solution)}
    del metadata["alpha"]
    return {**metadata, "dtype": dtype_name(solution.dtype)}


def unpack_solution(metadata: dict, alpha: torch.Tensor) -> Solution:
    """The Solution of ``pack_solution`` with its alpha."""
    return Solution(alpha=alpha, **{**metadata, "dtype": _DTYPES[metadata["dtype"]]})
