"""Options that ``method=`` takes in the place of a solver's name."""

from __future__ import annotations

import os
from dataclasses import dataclass

from fastagop.kernels import checks


@dataclass(frozen=True)
class ConjugateGradients:
    """How ``solve(..., method=ConjugateGradients(...))`` iterates; ``method="cg"`` takes the defaults.

    Args:
        tolerance: relative residual ||(k + ridge I) alpha - Y|| / ||Y|| to reach, of every output by itself.
        rank: pivots of the preconditioner, 0 for none; default a sixteenth of the points, at most 2000, less where
            memory is short. It takes 8 n rank bytes.
        max_iterations: steps at most; each is one pass over all pairs of points.
        progress: show a tqdm bar. Steps are logged at INFO to "fastagop" either way.
        seed: seed of the random draw of pivots.
        store: keep half of the kernel matrix in float64, 4 n^2 bytes: a step then costs n^2 K, and not n^2 d.
    """

    tolerance: float = 1e-6
    rank: int | None = None
    max_iterations: int = 1000
    progress: bool = False
    seed: int = 0
    store: bool = False

    def __post_init__(self) -> None:
        if not checks.nonnegative("tolerance", self.tolerance):
            raise ValueError("tolerance must be above 0, got 0; residuals end at rounding, about 1e-12")
        for name, least in (("rank", 0), ("max_iterations", 1), ("seed", 0)):
            if name != "rank" or self.rank is not None:
                checks.integer(name, getattr(self, name), least)
        checks.flag("progress", self.progress)
        checks.flag("store", self.store)


@dataclass(frozen=True)
class CholeskyCG:
    """How ``solve(..., method=CholeskyCG(...))`` computes; ``method="cholesky+cg"`` takes the defaults.

    Args:
        tolerance: relative residual ||(k + ridge I) alpha - Y|| / ||Y|| to reach, of every output by itself.
        place: where the kernel matrix and its factor lie: "device", in the memory of the device of X; "host", pinned
            memory beside a CUDA device, from which blocks are streamed; or a folder, in which a memory-mapped file
            without a name holds them: nothing of it is left when the process ends, however that comes about.
    """

    tolerance: float = 1e-10
    place: str = "device"

    def __post_init__(self) -> None:
        if not checks.nonnegative("tolerance", self.tolerance):
            raise ValueError("tolerance must be above 0, got 0; residuals end at rounding, about 1e-12")
        if not isinstance(self.place, (str, os.PathLike)):
            raise TypeError(f"place must be 'device', 'host' or a folder, got {type(self.place).__name__}")
        object.__setattr__(self, "place", os.fspath(self.place))  # a solve looks for it: files come to other machines
