"""The Triton backend without a GPU: its cases interpreted, and every launch configuration compiled ahead of time.

``triton_cases.py`` has the cases; on a machine with a GPU they run there unchanged.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fastagop.kernels.triton_backend import launch_config
from fastagop.kernels.triton_backend.backend import has_products, input_precisions

import fastagop
from fastagop import BackendUnavailable, Laplace

triton = pytest.importorskip("triton")

CASES = Path(__file__).parent / "triton_cases.py"
CONTRACT = Path(__file__).parent / "test_contract.py"
FAST = "(test_shapes and Laplace and not 40-130) or test_explain or test_split or test_offsets_of_the_factor"
SHARED = {80: 166_912, 90: 232_448}  # bytes of shared memory a block may take
MATRIX_INSTRUCTION = {80: "HMMA", 90: "HGMMA"}
VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
LAUNCHES = sorted(launch_config.TABLE[8])  # (operation, precision)


# Interpreters before Triton 3.7 convert arrays of one element to int, which NumPy 2.4 no longer does.
INTERPRETS = VERSION >= (3, 7) or tuple(int(part) for part in np.__version__.split(".")[:2]) < (2, 4)


def run_cases(*words):
    if not (torch.cuda.is_available() or INTERPRETS):
        pytest.skip("this Triton interprets with numpy < 2.4 only")
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", *words, "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def test_some_cases():
    """Values, products, gradients and both forms of the AGOP of one kernel; test_all_cases runs the rest."""
    run_cases(str(CASES), "-k", FAST)


def test_all_cases():
    """And the contract suite, which on a machine with a GPU runs Triton by itself."""
    run_cases(str(CASES), "-k", f"not ({FAST})")
    if not torch.cuda.is_available():
        run_cases(str(CONTRACT), "-k", "triton")


def compiled(operation, precision, capability, profile=Laplace, weight=True):
    """One launch configuration, compiled as it would be for 16-divisible sizes and pointers."""
    if precision == "fp64" and not has_products(torch.float64):
        pytest.skip("this Triton has no float64 products")
    if precision == "bf16x3" and "bf16x3" not in input_precisions():
        pytest.skip("this Triton has no bf16x3 products")
    from fastagop.kernels.triton_backend import agop as agop_triton
    from fastagop.kernels.triton_backend import cholesky
    from fastagop.kernels.triton_backend import matmul as matmul_triton
    from fastagop.kernels.triton_backend import matrix as matrix_triton
    from fastagop.kernels.triton_backend.profile import device_profile

    kernel = {
        "update": cholesky._update_kernel,
        "matrix": matrix_triton._matrix_kernel,
        "matmul": matmul_triton._matmul_kernel,
        "gradient": agop_triton._gradient_kernel,
        "gram": agop_triton._gram_kernel,
    }[operation]
    config = launch_config.TABLE[capability // 10][operation, precision]
    second = {"fp16x3": "tf32x3"}.get(precision, precision)
    constants = {
        **{
            "PREC": precision,
            "BM": config.rows,
            "BN": config.columns,
            "BK": config.inner,
            "PROFILE": device_profile(profile),
        },
        **{"WEIGHT": weight, "SELF": True, "LOWER": True, "SECOND": second, "BP": 64},
    }
    names = kernel.arg_names
    whole = "*fp64" if precision == "fp64" else "*fp32"
    half = "*fp16" if precision == "fp16x3" else whole
    counts = {"m", "n", "d", "p", "b", "K", "first", "stop"}
    signature = {}
    for name in names:
        if name in constants:
            signature[name] = "constexpr"
        elif name == "near":
            signature[name] = "fp32"
        elif name in counts or name.startswith("stride"):
            signature[name] = "i32"
        else:
            signature[name] = half if name in ("ZA", "ZL", "XA", "XL", "WA", "WL") else whole
    whole_blocks = ("first",) if operation == "update" else ()
    divisible = [
        i
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name.startswith("stride") or name in ("n", "d", *whole_blocks)
    ]
    if VERSION < (3, 3):
        from triton.backends.compiler import AttrsDescriptor

        held = {name: constants[name] for name in names if name in constants}
        hints = AttrsDescriptor.from_hints(dict.fromkeys(divisible, 16))
        source = triton.compiler.ASTSource(fn=kernel, signature=signature, constants=held, attrs=hints)
    else:
        source = triton.compiler.ASTSource(
            fn=kernel,
            signature=signature,
            constexprs={(i,): constants[name] for i, name in enumerate(names) if name in constants},
            attrs={(i,): [["tt.divisibility", 16]] for i in divisible},
        )
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}
    return triton.compile(source, target=target, options=options)


def spilled(assembly):
    """Instructions that move registers to memory and back; older compilers than those tuned for may need a few."""
    return [] if VERSION < (3, 6) else re.findall(r"\b(?:STL|LDL)\b", assembly)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("operation", "precision"), LAUNCHES)
def test_ahead_of_time(operation, precision, capability, monkeypatch):
    monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "1")
    binary = compiled(operation, precision, capability)
    assembly = binary.asm["sass"]
    assert not spilled(assembly)
    assert binary.metadata.shared <= SHARED[capability]
    instruction = "DMMA" if precision == "fp64" else MATRIX_INSTRUCTION[capability]
    assert re.search(rf"\b{instruction}\b", assembly)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("profile", [fastagop.GeneralisedLaplace, fastagop.Matern52])
@pytest.mark.parametrize(
    ("operation", "precision", "weight"),
    [("matrix", "fp16x3", True), ("matrix", "fp64", False)],  # what holds most registers; what solve starts from
)
def test_further_profiles_ahead_of_time(operation, precision, weight, profile, capability, monkeypatch):
    monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "1")
    binary = compiled(operation, precision, capability, profile, weight)
    assert not spilled(binary.asm["sass"])
    assert binary.metadata.shared <= SHARED[capability]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu():
    X = torch.randn(5, 3)
    with pytest.raises(BackendUnavailable, match=r"X is on cpu and it runs on CUDA; move the tensors with \.cuda\(\)"):
        fastagop.kernel_matrix(Laplace(2.0), X, backend="triton")


def test_what_it_does_not_serve():
    X = torch.randn(5, 3, dtype=torch.float64)
    with pytest.raises(BackendUnavailable, match="float32"):
        fastagop.agop(Laplace(2.0), X, X, backend="triton")
