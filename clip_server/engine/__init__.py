"""From the items of requests to embeddings: scheduling, batching, caching, on one runtime."""
