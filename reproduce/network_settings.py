"""What a neural network's run is made of; ``paper`` gives the settings of the paper's appendix C."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reproduce.settings import Experiment, points

NETWORKS = {"mlp": "MLP", "resnet": "ResNet18", "vgg": "VGG-11"}  # These are the networks' names in titles.
HIDDEN = 5  # Every network has five Linear layers without bias before its readout.
_TRAINING: dict[str, dict[str, Any]] = {
    "mlp": {"epochs": 500, "learning_rate": 0.05, "momentum": 0.0, "init_scale": 0.3},
    "resnet": {"epochs": 300, "learning_rate": 0.05, "momentum": 0.0, "init_scale": 0.2},
    "vgg": {"epochs": 600, "learning_rate": 0.01, "momentum": 0.9, "init_scale": 0.3},
}
_MNIST_SCALE = 0.2  # On MNIST this is the initialisation scale of every network.
# These show the effect in minutes on two CPU cores; a larger initialisation leaves the first plateau early.
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
    init_scale: float  # The hidden layers' weights are this times sqrt(2 / d) times standard Gaussian.
    width: int = 512
    batch: int = 128
    every: int = 10  # This many epochs lie between measurements.
    standardize: bool = True  # The paper is silent.
    seed: int = 0

    @property
    def readable(self) -> str:
        """The key's first part."""
        return f"{self.name}-{self.network}-n{self.n}-e{self.epochs}-w{self.width}-s{self.seed}"

    def __str__(self):
        model = f"{NETWORKS[self.network]}, width {self.width}"
        optimizer = f"SGD {self.learning_rate:g}, momentum {self.momentum:g}, initialisation {self.init_scale:g}"
        return f"{self.title}: {model}, {self.epochs} epochs of {optimizer}, n = {self.n}, seed {self.seed}"


def paper(dataset: str, network: str, *, quick: bool = False, n: int | None = None, **changes: Any) -> NetworkSettings:
    """The paper's settings for a data set and a network, or the quick ones; changed where a change is not None."""
    values = dict(_TRAINING[network])
    if dataset == "mnist":
        values["init_scale"] = _MNIST_SCALE
    if quick:
        values |= _QUICK[network]
        quick_n = min(values.pop("n"), points(dataset, None))
        n = quick_n if n is None else n
    values |= {name: value for name, value in changes.items() if value is not None}
    return NetworkSettings(dataset, network, points(dataset, n), **values)
