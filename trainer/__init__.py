"""Lockstep: the same training run on one GPU or many."""
