"""How well a model does on a person's own pictures, by runtime and precision.

`python -m clip_server.evaluate`; see docs/evaluate.md.
"""
