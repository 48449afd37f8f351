"""Scheduling, batching and caching on one runtime: from the items of requests to embeddings."""
