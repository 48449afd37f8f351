"""The documents that Jina clients send to an encoder and get back."""

from clip_server.rpc.documents import ClipChunk, ClipDoc, ClipMatch, ClipPart

__all__ = ["ClipChunk", "ClipDoc", "ClipMatch", "ClipPart"]
