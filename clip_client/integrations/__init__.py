"""The Client as the embedding model of other libraries, each imported only with its module."""
