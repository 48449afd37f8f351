"""CLIP as a microservice: texts and images to vectors."""

from importlib.metadata import version

__version__ = version("clip-server")
