"""Lockstep's `fit` beside the loops and trainers of others, on the same function."""
