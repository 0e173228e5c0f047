"""Algorithms, one file each; see `rl list` and CONTRIBUTING.md. Nothing is imported here: the registry loads a file by name."""
