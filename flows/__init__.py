"""The flows that come with the server, as YAML files."""
