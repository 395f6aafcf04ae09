"""A run, sent to Weights & Biases."""
