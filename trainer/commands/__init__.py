"""What `python -m trainer COMMAND …` runs: one file each, read when it is asked for."""
