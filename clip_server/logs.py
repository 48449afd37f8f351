"""The server's log: lines of text or JSON on stderr, each with the id of the request it is about.

As JSON, whatever a process of the server prints is an object on a line. Set by environment
variables, which every process of the server inherits:

    CLIP_LOG_LEVEL   debug, info (the default), warning, error
    CLIP_LOG_FORMAT  text (the default), json
    CLIP_ACCESS_LOG  1: a line for each request
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any, TextIO

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("text", "json")
# The request that the current task works on; "": none.
request_id: ContextVar[str] = ContextVar("request_id", default="")
# Control characters and line separators, as they are shown in a line of text.
_ESCAPED = {code: ascii(chr(code))[1:-1] for code in (*range(32), *range(127, 160), 0x2028, 0x2029)}
_TIME, _MILLISECONDS = "%Y-%m-%dT%H:%M:%S", ".%03dZ"
# What a terminal overwrites, as a progress bar does with itself.
_OVERWRITTEN = re.compile(r"[^\n]*\r(?=[^\r\n])")
# Attributes of a record that is logged with `extra` as fields of JSON.
_FIELDS = "fields"


def configure() -> None:
    """Makes this process log as the environment says. May be called again."""
    level = _chosen("CLIP_LOG_LEVEL", LEVELS, "info").upper()
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonFormatter() if is_json() else _TextFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    logging.captureWarnings(True)
    # Libraries tell every step of a connection.
    root.setLevel(max(logging.getLevelName(level), logging.WARNING))
    for name in ("clip_server", "clip_client"):
        logging.getLogger(name).setLevel(level)
    # They warn of each client that sends no HTTP, or metadata that is not Unicode.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_of_the_server)


def _is_of_the_server(record: logging.LogRecord) -> bool:
    """Whether a record of gRPC is about more than what a client sent."""
    return not str(record.msg).startswith("Invalid encoding")


def choose(level: str | None, form: str | None, access: bool) -> None:
    """Sets the environment of this process and its children; None, False: leaves it as it is."""
    chosen = {"CLIP_LOG_LEVEL": level, "CLIP_LOG_FORMAT": form, "CLIP_ACCESS_LOG": access and "1"}
    os.environ.update({name: str(value) for name, value in chosen.items() if value})


def print_as_json() -> None:
    """Makes this process and its forks print JSON only, if lines are JSON: what libraries and
    executors print, and tracebacks, become messages.

    Call it once, before anything is printed.
    """
    if is_json():
        sys.stdout, sys.stderr = _JsonOutput(sys.stdout), _JsonOutput(sys.stderr)


def announce(
    message: str,
    level: int = logging.INFO,
    *,
    details: Mapping[str, Sequence[str]] | None = None,
    file: TextIO | None = None,
) -> None:
    """Prints a message of the command, whatever the level of the log.

    details: fields of JSON; in text, lines below the message.
    file: None: stderr.
    """
    details = details or {}
    if is_json():
        text = _object(f"clip_server: {message}", level, "clip_server", time.time(), details)
    else:
        warning = "warning: " if level == logging.WARNING else ""
        lines = [line for lines in details.values() for line in lines]
        text = "\n  ".join([f"clip_server: {warning}{message}", *lines])
    print(text, file=file or sys.stderr, flush=True)


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
    default_time_format = _TIME
    default_msec_format = f"%s{_MILLISECONDS}"

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        # Requests hold line breaks, which would look like lines of the log.
        line = super().formatMessage(record).translate(_ESCAPED)
        named = _request_id(record)
        return f"{line} [request {named}]" if named else line


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        named = _request_id(record)
        fields = {"request_id": named} if named else {}
        fields |= getattr(record, _FIELDS, {})
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return _object(record.getMessage(), record.levelno, record.name, record.created, fields)


def _object(
    message: str, level: int, logger: str, seconds: float, fields: Mapping[str, Any]
) -> str:
    moment = time.strftime(_TIME, time.gmtime(seconds)) + _MILLISECONDS % (seconds % 1 * 1000)
    line = {
        "time": moment,
        "level": logging.getLevelName(level).lower(),
        "logger": logger,
        "message": message,
        **fields,
    }
    # In ASCII: some readers take U+2028 and U+0085 for the end of a line.
    return json.dumps(line, default=str)


class _JsonOutput(io.TextIOBase):
    """A stream that is given text, and writes JSON: objects as they are, all else as messages.

    stream: where it writes.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._begun = stream, ""

    def write(self, text: str) -> int:
        self._begun = _OVERWRITTEN.sub("\r", self._begun + text)
        if self._begun.endswith("\n"):
            self._write_message()
        return len(text)

    def flush(self) -> None:
        if "\r" not in self._begun:  # a progress bar is flushed at each step
            self._write_message()
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return False

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    def _write_message(self) -> None:
        message, self._begun = self._begun.strip("\r\n"), ""
        if not _is_object(message):
            message = message and _object(message, logging.INFO, "output", time.time(), {})
        if message:
            self._stream.write(f"{message}\n")


def _is_object(text: str) -> bool:
    try:
        return text.startswith("{") and isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _request_id(record: logging.LogRecord) -> str:
    """The id given as `extra`, where a thread works for several requests, or that of the task."""
    return getattr(record, "request_id", None) or request_id.get()
