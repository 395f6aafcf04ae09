"""The processes of a run: ranks, signals, parents, memory."""
