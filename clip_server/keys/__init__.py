"""Keys of the server's callers: the ring that is asked for each request, and the command that
makes entries."""
