"""What a kernel machine looks at: leading eigenvectors of its AGOP as images, and eigenvalues with intervals."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

import torch

import fastagop
from fastagop import Laplace, commands
from fastagop import plots as library
from reproduce import files, options, plots
from reproduce.about import About
from reproduce.networks import Images
from reproduce.settings import DATASETS, Experiment, load

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "eigenvectors"
ABOUT = About(
    "Eigenvectors of the AGOP of a kernel machine",
    "The AGOP has few large eigenvalues, and its eigenvectors are directions that tell classes apart: strokes, where "
    "the data are digits (as in Radhakrishnan et al., 2024)",
    "the leading eigenvectors of a kernel machine's AGOP as images",
)
_POINTS = {False: 2000, True: 500}  # by --quick
_DRAWS = 50  # of the bootstrap


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add = parser.add_argument
    add("--quick", action="store_true", help=f"{_POINTS[True]} points where --n is not given")
    text = f"square images: {DATASETS}; default %(default)s"
    add("--dataset", action=options.Once, default="mnist", help=text)
    add("--n", type=commands.count, help=f"training points, the first in file order; default {_POINTS[False]}")
    add("--count", type=commands.count, default=12, help="eigenvectors; default %(default)s")
    add("--bandwidth", type=options.positive, default=10.0, help="L of the Laplace kernel; default %(default)s")
    add("--ridge", type=options.positive, default=1e-3, help=options.RIDGE)
    options.add_location(parser, "out", checkpoint=False)


def command(args: argparse.Namespace) -> int:
    """Solve, take the AGOP, draw, write, and say what to see; 0."""
    plots.require()
    n, start = args.n or _POINTS[args.quick], time.perf_counter()
    X, y = load(args.dataset, args.data_root, n=n, download=args.download)
    if args.count > X.shape[1]:
        raise ValueError(f"--count must be at most {X.shape[1]}, the pixels of an image, got {args.count}")
    X, y = (part.to(options.run_location(args).torch_device) for part in (X, y))
    kernel, Y = Laplace(args.bandwidth), 2.0 * torch.nn.functional.one_hot(y).to(X.dtype) - 1.0
    alpha = fastagop.solve(kernel, X, Y, ridge=args.ridge).alpha
    M, slopes = fastagop.agop(kernel, X, alpha), fastagop.gradients(kernel, X, alpha)
    found = fastagop.spectrum(M, args.count, bootstrap=_DRAWS, gradients=slopes, random_state=0)
    about = {"dataset": args.dataset.rpartition("/")[2], "n": len(y), "kernel": repr(kernel), "ridge": args.ridge}
    origin = {"settings": about, "environment": files.environment(X.device), "seconds": time.perf_counter() - start}
    stem, said = args.out / NAME, lesson(found)
    images = Images(X.shape[1], Experiment(args.dataset).channels_first)
    written = plots.save(draw(found, images, f"{Experiment(args.dataset).title}, n = {len(y)}"), stem)
    files.write_csv(stem.with_suffix(".csv"), rows(found))
    files.write_json(stem.with_suffix(".json"), {"runs": [origin], "lessons": [said]})
    print(f"\n{said}\nwrote {', '.join(map(str, written))}, {stem}.csv and {stem}.json")
    return 0


def rows(found: fastagop.Spectrum) -> list[dict[str, float]]:
    """A line an eigenvalue: its share of the trace, and its interval."""
    shares, intervals = found.shares.tolist(), found.intervals.tolist()
    return [
        {
            "number": i + 1,
            "eigenvalue": float(value),
            "share": shares[i],
            "low": intervals[i][0],
            "high": intervals[i][1],
        }
        for i, value in enumerate(found.values)
    ]


def draw(found: fastagop.Spectrum, images: Images, title: str) -> Figure:
    """Eigenvectors left, eigenvalues right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.7), layout="constrained")
    figure.suptitle(f"Eigenvectors of the AGOP of a Laplace machine: {title}", fontsize=11)
    parts: Any = figure.subfigures(1, 2, width_ratios=(2.3, 1))
    left, right = parts
    shown = images.unflattened(torch.as_tensor(found.vectors))
    shape = shown.shape[1:] if shown.shape[1] == 3 else shown.shape[2:]
    library.eigenvectors(found, tuple(shape), figure=left)
    library.spectrum(found, ax=right.subplots())
    return figure


def lesson(found: fastagop.Spectrum) -> str:
    """How few directions matter."""
    shares = [float(share) for share in found.shares]
    return (
        f"the first of {found.vectors.shape[1]} eigenvalues has {shares[0]:.0%} of the trace, the first {len(shares)} "
        f"{sum(shares):.0%}; effective rank {float(found.effective_rank):.1f}"
    )
