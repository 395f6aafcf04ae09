"""A config: its keys, how values are read and checked, files and overrides, names and secrets."""
