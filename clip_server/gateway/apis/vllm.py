"""vLLM's addition to OpenAI's API: `messages`, as in a chat, in place of `input`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clip_server.errors import RequestError
from clip_server.gateway.apis.inputs import PlacedItem, part_item, text_item

_CONTENT = "messages[0].content"


def items(body: Mapping[str, Any]) -> list[PlacedItem]:
    """The one item of a body's messages. Raises RequestError unless they have exactly one part."""
    messages = body.get("messages")
    only = messages[0] if isinstance(messages, list) and len(messages) == 1 else None
    content = only.get("content") if isinstance(only, Mapping) else None
    if isinstance(content, str):
        return [PlacedItem(_CONTENT, text_item(content, _CONTENT))]
    if not isinstance(content, list) or len(content) != 1:
        raise RequestError(
            "messages: a CLIP model embeds one text or one image at a time: send one message whose "
            "content has one part, or several texts and images in input"
        )
    place = f"{_CONTENT}[0]"
    return [PlacedItem(place, part_item(content[0], place))]
