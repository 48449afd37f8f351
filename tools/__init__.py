"""Programs for those who work on the server; not installed with it."""
