"""timm's FastViT, the image tower of most MobileCLIPs: convolutions in each channel and MLPs over
the channels, in the last stages attention.

Its convolutions are trained as sums of parallel branches, each with a batch norm. In the graph each
sum is one convolution.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from clip_server.model_card import ImageSpec
from clip_server.towers.attention import Attention
from clip_server.towers.convolution import (
    Convolution,
    batch_norm,
    batch_norm_shapes,
    convolution_shapes,
    to_channels,
    to_rows,
)
from clip_server.towers.layout import of_all_positions
from clip_server.towers.pixels import normalised
from clip_server.towers.tower import (
    Config,
    Shapes,
    Target,
    TimmTower,
    linear_shapes,
    norm_shapes,
)

if TYPE_CHECKING:
    from clip_server.towers.builder import GraphBuilder

_PREFIX = "visual.trunk."
_FINAL, _HEAD = f"{_PREFIX}final_conv.", f"{_PREFIX}head.fc"
_HEAD_WIDTH = 32
# Sides of kernels. Large ones are before an MLP, where a stage begins, and for positions.
_SMALL, _LARGE = 3, 7
# The first stage with gates, and the first with attention.
_FIRST_GATED, _FIRST_ATTENDING = 2, 3
# How many times narrower a gate is inside: where a stage begins, and in the last convolution.
_GATE, _FINAL_GATE = 4, 16
# Sides of the kernels of branches, by name.
_POINTWISE = {"conv_kxk.0": 1}
_PLAIN = {"conv_kxk.0": _SMALL}
_SCALED = _PLAIN | {"conv_scale": 1}
_HALVING = {"large_conv": _LARGE, "small_conv": _SMALL}


class Size(NamedTuple):
    """The dimensions of a tower.

    widths, blocks: channels and blocks of each stage.
    mlp_ratio: how many times wider an MLP is inside.
    late: whether it came with MobileCLIP 2: such towers have layer norm before attention, no gates
        in their stages and fewer branches in their stem.
    """

    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    mlp_ratio: int = 3
    late: bool = False


# By timm's names.
SIZES = {
    "fastvit_mci0": Size((64, 128, 256, 512), (2, 6, 10, 2)),
    "fastvit_mci1": Size((64, 128, 256, 512), (4, 12, 20, 4)),
    "fastvit_mci2": Size((80, 160, 320, 640), (4, 12, 24, 4)),
    "fastvit_mci3": Size((96, 192, 384, 768, 1536), (2, 12, 24, 4, 2), 4, late=True),
    "fastvit_mci4": Size((128, 256, 512, 1024, 2048), (2, 12, 24, 4, 4), 4, late=True),
}


@dataclass(frozen=True)
class Branches:
    """A convolution that was trained as a sum of parallel ones, each with a batch norm.

    prefix: of its tensors. inputs, outputs: channels.
    sides: of the branches' kernels, by name; the largest is the side of the sum.
    depthwise: whether each output depends on one input channel.
    skips: whether the input, through a batch norm, is one more branch.
    gate: channels inside the gate that follows (squeeze and excitation); 0: there is none.
    """

    prefix: str
    inputs: int
    outputs: int
    sides: Mapping[str, int]
    depthwise: bool = True
    skips: bool = False
    stride: int = 1
    gate: int = 0

    @property
    def _groups(self) -> int:
        return self.inputs if self.depthwise else 1

    def shapes(self) -> Shapes:
        """The name and shape of every tensor."""
        shapes: Shapes = {}
        for name, side in self.sides.items():
            kernel = (self.outputs, self.inputs // self._groups, side, side)
            shapes[f"{self.prefix}{name}.conv.weight"] = kernel
            shapes |= batch_norm_shapes(f"{self.prefix}{name}.bn", self.outputs)
        if self.skips:
            shapes |= batch_norm_shapes(f"{self.prefix}identity", self.inputs)
        if self.gate:
            shapes |= convolution_shapes(f"{self.prefix}se.fc1", self.outputs, self.gate, 1)
            shapes |= convolution_shapes(f"{self.prefix}se.fc2", self.gate, self.outputs, 1)
        return shapes

    def macs(self, grid: int) -> int:
        """Multiply-accumulates for outputs of G positions a side."""
        products = grid**2 * self.inputs // self._groups * max(self.sides.values()) ** 2
        return self.outputs * (products + 2 * self.gate)

    def folded(self, graph: GraphBuilder) -> Convolution:
        """The sum of the branches."""
        names = [f"{self.prefix}{name}" for name in self.sides]
        branches = [Convolution.stored(graph, f"{name}.conv", f"{name}.bn") for name in names]
        if self.skips:
            identity = Convolution.identity(self.inputs, depthwise=self.depthwise)
            branches.append(identity.scaled(*batch_norm(graph, f"{self.prefix}identity")))
        return reduce(operator.add, branches)

    def build(self, graph: GraphBuilder, states: str) -> str:
        """The sum alone: states [B, I, S, S] to [B, O, S / stride, S / stride]."""
        name, options = f"{self.prefix}folded", {"stride": self.stride, "groups": self._groups}
        return self.folded(graph).build(graph, states, name, **options)

    def activated(self, graph: GraphBuilder, states: str) -> str:
        """As `build`, followed by the gate, if there is one, and a GELU."""
        states = self.build(graph, states)
        if self.gate:
            states = self._gated(graph, states)
        return graph.gelu(states, f"{self.prefix}gelu")

    def _gated(self, graph: GraphBuilder, states: str) -> str:
        """Multiplies every channel by a number that depends on the means of all."""
        prefix = f"{self.prefix}se."
        gate = graph.op("ReduceMean", states, graph.integers(2, 3), name=f"{prefix}means")
        gate = graph.stored_convolution(gate, f"{prefix}fc1")
        gate = graph.op("Relu", gate, name=f"{prefix}relu")
        gate = graph.stored_convolution(gate, f"{prefix}fc2")
        gate = graph.op("Sigmoid", gate, name=f"{prefix}gate")
        return graph.op("Mul", states, gate, name=f"{prefix}gated")


@dataclass(frozen=True)
class Stage:
    """One stage. index: its number. inputs: channels before it. grid: positions of an image's side.
    hidden: channels inside an MLP. late: as in `Size`."""

    index: int
    inputs: int
    width: int
    blocks: int
    grid: int
    hidden: int
    late: bool

    @property
    def _prefix(self) -> str:
        return f"{_PREFIX}stages.{self.index}."

    @property
    def _attends(self) -> bool:
        return self.index >= _FIRST_ATTENDING

    @property
    def _positions(self) -> str:
        """The name of the convolution that tells positions apart, in stages with attention."""
        return f"{self._prefix}pos_emb.pos_enc"

    def _prefixes(self) -> list[str]:
        """Of the tensors of each block."""
        return [f"{self._prefix}blocks.{block}." for block in range(self.blocks)]

    def _opening(self) -> tuple[Branches, ...]:
        """The convolutions that halve the side; the first stage has none."""
        if not self.index:
            return ()
        prefix, width = f"{self._prefix}downsample.proj.", self.width
        gate = 0 if self.late or self.index < _FIRST_GATED else width // _GATE
        return (
            Branches(f"{prefix}0.", self.inputs, width, _HALVING, stride=2, gate=gate),
            Branches(f"{prefix}1.", width, width, _POINTWISE, depthwise=False, skips=True),
        )

    def _before_mlp(self, prefix: str) -> Branches:
        return Branches(f"{prefix}mlp.", self.width, self.width, {"conv": _LARGE})

    def _mixers(self, prefix: str) -> tuple[Branches, Branches]:
        """The convolution that mixes positions, and what is subtracted from it."""
        mixer, norm, width = f"{prefix}token_mixer.mixer.", f"{prefix}token_mixer.norm.", self.width
        return (
            Branches(mixer, width, width, _SCALED, skips=True),
            Branches(norm, width, width, {}, skips=True),
        )

    def shapes(self) -> Shapes:
        """The name and shape of every tensor."""
        shapes: Shapes = {}
        for each in self._opening():
            shapes |= each.shapes()
        if self._attends:
            shapes |= convolution_shapes(self._positions, 1, self.width, _LARGE)
        for prefix in self._prefixes():
            mixing = self._attention_shapes if self._attends else self._mixer_shapes
            shapes |= mixing(prefix)
            shapes |= self._before_mlp(prefix).shapes()
            shapes |= convolution_shapes(f"{prefix}mlp.fc1", self.width, self.hidden, 1)
            shapes |= convolution_shapes(f"{prefix}mlp.fc2", self.hidden, self.width, 1)
        return shapes

    def _mixer_shapes(self, prefix: str) -> Shapes:
        scales = [f"{prefix}token_mixer.layer_scale", f"{prefix}layer_scale"]
        mixer, norm = self._mixers(prefix)
        return mixer.shapes() | norm.shapes() | _scale_shapes(scales, self.width)

    def _attention_shapes(self, prefix: str) -> Shapes:
        width, norm = self.width, norm_shapes if self.late else batch_norm_shapes
        return {
            **norm(f"{prefix}norm", width),
            f"{prefix}token_mixer.qkv.weight": (3 * width, width),
            **linear_shapes(f"{prefix}token_mixer.proj", width, width),
            **_scale_shapes([f"{prefix}layer_scale_{index}" for index in (1, 2)], width),
        }

    def macs(self) -> int:
        """Multiply-accumulates of one image."""
        length, width = self.grid**2, self.width
        mixing = 2 * width * (2 * width + length) if self._attends else width * _SMALL**2
        block = mixing + width * (_LARGE**2 + 2 * self.hidden)
        positions = width * _LARGE**2 if self._attends else 0
        opening = sum(each.macs(self.grid) for each in self._opening())
        return opening + length * (positions + self.blocks * block)

    def build(self, graph: GraphBuilder, states: str) -> str:
        """States of the stage before, [B, I, S, S], to [B, W, G, G]."""
        for each in self._opening():
            states = each.activated(graph, states)
        if self._attends:
            states = self._placed(graph, states)
        for prefix in self._prefixes():
            mix = self._attended if self._attends else self._mixed
            states = self._through_mlp(graph, mix(graph, states, prefix), prefix)
        return states

    def _placed(self, graph: GraphBuilder, states: str) -> str:
        """States with what tells their positions apart."""
        added = Convolution.stored(graph, self._positions)
        folded = Convolution.identity(self.width) + added
        return folded.build(graph, states, self._positions, groups=self.width)

    def _mixed(self, graph: GraphBuilder, states: str, prefix: str) -> str:
        """States with their neighbours mixed in."""
        mixer, norm = (each.folded(graph) for each in self._mixers(prefix))
        scale = _scale(graph, f"{prefix}token_mixer.layer_scale").astype(np.float64)
        folded = Convolution.identity(self.width) + mixer.scaled(scale) + norm.scaled(-scale)
        return folded.build(graph, states, f"{prefix}token_mixer", groups=self.width)

    def _attended(self, graph: GraphBuilder, states: str, prefix: str) -> str:
        """States with what they attend to added."""
        name, width = f"{prefix}token_mixer.", self.width
        rows = to_rows(graph, states, width, name)
        weight, bias = graph.weight(f"{name}qkv.weight"), np.zeros(3 * width, np.float32)
        if self.late:
            rows = graph.layer_norm(rows, f"{prefix}norm")
        else:
            scale, shift = batch_norm(graph, f"{prefix}norm")
            bias = (weight @ shift).astype(np.float32)
            weight = (weight * scale).astype(np.float32)
        attention = Attention(graph, f"{name}attn", width // _HEAD_WIDTH, weight, bias)
        layout = of_all_positions(graph, self.grid**2)
        query, key, value = attention.project_all(rows, layout)
        rows = attention.attend(query, key, value, mask=None)
        rows = graph.stored_linear(rows, f"{name}proj", _scale(graph, f"{prefix}layer_scale_1"))
        hidden = to_channels(graph, rows, self.grid, width, name)
        return graph.op("Add", states, hidden, name=f"{prefix}attended")

    def _through_mlp(self, graph: GraphBuilder, states: str, prefix: str) -> str:
        """States with the output of the block's MLP added."""
        scale = _scale(graph, f"{prefix}layer_scale{'_2' if self._attends else ''}")
        hidden = self._before_mlp(prefix).build(graph, states)
        hidden = graph.pointwise_mlp(hidden, (f"{prefix}mlp.fc1", f"{prefix}mlp.fc2"), scale)
        return graph.op("Add", states, hidden, name=f"{prefix}states")


