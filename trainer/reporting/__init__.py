"""What a run reports of itself: console, metrics.jsonl, figures, W&B."""
