"""Evaluates a model on a person's own images, by runtime and precision.

`python -m clip_server.evaluate`; see docs/evaluate.md.
"""