@dataclass(frozen=True)
class FastVit(TimmTower):
    """grid: positions of an image's side in the first stage."""

    size: Size
    grid: int

    @classmethod
    def from_config(cls, config: Config) -> FastVit | None:
        trunk = cls.trunk(config)
        size = SIZES.get(trunk.name)
        if size is None or trunk.ending != ("avg", None):
            return None
        return cls(size, _halved(config["vision_cfg"]["image_size"], 2))

    def _stem(self) -> tuple[Branches, ...]:
        width = self.size.widths[0]
        sides = _PLAIN if self.size.late else _SCALED
        return (
            Branches(f"{_PREFIX}stem.0.", 3, width, sides, depthwise=False, stride=2),
            Branches(f"{_PREFIX}stem.1.", width, width, sides, stride=2),
            Branches(f"{_PREFIX}stem.2.", width, width, _POINTWISE, depthwise=False, skips=True),
        )

    def _stages(self) -> Iterator[Stage]:
        widths, blocks, ratio, late = self.size
        for index, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            inputs, grid = widths[max(index - 1, 0)], _halved(self.grid, index)
            yield Stage(index, inputs, width, count, grid, ratio * width, late)

    @property
    def _final(self) -> Branches:
        width = self.size.widths[-1]
        gate = 2 * width // _FINAL_GATE
        return Branches(_FINAL, width, 2 * width, _SCALED, gate=gate)

    def shapes(self, dim: int) -> Shapes:
        shapes = linear_shapes(_HEAD, self._final.outputs, dim)
        parts: list[Branches | Stage] = [*self._stem(), *self._stages(), self._final]
        for part in parts:
            shapes |= part.shapes()
        return shapes

    def macs(self, dim: int) -> int:
        first, *others = self._stem()
        stem = first.macs(2 * self.grid) + sum(each.macs(self.grid) for each in others)
        last = self._final.macs(_halved(self.grid, len(self.size.widths) - 1))
        return stem + sum(each.macs() for each in self._stages()) + last + self._final.outputs * dim

    def build(self, graph: GraphBuilder, image: ImageSpec, target: Target) -> str:
        del target  # the same graph for all
        states = normalised(graph, image)
        for each in self._stem():
            states = each.activated(graph, states)
        for stage in self._stages():
            states = stage.build(graph, states)
        states = self._final.activated(graph, states)
        axes = graph.integers(2, 3)
        pooled = graph.op("ReduceMean", states, axes, name=f"{_HEAD}.pooled", keepdims=0)
        return graph.stored_linear(pooled, _HEAD)


def _halved(side: int, times: int) -> int:
    """The side after convolutions with a stride of 2."""
    return math.ceil(side / (1 << times))


def _scale_shapes(names: Sequence[str], width: int) -> Shapes:
    return {f"{name}.gamma": (width, 1, 1) for name in names}


def _scale(graph: GraphBuilder, name: str) -> NDArray[np.float32]:
    """The scale of each channel, [C], by which a block's addition is multiplied."""
    return graph.weight(f"{name}.gamma").reshape(-1)
