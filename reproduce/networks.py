"""The paper's networks (appendix C): an MLP, ResNet18 and VGG-11, all ending in the same five layers and readout."""

from __future__ import annotations

import math

import torch
from torch import nn

from reproduce.network_settings import HIDDEN, NetworkSettings


class Images(nn.Module):
    """Flat rows as ``datasets.load`` gives them, back to images (n, 3, height, width); grey ones three times."""

    def __init__(self, d: int, channels_first: bool):
        super().__init__()
        channels = next((c for c in (1, 3) if d % c == 0 and math.isqrt(d // c) ** 2 == d // c), None)
        if channels is None:
            raise ValueError(f"--dataset: rows of {d} numbers are no square images of 1 or 3 channels")
        side = math.isqrt(d // channels)
        self.shape = (channels, side, side) if channels_first else (side, side, channels)
        self.order = (0, 1, 2, 3) if channels_first else (0, 3, 1, 2)

    def unflattened(self, x: torch.Tensor) -> torch.Tensor:
        """Rows (n, d) as images with the channels that they have."""
        return x.view(-1, *self.shape).permute(self.order)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rows (n, d)."""
        return self.unflattened(x).expand(-1, 3, -1, -1).contiguous()


def build(settings: NetworkSettings, d: int, classes: int) -> nn.Module:
    """The network for rows of d numbers, initialised from the settings' seed."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(settings.seed)
        if settings.network == "mlp":
            return _head(d, classes, settings)
        images = Images(d, settings.channels_first)
        trunk = _resnet() if settings.network == "resnet" else _vgg(max(images.shape))
        with torch.no_grad():
            features = trunk.eval()(images(torch.zeros(1, d))).shape[1]
        return nn.Sequential(images, trunk.train(), _head(features, classes, settings))


def _head(d: int, classes: int, settings: NetworkSettings) -> nn.Sequential:
    """Five Linear layers with ReLU and a readout of torch's own initialisation, all without bias."""
    layers: list[nn.Module] = []
    for _ in range(HIDDEN):
        linear = nn.Linear(d, settings.width, bias=False)
        nn.init.normal_(linear.weight, std=settings.init_scale * math.sqrt(2 / d))
        layers += [linear, nn.ReLU()]
        d = settings.width
    return nn.Sequential(*layers, nn.Linear(d, classes, bias=False))


def _resnet() -> nn.Module:
    """ResNet18 up to its classifier."""
    from torchvision.models import resnet18

    return nn.Sequential(*list(resnet18(weights=None).children())[:-1], nn.Flatten())


def _vgg(side: int) -> nn.Module:
    """VGG-11 up to the ReLU before its last two poolings."""
    from torchvision.models import vgg11

    if side < 16:
        raise ValueError(f"--dataset: VGG-11 needs images of at least 16 x 16, got {side} x {side}")
    return nn.Sequential(*list(vgg11(weights=None).features.children())[:-1], nn.Flatten())
