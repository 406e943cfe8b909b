"""The Triton backend without a GPU: its cases interpreted. ``test_machine_code.py`` compiles every configuration.

``triton_cases.py`` has the cases; on a machine with a GPU they run there unchanged.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fastagop
from fastagop import BackendUnavailable, Laplace

triton = pytest.importorskip("triton")

CASES = Path(__file__).parent / "triton_cases.py"
CONTRACT = Path(__file__).parent / "test_contract.py"
FAST = "(test_shapes and Laplace and not 40-130) or test_explain or test_split or offsets_of_the_factor or every_tile"
LONG = "tails_of_production or offsets_of_the_agop or offsets_of_the_product or gradients_and_agop"
VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])

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
    """Values, products, gradients and both forms of the AGOP of one kernel; those below run the rest."""
    run_cases(str(CASES), "-k", FAST)


@pytest.mark.parametrize("which", [LONG, f"not ({FAST}) and not ({LONG})"], ids=["long", "rest"])
def test_all_cases(which):
    run_cases(str(CASES), "-k", which)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the contract suite runs Triton by itself there")
def test_the_contract():
    run_cases(str(CONTRACT), "-k", "triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu():
    X = torch.randn(5, 3)
    with pytest.raises(BackendUnavailable, match=r"X is on cpu and it runs on CUDA; move the tensors with \.cuda\(\)"):
        fastagop.kernel_matrix(Laplace(2.0), X, backend="triton")


def test_what_it_does_not_serve():
    X = torch.randn(5, 3, dtype=torch.float64)
    with pytest.raises(BackendUnavailable, match="float32"):
        fastagop.agop(Laplace(2.0), X, X, backend="triton")
