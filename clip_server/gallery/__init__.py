"""The gallery command: collections built from files, by PaddleClas' configuration."""
