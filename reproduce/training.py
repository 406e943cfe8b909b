"""How a network's run is computed: trained as in appendix C, measured every few epochs, resumed where last measured.

Beside what every run has, its folder holds measures.csv and, until the run is complete, checkpoint.safetensors
(weights, momentum and what was measured so far, in one file).
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from fastagop import datasets, network
from fastagop.estimators import files as storage
from reproduce import files, networks
from reproduce.layers import STAGES, number
from reproduce.network_settings import NetworkSettings
from reproduce.runs import Procedure
from reproduce.settings import RunLocation

_KIND = "network in training"  # The checkpoint file names its kind, and another kind is refused.


class NetworkProcedure(Procedure):
    """Trains a network, and measures it every few epochs."""

    parts = ("classes", "layers", "losses", "seconds", "accuracy", "resumed")
    checkpoint = "checkpoint.safetensors"
    prints_table = False

    def compute(self, settings: NetworkSettings, location: RunLocation, folder: Path) -> dict[str, Any]:
        """Accuracy, losses by epoch, and the measured layers."""
        training = Training(settings, location)
        checkpoint = folder / self.checkpoint
        resumed = training.load(checkpoint)
        first, last = training.epoch, settings.epochs
        progress = tqdm(range(first, last), initial=first, total=last, unit="epoch", disable=None)
        if not resumed:
            training.measure()
        for _ in progress:
            progress.set_postfix(loss=f"{training.train_epoch():.2e}")
            if training.epoch % settings.every == 0 or training.epoch == last:
                training.measure()
                training.save(checkpoint)
        record: dict[str, Any] = {"resumed": resumed, "seconds": training.seconds, "accuracy": training.accuracy()}
        record |= {"classes": training.classes, "losses": training.losses, "layers": training.rows}
        files.write_csv(folder / "measures.csv", training.rows)
        return record

    def table(self, rows: list[dict[str, Any]]) -> str:
        """The last measurement, a line a layer, with the share of NC1's fall that S V^T makes."""
        lines = [f"{'layer':>6} |{'NC1 input':>11}{'S V^T x':>11}{'ReLU':>11} | {'fall at S V^T':>13} |{'NFA':>7}"]
        for row in (row for row in rows if row["epoch"] == rows[-1]["epoch"]):
            values = [number(row[f"nc1_{stage}"]) for stage in STAGES]
            nc1, share = "".join(f"{value:>11.2e}" for value in values), log_drop_share(*values)
            text = "no fall" if share is None else f"{100 * share:.0f}%"
            lines.append(f"{row['layer']:>6} |{nc1} | {text:>13} |{number(row['nfa']):>7.3f}")
        return "\n".join(lines)

    def summary(self, record: dict[str, Any]) -> str:
        """Seconds, the last loss and the accuracy."""
        loss, accuracy = record["losses"][-1], record["accuracy"]
        return f"{record['seconds']:.1f} s; loss {loss:.1e}, accuracy {accuracy:.4f} on its points"


