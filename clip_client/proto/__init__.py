"""The public contract, `clip.proto`, and the module generated from it.

Generated with grpcio-tools 1.62.3, whose output runs on protobuf 4.25 and everything since:
`python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. clip_client/proto/clip.proto`, and
the first line of the .pyi, for mypy, by hand.
"""
