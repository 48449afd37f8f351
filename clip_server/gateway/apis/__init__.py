"""The dialects of the HTTP port, one module each."""
