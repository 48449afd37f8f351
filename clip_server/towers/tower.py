"""The interface of a family of towers: everything that differs between families is behind it.

A family is a subclass of `ImageTower` or `TextTower` in a file of its own, and an entry in
`registry`. Neither these files nor what they import needs the onnx package: reading a model's
configuration must work where only torch is installed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from clip_server.model_card import ImageSpec, ResizeMode, Trim, Vocabulary

if TYPE_CHECKING:
    from clip_server.towers.builder import GraphBuilder

# Names and shapes of the tensors in a checkpoint.
Shapes = dict[str, tuple[int, ...]]
# A model's configuration in open_clip's JSON form.
Config = Mapping[str, Any]
# Graphs for onnxruntime have operators on uint8 and, on CPUs, shapes that depend on the texts: this
# saves the work of padding. On a GPU, waiting for these shapes takes longer than the padding.
# TensorRT supports neither.
Target = Literal["onnxruntime", "onnxruntime-cuda", "tensorrt"]
# Of an MLP: the exact GELU, OpenAI's approximation by a sigmoid, and that by a hyperbolic tangent.
Activation = Literal["gelu", "quick_gelu", "gelu_tanh"]
# Keys of `text_cfg` that describe the tokenizer, not the tower.
TOKENIZER_KEYS = frozenset({"hf_tokenizer_name", "tokenizer_kwargs"})
# torch's default in layer norm and batch norm.
EPSILON = 1e-5


@dataclass(frozen=True)
class SavedByTransformers:
    """The format in which Hugging Face's transformers library saves a tower.

    model_types: the `model_type` of each `config.json` that describes this family.
    defaults: values that the configuration of a tower may omit.
    prefixes: prefixes of tensor names, each with ours. The longest match is replaced.
    parts: parts of tensor names that are then replaced, each with ours.
    transposed: tensors stored as [outputs, inputs], each with the name of ours [inputs, outputs].
    """

    model_types: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    prefixes: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, str] = field(default_factory=dict)
    transposed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TextSavedByTransformers(SavedByTransformers):
    """As `SavedByTransformers`, with the defaults for the rest of the model.

    vocabulary: the tokenizer's, unless a file in the folder overrides it; None if that has to.
    resize: of images, likewise.
    """

    vocabulary: Vocabulary | None = "clip"
    resize: ResizeMode = "shortest"


class Tower(ABC):
    """One tower of a model: its dimensions, and everything derived from them.

    keys: of `vision_cfg` or `text_cfg` that the family reads. Where no family accepts a
        configuration, the error names the keys that none of them reads.
    saved: how transformers saves the tower; None if it does not.
    torch_module: import path (`package.module:Class`) of the tower in torch, made from the tower
        and its tensors; None if open_clip has it. An image tower gets normalised pixels.
    unused: prefixes of tensors that checkpoints may hold and the tower does not need.
    """

    keys: ClassVar[frozenset[str]]
    saved: ClassVar[SavedByTransformers | None] = None
    torch_module: ClassVar[str | None] = None
    unused: ClassVar[tuple[str, ...]] = ()

    @classmethod
    @abstractmethod
    def from_config(cls, config: Config) -> Tower | None:
        """The tower that a configuration describes; None if it is of another family.

        Raises:
            ConfigurationError: it is of this family, and invalid.
        """

    @classmethod
    def from_transformers(cls, saved: Mapping[str, Any]) -> dict[str, Any]:
        """A tower's configuration as transformers saves it, in open_clip's form.

        saved: with `defaults` filled in.
        Returns `vision_cfg` or `text_cfg`, and `quick_gelu` where the family has that choice.

        Raises:
            ConfigurationError: it needs a feature that the family lacks.
        """
        raise NotImplementedError(f"transformers does not save {cls.__name__}")

    @abstractmethod
    def shapes(self, dim: int) -> Shapes:
        """The name and shape of every tensor in a checkpoint; embeddings have `dim`.

        Raises:
            ConfigurationError: only torch can build the tower.
        """


class ImageTower(Tower):
    """An image tower. Its tensors' names begin with `visual.`."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: Config) -> ImageTower | None:
        """The tower that a configuration describes, as in `Tower`."""

    def macs(self, dim: int) -> int | None:
        """Multiply-accumulates of one image; None if they are not counted."""
        del dim
        return None

    @abstractmethod
    def build(self, graph: GraphBuilder, image: ImageSpec, target: Target) -> str:
        """Adds the nodes from `pixels`, uint8 [B, 3, S, S], to embeddings [B, D].

        image: how pixels are normalised.
        Returns the name of the embeddings.
        """


class Trunk(NamedTuple):
    """One of timm's models, and how open_clip ends it.

    name: empty if the configuration says more than a `TimmTower` reads.
    ending: how states are pooled and projected, as the configuration has it.
    """

    name: str
    ending: tuple[Any, Any]
    has_projection_bias: bool


class TimmTower(ImageTower):
    """An image tower whose trunk is one of timm's models."""

    # Dropout is for training alone.
    keys = frozenset(
        {
            "image_size",
            "timm_model_name",
            "timm_model_pretrained",
            "timm_pool",
            "timm_proj",
            "timm_proj_bias",
            "timm_drop",
            "timm_drop_path",
        }
    )

    @classmethod
    def trunk(cls, config: Config) -> Trunk:
        """The trunk that a configuration names."""
        vision = config["vision_cfg"]
        return Trunk(
            name=vision.get("timm_model_name", "") if vision.keys() <= cls.keys else "",
            ending=(vision.get("timm_pool"), vision.get("timm_proj")),
            has_projection_bias=bool(vision.get("timm_proj_bias", False)),
        )


class TextTower(Tower):
    """A text tower.

    trim: how a batch of texts may be trimmed.
    pad_id: the padding token; None if any will do, so that the tokenizer's is used.
    max_length: the number of tokens that the tower has positions for.
    hub: the repository whose `config.json` torch needs to build the tower, if any.
    """

    saved: ClassVar[TextSavedByTransformers | None] = None
    trim: Trim
    pad_id: int | None
    hub: str | None = None

    @property
    @abstractmethod
    def max_length(self) -> int:
        """The most tokens of a text that the tower has positions for."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: Config) -> TextTower | None:
        """The tower that a configuration describes, as in `Tower`."""

    def macs(self, dim: int, length: int) -> int | None:
        """Multiply-accumulates of one text of `length` tokens; None if they are not counted."""
        del dim, length
        return None

    @abstractmethod
    def build(self, graph: GraphBuilder, target: Target) -> str:
        """Adds the nodes from `tokens`, int32 [B, L], to embeddings [B, D].

        Returns the name of the embeddings.
        """


def transformer_macs(width: int, mlp_width: int, layers: int, length: int) -> int:
    """Multiply-accumulates of the blocks of a transformer, for `length` positions."""
    return layers * length * (4 * width**2 + 2 * width * mlp_width + 2 * length * width)


def norm_shapes(name: str, width: int) -> Shapes:
    """The tensors of a torch LayerNorm."""
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def linear_shapes(name: str, inputs: int, outputs: int) -> Shapes:
    """The tensors of a torch Linear."""
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
