"""The Jina executors: each builds one runtime, `base` holds what they share."""
