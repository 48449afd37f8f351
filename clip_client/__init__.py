"""The client of CLIP as a microservice.

from clip_client import Client

client = Client("grpc://127.0.0.1:51000")
embeddings = client.encode(["a photo of a cat", "cat.jpg"])
"""

from importlib.metadata import PackageNotFoundError, version

from clip_client.callbacks import Batch
from clip_client.client import Client
from clip_client.errors import (
    AuthenticationError,
    ClientClosedError,
    ClipError,
    ClipWarning,
    ConnectionFailedError,
    DeadlineExceededError,
    InvalidInputError,
    ItemFailure,
    ItemsError,
    OverloadedError,
    ServerError,
    TruncationWarning,
)
from clip_client.results import Collection, Info, Label, Match, Ranking

try:
    __version__ = version("clip-microservice-client")
except PackageNotFoundError:
    __version__ = "0.0.0"

__all__ = [
    "AuthenticationError",
    "Batch",
    "Client",
    "ClientClosedError",
    "ClipError",
    "ClipWarning",
    "Collection",
    "ConnectionFailedError",
    "DeadlineExceededError",
    "Info",
    "InvalidInputError",
    "ItemFailure",
    "ItemsError",
    "Label",
    "Match",
    "OverloadedError",
    "Ranking",
    "ServerError",
    "TruncationWarning",
]
