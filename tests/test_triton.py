"""A real Triton serves what `convert --to triton` writes, and our client speaks to it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import cn_clip_reference as chinese
import numpy as np
import pytest
import seeded
import small_towers
import test_families as families
import triton_server
from conftest import eventually, saved
from numpy.typing import NDArray
from PIL import Image
from test_tokenizer_hugging_face import t5 as write_tokenizer
from triton_server import Installed, Triton

from clip_client import Client, ConnectionFailedError, ItemsError, ServerError, TruncationWarning
from clip_client.scores import normalize
from clip_server.convert.__main__ import main
from clip_server.models import zoo
from clip_server.preprocess.image import ImageTransform
from clip_server.preprocess.tokenizer import pad, tokenizer_for
from clip_server.runtimes import load_runtime
from clip_server.towers import timm_vit

pytestmark = pytest.mark.slow

SMALL_TEXT = seeded.SMALL_CLIP["text_cfg"]
# Small members of each family.
SEEDED: dict[str, dict[str, Any]] = {
    "vision transformer": seeded.SMALL_CLIP,
    "residual network": seeded.SMALL_RESNET | {"text_cfg": SMALL_TEXT},
    "SigLIP": families.SMALL_SIGLIP,
    "CoCa": families.FAMILIES["coca"]
    | {"text_cfg": SMALL_TEXT | {"context_length": 76, "embed_cls": True, "output_tokens": True}},
    "Chinese-CLIP": chinese.SMALL,
}
TEXTS = ["a cat", "a photo of two dogs on a beach", "x", "一只猫坐在沙发上", "naïve café"]
PROMPTS = ["a cat", "a dog", "a red car"]
DIFFERENCE = 1e-5  # of embeddings of length 1


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return triton_server.install(tmp_path_factory.mktemp("installed"))


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embedded")
    prompts = folder.with_suffix(".txt")
    prompts.write_text("\n".join(PROMPTS))
    command = ["embedded", "--to", "triton", "--towers", "python", "--out", str(folder)]
    assert main([*command, "--labels", str(prompts)]) == 0
    return folder


@pytest.fixture(scope="module")
def triton(
    installed: Installed, repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Triton]:
    log = tmp_path_factory.mktemp("log") / "triton.log"
    with triton_server.running(installed, repository, log) as server:
        yield server


@pytest.fixture
def clients(triton: Triton) -> Iterator[list[Client]]:
    with ExitStack() as stack:
        yield [stack.enter_context(Client(address)) for address in triton.addresses]


def jpeg(seed: int, width: int = 320, height: int = 240) -> bytes:
    colours = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return saved(Image.fromarray(colours).resize((width, height)), "JPEG")


IMAGES = [jpeg(0), jpeg(1, 700, 300), jpeg(2, 90, 400)]


def expected(name: str, path: Path | None) -> NDArray[np.float32]:
    """What our ONNX runtime makes of the texts and the images, item by item."""
    runtime = load_runtime("onnx", name, model_path=path, device="cpu")
    card = zoo.resolve(name, path)
    tokenizer, transform = tokenizer_for(card.text), ImageTransform(card.image)
    texts = [runtime.encode_text(pad([tokenizer.encode(text)], tokenizer.spec)) for text in TEXTS]
    images = [runtime.encode_image(transform(image)[None]) for image in IMAGES]
    return np.concatenate([*texts, *images])


def assert_equal(found: NDArray[np.float32], theirs: NDArray[np.float32]) -> None:
    difference = np.abs(normalize(found) - normalize(theirs)).max()
    assert difference < DIFFERENCE


def test_embeddings_are_ours(clients: list[Client]) -> None:
    theirs = expected("embedded", None)
    for client in clients:
        assert_equal(client.encode([*TEXTS, *IMAGES]), theirs)
        unit = client.encode(TEXTS, normalize=True)
        np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("family", SEEDED)
def test_embeddings_of_other_families_are_ours(
    installed: Installed, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(timm_vit.SIZES, "test_patch16", small_towers.VIT)
    families.add_small_members_to_timm()
    config = SEEDED[family]
    checkpoint = seeded.save_drawn(tmp_path / "checkpoint", config)
    if "hf_tokenizer_name" in config["text_cfg"]:
        write_tokenizer(checkpoint)
    repository = tmp_path / "repository"
    command = [str(checkpoint), "--to", "triton", "--towers", "python", "--out", str(repository)]
    assert main(command) == 0
    theirs = expected("", checkpoint)
    with triton_server.running(installed, repository, tmp_path / "log") as server:
        for address in server.addresses:
            with Client(address) as client:
                assert client.info().dim == theirs.shape[1]
                assert_equal(client.encode([*TEXTS, *IMAGES]), theirs)
                assert_zero_shot_is_rank(server, client, PROMPTS)


def test_requests_are_served_in_batches(triton: Triton, clients: list[Client]) -> None:
    before = triton.statistics("clip_textual")

    def served(counted: str) -> int:
        return triton.statistics("clip_textual")[counted] - before[counted]

    texts = [f"a text with the number {number}" for number in range(300)]
    for client in clients:
        client.encode(texts, batch_size=1)
    # Triton counts a request only after its answer.
    assert eventually(lambda: served("items") >= 600)
    assert served("batches") < 600


def test_a_bad_image_fails_alone(clients: list[Client]) -> None:
    bad = {"uri": "data:image/png;base64,bm90IGFuIGltYWdl"}
    cut = IMAGES[0][:500]
    for client in clients:
        (alone,) = client.encode(IMAGES[:1])
        with pytest.raises(ItemsError) as caught:
            client.encode([IMAGES[0], b"nothing", "a cat", bad, cut, "", *IMAGES])
        assert [failure.index for failure in caught.value.errors] == [1, 3, 4, 5]
        assert "JPEG" in caught.value.errors[0].message
        rows = caught.value.embeddings
        assert rows is not None
        assert np.isnan(rows[[1, 3, 4, 5]]).all()
        assert_equal(rows[[0, 6]], np.stack([alone, alone]))


def test_a_bad_image_fails_no_neighbour(clients: list[Client]) -> None:
    def encode(client: Client, image: bytes) -> bool:
        try:
            client.encode([image])
        except ItemsError:
            return False
        return True

    images = [b"nothing" if number % 4 == 0 else IMAGES[number % 3] for number in range(64)]
    with ThreadPoolExecutor(16) as threads:
        for client in clients:
            answers = list(threads.map(lambda image, c=client: encode(c, image), images))
            assert answers == [image != b"nothing" for image in images]


def test_rank_and_classify(clients: list[Client]) -> None:
    for client in clients:
        ranked = client.rank(IMAGES[0], ["a cat", "a dog", "a red car"])
        assert sum(each.probability for each in ranked) == pytest.approx(1)
        cosines = [each.cosine for each in ranked]
        assert cosines == sorted(cosines, reverse=True)
        labels = client.classify(IMAGES, ["cat", "dog"])
        assert [len(each) for each in labels] == [2, 2, 2]


@pytest.mark.parametrize("prompts", [PROMPTS, None])
def test_zero_shot_is_what_rank_finds(
    triton: Triton, clients: list[Client], prompts: list[str] | None
) -> None:
    """Without prompts those of `--labels` are meant."""
    assert_zero_shot_is_rank(triton, clients[0], prompts)


def assert_zero_shot_is_rank(triton: Triton, client: Client, prompts: list[str] | None) -> None:
    from tritonclient import grpc

    library = grpc.InferenceServerClient(f"127.0.0.1:{triton.grpc_port}")
    inputs = [grpc.InferInput("IMAGE", [1], "BYTES")]
    inputs[0].set_data_from_numpy(np.array([IMAGES[0]], dtype=object))
    if prompts is not None:
        inputs.append(grpc.InferInput("TEXTS", [len(prompts)], "BYTES"))
        inputs[1].set_data_from_numpy(np.array(prompts, dtype=object))
    found = library.infer("zero_shot", inputs)
    library.close()
    ranked = client.rank(IMAGES[0], prompts or PROMPTS)
    by_prompt = sorted(ranked, key=lambda each: each.index)
    probabilities = [each.probability for each in by_prompt]
    np.testing.assert_allclose(found.as_numpy("PROBABILITIES"), probabilities, atol=1e-4)
    info = client.info()
    logits = [info.logit_scale * each.cosine + (info.logit_bias or 0) for each in by_prompt]
    np.testing.assert_allclose(found.as_numpy("LOGITS"), logits, atol=1e-3)


def test_long_texts_are_cut_with_a_warning(clients: list[Client]) -> None:
    for client in clients:
        with pytest.warns(TruncationWarning, match="1 text"):
            client.encode(["short", "word " * 200])


def test_a_model_may_be_unloaded_and_loaded(triton: Triton, clients: list[Client]) -> None:
    before = clients[0].encode(TEXTS)
    for model in ("text_embedding", "clip_textual"):
        triton.post(f"repository/models/{model}/unload")
    for client in clients:
        with pytest.raises((ServerError, ConnectionFailedError), match="text_embedding"):
            client.encode(TEXTS, timeout=5)
        client.encode(IMAGES)
    triton.post("repository/models/text_embedding/load")
    for client in clients:
        assert_equal(client.encode(TEXTS), before)


def test_a_repository_of_something_else(installed: Installed, tmp_path: Path) -> None:
    model = tmp_path / "repository" / "other" / "1"
    model.mkdir(parents=True)
    (model.parent / "config.pbtxt").write_text('name: "other"\nbackend: "python"\n')
    (model / "model.py").write_text("class TritonPythonModel:\n    pass\n")
    with triton_server.running(installed, tmp_path / "repository", tmp_path / "log") as server:
        for address in server.addresses:
            with Client(address) as client, pytest.raises(ServerError, match="--to triton"):
                client.encode(["a cat"])


@pytest.mark.parametrize("scheme", ["triton", "triton+grpc"])
def test_no_server(scheme: str) -> None:
    if scheme == "triton":
        pytest.importorskip("geventhttpclient")
    client = Client(f"{scheme}://127.0.0.1:1", connect_timeout=0.5)
    with client, pytest.raises(ConnectionFailedError, match="tritonserver"):
        client.encode(["a cat"])
