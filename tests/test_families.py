"""Families that open_clip shares with timm and transformers: graphs built from the checkpoint equal
the model, and the server runs them without torch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import requests
import seeded
import small_towers
from cn_clip_reference import drawn
from conftest import Server, Start, flow, needs_torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from test_graph import session
from test_hub import Hub, serve
from test_models_parity import (
    CAPTIONS,
    CLIPA,
    COCA,
    CONTEXT,
    SIGLIP_TEXT,
    TEXT,
    VIT,
    config,
    open_clip_model,
    references,
    timm,
)
from test_tokenizer_hugging_face import roberta as write_roberta_tokenizer
from test_tokenizer_hugging_face import t5 as write_tokenizer

from clip_client import Client
from clip_client.scores import cosines
from clip_server.convert.parity import Parity
from clip_server.model_card import ImageSpec, Precision
from clip_server.models import weights
from clip_server.runtimes.onnx import OnnxRuntime
from clip_server.towers import bert, graph, nllb, registry

SMALL_SIGLIP = config(
    timm("vit_test_patch16_siglip_64", 64, "map", "none"),
    SIGLIP_TEXT | {"hf_tokenizer_name": "here"},
    custom_text=True,
    embed_dim=64,
    init_logit_bias=-10,
)
FAMILIES: dict[str, dict[str, Any]] = {
    "siglip": SMALL_SIGLIP,
    "siglip, no projection": SMALL_SIGLIP
    | {"text_cfg": SIGLIP_TEXT | {"proj_type": "none", "act_kwargs": {}}},
    "timm with a class token": config(
        timm("vit_test_patch16_clip_64", 64, "token", None),
        TEXT | {"no_causal_mask": True},
        custom_text=True,
    ),
    "clipa": config(VIT | CLIPA, TEXT | {"pool_type": "last", "no_causal_mask": True}),
    "coca": config(
        VIT | COCA,
        TEXT | {"embed_cls": True, "output_tokens": True},
        custom_text=True,
        multimodal_cfg=CAPTIONS | {"layers": 1, "attn_pooler_heads": 4},
    ),
    "coca, as wide as its embeddings": config(
        VIT | COCA | {"width": 64},
        TEXT | {"embed_cls": True, "output_tokens": True},
        custom_text=True,
        embed_dim=64,
        multimodal_cfg=CAPTIONS | {"layers": 1, "attn_pooler_heads": 4},
    ),
    **{
        name: config(timm(trunk, 64, pool, None), TEXT, custom_text=True)
        for name, (trunk, pool) in {
            "eva-01": ("eva_test_patch16_64", "token"),
            "eva-02": ("eva02_test_patch16_clip_64", "token"),
            "eva-02, norms last": ("eva02_last_patch16_clip_64", "token"),
            "pe-core": ("vit_pe_core_test_patch16_64", "map"),
            "pe-core, no class token": ("vit_pe_core_bare_patch16_64", "map"),
        }.items()
    },
    **{
        name: config(timm(trunk, size, "avg", None), TEXT, custom_text=True)
        for name, (trunk, size) in {
            "mobileclip": ("fastvit_test", 64),
            "mobileclip 2, late": ("fastvit_late_test", 72),
            "mobileclip, real size": ("fastvit_mci0", 256),
        }.items()
    },
    "mobileclip-b": config(timm("vit_mci_test", 64, "token", None), TEXT, custom_text=True),
    "convnext": config(timm("convnext_test", 64, "", "linear"), TEXT),
    "convnext, mlp": config(timm("convnext_test", 64, "", "mlp"), TEXT),
    **{
        name: config(timm(trunk, size, "", "linear"), TEXT, custom_text=True)
        for name, (trunk, size) in {
            "vitamin": ("vitamin_test_64", 64),
            "vitamin, no positions": ("vitamin_bare_64", 72),
            "vitamin, real size": ("vitamin_small_224", 224),
        }.items()
    },
    "metaclip worldwide": config(VIT, TEXT | {"pool_type": "eos", "eos_id": 2}),
}
TEXTS = ["a cat", "the end", "unbelievably hyphenated"]
# Variants of what another one shows.
SLOW = (
    "siglip, no projection",
    "coca, as wide as its embeddings",
    "eva-02, norms last",
    "pe-core, no class token",
    "convnext, mlp",
    "vitamin, no positions",
    "vitamin, real size",
    "mobileclip 2, late",
    "mobileclip, real size",
)
each_family = pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else []) for name in FAMILIES],
)


@pytest.fixture(scope="module", autouse=True)
def small_members() -> Iterator[None]:
    """Small members of timm's families."""
    with pytest.MonkeyPatch.context() as patch:
        small_towers.add(patch.setitem)
        yield


