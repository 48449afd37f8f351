"""Shared by the command-line programs: output and options."""
