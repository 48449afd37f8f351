"""The server's log: lines of text or JSON on stderr, each with the id of the request it is about.

Set by environment variables, which every process of the server inherits:

    CLIP_LOG_LEVEL   debug, info (the default), warning, error
    CLIP_LOG_FORMAT  text (the default), json
    CLIP_ACCESS_LOG  1: a line for each request
"""

from __future__ import annotations

import json
import logging
import os
import time
from contextvars import ContextVar
from typing import Any

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("text", "json")
# The request that the current task works on; "": none.
request_id: ContextVar[str] = ContextVar("request_id", default="")
# Attributes of a record that is logged with `extra` as fields of JSON.
_FIELDS = "fields"


def configure() -> None:
    """Makes this process log as the environment says. May be called again."""
    level = _chosen("CLIP_LOG_LEVEL", LEVELS, "info").upper()
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonFormatter() if is_json() else _TextFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    # Libraries tell every step of a connection.
    root.setLevel(max(logging.getLevelName(level), logging.WARNING))
    for name in ("clip_server", "clip_client"):
        logging.getLogger(name).setLevel(level)
    # It warns of each client that sends no HTTP.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)


def choose(level: str | None, form: str | None, access: bool) -> None:
    """Sets the environment of this process and its children; None, False: leaves it as it is."""
    chosen = {"CLIP_LOG_LEVEL": level, "CLIP_LOG_FORMAT": form, "CLIP_ACCESS_LOG": access and "1"}
    os.environ.update({name: str(value) for name, value in chosen.items() if value})


def is_json() -> bool:
    """Whether lines are JSON."""
    return _chosen("CLIP_LOG_FORMAT", FORMATS, "text") == "json"


def has_access_log() -> bool:
    """Whether each request gets a line."""
    return os.environ.get("CLIP_ACCESS_LOG", "").lower() in ("1", "true", "yes", "on")


def _chosen(variable: str, allowed: tuple[str, ...], default: str) -> str:
    value = os.environ.get(variable, "").lower() or default
    return value if value in allowed else default


class _TextFormatter(logging.Formatter):
    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record)
        named = _request_id(record)
        return f"{line} [request {named}]" if named else line


class _JsonFormatter(_TextFormatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if named := _request_id(record):
            line["request_id"] = named
        line |= getattr(record, _FIELDS, {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def _request_id(record: logging.LogRecord) -> str:
    """The id given as `extra`, where a thread works for several requests, or that of the task."""
    return getattr(record, "request_id", None) or request_id.get()
