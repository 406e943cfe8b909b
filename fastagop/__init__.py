"""Average gradient outer products (AGOP) of kernel machines, and Deep RFM.

Conventions: rows are samples. X (n, d) are training points (centers), Z (m, d) evaluation points, alpha (n, K)
coefficients; a predictor is f_c(z) = sum_j alpha[j, c] k(z, X[j]). A bandwidth has the units of X. All tensors of one
call share device and dtype, float32 or float64. ``precision`` is "highest" (float32-accurate), "high" (about three bf16
products) or "medium" (TF32), and only concerns float32 on CUDA.

"The paper" in docstrings is Beaglehole, Sukenik, Mondelli, Belkin, "Average gradient outer product as a mechanism for
deep neural collapse", NeurIPS 2024, arXiv 2402.13728.

With ``backend="triton"``, kernel_matrix, kernel_matmul, gradients and agop in its gradient form can be captured in a
CUDA graph after one call to warm up, for agop with method="gradient": a capture runs that form and must not load
another kernel. During a capture the host cannot look at values: NaN is not refused, points must lie between 2^-20 and
2^20 in size, and an offset far larger than the spread is not subtracted.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

_HERE = Path(__file__).resolve().parent
if not (_HERE / "kernels").is_dir():  # a checkout as it lies there: fastagop.kernels is the folder beside this one
    __path__.append(str(_HERE.parent))

from fastagop import collapse, datasets, distributed, estimators, network, plots
from fastagop.explain import explain
from fastagop.kernels.errors import BackendUnavailable, NumericalWarning
from fastagop.kernels.families.angles import NTK, ArcCosine
from fastagop.kernels.families.coordinates import LpLaplace, ProductLaplace
from fastagop.kernels.families.dot_product import Polynomial
from fastagop.kernels.operations import agop, gradients, kernel_matmul, kernel_matrix
from fastagop.kernels.radial import Gaussian, GeneralisedLaplace, Laplace, Matern52
from fastagop.solvers.bandwidth import settled
from fastagop.solvers.options import CholeskyCG, ConjugateGradients
from fastagop.solvers.solution import Solution
from fastagop.solvers.solve import solve
from fastagop.spectra import Spectrum, spectrum

if TYPE_CHECKING:
    from fastagop import autograd, convolution, probes
    from fastagop.deep_rfm.estimator import DeepRFMClassifier, DeepRFMRegressor
    from fastagop.estimators.persistence import load
    from fastagop.rfm import (
        RFMClassifier,
        RFMClassifierCV,
        RFMRegressor,
        RFMRegressorCV,
        RFMTreeClassifier,
        RFMTreeRegressor,
    )

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022 (plainly sorted: NTK is a class)
    "ArcCosine",
    "BackendUnavailable",
    "CholeskyCG",
    "ConjugateGradients",
    "DeepRFMClassifier",
    "DeepRFMRegressor",
    "Gaussian",
    "GeneralisedLaplace",
    "Laplace",
    "LpLaplace",
    "Matern52",
    "NTK",
    "NumericalWarning",
    "Polynomial",
    "ProductLaplace",
    "RFMClassifier",
    "RFMClassifierCV",
    "RFMRegressor",
    "RFMRegressorCV",
    "RFMTreeClassifier",
    "RFMTreeRegressor",
    "Solution",
    "Spectrum",
    "agop",
    "autograd",
    "collapse",
    "convolution",
    "datasets",
    "distributed",
    "explain",
    "gradients",
    "kernel_matmul",
    "kernel_matrix",
    "load",
    "network",
    "plots",
    "probes",
    "settled",
    "solve",
    "spectrum",
]

# They import scikit-learn or safetensors.
_LAZY = {**estimators.MODULES, "load": "fastagop.estimators.persistence"}


def __getattr__(name: str) -> Any:
    if name in ("autograd", "convolution", "probes"):  # modules, which import scikit-learn or register operators
        return importlib.import_module(f"fastagop.{name}")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'fastagop' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