@pytest.fixture(scope="module")
def small_members_in_timm() -> None:
    add_small_members_to_timm()


@cache
def add_small_members_to_timm() -> None:
    """Registers them once: timm warns of names that it knows."""
    from timm.layers import HybridEmbed, LayerNorm
    from timm.models import register_model
    from timm.models.vision_transformer import VisionTransformer

    size = {"embed_dim": 64, "depth": 2, "num_heads": 2, "mlp_ratio": 3.0}

    def vit_test_patch16_siglip_64(*_: Any, num_classes: int, global_pool: str, **__: Any) -> Any:
        options = {"num_classes": num_classes, "global_pool": global_pool}
        return VisionTransformer(64, 16, class_token=False, **size, **options)

    def vit_test_patch16_clip_64(*_: Any, num_classes: int, global_pool: str, **__: Any) -> Any:
        options = {"num_classes": num_classes, "global_pool": global_pool}
        norm = partial(LayerNorm, eps=1e-5)
        return VisionTransformer(64, 16, pre_norm=True, norm_layer=norm, **size, **options)

    from timm.models.convnext import ConvNeXt
    from timm.models.eva import Eva
    from timm.models.fastvit import fastvit_mci0, fastvit_mci3
    from timm.models.vision_transformer_hybrid import ConvStem
    from torch.nn import GELU

    rotated = {"use_rot_pos_emb": True, "ref_feat_shape": (6, 6)}
    eva02 = {"qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True}
    perception = rotated | {
        "attn_type": "rope",
        "rope_grid_offset": 1.0,
        "rope_grid_indexing": "xy",
        "use_pre_transformer_norm": True,
        "norm_layer": partial(LayerNorm, eps=1e-5),
        "attn_pool_num_heads": 8,
        "attn_pool_mlp_ratio": 4.0,
    }

    def eva_test_patch16_64(*_: Any, num_classes: int, global_pool: str, **more: Any) -> Any:
        options = {"num_classes": num_classes, "global_pool": global_pool}
        return Eva(64, 16, **size, **options, **more.get("style", {}))

    def eva02_test_patch16_clip_64(*_: Any, **options: Any) -> Any:
        return eva_test_patch16_64(**options, style=eva02 | rotated)

    def eva02_last_patch16_clip_64(*_: Any, **options: Any) -> Any:
        return eva_test_patch16_64(**options, style={"use_post_norm": True})

    def vit_pe_core_test_patch16_64(*_: Any, **options: Any) -> Any:
        return eva_test_patch16_64(**options, style=perception)

    def vit_pe_core_bare_patch16_64(*_: Any, **options: Any) -> Any:
        return eva_test_patch16_64(**options, style=perception | {"class_token": False})

    def convnext_test(*_: Any, **__: Any) -> Any:
        model = ConvNeXt(depths=(1, 2, 1, 1), dims=(16, 24, 32, 48))
        model.default_cfg = {}
        return model

    def fastvit_test(*_: Any, num_classes: int, global_pool: str, **__: Any) -> Any:
        small = {"layers": (1, 1, 1, 2), "embed_dims": (8, 16, 32, 64)}
        return fastvit_mci0(num_classes=num_classes, global_pool=global_pool, **small)

    def fastvit_late_test(*_: Any, num_classes: int, global_pool: str, **__: Any) -> Any:
        small = {"layers": (1,) * 5, "embed_dims": (8, 8, 16, 32, 64)}
        return fastvit_mci3(num_classes=num_classes, global_pool=global_pool, **small)

    def vit_mci_test(*_: Any, num_classes: int, global_pool: str, **__: Any) -> Any:
        strides = {"kernel_size": (4, 2, 2), "stride": (4, 2, 2), "padding": 0}
        stem = ConvStem(channels=(16, 16, 64), act_layer=GELU, **strides)
        embed = partial(HybridEmbed, backbone=stem, proj=False)
        options = {"num_classes": num_classes, "global_pool": global_pool, "no_embed_class": True}
        return VisionTransformer(64, 1, embed_layer=embed, **size, **options)

    register_model(fastvit_test)
    register_model(fastvit_late_test)
    register_model(vit_mci_test)
    from timm.models.vitamin import GeGluMlp, MbConvStages, VitCfg

    def vitamin_test_64(*_: Any, pos_embed: str = "learn", **__: Any) -> Any:
        stages = MbConvStages(VitCfg((16, 24, 64), (2, 4, 1), stem_width=16))
        model = VisionTransformer(
            64,
            patch_size=1,
            class_token=False,
            global_pool="avg",
            pos_embed=pos_embed,
            embed_layer=partial(HybridEmbed, backbone=stages, proj=False),
            mlp_layer=GeGluMlp,
            **size | {"mlp_ratio": 2.0},
        )
        model.default_cfg = {}
        return model

    def vitamin_bare_64(*_: Any, **__: Any) -> Any:
        return vitamin_test_64(pos_embed="none")

    register_model(vitamin_test_64)
    register_model(vitamin_bare_64)
    register_model(convnext_test)
    register_model(eva_test_patch16_64)
    register_model(eva02_test_patch16_clip_64)
    register_model(eva02_last_patch16_clip_64)
    register_model(vit_pe_core_test_patch16_64)
    register_model(vit_pe_core_bare_patch16_64)
    register_model(vit_test_patch16_siglip_64)
    register_model(vit_test_patch16_clip_64)


def seeded_model(described: dict[str, Any]) -> Any:
    """open_clip's own model, in which no parameter is without effect."""
    import torch

    model = open_clip_model(described)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.startswith("logit") or not tensor.is_floating_point():
                continue
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif (tensor == tensor.flatten()[0]).all():  # as layer norms and biases begin
                tensor.add_(torch.randn_like(tensor), alpha=0.1)
    return model


@needs_torch
@pytest.mark.usefixtures("small_members_in_timm")
@each_family
def test_graphs_equal_open_clip(family: str, tmp_path: Path) -> None:
    described = FAMILIES[family]
    model = seeded_model(described)
    folder = seeded.save(model, tmp_path, described)
    if "hf_tokenizer_name" in described["text_cfg"]:
        write_tokenizer(folder)
    runtimes: dict[Precision, OnnxRuntime] = {
        precision: OnnxRuntime.load("mine", model_path=folder, precision=precision, threads=1)
        for precision in ("fp32", "int8")
    }
    for batch, longest in ((1, 5), (3, CONTEXT)):
        pixels = seeded.random_pixels(described, batch)
        tokens = random_tokens(described, batch, longest)
        images, texts = references(model, pixels, tokens)
        for precision, runtime in runtimes.items():
            kept = CONTEXT if runtime.card.text.trim == "fixed" else longest
            assert Parity.of(runtime.encode_image(pixels), images).suffices(precision)
            assert Parity.of(runtime.encode_text(tokens[:, :kept]), texts).suffices(precision)


def assert_texts_equal(folder: Path, text: dict[str, Any], torch_runtime: Any) -> None:
    """Texts of a tower of Hugging Face's, which masks padding, in every runtime.

    folder: that the model is saved in. text: the configuration of the tower.
    """
    model = seeded_model(config(VIT, text | {"hf_model_pretrained": False}, custom_text=True))
    described = config(VIT, text, custom_text=True)
    seeded.save(model, folder, described)
    write_roberta_tokenizer(folder)
    tokens = np.random.default_rng(0).integers(3, 600, (3, CONTEXT), dtype=np.int32)
    tokens[0, 5:] = tokens[1, 9:] = 1
    pixels = seeded.random_pixels(described, 3)
    _, texts = references(model, pixels, tokens)
    for runtime, precision in (
        (OnnxRuntime.load("mine", model_path=folder), "fp32"),
        (OnnxRuntime.load("mine", model_path=folder, precision="int8"), "int8"),
        (torch_runtime.load("mine", model_path=folder, device="cpu"), "fp32"),
    ):
        assert (runtime.card.text.trim, runtime.card.text.pad_id) == ("masked", 1)
        assert Parity.of(runtime.encode_text(tokens), texts).suffices(precision)
        alone = runtime.encode_text(tokens[:1, :5])
        assert Parity.of(alone, texts[:1]).suffices(precision)


@needs_torch
def test_nllbs_encoder_equals_open_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    from clip_server.runtimes.torch import TorchRuntime

    tower = tmp_path / "tower"
    transformers.M2M100Config(
        vocab_size=600,
        d_model=48,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_layers=1,
        decoder_attention_heads=4,
        decoder_ffn_dim=96,
        scale_embedding=True,
        activation_function="relu",
        pad_token_id=1,
    ).save_pretrained(tower)
    named = {
        "hf_model_name": str(tower),
        "hf_tokenizer_name": "here",
        "hf_pooler_type": "cls_pooler",
        "hf_proj_type": "linear",
        "vocab_size": 600,
    }
    size = nllb.Size(2, 96, width=48, heads=4, vocab_size=600)
    monkeypatch.setitem(nllb.SIZES, str(tower), size)
    assert_texts_equal(tmp_path, named, TorchRuntime)


@needs_torch
@pytest.mark.parametrize("kind", ["Roberta", "XLMRoberta"])
def test_text_towers_of_hugging_faces_equal_open_clip(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    from clip_server.runtimes.torch import TorchRuntime

    size = {"width": 48, "layers": 2, "heads": 4, "mlp_width": 96, "vocab_size": 600}
    tower = tmp_path / "tower"
    getattr(transformers, f"{kind}Config")(
        vocab_size=600,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=514,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        pad_token_id=1,
    ).save_pretrained(tower)
    named = {"hf_model_name": str(tower), "hf_tokenizer_name": "here", "vocab_size": 600}
    monkeypatch.setitem(bert._HUGGING_FACE, str(tower), size)
    assert_texts_equal(tmp_path, named, TorchRuntime)


@each_family
def test_graphs_for_tensorrt_and_in_fp16_give_the_same_embeddings(family: str) -> None:
    described = FAMILIES[family]
    tensors = drawn(registry.tensor_shapes(described))
    image = ImageSpec(described["vision_cfg"]["image_size"])
    feeds = (
        {"pixels": seeded.random_pixels(described, 2)},
        {"tokens": random_tokens(described, 2, 9)},
    )
    usual = [
        graph.build_visual(described, tensors, image),
        graph.build_textual(described, tensors),
    ]
    for precision in ("fp32", "fp16"):
        options: Any = {"precision": precision, "target": "tensorrt"}
        others = [
            graph.build_visual(described, tensors, image, **options),
            graph.build_textual(described, tensors, **options),
        ]
        for feed, expected, found in zip(feeds, usual, others, strict=True):
            onnx.checker.check_model(found, full_check=True)
            assert {opset.domain for opset in found.opset_import} == {""}
            rows = [session(model).run(None, feed)[0] for model in (found, expected)]
            assert Parity.of(*rows).suffices(precision)


def random_tokens(described: dict[str, Any], batch: int, longest: int) -> NDArray[np.int32]:
    """As `seeded.random_tokens`, with the end token of the text tower."""
    text = TEXT | described["text_cfg"]
    tokens = seeded.random_tokens({"text_cfg": text}, batch, longest)
    if "eos_id" in text:
        tokens[tokens == text["vocab_size"] - 1] = text["eos_id"]
    return tokens


def sigmoid(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1 / (1 + np.exp(-logits))


@pytest.fixture(scope="module")
def sigmoid_server(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Server:
    """A server of a model with SigLIP's text tower and logit bias."""
    folder = tmp_path_factory.mktemp("sigmoid")
    described = config(VIT, SIGLIP_TEXT | {"hf_tokenizer_name": "here"}, init_logit_bias=-10)
    tensors = drawn(registry.tensor_shapes(described))
    numbers = {"logit_scale": np.float32([np.log(20)]), "logit_bias": np.float32([-3])}
    save_file(tensors | numbers, folder / weights.CHECKPOINT)
    seeded.describe(folder, described)
    write_tokenizer(folder)
    return start(flow("onnx", name="mine", model_path=str(folder)))


def test_probabilities_of_siglip_are_sigmoids(sigmoid_server: Server) -> None:
    for address in sigmoid_server.addresses:
        with Client(address) as client:
            info = client.info()
            assert (round(info.logit_scale, 4), info.logit_bias) == (20, -3)
            embeddings = client.encode(["naïve café", *TEXTS])
            expected = sigmoid(20 * cosines(embeddings[:1], embeddings[1:])[0] - 3)
            ranked = client.rank("naïve café", TEXTS)
            assert [each.index for each in ranked] == np.argsort(-expected).tolist()
            found = [each.probability for each in ranked]
            np.testing.assert_allclose(found, np.sort(expected)[::-1], rtol=1e-4)
            # Each by itself: another candidate changes nothing.
            alone = client.rank("naïve café", TEXTS[:1])
            np.testing.assert_allclose(alone[0].probability, expected[0], rtol=1e-4)

            pixels = seeded.random_pixels({"vision_cfg": {"image_size": 64}}, 1)[0]
            image = np.ascontiguousarray(pixels.transpose(1, 2, 0))
            (labels,) = client.classify([image], TEXTS, prompt="{}")
            expected = sigmoid(20 * cosines(client.encode([image]), client.encode(TEXTS))[0] - 3)
            by_label = {each.label: each.probability for each in labels}
            np.testing.assert_allclose([by_label[text] for text in TEXTS], expected, rtol=1e-4)


def test_rank_over_http_gives_sigmoids(sigmoid_server: Server) -> None:
    info = requests.get(f"{sigmoid_server.http}/info", timeout=30).json()
    assert info["logit_bias"] == -3
    matches = [{"text": text} for text in TEXTS]
    body = {"data": [{"text": "naïve café", "matches": matches}]}
    answer = requests.post(f"{sigmoid_server.http}/rank", json=body, timeout=30).json()
    for match in answer["data"][0]["matches"]:
        scores = {name: score["value"] for name, score in match["scores"].items()}
        expected = sigmoid(np.float64(20 * scores["clip_score_cosine"] - 3))
        np.testing.assert_allclose(scores["clip_score"], expected, rtol=1e-4)
    assert len(answer["data"][0]["matches"]) == len(TEXTS)


SERVED_TRUNKS = ["eva-02", "pe-core", "convnext", "vitamin", "mobileclip", "mobileclip-b"]
SERVED = ["siglip", "timm with a class token", "clipa", "coca", *SERVED_TRUNKS]
# What the process of a server runs first.
STARTUP = f"""
import sys
sys.modules["torch"] = None
sys.path.insert(0, {str(Path(__file__).parent)!r})
import small_towers
small_towers.add()
"""


@pytest.fixture(scope="module")
def hub_of_families(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub with a seeded model of each family."""
    folder = tmp_path_factory.mktemp("families")
    for index, family in enumerate(SERVED):
        described = FAMILIES[family]
        repository = folder / f"seeded/family-{index}"
        repository.mkdir(parents=True)
        numbers = {"logit_scale": np.float32([3]), "logit_bias": np.float32([-3])}
        tensors = drawn(registry.tensor_shapes(described)) | numbers
        if family == "vitamin":  # whose checkpoints on the hub are pickled
            torch = pytest.importorskip("torch")
            pickled = {name: torch.from_numpy(value) for name, value in tensors.items()}
            torch.save(pickled, repository / "pytorch_model.bin")
        else:
            save_file(tensors, repository / weights.CHECKPOINT)
        seeded.describe(repository, described)
        if "hf_tokenizer_name" in described["text_cfg"]:
            write_tokenizer(repository)
    files = {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }
    with serve(files) as hub:
        yield hub


@pytest.mark.slow
def test_every_family_is_served_from_a_hub_without_torch(
    hub_of_families: Hub, start: Start, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(STARTUP)
    names = [f"seeded/family-{index}" for index in range(len(SERVED))]
    spec = flow("onnx")
    spec["executors"] = [
        {**flow("onnx", name=name, exact=True)["executors"][0], "name": f"family{index}"}
        for index, name in enumerate(names)
    ]
    server = start(
        spec, PYTHONPATH=str(tmp_path), HF_HOME=str(tmp_path), HF_ENDPOINT=hub_of_families.url
    )
    image = np.ascontiguousarray(
        seeded.random_pixels({"vision_cfg": {"image_size": 64}}, 1)[0].transpose(1, 2, 0)
    )
    with Client(server.grpc) as client:
        for name, family in zip(names, SERVED, strict=True):
            described = FAMILIES[family]
            tensors = drawn(registry.tensor_shapes(described))
            (row,) = client.encode([image], model=name)
            visual = session(graph.build_visual(described, tensors, ImageSpec(64)))
            pixels = image.transpose(2, 0, 1)[np.newaxis]
            (expected,) = visual.run(None, {"pixels": np.ascontiguousarray(pixels)})
            assert seeded.relative(row[np.newaxis], expected) < 1e-4, family
