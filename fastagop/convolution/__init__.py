"""Convolutional kernel machines: kernels of image patches, their patch AGOP, and a Deep RFM layer made of them."""

from fastagop.convolution.layer import ConvLayer, ConvLayerSettings, fit_layer
from fastagop.convolution.machine import PatchMachine, patch_kernel_matrix
from fastagop.convolution.window import Window

__all__ = ["ConvLayer", "ConvLayerSettings", "PatchMachine", "Window", "fit_layer", "patch_kernel_matrix"]
