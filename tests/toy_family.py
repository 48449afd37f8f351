"""Families as someone would add them: the mean of a text's tokens, and of an image's pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from clip_server.model_card import ImageSpec
from clip_server.towers.pixels import normalised
from clip_server.towers.tower import Config, ImageTower, Shapes, Target, TextTower

if TYPE_CHECKING:
    from clip_server.towers.builder import GraphBuilder

TABLE, PROJECTION, COLOUR = "words.weight", "words.projection", "visual.colour"


@dataclass(frozen=True)
class BagOfWords(TextTower):
    """`bag_of_words` in `text_cfg` is the width."""

    width: int
    vocabulary: int
    context: int

    keys = frozenset({"bag_of_words", "vocab_size", "context_length"})
    trim = "masked"
    pad_id = 0
    torch_module = "toy_family_torch:TorchBagOfWords"

    @property
    def max_length(self) -> int:
        return self.context

    @classmethod
    def from_config(cls, config: Config) -> BagOfWords | None:
        text = config["text_cfg"]
        if "bag_of_words" not in text:
            return None
        return cls(text["bag_of_words"], text["vocab_size"], text["context_length"])

    def shapes(self, dim: int) -> Shapes:
        return {TABLE: (self.vocabulary, self.width), PROJECTION: (self.width, dim)}

    def build(self, graph: GraphBuilder, target: Target) -> str:
        del target
        pad = graph.constant("pad_id", np.array(self.pad_id, dtype=np.int32))
        present = graph.op("Not", graph.op("Equal", "tokens", pad, name="padding"), name="present")
        present = graph.as_computed(graph.cast(present, np.float32, "present.float"))
        rows = graph.lookup(TABLE, graph.weight(TABLE), "tokens")
        row = graph.op("Unsqueeze", present, graph.integers(1), name="present.row")
        total = graph.op("MatMul", row, rows, name="total")
        total = graph.op("Reshape", total, graph.integers(-1, self.width), name="total.flat")
        count = graph.op("ReduceSum", present, graph.integers(1), name="count", keepdims=1)
        return graph.projection(graph.op("Div", total, count, name="mean"), PROJECTION)


@dataclass(frozen=True)
class MeanColour(ImageTower):
    """`mean_colour` in `vision_cfg` is true."""

    keys = frozenset({"mean_colour", "image_size"})

    @classmethod
    def from_config(cls, config: Config) -> MeanColour | None:
        return cls() if config["vision_cfg"].get("mean_colour") else None

    def shapes(self, dim: int) -> Shapes:
        return {COLOUR: (3, dim)}

    def build(self, graph: GraphBuilder, image: ImageSpec, target: Target) -> str:
        del target
        pixels, sides = normalised(graph, image), graph.integers(2, 3)
        mean = graph.op("ReduceMean", pixels, sides, name="mean", keepdims=0)
        return graph.projection(mean, COLOUR)
