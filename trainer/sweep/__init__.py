"""Sweeps: W&B's own YAML, checked before the first trial, and run here without a server."""
