"""Compares the embeddings of another server with ours: can an index of theirs be kept?

`python -m clip_server.compare`; see docs/evaluate.md.
"""
