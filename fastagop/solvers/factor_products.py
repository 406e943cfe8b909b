"""What a float32 factor of half a matrix multiplies by."""

from __future__ import annotations

import torch

from fastagop.kernels import calibration, checks
from fastagop.kernels.gemm import LIBRARY, PanelProducts
from fastagop.kernels.torch_backend.panels import MixedPanels, has_tiles
from fastagop.solvers.problem import Problem
from fastagop.solvers.symmetric_blocks import SymmetricBlocks


def products_of(problem: Problem) -> PanelProducts:
    """The backend's products, or the library's where faster.

    Consumer chips' float32 is, and ranks take the library's, too.
    """
    if problem.shared is not None:
        return LIBRARY
    operator, device = problem.operator, problem.X.device
    panels = operator.backend.factor_kernels(torch.float32, operator.precision).panels
    theirs, library = (calibration.rate("gradient", way.word, device) for way in (panels, LIBRARY))
    return panels if theirs >= library else LIBRARY


def may_round(problem: Problem) -> bool:
    """Whether a factor beside k(X, X) in float64 is made by ``MixedPanels``: by one process, on a CPU with tiles.

    A backend's own products come first.
    """
    alone = problem.shared is None and problem.X.device.type == "cpu"
    return alone and has_tiles() and products_of(problem) is LIBRARY


def mixed(blocks: SymmetricBlocks, diagonal: float | torch.Tensor) -> MixedPanels:
    """Products for a factor of blocks that hold k(X, X), with another diagonal."""
    least = float(checks.tensor(diagonal).min()) - blocks.largest_beside_diagonal()
    return MixedPanels(len(blocks), blocks.rows, least)
