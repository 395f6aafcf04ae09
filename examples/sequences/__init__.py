"""Sequences of any length: a collate function that pads them, and an LSTM that takes two inputs by name."""
