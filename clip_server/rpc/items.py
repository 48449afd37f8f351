"""Ids of items that come without one."""

from __future__ import annotations

import hashlib


def content_id(content: str | bytes) -> str:
    """A hash of a text or image, so that the same content is one row of a collection."""
    data = content.encode() if isinstance(content, str) else content
    return f"sha256-{hashlib.sha256(data).hexdigest()[:40]}"
