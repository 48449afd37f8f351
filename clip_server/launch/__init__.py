"""Starts a server: reads a flow's YAML, checks ports, sets up and watches processes."""
