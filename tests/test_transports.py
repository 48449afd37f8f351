"""Three transports, two runtimes, one answer: open_clip's."""

from __future__ import annotations

import asyncio
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import HAS_TORCH, SAMPLES, Server, needs_torch
from numpy.typing import NDArray

from clip_client import Client

TEXTS = ["a cat", "a slice of pizza", "Ein Haus am See", "火箭 🚀 &amp; more", "a " * 120]
# Between transports only the batches differ, and with them the last bits of float32 sums:
# the largest difference against a vector's length. Between runtimes the arithmetic does.
SAME = 1e-5
COSINE = 0.9999


def cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    products: NDArray[np.float32] = (a * b).sum(1)
    return products / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.fixture(scope="session", params=["onnx", pytest.param("torch", marks=needs_torch)])
def server(request: pytest.FixtureRequest) -> Server:
    chosen: Server = request.getfixturevalue(f"{request.param}_server")
    return chosen


@pytest.fixture(scope="session")
def reference(photos: list[bytes]) -> NDArray[np.float32]:
    """open_clip's own embeddings of TEXTS and the photos."""
    if not HAS_TORCH:
        pytest.skip("open_clip is not installed")
    import open_clip
    import torch
    from PIL import Image

    from clip_server.models import zoo
    from clip_server.preprocess.tokenizer import pad, tokenizer_for
    from clip_server.runtimes.loading import load_checkpoint

    card, tensors = load_checkpoint("embedded")
    model = open_clip.model.CLIP(**card.config).eval()
    model.load_state_dict(
        {k: torch.tensor(np.asarray(v, np.float32)) for k, v in tensors.items()}, strict=False
    )
    assert zoo.resolve("embedded") == card
    size = card.image.size
    transform = open_clip.image_transform(
        size, is_train=False, mean=card.image.mean, std=card.image.std
    )
    tokenizer = tokenizer_for(card.text)
    tokens = pad([tokenizer.encode(text) for text in TEXTS], card.text)
    tokens = np.pad(tokens, ((0, 0), (0, card.text.context_length - tokens.shape[1])))
    pixels = torch.stack([transform(Image.open(BytesIO(photo))) for photo in photos])
    with torch.inference_mode():
        texts = model.encode_text(torch.tensor(tokens, dtype=torch.long)).numpy()
        images = model.encode_image(pixels).numpy()
    return np.concatenate([texts, images])


def test_the_transports_agree(server: Server, photos: list[bytes]) -> None:
    results = []
    for address in server.addresses:
        with Client(address) as client:
            results.append(client.encode([*TEXTS, *photos]))
    assert results[0].dtype == np.float32
    assert results[0].shape == (len(TEXTS) + len(photos), 256)
    assert np.isfinite(results[0]).all()
    for other in results[1:]:
        difference = np.linalg.norm(other - results[0], axis=1)
        assert (difference <= SAME * np.linalg.norm(results[0], axis=1)).all()


def test_equal_to_open_clip(
    server: Server, photos: list[bytes], reference: NDArray[np.float32]
) -> None:
    with Client(server.grpc) as client:
        embeddings = client.encode([*TEXTS, *photos])
    # Photographs this small are decoded at full size, so they are open_clip's to the pixel.
    assert cosines(embeddings, reference).min() >= COSINE


@needs_torch
def test_the_runtimes_agree(onnx_server: Server, torch_server: Server, photos: list[bytes]) -> None:
    with Client(onnx_server.http) as one, Client(torch_server.http) as other:
        a, b = one.encode([*TEXTS, *photos]), other.encode([*TEXTS, *photos])
    assert cosines(a, b).min() >= COSINE


def test_the_vectors_mean_something(server: Server) -> None:
    names = ["cat", "dog", "pizza", "car", "rocket", "guitar"]
    with Client(server.grpc) as client:
        pictures = client.encode([SAMPLES / f"{name}.png" for name in names])
        texts = client.encode([f"a {name}" for name in names], parameters={"normalize": True})
        np.testing.assert_allclose(np.linalg.norm(texts, axis=1), 1, rtol=1e-5)
        best = (pictures @ texts.T).argmax(1)
        assert [names[i] for i in best] == names
        ranked = client.rank(SAMPLES / "pizza.png", [f"a {name}" for name in names])
        assert ranked[0].item == "a pizza"
        assert sum(each.probability for each in ranked) == pytest.approx(1, abs=1e-5)
        labels = client.classify([SAMPLES / "cat.png", SAMPLES / "car.png"], names)
        assert [each[0].label for each in labels] == ["cat", "car"]


def test_async_and_many_at_once(server: Server) -> None:
    async def run() -> None:
        async with Client(server.grpc) as client:
            single = await client.aencode(["text 7"])
            many = await asyncio.gather(*(client.aencode([f"text {i}"]) for i in range(100)))
        np.testing.assert_allclose(many[7], single, rtol=1e-4, atol=1e-5)
        assert len({row.tobytes() for row in many}) == 100

    asyncio.run(run())


def test_a_generator_of_a_thousand(onnx_server: Server) -> None:
    seen = 0

    def texts() -> Any:
        nonlocal seen
        for seen in range(1, 1001):
            yield f"number {seen}"

    with Client(onnx_server.grpc) as client:
        embeddings = client.encode(texts(), batch_size=100)
        again = client.encode(["number 1", "number 1000"])
    assert seen == 1000
    assert embeddings.shape == (1000, 256)
    np.testing.assert_allclose(embeddings[[0, -1]], again, rtol=1e-4, atol=1e-5)


def test_profile(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    with Client(server.grpc) as client:
        latencies = client.profile()
    assert latencies
    assert "ms" in capsys.readouterr().out


@pytest.mark.slow
def test_exact_pictures(start: Any, onnx_server: Server, tmp_path: Path) -> None:
    """`exact` decodes a large JPEG in full, which differs a little from the scaled way."""
    from conftest import flow
    from PIL import Image
    from skimage import data

    file = tmp_path / "large.jpg"
    Image.fromarray(data.astronaut()).resize((1600, 1200)).save(file, quality=85)
    exact = start(flow("onnx", exact=True))
    with Client(exact.grpc) as client, Client(onnx_server.grpc) as scaled:
        a, b = client.encode([file]), scaled.encode([file])
    exact.stop()
    assert (a != b).any()
    assert cosines(a, b)[0] > 0.99
