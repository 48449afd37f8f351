"""The pages for browsers, each one response without outside assets: at `/` the one to try the
server, and the reference of its API."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib import resources

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send


class PageForBrowsers:
    """ASGI middleware: answers browsers at `/` with the page, which needs no key; the requests
    that it makes do. Programs get what the application answers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_root = scope["path"] == "/" and scope["method"] in ("GET", "HEAD")
        if is_root and "text/html" in Headers(scope=scope).get("accept", ""):
            await _response("index.html", "page.js")(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def reference() -> Response:
    """The page that shows the OpenAPI document."""
    return _response("reference.html", "reference.js")


def _response(html: str, script: str) -> Response:
    """A page; it may run its own script and ask this server, and nothing else."""
    content, policy = _built(html, script)
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
        "Vary": "Accept",
    }
    return Response(content, media_type="text/html", headers=headers)


@cache
def _built(html_name: str, script_name: str) -> tuple[str, str]:
    """The HTML with its style and script, and the policy that allows these alone."""
    folder = resources.files(__name__)
    html, head, style, *scripts = (
        folder.joinpath(name).read_text("utf-8")
        for name in (html_name, "head.html", "page.css", "shared.js", script_name)
    )
    script = "\n".join(scripts)
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    html = html.replace("<!--head-->", head.strip()).replace("/*style*/", style)
    return html.replace("/*script*/", script), policy


def _hash(content: str) -> str:
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
