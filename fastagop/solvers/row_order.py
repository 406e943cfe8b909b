"""The order in which points are trained on: classes one after the other where blocks then have fewer near pairs."""

from __future__ import annotations

from dataclasses import replace

import torch

from fastagop.kernels.plan import on_gpu
from fastagop.solvers.copies import Rows


def by_class(rows: Rows, classes: torch.Tensor | None) -> Rows:
    """The rows with their points in the order of their classes, on CUDA; as they are elsewhere, or without classes.

    Near collapse a pair of one class is near, and the device measures a tile of pairs again that has a near one: of
    points in any order that is every tile, of sorted ones about one in the number of classes. What goes back to all
    rows comes in the order given.

    Args:
        rows: how rows became points.
        classes: class indices of the rows (n,), or None.
    """
    if classes is None or not on_gpu(rows.kept.device):  # only a GPU's kernels measure pairs again by tiles
        return rows
    of_points = classes[rows.kept]
    if bool((of_points[1:] >= of_points[:-1]).all()):
        return rows
    return ordered(rows, torch.argsort(of_points, stable=True))


def ordered(rows: Rows, order: torch.Tensor) -> Rows:
    """The rows with their points in another order (r,)."""
    count = len(order)
    place = torch.empty_like(order)
    place[order] = torch.arange(count, device=order.device)
    group = torch.where(rows.group < count, place[rows.group.clamp(max=count - 1)], rows.group)
    of_points = {name: getattr(rows, name)[order] for name in ("kept", "weight", "equal")}
    return replace(rows, group=group, plain=False, **of_points)
