# mypy: disable-error-code="type-arg"
from google.protobuf import struct_pb2 as _struct_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Target(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BOTH: _ClassVar[Target]
    TEXTS: _ClassVar[Target]
    IMAGES: _ClassVar[Target]
BOTH: Target
TEXTS: Target
IMAGES: Target

class Item(_message.Message):
    __slots__ = ("text", "image", "uri", "id", "tags", "source")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    URI_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    text: str
    image: bytes
    uri: str
    id: str
    tags: _struct_pb2.Struct
    source: str
    def __init__(self, text: _Optional[str] = ..., image: _Optional[bytes] = ..., uri: _Optional[str] = ..., id: _Optional[str] = ..., tags: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., source: _Optional[str] = ...) -> None: ...

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
    __slots__ = ("embeddings", "count", "dim", "errors", "timings", "truncated", "tokens", "truncated_items")
    EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    DIM_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_ITEMS_FIELD_NUMBER: _ClassVar[int]
    embeddings: bytes
    count: int
    dim: int
    errors: _containers.RepeatedCompositeFieldContainer[ItemError]
    timings: Timings
    truncated: int
    tokens: int
    truncated_items: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, embeddings: _Optional[bytes] = ..., count: _Optional[int] = ..., dim: _Optional[int] = ..., errors: _Optional[_Iterable[_Union[ItemError, _Mapping]]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., truncated: _Optional[int] = ..., tokens: _Optional[int] = ..., truncated_items: _Optional[_Iterable[int]] = ...) -> None: ...

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
    __slots__ = ("total", "preprocess", "inference", "queue", "gateway", "search")
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    PREPROCESS_FIELD_NUMBER: _ClassVar[int]
    INFERENCE_FIELD_NUMBER: _ClassVar[int]
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_FIELD_NUMBER: _ClassVar[int]
    SEARCH_FIELD_NUMBER: _ClassVar[int]
    total: float
    preprocess: float
    inference: float
    queue: float
    gateway: float
    search: float
    def __init__(self, total: _Optional[float] = ..., preprocess: _Optional[float] = ..., inference: _Optional[float] = ..., queue: _Optional[float] = ..., gateway: _Optional[float] = ..., search: _Optional[float] = ...) -> None: ...

class InfoRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class InfoResponse(_message.Message):
    __slots__ = ("model", "runtime", "device", "dtype", "dim", "image_size", "context_length", "logit_scale", "version", "max_item_bytes", "max_request_bytes", "max_request_items", "collection", "modality", "access_paths", "aliases", "matryoshka_dimensions", "model_names", "logit_bias")
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
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    MODALITY_FIELD_NUMBER: _ClassVar[int]
    ACCESS_PATHS_FIELD_NUMBER: _ClassVar[int]
    ALIASES_FIELD_NUMBER: _ClassVar[int]
    MATRYOSHKA_DIMENSIONS_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAMES_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
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
    collection: Collection
    modality: str
    access_paths: str
    aliases: _containers.RepeatedScalarFieldContainer[str]
    matryoshka_dimensions: _containers.RepeatedScalarFieldContainer[int]
    model_names: _containers.RepeatedScalarFieldContainer[str]
    logit_bias: float
    def __init__(self, model: _Optional[str] = ..., runtime: _Optional[str] = ..., device: _Optional[str] = ..., dtype: _Optional[str] = ..., dim: _Optional[int] = ..., image_size: _Optional[int] = ..., context_length: _Optional[int] = ..., logit_scale: _Optional[float] = ..., version: _Optional[str] = ..., max_item_bytes: _Optional[int] = ..., max_request_bytes: _Optional[int] = ..., max_request_items: _Optional[int] = ..., collection: _Optional[_Union[Collection, _Mapping]] = ..., modality: _Optional[str] = ..., access_paths: _Optional[str] = ..., aliases: _Optional[_Iterable[str]] = ..., matryoshka_dimensions: _Optional[_Iterable[int]] = ..., model_names: _Optional[_Iterable[str]] = ..., logit_bias: _Optional[float] = ...) -> None: ...

class MetricsRequest(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: bool
    def __init__(self, text: bool = ...) -> None: ...

class MetricsResponse(_message.Message):
    __slots__ = ("text", "counts")
    class CountsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    TEXT_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    text: str
    counts: _containers.ScalarMap[str, float]
    def __init__(self, text: _Optional[str] = ..., counts: _Optional[_Mapping[str, float]] = ...) -> None: ...

class Collection(_message.Message):
    __slots__ = ("engine", "rows", "indexed", "dim", "model", "metric", "index_method")
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    INDEXED_FIELD_NUMBER: _ClassVar[int]
    DIM_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    METRIC_FIELD_NUMBER: _ClassVar[int]
    INDEX_METHOD_FIELD_NUMBER: _ClassVar[int]
    engine: str
    rows: int
    indexed: int
    dim: int
    model: str
    metric: str
    index_method: str
    def __init__(self, engine: _Optional[str] = ..., rows: _Optional[int] = ..., indexed: _Optional[int] = ..., dim: _Optional[int] = ..., model: _Optional[str] = ..., metric: _Optional[str] = ..., index_method: _Optional[str] = ...) -> None: ...

class IndexRequest(_message.Message):
    __slots__ = ("items", "embeddings")
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[Item]
    embeddings: bytes
    def __init__(self, items: _Optional[_Iterable[_Union[Item, _Mapping]]] = ..., embeddings: _Optional[bytes] = ...) -> None: ...

class IndexResponse(_message.Message):
    __slots__ = ("ids", "errors", "timings", "truncated", "embeddings")
    IDS_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[str]
    errors: _containers.RepeatedCompositeFieldContainer[ItemError]
    timings: Timings
    truncated: int
    embeddings: bytes
    def __init__(self, ids: _Optional[_Iterable[str]] = ..., errors: _Optional[_Iterable[_Union[ItemError, _Mapping]]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., truncated: _Optional[int] = ..., embeddings: _Optional[bytes] = ...) -> None: ...

class SearchRequest(_message.Message):
    __slots__ = ("queries", "embeddings", "limit", "filter", "target", "score_threshold", "min_relevance")
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    FILTER_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    SCORE_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    MIN_RELEVANCE_FIELD_NUMBER: _ClassVar[int]
    queries: _containers.RepeatedCompositeFieldContainer[Item]
    embeddings: bytes
    limit: int
    filter: str
    target: Target
    score_threshold: float
    min_relevance: float
    def __init__(self, queries: _Optional[_Iterable[_Union[Item, _Mapping]]] = ..., embeddings: _Optional[bytes] = ..., limit: _Optional[int] = ..., filter: _Optional[str] = ..., target: _Optional[_Union[Target, str]] = ..., score_threshold: _Optional[float] = ..., min_relevance: _Optional[float] = ...) -> None: ...

class SearchResponse(_message.Message):
    __slots__ = ("results", "errors", "timings", "metric", "truncated")
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    METRIC_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[Hits]
    errors: _containers.RepeatedCompositeFieldContainer[ItemError]
    timings: Timings
    metric: str
    truncated: int
    def __init__(self, results: _Optional[_Iterable[_Union[Hits, _Mapping]]] = ..., errors: _Optional[_Iterable[_Union[ItemError, _Mapping]]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., metric: _Optional[str] = ..., truncated: _Optional[int] = ...) -> None: ...

class Hits(_message.Message):
    __slots__ = ("hits",)
    HITS_FIELD_NUMBER: _ClassVar[int]
    hits: _containers.RepeatedCompositeFieldContainer[Hit]
    def __init__(self, hits: _Optional[_Iterable[_Union[Hit, _Mapping]]] = ...) -> None: ...

class Hit(_message.Message):
    __slots__ = ("id", "score", "relevance", "text", "source", "tags", "is_image")
    ID_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    RELEVANCE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    IS_IMAGE_FIELD_NUMBER: _ClassVar[int]
    id: str
    score: float
    relevance: float
    text: str
    source: str
    tags: _struct_pb2.Struct
    is_image: bool
    def __init__(self, id: _Optional[str] = ..., score: _Optional[float] = ..., relevance: _Optional[float] = ..., text: _Optional[str] = ..., source: _Optional[str] = ..., tags: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., is_image: bool = ...) -> None: ...

class DeleteRequest(_message.Message):
    __slots__ = ("ids", "filter")
    IDS_FIELD_NUMBER: _ClassVar[int]
    FILTER_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[str]
    filter: str
    def __init__(self, ids: _Optional[_Iterable[str]] = ..., filter: _Optional[str] = ...) -> None: ...

class DeleteResponse(_message.Message):
    __slots__ = ("count",)
    COUNT_FIELD_NUMBER: _ClassVar[int]
    count: int
    def __init__(self, count: _Optional[int] = ...) -> None: ...

class CountRequest(_message.Message):
    __slots__ = ("filter", "target")
    FILTER_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    filter: str
    target: Target
    def __init__(self, filter: _Optional[str] = ..., target: _Optional[_Union[Target, str]] = ...) -> None: ...

class CountResponse(_message.Message):
    __slots__ = ("count",)
    COUNT_FIELD_NUMBER: _ClassVar[int]
    count: int
    def __init__(self, count: _Optional[int] = ...) -> None: ...

class OpenRequest(_message.Message):
    __slots__ = ("model", "dim", "precision", "probes")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DIM_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    PROBES_FIELD_NUMBER: _ClassVar[int]
    model: str
    dim: int
    precision: str
    probes: bytes
    def __init__(self, model: _Optional[str] = ..., dim: _Optional[int] = ..., precision: _Optional[str] = ..., probes: _Optional[bytes] = ...) -> None: ...

class OpenResponse(_message.Message):
    __slots__ = ("collection",)
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    collection: Collection
    def __init__(self, collection: _Optional[_Union[Collection, _Mapping]] = ...) -> None: ...

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
    __slots__ = ("id", "encode", "rank", "info", "cancel", "metrics", "index", "search", "delete", "count", "open", "timeout", "request_id", "traceparent")
    ID_FIELD_NUMBER: _ClassVar[int]
    ENCODE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    INFO_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    SEARCH_FIELD_NUMBER: _ClassVar[int]
    DELETE_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    id: int
    encode: EncodeRequest
    rank: RankRequest
    info: InfoRequest
    cancel: Cancel
    metrics: MetricsRequest
    index: IndexRequest
    search: SearchRequest
    delete: DeleteRequest
    count: CountRequest
    open: OpenRequest
    timeout: int
    request_id: str
    traceparent: str
    def __init__(self, id: _Optional[int] = ..., encode: _Optional[_Union[EncodeRequest, _Mapping]] = ..., rank: _Optional[_Union[RankRequest, _Mapping]] = ..., info: _Optional[_Union[InfoRequest, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., metrics: _Optional[_Union[MetricsRequest, _Mapping]] = ..., index: _Optional[_Union[IndexRequest, _Mapping]] = ..., search: _Optional[_Union[SearchRequest, _Mapping]] = ..., delete: _Optional[_Union[DeleteRequest, _Mapping]] = ..., count: _Optional[_Union[CountRequest, _Mapping]] = ..., open: _Optional[_Union[OpenRequest, _Mapping]] = ..., timeout: _Optional[int] = ..., request_id: _Optional[str] = ..., traceparent: _Optional[str] = ...) -> None: ...

class Response(_message.Message):
    __slots__ = ("id", "request_id", "encode", "rank", "info", "error", "metrics", "index", "search", "delete", "count", "open")
    ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ENCODE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    INFO_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    SEARCH_FIELD_NUMBER: _ClassVar[int]
    DELETE_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    id: int
    request_id: str
    encode: EncodeResponse
    rank: RankResponse
    info: InfoResponse
    error: Error
    metrics: MetricsResponse
    index: IndexResponse
    search: SearchResponse
    delete: DeleteResponse
    count: CountResponse
    open: OpenResponse
    def __init__(self, id: _Optional[int] = ..., request_id: _Optional[str] = ..., encode: _Optional[_Union[EncodeResponse, _Mapping]] = ..., rank: _Optional[_Union[RankResponse, _Mapping]] = ..., info: _Optional[_Union[InfoResponse, _Mapping]] = ..., error: _Optional[_Union[Error, _Mapping]] = ..., metrics: _Optional[_Union[MetricsResponse, _Mapping]] = ..., index: _Optional[_Union[IndexResponse, _Mapping]] = ..., search: _Optional[_Union[SearchResponse, _Mapping]] = ..., delete: _Optional[_Union[DeleteResponse, _Mapping]] = ..., count: _Optional[_Union[CountResponse, _Mapping]] = ..., open: _Optional[_Union[OpenResponse, _Mapping]] = ...) -> None: ...

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
