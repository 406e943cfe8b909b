"""What a neural network's run is made of; ``paper`` gives the settings of the paper's appendix C."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reproduce.settings import Experiment, points

NETWORKS = {"mlp": "MLP", "resnet": "ResNet18", "vgg": "VGG-11"}  # as titles write them
HIDDEN = 5  # Linear layers without bias before the readout, in every network
_TRAINING: dict[str, dict[str, Any]] = {
    "mlp": {"epochs": 500, "learning_rate": 0.05, "momentum": 0.0, "init_scale": 0.3},
    "resnet": {"epochs": 300, "learning_rate": 0.05, "momentum": 0.0, "init_scale": 0.2},
    "vgg": {"epochs": 600, "learning_rate": 0.01, "momentum": 0.9, "init_scale": 0.3},
}
_MNIST = 0.2  # initialisation scale there, whatever the network
# Enough to see the effect in minutes on two CPU cores; a larger initialisation leaves the first plateau early.
_QUICK: dict[str, dict[str, Any]] = {
    "mlp": {"n": 1000, "epochs": 100, "init_scale": 0.5, "learning_rate": 0.1},
    "resnet": {"n": 500, "epochs": 20, "init_scale": 0.5},
    "vgg": {"n": 400, "epochs": 20, "init_scale": 1.0, "batch": 32},
}


@dataclass(frozen=True)
class NetworkSettings(Experiment):
    """A network's training; the loss is the mean square over samples and the +-1 one-hot outputs."""

    network: str
    n: int
    epochs: int
    learning_rate: float
    momentum: float
    init_scale: float  # of the hidden layers' weights, times sqrt(2 / d) standard Gaussian
    width: int = 512
    batch: int = 128
    every: int = 10  # epochs between measurements
    standardize: bool = True  # the paper is silent
    seed: int = 0

    @property
    def readable(self) -> str:
        """The key's first part."""
        return f"{self.name}-{self.network}-n{self.n}-e{self.epochs}-w{self.width}-s{self.seed}"

    def __str__(self):
        how = f"SGD {self.learning_rate:g}, momentum {self.momentum:g}, initialisation {self.init_scale:g}"
        what = f"{self.title}: {NETWORKS[self.network]}, width {self.width}"
        return f"{what}, {self.epochs} epochs of {how}, n = {self.n}, seed {self.seed}"


def paper(dataset: str, network: str, *, quick: bool = False, n: int | None = None, **changes: Any) -> NetworkSettings:
    """The paper's settings for a data set and a network, or the quick ones; changed where a change is not None."""
    given = dict(_TRAINING[network])
    if dataset == "mnist":
        given["init_scale"] = _MNIST
    if quick:
        given |= _QUICK[network]
        few = min(given.pop("n"), points(dataset, None))
        n = few if n is None else n
    given |= {name: value for name, value in changes.items() if value is not None}
    return NetworkSettings(dataset, network, points(dataset, n), **given)
