"""The transformer blocks of CLIP's and timm's towers: layer norm first, then add."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from clip_server.errors import ConfigurationError
from clip_server.towers.attention import Attention
from clip_server.towers.layout import Layout
from clip_server.towers.tower import (
    EPSILON,
    Activation,
    Config,
    Shapes,
    linear_shapes,
    norm_shapes,
    transformer_macs,
)

if TYPE_CHECKING:
    from clip_server.towers.builder import GraphBuilder

# The names of a block's parts in transformers, with ours.
TRANSFORMERS_PARTS = {
    ".self_attn.": ".attn.",
    ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
}
# A quotient of two widths times the divisor may be a little less than the dividend.
_INEXACT = 1e-6
# The approximation of GELU by a hyperbolic tangent: open_clip's option, and transformers' names.
_TANH = {"approximate": "tanh"}
_TANH_NAMES = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")


@dataclass(frozen=True)
class BlockNames:
    """The names of a block's tensors. blocks: of the list of them. Projections to query, key and
    value end in `weight` and `bias`."""

    blocks: str
    norm_1: str
    qkv: str
    attended: str
    norm_2: str
    mlp: tuple[str, str]


OPEN_CLIP = BlockNames(
    "transformer.resblocks",
    norm_1="ln_1",
    qkv="attn.in_proj_",
    attended="attn.out_proj",
    norm_2="ln_2",
    mlp=("mlp.c_fc", "mlp.c_proj"),
)
TIMM = BlockNames(
    "blocks",
    norm_1="norm1",
    qkv="attn.qkv.",
    attended="attn.proj",
    norm_2="norm2",
    mlp=("mlp.fc1", "mlp.fc2"),
)


@dataclass(frozen=True)
class Transformer:
    """The blocks of a tower. prefix: of the tower's tensors in a checkpoint."""

    prefix: str
    width: int
    layers: int
    heads: int
    mlp_ratio: float
    activation: Activation = "gelu"
    epsilon: float = EPSILON
    names: BlockNames = OPEN_CLIP

    @property
    def mlp_width(self) -> int:
        """The width of the hidden layer in a block."""
        return int(self.width * self.mlp_ratio + _INEXACT)

    def shapes(self) -> Shapes:
        """The name and shape of every tensor of the blocks."""
        width, names = self.width, self.names
        one: Shapes = {
            **norm_shapes(names.norm_1, width),
            f"{names.qkv}weight": (3 * width, width),
            f"{names.qkv}bias": (3 * width,),
            **linear_shapes(names.attended, width, width),
            **norm_shapes(names.norm_2, width),
            **self.mlp_shapes(),
        }
        return {
            self._block(index) + name: shape
            for index in range(self.layers)
            for name, shape in one.items()
        }

    def mlp_shapes(self) -> Shapes:
        """The name and shape of every tensor of a block's MLP, without the block's prefix."""
        width, hidden, (first, second) = self.width, self.mlp_width, self.names.mlp
        return linear_shapes(first, width, hidden) | linear_shapes(second, hidden, width)

    def macs(self, length: int) -> int:
        """Multiply-accumulates for `length` positions."""
        return transformer_macs(self.width, self.mlp_width, self.layers, length)

    def build(
        self,
        graph: GraphBuilder,
        states: str,
        layout: Layout,
        *,
        mask: str | None = None,
        pooled_mask: str | None = None,
    ) -> str:
        """All blocks: states [N, W] to those of the pooled positions, [B, W].

        The last block computes its query and its MLP for the pooled positions alone. Where the
        layout has none, it computes all, [N, W].

        mask: added to the attention scores, [L, L]; pooled_mask: to those of the pooled
            positions, [B, 1, 1, L].
        """
        for index in range(self.layers - 1):
            states = self._build_block(graph, index, states, replace(layout, pool=None), mask)
        last_mask = mask if layout.pool is None else pooled_mask
        return self._build_block(graph, self.layers - 1, states, layout, last_mask)

    def build_mlp(self, graph: GraphBuilder, states: str, prefix: str) -> str:
        """The MLP of the block whose tensors begin with `prefix`: states [N, W] to the same."""
        return mlp(graph, states, prefix, self.names.mlp, self.activation)

    def _block(self, index: int) -> str:
        return f"{self.prefix}{self.names.blocks}.{index}."

    def _build_block(
        self, graph: GraphBuilder, index: int, states: str, layout: Layout, mask: str | None
    ) -> str:
        """One block: states [N, W] to the same, or only to the pooled ones, [B, W]."""
        prefix, names = self._block(index), self.names
        normed = graph.layer_norm(states, prefix + names.norm_1, self.epsilon)
        weight = graph.weight(f"{prefix}{names.qkv}weight")
        bias = graph.weight(f"{prefix}{names.qkv}bias")
        attention = Attention(graph, f"{prefix}attn", self.heads, weight, bias)
        if layout.pool is not None:
            pooled = layout.pool(normed)
            query, key, value = attention.project_pooled(pooled, normed, layout)
            attended = attention.attend(query, key, value, mask)
            states = layout.pool(states)
        else:
            query, key, value = attention.project_all(normed, layout)
            attended = layout.gather(attention.attend(query, key, value, mask))
        attended = graph.stored_linear(attended, prefix + names.attended)
        states = graph.op("Add", states, attended, name=f"{prefix}attended")
        hidden = graph.layer_norm(states, prefix + names.norm_2, self.epsilon)
        hidden = self.build_mlp(graph, hidden, prefix)
        return graph.op("Add", states, hidden, name=f"{prefix}states")


def mlp(
    graph: GraphBuilder, states: str, prefix: str, names: tuple[str, str], activation: Activation
) -> str:
    """Two torch Linear layers of the checkpoint, with an activation between them."""
    hidden = graph.stored_linear(states, prefix + names[0])
    hidden = graph.activation(activation, hidden, f"{prefix}mlp.gelu")
    return graph.stored_linear(hidden, prefix + names[1])


def clip_activation(config: Config, part: Mapping[str, Any]) -> Activation | None:
    """The activation of one of CLIP's own towers; None if it is unknown.

    part: `vision_cfg` or `text_cfg`.
    """
    quick, options = config.get("quick_gelu", False), part.get("act_kwargs") or {}
    if not options:
        return "quick_gelu" if quick else "gelu"
    return "gelu_tanh" if options == _TANH and not quick else None


def norm_epsilon(part: Mapping[str, Any]) -> float | None:
    """The epsilon of a tower's layer norms; None if they have other options."""
    options = part.get("norm_kwargs") or {}
    epsilon: float = options.get("eps", EPSILON)
    return epsilon if options.keys() <= {"eps"} else None


def has_quick_gelu(saved: Mapping[str, Any]) -> bool:
    """Whether a tower that transformers saved has QuickGELU.

    Raises:
        ConfigurationError: its activation is neither that nor a GELU.
    """
    activation = saved["hidden_act"]
    if activation not in ("quick_gelu", "gelu", *_TANH_NAMES):
        raise ConfigurationError(
            f"hidden_act {activation!r} is not supported: quick_gelu, gelu or one of "
            f"{', '.join(_TANH_NAMES)}"
        )
    return bool(activation == "quick_gelu")


def saved_options(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The options of activations and layer norms that transformers saved, as in `text_cfg`."""
    options = {}
    if saved["hidden_act"] in _TANH_NAMES:
        options["act_kwargs"] = _TANH
    if saved["layer_norm_eps"] != EPSILON:
        options["norm_kwargs"] = {"eps": saved["layer_norm_eps"]}
    return options