class Training:
    """A network, its data and what has been measured; ``epoch`` counts finished epochs."""

    def __init__(self, settings: NetworkSettings, location: RunLocation):
        self.settings = settings
        X, y = location.load(settings, n=settings.n)
        if settings.standardize:
            (X,) = datasets.standardize(X)
        self.device = location.torch_device
        self.X, self.labels = X.to(self.device), torch.unique(y, return_inverse=True)[1]
        self.classes = int(self.labels.max()) + 1
        self.Y = (2.0 * nn.functional.one_hot(self.labels, self.classes) - 1.0).to(self.X)
        self.model = networks.build(settings, X.shape[1], self.classes).to(self.device)
        rate, momentum = settings.learning_rate, settings.momentum
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=rate, momentum=momentum)
        self.epoch, self.seconds = 0, 0.0
        self.losses: list[float] = []  # There is one an epoch: the mean over its batches as they were met.
        self.rows: list[dict[str, Any]] = []

    def train_epoch(self) -> float:
        """One pass over the points, in an order made of seed and epoch alone; the mean loss."""
        start = time.perf_counter()
        self.model.train()
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.X), generator=generator).to(self.device)
        total = torch.zeros((), device=self.device)
        for rows in order.split(self.settings.batch):
            loss = nn.functional.mse_loss(self.model(self.X[rows]), self.Y[rows])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            total += loss.detach() * len(rows)
        self.epoch += 1
        self.losses.append(float(total) / len(self.X))
        self.seconds += time.perf_counter() - start
        if not self.losses[-1] < float("inf"):
            raise ValueError(f"training diverged in epoch {self.epoch}, choose a smaller --learning-rate")
        return self.losses[-1]

    def measure(self) -> None:
        """Add a row for every Linear layer: NFA correlation, and NC1 and NC2 at its three stages."""
        start = time.perf_counter()
        try:
            linear = [name for name, module in self.model.named_modules() if isinstance(module, torch.nn.Linear)]
            splits = network.collapse_split(self.model, self.X, self.labels, linear)
        except ValueError as error:
            hint = "choose a smaller --learning-rate or --init-scale"
            raise ValueError(f"training diverged before epoch {self.epoch}, {hint}: {error}") from error
        try:
            correlation = network.nfa_correlation(self.model, self.X, list(splits))
        except network.ConstantMatrixError:  # The network is dead: its outputs do not depend on its input.
            correlation = {}
        loss = self.losses[-1] if self.losses else None
        for layer, (name, split) in enumerate(splits.items(), start=1):
            row = {"epoch": self.epoch, "layer": layer, "name": name, "loss": loss, "nfa": correlation.get(name)}
            row |= {f"nc1_{stage}": split.nc1[stage] for stage in STAGES}
            self.rows.append(row | {f"nc2_{stage}": split.nc2[stage] for stage in STAGES})
        self.seconds += time.perf_counter() - start

    @torch.no_grad()
    def accuracy(self) -> float:
        """Share of the training points that the largest output classifies correctly."""
        self.model.eval()
        predicted = torch.cat([self.model(block).argmax(1).cpu() for block in self.X.split(1024)])
        return float((predicted == self.labels).double().mean())

    def save(self, path: Path) -> None:
        """Everything that the next epoch needs, in one file."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"momentum.{i}": state["momentum_buffer"]} if state.get("momentum_buffer") is not None else {}
        done = {"epoch": self.epoch, "seconds": self.seconds, "losses": self.losses, "rows": self.rows}
        storage.write(path, _KIND, tensors, {"settings": self.settings.recorded, **done})

    def load(self, path: Path) -> bool:
        """Go on from a saved file, where there is one.

        Raises:
            ValueError: naming the file, which is damaged or another run's.
        """
        if not path.exists():
            return False
        try:
            tensors, done = storage.read(path, _KIND)
            with storage.restoring(path):
                self._restore(tensors, done)
        except ValueError as error:
            raise ValueError(f"{error}; remove it to train from the start") from error
        print(f"resumed after epoch {self.epoch}")
        return True

    def _restore(self, tensors: dict[str, torch.Tensor], done: dict[str, Any]) -> None:
        if done["settings"] != self.settings.recorded:
            raise ValueError("it is another run's: its settings differ")
        self.epoch, self.seconds, self.losses, self.rows = (done[key] for key in ("epoch", "seconds", "losses", "rows"))
        weights = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
        self.model.load_state_dict(weights)
        for i, parameter in enumerate(self.model.parameters()):
            if f"momentum.{i}" in tensors:
                self.optimizer.state[parameter]["momentum_buffer"] = tensors[f"momentum.{i}"].to(self.device)


def log_drop_share(start: float, middle: float, end: float) -> float | None:
    """Share of a layer's fall of NC1, on a log scale, that S V^T makes; None where NC1 does not fall."""
    if not (0 < end < start < math.inf and 0 < middle < math.inf):
        return None
    return math.log(start / middle) / math.log(start / end)
