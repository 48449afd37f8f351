"""Bodies that no client should send, drawn from a seed: the same ones in each run."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

from clip_client.proto import clip_pb2 as pb

JSON, PROTOBUF = "application/json", "application/x-protobuf"
CONTENT_TYPES = [JSON] * 6 + ["", "text/plain", "application/json; charset=latin-1"]
# Each is JSON, or what some writers take for it.
ODD_VALUES = [
    *("null", "true", "false", "0", "-1", "1.5", "1e308", "1e999", "NaN", "-Infinity"),
    *("9" * 30, "9223372036854775808", "-9223372036854775809", "18446744073709551616"),
    *('""', '"a"', '" "', '"@c"', '"@r,cc"', '"/rank"', '"/index"', '"clip"', '"("'),
    *(r'"\ud83d"', r'"\ude00 x"', r'"\u0000"', '"\x00"', '"' + "x" * 3000 + '"'),
    *('"data:,a%20cat"', '"data:image/png;base64,AAAA"', '"https://example.org/a.png"'),
    *("[]", "{}", "[[]]", "[null]", '[1,"a",{}]', '{"a":null}', '{"":{}}', r'{"\ud800":1}'),
    *("[" * 150 + "]" * 150, '{"a":' * 120 + "1" + "}" * 120),
    *('{"docs":[{"text":"a"}]}', '{"value":1}'),
]
KEYS = [
    *("data", "parameters", "header", "docs", "execEndpoint", "exec_endpoint", "targetExecutor"),
    *("requestId", "request_id", "text", "uri", "blob", "image", "id", "tags", "source"),
    *("matches", "chunks", "scores", "embedding", "tensor", "error", "ids", "filter", "limit"),
    *("normalize", "minibatch_size", "drop_image_content", "encoding_format", "access_paths"),
    *("model_name", r"\ud800", ""),
]
ENTRY_KEYS = KEYS[9:21]
PARAMETERS = KEYS[23:31]


class Body(NamedTuple):
    """A body and how its content is said to be."""

    route: str
    content: bytes
    content_type: str


def odd_bodies(seed: int, count: int) -> Iterator[Body]:
    """Bodies for every route that takes any."""
    draw = _Draw(random.Random(seed))
    for _ in range(count):
        yield draw.protobuf() if draw.chance(0.3) else draw.json()


class _Draw:
    def __init__(self, source: random.Random) -> None:
        self._source = source
        self.chance = lambda part: source.random() < part

    def json(self) -> Body:
        routes = ["/encode", "/rank", "/post", "/post", "/index", "/search", "/delete", "/any"]
        content = self._body().encode("utf-8", "surrogatepass")
        if self.chance(0.15):
            content = self._mutated(content)
        return Body(self._one(routes), content, self._one(CONTENT_TYPES))

    def protobuf(self) -> Body:
        kind = self._one(["Encode", "Rank", "Index", "Search"])
        items = [self._item() for _ in range(self._source.randint(0, 4))]
        message: pb.EncodeRequest | pb.RankRequest | pb.IndexRequest | pb.SearchRequest
        if kind == "Encode":
            message = pb.EncodeRequest(items=items, model=self._one(["", "clip", "x"]))
            message.options.minibatch_size = self._one([0, 1, 2**32 - 1])
        elif kind == "Rank":
            message = pb.RankRequest(query=self._item(), candidates=items)
        elif kind == "Index":
            message = pb.IndexRequest(items=items, embeddings=bytes(self._one([0, 3, 4096])))
        else:
            message = pb.SearchRequest(queries=items, limit=self._one([0, 2**31]), filter="{")
        content = self._mutated(message.SerializeToString())
        return Body(f"/{kind.lower()}", content, PROTOBUF)

    def _one(self, values):  # type: ignore[no-untyped-def]
        return self._source.choice(values)

    def _body(self) -> str:
        if self.chance(0.1):
            return self._value()
        entries = ",".join(self._entry() for _ in range(self._source.randint(0, 4)))
        fields = {"data": f"[{entries}]" if self.chance(0.85) else self._value()}
        if self.chance(0.5):
            known = {self._one(PARAMETERS): self._value()}
            fields["parameters"] = self._value() if self.chance(0.4) else self._object(known)
        for name in ("execEndpoint", "targetExecutor", "header"):
            if self.chance(0.25):
                fields[name] = self._value()
        return self._object(fields) if self.chance(0.3) else _as_json(list(fields.items()))

    def _entry(self) -> str:
        if self.chance(0.3):
            return self._value()
        names = self._source.sample(ENTRY_KEYS, 2)
        return self._object({k: self._value() if self.chance(0.6) else '"a cat"' for k in names})

    def _object(self, known: dict[str, str], depth: int = 0) -> str:
        """With the known fields and others, some of them twice."""
        others = range(self._source.randint(0, 3))
        fields = [*known.items(), *((self._one(KEYS), self._value(depth + 1)) for _ in others)]
        self._source.shuffle(fields)
        return _as_json(fields)

    def _value(self, depth: int = 0) -> str:
        if depth > 3 or self.chance(0.6):
            return str(self._one(ODD_VALUES))
        if self.chance(0.4):
            return f"[{self._value(depth + 1)},{self._value(depth + 1)}]"
        return self._object({}, depth)

    def _item(self) -> pb.Item:
        item = pb.Item(id=self._one(["", "1"]))
        if self.chance(0.4):
            item.text = self._one(["a cat", "", " ", "x" * 2000])
        elif self.chance(0.5):
            item.uri = self._one(["data:,x", "file:///x", "data:image/png;base64,AAAA"])
        else:
            item.image = self._source.randbytes(20)
        if self.chance(0.4):
            item.tags.update({"a": self._one([1.0, float("nan"), "x", None])})
        return item

    def _mutated(self, content: bytes) -> bytes:
        changed = bytearray(content)
        for _ in range(self._source.randint(0, 3) if changed else 0):
            place, length = self._source.randrange(len(changed) + 1), self._source.randint(0, 4)
            changed[place : place + length] = self._source.randbytes(self._source.randint(0, 4))
        return bytes(changed)


def _as_json(fields: list[tuple[str, str]]) -> str:
    inside = ",".join(f'"{name}":{value}' for name, value in fields)
    return f"{{{inside}}}"
