"""How much time and memory Lockstep adds to the leanest loop, and to whom else it compares. Run from the repository."""
