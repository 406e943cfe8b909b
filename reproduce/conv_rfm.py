"""Convolutional Deep RFM: neural collapse in layers of patch kernel machines, on images.

Each layer takes normalised patches, solves kernel ridge regression with the mean of a kernel over pairs of patches,
projects patches by M^(1/2) of the patch AGOP, and maps them by random convolutional features.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastagop import Laplace, commands, datasets
from fastagop.convolution import ConvLayerSettings, Window, fit_layer
from reproduce import files, layers, options, plots
from reproduce.about import About
from reproduce.networks import Images
from reproduce.settings import DATASETS, Experiment, load

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

NAME = "conv_rfm"
ABOUT = About(
    "Neural collapse in a convolutional Deep RFM",
    "No paper shows this: Deep RFM with the patch AGOP of convolutional kernel machines (Radhakrishnan et al., 2024) "
    "in place of the AGOP. On CIFAR-10, M^(1/2) lowers NC1 from the second layer on, and random features raise it",
    "collapse in a Deep RFM of convolutional layers, by patch AGOP",
)
WINDOWS = ((7, 5), (3, 1), (3, 1), (2, 1))  # sizes and strides of the layers: 32 pixels, then 6, 4, 2 and 1 a side
_POINTS = {False: 2000, True: 300}  # by --quick


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add = parser.add_argument
    add("--quick", action="store_true", help=f"{_POINTS[True]} points where --n is not given: half a minute")
    text = f"square images: {DATASETS}; default %(default)s"
    add("--dataset", action=options.Once, default="cifar10", help=text)
    add("--n", type=commands.count, help=f"training points, the first in file order; default {_POINTS[False]}")
    add("--width", type=commands.count, default=64, help="random features of a layer; default %(default)s")
    add("--bandwidth", type=options.positive, default=1.0, help="L of the Laplace kernel; default %(default)s")
    add("--ridge", type=options.positive, default=1e-3, help=options.RIDGE)
    add("--seed", type=options.seed, default=0, help="of the random features; default %(default)s")
    options.add_location(parser, "out", checkpoint=False)


def command(args: argparse.Namespace) -> int:
    """Fit the layers, draw, write, and say what to see; 0."""
    plots.require()
    n = args.n or _POINTS[args.quick]
    X, y = load(args.dataset, args.data_root, n=n, download=args.download)
    flat, shape = datasets.standardize(X)[0], Images(X.shape[1], Experiment(args.dataset).channels_first)
    images = shape.unflattened(flat).contiguous()
    kernel, start = Laplace(args.bandwidth), time.perf_counter()
    settings = [ConvLayerSettings(kernel, Window(*window), args.width, args.ridge) for window in WINDOWS]
    device = options.run_location(args).torch_device
    rows = run(images.to(device), y, settings, args.seed)
    stem = args.out / NAME
    about = {"dataset": args.dataset.rpartition("/")[2], "n": len(y), "windows": WINDOWS, "width": args.width}
    about |= {"kernel": repr(kernel), "ridge": args.ridge, "seed": args.seed}
    written = plots.save(drawing(about, rows), stem)
    origin = {"settings": about, "environment": files.environment(device), "seconds": time.perf_counter() - start}
    files.write_csv(stem.with_suffix(".csv"), rows)
    files.write_json(stem.with_suffix(".json"), {"runs": [origin], "lessons": [lesson(rows)]})
    print(f"\n{lesson(rows)}\nwrote {', '.join(map(str, written))}, {stem}.csv and {stem}.json")
    return 0


def run(images: torch.Tensor, y: torch.Tensor, settings: list[ConvLayerSettings], seed: int) -> list[dict[str, Any]]:
    """A row a layer: collapse at its three stages, accuracy on its own images, seconds; printed as they come.

    A last window larger than the images that are left ends the layers.
    """
    rows: list[dict[str, Any]] = []
    print(
        f"{'layer':>5} | {'images':>10} |{'NC1 input':>11}{'M^1/2 p':>11}{'features':>11} |"
        f"{'accuracy':>9}{'seconds':>9}"
    )
    for index, layer in enumerate(settings, 1):
        if min(images.shape[2:]) < layer.window.size:
            break
        start = time.perf_counter()
        fitted = fit_layer(images, y, layer, seed + index)
        images, shape = fitted(images), "x".join(map(str, images.shape[1:]))
        seconds = time.perf_counter() - start
        row: dict[str, Any] = {
            "layer": index,
            "images": shape,
            "window": layer.window.size,
            "stride": layer.window.stride,
        }
        row |= {f"{name}_{stage}": getattr(fitted, name)[stage] for name in ("nc1", "nc2") for stage in layers.STAGES}
        row |= {"accuracy": fitted.accuracy, "residual": fitted.residual, "jitter": fitted.jitter, "seconds": seconds}
        rows.append(row)
        nc1 = "".join(f"{row[f'nc1_{stage}']:>11.2e}" for stage in layers.STAGES)
        print(f"{index:>5} | {shape:>10} |{nc1} |{fitted.accuracy:>9.3f}{seconds:>9.1f}", flush=True)
    return rows


def drawing(about: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Drawing:
    """NC1 and NC2 by layer, from a run's settings and its rows or their cells in a .csv."""
    nc1, nc2 = (
        {stage: np.array([[layers.number(row[f"{measure}_{stage}"]) for row in rows]]) for stage in layers.STAGES}
        for measure in ("nc1", "nc2")
    )
    return plots.curves([plots.Curves(Experiment(about["dataset"]).title, nc1, nc2)], ABOUT.title, "ReLU")


def lesson(rows: list[dict[str, Any]]) -> str:
    """Where NC1 falls and where it rises."""
    fell = sum(row["nc1_projected"] < row["nc1_input"] for row in rows)
    rose = sum(row["nc1_features"] > row["nc1_projected"] for row in rows)
    return (
        f"M^(1/2) of the patch AGOP lowers NC1 in {fell} of {len(rows)} layers, random convolutional features raise it "
        f"in {rose}; after M^(1/2) it goes from {rows[0]['nc1_projected']:.3g} to {rows[-1]['nc1_projected']:.3g}"
    )
