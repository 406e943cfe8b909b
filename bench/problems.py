"""The problems of every case: points, classes, coefficients or targets, and the network.

All are drawn before a clock runs. Numbers come from the CPU's generator with one seed, so that a problem is the same
on every device.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, field

import torch
from fastagop.kernels.radial import Radial
from torch import nn

import fastagop

CPU = torch.device("cpu")
LAPLACE = fastagop.Laplace(2.0)
CLASSES = 10
# The paper's MLP for MNIST: widths of the inputs and of the hidden layers, and outputs.
WIDTHS, OUTPUTS = (784, 512, 512, 512, 512, 512), 10
LAYERS = [str(2 * i) for i in range(len(WIDTHS) - 1)]  # the Linear layers before the readout, in the Sequential


@dataclass(frozen=True, eq=False)
class Problem:
    """What contenders compute on; without a kernel it is a neural network's.

    Attributes:
        X: points (n, d).
        alpha: coefficients, right-hand sides or targets (n, K).
        y: classes (n,).
        kernel: of a kernel machine.
        model: of a network's problem.
        ridge: of a solve.
    """

    X: torch.Tensor
    alpha: torch.Tensor
    y: torch.Tensor
    kernel: Radial | None = LAPLACE
    model: nn.Sequential = field(default_factory=nn.Sequential)
    ridge: float = 1e-3

    @property
    def n(self) -> int:
        """Points."""
        return len(self.X)

    @property
    def d(self) -> int:
        """Features."""
        return self.X.shape[1]

    @property
    def K(self) -> int:
        """Outputs."""
        return self.alpha.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.X.device

    @property
    def family(self) -> str:
        """The kernel's name, or the network's."""
        return "MLP" if self.kernel is None else type(self.kernel).__name__

    def first(self, n: int) -> Problem:
        """The problem of its first points."""
        return dataclasses.replace(self, X=self.X[:n], alpha=self.alpha[:n], y=self.y[:n])


def draw(n: int, d: int, K: int, kernel: Radial | None = LAPLACE, device: torch.device = CPU) -> Problem:
    """Unit rows around ten class centres, and random coefficients; the MLP and its inputs where there is no kernel."""
    if kernel is None:
        return network(n, device)
    generator, y = torch.Generator().manual_seed(0), torch.arange(n) % CLASSES
    X = _around_centres(y, d, 2.0, generator)
    return Problem(X.to(device), torch.randn(n, K, generator=generator).to(device), y.to(device), kernel)


def collapsed(n: int, d: int, spread: float, device: torch.device = CPU, classes: int = CLASSES) -> Problem:
    """Unit rows of shuffled classes, ten by default, collapsed to a spread around their centres.

    Sorted classes would hide near pairs: of a matrix in tiles, one in ten has any then.
    """
    generator = torch.Generator().manual_seed(0)
    y = (torch.arange(n) % classes)[torch.randperm(n, generator=generator)]
    X = _around_centres(y, d, spread, generator)
    return Problem(X.to(device), torch.randn(n, 1, generator=generator).to(device), y.to(device))


def interpolated(n: int, d: int, K: int) -> Problem:
    """Unit rows around ten centres, and the ridgeless coefficients of +-1 labels (noisy random codes for K > 10)."""
    generator, y = torch.Generator().manual_seed(0), torch.arange(n) % CLASSES
    X = _around_centres(y, d, 2.0, generator)
    many = K > CLASSES
    code = torch.randint(0, 2, (CLASSES, K), generator=generator) if many else torch.eye(CLASSES)
    noise = (torch.rand(n, K, generator=generator) < 0.1) if many else torch.zeros(n, K)
    targets = 2.0 * ((code[y] + noise) % 2) - 1.0
    return Problem(X, fastagop.solve(LAPLACE, X, targets).alpha, y)


def labelled(n: int, d: int) -> Problem:
    """Unit rows around ten centres and their +-1 labels, float64."""
    drawn = draw(n, d, CLASSES)
    targets = 2.0 * torch.eye(CLASSES, dtype=torch.float64)[drawn.y] - 1.0
    return dataclasses.replace(drawn, X=drawn.X.double(), alpha=targets)


def normal(n: int, d: int, K: int, dtype: torch.dtype) -> Problem:
    """Standard normal points that are not scaled, and random coefficients."""
    generator = torch.Generator().manual_seed(0)
    X, alpha = torch.randn(n, d, generator=generator), torch.randn(n, K, generator=generator)
    return Problem(X.to(dtype), alpha.to(dtype), torch.zeros(n, dtype=torch.long))


def network(n: int, device: torch.device = CPU) -> Problem:
    """The paper's MLP for MNIST with torch's own initialisation, and n Gaussian inputs."""
    torch.manual_seed(0)
    hidden = [m for a, b in itertools.pairwise(WIDTHS) for m in (nn.Linear(a, b, bias=False), nn.ReLU())]
    model = nn.Sequential(*hidden, nn.Linear(WIDTHS[-1], OUTPUTS, bias=False))
    X = torch.randn(n, WIDTHS[0])
    nothing = torch.zeros(n, OUTPUTS)  # a network brings no coefficients
    return Problem(X.to(device), nothing, torch.zeros(n, dtype=torch.long), None, model.to(device))


def _around_centres(y: torch.Tensor, d: int, spread: float, generator: torch.Generator) -> torch.Tensor:
    centres = torch.randn(max(CLASSES, int(y.max()) + 1), d, generator=generator)
    return torch.nn.functional.normalize(centres[y] + spread * torch.randn(len(y), d, generator=generator))
