"""Options that commands share, and what is wrong with their values."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

from fastagop import commands
from fastagop.deep_rfm.random_features import COS_SCALE
from reproduce.settings import DATASETS, DEPTH, KERNELS, POINTS, QUICK, RunLocation

RIDGE = "mu, added to the diagonal of the kernel matrix; default %(default)s"


def add_figure(parser: argparse.ArgumentParser) -> None:
    """Options of a Deep RFM figure; their defaults are the paper's settings."""
    add = parser.add_argument
    text = f"{QUICK['n']} points, {QUICK['depth']} layers, {QUICK['width']} features where not given: seconds a row"
    add("--quick", action="store_true", help=text)
    _add_points(parser)
    add("--depth", type=commands.count, help=f"layers; default {DEPTH}")
    add("--width", type=commands.count, help="random features; default 1024 for ReLU, 4096 for cos")
    add("--feature-scale", type=float, help=f"scale of cos features' Cauchy W; default {COS_SCALE}")
    add("--ridge", type=float, default=0.0, help=RIDGE)
    text = "paper: Gaussian for ReLU on MNIST, else Laplace; default %(default)s"
    add("--kernel", choices=("paper", *KERNELS), default="paper", help=text)
    add("--bandwidth", type=float, default=2.0, help="L of the kernel; default %(default)s")
    text = "divide M by its largest entry (max), by the number of points (mean), or not (sum); default %(default)s"
    add("--agop-scale", choices=("max", "mean", "sum"), default="max", help=text)
    text = "one run each: curves show their mean and range, strips the first; default 0"
    add("--seeds", type=seed, nargs="+", help=text)
    add("--dtype", choices=("float32", "float64"), default="float32", help="of the features; default %(default)s")
    _add_standardize(parser, ", as the authors' code does")
    add_location(parser, "out")


def add_network_figure(parser: argparse.ArgumentParser) -> None:
    """Options of a figure about neural networks; what is not given is the paper's, or the quick setting's."""
    add = parser.add_argument
    add("--quick", action="store_true", help="one seed, few points and epochs: minutes on two CPU cores")
    _add_points(parser)
    add("--epochs", type=commands.count, help="default 500 (MLP), 300 (ResNet), 600 (VGG)")
    add("--learning-rate", type=positive, help="default 0.05 (MLP, ResNet), 0.01 (VGG)")
    add("--momentum", type=float, help="default 0 (MLP, ResNet), 0.9 (VGG)")
    text = "standard deviation of initial weights over sqrt(2 / d); default 0.3, or 0.2 for ResNet and for MNIST"
    add("--init-scale", type=positive, help=text)
    add("--width", type=commands.count, help="of the hidden layers; default 512")
    add("--every", type=commands.count, help="epochs between measurements; default 10")
    text = "one run each: curves show their mean and one standard deviation; default 0 1 2, or 0 with --quick"
    add("--seeds", type=seed, nargs="+", help=text)
    _add_standardize(parser, " (the paper is silent)")
    add_location(parser, "out")


def _add_points(parser: argparse.ArgumentParser) -> None:
    text = f"{DATASETS}; repeat for several; default: the figure's own"
    parser.add_argument("--dataset", action="append", default=[], help=text)
    text = f"training points, the first in file order; default {POINTS}, or what there is"
    parser.add_argument("--n", type=commands.count, help=text)


def _add_standardize(parser: argparse.ArgumentParser, remark: str) -> None:
    text = f"standardise pixels over the training points{remark}; default on"
    parser.add_argument("--standardize", action=argparse.BooleanOptionalAction, default=True, help=text)


def add_location(parser: argparse.ArgumentParser, out: str, data: bool = True, checkpoint: bool = True) -> None:
    """Options that say where to read (where there are files to read), compute and write, and what to keep."""
    add = parser.add_argument
    parser.set_defaults(data_root=None, download=False, keep_checkpoint=False)
    if data:
        add_data(parser)
    add("--device", type=_device, default="auto", help="cpu, cuda, cuda:1, ...; default CUDA where there is one")
    add_out(parser, out)
    if checkpoint:
        add("--keep-checkpoint", action="store_true", help="keep the trained layers of a complete run")


class Once(argparse.Action):
    """An option that other commands take several times, and this one once."""

    def __call__(self, parser, namespace, values, option_string=None):
        """Store the value; a second one is refused."""
        if getattr(namespace, self.dest) is not self.default:
            parser.error(f"{option_string} must be given once here, got {getattr(namespace, self.dest)} and {values}")
        setattr(namespace, self.dest, values)


def add_out(parser: argparse.ArgumentParser, out: str) -> None:
    """The option that says where results lie."""
    parser.add_argument("--out", type=Path, default=Path(out), help="folder for results; default %(default)s")


def add_data(parser: argparse.ArgumentParser) -> None:
    """Options that say where the data sets are."""
    parser.add_argument("--data-root", help="folder with torchvision's files; default data")
    parser.add_argument("--download", action="store_true", help="let torchvision fetch missing files")


def positive(text: str) -> float:
    """An option's finite number > 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number > 0, got {text!r}")
    return value


def seed(text: str) -> int:
    """An option's integer from 0 to 2^32 - 1."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"must be an integer from 0 to 2^32 - 1, got {text!r}")
    return int(text)


def _device(text: str) -> str:
    try:
        if text != "auto":
            torch.empty(1, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"torch cannot use {text!r}: {str(error).splitlines()[0]}") from error
    return text


def run_location(args: argparse.Namespace) -> RunLocation:
    """Where the command works."""
    return RunLocation(args.out, args.data_root, args.device, args.download, args.keep_checkpoint)
