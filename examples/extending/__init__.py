"""Four ways to add code of one's own to a run, each in a file. See docs/extending.md."""
