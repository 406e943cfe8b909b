"""Options that commands share, and what is wrong with their values."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fastagop.features import COS_SCALE
from reproduce.settings import KERNELS, POINTS, Place


def add_figure(parser: argparse.ArgumentParser) -> None:
    """Options of a Deep RFM figure; their defaults are the paper's settings."""
    add = parser.add_argument
    what = "mnist, cifar10, svhn, digits or the path of an .npz; repeat for several; default: the figure's own"
    add("--dataset", action="append", default=[], help=what)
    add("--n", type=count, help=f"training points, the first in file order; default {POINTS}, or what there is")
    add("--depth", type=count, default=20, help="layers; default %(default)s")
    add("--width", type=count, help="random features; default 1024 for ReLU, 4096 for cos")
    add("--feature-scale", type=float, default=COS_SCALE, help="of cos features' Cauchy W; default %(default)s")
    add("--ridge", type=float, default=0.0, help="default %(default)s")
    what = "paper: Gaussian for ReLU on MNIST, else Laplace; default %(default)s"
    add("--kernel", choices=("paper", *KERNELS), default="paper", help=what)
    add("--bandwidth", type=float, default=2.0, help="L of the kernel; default %(default)s")
    add("--agop-scale", choices=("max", "mean", "sum"), default="max", help="see README.md; default %(default)s")
    what = "one run each: curves show their mean and range, strips the first; default 0"
    add("--seeds", type=int, nargs="+", default=[0], help=what)
    add("--dtype", choices=("float32", "float64"), default="float32", help="default %(default)s")
    what = "standardise pixels over the training points, as the authors' code does; default on"
    add("--standardize", action=argparse.BooleanOptionalAction, default=True, help=what)
    add_place(parser, "out")


def add_place(parser: argparse.ArgumentParser, out: str, data: bool = True) -> None:
    """Options that say where to read (where there are files to read), compute and write."""
    add = parser.add_argument
    parser.set_defaults(data_root=None, download=False)
    if data:
        add("--data-root", help="folder with torchvision's files; default data")
        add("--download", action="store_true", help="let torchvision fetch missing files")
    add("--device", type=_device, default="auto", help="cpu, cuda, cuda:1, ...; default CUDA where there is one")
    add("--out", type=Path, default=Path(out), help="folder for results; default %(default)s")
    add("--keep-checkpoint", action="store_true", help="keep the trained layers of a complete run")


def count(text: str) -> int:
    """An option's integer >= 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text!r}")
    return int(text)


def _device(text: str) -> str:
    try:
        if text != "auto":
            torch.empty(1, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"torch cannot use {text!r}: {str(error).splitlines()[0]}") from error
    return text


def place(args: argparse.Namespace) -> Place:
    """Where the command works."""
    return Place(args.out, args.data_root, args.device, args.download, args.keep_checkpoint)
