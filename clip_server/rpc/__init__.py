"""clip.v1 on the server: gRPC methods, and connections with many requests in flight."""
