"""Which patches of an image a convolution sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import unfold

from fastagop.deep_rfm.layer import normalise_rows
from fastagop.kernels import checks

_IMAGES = 256  # whose patches are normalised at once


@dataclass(frozen=True)
class Window:
    """A square window that moves over images, as of a convolution.

    Args:
        size: side in pixels.
        stride: pixels between neighbouring patches.
        padding: zeros added around an image.
    """

    size: int
    stride: int = 1
    padding: int = 0

    def __post_init__(self) -> None:
        for name, least in (("size", 1), ("stride", 1), ("padding", 0)):
            object.__setattr__(self, name, checks.integer(name, getattr(self, name), least))

    def positions(self, side: int) -> int:
        """Patches along a side of so many pixels.

        Raises:
            ValueError: the window is larger than the padded image.
        """
        room = side + 2 * self.padding - self.size
        if room < 0:
            raise ValueError(f"a window of size {self.size} needs images of that side, got {side} + 2 * {self.padding}")
        return room // self.stride + 1

    def patches(self, images: torch.Tensor, normalise: bool = True) -> torch.Tensor:
        """Patches of images, shape (n, P, c size size), the order of pixels that of a convolution's weight.

        Args:
            images: (n, c, h, w), float32 or float64.
            normalise: divide every patch by its length, whatever that is; a patch of zeros stays.

        Raises:
            ValueError: images of another shape or dtype, smaller than the window, or not finite. Inside transforms of
                torch.func (vmap, jacrev) no number can be asked for, and NaN goes through.
        """
        checks.plain("images", images)
        if images.ndim != 4 or images.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"images must be float32 or float64 of shape (n, c, h, w), got {tuple(images.shape)} {images.dtype}"
            )
        if 0 in images.shape[1:]:
            raise ValueError(f"images must have channels and pixels, got shape {tuple(images.shape)}")
        for side in images.shape[2:]:
            self.positions(side)
        if not (torch._C._are_functorch_transforms_active() or checks.finite(images)):
            raise ValueError("images must be finite, but hold NaN or infinity")
        found = unfold(images, self.size, padding=self.padding, stride=self.stride).mT.contiguous()
        if normalise:
            for start in range(0, len(found), _IMAGES):
                some = found[start : start + _IMAGES]
                some.copy_(normalise_rows(some.flatten(0, 1)).view_as(some))
        return found
