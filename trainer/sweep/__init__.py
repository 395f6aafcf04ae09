"""Sweeps in W&B's YAML: checked before the first trial, and run on this machine without a server."""
