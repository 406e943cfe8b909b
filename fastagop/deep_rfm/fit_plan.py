"""The plan of a Deep RFM's fit: what its layers take, one after the other."""

from __future__ import annotations

import dataclasses

from fastagop import estimates
from fastagop.deep_rfm.layer import Settings
from fastagop.estimators.fit_plans import Data, Step, memory_rate, root_seconds, solve_only, step_of
from fastagop.kernels.plan import AgopTask

_PASSES = 12  # over the features of a layer, for the measures of collapse


def layer_steps(data: Data, share: int, settings: Settings, classes: bool) -> tuple[list[tuple[str, int, Step]], int]:
    """([(name, how often, step)], bytes that the layers keep)."""
    n, width, size = len(data.X), settings.width, data.X.element_size()
    names = [("layer 1", 1, data.X.shape[1])]
    if settings.depth > 1:
        names.append((f"layers 2 to {settings.depth}" if settings.depth > 2 else "layer 2", settings.depth - 1, width))
    steps, held = [], 0
    for name, times, d in names:
        X = data.of_width(d)
        step = step_of(X, data.Y, settings.regression, share, AgopTask("sum"))
        maps = estimates.of_products(2.0 * n * d * (d + width), X)
        passes = _PASSES * n * (2 * d + width) * 8 / memory_rate(X.device) if classes else 0.0
        step.seconds.update(root=root_seconds(n, d, X.device), features=maps, measures=passes)
        peak = max(step.peak_bytes, 4 * 8 * d * d) + (n * (d + 2 * width) + d * width) * size
        steps.append((f"{name}, {d} features", times, dataclasses.replace(step, peak_bytes=peak)))
        held += times * ((2 * d * d + d * width) * size + 8 * n * data.Y.shape[1])
    steps.append((f"readout, {width} features", 1, solve_only(data.of_width(width), data.Y, settings.regression)))
    return steps, held
