"""Data: the sets that a config can name, their transforms, and the loading of a plan's micro-batches."""
