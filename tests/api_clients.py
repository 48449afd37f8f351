"""`python api_clients.py URL IMAGE`: embeds a text and an image with the clients of other APIs.

It runs in an environment of its own, since these need pydantic 2, and prints what each got as JSON.
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

import cohere
import infinity_client
import litellm
import openai
from huggingface_hub import InferenceClient
from infinity_client.api.default import embeddings as infinity_embeddings
from infinity_client.models import OpenAIEmbeddingInputImage, OpenAIEmbeddingInputText
from langchain_openai import OpenAIEmbeddings
from llama_index.embeddings.openai import OpenAIEmbedding

MODEL, TEXT = "text-embedding-3-small", "a cat"


def refusal(client: openai.OpenAI, **request: Any) -> openai.APIStatusError:
    try:
        client.embeddings.create(**request)
    except openai.APIStatusError as error:
        return error
    raise AssertionError(f"{request} was accepted")


def main(url: str, image: str) -> None:
    uri = "data:image/png;base64," + base64.b64encode(Path(image).read_bytes()).decode()
    v1 = f"{url}/v1"
    client = openai.OpenAI(base_url=v1, api_key="none", max_retries=0)
    found = {
        # By default it asks for base64.
        "openai": client.embeddings.create(model=MODEL, input=[TEXT, uri]).data[0].embedding,
        "openai float": client.embeddings.create(model=MODEL, input=TEXT, encoding_format="float")
        .data[0]
        .embedding,
        "openai image": client.embeddings.create(model=MODEL, input=uri).data[0].embedding,
        "langchain": OpenAIEmbeddings(
            base_url=v1, api_key="none", model=MODEL, check_embedding_ctx_length=False
        ).embed_query(TEXT),
        "llama-index": OpenAIEmbedding(
            api_base=v1, api_key="none", model_name=MODEL
        ).get_text_embedding(TEXT),
        "litellm": litellm.embedding(
            f"openai/{MODEL}", [TEXT], api_base=v1, api_key="none", encoding_format="float"
        ).data[0]["embedding"],
        "litellm image": litellm.embedding(
            f"openai/{MODEL}", [uri], api_base=v1, api_key="none", input_type="image"
        ).data[0]["embedding"],
        # As it calls TEI.
        "hugging face": InferenceClient(model=url)
        .feature_extraction(TEXT, normalize=True, truncate=True)[0]
        .tolist(),
    }
    infinity = infinity_client.Client(base_url=url)
    for name, body in (
        ("infinity", OpenAIEmbeddingInputText(input_=[TEXT])),
        ("infinity image", OpenAIEmbeddingInputImage(input_=[uri])),
    ):
        found[name] = infinity_embeddings.sync(client=infinity, body=body).data[0].embedding
    ours = cohere.ClientV2(api_key="none", base_url=url)
    forms = ["float", "int8", "ubinary"]
    texts = ours.embed(model=MODEL, input_type="search_query", texts=[TEXT], embedding_types=forms)
    images = ours.embed(model=MODEL, input_type="image", images=[uri], embedding_types=["float"])
    found["cohere"], found["cohere image"] = texts.embeddings.float_[0], images.embeddings.float_[0]
    found["cohere int8"] = texts.embeddings.int8[0]
    wrong = refusal(client, model="third", input=TEXT)
    assert (wrong.status_code, wrong.code) == (404, "model_not_found")
    assert MODEL in wrong.message
    # As LangChain sends it by default, once it has downloaded its tokenizer.
    tokens = refusal(client, model=MODEL, input=[[64, 8415]])
    assert tokens.status_code == 400
    assert "check_embedding_ctx_length=False" in tokens.message
    assert client.models.list().data[0].id == client.models.retrieve(MODEL).id
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
