"""What a run says of itself: console, metrics.jsonl, figures, W&B."""
