"""Scripts that make the small CLIP shipped with the service (see README.md)."""
