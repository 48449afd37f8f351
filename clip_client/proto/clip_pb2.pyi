# mypy: disable-error-code="type-arg"
from google.protobuf import struct_pb2 as _struct_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Item(_message.Message):
    __slots__ = ("text", "image", "uri", "id", "tags")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    URI_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    text: str
    image: bytes
    uri: str
    id: str
    tags: _struct_pb2.Struct
    def __init__(self, text: _Optional[str] = ..., image: _Optional[bytes] = ..., uri: _Optional[str] = ..., id: _Optional[str] = ..., tags: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ...) -> None: ...

class Options(_message.Message):
    __slots__ = ("normalize", "minibatch_size")
    NORMALIZE_FIELD_NUMBER: _ClassVar[int]
    MINIBATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    normalize: bool
    minibatch_size: int
    def __init__(self, normalize: bool = ..., minibatch_size: _Optional[int] = ...) -> None: ...

class EncodeRequest(_message.Message):
    __slots__ = ("items", "options", "model")
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[Item]
    options: Options
    model: str
    def __init__(self, items: _Optional[_Iterable[_Union[Item, _Mapping]]] = ..., options: _Optional[_Union[Options, _Mapping]] = ..., model: _Optional[str] = ...) -> None: ...

class EncodeResponse(_message.Message):
    __slots__ = ("embeddings", "count", "dim", "errors", "timings", "truncated")
    EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    DIM_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    embeddings: bytes
    count: int
    dim: int
    errors: _containers.RepeatedCompositeFieldContainer[ItemError]
    timings: Timings
    truncated: int
    def __init__(self, embeddings: _Optional[bytes] = ..., count: _Optional[int] = ..., dim: _Optional[int] = ..., errors: _Optional[_Iterable[_Union[ItemError, _Mapping]]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., truncated: _Optional[int] = ...) -> None: ...

class RankRequest(_message.Message):
    __slots__ = ("query", "candidates", "model")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    query: Item
    candidates: _containers.RepeatedCompositeFieldContainer[Item]
    model: str
    def __init__(self, query: _Optional[_Union[Item, _Mapping]] = ..., candidates: _Optional[_Iterable[_Union[Item, _Mapping]]] = ..., model: _Optional[str] = ...) -> None: ...

class RankResponse(_message.Message):
    __slots__ = ("matches", "errors", "timings")
    MATCHES_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    matches: _containers.RepeatedCompositeFieldContainer[Match]
    errors: _containers.RepeatedCompositeFieldContainer[ItemError]
    timings: Timings
    def __init__(self, matches: _Optional[_Iterable[_Union[Match, _Mapping]]] = ..., errors: _Optional[_Iterable[_Union[ItemError, _Mapping]]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ...) -> None: ...

class Match(_message.Message):
    __slots__ = ("index", "probability", "cosine")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    COSINE_FIELD_NUMBER: _ClassVar[int]
    index: int
    probability: float
    cosine: float
    def __init__(self, index: _Optional[int] = ..., probability: _Optional[float] = ..., cosine: _Optional[float] = ...) -> None: ...

class ItemError(_message.Message):
    __slots__ = ("index", "message")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    index: int
    message: str
    def __init__(self, index: _Optional[int] = ..., message: _Optional[str] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("total", "preprocess", "inference", "gateway")
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    PREPROCESS_FIELD_NUMBER: _ClassVar[int]
    INFERENCE_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_FIELD_NUMBER: _ClassVar[int]
    total: float
    preprocess: float
    inference: float
    gateway: float
    def __init__(self, total: _Optional[float] = ..., preprocess: _Optional[float] = ..., inference: _Optional[float] = ..., gateway: _Optional[float] = ...) -> None: ...

class InfoRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class InfoResponse(_message.Message):
    __slots__ = ("model", "runtime", "device", "dtype", "dim", "image_size", "context_length", "logit_scale", "version", "max_item_bytes", "max_request_bytes", "max_request_items")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    RUNTIME_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DIM_FIELD_NUMBER: _ClassVar[int]
    IMAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    LOGIT_SCALE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MAX_ITEM_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_REQUEST_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_REQUEST_ITEMS_FIELD_NUMBER: _ClassVar[int]
    model: str
    runtime: str
    device: str
    dtype: str
    dim: int
    image_size: int
    context_length: int
    logit_scale: float
    version: str
    max_item_bytes: int
    max_request_bytes: int
    max_request_items: int
    def __init__(self, model: _Optional[str] = ..., runtime: _Optional[str] = ..., device: _Optional[str] = ..., dtype: _Optional[str] = ..., dim: _Optional[int] = ..., image_size: _Optional[int] = ..., context_length: _Optional[int] = ..., logit_scale: _Optional[float] = ..., version: _Optional[str] = ..., max_item_bytes: _Optional[int] = ..., max_request_bytes: _Optional[int] = ..., max_request_items: _Optional[int] = ...) -> None: ...

class MetricsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class MetricsResponse(_message.Message):
    __slots__ = ("values",)
    class ValuesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.ScalarMap[str, float]
    def __init__(self, values: _Optional[_Mapping[str, float]] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("code", "message", "retry_after")
    class Code(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        UNKNOWN: _ClassVar[Error.Code]
        INVALID_ARGUMENT: _ClassVar[Error.Code]
        UNAUTHENTICATED: _ClassVar[Error.Code]
        RESOURCE_EXHAUSTED: _ClassVar[Error.Code]
        DEADLINE_EXCEEDED: _ClassVar[Error.Code]
        UNAVAILABLE: _ClassVar[Error.Code]
        INTERNAL: _ClassVar[Error.Code]
    UNKNOWN: Error.Code
    INVALID_ARGUMENT: Error.Code
    UNAUTHENTICATED: Error.Code
    RESOURCE_EXHAUSTED: Error.Code
    DEADLINE_EXCEEDED: Error.Code
    UNAVAILABLE: Error.Code
    INTERNAL: Error.Code
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_FIELD_NUMBER: _ClassVar[int]
    code: Error.Code
    message: str
    retry_after: int
    def __init__(self, code: _Optional[_Union[Error.Code, str]] = ..., message: _Optional[str] = ..., retry_after: _Optional[int] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Request(_message.Message):
    __slots__ = ("id", "encode", "rank", "info", "cancel", "metrics", "timeout")
    ID_FIELD_NUMBER: _ClassVar[int]
    ENCODE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    INFO_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    id: int
    encode: EncodeRequest
    rank: RankRequest
    info: InfoRequest
    cancel: Cancel
    metrics: MetricsRequest
    timeout: int
    def __init__(self, id: _Optional[int] = ..., encode: _Optional[_Union[EncodeRequest, _Mapping]] = ..., rank: _Optional[_Union[RankRequest, _Mapping]] = ..., info: _Optional[_Union[InfoRequest, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., metrics: _Optional[_Union[MetricsRequest, _Mapping]] = ..., timeout: _Optional[int] = ...) -> None: ...

class Response(_message.Message):
    __slots__ = ("id", "encode", "rank", "info", "error", "metrics")
    ID_FIELD_NUMBER: _ClassVar[int]
    ENCODE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    INFO_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    id: int
    encode: EncodeResponse
    rank: RankResponse
    info: InfoResponse
    error: Error
    metrics: MetricsResponse
    def __init__(self, id: _Optional[int] = ..., encode: _Optional[_Union[EncodeResponse, _Mapping]] = ..., rank: _Optional[_Union[RankResponse, _Mapping]] = ..., info: _Optional[_Union[InfoResponse, _Mapping]] = ..., error: _Optional[_Union[Error, _Mapping]] = ..., metrics: _Optional[_Union[MetricsResponse, _Mapping]] = ...) -> None: ...

class Requests(_message.Message):
    __slots__ = ("requests",)
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[Request]
    def __init__(self, requests: _Optional[_Iterable[_Union[Request, _Mapping]]] = ...) -> None: ...

class Responses(_message.Message):
    __slots__ = ("responses",)
    RESPONSES_FIELD_NUMBER: _ClassVar[int]
    responses: _containers.RepeatedCompositeFieldContainer[Response]
    def __init__(self, responses: _Optional[_Iterable[_Union[Response, _Mapping]]] = ...) -> None: ...
