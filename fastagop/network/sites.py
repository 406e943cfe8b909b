"""Where a model multiplies by weights: Linear layers, convolutions, attention's projections; and embeddings.

A site is one such place. While ``forwards`` stand in for those of the modules, every site asks a step for its output,
which may compute it as the module does (``Site.compute``) and look at what passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from fastagop.kernels import checks

Kind = Literal["linear", "convolution", "embedding"]
KINDS: tuple[Kind, ...] = ("linear", "convolution", "embedding")
MATRICES: tuple[Kind, ...] = ("linear", "convolution")  # those that have a matrix W which multiplies their input
ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


def _weight_and_bias(module: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    return module.weight, getattr(module, "bias", None)


def _linear(module: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return nn.functional.linear(input, weight, bias)


def _as_it_is(module: Any, weight: torch.Tensor) -> torch.Tensor:
    return weight


def _last_axis(module: Any, grad: torch.Tensor) -> torch.Tensor:
    return grad.reshape(-1, grad.shape[-1])


def _filters(module: Any, weight: torch.Tensor) -> torch.Tensor:
    groups = module.groups
    return weight.flatten(1) if groups == 1 else weight.reshape(groups, len(weight) // groups, -1)


def _positions(module: Any, grad: torch.Tensor) -> torch.Tensor:
    channels = grad.movedim(-1 - len(module.kernel_size), 0)  # They stay apart in memory, which is how they multiply.
    return channels.reshape(len(channels), -1).T


@dataclass(frozen=True)
class LayerKind:
    """How modules of a class multiply by weights: an entry of ``LAYERS``. Defaults are those of rows times W^T + bias.

    Attributes:
        kind: what their inputs are: "linear" for vectors along the last axis, which W multiplies; "convolution" for
            patches; "embedding" for indices.
        weights: module -> the weight and the bias with which its forward computes, asked at every call.
        compute: (module, input, weight, bias) -> what the module computes. Those of kind "linear" go by W itself.
        matrix: (module, weight) -> W (d_out, d_in) of tokens or patches; of groups (groups, d_out, d_in).
        rows: (module, gradients at the output) -> these as (m, d_out), a row for a token or position, by samples.
        methods: those of the class that must be its own for this to hold.
        parts: names of several sites in a module, each of kind "linear".
    """

    kind: Kind
    weights: Callable[[Any], tuple[torch.Tensor, torch.Tensor | None]] = _weight_and_bias
    compute: Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor] = _linear
    matrix: Callable[[Any, torch.Tensor], torch.Tensor] = _as_it_is
    rows: Callable[[Any, torch.Tensor], torch.Tensor] = _last_axis
    methods: tuple[str, ...] = ("forward",)
    parts: tuple[str, ...] = ("",)

    def __post_init__(self) -> None:
        checks.choice("kind", self.kind, KINDS)


_CONVOLUTION = LayerKind(
    "convolution",
    compute=lambda module, input, weight, bias: module._conv_forward(input, weight, bias),
    matrix=_filters,
    rows=_positions,
    methods=("forward", "_conv_forward"),
)
LAYERS: dict[type[nn.Module], LayerKind] = {  # A class that is not here may be described by one it derives from.
    nn.Linear: LayerKind("linear"),
    nn.Conv1d: _CONVOLUTION,
    nn.Conv2d: _CONVOLUTION,
    nn.Conv3d: _CONVOLUTION,
    nn.MultiheadAttention: LayerKind("linear", parts=ATTENTION),
    nn.Embedding: LayerKind(
        "embedding", compute=lambda module, input, weight, bias: nn.Embedding.forward(module, input)
    ),
}
# What multiplies by weights and cannot be measured, with the reason.
UNSERVED: dict[type[nn.Module], str] = {
    nn.modules.conv._ConvTransposeNd: "a transposed convolution has no patches of its input",
    nn.RNNBase: "a recurrent layer multiplies by its weights where nothing is seen of it",
    nn.RNNCellBase: "a recurrent layer multiplies by its weights where nothing is seen of it",
    nn.EmbeddingBag: "a bag adds up its vectors unseen",
    nn.Bilinear: "a bilinear form has no one input",
}


@dataclass(eq=False, frozen=True)
class Site:
    """One multiplication by weights, or one table of vectors, in a module; ``part`` of an attention layer."""

    name: str
    module: nn.Module
    layer: LayerKind
    part: str = ""

    @property
    def kind(self) -> Kind:
        """What its inputs are."""
        return self.layer.kind

    def compute(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """What the module computes there."""
        return self.layer.compute(self.module, input, weight, bias)

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight as W (d_out, d_in) of tokens or patches; of grouped convolutions (groups, d_out, d_in)."""
        return self.layer.matrix(self.module, weight)

    def rows(self, grad: torch.Tensor) -> torch.Tensor:
        """Gradients at the output as (m, d_out), one row a token or position, sample after sample."""
        return self.layer.rows(self.module, grad)


def plain_class(module: nn.Module) -> type[nn.Module] | None:
    """The class of ``LAYERS`` that a module is of or comes from, None for others."""
    return next((kind for kind in type(module).__mro__ if kind in LAYERS), None)


def of_module(name: str, module: nn.Module) -> list[Site]:
    """The sites of a module, none where it is of another kind or has a forward of its own (but for Linear layers)."""
    kind = plain_class(module)
    if kind is None or (own_forward(module) and (LAYERS[kind].kind != "linear" or LAYERS[kind].parts != ("",))):
        return []
    layer = LAYERS[kind]
    return [Site(f"{name}.{part}".strip(".") if part else name, module, layer, part) for part in layer.parts]


def own_forward(module: nn.Module) -> bool:
    """Whether a module's forward is not that of the class of ``LAYERS`` that it comes from."""
    kind = plain_class(module)
    if kind is None:
        return "forward" in vars(module)
    methods = LAYERS[kind].methods
    return "forward" in vars(module) or any(getattr(type(module), each) is not getattr(kind, each) for each in methods)


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
        return step(parts[""], input, *parts[""].layer.weights(module))

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
