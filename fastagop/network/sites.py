"""Where a model multiplies by weights: Linear layers, convolutions, attention's projections; and embeddings.

A site is one such place. While ``forwards`` stand in for those of the modules, every site asks a step for its output,
which may compute it as the module does (``Site.compute``) and look at what passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

Kind = Literal["linear", "convolution", "embedding"]
KINDS: tuple[Kind, ...] = ("linear", "convolution", "embedding")
MATRICES: tuple[Kind, ...] = ("linear", "convolution")  # those that have a matrix W which multiplies their input
ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(eq=False, frozen=True)
class Site:
    """One multiplication by weights, or one table of vectors, in a module; ``part`` of an attention layer."""

    name: str
    module: nn.Module
    kind: Kind
    part: str = ""

    def compute(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """What the module computes there."""
        if isinstance(self.module, _CONVOLUTIONS):
            return self.module._conv_forward(input, weight, bias)
        if isinstance(self.module, nn.Embedding):
            return nn.Embedding.forward(self.module, input)
        return nn.functional.linear(input, weight, bias)

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight as W (d_out, d_in) of tokens or patches; of grouped convolutions (groups, d_out, d_in)."""
        if not isinstance(self.module, _CONVOLUTIONS):
            return weight
        groups = self.module.groups
        return weight.flatten(1) if groups == 1 else weight.reshape(groups, len(weight) // groups, -1)

    def rows(self, grad: torch.Tensor) -> torch.Tensor:
        """Gradients at the output as (m, d_out), one row a token or position, sample after sample."""
        if isinstance(self.module, _CONVOLUTIONS):  # Channels stay apart in memory, which is how they are multiplied.
            channels = grad.movedim(-1 - len(self.module.kernel_size), 0)
            return channels.reshape(len(channels), -1).T
        return grad.reshape(-1, grad.shape[-1])


def of_module(name: str, module: nn.Module) -> list[Site]:
    """The sites of a module, none where it is of another kind or has a forward of its own."""
    if isinstance(module, nn.Linear):
        return [Site(name, module, "linear")]
    if isinstance(module, (*_CONVOLUTIONS, nn.Embedding)) and not own_forward(module):
        return [Site(name, module, "embedding" if isinstance(module, nn.Embedding) else "convolution")]
    if isinstance(module, nn.MultiheadAttention) and not own_forward(module):
        return [Site(f"{name}.{part}".lstrip("."), module, "linear", part) for part in ATTENTION]
    return []


def own_forward(module: nn.Module) -> bool:
    """Whether a module's forward is not that of the torch class that it comes from."""
    for kind in (nn.Linear, *_CONVOLUTIONS, nn.Embedding, nn.MultiheadAttention):
        if isinstance(module, kind):
            changed = type(module).forward is not kind.forward or "forward" in vars(module)
            if isinstance(module, _CONVOLUTIONS):
                changed |= type(module)._conv_forward is not kind._conv_forward  # pyright: ignore[reportAttributeAccessIssue]
            return changed
    return "forward" in vars(module)


Step = Callable[[Site, torch.Tensor, torch.Tensor, "torch.Tensor | None"], torch.Tensor]


def forwards(sites: Iterable[Site], step: Step) -> dict[nn.Module, Callable]:
    """By module, the forward that asks ``step`` for the output of each of these sites."""
    parts: dict[nn.Module, dict[str, Site]] = {}
    for site in sites:
        parts.setdefault(site.module, {})[site.part] = site
    return {module: _forward(module, found, step) for module, found in parts.items()}


def _forward(module: nn.Module, parts: dict[str, Site], step: Step) -> Callable:
    if isinstance(module, nn.MultiheadAttention):
        return _attention(module, parts, step)

    def forward(input: torch.Tensor) -> torch.Tensor:
        return step(parts[""], input, module.weight, getattr(module, "bias", None))  # pyright: ignore[reportArgumentType]

    return forward


def _attention(module: nn.MultiheadAttention, parts: dict[str, Site], step: Step) -> Callable:
    """torch's own function with identities for its projections, which leave every number as it is.

    The projections come before and after it: it multiplies by weights where nothing can be seen of it.
    """

    def project(part: str, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return step(parts[part], input, weight, bias) if part in parts else nn.functional.linear(input, weight, bias)

    def forward(
        query,
        key,
        value,
        key_padding_mask=None,
        need_weights=True,
        attn_mask=None,
        average_attn_weights=True,
        is_causal=False,
    ):
        inputs, biases = (query, key, value), (None, None, None)
        if module.in_proj_bias is not None:
            biases = module.in_proj_bias.chunk(3)
        q, k, v = (project(*each) for each in zip(ATTENTION, inputs, _in_projections(module), biases, strict=False))
        turned = module.batch_first and query.dim() == 3
        if turned:
            q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        same = torch.eye(module.embed_dim, dtype=q.dtype, device=q.device)
        out, weights = nn.functional.multi_head_attention_forward(
            *(q, k, v, module.embed_dim, module.num_heads, None, None, module.bias_k, module.bias_v),
            *(module.add_zero_attn, module.dropout, same, None),
            training=module.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            use_separate_proj_weight=True,
            q_proj_weight=same,
            k_proj_weight=same,
            v_proj_weight=same,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        if turned:
            out = out.transpose(0, 1)
        return project("out_proj", out, module.out_proj.weight, module.out_proj.bias), weights

    return forward


def _in_projections(module: nn.MultiheadAttention) -> tuple[torch.Tensor, ...]:
    if module.in_proj_weight is not None:
        return module.in_proj_weight.chunk(3)
    return module.q_proj_weight, module.k_proj_weight, module.v_proj_weight  # pyright: ignore[reportReturnType]
