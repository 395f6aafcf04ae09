"""A run composed from its config: forward, metrics, evaluation."""
