"""PyTorch, on the CPU, a CUDA GPU or an Apple GPU, through open_clip's own modules."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_server import runtimes
from clip_server.errors import ConfigurationError, WeightsError
from clip_server.install import IMPORT_ERRORS, import_failure
from clip_server.model_card import ImageSpec, ModelCard
from clip_server.models import converted, weights, zoo
from clip_server.models.converted import Tower
from clip_server.runtimes import memory
from clip_server.runtimes.loading import load_checkpoint
from clip_server.runtimes.protocol import OutOfMemoryError
from clip_server.runtimes.reloading import Reloadable
from clip_server.towers import registry
from clip_server.towers.tower import ImageTower, TextTower

try:
    import torch
    from open_clip.convert import convert_state_dict
    from open_clip.model import CustomTextCLIP, text_global_pool
    from torch import Tensor, nn
    from torch.overrides import TorchFunctionMode
except IMPORT_ERRORS as error:
    raise ConfigurationError(import_failure(error, "the torch runtime", "torch")) from error

# The keys of a configuration that describe the towers; the prefix of CoCa's caption decoder.
_TOWERS = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}
# The keys of the two towers, by their names in open_clip's models.
_CONFIGURATIONS = {"visual": "vision_cfg", "text": "text_cfg"}
# open_clip's prefix of a separate text tower, and those of what is not in it.
_TEXT = "text."
_NOT_TEXT = ("visual.", "logit_", _TEXT)
# The functions that initialise a parameter at random, and then clip and scale it.
_INITIALISERS = {
    *("uniform_", "normal_", "kaiming_uniform_", "kaiming_normal_"),
    *("erfinv_", "mul_", "add_", "clamp_"),
}
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class TorchRuntime:
    """CLIP's two towers as torch modules; see `Runtime` for the methods."""

    spec = runtimes.find("torch")
    name = spec.name
    overlaps = False

    def __init__(
        self,
        card: ModelCard,
        visual: Reloadable[nn.Module],
        textual: Reloadable[nn.Module],
        device: str,
        precision: str,
    ) -> None:
        self.card, self.device, self.precision = card, device, precision
        self.concurrent = device == "cpu"
        self.towers: dict[Tower, Reloadable[nn.Module]] = {"image": visual, "text": textual}

    @classmethod
    def load(
        cls,
        name: str,
        *,
        model_path: str | Path | None = None,
        device: str | None = None,
        precision: str | None = None,
        jit: bool = False,
        threads: int | None = None,
    ) -> TorchRuntime:
        """Loads a model and puts it on its device.

        name: a canonical name or an alias.
        model_path: a checkpoint as in `weights.find`, or a folder with `visual.pt`,
            `textual.pt` and `card.json`, of `python -m clip_server.convert`.
        device: as torch names it; by default a CUDA GPU, an Apple GPU or the CPU, whichever
            is there first.
        precision: of weights and arithmetic: `fp32` (the default), `bf16`, or on a GPU `fp16`.
            Towers in a folder have theirs.
        jit: trace both towers.
        threads: cores that one call may use; torch keeps this for the whole process.

        Raises:
            ConfigurationError: the device, the precision or the model is unavailable.
        """
        place = _device(device)
        if threads is not None:
            torch.set_num_threads(threads)
        if own := cls.spec.own_towers(name, model_path):
            precision = converted.check_precision(own.folder, precision)
            card = zoo.resolve(name, model_path)
            visual, textual = (
                Reloadable(load(), load, [file], _emptying_cache)
                for file in own.files.values()
                for load in [partial(_loaded, file, place)]
            )
            return cls(card, visual, textual, str(place), precision)
        precision = _precision(precision, place)
        card, tensors = load_checkpoint(name, model_path)
        if place.type == "cpu":
            memory.check(card.name, sum(file.stat().st_size for file in tensors.files))

        def load_towers(tensors: weights.Tensors) -> Sequence[nn.Module]:
            visual, textual = (tower.to(place) for tower in towers(card, tensors, precision))
            return _traced(card, visual, textual, place) if jit else (visual, textual)

        def load_again(index: int) -> nn.Module:
            return load_towers(load_checkpoint(name, model_path)[1])[index]

        visual, textual = (
            Reloadable(tower, partial(load_again, index), tensors.files, _emptying_cache)
            for index, tower in enumerate(load_towers(tensors))
        )
        return cls(card, visual, textual, str(place), precision)

    def encode_image(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """[B, 3, S, S] RGB pixels, 0..255, to [B, D] embeddings (not normalised)."""
        return self._encode("image", pixels)

    def encode_text(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """[B, L] token ids, L at most the context length, to [B, D] (not normalised)."""
        return self._encode("text", tokens)

    def _encode(self, tower: Tower, batch: NDArray[Any]) -> NDArray[np.float32]:
        with self.towers[tower].use() as module:
            return _run(module, batch, self.device)


def towers(
    card: ModelCard, tensors: weights.Tensors, precision: str = "fp32"
) -> tuple[nn.Module, nn.Module]:
    """The image and the text tower of a checkpoint, on the CPU.

    They take uint8 pixels [B, 3, S, S] and int32 tokens [B, L], and return embeddings [B, D].

    Raises:
        WeightsError, ConfigurationError: the checkpoint does not match the card, or open_clip
            cannot build it.
    """
    model = _model(card, tensors).to(_DTYPES[precision])
    return _ImageTower(model, card.image, _DTYPES[precision]), _text_tower(card, model)


def save_traced(tower: nn.Module, batch: NDArray[Any], path: Path) -> None:
    """Writes a tower on the CPU as TorchScript, for batches of any size.

    batch: pixels or tokens, for their shape.
    """
    with _no_warnings():
        save: Callable[..., None] = torch.jit.save
        save(_trace(tower, torch.from_numpy(batch)), path)


def open_tower(path: Path) -> Callable[[NDArray[Any]], NDArray[np.float32]]:
    """One tower by itself: TorchScript in a file, as pixels or tokens to embeddings [B, D]."""
    return partial(_run, _loaded(path, torch.device("cpu")))


@torch.inference_mode()
def _run(tower: nn.Module, batch: NDArray[Any], device: str = "cpu") -> NDArray[np.float32]:
    # torch warns of an array that it may not write to.
    writeable = torch.from_numpy(np.require(batch, requirements="W"))
    try:
        embeddings: Tensor = tower(writeable.to(device))
        return embeddings.float().cpu().numpy()
    except torch.cuda.OutOfMemoryError as error:
        raise OutOfMemoryError(str(error)) from None


def _loaded(path: Path, place: torch.device) -> nn.Module:
    """A tower in TorchScript.

    Raises:
        WeightsError: the file is damaged, or not TorchScript.
    """
    try:
        with _no_warnings():
            load: Callable[..., nn.Module] = torch.jit.load
            return load(path, map_location=place)
    except Exception as error:  # a damaged file may raise anything
        raise WeightsError(f"{path} is damaged, or not TorchScript: convert it again") from error


class _ImageTower(nn.Module):
    """uint8 pixels to embeddings; uint8 needs a quarter of the bytes on the way to the device."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: CustomTextCLIP, image: ImageSpec, dtype: torch.dtype) -> None:
        super().__init__()
        self.visual = model.visual
        self.dtype = dtype
        mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (image.mean, image.std))
        self.register_buffer("mean", 255 * mean)
        self.register_buffer("std", 255 * std)

    def forward(self, pixels: Tensor) -> Tensor:
        return _embeddings(self.visual(((pixels - self.mean) / self.std).to(self.dtype)))


class _TextTower(nn.Module):
    """A text tower of open_clip, for tokens trimmed as the card allows."""

    def __init__(self, model: CustomTextCLIP) -> None:
        super().__init__()
        self.text = model.text

    def forward(self, tokens: Tensor) -> Tensor:
        return _embeddings(self.text(tokens))


class _CausalTextTower(nn.Module):
    """CLIP's own text tower, which pools before the layers that work on each position alone."""

    attn_mask: Tensor

    def __init__(self, model: CustomTextCLIP) -> None:
        super().__init__()
        text = model.text
        self.token_embedding = text.token_embedding
        self.positional_embedding = text.positional_embedding
        self.transformer = text.transformer
        self.ln_final = text.ln_final
        self.text_projection = text.text_projection
        self.pool_type, self.end = text.pool_type, text.eos_id
        self.register_buffer("attn_mask", text.attn_mask)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        states = self.token_embedding(tokens) + self.positional_embedding[:length]
        states = self.transformer(states, attn_mask=self.attn_mask[:length, :length])
        # The end token has the largest id of the vocabulary, or one that is known.
        pooled = self.ln_final(text_global_pool(states, tokens, self.pool_type, self.end))
        embeddings: Tensor = pooled
        if isinstance(self.text_projection, nn.Module):
            embeddings = self.text_projection(pooled)
        elif self.text_projection is not None:
            embeddings = pooled @ self.text_projection
        return embeddings


def _embeddings(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The pooled output, of towers that also return their other tokens, as CoCa's do."""
    return output[0] if isinstance(output, tuple) else output


def _text_tower(card: ModelCard, model: CustomTextCLIP) -> nn.Module:
    return _CausalTextTower(model) if card.text.trim == "causal" else _TextTower(model)


def _model(card: ModelCard, tensors: weights.Tensors) -> CustomTextCLIP:
    """open_clip's two towers of a card with the checkpoint's weights, on the CPU.

    Every family is built as open_clip's CustomTextCLIP: CLIP with a separate text tower, and CoCa
    without its decoder. A family's `torch_module` replaces its tower.
    """
    model, own = _empty_model(card), _own_towers(card)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    state = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    for tower in own.values():
        shapes |= tower.shapes(card.dim)
    if "text" not in own:
        state = convert_state_dict(model, state)  # checkpoints in a model's original format
        state = {
            name if name.startswith(_NOT_TEXT) else _TEXT + name: value
            for name, value in state.items()
        }
    weights.check(state, shapes)
    for name, parameter in model.named_parameters():
        # Parameters that a checkpoint may lack are not needed by a tower.
        found = state[name] if name in state else torch.zeros_like(parameter)
        state[name] = found.reshape(parameter.shape)
    model.load_state_dict(state, strict=False, assign=True)
    for part, tower in own.items():
        module: Callable[..., nn.Module] = resolve_name(str(tower.torch_module))
        setattr(model, part, module(tower, state).eval())
    return model


def _own_towers(card: ModelCard) -> dict[str, ImageTower | TextTower]:
    """The towers that open_clip lacks, by their names in its CustomTextCLIP."""
    towers: dict[str, ImageTower | TextTower] = {
        "visual": registry.image_tower(card.config),
        "text": registry.text_tower(card.config),
    }
    return {part: tower for part, tower in towers.items() if tower.torch_module}


def _empty_model(card: ModelCard) -> CustomTextCLIP:
    """open_clip's two towers of a card, with uninitialised parameters."""
    config = {key: value for key, value in card.config.items() if key in _TOWERS}
    # Otherwise a Hugging Face tower would be downloaded with its own weights.
    config["text_cfg"] = config["text_cfg"] | {"hf_model_pretrained": False}
    own = _own_towers(card)
    replaced: dict[str, Any] = {_CONFIGURATIONS[part]: {} for part in own}
    try:
        with _SkipParameterInit():
            model = CustomTextCLIP(**config | replaced).eval()
    except Exception as error:  # of open_clip, timm or transformers
        raise ConfigurationError(f"open_clip cannot build {card.name}: {error}") from error
    for part in own:
        setattr(model, part, nn.Identity())
    return model


class _SkipParameterInit(TorchFunctionMode):
    """Leaves the parameters of new modules uninitialised: random values take seconds, and a
    checkpoint replaces them. Buffers, which checkpoints may lack, are computed."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        target = next(iter((*args, *kwargs.values())), None)
        if func.__name__ in _INITIALISERS and isinstance(target, nn.Parameter):
            return target
        return func(*args, **kwargs)


def _traced(
    card: ModelCard, visual: nn.Module, textual: nn.Module, place: torch.device
) -> tuple[nn.Module, nn.Module]:
    size, context = card.image.size, card.text.context_length
    pixels = torch.zeros((2, 3, size, size), dtype=torch.uint8, device=place)
    tokens = torch.zeros((2, context), dtype=torch.int32, device=place)
    return _trace(visual, pixels), _trace(textual, tokens)


def _trace(tower: nn.Module, batch: Tensor) -> nn.Module:
    with torch.inference_mode(), _no_warnings():
        trace: Callable[..., nn.Module] = torch.jit.trace
        return trace(tower.eval(), batch)


@contextmanager
def _emptying_cache() -> Iterator[None]:
    """Returns the GPU memory that is freed meanwhile, which torch would keep for later tensors."""
    yield
    torch.cuda.empty_cache()


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Silences TorchScript's warnings: about its deprecation, and about lengths that it handles."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _device(wanted: str | None) -> torch.device:
    """The device to use, with its index where there may be several.

    Raises:
        ConfigurationError: torch does not know the device, or this machine lacks it.
    """
    try:
        device = torch.device(wanted or _best_device())
    except RuntimeError:
        raise ConfigurationError(f"device {wanted!r} is not cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if count <= (device.index or 0):
            raise ConfigurationError(
                f"device {wanted!r} cannot be used: torch {torch.__version__} sees {count} GPUs; "
                "check the driver, and that this torch was built for CUDA"
            )
        return torch.device("cuda", device.index or 0)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigurationError(f"device {wanted!r} cannot be used: no Apple GPU was found")
    return device


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _precision(wanted: str | None, place: torch.device) -> str:
    precision = TorchRuntime.spec.check_precision(wanted)
    if precision == "fp16" and place.type == "cpu":
        # CPUs convert every fp16 product to fp32 and back: slower, and less exact.
        raise ConfigurationError("dtype 'fp16' needs a GPU: on a CPU use fp32 or bf16")
    return precision
