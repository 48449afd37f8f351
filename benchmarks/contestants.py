"""The contestants of `benchmarks.gpu`: our runtimes, and torch as clip-as-service uses it.

Each computes embeddings of ready batches, and of texts and JPEG files as people have them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from io import BytesIO
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from clip_server.engine.engine import Engine, Item
from clip_server.runtimes import RUNTIMES, load_runtime
from clip_server.runtimes.loading import load_checkpoint, normalized
from clip_server.runtimes.protocol import Runtime

# Both sides' defaults.
MINIBATCH, WORKERS = 32, 4
PEER = "clip-as-service"


class Contestant(Protocol):
    """One runtime in one precision."""

    def encode_image(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]: ...

    def encode_text(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]: ...

    def encode(self, items: Sequence[Item]) -> NDArray[np.float32]:
        """All texts, or all JPEG files, to embeddings [N, D]."""
        ...

    def close(self) -> None: ...


class Ours:
    """A runtime of this project, with the engine that the server has around it."""

    def __init__(self, runtime: Runtime) -> None:
        self.encode_image = runtime.encode_image
        self.encode_text = runtime.encode_text
        self._loop = asyncio.new_event_loop()
        self._engine = Engine(runtime, minibatch_size=MINIBATCH, num_worker_preprocess=WORKERS)

    def encode(self, items: Sequence[Item]) -> NDArray[np.float32]:
        encoded = self._loop.run_until_complete(self._engine.encode(items))
        if encoded.errors:
            raise RuntimeError(f"the engine failed: {encoded.errors}")
        return encoded.embeddings

    def close(self) -> None:
        self._engine.close()
        self._loop.close()


class AsClipAsService:
    """torch as clip-as-service's executor uses it: every text with all its 77 positions, pictures
    decoded at full size, normalised in float32 on the CPU and copied from pageable memory."""

    def __init__(self, dtype: str, device: str, checkpoint: Path) -> None:
        import torch
        from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
        from open_clip.model import CLIP
        from open_clip.tokenizer import SimpleTokenizer
        from open_clip.transform import image_transform

        self._torch, self._device = torch, device
        card, tensors = load_checkpoint("", checkpoint)
        config = {
            key: card.config[key]
            for key in ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu")
            if key in card.config
        }
        model = CLIP(**config).eval()
        model.load_state_dict({k: torch.from_numpy(v) for k, v in tensors.items()}, strict=False)
        self._dtype = {"fp16": torch.float16, "fp32": torch.float32}[dtype]
        self._model: Any = model.to(device, self._dtype)
        self._image, self._context = card.image, card.text.context_length
        self._tokenize = SimpleTokenizer(context_length=self._context)
        self._transform: Any = image_transform(
            card.image.size, is_train=False, mean=OPENAI_DATASET_MEAN, std=OPENAI_DATASET_STD
        )
        self._pool = ThreadPool(WORKERS)

    def encode_image(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self._run(
            self._model.encode_image, self._torch.from_numpy(normalized(pixels, self._image))
        )

    def encode_text(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        padded = np.pad(tokens, ((0, 0), (0, self._context - tokens.shape[1])))
        return self._run(self._model.encode_text, self._torch.from_numpy(padded))

    def encode(self, items: Sequence[Item]) -> NDArray[np.float32]:
        batches = [items[first : first + MINIBATCH] for first in range(0, len(items), MINIBATCH)]
        texts = isinstance(items[0], str)
        run = self._model.encode_text if texts else self._model.encode_image
        prepared = self._pool.imap(self._tokenize if texts else self._decoded, batches)
        return np.concatenate([self._run(run, each) for each in prepared])

    def close(self) -> None:
        self._pool.terminate()

    def _decoded(self, files: Iterable[bytes]) -> Any:
        from PIL import Image

        return self._torch.stack([self._transform(Image.open(BytesIO(file))) for file in files])

    def _run(self, tower: Callable[[Any], Any], batch: Any) -> NDArray[np.float32]:
        with self._torch.inference_mode():
            on_device = batch.to(self._device)
            if on_device.is_floating_point():
                on_device = on_device.to(self._dtype)
            embeddings: NDArray[np.float32] = tower(on_device).float().cpu().numpy()
        return embeddings


def named(device: str) -> dict[str, Callable[[Path], Contestant]]:
    """Every contestant of a device, by name; each is made of a checkpoint's folder."""
    halves = not device.startswith("cpu")
    place = "CUDA" if halves else "CPU"
    pairs = [
        (spec.name, precision)
        for spec in RUNTIMES
        if place in spec.devices
        for precision in (spec.precisions if halves else ("fp32",))
        if precision != "int8"
    ]

    def ours(runtime: str, precision: str) -> Callable[[Path], Contestant]:
        return lambda checkpoint: Ours(
            load_runtime(runtime, "", model_path=checkpoint, device=device, precision=precision)
        )

    def peer(checkpoint: Path) -> Contestant:
        return AsClipAsService("fp16" if halves else "fp32", device, checkpoint)

    return {" ".join(pair): ours(*pair) for pair in pairs} | {PEER: peer}


def candidate(make: Callable[[Path], Runtime]) -> Callable[[Path], Contestant]:
    """One of `candidates`, as it would be as a runtime."""
    return lambda checkpoint: Ours(make(checkpoint))
