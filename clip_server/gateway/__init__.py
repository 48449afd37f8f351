"""The gateway: one contract over gRPC, HTTP and WebSocket.

A flow's YAML file names this module in `py_modules` and `ClipGateway` in `uses`; the command
does so for every flow that names no gateway of its own.
"""

from clip_server.gateway.gateway import ClipGateway

__all__ = ["ClipGateway"]
