"""Starting a server: a flow's YAML, its ports, and what every process sets up."""
