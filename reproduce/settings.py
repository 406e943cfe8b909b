"""What a run is made of; ``paper`` gives Deep RFM's settings of the paper's appendix C."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastagop import Gaussian, Laplace, datasets
from fastagop.datasets import npz
from fastagop.datasets.loading import NAMED
from fastagop.deep_rfm.random_features import COS_SCALE

POINTS = 50_000  # The paper trains on the first 50,000 points of each data set.
DEPTH = 20
QUICK = {"n": 1000, "depth": 10, "width": 512}  # These show the effect in seconds.
KERNELS = {"laplace": Laplace, "gaussian": Gaussian}
WIDTHS = {"relu": 1024, "cos": 4096}
FEATURES = {"relu": "ReLU", "cos": "cos"}  # These are the feature maps' names in titles.
DATASETS = f"{', '.join(NAMED)} or the path of an .npz"  # What --dataset takes.
TITLES = {name: known.title for name, known in NAMED.items()} | {"cifar10_jpeg": "CIFAR-10 (JPEG)"}


@dataclass(frozen=True)
class Experiment:
    """What decides a run's numbers, up to rounding; the run folder's name is made of it."""

    dataset: str

    @property
    def name(self) -> str:
        """The data set's name, or its file's."""
        return Path(self.dataset).stem

    @property
    def title(self) -> str:
        """The data set as a figure names it."""
        return TITLES.get(self.name, self.name)

    @property
    def channels_first(self) -> bool:
        """Whether its images are flattened as (channels, height, width)."""
        return self.name in NAMED and NAMED[self.name].channels_first

    @property
    def readable(self) -> str:
        """The key's first part."""
        return self.name

    @property
    def recorded(self) -> dict[str, Any]:
        """The settings as result files hold them: a file's name, not where it lies on this machine."""
        return {**asdict(self), "dataset": Path(self.dataset).name}

    @property
    def key(self) -> str:
        """Readable part and hash; an .npz enters with its content, wherever it lies."""
        named = {**asdict(self), "dataset": self.name + _content(self.dataset)}
        digest = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.readable}-{digest}"


@dataclass(frozen=True)
class Settings(Experiment):
    """A Deep RFM run."""

    features: str
    n: int
    kernel: str
    width: int
    feature_scale: float | None
    bandwidth: float = 2.0
    depth: int = DEPTH
    ridge: float = 0.0
    agop_scale: str = "max"  # This is the authors' code's; ReLU features do not depend on it.
    standardize: bool = True  # This is the authors' code's; the paper is silent.
    dtype: str = "float32"
    seed: int = 0
    score: bool = False  # True adds the accuracies on training and test points.

    @property
    def readable(self) -> str:
        """The key's first part."""
        return f"{self.name}-{self.features}-{self.kernel}-n{self.n}-d{self.depth}-w{self.width}-s{self.seed}"

    def __str__(self):
        kernel, phi = KERNELS[self.kernel](self.bandwidth), f"{self.width} {FEATURES[self.features]} features"
        return f"{self.title}: {phi}, {kernel!r}, ridge {self.ridge:g}, n = {self.n}, seed {self.seed}"


def paper(
    dataset: str,
    features: str,
    *,
    n: int | None = None,
    kernel: str = "paper",
    width: int | None = None,
    depth: int | None = None,
    feature_scale: float | None = None,
    quick: bool = False,
    **changes: Any,
) -> Settings:
    """The paper's settings for a data set and a feature map (appendix C), changed as asked for.

    n None is 50,000, or what the data set has; kernel "paper" is Gaussian for ReLU on MNIST and Laplace otherwise;
    width None is 1024 for ReLU and 4096 for cos; depth None is 20; feature_scale is for cos only, None is 0.05.
    ``quick`` stands in for whichever of n, width and depth is None.
    """
    if quick:
        n = min(QUICK["n"], points(dataset, None)) if n is None else n
        width, depth = width or QUICK["width"], depth or QUICK["depth"]
    if kernel == "paper":
        kernel = "gaussian" if (dataset, features) == ("mnist", "relu") else "laplace"
    width = WIDTHS[features] if width is None else width
    scale = None
    if features == "cos":
        scale = COS_SCALE if feature_scale is None else feature_scale
    size = points(dataset, n)
    return Settings(dataset, features, size, kernel, width, scale, depth=depth or DEPTH, **changes)


@dataclass(frozen=True)
class RunLocation:
    """Where a run reads, computes and writes; its numbers do not depend on it, up to rounding."""

    out: Path
    data_root: str | None = None
    device: str = "auto"
    download: bool = False
    keep_checkpoint: bool = False

    @property
    def torch_device(self) -> torch.device:
        """The device; "auto" is CUDA where there is one."""
        automatic = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device(automatic if self.device == "auto" else self.device)

    def folder(self, settings: Experiment) -> Path:
        """The run's folder."""
        return self.out / "runs" / settings.key

    def load(self, settings: Experiment, **options: Any):
        """(X, y) of the settings' data set; options as of datasets.load."""
        return load(settings.dataset, self.data_root, download=self.download, **options)


def load(dataset: str, *args: Any, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """``datasets.load``, whose errors name the options of the command line in place of its arguments."""
    try:
        return datasets.load(dataset, *args, **arguments)
    except (FileNotFoundError, ValueError) as error:
        message, told = str(error), str(error)
        for argument, option in (("pass download=True", "pass --download"), ("name_or_path must", "--dataset must")):
            told = told.replace(argument, option)
        if told == message:
            raise
        raise type(error)(told) from error


def points(dataset: str, n: int | None) -> int:
    """n, or the paper's number as far as the data set has it."""
    available = NAMED[dataset].points if dataset in NAMED else _count(dataset)
    if n is None:
        return min(available, POINTS)
    if not 1 <= n <= available:
        raise ValueError(f"--n must be from 1 to {available}, the training points of {dataset}, got {n}")
    return n


def _count(dataset: str) -> int:
    """Training points of an .npz."""
    load(dataset, n=1)  # This tells what is wrong with the name or the file.
    with npz.Archive(dataset) as archive:  # The labels alone are read, because images are large.
        return archive.header("y_train").shape[0]


def _content(dataset: str) -> str:
    """Checksums of an .npz's arrays, from its directory; empty for what has a name of its own."""
    if not dataset.endswith(".npz") or not Path(dataset).exists():
        return ""
    with npz.Archive(dataset) as archive:
        return "".join(f"-{checksum:08x}" for checksum in archive.checksums())
