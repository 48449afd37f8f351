"""Code blocks of README.md, docs/ and other pages run as they stand, and links lead somewhere.

A page's blocks run in order, in a folder with the files that `material` makes. A block with a file
name after its language is saved under it. A command that starts a server runs on while the rest
of the page runs; the Python blocks without a name are one program, run at the end. Where a block
cannot run in a test, `<!-- not run: REASON -->` stands on the line before it.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, SAMPLES, Server, Start, free_ports
from guard import popen

from clip_client import Client
from clip_server.launch import flow

README = ROOT / "README.md"
CHANGELOG = ROOT / "CHANGELOG.md"
PAGES = sorted(
    {*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("training/*.md")} - {CHANGELOG}
)
LANGUAGES = {"bash", "javascript", "json", "python", "text", "yaml"}
# What the blocks of a page print, besides running.
SHOWN = {
    "README.md": ("(2, 256)", "a slice of pizza", "\ndog\n", '"embedding":[', '"matches":['),
    "docs/protocols.md": ("0 256", "1 256", "request 1: 1 x 256", "request 2: 1 x 256", "(1, 256)"),
    "docs/search.md": ("cat.jpg", '"text":"a red car"'),
    "docs/tls.md": ("grpcs://", "https://", "wss://", "(1, 256)", '"embedding":['),
}
TOOLS = ("curl", "node", "npm", "openssl")
MODELS = re.compile(r"\b(?:ViT-|RN\d|CN-CLIP/|M-CLIP/)[\w/@:-]*")
SERVES = re.compile(r"-m clip_server(?!\.)")
SLOW = re.compile(r"-m (?:clip_server(?! *\.models)|tools)|^npm|^openssl", re.MULTILINE)
COMMENT = r"(?:<!-- not run: (?P<reason>.+?) -->\n)?"
BLOCK = re.compile(rf"^{COMMENT}```(?P<info>.*)\n(?P<text>(?:.*\n)*?)^```$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    file: str
    text: str
    reason: str | None  # why it is not run

    def __str__(self) -> str:
        return f"{name(self.page)}:{self.line}"


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> Iterator[Block]:
    content = page.read_text("utf-8")
    for found in BLOCK.finditer(content):
        language, _, file = found["info"].partition(" ")
        line = content.count("\n", 0, found.start("info")) + 1
        yield Block(page, line, language, file, found["text"], found["reason"])


BLOCKS = [block for page in PAGES for block in blocks(page)]
RUN = [block for block in BLOCKS if block.reason is None]
FLOWS = [block for block in RUN if block.language == "yaml" and "jtype" in block.text]


def commands(page: Path) -> str:
    return "\n".join(b.text for b in RUN if b.page == page and b.language == "bash")


def is_slow(page: Path) -> bool:
    return SLOW.search(commands(page)) is not None


def served(block: Block, folder: Path, ports: list[int]) -> dict[str, Any]:
    """A flow of the docs on free ports; the built-in model stands in for one not in `folder`."""
    spec = flow.load(block.text)
    for executor in spec["executors"]:
        parameters = executor["uses"]["with"]
        if executor["uses"]["jtype"] == "CLIPIndexer":
            parameters["path"] = str(folder / "collection")
            continue
        if not (folder / parameters.get("model_path", "none")).exists():
            parameters.pop("model_path", None)
            parameters["name"] = "embedded"
    options = spec.setdefault("with", {})
    options["host"] = "127.0.0.1"
    count = len(options["port"]) if isinstance(options.get("port"), list) else 1
    options["port"] = ports[:count] if "port" in options else ports
    return spec


def test_every_block_says_what_it_is() -> None:
    for block in BLOCKS:
        assert block.language in LANGUAGES, f"{block}: a block of {block.language or 'nothing'}"
    fences = sum(len(re.findall("^```", page.read_text("utf-8"), re.MULTILINE)) for page in PAGES)
    assert fences == 2 * len(BLOCKS)
    assert {"python", "bash", "yaml", "json"} <= {block.language for block in RUN}


@pytest.mark.parametrize("block", [b for b in RUN if b.language == "json"], ids=str)
def test_json(block: Block) -> None:
    try:
        json.loads(block.text)
    except json.JSONDecodeError:  # one value on each line
        for line in block.text.splitlines():
            json.loads(line)


@pytest.mark.parametrize("block", FLOWS, ids=str)
def test_flow(block: Block, tmp_path: Path) -> None:
    spec = served(block, tmp_path, free_ports(3))
    for made_by_the_page in ("ssl_keyfile", "ssl_certfile"):
        spec["with"].pop(made_by_the_page, None)
    prepared = flow.prepare(flow.expand(spec))
    assert prepared["gateway"]["uses"] == "ClipGateway"
    kinds = {each["uses"]["jtype"] for each in prepared["executors"]}
    encoders = {"CLIPEncoder", "CLIPImageEncoder", "CLIPTextEncoder"}
    assert kinds & encoders
    assert kinds <= encoders | {"CLIPIndexer"}


class Session:
    """One page, followed by a reader in an empty folder."""

    def __init__(self, folder: Path, ports: list[int], web: str) -> None:
        self._folder = folder
        self._ports = ports
        self._web = web
        self._server: Server | None = None
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self._environment = {**os.environ, "PATH": path, "CLIP_MODEL": "embedded"}

    def follow(self, page: Path) -> str:
        """Runs the blocks of a page; what they print."""
        self._provide_flows()
        own = [each for each in RUN if each.page == page]
        printed = ""
        for block in own:
            if block in FLOWS and block.file:
                spec = served(block, self._folder, self._ports)
                (self._folder / block.file).write_text(yaml.safe_dump(spec))
            elif block.file:
                (self._folder / block.file).write_text(self._here(block.text))
            elif block.language == "bash" and SERVES.search(block.text):
                self._serve(self._here(block.text), block)
            elif block.language == "bash":
                printed += self._run(["bash", "-ec", self._here(block.text)], str(block))
        python = "\n".join(b.text for b in own if b.language == "python" and not b.file)
        return printed + self._run([sys.executable, "-c", self._here(python)], name(page))

    def close(self) -> None:
        if self._server is not None:
            self._server.stop()

    def _here(self, text: str) -> str:
        """The text of a block, with what this machine has instead of what it names."""
        for documented, port in zip((51000, 51001, 51002), self._ports, strict=True):
            text = text.replace(str(documented), str(port))
        return MODELS.sub("embedded", text).replace("https://example.com", self._web)

    def _provide_flows(self) -> None:
        """The built-in flows on this session's ports."""
        for built_in in (ROOT / "flows").glob("*.yml"):
            (self._folder / built_in.name).write_text(self._here(built_in.read_text()))

    def _serve(self, command: str, block: Block) -> None:
        self.close()
        log = self._folder / "server.log"
        with log.open("wb") as output:
            process = popen(
                ["bash", "-c", command],
                cwd=self._folder,
                env=self._environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._server = Server(process, log, self._ports)
        try:
            self._server.wait_until_ready()
        except AssertionError as error:
            raise AssertionError(f"{block}: {error}") from None

    def _run(self, command: list[str], what: str) -> str:
        done = subprocess.run(
            command,
            cwd=self._folder,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        output = done.stdout + done.stderr
        assert done.returncode == 0, f"{what}\n{command[-1]}\n{output}"
        assert "Traceback" not in output, f"{what}\n{output}"
        return done.stdout


def material(folder: Path) -> None:
    """The files that the pages speak of."""
    (folder / "clip_server").symlink_to(ROOT / "clip_server")
    (folder / "texts.txt").write_text("a cat\na dog\n")
    shutil.copy(ROOT / "clip_client" / "proto" / "clip.proto", folder)
    for name in ("cat", "dog"):
        picture = (SAMPLES / f"{name}.png").read_bytes()
        (folder / f"{name}.jpg").write_bytes(picture)
        for subfolder in (f"images/{name}", "photos"):
            (folder / subfolder).mkdir(parents=True, exist_ok=True)
            (folder / subfolder / f"{name}.jpg").write_bytes(picture)


@pytest.fixture
def follow(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[[Path], str]]:
    sessions = []

    def follow_page(page: Path) -> str:
        for tool in TOOLS:
            if re.search(rf"^{tool} ", commands(page), re.MULTILINE) and not shutil.which(tool):
                pytest.skip(f"there is no {tool}")
        starts = SERVES.search(commands(page))
        server = None if starts else request.getfixturevalue("onnx_server")
        session = Session(tmp_path, server.ports if server else free_ports(3), web)
        sessions.append(session)
        return session.follow(page)

    material(tmp_path)
    handler = functools.partial(QuietHandler, directory=str(tmp_path))
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    web = f"http://127.0.0.1:{httpd.server_port}"
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield follow_page
    for session in sessions:
        session.close()
    httpd.shutdown()
    httpd.server_close()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def pages_to_follow() -> Iterator[Any]:
    for page in PAGES:
        if any(b.page == page and b.language in ("bash", "python") for b in RUN):
            marks = [pytest.mark.slow] if is_slow(page) else []
            yield pytest.param(page, marks=marks, id=name(page))


@pytest.mark.parametrize("page", list(pages_to_follow()))
def test_page(page: Path, follow: Callable[[Path], str]) -> None:
    printed = follow(page)
    for shown in SHOWN.get(name(page), ()):
        assert shown in printed


@pytest.mark.slow
@pytest.mark.parametrize("block", [b for b in FLOWS if not b.file], ids=str)
def test_flow_starts(block: Block, tmp_path: Path, start: Start) -> None:
    server = start(served(block, tmp_path, free_ports(3)))
    with Client(server.grpc) as client:
        assert client.encode(["a cat"]).shape == (1, 256)
    server.stop()


def test_the_two_commands_come_first() -> None:
    assert next(blocks(README)).text.split()[:4] == ["make", "serve", "make", "test"]
    makefile = (ROOT / "Makefile").read_text()
    for target in ("serve", "test", "lint"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def prose(page: Path) -> str:
    """A page without its code."""
    return re.sub(r"^```.*?^```|`[^`\n]+`", "", page.read_text("utf-8"), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ +(.+?) *$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}


@pytest.mark.parametrize("page", [*PAGES, CHANGELOG], ids=name)
def test_links(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name(page)} links to {link}"
        if anchor:
            assert anchor in anchors(target), f"{name(page)} links to {link}"


def test_readme_links_to_every_page() -> None:
    links = set(re.findall(r"\]\(([\w/-]+\.md)\)", prose(README)))
    assert {name(page) for page in [*PAGES, CHANGELOG] if page != README} <= links
